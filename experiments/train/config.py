"""The schema of every experiment: Hydra checks keys and types, `check` the values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from densitylr.policy import MODES
from experiments.train.arms import (
    CONTROLLERS,
    RIVALS,
    ControllerConfig,
    OptimizerConfig,
    ProfileConfig,
    controller_name,
)
from experiments.train.tasks import DataConfig, ModelConfig

__all__ = ["Config", "arm_name", "check", "register"]


@dataclass
class StudyConfig:
    """What is declared before the runs; the report shows it and judges by it."""

    title: str = "Learning rates, controlled and fixed"
    declared: str = ""
    primary: str = "accuracy"
    reference: str | None = None
    baseline: str | None = None
    treated: str | None = None
    harmless: str | None = None
    smallest_effect: float = 0.005
    written: str | None = None  # the day, ISO 8601
    target: float = 0.95  # share of the reference's accuracy: steps to it are counted
    tuning_seeds: list[int] = field(default_factory=list)  # chose the fixed rate, nothing else


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    seed: int = 0
    epochs: int = 1
    max_steps: int | None = None
    eval_every: int = 40
    threads: int | None = None
    output: str = "outputs/runs"
    force: bool = False


CHOICES = {
    "data.name": ("mnist-sample", "mnist", "digits", "brackets"),
    "model.name": ("resnet18", "mlp", "reader"),
    "optimizer.name": ("sgd", "adam", "adamw", *RIVALS),
    "optimizer.schedule": ("constant", "cosine"),
    "profile.name": ("flat", "geometric", "slice", "one-stage", "random"),
    "controller.name": CONTROLLERS,
    "controller.mode": tuple(MODES),
    "study.primary": ("accuracy", "macro_f1", "test_loss"),
}
POSITIVE = (
    "data.batch_size",
    "model.width",
    "optimizer.lr",
    "controller.every",
    "epochs",
    "eval_every",
)


def register() -> None:
    """Make the schema known to Hydra as ``schema``."""
    ConfigStore.instance().store(name="schema", node=Config)


def check(config: Config) -> None:
    """Raise ValueError, naming key, rule and value, unless every value is usable."""

    def value(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        return node

    for key, choices in CHOICES.items():
        if value(key) not in choices:
            raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value(key)!r}")
    for key in POSITIVE:
        if not value(key) > 0:
            raise ValueError(f"{key} must be positive, got {value(key)!r}")
    if config.max_steps is not None and config.max_steps < 1:
        raise ValueError(f"max_steps must be positive or null, got {config.max_steps!r}")
    if not 0 < config.profile.ratio <= 1:
        raise ValueError(f"profile.ratio must be in (0, 1], got {config.profile.ratio!r}")
    if not 0 <= config.data.holdout < 1:
        raise ValueError(f"data.holdout must be in [0, 1), got {config.data.holdout!r}")
    if config.optimizer.name in RIVALS and arm_name(config) != "flat/fixed":
        raise ValueError(
            f"optimizer.name={config.optimizer.name} chooses one rate for all stages by itself: "
            f"it wants profile=flat controller=fixed, got {arm_name(config)}"
        )


def arm_name(config: Config) -> str:
    """What is compared over seeds: ``profile/controller``."""
    return f"{config.profile.name}/{controller_name(config.controller)}"
