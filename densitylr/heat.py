"""How far the largest rate can be trusted, up to which a repair raises the others. Pure, no torch.

Rates that differ tell which stages lag behind, not whether the largest of them is a good one. That
shows in the stages which have it, and at once: at a good rate the RMS of their outputs mostly stays
within a factor of two of what the untrained weights give in the first steps, at one that is a
hundred times too high it is soon dozens of times that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from densitylr.policy import ROUNDING, StageState
from densitylr.records import StageReading

__all__ = ["DOUBT", "Trust", "heat_at", "heated", "trusted"]

LATE = 3
"""A stage's first reading still counts if it comes within so many times the heeded steps."""

DOUBT = "outputs at your largest rate have changed"
"""How the reason begins for which a rate is taken back."""


class Trust(NamedTuple):
    """How far the largest rate is trusted.

    Attributes:
        heat: `heat_at` that rate.
        share: of it, up to which other stages may be raised.
    """

    heat: float | None
    share: float

    @property
    def why(self) -> str:
        """Why less than the largest rate is as high as a stage may go."""
        return f"{DOUBT} {math.exp(self.heat or 0.0):.3g}-fold in scale"


def heated(stage: StageState, seen: StageReading, heed: int) -> StageState:
    """The stage with how far the scale of its outputs has come.

    Args:
        stage: as it is at this reading.
        seen: its statistics.
        heed: steps from the stage's first one in which its outputs tell of its rate, or up to
            `LATE` times as many until it is first read; later they grow in good health, too.
    """
    steps = 0 if stage.first is None else stage.step - stage.first
    stage = dataclasses.replace(stage, heeded=steps < heed)
    over = steps > (heed if stage.heat is not None else LATE * heed)
    scales = seen.rms, seen.rms0
    if steps <= 0 or over or not all(0 < scale < math.inf for scale in scales):
        return stage  # unread, or it starts from zeros
    heat = abs(math.log(seen.rms / seen.rms0))
    return dataclasses.replace(stage, heat=max(stage.heat or 0.0, heat))


def heat_at(
    rate: float, stages: Mapping[str, StageState], rates: Mapping[str, float]
) -> float | None:
    """How far the scale of outputs has come at a rate: mean over the stages that have it of the
    largest ``|ln(rms / untrained rms)|`` so far; None where none has been seen.
    """
    there = (
        s for n, s in stages.items() if math.isclose(rates.get(n, 0.0), rate, rel_tol=ROUNDING)
    )
    seen = (stage.heat for stage in there)
    heats = [heat for heat in seen if heat is not None]
    return sum(heats) / len(heats) if heats else None


def trusted(heat: float | None, calm: float, steep: float) -> Trust:
    """All of a rate up to a heat of ``calm``; above, ``exp(-steep * (heat - calm))`` of it."""
    return Trust(heat, 1.0 if heat is None else math.exp(-steep * max(0.0, heat - calm)))
