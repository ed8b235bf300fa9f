"""What the report says and shows of one optimizer, ready for the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from densitylr.history import LIFT_OFF
from densitylr.policy import MODES
from experiments.report.comparison import (
    LABELS,
    Bench,
    Contrast,
    Effect,
    Reached,
    discrepancies,
    reached,
    signed,
)
from experiments.report.page import Chart, Picture
from experiments.report.sections.charts import anchor, stage_lines, target_lines
from experiments.report.sections.fairness import fairness
from experiments.report.sections.figures import curve, heatmaps
from experiments.train.runs import Run

__all__ = ["gap_sentence", "reading", "same_sentence", "section"]

_SHOWN = 4  # controlled arms whose rates are drawn
_CURVES = (
    ("accuracy", "accuracy"),
    ("macro_f1", "macro-F1"),
    ("test_loss", "loss"),
    ("train_loss", "training loss"),
)


def section(bench: Bench, arms: Sequence[str], rivals: Mapping[str, float]) -> dict[str, Any]:
    """Everything the template shows of one optimizer.

    Args:
        bench: its runs.
        arms: all arms of the report, in the order of their colours.
        rivals: mean results on this task of optimizers that have no rate to choose.
    """
    contrasts = bench.contrasts()
    primary = bench.study.primary
    seeds = [
        {
            "seed": seed,
            "values": [(arm, bench.value(arm, seed, primary)) for arm in bench.arms],
            "difference": _difference(bench, contrasts, seed),
            "start": list(zip(bench.same_start(seed), _hashes(bench, seed), strict=True)),
        }
        for seed in bench.seeds
    ]
    by_arm = {a: [r for r in bench.runs if r.arm == a and r.counts] for a in bench.arms}
    curves = [
        picture
        for y, label in _CURVES
        for x in ("step", "seconds")
        if (picture := curve(by_arm, arms, x, y, label))
    ]
    watched = [_watch(run, bench) for run in _controlled(bench, contrasts)]
    seed = watched[0]["run"].seed if watched else next(iter(bench.seeds), None)
    return {
        "bench": bench,
        "contrasts": contrasts,
        "seeds": seeds,
        "curves": curves,
        "watched": watched,
        "diagnoses": [
            (arm, diagnosis)
            for arm in bench.arms
            if seed is not None and (run := bench.table.get((arm, seed)))
            for diagnosis in run.diagnoses
        ],
        "diagnosed_seed": seed,
        "heatmap": _heatmap(bench, contrasts),
        "targets": (targets := _targets(bench)),
        "target_chart": target_lines(targets, arms, f"accuracy {bench.target:.4f}")
        if targets and bench.target is not None
        else None,
        "fairness": fairness(bench, arms, rivals),
        "cost": _cost(bench),
        "discrepancies": discrepancies(list(bench.table.values())),
    }


def _hashes(bench: Bench, seed: int) -> tuple[str, str]:
    """The first digits of the seed's initial weights and batches, one for every different one."""
    runs = [run for arm in bench.arms if (run := bench.table.get((arm, seed)))]
    return tuple(  # type: ignore[return-value]
        " ".join(dict.fromkeys(h[:8] for run in runs if (h := run.hashes.get(kind))))
        for kind in ("initial", "batches")
    )


def _controlled(bench: Bench, contrasts: Sequence[Contrast]) -> list[Run]:
    """The runs whose rates are shown: of each controlled arm, the main one first, the first seed
    that has a history.
    """
    controlled = [arm for arm in bench.arms if not arm.endswith("/fixed")]
    found = []
    for arm in dict.fromkeys([*(contrast.treated for contrast in contrasts), *controlled]):
        own = (bench.table.get((arm, seed)) for seed in bench.seeds)
        if run := next((run for run in own if run is not None and run.readings), None):
            found.append(run)
    return found[:_SHOWN]


def _watch(run: Run, bench: Bench) -> dict[str, Any]:
    by_density = run.arm.rpartition("/")[2] in MODES
    wanted = (
        ("effective", "learning rate in force", True, None),
        ("scale", "factor on the user's rate", True, None),
        ("near_zero", "near-zero share of the outputs", False, None),
        (
            "displacement",
            "displacement |ln(z / z untrained)|",
            False,
            LIFT_OFF if by_density else None,
        ),
    )
    charts: list[Chart] = [c for w in wanted if (c := stage_lines(run, bench.optimizer, *w))]
    return {
        "run": run,
        "charts": charts,
        "decisions": [
            (anchor(bench.optimizer, run, number), decision)
            for number, decision in enumerate(run.history.decisions if run.history else [])
        ],
    }


def _targets(bench: Bench) -> list[Reached]:
    found = []
    for arm in bench.arms:
        outcomes = [
            (steps, late)
            for seed in bench.seeds
            if (run := bench.table.get((arm, seed)))
            for steps, late in [bench.steps_to_target(run)]
            if steps is not None
        ]
        if outcomes:
            found.append(reached(arm, outcomes))
    return found


def _heatmap(bench: Bench, contrasts: Sequence[Contrast]) -> Picture | None:
    first = contrasts[0] if contrasts else None
    names = (first.baseline, first.treated) if first else bench.arms[:2]
    arms = [a for a in dict.fromkeys((*names, bench.study.reference)) if a in bench.arms]

    def seen(seed: int) -> list[Run]:
        runs = [run for arm in arms if (run := bench.table.get((arm, seed)))]
        return [run for run in runs if run.readings]

    best = max(bench.seeds, key=lambda seed: len(seen(seed)), default=None)  # the first of equals
    return heatmaps(seen(best)) if best is not None else None


def _cost(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    for arm in bench.arms:
        seconds = {
            seed: run.train_seconds
            for seed in bench.seeds
            if (run := bench.table.get((arm, seed))) and math.isfinite(run.train_seconds)
        }
        fixed = arm.split("/")[0] + "/fixed"
        ratios = [
            seconds[seed] / run.train_seconds
            for seed in seconds
            if (run := bench.table.get((fixed, seed))) and run.train_seconds > 0
        ]
        values = list(seconds.values())
        rows.append(
            {
                "arm": arm,
                "n": len(values),
                "mean": sum(values) / len(values) if values else None,
                "least": min(values, default=None),
                "most": max(values, default=None),
                "fixed": fixed if arm != fixed and ratios else None,
                "ratio": math.exp(sum(map(math.log, ratios)) / len(ratios))
                if ratios and min(ratios) > 0
                else None,
            }
        )
    return rows


def _difference(bench: Bench, contrasts: Sequence[Contrast], seed: int) -> float | None:
    if not contrasts:
        return None
    arms = (contrasts[0].treated, contrasts[0].baseline)
    treated, baseline = (bench.value(arm, seed, bench.study.primary) for arm in arms)
    return None if treated is None or baseline is None else treated - baseline


def gap_sentence(contrast: Contrast, bench: Bench) -> str:
    """How much of the way from the baseline to the reference the treated arm went."""
    gap, metric = contrast.gap, LABELS[bench.study.primary]
    between = f"the gap in {metric} between {contrast.baseline} and {bench.study.reference}"
    if gap is None or gap.n == 0:
        return f"No seed has all three arms, so nothing can be said about {between}."
    if math.isnan(gap.fraction):
        return f"There is no share to give of {between}: it is 0 (n = {gap.n})."
    share = f"{contrast.treated} closed {signed(gap.fraction, 2).lstrip('+')} of {between}"
    if gap.n == 1:
        return f"{share} (n = 1 seed, no interval)."
    if not gap.bounded:
        return (
            f"Nothing firm can be said about {between}: over {gap.n} seeds it is not "
            f"distinguishable from 0 itself, so a share of it ({gap.fraction:.2f} by the means) "
            "has no bounded interval."
        )
    low, high = (signed(v or 0.0, 2).lstrip("+") for v in (gap.low, gap.high))
    return f"{share} (1 is all of it; 95 % Fieller interval {low} to {high}, n = {gap.n} seeds)."


def same_sentence(contrast: Contrast) -> str:
    """Whether the controller left training alone where nothing was wrong."""
    pair = f"{contrast.treated} and {contrast.baseline}"
    if contrast.compared == 0:
        return f"Whether {pair} end with the same weights is unknown: no seed has both hashes."
    seeds = "seed" if contrast.compared == 1 else "seeds"
    return (
        f"Final weights of {pair} are identical bit for bit in {contrast.same} of "
        f"{contrast.compared} {seeds}."
    )


def reading(effect: Effect, higher: Sequence[str]) -> str:
    """An effect in a few words."""
    if effect.difference.n < 2:
        return "no pair" if effect.difference.n == 0 else "one pair, no interval"
    if effect.difference.low == effect.difference.high == 0:
        return "equal in every seed"
    if not effect.difference.distinguishable:
        return "not distinguishable"
    return "better" if (effect.difference.effect > 0) == (effect.metric in higher) else "worse"
