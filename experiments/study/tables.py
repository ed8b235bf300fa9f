"""What ``docs/study.md`` says, computed from the packed runs; “not run” where there are none."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from experiments.report.comparison import (
    HIGHER_IS_BETTER,
    LABELS,
    Bench,
    Point,
    benches,
    by_rate,
    by_ratio,
    study_of,
    tuning,
    untuned,
    width,
)
from experiments.report.page import ARM_COLOURS, rendered
from experiments.report.sections import (
    WITHIN,
    Row,
    gap_sentence,
    heatmaps,
    same_sentence,
    tuned_sentence,
    width_words,
)
from experiments.study.packing import load
from experiments.train.arms import RIVALS
from experiments.train.runs import Run

__all__ = ["FIGURES", "README_TABLES", "TABLES"]

NOT_RUN = "*not run*"


def _part(results: Path, part: str) -> tuple[list[Run], list[Bench]]:
    runs = load(results / part)
    return runs, benches(runs, study_of(runs)[0])


def story(results: Path) -> str:
    """Final values of every arm, and the verdict."""
    _, found = _part(results, "story")
    if not found:
        return NOT_RUN
    (bench,) = found
    rows = []
    for arm in bench.arms:
        own = [run for seed in bench.seeds if (run := bench.table.get((arm, seed)))]
        rows.append([arm, *(_mean(bench, own, metric) for metric in LABELS), str(len(own))])
    head = ["arm", *LABELS.values(), "seeds"]
    return _table(rows, head) + "\n" + _verdicts(bench)


def _mean(bench: Bench, runs: Sequence[Run], metric: str) -> str:
    """Mean and standard deviation over the seeds; a run that never got there has its last step."""
    reached = [bench.steps_to_target(run) for run in runs] if metric == "steps" else []
    values = [v for v, _ in reached] if reached else [run.metric(metric) for run in runs]
    known = [v for v in values if v is not None]
    digits = 0 if metric == "steps" else 4
    spread = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    late = sum(never for _, never in reached)
    note = f" ({late} of {len(runs)} never)" if late else ""
    return f"{np.mean(known):.{digits}f}{spread}{note}" if known else "–"


def density(results: Path) -> str:
    """Near-zero share of every stage before training, and at its end under each arm."""
    runs, _ = _part(results, "story")
    shown = [(run, history) for run in runs if (history := run.history) is not None]
    if not shown:
        return NOT_RUN
    stages = shown[0][1].stages
    before = [f"{shown[0][1].series(s, 'near_zero')[0]:.3f}" for s in stages]
    rows = [["before training", *before]]
    for run, history in shown:
        after = [f"{history.series(s, 'near_zero')[-1]:.3f}" for s in stages]
        rows.append([f"after {run.arm}, seed {run.seed}", *after])
    picture = "\n![Densities of every stage over training under each arm](study_story.png)\n"
    return _table(rows, ["near-zero share", *stages]) + picture


def rate(results: Path) -> str:
    """Final values by learning rate, decades of usable rates, and optimizers without one."""
    _, found = _part(results, "rate")
    compared = [b for b in found if b.optimizer not in RIVALS]
    if not compared:
        return NOT_RUN
    text = [_settings(b, _rates(b), "decades near the best", tuned=True) for b in compared]
    rivals = [
        [b.optimizer, f"{np.mean(values):.4f}", str(len(values))]
        for b in found
        if b.optimizer in RIVALS
        and (values := [v for r in b.every if (v := r.metric("accuracy")) is not None])
    ]
    if rivals:
        text.append(_table(rivals, ["without a rate", "accuracy", "seeds"]))
    text.append("![Accuracy against the learning rate](study_rate.png)\n")
    return "\n".join(text)


def profile(results: Path) -> str:
    """Final values by the ratio of geometric rates."""
    _, found = _part(results, "profile")
    if not found:
        return NOT_RUN
    text = [
        _settings(b, by_ratio(b.every, b.study.primary, b.rate), "decades near the best")
        for b in found
    ]
    text.append("![Accuracy against the ratio of the profile](study_profile.png)\n")
    return "\n".join(text)


def fresh(results: Path) -> str:
    """The verdict on each task and optimizer."""
    _, found = _part(results, "fresh")
    if not found:
        return NOT_RUN
    return "\n".join(f"**{b.optimizer}**\n\n{_verdicts(b)}{_tuned(b, b.rate)}" for b in found)


def _verdicts(bench: Bench) -> str:
    contrasts = [c for c in bench.contrasts() if c.declared]
    said = [f"* {c.sentence}" for c in contrasts[:1]]
    said += [f"* {gap_sentence(c, bench)}" for c in contrasts[:1] if c.gap is not None]
    said += [f"* {c.beside}" for c in contrasts[:1] if c.beside is not None]
    said += [f"* {same_sentence(c)}" for c in contrasts if c.baseline == bench.study.reference]
    said += [f"* {remark}" for c in contrasts for remark in c.remarks]
    return "\n".join(said) + "\n"


def _tuned(bench: Bench, used: float | None) -> str:
    """How the fixed rate was chosen, and whether ``used``, the one compared, is that one."""
    higher = bench.study.primary in HIGHER_IS_BETTER
    found = tuning(bench.every, bench.study, used, higher)
    return "".join(f"* {tuned_sentence(t, LABELS[bench.study.primary])}\n" for t in found)


def _settings(
    bench: Bench, arms: Mapping[str, Sequence[Point]], last: str, tuned: bool = False
) -> str:
    metric = bench.study.primary
    best = max((p.mean for points in arms.values() for p in points), default=np.nan)
    at = sorted({p.at for points in arms.values() for p in points})
    rows = []
    for arm, points in arms.items():
        cells = {p.at: f"{p.mean:.3f}{'*' if p.diverged else ''}" for p in points}
        row = Row(arm, points, *width(points, best, WITHIN[metric], higher=True))
        counts = "/".join(sorted({str(p.n) for p in points}))
        rows.append([arm, *(cells.get(a, "–") for a in at), width_words(row), counts])
    head = [bench.optimizer, *(f"{a:g}" for a in at), last, "seeds"]
    note = f"\nNear the best: within {WITHIN[metric]} of {best:.4f}; `*`: some seeds diverged.\n\n"
    return _table(rows, head) + note + (_tuned(bench, None) if tuned else "")


def _rates(bench: Bench) -> dict[str, list[Point]]:
    return by_rate(untuned(bench.every, bench.study), bench.study.primary)


def _table(rows: list[list[str]], head: list[str]) -> str:
    align = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, head, tablefmt="github", colalign=align, disable_numparse=True) + "\n"


def _story_figure(results: Path) -> bytes | None:
    picture = heatmaps([run for run in _part(results, "story")[0] if run.history_file])
    return None if picture is None else _png(picture.light)


def _rate_figure(results: Path) -> bytes | None:
    _, found = _part(results, "rate")
    levels = {
        b.optimizer: float(np.mean(values))
        for b in found
        if b.optimizer in RIVALS
        and (values := [v for r in b.every if (v := r.metric("accuracy")) is not None])
    }
    panels = {b.optimizer: _rates(b) for b in found if b.optimizer not in RIVALS}
    return _lines(panels, "learning rate", levels)


def _profile_figure(results: Path) -> bytes | None:
    _, found = _part(results, "profile")
    panels = {b.optimizer: by_ratio(b.every, b.study.primary, b.rate) for b in found}
    return _lines(panels, "first stage's rate, times the head's", {})


def _lines(
    panels: Mapping[str, Mapping[str, Sequence[Point]]], x: str, levels: Mapping[str, float]
) -> bytes | None:
    if not any(points for arms in panels.values() for points in arms.values()):
        return None
    order = list(dict.fromkeys(arm for arms in panels.values() for arm in arms))

    def draw(figure: Figure, theme: dict[str, Any]) -> None:
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, arms) in zip(grid, panels.items(), strict=True):
            _panel(axes, arms, order, levels, theme)
            axes.set_title(title, color=theme["ink"])
            axes.set_xlabel(x)
        grid[0].set_ylabel("final accuracy")
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)

    return _png(rendered(draw, (4.6 * len(panels), 4.4), alt="", caption="").light)


def _panel(
    axes: Axes,
    arms: Mapping[str, Sequence[Point]],
    order: Sequence[str],
    levels: Mapping[str, float],
    theme: Mapping[str, Any],
) -> None:
    for arm, points in arms.items():
        colour = ARM_COLOURS[order.index(arm) % len(ARM_COLOURS)][theme["shade"]]
        at = [p.at for p in points]
        style = "-" if arm.endswith("/fixed") else "--"
        axes.plot(at, [p.mean for p in points], style, color=colour, marker="o", label=arm)
        low, high = [p.low for p in points], [p.high for p in points]
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    for i, (name, value) in enumerate(levels.items()):
        axes.axhline(value, color=f"C{i}", linewidth=0.9, linestyle=":", label=name)
    axes.set_xscale("log")
    axes.grid(color=theme["faint"], linewidth=0.6)


def _png(uri: str) -> bytes:
    return base64.b64decode(uri.split(",")[1])


TABLES: dict[str, Callable[[Path], str]] = {
    f.__name__: f for f in (story, density, rate, profile, fresh)
}
README_TABLES: dict[str, Callable[[Path], str]] = {"study": story}
FIGURES: dict[str, Callable[[Path], bytes | None]] = {
    "study_story.png": _story_figure,
    "study_rate.png": _rate_figure,
    "study_profile.png": _profile_figure,
}
