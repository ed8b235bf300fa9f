"""At a raise momentum is corrected: weights go on as they move, new gradients count in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from densitylr import (
    DensityLR,
    Free,
    Observation,
    Policy,
    Repair,
    StageView,
    Warmup,
)


class Steps(Policy):
    """A policy that gives every stage the scale of each reading from a list, one a step.

    At a raise momentum is corrected as for ``repair``, or not, as for a search.
    """

    within_user_rates = True

    def __init__(self, scales: list[float], corrects_momentum: bool) -> None:
        self.scales, self.corrects_momentum = scales, corrects_momentum

    def init(self, stages: Mapping[str, StageView]) -> tuple[dict[str, float], Any]:
        return dict.fromkeys(stages, 1.0), None

    def update(self, state: Any, seen: Observation) -> tuple[dict[str, float], Any]:
        scale = self.scales[min(seen.step, len(self.scales) - 1)]
        return dict.fromkeys(seen.stages, scale), None


class Run:
    """One weight at a rate of 0.1, pulled by the gradients that it is given."""

    def __init__(
        self,
        scales: list[float],
        optimizer: Any = torch.optim.SGD,
        corrects_momentum: bool = True,
        **options: Any,
    ) -> None:
        self.model = nn.Linear(1, 1, bias=False).double()
        self.inner = optimizer(self.model.parameters(), lr=0.1, **options)
        policy = Steps(scales, corrects_momentum)
        self.wrapped = DensityLR(self.inner, self.model, policy=policy, every=1, pretrained=False)

    def moved(self, gradients: list[float]) -> list[float]:
        found = []
        for gradient in gradients:
            before = self.model.weight.item()
            self.wrapped.zero_grad()
            self.model(torch.full((1, 1), gradient, dtype=torch.float64)).sum().backward()
            self.wrapped.step()
            found.append(before - self.model.weight.item())
        return found


def velocities(
    scales: list[float], gradients: list[float], momentum: float, nesterov: bool
) -> list[float]:
    """SGD whose momentum adds up steps instead of gradients: ``v = m v + lr g``.

    A lower scale applies to all of ``v``, as in torch's SGD it does to the whole buffer.
    """
    found, v, last = [], 0.0, scales[0]
    for scale, gradient in zip(scales, gradients, strict=True):
        v *= min(1.0, scale / last)
        v = momentum * v + 0.1 * scale * gradient
        found.append(momentum * v + 0.1 * scale * gradient if nesterov else v)
        last = scale
    return found


@given(
    st.lists(st.tuples(st.floats(0.01, 1e4), st.floats(-3, 3)), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    st.booleans(),
)
def test_under_any_scales_sgd_is_the_one_whose_momentum_adds_up_steps(
    steps: list[tuple[float, float]], momentum: float, nesterov: bool
) -> None:
    nesterov = nesterov and momentum > 0
    scales, gradients = [scale for scale, _ in steps], [gradient for _, gradient in steps]
    expected = velocities([1.0, *scales], [1.0, *gradients], momentum, nesterov)
    run = Run([1.0, *scales], momentum=momentum, nesterov=nesterov)
    assert run.moved([1.0, *gradients]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


RAISED = [1.0] * 60 + [100.0]


def test_old_gradients_do_not_come_back_larger() -> None:
    moved = Run(RAISED, momentum=0.9).moved([1.0] * 60 + [0.0] * 2)
    assert moved[59] == pytest.approx(1.0, rel=0.01)  # a full buffer of ten gradients
    assert moved[60:] == pytest.approx([0.9, 0.81], rel=0.01)


def test_rmsprop_with_momentum_is_corrected_too() -> None:
    moved = Run(RAISED, torch.optim.RMSprop, momentum=0.9).moved([1.0] * 60 + [0.0] * 2)
    assert moved[60] / moved[59] == pytest.approx(0.9, rel=1e-6)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
def test_the_state_of_other_optimizers_is_left_alone(optimizer: Any) -> None:
    run, bare = Run(RAISED, optimizer), Run([1.0], optimizer)
    run.moved([1.0] * 61)
    bare.moved([1.0] * 61)
    [ours], [theirs] = run.inner.state.values(), bare.inner.state.values()
    assert {k: float(v) for k, v in ours.items()} == {k: float(v) for k, v in theirs.items()}


def test_a_search_counts_with_full_buffers_and_leaves_them_full() -> None:
    """It raises rates while momentum builds up."""
    moved = Run(RAISED, corrects_momentum=False, momentum=0.9).moved([1.0] * 60 + [0.0])
    assert moved[60] == pytest.approx(90.0, rel=0.01)
    assert Repair.corrects_momentum
    assert not Warmup.corrects_momentum
    assert not Free.corrects_momentum


def test_a_run_resumed_just_after_a_raise_goes_on_as_if_it_had_never_stopped() -> None:
    straight, first, second = (Run([1.0] * 8 + [100.0], momentum=0.9) for _ in range(3))
    first.moved([1.0] * 9)
    second.wrapped.load_state_dict(first.wrapped.state_dict())
    assert second.moved([1.0] * 4) == pytest.approx(straight.moved([1.0] * 13)[9:], rel=1e-12)


def test_what_was_only_observed_is_a_raise_when_it_comes_into_force() -> None:
    run = Run(RAISED, momentum=0.9)
    run.wrapped.observe_only = True
    moved = run.moved([1.0] * 61 + [0.0])
    assert moved[61] == pytest.approx(0.9, rel=0.01)
    run.wrapped.observe_only = False
    assert run.moved([0.0]) == pytest.approx([0.81], rel=0.01)
    run.wrapped.observe_only = True  # a scale that falls to 1 applies at once
    assert run.moved([0.0]) == pytest.approx([0.729 / 100], rel=0.01)


def test_other_stages_keep_their_buffers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    groups = [
        {"params": model[0].parameters(), "lr": 1e-3},
        {"params": model[2].parameters(), "lr": 1e-1},
    ]
    inner = torch.optim.SGD(groups, momentum=0.9)
    wrapped = DensityLR(inner, model, every=1, pretrained=False)
    for _ in range(40):
        wrapped.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        gradient = model[2].weight.grad.clone()
        buffer = inner.state[model[2].weight].get("momentum_buffer", torch.zeros(2, 4)).clone()
        wrapped.step()
        now = inner.state[model[2].weight]["momentum_buffer"]
        assert torch.equal(now, buffer * 0.9 + gradient)
    assert wrapped.scales["0"] > 1
