"""Readings and decisions in TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from densitylr.history import BOUNDS, Decision, Reading, scalars

__all__ = ["TensorBoardSink"]

_LIMITS = BOUNDS[1:]  # the first bin begins at 0
_CENTRES = (_LIMITS + np.array([0.0, *BOUNDS[1:-1]])) / 2


class TensorBoardSink:
    """Scalars, histograms of ``|a| / rms0``, and decisions as text.

    Args:
        writer: a folder for event files of its own; or the user's ``SummaryWriter``, which
            `close` flushes and leaves open. In a folder that is written to again, after a
            checkpoint has been loaded, events of later steps than the first new one are
            hidden by TensorBoard.
        prefix: what all tags begin with.
    """

    def __init__(
        self, writer: str | os.PathLike[str] | SummaryWriter, prefix: str = "densitylr"
    ) -> None:
        self._writer = writer if isinstance(writer, SummaryWriter) else None
        self._folder = None if isinstance(writer, SummaryWriter) else os.fspath(writer)
        self.prefix = prefix

    def write(
        self,
        reading: Reading,
        rates: Mapping[str, float],
        scales: Mapping[str, float],
        decisions: Sequence[Decision],
    ) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(self._folder, purge_step=reading.step)
        for name, value in scalars(reading, rates, scales, self.prefix).items():
            self._writer.add_scalar(name, value, reading.step)
        for stage, seen in reading.stages.items():
            counts = seen.histogram
            if counts.any():
                self._writer.add_histogram_raw(
                    f"{self.prefix}/density/{stage}",
                    min=0.0,
                    max=float(_LIMITS[-1]),
                    num=int(counts.sum()),
                    sum=float(counts @ _CENTRES),
                    sum_squares=float(counts @ _CENTRES**2),
                    bucket_limits=_LIMITS.tolist(),
                    bucket_counts=counts.tolist(),
                    global_step=reading.step,
                )
        for decision in decisions:
            name = f"{self.prefix}/decisions/{decision.stage}"
            self._writer.add_text(name, f"{decision.kind}: {decision.reason}", reading.step)
        if decisions:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is None:
            return
        self._writer.flush()
        if self._folder is not None:
            self._writer.close()
            self._writer = None
