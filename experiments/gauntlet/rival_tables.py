"""The tables of ``docs/law.md`` on rivals that are given rates by layer, as `repair` is."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np

from experiments.gauntlet.cell import OPTIMIZERS, SCHEDULES
from experiments.gauntlet.committed import Record, by_cell, markdown, records_of
from experiments.gauntlet.rivals import LAYERWISE

__all__ = ["layerwise", "schedules"]


def schedules() -> str:
    """Mean accuracies over the networks and optimizers, on the same rates."""
    arms = ("fixed", *SCHEDULES, "repair")
    rows = []
    for (condition,), runs in by_cell(_records(), lambda r: (r["condition"],)).items():
        whole = [[run[arm] for arm in arms] for run in runs if {*arms} <= {*run}]
        if whole:
            means = [f"{mean:.3f}" for mean in np.mean(whole, 0)]
            rows.append([condition, str(len(whole)), *means])
    head = ["fixed", "ReduceLROnPlateau", "linear warm-up", "repair"]
    return markdown(rows, ["condition", "runs", *head])


def layerwise() -> str:
    """Mean accuracies over the networks, each optimizer at the same factors on its good rate."""
    columns = [
        *((name, "fixed") for name in LAYERWISE),
        *itertools.product(("sgd", "adamw"), ("fixed", "repair")),
    ]
    found: dict[str, dict[tuple[str, int], dict[tuple[str, str], float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for r in _records():
        if r["steps"] == 150:
            what = (r["optimizer"], r["arm"])
            found[r["condition"]][r["net"], r["seed"]][what] = r["accuracy"]
    rows = []
    for condition, runs in sorted(found.items()):
        whole = [[run[c] for c in columns] for run in runs.values() if {*columns} <= {*run}]
        if whole:
            means = [f"{mean:.3f}" for mean in np.mean(whole, 0)]
            rows.append([condition, str(len(whole)), *means])
    head = ["LARS", "LAMB", "SGD", "SGD, repair", "AdamW", "AdamW, repair"]
    return markdown(rows, ["condition", "runs", *head])


def _records() -> list[Record]:
    """The rivals', and in the same conditions ours and the fixed rates'."""
    rivals = records_of("rivals")
    conditions = {r["condition"] for r in rivals}
    others = (r for r in records_of("gauntlet") if r["condition"] in conditions)
    kept = [r for r in others if r["optimizer"] in OPTIMIZERS and r["arm"] in ("fixed", "repair")]
    return [*rivals, *kept]
