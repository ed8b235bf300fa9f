"""The statistics of taps at one probe: rows of outputs in, one row of numbers each out.

Near-zero density in the sense of this package is *relative*: the share of a layer's outputs
that are small against the scale of the same layer, untrained: ``|a| < TAU * rms0``. Two other
numbers that are often given the same name have names of their own here: ``near_zero_absolute``
(``|a| <= 0.05``) and ``exactly_zero``.

`measure` makes a handful of passes over a matrix, whatever the number of taps in it, and never
waits for a device; `summarise` turns its sums into numbers on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "BINS",
    "COLUMNS",
    "EDGES",
    "ESTIMATORS",
    "TABLE",
    "TAU",
    "Scratch",
    "channel_slots",
    "channel_weights",
    "dormant",
    "loudness",
    "measure",
    "row_dtype",
    "summarise",
    "variety",
]

TAU = 0.1
"""Near zero is below this share of the untrained RMS."""

ABSOLUTE = 0.05

DORMANT = 0.025
"""A channel is dormant below this share of its layer's mean magnitude (Sokar et al., 2023)."""

CHANNELS = 256
"""Most channels of a tap that are looked at one by one: of more, each second, third …"""

FEW = 8
"""Examples below which their variance says nothing."""

COLUMNS = (
    "count",  # finite elements
    "near_zero_absolute",  # |a| <= 0.05
    "exactly_zero",
    "near_zero_present",  # |a| <= TAU * rms(a): against the present, not the untrained scale
    "sum",
    "norm",  # root of the sum of squares
    "rms0",  # the untrained RMS that the histogram is in units of
)

TABLE = (
    "count",
    "nonfinite",
    "near_zero",  # against rms0
    "near_zero_absolute",
    "near_zero_present",
    "exactly_zero",
    "mean",
    "std",
    "rms",
    "rms0",
    "reference_count",  # finite elements of the untrained twin's output, or of the first probe
    "reference_near_zero",  # near-zero elements there
    "dormant",
    "variety",  # share of the mean square that is variance over the examples
    "peak",  # the largest RMS of a forward since the last probe, NaN if one was not finite
    "estimator",  # where the reference is from: a place in ESTIMATORS
)
"""What is known of a tap on the host, beside its histogram: counts, moments, shares."""

ESTIMATORS = ("", "first-probe", "last-twin", "twin")

# Four bins an octave, TAU on an edge: magnitudes from 0.003 to 6.4 untrained RMS. A float32
# above 0 has its exponent and the first two bits of its mantissa in its upper 11 bits: shifted
# down, they are the *code* of |a| / (TAU * rms0), found in a twentieth of the time of a search.
_SHIFT = 21
_ONE = 127 * 4  # the code of 1.0
_OCTAVES = (-5, 6)
_FIRST = _ONE + 4 * _OCTAVES[0]
_LAST = _ONE + 4 * _OCTAVES[1]

EDGES: tuple[float, ...] = tuple(
    TAU * 2.0 ** (step // 4) * (1 + step % 4 / 4)
    for step in range(4 * _OCTAVES[0], 4 * _OCTAVES[1] + 1)
)
"""Upper edges of the histogram bins in units of rms0, exclusive; a last bin holds the rest."""

BINS = len(EDGES) + 1

_NEAR = EDGES.index(TAU) + 1

TINY = 1e-37
"""Least ``TAU * rms0`` to divide by: a layer that starts from zeros has an untrained RMS of 0."""


class Scratch:
    """What `measure` works in, kept from probe to probe.

    Args:
        rows, n: the shape of the matrices it serves.
        memory: at least ``3 * rows * n`` elements, 1-dim, float32; others may use it in between.

    Attributes:
        wide: a matrix in `row_dtype`.
        flags: three matrices in float32, in the same memory.
        limits: of the magnitudes that are counted in each of them.
        offsets: what makes a code a bin, of each row.
    """

    def __init__(self, rows: int, n: int, memory: Tensor) -> None:
        memory = memory[: 3 * rows * n]
        wide = memory[: 2 * rows * n].view(row_dtype(memory.device))
        self.wide = wide[: rows * n].view(rows, n)
        self.flags = memory.view(3, rows, n)
        limits = [torch.finfo(torch.float32).max, ABSOLUTE, 0.0]
        self.limits = memory.new_tensor(limits)[:, None, None]
        row = torch.arange(rows, dtype=torch.int32, device=memory.device)
        self.offsets = row[:, None] * BINS - (_FIRST - 1)


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
    scratch = scratch or Scratch(rows, n, values.new_empty(3 * rows * n))
    # The sums come first: what is counted afterwards is written over their memory.
    wide = scratch.wide.copy_(values).nan_to_num_(0.0, 0.0, 0.0)
    total, norm = wide.sum(1), torch.linalg.vector_norm(wide, dim=1)
    # A float32 sum of ones is exact up to 2**24.
    counter = None if n < 2**24 else row_dtype(values.device)
    values.abs_()
    counts = torch.le(values, scratch.limits, out=scratch.flags).sum(2, dtype=counter)
    # NaN where nothing is finite, and a positive one: a code has no sign.
    rms = (norm.square() / counts[0]).sqrt_().float().abs_()
    first = scratch.flags[0]
    present = torch.le(values, (TAU * rms)[:, None], out=first).sum(1, dtype=counter)
    rms0 = torch.where(rms0.isnan(), rms, rms0)
    if untrained is not None:
        rms0 = torch.where(untrained < 0, rms0, rms[untrained])
    scale = 1 / (TAU * rms0).clamp_(min=TINY)
    codes = torch.mul(values, scale[:, None], out=first).view(torch.int32)
    codes.bitwise_right_shift_(_SHIFT).clamp_(_FIRST - 1, _LAST)
    # Each row counts in bins of its own.
    found = _tally(codes.add_(scratch.offsets).view(-1), rows * BINS).view(rows, BINS)
    columns = [counts.T, *(c[:, None] for c in (present, total, norm, rms0)), found[:, :-1]]
    return torch.cat(columns, 1)


def _tally(codes: Tensor, bins: int) -> Tensor:
    """How often each of ``0 … bins - 1`` occurs, int64 ``[bins]``."""
    if codes.device.type == "cpu":
        return torch.bincount(codes, minlength=bins)
    # There bincount waits for the largest code.
    counts = torch.zeros(bins, dtype=torch.int64, device=codes.device)
    return counts.scatter_add_(0, codes.long(), torch.ones_like(codes, dtype=torch.int64))


def channel_slots(channels: Tensor) -> Tensor:
    """Where `dormant` adds up each element: one of `CHANNELS`, or ``CHANNELS`` for none of them.

    Args:
        channels: the channel of each element of a row, int64 ``[n]``; -1 for none. Of more than
            `CHANNELS` each second, third … is taken.
    """
    last = int(channels.max()) if len(channels) else 0
    stride = max(0, last) // CHANNELS + 1
    chosen = (channels >= 0) & (channels % stride == 0)
    return torch.where(chosen, channels // stride, CHANNELS)


def channel_weights(slots: Tensor) -> Tensor:
    """`DORMANT` times the share of a row's elements that each channel has; NaN where none.

    Args:
        slots: int64 ``[n]``, from `channel_slots`.

    Returns:
        float32 ``[CHANNELS]``.
    """
    counts = torch.bincount(slots, minlength=CHANNELS + 1)[:-1].float()
    return torch.where(counts > 0, DORMANT * counts / counts.sum(), torch.nan)


def dormant(magnitudes: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """How many of each row's channels have a mean magnitude of at most `DORMANT` of the row's.

    Args:
        magnitudes: ``[rows, n]``, float32; NaN and infinities count as 0.
        slots: int64 ``[rows, n]``, from `channel_slots`.
        weights: ``[rows, CHANNELS]``, from `channel_weights`.

    Returns:
        int64 ``[rows]``.
    """
    usable = torch.nan_to_num(magnitudes, 0.0, 0.0, 0.0)
    sums = usable.new_zeros(len(usable), CHANNELS + 1).scatter_add_(1, slots, usable)[:, :-1]
    return (sums <= weights * sums.sum(1, keepdim=True)).sum(1)


def summarise(rows: np.ndarray, sizes: np.ndarray) -> Mapping[str, np.ndarray]:
    """The numbers of each tap from the sums of `measure`.

    Args:
        rows: float64 ``[taps, len(COLUMNS) + BINS - 1]``.
        sizes: elements of each tap, without padding, ``[taps]``.

    Returns:
        Arrays ``[taps]``: the counts ``count``, ``nonfinite``, ``near_zero``,
        ``near_zero_absolute``, ``near_zero_present`` and ``exactly_zero``; the moments ``mean``,
        ``std``, ``rms`` and ``rms0``, in the units of the activation; and the ``histogram`` of
        ``|a| / rms0`` in the bins of `EDGES`, ``[taps, BINS]``.
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
        "std": np.sqrt(np.maximum(square - mean**2, 0)),
        "rms": np.sqrt(square),
        "histogram": histogram,
    }


def loudness(a: Tensor) -> Tensor:
    """Root mean square, 0-dim in `row_dtype`; NaN or infinite where an element is."""
    norm = torch.linalg.vector_norm(a, dtype=row_dtype(a.device))
    return norm.div_(math.sqrt(max(1, a.numel())))


def variety(a: Tensor, examples: int = 0) -> Tensor:
    """How much of ``a`` depends on the example: variance over the examples / mean square.

    Args:
        a: any shape and floating dtype.
        examples: the dimension along which the examples run.

    Returns:
        0-dim float32 in 0 … 1; NaN for fewer than 8 examples, where it is mostly noise, and
        where nothing but zeros is left.
    """
    if a.shape[examples] < FEW:
        return torch.full((), torch.nan, device=a.device)
    values = a.detach().movedim(examples, 0).reshape(a.shape[examples], -1).float()
    return (values - values.mean(0)).square().mean() / values.square().mean()
