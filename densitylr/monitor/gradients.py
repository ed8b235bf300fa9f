"""What is measured on gradients and weights: alignment, zero gradients, and norms.

Everything is read just before an optimizer step, and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densitylr.history import restored
from densitylr.model import Ranks, Stage
from densitylr.monitor.baseline import SAMPLE, Baseline, sample_weights
from densitylr.monitor.layers import even_stride
from densitylr.monitor.measure import row_dtype

__all__ = ["Alignment", "Norms", "StageNorms", "zero_gradients"]

LOOK, LOOK_UNPAIRED = 0.1, 0.4
"""Displacement below which a stage's gradients are looked at: one that has moved by that has some.
Without a twin small stages seem to move by 0.1 from batch to batch."""


class Alignment:
    """The cosine between the descent direction and the way that a stage's weights have come.

    Of each parameter a bounded sample is looked at, at each step; nothing waits for the device
    until a reading.

    Args:
        baseline: with the first weights of the stages that may be looked at.
        ranks: those that train the same model, whose means are put together.
        ascending: ids of parameters that go up their gradient (``maximize``).
    """

    def __init__(
        self, baseline: Baseline, ranks: Ranks | None = None, ascending: Collection[int] = ()
    ) -> None:
        self.ranks, self.ascending = ranks, ascending
        self._stages = baseline.stages
        self._first = dict(baseline.first_weights)
        self._strides: dict[tuple[str, str], int] = {}
        self._seen: Tensor | None = None  # [2, stages]: sums of cosines, and of how many

    @torch.no_grad()
    def add(self, names: Collection[str]) -> None:
        """Look at the gradients of the step that is about to be taken.

        Args:
            names: the stages of interest; one at least.
        """
        found = {n: self._cosine(n, stage) for n, stage in self._stages.items() if n in names}
        first = next(iter(found.values()))
        unseen = torch.full_like(first, math.nan)
        row = torch.stack([found.get(n, unseen).to(first.device) for n in self._stages])
        known = row.isfinite()
        seen = torch.stack([row.where(known, 0.0), known.to(row.dtype)])
        self._seen = seen if self._seen is None else self._seen.to(seen) + seen

    def take(self, step: int) -> dict[str, float]:
        """The mean cosines since the last call, NaN where none was known; empty if none was added.

        A collective, where several ranks train the model.
        """
        if self._seen is None:
            return {}
        found = self._seen.cpu().double().numpy()
        self._seen = None
        if self.ranks is not None:
            found = self.ranks.sums(found.ravel(), step).reshape(found.shape)
        pairs = zip(self._stages, *found.tolist(), strict=True)
        return {name: total / count if count else math.nan for name, total, count in pairs}

    def keep(self, names: Collection[str]) -> None:
        """Free the first weights of all other stages, which have no alignment from then on."""
        self._first = {name: first for name, first in self._first.items() if name in names}
        if not self._first:
            self._seen = None

    def state_dict(self) -> dict[str, Any]:
        """The first weights by stage and parameter, and what was added since the last reading."""
        sums, counts = ([], []) if self._seen is None else self._seen.tolist()
        return {
            "first_weights": {name: dict(first) for name, first in self._first.items()},
            "sums": dict(zip(self._stages, zip(sums, counts, strict=True), strict=False)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with where another run of such a model began; see `prepare`."""
        self.prepare(state)()

    def prepare(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check a state; the result has this compare with where another such run began.

        Args:
            state: of `state_dict`, or empty; of a stage whose first weights are None those at hand
                are kept.

        Raises:
            ValueError: it is damaged.
        """
        sums = restored(dict[str, tuple[float, float]], state.get("sums", {}))
        rows = [sums.get(name, (0.0, 0.0)) for name in self._stages]
        seen = torch.tensor(rows, dtype=torch.float64).T if sums else None
        kind = dict[str, dict[str, Tensor] | None]
        saved, own = restored(kind, state.get("first_weights", {})), self._first
        first = {
            name: own.get(name, {}) if saved[name] is None else _fitting(saved[name], stage)
            for name, stage in self._stages.items()
            if name in saved
        }

        def load() -> None:
            self._seen, self._first = seen, first

        return load

    def _cosine(self, name: str, stage: Stage) -> Tensor:
        """0-dim; NaN where there is no gradient to look at, or nothing has moved."""
        gradients, ways, first_weights = [], [], self._first.get(name, {})
        for n, parameter in stage.parameters.items():
            gradient, first = parameter.grad, first_weights.get(n)
            if gradient is None or gradient.is_sparse or first is None:
                continue
            stride = self._stride(name, n, parameter)
            now, down = sample_weights(parameter, stride), sample_weights(gradient, stride)
            if now.shape != first.shape:  # the parameter has been resized
                continue
            wide = torch.float32 if now.device.type == "mps" else torch.float64
            sign = -1 if id(parameter) in self.ascending else 1
            gradients.append(down.to(wide) * sign)
            ways.append(now.to(wide) - first.to(now.device, wide))
        if not ways:
            device = next(iter(stage.parameters.values())).device
            return torch.full((), math.nan, dtype=row_dtype(device), device=device)
        g, d = (torch.cat([part.to(ways[0].device) for part in s]) for s in (gradients, ways))
        return -g.dot(d) / (g.dot(g) * d.dot(d)).sqrt()

    def _stride(self, stage: str, name: str, parameter: Tensor) -> int:
        """Of the samples of a parameter; worked out once."""
        if (stage, name) not in self._strides:
            numbers = parameter.numel() * (2 if parameter.is_complex() else 1)
            self._strides[stage, name] = even_stride(numbers, SAMPLE)
        return self._strides[stage, name]


def _fitting(first: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
    """The first weights of parameters that are there, and of their shape."""
    own = stage.parameters
    return {
        n: weights.to(own[n].device)
        for n, weights in first.items()
        if n in own and weights.shape == sample_weights(own[n]).shape
    }


def zero_gradients(
    step: int,
    numbers: Mapping[str, Mapping[str, Any]],
    stages: Mapping[str, Stage],
    ranks: Ranks | None = None,
) -> set[str]:
    """The stages that no learning rate moves: all of their gradients are exactly zero.

    Before the first step nothing is looked at: behind a layer that starts from zeros every gradient
    is zero once. Of a stage that is alive one parameter is read, as a rule; of one that has moved
    by `LOOK`, or by `LOOK_UNPAIRED` without a twin, none is, so that nothing waits for the device.

    Args:
        step: optimizer steps done.
        numbers: ``displacement`` and ``estimator`` of each stage.
        stages: the stages by name.
        ranks: those that hold the other shards of the gradients, where each holds one.
    """
    limits = {n: LOOK if s["estimator"] == "twin" else LOOK_UNPAIRED for n, s in numbers.items()}
    looked = [n for n, s in numbers.items() if s["displacement"] < limits[n]]
    if not (step and looked):
        return set()
    counts = _counts([stages[name] for name in looked])
    if ranks is not None and ranks.sharded:
        counts = [int(total) for total in ranks.sums(counts, step)]
    return {
        name
        for name, present, alive in zip(looked, counts[::2], counts[1::2], strict=True)
        if present and not alive
    }


def _counts(stages: Sequence[Stage]) -> list[int]:
    """Of each stage, whether any gradient can be read here, and whether one is not all zeros."""
    gradients = [_smallest_first(stage) for stage in stages]
    first = [next(own, None) for own in gradients]
    alive = iter(_any_of([values for values in first if values is not None]))
    counts = []
    for smallest, larger in zip(first, gradients, strict=True):
        if smallest is None:
            counts += [0, 0]
        else:
            counts += [1, int(next(alive) or any(bool(values.any()) for values in larger))]
    return counts


def _smallest_first(stage: Stage) -> Iterator[Tensor]:
    """The gradients of a stage: the first is all that is read of one that is alive, as a rule."""
    for parameter in sorted(stage.parameters.values(), key=Tensor.numel):
        values = _values(parameter)
        if values is not None:
            yield values


def _any_of(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each holds anything but zeros; one copy to the host for each device."""
    places: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(i)
    found = [False] * len(tensors)
    for at in places.values():
        flags = torch.stack([tensors[i].any() for i in at]).tolist()
        for i, flag in zip(at, flags, strict=True):
            found[i] = flag
    return found


def _values(parameter: Tensor) -> Tensor | None:
    """What can be read of a gradient here; None where there is none."""
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    if hasattr(gradient, "to_local"):  # a shard: the others are elsewhere
        gradient = gradient.to_local()
    return gradient if gradient.numel() else None


class StageNorms(NamedTuple):
    """Euclidean norms over the weights of a stage; NaN where not known.

    Attributes:
        weight: of the weights.
        gradient: of their gradients.
        update: of their change since the last time, by step.
        alignment: cosine between the descent direction and that change.
    """

    weight: float = math.nan
    gradient: float = math.nan
    update: float = math.nan
    alignment: float = math.nan


class Norms:
    """Norms of weights, gradients and updates, for policies that ask for them.

    A stage's weights are its parameters of two dimensions or more, or all of them where it has
    none. Sums are in float64.

    Args:
        stages: the stages by name.
        gradients, updates: whether they are asked for; updates need a copy of the weights.
        ascending: ids of parameters that go up their gradient (``maximize``).
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        *,
        gradients: bool,
        updates: bool,
        ascending: Collection[int] = (),
    ) -> None:
        self.gradients, self.updates, self.ascending = gradients, updates, ascending
        self._weights = {name: _weights_of(stage) for name, stage in stages.items()}
        self._before: dict[str, list[Tensor]] = {}
        self._step = 0
        if updates:
            self._remember(0)

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, StageNorms]:
        """The norms of each stage, at a step; updates are those since the last call."""
        sums = {name: self._sums(name, weights) for name, weights in self._weights.items()}
        flat = [value for own in sums.values() for column in own for value in column]
        if not flat:
            return {name: StageNorms() for name in sums}
        device = flat[0].device
        numbers = iter(torch.stack([value.to(device) for value in flat]).tolist())  # one copy
        steps = step - self._step
        moved = bool(self._before) and steps > 0
        found = {}
        for name, own in sums.items():
            w, g, u, down = (
                sum(next(numbers) for _ in column) if column else math.nan for column in own
            )
            size = math.sqrt(g) * math.sqrt(u)
            found[name] = StageNorms(
                math.sqrt(w),
                math.sqrt(g) if self.gradients else math.nan,
                math.sqrt(u) / steps if moved else math.nan,
                down / size if moved and size > 0 else math.nan,
            )
        if self.updates:
            self._remember(step)
        return found

    def forget(self) -> None:
        """The weights were put elsewhere: there is no update until `measure` was called again."""
        self._before = {}

    def _sums(self, name: str, weights: list[Tensor]) -> tuple[list[Tensor], ...]:
        """Of each weight ``w·w``, ``g·g``, ``u·u`` and ``-g·u``, 0-dim."""
        columns: tuple[list[Tensor], ...] = ([], [], [], [])
        before = self._before.get(name, [None] * len(weights))
        for weight, past in zip(weights, before, strict=True):
            w, g = _wide(weight), None
            columns[0].append(w.square().sum())
            if weight.grad is not None and not weight.grad.is_sparse:
                g = _wide(weight.grad) * (-1 if id(weight) in self.ascending else 1)
                columns[1].append(g.square().sum())
            if past is not None and past.shape == weight.shape:
                u = w - _wide(past).to(w)
                columns[2].append(u.square().sum())
                if g is not None:
                    columns[3].append(-(g * u).sum())
        return columns

    def _remember(self, step: int) -> None:
        self._step = step
        self._before = {
            name: [weight.detach().clone() for weight in weights]
            for name, weights in self._weights.items()
        }


def _wide(tensor: Tensor) -> Tensor:
    """In `row_dtype`; a complex one as its two parts."""
    tensor = tensor.detach()
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.to(row_dtype(real.device))


def _weights_of(stage: Stage) -> list[Tensor]:
    own: list[Tensor] = list(stage.parameters.values())
    return [p for p in own if p.ndim >= 2] or own
