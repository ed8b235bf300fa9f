"""Whether gradients still pull weights away from where they began."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from densitylr.distributed import Ranks, is_sharded
from densitylr.records import Reading
from densitylr.stages import Stage

__all__ = ["Pull"]

SAMPLE = 2**16
"""Most weights of a parameter that are kept and looked at."""


class Pull:
    """The cosine between the descent direction and the way come from the untrained weights.

    Of each parameter a strided sample of at most `SAMPLE` weights is kept as it was. Nothing is
    copied to the host before `onto`.

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
            s: {n: _sample(p).clone() for n, p in stage.parameters.items()}
            for s, stage in self._stages.items()
        }
        self._sums: list[dict[str, list[Tensor]]] = []  # of each step, by stage

    @torch.no_grad()
    def add(self) -> None:
        """Look at the gradients of the step that is about to be taken."""
        self._sums.append({s: self._look(s, stage) for s, stage in self._stages.items()})

    def onto(self, reading: Reading) -> Reading:
        """The reading with the means since the last one; the same where nothing was added."""
        if not self._sums:
            return reading
        table = torch.zeros(len(self._sums), len(self._stages), 3, dtype=torch.float64)
        for i, step in enumerate(self._sums):
            for j, found in enumerate(step.values()):
                for sums in found:
                    table[i, j] += sums.cpu()
        self._sums.clear()
        if self.ranks is not None and self.ranks.sharded:
            own = table.numpy().ravel()
            table = torch.from_numpy(self.ranks.summed(own, reading.step)).view_as(table)
        cosines = -table[..., 0] / (table[..., 1] * table[..., 2]).sqrt()
        changed = dict(reading.stages)
        for name, pull in zip(self._stages, cosines.T, strict=True):
            seen = pull[pull.isfinite()]
            mean = float(seen.mean()) if len(seen) else math.nan
            changed[name] = dataclasses.replace(changed[name], pull=mean)
        return Reading(reading.step, changed)

    def state_dict(self) -> dict[str, Any]:
        return {s: dict(start) for s, start in self._start.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums.clear()
        for s in state.keys() & self._start.keys():
            self._start[s] = dict(state[s])

    def _look(self, name: str, stage: Stage) -> list[Tensor]:
        found = []
        for n, p in stage.parameters.items():
            start = self._start[name].get(n)
            if p.grad is None or start is None or p.grad.is_sparse:
                continue
            g, d = _sample(p.grad).double(), _sample(p).double()
            d = d - start.to(d.device, d.dtype)
            found.append(torch.stack([g.dot(d), g.dot(g), d.dot(d)]))
        return found


def _sample(tensor: Tensor) -> Tensor:
    own = tensor.detach()
    own = own.to_local() if is_sharded(own) else own  # type: ignore[attr-defined]
    own = own.reshape(-1)
    return own[:: max(1, -(-own.numel() // SAMPLE))]
