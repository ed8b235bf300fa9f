"""What happens to models and optimizers in the course of their lives.

Parameters that come later, thaw or freeze, that belong to two layers, and copies of all kinds.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from densitylr import DensityLR
from tests.matrix.cells import Cell, refusal
from tests.matrix.nets import difference
from tests.support.fixed import Fixed, batches, hooks_of, net, numbers_of, one_step, same

__all__ = ["cells"]

SCALES = {"0": 0.25, "3": 2.0, "5": 1.0}
STEPS = 9

Act = Callable[[nn.Module, Optimizer], None]


def cells() -> list[Cell]:
    found = []
    for name, (start, act) in CHANGES.items():
        for kind, scaled in (("flat rates", False), ("scaled", True)):
            run = functools.partial(_changed, start, act, scaled)
            found.append(Cell("parameters", name, kind, run))
    for name, run in COPIES.items():
        found.append(Cell("copies", name, "outcome", run))
    return found


# Parameters that change in the midst of a run, after the third step


def _changed(start: tuple[int, ...], act: Act, scaled: bool) -> None:
    """Against the same life of a bare optimizer, of real parameter groups where scaled."""
    runs = []
    for wrap in (False, True):
        model = Tied() if act is _nothing else net()
        inner = _optimizer(model, start, split=scaled and not wrap)
        optimizer: Any = inner
        if wrap and scaled:
            optimizer = DensityLR(inner, model, policy=Fixed(SCALES), every=2)
        elif wrap:
            optimizer = DensityLR(inner, model, every=2)
        for step, batch in enumerate(batches(STEPS)):
            if step == 3:
                act(model, optimizer)
                if scaled and not wrap:
                    _scale(model, inner)
            one_step(model, optimizer, batch)
        runs.append((model, inner))
    assert (found := difference(runs[1], runs[0])) is None, found
    assert len(optimizer.history) == STEPS + (act is _freeze_and_thaw)
    if act is _thaw:  # it may need to be raised now: it must be known how it was
        assert optimizer.history.readings[-1].stages["0"].estimator == "twin"
    assert optimizer.history.series("0", "rate")[-1] == (0.0 if act is _freeze else 0.05)


def _optimizer(model: nn.Module, children: tuple[int, ...], split: bool) -> Optimizer:
    """Over some children; the others are frozen."""
    parts = [list(model[i].parameters()) for i in children]  # type: ignore[index]
    held = {id(p) for part in parts for p in part}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in held)
    groups: Any = [{"params": p} for p in parts] if split else [p for part in parts for p in part]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    if split:
        _scale(model, optimizer)
    return optimizer


def _scale(model: nn.Module, optimizer: Optimizer) -> None:
    """Real groups at the rates of their stages."""
    factors = {
        id(p): SCALES["0" if i == "1" else i]
        for i, child in model.named_children()
        for p in child.parameters()
        if i != "tied"
    }
    for group in optimizer.param_groups:
        group["lr"] = 0.05 * factors[id(group["params"][0])]


def _add(child: int, model: nn.Module, optimizer: Optimizer) -> None:
    parameters = list(model[child].parameters())  # type: ignore[index]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer.add_param_group({"params": parameters, "lr": 0.05})


def _thaw(model: nn.Module, optimizer: Optimizer) -> None:
    """Two stages, which enter the optimizer one after the other."""
    model.requires_grad_()
    for child in (3, 0, 1):
        _add(child, model, optimizer)


def _thaw_held(model: nn.Module, optimizer: Optimizer) -> None:
    model.requires_grad_()


def _freeze(model: nn.Module, optimizer: Optimizer) -> None:
    for child in (0, 1):
        model[child].requires_grad_(False)  # type: ignore[index]
        for parameter in model[child].parameters():  # type: ignore[index]
            parameter.grad = None


def _freeze_and_thaw(model: nn.Module, optimizer: Optimizer) -> None:
    _freeze(model, optimizer)
    one_step(model, optimizer, batches(1, seed=8)[0])
    model.requires_grad_()


def _through_inner(model: nn.Module, optimizer: Optimizer) -> None:
    _add(3, model, optimizer.inner if isinstance(optimizer, DensityLR) else optimizer)


def _nothing(model: nn.Module, optimizer: Optimizer) -> None:
    """Tied from the start."""


class Tied(nn.Sequential):
    """`net` with its last layer at work twice: a parameter of two places, a layer of two calls."""

    def __init__(self) -> None:
        super().__init__(*net())
        self.tied = self[5]

    def forward(self, x: Tensor) -> Tensor:
        for child in list(self)[:5]:
            x = child(x)
        result: Tensor = self[5](x) + self.tied(x.flip(1))
        return result


CHANGES: dict[str, tuple[tuple[int, ...], Act]] = {
    "a group added later": ((0, 1, 5), functools.partial(_add, 3)),
    "a group added later, to the inner": ((0, 1, 5), _through_inner),
    "two stages thaw and are added": ((5,), _thaw),
    "frozen later": ((0, 1, 3, 5), _freeze),
    "frozen and thawed": ((0, 1, 3, 5), _freeze_and_thaw),
    "shared by two layers": ((0, 1, 3, 5), _nothing),
}


# Copies


def _made() -> tuple[nn.Module, DensityLR]:
    model = net()
    optimizer = DensityLR(torch.optim.SGD(model.parameters(), lr=0.05), model, policy=Fixed(SCALES))
    for batch in batches(3):
        one_step(model, optimizer, batch)
    return model, optimizer


def _inert(model: nn.Module, optimizer: DensityLR, copied: nn.Module) -> None:
    """A copy is the model, trains by itself, and is not read."""
    assert same(model, copied)
    readings, before = len(optimizer.history), copy.deepcopy(model.state_dict())
    bare = torch.optim.SGD(copied.parameters(), lr=0.05)
    for batch in batches(6):
        one_step(copied, bare, batch)
    assert len(optimizer.history) == readings
    assert numbers_of(model.state_dict()) == numbers_of(before)
    assert not same(model, copied)
    for batch in batches(6):
        one_step(model, optimizer, batch)
    assert optimizer.history.readings[-1].stages["0"].count == 16 * 16
    DensityLR(bare, copied, pretrained=False)  # a copy can be wrapped anew


def _copied_model() -> None:
    model, optimizer = _made()
    _inert(model, optimizer, copy.deepcopy(model))
    model, optimizer = _made()
    _inert(model, optimizer, pickle.loads(pickle.dumps(model)))


def _copied_optimizer(attempt: Callable[[Any], Any]) -> str:
    model, optimizer = _made()
    why = refusal(lambda: attempt(optimizer))
    one_step(model, optimizer, batches(1)[0])
    assert optimizer.scales == SCALES
    return why


def _copied_pair() -> None:
    """The model with the user's own optimizer: a bare pair, at the user's rates."""
    model, optimizer = _made()
    twin, bare = copy.deepcopy((model, optimizer.inner))
    reference = net()
    reference.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(reference.parameters(), lr=0.05)
    for batch in batches(3):
        one_step(twin, bare, batch)
        one_step(reference, plain, batch)
    assert same(twin, reference)


_LOADING = """
import sys, torch
from tests.support.fixed import batches, loss_of
model = torch.load(sys.argv[1] + "/model", weights_only=False)
for batch in batches(2):
    loss_of(model, batch).backward()
torch.save({n: p.grad for n, p in model.named_parameters()}, sys.argv[1] + "/gradients")
"""


def _new_process() -> None:
    """Saved whole, between a reading's forward and its step, and used elsewhere."""
    model, optimizer = _made()
    model(batches(1)[0][0])
    with tempfile.TemporaryDirectory() as name:
        torch.save(model, Path(name) / "model")
        # Bit for bit the same only with as many threads.
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-c", _LOADING, name]
        subprocess.run(command, check=True, env={**os.environ, **threads})
        found = torch.load(Path(name) / "gradients")
    copied = copy.deepcopy(model)
    for x, y in batches(2):
        nn.functional.cross_entropy(copied(x), y).backward()
    for parameter_name, parameter in copied.named_parameters():
        assert torch.equal(parameter.grad, found[parameter_name])
    assert optimizer.scales == SCALES


def _one_a_stage() -> str:
    """An optimizer for each stage, as where the step is taken during backward."""
    model = net()
    first = torch.optim.SGD(model[:3].parameters(), lr=0.1)
    why = refusal(lambda: DensityLR(first, model))
    assert not hooks_of(model)
    assert not first._optimizer_step_pre_hooks
    return why


def _two_models() -> None:
    """Two models, two wrappers, one process: neither sees the other."""
    (a, first), (b, second) = _made(), _made()
    for batch in batches(4, seed=6):
        one_step(a, first, batch)
    assert len(second.history) < len(first.history)
    for batch in batches(4, seed=6):
        one_step(b, second, batch)
    assert same(a, b)


def _closed() -> None:
    model, optimizer = _made()
    optimizer.close()
    assert not hooks_of(model)
    copied, plain = copy.deepcopy((model, optimizer.inner))
    for batch in batches(3):
        one_step(model, optimizer, batch)
        one_step(copied, plain, batch)
    assert same(model, copied)


COPIES: dict[str, Callable[[], str | None]] = {
    "deepcopy and pickle of the model": _copied_model,
    "deepcopy of the wrapper": functools.partial(_copied_optimizer, copy.deepcopy),
    "pickle of the wrapper": functools.partial(_copied_optimizer, pickle.dumps),
    "deepcopy of model and inner": _copied_pair,
    "torch.save(model), a new process": _new_process,
    "one optimizer a stage": _one_a_stage,
    "two models, two wrappers": _two_models,
    "closed": _closed,
}
