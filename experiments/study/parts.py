"""The sweeps of the study, part by part: the commands that train them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["PARTS", "commands"]

_RIVALS = "prodigy,dadapt_adam,dadapt_sgd,dog,ldog,schedule_free"
_TUNED = ("controller=fixed", "seed=100,101")
_DIGITS = ("data=digits", "model=mlp", "epochs=10")
_BRACKETS = ("data=brackets", "model=reader")
_GRIDS = {"sgd": "1e-3,3e-3,1e-2,3e-2,1e-1,3e-1", "adamw": "1e-4,3e-4,1e-3,3e-3,1e-2,3e-2"}
_FRESH_RATES = {
    (_DIGITS, "sgd"): "3e-2",
    (_DIGITS, "adamw"): "3e-3",
    (_BRACKETS, "sgd"): "1e-1",
    (_BRACKETS, "adamw"): "1e-2",
}
"""The best of `_GRIDS` on the tuning seeds; the report says so, or else."""

PARTS: dict[str, list[tuple[str, ...]]] = {
    "story": [("profile=flat,geometric", "controller=fixed"), ()],
    "rate": [
        (),
        _TUNED,
        (f"optimizer={_RIVALS}", "controller=fixed", "optimizer.lr=1"),
    ],
    "profile": [(), ("profile=flat", "profile.ratio=1", "controller=fixed")],
    "fresh": [
        sweep
        for (task, optimizer), rate in _FRESH_RATES.items()
        for sweep in (
            (*task, f"optimizer={optimizer}", f"optimizer.lr={rate}"),
            (
                *(*task, f"optimizer={optimizer}", f"optimizer.lr={_GRIDS[optimizer]}"),
                *("profile=flat", *_TUNED),
            ),
        )
    ],
}
"""The sweeps of each part, beyond what its experiment says."""


def commands(part: str, overrides: Sequence[str] = ()) -> list[list[str]]:
    """The command of every sweep of a part.

    Args:
        part: one of `PARTS`.
        overrides: added to each, and stronger than the part's own.
    """
    start = [sys.executable, "-m", "experiments.train", "--multirun", f"experiment={part}"]
    own = {word.split("=")[0] for word in overrides}
    return [
        [*start, *(word for word in sweep if word.split("=")[0] not in own), *overrides]
        for sweep in PARTS[part]
    ]
