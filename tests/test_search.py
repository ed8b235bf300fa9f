"""The search for a rate: what of it reaches the weights, and where stages meet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from fixed import net
from hypothesis import given
from hypothesis import strategies as st
from readings import stage_reading
from torch.optim import Optimizer

from densitylr import DensityLR, LiftOff, Reading
from densitylr.policy import LawState
from densitylr.rates import startup
from densitylr.search import ENOUGH, agreed, reached

RATES = st.dictionaries(st.sampled_from("abcdefg"), st.floats(1e-9, 1e9), min_size=1)

OPTIMIZERS: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, nesterov=True),
    "dampened": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, dampening=0.9),
    "rmsprop with momentum": lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=0.0, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=0.0),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, eps=0.0),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, eps=0.0, weight_decay=0.0),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3, eps=0.0, betas=(0.0, 0.999)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_reaches_the_weights_is_what_torch_moves_them(name: str) -> None:
    """With a constant gradient, in units of the move of a step after very many."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = OPTIMIZERS[name]([weight])
    places = [0.0]
    for _ in range(4000):
        weight.grad = torch.full_like(weight, 0.3)
        optimizer.step()
        places.append(-weight.item())
    late = places[-1] - places[-2]
    constants = {"momentum": 0.0, "memory": 0.0, **startup(optimizer)}
    for start, stop in ((0, 1), (0, 2), (2, 7), (0, 40), (100, 101), (5, 5)):
        moved = (places[stop] - places[start]) / late
        assert reached(start, stop, **constants) == pytest.approx(moved, rel=1e-6)


def test_the_law_of_a_density_lr_knows_its_optimizer() -> None:
    for name, make in OPTIMIZERS.items():
        model = net()
        law = DensityLR(make(list(model.parameters())), model, mode="free").policy
        assert isinstance(law, LiftOff)
        moving = ("sgd with momentum", "nesterov", "rmsprop with momentum")
        assert law.momentum == (0.9 if name in moving else 0.0)
        assert law.memory == (0.99 if name.startswith("rmsprop") else 0.0)
        assert law.nesterov == (name == "nesterov")


@given(RATES, st.data())
def test_stages_meet_half_way_to_the_median(alone: dict[str, float], data: st.DataObject) -> None:
    near_zero = {name: data.draw(st.floats(1, 1e5)) for name in alone}
    heard = data.draw(st.sets(st.sampled_from(sorted(alone))))
    found = agreed(alone, near_zero, heard)
    most = max(near_zero.values())
    informed = {name for name in alone if near_zero[name] >= ENOUGH * most}
    assert found.followers == alone.keys() - informed
    logs = [math.log(alone[name]) for name in (informed & heard or informed)]
    middle = math.exp(statistics.median(logs))
    assert found.middle == pytest.approx(middle)
    for name, rate in found.rates.items():
        wanted = middle if name in found.followers else math.sqrt(alone[name] * middle)
        assert rate == pytest.approx(wanted)


@given(st.floats(1e-100, 1e100))
def test_a_stage_alone_is_left_alone(rate: float) -> None:
    assert agreed({"a": rate}, {"a": 0.0}, set()).rates["a"] == pytest.approx(rate, rel=1e-15)


def search(
    law: LiftOff, traces: dict[str, list[float]], rates: dict[str, float], counts: dict[str, int]
) -> list[LawState]:
    state, states = law.init(list(traces)), []
    for i in range(len(next(iter(traces.values())))):
        seen = {n: stage_reading(moved[i], count=counts[n]) for n, moved in traces.items()}
        state, _ = law.decide(state, Reading(2 * i, seen), rates, max(rates.values()))
        states.append(state)
    return states


def test_a_displacement_that_crosses_zero_is_no_reason_for_a_leap() -> None:
    law = LiftOff("free", delta=100.0)
    rates, counts = {"a": 1.0}, {"a": 2**17}
    calm = search(law, {"a": [0.0, 0.05, 0.05]}, rates, counts)
    crossing = search(law, {"a": [0.0, 0.05, 0.0]}, rates, counts)
    assert crossing[-1].scales == calm[-1].scales


def test_momentum_that_builds_up_is_not_taken_for_a_rate_that_does_little() -> None:
    """``speed * S / D``, where S is what a loop over the steps of SGD with momentum adds up."""
    law = LiftOff("free", momentum=0.9, growth=1e9, shrink=1e-9, delta=100.0)
    state = search(law, {"a": [0.0, 0.05]}, {"a": 0.3}, {"a": 2**17})[-1]
    held, spent = 0.0, 0.0
    for _ in range(2):
        held = 0.9 * held + 1.0
        spent += 0.3 * law.start * held * (1 - 0.9)
    assert state.stages["a"].spent == pytest.approx(spent)
    assert 0.3 * state.scales["a"] == pytest.approx(law.speed * spent / 0.05)


def test_a_head_with_few_outputs_takes_the_median_and_lifts_off_with_the_others() -> None:
    traces = {
        "early": [0.0, 0.02, 0.05, 0.2],
        "late": [0.0, 0.01, 0.2, 0.2],
        "head": [0.0, 0.3, 0.3, 0.3],
    }
    counts = {"early": 2**15, "late": 2**15, "head": 320}
    rates = {"early": 1e-3, "late": 0.5, "head": 0.1}
    states = search(LiftOff("free"), traces, rates, counts)
    for state in states[1:]:
        force = {name: rates[name] * scale for name, scale in state.scales.items()}
        assert force["head"] == pytest.approx(math.sqrt(force["early"] * force["late"]))
    lifted = [[name for name, s in state.stages.items() if s.lifted] for state in states]
    assert lifted == [[], [], ["late"], ["early", "late", "head"]]


def test_once_all_have_lifted_off_a_stage_that_thaws_moves_no_other() -> None:
    law = LiftOff("free")
    counts = {"a": 2**15, "b": 2**15, "thawed": 2**15}
    still = search(
        law,
        {"a": [0.0, 0.05, 0.2], "b": [0.0, 0.2, 0.2], "thawed": [0.0] * 3},
        {"a": 0.1, "b": 0.2, "thawed": 0.0},
        counts,
    )[-1]
    assert [s.alone for s in still.stages.values()] == [None, None, law.start]
    state = still
    for step, moved in ((6, 0.0), (8, 0.01), (10, 0.5)):
        seen = {"a": stage_reading(0.0), "b": stage_reading(3.0), "thawed": stage_reading(moved)}
        rates = {"a": 0.1, "b": 0.2, "thawed": 0.3}
        state, decisions = law.decide(state, Reading(step, seen), rates, 0.3)
        assert {d.stage for d in decisions} <= {"thawed"}
    assert state.stages["thawed"].lifted
    for name in "ab":
        assert state.scales[name] == still.scales[name]


def test_a_stage_that_thaws_in_a_search_is_searched_for_like_any_other() -> None:
    """Not taken for a head because nothing is known of it yet, nor lifted off unjudged."""
    law, state = LiftOff("free"), LiftOff("free").init(["a", "c"])
    for step, a, c in ((0, 0.0, 0.0), (2, 0.02, 0.0), (4, 0.05, 0.0), (6, 0.2, 0.0), (8, 0.2, 0.0)):
        rates = {"a": 0.1, "c": 0.1 if step >= 6 else 0.0}
        seen = {"a": stage_reading(a), "c": stage_reading(c)}
        state, decisions = law.decide(state, Reading(step, seen), rates, 0.1)
        if step <= 6:
            assert state.stages["c"].scale == law.start
            assert not state.stages["c"].lifted
    assert [(d.stage, d.kind) for d in decisions] == [("c", "raise")]
    assert state.scales["c"] == pytest.approx(math.sqrt(law.leap * law.start * state.scales["a"]))


def test_a_stage_that_joins_late_takes_nothing_back_from_one_that_has_lifted_off() -> None:
    law, state = LiftOff("free"), LiftOff("free").init(["a", "b", "big"])
    counts = {"a": 20_000, "b": 20_000, "big": 2**17}
    for step in range(0, 30, 2):
        rates = {"a": 0.1, "b": 0.1, "big": 0.1 if step >= 4 else 0.0}
        moved = {"a": 0.2 * (step > 0), "b": 0.0, "big": 0.0}
        seen = {n: stage_reading(moved[n], count=counts[n]) for n in counts}
        before = state
        state, decisions = law.decide(state, Reading(step, seen), rates, 0.1)
        if before.stages["a"].lifted:
            assert state.stages["a"].lifted
            assert state.scales["a"] == before.scales["a"]
            assert "a" not in {d.stage for d in decisions}


def test_a_search_is_over_when_the_last_that_has_not_lifted_off_is_frozen() -> None:
    law, state = LiftOff("free"), LiftOff("free").init(["a", "c"])
    scales = []
    for step in range(0, 60, 2):
        rates = {"a": 0.1, "c": 0.0 if 10 <= step < 40 else 0.2}
        seen = {"a": stage_reading(0.2 * (step > 2)), "c": stage_reading(1e-4 * step)}
        state, _ = law.decide(state, Reading(step, seen), rates, 0.2)
        if step >= 10:
            scales.append(state.scales["a"])
    assert state.stages["c"].scale > law.start
    assert len(set(scales)) == 1


def test_the_small_rest_of_the_data_is_not_judged_by() -> None:
    law, rates = LiftOff("free"), {"a": 1.0}
    state = law.init(["a"])
    for step, moved, count in ((0, 0.0, 2**17), (2, 5e-4, 2**17), (4, 0.09, 100), (6, 5e-4, 2**17)):
        seen = Reading(step, {"a": stage_reading(moved, count=count)})
        before, (state, decisions) = state, law.decide(state, seen, rates, 1.0)
        if count == 100:
            assert state.scales == before.scales
            assert decisions == []
    assert state.scales["a"] == pytest.approx(law.leap**2 * law.start)


def test_a_search_goes_on_from_a_checkpoint_that_knows_less() -> None:
    """Stages that had lifted off have their say in where the head goes."""
    old = {"scale": 1e-2, "lifted": True, "first": 0, "step": 10, "rate": 1e-3, "spent": 1e-2}
    law = LiftOff("free")
    state = LawState.from_dict(
        {"a": old, "b": {**old, "lifted": False}, "head": {**old, "lifted": False}}
    )
    counts = {"a": 2**15, "b": 2**15, "head": 320}
    seen = {n: stage_reading(0.05 * (n != "head"), count=c) for n, c in counts.items()}
    state, _ = law.decide(state, Reading(12, seen), dict.fromkeys(counts, 0.1), 0.1)
    assert state.stages["a"].lifted
    assert not state.stages["b"].lifted
    assert state.stages["b"].alone is not None
    between = math.sqrt(1e-2 * state.stages["b"].alone)
    assert state.scales["head"] == pytest.approx(between)
    assert state.scales["a"] == old["scale"]


def test_a_stage_that_nothing_moves_draws_no_other_along() -> None:
    law, steps = LiftOff("free"), 40
    traces = {"mute": [0.0] * steps, "a": [0.0] + [0.2] * (steps - 1)}
    states = search(law, traces, dict.fromkeys(traces, 1.0), dict.fromkeys(traces, 2**15))
    assert len({state.scales["a"] for state in states[1:]}) == 1
    assert states[-1].scales["mute"] == pytest.approx(law.leap * states[-1].scales["a"], rel=1e-3)


def test_where_groups_differ_the_slowest_to_build_up_is_waited_for() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    groups = [{"params": [w], "momentum": m} for w, m in zip(weights, (0.0, 0.9, 0.5), strict=True)]
    assert startup(torch.optim.SGD(groups, lr=0.1)) == {"momentum": 0.9, "nesterov": False}
    groups = [{"params": [w], "alpha": a} for w, a in zip(weights, (0.9, 0.99, 0.5), strict=True)]
    found = startup(torch.optim.RMSprop(groups, lr=0.1))
    assert found == {"momentum": 0.0, "nesterov": False, "memory": 0.99}
