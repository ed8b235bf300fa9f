"""Is a stage still as it was initialised, or has somebody trained it already?

Low early learning rates are right for pretrained weights, so the lift-off law must leave such
stages alone. An initialisation leaves traces that training destroys: batch norm has seen no
batch, norms and most biases are constant, and a weight matrix is an independent draw from one
of a few distributions whose spread follows from the layer's shape. `check_untrained` looks for
the first trace that is gone and names it. Whoever draws weights in a way that is not known
here is taken for somebody who trained them: the law then does nothing, which is the safe error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from densitylr.stages import Stage, unwrap

__all__ = ["WeightCheck", "check_untrained"]

_ERRORS = 5.0  # standard errors of a two-sided test: one false alarm in 1.7 million
_ENOUGH = 32  # a tensor with fewer elements cannot tell
_SAMPLE = 2**20  # elements read for moments and for the spectrum
_TINY = 1e-5  # biases this small were drawn around zero (torchvision: std 1e-6)


@dataclass(frozen=True)
class WeightCheck:
    """Whether a stage is still an initialisation, and what says so.

    Attributes:
        untrained: every tensor is a plausible initialisation.
        reason: the first tensor that is not, the rule and the numbers; or what was checked.
    """

    untrained: bool
    reason: str


@dataclass(frozen=True)
class _Shape:
    """A zero-mean distribution of standard deviation 1: ``E|z|``, ``E|z|³``, ``E z⁴``, ``max|z|``.

    ``scales``: what a formula's spread may stand for, the spread after or before truncation.
    """

    name: str
    absolute: float
    cubed: float
    kurtosis: float
    limit: float = math.inf
    scales: tuple[float, ...] = (1.0,)


def _truncated_normal() -> _Shape:
    """The normal cut off at two standard deviations, rescaled to standard deviation 1."""
    at0, at2 = (math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (0.0, 2.0))
    mass = math.erf(math.sqrt(2))
    variance = 1 - 4 * at2 / mass
    std = math.sqrt(variance)
    return _Shape(
        "truncated normal",
        2 * (at0 - at2) / mass / std,
        2 * (2 * at0 - 6 * at2) / mass / std**3,
        (3 * variance - 16 * at2 / mass) / std**4,
        2 / std,
        (1.0, std),
    )


_NORMAL = _Shape("normal", math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi), 3.0)
_UNIFORM = _Shape("uniform", math.sqrt(3) / 2, 3 * math.sqrt(3) / 4, 1.8, math.sqrt(3))
_SHAPES = (_NORMAL, _UNIFORM, _truncated_normal())

# Spread = gain / sqrt(fan). sqrt(1/3) is torch's default, U(±1/sqrt(fan-in)).
_GAINS = {
    "kaiming": math.sqrt(2),
    "unit gain": 1.0,  # LeCun over fan-in, Xavier over the average of the fans
    "torch default": math.sqrt(1 / 3),
    "tanh gain": 5 / 3,
    "selu gain": 0.75,
}
_FIXED = {f"{std:g}": std for std in (1.0, 0.1, 0.05, 0.02, 0.01, 0.001)}
# GPT-2 draws the last layer of each of its L residual blocks from N(0, 0.02 / sqrt(2 L)).
_RESIDUAL = {f"0.02/sqrt(2·{k})": 0.02 / math.sqrt(2 * k) for k in (*range(1, 25), 32, 36, 40, 48)}


@dataclass(frozen=True)
class _Moments:
    """Of a tensor: elements read, mean, RMS, mean magnitude; elements in all, their largest."""

    n: int
    mean: float
    rms: float
    absolute: float
    size: int
    largest: float


@torch.no_grad()
def check_untrained(stage: Stage, model: nn.Module | None = None) -> WeightCheck:
    """Decide whether a stage's weights are statistically still an initialisation.

    Every tensor must pass; each test allows five standard errors.

    - Batch norm: running mean 0, running variance 1, no batch seen.
    - Parameters outside weight layers: constant (norms, layer scales), or a draw with a
      customary spread (tokens, position embeddings).
    - Biases: constant, or a draw from ``U(±1/sqrt(fan))`` or with a customary spread.
    - Weights: constant, or orthogonal, or a draw with all of: mean 0; the *shape* of a normal,
      a uniform or a normal truncated at two standard deviations, by Geary's ratio of mean
      magnitude to RMS and by the largest magnitude; the *spread* of a known formula (Kaiming,
      Xavier, LeCun, torch's defaults for linear, convolutional and recurrent layers, fixed
      spreads from 0.001 to 1, GPT-2's residual 0.02/sqrt(2 L)); rows and columns that differ
      in norm by no more than chance; and a largest singular value within the edge
      ``std · (sqrt(rows) + sqrt(columns))`` of an independent draw.

    *Power.* The default error of a test is a few over the square root of the tensor's size:
    layers of a few hundred weights can only be told by their norms, biases or a uniform
    draw's sharp limits, and tensors of fewer than 32 elements not at all. A stage trained for
    so short or so slowly that its numbers have not left these bounds reads untrained. An
    initialisation not listed (Fixup, a batch-norm scale drawn at random) reads trained, as
    does a stage whose batch norm saw one forward pass in training mode.

    The global random state is neither read nor changed. At most 2**20 elements of a tensor,
    evenly spaced, are read for moments and spectrum, all of them for the limits.

    Args:
        stage: from `densitylr.find_stages`.
        model: the model it was taken from, wrapped or not. A stage holds parameters only; the
            model is needed to see batch norm's running statistics. Default: do without.

    Returns:
        The verdict and its reason.

    Sources:
        Shape: Geary, *The ratio of the mean deviation to the standard deviation as a test of
        normality*, Biometrika 27 (1935). Spread: Wilson and Hilferty, *The distribution of
        chi-square*, PNAS 17 (1931). Edge: Davidson and Szarek, *Local operator theory, random
        matrices and Banach spaces* (2001), theorem II.13.
    """
    checked = 0
    for name, module in _batch_norms(stage, model):
        trace = _batch_norm_trace(module)
        if trace:
            return WeightCheck(False, f"{name}: {trace}")
    seen: set[int] = set()
    for tap, layer in stage.taps.items():
        weights = [p for p in layer.parameters() if p.ndim >= 2 and p.numel()]
        fans = {k: v for w in weights for k, v in _fans(layer, w.shape).items()}
        for local, parameter in layer.named_parameters():
            if id(parameter) in seen or not parameter.numel():
                continue
            seen.add(id(parameter))
            # weight_norm keeps the row norms of its weight as a parameter of their own.
            if local.endswith(("weight_g", "original0")) and max(parameter.shape) == (
                parameter.numel()
            ):
                continue
            if parameter.ndim >= 2:
                trace = _weight_trace(_without_padding(layer, parameter), layer, parameter.shape)
            else:
                trace = _bias_trace(parameter, layer, fans)
            if trace:
                return WeightCheck(False, f"{tap}.{local}: {trace}")
            checked += 1
    for name, parameter in stage.parameters.items():
        # A frozen parameter outside a weight layer is a table that was computed, not drawn.
        if id(parameter) in seen or not parameter.numel() or not parameter.requires_grad:
            continue
        trace = _other_trace(parameter)
        if trace:
            return WeightCheck(False, f"{name}: {trace}")
        checked += 1
    return WeightCheck(True, f"all {checked} tensors are plausible initialisations")


def _batch_norms(stage: Stage, model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    if model is None:
        return
    for name, module in unwrap(model).named_modules():
        inside = any(not m or name == m or name.startswith(m + ".") for m in stage.modules)
        if inside and isinstance(module, nn.modules.batchnorm._NormBase):
            yield name, module


def _batch_norm_trace(module: nn.Module) -> str:
    batches, mean, var = (
        getattr(module, name, None)
        for name in ("num_batches_tracked", "running_mean", "running_var")
    )
    if batches is not None and int(batches):
        return f"batch norm has seen {int(batches)} batches, an initialisation none"
    if mean is not None and bool((mean != 0).any()):
        return f"running mean up to {float(mean.abs().max()):.3g}, an initialisation has 0"
    if var is not None and bool((var != 1).any()):
        worst = float(var[(var - 1).abs().argmax()])
        return f"running variance {worst:.3g}, an initialisation has 1"
    return ""


def _fans(layer: nn.Module, shape: torch.Size) -> dict[str, float]:
    """The numbers of connections that a formula may divide by, by name."""
    field = math.prod(shape[2:])
    fan_out, fan_in = shape[0] * field, shape[1] * field
    fans = {"fan-in": float(fan_in), "fan-out": float(fan_out)}
    fans["fan-average"] = (fan_in + fan_out) / 2
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:
        per_group = fan_out / layer.groups
        fans["fan-out of a group"] = per_group
        fans["fan-average of a group"] = (fan_in + per_group) / 2
    if isinstance(layer, nn.RNNBase):
        fans["hidden size"] = float(layer.hidden_size)
        fans["average of hidden size and fan-in"] = (layer.hidden_size + fan_in) / 2
    if isinstance(layer, nn.Bilinear):
        fans["in1_features"] = float(shape[1])
    return fans


def _without_padding(layer: nn.Module, weight: Tensor) -> Tensor:
    """An embedding's table but for the row of zeros that stands for padding."""
    row = getattr(layer, "padding_idx", None)
    if not isinstance(row, int):
        return weight
    return torch.cat([weight[:row], weight[row + 1 :]])


def _weight_trace(weight: Tensor, layer: nn.Module, shape: torch.Size) -> str:
    """What says that a weight layer's weight was trained; empty if nothing does."""
    if _is_constant(weight) or _is_orthogonal(weight):
        return ""
    fans = _fans(layer, shape)
    spreads = {
        f"{gain}, {fan} {size:g}": value / math.sqrt(size)
        for gain, value in _GAINS.items()
        for fan, size in fans.items()
    }
    trace, shapes = _draw_trace(weight, {**spreads, **_FIXED}, _RESIDUAL)
    return trace or _structure_trace(weight, shapes)


def _bias_trace(bias: Tensor, layer: nn.Module, fans: Mapping[str, float]) -> str:
    """The same for a bias; a recurrent layer's gates may start from different constants."""
    gates = {"LSTM": 4, "GRU": 3}.get(getattr(layer, "mode", ""), 1)
    spreads = {f"torch default, {k} {v:g}": math.sqrt(1 / 3 / v) for k, v in fans.items()}
    for part in bias.chunk(gates):
        if _is_constant(part) or float(part.abs().max()) <= _TINY:
            continue
        trace, _ = _draw_trace(part, {**spreads, **_FIXED}, {})
        if trace:
            return trace
    return ""


def _other_trace(parameter: Tensor) -> str:
    """The same for a parameter outside the weight layers."""
    if _is_constant(parameter):
        return ""
    trace, _ = _draw_trace(
        parameter, {"1/sqrt(last dimension)": parameter.shape[-1] ** -0.5, **_FIXED}, {}
    )
    return trace and f"not constant, and not a draw: {trace}"


def _is_constant(values: Tensor) -> bool:
    return bool((values == values.reshape(-1)[0]).all())


def _is_orthogonal(weight: Tensor) -> bool:
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


def _draw_trace(
    values: Tensor, spreads: Mapping[str, float], normal_spreads: Mapping[str, float]
) -> tuple[str, list[_Shape]]:
    """Compare a tensor with every known draw.

    Args:
        values: any shape.
        spreads: standard deviations by name, for every shape of distribution.
        normal_spreads: further ones for the normal distribution.

    Returns:
        What speaks against all of them, empty if one fits; and the shapes that fit.
    """
    if values.numel() < _ENOUGH:
        return "", []
    seen = _moments(values)
    if not math.isfinite(seen.rms):
        return "not finite", []
    if abs(seen.mean) > _ERRORS * seen.rms / math.sqrt(seen.n):
        return f"mean {seen.mean:.3g} at spread {seen.rms:.3g}, a draw has mean 0", []
    ratio = seen.absolute / seen.rms
    shapes = [s for s in _SHAPES if abs(ratio - s.absolute) <= _ERRORS * _ratio_error(s, seen.n)]
    if not shapes:
        expected = ", ".join(f"{s.name} {s.absolute:.4f}" for s in _SHAPES)
        return f"shape: mean magnitude over RMS {ratio:.4f}, known are {expected}", []
    candidates = [
        (shape, name, spread * scale)
        for shape in shapes
        for name, spread in (spreads | normal_spreads if shape is _NORMAL else spreads).items()
        for scale in shape.scales
    ]
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
    return "", list({id(c[0]): c[0] for c in fitting}.values())


def _ratio_error(shape: _Shape, n: int) -> float:
    """Standard error of mean magnitude over RMS, by the delta method."""
    g = shape.absolute
    variance = 1 - g * g - g * (shape.cubed - g) + g * g * (shape.kurtosis - 1) / 4
    return math.sqrt(variance / n)


def _same_spread(seen: _Moments, spread: float, kurtosis: float) -> bool:
    freedom = 2 * seen.n / (kurtosis - 1)
    return abs(_wilson_hilferty((seen.rms / spread) ** 2, freedom)) <= _ERRORS


def _wilson_hilferty(ratio: float, freedom: float) -> float:
    """A chi-square over its degrees of freedom, as a standard normal."""
    spread = 2 / (9 * freedom)
    return (ratio ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def _structure_trace(weight: Tensor, shapes: list[_Shape]) -> str:
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
        if _wilson_hilferty(excess, freedom) > _ERRORS:
            return (
                f"norms of its {len(energy)} {what} vary {math.sqrt(excess):.2f} times as much "
                "as those of an independent draw"
            )
    standard = matrix.float() / matrix.double().square().mean().sqrt().float()
    top = _largest_singular_value(standard)
    edge = math.sqrt(rows) + math.sqrt(columns)
    if top > edge + _ERRORS:
        return (
            f"largest singular value {top:.1f} spreads, that of an independent "
            f"{rows} × {columns} draw is about {edge:.1f}"
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
