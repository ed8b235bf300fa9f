"""The report's line charts: stages over time, steps to target, and how wrong a rate may be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from densitylr import History
from experiments.report.comparison import Point, Reached
from experiments.report.page import ARM_COLOURS, Chart, Line, Mark, chart, stage_colours
from experiments.train.runs import Run

__all__ = ["anchor", "sensitivity", "stage_lines", "target_lines"]

Array = npt.NDArray[np.float64]


def anchor(optimizer: str, run: Run, number: int) -> str:
    """The id of a decision's row in the report."""
    words = f"decision {optimizer} {run.arm} {number}"
    return "".join(c if c.isalnum() else "-" for c in words)


def stage_lines(
    run: Run, optimizer: str, name: str, label: str, log: bool, level: float | None = None
) -> Chart | None:
    """One number of every stage over the steps of one run, its decisions marked.

    Args:
        run: a run with a history.
        optimizer: as the report calls it: part of the link from a mark to its row.
        name: ``"effective"`` for the learning rate in force, or a name `History.series` knows.
        label: what to call it, with its unit.
        log: logarithmic axis.
        level: height of a horizontal line to compare with.
    """
    history = run.history
    if history is None or not len(history):
        return None
    steps = history.steps.astype(np.float64)
    series = {stage: _series(run, history, stage, name) for stage in history.stages}
    colours = dict(zip(series, stage_colours(len(series)), strict=True))
    held = name in ("effective", "scale")  # in force until the next reading
    lines = [
        Line(stage, list(zip(steps, values, strict=True)), colours[stage], held=held)
        for stage, values in series.items()
    ]
    marks = [
        Mark(
            d.step,
            float(np.interp(d.step, steps, series[d.stage])),
            d.kind,
            f"step {d.step}, {d.stage}: {d.kind}; {d.reason}",
            colours[d.stage],
            f"#{anchor(optimizer, run, number)}",
        )
        for number, d in enumerate(history.decisions)
        if d.stage in series
    ]
    return chart(
        lines,
        marks,
        x="optimizer step",
        y=label,
        alt=f"{label} of {', '.join(series)} over the steps of {run.arm}, seed {run.seed}, "
        f"with {len(marks)} decisions marked, each a link to its row in the table below",
        caption=f"{label[:1].upper()}{label[1:]} by stage, {run.arm}, seed {run.seed}."
        + (" ▲ raised, ▼ lowered, ★ lift-off: point at a mark for its reason." if marks else ""),
        log_y=log,
        level=level,
    )


def target_lines(found: Sequence[Reached], arms: Sequence[str], target: str) -> Chart | None:
    """The share of runs that has reached the target, by step.

    Args:
        found: by arm.
        arms: all arms of the report, in the order of their colours.
        target: what it is, in words.
    """
    lines = [
        Line(
            f"{r.arm} ({len(r.steps)} of {r.n})",
            r.share,
            _colour(r.arm, arms),
            held=True,
            dashed=not r.arm.endswith("/fixed"),
        )
        for r in found
    ]
    return chart(
        lines,
        x="optimizer step",
        y="share of runs at the target",
        alt=f"Share of runs that reached {target}, by optimizer step: "
        + "; ".join(f"{r.arm} {len(r.steps)} of {r.n}" for r in found),
        caption=f"Share of runs that reached {target}, by step (Kaplan–Meier).",
    )


def sensitivity(
    arms: Mapping[str, Sequence[Point]],
    order: Sequence[str],
    x: str,
    y: str,
    used: float | None = None,
    rivals: Mapping[str, float] | None = None,
) -> Chart | None:
    """The final value of every arm against a setting, on a logarithmic axis.

    Args:
        arms: the points of each arm.
        order: all arms of the report, in the order of their colours.
        x, y: labels.
        used: the setting that is compared in the rest of the report.
        rivals: mean results of optimizers without the setting, drawn as levels.
    """
    lines, marks = [], []
    for arm, points in arms.items():
        colour = _colour(arm, order)
        lines.append(
            Line(
                arm,
                [(p.at, p.mean) for p in points],
                colour,
                dashed=not arm.endswith("/fixed"),
                spread=[(p.at, p.low, p.high) for p in points],
            )
        )
        for p in points:
            lost = f", {p.diverged} diverged" if p.diverged else ""
            here = ", compared in this report" if p.at == used else ""
            text = f"{arm} at {p.at:.3g}: {p.mean:.4f} (n = {p.n}, {p.low:.4f} to {p.high:.4f}"
            kind = "diverged" if p.diverged else "dot"
            marks.append(Mark(p.at, p.mean, kind, f"{text}{lost}){here}", colour))
    at = [p.at for points in arms.values() for p in points]
    for i, (name, value) in enumerate((rivals or {}).items()):
        colour = ARM_COLOURS[(len(arms) + i) % len(ARM_COLOURS)]
        lines.append(Line(f"{name} (no rate)", [(min(at), value), (max(at), value)], colour, True))
    if len(set(at)) < 2:
        return None
    decades = math.log10(max(at) / min(at))
    return chart(
        lines,
        marks,
        x=x,
        y=y,
        alt=f"{y} against {x} over {decades:.0f} decades for {', '.join(arms)}; the values are in "
        "the table beside it",
        caption=f"{y[:1].upper()}{y[1:]} against {x}: mean, band from the worst to the best seed; "
        "cross: some seeds diverged.",
        log_x=True,
    )


def _colour(arm: str, order: Sequence[str]) -> tuple[str, str]:
    return ARM_COLOURS[list(order).index(arm) % len(ARM_COLOURS)]


def _series(run: Run, history: History, stage: str, name: str) -> Array:
    if name != "effective":
        return np.asarray(history.series(stage, name), dtype=np.float64)
    rate, scale = history.series(stage, "rate"), history.series(stage, "scale")
    rate = np.where(np.isfinite(rate), rate, run.base_rates.get(stage, np.nan))
    return np.asarray(rate * np.where(np.isfinite(scale), scale, 1.0), dtype=np.float64)
