"""The diagnosis in plain text, for a terminal."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Sequence

import numpy as np

from densitylr.doctor.report.report import ModelReport, Report

__all__ = ["sparkline", "text"]

BLOCKS = "▁▂▃▄▅▆▇█"
POINTS = 16

NARROW = 30
"""Characters beside the table below which the evidence goes under it."""


def text(report: Report, width: int | None = None) -> str:
    """The whole diagnosis: one line a stage, then what to do, worst first.

    Args:
        report: what was found.
        width: of the terminal, in characters. Default: that of the present one.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    parts = [textwrap.fill(f"densitylr: {report.headline}", width)]
    parts += [_model_report(model, width) for model in report.models]
    notes = [textwrap.fill(note, width, subsequent_indent="  ") for note in report.notes]
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])


def sparkline(values: Sequence[float] | np.ndarray, points: int = POINTS) -> str:
    """A row of block characters from 0 to the largest value; blank where nothing was read."""
    shown = np.asarray(values, dtype=float)
    if len(shown) > points:
        shown = shown[np.linspace(0, len(shown) - 1, points).round().astype(int)]
    largest = float(np.nanmax(shown)) if np.isfinite(shown).any() else 0.0
    levels = np.nan_to_num(shown / (largest or 1.0) * (len(BLOCKS) - 1)).round().astype(int)
    return "".join(" " if math.isnan(v) else BLOCKS[i] for v, i in zip(shown, levels, strict=True))


def _model_report(model: ModelReport, width: int) -> str:
    lines = textwrap.wrap(f"{model.title}: {model.verdict}", width)
    if model.stages:
        lines += ["", *_table(model, width)]
    for number, advice in enumerate(model.advice, 1):
        head = f"{number}. {advice.word}: {', '.join(advice.stages)}"
        lines += ["", *textwrap.wrap(head, width, subsequent_indent="   ")]
        for remedy in advice.remedies:
            lines += textwrap.wrap(
                f"{remedy.text}:", width, initial_indent="   ", subsequent_indent="   "
            )
            lines += ["", textwrap.indent(remedy.code, "       "), ""]
        if not lines[-1]:
            lines.pop()
    return "\n".join(lines)


def _table(model: ModelReport, width: int) -> list[str]:
    rows = [("stage", "state", "density", "rate")]
    rows += [(s.stage, s.word, sparkline(s.density), f"{s.rate:.1e}") for s in model.stages]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    indent = sum(widths) + 10
    beside = width - indent >= NARROW
    lines = []
    evidences = ["evidence", *(s.evidence for s in model.stages)]
    for row, evidence in zip(rows, evidences, strict=True):
        line = "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        if beside:
            first, *more = textwrap.wrap(evidence, width - indent) or [""]
            lines.append(f"{line}  {first}".rstrip())
            lines += [" " * indent + rest for rest in more]
        else:
            lines.append(line.rstrip())
            lines += textwrap.wrap(evidence, width, initial_indent="    ", subsequent_indent="    ")
    return lines
