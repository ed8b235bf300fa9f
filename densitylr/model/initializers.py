"""The spreads that initialisations give to a layer's weights, and what is far from all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from densitylr.model.goodness_of_fit import draw_trace, is_constant, is_orthogonal, structure_trace

__all__ = ["FIXED", "fans", "gain_trace", "is_draw", "weight_trace"]

# Spread = gain / sqrt(fan). sqrt(1/3) is torch's default, U(±1/sqrt(fan-in)).
_DEFAULT, _SELU = "torch default", "selu gain"
_GAINS = {
    "kaiming": math.sqrt(2),
    "unit gain": 1.0,  # LeCun over fan-in, Xavier over the average of the fans
    _DEFAULT: math.sqrt(1 / 3),
    "tanh gain": 5 / 3,
    _SELU: 0.75,
}
FIXED = {f"{std:g}": std for std in (1.0, 0.1, 0.05, 0.02, 0.01, 0.001)}
"""Standard deviations that are given without regard to the shape."""

# GPT-2 draws the last layer of each of its L residual blocks from N(0, 0.02 / sqrt(2 L)).
_RESIDUAL = {f"0.02/sqrt(2·{k})": 0.02 / math.sqrt(2 * k) for k in (*range(1, 25), 32, 36, 40, 48)}

_TOO_LARGE, _TOO_SMALL = 4.0, 1 / 16
"""Times the largest and the smallest customary spread; SIREN, the smallest in use, is 1/12 of
torch's default."""

_TOO_LARGE_TABLE = 1.5
"""The same for an embedding, whose largest customary spread is 1, whatever its shape."""


def fans(layer: nn.Module, shape: torch.Size) -> dict[str, float]:
    """The numbers of connections that a formula may divide by, by name."""
    field = math.prod(shape[2:])
    fan_out, fan_in = shape[0] * field, shape[1] * field
    found = {"fan-in": float(fan_in), "fan-out": float(fan_out)}
    found["fan-average"] = (fan_in + fan_out) / 2
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1:
        per_group = fan_out / layer.groups
        found["fan-out of a group"] = per_group
        found["fan-average of a group"] = (fan_in + per_group) / 2
    if isinstance(layer, nn.RNNBase):
        found["hidden size"] = float(layer.hidden_size)
        found["average of hidden size and fan-in"] = (layer.hidden_size + fan_in) / 2
    if isinstance(layer, nn.Bilinear):
        found["in1_features"] = float(shape[1])
    return found


def weight_trace(weight: Tensor, layer: nn.Module, shape: torch.Size) -> str:
    """What says that a weight layer's weight was trained; empty if nothing does."""
    if is_constant(weight) or is_orthogonal(weight):
        return ""
    # Residual spreads belong to linear layers; a small convolution could be anything.
    residual = {} if isinstance(layer, nn.modules.conv._ConvNd) else _RESIDUAL
    trace, shapes = draw_trace(weight, _fan_spreads(layer, shape), {**FIXED, **residual})
    return trace or structure_trace(weight, shapes)


def gain_trace(weight: Tensor, layer: nn.Module, shape: torch.Size) -> str:
    """What says that a weight with a trace is an initialisation of a far too large or small spread.

    Rescaled to the nearest customary spread it would have none.
    """
    if weight.numel() < 2 or not (factors := _to_one(weight)):
        return ""
    rms = 1 / factors[0]
    spreads, too_large = _fan_spreads(layer, shape, meant=True), _TOO_LARGE
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        spreads, too_large = {**spreads, _DEFAULT: 1.0}, _TOO_LARGE_TABLE
    name, spread = min(spreads.items(), key=lambda item: abs(math.log(rms / item[1])))
    ratio = rms / spread
    if _TOO_SMALL * min(spreads.values()) <= rms <= too_large * max(spreads.values()):
        return ""
    for factor in factors:
        if not weight_trace(weight.double() * (spread * factor), layer, shape):
            return (
                f"its spread {rms:.3g} is {ratio:.3g} times that of the nearest usual "
                f"initialisation ({name}: {spread:.3g})"
            )
    return ""


def is_draw(values: Tensor) -> bool:
    """Whether a tensor could be an independent draw of whatever spread."""
    return any(not draw_trace(values.double() * f, {"1": 1.0}, {})[0] for f in _to_one(values))


def _to_one(values: Tensor) -> tuple[float, ...]:
    """Factors that bring a draw to a spread of 1, by its RMS and by the limit of a uniform draw,
    which its RMS gives less sharply; none if it is not finite, or all zero.
    """
    rms, largest = float(values.double().square().mean().sqrt()), float(values.abs().max())
    return (1 / rms, math.sqrt(3) / largest) if math.isfinite(largest) and rms else ()


def _fan_spreads(layer: nn.Module, shape: torch.Size, *, meant: bool = False) -> dict[str, float]:
    """The spreads that follow from a layer's shape, by formula.

    Args:
        meant: only those in use: torch's default and the gain for SELU go by what comes in.
    """
    return {
        f"{gain}, {fan} {size:g}": value / math.sqrt(size)
        for gain, value in _GAINS.items()
        for fan, size in fans(layer, shape).items()
        if not meant or gain not in (_DEFAULT, _SELU) or not fan.startswith(("fan-out", "fan-av"))
    }
