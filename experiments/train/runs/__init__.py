"""The folders that training leaves, read back: every run is accounted for, damaged or not."""

from experiments.train.runs.finding import find_runs
from experiments.train.runs.reading import read_run
from experiments.train.runs.run import COLUMNS, METRICS, STATUSES, Run

__all__ = ["COLUMNS", "METRICS", "STATUSES", "Run", "find_runs", "read_run"]
