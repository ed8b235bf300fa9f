"""What was seen and what was decided: records, the history they are kept in, and where they go."""

from densitylr.history.bins import BINS, BOUNDS, EDGES, OCTAVES, TAU
from densitylr.history.causes import Cause, Finding
from densitylr.history.history import TABLE_HEADER, History, check_series, table_rows
from densitylr.history.records import (
    LIFT_OFF,
    Count,
    Decision,
    Diagnosis,
    Finite,
    Number,
    Reading,
    Size,
    StageReading,
    restored,
)
from densitylr.history.schedule import EARLY, PATIENCE, YOUNG, ReadingSchedule, check_every
from densitylr.history.sentences import collapse_evidence
from densitylr.history.sinks import Sink, scalars

__all__ = [
    "BINS",
    "BOUNDS",
    "EARLY",
    "EDGES",
    "LIFT_OFF",
    "OCTAVES",
    "PATIENCE",
    "TABLE_HEADER",
    "TAU",
    "YOUNG",
    "Cause",
    "Count",
    "Decision",
    "Diagnosis",
    "Finding",
    "Finite",
    "History",
    "Number",
    "Reading",
    "ReadingSchedule",
    "Sink",
    "Size",
    "StageReading",
    "check_every",
    "check_series",
    "collapse_evidence",
    "restored",
    "scalars",
    "table_rows",
]
