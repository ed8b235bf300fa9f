"""Is a stage still as it was initialised, or was it trained before?

Low early learning rates are right for pretrained weights, so a policy must leave such
stages alone. An initialisation leaves traces that training destroys: batch norm has seen no
batch, norms and most biases are constant, and a weight matrix is an independent draw from one
of a few distributions whose spread follows from the layer's shape. `check_untrained` looks for
the first trace that is gone and names it. Weights from an initialiser that is not known here
count as trained: the policy then does nothing, which is the safe error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from densitylr.model.goodness_of_fit import draw_trace, is_constant
from densitylr.model.initializers import FIXED, fans, gain_trace, is_draw, weight_trace
from densitylr.model.ranks import whole
from densitylr.model.stages import Stage, unwrap

__all__ = ["WeightCheck", "WeightChecks", "check_untrained", "check_weights"]

_TINY = 1e-5  # biases (torchvision) and tokens (timm) this small were drawn around zero, std 1e-6


@dataclass(frozen=True)
class WeightCheck:
    """Whether a stage is still an initialisation, and what says so.

    Attributes:
        untrained: every tensor is a plausible initialisation.
        reason: the first tensor that is not, the rule and the numbers; or what was checked.
        bad_gain: it would be one, were its spread not far from every customary one.
    """

    untrained: bool
    reason: str
    bad_gain: bool = False


@torch.no_grad()
def check_untrained(stage: Stage, model: nn.Module | None = None) -> WeightCheck:
    """Decide whether a stage's weights are statistically still an initialisation.

    Every tensor must pass; each test allows five standard errors.

    - Batch norm: running mean 0, running variance 1, no batch seen.
    - Parameters outside weight layers: constant (norms, layer scales), or a draw with a
      customary spread (tokens, position embeddings).
    - Biases: constant, or a draw from ``U(±1/sqrt(fan))``, whose limit is sharp, or from the
      normal distribution that the layer's weight is drawn from, too.
    - Weights: constant, or orthogonal, or a draw with all of: mean 0; the *shape* of a normal,
      a uniform or a normal truncated at two standard deviations, by Geary's ratio of mean
      magnitude to RMS and by the largest magnitude; the *spread* of a known formula (Kaiming,
      Xavier, LeCun, torch's defaults for linear, convolutional and recurrent layers, fixed
      spreads from 0.001 to 1, GPT-2's residual 0.02/sqrt(2 L)); rows and columns that differ
      in norm by no more than chance; and a largest singular value no further beyond the edge
      ``std · (sqrt(rows) + sqrt(columns))`` of an independent draw than chance allows.

    *Power.* The relative error of a spread is a few over the square root of the tensor's size:
    layers of a few hundred weights can be recognised only by their norms, biases or a uniform
    draw's sharp limits, and tensors of fewer than 32 elements not at all. Least power has a
    normal draw without bias and norm: some hundred steps on 65,000 such weights can go
    unnoticed. A stage whose numbers have not left these bounds reads untrained. An
    initialisation not listed (Fixup, a batch-norm scale drawn at random) reads trained, as
    does a stage whose batch norm saw one forward pass in training mode.

    *Bad gain.* A weight that passes every test but that of the spread, and whose spread is more
    than 4 times the largest or less than 1/16 of the smallest that its fans give (1.5 times for
    an embedding, which depends on no fan), was not trained but badly initialised:
    `WeightCheck.bad_gain`, if nothing else in the stage reads trained; tokens and position
    embeddings beside it may be draws of any spread. A spread of 0.001, which is customary, is
    never called bad.

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
        chi-square*, PNAS 17 (1931). Edge: Johnstone, *On the distribution of the largest
        eigenvalue in principal components analysis*, Annals of Statistics 29 (2001).
    """
    checked, bad_gain = 0, ""
    for name, module in _batch_norms(stage, model):
        trace = _batch_norm_trace(module)
        if trace:
            return WeightCheck(False, f"{name}: {trace}")
    seen: set[int] = set()
    parameter: Tensor
    for tap, layer in stage.layers.items():
        weights = [p for p in layer.parameters() if p.ndim >= 2 and p.numel()]
        connections = {k: v for w in weights for k, v in fans(layer, w.shape).items()}
        for local, parameter in layer.named_parameters():
            if id(parameter) in seen or not parameter.numel():
                continue
            seen.add(id(parameter))
            parameter = whole(parameter)
            # weight_norm keeps the row norms of its weight as a parameter of their own.
            if local.endswith(("weight_g", "original0")) and max(parameter.shape) == (
                parameter.numel()
            ):
                continue
            if parameter.ndim >= 2:
                weight = _without_clamped(_without_padding(layer, parameter))
                trace = weight_trace(weight, layer, parameter.shape)
                gain = gain_trace(weight, layer, parameter.shape) if trace else ""
                if gain:
                    bad_gain, trace = bad_gain or f"{tap}.{local}: {gain}", ""
            else:
                trace = _bias_trace(parameter, layer, connections, weights)
            if trace:
                return WeightCheck(False, f"{tap}.{local}: {trace}")
            checked += 1
    for name, parameter in stage.parameters.items():
        # A frozen parameter outside a weight layer is a table that was computed, not drawn.
        if id(parameter) in seen or not parameter.numel() or not parameter.requires_grad:
            continue
        parameter = whole(parameter)
        trace = _other_trace(parameter)
        # Beside a weight of a bad gain it may have been scaled with it.
        if trace and not (bad_gain and is_draw(parameter)):
            return WeightCheck(False, f"{name}: {trace}")
        checked += 1
    if bad_gain:
        return WeightCheck(False, bad_gain, bad_gain=True)
    return WeightCheck(True, f"all {checked} tensors are plausible initialisations")


@dataclass(frozen=True)
class WeightChecks:
    """Which stages of a model were trained already, as far as the weights show it.

    Attributes:
        excluded: the stages to leave alone, with the reason.
        bad_gains: those among them that were not trained, but have initial weights that are far
            larger or smaller than customary, with the numbers.
    """

    excluded: Mapping[str, str]
    bad_gains: Mapping[str, str]

    @classmethod
    def restored(cls, saved: object) -> WeightChecks:
        """From what a checkpoint holds of it.

        Raises:
            ValueError: it is damaged.
        """
        keys = ("excluded", "bad_gains")
        found: list[Any] = [saved.get(k) if isinstance(saved, Mapping) else None for k in keys]
        if not all(
            isinstance(reasons, Mapping)
            and all(isinstance(text, str) for text in (*reasons, *reasons.values()))
            for reasons in found
        ):
            raise ValueError(f"the checks of the weights in the state dict are damaged: {saved!r}")
        return cls(*(dict(reasons) for reasons in found))

    @property
    def trained(self) -> dict[str, str]:
        """The stages that look trained, with the reason."""
        return {name: why for name, why in self.excluded.items() if name not in self.bad_gains}


def check_weights(
    model: nn.Module, stages: Mapping[str, Stage], pretrained: bool | None
) -> WeightChecks:
    """Decide which stages to leave alone.

    One trained stage is enough: all others are left alone, too. The test misses some, and a trained
    layer between untrained ones is rare.

    Args:
        model: the model.
        stages: its stages by name, in its order.
        pretrained: True: all of them, False: none; None: by `check_untrained`.
    """
    if pretrained is not None:
        return WeightChecks(dict.fromkeys(stages, "pretrained=True") if pretrained else {}, {})
    checks = {name: check_untrained(stage, model) for name, stage in stages.items()}
    gains = {name: check.reason for name, check in checks.items() if check.bad_gain}
    excluded = {name: check.reason for name, check in checks.items() if not check.untrained}
    trained = [name for name in excluded if name not in gains]
    if trained:
        reason = f"{trained[0]} is trained: {excluded[trained[0]]}"
        excluded = {name: excluded.get(name, reason) for name in checks}
    return WeightChecks(excluded, gains)


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


def _without_padding(layer: nn.Module, weight: Tensor) -> Tensor:
    """An embedding's table but for the row of zeros that stands for padding."""
    row = getattr(layer, "padding_idx", None)
    if not isinstance(row, int):
        return weight
    return torch.cat([weight[:row], weight[row + 1 :]])


def _without_clamped(weight: Tensor) -> Tensor:
    """A weight but for what a rounded draw of the truncated normal has left at its limits.

    timm, and older torch, invert the distribution of a uniform draw in float32. Once in some
    ten million that rounds to ±1, whose inverse is infinite and is clamped to the customary ±2:
    a hundred standard deviations of 0.02, and most large models hold one.
    """
    clamped = (weight.abs() == 2) & (weight.abs() > 20 * weight.square().mean().sqrt())
    return weight.masked_fill(clamped, 0) if bool(clamped.any()) else weight


def _bias_trace(
    bias: Tensor, layer: nn.Module, connections: Mapping[str, float], weights: Iterable[Tensor]
) -> str:
    """The same for a bias; a recurrent layer's gates may start from different constants."""
    gates = {"LSTM": 4, "GRU": 3}.get(getattr(layer, "mode", ""), 1)
    default = {f"torch default, {k} {v:g}": math.sqrt(1 / 3 / v) for k, v in connections.items()}
    for part in bias.chunk(gates):
        if is_constant(part) or float(part.abs().max()) <= _TINY:
            continue
        trace, _ = draw_trace(part, {}, {}, default)
        # A normal draw has no limit, and would pass for most biases that were trained for a while.
        shared = trace and any(
            not draw_trace(whole(w), {}, spread)[0] and not draw_trace(part, {}, spread)[0]
            for w in weights
            for spread in ({name: std} for name, std in FIXED.items())
        )
        if trace and not shared:
            return trace
    return ""


def _other_trace(parameter: Tensor) -> str:
    """The same for a parameter outside the weight layers."""
    if is_constant(parameter) or float(parameter.abs().max()) <= _TINY:
        return ""
    trace, _ = draw_trace(parameter, {"1/sqrt(last dimension)": parameter.shape[-1] ** -0.5}, FIXED)
    return trace and f"not constant, and not a draw: {trace}"
