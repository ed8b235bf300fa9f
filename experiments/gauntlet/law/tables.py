"""The tables of ``docs/law.md`` and of the README, by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from densitylr import Repair
from experiments.gauntlet.cells import ABLATIONS
from experiments.gauntlet.law.committed import (
    DEVELOPED_ON,
    Record,
    by_cell,
    cell_of,
    markdown,
    marked,
    records_of,
)
from experiments.gauntlet.law.rival_tables import layerwise, schedules
from experiments.gauntlet.law.search_tables import (
    alignments,
    late_raises,
    lengths,
    ranks,
    rules,
    search,
    signals,
)
from experiments.gauntlet.verdict import SETTING, closed, family, flat_runs, group, judge

__all__ = ["README_TABLES", "TABLES", "compare"]

WITHOUT_NORM, WITH_NORM = ("mlp_deep", "cnn_plain", "gru"), ("cnn_bn", "mixer")
"""The networks that estimators were compared on."""


def gauntlet() -> str:
    """The demands and whether they are met, without the cells that fail."""
    lines = (line for j in judge(records_of("gauntlet")) for line in str(j).splitlines()[:2])
    return "```\n" + "\n".join(lines) + "\n```"


def verdict() -> str:
    return "```\n" + "\n".join(_short(j) for j in judge(records_of("gauntlet"))) + "\n```"


def _short(judgement: Any) -> str:
    """The judgement with its ten worst cells."""
    lines = str(judgement).splitlines()
    more = len(lines) - 12
    return "\n".join([*lines[:12], *([f"    and {more} more"] if more > 0 else [])])


def starved() -> str:
    """Share of the cells that pass, by network and optimizer."""
    cells = closed(records_of("gauntlet"))
    rows = []
    for net in dict.fromkeys(c.net for c in cells):
        own = [c for c in cells if c.net == net]
        row = [marked(net)]
        for optimizer in ("sgd", "adamw", "rmsprop"):
            some = [c for c in own if c.optimizer == optimizer]
            row.append(f"{sum(c.passed for c in some)}/{len(some)}")
        gaps = [c for c in own if c.there]
        lost = np.mean([c.flat - c.fixed for c in gaps]) if gaps else np.nan
        left = np.mean([c.flat - c.repaired for c in gaps]) if gaps else np.nan
        rows.append([*row, f"{lost:.3f}", f"{left:+.3f}"])
    head = ["network", "sgd", "adamw", "rmsprop", "lost by fixed rates", "left by repair"]
    return markdown(rows, head)


def hot() -> str:
    """What `repair` changes where one stage, which has the largest rate, is too hot."""
    middle = (r for r in records_of("gauntlet") if r["condition"].startswith("hot-middle"))
    rows = []
    for what, runs in by_cell(middle, lambda r: (r["condition"], r["optimizer"])).items():
        pairs = [(run["fixed"], run["repair"]) for run in runs if {"fixed", "repair"} <= {*run}]
        fixed, repaired = np.mean(pairs, 0)
        worst = min(ours - theirs for theirs, ours in pairs)
        numbers = f"{fixed:.3f}", f"{repaired:.3f}", f"{100 * worst:+.1f}"
        rows.append([*what, str(len(pairs)), *numbers])
    return markdown(rows, ["condition", "optimizer", "runs", "fixed", "repair", "worst, points"])


def modes() -> str:
    """Mean accuracies of every mode where rates are wrong, everywhere or in one stage."""
    wrong = ("all-starved", "hot")
    records = records_of("gauntlet")
    arms = ("fixed", "repair", "warmup", "free")
    flat = {
        key: np.mean([r["accuracy"] for (arm, _), r in own.items() if arm == "fixed"])
        for key, own in flat_runs(records).items()
    }
    rows = []
    for condition in dict.fromkeys(r["condition"] for r in records if family(r) in wrong):
        whole = [
            [flat[tuple(setting)], *(runs[arm, seed]["accuracy"] for arm in arms)]
            for (*setting, _), runs in group(
                (r for r in records if r["condition"] == condition), *SETTING, "condition"
            ).items()
            for seed in {seed for _, seed in runs}
            if all((arm, seed) in runs for arm in arms)
        ]
        if whole:
            means = [f"{mean:.3f}" for mean in np.mean(whole, 0)]
            rows.append([condition, str(len(whole)), *means])
    return markdown(rows, ["condition", "runs", "good flat rate", *arms])


def sensitivity() -> str:
    return _by_arm(records_of("sensitivity"), lambda arm: arm.startswith("repair"))


def growth() -> str:
    """The growth of outputs at the largest rate in four steps."""
    rows = []
    kinds = {"": "good", "10": "ten times too high", "100": "a hundred times too high"}
    for hot, what in kinds.items():
        found = [
            r
            for r in records_of("heats")
            if (r["condition"].rsplit("-", 1)[-1] if family(r) == "hot" else "") == hot
        ]
        for label, nets in (("tuning networks", True), ("the other five", False)):
            own = [r["heat"] for r in found if (r["net"] in DEVELOPED_ON) == nets]
            times = [f"{factor:.3g}" for factor in np.exp(np.quantile(own, [0.1, 0.5, 0.9]))]
            above = f"{np.mean([value > Repair().growth_tolerance for value in own]):.0%}"
            rows.append([what, label, str(len(own)), *times, above])
    head = ["the largest rate", "networks", "runs", "10 %", "median", "90 %", "not trusted"]
    return markdown(rows, head)


def trust() -> str:
    """The effect of the constants of `repair` on trust in the largest rate."""
    records = records_of("trust")
    changes, rows = _changed_where_hot(records), []
    for arm in dict.fromkeys(r["arm"] for r in records if r["arm"] != "fixed"):
        cells = closed(records, arm)
        left = np.mean([c.flat - c.repaired for c in cells])
        row = [arm, f"{sum(c.passed for c in cells)}/{len(cells)}", f"{100 * left:+.1f}"]
        for some in (["10"], ["100", "1000"]):
            own = [c for condition, c in changes[arm] if condition.split("-")[-1] in some]
            row += [f"{100 * np.mean(own):+.1f}", f"{100 * min(own):+.1f}"]
        rows.append(row)
    head = ["arm", "starved: passed", "points left", "10 times too hot: points changed", "worst"]
    return markdown(rows, [*head, "100 or 1,000 times: points changed", "worst"])


def max_raises() -> str:
    """Mean accuracies by the largest raise of `repair` at one reading."""

    def what(r: Record) -> tuple[str, ...] | None:
        if family(r) == "hot":
            return "tuning networks", r["condition"]
        return (f"{r['net']}, {r['optimizer']}", "starved") if family(r) == "starved" else None

    arms = ("fixed", "16", "16, or as outputs tell", "any")
    rows = []
    for (nets, condition), runs in by_cell(records_of("leaps"), what).items():
        means = [f"{np.mean([run[arm] for run in runs]):.3f}" for arm in arms]
        rows.append([nets, condition, str(len(runs)), *means])
    head = ["fixed", "16", "16, or expected × near-zero outputs", "any"]
    return markdown(rows, ["networks", "condition", "runs", *head])


def corrections() -> str:
    """Mean accuracies under SGD, with momentum corrected at a raise and without."""
    kinds = {"healthy": "", "hot": "one stage hot", "starved": "starved"}
    found = by_cell(records_of("momentum"), lambda r: (kinds[family(r)], r["net"]))
    arms = ("fixed", "at once", "repair(momentum=0)", "repair")
    rows = []
    for (condition, net), runs in found.items():
        if condition:
            good = float(np.mean([run["fixed"] for run in found["", net]]))
            means = [float(np.mean([run[arm] for run in runs])) for arm in arms]
            worst = [min(run[arm] for run in runs) for arm in ("at once", "repair")]
            numbers = [f"{number:.3f}" for number in (good, *means, *worst)]
            rows.append([marked(net), condition, str(len(runs)), *numbers])
    head = ["fixed", "old steps at the new rate", "all steps count alike", "repair"]
    worst_head = ["worst: old steps at the new rate", "worst: repair"]
    return markdown(rows, ["network", "condition", "runs", "flat", *head, *worst_head])


def ablations() -> str:
    return _by_arm(records_of("ablations"), lambda arm: arm in ABLATIONS)


def estimator() -> str:
    """Starved cells that pass, and points left, with the twin and with the first reading."""
    records = records_of("estimator")
    rows = []
    for norms, nets in (("none", WITHOUT_NORM), ("batch or layer norm", WITH_NORM)):
        own = [r for r in records if r["net"] in nets]
        for batch in sorted({r["batch"] for r in own}):
            row = [norms, str(batch)]
            for arm in ("density", "first-probe"):
                cells = closed([r for r in own if r["batch"] == batch], arm)
                left = np.mean([c.flat - c.repaired for c in cells])
                row += [f"{sum(c.passed for c in cells)}/{len(cells)}", f"{100 * left:+.1f}"]
            rows.append(row)
    head = ["normalisation", "batch", "twin: passed", "left", "first reading: passed", "left"]
    return markdown(rows, head)


def _changed_where_hot(records: Sequence[Record]) -> dict[str, list[tuple[str, float]]]:
    """By arm: of each run with a hot stage its condition, and its accuracy less the fixed run's."""
    bare = {cell_of(r): r["accuracy"] for r in records if r["arm"] == "fixed"}
    changes: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for r in records:
        if family(r) == "hot" and r["arm"] != "fixed":
            changes[r["arm"]].append((r["condition"], r["accuracy"] - bare[cell_of(r)]))
    return changes


def compare(records: Sequence[Record], wanted: Callable[[str], bool]) -> dict[str, list[float]]:
    """By arm: share of starved cells that pass, mean accuracy left of the flat rate's, and mean
    change where one stage is hot.
    """
    changes = _changed_where_hot(records)
    found = {}
    for arm in dict.fromkeys(r["arm"] for r in records if wanted(r["arm"])):
        cells = closed(records, arm)
        left = [c.flat - c.repaired for c in cells]
        passed = [c.passed for c in cells]
        changed = [change for _, change in changes[arm]]
        found[arm] = [float(np.mean(x)) for x in (passed, left, changed)]
    return found


def _by_arm(records: Sequence[Record], wanted: Callable[[str], bool]) -> str:
    rows = [
        [arm, f"{passed:.0%}", f"{100 * left:+.1f}", f"{100 * change:+.1f}"]
        for arm, (passed, left, change) in compare(records, wanted).items()
    ]
    head = ["arm", "starved: passed", "starved: points left", "one stage hot: points changed"]
    return markdown(rows, head)


README_TABLES = {"gauntlet": gauntlet}
TABLES = {
    f.__name__: f
    for f in (
        *(verdict, starved, hot, modes, sensitivity, growth, trust, max_raises, corrections),
        *(estimator, ablations),
        *(layerwise, schedules, search, ranks, rules, signals, alignments, late_raises, lengths),
    )
}
