"""The learning rate of each stage, and the optimizer that has them."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from omegaconf import MISSING
from torch.optim import Optimizer

from densitylr import Stage

__all__ = ["OptimizerConfig", "ProfileConfig", "build_optimizer", "profile_rates"]


@dataclass
class OptimizerConfig:
    name: str = MISSING  # sgd | adam | adamw | a rival
    lr: float = MISSING
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str = "cosine"  # constant | cosine, to zero over the run


@dataclass
class ProfileConfig:
    name: str = MISSING  # flat | geometric | slice | one-stage | random
    ratio: float = 1.0  # smallest rate / largest rate
    stage: str = "conv1"  # one-stage: the one
    seed: int = 0  # random: drawn from it


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
