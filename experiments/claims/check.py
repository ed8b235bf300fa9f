"""What the README claims, each claim checked against finished runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.report.comparison import Estimate, gap_closed, paired_difference
from experiments.train.runs import Run, find_runs

__all__ = ["Claim", "claims"]

CHANCE = 0.2  # accuracy that ten classes can reach without learning anything
WITHIN = 0.02
Runs = dict[tuple[str, str], dict[int, Run]]


@dataclass(frozen=True)
class Claim:
    """One sentence, whether it holds (None: the runs are not there), and the numbers."""

    text: str
    holds: bool | None
    evidence: str

    def __str__(self) -> str:
        state = {True: "holds", False: "fails", None: "no runs"}[self.holds]
        return f"[{state}] {self.text}\n    {self.evidence}"


def claims(folder: Path) -> Iterator[Claim]:
    """All claims, checked against the runs below ``folder``."""
    repair, free, warmup = (_by_arm(folder / part) for part in ("repair", "free", "warmup"))
    for optimizer in ("sgd", "adamw"):
        yield _gap(optimizer, repair)
    for optimizer in ("sgd", "adam", "adamw"):
        yield _identical(optimizer, repair)
    for optimizer in ("sgd", "adam"):
        yield _near_flat("free", optimizer, repair, free)
    for optimizer in ("sgd", "adam"):
        yield _near_flat("warmup", optimizer, repair, warmup)
        yield _survives(optimizer, warmup)
    yield _named(repair)
    yield _silent(repair)


def _by_arm(folder: Path) -> Runs:
    table: Runs = {}
    for run in find_runs([folder]) if folder.is_dir() else []:
        if run.status in ("done", "diverged") and run.seed is not None:
            table.setdefault((run.optimizer, run.arm), {})[run.seed] = run
    return table


def _paired(*arms: dict[int, Run]) -> tuple[list[int], list[list[float]]]:
    """The seeds that all arms share, and each arm's accuracies in their order."""
    seeds = sorted(set.intersection(*(set(arm) for arm in arms)))
    return seeds, [[arm[s].final["accuracy"] or 0.0 for s in seeds] for arm in arms]


def _interval(difference: Estimate) -> str:
    if difference.low is None or difference.high is None:
        return f"{difference.effect:+.4f} (n={difference.n}, no interval)"
    between = f"{difference.low:+.4f} to {difference.high:+.4f}"
    return f"{difference.effect:+.4f} (95 % {between}, n={difference.n})"


def _gap(optimizer: str, runs: Runs) -> Claim:
    text = f"{optimizer}, geometric 1e-3: repair closes at least 90 % of the mean gap to flat"
    arms = [runs.get((optimizer, a), {}) for a in ("geometric/repair", "geometric/fixed")]
    seeds, (controlled, fixed, flat) = _paired(*arms, runs.get((optimizer, "flat/fixed"), {}))
    if not seeds:
        return Claim(text, None, "run make claims")
    gap = gap_closed(controlled, fixed, flat)
    difference = paired_difference(controlled, fixed)
    interval = "unbounded" if gap.low is None else f"{gap.low:.0%} to {gap.high:.0%}"
    return Claim(
        text,
        gap.fraction >= 0.9,
        f"closed {gap.fraction:.0%} (95 % {interval}); accuracy fixed "
        f"{np.mean(fixed):.4f}, repair {np.mean(controlled):.4f}, flat {np.mean(flat):.4f}; "
        f"repair − fixed {_interval(difference)}",
    )


def _identical(optimizer: str, runs: Runs) -> Claim:
    text = f"{optimizer}, flat: repair leaves every parameter identical, bit for bit"
    arms = [runs.get((optimizer, a), {}) for a in ("flat/repair", "flat/fixed")]
    seeds = sorted(set(arms[0]) & set(arms[1]))
    if not seeds:
        return Claim(text, None, "run make claims")
    same = sum(arms[0][s].hashes["final"] == arms[1][s].hashes["final"] for s in seeds)
    return Claim(text, same == len(seeds), f"identical in {same} of {len(seeds)} seeds")


def _near_flat(mode: str, optimizer: str, reference: Runs, runs: Runs) -> Claim:
    found = runs.get((optimizer, f"flat/{mode}"), {})
    rate = next(iter(found.values())).config["optimizer"]["lr"] if found else None
    text = f"{optimizer}, {mode} from rate {rate}: within 2 points of flat at its good rate"
    seeds, (ours, flat) = _paired(found, reference.get((optimizer, "flat/fixed"), {}))
    if not seeds:
        return Claim(text, None, "run make claims")
    difference = paired_difference(ours, flat)
    return Claim(
        text,
        difference.effect >= -WITHIN,
        f"{mode} {np.mean(ours):.4f}, flat {np.mean(flat):.4f}, difference {_interval(difference)}",
    )


def _survives(optimizer: str, runs: Runs) -> Claim:
    text = f"{optimizer}, rate 100 times too high: fixed ends in NaN or at chance, warmup does not"
    arms = [runs.get((optimizer, a), {}) for a in ("flat/warmup", "flat/fixed")]
    seeds, (ours, fixed) = _paired(*arms)
    if not seeds:
        return Claim(text, None, "run make claims")
    lost = [
        arms[1][s].status == "diverged" or a < CHANCE for s, a in zip(seeds, fixed, strict=True)
    ]
    kept = [arms[0][s].status == "done" and a > CHANCE for s, a in zip(seeds, ours, strict=True)]
    return Claim(
        text,
        all(lost) and all(kept),
        f"fixed lost in {sum(lost)} of {len(seeds)} seeds (accuracies "
        f"{', '.join(f'{a:.3f}' for a in fixed)}); warmup kept in {sum(kept)} "
        f"({', '.join(f'{a:.3f}' for a in ours)})",
    )


def _named(runs: Runs) -> Claim:
    text = "geometric, repair: conv1 is named as starved within 40 steps"
    found = [
        r for (_, arm), seeds in runs.items() if arm == "geometric/repair" for r in seeds.values()
    ]
    if not found:
        return Claim(text, None, "run make claims")
    named = [
        [d for d in r.diagnoses if (d["stage"], d["kind"]) == ("conv1", "starved")] for r in found
    ]
    right = sum(any(d["since_step"] <= 40 for d in own) for own in named)
    example = next((own[0]["text"] for own in named if own), "never named")
    return Claim(text, right == len(found), f"{right} of {len(found)} runs; “{example}”")


def _silent(runs: Runs) -> Claim:
    text = "flat, repair: nothing is diagnosed"
    found = [r for (_, arm), seeds in runs.items() if arm == "flat/repair" for r in seeds.values()]
    if not found:
        return Claim(text, None, "run make claims")
    alarms = [d["text"] for r in found for d in r.diagnoses]
    return Claim(text, not alarms, f"{len(alarms)} diagnoses in {len(found)} runs {alarms[:1]}")
