"""What the layers of one device put out at one reading, kept until all of it can be measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densitylr.history import BINS
from densitylr.monitor.measure.statistics import (
    COLUMNS,
    Scratch,
    measure,
    row_dtype,
)

__all__ = [
    "EXAMPLE_VARIANCE_AT",
    "PEAK_AT",
    "SHAPES",
    "SUMS",
    "UNKEPT",
    "SampleBuffer",
    "shares_memory",
]

SUMS = len(COLUMNS) + BINS - 1
EXAMPLE_VARIANCE_AT, PEAK_AT = SUMS, SUMS + 1
"""A row: what `measure` gives, example variance, peak RMS."""

UNKEPT = -1.0
"""The peak of a layer of which none is kept; NaN is that of one that was not finite."""

SHAPES = 16
"""Most shapes of one layer's output, or of one reading's samples, that are remembered."""

_Layout = tuple[tuple[int, ...], tuple[int, ...]]


class SampleBuffer:
    """Samples of the layers on one device, and one buffer with their statistics.

    Row ``i`` of `rows` is layer ``i``; those behind are the answers of the untrained twins.

    Args:
        rms0: the untrained RMS of each layer; None where it is not known yet.
        twins: the layers that have a twin.
        budget: samples up to this size are measured together.
        device: where they are.
        watched: the layers whose peaks are kept.
    """

    def __init__(
        self,
        rms0: Sequence[float | None],
        twins: Sequence[int],
        budget: int,
        device: torch.device,
        *,
        watched: Sequence[int] = (),
    ) -> None:
        self.layers = layers = len(rms0)
        self.budget = budget
        self.watched = list(watched)
        self.twin_row = {layer: layers + i for i, layer in enumerate(twins)}
        count = layers + len(twins)
        self.sizes = [0] * count
        self.rows = torch.zeros(count, PEAK_AT + 1, dtype=row_dtype(device), device=device)
        self.rows[:, EXAMPLE_VARIANCE_AT] = torch.nan
        self.rows[:, PEAK_AT] = UNKEPT
        self.peaks = self.rows[:, PEAK_AT].unbind()
        self.forget_peaks()
        known = [math.nan if value is None else value for value in rms0]
        real: dict[str, Any] = {"dtype": torch.float32, "device": device}  # whatever the default is
        self._rms0 = torch.tensor([*known, *[math.nan] * len(twins)], **real)
        # The row that knows the untrained RMS: a twin itself; of a layer its twin, or -1.
        self._partner = [-1] * layers + list(range(layers, count))
        self._memory = torch.empty(0, **real)
        self._scratch: dict[tuple[int, int], Scratch] = {}  # in the memory, by shape
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._values = torch.full((count, 0), torch.nan, **real)
        self._places: dict[int, Tensor] = {}  # where the samples of a row go, in their shape
        self._layouts: dict[int, _Layout] = {}
        self._views: dict[int, tuple[tuple[int, ...], int]] = {}  # of a layer without an answer
        self._fresh: set[int] = set()  # rows that were kept since the last `finish`

    def again(self, layer: int, output: Tensor) -> bool:
        """Keep the same sample as of the last output of a layer that nothing has answered to.

        Returns:
            False, and nothing is kept, if ``output`` does not lie in memory as that one did.
        """
        view = self._views.get(layer)
        if view is None or self._layouts[layer] != (output.shape, output.stride()):
            return False
        strides, offset = view
        place = self._places[layer]
        offset += int(output.storage_offset())
        place.copy_(output.as_strided(place.shape, strides, offset))
        self._fresh.add(layer)
        return True

    def put(
        self,
        layer: int,
        output: Tensor,
        sample: Tensor,
        answer: Tensor | None,
        *,
        again: bool,
    ) -> None:
        """Keep what was seen of a layer.

        Args:
            layer: its row.
            output: its output.
            sample: of ``output``, of any shape.
            answer: its twin's to the same input, of any shape; None where there is none.
            again: the next output that lies in memory alike may be sampled alike, by `again`.
        """
        if answer is not None:
            self._keep(self.twin_row[layer], answer)
        self._partner[layer] = -1 if answer is None else self.twin_row[layer]
        self._keep(layer, sample)
        self._layouts[layer] = output.shape, output.stride()
        self._views.pop(layer, None)
        if again and shares_memory(sample, output):
            offset = int(sample.storage_offset()) - int(output.storage_offset())
            self._views[layer] = sample.stride(), offset

    def finish(self) -> Tensor:
        """Measure what was kept. Returns `rows`. It waits for the device only where rows are
        grouped in a new way.
        """
        groups: dict[int, list[int]] = {}
        for row in sorted(self._fresh):
            groups.setdefault(max(self.sizes[row], self.budget), []).append(row)
        for rows in groups.values():
            self._measure(rows)
        self._fresh.clear()
        return self.rows

    def _measure(self, rows: list[int]) -> None:
        """Measure rows of like sizes; a layer and its twin are of one size."""
        at: slice | Tensor = slice(0, len(rows))
        if rows[-1] >= len(rows):  # not just the first so many
            at = self._index(rows)
        values = self._values[at, : max(self.sizes[row] for row in rows)]
        scratch = self._scratch_of(*values.shape)
        found = measure(values, self._rms0[at], self._untrained(rows), scratch)
        self.rows[at, :SUMS] = found
        self._rms0[at] = found[:, COLUMNS.index("rms0")].float()

    def _untrained(self, rows: list[int]) -> Tensor | None:
        """Where `measure` finds the untrained RMS; None where no twin is among the rows."""
        if rows[-1] < self.layers:
            return None
        place = {row: i for i, row in enumerate(rows)}
        return self._index([place.get(self._partner[row], -1) for row in rows])

    def _index(self, numbers: list[int]) -> Tensor:
        """On the device, which is waited for where they are new."""
        key = tuple(numbers)
        if key not in self._indices:
            if len(self._indices) >= SHAPES:
                self._indices.clear()
            self._indices[key] = torch.tensor(numbers, device=self.rows.device)
        return self._indices[key]

    def _scratch_of(self, rows: int, n: int) -> Scratch:
        if (rows, n) not in self._scratch:
            more = 2 * rows * n > self._memory.numel()
            if more or len(self._scratch) >= SHAPES:
                self._scratch.clear()
            if more:
                self._memory = self._memory.new_empty(2 * rows * n)
            self._scratch[rows, n] = Scratch(rows, n, self._memory)
        return self._scratch[rows, n]

    def forget_peaks(self) -> None:
        """The peaks start anew."""
        for layer in self.watched:
            self.peaks[layer].zero_()

    def _keep(self, row: int, sample: Tensor) -> None:
        """Copy a sample."""
        self._fresh.add(row)
        place = self._places.get(row)
        if place is not None and place.shape == sample.shape:
            place.copy_(sample)
            return
        if sample.numel() > self._values.shape[1]:
            self._widen(sample.numel())
        n = sample.numel()
        self._values[row, n:] = torch.nan
        self._places[row] = self._values[row, :n].view(sample.shape)
        self._places[row].copy_(sample)
        self.sizes[row] = n

    def _widen(self, width: int) -> None:
        """Make room for larger samples."""
        values = self._values
        self._values = values.new_full((len(values), width), torch.nan)
        self._values[:, : values.shape[1]] = values
        for row, place in self._places.items():
            self._places[row] = self._values[row, : place.numel()].view(place.shape)


def shares_memory(sample: Tensor, output: Tensor) -> bool:
    """Whether a sample is a view of the output, and no copy."""
    return sample.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
