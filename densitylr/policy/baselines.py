"""Published controllers of learning rates, each in a few lines of the `Policy` contract.

They are rivals to compare with, and examples of how a policy is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from densitylr.policy.base import Change, Needs, Observation, Policy, Scales, StageView

__all__ = ["Hypergradient", "Lars", "LayerwiseDecay", "MuP", "Plateau", "UpdateRatio"]


@dataclass(frozen=True)
class Lars(Policy):
    """The trust ratio: ``scale = trust * |w| / |g|`` for each stage, at every step.

    You, Gitman and Ginsburg, *Large Batch Training of Convolutional Networks*, 2017,
    arXiv:1708.03888, equation 6 without weight decay, with stages in the place of layers.

    Args:
        trust: the trust coefficient.
    """

    trust: float = 1e-3
    needs = Needs(every=1, activations=False, weights=True, gradients=True)

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        norms = {n: (v.weight_norm, v.gradient_norm) for n, v in seen.stages.items()}
        return {n: self.trust * w / g for n, (w, g) in norms.items() if w > 0 and g > 0}, state


@dataclass(frozen=True)
class UpdateRatio(Policy):
    """Raise a rate fourfold while a step changes the weights by less than a thousandth.

    The rule of thumb of A. Karpathy, *Building makemore, part 3*, 2022: ``|update| / |weight|``
    should be about 1e-3. Rates are raised at most to the user's largest.

    Args:
        target: the ratio below which a rate is too low.
        growth_factor: one raise.
    """

    target: float = 1e-3
    growth_factor: float = 4.0
    needs = Needs(weights=True, updates=True)
    within_user_rates = True
    corrects_momentum = True

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        scales: dict[str, float | Change] = {}
        for name, view in seen.stages.items():
            ratio = view.update_norm / view.weight_norm if view.weight_norm else math.nan
            low = view.lr > 0 and ratio < self.target
            scale = max(1.0, min(view.cap, view.scale * (self.growth_factor if low else 1.0)))
            scales[name] = Change(scale, numbers={"update / weight": ratio})
        return scales, state


@dataclass(frozen=True)
class MuP(Policy):
    """A rate in proportion to ``1 / fan-in`` of the stage's first weight layer.

    Yang et al., *Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter
    Transfer*, 2022, arXiv:2203.03466, table 3: the rule for hidden weights under Adam. It scales
    once, before the first step.

    Args:
        base: the fan-in at which the user's rate is right.
    """

    base: int = 64
    needs = Needs(activations=False)

    def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, Any]:
        return {name: Change(self.base / view.fan_in) for name, view in stages.items()}, None

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        return {}, state


@dataclass(frozen=True)
class Hypergradient(Policy):
    """Multiplicative hypergradient descent: ``scale *= exp(rate * cos(-g, last update))``.

    Baydin et al., *Online Learning Rate Adaptation with Hypergradient Descent*, ICLR 2018,
    arXiv:1703.04782, the multiplicative rule of section 3 with a cosine for the inner product.

    Args:
        rate: the hypergradient learning rate.
    """

    rate: float = 0.05
    needs = Needs(every=1, activations=False, updates=True)

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        cosines = {n: v.update_alignment for n, v in seen.stages.items()}
        known = {n: cosine for n, cosine in cosines.items() if math.isfinite(cosine)}
        factors = {n: math.exp(self.rate * cosine) for n, cosine in known.items()}
        return {n: seen.stages[n].scale * factor for n, factor in factors.items()}, state


@dataclass(frozen=True)
class LayerwiseDecay(Policy):
    """``decay ** depth`` below the head, as in fine-tuning; it scales once, before the first step.

    Howard and Ruder, *Universal Language Model Fine-tuning for Text Classification*, ACL 2018,
    arXiv:1801.06146, section 3.2 (discriminative fine-tuning).

    Args:
        decay: the ratio of the rates of two neighbouring stages; 1 / 2.6 in the paper.
    """

    decay: float = 1 / 2.6
    needs = Needs(activations=False)

    def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, Any]:
        last = len(stages) - 1
        return {name: Change(self.decay ** (last - i)) for i, name in enumerate(stages)}, None

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        return {}, state


@dataclass(frozen=True)
class Plateau(Policy):
    """Lower all rates where the loss has not fallen for long; it needs the loss.

    ``torch.optim.lr_scheduler.ReduceLROnPlateau`` on the mean training loss of ``steps`` steps, as
    a policy. Pass the loss to ``DensityLR.observe_loss``.

    Args:
        factor: one change of the rates.
        patience: means without an improvement that are allowed.
        steps: losses in a mean.
        threshold: relative improvement that counts.
    """

    factor: float = 0.5
    patience: int = 5
    steps: int = 10
    threshold: float = 1e-3
    needs = Needs(every=1, activations=False, loss=True)

    def init(self, stages: Mapping[str, StageView]) -> tuple[Scales, Any]:
        return dict.fromkeys(stages, 1.0), {"losses": [], "best": None, "waited": 0}

    def update(self, state: Any, seen: Observation) -> tuple[Scales, Any]:
        losses = [*state["losses"], seen.loss] if seen.loss is not None else state["losses"]
        if len(losses) < self.steps:
            return {}, {**state, "losses": losses}
        mean, best = sum(losses) / len(losses), state["best"]
        if best is None or mean < best - abs(best) * self.threshold:
            return {}, {"losses": [], "best": mean, "waited": 0}
        waited = state["waited"] + 1
        if waited <= self.patience:
            return {}, {"losses": [], "best": best, "waited": waited}
        scales = {n: Change(v.scale * self.factor) for n, v in seen.stages.items()}
        return scales, {"losses": [], "best": best, "waited": 0}
