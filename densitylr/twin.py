"""Untrained twins: what a layer would say to today's input, had it never been trained.

A density moves for two reasons: because the layer learned, or because its input changed. A copy
of the layer's first weights, given the very same input, tells the two apart. The copy holds at
most ``CHANNELS`` output channels and sees at most ``BUDGET`` outputs' worth of rows, so its cost
does not grow with the width of the layer or the size of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["BUDGET", "CHANNELS", "Sampler", "first_tensor", "make_twin"]

CHANNELS = 64
"""Most output channels of a tap that are read."""

BUDGET = 2**17
"""Most outputs of a tap that are read, but never less than one row."""

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


def first_tensor(output: object) -> Tensor | None:
    """The first floating-point tensor in a module's output: a tensor, tuple, list or mapping."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        for item in output:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


class Sampler:
    """Which outputs of a layer are read: evenly strided rows and channels.

    Rows run along the first dimension. Channels are dimension 1 of a convolution's output and
    the last one of everything else. A missing batch dimension is put back.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.spatial = 0
        width = getattr(layer, "out_features", 0)
        if isinstance(layer, nn.modules.conv._ConvNd):
            self.spatial = len(layer.kernel_size)
            width = layer.out_channels if layer.groups == 1 else 0
        elif isinstance(layer, nn.Embedding):
            width = layer.embedding_dim
        self.channel_stride = max(1, -(-width // CHANNELS))
        # A recurrent or attention layer has its examples along dimension 1 unless told.
        self.examples = int(not getattr(layer, "batch_first", True))

    def rows(self, output: Tensor) -> int:
        """The stride along the rows of a (batched) output ``[rows, …]``."""
        per_row = output[:1].numel() // self.channel_stride
        return max(1, -(-len(output) // max(1, BUDGET // max(1, per_row))))

    def batched(self, x: Tensor) -> Tensor:
        """``x`` with its batch dimension, put back where a single example was given."""
        return x.unsqueeze(0) if x.ndim <= self.spatial + 1 else x

    def __call__(self, output: Tensor) -> Tensor:
        """The sampled part of ``output``, a view."""
        output = self.batched(output)
        rows = output[:: self.rows(output)]
        if self.spatial:
            return rows[:, :: self.channel_stride]
        return rows[..., :: self.channel_stride]


class _SampledTwin:
    """Twin of a linear, convolution or embedding layer: a strided copy of its weight rows."""

    def __init__(self, layer: nn.Module, sampler: Sampler) -> None:
        self.layer, self.sampler = layer, sampler
        weight, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(weight, Tensor)
        stride = sampler.channel_stride
        channels = weight[:, ::stride] if isinstance(layer, nn.Embedding) else weight[::stride]
        self.weight = channels.detach().clone()
        self.bias = None if bias is None else bias.detach()[::stride].clone()

    def __call__(self, args: Args, kwargs: Kwargs, row_stride: int) -> Tensor | None:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor):
            return None
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        self.weight = self.weight.to(weight.device, weight.dtype)
        if self.bias is not None:
            self.bias = self.bias.to(weight.device, weight.dtype)
        if isinstance(self.layer, nn.Embedding):
            x = x.unsqueeze(0) if x.ndim == 0 else x
            return F.embedding(x[::row_stride], self.weight)
        rows = self.sampler.batched(x)[::row_stride]
        if isinstance(self.layer, nn.Linear):
            return F.linear(rows, self.weight, self.bias)
        return self.layer._conv_forward(rows, self.weight, self.bias)  # type: ignore

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "bias": self.bias}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weight, self.bias = state["weight"], state["bias"]


class _CopiedTwin:
    """Twin of a layer that is called whole: recurrent, attention, transposed convolution."""

    def __init__(self, layer: nn.Module, sampler: Sampler) -> None:
        self.layer, self.sampler = layer, sampler
        self.copy = copy.deepcopy(layer).requires_grad_(False).train()
        self.copy._forward_hooks.clear()

    def __call__(self, args: Args, kwargs: Kwargs, row_stride: int) -> Tensor | None:
        now = next(self.layer.parameters())
        self.copy.to(now.device, now.dtype)
        output = first_tensor(self.copy(*args, **kwargs))
        return None if output is None else self.sampler(output)

    def state_dict(self) -> dict[str, Any]:
        return self.copy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.copy.load_state_dict(state)


Twin = _SampledTwin | _CopiedTwin


def make_twin(layer: nn.Module, sampler: Sampler) -> Twin | None:
    """A frozen copy of ``layer`` as it is now, or None where a copy cannot be called cheaply.

    A layer with dropout of its own has none: calling it would use up random numbers, and
    training would no longer be what it is without us. Nor has a parametrised one: reading the
    weight of a spectral norm is a step of its power iteration.
    """
    forward = type(layer).forward
    if parametrize.is_parametrized(layer):
        return None
    if isinstance(layer, nn.Linear) and forward is nn.Linear.forward:
        return _SampledTwin(layer, sampler)
    if isinstance(layer, nn.Embedding) and forward is nn.Embedding.forward:
        return None if layer.max_norm is not None else _SampledTwin(layer, sampler)
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if isinstance(layer, plain) and any(forward is kind.forward for kind in plain):
        return _SampledTwin(layer, sampler)
    whole = (nn.RNNBase, nn.MultiheadAttention, nn.modules.conv._ConvTransposeNd)
    hooked = bool(layer._forward_pre_hooks)  # they may hold the weights (weight norm)
    if isinstance(layer, whole) and not hooked and not getattr(layer, "dropout", 0):
        return _CopiedTwin(layer, sampler)
    return None
