"""When to take a reading: often at first, rarely where nothing has been decided for long."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from densitylr.history.records import Count, restored

__all__ = ["ReadingSchedule", "check_every"]

EARLY = 20
"""Steps after the first reading with readings twice as often: what a starved stage loses here it
does not get back."""

PATIENCE = 20
"""The steps since the last decision over this are the steps to the next reading …"""

YOUNG = 40
"""Steps after the first reading in which a rate that is too high can make all outputs alike."""

RARE = 10
"""… but never more than ``every`` times this."""


@dataclass
class ReadingSchedule:
    """The steps at which readings are due.

    Attributes:
        every: steps between two readings; half of that, rounded down, during the first `EARLY`.
        steady: do not read more rarely where nothing is decided.
        due: the step of the next reading.
        decided: the step of the last decision, or of the first reading.
        first: the step of the first reading; None before it. It comes late where nothing is read.
    """

    every: int
    steady: bool = False
    due: int = 0
    decided: int = 0
    first: int | None = None

    def young(self, step: int) -> bool:
        """Whether training has begun no more than `YOUNG` steps before."""
        return self.first is None or step - self.first <= YOUNG

    def read(self, step: int, decided: bool) -> None:
        """There was a reading at ``step``, and whether something was decided at it."""
        if self.first is None:
            self.first = self.decided = step
        if decided:
            self.decided = step
        quiet = 0 if self.steady else (step - self.decided) // PATIENCE
        gap = min(max(quiet, self.every), RARE * self.every)
        self.due = step + (max(1, self.every // 2) if step - self.first < EARLY else gap)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"due": self.due, "decided": self.decided, "first": self.first}

    def restored(self, state: Mapping[str, Any]) -> ReadingSchedule:
        """This schedule, where another one was.

        Raises:
            KeyError, ValueError: the state is damaged.
        """
        due, decided = restored(Count, state["due"]), restored(Count, state["decided"])
        first = restored(Count | None, state["first"])
        return dataclasses.replace(self, due=due, decided=decided, first=first)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as another schedule would have."""
        self.__dict__.update(vars(self.restored(state)))


def check_every(every: int) -> None:
    """Raise ValueError unless ``every`` is a positive integer."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a positive number of steps, got {every!r}")
