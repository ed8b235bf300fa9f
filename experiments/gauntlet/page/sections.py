"""The content of each section of the gauntlet's page, for the template."""

from __future__ import annotations

import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from experiments.gauntlet.cells import ABLATIONS, OPTIMIZERS
from experiments.gauntlet.page.figures import Searched, closed_dots, search_lines
from experiments.gauntlet.verdict import (
    Closed,
    Record,
    closed,
    family,
    flat_runs,
    named,
    quiet,
    recovered,
    what,
)
from experiments.train.arms import RIVALS
from experiments.train.tasks import NETS

__all__ = ["ablated", "healthy", "naming", "recovery", "search", "starved", "summary", "tally"]

FAMILIES = ("healthy", "pretrained", "starved", "all-starved", "hot", "collapse", "beyond")
_SEARCHING = ("free", "warmup")


def tally(records: Sequence[Record]) -> dict[str, Any]:
    """Runs of each arm by network and optimizer, and with what settings they were trained."""
    arms = sorted({r["arm"] for r in records}, key=lambda arm: _place(("", "", arm)))
    groups = _by(records, "net", "optimizer")
    rows = []
    for net, optimizer in sorted(groups, key=lambda names: _place((*names, ""))):
        runs = groups[net, optimizer]
        rows.append(
            {
                "names": (net, optimizer),
                "arms": [sum(r["arm"] == arm for r in runs) for arm in arms],
                "conditions": len({r["condition"] for r in runs}),
                "seeds": _several(r["seed"] for r in runs),
                "steps": _several(r["steps"] for r in runs),
                "batches": _several(r["batch"] for r in runs),
                "diverged": sum(r["test_loss"] is None for r in runs),
            }
        )
    return {"arms": arms, "rows": rows}


def starved(records: Sequence[Record]) -> dict[str, Any] | None:
    """Shares and gaps by network and optimizer, the heat map, and the dots."""
    cells = closed(records)
    if not cells:
        return None
    nets, optimizers = _nets(c.net for c in cells), _optimizers(c.optimizer for c in cells)
    columns = sorted({profile(c.profile) for c in cells}, key=_natural)
    table = []
    for net in [*nets, "all"]:
        mine = [c for c in cells if net in (c.net, "all")]
        parts = [[c for c in mine if c.optimizer == o] for o in optimizers]
        table.append((net, [_share(part) for part in [*parts, mine]]))
    heat = []
    for net, optimizer in itertools.product(nets, optimizers):
        mine = [c for c in cells if (c.net, c.optimizer) == (net, optimizer)]
        row = [_heat([c for c in mine if profile(c.profile) == name]) for name in columns]
        if mine:
            heat.append((net, optimizer, row))
    pictures = [
        closed_dots(o, sorted((c for c in cells if c.optimizer == o), key=_of_cell), nets)
        for o in optimizers
    ]
    return {
        "optimizers": optimizers,
        "table": table,
        "columns": columns,
        "heat": heat,
        "pictures": [p for p in pictures if p],
        "random": sum(profile(c.profile) == "random" for c in cells),
    }


def profile(condition: str) -> str:
    """The condition's name; all random profiles share one."""
    return "random" if re.fullmatch(r"random-\d+", condition) else condition


def _share(cells: Sequence[Closed]) -> dict[str, Any]:
    gaps = [c for c in cells if c.there]
    return {
        "cells": len(cells),
        "passed": sum(c.passed for c in cells) / len(cells) if cells else None,
        "gaps": len(gaps),
        "closed": statistics.fmean(c.gap.fraction for c in gaps) if gaps else None,
    }


def _heat(cells: Sequence[Closed]) -> tuple[str, float | None]:
    """A class of the style sheet and the mean gap closed."""
    gaps = [c.gap.fraction for c in cells if c.there]
    if not gaps:
        if not cells:
            return "", None
        return ("none" if all(c.passed for c in cells) else "lost"), None
    mean = statistics.fmean(gaps)
    limits = (0.0, 0.25, 0.5, 0.75, 0.9 - 1e-9)
    return f"h{sum(mean >= limit for limit in limits)}", mean


def naming(records: Sequence[Record]) -> list[dict[str, Any]]:
    """By condition: how many faults were named rightly, the wrong names, and how soon."""
    groups = defaultdict(list)
    for finding in named(records):
        groups[finding.family, profile(finding.record["condition"])].append(finding)
    rows = []
    for kind, name in sorted(groups, key=lambda k: (FAMILIES.index(k[0]), _natural(k[1]))):
        findings = groups[kind, name]
        ill = [f for f in findings if f.ill]
        delays = [
            since - what(f.record).onset
            for f in ill
            for stage, said, since in f.record["named"]
            if stage in what(f.record).ill and said in what(f.record).kinds
        ]
        rows.append(
            {
                "family": kind,
                "condition": name,
                "runs": len(findings),
                "ill": len(ill),
                "rightly": sum(f.rightly for f in ill),
                "wrong": sum(bool(f.wrong) for f in findings),
                "steps": statistics.median(delays) if delays else None,
            }
        )
    return rows


def healthy(records: Sequence[Record]) -> list[dict[str, Any]]:
    """By condition: runs with a diagnosis or a decision that was not needed."""
    groups = defaultdict(list)
    for run in quiet(records):
        groups[run.record["condition"]].append(run)
    names = sorted(groups, key=lambda n: (n == "pretrained", n != "flat", n))
    return [
        {
            "condition": name,
            "runs": len(groups[name]),
            "alarmed": sum(q.alarmed for q in groups[name]),
            "acted": sum(q.acted for q in groups[name]),
            "paired": sum(q.paired for q in groups[name]),
            "changed": sum(q.changed for q in groups[name]),
        }
        for name in names
    ]


def search(records: Sequence[Record]) -> dict[str, Any] | None:
    """Where a search for the rate, or a rival, ends, against the tuned flat rate."""
    flats = flat_runs(records)
    groups = defaultdict(list)
    for record in records:
        if record["arm"] in (*_SEARCHING, *RIVALS) and (factor := _uniform(record)) is not None:
            start = None if record["arm"] in RIVALS else float(f"{record['start'] * factor:.3g}")
            setting = tuple(record[n] for n in ("batch", "steps", "schedule"))
            groups[record["net"], record["optimizer"], record["arm"], *setting, start].append(
                record
            )
    if not groups:
        return None
    rows = []
    lines: dict[str, dict[str, Searched]] = {}
    levels: dict[str, dict[str, float]] = defaultdict(dict)
    for key in sorted(groups, key=lambda k: (_place(k[:3]), k[3:6], k[6] or 0.0)):
        net, optimizer, arm, batch, steps, schedule, start = key
        flat = {
            s: r["accuracy"]
            for (a, s), r in flats.get((net, optimizer, batch, steps, schedule), {}).items()
            if a == "fixed"
        }
        runs = groups[key]
        mine = statistics.fmean(r["accuracy"] for r in runs)
        pairs = [r["accuracy"] - flat[r["seed"]] for r in runs if r["seed"] in flat]
        level = statistics.fmean(flat.values()) if flat else None
        rows.append(
            {
                "names": (net, optimizer, arm),
                "setting": f"{steps} steps, {schedule}" + (f", batch {batch}" * (batch != 32)),
                "start": "its own" if start is None else f"{start:g}",
                "runs": len(runs),
                "accuracy": mine,
                "flat": level,
                "difference": statistics.fmean(pairs) if pairs else None,
                "pairs": len(pairs),
            }
        )
        if start is not None and (batch, schedule) == (32, "cosine"):
            name = f"{net}, {steps} steps"
            lines.setdefault(name, {}).setdefault(optimizer, {}).setdefault(arm, []).append(
                (start, mine)
            )
            if level is not None:
                levels[name][optimizer] = level
    pictures = [search_lines(name, found, levels[name]) for name, found in lines.items()]
    return {"rows": rows, "pictures": [p for p in pictures if p]}


def _uniform(record: Record) -> float | None:
    """The one factor on the good rates; None where a condition does more than that."""
    name = record["condition"]
    if record["rate"] is not None or not (name == "flat" or name.startswith(("all-", "hot-all-"))):
        return None
    return float(next(iter(what(record).rates.values())))


def recovery(records: Sequence[Record]) -> list[Any]:
    """Cells that were made to collapse, in order."""
    return sorted(recovered(records), key=lambda c: (_place((c.net, c.optimizer, "")), c.condition))


def ablated(records: Sequence[Record]) -> dict[str, Any] | None:
    """Mean gap left by arm, on the starved cells that all arms have in common."""
    seen = {r["arm"] for r in records if family(r) == "starved"}
    arms = [a for a in ABLATIONS if a in seen]
    if not arms:
        return None
    tables = {
        arm: {_of_cell(c): c for c in closed(records, arm)}
        for arm in [*(["repair"] if "repair" in seen else []), *arms]
    }
    tables = {arm: cells for arm, cells in tables.items() if cells}
    if not tables:
        return None
    common = sorted(set.intersection(*(set(cells) for cells in tables.values())))
    rows = []
    for arm, table in tables.items():
        cells = [table[key] for key in common]
        gaps = [c for c in cells if c.there]
        rows.append(
            {
                "arm": arm,
                "own": len(table),
                "gaps": len(gaps),
                "left": float(np.mean([c.flat - c.repaired for c in gaps])) if gaps else None,
                **{k: v for k, v in _share(cells).items() if k != "gaps"},
            }
        )
    return {"rows": rows, "common": len(common)}


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a cell, over its seeds; random profiles together."""
    names = ("net", "optimizer", "condition", "arm", "batch", "steps", "schedule", "start", "rate")
    groups = defaultdict(list)
    for record in records:
        shown = {**record, "condition": profile(record["condition"])}
        groups[tuple(shown[n] for n in names)].append(record)
    rows = []
    for key in sorted(groups, key=lambda k: _order(dict(zip(names, k, strict=True)))):
        runs = groups[key]
        losses = [r["test_loss"] for r in runs if r["test_loss"] is not None]
        accuracies = [r["accuracy"] for r in runs]
        rows.append(
            {
                **dict(zip(names, key, strict=True)),
                "runs": len(runs),
                "accuracy": statistics.fmean(accuracies),
                "least": min(accuracies),
                "most": max(accuracies),
                "test_loss": statistics.fmean(losses) if losses else None,
                "diverged": len(runs) - len(losses),
            }
        )
    return rows


def in_order(records: Iterable[Record]) -> list[Record]:
    """As on the page: by network, optimizer, condition (flat first), arm, and the rest."""
    return sorted(records, key=_order)


def _order(r: Record) -> tuple[Any, ...]:
    rest = (r["batch"], r["steps"], r["schedule"], r["start"], r["rate"] or 0.0, r.get("seed", 0))
    net, optimizer, arm = _place((r["net"], r["optimizer"], r["arm"]))
    name = r["condition"]
    return (net, optimizer, name != "flat", _natural(name), arm, *rest)


def _place(names: Sequence[str]) -> tuple[Any, ...]:
    """Networks and optimizers as they are declared, ``fixed`` and ``repair`` first."""
    net, optimizer, arm = names
    known = (list(NETS), list(OPTIMIZERS), ["fixed", "repair"])
    return tuple(
        (group.index(name) if name in group else len(group), name)
        for group, name in zip(known, (net, optimizer, arm), strict=True)
    )


def _of_cell(cell: Closed) -> tuple[Any, ...]:
    return (*_place((cell.net, cell.optimizer, ""))[:2], _natural(cell.profile))


def _natural(text: str) -> tuple[Any, ...]:
    """``random-2`` before ``random-10``, and 1e-1 before 1e-2."""
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", text))


def _several(values: Iterable[int]) -> str:
    """``0 to 4`` for a run of numbers, or each of them."""
    found = sorted(set(values))
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def _by(records: Iterable[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record[n] for n in names)].append(record)
    return dict(groups)


def _nets(names: Iterable[str]) -> list[str]:
    found = set(names)
    return [n for n in NETS if n in found]


def _optimizers(names: Iterable[str]) -> list[str]:
    return sorted(set(names), key=lambda name: _place(("", name, ""))[1])
