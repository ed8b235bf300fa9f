"""A GPU, where there is one: the same comparisons with model, batches and statistics on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from densitylr import DensityLR, find_stages
from tests.matrix.cells import Cell, UnavailableError
from tests.matrix.nets import difference
from tests.support.fixed import Fixed, batches, loss_of, net

__all__ = ["cells"]

STEPS = 6
FORMS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "tensor lr": {"lr": torch.tensor(0.02), "foreach": True},
    "bfloat16 autocast": {},
    "float16, GradScaler": {},
}


def cells() -> list[Cell]:
    runs: Mapping[str, Callable[[str], None]] = {"flat rates": _flat, "scaled": _scaled}
    return [
        Cell("on a GPU, AdamW", form, column, functools.partial(_on_gpu, run, form))
        for form in FORMS
        for column, run in runs.items()
    ]


def _on_gpu(run: Callable[[str], None], form: str) -> None:
    if not torch.cuda.is_available():
        raise UnavailableError("there is no GPU on this machine")
    run(form)


def _train(form: str, model: nn.Module, optimizer: Any) -> None:
    dtype = {"bfloat16 autocast": torch.bfloat16, "float16, GradScaler": torch.float16}.get(form)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            loss = loss_of(model, (x.cuda(), y.cuda()))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def _optimizer(form: str, parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, **{"lr": 0.02, **FORMS[form]})


def _flat(form: str) -> None:
    runs = []
    for wrap in (False, True):
        model = net().cuda()
        inner = _optimizer(form, model.parameters())
        _train(form, model, DensityLR(inner, model, every=2) if wrap else inner)
        runs.append((model, inner))
    assert (found := difference(runs[1], runs[0])) is None, f"flat rates change {found}"


def _scaled(form: str) -> None:
    runs = []
    for wrap in (False, True):
        model = net().cuda()
        stages = find_stages(model)
        scales = dict(zip(stages, (0.25, 2.0, 1.0), strict=True))
        groups: Any = [{"params": list(s.parameters.values())} for s in stages.values()]
        inner = _optimizer(form, model.parameters() if wrap else groups)
        if not wrap:
            for group, scale in zip(inner.param_groups, scales.values(), strict=True):
                group["lr"] = group["lr"] * scale
        optimizer = DensityLR(inner, model, policy=Fixed(scales), every=2) if wrap else inner
        _train(form, model, optimizer)
        runs.append((model, inner))
    assert (found := difference(runs[1], runs[0])) is None, f"not as real groups: {found}"
