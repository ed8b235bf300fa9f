"""``python -m tests.doctor.table``: the ten example scripts, alone and under the doctor.

Each is run healthy and ill. The table shows its last number alone, whether it is the same under
the doctor, and what the doctor found.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["SCRIPTS", "Example", "Run", "alone", "doctored", "environment", "run"]


from tests.support import ROOT


@dataclass(frozen=True)
class Example:
    """A script in ``examples/scripts``.

    Attributes:
        name: its file name without the ending.
        illness: what is wrong with the stages of the ill variant, by model and stage.
        needs: a package that it imports beside torch.
    """

    name: str
    illness: dict[tuple[str, str], str]
    needs: str = ""

    @property
    def path(self) -> Path:
        return ROOT / "examples" / "scripts" / f"{self.name}.py"

    @property
    def missing(self) -> str:
        """The reason why it cannot run here, or empty."""
        there = not self.needs or importlib.util.find_spec(self.needs) is not None
        return "" if there else f"{self.needs} is not installed"


SCRIPTS = [
    Example("plain_loop", {("model", "0"): "starved"}),
    Example("functions", {("net", "conv1"): "dead", ("net", "conv2"): "dead"}),
    Example("two_optimizers", {("net", f"body.{i}"): "starved" for i in (0, 2)}),
    Example("gan", {("G", str(i)): "starved" for i in (0, 2, 4)}),
    Example("accumulation_amp", {("model", "encoder"): "left out"}),
    Example("notebook_export", {("net", "b"): "bad gain"}),
    Example("accelerate_loop", {("model", str(i)): "hot" for i in (0, 2, 4)}, "accelerate"),
    Example("lightning_module", {("Classifier", "first"): "starved"}, "lightning"),
    Example(
        "hf_trainer",
        {("BertForSequenceClassification", f"bert.encoder.layer.{i}"): "starved" for i in (0, 1)},
        "transformers",
    ),
    Example("fastai_learner", {("Sequential", str(i)): "starved" for i in (0, 2)}, "fastai"),
]


@dataclass(frozen=True)
class Run:
    """A finished process."""

    code: int
    stdout: str
    stderr: str

    @property
    def number(self) -> str:
        """The last line that it printed."""
        return (self.stdout.splitlines() or [""])[-1]

    @property
    def words(self) -> dict[tuple[str, str], str]:
        """The state of each stage, by model and stage, as the terminal shows it."""
        found = {}
        model = ""
        table = False
        for line in self.stderr.splitlines():
            if head := re.match(r"(\S+?)(?: \(.*?\))?, \d+ steps? of ", line):
                model = head[1]
            if re.match(r"  stage +state ", line):
                table = True
            elif table and (row := re.match(r"  (\S+) +(\w+(?: \w+)?)  ", line)):
                found[model, row[1]] = row[2]
            elif not line.startswith("   "):
                table = False
        return found

    @property
    def verdicts(self) -> list[str]:
        """The sentence on each model."""
        found = re.findall(r"^(\S+?)(?: \(.*?\))?, \d+ steps? of [^:]*: (.*)$", self.stderr, re.M)
        return [f"{model}: {verdict}" for model, verdict in found]


def environment() -> dict[str, str]:
    """One thread, this checkout first on the path, and a terminal wide enough for any verdict."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "300"}


def run(command: list[str], folder: Path) -> Run:
    """Python with this command line, in a folder."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def alone(example: Example, folder: Path, *arguments: str) -> Run:
    """The script as it is."""
    return run([str(example.path), *arguments], folder)


def doctored(example: Example, folder: Path, *arguments: str) -> Run:
    """The script under the doctor."""
    return run(["-m", "densitylr", str(example.path), *arguments], folder)


def main() -> int:
    print("| script | | its last number, alone | the same under the doctor | what was found |")
    print("|---|---|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory() as name:
        for example in SCRIPTS:
            if example.missing:
                print(f"| {example.name} | | | | not run: {example.missing} |")
                continue
            for variant in ((), ("--ill",)):
                own = alone(example, Path(name), *variant)
                seen = doctored(example, Path(name), *variant)
                right = {k: w for k, w in seen.words.items() if w != "learning"} == (
                    example.illness if variant else {}
                )
                same = "yes" if own.number == seen.number and own.code == seen.code == 0 else "NO"
                failed = failed or same == "NO" or not right
                found = "; ".join(seen.verdicts) + ("" if right else " (NOT what it has)")
                state = "ill" if variant else "healthy"
                print(f"| {example.name} | {state} | {own.number} | {same} | {found} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
