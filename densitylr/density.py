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
    "near_zero_present",  # |a| <= TAU * rms(a): against the present, not the untrained scale
    "sum",
    "square",  # sum of squares
    "rms0",  # the untrained RMS that the histogram is in units of
    "exactly_zero",  # or below 2**-126 * TAU * rms0
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
_SUBNORMAL = 4  # codes below this: zero, or less than 2**-126
_CODES = 256 * 4

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
    """Memory that `measure` works in, kept from probe to probe.

    Args:
        elements: size of the largest matrix it serves.
        device: where.
    """

    def __init__(self, elements: int, device: torch.device) -> None:
        self.elements = elements
        self._memory = torch.empty(2 * elements, device=device, dtype=torch.float32)

    def wide(self, rows: int, n: int) -> Tensor:
        """All of it as a matrix in `row_dtype`."""
        dtype = row_dtype(self._memory.device)
        return self._memory.view(dtype)[: rows * n].view(rows, n)

    def halves(self, rows: int, n: int) -> tuple[Tensor, Tensor]:
        """The same memory as two matrices in float32."""
        first, second = self._memory[: 2 * rows * n].view(2, rows, n)
        return first, second


def row_dtype(device: torch.device) -> torch.dtype:
    """float64, in which counts are exact up to 2**53; float32 where a device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def measure(
    values: Tensor, rms0: Tensor, untrained: Tensor, scratch: Scratch | None = None
) -> Tensor:
    """Statistics of each row.

    Args:
        values: ``[rows, n]``, float32; rows shorter than ``n`` are padded with NaN.
        rms0: ``[rows]``, float32, the untrained RMS; NaN where it is not known yet.
        untrained: int64 ``[rows]``: where it is to be found: the row of the untrained twin, or
            of the values themselves (for twins); -1 takes ``rms0`` or, where that is not known,
            the row's own.
        scratch: memory to use, for ``rows * n`` elements.

    Returns:
        ``[rows, len(COLUMNS) + BINS - 1]`` in `row_dtype`: `COLUMNS`, then the histogram but for
        its last bin. Thresholds and ratios are rounded to float32; sums are in `row_dtype`.
    """
    rows, n = values.shape
    scratch = scratch or Scratch(rows * n, values.device)
    # The sums come first: what is counted afterwards is written over their memory.
    wide = scratch.wide(rows, n).copy_(values).nan_to_num_(0.0, 0.0, 0.0)
    total = wide.sum(1)
    square = torch.linalg.vector_norm(wide, dim=1).square()
    magnitude, flags = scratch.halves(rows, n)
    # A float32 sum of ones is exact up to 2**24.
    counter = None if n < 2**24 else row_dtype(values.device)

    def at_most(limit: float | Tensor) -> Tensor:
        return torch.le(magnitude, limit, out=flags).sum(1, dtype=counter)

    torch.abs(values, out=magnitude)
    count = at_most(torch.finfo(torch.float32).max)
    absolute = at_most(ABSOLUTE)
    # NaN where nothing is finite, and a positive one: a code has no sign.
    rms = (square / count).sqrt().float().abs()
    present = at_most((TAU * rms)[:, None])
    own = torch.where(rms0.isnan(), rms, rms0)
    rms0 = torch.where(untrained < 0, own, rms[untrained])
    codes = magnitude.mul_(1 / (TAU * rms0).clamp(min=TINY)[:, None]).view(torch.int32)
    codes.bitwise_right_shift_(_SHIFT)
    # Each row counts in bins of its own.
    codes += torch.arange(rows, dtype=torch.int32, device=values.device)[:, None] * _CODES
    found = _tally(codes.view(-1), rows * _CODES).view(rows, _CODES)
    zero, low = found[:, :_SUBNORMAL].sum(1), found[:, :_FIRST].sum(1)
    numbers = torch.stack((count, absolute, present, total, square, rms0, zero, low), 1)
    return torch.cat((numbers, found[:, _FIRST:_LAST]), 1)


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


def dormant(values: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Share of each row's channels whose mean magnitude is at most `DORMANT` of the row's mean.

    Args:
        values: ``[rows, n]``, float32; NaN and infinities count as 0.
        slots: int64 ``[rows, n]``, from `channel_slots`.
        weights: ``[rows, CHANNELS]``, from `channel_weights`.

    Returns:
        ``[rows]``, float32; NaN where no element has a channel.
    """
    magnitude = torch.nan_to_num(values, 0.0, 0.0, 0.0).abs_()
    sums = magnitude.new_zeros(len(values), CHANNELS + 1).scatter_add_(1, slots, magnitude)
    sums = sums[:, :-1]
    quiet = sums <= weights * sums.sum(1, keepdim=True)
    return quiet.sum(1) / (~weights.isnan()).sum(1)


def summarise(rows: np.ndarray, sizes: np.ndarray) -> Mapping[str, np.ndarray]:
    """The numbers of each tap from the sums of `measure`.

    Args:
        rows: float64 ``[taps, len(COLUMNS) + BINS - 1]``.
        sizes: elements of each tap, without padding, ``[taps]``.

    Returns:
        Arrays ``[taps]``: the counts ``count``, ``nonfinite``, ``near_zero``,
        ``near_zero_absolute``, ``near_zero_present`` and ``exactly_zero`` (which takes in what
        is below ``2**-126 * TAU * rms0``); the moments ``mean``, ``std``, ``rms`` and ``rms0``,
        in the units of the activation; and the ``histogram`` of ``|a| / rms0`` in the bins of
        `EDGES`, ``[taps, BINS]``.
    """
    found = {name: rows[:, i] for i, name in enumerate(COLUMNS)}
    n = np.maximum(found["count"], 1)
    mean, square = found.pop("sum") / n, found.pop("square") / n
    histogram = np.empty((len(rows), BINS), dtype=np.int64)
    histogram[:, :-1] = rows[:, len(COLUMNS) :]
    # The rest: a finite value in units of a tiny rms0 has the code of an infinite one.
    histogram[:, -1] = found["count"] - histogram[:, :-1].sum(1)
    return {
        **found,
        "nonfinite": sizes - found["count"],
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
