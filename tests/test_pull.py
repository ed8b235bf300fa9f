"""Gradients that still pull weights away from their start are seen, and let the rates creep up."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from readings import stage_reading
from torch import nn

from densitylr import DensityLR, find_stages
from densitylr.creep import Limits, creeping
from densitylr.liftoff import LiftOff
from densitylr.policy import LawState, StageState
from densitylr.pull import SAMPLE, Pull, _sample
from densitylr.records import Reading

LIMITS = Limits(pull=0.03, creep=1.5, pace=5, follow=100)
RATES = dict.fromkeys("abc", 0.1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def reading(model: nn.Module, step: int = 0) -> Reading:
    return Reading(step, {name: stage_reading() for name in find_stages(model)})


@given(st.integers(1, 5), st.integers(0, 99))
def test_the_cosine_against_float64(steps: int, seed: int) -> None:
    model, draw = net(), np.random.default_rng(seed)
    stages = find_stages(model)
    pull = Pull(stages, stages)
    start = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    expected: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(steps):
        for p in model.parameters():
            p.data += torch.from_numpy(draw.standard_normal(p.shape)).float()
            p.grad = torch.from_numpy(draw.standard_normal(p.shape)).float()
        pull.add(stages)
        for name in stages:
            own = [(n, p) for n, p in model.named_parameters() if n.startswith(f"{name}.")]
            way = [(p.detach().double().numpy() - start[n]).ravel() for n, p in own]
            down = [-p.grad.double().numpy().ravel() for _, p in own if p.grad is not None]
            g, d = np.concatenate(down), np.concatenate(way)
            expected[name].append(float(g @ d / np.linalg.norm(g) / np.linalg.norm(d)))
    found = pull.onto(reading(model))
    for name, cosines in expected.items():
        assert found.stages[name].pull == pytest.approx(np.mean(cosines), rel=1e-9, abs=1e-12)
    assert pull.onto(reading(model)) == reading(model)  # it has been told


def test_what_has_not_moved_or_has_no_gradient_has_no_pull() -> None:
    model = net()
    stages = find_stages(model)
    pull = Pull(stages, stages)
    model(torch.randn(5, 6)).sum().backward()
    model[0].weight.grad = model[0].bias.grad = None
    with torch.no_grad():
        model[0].weight += 1
    pull.add(stages)
    assert all(math.isnan(s.pull) for s in pull.onto(reading(model)).stages.values())


def test_large_parameters_are_sampled_alike() -> None:
    model = nn.Sequential(nn.Linear(700, 400, bias=False))
    stages = find_stages(model)
    pull = Pull(stages, stages)
    assert sum(t.numel() for t in pull.state_dict()["0"].values()) <= SAMPLE
    way = torch.randn_like(model[0].weight)
    with torch.no_grad():
        model[0].weight += way
    model[0].weight.grad = -way - torch.randn_like(way)  # a cosine of 1 / sqrt(2)
    pull.add(stages)
    assert pull.onto(reading(model)).stages["0"].pull == pytest.approx(0.5**0.5, abs=0.02)


@pytest.mark.parametrize("shape", [(256, 256, 3, 3), (1024, 784), (4096, 64), (300, 300)])
def test_a_sample_visits_all_columns_alike(shape: tuple[int, ...]) -> None:
    columns = math.prod(shape[1:])
    weight = torch.arange(math.prod(shape)).view(shape)
    seen = torch.bincount(_sample(weight) % columns, minlength=columns)
    assert len(_sample(weight)) <= SAMPLE
    assert seen.max() - seen.min() <= 1


def test_a_run_goes_on_creeping_from_a_checkpoint_even_where_it_has_let_go() -> None:
    def train(model: nn.Module, wrapped: DensityLR, steps: range) -> None:
        for step in steps:
            x = torch.randn(64, 6, generator=torch.Generator().manual_seed(step))
            wrapped.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            wrapped.step()

    def run() -> tuple[nn.Module, DensityLR]:
        model = net()
        inner = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        return model, DensityLR(inner, model, mode="free", pretrained=False)

    model, wrapped = run()
    train(model, wrapped, range(30))
    saved = copy.deepcopy((model.state_dict(), wrapped.state_dict()))
    assert any(s.following for s in wrapped._law.stages.values())
    train(model, wrapped, range(30, 60))
    ended = dict(wrapped.scales)
    train(model, wrapped, range(60, 250))
    for again in ((model, wrapped), run()):
        again[0].load_state_dict(saved[0])
        again[1].load_state_dict(copy.deepcopy(saved[1]))
        train(*again, range(30, 60))
        assert again[1].scales == ended


def seen(step: int, **pulls: float) -> Reading:
    told = {n: dataclasses.replace(stage_reading(), pull=pull) for n, pull in pulls.items()}
    return Reading(step, told)


def follow(pulls: list[float], every: int = 5) -> list[float]:
    """The scale at each reading, with what was seen since the one before."""
    stages = {n: StageState(s, over=0, following=True) for n, s in (("a", 1.0), ("b", 0.25))}
    scales = []
    for i, pull in enumerate(pulls):
        step = every * (i + 1)
        told = seen(step, a=pull, b=pull)
        crept = creeping(stages, stages, told, RATES, LIMITS, together=True)
        stages |= {n: dataclasses.replace(s, step=step) for n, s in (stages | crept.stages).items()}
        assert stages["b"].scale == pytest.approx(stages["a"].scale / 4)
        scales.append(stages["a"].scale)
    return scales


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_all_rates_creep_together_while_they_are_pulled_and_for_so_long(pulls: list[float]) -> None:
    scale = 1.0
    for i, (pull, found) in enumerate(zip(pulls, follow(pulls), strict=True)):
        scale *= LIMITS.creep if pull > LIMITS.pull and 5 * i < LIMITS.follow else 1.0
        assert found == pytest.approx(scale)


def test_the_pull_is_a_mean_over_the_pace_and_over_the_stages_that_have_one() -> None:
    assert follow([0.1] * 4, every=2) == [1.0, 1.0, 1.5, 1.5]
    # 0.05 over 4 steps and -0.1 over 2 are 0 in the mean.
    assert follow([0.05, 0.05, -0.1, -0.1, -0.1, -0.1], every=2)[-1] == 1.0
    two = {n: StageState(1.0, over=0, following=True) for n in ("a", "b")}
    for other, factor in ((math.nan, 1.5), (-0.02, 1.0), (0.04, 1.5)):
        found = creeping(two, two, seen(5, a=0.05, b=other), RATES, LIMITS, together=True)
        assert {s.scale for s in found.stages.values()} == {factor}
        assert set(found.why) == (set("ab") if factor > 1 else set())


def creep_apart(stages: dict[str, StageState], read: Reading) -> dict[str, float]:
    found = creeping(stages, stages, read, RATES, LIMITS, together=False)
    assert set(found.why) == {n for n, s in found.stages.items() if s.scale > stages[n].scale}
    return {n: s.scale for n, s in found.stages.items()}


def test_in_a_repair_each_stage_is_raised_by_its_own_pull() -> None:
    two = {n: StageState(1.0, over=0, following=True) for n in ("a", "b")}
    still = {"c": StageState(1.0, lifted=True, over=0)}
    found = creep_apart(two | still, seen(5, a=0.09, b=-0.02, c=0.9))
    assert found == {"a": LIMITS.creep, "b": 1.0}


@given(st.lists(st.tuples(st.floats(-0.5, 0.5), st.integers(1, 9)), min_size=1, max_size=6))
def test_in_a_repair_no_stage_is_raised_unless_they_are_pulled_in_the_mean(
    followed: list[tuple[float, int]],
) -> None:
    now = 20
    names = [str(i) for i in range(len(followed))]
    stages = {
        n: StageState(1.0, step=now - steps, judged=now - steps, following=True)
        for n, (_, steps) in zip(names, followed, strict=True)
    }
    pulls = dict(zip(names, (pull for pull, _ in followed), strict=True))
    read = seen(now, **pulls)
    limits = LIMITS._replace(pull=0.0)  # so that no product is rounded
    rates = dict.fromkeys(names, 0.1)
    found = creeping(stages, stages, read, rates, limits, together=False)
    total = sum(pull * steps for pull, steps in followed)
    for name, (pull, steps) in zip(names, followed, strict=True):
        raised = total > 0 and pull > 0 and steps >= limits.pace
        assert found.stages[name].scale == (limits.creep if raised else 1.0)


def test_a_stage_that_its_displacement_has_raised_is_judged_anew() -> None:
    before = {n: StageState(1.0, following=True) for n in ("a", "b", "c")}
    before["c"] = dataclasses.replace(before["c"], judged=9)  # it does not count before that
    after = before | {n: dataclasses.replace(before[n], scale=8.0) for n in ("a", "c")}
    for step in (LIMITS.pace - 2, LIMITS.pace):
        read = seen(step, a=0.9, b=0.9, c=0.9)
        found = creeping(before, after, read, RATES, LIMITS, together=False)
        due = step == LIMITS.pace
        assert {n: (s.scale, s.pulled > 0, s.judged) for n, s in found.stages.items()} == {
            "a": (8.0, False, step),
            "b": (LIMITS.creep if due else 1.0, not due, step if due else 0),
            "c": (8.0, False, 9),
        }
        assert set(found.why) == ({"b"} if due else set())


def test_a_stage_that_has_not_lifted_off_is_followed_however_late_it_is() -> None:
    """From ``settle`` steps after its first positive rate on."""
    law, begin = LiftOff(), 150
    state, raised = law.init(["a"]), []
    for step in range(begin + 30):
        read = dataclasses.replace(stage_reading(displacement=0.05), pull=0.5)
        own = 0.01 if step >= begin else 0.0
        moved = read if step < begin + 9 else dataclasses.replace(read, displacement=0.2)
        state, decisions = law.decide(state, Reading(step, {"a": moved}), {"a": own}, 1.0)
        raised += [d.step for d in decisions if d.kind == "raise"]
    assert raised[:2] == [begin + law.settle + law.haste, begin + law.settle + 2 * law.haste]


def test_a_stage_that_no_rate_moves_is_not_followed() -> None:
    law = LiftOff()
    state = law.init(["a"])
    for step, gradient in enumerate((0.0, 0.0, 1.0, 1.0, 0.0)):
        read = dataclasses.replace(stage_reading(0.01 * step), zero_gradient=gradient)
        state, _ = law.decide(state, Reading(step, {"a": read}), {"a": 0.01}, 1.0)
        assert state.stages["a"].following == (gradient == 0)


def test_what_the_user_has_taken_back_is_no_raise() -> None:
    law, state, step = LiftOff(), LawState({"a": StageState(8.0, first=0, following=True)}), 10
    read = dataclasses.replace(stage_reading(displacement=0.06), pull=0.5)
    state, (decision,) = law.decide(state, Reading(step, {"a": read}), {"a": 0.5}, 1.0)
    assert (decision.kind, decision.scale) == ("lower", 2.0)
    assert "your rates have changed" in decision.reason


def test_later_is_later_for_the_pull_as_well() -> None:
    law, read = LiftOff(), dataclasses.replace(stage_reading(displacement=0.2), pull=0.5)
    states = {0: law.init(["a"]), 40: law.init(["a"])}
    for shift in states:
        for step in range(8):
            if step == 4:
                states[shift] = states[shift].later(shift)
            now = step + (shift if step >= 4 else 0)
            told = Reading(now, {"a": read})
            states[shift], _ = law.decide(states[shift], told, {"a": 0.01}, 1.0)
    assert states[0].later(40) == states[40]


def test_a_group_without_a_rate_costs_nothing_for_long() -> None:
    """Neither gradients that are looked at nor dense probes."""
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}]
    wrapped = DensityLR(torch.optim.SGD(groups, lr=0.1), model, pretrained=False)
    looked = []
    pull = wrapped._decider.pull
    assert pull is not None
    add = pull.add
    pull.add = lambda names: looked.append(wrapped._decider.steps) or add(names)  # type: ignore
    for step in range(400):
        wrapped.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        wrapped.step()
        if step == 0:
            wrapped.param_groups[0]["lr"] = 0.0
    assert looked == []
    assert np.diff(wrapped.history.steps)[-1] > 5


def test_a_stage_does_not_lift_off_while_it_is_raised() -> None:
    law, rates = LiftOff(), {"a": 0.01}
    state, found = law.init(["a"]), []
    for step in range(0, 30, 2):
        pull = 0.5 if step < 12 else 0.0
        read = dataclasses.replace(stage_reading(displacement=0.02 * step), pull=pull)
        state, decisions = law.decide(state, Reading(step, {"a": read}), rates, 1.0)
        found += [(d.kind, d.scale) for d in decisions]
    kinds = [kind for kind, _ in found]
    assert kinds.count("lift-off") == 1
    assert kinds.count("raise") >= 2
    assert all(b > a for (_, a), (k, b) in itertools.pairwise(found) if k == "raise")
    assert state.stages["a"].lifted


def repaired(pull: float, law: LiftOff, own: float = 0.01, steps: int = 160) -> list[float]:
    """The scale of a stage that has lifted off at a hundredth of the largest rate, at each step."""
    state, scales = law.init(["a"]), []
    for step in range(steps):
        read = dataclasses.replace(stage_reading(displacement=step), pull=pull)
        state, _ = law.decide(state, Reading(step, {"a": read}), {"a": own}, 1.0)
        scales.append(state.stages["a"].scale)
    return scales


@given(st.floats(-1, 1), st.floats(1e-6, 1.0))
def test_repair_raises_a_stage_that_lifted_off_while_gradients_pull(
    pull: float, own: float
) -> None:
    law = LiftOff()
    scales = repaired(pull, law, own)
    assert set(scales[: law.settle + law.haste]) == {1.0}
    if pull <= law.pull:
        assert set(scales) == {1.0}
    else:
        most = law.growth ** (law.follow // law.haste)
        assert scales[law.settle + law.haste] == pytest.approx(min(law.growth, 1 / own))
        assert scales[-1] == pytest.approx(min(1 / own, most))


def test_repair_follows_for_so_long() -> None:
    law = LiftOff(growth=1.001)
    scales = repaired(0.9, law)
    end = 1 + law.follow + law.haste  # it lifts off at a reading at which it is not raised
    assert scales[end] > scales[law.follow - law.haste]
    assert set(scales[end:]) == {scales[-1]}


@pytest.mark.parametrize("mode", ["warmup", "free"])
def test_of_searches_only_free_creeps_and_only_when_it_is_over(mode: str) -> None:
    law = LiftOff(mode)
    state = law.init(["a"])
    scales = []
    for step in range(0, 60, 5):
        seen = stage_reading(displacement=0.05 + 0.01 * step, near_zero=0.05)
        seen = dataclasses.replace(seen, pull=0.5)
        state, decisions = law.decide(state, Reading(step, {"a": seen}), {"a": 0.1}, 0.1)
        scales.append(state.stages["a"].scale)
    lifted = next(i for i in range(12) if 0.05 + 0.05 * i >= law.delta)
    rises = [b > a for a, b in zip(scales[lifted:], scales[lifted + 1 :], strict=False)]
    assert any(rises) == (mode == "free")
    if mode == "free":
        assert all(rises)
        assert "still pull away" in decisions[0].reason


def test_training_that_needs_no_more_is_left_and_what_was_kept_is_let_go() -> None:
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    wrapped = DensityLR(inner, model, mode="free", pretrained=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        x = torch.randn(64, 6, generator=generator)
        loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
        wrapped.zero_grad()
        loss.backward()
        wrapped.step()
    creeps = [d for d in wrapped.history.decisions if "still pull" in d.reason]
    assert loss.item() < 0.7
    assert max(d.step for d in creeps) < 200
    assert wrapped.state_dict()["densitylr"][0]["pull"] == {}


@pytest.mark.parametrize("low", [1.0, 0.01])
def test_repair_keeps_the_first_weights_of_stages_that_have_room_and_of_no_other(
    low: float,
) -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": low}, {"params": model[2].parameters()}]
    inner = torch.optim.SGD(groups, lr=1.0)
    warm_up = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.01 * step)
    wrapped = DensityLR(inner, model, pretrained=False)
    for _ in range(3):  # which stages have room is known when the rates are
        wrapped.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        wrapped.step()
        warm_up.step()
    assert list(wrapped.state_dict()["densitylr"][0]["pull"]) == (["0"] if low < 1 else [])


def test_a_stage_with_too_low_a_rate_is_raised_on_after_lift_off() -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters()}]
    wrapped = DensityLR(torch.optim.SGD(groups, lr=0.3, momentum=0.9), model, pretrained=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(150):
        x = torch.randn(64, 6, generator=generator)
        wrapped.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
        wrapped.step()
    raises = [d for d in wrapped.history.decisions if d.kind == "raise"]
    assert {d.stage for d in wrapped.history.decisions} == {"0"}
    assert any("still pull" in d.reason for d in raises)
    assert wrapped._law.stages["0"].lifted
    assert wrapped.scales["0"] == 30


@pytest.mark.parametrize("together", [True, False])
def test_a_stage_without_a_rate_waits(together: bool) -> None:
    stages = {n: StageState(1.0, over=0, following=True) for n in ("a", "b")}
    rates = RATES | {"b": 0.0}
    found = creeping(stages, stages, seen(5, a=0.5, b=0.5), rates, LIMITS, together=together).stages
    assert {n: (s.scale, s.judged) for n, s in found.items()} == {"a": (1.5, 5), "b": (1.0, 5)}
    # With its rate back it is judged by what is seen from there on.
    later = {n: dataclasses.replace(s, step=5) for n, s in found.items()}
    found = creeping(later, later, seen(8, a=0.5, b=0.5), RATES, LIMITS, together=together).stages
    assert found["b"].scale == 1.0


@given(st.integers(1, 12), st.integers(0, 12), st.floats(0.0, 0.029))
def test_a_pull_below_the_threshold_raises_nothing_however_readings_fall(
    every: int, begin: int, pull: float
) -> None:
    stages = {"a": StageState(1.0, over=0, judged=begin, following=True)}
    for step in range(every, 60, every):
        found = creeping(stages, stages, seen(step, a=pull), RATES, LIMITS, together=False)
        stages = {"a": dataclasses.replace(found.stages["a"], step=step)}
    assert stages["a"].scale == 1.0


@pytest.mark.parametrize("maximize", [False, True])
def test_the_pull_of_a_run_that_goes_up_its_gradients_is_the_same(maximize: bool) -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 1e-2}, {"params": model[2].parameters()}]
    inner = torch.optim.SGD(groups, lr=0.3, maximize=maximize)
    wrapped = DensityLR(inner, model, pretrained=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        x = torch.randn(64, 6, generator=generator)
        loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
        wrapped.zero_grad()
        (-loss if maximize else loss).backward()
        wrapped.step()
    assert wrapped.scales["0"] == 30


def test_complex_weights_count_with_both_parts() -> None:
    model = nn.Sequential(nn.Linear(6, 9))
    model[0].mixing = nn.Parameter(torch.zeros(4, dtype=torch.cfloat))
    stages = find_stages(model)
    pull = Pull(stages, stages)
    with torch.no_grad():
        model[0].mixing += torch.tensor([1j] * 4)
    model[0].mixing.grad = torch.tensor([-1j] * 4)
    pull.add(stages)
    assert pull.onto(reading(model)).stages["0"].pull == pytest.approx(1.0)


def test_a_run_resumed_between_two_readings_has_seen_what_was_seen() -> None:
    model = net()
    stages = find_stages(model)
    pull, other = Pull(stages, stages), Pull(stages, stages)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
            parameter.grad = torch.randn_like(parameter)
    pull.add(stages)
    other.load_state_dict(pull.state_dict())
    other.seen = pull.seen
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for one in (pull, other):
        one.add(stages)
    assert other.onto(reading(model)) == pull.onto(reading(model))


def test_a_closed_run_holds_no_weights() -> None:
    model = net()
    wrapped = DensityLR(torch.optim.SGD(model.parameters(), lr=1e-2), model, mode="free")
    pull = wrapped._decider.pull
    assert pull is not None
    assert all(pull.state_dict().values())
    wrapped.close()
    assert pull.state_dict() == {}
