"""Sweep results on one page.

The page is one HTML file that asks the network for nothing. The same runs give the same bytes.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.report.comparison import (
    HIGHER_IS_BETTER,
    LABELS,
    Bench,
    benches,
    judged_on,
    study_of,
    when,
)
from experiments.report.page import csv_uri, environment, save
from experiments.report.sections import (
    gap_sentence,
    reading,
    same_sentence,
    section,
    tuned_sentence,
    width_words,
)
from experiments.train.arms import RIVALS
from experiments.train.runs import METRICS, STATUSES, Run, find_runs

__all__ = ["render", "write_report"]


def render(runs: Sequence[Run], sources: Sequence[str] = ("FOLDER",)) -> str:
    """The report as HTML.

    Args:
        runs: what `find_runs` returned.
        sources: names of the folders, for the command that makes the report again.
    """
    study, notes = study_of(runs)
    per_optimizer = benches(runs, study)
    known = [run.arm for bench in per_optimizer for run in bench.others if run.arm]
    arms = list(dict.fromkeys([a for bench in per_optimizer for a in bench.arms] + sorted(known)))
    placed = {id(run) for bench in per_optimizer for run in bench.every}
    rivals = [bench for bench in per_optimizer if bench.every[0].optimizer in RIVALS]
    compared = [bench for bench in per_optimizer if bench not in rivals]
    pages = environment()
    pages.globals.update(gap_sentence=gap_sentence, same_sentence=same_sentence, reading=reading)
    pages.globals.update(tuned_sentence=tuned_sentence, width_words=width_words)
    commands = list(dict.fromkeys(run.command for run in runs if run.command))
    return pages.get_template("report.html.jinja").render(
        study=study,
        labels=LABELS,
        higher=HIGHER_IS_BETTER,
        notes=notes,
        written=when(study, runs),
        judged=judged_on(runs),
        sections=[section(bench, arms, _levels(bench, rivals)) for bench in compared],
        benches=per_optimizer,
        statuses=[s for s in STATUSES if s != "duplicate" or any(r.status == s for r in runs)],
        runs=runs,
        unplaced=[run for run in runs if id(run) not in placed],
        mishaps=[run for run in runs if run.status != "done"],
        metrics=METRICS,
        versions=_versions(runs),
        commands=commands,
        report_command=f"python -m experiments.report {' '.join(sources)}",
        csv=_csv_uri(runs),
    )


def _levels(bench: Bench, rivals: Sequence[Bench]) -> dict[str, float]:
    """Mean results of the rivals on the task of a bench."""
    found = {}
    for rival in rivals:
        if rival.every[0].task == bench.every[0].task:
            values = [v for run in rival.runs if (v := run.metric(bench.study.primary)) is not None]
            if values:
                found[rival.every[0].optimizer] = sum(values) / len(values)
    return found


def write_report(folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> int:
    """Read the runs below the folders and write the report, in one piece or not at all.

    Returns:
        How many run folders there were.

    Raises:
        NotADirectoryError: one of the folders is none.
        ValueError: there is no run below any of them.
        OSError: the report cannot be written.
    """
    runs = find_runs(folders)
    if not runs:
        names = ", ".join(map(str, folders))
        raise ValueError(f"no run found: no run.json or config.yaml anywhere below {names}")
    # An absolute path says more about a desk than a report should.
    sources = [p.name if p.is_absolute() else p.as_posix() for p in map(Path, folders)]
    page = render(runs, sources)
    save(page, Path(output))
    return len(runs)


def _versions(runs: Sequence[Run]) -> list[str]:
    names = sorted({name for run in runs for name in run.versions})
    found = {n: sorted({r.versions[n] for r in runs if n in r.versions}) for n in names}
    return [f"{name} {' and '.join(values)}" for name, values in found.items()]


def _csv_uri(runs: Sequence[Run]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    hashes = ("initial", "batches", "final")
    columns = ["run", "task", "optimizer", "rate", "arm", "ratio", "seed", "status", "reason"]
    columns += ["started", "steps", "train_seconds"]
    table.writerow([*columns, *METRICS, *(f"{name}_hash" for name in hashes)])
    for run in runs:
        numbers = [run.train_seconds if math.isfinite(run.train_seconds) else ""]
        numbers += ["" if (v := run.final.get(m)) is None else v for m in METRICS]
        seed = "" if run.seed is None else run.seed
        row = [run.label, run.task, run.optimizer, _csv(run.rate), run.arm, _csv(run.ratio), seed]
        row += [run.status, run.reason, run.started, run.steps, *numbers]
        table.writerow([*row, *(run.hashes.get(name, "") for name in hashes)])
    return csv_uri(text.getvalue())


def _csv(value: float | None) -> float | str:
    return "" if value is None else value
