"""The figure of ``docs/law.md``: what is left of starved profiles against what is harmed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

__all__ = ["trade_off"]


def trade_off(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """What is left where stages starve against what is harmed where one stage is hot.

    Args:
        panels: by title, and in each by arm: share passed, accuracy left, accuracy changed.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(6.6 * len(panels), 5.0), layout="constrained")
    for axes, (title, arms) in zip(
        np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True
    ):
        # The labels stand in a column beside the axes, in the order of the points.
        downwards = sorted(arms.items(), key=lambda arm: (-arm[1][2], arm[1][1]))
        heights = np.linspace(0.97, 0.03, len(downwards))
        for (arm, (_, left, changed)), height in zip(downwards, heights, strict=True):
            ours = arm in ("repair", "density")
            color = "#d55e00" if ours else "#0072b2"
            axes.scatter(100 * left, 100 * changed, s=40, color=color, zorder=4 if ours else 3)
            axes.annotate(
                arm.removeprefix("repair").strip("()") or "as shipped",
                (100 * left, 100 * changed),
                xytext=(1.06, height),
                textcoords="axes fraction",
                va="center",
                fontsize=9,
                color=color,
                arrowprops={
                    "arrowstyle": "-",
                    "color": "#aaaaaa",
                    "linewidth": 0.7,
                    "relpos": (0, 0.5),
                },
            )
        axes.margins(0.06)
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("starved profiles: points of accuracy left to the flat rate")
        axes.set_ylabel("one stage 10 times too hot: points changed")
        axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()
