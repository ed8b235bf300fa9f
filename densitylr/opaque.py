"""Hooks where torch transforms the code they stand in: ``torch.compile`` and ``torch.func``.

A hook that is traced becomes part of the graph, with a guard on everything it reads: the graph is
compiled again whenever a probe begins, a twin is made or let go. A hook that is not traced breaks
the graph in two. So a traced hook calls an operator instead, and what the hook does is done when
the graph runs: one graph, no breaks, nothing compiled again, and the readings are made by the very
code that makes them without a compiler.

Under ``torch.func.grad`` tensors are wrapped, and nothing may be written into one from outside:
what the hook does is done `below` the transform, on the tensors themselves.
"""

from __future__ import annotations

import ast
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Opaque", "below", "call"]

_LIBRARY = torch.library.Library("densitylr", "DEF")
# What writes into an argument is neither left out, nor moved, nor computed twice: nothing is
# ever written into ``order``, which all hooks of a monitor share.
_LIBRARY.define(
    "hook(Tensor[] tensors, str[] names, str[] constants, int number, str dtype, Tensor(a!) order)"
    " -> ()",
    # A captured CUDA graph replays kernels and would never come back to Python.
    tags=[t for t in [getattr(torch.Tag, "cudagraph_unsafe", None)] if t is not None],
)


class _Hook(Protocol):
    def idle(self) -> bool:
        """Whether there is nothing to do at this call."""

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """What the hook does at a call; kept from the compiler."""


class Opaque:
    """A hook's place in a graph: a number, and a tensor that keeps the hooks in their order.

    Args:
        hook: what is run; it is not kept alive.
        order: one tensor for all hooks whose order matters.
    """

    def __init__(self, hook: _Hook, order: Tensor) -> None:
        self.number = next(_NUMBERS)
        self.order = order
        _HOOKS[self.number] = hook


_NUMBERS = itertools.count()
_HOOKS: weakref.WeakValueDictionary[int, _Hook] = weakref.WeakValueDictionary()


def call(
    opaque: Opaque, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor | None
) -> None:
    """Call ``opaque``'s hook when the graph runs that is being traced now.

    Args:
        opaque: the hook's place.
        args, kwargs: of the module's call. Tensors, and what Python can write down as a literal,
            reach the hook; other arguments do not.
        output: the tensor to be read.
    """
    # Written so that torch 2.7 can trace it, which knows no unions, of dictionaries or of types.
    given = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    if output is not None:
        given["output of the module"] = output
    tensors = {name: v.detach() for name, v in given.items() if isinstance(v, Tensor)}
    literals = {name: repr(v) for name, v in given.items() if _is_literal(v)}
    dtype = ""
    kind = output.device.type if output is not None else "cpu"
    if torch.is_autocast_enabled(kind):  # the graph is run without autocast
        dtype = str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
    torch.ops.densitylr.hook(
        list(tensors.values()),
        [*tensors, *literals],
        list(literals.values()),
        opaque.number,
        dtype,
        opaque.order,
    )


def _is_literal(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_literal(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


@torch.library.impl(_LIBRARY, "hook", "CompositeExplicitAutograd")  # type: ignore[untyped-decorator]
@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch 2.7 would compile it
def _run(
    tensors: list[Tensor],
    names: list[str],
    constants: list[str],
    number: int,
    dtype: str,
    order: Tensor,
) -> None:
    hook = _HOOKS.get(number)
    if hook is None or hook.idle():
        return
    values = [*tensors, *map(ast.literal_eval, constants)]
    given = dict(zip(names, values, strict=True))
    output = given.pop("output of the module", None)
    places = sorted((name for name in given if name.isdecimal()), key=int)
    args = tuple(given.pop(place) for place in places)
    kind = output.device.type if output is not None else "cpu"
    with torch.autocast(kind, getattr(torch, dtype, None), enabled=bool(dtype)):
        hook.run(args, given, output)


@torch.library.register_fake("densitylr::hook", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake(
    tensors: list[Tensor],
    names: list[str],
    constants: list[str],
    number: int,
    dtype: str,
    order: Tensor,
) -> None:
    """Nothing comes out of it."""


def below(act: Callable[..., None], *operands: Any) -> None:
    """``act(*operands)``, outside of all transforms of ``torch.func``; under ``vmap`` not at all.

    What ``vmap`` maps over is no batch that the layers of a model can be called with.
    """
    if torch._C._are_functorch_transforms_active():
        _Below.apply(act, *operands)
    else:
        act(*operands)


class _Below(torch.autograd.Function):
    """torch calls ``forward`` with the tensors inside its wrappers. Nothing comes out of it."""

    @staticmethod
    def forward(act: Callable[..., None], *operands: Any) -> Tensor:
        act(*operands)
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)
        ctx.operands = len(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return (None,) * ctx.operands

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, None]:
        return torch.empty(0), None
