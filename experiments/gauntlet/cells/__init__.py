"""What is trained: one network once is a cell, made healthy or ill, under one arm."""

from experiments.gauntlet.cells.ablations import ABLATIONS
from experiments.gauntlet.cells.cell import (
    ARMS,
    GOOD_RATES,
    NAMED_WITHIN,
    OPTIMIZERS,
    SCHEDULES,
    Cell,
    parse_arm,
    run_cell,
)
from experiments.gauntlet.cells.conditions import Condition, condition
from experiments.gauntlet.cells.pool import read, run_cells
from experiments.gauntlet.cells.suites import Block, GauntletConfig, expand, register

__all__ = [
    "ABLATIONS",
    "ARMS",
    "GOOD_RATES",
    "NAMED_WITHIN",
    "OPTIMIZERS",
    "SCHEDULES",
    "Block",
    "Cell",
    "Condition",
    "GauntletConfig",
    "condition",
    "expand",
    "parse_arm",
    "read",
    "register",
    "run_cell",
    "run_cells",
]
