"""Run folders as the trainer leaves them: found, read, and every one of them accounted for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.train.runs.reading import FILES, printable, read_run
from experiments.train.runs.run import COLUMNS, METRICS, STATUSES, Run

__all__ = ["COLUMNS", "METRICS", "STATUSES", "Run", "find_runs", "read_run"]


def find_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read every run below the folders, by label; none twice, and none left out.

    Of several outcomes of one task, optimizer, rate, arm and seed the first by label counts
    (whatever it turned out to be), and the others become duplicates.

    Args:
        folders: run folders, or folders that hold some at any depth.

    Raises:
        NotADirectoryError: one of them is not a folder.
    """
    found: dict[Path, Run] = {}
    seen: set[Path] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is not a folder")
        name = folder.resolve().name
        for path, why in _run_folders(folder, seen):
            below = path.relative_to(folder).as_posix()
            label = printable(name if below == "." else f"{name}/{below}")
            found[path] = Run(label, "broken", why) if why else read_run(path, label)
    return _mark_duplicates(sorted(found.values(), key=lambda run: run.label))


def _run_folders(folder: Path, seen: set[Path]) -> Iterator[tuple[Path, str]]:
    """Folders with a run's files, links to folders included, each with why it cannot be read."""
    if folder.resolve() in seen:  # a link that leads back
        return
    seen.add(folder.resolve())
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield folder, f"cannot be listed: {error.strerror}"
        return
    if any(entry.name in FILES for entry in entries):
        yield folder, ""
    for entry in entries:
        if not entry.name.startswith(".") and entry.is_dir():  # .hydra has a config
            yield from _run_folders(Path(entry.path), seen)


def _mark_duplicates(runs: list[Run]) -> list[Run]:
    first: dict[tuple[object, ...], str] = {}
    marked = []
    for run in runs:
        if run.counts:
            what = (run.task, run.optimizer, run.rate, run.arm, run.ratio, run.seed)
            used = first.setdefault(what, run.label)
            if used != run.label:
                reason = f"{run.status}, but {used} is the same optimizer, arm and seed and counts"
                run = replace(run, status="duplicate", reason=reason)
        marked.append(run)
    return marked
