"""Pictures of a history: what the activations did, and what was decided about the rates.

One function a figure, each takes a `History` and returns a matplotlib ``Figure`` that belongs
to nobody: no window, no global state, nothing to close. ``figure.savefig("density.png")``.

Colours: the stages run through viridis from the input (dark) to the output (light), and every
fourth has a line style of its own; both survive colour-blind eyes and a grey printer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from densitylr.density import EDGES, TAU
from densitylr.history import History

__all__ = ["density_heatmap", "density_heatmaps", "near_zero", "overview", "rates"]

_MARKERS = {"raise": "^", "lower": "v", "lift-off": "o", "recover": "X"}
# No dotted line: that is the untrained reference.
_STYLES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))
_DOTTED = (0, (1, 2))
_STEP = "optimizer step"
_MAGNITUDE = "|a| / untrained RMS"
_DENSITY = "share of the outputs per octave (log scale)"
_LEAST = 1e-4
_DECISION_COLOUR = "#d55e00"

# The outer bins are open: drawn one bin wide, as far below and above the edges.
_BOUNDS = np.array([EDGES[0] ** 2 / EDGES[1], *EDGES, EDGES[-1] ** 2 / EDGES[-2]])


def density_heatmap(history: History, stage: str) -> Figure:
    """The density of one stage: how large its activations are, step by step.

    x is the optimizer step, y the magnitude ``|a|`` over the untrained RMS (log axis), colour
    the number of outputs (log scale; empty bins stay blank). The lowest and the highest bin are
    open. Dashed: the near-zero threshold. Thin vertical lines: decisions about this stage.

    Args:
        history: what was recorded, at least one reading.
        stage: a name in ``history.stages``.

    Returns:
        A figure with one heat map and a colour bar.

    Raises:
        ValueError: the history has no reading.
        KeyError: no such stage.
    """
    _check(history)
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    mesh = _draw_heatmap(axes, history, stage, _norm(history, [stage]))
    axes.set(xlabel=_STEP, ylabel=_MAGNITUDE)
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
    _check(history)
    names = _names(history, stages)
    rows, columns = _grid(len(names))
    figure = Figure(figsize=(1.8 + 3.0 * columns, 1.0 + 2.3 * rows), layout="constrained")
    _draw_grid(figure, history, names)
    _line_key(figure, history, names)
    return figure


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
    _check(history)
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    _draw_near_zero(axes, history)
    axes.set_xlabel(_STEP)
    _legend(figure, history, dotted=True)
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
    _check(history)
    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    _draw_rates(upper, history)
    _draw_scales(lower, history)
    lower.set_xlabel(_STEP)
    _legend(figure, history, dotted=False)
    return figure


def overview(history: History) -> Figure:
    """Everything in one picture: densities above; near-zero density, rates and scales below.

    Args:
        history: what was recorded, at least one reading.

    Returns:
        A figure with a heat map a stage and three further axes.

    Raises:
        ValueError: the history has no reading.
    """
    _check(history)
    names = history.stages
    rows, columns = _grid(len(names))
    upper = 0.4 + 2.2 * rows
    figure = Figure(figsize=(max(12.0, 1.2 + 3.0 * columns), upper + 4.4), layout="constrained")
    above, below = cast("Any", figure.subfigures(2, 1, height_ratios=[upper, 4.4]))
    _draw_grid(above, history, names)
    left, middle, right = below.subplots(1, 3, sharex=True)
    _draw_near_zero(left, history)
    _draw_rates(middle, history)
    _draw_scales(right, history)
    for axes in (left, middle, right):
        axes.set_xlabel(_STEP)
    handles = _handles(history, dotted=True)
    below.legend(
        handles=handles,
        loc="outside lower center",
        ncols=math.ceil(len(handles) / math.ceil(len(handles) / 9)),
        fontsize="small",
        frameon=False,
    )
    return figure


def _draw_grid(figure: Any, history: History, names: Sequence[str]) -> None:
    """Heat maps of the named stages over a figure or subfigure, with one colour bar."""
    rows, columns = _grid(len(names))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    norm = _norm(history, names)
    for i, axes in enumerate(grid.flat):
        if i >= len(names):
            axes.remove()
            continue
        mesh = _draw_heatmap(axes, history, names[i], norm)
        if i + columns >= len(names):
            axes.set_xlabel(_STEP)
            axes.tick_params(labelbottom=True)
    label = _MAGNITUDE if rows == 1 else f"activation magnitude, {_MAGNITUDE}"
    figure.supylabel(label, fontsize="medium")
    figure.colorbar(mesh, ax=list(grid.flat)[: len(names)], label=_DENSITY, aspect=12 * rows)


def _line_key(figure: Figure, history: History, names: Sequence[str]) -> None:
    """Say below a heat map what its lines are."""
    handles = [Line2D([], [], color="black", linestyle="--", label=f"near zero, {TAU:g}")]
    if any(d.stage in names for d in history.decisions):
        handles.append(Line2D([], [], color=_DECISION_COLOUR, linewidth=0.8, label="decision"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, fontsize="small", frameon=False
    )


def _draw_heatmap(axes: Axes, history: History, stage: str, norm: LogNorm) -> QuadMesh:
    """One stage's density; the caller labels the axes and draws the colour bar."""
    mesh = axes.pcolormesh(
        _step_bounds(history.steps),
        _BOUNDS,
        np.ma.masked_less_equal(history.density(stage).T, 0),
        norm=norm,
        cmap="viridis",
        rasterized=True,
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([0.01, TAU, 1.0]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 6, 7, 8, 9)))
    axes.axhline(TAU, color="white", linestyle="--", linewidth=1.2)
    first, last = axes.get_xlim()
    for decision in history.decisions:
        if decision.stage == stage and first <= decision.step <= last:
            axes.axvline(decision.step, color=_DECISION_COLOUR, linewidth=0.8, alpha=0.8)
    axes.set_title(stage, fontsize="medium")
    _step_ticks(axes, history, 4)
    return mesh


def _draw_near_zero(axes: Axes, history: History) -> None:
    for stage, look in _looks(history).items():
        values = history.series(stage, "near_zero")
        axes.plot(history.steps, values, label=stage, **look)
        axes.plot(
            history.steps,
            history.series(stage, "untrained"),
            color=look["color"],
            linestyle=_DOTTED,
            linewidth=1.0,
            marker="_" if len(history) == 1 else "",
            label="_nolegend_",
        )
        _mark(axes, history, stage, values, look["color"], ("lift-off",))
    axes.set(ylabel=f"near-zero density\n(share of |a| < {TAU:g} untrained RMS)")
    axes.set_ylim(bottom=0)
    _tidy(axes, history)


def _draw_rates(axes: Axes, history: History) -> None:
    drawn = False
    for stage, look in _looks(history).items():
        effective = history.series(stage, "rate") * _scale(history, stage)
        effective = np.where(effective > 0, effective, np.nan)
        drawn = drawn or bool(np.isfinite(effective).any())
        axes.plot(history.steps, effective, label=stage, **look)
        _mark(axes, history, stage, effective, look["color"], tuple(_MARKERS))
    if drawn:
        axes.set_yscale("log")
    else:
        axes.text(0.5, 0.5, "no rates were recorded", transform=axes.transAxes, ha="center")
        axes.yaxis.set_major_locator(NullLocator())
    axes.set(ylabel="effective learning rate")
    _tidy(axes, history)


def _draw_scales(axes: Axes, history: History) -> None:
    scales = {stage: _scale(history, stage) for stage in history.stages}
    for stage, look in _looks(history).items():
        axes.plot(history.steps, scales[stage], label=stage, **look)
        _mark(axes, history, stage, scales[stage], look["color"], tuple(_MARKERS))
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
                _MARKERS[kind],
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
    _step_ticks(axes, history, 6)


def _step_ticks(axes: Axes, history: History, most: int) -> None:
    """Whole steps only; a lone reading has one tick."""
    lone = len(history) == 1
    locator = FixedLocator([history.steps[0]]) if lone else MaxNLocator(most, integer=True)
    axes.xaxis.set_major_locator(locator)


def _legend(figure: Figure, history: History, dotted: bool) -> None:
    """Beside the axes, where it covers nothing however many stages there are."""
    figure.legend(
        handles=_handles(history, dotted),
        loc="outside right upper",
        fontsize="small",
        frameon=False,
    )


def _handles(history: History, dotted: bool) -> list[Line2D]:
    handles = [Line2D([], [], label=stage, **look) for stage, look in _looks(history).items()]
    if dotted:
        handles.append(
            Line2D([], [], color="gray", linestyle=_DOTTED, linewidth=1.0, label="untrained")
        )
    words = {"raise": "raised", "lower": "lowered", "lift-off": "lift-off", "recover": "went back"}
    for kind in _MARKERS:
        if any(d.kind == kind and d.stage in history.stages for d in history.decisions):
            handles.append(
                Line2D(
                    [],
                    [],
                    color="gray",
                    linestyle="",
                    marker=_MARKERS[kind],
                    markeredgecolor="black",
                    markeredgewidth=0.6,
                    label=words[kind],
                )
            )
    return handles


def _looks(history: History) -> dict[str, dict[str, Any]]:
    """Colour and line style of each stage; a single reading is a dot instead of a line."""
    names = history.stages
    colours = colormaps["viridis"](np.linspace(0.0, 0.88, len(names)))
    alone = len(history) == 1
    return {
        name: {
            "color": tuple(float(c) for c in colours[i]),
            "linestyle": _STYLES[i % len(_STYLES)],
            "linewidth": 1.6,
            "marker": "." if alone else "",
        }
        for i, name in enumerate(names)
    }


def _grid(n: int) -> tuple[int, int]:
    """Rows and columns for n panels: one row up to three, never more than four columns."""
    columns = n if n <= 3 else 3 if n <= 6 else 4
    return math.ceil(n / columns), columns


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


def _check(history: History) -> None:
    if not len(history):
        raise ValueError("a picture needs a history of at least one reading, got 0 readings")
