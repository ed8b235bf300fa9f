"""The folder that a run of the doctor leaves: the page, and the histories."""

from __future__ import annotations

import re
from pathlib import Path

from densitylr.doctor.report.page import page
from densitylr.doctor.report.report import Report

__all__ = ["write"]


def write(found: Report, parent: Path, label: str) -> Path:
    """Write ``index.html`` and one ``history.npz`` a model into a new folder.

    Args:
        found: what was found.
        parent: made where it is missing.
        label: the folder is ``<label>-<n>``, n being the first number that is free.

    Returns:
        The folder.

    Raises:
        OSError: it cannot be written.
    """
    folder = _fresh(parent, re.sub(r"[^\w.-]+", "-", label))
    names = {}
    for number, model in enumerate(found.models, 1):
        several = f"-{number}" if len(found.models) > 1 else ""
        names[model.name] = f"history{several}.npz"
        model.history.save(folder / names[model.name])
    (folder / "index.html").write_text(page(found, names), encoding="utf-8")
    return folder


def _fresh(parent: Path, label: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = parent / f"{label}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
