"""The sentences of decisions and diagnoses, made from their causes and numbers.

This is the only place where they are put into words, and nothing reads the words back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from densitylr.history.causes import Cause, Finding

__all__ = ["action", "collapse_evidence", "evidence", "reason"]

_CURE = "a lower rate does not bring it back: go back to a checkpoint before it, with a lower rate"


def reason(decision: Any) -> str:
    """Why a `Decision` was taken: one sentence with its numbers."""
    if decision.cause is Cause.COLLAPSE:
        return f"collapsed: {collapse_evidence(decision.numbers)}; {_recovery(decision.numbers)}"
    return f"{_why(decision)}; {_change(decision)}"


def _why(decision: Any) -> str:
    """What was seen, and what follows from it."""
    numbers: Mapping[str, Any] = decision.numbers
    try:
        why = _CAUSES[decision.cause].format(**numbers)
    except (KeyError, ValueError):  # a policy of somebody's own has given other numbers
        why = str(decision.cause)
    if decision.cause is Cause.POLICY:
        own = {name: n for name, n in numbers.items() if name not in _SHOWN_ELSEWHERE}
        why += f" ({', '.join(f'{name} {n:.3g}' for name, n in own.items())})" if own else ""
    if numbers.get("consensus"):
        why += f"; half-way to the median, {numbers['consensus']:.1e}"
    if "near_zero" not in numbers:
        return f"after {decision.step} steps; {why}"
    seen = "not read"
    if numbers["near_zero"] == numbers["near_zero"]:
        seen = (
            f"near-zero density {numbers['near_zero']:.3f}, untrained {numbers['untrained']:.3f},"
        )
    return f"{seen} after {decision.step} steps; {why}"


_SHOWN_ELSEWHERE = ("near_zero", "untrained", "consensus", "limit")

_CAUSES = {
    Cause.STARVED: "expected to have moved {expected:.1%}",
    Cause.ALIGNMENT: "gradients still point away from the untrained weights ({alignment:.2f})",
    Cause.UNTRUSTED_MAXIMUM: "outputs at your largest rate have changed {growth:.3g}-fold in scale",
    Cause.SCHEDULE: "your rates have changed",
    Cause.LIFT_OFF: "moved {moved:.1%}, lifted off",
    Cause.NOT_VISIBLE: "moved {moved:.2%}, too little to solve for a rate",
    Cause.SOLVED: "moved {moved:.2%} for {spent:.2g} of rate spent",
    Cause.CONSENSUS: "too few near-zero outputs to judge by; takes the median of the others, "
    "{median:.1e}",
    Cause.LIFTED_BEFORE: "lifted off before",
    Cause.POLICY: "set by the policy",
}

_LIMITS = {
    "largest": "the largest you gave",
    "trusted": "as far as your largest is trusted",
    "reach": "the largest it may have",
}


def _change(decision: Any) -> str:
    if decision.scale == decision.scale_before:
        return f"rate stays {decision.rate:.1e}, {decision.scale:.4g} times yours"
    limit = _LIMITS.get(decision.numbers.get("limit", ""))
    change = f"rate {decision.rate_before:.1e} → {decision.rate:.1e}"
    return f"{change} ({limit})" if limit else change


def collapse_evidence(numbers: Mapping[str, Any]) -> str:
    """What showed that training collapsed."""
    return _SIGNS[numbers["sign"]].format(**numbers)


_SIGNS = {
    "non-finite": "{nonfinite} of its activations are NaN or infinite",
    "non-finite step": "its activations were not finite in a step since the last reading",
    "exploded": "RMS of its activations {peak_rms:.3g}, at most {usual:.3g} before",
    "alike": "{example_variance:.2%} of its mean square depends on the example, {usual:.1%} before",
    "all alike": "{example_variance:.2%} of its mean square depends on the example, {usual:.1%} "
    "before, and over all stages {mean:.0%} as much as before",
    "near zero": "{share:.0%} of its outputs are below a tenth of their own RMS, {first:.0%} at "
    "first",
}


def _recovery(numbers: Mapping[str, Any]) -> str:
    """What `recover` did about it."""
    if numbers["gave_up"]:
        tries = numbers["tries"]
        return f"gave up after {tries} recoveries in a row: start again with a lower rate"
    why = "a quarter of what they were" if numbers["again"] else "the largest that was healthy"
    return f"went back to step {numbers['target']}, rates capped at {numbers['cap']:.1e}, {why}"


def evidence(diagnosis: Any) -> str:
    """The numbers that a `Diagnosis` rests on, in words."""
    numbers: Mapping[str, Any] = diagnosis.numbers
    if diagnosis.finding is Finding.RAISED:
        return f"{_why(numbers['first'])} at rate {numbers['first'].rate_before:.1e}"
    if diagnosis.finding is Finding.RECOVERED:
        times = numbers["times"]
        several = f" (the first of {times} times)" if times > 1 else ""
        return collapse_evidence(numbers["first"].numbers) + several
    return _EVIDENCE[diagnosis.finding].format(**numbers)


_EVIDENCE = {
    Finding.UNTRAINABLE: "none of its parameters has requires_grad",
    Finding.ZERO_RATE: "its learning rate is 0",
    Finding.BAD_GAIN: "{weights}",
    Finding.ZERO_GRADIENT: "all of its gradients are exactly zero at the last {readings} readings, "
    "at rate {rate:.1e}",
    Finding.NOTHING_MOVES: "the outputs of no stage have changed by more than they vary between "
    "batches in {steps} steps; the RMS of this one against its untrained one varied by {moved:.1%} "
    "at rate {rate:.1e}",
    Finding.OUTPUTS_GREW: "its outputs are {times:.3g} times their untrained size after {step} "
    "steps at rate {rate:.1e}",
    Finding.OUTPUTS_ALIKE: "its outputs are the same for all examples: {share:.2%} of their mean "
    "square depends on the example, {first:.0%} untrained, after {step} steps at rate {rate:.1e}",
    Finding.SUDDEN_GROWTH: "its outputs grew {times:.3g} times from step {begin} to step {end}, "
    "and stayed there",
    Finding.NEAR_ZERO: "{share:.0%} of its outputs are below a tenth of their own RMS, {first:.0%} "
    "at first",
    Finding.NON_FINITE: "{nonfinite} NaN or infinite activations at one reading",
    Finding.OUTLIER_BATCH: "the RMS of its outputs was {peak:.3g} in a forward of steps {begin} to "
    "{end}, at most {before:.3g} before and {after:.3g} after",
}


def action(diagnosis: Any) -> str:
    """What was done about a `Diagnosis`, or what to do."""
    numbers: Mapping[str, Any] = diagnosis.numbers
    if diagnosis.finding is Finding.RAISED:
        return _raised(numbers)
    if diagnosis.finding is Finding.RECOVERED:
        last = numbers["last"]
        return (f"at step {last.step} " if numbers["times"] > 1 else "") + _recovery(last.numbers)
    if diagnosis.finding is Finding.NOTHING_MOVES:
        return _nothing_moves(numbers)
    if diagnosis.finding in (Finding.OUTPUTS_GREW, Finding.OUTPUTS_ALIKE):
        if numbers["within_user_rates"]:
            return "repair takes no rate below yours: lower it, or use mode='warmup'"
        return "lower the rate"
    return _ACTIONS[diagnosis.finding]


_ACTIONS = {
    Finding.UNTRAINABLE: "left alone",
    Finding.ZERO_RATE: "left alone, as no scale changes a rate of 0: give it one if it is to learn",
    Finding.BAD_GAIN: "left alone, as no learning rate mends it: initialise it anew",
    Finding.ZERO_GRADIENT: "left alone, as no learning rate moves it: look for units that never "
    "fire after it, such as a large negative bias before a ReLU, and initialise them anew",
    Finding.SUDDEN_GROWTH: _CURE,
    Finding.NEAR_ZERO: _CURE,
    Finding.NON_FINITE: "a lower rate or gradient clipping, from a checkpoint before it",
    Finding.OUTLIER_BATCH: "look at the data of these steps; such a batch stays in the optimizer's "
    "averages and in the running statistics of batch norm for long, so go back to a checkpoint "
    "before it",
}


def _raised(numbers: Mapping[str, Any]) -> str:
    last, count = numbers["last"], numbers["changes"]
    times = "1 decision" if count == 1 else f"{count} decisions"
    change = f"rate ×{last.scale:.4g} to {last.rate:.1e} in {times}"
    if numbers["schedule_changed"]:
        change += f", as yours was {last.rate / last.scale:.1e} by then"
    if numbers["observe_only"]:
        return f"only observed; it would have been {change}"
    if numbers["lifted_at"] is not None:
        return f"{change}; lifted off at step {numbers['lifted_at']}"
    return (
        f"{change}; {'had lifted off before' if numbers['lifted_before'] else 'not yet lifted off'}"
    )


def _nothing_moves(numbers: Mapping[str, Any]) -> str:
    remedy = "raise the learning rate"
    if not numbers["within_user_rates"]:
        return remedy
    why = "no rate is large enough"
    if numbers["rate"] == numbers["largest"]:
        why = "no group has a larger rate to go by"
    return f"{why}: {remedy}, or use mode='free'"
