"""What all figures have in common: how a stage looks, the axis of steps, the key to the lines.

Colours: the stages run through viridis from the input (dark) to the output (light), and every
fourth has a line style of its own; both can be read without colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from densitylr.history import History

__all__ = ["DOTTED", "MARKERS", "STEP", "check", "legend_beside", "line_key", "looks", "step_ticks"]

MARKERS = {"raise": "^", "lower": "v", "lift-off": "o", "recover": "X"}
"""Of each kind of decision."""

DOTTED = (0, (1, 2))
"""The untrained reference."""

STEP = "optimizer step"

_STYLES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)))  # no dotted line


def check(history: History) -> None:
    if not len(history):
        raise ValueError("a picture needs a history of at least one reading, got 0 readings")


def looks(history: History) -> dict[str, dict[str, Any]]:
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


def step_ticks(axes: Axes, history: History, most: int) -> None:
    """Whole steps only; a lone reading has one tick."""
    lone = len(history) == 1
    locator = FixedLocator([history.steps[0]]) if lone else MaxNLocator(most, integer=True)
    axes.xaxis.set_major_locator(locator)


def legend_beside(
    figure: Figure, history: History, dotted: bool, kinds: Sequence[str] = tuple(MARKERS)
) -> None:
    """Beside the axes, where it covers nothing; ``kinds`` of decisions are marked there."""
    figure.legend(
        handles=line_key(history, dotted, kinds),
        loc="outside right upper",
        fontsize="small",
        frameon=False,
    )


def line_key(history: History, dotted: bool, kinds: Sequence[str] = tuple(MARKERS)) -> list[Line2D]:
    handles = [Line2D([], [], label=stage, **look) for stage, look in looks(history).items()]
    if dotted:
        handles.append(
            Line2D([], [], color="gray", linestyle=DOTTED, linewidth=1.0, label="untrained")
        )
    words = {"raise": "raised", "lower": "lowered", "lift-off": "lift-off", "recover": "went back"}
    for kind in kinds:
        if any(d.kind == kind and d.stage in history.stages for d in history.decisions):
            handles.append(
                Line2D(
                    [],
                    [],
                    color="gray",
                    linestyle="",
                    marker=MARKERS[kind],
                    markeredgecolor="black",
                    markeredgewidth=0.6,
                    label=words[kind],
                )
            )
    return handles
