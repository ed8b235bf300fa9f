"""A copy of everything that training writes into, and the way back to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from densitylr.policy import LawState

__all__ = ["Snapshot", "finite"]


class Snapshot:
    """A copy of parameters, buffers and optimizer state, and of what goes with them."""

    def __init__(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        rates: Mapping[str, float],
        law: LawState,
    ) -> None:
        self.step, self.rates, self.law = step, rates, law
        self.acted: Mapping[str, float] = rates  # the largest until then
        self.top = 0.0  # the user's largest rate in the steps just before
        self.tensors = {n: t.detach().clone() for n, t in _tensors(model, optimizer)}
        self.state = {
            at: {k: _clone(v) for k, v in optimizer.state[p].items()}
            for at, p in _members(optimizer)
            if p in optimizer.state
        }

    def current(self, model: nn.Module, optimizer: Optimizer) -> bool:
        """Whether the parameters are those of the snapshot."""
        buffers = dict(model.named_buffers())
        return all(
            torch.equal(self.tensors[name], tensor)
            for name, tensor in _tensors(model, optimizer)
            if name in self.tensors and name not in buffers
        )

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Write it back in place: no parameter, buffer or state tensor is replaced."""
        for name, tensor in _tensors(model, optimizer):
            saved = self.tensors.get(name)
            if saved is not None and saved.shape == tensor.shape:
                tensor.copy_(saved)
        for at, p in _members(optimizer):
            if at not in self.state:
                optimizer.state.pop(p, None)
                continue
            now, then = optimizer.state[p], self.state[at]
            for key in now.keys() - then.keys():
                del now[key]
            for key, value in then.items():
                if isinstance(value, Tensor) and isinstance(now.get(key), Tensor):
                    now[key].copy_(value)
                else:
                    now[key] = _clone(value)


@torch.no_grad()
def finite(model: nn.Module, optimizer: Optimizer) -> bool:
    """Whether this is worth going back to; buffers are not asked, as a mask may be infinite."""
    held: list[Any] = list({*model.parameters(), *(p for _, p in _members(optimizer))})
    held += [v for p in held if p in optimizer.state for v in optimizer.state[p].values()]
    read = [t for t in held if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    return bool(torch.isfinite(nn.utils.get_total_norm(read, math.inf)))


def _members(optimizer: Optimizer) -> Iterable[tuple[tuple[int, int], Tensor]]:
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            yield (g, i), p


def _tensors(model: nn.Module, optimizer: Optimizer) -> Iterable[tuple[Any, Tensor]]:
    """Everything that training writes into: of the model, and what else is optimized."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    own = {id(p) for p in model.parameters()}
    yield from ((at, p) for at, p in _members(optimizer) if id(p) not in own)


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)
