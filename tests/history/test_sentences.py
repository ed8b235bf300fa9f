"""Every cause and every finding has one sentence, and its numbers stand in it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from densitylr import Decision, Diagnosis
from densitylr.history import Cause, Finding, collapse_evidence

DENSITY = {"near_zero": 0.0791, "untrained": 0.0834}
SEEN = "near-zero density 0.079, untrained 0.083, after 35 steps; "
WENT_BACK = {"gave_up": False, "again": False, "target": 30, "cap": 0.02}
EXPLODED = {"sign": "exploded", "peak_rms": 41.5, "usual": 2.25}

CAUSES: list[tuple[Cause, dict[str, Any], str]] = [
    (Cause.STARVED, DENSITY | {"expected": 0.0525}, SEEN + "expected to have moved 5.2%"),
    (
        Cause.ALIGNMENT,
        DENSITY | {"alignment": 0.172},
        SEEN + "gradients still point away from the untrained weights (0.17)",
    ),
    (
        Cause.UNTRUSTED_MAXIMUM,
        DENSITY | {"growth": 31.42},
        SEEN + "outputs at your largest rate have changed 31.4-fold in scale",
    ),
    (Cause.SCHEDULE, DENSITY, SEEN + "your rates have changed"),
    (Cause.LIFT_OFF, DENSITY | {"moved": 0.123}, SEEN + "moved 12.3%, lifted off"),
    (
        Cause.NOT_VISIBLE,
        DENSITY | {"moved": 0.00123},
        SEEN + "moved 0.12%, too little to solve for a rate",
    ),
    (
        Cause.SOLVED,
        DENSITY | {"moved": 0.0456, "spent": 0.0078},
        SEEN + "moved 4.56% for 0.0078 of rate spent",
    ),
    (
        Cause.CONSENSUS,
        DENSITY | {"median": 0.00231},
        SEEN + "too few near-zero outputs to judge by; takes the median of the others, 2.3e-03",
    ),
    (Cause.LIFTED_BEFORE, DENSITY, SEEN + "lifted off before"),
    (
        Cause.LIFTED_BEFORE,
        DENSITY | {"consensus": 0.0052},
        SEEN + "lifted off before; half-way to the median, 5.2e-03",
    ),
    (
        Cause.SOLVED,
        DENSITY | {"moved": 0.0456, "spent": 0.0078, "consensus": 0.0052},
        SEEN + "moved 4.56% for 0.0078 of rate spent; half-way to the median, 5.2e-03",
    ),
    (
        Cause.SCHEDULE,
        {"near_zero": math.nan, "untrained": math.nan},
        "not read after 35 steps; your rates have changed",
    ),
    (Cause.POLICY, {}, "after 35 steps; set by the policy"),
]


@pytest.mark.parametrize(
    ("cause", "numbers", "sentence"), CAUSES, ids=[str(cause) for cause, _, _ in CAUSES]
)
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("", ""),
        ("largest", " (the largest you gave)"),
        ("trusted", " (as far as your largest is trusted)"),
        ("reach", " (the largest it may have)"),
    ],
)
def test_the_reason_of_a_decision(
    cause: Cause, numbers: dict[str, Any], sentence: str, limit: str, words: str
) -> None:
    known = numbers | ({"limit": limit} if limit else {})
    decision = Decision(35, "conv1", "raise", 1.0, 4.0, 0.0012, 0.0048, cause, known)
    assert decision.reason == f"{sentence}; rate 1.2e-03 → 4.8e-03{words}"
    assert str(decision) == f"conv1: {decision.reason}"
    stays = Decision(35, "conv1", "lift-off", 4.0, 4.0, 0.0048, 0.0048, cause, known)
    assert stays.reason == f"{sentence}; rate stays 4.8e-03, 4 times yours"


SIGNS: list[tuple[dict[str, Any], str]] = [
    ({"sign": "non-finite", "nonfinite": 17}, "17 of its activations are NaN or infinite"),
    (
        {"sign": "non-finite step"},
        "its activations were not finite in a step since the last reading",
    ),
    (EXPLODED, "RMS of its activations 41.5, at most 2.25 before"),
    (
        {"sign": "alike", "example_variance": 0.0012, "usual": 0.345},
        "0.12% of its mean square depends on the example, 34.5% before",
    ),
    (
        {"sign": "all alike", "example_variance": 0.0512, "usual": 0.345, "mean": 0.29},
        "5.12% of its mean square depends on the example, 34.5% before, and over all stages 29% as "
        "much as before",
    ),
    (
        {"sign": "near zero", "share": 0.71, "first": 0.08},
        "71% of its outputs are below a tenth of their own RMS, 8% at first",
    ),
]

RECOVERIES: list[tuple[dict[str, Any], str]] = [
    (WENT_BACK, "went back to step 30, rates capped at 2.0e-02, the largest that was healthy"),
    (
        WENT_BACK | {"again": True},
        "went back to step 30, rates capped at 2.0e-02, a quarter of what they were",
    ),
    (
        WENT_BACK | {"gave_up": True, "tries": 8},
        "gave up after 8 recoveries in a row: start again with a lower rate",
    ),
]


def collapse(step: int, numbers: dict[str, Any]) -> Decision:
    known = EXPLODED | numbers
    return Decision(step, "a", "recover", 1.0, 0.5, 0.1, 0.05, Cause.COLLAPSE, known, step - 5)


@pytest.mark.parametrize(("numbers", "sentence"), SIGNS)
@pytest.mark.parametrize(("done", "words"), RECOVERIES)
def test_the_reason_of_a_recovery(
    numbers: dict[str, Any], sentence: str, done: dict[str, Any], words: str
) -> None:
    assert collapse_evidence(numbers) == sentence
    event = Decision(
        35, "a", "recover", 1.0, 0.5, 0.1, 0.05, Cause.COLLAPSE, numbers | done, since=30
    )
    assert event.reason == f"collapsed: {sentence}; {words}"


def raised(**numbers: Any) -> dict[str, Any]:
    """What is known of a stage that was raised from 1.0e-04 to 3.2e-03."""
    first, last = (
        Decision(step, "a", "raise", before, scale, before * 1e-4, scale * 1e-4, cause, known)
        for step, before, scale, cause, known in (
            (10, 1.0, 8.0, Cause.STARVED, DENSITY | {"expected": 0.05}),
            (20, 8.0, 32.0, Cause.ALIGNMENT, DENSITY | {"alignment": 0.1}),
        )
    )
    known = {
        "first": first,
        "last": last,
        "changes": 3,
        "observe_only": False,
        "lifted_at": None,
        "lifted_before": False,
        "schedule_changed": False,
    }
    return known | numbers


RAISED = (
    "near-zero density 0.079, untrained 0.083, after 10 steps; expected to have moved 5.0% at rate "
    "1.0e-04"
)
CURE = "a lower rate does not bring it back: go back to a checkpoint before it, with a lower rate"
STILL = {"steps": 55, "moved": 0.0123, "rate": 1e-6, "largest": 1e-4}
STOOD = (
    "the outputs of no stage have changed by more than they vary between batches in 55 steps; the "
    "RMS of this one against its untrained one varied by 1.2% at rate 1.0e-06"
)
GREW = {"times": 91.3, "step": 15, "rate": 0.5}
GREW_WORDS = "its outputs are 91.3 times their untrained size after 15 steps at rate 5.0e-01"
MUTE = {"share": 0.00123, "first": 0.41, "step": 15, "rate": 0.5}
MUTE_WORDS = (
    "its outputs are the same for all examples: 0.12% of their mean square depends on the example, "
    "41% untrained, after 15 steps at rate 5.0e-01"
)
LOWER = "repair takes no rate below yours: lower it, or use mode='warmup'"
RISEN = "rate ×32 to 3.2e-03 in "

FINDINGS: list[tuple[Finding, dict[str, Any], str, str]] = [
    (Finding.UNTRAINABLE, {}, "none of its parameters has requires_grad", "left alone"),
    (
        Finding.ZERO_RATE,
        {},
        "its learning rate is 0",
        "left alone, as no scale changes a rate of 0: give it one if it is to learn",
    ),
    (
        Finding.BAD_GAIN,
        {"weights": "0.weight: its spread 3 is 17 times that of"},
        "0.weight: its spread 3 is 17 times that of",
        "left alone, as no learning rate mends it: initialise it anew",
    ),
    (
        Finding.ZERO_GRADIENT,
        {"readings": 9, "rate": 0.0021},
        "all of its gradients are exactly zero at the last 9 readings, at rate 2.1e-03",
        "left alone, as no learning rate moves it: look for units that never fire after it, such "
        "as a large negative bias before a ReLU, and initialise them anew",
    ),
    (Finding.RAISED, raised(), RAISED, RISEN + "3 decisions; not yet lifted off"),
    (Finding.RAISED, raised(changes=1), RAISED, RISEN + "1 decision; not yet lifted off"),
    (
        Finding.RAISED,
        raised(lifted_at=45),
        RAISED,
        RISEN + "3 decisions; lifted off at step 45",
    ),
    (
        Finding.RAISED,
        raised(lifted_before=True),
        RAISED,
        RISEN + "3 decisions; had lifted off before",
    ),
    (
        Finding.RAISED,
        raised(schedule_changed=True),
        RAISED,
        RISEN + "3 decisions, as yours was 1.0e-04 by then; not yet lifted off",
    ),
    (
        Finding.RAISED,
        raised(observe_only=True),
        RAISED,
        "only observed; it would have been " + RISEN + "3 decisions",
    ),
    (
        Finding.NOTHING_MOVES,
        STILL | {"within_user_rates": True},
        STOOD,
        "no rate is large enough: raise the learning rate, or use mode='free'",
    ),
    (
        Finding.NOTHING_MOVES,
        STILL | {"within_user_rates": True, "largest": 1e-6},
        STOOD,
        "no group has a larger rate to go by: raise the learning rate, or use mode='free'",
    ),
    (
        Finding.NOTHING_MOVES,
        STILL | {"within_user_rates": False},
        STOOD,
        "raise the learning rate",
    ),
    (Finding.OUTPUTS_GREW, GREW | {"within_user_rates": True}, GREW_WORDS, LOWER),
    (Finding.OUTPUTS_GREW, GREW | {"within_user_rates": False}, GREW_WORDS, "lower the rate"),
    (Finding.OUTPUTS_ALIKE, MUTE | {"within_user_rates": True}, MUTE_WORDS, LOWER),
    (Finding.OUTPUTS_ALIKE, MUTE | {"within_user_rates": False}, MUTE_WORDS, "lower the rate"),
    (
        Finding.SUDDEN_GROWTH,
        {"times": 21.05, "begin": 45, "end": 50},
        "its outputs grew 21.1 times from step 45 to step 50, and stayed there",
        CURE,
    ),
    (
        Finding.NEAR_ZERO,
        {"share": 0.91, "first": 0.08},
        "91% of its outputs are below a tenth of their own RMS, 8% at first",
        CURE,
    ),
    (
        Finding.RECOVERED,
        {"first": collapse(35, WENT_BACK), "last": collapse(35, WENT_BACK), "times": 1},
        "RMS of its activations 41.5, at most 2.25 before",
        "went back to step 30, rates capped at 2.0e-02, the largest that was healthy",
    ),
    (
        Finding.RECOVERED,
        {
            "first": collapse(35, WENT_BACK),
            "last": collapse(60, WENT_BACK | {"gave_up": True, "tries": 2}),
            "times": 2,
        },
        "RMS of its activations 41.5, at most 2.25 before (the first of 2 times)",
        "at step 60 gave up after 2 recoveries in a row: start again with a lower rate",
    ),
    (
        Finding.NON_FINITE,
        {"nonfinite": 7},
        "7 NaN or infinite activations at one reading",
        "a lower rate or gradient clipping, from a checkpoint before it",
    ),
    (
        Finding.OUTLIER_BATCH,
        {"peak": 212.0, "before": 1.31, "after": 1.24, "begin": 41, "end": 45},
        "the RMS of its outputs was 212 in a forward of steps 41 to 45, at most 1.31 before and "
        "1.24 after",
        "look at the data of these steps; such a batch stays in the optimizer's averages and in "
        "the running statistics of batch norm for long, so go back to a checkpoint before it",
    ),
]


@pytest.mark.parametrize(
    ("finding", "numbers", "evidence", "action"), FINDINGS, ids=[str(f[0]) for f in FINDINGS]
)
@pytest.mark.parametrize(("kind", "verb"), [("starved", "is"), ("bad gain", "has a")])
def test_the_sentence_of_a_diagnosis(
    finding: Finding,
    numbers: dict[str, Any],
    evidence: str,
    action: str,
    kind: str,
    verb: str,
) -> None:
    found = Diagnosis("a", kind, 10, finding, numbers)
    assert (found.evidence, found.action) == (evidence, action)
    assert str(found) == f"a {verb} {kind} since step 10: {evidence}; {action}"


def test_there_is_one_for_each() -> None:
    assert {cause for cause, _, _ in CAUSES} == set(Cause) - {Cause.COLLAPSE}
    assert {finding for finding, *_ in FINDINGS} == set(Finding)


def test_a_cause_without_its_numbers_is_named() -> None:
    decision = Decision(3, "a", "raise", 1.0, 2.0, 0.1, 0.2, Cause.STARVED)
    assert decision.reason == "after 3 steps; starved; rate 1.0e-01 → 2.0e-01"
