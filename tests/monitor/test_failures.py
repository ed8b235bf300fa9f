"""What goes wrong inside of us ends the watching and the control, and leaves the training alone."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densitylr import DensityLR, History, Policy, Repair
from densitylr.controller import loop
from densitylr.controller.measurements import Measurements
from densitylr.history import ReadingSchedule
from densitylr.monitor import Alignment, DensityMonitor
from densitylr.monitor.layers import Sampler, WatchedLayer
from densitylr.policy import Hypergradient
from densitylr.recovery import Recovery
from tests.support.fixed import batches, hooks_of, loss_of, net, same, same_state

Wrap = Callable[[nn.Module, torch.optim.Optimizer], Any]


class OursError(Exception):
    pass


def train(wrap: Wrap, steps: int = 30) -> tuple[nn.Module, torch.optim.Optimizer, Any, list[float]]:
    model = net()
    low, rest = list(model[:3].parameters()), list(model[3:].parameters())
    inner = torch.optim.SGD(
        [{"params": low, "lr": 0.01}, {"params": rest}], lr=0.05, momentum=0.9, nesterov=True
    )
    optimizer, losses = wrap(model, inner), []
    for batch in batches(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, inner, optimizer, losses


def bare(model: nn.Module, inner: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return inner


def broken_after(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: int) -> None:
    """Let a method fail for good after so many calls."""
    plain, seen = getattr(owner, name), []

    def broken(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) > calls:
            raise OursError(f"in {name}")
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


PLACES: list[tuple[type, str]] = [
    (WatchedLayer, "read"),
    (Sampler, "block"),
    (Sampler, "spread"),
    (DensityMonitor, "collect"),
    (Measurements, "views"),
    (Measurements, "release_twins"),
    (Alignment, "add"),
    (Alignment, "take"),
    (Repair, "update"),
    (Repair, "requires"),
    (ReadingSchedule, "read"),
    (History, "record"),
    (Recovery, "look"),
    (Recovery, "see"),
    (Recovery, "stepped"),
]


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[f"{o.__name__}.{n}" for o, n in PLACES])
@pytest.mark.parametrize("calls", [0, 2])
def test_a_failure_ends_the_watching_is_logged_once_and_training_goes_on(
    owner: type,
    name: str,
    calls: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inner, _, losses = train(bare)

    def wrap(watched: nn.Module, optimizer: torch.optim.Optimizer) -> DensityLR:
        # It changes no scale: until it fails, too, training is the bare one.
        policy = Repair(lift_off=1e-9, alignment=2.0)
        made = DensityLR(optimizer, watched, policy=policy, pretrained=False, recover=True)
        broken_after(monkeypatch, owner, name, calls)
        return made

    monkeypatch.setattr(loop, "STRICT", False)
    with caplog.at_level(logging.WARNING, "densitylr"):
        watched, other, optimizer, seen_losses = train(wrap)
    assert seen_losses == losses
    assert same(watched, model)
    assert same_state(other, inner)
    assert [group["lr"] for group in other.param_groups] == [0.01, 0.05]
    assert set(optimizer.scales.values()) == {1.0}
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.name == "densitylr"
    assert "failed at step" in record.getMessage()
    assert "training goes on at your own rates" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], OursError)
    assert hooks_of(watched) == 0
    assert "closed" in repr(optimizer)


@pytest.mark.parametrize(("owner", "name"), PLACES, ids=[f"{o.__name__}.{n}" for o, n in PLACES])
def test_where_it_is_strict_a_failure_is_raised(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrap(model: nn.Module, optimizer: torch.optim.Optimizer) -> DensityLR:
        made = DensityLR(optimizer, model, pretrained=False, recover=True)
        broken_after(monkeypatch, owner, name, 0)
        return made

    assert loop.STRICT
    with pytest.raises(OursError, match=f"in {name}"):
        train(wrap)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_scales_that_were_in_force_are_off_once_the_control_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From there on each step is the bare optimizer's."""
    monkeypatch.setattr(loop, "STRICT", False)
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapped = DensityLR(inner, model, mode="free", pretrained=False)
    kept: list[tuple[nn.Module, torch.optim.Optimizer]] = []
    for i, batch in enumerate(batches(24)):
        if i == 12:
            assert any(scale != 1 for scale in wrapped.scales.values())
            broken_after(monkeypatch, DensityMonitor, "collect", 0)
            other = copy.deepcopy(model)
            again = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
            again.load_state_dict(copy.deepcopy(inner.state_dict()))
            kept.append((other, again))
        for net_, optimizer in [(model, wrapped), *kept]:
            optimizer.zero_grad()
            loss_of(net_, batch).backward()
            optimizer.step()
    (other, again), *_ = kept
    assert same(model, other)
    assert same_state(inner, again)
    assert set(wrapped.scales.values()) == {1.0}


class Users(Policy):
    def update(self, state: None, seen: Any) -> Any:
        raise OursError("of the user's")


@pytest.mark.parametrize("strict", [False, True])
def test_a_policy_of_the_users_may_raise(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "STRICT", strict)
    with pytest.raises(OursError, match="of the user's"):
        train(lambda model, inner: DensityLR(inner, model, policy=Users(), pretrained=False))


def test_a_failure_of_a_published_rule_of_ours_is_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loop, "STRICT", False)
    broken_after(monkeypatch, Hypergradient, "update", 0)
    model, *_ = train(bare)
    watched, *_ = train(
        lambda m, inner: DensityLR(inner, m, policy=Hypergradient(), pretrained=False)
    )
    assert same(watched, model)
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    assert hooks_of(watched) == 0


def test_a_failure_inside_a_forward_leaves_its_output_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop, "STRICT", False)
    model, x = net(), torch.randn(16, 6)
    expected = copy.deepcopy(model)(x)
    wrapped = DensityLR(torch.optim.SGD(model.parameters(), lr=0.05), model)
    broken_after(monkeypatch, WatchedLayer, "read", 1)
    found: Tensor = model(x)
    assert torch.equal(found, expected)
    assert hooks_of(model) == 0
    found.sum().backward()
    wrapped.step()
    assert len(wrapped.history) == 0
