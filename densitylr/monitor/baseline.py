"""The model as it was before training: what stages are compared with while they learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from densitylr.model import Stage, WeightChecks, check_weights, find_stages, is_sharded, untrainable
from densitylr.monitor.layers import Twin, even_stride, make_twin

__all__ = ["SAMPLE", "Baseline", "sample_weights"]

SAMPLE = 2**14
"""Most weights of a parameter that are kept."""


@dataclass
class Baseline:
    """The untrained model: its stages, their untrained twins and samples of their first weights.

    `densitylr.DensityLR` and `densitylr.DensityMonitor` capture one when they are made. Capture one
    yourself where the model is trained, or is given trained weights, before they can be made: a run
    that goes on from a checkpoint loads the weights first.

    Attributes:
        stages: `densitylr.Stage` by name.
        twins: the untrained twin of each weight layer, by qualified name; None where it has none.
        first_weights: a sample of the weights of each parameter, by stage and parameter.
        checks: which stages were trained already.
        sharded: each process holds a part of the weights, so that there are no samples of them.
    """

    stages: dict[str, Stage]
    twins: dict[str, Twin | None] = field(repr=False)
    first_weights: dict[str, dict[str, Tensor]] = field(repr=False)
    checks: WeightChecks
    sharded: bool = False

    @classmethod
    def capture(
        cls,
        model: nn.Module,
        stages: Mapping[str, str | Sequence[str]] | None = None,
        *,
        pretrained: bool | None = None,
        first_weights: bool = True,
    ) -> Baseline:
        """Take a model as it is now; it is not changed.

        Args:
            model: the model, not yet trained. Under ``fully_shard`` this is a collective.
            stages: as in `densitylr.find_stages`.
            pretrained: whether the weights were trained before; None: decided by a test of the
                weights. A stage that was trained has neither a twin nor first weights.
            first_weights: keep samples of the first weights, too.

        Raises:
            TypeError, ValueError: as in `densitylr.find_stages`.
        """
        found = find_stages(model, stages)
        checks = check_weights(model, found, pretrained)
        fresh = [name for name in found if name not in checks.excluded]
        compared = {*fresh, *untrainable(found)}  # what is frozen may thaw
        twins = {
            name: make_twin(layer) if stage.name in compared else None
            for stage in found.values()
            for name, layer in stage.layers.items()
        }
        sharded = any(is_sharded(p) for s in found.values() for p in s.parameters.values())
        first = {
            name: {n: sample_weights(p).clone() for n, p in found[name].parameters.items()}
            for name in (fresh if first_weights and not sharded else ())
        }
        return cls(found, twins, first, checks, sharded)


def sample_weights(tensor: Tensor, stride: int | None = None) -> Tensor:
    """At most `SAMPLE` elements, 1-dim, of all rows and columns alike; a view where it can be.

    Args:
        tensor: a parameter, or its gradient.
        stride: of the sample, where it is known from before.
    """
    tensor = tensor.detach()
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    return flat[:: even_stride(flat.numel(), SAMPLE) if stride is None else stride]
