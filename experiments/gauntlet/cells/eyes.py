"""Other measurements for the same policy, in place of the paired near-zero density.

A view turns a layer's output into a displacement, a number that is zero while nothing has
changed. `Eyes` hooks views to a model and reads them in the very forward passes that the
controller reads. Training numbers and random state are those of a run without them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from densitylr import Stage, find_stages
from densitylr.history import TAU
from densitylr.monitor import (
    DensityMonitor,
    LayerHook,
    Sampler,
    first_tensor,
    inert_hook,
    make_twin,
)

__all__ = ["Density", "Eyes", "FastaiThreshold", "OutputChange", "View", "behind", "itself"]


ABSOLUTE = 0.05
"""The threshold of fastai's ``ActivationStats``."""

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def rms(a: Tensor) -> Tensor:
    """Root mean square of the finite elements, 0-dim float64."""
    values = torch.where(torch.isfinite(a), a, 0).double()
    return (values.square().sum() / torch.isfinite(a).sum().clamp(min=1)).sqrt()


class View(Protocol):
    """A way to look at one layer; made while the model is untrained.

    Two views on one layer are two objects: each remembers what it saw first.
    """

    def __call__(self, args: Args, kwargs: Kwargs, a: Tensor) -> Tensor | None:
        """The displacement, 0-dim, from a call of the layer and its output; None: unknown."""


class _Share:
    """``|ln(share / first share)|`` of a count, smoothed as the monitor smooths its own."""

    def __init__(self, layer: nn.Module) -> None:
        self.sampler = Sampler(layer)
        self.first: Tensor | None = None

    def counts(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Finite and counted elements."""
        raise NotImplementedError

    def __call__(self, args: Args, kwargs: Kwargs, a: Tensor) -> Tensor:
        n, counted = self.counts(self.sampler.block(a))
        # Half a count more keeps the logarithm finite and equal counts at exactly zero.
        share = ((counted.double() + 0.5) / (n.double() + 1)).log()
        if self.first is None:
            self.first = share
        return (share - self.first.to(share.device)).abs()


class Density(_Share):
    """Near-zero density against the first reading, in units of the first reading's RMS."""

    rms0: Tensor | None = None

    def counts(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        if self.rms0 is None:
            self.rms0 = rms(sample)
        near = sample.abs() < TAU * self.rms0.to(sample.device)
        return torch.isfinite(sample).sum(), near.sum()


class FastaiThreshold(_Share):
    """The share of ``a <= 0.05``, as fastai's ``ActivationStats`` counts it: every negative is
    near zero, and 0.05 is in whatever units the layer happens to have.
    """

    def counts(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        finite = torch.isfinite(sample)
        return finite.sum(), (finite & (sample <= ABSOLUTE)).sum()


class OutputChange:
    """``rms(layer(x) - twin(x)) / rms(twin(x))``: how far the output itself has gone from what
    the untrained layer would return for the same input. A layer without a twin has no answer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.sampler = Sampler(layer)
        self.twin = make_twin(layer)

    def __call__(self, args: Args, kwargs: Kwargs, a: Tensor) -> Tensor | None:
        a = self.sampler.batched(a)
        answer = self.twin(args, kwargs, self.sampler.strides(a)) if self.twin else None
        if answer is None:
            return None
        return (rms(self.sampler.block(a).float() - answer.float()) / rms(answer)).double()


_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def itself(model: nn.Module, layer: nn.Module) -> nn.Module:
    """The weight layer, before normalisation and activation."""
    return layer


def behind(model: nn.Module, layer: nn.Module) -> nn.Module:
    """The normalisation that follows a weight layer; if there is none, the activation.

    "Follows" is the order of registration, which in our networks is the order of calls. A layer
    that is followed by neither (a head, a query projection) is looked at itself.
    """
    inside = set(layer.modules())
    leaves = [m for m in model.modules() if m is layer or not (m in inside or any(m.children()))]
    following = (leaves[leaves.index(layer) + 1 :] or [layer])[0]
    activation = type(following).__module__ == "torch.nn.modules.activation"
    activation = activation and not isinstance(following, nn.MultiheadAttention)
    return following if activation or isinstance(following, _NORMS) else layer


class _Hook:
    """A forward hook that does not keep the views alive, and is inert in a copied model."""

    def __init__(self, eyes: Eyes, layer: str) -> None:
        self.eyes, self.layer = weakref.ref(eyes), layer

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        eyes = self.eyes()
        if eyes is not None and module.training and torch.is_grad_enabled():
            eyes._look(self.layer, args, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return inert_hook, ()


class Eyes:
    """One view on each weight layer of a model, read whenever its `DensityLR` reads.

    Args:
        model: the model, untrained and not compiled.
        view: makes the view on a layer.
        place: the module whose output is looked at, from the model and a weight layer.
    """

    def __init__(
        self,
        model: nn.Module,
        view: Callable[[nn.Module], View],
        place: Callable[[nn.Module, nn.Module], nn.Module] = itself,
    ) -> None:
        self.stages: dict[str, Stage] = find_stages(model)
        self._layers = {n: m for stage in self.stages.values() for n, m in stage.layers.items()}
        self._views = {n: view(place(model, m)) for n, m in self._layers.items()}
        self._seen: dict[str, Tensor | None] = {}
        self._handles = [
            place(model, m).register_forward_hook(_Hook(self, n), with_kwargs=True)
            for n, m in self._layers.items()
        ]
        weakref.finalize(self, _remove, self._handles)

    def close(self) -> None:
        """Remove all hooks and let the views go. May be called again."""
        _remove(self._handles)
        self._views.clear()
        self._seen.clear()

    def let_go(self, stage: str) -> None:
        """Look at a stage no more."""
        for name in self.stages[stage].layers:
            self._views.pop(name, None)

    def collect(self) -> dict[str, float]:
        """The displacement of each stage since the last call, the mean over the layers that were
        read; NaN where none was.
        """
        seen = {n: float(d) for n, d in self._seen.items() if d is not None}
        self._seen.clear()
        return {
            name: _mean([seen[n] for n in s.layers if n in seen]) for name, s in self.stages.items()
        }

    def _look(self, layer: str, args: Any, kwargs: Any, output: Any) -> None:
        # As in the monitor: a layer that is called twice is read once.
        if layer not in self._views or layer in self._seen or not _is_read(self._layers[layer]):
            return
        a = first_tensor(output)
        with torch.no_grad():
            if a is not None and a.numel():
                self._seen[layer] = self._views[layer](args, kwargs, a.detach())


def _is_read(layer: nn.Module) -> bool:
    """Whether a controller reads the layer in this forward; a bare monitor has its own schedule."""
    hooks = (h for h in layer._forward_hooks.values() if isinstance(h, LayerHook))
    monitors = (hook.watcher() for hook in hooks)
    return any(isinstance(m, DensityMonitor) and m.every is None and m.armed for m in monitors)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
