"""One run folder, read: a run counts as a whole or not at all.

A folder with ``run.json`` is a run. One with ``config.yaml`` alone is a run that was killed or
is still going. A folder with a damaged file is a run too, a broken one, with the reason.
"""

from __future__ import annotations

import csv
import json
import math
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from densitylr import History
from experiments.train.runs.run import COLUMNS, METRICS, STATUSES, Run

__all__ = ["FILES", "printable", "read_run"]

FILES = ("run.json", "config.yaml", "metrics.csv", "history.npz")
_OTHERS = ("traceback.txt", "report.html")


def read_run(folder: str | os.PathLike[str], label: str | None = None) -> Run:
    """Read one run folder; what cannot be read makes a broken run, never an exception.

    Args:
        folder: holds ``run.json``, ``config.yaml``, ``metrics.csv`` and ``history.npz``.
        label: what to call it; default the folder's name.
    """
    folder = Path(folder)
    run = Run(label or folder.name, "incomplete", "killed or still running: there is no run.json")
    try:
        run = replace(run, ignored=_ignored(folder))
        # The configuration comes first: it says which arm a run belongs to that left no more.
        run = _with_config(run, folder / "config.yaml")
        if (folder / "run.json").exists():
            run = _with_outcome(run, folder / "run.json")
            run = _with_records(run, folder)
        elif not (folder / "config.yaml").exists():
            raise _BrokenError("neither run.json nor config.yaml beside the files of a run")
    except _BrokenError as error:
        run = replace(run, status="broken", reason=str(error))
    except Exception as error:  # whatever strange contents make a parser do
        reason = f"cannot be read: {type(error).__name__}: {_one_line(error)}"
        run = replace(run, status="broken", reason=reason)
    return run


class _BrokenError(Exception):
    pass


def _ignored(folder: Path) -> tuple[str, ...]:
    """Files that no run leaves, in a folder that is a run's and holds nothing else."""
    known = (*FILES, *_OTHERS)
    with os.scandir(folder) as entries:
        files = [e.name for e in entries if e.is_file() and not e.name.startswith(".")]
    return tuple(sorted(printable(name) for name in files if name not in known))


def printable(text: str) -> str:
    """The text without what cannot be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _with_config(run: Run, path: Path) -> Run:
    if not path.exists():
        return run
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _BrokenError(f"config.yaml: {_one_line(error)}") from error
    if not isinstance(config, dict):
        raise _BrokenError(f"config.yaml: expected a mapping, got {type(config).__name__}")
    try:
        json.dumps(config, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # an alias of itself, say
        raise _BrokenError(f"config.yaml: {_one_line(error)}") from error
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
        arm=printable(f"{profile}/{controller}") if profile and controller else "",
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
        started=str(data.get("started") or ""),
        traceback=str(data.get("traceback") or ""),
    )


def _with_records(run: Run, folder: Path) -> Run:
    curves, history, readings = None, None, 0
    if (folder / "metrics.csv").exists():
        curves = _read_curves(folder / "metrics.csv")
    elif run.status == "done":
        raise _BrokenError("metrics.csv is missing from a finished run")
    if (folder / "history.npz").exists():
        if not zipfile.is_zipfile(folder / "history.npz"):
            raise _BrokenError("history.npz: truncated, or not an .npz file")
        try:
            readings = len(History.load(folder / "history.npz"))
            history = folder / "history.npz"
        except (OSError, ValueError) as error:
            raise _BrokenError(f"history.npz: {_one_line(error.__cause__ or error)}") from error
    return replace(run, curves=curves, history_file=history, readings=readings)


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
    steps = columns[0]
    if not np.isfinite(steps).all() or (np.diff(steps) <= 0).any():
        raise _BrokenError("metrics.csv: the steps must be numbers that increase")
    return dict(zip(COLUMNS, columns, strict=True))


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:157] + "…"
