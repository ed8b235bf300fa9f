"""A network's own activation density runs its learning rates."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densitylr.controller import DensityLR
    from densitylr.history import History
    from densitylr.liftoff import LiftOff
    from densitylr.monitor import DensityMonitor
    from densitylr.policy import simulate
    from densitylr.records import Decision, Diagnosis, Reading, StageReading
    from densitylr.stages import Stage, find_stages

__all__ = [
    "Decision",
    "DensityLR",
    "DensityMonitor",
    "Diagnosis",
    "History",
    "LiftOff",
    "Reading",
    "Stage",
    "StageReading",
    "find_stages",
    "simulate",
]
__version__ = "0.1.0"

# The names are imported when they are asked for: the doctor must not import torch before the
# script that it runs, which may set OMP_NUM_THREADS and the like first.
_HOMES = {
    "controller": ("DensityLR",),
    "history": ("History",),
    "liftoff": ("LiftOff",),
    "monitor": ("DensityMonitor",),
    "policy": ("simulate",),
    "records": ("Decision", "Diagnosis", "Reading", "StageReading"),
    "stages": ("Stage", "find_stages"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names or name == module:
            home = importlib.import_module(f"densitylr.{module}")
            return home if name == module else globals().setdefault(name, getattr(home, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
