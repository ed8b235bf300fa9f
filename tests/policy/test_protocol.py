"""What every policy of the package keeps to, whatever it is shown."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import json
import math
import textwrap
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densitylr import Decision, Free, Needs, Observation, Policy, Repair, StageView, Warmup
from densitylr.policy import (
    MODES,
    BuildUp,
    Change,
    Hypergradient,
    Lars,
    LayerwiseDecay,
    MuP,
    Plateau,
    PolicyRun,
    StageNeeds,
    UpdateRatio,
)
from densitylr.policy.base import plain
from tests.support.readings import stage_reading

OURS: list[Callable[[], Policy]] = [Repair, Warmup, Free]
RULES: list[Callable[[], Policy]] = [
    Lars,
    UpdateRatio,
    MuP,
    Hypergradient,
    LayerwiseDecay,
    lambda: Plateau(patience=1, steps=2),
]
EACH = pytest.mark.parametrize("make", OURS + RULES, ids=lambda make: type(make()).__name__)

NAN = st.just(math.nan)
RATES = st.one_of(st.just(0.0), st.floats(1e-8, 10))
NORMS = st.one_of(NAN, st.just(0.0), st.floats(1e-20, 1e20))
COSINES = st.one_of(NAN, st.floats(-1, 1))
MOVED = st.one_of(st.floats(0, 0.3), st.sampled_from([0.0, 0.05, 0.2, 5.0, math.nan]))
STAGES = ("conv1", "body", "head")


@st.composite
def views(draw: st.DrawFn) -> StageView:
    """A stage at an update; its largest rate and its scale are those of the run."""
    read = stage_reading(
        draw(MOVED),
        count=draw(st.sampled_from([0, 30, 2**15, 2**17])),
        rms=draw(st.one_of(NAN, st.just(0.0), st.floats(1e-3, 1e3))),
        zero_gradient=draw(st.sampled_from([0.0, 0.0, 0.0, 1.0])),
        alignment=draw(COSINES),
    )
    return StageView(
        draw(RATES),
        0.0,
        1.0,
        fan_in=draw(st.integers(1, 10**6)),
        build_up=draw(st.sampled_from([BuildUp(), BuildUp(0.9), BuildUp(0.9, 0.99, False)])),
        optimizer="SGD",
        weight_norm=draw(NORMS),
        gradient_norm=draw(NORMS),
        update_norm=draw(NORMS),
        update_alignment=draw(COSINES),
        alignment=read.alignment,
        reading=read,
    )


UPDATES = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.fixed_dictionaries(dict.fromkeys(STAGES, views())),
        st.one_of(st.none(), st.floats(-10, 10)),
    ),
    min_size=1,
    max_size=14,
)
Update = tuple[int, dict[str, StageView], float | None]


def first(updates: list[Update]) -> dict[str, StageView]:
    stages = updates[0][1]
    largest = max(view.lr for view in stages.values())
    return {n: dataclasses.replace(v, max_lr=largest, reading=None) for n, v in stages.items()}


def observations(run: PolicyRun, updates: list[Update], begin: int = 0) -> Iterator[Observation]:
    """What a run is shown, one update after the other, with the scales that it has chosen."""
    step = sum(gap for gap, _, _ in updates[:begin])
    for gap, stages, loss in updates[begin:]:
        largest = max(view.lr for view in stages.values())
        shown = {
            name: dataclasses.replace(view, max_lr=largest, scale=run.scales[name])
            for name, view in stages.items()
        }
        yield Observation(step, shown, loss)
        step += gap


@EACH
@given(updates=UPDATES)
def test_scales_are_finite_and_of_the_stages_that_were_given(
    make: Callable[[], Policy], updates: list[Update]
) -> None:
    policy, stages = make(), first(updates)
    scales, state = policy.init(stages)
    run = PolicyRun(policy, stages)
    for seen in [None, *observations(run, updates)]:
        if seen is not None:
            run.update(seen)
            scales, state = policy.update(state, seen)
        assert scales.keys() <= set(STAGES)
        for value in scales.values():
            scale = value.scale if isinstance(value, Change) else value
            assert 0 <= scale < math.inf
            assert not policy.within_user_rates or scale >= 1
        needs = policy.requires(state)
        assert needs.keys() <= set(STAGES)
        assert all(isinstance(own, StageNeeds) for own in needs.values())


@EACH
@given(updates=UPDATES)
def test_no_rate_exceeds_the_users_largest_where_that_is_promised(
    make: Callable[[], Policy], updates: list[Update]
) -> None:
    run = PolicyRun(make(), first(updates))
    for seen in observations(run, updates):
        run.update(seen)
        for name, view in seen.stages.items():
            if run.policy.within_user_rates:
                assert view.lr * run.scales[name] <= view.max_lr * (1 + 1e-6)


@EACH
@given(updates=UPDATES)
def test_nothing_that_is_given_is_changed(
    make: Callable[[], Policy], updates: list[Update]
) -> None:
    policy, stages = make(), first(updates)
    constants, kept = dict(vars(policy)), copy.deepcopy(stages)
    _, state = policy.init(stages)
    assert repr(stages) == repr(kept)
    run = PolicyRun(policy, stages)
    for seen in observations(run, updates):
        before, shown = copy.deepcopy(state), copy.deepcopy(seen)
        found, after = policy.update(state, seen)
        assert repr(state) == repr(before)
        assert repr(seen) == repr(shown)
        again, twice = policy.update(state, seen)  # a pure function of what it is given
        assert (repr(found), repr(after)) == (repr(again), repr(twice))
        policy.requires(after)
        state = after
        run.update(seen)
    assert vars(policy) == constants


def said(decisions: list[Decision]) -> list[str]:
    return [f"{d} {d.kind} {dict(d.numbers)}" for d in decisions]


@EACH
@given(updates=UPDATES, cut=st.integers(0, 14))
def test_a_run_that_was_interrupted_decides_as_one_that_never_stopped(
    make: Callable[[], Policy], updates: list[Update], cut: int
) -> None:
    whole, stages = PolicyRun(make(), first(updates)), first(updates)
    expected = [whole.update(seen) for seen in observations(whole, updates)]
    found, run = [], PolicyRun(make(), stages)
    cut = min(cut, len(updates))
    for seen in observations(run, updates[:cut]):
        found.append(run.update(seen))
    saved = json.loads(json.dumps(run.state_dict()))
    other = PolicyRun(make(), stages)
    other.load(other.restored(saved))
    for seen in observations(other, updates, cut):
        found.append(other.update(seen))
    if cut:  # of one that was saved before its first update, what was set at first is not told
        assert [said(decisions) for decisions in found] == [said(d) for d in expected]
    assert repr(other.now) == repr(whole.now)


@EACH
@given(updates=UPDATES)
def test_a_state_is_restored_as_it_was(make: Callable[[], Policy], updates: list[Update]) -> None:
    policy = make()
    run = PolicyRun(policy, first(updates))
    for seen in observations(run, updates):
        run.update(seen)
        state = run.now.state
        again = policy.restore(json.loads(json.dumps(plain(state))))
        assert type(again) is type(state)
        assert repr(again) == repr(state)


@EACH
def test_constants_are_all_there_is(make: Callable[[], Policy]) -> None:
    """A policy is a frozen dataclass, and its name says them, as the ranks compare that."""
    policy = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.new = 1  # type: ignore[attr-defined]
    assert policy == make()
    for name, value in vars(policy).items():
        assert f"{name}={value!r}" in repr(policy)
        other = dataclasses.replace(policy, **{name: value * 2})  # type: ignore[type-var]
        assert repr(other) != repr(policy)
        assert other != policy


def test_what_each_needs() -> None:
    assert Repair().needs == Needs(twins=True, alignment=True)
    assert Warmup().needs == Needs(twins=True)
    assert Free().needs == Needs(twins=True, alignment=True)
    assert Lars().needs == Needs(every=1, activations=False, weights=True, gradients=True)
    assert UpdateRatio().needs == Needs(weights=True, updates=True)
    assert MuP().needs == LayerwiseDecay().needs == Needs(activations=False)
    assert Hypergradient().needs == Needs(every=1, activations=False, updates=True)
    assert Plateau().needs == Needs(every=1, activations=False, loss=True)
    within = {kind for kind in (*OURS, *RULES) if kind().within_user_rates}
    assert within == {Repair, UpdateRatio}
    assert {"repair": Repair, "warmup": Warmup, "free": Free} == MODES


@pytest.mark.parametrize("kind", [Lars, UpdateRatio, MuP, Hypergradient, LayerwiseDecay, Plateau])
def test_a_published_rule_takes_fifteen_lines_at_most(kind: type[Policy]) -> None:
    lengths = {}
    for name in ("init", "update"):
        if name in vars(kind):
            source = textwrap.dedent(inspect.getsource(vars(kind)[name]))
            (function,) = ast.parse(source).body
            assert isinstance(function, ast.FunctionDef)
            assert function.end_lineno is not None
            lengths[name] = function.end_lineno - function.body[0].lineno + 1
    assert "update" in lengths
    assert sum(lengths.values()) <= 15
    own = {name for name, value in vars(kind).items() if inspect.isfunction(value)}
    assert own - {"init", "update"} <= {n for n in own if n.startswith("__")}
