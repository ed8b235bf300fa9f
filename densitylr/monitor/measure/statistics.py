"""The statistics of layers at one reading: rows of outputs in, one row of numbers each out.

Near-zero density in the sense of this package is *relative*: the share of a layer's outputs
that are small against the scale of the same layer, untrained: ``|a| < TAU * rms0``. It is neither
the share below a fixed threshold nor the share of exact zeros.

`measure` makes a handful of passes over a matrix, whatever the number of layers in it, and never
waits for a device; `summarise` turns its sums into numbers on the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from densitylr.history import BINS, EDGES, OCTAVES, TAU

__all__ = [
    "COLUMNS",
    "ESTIMATORS",
    "TABLE",
    "TAU",
    "Scratch",
    "measure",
    "near_zero_below",
    "row_dtype",
    "summarise",
]

COLUMNS = (
    "count",  # finite elements
    "near_zero_present",  # |a| <= TAU * rms(a): against the present, not the untrained scale
    "sum",
    "norm",  # root of the sum of squares
    "rms0",  # the untrained RMS that the histogram is in units of
)

TABLE = (
    "count",
    "nonfinite",
    "near_zero",  # against rms0
    "near_zero_present",
    "mean",
    "rms",
    "rms0",
    "reference_count",  # finite elements of the untrained twin's output, or of the first reading
    "reference_near_zero",  # near-zero elements there
    "example_variance",  # share of the mean square that is variance over the examples
    "peak_rms",  # the largest RMS of a forward since the last reading, NaN if one was not finite
    "estimator",  # where the reference is from: a place in ESTIMATORS
)
"""What is known of a layer on the host, beside its histogram: counts, moments, shares."""

ESTIMATORS = ("", "first-probe", "last-twin", "twin")

# Four bins an octave, TAU on an edge: magnitudes from 0.003 to 6.4 untrained RMS. A float32
# above 0 has its exponent and the first two bits of its mantissa in its upper 11 bits: shifted
# down, they are the *code* of |a| / (TAU * rms0), found in a twentieth of the time of a search.
_SHIFT = 21
_ONE = 127 * 4  # the code of 1.0
_FIRST = _ONE + 4 * OCTAVES[0]
_LAST = _ONE + 4 * OCTAVES[1]

_NEAR = EDGES.index(TAU) + 1

_LARGEST = torch.finfo(torch.float32).max

TINY = 1e-37
"""Least ``TAU * rms0`` to divide by: a layer that starts from zeros has an untrained RMS of 0."""


class Scratch:
    """What `measure` works in, kept from reading to reading.

    Args:
        rows, n: the shape of the matrices it serves.
        memory: at least ``2 * rows * n`` elements, 1-dim, float32; others may use it in between.

    Attributes:
        wide: a matrix in `row_dtype`.
        flags: a matrix in float32, in the same memory.
        offsets: what makes a code a bin, of each row.
    """

    def __init__(self, rows: int, n: int, memory: Tensor) -> None:
        memory = memory[: 2 * rows * n]
        wide = memory.view(row_dtype(memory.device))
        self.wide = wide[: rows * n].view(rows, n)
        self.flags = memory[: rows * n].view(rows, n)
        row = torch.arange(rows, dtype=torch.int32, device=memory.device)
        self.offsets = row[:, None] * BINS - (_FIRST - 1)


@contextlib.contextmanager
def near_zero_below(share: float) -> Iterator[None]:
    """Another threshold than `TAU`, for all monitors, while it is open: for studies of it."""
    global TAU
    kept, TAU = TAU, share
    try:
        yield
    finally:
        TAU = kept


def row_dtype(device: torch.device) -> torch.dtype:
    """float64, in which counts are exact up to 2**53; float32 where a device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def measure(
    values: Tensor, rms0: Tensor, untrained: Tensor | None = None, scratch: Scratch | None = None
) -> Tensor:
    """Statistics of each row.

    Args:
        values: ``[rows, n]``, float32; rows shorter than ``n`` are padded with NaN. Their signs
            are lost.
        rms0: ``[rows]``, float32, the untrained RMS; NaN where it is not known yet: then it is
            the row's own.
        untrained: int64 ``[rows]``: where it is to be found instead: the row of the untrained
            twin, or of the values themselves (for twins); -1 for none.
        scratch: memory to use, for this shape.

    Returns:
        ``[rows, len(COLUMNS) + BINS - 1]`` in `row_dtype`: `COLUMNS`, then the histogram but for
        its last bin. Thresholds and ratios are rounded to float32; sums are in `row_dtype`.
    """
    rows, n = values.shape
    scratch = scratch or Scratch(rows, n, values.new_empty(2 * rows * n))
    # The sums come first: what is counted afterwards is written over their memory.
    wide = scratch.wide.copy_(values).nan_to_num_(0.0, 0.0, 0.0)
    total, norm = wide.sum(1), torch.linalg.vector_norm(wide, dim=1)
    # A float32 sum of ones is exact up to 2**24.
    counter = None if n < 2**24 else row_dtype(values.device)
    values.abs_()
    flags = scratch.flags
    count = torch.le(values, _LARGEST, out=flags).sum(1, dtype=counter)
    # NaN where nothing is finite, and a positive one: a code has no sign.
    rms = (norm.square() / count).sqrt_().float().abs_()
    present = torch.le(values, (TAU * rms)[:, None], out=flags).sum(1, dtype=counter)
    rms0 = torch.where(rms0.isnan(), rms, rms0)
    if untrained is not None:
        rms0 = torch.where(untrained < 0, rms0, rms[untrained])
    scale = 1 / (TAU * rms0).clamp_(min=TINY)
    codes = torch.mul(values, scale[:, None], out=flags).view(torch.int32)
    codes.bitwise_right_shift_(_SHIFT).clamp_(_FIRST - 1, _LAST)
    # Each row counts in bins of its own.
    found = _tally(codes.add_(scratch.offsets).view(-1), rows * BINS).view(rows, BINS)
    columns = [c[:, None] for c in (count, present, total, norm, rms0)]
    return torch.cat([*columns, found[:, :-1]], 1)


def _tally(codes: Tensor, bins: int) -> Tensor:
    """How often each of ``0 … bins - 1`` occurs, int64 ``[bins]``."""
    if codes.device.type == "cpu":
        return torch.bincount(codes, minlength=bins)
    # There bincount waits for the largest code.
    counts = torch.zeros(bins, dtype=torch.int64, device=codes.device)
    return counts.scatter_add_(0, codes.long(), torch.ones_like(codes, dtype=torch.int64))


def summarise(rows: np.ndarray, sizes: np.ndarray) -> Mapping[str, np.ndarray]:
    """The numbers of each layer from the sums of `measure`.

    Args:
        rows: float64 ``[layers, len(COLUMNS) + BINS - 1]``.
        sizes: elements of each layer, without padding, ``[layers]``.

    Returns:
        Arrays ``[layers]``: the counts ``count``, ``nonfinite``, ``near_zero`` and
        ``near_zero_present``; the moments ``mean``, ``rms`` and ``rms0``, in the units of the
        activation; and the ``histogram`` of
        ``|a| / rms0`` in the bins of `EDGES`, ``[layers, BINS]``.
    """
    found = {name: rows[:, i] for i, name in enumerate(COLUMNS)}
    count = found["count"]
    n = np.maximum(count, 1)
    mean, square = found.pop("sum") / n, found.pop("norm") ** 2 / n
    histogram = np.empty((len(rows), BINS))
    histogram[:, :-1] = rows[:, len(COLUMNS) :]
    # The rest: a finite value in units of a tiny rms0 has the code of an infinite one.
    histogram[:, -1] = count - histogram[:, :-1].sum(1)
    return {
        **found,
        "nonfinite": sizes - count,
        "near_zero": histogram[:, :_NEAR].sum(1),
        "mean": mean,
        "rms": np.sqrt(square),
        "histogram": histogram,
    }
