"""What is known of one training run."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from densitylr import History

__all__ = ["COLUMNS", "METRICS", "STATUSES", "Run"]

STATUSES = ("done", "diverged", "failed", "incomplete", "broken", "duplicate")
METRICS = ("accuracy", "macro_f1", "test_loss", "train_loss")
COLUMNS = ("step", "seconds", "train_loss", "test_loss", "accuracy", "macro_f1")


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        label: the folder's path, from the folder that was asked for on.
        status: one of `STATUSES`.
        reason: why it is not done; empty for a finished run.
        arm: profile and controller, ``"geometric/repair"``; empty if unknown.
        optimizer: ``"sgd"``, ``"adam"``, …; empty if unknown.
        seed: None if unknown.
        steps: optimizer steps done.
        train_seconds: wall-clock seconds of training, evaluations left out; NaN if unknown.
        final: last value of each of `METRICS`; None where there is no finite one.
        hashes: of the initial weights, the batches and the final weights.
        versions: of the libraries it ran under.
        base_rates: the user's learning rate of each stage.
        diagnoses: the diagnoses of the controller, as recorded.
        command: what started it.
        started: when, in UTC, ISO 8601; empty if unknown.
        traceback: of a failed run.
        ignored: names of files in its folder that no run leaves there.
        config: the resolved configuration.
        curves: float64 ``[logged steps]`` for each of `COLUMNS`, NaN where nothing was logged.
        history_file: densities, scales and decisions; None where they were left out to keep
            results small.
        readings: in the history.
    """

    label: str
    status: str
    reason: str = ""
    arm: str = ""
    optimizer: str = ""
    seed: int | None = None
    steps: int = 0
    train_seconds: float = math.nan
    final: dict[str, float | None] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    base_rates: dict[str, float] = field(default_factory=dict)
    diagnoses: list[dict[str, Any]] = field(default_factory=list)
    command: str = ""
    started: str = ""
    traceback: str = ""
    ignored: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, npt.NDArray[np.float64]] | None = None
    history_file: Path | None = None
    readings: int = 0

    @property
    def counts(self) -> bool:
        """The run is an outcome, good or bad, and not a mishap."""
        return self.status in ("done", "diverged")

    def metric(self, name: str) -> float | None:
        """The final value of a metric, or None where the run is no outcome or has none."""
        return self.final.get(name) if self.counts else None

    @property
    def history(self) -> History | None:
        """Densities, scales and decisions, read when asked for: all runs' would fill the memory."""
        return _history(self.history_file) if self.history_file else None

    @property
    def rate(self) -> float | None:
        """The learning rate that the profile is a share of; None if unknown."""
        return _number(self.config, "optimizer", "lr")

    @property
    def ratio(self) -> float | None:
        """Smallest rate of the profile, in units of the largest; None if unknown."""
        return _number(self.config, "profile", "ratio")

    @property
    def task(self) -> str:
        """Model and data: ``"resnet18 on mnist"``; empty if unknown."""
        names = [_entry(self.config, group, "name") for group in ("model", "data")]
        return " on ".join(map(str, names)) if all(names) else ""


@functools.lru_cache(maxsize=16)
def _history(path: Path) -> History:
    return History.load(path)


def _entry(config: dict[str, Any], group: str, key: str) -> Any:
    return inner.get(key) if isinstance(inner := config.get(group), dict) else None


def _number(config: dict[str, Any], group: str, key: str) -> float | None:
    value = _entry(config, group, key)
    return float(value) if isinstance(value, int | float) else None
