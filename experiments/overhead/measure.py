"""Everything that the benchmark measures, as plain numbers."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.overhead.arms import CASES, EVERY_ARM, Times, idle_call, time_case
from experiments.overhead.counts import compiled, copies, growth, identical_losses, sample_error
from experiments.overhead.tables import (
    median_interval,
)
from experiments.overhead.watchers import installed, versions

__all__ = ["measure", "summary"]

SWEPT = ("bare", "repair", "floor", "fastai")


def summary(times: Times, layers: int, idle: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Medians with intervals of each arm, in ms.

    Args:
        times: of each round, from `time_case`.
        layers: hooked layers.
        idle: what a hook with nothing to do costs a call.

    Returns:
        By arm ``total`` (bare only), or ``probe``, ``quiet`` (direct) and ``difference`` (a step
        with a reading − one without).
    """
    arms: dict[str, dict[str, Any]] = {}
    waiting = layers * median_interval(idle)[0]
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
        times, layers = time_case(CASES[name], batch, rounds, device, EVERY_ARM)
        result["cases"][name] = {
            "title": CASES[name].title,
            "batch": batch,
            "layers": layers,
            "rounds": rounds,
            "arms": summary(times, layers, idle),
        }
        bar.update()
    for size in batches:
        few = max(3, rounds * batch // (2 * max(batch, size)))
        times, layers = time_case(CASES[cases[0]], size, few, device, SWEPT)
        arms = summary(times, layers, idle)
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
        times, layers = time_case(CASES[name], batch, rounds, device, ("bare", "wandb"))
        result["cases"][name]["arms"]["wandb"] = summary(times, layers, idle)["wandb"]
    bar.close()
    return result


def _processor_seconds() -> float | None:
    """Seconds that all processes have run, of all processors; None where that is not known."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system = (int(v) for v in fields[:3])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")
