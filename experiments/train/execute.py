"""One config trained into its folder: once, whole, and never again while the config is the same."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from omegaconf import DictConfig, OmegaConf
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import densitylr
from densitylr import DensityLR, DensityMonitor, Diagnosis, find_stages
from experiments.train.arms import RIVALS, build_optimizer, controlled, profile_rates, rival
from experiments.train.config import Config, arm_name, check
from experiments.train.loop import Row, train
from experiments.train.runs import COLUMNS, read_run
from experiments.train.tasks import build_model, fingerprint, load

__all__ = ["execute", "run", "run_folder"]


def run_folder(config: Config, resolved: str) -> Path:
    """Where a run is kept: readable, and another one for every other config."""
    arm = arm_name(config).replace("/", "-")
    digest = hashlib.sha256(resolved.encode()).hexdigest()[:8]
    return Path(config.output) / f"{arm}-{config.optimizer.name}-seed{config.seed}-{digest}"


def write(path: Path, content: str) -> None:
    """Write a file in one piece or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def execute(config: Config, folder: Path) -> dict[str, Any]:
    """Train the arm that the config describes; returns the record for ``run.json``."""
    began = time.perf_counter()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = load(config.data)
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    initial = fingerprint(model)
    stages = find_stages(model)
    rates = profile_rates(config.profile, config.optimizer.lr, stages)
    if config.optimizer.name in RIVALS:
        optimizer = rival(config.optimizer.name, model)
    else:
        optimizer = build_optimizer(config.optimizer, rates, stages)
    optimizer = controlled(config.controller, optimizer, model)
    every = config.controller.every
    cosine = config.optimizer.schedule == "cosine"
    watcher = optimizer if isinstance(optimizer, DensityLR) else DensityMonitor(model, every=every)
    total = config.epochs * (len(data.train_x) // config.data.batch_size)
    total = min(total, config.max_steps or total)
    scheduler = CosineAnnealingLR(optimizer, total) if cosine else None
    with tqdm(
        total=total,
        desc=f"{arm_name(config)} {config.optimizer.name} seed {config.seed}",
        unit="step",
        disable=None,
        leave=False,
    ) as bar:

        def tick(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        outcome = train(
            model,
            optimizer,
            scheduler,
            data,
            batch_size=config.data.batch_size,
            epochs=config.epochs,
            seed=config.seed,
            eval_every=config.eval_every,
            max_steps=config.max_steps,
            tick=tick,
        )
    watcher.history.save(folder / "history.npz")
    write(folder / "metrics.csv", _table(outcome.rows))
    diagnoses = optimizer.diagnose() if isinstance(optimizer, DensityLR) else []
    return {
        "status": "diverged" if outcome.diverged else "done",
        "reason": "the training loss became NaN or infinite" if outcome.diverged else None,
        "steps": outcome.steps,
        "seconds": time.perf_counter() - began,
        "train_seconds": outcome.train_seconds,
        "final": outcome.final,
        "hashes": {
            "initial": initial,
            "batches": outcome.batch_hash,
            "final": fingerprint(model),
        },
        "base_rates": rates,
        "scales": optimizer.scales if isinstance(optimizer, DensityLR) else {},
        "diagnoses": [_plain(diagnosis) for diagnosis in diagnoses],
    }


def _plain(diagnosis: Diagnosis) -> dict[str, Any]:
    names = ("stage", "kind", "since_step", "evidence", "action")
    return {**{name: getattr(diagnosis, name) for name in names}, "text": str(diagnosis)}


def _table(rows: list[Row]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows({k: v for k, v in row.items() if v is not None} for row in rows)
    return text.getvalue()


def versions() -> dict[str, str]:
    return {
        "densitylr": densitylr.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "threads": str(torch.get_num_threads()),
        "machine": platform.machine(),
    }


def run(raw: DictConfig, command: str = "") -> dict[str, Any]:
    """Execute a run, or find it done: a finished run of the same config is not run again.

    A folder with a damaged file, or one that a killed run left behind, is not a finished run.
    Of two processes that want the same run one waits for the other and finds it done. A run that
    fails leaves ``run.json`` with the status ``failed``, and ``traceback.txt`` beside it.

    Raises:
        ValueError, FileNotFoundError: a value that cannot be used, data that is not there.
        Exception: whatever a bug raises, after the failure has been recorded.
    """
    config = OmegaConf.to_object(raw)
    assert isinstance(config, Config)
    check(config)
    identity = dataclasses.asdict(config)
    for key in ("output", "force", "study"):  # they do not change what is trained
        del identity[key]
    folder = run_folder(config, json.dumps(identity, sort_keys=True))
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return _run(raw, config, folder, command)


def _run(raw: DictConfig, config: Config, folder: Path, command: str) -> dict[str, Any]:
    label = f"{arm_name(config)} {config.optimizer.name} seed {config.seed}"
    done = folder / "run.json"
    if done.exists() and not config.force:
        before = read_run(folder)
        if before.counts:
            record: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
            print(f"{label}: {_sentence(record)}, as before ({folder})", flush=True)
            return record
        print(f"{label}: again, as it was {before.status} ({before.reason})", flush=True)
    for stale in (done, folder / "traceback.txt", *folder.glob(".*.partial")):
        stale.unlink(missing_ok=True)
    write(folder / "config.yaml", OmegaConf.to_yaml(raw, resolve=True))
    record = {"arm": arm_name(config), "optimizer": config.optimizer.name, "seed": config.seed}
    record |= {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    record |= {"command": command, "versions": versions()}
    try:
        record |= execute(config, folder)
    except Exception as error:
        record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        record |= {"traceback": traceback.format_exc(), "final": {}, "hashes": {}}
        write(folder / "traceback.txt", record["traceback"])
        write(done, json.dumps(record, indent=1, allow_nan=False))
        print(f"{label}: failed, see {folder / 'traceback.txt'}", file=sys.stderr, flush=True)
        raise
    write(done, json.dumps(record, indent=1, allow_nan=False))
    print(f"{label}: {_sentence(record)} ({folder})", flush=True)
    return record


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; the kernel lets go of it when this one dies."""
    with open(folder / ".lock", "w") as file:
        # Where the file system knows no locks, two sweeps at once may do a run twice.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sentence(record: dict[str, Any]) -> str:
    final = record["final"]
    return (
        f"{record['status']}, accuracy {final['accuracy']:.4f}, macro-F1 {final['macro_f1']:.4f}, "
        f"{record['train_seconds']:.0f} s"
    )
