"""Run folders as the trainer would leave them, without the training."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from densitylr import Decision, History, Reading, StageReading
from densitylr.history import EDGES, TAU, Cause

STAGES = ("conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x", "fc")
STUDY = {
    "title": "Repair of geometric rates",
    "primary": "accuracy",
    "reference": "flat/fixed",
    "baseline": "geometric/fixed",
    "treated": "geometric/repair",
    "harmless": "flat/repair",
    "smallest_effect": 0.005,
    "declared": "Repair of geometric rates gains at least 0.005 of accuracy.",
}
LEVEL = {"flat/fixed": 0.95, "flat/repair": 0.95, "geometric/repair": 0.945, "geometric/fixed": 0.9}


def fake_history(arm: str, seed: int, readings: int = 12, every: int = 5) -> History:
    """Densities that fall where a stage learns, with a raise and a lift-off where one is due."""
    rng = np.random.default_rng(seed)
    history = History()
    starved = arm == "geometric/fixed"
    for i in range(readings):
        stages, scales, rates, decisions = {}, {}, {}, []
        for k, stage in enumerate(STAGES):
            speed = 0.0 if starved and k < 3 else 1.0
            growth = 1 + 2 * speed * (1 - np.exp(-i / 4))
            a = np.abs(rng.standard_normal(2000)) * growth
            counts = np.bincount(np.searchsorted(EDGES, a), minlength=len(EDGES) + 1)
            near, first = float(np.mean(a <= TAU)), 0.08
            stages[stage] = StageReading(
                near_zero=near,
                untrained=first,
                displacement=abs(float(np.log(max(near, 1e-3) / first))),
                estimator="twin",
                near_zero_present=first,
                mean=0.0,
                rms=growth,
                rms0=1.0,
                count=2000,
                nonfinite=0,
                histogram=counts.astype(np.int64),
            )
            rates[stage] = 0.01 if arm.startswith("flat") else 0.01 * 1e-3 ** (1 - k / 5)
            boosted = arm == "geometric/repair" and k < 4
            before = min(0.01 / rates[stage], 4.0**i) if boosted else 1.0
            scales[stage] = min(0.01 / rates[stage], 4.0 ** (i + 1)) if boosted else 1.0
            if boosted and scales[stage] != before:
                rate = rates[stage]
                seen = {"near_zero": near, "untrained": first, "expected": 0.1}
                decisions.append(
                    Decision(
                        i * every,
                        stage,
                        "raise",
                        before,
                        scales[stage],
                        rate * before,
                        rate * scales[stage],
                        Cause.STARVED,
                        seen,
                    )
                )
            if boosted and i == 6:
                s, r = scales[stage], rates[stage] * scales[stage]
                numbers = {"near_zero": near, "untrained": first, "moved": 0.12}
                decisions.append(
                    Decision(i * every, stage, "lift-off", s, s, r, r, Cause.LIFT_OFF, numbers)
                )
        history.record(Reading(i * every, stages), rates, scales, decisions)
    return history


def fake_run(
    root: Path,
    arm: str = "geometric/repair",
    seed: int = 0,
    accuracy: float | None = None,
    optimizer: str = "sgd",
    status: str = "done",
    study: dict[str, Any] | None = STUDY,
    rate: float = 0.01,
    **changes: Any,
) -> Path:
    """Write one run folder and return it; ``changes`` replace entries of ``run.json``."""
    folder = root / optimizer / arm.replace("/", "-") / str(seed)
    folder = folder if rate == 0.01 else folder.with_name(f"{seed}-at-{rate:g}")
    folder.mkdir(parents=True)
    profile, controller = arm.split("/")
    rng = np.random.default_rng([seed, len(arm)])
    level = LEVEL.get(arm, 0.93)
    if accuracy is None and status == "done":
        accuracy = level + float(np.random.default_rng(seed).normal(0, 0.006))
        if not arm.startswith("flat"):  # the flat arms are to come out the same
            accuracy += float(rng.normal(0, 0.003))
    config = {
        "seed": seed,
        "epochs": 1,
        "data": {"name": "mnist", "batch_size": 64},
        "model": {"name": "resnet18"},
        "optimizer": {"name": optimizer, "lr": rate},
        "profile": {"name": profile, "ratio": 1e-3},
        "controller": {"name": controller},
        "study": study,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    finals = {"accuracy": accuracy, "macro_f1": None, "test_loss": None, "train_loss": None}
    if accuracy is not None:
        finals |= {"macro_f1": accuracy - 0.002, "test_loss": 3 * (1 - accuracy), "train_loss": 0.2}
    seconds = 20.0 + seed + 0.5 * arm.endswith("repair")
    final_hash = f"{profile if profile == 'flat' else arm}-{seed}"
    data = {
        "status": status,
        "reason": None if status == "done" else "the loss is not finite at step 31",
        "arm": arm,
        "optimizer": optimizer,
        "seed": seed,
        "steps": 150,
        "seconds": seconds + 1.4,
        "train_seconds": seconds,
        "final": finals,
        "hashes": {"initial": f"i{seed}", "batches": f"b{seed}", "final": final_hash},
        "versions": {"torch": "2.9.0", "numpy": "2.3.1"},
        "base_rates": {"conv1": 1e-5, "fc": 1e-2},
        "diagnoses": [
            {
                "stage": "conv1",
                "kind": "starved",
                "since_step": 10,
                "evidence": "displacement 0.004 after 20 steps, 0.1 expected",
                "action": "raise its learning rate",
                "text": "conv1 is starved",
            }
        ]
        if arm == "geometric/fixed"
        else [],
        "command": "python -m experiments.train --multirun experiment=repair",
    }
    (folder / "run.json").write_text(json.dumps(data | changes), encoding="utf-8")
    with open(folder / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["step", "seconds", "train_loss", "test_loss", "accuracy", "macro_f1"])
        for step in range(1, 151):
            loss = 2.3 * np.exp(-step / 40) + 0.15 + 0.02 * rng.random()
            row: list[Any] = [step, step * seconds / 150, loss, "", "", ""]
            if step % 15 == 0:
                reached = (accuracy or 0.1) * (1 - np.exp(-step / 22)) / (1 - np.exp(-150 / 22))
                row[3:] = [loss + 0.02, reached, reached - 0.002]
            table.writerow(row)
    fake_history(arm, seed).save(folder / "history.npz")
    return folder


def fake_sweep(root: Path, seeds: int = 4, optimizer: str = "sgd", **options: Any) -> Path:
    """Every arm under every seed."""
    for arm in LEVEL:
        for seed in range(seeds):
            fake_run(root, arm, seed, optimizer=optimizer, **options)
    return root
