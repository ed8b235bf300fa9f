"""The protocol of a sink, to which readings and decisions are written as they are recorded.

A `History` thins itself, and it is read after training. A sink gets every reading at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

from densitylr.history.records import Decision, Reading

__all__ = ["NUMBERS", "Sink", "offer", "scalars"]

NUMBERS = ("near_zero", "untrained", "displacement", "rms", "nonfinite")
"""The numbers of a `StageReading` that are logged as curves."""


class Sink(Protocol):
    """What is subscribed to a `History`; see `History.subscribe`.

    A sink keeps no reference to the model, the optimizer or the history.
    """

    def write(
        self,
        reading: Reading,
        rates: Mapping[str, float],
        scales: Mapping[str, float],
        decisions: Sequence[Decision],
    ) -> None:
        """Take what `History.record` has just been given.

        Args:
            reading: its ``step`` counts optimizer steps; after a checkpoint of an earlier step
                has been loaded, it goes back to there.
            rates: the user's own learning rate of each stage; empty under a bare monitor.
            scales: our factor on it, in force for the next step; empty under a bare monitor.
            decisions: what was decided at this reading, as a rule nothing.
        """

    def close(self) -> None:
        """Flush and release resources. The caller that created the sink calls this."""


def scalars(
    reading: Reading,
    rates: Mapping[str, float],
    scales: Mapping[str, float],
    prefix: str = "densitylr",
) -> dict[str, float]:
    """The finite `NUMBERS`, rates and scales of a reading as ``"prefix/number/stage"``.

    What was not read, or is not finite, is left out: a gap in the curve.
    """
    found: dict[str, float] = {}
    for stage, seen in reading.stages.items():
        found |= {f"{prefix}/{name}/{stage}": float(getattr(seen, name)) for name in NUMBERS}
    for name, values in (("rate", rates), ("scale", scales)):
        found |= {f"{prefix}/{name}/{stage}": float(value) for stage, value in values.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def offer(
    sinks: list[Sink],
    reading: Reading,
    rates: Mapping[str, float],
    scales: Mapping[str, float],
    decisions: Sequence[Decision],
) -> None:
    """Write to each sink. One that raises is taken out of the list, with a RuntimeWarning.

    A full disk or a closed run must not end a training run, nor warn at every reading.
    """
    for sink in list(sinks):
        try:
            sink.write(reading, rates, scales, decisions)
        except Exception as error:
            sinks.remove(sink)
            warnings.warn(
                f"{type(sink).__name__} failed at step {reading.step} and gets nothing more; "
                f"training goes on ({type(error).__name__}: {error})",
                RuntimeWarning,
                stacklevel=3,
            )
