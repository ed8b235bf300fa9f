"""Scaled for one step only, and equal to real parameter groups with those rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from densitylr.controller.param_groups import ScaledGroups
from tests.support.fixed import batches, loss_of, net, one_step, same, same_state

FACTORS = {"0": 0.25, "1": 0.25, "3": 2.0, "5": 1.0}

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd nesterov": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True, amsgrad=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adam tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def factors(model: nn.Module, optimizer: Optimizer) -> list[list[float]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return [
        [FACTORS[names[id(p)].split(".")[0]] for p in group["params"]]
        for group in optimizer.param_groups
    ]


def scaled_run(make: Callable[..., Optimizer], grouped: bool, steps: int = 6) -> tuple[Any, ...]:
    model = net()
    groups: Any = model.parameters()
    if grouped:  # by kind, as for weight decay: each group spans all stages
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1]},
        ]
    optimizer = make(groups)
    scaled = ScaledGroups(optimizer)
    before = [dict(g) for g in optimizer.param_groups]
    for batch in batches(steps):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        groups_before = optimizer.param_groups
        scaled.apply(factors(model, optimizer))
        assert optimizer.param_groups is not groups_before
        optimizer.step()
        scaled.restore()
        assert optimizer.param_groups is groups_before
        for now, then in zip(optimizer.param_groups, before, strict=True):
            assert now.keys() == then.keys()
            assert all(now[k] is then[k] for k in now)
    return model, optimizer


def real_run(make: Callable[..., Optimizer], steps: int = 6) -> tuple[Any, ...]:
    """The same with one real group for each child of the model."""
    model = net()
    optimizer = make([{"params": list(c.parameters())} for c in model if len(list(c.parameters()))])
    for group, factor in zip(optimizer.param_groups, FACTORS.values(), strict=True):
        group["lr"] = group["lr"] * factor
    for batch in batches(steps):
        one_step(model, optimizer, batch)
    return model, optimizer


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_to_real_parameter_groups(name: str, grouped: bool) -> None:
    ours, _ = scaled_run(OPTIMIZERS[name], grouped)
    theirs, _ = real_run(OPTIMIZERS[name])
    assert same(ours, theirs)
    plain = net()
    optimizer = OPTIMIZERS[name](plain.parameters())
    for batch in batches(6):
        one_step(plain, optimizer, batch)
    assert not same(plain, ours)


def test_a_group_within_one_stage_is_scaled_in_place() -> None:
    model = net()
    optimizer = torch.optim.SGD([{"params": c.parameters(), "lr": 0.5} for c in model], lr=1)
    scaled = ScaledGroups(optimizer)
    groups = optimizer.param_groups
    scaled.apply(factors(model, optimizer))
    assert optimizer.param_groups is groups
    assert [g["lr"] for g in groups if g["params"]] == [0.125, 0.125, 1.0, 0.5]
    scaled.restore()
    assert [g["lr"] for g in groups] == [0.5] * 6


def test_all_ones_touch_nothing() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    groups, group = optimizer.param_groups, optimizer.param_groups[0]
    scaled = ScaledGroups(optimizer)
    scaled.apply([[1.0] * len(group["params"])])
    assert optimizer.param_groups is groups
    assert groups[0] is group
    scaled.restore()
    assert group["lr"] == 0.1


def test_three_failed_steps_leave_the_rate() -> None:
    for grouped in (False, True):
        model = net()
        parameters = [{"params": c.parameters()} for c in model] if grouped else model.parameters()
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        scaled = ScaledGroups(optimizer)
        groups, wanted = optimizer.param_groups, factors(model, optimizer)
        for _ in range(3):
            scaled.apply(wanted)  # and the step raises
        scaled.heal()
        scaled.heal()
        assert optimizer.param_groups is groups
        assert all(g["lr"] == 0.1 for g in groups)


def test_what_the_step_writes_into_its_groups_is_kept() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1
            return super().step(closure)

    model = net()
    optimizer = Counting(model.parameters(), lr=0.1)
    scaled = ScaledGroups(optimizer)
    for batch in batches(3):
        loss_of(model, batch).backward()
        scaled.apply(factors(model, optimizer))
        optimizer.step()
        scaled.restore()
    assert [g["calls"] for g in optimizer.param_groups] == [3]
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("grouped", [False, True])
def test_a_step_that_sets_a_rate_itself_is_refused(grouped: bool) -> None:
    model = net()
    parameters = [{"params": c.parameters()} for c in model] if grouped else model.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaled = ScaledGroups(optimizer)
    groups, wanted = optimizer.param_groups, factors(model, optimizer)
    scaled.apply(wanted)
    optimizer.param_groups[0]["lr"] = 0.7
    with pytest.raises(RuntimeError, match=r"SGD has set a rate in its own step, to 0\.7 where"):
        scaled.restore()
    assert optimizer.param_groups is groups
    assert all(g["lr"] == 0.1 for g in groups)
    scaled.apply(wanted)  # and go on
    scaled.restore()
    assert all(g["lr"] == 0.1 for g in groups)


def test_a_rate_set_after_a_step_that_failed_is_meant() -> None:
    model = net()
    optimizer = torch.optim.SGD([{"params": c.parameters()} for c in model], lr=0.1)
    scaled = ScaledGroups(optimizer)
    scaled.apply(factors(model, optimizer))
    optimizer.param_groups[0]["lr"] = 0.7
    scaled.heal()
    assert [g["lr"] for g in optimizer.param_groups] == [0.7] + [0.1] * 5


def test_a_tensor_rate_shared_by_all_groups_is_not_written_to() -> None:
    model = net()
    rate = torch.tensor(0.01)
    optimizer = torch.optim.Adam(
        [{"params": c.parameters()} for c in model], lr=rate, foreach=False
    )
    shared = [g["lr"] for g in optimizer.param_groups]
    scaled = ScaledGroups(optimizer)
    scaled.apply(factors(model, optimizer))
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.0025)
    scaled.restore()
    assert all(g["lr"] is r for g, r in zip(optimizer.param_groups, shared, strict=True))
    assert rate.item() == pytest.approx(0.01)


def test_state_belongs_to_the_parameters_not_to_the_parts() -> None:
    model, optimizer = scaled_run(OPTIMIZERS["adam"], grouped=False)
    assert set(optimizer.state) == set(model.parameters())
    other = OPTIMIZERS["adam"](net().parameters())
    other.load_state_dict(optimizer.state_dict())
    assert same_state(other, optimizer)
