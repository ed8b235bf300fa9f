"""Could a tensor be an independent draw from a known distribution of a known spread?

Pure statistics: a tensor and candidate spreads in, a sentence against them out. Every test
allows five standard errors of its own, because a model has hundreds of tensors and each takes
several tests: a small tensor, which can tell little, must not be blamed for noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

ERRORS = 5.0
"""Standard errors of a two-sided test: one false alarm in 1.7 million."""

_ENOUGH = 32  # a tensor with fewer elements cannot tell
_SAMPLE = 2**20  # elements read for moments and for the spectrum


@dataclass(frozen=True)
class Shape:
    """A zero-mean distribution of standard deviation 1: ``E|z|``, ``E|z|³``, ``E z⁴``, ``max|z|``.

    ``scales``: what a formula's spread may stand for, the spread after or before truncation.
    """

    name: str
    absolute: float
    cubed: float
    kurtosis: float
    limit: float = math.inf
    scales: tuple[float, ...] = (1.0,)


def _truncated_normal() -> Shape:
    """The normal cut off at two standard deviations, rescaled to standard deviation 1."""
    at0, at2 = (math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (0.0, 2.0))
    mass = math.erf(math.sqrt(2))
    variance = 1 - 4 * at2 / mass
    std = math.sqrt(variance)
    return Shape(
        "truncated normal",
        2 * (at0 - at2) / mass / std,
        2 * (2 * at0 - 6 * at2) / mass / std**3,
        (3 * variance - 16 * at2 / mass) / std**4,
        2 / std,
        (1.0, std),
    )


_NORMAL = Shape("normal", math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi), 3.0)
_UNIFORM = Shape("uniform", math.sqrt(3) / 2, 3 * math.sqrt(3) / 4, 1.8, math.sqrt(3))
_SHAPES = (_NORMAL, _UNIFORM, _truncated_normal())


@dataclass(frozen=True)
class _Moments:
    """Of a tensor: elements read, mean, RMS, mean magnitude; elements in all, their largest."""

    n: int
    mean: float
    rms: float
    absolute: float
    size: int
    largest: float


def is_constant(values: Tensor) -> bool:
    return bool((values == values.reshape(-1)[0]).all())


def is_orthogonal(weight: Tensor) -> bool:
    """Whether the vectors along the shorter side are orthogonal and of one length."""
    matrix = weight.reshape(weight.shape[0], -1)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    if matrix.shape[0] < 2:
        return False
    vectors = matrix[:64].double()
    gram = vectors @ vectors.T
    size = gram.diagonal().mean()
    error = (gram / size - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).abs().max()
    return bool(error <= max(1e-4, 4 * torch.finfo(weight.dtype).eps))


def _moments(values: Tensor) -> _Moments:
    flat = values.reshape(-1)
    stride = (flat.numel() // _SAMPLE) | 1 if flat.numel() > _SAMPLE else 1
    read = flat[::stride].double()
    rms = float(read.square().mean().sqrt())
    return _Moments(
        read.numel(),
        float(read.mean()),
        rms,
        float(read.abs().mean()),
        flat.numel(),
        float(flat.abs().max()),
    )


def draw_trace(
    values: Tensor,
    spreads: Mapping[str, float],
    normal_spreads: Mapping[str, float],
    uniform_spreads: Mapping[str, float] | None = None,
) -> tuple[str, list[Shape]]:
    """Compare a tensor with every known draw.

    Args:
        values: any shape.
        spreads: standard deviations by name, for every shape of distribution.
        normal_spreads: further ones for the normal distribution, whole or truncated.
        uniform_spreads: further ones for the uniform distribution.

    Returns:
        What speaks against all of them, empty if one fits; and the shapes that fit.
    """
    if values.numel() < _ENOUGH:
        return "", []
    seen = _moments(values)
    if not math.isfinite(seen.rms):
        return "not finite", []
    if abs(seen.mean) > ERRORS * seen.rms / math.sqrt(seen.n):
        return f"mean {seen.mean:.3g} at spread {seen.rms:.3g}, a draw has mean 0", []
    ratio = seen.absolute / seen.rms
    shapes = [s for s in _SHAPES if abs(ratio - s.absolute) <= ERRORS * _ratio_error(s, seen.n)]
    if not shapes:
        expected = ", ".join(f"{s.name} {s.absolute:.4f}" for s in _SHAPES)
        return f"shape: mean magnitude over RMS {ratio:.4f}, known are {expected}", []
    uniform, normal = {**spreads, **(uniform_spreads or {})}, {**spreads, **normal_spreads}
    candidates = [
        (shape, name, spread * scale)
        for shape in shapes
        for name, spread in (uniform if shape is _UNIFORM else normal).items()
        for scale in shape.scales
    ]
    if not candidates:
        return f"shape: {shapes[0].name}, no initialisation draws such a tensor from it", []
    near = [c for c in candidates if _same_spread(seen, c[2], c[0].kurtosis)]
    if not near:
        shape, name, spread = min(candidates, key=lambda c: abs(math.log(seen.rms / c[2])))
        return (
            f"spread {seen.rms:.4g}, no known initialisation gives that "
            f"(nearest: {shape.name}, {name}: {spread:.4g})",
            [],
        )
    rounding = 1e-5 + torch.finfo(values.dtype).eps
    tail = -NormalDist().inv_cdf(3e-7 / seen.size)
    fitting = [c for c in near if seen.largest <= min(c[0].limit, tail) * c[2] * (1 + rounding)]
    if not fitting:
        shape, name, spread = min(near, key=lambda c: abs(math.log(seen.rms / c[2])))
        return (
            f"largest magnitude {seen.largest:.4g}, a draw of {seen.size} ({shape.name}, {name}: "
            f"{spread:.4g}) stays below {min(shape.limit, tail) * spread:.4g}",
            [],
        )
    reached = [c for c in fitting if _reaches(c[0], seen.largest / c[2], seen.size)]
    if not reached:
        shape, name, spread = min(fitting, key=lambda c: abs(math.log(seen.rms / c[2])))
        return (
            f"largest magnitude {seen.largest:.4g}, a draw of {seen.size} ({shape.name}, {name}: "
            f"{spread:.4g}) goes further",
            [],
        )
    return "", list({id(c[0]): c[0] for c in reached}.values())


def _reaches(shape: Shape, largest: float, size: int) -> bool:
    """Whether chance may keep ``size`` draws below ``largest`` standard deviations."""
    if shape is _UNIFORM:
        below = largest / shape.limit
    elif shape is _NORMAL:
        below = math.erf(largest / math.sqrt(2))
    else:
        below = math.erf(largest * 2 / shape.limit / math.sqrt(2)) / math.erf(math.sqrt(2))
    return size * math.log(max(1e-300, min(1.0, below))) >= math.log(3e-7)


def _ratio_error(shape: Shape, n: int) -> float:
    """Standard error of mean magnitude over RMS, by the delta method."""
    g = shape.absolute
    variance = 1 - g * g - g * (shape.cubed - g) + g * g * (shape.kurtosis - 1) / 4
    return math.sqrt(variance / n)


def _same_spread(seen: _Moments, spread: float, kurtosis: float) -> bool:
    freedom = 2 * seen.n / (kurtosis - 1)
    return abs(_wilson_hilferty((seen.rms / spread) ** 2, freedom)) <= ERRORS


def _wilson_hilferty(ratio: float, freedom: float) -> float:
    """A chi-square over its degrees of freedom, as a standard normal."""
    spread = 2 / (9 * freedom)
    return (math.pow(ratio, 1 / 3) - (1 - spread)) / math.sqrt(spread)


def structure_trace(weight: Tensor, shapes: list[Shape]) -> str:
    """What says that the entries of a weight are not independent; empty if nothing does."""
    matrix = weight.reshape(weight.shape[0], -1)
    rows, columns = matrix.shape
    if min(rows, columns) < 8 or not shapes:
        return ""
    kurtosis = max(s.kurtosis for s in shapes)
    if rows * columns > _SAMPLE:
        keep = max(min(rows, 1024), _SAMPLE // columns)
        matrix = matrix[:: -(-rows // keep)]
        matrix = matrix[:, :: -(-matrix.numel() // _SAMPLE)]
        rows, columns = matrix.shape
    squares = matrix.double().square()
    squares = squares / squares.mean()
    for what, energy, length in (
        ("rows", squares.mean(1), columns),
        ("columns", squares.mean(0), rows),
    ):
        expected = (kurtosis - 1) / length
        excess = float((energy - 1).square().mean()) / expected
        # 12 is the excess kurtosis of a squared normal, the largest among the shapes.
        freedom = 2 * len(energy) / (2 + 12 / length)
        if _wilson_hilferty(excess, freedom) > ERRORS:
            return (
                f"norms of its {len(energy)} {what} vary {math.sqrt(excess):.2f} times as much "
                "as those of an independent draw"
            )
    standard = matrix.float() / matrix.double().square().mean().sqrt().float()
    top = _largest_singular_value(standard)
    edge = math.sqrt(rows) + math.sqrt(columns)
    # The fluctuation around the edge (Johnstone 2001) passes 8 of its units by chance less
    # often than five standard errors: its upper tail falls like exp(-2/3 · 8 ** 1.5).
    unit = (1 / math.sqrt(rows) + 1 / math.sqrt(columns)) ** (1 / 3) / 2
    if top > edge + 8 * unit:
        return (
            f"largest singular value {top:.1f} spreads, that of an independent "
            f"{rows} × {columns} draw stays below {edge + 8 * unit:.1f}"
        )
    return ""


def _largest_singular_value(matrix: Tensor) -> float:
    """A lower bound by power iteration from a fixed start."""
    start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0))
    vector = start.to(matrix.device)
    for _ in range(24):
        vector = matrix.T @ (matrix @ vector)
        vector = vector / vector.norm()
    return float((matrix @ vector).norm())
