"""What a model is made of: its stages, whether its weights are untrained, and who trains it."""

from densitylr.model.initialization import (
    WeightCheck,
    WeightChecks,
    check_untrained,
    check_weights,
)
from densitylr.model.ranks import (
    Ranks,
    RanksError,
    find_ranks,
    fingerprint,
    is_sharded,
    stepping_optimizer,
    whole,
)
from densitylr.model.stages import Stage, find_stages, untrainable, unwrap

__all__ = [
    "Ranks",
    "RanksError",
    "Stage",
    "WeightCheck",
    "WeightChecks",
    "check_untrained",
    "check_weights",
    "find_ranks",
    "find_stages",
    "fingerprint",
    "is_sharded",
    "stepping_optimizer",
    "untrainable",
    "unwrap",
    "whole",
]
