"""Kill a sweep at random moments and show what it costs: ``python -m experiments.kill_test``.

A tiny sweep is trained once undisturbed. The same sweep is then started over and over in another
folder, and each time its whole process group is killed (signal 9, which no program can catch) at
a random moment of a run; at last it is let through. What was finished before a kill must never
be trained again, what is there at the end must be every planned run with the undisturbed one's
weights and losses, and no half-written file may be taken for a result.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.train.runs import Run, find_runs

__all__ = ["Tally", "kill_repeatedly", "main"]

ROOT = Path(__file__).parents[1]
SWEEP = ["profile=geometric", "controller=density", "model.width=0.125", "data.batch_size=16"]
SWEEP += ["max_steps=12", "eval_every=100", "threads=1"]


@dataclass
class Tally:
    """What the kills came to.

    Attributes:
        kills: how often the sweep was killed.
        inside: kills that left a run unfinished.
        planned: runs of the sweep.
        lost: runs that were finished and are gone, or never finished, or came out otherwise.
        double: runs that were trained again although they were finished.
        broken: damaged files seen among what counts as finished, after any kill.
    """

    kills: int = 0
    inside: int = 0
    planned: int = 0
    lost: int = 0
    double: int = 0
    broken: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.lost} lost, {self.double} double, {self.broken} broken "
            f"({self.planned} runs planned; {self.inside} kills in the middle of a run)"
        )


def kill_repeatedly(kills: int, folder: Path, seed: int = 0, launch: str = "") -> Tally:
    """Run the test.

    Args:
        kills: how often.
        folder: where to train; two sweeps are left there.
        seed: of the moments.
        launch: ``"cores"`` for the joblib launcher; default one run at a time.
    """
    draw = random.Random(seed)
    tally = Tally(planned=kills + 2)
    command = [sys.executable, "-m", "experiments.train", "--multirun", *SWEEP]
    command += [f"seed={','.join(map(str, range(tally.planned)))}"]
    command += [f"launch={launch}"] if launch else []
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    _start([*command, f"output={undisturbed}"]).wait()
    reference = _outcomes(undisturbed)
    each = float(np.median(np.diff(sorted(_ended(undisturbed)))))
    seen: dict[Path, str] = {}
    while tally.kills < kills:
        process = _start([*command, f"output={killed}"])
        _wait_for_a_run(process, killed)
        time.sleep(draw.uniform(0, 1.5 * each))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        tally.kills += 1
        _compare(seen, killed, tally)
        tally.inside += any(run.status == "incomplete" for run in find_runs([killed]))
    _start([*command, f"output={killed}"]).wait()
    _compare(seen, killed, tally)
    outcomes = _outcomes(killed)
    tally.lost += sum(outcomes.get(s) != reference.get(s) for s in range(tally.planned))
    tally.lost += len(reference) < tally.planned
    return tally


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet, start_new_session=True)


def _ended(folder: Path) -> list[float]:
    return [path.stat().st_mtime for path in folder.glob("*/run.json")]


def _wait_for_a_run(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until the sweep works on a run that was not finished, or is through."""
    began = time.time()
    while process.poll() is None:
        if any(path.stat().st_mtime >= began for path in folder.glob("*/config.yaml")):
            return
        time.sleep(0.005)


def _compare(seen: dict[Path, str], folder: Path, tally: Tally) -> None:
    """Count what became of the finished runs, and remember those there are now."""
    runs = find_runs([folder]) if folder.is_dir() else []
    tally.broken += sum(run.status == "broken" for run in runs)
    for path, digest in seen.items():
        if not path.exists():
            tally.lost += 1
        elif _digest(path) != digest:
            tally.double += 1
    seen |= {path: _digest(path) for path in folder.glob("*/run.json")}


def _digest(record: Path) -> str:
    """Of the record's bytes and the moment it was written: a second training changes both."""
    return f"{hashlib.sha256(record.read_bytes()).hexdigest()} {record.stat().st_mtime_ns}"


def _outcomes(folder: Path) -> dict[int | None, tuple[object, ...]]:
    return {run.seed: _outcome(run) for run in find_runs([folder]) if run.status == "done"}


def _outcome(run: Run) -> tuple[object, ...]:
    """Everything about a run but its times."""
    losses = run.curves["train_loss"].tobytes() if run.curves else b""
    return tuple(sorted(run.hashes.items())), tuple(run.final.items()), run.steps, losses


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, 0 if nothing was lost, done twice or broken."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.kill_test",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20, help="how often (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--launch", default="", choices=["", "cores"], help="default: serially")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_repeatedly(options.kills, Path(folder), options.seed, options.launch)
    print(tally)
    return 0 if tally.lost == tally.double == tally.broken == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
