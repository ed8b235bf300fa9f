"""The monitor's hooks on a model: they hold it weakly, and cost a look while nothing is due."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from densitylr.opaque import Opaque, below, call
from densitylr.twin import first_tensor

if TYPE_CHECKING:
    from densitylr.monitor import DensityMonitor

__all__ = ["RootHook", "TapHook", "inert_hook"]


class TapHook:
    """A forward hook that does not keep the monitor alive, and is inert in a copied model."""

    def __init__(self, monitor: DensityMonitor, tap: str) -> None:
        self.monitor = weakref.ref(monitor)
        self.tap = tap
        self.opaque = Opaque(self, monitor._order)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling():
            call(self.opaque, args, kwargs, first_tensor(output))
        else:
            self.run(args, kwargs, output)

    def idle(self) -> bool:
        monitor = self.monitor()
        return monitor is None or not monitor.wants(self.tap)

    def run(self, args: Any, kwargs: Any, output: Any) -> None:
        monitor = self.monitor()
        if monitor is not None and monitor.wants(self.tap):
            below(monitor._read, self.tap, args, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return inert_hook, ()


class RootHook:
    """Counts training forwards of the whole model, for a monitor that drives itself."""

    def __init__(self, monitor: DensityMonitor, after: bool) -> None:
        self.monitor = weakref.ref(monitor)
        self.after = after
        self.opaque = Opaque(self, monitor._order)

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if torch.compiler.is_compiling():
            call(self.opaque, (), {}, None)
        else:
            self.run((), {}, None)

    def idle(self) -> bool:
        return False

    def run(self, args: Any, kwargs: Any, output: Any) -> None:
        monitor = self.monitor()
        if monitor is not None:
            below(monitor._forward_ended if self.after else monitor._forward_began)

    def __reduce__(self) -> tuple[Any, ...]:
        return inert_hook, ()


def _nothing(*args: Any) -> None:
    """What a copied or unpickled hook does."""


def inert_hook() -> Any:
    return _nothing
