"""How far the largest rate is trusted, as a pure function and in training."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from readings import stage_reading
from torch import nn

from densitylr import Decision, DensityLR, LiftOff, Reading
from densitylr.heat import LATE, heat_at, heated, trusted
from densitylr.policy import LawState, Policy, StageState

LAW = LiftOff()
HEATS = st.floats(-6, 6)


def seen(step: int, top: float, low: float = 0.0) -> Reading:
    """Two stages of which neither has moved; outputs of ``top`` have changed so many e-folds."""
    stages = {"low": stage_reading(low), "top": stage_reading(rms=math.exp(top))}
    return Reading(step, stages)


@given(st.lists(HEATS, min_size=2, max_size=5), st.floats(1e-6, 1))
def test_others_are_raised_only_as_far_as_the_largest_rate_is_trusted(
    tops: list[float], own: float
) -> None:
    """By a rule of its own: the largest change so far, of the first steps."""
    rates, state = {"low": own, "top": 1.0}, LAW.init(["low", "top"])
    for step, top in enumerate(tops):
        before = state.scales["low"]
        state, decisions = LAW.decide(state, seen(step, top), rates, 1.0)
        heat = max((abs(t) for t in tops[1 : min(step, LAW.heed) + 1]), default=0.0)
        most = max(1.0, math.exp(LAW.steep * min(0.0, LAW.calm - heat)) / own)
        assert state.scales["top"] == 1
        assert state.scales["low"] <= most * (1 + 1e-6)
        if before > most * (1 + 1e-6):
            (decision,) = decisions
            assert decision.kind == "lower"
            assert decision.scale == pytest.approx(most)
            assert "your largest rate" in decision.reason


def test_a_calm_stage_at_the_largest_rate_changes_nothing() -> None:
    rates, trusting = {"low": 1e-4, "top": 1.0}, dataclasses.replace(LAW, calm=1e9)
    calm, blind = LAW.init(list(rates)), trusting.init(list(rates))
    for step in range(0, 60, 5):
        reading = seen(step, 0.9 * LAW.calm)
        calm, said = LAW.decide(calm, reading, rates, 1.0)
        blind, same = trusting.decide(blind, reading, rates, 1.0)
        assert said == same
    assert calm.scales["low"] == pytest.approx(1e4)


def test_growth_after_the_first_steps_is_no_heat() -> None:
    state, rates = LAW.init(["low", "top"]), {"low": 1e-4, "top": 1.0}
    for step in (0, LAW.heed, LAW.heed + 1, 20, 40, 60, 80):
        state, _ = LAW.decide(state, seen(step, 5.0 if step > LAW.heed else 0.0), rates, 1.0)
    assert state.scales["low"] == pytest.approx(1e4)


def test_the_first_reading_counts_though_it_is_late() -> None:
    state, rates = LAW.init(["low", "top"]), {"low": 1e-4, "top": 1.0}
    for step in (0, LATE * LAW.heed, 6 * LAW.heed):
        state, _ = LAW.decide(state, seen(step, 5.0 if step else 0.0), rates, 1.0)
    assert state.scales["low"] == pytest.approx(1e4 * math.exp(LAW.steep * (LAW.calm - 5.0)))


def test_a_run_resumed_from_an_old_checkpoint_is_not_judged_by_its_grown_outputs() -> None:
    """Which knows nothing of heat: by then outputs have grown in good health."""
    old = {"scale": 100.0, "lifted": True, "first": 0, "step": 95, "following": False}
    state, rates = LawState.from_dict({"low": old, "top": old | {"scale": 1.0}}), {"low": 1e-4}
    state, decisions = LAW.decide(state, seen(100, 2.5), rates | {"top": 1.0}, 1.0)
    assert not decisions
    assert state.scales["low"] == 100


def test_its_steps_count_from_its_first_rate() -> None:
    """A warm-up from a rate of zero: until then outputs tell of nothing."""
    stage = StageState(1.0, first=None, step=3)
    assert heated(stage, stage_reading(rms=9.0), 4).heat is None
    stage = StageState(1.0, first=10, step=12)
    assert heated(stage, stage_reading(rms=9.0), 4).heat == pytest.approx(math.log(9))


@pytest.mark.parametrize("rms", [0.0, math.nan, math.inf])
def test_a_scale_that_is_not_known_says_nothing(rms: float) -> None:
    stage = StageState(1.0, first=0, step=2, heat=0.3)
    assert heated(stage, stage_reading(rms=rms), 4).heat == 0.3
    assert heated(stage, stage_reading(rms0=rms), 4).heat == 0.3


def test_heat_is_that_of_the_stages_at_the_rate() -> None:
    heats = {"a": 0.5, "b": 1.5, "c": 9.0, "d": None}
    stages = {name: StageState(1.0, heat=heat) for name, heat in heats.items()}
    rates = {"a": 0.1, "b": 0.1 * (1 + 1e-9), "c": 0.01, "d": 0.1}
    assert heat_at(0.1, stages, rates) == 1.0
    assert heat_at(0.5, stages, rates) is None
    assert trusted(None, 1.0, 1.0).share == 1


class Content:
    """A policy for which every stage has lifted off at once, and that knows nothing of heat."""

    def init(self, stages: list[str]) -> LawState:
        return LawState({name: StageState(1.0, lifted=True) for name in stages})

    def decide(self, state: LawState, *_: object) -> tuple[LawState, list[Decision]]:
        return state, []


def train(largest: float, law: Policy) -> DensityLR:
    """A first layer at a thousandth of the head's rate."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    groups = [{"params": model[0].parameters(), "lr": largest / 1000}]
    groups += [{"params": model[2].parameters(), "lr": largest}]
    optimizer = DensityLR(torch.optim.SGD(groups), model, policy=law)
    for _ in range(40):
        x = torch.randn(64, 20)
        nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(("largest", "hot"), [(0.1, False), (3.0, True)])
def test_in_training(largest: float, hot: bool) -> None:
    """The first layer is raised up to the head's rate, if that is a good one."""
    careful, trusting = (train(largest, LiftOff(calm=calm)) for calm in (LAW.calm, 1e9))
    assert trusting.scales["0"] == pytest.approx(1000)
    first = careful.history.steps <= LAW.heed
    grown = careful.history.series("2", "rms")[first] / careful.history.series("2", "rms0")[first]
    heat = np.abs(np.log(grown)).max()
    assert (heat > LAW.calm) == hot
    share = math.exp(LAW.steep * min(0.0, LAW.calm - heat))
    assert careful.scales["0"] == pytest.approx(1000 * share)
    seen_by = [reading.stages["2"].estimator for reading in careful.history.readings]
    assert set(seen_by[: first.sum()]) == {"twin"}
    assert seen_by[-1] == "last-twin"  # it has no room, and has lifted off


def test_another_policy_keeps_no_twins_for_it() -> None:
    readings = train(0.1, Content()).history.readings
    assert {r.stages[s].estimator for r in readings[1:] for s in "02"} == {"last-twin"}
