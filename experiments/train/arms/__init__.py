"""What is compared: rates by stage, the optimizer that has them, and who controls it."""

from experiments.train.arms.controller import (
    CONTROLLERS,
    ControllerConfig,
    controlled,
    controller_name,
)
from experiments.train.arms.optimizer import (
    OptimizerConfig,
    ProfileConfig,
    build_optimizer,
    profile_rates,
)
from experiments.train.arms.rivals import LAYERWISE, RIVALS, evaluation_mode, layerwise, rival

__all__ = [
    "CONTROLLERS",
    "LAYERWISE",
    "RIVALS",
    "ControllerConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "build_optimizer",
    "controlled",
    "controller_name",
    "evaluation_mode",
    "layerwise",
    "profile_rates",
    "rival",
]
