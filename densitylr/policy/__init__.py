"""What decides on scales: the contract of a policy, the three of this package, and others.

`Repair`, `Warmup` and `Free` go by activation density. `Lars`, `UpdateRatio`, `MuP`,
`Hypergradient`, `LayerwiseDecay` and `Plateau` are published rules. Write your own as a subclass of
`Policy`.
"""

from densitylr.policy.base import (
    BuildUp,
    Change,
    Needs,
    Observation,
    Policy,
    Scales,
    StageNeeds,
    StageView,
)
from densitylr.policy.baselines import (
    Hypergradient,
    Lars,
    LayerwiseDecay,
    MuP,
    Plateau,
    UpdateRatio,
)
from densitylr.policy.repair import Repair
from densitylr.policy.run import PolicyRun, RunState, simulate
from densitylr.policy.search import Free, Warmup

__all__ = [
    "MODES",
    "BuildUp",
    "Change",
    "Free",
    "Hypergradient",
    "Lars",
    "LayerwiseDecay",
    "MuP",
    "Needs",
    "Observation",
    "Plateau",
    "Policy",
    "PolicyRun",
    "Repair",
    "RunState",
    "Scales",
    "StageNeeds",
    "StageView",
    "UpdateRatio",
    "Warmup",
    "simulate",
]

MODES: dict[str, type[Policy]] = {"repair": Repair, "warmup": Warmup, "free": Free}
"""The policies with a short name, for ``DensityLR(mode=…)``."""
