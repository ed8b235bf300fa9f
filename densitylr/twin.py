"""Untrained twins: what a layer would say to today's input, had it never been trained.

A density moves for two reasons: because the layer learned, or because its input changed. A copy
of the layer's first weights, given the very same input, tells the two apart. The copy holds at
most `BLOCK_CHANNELS` output channels and answers for one block of the outputs, so its cost does not
grow with the width of the layer or the size of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from densitylr.distributed import is_sharded, whole
from densitylr.sampling import Sampler

__all__ = ["first_tensor", "make_twin"]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


class Twin(Protocol):
    """A frozen copy of a layer."""

    def __call__(self, args: Args, kwargs: Kwargs, strides: tuple[int, int]) -> Tensor | None:
        """Its answer to the layer's arguments, sampled; None where it has none."""

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by name, for a checkpoint."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of another one of the same layer."""


def first_tensor(output: object) -> Tensor | None:
    """The first floating-point tensor in a module's output: a tensor, tuple, list or mapping.

    Of a ragged (nested, jagged) one its values, the rows of all examples one after the other.
    """
    if isinstance(output, Tensor):
        if output.is_nested:
            ragged = output.layout is torch.jagged and output.is_contiguous()
            return first_tensor(output.values()) if ragged else None
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        for item in output:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


class _SampledTwin:
    """Twin of a linear, convolution or embedding layer: a strided copy of its weight rows."""

    def __init__(self, layer: nn.Module, sampler: Sampler) -> None:
        self.layer, self.sampler = layer, sampler
        weight, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(weight, Tensor)
        weight, bias = whole(weight), None if bias is None else whole(bias)
        stride = sampler.channel_stride
        channels = weight[:, ::stride] if isinstance(layer, nn.Embedding) else weight[::stride]
        self.weight = channels.detach().clone()
        self.bias = None if bias is None else bias.detach()[::stride].clone()

    def __call__(self, args: Args, kwargs: Kwargs, strides: tuple[int, int]) -> Tensor | None:
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor) and x.is_nested:
            x = x.values()
        if not isinstance(x, Tensor):
            return None
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        self.weight = self.weight.to(weight.device, weight.dtype)
        if self.bias is not None:
            self.bias = self.bias.to(weight.device, weight.dtype)
        rows, positions = strides
        if isinstance(self.layer, nn.Embedding):
            x = x.unsqueeze(0) if x.ndim == 0 else x
            every = (slice(None, None, positions),) * (x.ndim - 1)
            return F.embedding(x[(slice(None, None, rows), *every)], self.weight)
        x = self.sampler.batched(x)
        if isinstance(self.layer, nn.Linear):
            if x.layout is not torch.strided:  # a sparse input has no slices
                return self.sampler.part(F.linear(x, self.weight, self.bias), strides)
            return F.linear(self.sampler.part(x, strides), self.weight, self.bias)
        return self._convolved(x[::rows], positions)

    def _convolved(self, x: Tensor, positions: int) -> Tensor:
        layer: Any = self.layer
        if positions == 1:
            return layer._conv_forward(x, self.weight, self.bias)
        # A larger stride gives just the outputs that are read.
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.sampler.spatial - 1]
        stride = tuple(positions * s for s in layer.stride)
        return convolve(x, self.weight, self.bias, stride, 0, layer.dilation, layer.groups)

    def tensors(self) -> dict[str, Tensor]:
        bias = {} if self.bias is None else {"bias": self.bias}
        return {"weight": self.weight, **bias}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight, self.bias = tensors["weight"], tensors.get("bias")


class _CopiedTwin:
    """Twin of a layer that is called whole: recurrent, attention, transposed convolution."""

    def __init__(self, layer: nn.Module, sampler: Sampler) -> None:
        self.layer, self.sampler = layer, sampler
        weights = {id(p): nn.Parameter(whole(p)) for p in layer.parameters() if is_sharded(p)}
        self.copy = copy.deepcopy(layer, weights).requires_grad_(False).train()
        self.copy._forward_hooks.clear()

    def __call__(self, args: Args, kwargs: Kwargs, strides: tuple[int, int]) -> Tensor | None:
        now = next(self.layer.parameters())
        self.copy.to(now.device, now.dtype)
        output = first_tensor(self.copy(*args, **kwargs))
        return None if output is None else self.sampler.block(output)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.copy.state_dict())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.copy.load_state_dict(tensors)


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
    copied = (nn.RNNBase, nn.MultiheadAttention, nn.modules.conv._ConvTransposeNd)
    hooked = bool(layer._forward_pre_hooks)  # they may hold the weights (weight norm)
    if isinstance(layer, copied) and not hooked and not getattr(layer, "dropout", 0):
        return _CopiedTwin(layer, sampler)
    return None
