"""Draw the picture of the README: ``python -m experiments.study.picture RUNS docs/story.png``.

One stage's density over training, for the same seed, in the arms that the study declares:
fixed discriminative rates, the same under DensityLR, and the flat reference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from densitylr.history import BOUNDS, TAU
from experiments.train.runs import Run, find_runs

ARMS = {
    "geometric/fixed": "geometric rates, fixed",
    "geometric/repair": "the same under DensityLR",
    "flat/fixed": "one flat rate",
}


def draw(runs: dict[str, Run], stage: str) -> Figure:
    """A heat map for each arm of `ARMS`, with one colour scale."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    panels = figure.subplots(1, len(ARMS), sharey=True)
    histories = {arm: runs[arm].history for arm in ARMS}
    top = max(h.density(stage).max() for h in histories.values() if h is not None)
    for axes, (arm, title) in zip(panels, ARMS.items(), strict=True):
        history = histories[arm]
        assert history is not None
        density = history.density(stage)[:, :-1].T
        steps = history.steps
        mesh = axes.pcolormesh(
            [*steps, 2 * steps[-1] - steps[-2]],
            BOUNDS[:-1],
            np.ma.masked_less_equal(density, 0),
            norm=LogNorm(1e-4, top, clip=True),
            rasterized=True,
        )
        axes.axhline(TAU, color="white", linestyle="--", linewidth=1)
        for decision in history.decisions:
            if decision.stage == stage:
                axes.axvline(decision.step, color="tab:red", linewidth=1)
        axes.set(yscale="log", xlabel="optimizer step")
        accuracy = runs[arm].final["accuracy"]
        axes.set_title(f"{title}\ntest accuracy {accuracy:.1%}", fontsize="medium")
    panels[0].set_ylabel(f"|output of {stage}| / untrained RMS")
    figure.colorbar(mesh, ax=panels, label="share of the outputs per octave (log scale)")
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.study.picture", description=__doc__
    )
    parser.add_argument("runs", type=Path, help="a folder of runs that hold their histories")
    parser.add_argument("target", type=Path, help="the PNG to write")
    parser.add_argument("--stage", default="conv1")
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    runs = {
        run.arm: run
        for run in find_runs([options.runs])
        if (run.optimizer, run.seed) == (options.optimizer, options.seed) and run.history
    }
    missing = [arm for arm in ARMS if arm not in runs]
    if missing:
        print(f"error: {options.runs} holds no history of {', '.join(missing)}", file=sys.stderr)
        return 2
    options.target.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, options.stage).savefig(options.target, dpi=130, metadata={"Software": None})
    print(options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
