"""Sweep results on one page: ``python -m experiments.report FOLDER``.

The page is one HTML file that asks the network for nothing. The same runs give the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jinja2

from experiments.comparison import HIGHER_IS_BETTER, Bench, benches
from experiments.declaration import LABELS, judged_on, study_of, when
from experiments.fairness import tuned_sentence, width_words
from experiments.gauntlet.rivals import RIVALS
from experiments.report_sections import gap_sentence, reading, same_sentence, section
from experiments.results import METRICS, STATUSES, Run, find_runs
from experiments.stats import signed

__all__ = ["csv_uri", "environment", "main", "render", "save", "write_report"]

_DIGITS = {"steps": 0}  # decimals; four for everything else


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


def environment() -> jinja2.Environment:
    """The templates, with filters that write numbers as every page does."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters.update(
        number=_number, signed=signed, interval=_interval, unit=lambda m: _DIGITS.get(m, 4)
    )
    return pages


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


def save(page: str, target: Path) -> None:
    """Write a page, in one piece or not at all."""
    with tempfile.NamedTemporaryFile(
        "w",
        dir=target.parent,
        prefix=f".{target.name}.",
        encoding="utf-8",
        errors="replace",  # what a run says of itself may be no text at all
        newline="\n",
        delete=False,
    ) as file:
        try:
            file.write(page)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description="Compare controlled with fixed learning rates, seed by seed, and write one "
        "self-contained HTML page. Every run below the folders is accounted for: finished, "
        "diverged, failed, killed or damaged.",
        epilog="example: python -m experiments.report multirun/first outputs/extra --output r.html",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="run folder, or a folder with runs at any depth",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="where to write (default: report.html in the first FOLDER)"
    )
    options = parser.parse_args(arguments)
    output = Path(options.output) if options.output else Path(options.folders[0]) / "report.html"
    try:
        count = write_report(options.folders, output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{count} runs read")
    print(output)
    return 0


def _number(value: float | None, digits: int = 4) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def _interval(low: float | None, high: float | None, digits: int = 4) -> str:
    if low is None or high is None:
        return "none"
    return f"{signed(low, digits)} to {signed(high, digits)}"


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


def csv_uri(text: str) -> str:
    """Comma-separated values as something to download."""
    data = base64.b64encode(text.encode("utf-8", "replace")).decode("ascii")
    return f"data:text/csv;charset=utf-8;base64,{data}"


if __name__ == "__main__":
    sys.exit(main())
