"""A tap: a weight layer whose output is read, with its untrained twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from densitylr.density import loudness, variety
from densitylr.probe import VARIETY_AT, Probe
from densitylr.sampling import Sampler
from densitylr.twin import Args, Kwargs, make_twin

__all__ = ["Tap"]

PEAKS = 2**10
"""Most outputs of which the peak is taken, at each forward: it matters when it grows fivefold."""

KEPT = ("estimator", "rms0", "reference")


class Tap:
    """A weight layer that is read, its twin, and what it is compared with."""

    def __init__(
        self, name: str, layer: nn.Module, row: int, twin: bool, budget: int | None
    ) -> None:
        self.name = name
        self.row = row
        self.sampler = Sampler(layer, budget)
        self._peaks = Sampler(layer, PEAKS)
        self.twin = make_twin(layer, self.sampler) if twin else None
        self.estimator = "twin" if self.twin else "first-probe"
        self.rms0: float | None = None  # of the last probe
        self.reference: tuple[float, float] | None = None  # finite and near-zero counts
        self.device: torch.device | None = None  # where it was read at this probe
        self.answered = False  # by its twin, at this probe

    def read(self, args: Args, kwargs: Kwargs, a: Tensor, probe: Probe) -> None:
        """Put the layer's output into the probe, with the twin's answer beside it."""
        if self.twin is None and probe.again(self.row, a):
            return
        a = self.sampler.batched(a)
        if self.twin is None:
            answer, sample = None, self.sampler.spread(a)
        else:
            sample = self.sampler.block(a)
            with torch.no_grad():
                answer = self.twin(args, kwargs, self.sampler.strides(a))
        self.answered = answer is not None
        probe.put(self.row, a, sample, answer, self.sampler.channels, again=self.twin is None)

    def keep_peak(self, a: Tensor, peak: Tensor) -> None:
        """The largest RMS since the last probe, in ``peak``, 0-dim."""
        torch.maximum(peak, loudness(self._peaks.spread(a)), out=peak)

    def read_variety(self, a: Tensor, row: Tensor) -> None:
        """How much depends on the example, in ``row``."""
        sample = self.sampler.block(a)
        row[VARIETY_AT] = variety(sample, min(self.sampler.examples, sample.ndim - 1))

    def let_twin_go(self) -> None:
        if self.twin is not None:
            self.twin = None
            self.estimator = "first-probe" if self.reference is None else "last-twin"

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the weights of the twin."""
        twin = None if self.twin is None else self.twin.tensors()
        return {"twin": twin, **{name: getattr(self, name) for name in KEPT}}

    def load_state_dict(self, state: Mapping[str, Any], layer: nn.Module) -> None:
        """Compare with what the tap of another such layer was compared with."""
        for name in KEPT:
            setattr(self, name, state[name])
        self.twin = None if state["twin"] is None else self.twin or make_twin(layer, self.sampler)
        if self.twin is not None:
            self.twin.load(state["twin"])
