"""Whether the fixed rate was given its chance, and what a wrong one costs, for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.report.comparison import (
    HIGHER_IS_BETTER,
    LABELS,
    Bench,
    Point,
    Tuning,
    by_rate,
    by_ratio,
    tuning,
    untuned,
    width,
)
from experiments.report.sections.charts import sensitivity

__all__ = ["WITHIN", "Row", "fairness", "tuned_sentence", "width_words"]

WITHIN = {"accuracy": 0.02, "macro_f1": 0.02, "test_loss": 0.1}
"""How much worse than the best mean still counts as a usable rate."""


@dataclass(frozen=True)
class Row:
    """One arm against the learning rate: its points, and decades of usable rates."""

    arm: str
    points: Sequence[Point]
    decades: float
    edge: bool


def fairness(bench: Bench, arms: Sequence[str], rivals: Mapping[str, float]) -> dict[str, Any]:
    """What the report says of the choice of the rate.

    Args:
        bench: the runs of an optimizer.
        arms: all arms of the report, in the order of their colours.
        rivals: mean results on the same task of optimizers without a rate.
    """
    metric = bench.study.primary
    higher = metric in HIGHER_IS_BETTER
    label = LABELS[metric]
    runs = untuned(bench.every, bench.study)
    points = by_rate(runs, metric)
    means = [p.mean for own in points.values() for p in own]
    best = (max if higher else min)(means, default=math.nan)
    rates = sorted({p.at for own in points.values() for p in own})
    ratios = {
        arm: own
        for arm, own in by_ratio(runs, metric, bench.rate).items()
        if len({p.at for p in own}) > 1
    }
    return {
        "rates": rates,
        "best": best,
        "within": WITHIN[metric],
        "rows": [
            Row(a, own, *width(own, best, WITHIN[metric], higher)) for a, own in points.items()
        ]
        if len(rates) > 1
        else [],
        "chart": sensitivity(points, arms, "learning rate", f"final {label}", bench.rate, rivals)
        if len(rates) > 1
        else None,
        "ratio_chart": sensitivity(ratios, arms, "ratio of the profile", f"final {label}")
        if ratios
        else None,
        "rivals": dict(rivals),
        "tuning": tuning(bench.every, bench.study, bench.rate, higher),
        "overlap": sorted(set(bench.seeds) & set(bench.study.tuning_seeds)),
    }


def tuned_sentence(found: Tuning, metric: str) -> str:
    """How the rate of a fixed arm was chosen."""
    grid = ", ".join(f"{p.at:g}" for p in found.points)
    seeds = sorted({seed for p in found.points for seed in p.seeds})
    best = next(p for p in found.points if p.at == found.best)
    text = (
        f"{found.arm} was tried at {grid} on seeds {', '.join(map(str, seeds))}, which are in no "
        f"comparison; the best mean {metric} is {best.mean:.4f}, at {found.best:g}"
    )
    if found.edge:
        text += ", the end of the grid, so a better rate may lie beyond it"
    if found.used is None:
        return f"{text}."
    if found.used == found.best:
        return f"{text}. That is the rate compared."
    return f"{text}. Compared is {found.used:g}: not the rate that tuning favours."


def width_words(row: Row) -> str:
    """Decades of usable rates, in words."""
    if math.isnan(row.decades):
        return "no rate"
    if row.decades == 0:
        return "one rate" + (" (the grid ends there)" if row.edge else "")
    return ("at least " if row.edge else "") + f"{row.decades:.1f}"
