"""Two processes that train one model, started by ``torch.distributed.run``, on the CPU."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from densitylr import DensityLR
from tests.matrix.cells import Cell, UnavailableError, need
from tests.support import ROOT
from tests.support.fixed import Fixed, batches, net, one_step, same

PATIENCE = 240
"""Seconds that a launch may take on a busy machine, less than a rank waits for another one."""

COLUMNS = ("unscaled = bare", "scaled = real groups", "ranks identical", "resume", "recover=True")
ROWS = {
    "DDP": "replicas",
    "DDP, ZeroRedundancyOptimizer": "replicas",
    "fully_shard, resumed by torch.distributed.checkpoint": "shards",
}
ALONE = {
    "two ranks read what one reads of the whole batch": ("replicas", "reading"),
    "a layer that one rank does not call": ("replicas", "branch"),
    "all ranks go back from a collapse": ("replicas", "collapse"),
    "two trainings, a process_group each": ("replicas", "own groups"),
    "ZeroRedundancyOptimizer, overlap_with_ddp": ("replicas", "overlap"),
    "ranks with other weights": ("replicas", "other weights"),
    "one rank resumed, the other not": ("replicas", "other steps"),
    "fully_shard: scales and twins as of replicas": ("shards", "as replicas"),
    "fully_shard: replicas of shards": ("shards", "hybrid"),
    "fully_shard: zero gradients in shards": ("shards", "gradients"),
    "fully_shard: bfloat16 forward": ("shards", "precision"),
    "fully_shard: twins of recurrent and attention layers": ("shards", "estimators"),
    "fully_shard: test of the weights": ("shards", "pretrained"),
    "FullyShardedDataParallel": ("shards", "FSDP1"),
    "tensor parallelism": ("shards", "tensor parallel"),
    "fewer batches on a rank, DDP.join": ("uneven", "join"),
    "the same, throw_on_early_termination": ("uneven", "ended together"),
    "a rank that does not come to a step": ("uneven", "late"),
    "a rank that dies": ("death", "death"),
}


def cells() -> list[Cell]:
    found = [
        Cell("distributed", row, column, functools.partial(_look_up, script, f"{row}: {column}"))
        for row, script in ROWS.items()
        for column in COLUMNS
    ]
    found += [Cell("distributed", "NCCL", column, _nccl) for column in COLUMNS]
    found += [
        Cell("one model, several processes", row, "outcome", functools.partial(_look_up, *place))
        for row, place in ALONE.items()
    ]
    more = {
        "Hugging Face callback, resumed": _hugging_face,
        "DataParallel, without a GPU": _data_parallel,
    }
    return found + [
        Cell("one model, several processes", row, "outcome", try_it) for row, try_it in more.items()
    ]


@functools.cache
def _launch(script: str) -> dict[str, list[str]]:
    """What ``tests/matrix/ranks/<script>.py`` found on two ranks: ``{name: [kind, reason]}``."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "-m", f"tests.matrix.ranks.{script}", str(target)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nended after {PATIENCE} s"
        found: dict[str, list[str]] = json.loads(target.read_text()) if target.exists() else {}
        return {**found, "output": ["failed", output[-4000:]]}


def _look_up(script: str, name: str) -> str | None:
    found = _launch(script)
    kind, reason = found.get(name, found["output"])
    if kind == "failed":
        raise AssertionError(reason)
    return reason or None


def _nccl() -> None:
    count = torch.cuda.device_count()
    raise UnavailableError(
        f"needs a process on each of two GPUs, here {count} can be seen; the cells above run on "
        "the CPU with gloo only"
    )


def _hugging_face() -> str | None:
    need("transformers", "huggingface")
    return _look_up("callbacks", "resumed")


def _data_parallel() -> None:
    """Without a GPU it calls the module itself; the stages are found through it."""
    ours, real = net(), net()
    parallel = torch.nn.DataParallel(ours)
    inner = torch.optim.SGD(ours.parameters(), lr=0.05)
    opt = DensityLR(inner, parallel, policy=Fixed({"0": 0.5}))
    groups = [
        {"params": [*real[0].parameters(), *real[1].parameters()], "lr": 0.025},
        {"params": [*real[3].parameters(), *real[5].parameters()]},
    ]
    plain = torch.optim.SGD(groups, lr=0.05)
    for batch in batches(4):
        one_step(parallel, opt, batch)
        one_step(real, plain, batch)
    assert same(ours, real)
    assert len(opt.history) > 1
