"""Every scheduler of ``torch.optim.lr_scheduler``, with scales in force.

The sequence of what it writes into ``param_groups``, and of what it reports, must be that of a run
with the bare optimizer; the parameters must be those of real parameter groups with such rates.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from densitylr import DensityLR, find_stages
from tests.matrix.cells import Cell
from tests.support.fixed import Fixed, batches, net, numbers_of, one_step, same

__all__ = ["SCHEDULERS", "cells"]

STEPS = 12
SCALES = {"0": 0.25, "3": 2.0, "5": 0.5}

Make = Callable[[Optimizer], Any]

# How to build each; the list itself is torch's.
ARGUMENTS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (i + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)],
        milestones=[4],
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.2, 0.1], total_steps=STEPS + 2),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=5),
}
SCHEDULERS = sorted(
    name
    for module in (lr_scheduler, swa_utils)
    for name in module.__all__
    if inspect.isclass(kind := getattr(module, name))
    and issubclass(kind, lr_scheduler.LRScheduler)
    and kind is not lr_scheduler.LRScheduler
)
WAYS = ("on the inner, before", "on the inner, after", "on the wrapper")
MOMENTUM: dict[str, Callable[..., Optimizer]] = {
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "betas": lambda groups: torch.optim.AdamW(groups, lr=0.05),
}


def cells() -> list[Cell]:
    found = []
    for name in SCHEDULERS:
        for way in WAYS:
            found.append(Cell("schedulers", name, way, functools.partial(_same_rates, name, way)))
        found.append(Cell("schedulers", name, "resumed", functools.partial(_resumed, name)))
    found += [
        Cell("averaging", "AveragedModel", "the model", _averaged),
        Cell("averaging", "AveragedModel, EMA", "the model", functools.partial(_averaged, True)),
        Cell("averaging", "update_bn", "the model", _update_bn),
    ]
    return found


def _groups(model: nn.Module, split: bool = False) -> list[dict[str, Any]]:
    """Two groups, the first of two stages; ``split``: real groups, in the same order of stages."""
    stages = {n: list(s.parameters.values()) for n, s in find_stages(model).items()}
    if split:
        return [{"params": p} for p in stages.values()]
    return [{"params": stages["0"] + stages["3"]}, {"params": stages["5"], "lr": 0.02}]


class _Run:
    """A training with a scheduler, and the trace of all that it wrote."""

    def __init__(self, name: str, way: str, inner: str = "momentum") -> None:
        self.model, self.name = net(), name
        optimizer: Optimizer = MOMENTUM[inner](_groups(self.model))
        self.optimizer: Any = optimizer
        if way == "on the inner, before":
            self.scheduler = ARGUMENTS[name](optimizer)
        if way != "bare":
            self.optimizer = DensityLR(optimizer, self.model, policy=Fixed(SCALES), every=2)
        if way != "on the inner, before":
            self.scheduler = ARGUMENTS[name](
                optimizer if way == "on the inner, after" else self.optimizer
            )
        self.trace: list[Any] = []

    def train(self, first: int = 0, last: int = STEPS) -> None:
        for batch in batches(STEPS)[first:last]:
            one_step(self.model, self.optimizer, batch)
            self.scheduler.step(*([1.0] if self.name == "ReduceLROnPlateau" else []))
            groups = [
                {k: v for k, v in group.items() if k != "params"}
                for group in self.optimizer.param_groups
            ]
            self.trace.append((numbers_of(groups), numbers_of(self.scheduler.get_last_lr())))


def _reference(run: _Run, inner: str) -> nn.Module:
    """The model after steps with real groups whose rates are those of the trace, scaled."""
    model = net()
    optimizer = MOMENTUM[inner](_groups(model, split=True))
    fresh = _Run(run.name, "bare", inner)  # what the scheduler wrote as it was made
    start = [dict(g) for g in fresh.optimizer.param_groups]
    written = [start, *(groups for groups, _ in run.trace[:-1])]
    for batch, groups in zip(batches(STEPS), written, strict=True):
        owners = zip(optimizer.param_groups, (0, 0, 1), SCALES.values(), strict=True)
        for group, at, scale in owners:
            group.update({k: v for k, v in groups[at].items() if k != "params"})
            group["lr"] = groups[at]["lr"] * scale
        one_step(model, optimizer, batch)
    return model


def _same_rates(name: str, way: str) -> None:
    for inner in MOMENTUM:
        bare, ours = _Run(name, "bare", inner), _Run(name, way, inner)
        bare.train()
        ours.train()
        assert ours.trace == bare.trace
        assert len({str(groups) for groups, _ in ours.trace}) > 1, "the schedule is constant"
        assert same(ours.model, _reference(ours, inner))
        assert not same(ours.model, bare.model)


def _resumed(name: str) -> None:
    """Model, optimizer and scheduler, saved after five steps and loaded into new ones."""
    whole = _Run(name, "on the wrapper")
    whole.train()
    first = _Run(name, "on the wrapper")
    first.train(0, 5)
    states = [
        first.model.state_dict(),
        first.optimizer.state_dict(),
        first.scheduler.state_dict(),
    ]
    second = _Run(name, "on the wrapper")
    for part, state in zip((second.model, second.optimizer, second.scheduler), states, strict=True):
        part.load_state_dict(state)
    second.train(5)
    assert first.trace + second.trace == whole.trace
    assert same(second.model, whole.model)


def _pair() -> list[tuple[nn.Module, Optimizer]]:
    """A bare training and one of ours that may do nothing, over two flat groups."""
    found: list[tuple[nn.Module, Optimizer]] = []
    for wrap in (False, True):
        model = net()
        optimizer: Optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found.append((model, DensityLR(optimizer, model, every=2) if wrap else optimizer))
    return found


def _averaged(ema: bool = False) -> None:
    """Averages are those of the bare run; the copy in them is never read nor counted."""
    means = []
    for model, optimizer in _pair():
        average = swa_utils.AveragedModel(
            model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9) if ema else None
        )
        for batch in batches(STEPS):
            one_step(model, optimizer, batch)
            average.update_parameters(model)
            average.train()(batch[0]).sum().backward()
        means.append(average)
    assert same(*means)
    assert not same(means[0].module, model)
    assert isinstance(optimizer, DensityLR)
    assert {r.stages["0"].count for r in optimizer.history.readings} == {16 * 16}


def _update_bn() -> None:
    statistics = []
    for model, optimizer in _pair():
        for batch in batches(3):
            one_step(model, optimizer, batch)
        readings = len(optimizer.history) if isinstance(optimizer, DensityLR) else 0
        swa_utils.update_bn([x for x, _ in batches(4, seed=8)], model)
        statistics.append(model.state_dict())
    assert isinstance(optimizer, DensityLR)
    assert len(optimizer.history) == readings
    assert numbers_of(statistics[0]) == numbers_of(statistics[1])
    one_step(model, optimizer, batches(1)[0])
    assert optimizer.history.readings[-1].stages["0"].count == 16 * 16
