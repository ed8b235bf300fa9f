"""The gauntlet's figures: gaps closed by network, and where a search for the rate ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.gauntlet.verdict import Closed
from experiments.report.page import Picture, rendered

__all__ = ["Searched", "closed_dots", "search_lines"]

_COLOURS = {"sgd": "#0072b2", "adamw": "#d55e00", "rmsprop": "#009e73"}
_MARKERS = {"free": "o", "warmup": "s"}
_LOW, _HIGH = -0.25, 1.25

Searched = dict[str, list[tuple[float, float]]]
"""Start and mean accuracy, by arm."""


def closed_dots(optimizer: str, cells: Sequence[Closed], nets: Sequence[str]) -> Picture | None:
    """The gap closed in every cell of an optimizer, side by side for each network.

    Args:
        optimizer: whose cells these are.
        cells: of this optimizer; those without a gap to close are not drawn.
        nets: all networks of the page, in order.
    """
    shown = [c for c in cells if c.there]
    if not shown:
        return None
    beyond = sum(not _LOW <= c.gap.fraction <= _HIGH for c in shown)

    def draw(figure: Figure, theme: dict[str, Any]) -> None:
        axes: Axes = figure.subplots()
        for column, net in enumerate(nets):
            values = np.array([c.gap.fraction for c in shown if c.net == net])
            # Spread evenly in the order of the cells: nothing random, so the same bytes.
            across = column + np.linspace(-0.3, 0.3, len(values) + 2)[1:-1]
            for chosen, marker in (
                (values < _LOW, "v"),
                (values > _HIGH, "^"),
                ((values >= _LOW) & (values <= _HIGH), "o"),
            ):
                heights = np.clip(values[chosen], _LOW, _HIGH)
                colours = np.where(heights >= 0.9 - 1e-9, "#0072b2", "#d55e00")
                axes.scatter(
                    across[chosen],
                    heights,
                    s=18,
                    c=colours.tolist(),
                    marker=marker,
                    edgecolors=theme["ink"],
                    linewidths=0.5,
                )
        axes.axhline(0.9, color=theme["ink"], linewidth=1.0, linestyle="--")
        axes.set_ylim(_LOW - 0.05, _HIGH + 0.05)
        axes.set_xlim(-0.6, len(nets) - 0.4)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 1.0])
        axes.set_yticklabels(["0 %", "25 %", "50 %", "75 %", "90 %", "100 %"])
        axes.set_xticks(range(len(nets)), nets, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_xlabel("network")
        axes.set_ylabel("gap closed")
        axes.set_title(optimizer, color=theme["ink"])
        axes.grid(color=theme["faint"], linewidth=0.6, axis="y")

    passed = sum(c.gap.fraction >= 0.9 - 1e-9 for c in shown)
    text = (
        f"{optimizer}: gap closed in {len(shown)} cells with a gap, {passed} of them at least 90 %"
    )
    note = f" Triangles: {beyond} beyond the axis." if beyond else ""
    return rendered(draw, (5.0, 3.8), alt=f"{text}, by network.", caption=f"{text} (dashed).{note}")


def search_lines(net: str, found: dict[str, Searched], flat: dict[str, float]) -> Picture | None:
    """Accuracy against the start of the search, and the tuned flat rate as a line.

    Args:
        net: the network.
        found: by optimizer.
        flat: mean accuracy at the tuned flat rate, by optimizer.
    """
    if not any(points for arms in found.values() for points in arms.values()):
        return None

    def draw(figure: Figure, theme: dict[str, Any]) -> None:
        axes: Axes = figure.subplots()
        for optimizer, arms in found.items():
            colour = _COLOURS.get(optimizer, theme["ink"])
            for arm, points in arms.items():
                starts, accuracies = zip(*sorted(points), strict=True)
                axes.plot(
                    starts,
                    accuracies,
                    color=colour,
                    marker=_MARKERS.get(arm, "D"),
                    linestyle="-" if arm == "free" else ":",
                    linewidth=1.6,
                    markersize=5,
                    label=f"{optimizer} {arm}",
                )
            if optimizer in flat:
                name = f"{optimizer} flat"
                axes.axhline(
                    flat[optimizer], color=colour, linewidth=1.0, linestyle="--", label=name
                )
        axes.set_xscale("log")
        axes.set_xlabel("start, times the tuned rate")
        axes.set_ylabel("test accuracy")
        axes.set_title(net, color=theme["ink"])
        axes.grid(color=theme["faint"], linewidth=0.6)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)

    return rendered(
        draw,
        (5.0, 3.8),
        alt=f"Test accuracy of {net} against the start of the search for {', '.join(found)}.",
        caption=f"{net}: mean test accuracy against the start; dashed: the tuned flat rate.",
    )
