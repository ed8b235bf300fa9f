"""Gradients that point away from the first weights are seen, and let the rates grow."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from densitylr import Baseline, DensityLR, Free, Policy, Reading, Repair, Warmup
from densitylr.monitor import Alignment
from densitylr.monitor.baseline import sample_weights
from tests.support.readings import Play, stage_reading

RATES = dict.fromkeys("abc", 0.1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))


def alignment_of(model: nn.Module) -> Alignment:
    return Alignment(Baseline.capture(model, pretrained=False))


@given(st.integers(1, 5), st.integers(0, 99))
def test_the_cosine_against_float64(steps: int, seed: int) -> None:
    model, draw = net(), np.random.default_rng(seed)
    alignment = alignment_of(model)
    start = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    expected: dict[str, list[float]] = {"0": [], "2": []}
    for _ in range(steps):
        for p in model.parameters():
            p.data += torch.from_numpy(draw.standard_normal(p.shape)).float()
            p.grad = torch.from_numpy(draw.standard_normal(p.shape)).float()
        alignment.add(expected)
        for name in expected:
            own = [(n, p) for n, p in model.named_parameters() if n.startswith(f"{name}.")]
            way = [(p.detach().double().numpy() - start[n]).ravel() for n, p in own]
            down = [-p.grad.double().numpy().ravel() for _, p in own if p.grad is not None]
            g, d = np.concatenate(down), np.concatenate(way)
            expected[name].append(float(g @ d / np.linalg.norm(g) / np.linalg.norm(d)))
    found = alignment.take(0)
    for name, cosines in expected.items():
        assert found[name] == pytest.approx(np.mean(cosines), rel=1e-9, abs=1e-12)
    assert alignment.take(0) == {}  # it has been told


def test_what_has_not_moved_or_has_no_gradient_has_no_alignment() -> None:
    model = net()
    alignment = alignment_of(model)
    model(torch.randn(5, 6)).sum().backward()
    model[0].weight.grad = model[0].bias.grad = None
    with torch.no_grad():
        model[0].weight += 1
    alignment.add(["0", "2"])
    found = alignment.take(0)
    assert list(found) == ["0", "2"]
    assert all(math.isnan(cosine) for cosine in found.values())


def test_a_stage_that_is_not_asked_for_has_no_alignment() -> None:
    model = net()
    alignment = alignment_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = -torch.ones_like(parameter)
            parameter += 1
    alignment.add(["2"])
    alignment.add(["2"])
    found = alignment.take(0)
    assert found["2"] == pytest.approx(1.0)
    assert math.isnan(found["0"])
    alignment.keep(["0"])
    alignment.add(["0", "2"])
    found = alignment.take(0)
    assert found["0"] == pytest.approx(1.0)
    assert math.isnan(found["2"])
    alignment.add(["0"])
    alignment.keep([])
    assert alignment.take(0) == {}


def test_large_parameters_are_sampled_alike() -> None:
    model = nn.Sequential(nn.Linear(700, 400, bias=False))
    alignment = alignment_of(model)
    kept = alignment.state_dict()["first_weights"]["0"].values()
    assert sum(t.numel() for t in kept) <= 2**14
    way = torch.randn_like(model[0].weight)
    with torch.no_grad():
        model[0].weight += way
    model[0].weight.grad = -way - torch.randn_like(way)  # a cosine of 1 / sqrt(2)
    alignment.add(["0"])
    assert alignment.take(0)["0"] == pytest.approx(0.5**0.5, abs=0.02)


@pytest.mark.parametrize("shape", [(256, 256, 3, 3), (1024, 784), (4096, 64), (300, 300)])
def test_a_sample_visits_all_columns_alike(shape: tuple[int, ...]) -> None:
    columns = math.prod(shape[1:])
    weight = torch.arange(math.prod(shape)).view(shape)
    seen = torch.bincount(sample_weights(weight) % columns, minlength=columns)
    assert len(sample_weights(weight)) <= 2**14
    assert seen.max() - seen.min() <= 1


def test_a_run_goes_on_being_raised_from_a_checkpoint_even_where_it_has_released_all() -> None:
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
    assert wrapped._loop.run.waiting - wrapped._loop.run.undecided
    train(model, wrapped, range(30, 60))
    ended = dict(wrapped.scales)
    train(model, wrapped, range(60, 250))
    for again in ((model, wrapped), run()):
        again[0].load_state_dict(saved[0])
        again[1].load_state_dict(copy.deepcopy(saved[1]))
        train(*again, range(30, 60))
        assert again[1].scales == ended


def seen(step: int, **alignments: float) -> Reading:
    return Reading(step, {n: stage_reading(alignment=a) for n, a in alignments.items()})


def standing(
    policy: Policy,
    stages: Mapping[str, Mapping[str, Any]],
    step: int = 0,
    rates: Mapping[str, float] = RATES,
    largest: float = 1e6,
) -> Play:
    """A run at a step, with what its policy is to remember of each stage, and the scale."""
    game = Play(policy, {name: rates[name] for name in stages}, largest)
    saved = game.run.state_dict()
    saved["state"]["step"] = step
    for name, known in stages.items():
        own = saved["state"]["stages"][name]
        for key, value in known.items():
            if key == "scale":
                saved["scales"][name] = value
            elif key in ("open", "start", "total"):
                own["window"][key] = value
            else:
                assert key in own
                own[key] = value
    game.run.load(game.run.restored(saved))
    return game


SEARCHED = {"started": 0, "lifted": True, "own_scale": None, "ended_at": 0, "open": True}
"""Of a stage whose search was over at step 0."""

REPAIRED = {"started": 0, "lifted_at": 0, "open": True, "raisable": True, "compared": True}
"""Of a stage that lifted off at step 0."""


def follow(alignments: list[float], every: int = 5) -> list[float]:
    """The scale at each reading, with what was seen since the one before."""
    both = {"a": SEARCHED | {"scale": 1.0}, "b": SEARCHED | {"scale": 0.25}}
    game, scales = standing(Free(), both), []
    for i, alignment in enumerate(alignments):
        game.see(seen(every * (i + 1), a=alignment, b=alignment))
        assert game.scales["b"] == pytest.approx(game.scales["a"] / 4)
        scales.append(game.scales["a"])
    return scales


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30))
def test_all_rates_grow_together_while_gradients_point_away_and_for_so_long(
    alignments: list[float],
) -> None:
    scale = 1.0
    for i, (alignment, found) in enumerate(zip(alignments, follow(alignments), strict=True)):
        scale *= 1.5 if alignment > 0.03 and 5 * (i + 1) <= 100 else 1.0
        assert found == pytest.approx(scale)


@pytest.mark.parametrize(("at", "raised"), [(99, True), (100, True), (101, False)])
@pytest.mark.parametrize("kind", [Free, Repair])
def test_a_hundred_steps_after_lift_off_is_the_last_raise(
    kind: type[Policy], at: int, raised: bool
) -> None:
    known = SEARCHED if kind is Free else REPAIRED
    game = standing(kind(), {"a": known | {"scale": 2.0, "start": at - 7}}, at - 7)
    decisions = game.see(seen(at, a=0.5))
    assert game.scales["a"] == (2.0 * (1.5 if kind is Free else 4.0) if raised else 2.0)
    assert [d.cause for d in decisions] == ["alignment"] * raised
    assert game.memory("a").window.open == (at < 100)
    assert ("a" in game.run.aligned) == (at < 100)


def test_alignment_is_a_mean_over_steps_and_over_the_stages_that_have_one() -> None:
    assert follow([0.1] * 4, every=2) == [1.0, 1.0, 1.5, 1.5]
    # 0.05 over 4 steps and -0.1 over 2 are 0 in the mean.
    assert follow([0.05, 0.05, -0.1, -0.1, -0.1, -0.1], every=2)[-1] == 1.0
    for other, factor in ((math.nan, 1.5), (-0.02, 1.0), (0.04, 1.5)):
        game = standing(Free(), {n: SEARCHED | {"scale": 1.0} for n in "ab"})
        decisions = game.see(seen(5, a=0.05, b=other))
        assert set(game.scales.values()) == {factor}
        assert {d.stage for d in decisions} == (set("ab") if factor > 1 else set())
        mean = 0.05 if math.isnan(other) else (0.05 + other) / 2
        assert all(d.numbers["alignment"] == pytest.approx(mean) for d in decisions)


def test_in_a_repair_each_stage_is_raised_by_its_own_alignment() -> None:
    stages = {n: REPAIRED | {"scale": 2.0} for n in "ab"}
    game = standing(Repair(), stages | {"c": REPAIRED | {"open": False, "scale": 2.0}})
    decisions = game.see(seen(5, a=0.09, b=-0.02, c=0.9))
    assert game.scales == {"a": 8.0, "b": 2.0, "c": 2.0}
    assert [(d.stage, d.cause, d.numbers["alignment"]) for d in decisions] == [
        ("a", "alignment", pytest.approx(0.09))
    ]


@given(st.lists(st.tuples(st.floats(-0.5, 0.5), st.integers(1, 9)), min_size=1, max_size=6))
def test_in_a_repair_no_stage_is_raised_unless_gradients_point_away_in_the_mean(
    windows: list[tuple[float, int]],
) -> None:
    names = [str(i) for i in range(len(windows))]
    stages = {
        n: REPAIRED | {"start": 20 - steps, "scale": 2.0}
        for n, (_, steps) in zip(names, windows, strict=True)
    }
    policy = Repair(alignment=0.0, alignment_steps=5)  # so that no product is rounded
    game = standing(policy, stages, rates=dict.fromkeys(names, 0.1))
    game.see(seen(20, **dict(zip(names, (alignment for alignment, _ in windows), strict=True))))
    total = sum(alignment * steps for alignment, steps in windows)
    for name, (alignment, steps) in zip(names, windows, strict=True):
        raised = total > 0 and alignment > 0 and steps >= 5
        assert game.scales[name] == (8.0 if raised else 2.0)


@pytest.mark.parametrize("step", [3, 5])
def test_a_stage_that_its_displacement_has_raised_is_judged_anew(step: int) -> None:
    known = REPAIRED | {"lifted_at": None}
    # The third does not count before step 9.
    game = standing(Repair(alignment_steps=5), {"a": known, "b": known, "c": known | {"start": 9}})
    moved = {"a": 0.0, "b": 0.09, "c": 0.0}
    found = {n: stage_reading(m, alignment=0.9) for n, m in moved.items()}
    decisions = game.see(Reading(step, found))
    due = step == 5
    windows = {n: game.memory(n).window for n in found}
    assert {n: (w.total > 0, w.start) for n, w in windows.items()} == {
        "a": (False, step),
        "b": (not due, step if due else 0),
        "c": (False, 9),
    }
    assert {d.stage: d.cause for d in decisions} == {"a": "starved", "c": "starved"} | (
        {"b": "alignment"} if due else {}
    )
    assert game.scales["b"] == (4.0 if due else 1.0)
    assert game.scales["a"] == game.scales["c"] > 4


def test_a_stage_that_has_not_lifted_off_is_followed_however_late_it_is() -> None:
    """From ``settle`` steps after its first positive rate on."""
    game, begin, raised = Play(Repair(), {"a": 0.0}, largest=1.0), 150, []
    for step in range(begin + 30):
        read = stage_reading(0.05 if step < begin + 9 else 0.2, alignment=0.5)
        rates = {"a": 0.01 if step >= begin else 0.0}
        decisions = game.see(Reading(step, {"a": read}), rates)
        raised += [d.step for d in decisions if d.kind == "raise"]
    assert raised[:2] == [begin + 2 + 3, begin + 2 + 2 * 3]


def test_a_stage_that_no_rate_moves_is_not_followed() -> None:
    game = Play(Repair(), {"a": 0.01}, largest=1.0)
    for step, gradient in enumerate((0.0, 0.0, 1.0, 1.0, 0.0)):
        read = stage_reading(0.01 * step, zero_gradient=gradient)
        game.see(Reading(step, {"a": read}))
        assert game.memory("a").window.open == (gradient == 0)
        assert ("a" in game.run.aligned) == (gradient == 0)


def test_what_the_user_has_taken_back_is_no_raise() -> None:
    known = {"started": 0, "open": True, "scale": 8.0, "raisable": True, "compared": True}
    game = standing(Repair(), {"a": known}, largest=1.0)
    read = stage_reading(0.06, alignment=0.5)
    (decision,) = game.see(Reading(10, {"a": read}), {"a": 0.5})
    assert (decision.kind, decision.scale, decision.cause) == ("lower", 2.0, "schedule")
    assert "your rates have changed" in decision.reason


def test_steps_that_were_taken_back_count_for_nothing() -> None:
    """A run that goes back stands where it stood, however many steps it has taken since."""
    for policy in (Repair(), Free(), Warmup()):
        ended = []
        for shift in (0, 40):
            game, decisions = Play(policy, {"a": 0.01}, largest=1.0), []
            for step in range(12):
                if step == 4:
                    then = game.run.now
                    for wasted in range(step, step + shift, 9):
                        game.see(Reading(wasted, {"a": stage_reading(9.0, alignment=0.9)}))
                    game.run.go_back(then, shift)
                now = step + (shift if step >= 4 else 0)
                read = stage_reading(0.03 * step, alignment=0.5)
                decisions += [
                    (d.step - now + step, d.scale, d.cause)
                    for d in game.see(Reading(now, {"a": read}))
                ]
            ended.append((decisions, game.run.now.state, game.scales, game.run.now.reported))
            assert game.run.now.behind == shift
        assert ended[0] == ended[1]
        assert ended[0][0]


def test_a_group_without_a_rate_costs_nothing_for_long() -> None:
    """Neither gradients that are looked at nor dense readings."""
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[2].parameters()}]
    wrapped = DensityLR(torch.optim.SGD(groups, lr=0.1), model, pretrained=False)
    looked = []
    alignment = wrapped._loop._measured._alignment
    assert alignment is not None
    add = alignment.add
    alignment.add = lambda names: looked.append(names) or add(names)  # type: ignore
    for step in range(400):
        wrapped.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        wrapped.step()
        if step == 0:
            wrapped.param_groups[0]["lr"] = 0.0
    assert looked == []
    assert np.diff(wrapped.history.steps)[-1] > 5


def test_a_stage_does_not_lift_off_while_it_is_raised() -> None:
    game, found = Play(Repair(), {"a": 0.01}, largest=1.0), []
    for step in range(0, 30, 2):
        read = stage_reading(0.02 * step, alignment=0.5 if step < 12 else 0.0)
        found += [(d.kind, d.scale) for d in game.see(Reading(step, {"a": read}))]
    kinds = [kind for kind, _ in found]
    assert kinds.count("lift-off") == 1
    assert kinds.count("raise") >= 2
    assert all(b > a for (_, a), (k, b) in itertools.pairwise(found) if k == "raise")
    assert not game.run.undecided


def repaired(
    alignment: float, policy: Repair, own: float = 0.01, steps: int = 160
) -> tuple[list[float], Play]:
    """The scale of a stage that has lifted off at a part of the largest rate, at each step."""
    game, scales = Play(policy, {"a": own}, largest=1.0), []
    for step in range(steps):
        game.see(Reading(step, {"a": stage_reading(step, alignment=alignment)}))
        scales.append(game.scales["a"])
    return scales, game


@given(st.floats(-1, 1), st.floats(1e-6, 1.0))
def test_repair_raises_a_stage_that_lifted_off_while_gradients_point_away(
    alignment: float, own: float
) -> None:
    scales, _ = repaired(alignment, Repair(), own)
    assert set(scales[: 2 + 3]) == {1.0}
    if alignment <= 0.03:
        assert set(scales) == {1.0}
    else:
        assert scales[2 + 3] == pytest.approx(min(4.0, 1 / own))
        assert scales[-1] == pytest.approx(min(1 / own, 4.0 ** (100 // 3)))


def test_repair_follows_for_so_long() -> None:
    """A hundred steps from the reading at which the stage lifts off, where it is not raised."""
    scales, game = repaired(0.9, Repair(growth_factor=1.001))
    raises = [i for i in range(1, 160) if scales[i] > scales[i - 1]]
    # The first raise, at step 5, takes back the lift-off of step 1; the next are three steps apart.
    assert game.memory("a").lifted_at == 1
    assert raises == list(range(5, 102, 3))


@pytest.mark.parametrize("kind", [Warmup, Free])
def test_of_searches_only_free_goes_by_alignment_and_only_when_it_is_over(
    kind: type[Policy],
) -> None:
    game, scales = Play(kind(), {"a": 0.1}), []
    for step in range(0, 60, 5):
        read = stage_reading(0.05 + 0.01 * step, near_zero=0.05, alignment=0.5)
        decisions = game.see(Reading(step, {"a": read}))
        scales.append(game.scales["a"])
    lifted = next(i for i in range(12) if 0.05 + 0.05 * i >= 0.1)
    rises = [b > a for a, b in itertools.pairwise(scales[lifted:])]
    assert any(rises) == (kind is Free)
    if kind is Free:
        assert all(rises)
        assert decisions[0].cause == "alignment"
        assert "gradients still point away" in decisions[0].reason


def first_weights(wrapped: DensityLR) -> dict[str, Any]:
    """Those that are kept, by stage."""
    return wrapped.state_dict()["densitylr"][0]["measurements"]["alignment"]["first_weights"]


def test_training_that_needs_no_more_is_left_and_what_was_kept_is_released() -> None:
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
    raises = [d for d in wrapped.history.decisions if d.cause == "alignment"]
    assert loss.item() < 0.7
    assert max(d.step for d in raises) < 200
    assert first_weights(wrapped) == {}


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
    assert list(first_weights(wrapped)) == (["0"] if low < 1 else [])


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
    assert any(d.cause == "alignment" for d in raises)
    assert "0" not in wrapped._loop.run.undecided
    assert wrapped.scales["0"] == 30


@pytest.mark.parametrize("kind", [Free, Repair])
def test_a_stage_without_a_rate_waits(kind: type[Policy]) -> None:
    known, factor = (SEARCHED, 1.5) if kind is Free else (REPAIRED, 4.0)
    policy = kind(**({} if kind is Free else {"alignment_steps": 5}))
    game = standing(policy, {n: known | {"scale": 1.0} for n in "ab"})
    frozen = {"a": 0.1, "b": 0.0}
    game.see(seen(5, a=0.5, b=0.5), frozen)
    assert game.scales == {"a": factor, "b": 1.0}
    assert {n: game.memory(n).window.start for n in "ab"} == {"a": 5, "b": 5}
    assert game.memory("b").window.total == 0
    # With its rate back it is judged by what is seen from there on.
    game.see(seen(8, a=0.5, b=0.5))
    assert game.scales["b"] == 1.0
    game.see(seen(10, a=0.5, b=0.5))
    assert game.scales["b"] == factor


@given(st.integers(1, 12), st.integers(0, 12), st.floats(0.0, 0.029))
def test_an_alignment_below_the_threshold_raises_nothing_however_readings_fall(
    every: int, begin: int, alignment: float
) -> None:
    game = standing(Repair(), {"a": REPAIRED | {"start": begin, "scale": 2.0}})
    for step in range(every, 60, every):
        assert game.see(seen(step, a=alignment)) == []
    assert game.scales["a"] == 2.0


@pytest.mark.parametrize("maximize", [False, True])
def test_the_alignment_of_a_run_that_goes_up_its_gradients_is_the_same(maximize: bool) -> None:
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
    alignment = alignment_of(model)
    with torch.no_grad():
        model[0].mixing += torch.tensor([1j] * 4)
    model[0].mixing.grad = torch.tensor([-1j] * 4)
    alignment.add(["0"])
    assert alignment.take(0)["0"] == pytest.approx(1.0)


def test_a_run_resumed_between_two_readings_has_seen_what_was_seen() -> None:
    model = net()
    alignment, other = alignment_of(model), alignment_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
            parameter.grad = torch.randn_like(parameter)
    alignment.add(["0", "2"])
    other.load_state_dict(alignment.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for one in (alignment, other):
        one.add(["0", "2"])
    found = alignment.take(0)
    assert other.take(0) == found
    assert all(map(math.isfinite, found.values()))


def test_a_closed_run_holds_no_weights() -> None:
    model = net()
    wrapped = DensityLR(torch.optim.SGD(model.parameters(), lr=1e-2), model, mode="free")
    assert all(first_weights(wrapped).values())
    assert len(first_weights(wrapped)) == 2
    wrapped.close()
    assert first_weights(wrapped) == {}
