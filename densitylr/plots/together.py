"""Heat maps and curves in one figure."""

from __future__ import annotations

import math
from typing import Any, cast

from matplotlib.figure import Figure

from densitylr.history import History
from densitylr.plots.curves import draw_near_zero, draw_rates, draw_scales
from densitylr.plots.heatmaps import draw_grid, grid_shape, lines_on_heatmaps
from densitylr.plots.looks import STEP, check, line_key

__all__ = ["overview"]


def overview(history: History) -> Figure:
    """Everything in one picture: densities above; near-zero density, rates and scales below.

    Args:
        history: what was recorded, at least one reading.

    Returns:
        A figure with a heat map a stage and three further axes.

    Raises:
        ValueError: the history has no reading.
    """
    check(history)
    names = history.stages
    rows, columns = grid_shape(len(names))
    upper = 0.4 + 2.2 * rows
    figure = Figure(figsize=(max(12.0, 1.2 + 3.0 * columns), upper + 4.4), layout="constrained")
    above, below = cast("Any", figure.subfigures(2, 1, height_ratios=[upper, 4.4]))
    draw_grid(above, history, names)
    left, middle, right = below.subplots(1, 3, sharex=True)
    draw_near_zero(left, history)
    draw_rates(middle, history)
    draw_scales(right, history)
    for axes in (left, middle, right):
        axes.set_xlabel(STEP)
    handles = [*lines_on_heatmaps(history, names), *line_key(history, dotted=True)]
    below.legend(
        handles=handles,
        loc="outside lower center",
        ncols=math.ceil(len(handles) / math.ceil(len(handles) / 9)),
        fontsize="small",
        frameon=False,
    )
    return figure
