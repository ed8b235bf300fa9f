"""A short training under ``torch.compile`` whose graphs are counted, and what it is compared by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from densitylr import DensityLR
from tests.support.fixed import batches

__all__ = ["CompiledRun", "close_parameters", "same_readings"]


class CompiledRun:
    """A short training; what was compiled is counted."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        backend: str | None = None,
        *,
        model: bool = False,
        step: bool = False,
        wrap: bool = True,
        after: bool = False,
        in_place: bool = False,
        fullgraph: bool = True,
        steps: int = 12,
        **options: Any,
    ) -> None:
        torch._dynamo.reset()
        counters.clear()
        self.model = make()
        call, self.graphs = self.model, CompileCounterWithBackend(backend or "eager")
        if model and in_place:
            self.model.compile(backend=self.graphs, fullgraph=fullgraph)
        elif model:
            call = torch.compile(self.model, backend=self.graphs, fullgraph=fullgraph)
        inner = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)
        self.optimizer: Any = inner
        if wrap:
            self.optimizer = DensityLR(inner, call if after else self.model, every=2, **options)
        take = self.optimizer.step
        self.steps_compiled = CompileCounterWithBackend(backend or "eager")
        if step:
            take = torch.compile(take, backend=self.steps_compiled)
        self.seen: list[tuple[int, int]] = []
        for x, y in batches(steps):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(call(x), y).backward()
            take()
            self.seen.append((self.graphs.frame_count, self.steps_compiled.frame_count))

    @property
    def readings(self) -> list[Any]:
        readings: list[Any] = self.optimizer.history.readings
        return readings


def same_readings(ours: list[Any], theirs: list[Any]) -> None:
    assert [r.step for r in ours] == [r.step for r in theirs]
    assert ours
    for mine, other in zip(ours, theirs, strict=True):
        for name, seen in mine.stages.items():
            expected = other.stages[name]
            assert (seen.count, seen.estimator) == (expected.count, expected.estimator)
            assert seen.count
            for number in ("rms", "rms0", "mean"):
                a, b = getattr(seen, number), getattr(expected, number)
                assert math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3), (name, number, a, b)
            # An output on the very edge of "near zero" may be rounded over it.
            for share in ("near_zero", "untrained"):
                a, b = (getattr(r, share) * seen.count for r in (seen, expected))
                assert abs(a - b) < 2.5, (name, share, a, b)


def close_parameters(ours: nn.Module, theirs: nn.Module, atol: float = 1e-5) -> None:
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, 1e-4, atol), f"{name}: {(a - b).detach().abs().max():.3g}"
