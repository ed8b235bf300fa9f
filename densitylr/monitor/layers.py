"""A weight layer that is watched: which of its outputs are read, and its untrained twin.

A density changes for two reasons: because the layer learned, or because its input changed. A copy
of the layer's first weights, the *twin*, separates the two: it is given the same input. The copy
holds at most `BLOCK_CHANNELS` output channels and computes one block of the outputs, so that its
cost does not grow with the width of the layer or the size of the batch.

Outputs are sampled in two ways. A *block* is every so many rows, channels and positions: a twin can
compute just these. A *spread* sample takes every k-th output in the order of memory, ``k``
having no divisor in common with any dimension, so that it visits all rows, channels and positions
alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from densitylr.history import Size, restored
from densitylr.model import is_sharded, whole
from densitylr.monitor.hooks import first_tensor
from densitylr.monitor.measure import (
    ESTIMATORS,
    EXAMPLE_VARIANCE_AT,
    SHAPES,
    SampleBuffer,
    row_dtype,
    shares_memory,
)

__all__ = [
    "Sampler",
    "Twin",
    "WatchedLayer",
    "even_stride",
    "example_variance",
    "layer_budget",
    "make_twin",
    "rms",
]

FEW = 8
"""Examples below which their variance says nothing."""

BLOCK_CHANNELS = 64
"""Most output channels of a block."""

PAIRED = 2**16
"""Most outputs of a layer that are read while its twin answers for the same."""

BUDGET = 2**17
"""Outputs that are read in one reading, of all other layers together …"""

LEAST = 2**12
"""… but of a layer no fewer than these."""

ROWS = 8
"""Positions are left out of a block rather than rows, until there are this many rows."""

_View = tuple[tuple[int, ...], tuple[int, ...], int]

PEAKS = 2**10
"""Most outputs of which the peak RMS is taken, at each forward: it matters when it grows
fivefold."""

Estimator = Annotated[str, lambda name: name in ESTIMATORS]
Unsigned = Annotated[float, lambda x: not x < 0]
Reference = tuple[Size, Size]

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


class WatchedLayer:
    """A weight layer that is read, its twin, and what it is compared with.

    Args:
        name: its qualified name.
        layer: the layer.
        row: its row in the buffers.
        twin: its untrained twin; None where it has none.
        budget: most outputs to read where no twin answers for them.
    """

    def __init__(
        self, name: str, layer: nn.Module, row: int, twin: Twin | None, budget: int
    ) -> None:
        self.name = name
        self.row = row
        self.sampler = Sampler(layer, budget)
        self._peaks = Sampler(layer, PEAKS)
        self.twin = twin
        self.estimator = "twin" if twin else "first-probe"
        self.rms0: float | None = None  # at the last reading
        self.reference: tuple[float, float] | None = None  # finite and near-zero counts
        self.device: torch.device | None = None  # where it was read this time
        self.answered = False  # by its twin, this time

    def read(
        self,
        args: Args,
        kwargs: Kwargs,
        a: Tensor,
        buffer: SampleBuffer,
        *,
        due: bool,
        watched: bool,
        variance: bool,
    ) -> None:
        """Put what is asked for of the layer's output into the buffer.

        Args:
            args, kwargs: of the layer's call.
            a: its output, detached.
            buffer: of the output's device.
            due: a sample, with the twin's answer beside it.
            watched: the largest RMS since the last reading.
            variance: how much depends on the example.
        """
        if due:
            self.device = a.device
            if self.twin is not None or not buffer.again(self.row, a):
                self._sample(args, kwargs, self.sampler.batched(a), buffer)
        if watched:
            peak = buffer.peaks[self.row]
            torch.maximum(peak, rms(self._peaks.spread(a)), out=peak)
        if variance:
            block = self.sampler.block(a)
            examples = min(self.sampler.examples, block.ndim - 1)
            buffer.rows[self.row, EXAMPLE_VARIANCE_AT] = example_variance(block, examples)

    def _sample(self, args: Args, kwargs: Kwargs, a: Tensor, buffer: SampleBuffer) -> None:
        if self.twin is None:
            answer, sample = None, self.sampler.spread(a)
        else:
            sample = self.sampler.block(a)
            with torch.no_grad():
                answer = self.twin(args, kwargs, self.sampler.strides(a))
        self.answered = answer is not None
        buffer.put(self.row, a, sample, answer, again=self.twin is None)

    def release_twin(self) -> None:
        """Free the twin; later readings refer to its last answer."""
        if self.twin is not None:
            self.twin = None
            self.estimator = "first-probe" if self.reference is None else "last-twin"

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the weights of the twin."""
        return {
            "twin": None if self.twin is None else self.twin.tensors(),
            "estimator": self.estimator,
            "rms0": self.rms0,
            "reference": self.reference,
        }

    def prepare(self, state: Mapping[str, Any], layer: nn.Module) -> Callable[[], None]:
        """Check a state; the result has this compared with what another such layer was.

        Args:
            state: of `state_dict`; ``twin`` may be True: then the present twin is kept.
            layer: the layer.

        Raises:
            KeyError, ValueError: it is damaged.
        """
        weights = state["twin"]
        twin = None if weights is None else copy.copy(self.twin or make_twin(layer))
        if twin is not None and weights is not True:
            twin.load(_fitting(restored(dict[str, Tensor], weights), twin.tensors()))
        estimator = restored(Estimator, state["estimator"])
        rms0 = restored(Unsigned | None, state["rms0"])
        reference = restored(Reference | None, state["reference"])

        def load() -> None:
            self.twin, self.estimator = twin, estimator
            self.rms0, self.reference = rms0, reference

        return load


def _fitting(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, if they are such as the others.

    Raises:
        ValueError: one is missing, or is of another shape.
    """
    shapes = {name: tuple(w.shape) for name, w in weights.items()}
    wanted = {name: tuple(w.shape) for name, w in own.items()}
    if shapes != wanted:
        raise ValueError(f"a twin has weights {shapes}, its layer {wanted}")
    return weights


class Twin(Protocol):
    """A frozen copy of a layer."""

    def __call__(self, args: Args, kwargs: Kwargs, strides: tuple[int, int]) -> Tensor | None:
        """Its answer to the layer's arguments, sampled; None where it has none."""

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by name, for a checkpoint."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights of another one of the same layer; a copy of this one keeps its own."""


class _SampledTwin:
    """Twin of a linear, convolution or embedding layer: a strided copy of its weight rows."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.sampler = layer, Sampler(layer)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(weight, Tensor)
        weight, bias = whole(weight), None if bias is None else whole(bias)
        stride = self.sampler.channel_stride
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

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.sampler = layer, Sampler(layer)
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
        self.copy = copy.deepcopy(self.copy)
        self.copy.load_state_dict(tensors)


def make_twin(layer: nn.Module) -> Twin | None:
    """A frozen copy of ``layer`` as it is now, or None where a copy cannot be called cheaply.

    A layer with dropout of its own has none: calling it would use up random numbers, and
    training would no longer be what it is without us. Nor has a parametrised one: reading the
    weight of a spectral norm is a step of its power iteration.
    """
    forward = type(layer).forward
    if parametrize.is_parametrized(layer):
        return None
    if isinstance(layer, nn.Linear) and forward is nn.Linear.forward:
        return _SampledTwin(layer)
    if isinstance(layer, nn.Embedding) and forward is nn.Embedding.forward:
        return None if layer.max_norm is not None else _SampledTwin(layer)
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    if isinstance(layer, plain) and any(forward is kind.forward for kind in plain):
        return _SampledTwin(layer)
    copied = (nn.RNNBase, nn.MultiheadAttention, nn.modules.conv._ConvTransposeNd)
    hooked = bool(layer._forward_pre_hooks)  # they may hold the weights (weight norm)
    if isinstance(layer, copied) and not hooked and not getattr(layer, "dropout", 0):
        return _CopiedTwin(layer)
    return None


def layer_budget(layers: int) -> int:
    """Most outputs to read of each of so many layers that have no twin, a power of two."""
    return max(LEAST, 2 ** int(math.log2(BUDGET / max(1, layers))))


def even_stride(size: int, most: int) -> int:
    """The smallest stride that takes at most ``most`` of ``size`` elements and is coprime with
    it."""
    step = max(1, -(-size // most))
    while step > 1 and math.gcd(step, size) > 1:
        step += 1
    return step


class Sampler:
    """The samples of one layer.

    Rows run along the first dimension. Channels are dimension 1 of a convolution's output and
    the last one of everything else; positions are all dimensions between or behind. A missing
    batch dimension is put back.

    Args:
        layer: the layer.
        budget: most outputs in a spread sample (in a block: `PAIRED`).
    """

    def __init__(self, layer: nn.Module, budget: int = PAIRED) -> None:
        self.budget = budget
        self.spatial = 0
        width = getattr(layer, "out_features", 0)
        if isinstance(layer, nn.modules.conv._ConvNd):
            self.spatial = len(layer.kernel_size)
            width = layer.out_channels if layer.groups == 1 else 0
        elif isinstance(layer, nn.Embedding):
            width = layer.embedding_dim
        self.channel_stride = max(1, -(-width // BLOCK_CHANNELS))
        # A recurrent or attention layer has its examples along dimension 1 by default.
        self.examples = int(not getattr(layer, "batch_first", True))
        self._views: dict[object, _View] = {}

    def batched(self, x: Tensor) -> Tensor:
        """``x`` with its batch dimension, put back where a single example was given."""
        return x.unsqueeze(0) if x.ndim <= self.spatial + 1 else x

    def strides(self, output: Tensor) -> tuple[int, int]:
        """The strides of the block along the rows and along each dimension of positions."""
        rows, *rest = self.batched(output).shape
        channels = rest.pop(0 if self.spatial else -1) if rest else 1
        channels = -(-channels // self.channel_stride)
        positions = 1

        def row() -> int:
            return channels * math.prod(-(-size // positions) for size in rest)

        while min(rows, ROWS) * row() > PAIRED and positions < max(rest, default=1):
            positions += 1
        return max(1, -(-rows // max(1, PAIRED // max(1, row())))), positions

    def part(self, x: Tensor, strides: tuple[int, int]) -> Tensor:
        """Rows and positions of ``x``, with all of its channels: a view.

        Args:
            x: an output or, of a layer that keeps positions apart, an input ``[rows, …]``.
            strides: from `strides`.
        """
        rows, positions = strides
        between = (slice(None, None, positions),) * max(0, x.ndim - 2)
        channels = (slice(None),) * (x.ndim > 1)
        index = (*channels, *between) if self.spatial else (*between, *channels)
        return x[(slice(None, None, rows), *index)]

    def block(self, output: Tensor) -> Tensor:
        """Rows, channels and positions of an output, a view ``[rows, …]``."""
        return self._view("block", output, self._block)

    def spread(self, output: Tensor) -> Tensor:
        """At most ``budget`` outputs from everywhere, 1-dim; a view where memory has no gaps."""
        return self._view("spread", output, self._spread)

    def _view(self, kind: str, output: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``make`` gives; of a shape seen before, without working it out again."""
        key = (kind, output.shape, output.stride())
        known = self._views.get(key)
        if known is not None:
            shape, stride, offset = known
            return output.as_strided(shape, stride, int(output.storage_offset()) + offset)
        view = make(output)
        if shares_memory(view, output):
            if len(self._views) >= SHAPES:
                self._views.clear()
            offset = int(view.storage_offset()) - int(output.storage_offset())
            self._views[key] = (tuple(view.shape), view.stride(), offset)
        return view

    def _block(self, output: Tensor) -> Tensor:
        part = self.part(self.batched(output), self.strides(output))
        if self.spatial:
            return part[:, :: self.channel_stride]
        return part[..., :: self.channel_stride]

    def _spread(self, output: Tensor) -> Tensor:
        order = sorted(range(output.ndim), key=output.stride, reverse=True)
        flat = output.permute(order).reshape(-1)
        return flat[:: even_stride(int(flat.numel()), self.budget)]


def rms(a: Tensor) -> Tensor:
    """Root mean square, 0-dim in `row_dtype`; NaN or infinite where an element is."""
    norm = torch.linalg.vector_norm(a, dtype=row_dtype(a.device))
    return norm.div_(math.sqrt(max(1, a.numel())))


def example_variance(a: Tensor, examples: int = 0) -> Tensor:
    """How much of ``a`` depends on the example: variance over the examples / mean square.

    Args:
        a: any shape and floating dtype.
        examples: the dimension along which the examples run.

    Returns:
        0-dim float32 in 0 … 1; NaN for fewer than 8 examples, where it is mostly noise, and
        where nothing but zeros is left.
    """
    if a.shape[examples] < FEW:
        return torch.full((), torch.nan, device=a.device)
    values = a.detach().movedim(examples, 0).reshape(a.shape[examples], -1).float()
    return (values - values.mean(0)).square().mean() / values.square().mean()
