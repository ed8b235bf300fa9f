"""Runs at other learning rates than the compared one: was the fixed rate tuned, and does it matter?

A comparison rests on one rate, and one ratio of a profile. Runs at other ones show how wrong a
rate may be, and runs on tuning seeds how the fixed rate was chosen. Rates count in decades.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.report.comparison.declaration import Study
from experiments.train.runs import Run

__all__ = ["Point", "Tuning", "by_rate", "by_ratio", "settle", "tuning", "untuned", "width"]

_WORST = {"accuracy": 0.0, "macro_f1": 0.0}  # what a run without a value counts as


@dataclass(frozen=True)
class Point:
    """The runs of one arm at one rate (or ratio).

    Attributes:
        at: the rate.
        mean, low, high: of the metric over the runs.
        n: runs.
        diverged: of these.
        seeds: of the runs.
    """

    at: float
    mean: float
    low: float
    high: float
    n: int
    diverged: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Tuning:
    """How the rate of a fixed arm was chosen.

    Attributes:
        arm: the arm.
        points: its runs on tuning seeds, by rate.
        best: the rate of the best mean.
        used: the rate compared.
        edge: the best rate is the grid's smallest or largest, so a better one may lie beyond.
    """

    arm: str
    points: list[Point]
    best: float
    used: float | None
    edge: bool


def settle(runs: Sequence[Run], study: Study) -> tuple[list[Run], list[Run]]:
    """The runs that are compared, and those at other rates or ratios or on tuning seeds.

    Compared is the rate at which the declared arms have most outcomes (the smallest of equals),
    and of each profile the ratio likewise. A run whose rate is unknown stays with the compared.
    """
    declared = {study.baseline, study.treated, study.reference, study.harmless} - {None}
    judged = [r for r in runs if r.seed not in study.tuning_seeds]
    voters = [r for r in judged if r.counts and r.arm in declared]
    rate = _most([r.rate for r in voters or judged])
    here = [r for r in judged if r.rate in (rate, None)]
    profiles = {r.arm.split("/")[0] for r in here}
    ratios = {p: _most([r.ratio for r in here if r.arm.split("/")[0] == p]) for p in profiles}
    kept = [r for r in here if r.ratio in (ratios[r.arm.split("/")[0]], None)]
    chosen = {id(r) for r in kept}
    return kept, [r for r in runs if id(r) not in chosen]


def untuned(runs: Sequence[Run], study: Study) -> list[Run]:
    """The runs without those on tuning seeds, where an arm has others at the same setting."""
    judged = {(r.arm, r.rate, r.ratio) for r in runs if r.seed not in study.tuning_seeds}
    return [
        r
        for r in runs
        if r.seed not in study.tuning_seeds or (r.arm, r.rate, r.ratio) not in judged
    ]


def by_rate(runs: Sequence[Run], metric: str) -> dict[str, list[Point]]:
    """Every arm against the learning rate, each at its most frequent ratio."""
    kept = []
    for arm in sorted({r.arm for r in runs if r.arm}):
        own = [r for r in runs if r.arm == arm]
        ratio = _most([r.ratio for r in own])
        kept += [r for r in own if r.ratio == ratio]
    return _points(kept, lambda run: run.rate, metric)


def by_ratio(runs: Sequence[Run], metric: str, rate: float | None) -> dict[str, list[Point]]:
    """Every arm against the ratio of its profile, at one rate."""
    return _points([r for r in runs if r.rate == rate], lambda run: run.ratio, metric)


def tuning(runs: Sequence[Run], study: Study, used: float | None, higher: bool) -> list[Tuning]:
    """How the rates of the fixed arms were chosen; none where no tuning seed was run."""
    kept = [r for r in runs if r.seed in study.tuning_seeds and r.arm.endswith("/fixed")]
    found = []
    for arm, points in by_rate(kept, study.primary).items():
        best = (max if higher else min)(points, key=lambda p: p.mean)
        edge = best.at in (points[0].at, points[-1].at)
        found.append(Tuning(arm, points, best.at, used, edge))
    return found


def width(points: Sequence[Point], best: float, within: float, higher: bool) -> tuple[float, bool]:
    """Decades of neighbouring rates that end near the best result, and whether the grid ends there.

    Args:
        points: of one arm, by rate.
        best: what counts as the best mean.
        within: how much worse a mean may be.
        higher: more is better.

    Returns:
        Decades between the first and last of the longest such stretch (NaN where there is none),
        and True where one of them is the grid's end, so that the true width may be larger.
    """
    good = [(p.mean >= best - within) if higher else (p.mean <= best + within) for p in points]
    longest, at_edge, start = math.nan, False, None
    for i, ok in enumerate([*good, False]):
        if ok and start is None:
            start = i
        if not ok and start is not None:
            decades = math.log10(points[i - 1].at / points[start].at)
            if not decades <= longest:
                longest, at_edge = decades, start == 0 or i == len(points)
            start = None
    return longest, at_edge


def _points(
    runs: Sequence[Run], axis: Callable[[Run], float | None], metric: str
) -> dict[str, list[Point]]:
    cells: dict[tuple[str, float], list[tuple[float, Run]]] = {}
    for run in runs:
        at, value = axis(run), run.metric(metric)
        if value is None and run.status == "diverged":
            value = _WORST.get(metric)
        if run.arm and run.counts and at is not None and at > 0 and value is not None:
            cells.setdefault((run.arm, at), []).append((value, run))
    table: dict[str, list[Point]] = {}
    for (arm, at), found in sorted(cells.items(), key=lambda cell: cell[0]):
        values = [value for value, _ in found]
        seeds = tuple(sorted({r.seed for _, r in found if r.seed is not None}))
        lost = sum(r.status == "diverged" for _, r in found)
        mean = float(np.mean(values))
        point = Point(at, mean, min(values), max(values), len(values), lost, seeds)
        table.setdefault(arm, []).append(point)
    return table


def _most(values: Sequence[float | None]) -> float | None:
    counts = Counter(v for v in values if v is not None)
    return max(counts, key=lambda v: (counts[v], -v)) if counts else None
