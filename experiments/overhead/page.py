"""The page of the overhead benchmark: one HTML file that asks the network for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.overhead.tables import case_rows, lines
from experiments.report.page import ARM_COLOURS, Chart, Line, Mark, chart, environment

__all__ = ["render"]


def render(result: Mapping[str, Any], warning: str = "") -> str:
    """The page.

    Args:
        result: from `measure`, or a kept file.
        warning: that the times are disturbed; empty: they are not.
    """
    return (
        environment()
        .get_template("overhead.html.jinja")
        .render(
            machine=result["machine"],
            warning=warning,
            lines=lines(result),
            states={True: "Holds", False: "Fails", None: "Not measured"},
            cases=[(case, case_rows(case)) for case in result["cases"].values()],
            chart=_batches(result["batches"]),
            batches=result["batches"],
            error=result["error"],
        )
    )


def _batches(batches: Mapping[str, Any]) -> Chart | None:
    names = {"repair": "reading", "floor": "floor", "fastai": "fastai"}
    drawn, marks = [], []
    for (arm, name), colour in zip(names.items(), ARM_COLOURS, strict=False):
        found = {int(size): entry[arm] for size, entry in batches.items() if arm in entry}
        if not found:
            continue
        points = [(size, cost[0]) for size, cost in found.items()]
        spread = [(size, cost[1], cost[2]) for size, cost in found.items()]
        drawn.append(Line(name, points, colour, spread=spread))
        marks += [
            Mark(size, cost, "dot", f"{name}, batch {size}: {cost:.2f} ms", colour)
            for size, cost in points
        ]
    return chart(
        drawn,
        marks,
        x="examples in a batch",
        y="ms",
        alt="Cost of a reading by batch size",
        caption="What one reading, the sum of its sample (floor) and fastai's hook on the same "
        "layers take, by batch size: medians, and bands of 95 % for them.",
        log_x=True,
        log_y=True,
    )
