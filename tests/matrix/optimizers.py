"""Every optimizer of ``torch.optim``, in each of its forms.

A cell trains twice. With one flat rate and the policy at work, everything must be that of the bare
optimizer, bit for bit; with a scale of its own for each stage, that of real parameter groups.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from densitylr import DensityLR, find_stages
from tests.matrix.cells import Cell, UnavailableError, refusal
from tests.matrix.nets import Bags, bias_free, difference, split_by_stage
from tests.support.fixed import Fixed, batches, hooks_of, net, one_step

__all__ = ["OPTIMIZERS", "cells"]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
}
REFUSED = {"LBFGS": "single parameter group", "Rprop": "at its first step only"}
MODELS: dict[str, Callable[[], nn.Module]] = {"SparseAdam": Bags, "Muon": bias_free}
RATE = 0.02
STEPS = 6

# Options by the name of the form; a form exists where the optimizer has all of its options.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one by one": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "maximize": {"maximize": True},
    "differentiable": {"differentiable": True},
    "tensor lr": {"lr": torch.tensor(RATE)},
}
# What only some optimizers know, in one column: each is tried on its own.
OWN: list[dict[str, Any]] = [
    {"weight_decay": 0.1},
    {"decoupled_weight_decay": True, "weight_decay": 0.1},
    {"momentum": 0.9},
    {"nesterov": True, "momentum": 0.9},
    {"amsgrad": True},
    {"centered": True},
    {"t0": 2.0, "lambd": 0.1},
    {"lr_decay": 0.1},
    {"etas": (0.4, 1.3)},
    {"history_size": 5},
]


def cells() -> list[Cell]:
    found = []
    for name in sorted(OPTIMIZERS):
        for form, options in FORMS.items():
            found.append(Cell("optimizers", name, form, functools.partial(_try, name, options)))
        found.append(Cell("optimizers", name, "own options", functools.partial(_try_own, name)))
    return found


def _try_own(name: str) -> str | None:
    own = [options for options in OWN if _knows(name, options)]
    if not own:
        raise UnavailableError("torch has no such form of this optimizer")
    reasons = {_try(name, options) for options in own}
    (reason,) = reasons
    return reason


def _knows(name: str, options: Mapping[str, Any]) -> bool:
    return set(options) <= set(inspect.signature(OPTIMIZERS[name]).parameters)


def _try(name: str, options: Mapping[str, Any]) -> str | None:
    if not _knows(name, options):
        raise UnavailableError("torch has no such form of this optimizer")
    make = functools.partial(_optimizer, name, options)
    if name in REFUSED:
        return _refused(name, make)
    model = _model(name)
    try:
        bare = _train(model, make(model.parameters()))
    except Exception as error:  # of torch alone: whatever it does not take
        raise UnavailableError(f"torch: {error}") from error
    model = _model(name)
    inner = make(model.parameters())
    _train(model, DensityLR(inner, model, every=2))
    assert (found := difference((model, inner), bare)) is None, f"flat rates change {found}"
    _scaled(name, make, bare)
    return None


def _scaled(name: str, make: Callable[[Any], Optimizer], flat: tuple[nn.Module, Optimizer]) -> None:
    runs = []
    for split in (True, False):
        model = _model(name)
        stages = find_stages(model)
        owners = {n: s.name for s in stages.values() for n in s.parameters}
        scales = dict(zip(stages, (0.25, 2.0, 1.0), strict=False))
        lr = make(model.parameters()).param_groups[0]["lr"]
        inner = make(split_by_stage(model, list(stages), owners, scales, lr, split))
        optimizer = inner if split else DensityLR(inner, model, policy=Fixed(scales), every=2)
        rates = [float(group["lr"]) for group in inner.param_groups]
        runs.append((_train(model, optimizer)[0], inner))
        assert [float(group["lr"]) for group in inner.param_groups] == rates
    assert (found := difference(runs[1], runs[0])) is None, f"not as real groups: {found}"
    assert difference(runs[1], flat) is not None, "the scales do nothing"


def _refused(name: str, make: Callable[[Any], Optimizer]) -> str:
    model = _model(name)
    inner = make(model.parameters())
    why = refusal(lambda: DensityLR(inner, model))
    assert REFUSED[name] in why
    assert not hooks_of(model)
    assert not inner._optimizer_step_pre_hooks
    return why


def _model(name: str) -> nn.Module:
    return MODELS.get(name, net)()


def _optimizer(name: str, options: Mapping[str, Any], parameters: Any) -> Optimizer:
    return OPTIMIZERS[name](parameters, **{"lr": RATE, **options})


def _train(model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(9)
    for batch in batches(STEPS):
        one_step(model, optimizer, batch)
    return model, optimizer
