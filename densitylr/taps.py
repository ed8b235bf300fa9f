"""A tap: a weight layer whose output is read, with its untrained twin."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densitylr.density import loudness, variety
from densitylr.probe import PEAK, VARIETY, Probe
from densitylr.sampling import Sampler
from densitylr.twin import Args, Kwargs, make_twin

__all__ = ["Tap"]


class Tap:
    """A weight layer that is read, its twin, and what it is compared with."""

    def __init__(
        self, name: str, layer: nn.Module, row: int, twin: bool, budget: int | None
    ) -> None:
        self.name = name
        self.row = row
        self.sampler = Sampler(layer, budget)
        self.twin = make_twin(layer, self.sampler) if twin else None
        self.estimator = "twin" if self.twin else "first-probe"
        self.reference: tuple[float, float] | None = None  # finite and near-zero counts
        self.device: torch.device | None = None  # where it was read at this probe
        self.answered = False  # by its twin, at this probe

    def read(self, args: Args, kwargs: Kwargs, a: Tensor, probe: Probe) -> None:
        """Put the layer's output into the probe, with the twin's answer beside it."""
        a = self.sampler.batched(a)
        answer = self.twin(args, kwargs, self.sampler.strides(a)) if self.twin else None
        self.answered = answer is not None
        sample = self.sampler.block(a) if self.twin else self.sampler.spread(a)
        probe.put(self.row, sample, answer, lambda sample: self.sampler.channels(a, sample))

    def watch(self, a: Tensor, row: Tensor, probe: bool) -> None:
        """Keep the peak in ``row``; at a probe, the variety over the examples, too."""
        sample = self.sampler.block(a)
        peak = row[PEAK]
        torch.maximum(peak, loudness(sample).to(peak.dtype), out=peak)
        if probe:
            row[VARIETY] = variety(sample, min(self.sampler.examples, sample.ndim - 1))

    def let_twin_go(self) -> None:
        if self.twin is not None:
            self.twin = None
            self.estimator = "first-probe" if self.reference is None else "last-twin"
