"""Run folders as the trainer leaves them: found, read, and every one of them accounted for.

A folder with ``run.json`` is a run. One with ``config.yaml`` alone is a run that was killed or
is still going. A folder with a damaged file is a run too, a broken one, with the reason: a run
counts as a whole or not at all.
"""

from __future__ import annotations

import csv
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from densitylr.history import History

__all__ = ["COLUMNS", "METRICS", "STATUSES", "Run", "find_runs", "read_run"]

STATUSES = ("done", "diverged", "failed", "incomplete", "broken", "duplicate")
METRICS = ("accuracy", "macro_f1", "test_loss", "train_loss")
COLUMNS = ("step", "seconds", "train_loss", "test_loss", "accuracy", "macro_f1")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        label: the folder's path, from the folder that was asked for on.
        status: one of `STATUSES`.
        reason: why it is not done; empty for a finished run.
        arm: profile and controller, ``"geometric/repair"``; empty if unknown.
        optimizer: ``"sgd"``, ``"adam"``, …; empty if unknown.
        seed: None if unknown.
        steps: optimizer steps done.
        train_seconds: wall-clock seconds of training, evaluations left out; NaN if unknown.
        final: last value of each of `METRICS`; None where there is no finite one.
        hashes: of the initial weights, the batches and the final weights.
        versions: of the libraries it ran under.
        base_rates: the user's learning rate of each stage.
        diagnoses: what the controller had to say, as recorded.
        command: what started it.
        config: the resolved configuration.
        curves: float64 ``[logged steps]`` for each of `COLUMNS`, NaN where nothing was logged.
        history: densities, scales and decisions; None where it was left out to keep results small.
    """

    label: str
    status: str
    reason: str = ""
    arm: str = ""
    optimizer: str = ""
    seed: int | None = None
    steps: int = 0
    train_seconds: float = math.nan
    final: dict[str, float | None] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    base_rates: dict[str, float] = field(default_factory=dict)
    diagnoses: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, npt.NDArray[np.float64]] | None = None
    history: History | None = None

    @property
    def counts(self) -> bool:
        """The run is an outcome, good or bad, and not a mishap."""
        return self.status in ("done", "diverged")

    def metric(self, name: str) -> float | None:
        """The final value of a metric, or None where the run is no outcome or has none."""
        return self.final.get(name) if self.counts else None


def find_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read every run below the folders, by label; none twice, and none left out.

    Of several outcomes of one optimizer, arm and seed the first by label counts (whatever it
    turned out to be), and the others become duplicates.

    Args:
        folders: run folders, or folders that hold some at any depth.

    Raises:
        NotADirectoryError: one of them is not a folder.
    """
    found: dict[Path, str] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        name = folder.resolve().name
        for path in _run_folders(folder):
            below = path.relative_to(folder).as_posix()
            found.setdefault(path.resolve(), name if below == "." else f"{name}/{below}")
    runs = [read_run(path, label) for path, label in found.items()]
    return _mark_duplicates(sorted(runs, key=lambda run: run.label))


def read_run(folder: str | os.PathLike[str], label: str | None = None) -> Run:
    """Read one run folder; what cannot be read makes a broken run, never an exception.

    Args:
        folder: holds ``run.json``, ``config.yaml``, ``metrics.csv`` and ``history.npz``.
        label: what to call it; default the folder's name.
    """
    folder = Path(folder)
    run = Run(label or folder.name, "incomplete", "killed or still running: there is no run.json")
    try:
        # The configuration comes first: it says which arm a run belongs to that left no more.
        run = _with_config(run, folder / "config.yaml")
        if (folder / "run.json").exists():
            run = _with_outcome(run, folder / "run.json")
            run = _with_records(run, folder)
    except _BrokenError as error:
        run = replace(run, status="broken", reason=str(error))
    return run


class _BrokenError(Exception):
    pass


def _run_folders(folder: Path) -> Iterator[Path]:
    for parent, below, files in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))  # .hydra has a config
        if "run.json" in files or "config.yaml" in files:
            yield Path(parent)


def _with_config(run: Run, path: Path) -> Run:
    if not path.exists():
        return run
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _BrokenError(f"config.yaml: {_one_line(error)}") from error
    if not isinstance(config, dict):
        raise _BrokenError(f"config.yaml: expected a mapping, got {type(config).__name__}")
    groups = {
        key: group if isinstance(group := config.get(key), dict) else {}
        for key in ("profile", "controller", "optimizer")
    }
    profile, controller = groups["profile"].get("name"), groups["controller"].get("name")
    if controller == "density":  # the trainer names this arm by what the controller does
        controller = groups["controller"].get("mode")
    seed = config.get("seed")
    return replace(
        run,
        config=config,
        arm=f"{profile}/{controller}" if profile and controller else "",
        optimizer=str(groups["optimizer"].get("name") or ""),
        seed=_count(seed),
    )


def _with_outcome(run: Run, path: Path) -> Run:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _BrokenError(f"run.json: {_one_line(error)}") from error
    if not isinstance(data, dict):
        raise _BrokenError(f"run.json: expected an object, got {type(data).__name__}")
    for key, kind in (("arm", str), ("optimizer", str), ("status", str), ("seed", int)):
        if key not in data:
            raise _BrokenError(f"run.json: {key} is missing")
        if not isinstance(data[key], kind) or isinstance(data[key], bool):
            raise _BrokenError(f"run.json: {key} must be {kind.__name__}, got {data[key]!r}")
    if data["status"] not in STATUSES[:3]:
        raise _BrokenError(
            f"run.json: status must be one of {', '.join(STATUSES[:3])}, got {data['status']!r}"
        )
    for key in ("final", "hashes", "versions", "base_rates"):
        if not isinstance(data.get(key) or {}, dict):
            raise _BrokenError(f"run.json: {key} must be an object, got {data[key]!r}")
    diagnoses = data.get("diagnoses") or []
    if not isinstance(diagnoses, list) or not all(isinstance(d, dict) for d in diagnoses):
        raise _BrokenError("run.json: diagnoses must be a list of objects")
    steps = data.get("steps")
    seconds = _finite(data.get("train_seconds"))
    return replace(
        run,
        status=data["status"],
        reason=str(data.get("reason") or ""),
        arm=data["arm"],
        optimizer=data["optimizer"],
        seed=data["seed"],
        steps=_count(steps) or 0,
        train_seconds=math.nan if seconds is None else seconds,
        final={name: _finite((data.get("final") or {}).get(name)) for name in METRICS},
        hashes={k: str(v) for k, v in (data.get("hashes") or {}).items() if v},
        versions={k: str(v) for k, v in (data.get("versions") or {}).items()},
        base_rates={
            k: rate
            for k, v in (data.get("base_rates") or {}).items()
            if (rate := _finite(v)) is not None
        },
        diagnoses=diagnoses,
        command=str(data.get("command") or ""),
    )


def _with_records(run: Run, folder: Path) -> Run:
    curves, history = None, None
    if (folder / "metrics.csv").exists():
        curves = _read_curves(folder / "metrics.csv")
    elif run.status == "done":
        raise _BrokenError("metrics.csv is missing from a finished run")
    if (folder / "history.npz").exists():
        if not zipfile.is_zipfile(folder / "history.npz"):
            raise _BrokenError("history.npz: truncated, or not an .npz file")
        try:
            history = History.load(folder / "history.npz")
        except (OSError, ValueError) as error:
            raise _BrokenError(f"history.npz: {_one_line(error.__cause__ or error)}") from error
    return replace(run, curves=curves, history=history)


def _read_curves(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    rows: list[list[float]] = []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = csv.reader(file)
            header = next(table, [])
            if missing := [name for name in COLUMNS if name not in header]:
                raise _BrokenError(f"metrics.csv: no column {', '.join(missing)}")
            for row in table:
                if len(row) != len(header):
                    raise _BrokenError(
                        f"metrics.csv: line {table.line_num} has {len(row)} fields, "
                        f"the header has {len(header)}"
                    )
                values = dict(zip(header, row, strict=True))
                rows.append([float(values[name]) if values[name] else math.nan for name in COLUMNS])
    except (OSError, ValueError, csv.Error) as error:
        raise _BrokenError(f"metrics.csv: {_one_line(error)}") from error
    columns = np.array(rows, dtype=np.float64).reshape(-1, len(COLUMNS)).T
    return dict(zip(COLUMNS, columns, strict=True))


def _mark_duplicates(runs: list[Run]) -> list[Run]:
    first: dict[tuple[str, str, int | None], str] = {}
    marked = []
    for run in runs:
        if run.counts:
            used = first.setdefault((run.optimizer, run.arm, run.seed), run.label)
            if used != run.label:
                reason = f"{run.status}, but {used} is the same optimizer, arm and seed and counts"
                run = replace(run, status="duplicate", reason=reason)
        marked.append(run)
    return marked


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "…"
