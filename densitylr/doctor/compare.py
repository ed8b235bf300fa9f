"""Run a script twice, as it is and with `DensityLR` acting, and put both side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from densitylr.doctor.script import SEED, Target, interpreter, last_tenth, read

__all__ = ["compare"]


def compare(target: Target, mode: str, output: Path) -> int:
    """Run it twice in processes of their own, and print the two results on stderr.

    Python, numpy and torch are seeded alike before each run, and ``PYTHONHASHSEED`` is set.

    Args:
        target: what to run.
        mode: the mode of the second run.
        output: the folder for the folders of results of both runs.

    Returns:
        The exit code of the first run that failed, or 0.
    """
    names = ("as it is", f"--{mode}")
    results: dict[str, dict[str, Any]] = {}
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        for name, options in zip(names, ([], [f"--{mode}"]), strict=True):
            file = Path(folder) / f"{name}.json"
            print(f"\n=== {name}: {' '.join(['python', *target.command()])}", file=sys.stderr)
            command = [*interpreter(), "-m", "densitylr", *options, "--record", str(file)]
            command += ["--output", str(output), *target.command()]
            codes.append(_child(command))
            results[name] = read(file)
    print(_table(results), file=sys.stderr)
    return next((code for code in codes if code), 0)


def _child(command: list[str]) -> int:
    """Run it; an interrupt is the child's to answer."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        child = subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": str(SEED)})
        code = child.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"\ndensitylr: two runs from one seed ({SEED}; a script's own seeds come after it)"]
    for name, result in results.items():
        lines += [f"  {name}: {verdict}" for verdict in result["verdicts"]]
    places = list(dict.fromkeys(place for r in results.values() for place in r["losses"]))
    if not places:
        lines.append("no loss to compare: backward() was called on no scalar in this process")
        return "\n".join(lines)
    width = max(len(place) for place in places)
    heads = "".join(f"{name:>14}" for name in results)
    lines += ["", f"  {'loss at the end, at':<{width}}{heads}"]
    width = max(width, len("loss at the end, at"))
    for place in places:
        values = [r["losses"].get(place) for r in results.values()]
        cells = "".join(f"{last_tenth(v):>14.4g}" if v else f"{'-':>14}" for v in values)
        lines.append(f"  {place:<{width}}{cells}")
    lines.append("\n  means over the last tenth of the calls of backward(), as handed to it")
    return "\n".join(lines)
