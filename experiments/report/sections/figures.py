"""The report's dense figures: learning curves and density heatmaps.

Panels are drawn small, one to a figure, so that the page can set them side by side on a desk
and below each other on a phone, with letters of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from densitylr import History
from densitylr.history import BOUNDS, TAU
from experiments.report.page import ARM_COLOURS, Picture, rendered
from experiments.train.runs import Run

__all__ = ["curve", "heatmaps"]

Array = npt.NDArray[np.float64]
_POINTS = 1000  # of a mean curve: more than a panel has pixels
_WIDE = 4  # largest over least loss: below it a log axis has next to no ticks
_MANY = 20  # runs of an arm above which their spread is drawn instead of each


def curve(
    arms: dict[str, list[Run]], colours: Sequence[str], x: str, y: str, label: str
) -> Picture | None:
    """One curve of every arm: thin lines for the seeds, a thick one for their mean.

    The mean is drawn over the stretch that all finished seeds of an arm cover, interpolated
    linearly. Of more than 20 seeds a band from the 5th to the 95th percentile is drawn instead of
    each. A diverged run ends with a cross.

    Args:
        arms: runs with curves, by arm.
        colours: all arm names of the report, so that an arm keeps its colour.
        x: ``"step"`` or ``"seconds"``.
        y: a column of the curves.
        label: what to call ``y``.
    """
    lines: dict[str, list[tuple[Array, Array, bool]]] = {}
    for arm, runs in arms.items():
        if kept := [(*pair, r.status == "done") for r in runs if (pair := _line(r, x, y))]:
            lines[arm] = kept
    if not lines:
        return None

    def draw(figure: Figure, theme: dict[str, Any]) -> None:
        axes: Axes = figure.subplots()
        for arm in sorted(lines, key=lambda arm: not arm.endswith("/fixed")):
            colour = ARM_COLOURS[list(colours).index(arm) % len(ARM_COLOURS)][theme["shade"]]
            # Arms that come out the same show as a line in two colours.
            dashes: Any = "-" if arm.endswith("/fixed") else (0, (4, 2))
            many = len(lines[arm]) > _MANY
            for at, value, done in lines[arm]:
                if many and done:
                    continue
                dot = "o" if at.size == 1 else ""
                axes.plot(at, value, linewidth=0.7, alpha=0.35, marker=dot, color=colour)
                if not done:
                    axes.plot(at[-1], value[-1], "x", color=colour)
            whole = [(at, value) for at, value, done in lines[arm] if done]
            grid, seeds = _on_one_grid(whole) if whole else (np.array([]), np.empty((1, 0)))
            mean = seeds.mean(axis=0)
            if many and whole:
                low, high = np.quantile(seeds, (0.05, 0.95), axis=0)
                axes.fill_between(grid, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(
                grid,
                mean,
                color=colour,
                linestyle=dashes,
                linewidth=2.2,
                marker="o" if grid.size == 1 else "",
                label=f"{arm} ({len(whole)})",
            )
        axes.set_xlabel("optimizer step" if x == "step" else "seconds since the start")
        axes.set_ylabel(label)
        low, high = axes.dataLim.intervaly
        if "loss" in y and low > 0 and high > _WIDE * low:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(_plain))
            axes.yaxis.set_minor_formatter(FuncFormatter(_plain))
        axes.grid(color=theme["faint"], linewidth=0.6)
        _legend(figure, axes, columns=2)

    by = "optimizer step" if x == "step" else "wall-clock second"
    return rendered(
        draw,
        (5.0, 3.6),
        alt=f"{label} by {by} for {', '.join(lines)}.",
        caption=f"{label[:1].upper()}{label[1:]} by {by}.",
    )


def heatmaps(runs: Sequence[Run]) -> Picture | None:
    """Where the activations of every stage are, over time: a row a stage, a column a run.

    Args:
        runs: runs with histories; colours mean the same number in all of them.
    """
    seen = [(run, history) for run in runs if run.readings and (history := run.history)]
    if not seen:
        return None
    stages = list(dict.fromkeys(stage for _, history in seen for stage in history.stages))
    largest = max(float(h.density(s).max()) for _, h in seen for s in h.stages)

    def draw(figure: Figure, theme: dict[str, Any]) -> None:
        grid = figure.subplots(len(stages), len(seen), sharex=True, sharey=True, squeeze=False)
        norm = LogNorm(1e-4, max(1e-3, largest), clip=True)
        image = None
        for row, stage in zip(grid, stages, strict=True):
            for axes, (_, history) in zip(row, seen, strict=True):
                axes.set_facecolor(theme["faint"])
                if stage in history.stages:
                    density = np.ma.masked_less_equal(history.density(stage).T, 0)
                    image = axes.pcolormesh(_between(history.steps), BOUNDS, density, norm=norm)
                axes.axhline(TAU, color="#ff3b30", linewidth=1.4, linestyle="--")
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            row[0].set_yscale("log")
            row[0].yaxis.set_major_locator(FixedLocator([0.01, 0.1, 1]))
            row[0].yaxis.set_major_formatter(FuncFormatter(_plain))
            row[0].yaxis.set_minor_locator(NullLocator())
            row[0].set_ylabel(f"{stage}\n|a| / rms0")
        for axes, (run, _) in zip(grid[0], seen, strict=True):
            axes.set_title(run.arm, color=theme["ink"], fontsize=10)
        for axes in grid[-1]:
            axes.set_xlabel("optimizer step")
        if image is not None:
            bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.01)
            bar.set_label("share of the outputs per octave", color=theme["ink"])

    arms = ", ".join(run.arm for run, _ in seen)
    return rendered(
        draw,
        (2.6 * len(seen) + 1.4, 1.15 * len(stages) + 0.6),
        alt=f"Heatmaps of activation magnitudes over steps for {', '.join(stages)} in {arms}, "
        f"seed {seen[0][0].seed}: {_moved(seen, stages)}.",
        caption=f"What share of the outputs has which magnitude, seed {seen[0][0].seed}: |a| "
        f"against the untrained layer's RMS. Below the dashed line, at {TAU:g}, an output counts "
        "as near zero. "
        "The lowest and the highest row of bins hold everything beyond them.",
        wide=True,
    )


def _moved(seen: Sequence[tuple[Run, History]], stages: Sequence[str]) -> str:
    """What the pictures show, in numbers: near-zero shares from the first reading to the last."""
    said = []
    for run, history in seen:
        shares = [
            f"{stage} {z[0]:.2f} to {z[-1]:.2f}"
            for stage in stages
            if stage in history.stages and len(z := history.series(stage, "near_zero"))
        ]
        said.append(f"near-zero share in {run.arm}: {', '.join(shares)}")
    return "; ".join(said)


def _line(run: Run, x: str, y: str) -> tuple[Array, Array] | None:
    if run.curves is None:
        return None
    at, value = run.curves[x], run.curves[y]
    kept = np.isfinite(at) & np.isfinite(value)
    return (at[kept], value[kept]) if kept.any() else None


def _on_one_grid(seeds: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Steps or seconds ``[points]`` and each seed's values there ``[seeds, points]``."""
    start, stop = max(at[0] for at, _ in seeds), min(at[-1] for at, _ in seeds)
    grid = np.unique(np.concatenate([at for at, _ in seeds]))
    grid = grid[(grid >= start) & (grid <= stop)]
    if grid.size > _POINTS:
        grid = np.linspace(grid[0], grid[-1], _POINTS)
    return grid, np.array([np.interp(grid, at, value) for at, value in seeds])


def _between(steps: npt.NDArray[np.int64]) -> Array:
    at = steps.astype(np.float64)
    if at.size == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middle = (at[1:] + at[:-1]) / 2
    return np.array([2 * at[0] - middle[0], *middle, 2 * at[-1] - middle[-1]])


def _plain(value: float, position: int | None = None) -> str:
    """Ticks of a log axis: 1, 2 and 5 of a decade, as people write them."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
