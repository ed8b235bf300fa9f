"""Readings and decisions in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import wandb

from densitylr.history import BOUNDS, Decision, Reading, scalars

__all__ = ["WandbSink"]

_EDGES = np.array([0.0, *BOUNDS[1:]])


class WandbSink:
    """Scalars, histograms of ``|a| / rms0``, and decisions as text, over an axis of their own.

    The axis is ``"densitylr/step"``, in optimizer steps. The run's own step counter is the
    user's: nothing is committed, so a reading is stored with the user's next ``run.log``. Of
    several readings between two of those the last is stored, with the decisions of all.

    Args:
        run: the run; the one that ``wandb.init`` has made by default.
        prefix: what all names begin with.
        commit: commit each reading. Only for a run to which nothing else logs.

    Raises:
        ValueError: there is no run.
    """

    def __init__(
        self, run: wandb.Run | None = None, prefix: str = "densitylr", *, commit: bool = False
    ) -> None:
        run = run if run is not None else wandb.run
        if run is None:
            raise ValueError("there is no Weights & Biases run: call wandb.init first, or pass one")
        self.run, self.prefix, self.commit = run, prefix, commit
        self._row = -1  # of the user's counter, that the last reading waits in
        self._decided: list[str] = []
        run.define_metric(f"{prefix}/step", hidden=True)
        run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")

    def write(
        self,
        reading: Reading,
        rates: Mapping[str, float],
        scales: Mapping[str, float],
        decisions: Sequence[Decision],
    ) -> None:
        if self.commit or self.run.step != self._row:
            self._decided = []
        self._row = self.run.step
        self._decided += [f"step {d.step}: {d.kind}: {d}" for d in decisions]
        row: dict[str, Any] = scalars(reading, rates, scales, self.prefix)
        row[f"{self.prefix}/step"] = reading.step
        for stage, seen in reading.stages.items():
            if seen.histogram.any():
                row[f"{self.prefix}/density/{stage}"] = wandb.Histogram(
                    np_histogram=(seen.histogram, _EDGES)
                )
        if self._decided:
            row[f"{self.prefix}/decisions"] = "\n".join(self._decided)
        self.run.log(row, commit=self.commit)

    def close(self) -> None:
        """The run is the user's to finish, and stores what still waits."""
