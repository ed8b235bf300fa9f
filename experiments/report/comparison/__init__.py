"""Runs set against each other: what was declared, what came out, and how sure that is."""

from experiments.report.comparison.bench import HIGHER_IS_BETTER, Bench, Contrast, Effect, benches
from experiments.report.comparison.declaration import (
    LABELS,
    Study,
    discrepancies,
    judged_on,
    study_of,
    when,
)
from experiments.report.comparison.grid import (
    Point,
    Tuning,
    by_rate,
    by_ratio,
    tuning,
    untuned,
    width,
)
from experiments.report.comparison.stats import Estimate, Gap, gap_closed, paired_difference, signed
from experiments.report.comparison.targets import Reached, reached

__all__ = [
    "HIGHER_IS_BETTER",
    "LABELS",
    "Bench",
    "Contrast",
    "Effect",
    "Estimate",
    "Gap",
    "Point",
    "Reached",
    "Study",
    "Tuning",
    "benches",
    "by_rate",
    "by_ratio",
    "discrepancies",
    "gap_closed",
    "judged_on",
    "paired_difference",
    "reached",
    "signed",
    "study_of",
    "tuning",
    "untuned",
    "when",
    "width",
]
