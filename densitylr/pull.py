"""Whether gradients still pull weights away from where they began.

The cosine between the descent direction and the way that the weights of a stage have come. Of each
parameter a bounded sample is kept as it was and looked at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from densitylr.density import row_dtype
from densitylr.distributed import Ranks
from densitylr.records import Reading
from densitylr.sampling import even_step
from densitylr.stages import Stage

__all__ = ["SAMPLE", "Pull"]

SAMPLE = 2**14
"""Most weights of a parameter that are kept and looked at."""


class Pull:
    """Looks at the gradients of each step, and puts what it has seen onto the next reading.

    Args:
        stages: the stages, untrained, by name; no parameter is sharded.
        names: those that are looked at; others once a state has been loaded that has them.
        ranks: those that train the same model, whose means are put together.
        ascending: ids of parameters that go up their gradient (``maximize``).
    """

    def __init__(
        self,
        stages: Mapping[str, Stage],
        names: Iterable[str],
        ranks: Ranks | None = None,
        ascending: Collection[int] = (),
    ) -> None:
        self.ranks, self.ascending = ranks, ascending
        self._stages = dict(stages)
        self._start = {
            name: {n: _sample(p).clone() for n, p in stages[name].parameters.items()}
            for name in names
        }
        self._seen: Tensor | None = None  # [2, stages]: sums of cosines, and of how many

    @torch.no_grad()
    def add(self, names: Collection[str]) -> None:
        """Look at the gradients of the step that is about to be taken; nobody waits for them.

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

    def onto(self, reading: Reading) -> Reading:
        """The reading with the mean cosines since the last one; as it is if nothing was added."""
        if self._seen is None:
            return reading
        found = self._seen.cpu().double().numpy()
        self._seen = None
        if self.ranks is not None:
            found = self.ranks.summed(found.ravel(), reading.step).reshape(found.shape)
        changed = dict(reading.stages)
        for name, total, count in zip(self._stages, *found.tolist(), strict=True):
            mean = total / count if count else math.nan
            changed[name] = dataclasses.replace(changed[name], pull=mean)
        return Reading(reading.step, changed)

    def keep(self, names: Collection[str]) -> None:
        """Free the samples of all other stages, which have no pull from then on."""
        self._start = {name: start for name, start in self._start.items() if name in names}

    def let_go(self) -> None:
        """Free the samples; there is no pull from then on, until a state is loaded."""
        self._start, self._seen = {}, None

    def state_dict(self) -> dict[str, Any]:
        """The weights as they were, by stage and parameter."""
        return {name: dict(start) for name, start in self._start.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with where another run of such a model began."""
        self._seen = None
        self._start = {
            name: {
                n: start.to(stage.parameters[n].device)
                for n, start in state[name].items()
                if n in stage.parameters and start.shape == _sample(stage.parameters[n]).shape
            }
            for name, stage in self._stages.items()
            if name in state
        }

    @property
    def seen(self) -> dict[str, tuple[float, float]]:
        """Sum and number of the cosines of each stage since the last reading; may be set."""
        if self._seen is None:
            return {}
        sums, counts = self._seen.tolist()
        return dict(zip(self._stages, zip(sums, counts, strict=True), strict=True))

    @seen.setter
    def seen(self, seen: Mapping[str, tuple[float, float]]) -> None:
        rows = [seen.get(name, (0.0, 0.0)) for name in self._stages]
        self._seen = torch.tensor(rows, dtype=torch.float64).T if seen else None

    def _cosine(self, name: str, stage: Stage) -> Tensor:
        """0-dim; NaN where there is no gradient to look at, or nothing has moved."""
        gradients, ways = [], []
        for n, parameter in stage.parameters.items():
            gradient, start = parameter.grad, self._start.get(name, {}).get(n)
            if gradient is None or gradient.is_sparse or start is None:
                continue
            now, wide = _sample(parameter), row_dtype(parameter.device)
            sign = -1 if id(parameter) in self.ascending else 1
            gradients.append(_sample(gradient).to(wide) * sign)
            ways.append(now.to(wide) - start.to(now.device, wide))
        if not ways:
            device = next(iter(stage.parameters.values())).device
            return torch.full((), math.nan, dtype=row_dtype(device), device=device)
        g, d = (torch.cat([part.to(ways[0].device) for part in s]) for s in (gradients, ways))
        return -g.dot(d) / (g.dot(g) * d.dot(d)).sqrt()


def _sample(tensor: Tensor) -> Tensor:
    """At most `SAMPLE` elements, 1-dim, of all rows and columns alike."""
    tensor = tensor.detach()
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    return flat[:: even_step(flat.numel(), SAMPLE)]
