"""When to look: often at first, rarely where nothing has been decided for long. No tensors."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EARLY", "PATIENCE", "RARE", "YOUNG", "Cadence", "check_every"]

EARLY = 20
"""Steps after the first probe with probes twice as often: what a starved stage loses here it does
not get back."""

PATIENCE = 20
"""The steps since the last decision over this are the steps to the next probe …"""

YOUNG = 40
"""Steps after the first probe in which a rate that is too high can leave a net mute."""

RARE = 10
"""… but never more than ``every`` times this."""


@dataclass
class Cadence:
    """The steps at which probes are due.

    Attributes:
        every: steps between two probes; half of that, rounded down, during the first `EARLY`.
        steady: do not look more rarely where nothing is decided.
        due: the step of the next probe.
        decided: the step of the last decision, or of the first probe.
        first: the step of the first probe; None before it. It comes late where nothing is read.
    """

    every: int
    steady: bool = False
    due: int = 0
    decided: int = 0
    first: int | None = None

    def young(self, step: int) -> bool:
        """Whether training has begun no more than `YOUNG` steps before."""
        return self.first is None or step - self.first <= YOUNG

    def looked(self, step: int, decided: bool) -> None:
        """There was a probe at ``step``, and whether something was decided at it."""
        if self.first is None:
            self.first = self.decided = step
        if decided:
            self.decided = step
        quiet = 0 if self.steady else (step - self.decided) // PATIENCE
        gap = min(max(quiet, self.every), RARE * self.every)
        self.due = step + (max(1, self.every // 2) if step - self.first < EARLY else gap)


def check_every(every: int) -> None:
    """Raise ValueError unless ``every`` is a positive integer."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a positive number of steps, got {every!r}")
