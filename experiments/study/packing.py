"""Finished runs in small files that can be committed, and back again.

A part of the study is one ``runs.json.gz``: of every run its settings, outcome, hashes and the
evaluations along the way, and no path of the machine it ran on. The densities of one run of each
arm lie beside it.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.train.runs import COLUMNS, Run

__all__ = ["load", "pack"]

_NAME = "runs.json.gz"
_LEFT_OUT = ("curves", "history_file", "traceback", "ignored")
_PATHS = ("output", "data.root", "hydra.")


def pack(runs: Sequence[Run], folder: Path, densities: bool = False) -> str:
    """Write the outcomes among the runs; the same runs make the same bytes.

    Args:
        runs: what `find_runs` found.
        folder: made where it is missing; what was packed there before is replaced.
        densities: keep those of one run of each optimizer and arm, of the smallest seed.

    Returns:
        What was packed and what was not, in words.
    """
    kept = sorted((run for run in runs if run.counts), key=_order)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("density-*.npz"):
        old.unlink()
    shown: dict[str, str] = {}
    records = []
    for run in kept:
        name = f"density-{run.arm.replace('/', '-')}-{run.optimizer}.npz"
        wanted = densities and name not in shown and run.seed == _first(kept, run)
        if wanted and run.history_file:
            shutil.copyfile(run.history_file, folder / name)
            shown[name] = run.label
        records.append(_record(run, name if shown.get(name) == run.label else ""))
    partial = folder / f".{_NAME}.partial"
    with open(partial, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(json.dumps(records, indent=0, allow_nan=False, default=str).encode())
    os.replace(partial, folder / _NAME)
    left = len(runs) - len(kept)
    return f"{len(kept)} runs packed" + (f", {left} unfinished ones left out" if left else "")


def load(folder: Path) -> list[Run]:
    """The packed runs of a part; none where nothing was packed.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / _NAME
    if not path.exists():
        return []
    try:
        records = json.loads(gzip.decompress(path.read_bytes()))
        return [_run(record, folder) for record in records]
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder.name}/{_NAME} is damaged: {error}") from error


def _order(run: Run) -> tuple[Any, ...]:
    return run.task, run.optimizer, run.arm, run.rate or 0, run.ratio or 0, run.seed or 0


def _first(runs: Sequence[Run], like: Run) -> int | None:
    seeds = [r.seed for r in runs if (r.optimizer, r.arm) == (like.optimizer, like.arm)]
    return min((seed for seed in seeds if seed is not None), default=None)


def _record(run: Run, density: str) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(Run) if f.name not in _LEFT_OUT]
    record = {name: getattr(run, name) for name in names}
    record["label"] = run.label.split("/")[-1]
    record["train_seconds"] = run.train_seconds if np.isfinite(run.train_seconds) else None
    record["command"] = " ".join(w for w in run.command.split() if not w.startswith(_PATHS))
    config = {key: value for key, value in run.config.items() if key not in ("output", "force")}
    data = {key: value for key, value in config.get("data", {}).items() if key != "root"}
    record["config"] = config | {"data": data}
    record["density"] = density
    record["curves"] = None
    if run.curves is not None:
        seen = np.isfinite(run.curves["accuracy"])
        record["curves"] = {
            name: [float(f"{v:.6g}") if np.isfinite(v) else None for v in run.curves[name][seen]]
            for name in COLUMNS
        }
    return record


def _run(record: dict[str, Any], folder: Path) -> Run:
    fields = dict(record)
    density, curves, seconds, readings = (
        fields.pop(name) for name in ("density", "curves", "train_seconds", "readings")
    )
    return Run(
        **fields,
        train_seconds=float("nan") if seconds is None else seconds,
        curves=None
        if curves is None
        else {name: np.array(values, dtype=np.float64) for name, values in curves.items()},
        history_file=folder / density if density else None,
        readings=readings if density else 0,
    )
