"""Results of the cells: outcomes, diagnoses, actions, and whether demands are met."""

from experiments.gauntlet.verdict.conduct import named, quiet
from experiments.gauntlet.verdict.demands import Judgement, judge
from experiments.gauntlet.verdict.outcomes import (
    SETTING,
    Closed,
    Record,
    closed,
    family,
    flat_runs,
    group,
    recovered,
    what,
)
from experiments.gauntlet.verdict.searching import compare_rules, mean_ranks, searches

__all__ = [
    "SETTING",
    "Closed",
    "Judgement",
    "Record",
    "closed",
    "compare_rules",
    "family",
    "flat_runs",
    "group",
    "judge",
    "mean_ranks",
    "named",
    "quiet",
    "recovered",
    "searches",
    "what",
]
