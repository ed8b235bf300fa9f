"""The tables of ``docs/law.md`` on the search for a rate: how near it comes, and what was tried."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from experiments.gauntlet.law.committed import (
    DEVELOPED_ON,
    RESULTS,
    Record,
    cell_of,
    markdown,
    marked,
    records_of,
)
from experiments.gauntlet.law.signals import ALIGNMENT, judged, label, signals_of
from experiments.gauntlet.verdict import SETTING, compare_rules, mean_ranks, searches

__all__ = ["alignments", "late_raises", "lengths", "ranks", "rules", "search", "signals"]

LABELS = (
    ("creep=", "alignment_growth="),
    ("pull=", "alignment="),
    ("follow=", "alignment_window="),
    ("no creeping", "no raises after lift-off"),
    ("lowers, too, below", "also lowers rates below"),
    ("stops at the first pull below", "stops at the first alignment below"),
    ("the visible heard", "only visible displacements count"),
    ("all heard", "every displacement counts"),
    ("recover=True", "with recover=True"),
)
"""What the arms of the committed records are called in the tables."""


def search() -> str:
    """What `free` loses against the tuned flat rate, by network and optimizer, in points."""
    cells = searches(records_of("gauntlet"))
    rows = []
    for net in dict.fromkeys(c.net for c in cells):
        row: list[str] = [marked(net)]
        for optimizer in ("sgd", "adamw", "rmsprop"):
            lost = [c.lost for c in cells if (c.net, c.optimizer) == (net, optimizer)]
            row.append(f"{100 * np.mean(lost):+.1f} ({100 * max(lost):+.1f})" if lost else "–")
        rows.append(row)
    return markdown(rows, ["network", "sgd", "adamw", "rmsprop"])


def ranks() -> str:
    """Mean ranks of `free` and its rivals, with each optimizer inside of `free`."""
    records = records_of("gauntlet")
    found = [mean_ranks(records, inside) for inside in ("adamw", "sgd", "rmsprop")]
    order = sorted(found[0], key=lambda name: found[0][name])
    rows = [[name, *(f"{own[name]:.2f}" for own in found)] for name in order]
    return markdown(rows, ["optimizer", "AdamW in free", "SGD in free", "RMSprop in free"])


def _label(arm: str) -> str:
    for recorded, shown in LABELS:
        arm = arm.replace(recorded, shown)
    return arm


def rules() -> str:
    """What every rule of search that was tried loses, and *each by itself* in the same cells."""
    records = records_of("search_rules")
    rows = []
    for some, seeds in (
        ("chosen on", [r for r in records if r["seed"] >= 100]),
        ("0, looked at", [r for r in records if r["seed"] == 0]),
        ("1, 2", [r for r in records if 0 < r["seed"] < 100]),
    ):
        for rule, found in compare_rules(seeds).items():
            numbers = (found.lost, found.reference, found.worst)
            rows.append(
                [_label(rule), some, str(found.cells), *(f"{100 * n:+.1f}" for n in numbers)]
            )
    head = ["rule", "seeds", "cells", "points lost", "lost by “each by itself”", "worst cell"]
    return markdown(rows, head)


def late_raises() -> str:
    """Points lost by rules for raises after lift-off on the tuning networks, and by `free`."""
    lost = _lost(r for r in records_of("creeping") if r["net"] in DEVELOPED_ON)
    usual = {arm: own for (arm, *setting), own in lost.items() if setting == [300, "cosine", 32]}
    rows = []
    for arm, own in usual.items():
        both = own.keys() & usual["free"].keys()
        means = (np.mean([table[c] for c in both]) for table in (own, usual["free"]))
        rows.append(
            [
                _label(arm),
                str(len(both)),
                *(f"{m:+.1f}" for m in means),
                f"{max(own[c] for c in both):+.1f}",
            ]
        )
    rows.sort(key=lambda row: float(row[2]) - float(row[3]))
    return markdown(rows, ["rule", "runs", "points lost", "lost by free", "worst run"])


def lengths() -> str:
    """The same by `free` with and without late raises, for other lengths, schedules, batches."""
    lost = _lost(records_of("creeping"))
    rows = []
    for _, steps, schedule, batch in sorted(key for key in lost if key[0] == "free"):
        without = lost.get(("no creeping", steps, schedule, batch), {})
        own = lost["free", steps, schedule, batch]
        both = own.keys() & without.keys()
        means = [f"{np.mean([table[c] for c in both]):+.1f}" for table in (without, own)]
        rows.append([str(steps), schedule, str(batch), str(len(both)), *means])
    head = ["steps", "schedule", "batch", "runs", "without raises after lift-off", "free"]
    return markdown(rows, head)


def _lost(records: Iterable[Record]) -> dict[tuple[Any, ...], dict[tuple[Any, ...], float]]:
    """Points below the flat run of the same seed, by arm and setting, and in each by cell."""
    runs = list(records)
    flat = {_flat(r): r["accuracy"] for r in runs if r["arm"] == "fixed"}
    lost: dict[tuple[Any, ...], dict[tuple[Any, ...], float]] = defaultdict(dict)
    for r in runs:
        if r["arm"] != "fixed":
            setting = r["arm"], r["steps"], r["schedule"], r["batch"]
            lost[setting][cell_of(r)] = 100 * (flat[_flat(r)] - r["accuracy"])
    return lost


def _flat(record: Record) -> tuple[Any, ...]:
    return tuple(record[n] for n in (*SETTING, "seed"))


def signals() -> str:
    """Points lost by a loop that raises a rate while a signal says that it is too low."""
    rows = [
        [label(found.signal), f"{found.tuning:+.1f}", f"{found.others:+.1f}"]
        for found in judged(signals_of(RESULTS / "signals.jsonl.gz"), DEVELOPED_ON)
    ]
    return markdown(rows, ["signal, mean over steps 20 to 60", "tuning networks", "the other five"])


def alignments() -> str:
    """The alignment at six multiples of the tuned rate, by network and optimizer."""
    runs: dict[tuple[str, str], dict[float, float | None]] = defaultdict(dict)
    for r in signals_of(RESULTS / "signals.jsonl.gz"):
        runs[r["net"], r["optimizer"]][r["times"]] = r["signals"][ALIGNMENT]
    times = sorted({t for own in runs.values() for t in own})
    rows = [
        [marked(net), optimizer] + ["–" if own[t] is None else f"{own[t]:.3f}" for t in times]
        for (net, optimizer), own in runs.items()
    ]
    return markdown(rows, ["network", "optimizer", *(f"× {t:g}" for t in times)])
