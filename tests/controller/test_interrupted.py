"""A step that is interrupted anywhere leaves the user's groups and rates."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from densitylr import DensityLR
from tests.support import ROOT
from tests.support.fixed import Fixed, batches, loss_of, net

OURS = {str(ROOT / "densitylr/controller" / name) for name in ("step.py", "param_groups.py")}
SCALES = {"0": 0.25, "3": 2.0, "5": 4.0}
PARTS = ((0, 3), (3, 5), (5, 6))
(DATA,) = batches(1)


class Interrupt(BaseException):
    """As KeyboardInterrupt, which nobody catches."""


class At:
    """Raises `Interrupt` before the n-th line of ours that is executed within it."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __enter__(self) -> At:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: Any, event: str, arg: Any) -> Any:
        code = frame.f_code  # a comprehension writes nothing, and has many lines
        return self._line if code.co_filename in OURS and code.co_name[0] != "<" else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise Interrupt
        return self._line


def begin(split: bool) -> tuple[nn.Module, torch.optim.SGD]:
    """Groups of one stage each, or of several."""
    model = net()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    parts = (matrices, vectors) if split else [list(model[i:j].parameters()) for i, j in PARTS]
    groups = [{"params": p, "lr": 0.08 / 2**i} for i, p in enumerate(parts)]
    return model, torch.optim.SGD(groups, momentum=0.9)


def scheduled(optimizer: Any) -> Any:
    return lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9)


def rates_of(optimizer: Any) -> list[Any]:
    return [group["lr"] for group in optimizer.param_groups]


def rates_from_here(optimizer: Any, scheduler: Any) -> list[list[Any]]:
    """The rates in the next twenty steps, with the gradients of the last one."""
    # A reading that was interrupted goes on with the next forward; there is none here.
    warnings.filterwarnings("ignore", "10 steps were taken without a training forward")
    found = []
    for _ in range(20):
        optimizer.step()
        scheduler.step()
        found.append(rates_of(optimizer))
    return found


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("step_inner", [False, True])
def test_a_step_may_be_interrupted_at_any_line(
    split: bool, with_closure: bool, step_inner: bool
) -> None:
    bare_model, bare = begin(split)
    loss_of(bare_model, DATA).backward()
    expected = rates_from_here(bare, scheduled(bare))
    n, raised = 0, True
    while raised:
        n += 1
        model, inner = begin(split)
        wrapped = DensityLR(inner, model, policy=Fixed(SCALES), every=60, pretrained=False)
        stepped = inner if step_inner else wrapped
        scheduler = scheduled(stepped)
        groups, own, members = wrapped.param_groups, [*wrapped.param_groups], contents(wrapped)
        before = rates_of(wrapped)

        def closure(model: nn.Module = model, wrapped: DensityLR = wrapped) -> Tensor:
            wrapped.zero_grad()
            loss = loss_of(model, DATA)
            loss.backward()
            return loss

        closure()
        raised = False
        try:
            with At(n):
                stepped.step(*[closure] * with_closure)
        except Interrupt:
            raised = True
        if raised and step_inner:
            # Nobody can tell who looks now. The next step puts it right.
            stepped.step()
        assert wrapped.param_groups is groups, n
        assert all(now is then for now, then in zip(groups, own, strict=True)), n
        assert all(now is then for now, then in zip(rates_of(wrapped), before, strict=True)), n
        assert contents(wrapped) == members, n
        assert rates_from_here(stepped, scheduler) == expected, n
        assert contents(wrapped) == members, n
        assert wrapped.scales == SCALES
        wrapped.close()
    assert n > 40


def interrupt(*_: Any) -> None:
    raise Interrupt


def contents(optimizer: Any) -> list[Any]:
    """All that is in the groups but for the rates, parameters by identity."""
    return [
        {k: list(map(id, v)) if k == "params" else v for k, v in group.items() if k != "lr"}
        for group in optimizer.param_groups
    ]


def test_groups_that_were_replaced_after_a_step_had_failed_are_meant() -> None:
    """As a checkpoint does that is loaded into the user's own optimizer."""
    model, inner = begin(split=False)
    wrapped = DensityLR(inner, model, policy=Fixed(SCALES))
    saved = inner.state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    loss_of(model, DATA).backward()
    handle = inner.register_step_pre_hook(interrupt)
    with pytest.raises(Interrupt):
        inner.step()
    handle.remove()
    assert rates_of(inner) == [0.02, 0.08, 0.08]  # nobody has looked
    inner.load_state_dict(saved)
    loss_of(model, DATA).backward()
    inner.step()
    assert rates_of(wrapped) == [0.5, 0.04, 0.02]
