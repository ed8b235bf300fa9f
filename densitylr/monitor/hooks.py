"""The monitor's hooks on a model, in eager mode and where torch transforms the code they stand in.

They hold the monitor by weak reference and cost a few attribute checks when no reading is due.

A hook that ``torch.compile`` traces becomes part of the graph, with a guard on everything it reads:
the graph would be compiled again whenever a reading begins, or a twin is released. A hook that is
not traced breaks the graph in two. So a traced hook calls an operator instead, and what the hook
does is done when the graph runs: one graph, no breaks, nothing compiled again, and the readings are
made by the very code that makes them without a compiler.

Under ``torch.func.grad`` tensors are wrapped, and nothing may be written into one from outside:
what the hook does is done outside the transform (`outside_transforms`), on the tensors themselves.
"""

from __future__ import annotations

import ast
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["ForwardCounter", "LayerHook", "Watcher", "first_tensor", "inert_hook"]


def first_tensor(output: object) -> Tensor | None:
    """The first floating-point tensor in a module's output: a tensor, tuple, list or mapping.

    Of a ragged (nested, jagged) one its values, the rows of all examples one after the other.
    """
    if isinstance(output, Tensor):
        if output.is_nested:
            ragged = output.layout is torch.jagged and output.is_contiguous()
            return first_tensor(output.values()) if ragged else None
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        for item in output:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


class Watcher(Protocol):
    """What a hook calls during forward passes."""

    order: Tensor
    """One tensor for all hooks of a monitor, which keeps them in their order in a graph."""

    armed: bool
    """The next training forward of every layer is to be read …"""

    watched: frozenset[str]
    """… or else only that of these layers."""

    def read(self, layer: str, args: Any, kwargs: Any, output: Any) -> None:
        """Read it."""

    def fail(self, doing: str, error: Exception) -> None:
        """Reading it raised an error."""

    def forward_began(self) -> None:
        """A training forward of the whole model begins."""

    def forward_ended(self) -> None:
        """It has ended."""


class LayerHook:
    """A forward hook that does not keep the monitor alive, and is inert in a copied model."""

    def __init__(self, watcher: Watcher, layer: str) -> None:
        self.watcher = weakref.ref(watcher)
        self.layer = layer
        self.place = GraphPlace(self, watcher.order)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling():
            call_in_graph(self.place, args, kwargs, first_tensor(output))
        else:
            self.run(args, kwargs, output)

    def idle(self) -> bool:
        watcher = self.watcher()
        return watcher is None or not (watcher.armed or self.layer in watcher.watched)

    def run(self, args: Any, kwargs: Any, output: Any) -> None:
        watcher = self.watcher()
        if watcher is not None and (watcher.armed or self.layer in watcher.watched):
            doing = f"reading the outputs of {self.layer}"
            _tell(watcher, doing, watcher.read, self.layer, args, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return inert_hook, ()


class ForwardCounter:
    """Counts training forwards of the whole model, for a monitor that drives itself."""

    def __init__(self, watcher: Watcher, after: bool) -> None:
        self.watcher = weakref.ref(watcher)
        self.after = after
        self.place = GraphPlace(self, watcher.order)

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling():
            call_in_graph(self.place, (), {}, None)
        else:
            self.run((), {}, None)

    def idle(self) -> bool:
        return False

    def run(self, args: Any, kwargs: Any, output: Any) -> None:
        watcher = self.watcher()
        if watcher is not None:
            act = watcher.forward_ended if self.after else watcher.forward_began
            _tell(watcher, "the reading", act)

    def __reduce__(self) -> tuple[Any, ...]:
        return inert_hook, ()


def _tell(watcher: Watcher, doing: str, act: Callable[..., None], *operands: Any) -> None:
    """Errors of a hook do not reach the forward pass, except warnings that are to be raised."""
    try:
        outside_transforms(act, *operands)
    except Warning:
        raise
    except Exception as error:
        watcher.fail(doing, error)


def _nothing(*args: Any) -> None:
    """What a copied or unpickled hook does."""


def inert_hook() -> Any:
    return _nothing


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


class GraphPlace:
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


def call_in_graph(
    place: GraphPlace, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor | None
) -> None:
    """Call ``place``'s hook when the graph runs that is being traced now.

    Args:
        place: the hook's place.
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
        place.number,
        dtype,
        place.order,
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


def outside_transforms(act: Callable[..., None], *operands: Any) -> None:
    """``act(*operands)``, outside of all transforms of ``torch.func``; under ``vmap`` not at all.

    What ``vmap`` maps over is no batch that the layers of a model can be called with.
    """
    if torch._C._are_functorch_transforms_active():
        _Outside.apply(act, *operands)
    else:
        act(*operands)


class _Outside(torch.autograd.Function):
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
