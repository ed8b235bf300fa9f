"""Which outputs of a layer are read, so that the cost of a probe does not grow with them.

Two ways. A *block* is every so many rows, channels and positions: an untrained twin can answer
for just these. A *spread* sample takes every k-th output in the order of memory, ``k`` having no
divisor in common with any dimension, so that it visits all rows, channels and positions alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = [
    "BLOCK_CHANNELS",
    "BUDGET",
    "PAIRED",
    "SHAPES",
    "Sampler",
    "even_step",
    "shares_memory",
    "tap_budget",
]

BLOCK_CHANNELS = 64
"""Most output channels of a block."""

PAIRED = 2**16
"""Most outputs of a tap that are read while its twin answers for the same."""

BUDGET = 2**17
"""Outputs that are read in one probe, of all other taps together …"""

LEAST = 2**12
"""… but of a tap no fewer than these."""

ROWS = 8
"""Positions are left out of a block rather than rows, until there are this many rows."""

SHAPES = 16
"""Most shapes of one layer's output, or of one probe's samples, that are remembered."""

_View = tuple[tuple[int, ...], tuple[int, ...], int]


def tap_budget(taps: int) -> int:
    """Most outputs to read of each of so many taps that have no twin, a power of two."""
    return max(LEAST, 2 ** int(math.log2(BUDGET / max(1, taps))))


def even_step(size: int, most: int) -> int:
    """The step at which at most ``most`` of ``size`` elements are taken, in no dimension's beat."""
    step = max(1, -(-size // most))
    while step > 1 and math.gcd(step, size) > 1:
        step += 1
    return step


def shares_memory(sample: Tensor, output: Tensor) -> bool:
    """Whether a sample is a view of the output, and no copy."""
    return sample.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()


class Sampler:
    """The samples of one layer.

    Rows run along the first dimension. Channels are dimension 1 of a convolution's output and
    the last one of everything else; positions are all dimensions between or behind. A missing
    batch dimension is put back.

    Args:
        layer: the layer.
        budget: most outputs in a spread sample (in a block: `PAIRED`); None: all of them.
    """

    def __init__(self, layer: nn.Module, budget: int | None = PAIRED) -> None:
        self.budget = budget
        self.spatial = 0
        width = getattr(layer, "out_features", 0)
        if isinstance(layer, nn.modules.conv._ConvNd):
            self.spatial = len(layer.kernel_size)
            width = layer.out_channels if layer.groups == 1 else 0
        elif isinstance(layer, nn.Embedding):
            width = layer.embedding_dim
        self.channel_stride = 1 if budget is None else max(1, -(-width // BLOCK_CHANNELS))
        # A recurrent or attention layer has its examples along dimension 1 unless told.
        self.examples = int(not getattr(layer, "batch_first", True))
        self._views: dict[object, _View] = {}

    def batched(self, x: Tensor) -> Tensor:
        """``x`` with its batch dimension, put back where a single example was given."""
        return x.unsqueeze(0) if x.ndim <= self.spatial + 1 else x

    def strides(self, output: Tensor) -> tuple[int, int]:
        """The strides of the block along the rows and along each dimension of positions."""
        if self.budget is None:
            return 1, 1
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

    def channels(self, output: Tensor, sample: Tensor) -> Tensor:
        """The channel of each element of a sample of ``output``.

        Returns:
            int64, as many as the sample has elements, in their order; all -1 where it cannot be
            told from where they lie, because the output has gaps in memory.
        """
        reach = 1 + sum((n - 1) * s for n, s in zip(output.shape, output.stride(), strict=True))
        if not shares_memory(sample, output) or reach != output.numel():
            return torch.full((sample.numel(),), -1, device=sample.device)
        offsets = torch.tensor(sample.storage_offset() - output.storage_offset())
        for length, stride in zip(sample.shape, sample.stride(), strict=True):
            offsets = offsets[..., None] + torch.arange(length) * stride
        output = self.batched(output)
        channel = 1 if self.spatial else output.ndim - 1
        found = offsets.flatten() // max(1, output.stride(channel)) % output.shape[channel]
        return found.to(sample.device)

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
        return flat if self.budget is None else flat[:: even_step(int(flat.numel()), self.budget)]
