"""Whether gradients still pull weights away from where they began.

The cosine between the descent direction and the way that the weights of a stage have come. Of each
parameter a bounded, strided sample is kept as it was and looked at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from densitylr.density import row_dtype
from densitylr.distributed import Ranks, is_sharded
from densitylr.records import Reading
from densitylr.stages import Stage

__all__ = ["SAMPLE", "Pull"]

SAMPLE = 2**14
"""Most weights of a parameter that are kept and looked at."""


class Pull:
    """Looks at the gradients of each step, and puts what it has seen onto the next reading.

    Nothing is copied to the host before that, and then all of it at once.

    Args:
        stages: the stages, untrained, by name.
        names: those that are looked at.
        ranks: those that hold the other shards, where each holds one.
    """

    def __init__(
        self, stages: Mapping[str, Stage], names: Iterable[str], ranks: Ranks | None = None
    ) -> None:
        self.ranks = ranks
        self._stages = {name: stages[name] for name in names}
        self._start = {
            name: {n: _sample(p).clone() for n, p in stage.parameters.items()}
            for name, stage in self._stages.items()
        }
        self._steps: list[Tensor] = []  # [stages, 3] each: g · d, |g|² and |d|² of a step

    @torch.no_grad()
    def add(self) -> None:
        """Look at the gradients of the step that is about to be taken."""
        rows = [self._products(name, stage) for name, stage in self._stages.items()]
        self._steps.append(torch.stack([row.to(rows[0].device) for row in rows]))

    def onto(self, reading: Reading) -> Reading:
        """The reading with the mean cosines since the last one; as it is if nothing was added."""
        if not self._steps:
            return reading
        table = torch.stack([step.to(self._steps[0].device) for step in self._steps])
        found = table.cpu().double().numpy()
        self._steps.clear()
        if self.ranks is not None and self.ranks.sharded:
            found = self.ranks.summed(found.ravel(), reading.step).reshape(found.shape)
        table = torch.from_numpy(found)
        cosines = -table[..., 0] / (table[..., 1] * table[..., 2]).sqrt()
        changed = dict(reading.stages)
        for name, own in zip(self._stages, cosines.T, strict=True):
            seen = own[own.isfinite()]
            mean = float(seen.mean()) if len(seen) else math.nan
            changed[name] = dataclasses.replace(changed[name], pull=mean)
        return Reading(reading.step, changed)

    def state_dict(self) -> dict[str, Any]:
        """The weights as they were, by stage and parameter."""
        return {name: dict(start) for name, start in self._start.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with where another run of such a model began."""
        self._steps.clear()
        for name in state.keys() & self._start.keys():
            self._start[name] = dict(state[name])

    def _products(self, name: str, stage: Stage) -> Tensor:
        """``[g · d, |g|², |d|²]`` over a stage; zeros where there is no gradient to look at."""
        gradients, ways = [], []
        for n, parameter in stage.parameters.items():
            gradient, start = parameter.grad, self._start[name].get(n)
            if gradient is None or gradient.is_sparse or start is None:
                continue
            now = _sample(parameter)
            gradients.append(_sample(gradient))
            ways.append(now.to(_wide(now)) - start.to(now.device, _wide(now)))
        if not ways:
            device = next(iter(stage.parameters.values())).device
            return torch.zeros(3, dtype=row_dtype(device), device=device)
        home = ways[0].device
        g, d = (torch.cat([part.to(home, _wide(part)) for part in s]) for s in (gradients, ways))
        return torch.stack([g.dot(d), g.dot(g), d.dot(d)])


def _wide(tensor: Tensor) -> torch.dtype:
    return row_dtype(tensor.device)


def _sample(tensor: Tensor) -> Tensor:
    """At most `SAMPLE` elements of a parameter, or of this rank's shard of it, 1-dim."""
    own = tensor.detach()
    own = own.to_local() if is_sharded(own) else own  # type: ignore[attr-defined]
    own = own.reshape(-1)
    return own[:: max(1, -(-own.numel() // SAMPLE))]
