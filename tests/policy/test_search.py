"""The search for a rate: what of it reaches the weights, and where stages meet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import Optimizer

from densitylr import DensityLR, Free, Observation, Reading
from densitylr.controller import build_up_of
from densitylr.policy import BuildUp, RunState
from densitylr.policy.lift_off import effective_steps
from densitylr.policy.search import find_consensus
from tests.support.fixed import net
from tests.support.readings import Play, stage_reading

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
    build_up = build_up_of(optimizer)
    for start, stop in ((0, 1), (0, 2), (2, 7), (0, 40), (100, 101), (5, 5)):
        moved = (places[stop] - places[start]) / late
        assert effective_steps(start, stop, build_up) == pytest.approx(moved, rel=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_policy_is_shown_how_its_optimizer_builds_up(name: str) -> None:
    moving = ("sgd with momentum", "nesterov", "rmsprop with momentum")
    momentum, memory = 0.9 * (name in moving), 0.99 * name.startswith("rmsprop")
    expected = BuildUp(momentum, memory, nesterov=name == "nesterov")
    shown = []

    class Asks(Free):
        def update(self, state: object, seen: Observation) -> object:  # type: ignore[override]
            shown.append((seen.step, {view.build_up for view in seen.stages.values()}))
            return super().update(state, seen)

    model = net()
    wrapped = DensityLR(OPTIMIZERS[name](list(model.parameters())), model, policy=Asks())
    assert wrapped.build_up == expected
    model(torch.randn(8, 6)).square().mean().backward()
    wrapped.step()
    assert shown == [(0, {expected})]


def test_after_so_many_steps_every_buffer_is_full() -> None:
    slow = BuildUp(momentum=0.9999)
    assert effective_steps(9_999, 10_000, slow) == pytest.approx(1 - 0.9999**10_000)
    assert effective_steps(10_000, 10_001, slow) == 1


@given(RATES, st.data())
def test_stages_meet_half_way_to_the_median(asked: dict[str, float], data: st.DataObject) -> None:
    near_zero = {name: data.draw(st.floats(1, 1e5)) for name in asked}
    heard = data.draw(st.sets(st.sampled_from(sorted(asked))))
    lifted = data.draw(st.sets(st.sampled_from(sorted(asked))))
    found = find_consensus(asked, near_zero, heard, lifted)
    most = max(near_zero.values())
    informed = {name for name in asked if near_zero[name] >= 0.25 * most} | lifted
    assert found.followers == asked.keys() - informed
    logs = [math.log(asked[name]) for name in (informed & heard or informed)]
    median = math.exp(statistics.median(logs))
    assert found.median == pytest.approx(median)
    for name, rate in found.rates.items():
        wanted = median if name in found.followers else math.sqrt(asked[name] * median)
        assert rate == pytest.approx(wanted)


@pytest.mark.parametrize(("near_zero", "follows"), [(24.9, True), (25.0, False), (25.1, False)])
def test_a_quarter_of_the_most_near_zero_outputs_are_enough(
    near_zero: float, follows: bool
) -> None:
    found = find_consensus({"a": 1.0, "b": 4.0}, {"a": 100.0, "b": near_zero}, {"a", "b"})
    assert found.followers == ({"b"} if follows else set())
    assert found.rates["b"] == pytest.approx(1.0 if follows else math.sqrt(8.0))


@given(st.floats(1e-100, 1e100))
def test_a_stage_alone_is_left_alone(rate: float) -> None:
    assert find_consensus({"a": rate}, {"a": 0.0}, set()).rates["a"] == pytest.approx(
        rate, rel=1e-15
    )


def search(game: Play, traces: dict[str, list[float]], counts: dict[str, int]) -> list[RunState]:
    """Where the search stands after each reading, two steps apart."""
    states = []
    for i in range(len(next(iter(traces.values())))):
        seen = {n: stage_reading(moved[i], count=counts[n]) for n, moved in traces.items()}
        game.see(Reading(2 * i, seen))
        states.append(game.run.now)
    return states


def test_a_displacement_that_crosses_zero_is_no_reason_for_a_leap() -> None:
    ended = []
    for moved in ([0.0, 0.05, 0.05], [0.0, 0.05, 0.0]):
        ended.append(search(Play(Free(), {"a": 1.0}), {"a": moved}, {"a": 2**17})[-1].scales)
    assert ended[0] == ended[1]
    assert ended[0]["a"] != 1e-4


def test_momentum_that_builds_up_is_not_taken_for_a_rate_that_does_little() -> None:
    """``speed * S / D``, where S is what a loop over the steps of SGD with momentum adds up."""
    policy = Free(growth_factor=1e9, min_factor=1e-9)
    game = Play(policy, {"a": 0.3}, build_up=BuildUp(momentum=0.9))
    search(game, {"a": [0.0, 0.05]}, {"a": 2**17})
    held, spent = 0.0, 0.0
    for _ in range(2):
        held = 0.9 * held + 1.0
        spent += 0.3e-4 * held * (1 - 0.9)
    assert game.memory("a").spent == pytest.approx(spent)
    assert 0.3 * game.scales["a"] == pytest.approx(0.04 * spent / 0.05)


def test_a_head_with_few_outputs_takes_the_median_and_lifts_off_with_the_others() -> None:
    traces = {
        "early": [0.0, 0.02, 0.05, 0.2],
        "late": [0.0, 0.01, 0.2, 0.2],
        "head": [0.0, 0.3, 0.3, 0.3],
    }
    counts = {"early": 2**15, "late": 2**15, "head": 320}
    rates = {"early": 1e-3, "late": 0.5, "head": 0.1}
    states = search(Play(Free(), rates), traces, counts)
    for state in states[1:]:
        force = {name: rates[name] * scale for name, scale in state.scales.items()}
        assert force["head"] == pytest.approx(math.sqrt(force["early"] * force["late"]))
    lifted = [[name for name, s in now.state.stages.items() if s.lifted] for now in states]
    assert lifted == [[], [], ["late"], ["early", "late", "head"]]


def test_once_all_have_lifted_off_a_stage_that_thaws_moves_no_other() -> None:
    counts = {"a": 2**15, "b": 2**15, "thawed": 2**15}
    game = Play(Free(), {"a": 0.1, "b": 0.2, "thawed": 0.0})
    search(game, {"a": [0.0, 0.05, 0.2], "b": [0.0, 0.2, 0.2], "thawed": [0.0] * 3}, counts)
    assert [game.memory(name).own_scale for name in counts] == [None, None, 1e-4]
    still = game.scales
    for step, moved in ((6, 0.0), (8, 0.01), (10, 0.5)):
        seen = {"a": stage_reading(0.0), "b": stage_reading(3.0), "thawed": stage_reading(moved)}
        decisions = game.see(Reading(step, seen), {"a": 0.1, "b": 0.2, "thawed": 0.3})
        assert {d.stage for d in decisions} <= {"thawed"}
    assert "thawed" not in game.run.undecided
    for name in "ab":
        assert game.scales[name] == still[name]


def test_a_stage_that_thaws_in_a_search_is_searched_for_like_any_other() -> None:
    """Not taken for a head because nothing is known of it yet, nor lifted off unjudged."""
    game = Play(Free(), {"a": 0.1, "c": 0.0})
    for step, a, c in ((0, 0.0, 0.0), (2, 0.02, 0.0), (4, 0.05, 0.0), (6, 0.2, 0.0), (8, 0.2, 0.0)):
        rates = {"a": 0.1, "c": 0.1 if step >= 6 else 0.0}
        decisions = game.see(Reading(step, {"a": stage_reading(a), "c": stage_reading(c)}), rates)
        if step <= 6:
            assert game.scales["c"] == 1e-4
            assert "c" in game.run.undecided
    assert [(d.stage, d.kind) for d in decisions] == [("c", "raise")]
    assert game.scales["c"] == pytest.approx(math.sqrt(16 * 1e-4 * game.scales["a"]))


def test_a_stage_that_joins_late_takes_nothing_back_from_one_that_has_lifted_off() -> None:
    counts = {"a": 20_000, "b": 20_000, "big": 2**17}
    game, lifted = Play(Free(), {"a": 0.1, "b": 0.1, "big": 0.0}), 0
    for step in range(0, 30, 2):
        rates = {"a": 0.1, "b": 0.1, "big": 0.1 if step >= 4 else 0.0}
        moved = {"a": 0.2 * (step > 0), "b": 0.0, "big": 0.0}
        seen = {n: stage_reading(moved[n], count=counts[n]) for n in counts}
        before, scale = game.memory("a"), game.scales["a"]
        decisions = game.see(Reading(step, seen), rates)
        if before.lifted:
            lifted += 1
            assert game.memory("a").lifted
            assert game.scales["a"] == scale
            assert "a" not in {d.stage for d in decisions}
    assert lifted > 10


def test_a_search_is_over_when_the_last_that_has_not_lifted_off_is_frozen() -> None:
    game, scales = Play(Free(), {"a": 0.1, "c": 0.2}), []
    for step in range(0, 60, 2):
        rates = {"a": 0.1, "c": 0.0 if 10 <= step < 40 else 0.2}
        seen = {"a": stage_reading(0.2 * (step > 2)), "c": stage_reading(1e-4 * step)}
        game.see(Reading(step, seen), rates)
        if step >= 10:
            scales.append(game.scales["a"])
    assert game.scales["c"] > 1e-4
    assert len(set(scales)) == 1


@pytest.mark.parametrize(
    ("count", "judged"), [(100, False), (2**16 - 1, False), (2**16, True), (2**16 + 2**13, True)]
)
def test_the_small_rest_of_the_data_is_not_judged_by(count: int, judged: bool) -> None:
    """Less than half of what was read at first."""
    game = Play(Free(), {"a": 1.0})
    for step, moved, now in ((0, 0.0, 2**17), (2, 5e-4, 2**17), (4, 5e-4, count), (6, 5e-4, 2**17)):
        before = game.scales
        decisions = game.see(Reading(step, {"a": stage_reading(moved, count=now)}))
        if step == 4:
            assert (game.scales == before) == (not judged)
            assert bool(decisions) == judged
    assert game.scales["a"] == pytest.approx((16**3 if judged else 16**2) * 1e-4)


def test_a_displacement_that_the_rest_of_the_data_shows_is_none() -> None:
    game = Play(Free(), {"a": 1.0})
    for step, moved, count in ((0, 0.0, 2**17), (2, 5e-4, 2**17), (4, 0.09, 100), (6, 5e-4, 2**17)):
        game.see(Reading(step, {"a": stage_reading(moved, count=count)}))
    assert game.memory("a").displacement == 5e-4


def test_a_stage_that_lifted_off_has_its_say_though_little_is_known_of_it() -> None:
    """Which takes part in where the head goes."""
    game = Play(Free(), dict.fromkeys(("a", "b", "head"), 0.1))
    saved = game.run.state_dict()
    known = {"started": 0, "lr": 1e-3, "spent": 1e-2, "own_scale": None}
    for name, fields in saved["state"]["stages"].items():
        fields.update(known, lifted=name == "a")
    saved["state"]["step"] = 10
    saved["scales"] = dict.fromkeys(saved["scales"], 1e-2)
    game.run.load(game.run.restored(saved))
    counts = {"a": 2**15, "b": 2**15, "head": 320}
    seen = {n: stage_reading(0.05 * (n != "head"), count=c) for n, c in counts.items()}
    game.see(Reading(12, seen))
    assert game.run.undecided == {"b", "head"}
    own = game.memory("b").own_scale
    assert own is not None
    assert game.scales["head"] == pytest.approx(math.sqrt(1e-2 * own))
    assert game.scales["a"] == 1e-2


def test_a_stage_that_nothing_moves_draws_no_other_along() -> None:
    traces = {"mute": [0.0] * 40, "a": [0.0] + [0.2] * 39}
    states = search(Play(Free(), {"mute": 1.0, "a": 1.0}), traces, dict.fromkeys(traces, 2**15))
    assert len({state.scales["a"] for state in states[1:]}) == 1
    assert states[-1].scales["mute"] == pytest.approx(16 * states[-1].scales["a"], rel=1e-3)


def test_where_groups_differ_the_slowest_to_build_up_is_waited_for() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    groups = [{"params": [w], "momentum": m} for w, m in zip(weights, (0.0, 0.9, 0.5), strict=True)]
    assert build_up_of(torch.optim.SGD(groups, lr=0.1)) == BuildUp(0.9, 0.0, False)
    groups = [{"params": [w], "alpha": a} for w, a in zip(weights, (0.9, 0.99, 0.5), strict=True)]
    assert build_up_of(torch.optim.RMSprop(groups, lr=0.1)) == BuildUp(0.0, 0.99, False)
