"""From a config to a model, an optimizer and what watches or controls it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch
import torchvision
from torch import nn
from torch.optim import Optimizer

from densitylr import Decision, DensityLR, Reading, Stage, find_stages
from densitylr.policy import LawState, StageState
from experiments.config import ControllerConfig, ModelConfig, OptimizerConfig, ProfileConfig
from experiments.fresh import mlp, reader

__all__ = ["UpdateRatio", "build_model", "build_optimizer", "controlled", "profile_rates"]


def build_model(config: ModelConfig) -> nn.Module:
    """torchvision's ResNet-18 from scratch, ten classes, for images of one channel; or the network
    of a fresh task.
    """
    if config.name != "resnet18":
        return mlp() if config.name == "mlp" else reader()
    planes = max(1, round(64 * config.width))
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    if planes != 64:
        model = _narrow_resnet(planes)
    model.conv1 = nn.Conv2d(1, planes, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model


def _narrow_resnet(planes: int) -> nn.Module:
    """The same network with ``planes`` instead of 64 channels in the first stage."""

    class Narrow(torchvision.models.ResNet):  # type: ignore[misc]
        def _make_layer(
            self, block: type[nn.Module], width: int, blocks: int, stride: int = 1, **kwargs: bool
        ) -> nn.Module:
            if width == 64:  # the first stage: conv1 and bn1 are built for 64 channels
                self.inplanes = planes
            return super()._make_layer(block, width * planes // 64, blocks, stride, **kwargs)

    model = Narrow(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=10)
    model.bn1 = nn.BatchNorm2d(planes)
    model.fc = nn.Linear(8 * planes, 10)
    return model


def profile_rates(
    config: ProfileConfig, lr: float, stages: Mapping[str, Stage]
) -> dict[str, float]:
    """The learning rate of each stage.

    ``flat``: ``lr`` for all. ``geometric``: ``ratio * lr`` for the first, ``lr`` for the last.
    ``slice``: as fastai's ``slice(lr)``, a tenth of it for all but the last. ``one-stage``:
    ``ratio * lr`` for ``stage`` only. ``random``: log-uniform in ``ratio … 1`` times ``lr``.

    Raises:
        ValueError: ``one-stage`` names a stage that the model does not have.
    """
    names = list(stages)
    last = max(1, len(names) - 1)
    if config.name == "one-stage" and config.stage not in stages:
        raise ValueError(f"profile.stage must be one of {', '.join(names)}, got {config.stage!r}")
    draw = random.Random(config.seed)
    factors = {
        "flat": lambda i: 1.0,
        "geometric": lambda i: config.ratio ** (1 - i / last),
        "slice": lambda i: 1.0 if i == last else 0.1,
        "one-stage": lambda i: config.ratio if names[i] == config.stage else 1.0,
        "random": lambda i: math.exp(draw.uniform(math.log(config.ratio), 0.0)),
    }[config.name]
    return {name: lr * factors(i) for i, name in enumerate(names)}


def build_optimizer(
    config: OptimizerConfig, rates: Mapping[str, float], stages: Mapping[str, Stage]
) -> Optimizer:
    """One parameter group a stage, named after it."""
    groups = [
        {"params": list(stage.parameters.values()), "lr": rates[name], "name": name}
        for name, stage in stages.items()
    ]
    decay = config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=decay)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(groups, lr=config.lr, weight_decay=decay)


def controlled(config: ControllerConfig, optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """The optimizer as the arm uses it: ``fixed`` leaves it alone."""
    if config.name == "fixed":
        return optimizer
    policy = UpdateRatio(model) if config.name == "update-ratio" else None
    return DensityLR(
        optimizer,
        model,
        mode=config.mode,
        every=config.every,
        policy=policy,
        observe_only=config.observe_only,
    )


class UpdateRatio:
    """The ablation: the same hands, no density.

    A stage's rate is raised fourfold, up to the largest rate of any group, while the RMS of its
    weights' change per step is less than 1e-3 of the RMS of the weights themselves, the rule
    of thumb of A. Karpathy, "Building makemore, part 3" (2022).

    Args:
        model: the model that is trained; its weights are read at each probe.
    """

    target = 1e-3
    growth = 4.0

    def __init__(self, model: nn.Module) -> None:
        self.stages = find_stages(model)
        self.before = self._weights()

    def _weights(self) -> dict[str, list[torch.Tensor]]:
        return {
            name: [p.detach().clone() for p in stage.parameters.values() if p.ndim >= 2]
            for name, stage in self.stages.items()
        }

    def init(self, stages: list[str]) -> LawState:
        return LawState({name: StageState(1.0) for name in stages})

    def decide(
        self, state: LawState, reading: Reading, rates: Mapping[str, float], ceiling: float
    ) -> tuple[LawState, list[Decision]]:
        now = self._weights()
        stages = dict(state.stages)
        decisions = []
        for name, old in state.stages.items():
            steps = reading.step - old.step
            cap = ceiling / rates[name] if rates[name] > 0 else 1.0
            ratio = _relative_change(self.before[name], now[name]) / max(1, steps)
            scale = min(cap, old.scale)  # the user's rates may have drawn together
            if steps and ratio < self.target and scale < cap:
                scale = min(cap, scale * self.growth)
                before, after = rates[name] * old.scale, rates[name] * scale
                reason = (
                    f"update/weight ratio {ratio:.1e} a step, less than {self.target:.0e}; "
                    f"rate {before:.1e} → {after:.1e}"
                )
                decisions.append(
                    Decision(reading.step, name, "raise", old.scale, scale, before, after, reason)
                )
            stages[name] = StageState(scale, step=reading.step)
        self.before = now
        return LawState(stages), decisions


def _relative_change(before: list[torch.Tensor], now: list[torch.Tensor]) -> float:
    change = sum(float((b - a).square().sum()) for a, b in zip(before, now, strict=True))
    size = sum(float(a.square().sum()) for a in before)
    return math.sqrt(change / size) if size else math.inf
