"""What watching costs: ``python -m experiments.overhead`` times training steps, arms interleaved.

It is a benchmark, not a test: run it on a machine that does nothing else. Results are kept in a
JSON file with a page beside it; ``--show FILE`` prints a kept file's table and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.gauntlet.law import fill
from experiments.overhead_arms import (
    CASES,
    EVERY_ARM,
    Times,
    idle_call,
    time_case,
)
from experiments.overhead_counts import (
    compiled,
    copies,
    growth,
    identical_losses,
    sample_error,
)
from experiments.overhead_page import render
from experiments.overhead_rivals import installed, versions
from experiments.overhead_tables import (
    PRIMARY,
    disturbed,
    lines,
    median_interval,
    readme_tables,
    said,
    table,
)
from experiments.report import save

__all__ = ["main", "measure", "summary", "table"]

BATCHES = (32, 64, 128, 256, 512)
SWEPT = ("bare", "repair", "floor", "fastai")


def summary(times: Times, taps: int, idle: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Medians with intervals of each arm, in ms.

    Args:
        times: of each round, from `time_case`.
        taps: hooked layers.
        idle: what a hook with nothing to do costs a call.

    Returns:
        By arm ``total`` (bare only), or ``probe``, ``quiet`` (direct) and ``difference`` (a step
        with a probe − one without).
    """
    arms: dict[str, dict[str, Any]] = {}
    waiting = taps * median_interval(idle)[0]
    for name, own in times.items():
        arm, _, kind = name.partition(", ")
        direct = [a + b for a, b in zip(own["hooks"], own["step"], strict=True)]
        if name == "bare":
            arms[name] = {"total": median_interval(own["total"])}
        elif kind:
            cost = tuple(v + waiting for v in median_interval(direct))
            arms.setdefault(arm, {})[kind] = cost
        else:
            arms[name] = {"probe": median_interval(direct), "quiet": (0.0, 0.0, 0.0)}
        if kind == "probe":
            arms[arm]["hooks"] = median_interval(own["hooks"])
        if name != "bare" and kind != "quiet":
            without = times[f"{arm}, quiet" if kind else "bare"]["total"]
            more = [a - b for a, b in zip(own["total"], without, strict=True)]
            arms[arm]["difference"] = median_interval(more)
    return arms


def measure(
    rounds: int, device: torch.device, cases: Sequence[str], batches: Sequence[int]
) -> dict[str, Any]:
    """All that the page shows, as plain numbers.

    Args:
        rounds: of each case, at a batch of 64; larger batches are given fewer.
        device: where the models are.
        cases: names in `CASES`; the first is also trained at every batch size.
        batches: batch sizes of the first case.
    """
    batch = 64
    before, used, began = _processor_seconds(), time.process_time(), time.monotonic()
    load = os.getloadavg()[0]
    idle = idle_call()
    result: dict[str, Any] = {"cases": {}, "batches": {}}
    bar = tqdm(total=len(cases) + len(batches) + 2, disable=None, leave=False)
    for name in cases:
        times, taps = time_case(CASES[name], batch, rounds, device, EVERY_ARM)
        result["cases"][name] = {
            "title": CASES[name].title,
            "batch": batch,
            "taps": taps,
            "rounds": rounds,
            "arms": summary(times, taps, idle),
        }
        bar.update()
    for size in batches:
        few = max(3, rounds * batch // (2 * max(batch, size)))
        times, taps = time_case(CASES[cases[0]], size, few, device, SWEPT)
        arms = summary(times, taps, idle)
        result["batches"][str(size)] = {
            "rounds": few,
            "bare": arms["bare"]["total"],
            **{arm: arms[arm]["probe"] for arm in SWEPT[1:] if arm in arms},
            "probe": arms["repair"]["probe"],
        }
        bar.update()
    result["losses"] = identical_losses(CASES[cases[0]], 16, 12, device)
    result["copies"] = copies(CASES[cases[0]], 16, device)
    result["compiled"] = compiled()
    result["growth"] = growth()
    bar.update()
    result["error"] = sample_error(device, batches=min(12, max(3, rounds)))
    bar.update()
    own = time.process_time() - used
    after = _processor_seconds()
    others = None
    if before is not None and after is not None:
        whole = (time.monotonic() - began) * (os.cpu_count() or 1)
        others = max(0.0, (after - before - own) / whole)
    result["machine"] = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "packages": versions(),
        "load": [load, os.getloadavg()[0]],
        "others": others,
        "seconds": time.monotonic() - began,
    }
    for name in cases if installed("wandb") else ():  # last: it leaves processes running
        times, taps = time_case(CASES[name], batch, rounds, device, ("bare", "wandb"))
        result["cases"][name]["arms"]["wandb"] = summary(times, taps, idle)["wandb"]
    bar.close()
    return result


def _processor_seconds() -> float | None:
    """Seconds that all processes have run, of all processors; None where it is not told."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system = (int(v) for v in fields[:3])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if a line fails."""
    parser = argparse.ArgumentParser(prog="python -m experiments.overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each arm (default 40)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="models")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="sizes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to keep the results, and a page beside it"
    )
    parser.add_argument(
        "--show", type=Path, nargs="+", metavar="FILE", help="time nothing: print the table of the "
        "first kept file and of one with Composer, and what holds and fails in the others"
    )  # fmt: skip
    parser.add_argument(
        "--write", type=Path, metavar="DOCUMENT", help="with --show: put it into a Markdown "
        "document, too, between <!-- cost --> and <!-- /cost -->, composer and asked"
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="torch's threads on the CPU (default: its own)")
    options = parser.parse_args(arguments)
    if options.show is not None:
        shown = [json.loads(file.read_text(encoding="utf-8")) for file in options.show]
        tables = readme_tables(shown)
        print(*tables.values(), sep="\n\n")
        if options.write is not None:
            document = options.write.read_text(encoding="utf-8")
            text = fill(document, {name: partial(str, text) for name, text in tables.items()})
            options.write.write_text(text, encoding="utf-8")
        return 0
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if PRIMARY not in options.cases:
        parser.error(f"--cases must name {PRIMARY}, of which the lines speak")
    cases = sorted(options.cases, key=lambda name: name != PRIMARY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages say on being imported
        result = measure(options.rounds, torch.device(options.device), cases, options.batches)
    target = options.json or Path("outputs") / "overhead" / f"{options.device}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    save(render(result, disturbed(result["machine"])), target.with_suffix(".html"))
    machine = result["machine"]
    print(table(result), "", sep="\n")
    judged = lines(result)
    print(*map(said, judged), sep="\n")
    loads = " and ".join(f"{v:.2f}" for v in machine["load"])
    print(f"{machine['threads']} threads; load average before and after {loads}")
    if warning := disturbed(machine):
        print(f"warning: {warning}")
    print(f"{target}\n{target.with_suffix('.html')}")
    return int(any(line["holds"] is False for line in judged))


def _rounded(value: Any) -> Any:
    """Five digits are more than a time holds."""
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
