"""A raise comes into force as it does in a run whose momentum begins with it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from densitylr import DensityLR
from densitylr.arrival import Arrival
from densitylr.policy import LawState, StageState
from densitylr.records import Decision, Reading


class Steps:
    """A policy that gives stage ``0`` the scale of each reading from a list, one a step."""

    def __init__(self, scales: list[float]) -> None:
        self.scales = scales

    def init(self, stages: list[str]) -> LawState:
        return LawState({name: StageState(1.0) for name in stages})

    def decide(
        self, state: LawState, reading: Reading, rates: Mapping[str, float], ceiling: float
    ) -> tuple[LawState, list[Decision]]:
        scale = self.scales[min(reading.step, len(self.scales) - 1)]
        return LawState({name: StageState(scale) for name in state.stages}), []


def moved(scales: list[float], momentum: float, nesterov: bool) -> list[float]:
    """How far a weight moves in each step under a gradient of 1 and a rate of 1."""
    model = nn.Linear(1, 1, bias=False).double()
    inner = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum, nesterov=nesterov)
    wrapped = DensityLR(inner, model, policy=Steps(scales), every=1, pretrained=False)
    found = []
    for _ in scales:
        before = model.weight.item()
        wrapped.zero_grad()
        model(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
        wrapped.step()
        found.append(before - model.weight.item())
    wrapped.close()
    return found


@given(
    st.lists(st.floats(1, 8), min_size=1, max_size=6),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    st.booleans(),
)
def test_each_raise_moves_weights_as_an_empty_buffer_would(
    factors: list[float], between: int, momentum: float, nesterov: bool
) -> None:
    nesterov = nesterov and momentum > 0
    scales, scale = [1.0], 1.0
    for factor in factors:
        scale *= factor
        scales += [scale] * (1 + between)
    # A raise is a run of its own, of the difference, that begins at that step.
    expected = [0.0] * len(scales)
    for begin, (old, new) in enumerate(zip([0.0, *scales], scales, strict=False)):
        held = 0.0
        for step in range(begin, len(scales)):
            held = momentum * held + 1.0
            expected[step] += (new - old) * (1.0 + momentum * held if nesterov else held)
    assert moved(scales, momentum, nesterov) == pytest.approx(expected, rel=1e-9)


class Run:
    """One weight under a gradient of 1 and a rate of 1, raised to ``scale`` at the 9th step."""

    def __init__(self, scale: float = 100.0, **options: Any) -> None:
        self.model = nn.Linear(1, 1, bias=False).double()
        self.inner = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.9)
        self.options = {"policy": Steps([1.0] * 8 + [scale]), "every": 1, "pretrained": False}
        self.wrapped = DensityLR(self.inner, self.model, **self.options | options)

    def moved(self, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            before = self.model.weight.item()
            self.wrapped.zero_grad()
            self.model(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
            self.wrapped.step()
            found.append(before - self.model.weight.item())
        return found


def test_a_run_resumed_in_the_midst_of_a_raise_goes_on_as_if_it_had_never_stopped() -> None:
    straight, first, second = Run(), Run(), Run()
    first.moved(10)
    second.wrapped.load_state_dict(first.wrapped.state_dict())
    assert second.moved(4) == pytest.approx(straight.moved(14)[10:])


@pytest.mark.parametrize("what", ["older", "bare"])
def test_a_buffer_that_was_full_before_makes_no_raise_sudden(what: str) -> None:
    first = Run()
    first.moved(60)
    state = first.wrapped.state_dict() if what == "older" else first.inner.state_dict()
    if what == "older":
        del state["densitylr"][0]["arrival"]
    second = Run(policy=Steps([100.0]))
    told = pytest.warns(UserWarning, match="start anew") if what == "bare" else nullcontext()
    with told:
        second.wrapped.load_state_dict(state)
    second.wrapped._decider.law = LawState({n: StageState(1.0) for n in second.wrapped.stages})
    moved = second.moved(3)
    # A full buffer moves the weight by 10 a step, and a new one of 99 by 99, 188.1, 268.3 …
    assert moved == pytest.approx([10 + 99, 10 + 188.1, 10 + 268.29], rel=0.01)


def test_a_step_that_raised_is_no_step() -> None:
    run, straight = Run(), Run()
    run.moved(9)

    def fails() -> float:
        raise ValueError("a closure that fails")

    for _ in range(5):
        with pytest.raises(ValueError, match="that fails"):
            run.wrapped.step(fails)
    assert run.moved(3) == pytest.approx(straight.moved(12)[9:])


def test_what_was_only_observed_comes_into_force_like_a_raise() -> None:
    run = Run(observe_only=True)
    run.moved(60)
    run.wrapped.observe_only = False
    assert run.moved(2) == pytest.approx([10 + 99, 10 + 188.1], rel=0.01)


def test_a_lower_scale_is_in_force_at_once_and_so_is_the_share_that_is_late() -> None:
    arrival = Arrival(0.9)
    for _ in range(5):
        arrival.advance()
    arrival.changed({"a": 1.0}, {"a": 100.0})
    late = 1 - arrival.in_force({"a": 100.0})["a"] / 100
    arrival.changed({"a": 100.0}, {"a": 10.0})
    assert 0.5 < late < 1
    assert arrival.in_force({"a": 10.0})["a"] == pytest.approx(10 * (1 - late))


def test_without_momentum_a_raise_is_in_force_at_once() -> None:
    arrival = Arrival()
    arrival.advance()
    arrival.changed({"a": 1.0}, {"a": 100.0})
    assert arrival.in_force({"a": 100.0, "b": 1.0}) == {"a": 100.0, "b": 1.0}


def test_a_raise_arrives_in_the_end() -> None:
    arrival = Arrival(0.9)
    for step in range(1000):
        arrival.advance()
        if step == 3:
            arrival.changed({"a": 1.0}, {"a": 7.0})
    assert arrival.in_force({"a": 7.0})["a"] == 7.0
