"""How far the largest rate is trusted, as a pure function and in training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from densitylr import DensityLR, Needs, Observation, Policy, Reading, Repair
from densitylr.policy import Scales
from densitylr.policy.repair import largest_growth, mean_growth, trusted_share
from tests.support.readings import Play, stage_reading

GROWTHS = st.floats(-6, 6)
LIFTED = stage_reading(0.5)


def seen(step: int, top: float, low: float = 0.0) -> Reading:
    """Two stages of which neither has moved; outputs of ``top`` have changed so many e-folds."""
    stages = {"low": stage_reading(low), "top": stage_reading(rms=math.exp(top))}
    return Reading(step, stages)


@given(st.lists(GROWTHS, min_size=2, max_size=7), st.floats(1e-6, 1))
def test_others_are_raised_only_as_far_as_the_largest_rate_is_trusted(
    tops: list[float], own: float
) -> None:
    """By a rule of its own: the largest change so far, of the first steps."""
    game = Play(Repair(), {"low": own, "top": 1.0})
    for step, top in enumerate(tops):
        before = game.scales["low"]
        decisions = game.see(seen(step, top))
        growth = max((abs(t) for t in tops[1 : min(step, 4) + 1]), default=0.0)
        most = max(1.0, math.exp(1.5 * min(0.0, 1.0 - growth)) / own)
        assert game.scales["top"] == 1
        assert game.scales["low"] <= most * (1 + 1e-6)
        if before > most * (1 + 1e-6):
            (decision,) = decisions
            assert decision.kind == "lower"
            assert decision.scale == pytest.approx(most)
            assert decision.cause == "untrusted maximum"
            assert decision.numbers["growth"] == pytest.approx(math.exp(growth))
            assert "your largest rate" in decision.reason


def test_a_calm_stage_at_the_largest_rate_changes_nothing() -> None:
    rates = {"low": 1e-4, "top": 1.0}
    careful, blind = Play(Repair(), rates), Play(Repair(growth_tolerance=1e9), rates)
    for step in range(0, 60, 5):
        assert careful.see(seen(step, 0.9)) == blind.see(seen(step, 0.9))
    assert careful.scales["low"] == pytest.approx(1e4)


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_growth_after_the_first_steps_is_not_held_against_a_rate(step: int) -> None:
    game = Play(Repair(), {"low": 1e-4, "top": 1.0})
    for now in sorted({0, 1, 3, 4, step, 20, 40, 60, 80}):
        game.see(seen(now, 5.0 if now == step else 0.0))
    share = math.exp(1.5 * (1 - 5.0)) if step <= 4 else 1.0
    assert game.scales["low"] == pytest.approx(1e4 * share)


@pytest.mark.parametrize(("first", "counts"), [(11, True), (12, True), (13, False)])
def test_the_first_reading_counts_though_it_is_late(first: int, counts: bool) -> None:
    game = Play(Repair(), {"low": 1e-4, "top": 1.0})
    for step in (0, first, 24, 48, 60):
        game.see(seen(step, 5.0 if step else 0.0))
    share = math.exp(1.5 * (1 - 5.0)) if counts else 1.0
    assert game.scales["low"] == pytest.approx(1e4 * share)


@pytest.mark.parametrize(("step", "needed"), [(1, True), (3, True), (4, False), (5, False)])
def test_a_twin_is_needed_as_long_as_its_outputs_tell_of_the_rate(step: int, needed: bool) -> None:
    """Of a stage that has lifted off at once."""
    game = Play(Repair(), {"low": 0.1, "top": 1.0})
    for now in (0, step):
        game.see(
            seen(now, 0.0) if now == 0 else Reading(now, dict.fromkeys(("low", "top"), LIFTED))
        )
    assert not game.run.undecided
    assert game.run.compared == ({"low", "top"} if needed else set())


def test_its_steps_count_from_its_first_rate() -> None:
    """A warm-up from a rate of zero: until then outputs tell of nothing."""
    game = Play(Repair(), {"low": 0.0, "top": 0.0})
    for step in (0, 5, 10, 13):
        rate = 0.0 if step < 10 else 1.0
        game.see(seen(step, 3.0 if step != 13 else 2.0), {"low": 1e-4 * rate, "top": rate})
        assert game.memory("top").growth == (None if step < 13 else pytest.approx(2.0))
    assert game.memory("top").started == 10


@pytest.mark.parametrize(
    ("growth", "steps", "expected"),
    [
        (None, 0, None),
        (None, 1, math.log(9)),
        (None, 4, math.log(9)),
        (None, 12, math.log(9)),
        (None, 13, None),
        (0.3, 0, 0.3),
        (0.3, 1, math.log(9)),
        (0.3, 4, math.log(9)),
        (0.3, 5, 0.3),
        (3.0, 2, 3.0),
    ],
)
def test_the_largest_growth(growth: float | None, steps: int, expected: float | None) -> None:
    for rms, rms0 in ((9.0, 1.0), (1.0, 9.0)):
        found = largest_growth(growth, steps, 4, stage_reading(rms=rms, rms0=rms0))
        assert found == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize("rms", [0.0, math.nan, math.inf])
def test_a_scale_that_is_not_known_says_nothing(rms: float) -> None:
    assert largest_growth(0.3, 2, 4, stage_reading(rms=rms)) == 0.3
    assert largest_growth(0.3, 2, 4, stage_reading(rms0=rms)) == 0.3
    assert largest_growth(None, 2, 4, stage_reading(rms=rms)) is None


def test_growth_is_the_mean_over_the_stages_at_the_largest_rate() -> None:
    assert mean_growth([0.5, 1.5, None]) == 1.0
    assert mean_growth([None]) is None
    assert mean_growth([]) is None
    rates = {"low": 1e-4, "a": 0.1, "b": 0.1 * (1 + 1e-9), "c": 0.01, "d": 0.1}
    game = Play(Repair(), rates, largest=0.1 * (1 + 1e-9))
    rms = {"a": math.exp(2.5), "b": math.exp(3.5), "c": math.exp(9.0), "d": math.nan}
    for step in (0, 2, 10, 20, 30, 40, 50):
        game.see(Reading(step, {n: stage_reading(rms=rms.get(n, 1.0)) for n in rates}))
    assert game.scales["low"] == pytest.approx(1e3 * math.exp(1.5 * (1 - 3.0)))


@given(st.floats(0, 10), st.floats(0.1, 5), st.floats(0.1, 5))
def test_the_trusted_share(growth: float, tolerance: float, exponent: float) -> None:
    share = trusted_share(growth, tolerance, exponent)
    if growth <= tolerance:
        assert share == 1
    else:
        assert math.log(share) == pytest.approx(-exponent * (growth - tolerance))
    assert trusted_share(None, tolerance, exponent) == 1


class Content(Policy):
    """For which every stage has lifted off at once, and that knows nothing of growth."""

    needs = Needs()

    def update(self, state: None, seen: Observation) -> tuple[Scales, None]:
        return {}, state


def train(largest: float, policy: Policy) -> DensityLR:
    """A first layer at a thousandth of the head's rate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    groups = [{"params": model[0].parameters(), "lr": largest / 1000}]
    groups += [{"params": model[2].parameters(), "lr": largest}]
    optimizer = DensityLR(torch.optim.SGD(groups), model, policy=policy)
    for _ in range(40):
        x = torch.randn(64, 20)
        nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(("largest", "hot"), [(0.1, False), (3.0, True)])
def test_in_training(largest: float, hot: bool) -> None:
    """The first layer is raised up to the head's rate, if that is a good one."""
    careful, trusting = (train(largest, Repair(growth_tolerance=t)) for t in (1.0, 1e9))
    assert trusting.scales["0"] == pytest.approx(1000)
    first = careful.history.steps <= 4
    rms, rms0 = (careful.history.series("2", name)[first] for name in ("rms", "rms0"))
    growth = np.abs(np.log(rms / rms0)).max()
    assert (growth > 1.0) == hot
    share = math.exp(1.5 * min(0.0, 1.0 - growth))
    assert careful.scales["0"] == pytest.approx(1000 * share)
    seen_by = [reading.stages["2"].estimator for reading in careful.history.readings]
    assert set(seen_by[: first.sum()]) == {"twin"}
    assert seen_by[-1] == "last-twin"  # it has no room, and has lifted off


def test_another_policy_keeps_no_twins_for_it() -> None:
    readings = train(0.1, Content()).history.readings
    assert {r.stages[s].estimator for r in readings[1:] for s in "02"} == {"last-twin"}
