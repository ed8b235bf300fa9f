"""What controls an optimizer: nothing, or a policy by its name."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING
from torch import nn
from torch.optim import Optimizer

from densitylr import DensityLR, Policy
from densitylr.policy import (
    MODES,
    Hypergradient,
    Lars,
    LayerwiseDecay,
    MuP,
    Plateau,
    UpdateRatio,
)

__all__ = ["CONTROLLERS", "ControllerConfig", "controlled", "controller_name"]

POLICIES: dict[str, type[Policy]] = {
    "update-ratio": UpdateRatio,
    "lars": Lars,
    "mup": MuP,
    "hypergradient": Hypergradient,
    "layerwise-decay": LayerwiseDecay,
    "plateau": Plateau,
}

CONTROLLERS = ("fixed", "density", *POLICIES)


@dataclass
class ControllerConfig:
    name: str = MISSING  # one of CONTROLLERS
    mode: str = "repair"  # density: repair | warmup | free
    every: int = 5
    observe_only: bool = False


def controlled(config: ControllerConfig, optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """The optimizer as the arm uses it: ``fixed`` leaves it alone."""
    if config.name == "fixed":
        return optimizer
    policy = (POLICIES | {"density": MODES[config.mode]})[config.name]()
    return DensityLR(
        optimizer, model, policy=policy, every=config.every, observe_only=config.observe_only
    )


def controller_name(config: ControllerConfig) -> str:
    """What an arm is called: of ``density`` the mode."""
    return config.mode if config.name == "density" else config.name
