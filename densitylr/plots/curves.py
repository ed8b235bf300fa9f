"""Curves over the steps: near-zero densities, rates and scales, with the decisions on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from densitylr.history import TAU, History
from densitylr.plots.looks import DOTTED, MARKERS, STEP, check, legend_beside, looks, step_ticks

__all__ = ["draw_near_zero", "draw_rates", "draw_scales", "near_zero", "rates"]


def near_zero(history: History) -> Figure:
    """The near-zero density of all stages over time, the untrained reference dotted.

    A line that leaves its dotted reference is a stage that learns; the marker stands where its
    lift-off was decided.

    Args:
        history: what was recorded, at least one reading.

    Returns:
        A figure with one axes: a line and a dotted reference a stage.

    Raises:
        ValueError: the history has no reading.
    """
    check(history)
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_near_zero(axes, history)
    axes.set_xlabel(STEP)
    legend_beside(figure, history, dotted=True, kinds=("lift-off",))
    return figure


def rates(history: History) -> Figure:
    """The learning rates in force and our factor in them, stage by stage.

    Above: the effective learning rate, the user's rate times our scale (log axis; a rate of 0
    has no place on it and leaves a gap; empty under a bare monitor, which knows no rates).
    Below: the scale. Markers: ▲ raised, ▼ lowered, ● lift-off.

    Args:
        history: what was recorded, at least one reading.

    Returns:
        A figure with two axes that share their steps.

    Raises:
        ValueError: the history has no reading.
    """
    check(history)
    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    draw_rates(upper, history)
    draw_scales(lower, history)
    lower.set_xlabel(STEP)
    legend_beside(figure, history, dotted=False)
    return figure


def draw_near_zero(axes: Axes, history: History) -> None:
    for stage, look in looks(history).items():
        values = history.series(stage, "near_zero")
        axes.plot(history.steps, values, label=stage, **look)
        axes.plot(
            history.steps,
            history.series(stage, "untrained"),
            color=look["color"],
            linestyle=DOTTED,
            linewidth=1.0,
            marker="_" if len(history) == 1 else "",
            label="_nolegend_",
        )
        _mark(axes, history, stage, values, look["color"], ("lift-off",))
    axes.set(ylabel=f"near-zero density\n(share of |a| < {TAU:g} untrained RMS)")
    axes.set_ylim(bottom=0)
    _tidy(axes, history)


def draw_rates(axes: Axes, history: History) -> None:
    drawn = False
    for stage, look in looks(history).items():
        effective = history.series(stage, "rate") * _scale(history, stage)
        effective = np.where(effective > 0, effective, np.nan)
        drawn = drawn or bool(np.isfinite(effective).any())
        axes.plot(history.steps, effective, label=stage, **look)
        _mark(axes, history, stage, effective, look["color"], tuple(MARKERS))
    if drawn:
        axes.set_yscale("log")
    else:
        axes.text(0.5, 0.5, "no rates were recorded", transform=axes.transAxes, ha="center")
        axes.yaxis.set_major_locator(NullLocator())
    axes.set(ylabel="effective learning rate")
    _tidy(axes, history)


def draw_scales(axes: Axes, history: History) -> None:
    scales = {stage: _scale(history, stage) for stage in history.stages}
    for stage, look in looks(history).items():
        axes.plot(history.steps, scales[stage], label=stage, **look)
        _mark(axes, history, stage, scales[stage], look["color"], tuple(MARKERS))
    if all((values > 0).all() for values in scales.values()):
        axes.set_yscale("log")
        if max(values.max() for values in scales.values()) < 10 * min(
            values.min() for values in scales.values()
        ):  # less than a decade: the default ticks would overlap or be missing
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set(ylabel="scale, factor on the user's rate")
    _tidy(axes, history)


def _scale(history: History, stage: str) -> np.ndarray:
    """Our factor over time; 1 where none was recorded."""
    scale = history.series(stage, "scale")
    return np.where(np.isnan(scale), 1.0, scale)


def _mark(
    axes: Axes,
    history: History,
    stage: str,
    values: np.ndarray,
    colour: Any,
    kinds: tuple[str, ...],
) -> None:
    """Put a stage's decisions on its line, at the last reading up to each."""
    for kind in kinds:
        steps = [d.step for d in history.decisions if (d.stage, d.kind) == (stage, kind)]
        # A checkpoint brings decisions of steps before the first reading: nowhere to put them.
        steps = [s for s in steps if s >= history.steps[0]]
        if steps:
            at = np.searchsorted(history.steps, steps, side="right") - 1
            axes.plot(
                steps,
                values[at],
                MARKERS[kind],
                color=colour,
                markersize=6,
                markeredgecolor="black",
                markeredgewidth=0.6,
                zorder=3,
                label="_nolegend_",
            )


def _tidy(axes: Axes, history: History) -> None:
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    step_ticks(axes, history, 6)
