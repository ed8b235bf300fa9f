"""From outcomes to judgements: what must be true, whether it is, and where it is not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from experiments.gauntlet.verdict.conduct import Named, Quiet, named, quiet
from experiments.gauntlet.verdict.outcomes import (
    ENOUGH,
    LEAST_GAP,
    WIDE_GAP,
    Closed,
    Record,
    Recovered,
    closed,
    closed_by_luck,
    family,
    label,
    recovered,
)
from experiments.gauntlet.verdict.searching import mean_ranks, searches

__all__ = ["Judgement", "judge"]

WITHIN = 0.01
"""What `free` may lose on average against the tuned flat rate."""


@dataclass(frozen=True)
class Judgement:
    """One demand, whether it is met (None: no runs), the numbers, and the cells that fail it."""

    demand: str
    holds: bool | None
    evidence: str
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        state = {True: "holds", False: "fails", None: "no runs"}[self.holds]
        return "\n".join([f"[{state}] {self.demand}", f"    {self.evidence}", *self.failures])


def judge(records: Sequence[Record]) -> Iterator[Judgement]:
    """All demands that these records can answer."""
    yield _starved(closed(records), closed_by_luck(records))
    runs = quiet(records)
    for kind in ("healthy", "pretrained"):
        yield _silent(kind, [q for q in runs if family(q.record) == kind])
    findings = named(records)
    for kind in ("starved", "all-starved", "hot", "collapse", "beyond"):
        yield _names(kind, [f for f in findings if f.family == kind])
    yield _names("every family together", findings)
    yield _recovers(recovered(records))
    yield _searches(records)


def _starved(cells: list[Closed], lucky: list[Closed]) -> Judgement:
    demand = "starved: at least 95 % of the cells close at least 90 % of the gap"
    if not cells:
        return Judgement(demand, None, "")
    good = sum(c.passed for c in cells)
    gaps = [c for c in cells if c.there]
    real = sum(c.passed for c in gaps)
    evidence = (
        f"{good} of {len(cells)} cells ({good / len(cells):.1%}); of the {len(gaps)} in which "
        f"fixed rates lose at least {LEAST_GAP:.0%}, {real}"
    )
    if gaps:
        evidence += (
            f" ({real / len(gaps):.1%}); mean gap {np.mean([c.flat - c.fixed for c in gaps]):.3f}, "
            f"mean left {np.mean([c.flat - c.repaired for c in gaps]):+.3f}"
        )
    if wide := [c for c in gaps if c.flat - c.fixed >= WIDE_GAP]:
        evidence += (
            f"; of the {len(wide)} in which they lose at least {WIDE_GAP:.0%}, "
            f"{sum(c.passed for c in wide)}"
        )
    if drawn := [c for c in cells if c.profile.startswith("random-")]:
        evidence += f"; of the {len(drawn)} random profiles, {sum(c.passed for c in drawn)}"
    if lucky:
        evidence += (
            f"; flat rates with other seeds, scored in place of repair, pass in "
            f"{sum(c.passed for c in lucky)} of {len(lucky)}"
        )
        if drawn := [c for c in lucky if c.profile.startswith("random-")]:
            evidence += f", of the random profiles in {sum(c.passed for c in drawn)}"
    failed = [c for c in cells if not c.passed]
    if failed:
        sure = sum(c.gap.high is not None and c.gap.high < ENOUGH for c in failed)
        evidence += f"; in {sure} of the {len(failed)} that fail the interval ends below 90 %"
    failed.sort(key=lambda c: c.gap.fraction if c.there else math.inf)
    return Judgement(demand, good >= 0.95 * len(cells), evidence, [f"    {c}" for c in failed])


def _silent(kind: str, runs: list[Quiet]) -> Judgement:
    demand = f"{kind}: no action, bit for bit, and no alarm"
    loud = [q for q in runs if not q.silent]
    paired = sum(q.paired for q in runs)
    acted = sum(q.acted or q.changed for q in runs)
    evidence = (
        f"{len(runs) - len(loud)} of {len(runs)} runs, {paired} with a fixed run beside them; "
        f"action in {acted}, an alarm in {sum(q.alarmed for q in runs)}"
    )
    holds = None if not runs else False if loud else True if paired else None
    return Judgement(demand, holds, evidence if runs else "", [f"    {q}" for q in loud])


def _names(kind: str, findings: list[Named]) -> Judgement:
    demand = f"{kind}: named rightly within 40 steps in at least 98 % of the ill runs"
    ill = [f for f in findings if f.ill]
    if not ill:
        return Judgement(demand, None, "")
    good = sum(f.rightly for f in ill)
    wrong = sum(bool(f.wrong) for f in findings)
    evidence = (
        f"{good} of {len(ill)} ({good / len(ill):.1%}); "
        f"{wrong} of {len(findings)} were also given a name that does not fit"
    )
    lines = [
        f"    {label(f.record)}: not named {', '.join(f.missing)}; named {f.record['named']}"
        for f in ill
        if not f.rightly
    ]
    return Judgement(demand, good >= 0.98 * len(ill), evidence, lines)


def _recovers(cells: list[Recovered]) -> Judgement:
    demand = "collapse: with recover=True at least 90 % of the cells end within 2 points"
    if not cells:
        return Judgement(demand, None, "")
    good = sum(c.passed for c in cells)
    evidence = f"{good} of {len(cells)} cells ({good / len(cells):.1%})"
    failures = [f"    {c}" for c in cells if not c.passed]
    return Judgement(demand, good >= 0.9 * len(cells), evidence, failures)


def _searches(records: Sequence[Record]) -> Judgement:
    demand = "free: on average within 1 point of the tuned flat rate, and ranked above every rival"
    cells = searches(records)
    if not cells:
        return Judgement(demand, None, "")
    lost = float(np.mean([c.lost for c in cells]))
    near = sum(c.lost <= WITHIN for c in cells)
    ranks = mean_ranks(records)
    order = ", ".join(f"{n} {r:.2f}" for n, r in sorted(ranks.items(), key=lambda i: i[1]))
    best = all(ranks["free"] < r for n, r in ranks.items() if n != "free") if ranks else None
    evidence = (
        f"mean accuracy {-lost:+.4f} against flat over {len(cells)} cells, {near} of them within "
        f"{WITHIN:.0%}; mean ranks: {order or 'no rivals'}"
    )
    worst = sorted((c for c in cells if c.lost > WITHIN), key=lambda c: -c.lost)
    holds = lost <= WITHIN and best if best is not None else (None if lost <= WITHIN else False)
    return Judgement(demand, holds, evidence, [f"    {c}" for c in worst])
