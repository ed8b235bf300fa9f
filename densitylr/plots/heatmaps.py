"""Densities as heat maps: the step along x, the magnitude along y, the share as colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator

from densitylr.history import BOUNDS, TAU, History
from densitylr.plots.looks import STEP, check, step_ticks

__all__ = [
    "density_heatmap",
    "density_heatmaps",
    "draw_grid",
    "grid_shape",
    "lines_on_heatmaps",
]

_MAGNITUDE = "|a| / untrained RMS"
_DENSITY = "share of the outputs per octave (log scale)"
_LEAST = 1e-4
_DECISION_COLOUR = "#d55e00"


def density_heatmap(history: History, stage: str) -> Figure:
    """The density of one stage: how large its activations are, step by step.

    x is the optimizer step, y the magnitude ``|a|`` over the untrained RMS (log axis), colour
    the share of the outputs per octave of magnitude (log scale; empty bins stay blank). The
    lowest and the highest bin are open. Dashed: the near-zero threshold. Thin vertical lines:
    decisions about this stage.

    Args:
        history: what was recorded, at least one reading.
        stage: a name in ``history.stages``.

    Returns:
        A figure with one heat map and a colour bar.

    Raises:
        ValueError: the history has no reading.
        KeyError: no such stage.
    """
    check(history)
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    mesh = _draw_heatmap(axes, history, stage, _norm(history, [stage]))
    axes.set(xlabel=STEP, ylabel=_MAGNITUDE)
    figure.colorbar(mesh, ax=axes, label=_DENSITY)
    _line_key(figure, history, [stage])
    return figure


def density_heatmaps(history: History, stages: Sequence[str] | None = None) -> Figure:
    """The densities of several stages in a grid, with one colour scale.

    Args:
        history: what was recorded, at least one reading.
        stages: names in ``history.stages``. Default: all of them.

    Returns:
        A figure with one heat map a stage, in the given order by rows, and one colour bar.

    Raises:
        ValueError: the history has no reading, or ``stages`` is empty.
        KeyError: no such stage.
    """
    check(history)
    names = _names(history, stages)
    rows, columns = grid_shape(len(names))
    figure = Figure(figsize=(1.8 + 3.0 * columns, 1.0 + 2.3 * rows), layout="constrained")
    draw_grid(figure, history, names)
    _line_key(figure, history, names)
    return figure


def draw_grid(figure: Any, history: History, names: Sequence[str]) -> None:
    """Heat maps of the named stages over a figure or subfigure, with one colour bar."""
    rows, columns = grid_shape(len(names))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    norm = _norm(history, names)
    for i, axes in enumerate(grid.flat):
        if i >= len(names):
            axes.remove()
            continue
        mesh = _draw_heatmap(axes, history, names[i], norm)
        if i + columns >= len(names):
            axes.set_xlabel(STEP)
            axes.tick_params(labelbottom=True)
    label = _MAGNITUDE if rows == 1 else f"activation magnitude, {_MAGNITUDE}"
    figure.supylabel(label, fontsize="medium")
    density = _DENSITY.replace(" per", "\nper") if rows == 1 else _DENSITY
    figure.colorbar(mesh, ax=list(grid.flat)[: len(names)], label=density, aspect=12 * rows)


def grid_shape(n: int) -> tuple[int, int]:
    """Rows and columns for n panels: one row up to three, never more than four columns."""
    columns = n if n <= 3 else 3 if n <= 6 else 4
    return math.ceil(n / columns), columns


def _draw_heatmap(axes: Axes, history: History, stage: str, norm: LogNorm) -> QuadMesh:
    """One stage's density; the caller labels the axes and draws the colour bar."""
    mesh = axes.pcolormesh(
        _step_bounds(history.steps),
        BOUNDS,
        np.ma.masked_less_equal(history.density(stage).T, 0),
        norm=norm,
        cmap="viridis",
        rasterized=True,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([0.01, TAU, 1.0]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 6, 7, 8, 9)))
    outline = [withStroke(linewidth=2.4, foreground="white")]  # empty bins are white, full not
    axes.axhline(TAU, color="black", linestyle="--", linewidth=1.0, path_effects=outline)
    first, last = axes.get_xlim()
    for decision in history.decisions:
        if decision.stage == stage and first <= decision.step <= last:
            axes.axvline(decision.step, color=_DECISION_COLOUR, linewidth=0.8, alpha=0.8)
    axes.set_title(stage, fontsize="medium")
    step_ticks(axes, history, 4)
    return mesh


def _line_key(figure: Figure, history: History, names: Sequence[str]) -> None:
    """Say below a heat map what its lines are."""
    figure.legend(
        handles=lines_on_heatmaps(history, names),
        loc="outside lower center",
        ncols=2,
        fontsize="small",
        frameon=False,
    )


def lines_on_heatmaps(history: History, names: Sequence[str]) -> list[Line2D]:
    """What the lines on the heat maps of these stages are, for a legend."""
    handles = [Line2D([], [], color="black", linestyle="--", label=f"near zero, {TAU:g}")]
    if any(d.stage in names for d in history.decisions):
        handles.append(Line2D([], [], color=_DECISION_COLOUR, linewidth=0.8, label="decision"))
    return handles


def _norm(history: History, names: Sequence[str]) -> LogNorm:
    """One colour scale for the named stages, up to the largest density."""
    largest = max(float(history.density(name).max()) for name in names)
    return LogNorm(vmin=_LEAST, vmax=max(largest, 2 * _LEAST), clip=True)


def _step_bounds(steps: np.ndarray) -> np.ndarray:
    """Edges of the cells around the readings, float64 ``[readings + 1]``."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.array([2 * steps[0] - middle[0], *middle, 2 * steps[-1] - middle[-1]])


def _names(history: History, stages: Sequence[str] | None) -> list[str]:
    names = history.stages if stages is None else list(stages)
    if not names:
        raise ValueError("stages must name at least one stage, got an empty list")
    return names
