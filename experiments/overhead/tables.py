"""From the times of the overhead benchmark to tables and to sentences that hold or fail. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binom
from tabulate import tabulate

from densitylr.history import ReadingSchedule

__all__ = [
    "SPANS",
    "amortised",
    "case_rows",
    "disturbed",
    "lines",
    "median_interval",
    "probes",
    "readme_tables",
    "said",
    "table",
    "verdicts",
]

SPANS = (157, 938, 10_000)
"""Steps over which the cost is spread: one epoch of 10,000 and of 60,000 images in batches of
64, and a long run."""

PRIMARY = "mnist"
LIMIT = 0.01
TENTH = 0.1
FLOORS = 3.0
FLAT = 1.5

NAMES = {
    "repair": "repair, flat rates (default)",
    "twins": "every twin alive (observed, geometric)",
    "recover": "repair with `recover=True`",
    "fastai": "fastai `ActivationStats(with_hist=True, cpu=False)`, same layers",
    "fastai-cpu": "fastai `ActivationStats(with_hist=True)`, same layers",
    "composer": "Composer `ActivationMonitor`, same layers",
    "wandb": '`wandb.watch(log="gradients")`: parameters, not layers',
    "floor": "floor: the sum of the outputs that are read",
}
OTHERS = 0.05
"""Share of the machine's time that others may use before the times are called disturbed."""

Result = Mapping[str, Any]


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """The median and the order statistics that enclose that of the population.

    The interval is the shortest symmetric one with at least the nominal coverage, whatever the
    distribution; with too few values for any, their range.

    Raises:
        ValueError: there are no values.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    if n == 0:
        raise ValueError("the median of no values is not defined")
    low = max(0, int(binom.ppf((1 - level) / 2, n, 0.5)) - 1)
    return float(np.median(ordered)), float(ordered[low]), float(ordered[n - 1 - low])


def probes(steps: int, every: int = 5, steady: bool = False) -> int:
    """Readings in so many steps if nothing is ever decided."""
    schedule, count = ReadingSchedule(every, steady=steady), 0
    for step in range(steps):
        if step >= schedule.due:
            schedule.read(step, decided=False)
            count += 1
    return count


def amortised(probe: float, quiet: float, steps: int, count: int) -> float:
    """Cost of a step on average: ``count`` of ``steps`` cost ``probe``, the others ``quiet``."""
    return (count * probe + (steps - count) * quiet) / steps


def case_rows(case: Result) -> list[dict[str, Any]]:
    """For each arm: its cost at a step with a reading and without, and spread over `SPANS`.

    Other arms are timed at the reading schedule of densitylr. Costs are the direct ones,
    in ms; shares are of the bare step.
    """
    bare = case["arms"]["bare"]["total"][0]
    rows = []
    for arm in (name for name in NAMES if name in case["arms"]):
        found = case["arms"][arm]
        spread = []
        for steps in SPANS:
            count = probes(steps, steady=arm == "recover")
            cost = amortised(found["probe"][0], found["quiet"][0], steps, count)
            spread.append({"steps": steps, "probes": count, "ms": cost, "share": cost / bare})
        rows.append(
            {
                "arm": arm,
                "name": NAMES[arm],
                "probe": found["probe"],
                "quiet": found["quiet"],
                "difference": found["difference"],
                "spread": spread,
            }
        )
    return rows


def disturbed(machine: Mapping[str, Any]) -> str:
    """A warning if others used the machine meanwhile; empty if not, or if it is not known."""
    others = machine["others"]
    if others is None or others <= OTHERS:
        return ""
    return f"other processes used {others:.0%} of the machine meanwhile: the times are disturbed"


def table(result: Result) -> str:
    """The Markdown table of the primary case, with a warning where its times are disturbed."""
    case = result["cases"][PRIMARY]
    bare = case["arms"]["bare"]["total"]
    head = [
        f"{case['title']}, batch {case['batch']}: {bare[0]:.1f} ms a bare step",
        "ms, with a reading",
        "ms, without",
        *(f"share over {steps:,} steps" for steps in SPANS),
    ]
    rows = [
        [
            row["name"],
            f"{row['probe'][0]:.2f}",
            f"{row['quiet'][0]:.2f}",
            *(f"{s['share']:.2%}" for s in row["spread"]),
        ]
        for row in case_rows(case)
        if row["arm"] != "floor"
    ]
    align = ["left", *["right"] * (len(head) - 1)]
    text = tabulate(rows, head, tablefmt="github", colalign=align, disable_numparse=True)
    warning = disturbed(result["machine"])
    return f"{text}\n\nNot to be relied on: {warning}." if warning else text


def readme_tables(results: Sequence[Result]) -> dict[str, str]:
    """What the README shows of kept files: the costs of the first, those of one with Composer's
    monitor in it, which has an environment of its own, and what holds in the others.
    """
    apart = [r for r in results if "composer" in r["cases"][PRIMARY]["arms"]]
    usual = [r for r in results if r not in apart]
    tables = {"cost": table(usual[0])} if usual else {}
    if apart:
        tables["composer"] = table(apart[0])
    return tables | ({"asked": verdicts(usual)} if usual else {})


def verdicts(results: Sequence[Result]) -> str:
    """What holds and what fails, as text to be printed, for each number of threads."""
    blocks = []
    for result in results:
        threads = result["machine"]["threads"]
        head = f"{threads} thread{'s' if threads != 1 else ''}"
        blocks.append("\n".join([head, *(said(line) for line in lines(result))]))
    return "```\n" + "\n\n".join(blocks) + "\n```"


def _line(text: str, holds: bool | None, evidence: str) -> dict[str, Any]:
    return {"text": text, "holds": holds, "evidence": evidence}


def lines(result: Result) -> list[dict[str, Any]]:
    """Each sentence, whether it holds (None: not measured), and the numbers."""
    case = result["cases"][PRIMARY]
    arms = case["arms"]
    rows = {row["arm"]: row for row in case_rows(case)}
    short, epoch, long = rows["repair"]["spread"]
    probe, floor = arms["repair"]["probe"], arms["floor"]["probe"]
    named = f"{case['title']}, batch {case['batch']}"
    found = [
        _line(
            f"{named}: at most 1 % of the training time over {epoch['steps']} steps",
            epoch["share"] <= LIMIT,
            f"{epoch['share']:.2%} ({epoch['probes']} readings); over {short['steps']} steps "
            f"{short['share']:.2%} ({short['probes']}), over {long['steps']:,} "
            f"{long['share']:.2%} ({long['probes']})",
        )
    ]
    text = f"{named}: a reading takes at most a tenth of fastai's ActivationStats(with_hist=True)"
    if "fastai-cpu" in arms:
        theirs = min(arms["fastai"]["probe"][0], arms["fastai-cpu"]["probe"][0])
        found.append(
            _line(
                text,
                probe[0] <= TENTH * theirs,
                f"{_ms(probe)} against {theirs:.2f} ms, {probe[0] / theirs:.1%}",
            )
        )
    else:
        found.append(_line(text, None, "fastai is not installed"))
    found.append(
        _line(
            f"{named}: a reading takes at most {FLOORS:g} times as long as a sum of its sample",
            probe[0] <= FLOORS * floor[0],
            f"{_ms(probe)} against {_ms(floor)}, {probe[0] / floor[0]:.1f} times",
        )
    )
    sweep = [(int(n), entry["probe"]) for n, entry in result["batches"].items()]
    costs = [cost[0] for _, cost in sweep]
    found.append(
        _line(
            f"a reading costs the same at every batch from {sweep[0][0]} to {sweep[-1][0]}, "
            f"to a factor of {FLAT:g}",
            max(costs) <= FLAT * min(costs),
            ", ".join(f"{n}: {cost[0]:.2f} ms" for n, cost in sweep),
        )
    )
    same = result["losses"]
    found.append(
        _line(
            "losses and weights are those of a run without, bit for bit",
            same["losses"] and same["weights"],
            f"{same['steps']} steps, {result['cases'][PRIMARY]['title']}",
        )
    )
    graphs = result["compiled"]
    counted = [graphs[name] for name in ("graphs", "breaks", "recompilations")]
    found.append(
        _line(
            "under torch.compile: one graph, no break, nothing compiled again",
            counted == [1, 0, 0],
            "graphs {}, breaks {}, compiled again {}; {} readings".format(
                *counted, graphs["probes"]
            ),
        )
    )
    copied = result["copies"]
    found.append(
        _line(
            "a reading is one copy to the host for each device",
            copied["copies"] == copied["devices"] and not copied["scalars"],
            f"copies: {copied['copies']}, single numbers read: {copied['scalars']}, "
            f"devices: {copied['devices']}; where stages do not move, so that their gradients are "
            f"read, too: {copied['still']} copies",
        )
    )
    grown = result["growth"]
    more = "more" if grown["objects"] > 0 else "fewer"
    found.append(
        _line(
            "memory does not grow once the history is thinned",
            grown["objects"] <= 0 and grown["largest"] <= grown["budget"],
            f"{abs(grown['objects'])} {more} objects alive after {grown['steps']:,} steps than "
            "half-way; "
            f"{grown['largest']} readings of at most {grown['budget']}",
        )
    )
    on_gpu = result["machine"]["device"] != "cpu"
    found.append(
        _line("the same on a GPU", True if on_gpu else None, "" if on_gpu else "no GPU here")
    )
    return found[:-1] if on_gpu else found


def _ms(found: Sequence[float]) -> str:
    return f"{found[0]:.2f} ms ({found[1]:.2f} to {found[2]:.2f})"


def said(line: Mapping[str, Any]) -> str:
    """A sentence of `lines` as it is printed."""
    state = {True: "holds", False: "fails", None: "not measured"}[line["holds"]]
    return f"[{state}] {line['text']}\n    {line['evidence']}"
