"""Why a scale was changed, and what a diagnosis has found: one name each."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Cause", "Finding"]


class Cause(StrEnum):
    """Why a scale was changed."""

    STARVED = "starved"
    """The stage has moved less than a stage that learns would have."""
    ALIGNMENT = "alignment"
    """Gradients go on pointing away from the first weights: the rate is too low."""
    UNTRUSTED_MAXIMUM = "untrusted maximum"
    """Outputs of the stages at the largest rate changed too much for it to be trusted."""
    SCHEDULE = "schedule"
    """The user's rates have changed, and with them the largest scale."""
    LIFT_OFF = "lift-off"
    """The stage has lifted off: displacement no longer changes its scale."""
    NOT_VISIBLE = "not visible"
    """The stage has moved too little to solve for its rate."""
    SOLVED = "solved"
    """The rate was solved for from the displacement and the rate spent."""
    CONSENSUS = "consensus"
    """The stage has too few near-zero outputs and takes the median of the others."""
    LIFTED_BEFORE = "lifted before"
    """The stage had lifted off, and goes on meeting the others half-way."""
    COLLAPSE = "collapse"
    """Training collapsed and `recover` went back, or gave up."""
    POLICY = "policy"
    """A policy that gives no further reason."""


class Finding(StrEnum):
    """What a diagnosis has found; several findings may have one ``kind``."""

    UNTRAINABLE = "untrainable"
    ZERO_RATE = "zero rate"
    BAD_GAIN = "bad gain"
    ZERO_GRADIENT = "zero gradient"
    RAISED = "raised"
    NOTHING_MOVES = "nothing moves"
    OUTPUTS_GREW = "outputs grew"
    OUTPUTS_ALIKE = "outputs alike"
    SUDDEN_GROWTH = "sudden growth"
    NEAR_ZERO = "near zero"
    RECOVERED = "recovered"
    NON_FINITE = "non-finite"
    OUTLIER_BATCH = "outlier batch"
