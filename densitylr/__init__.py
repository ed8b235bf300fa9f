"""A network's own activation density runs its learning rates."""

from densitylr.controller import DensityLR
from densitylr.history import History
from densitylr.monitor import DensityMonitor
from densitylr.policy import LiftOff, simulate
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
