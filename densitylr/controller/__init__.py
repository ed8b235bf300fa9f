"""`DensityLR`: the optimizer facade, its steps, the control loop, scaling, checkpoints."""

from densitylr.controller.checkpoint import STATE_KEY, add_state
from densitylr.controller.controller import DensityLR
from densitylr.controller.loop import ControlLoop
from densitylr.controller.param_groups import StageRate, build_up_of
from densitylr.controller.step import with_closures

__all__ = [
    "STATE_KEY",
    "ControlLoop",
    "DensityLR",
    "StageRate",
    "add_state",
    "build_up_of",
    "with_closures",
]
