"""From samples of outputs to numbers: a buffer, statistics, and what they are pooled to."""

from densitylr.monitor.measure.aggregate import (
    COLUMN,
    Compared,
    References,
    pool_layers,
    pool_ranks,
    tabulate,
    unread,
)
from densitylr.monitor.measure.buffer import (
    EXAMPLE_VARIANCE_AT,
    PEAK_AT,
    SHAPES,
    SampleBuffer,
    shares_memory,
)
from densitylr.monitor.measure.statistics import ESTIMATORS, near_zero_below, row_dtype

__all__ = [
    "COLUMN",
    "ESTIMATORS",
    "EXAMPLE_VARIANCE_AT",
    "PEAK_AT",
    "SHAPES",
    "Compared",
    "References",
    "SampleBuffer",
    "near_zero_below",
    "pool_layers",
    "pool_ranks",
    "row_dtype",
    "shares_memory",
    "tabulate",
    "unread",
]
