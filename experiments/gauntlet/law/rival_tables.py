"""The tables of ``docs/law.md`` on rivals that are given rates by layer, as `repair` is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.gauntlet.cells import OPTIMIZERS, SCHEDULES
from experiments.gauntlet.law.committed import Record, by_cell, markdown, records_of
from experiments.train.arms import LAYERWISE

__all__ = ["layerwise", "schedules"]


def schedules() -> str:
    """Mean accuracies over the networks and optimizers, on the same rates."""
    arms = ("fixed", *SCHEDULES, "repair")
    return _means(_records(), arms, ["fixed", "ReduceLROnPlateau", "linear warm-up", "repair"])


def layerwise() -> str:
    """Mean accuracies over the networks, each optimizer at the same factors on its good rate."""
    found = [r | {"optimizer": "", "arm": f"{r['optimizer']} {r['arm']}"} for r in _records()]
    arms = [f"{name} fixed" for name in LAYERWISE]
    arms += [f"{name} {arm}" for name in ("sgd", "adamw") for arm in ("fixed", "repair")]
    head = ["LARS", "LAMB", "SGD", "SGD, repair", "AdamW", "AdamW, repair"]
    return _means(found, arms, head)


def _means(records: Sequence[Record], arms: Sequence[str], head: Sequence[str]) -> str:
    """By condition, over the cells that all of these arms have."""
    rows = []
    for (condition,), runs in by_cell(records, lambda r: (r["condition"],)).items():
        whole = [[run[arm] for arm in arms] for run in runs if {*arms} <= {*run}]
        if whole:
            means = [f"{mean:.3f}" for mean in np.mean(whole, 0)]
            rows.append([condition, str(len(whole)), *means])
    return markdown(rows, ["condition", "runs", *head])


def _records() -> list[Record]:
    """The rivals', and in the same conditions ours and the fixed rates'."""
    rivals = records_of("rivals")
    conditions = {r["condition"] for r in rivals}
    others = (r for r in records_of("gauntlet") if r["condition"] in conditions)
    kept = [r for r in others if r["optimizer"] in OPTIMIZERS and r["arm"] in ("fixed", "repair")]
    return [*rivals, *kept]
