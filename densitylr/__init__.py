"""A network's own activation density controls its learning rates.

`DensityLR` is put around an optimizer. What the packages below offer beyond the names here stands
in their own ``__all__``: `densitylr.policy` (write a controller), `densitylr.history`,
`densitylr.monitor`, `densitylr.diagnosis`, `densitylr.plots`, `densitylr.integrations`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densitylr.controller import DensityLR
    from densitylr.history import Decision, Diagnosis, History, Reading, Sink, StageReading
    from densitylr.model import Stage, find_stages
    from densitylr.monitor import Baseline, DensityMonitor
    from densitylr.policy import (
        Free,
        Needs,
        Observation,
        Policy,
        Repair,
        StageView,
        Warmup,
        simulate,
    )

__all__ = [
    "Baseline",
    "Decision",
    "DensityLR",
    "DensityMonitor",
    "Diagnosis",
    "Free",
    "History",
    "Needs",
    "Observation",
    "Policy",
    "Reading",
    "Repair",
    "Sink",
    "Stage",
    "StageReading",
    "StageView",
    "Warmup",
    "find_stages",
    "simulate",
]
__version__ = "0.1.0"

_PACKAGES = ("controller", "history", "model", "monitor", "policy")


def __getattr__(name: str) -> Any:
    # Names are imported when they are asked for: the doctor must not import torch before the
    # script that it runs, which may set OMP_NUM_THREADS and the like first.
    if name in __all__:
        for package in _PACKAGES:
            home = importlib.import_module(f"densitylr.{package}")
            if name in home.__all__:
                return globals().setdefault(name, getattr(home, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
