"""Stages that no learning rate moves: all of their gradients are exactly zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from densitylr.distributed import Ranks
from densitylr.records import Reading
from densitylr.stages import Stage

__all__ = ["LOOK", "without_gradient"]

LOOK, LOOK_UNPAIRED = 0.1, 0.4
"""Displacement below which a stage's gradients are looked at: one that has moved by that has some.
Without a twin small stages seem to move by 0.1 from batch to batch."""


def without_gradient(
    reading: Reading, stages: Mapping[str, Stage], ranks: Ranks | None = None
) -> Reading:
    """The reading with ``zero_gradient`` set where a stage's gradients are all exactly zero.

    Before the first step nothing is looked at: behind a layer that starts from zeros every
    gradient is zero once. Of a stage that is alive one parameter is read, as a rule; of one
    that has moved by `LOOK`, or by `LOOK_UNPAIRED` without a twin, none is, so that nothing waits
    for the device.

    Args:
        reading: of all stages, taken before the step that uses the gradients.
        stages: the stages by name.
        ranks: those that hold the other shards of the gradients, where each holds one.
    """
    limits = {
        n: LOOK if s.estimator == "twin" else LOOK_UNPAIRED for n, s in reading.stages.items()
    }
    looked = [n for n, s in reading.stages.items() if s.displacement < limits[n]]
    if not (reading.step and looked):
        return reading
    counts = _counts([stages[name] for name in looked])
    if ranks is not None and ranks.sharded:
        counts = ranks.total(counts, reading.step)
    changed = {
        name: dataclasses.replace(reading.stages[name], zero_gradient=1.0)
        for name, present, alive in zip(looked, counts[::2], counts[1::2], strict=True)
        if present and not alive
    }
    return Reading(reading.step, {**reading.stages, **changed}) if changed else reading


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
