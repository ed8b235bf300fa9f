"""A copy of everything that training writes into, and the way back to it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from densitylr.history import Reading
from densitylr.policy import RunState

__all__ = ["Snapshot", "finite"]


class Snapshot:
    """A copy of parameters, buffers and optimizer state, and of what goes with them.

    Args:
        step: of the reading that found them healthy.
        model: whose parameters and buffers.
        optimizer: whose state, and whatever parameters the model lacks.
        rates: the rate in force of each stage.
        run: where the policy stood.
        room: a snapshot that is no longer needed; its memory is written over, as fresh memory
            costs more than what is copied into it.
    """

    def __init__(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        rates: Mapping[str, float],
        run: RunState,
        room: Snapshot | None = None,
    ) -> None:
        self.step, self.rates, self.run = step, rates, run
        self.undecided: frozenset[str] = frozenset()  # stages whose scale was to be found …
        self.waiting: frozenset[str] = frozenset()  # … or may still have been raised
        self.max_effective_lr: Mapping[str, float] = rates  # until then
        self.top = 0.0  # the user's largest rate in the steps just before
        self.recent: tuple[Reading, ...] = ()  # the last healthy readings
        tensors: dict[Any, Tensor] = {} if room is None else room.tensors
        states: dict[Any, dict[str, Any]] = {} if room is None else room.state
        self.tensors: dict[Any, Tensor] = {
            n: _copy(t, tensors.get(n)) for n, t in _tensors(model, optimizer)
        }
        self.state: dict[Any, dict[str, Any]] = {
            at: {k: _copy(v, states.get(at, {}).get(k)) for k, v in optimizer.state[p].items()}
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
                    now[key] = _copy(value)


@torch.no_grad()
def finite(model: nn.Module, optimizer: Optimizer) -> bool:
    """Whether this is worth going back to; buffers are not asked, as a mask may be infinite."""
    held: list[Any] = list({*model.parameters(), *(p for _, p in _members(optimizer))})
    held += [v for p in held if p in optimizer.state for v in optimizer.state[p].values()]
    read = [t for t in held if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    # A sum is a third of the price of looking at each element, and as good: no healthy one
    # overflows. It overflows in half precision.
    sums = [t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in read]
    return not sums or bool(torch.stack([s.to(sums[0]) for s in sums]).isfinite().all())


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


@torch.no_grad()
def _copy(value: Any, room: Any = None) -> Any:
    """A copy that shares nothing, in the memory of ``room`` if that is such a tensor."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    value = value.detach()
    if isinstance(room, Tensor) and value.layout is torch.strided and _like(room) == _like(value):
        return room.copy_(value)
    return value.clone()


def _like(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride() if tensor.layout is torch.strided else None  # sparse ones have none
    return type(tensor), tensor.shape, strides, tensor.dtype, tensor.device
