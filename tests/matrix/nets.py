"""The small models of the matrix, and what is compared after training them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

__all__ = ["Bags", "Checkpointed", "bias_free", "difference", "no_norm", "split_by_stage"]


class Bags(nn.Module):
    """Two stages with sparse gradients and nothing else: ``a`` and ``b``; inputs as of `net`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a = nn.EmbeddingBag(12, 8, sparse=True)
        self.b = nn.EmbeddingBag(12, 3, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        words = (x > 0).long() + 2 * torch.arange(6)
        return torch.tanh(self.a(words))[:, :3] + self.b(words)


def bias_free() -> nn.Sequential:
    """Three stages of matrices only: 0, 2, 4."""
    torch.manual_seed(1)
    layers = (nn.Linear(6, 16, bias=False), nn.Tanh(), nn.Linear(16, 8, bias=False), nn.Tanh())
    return nn.Sequential(*layers, nn.Linear(8, 3, bias=False))


class Checkpointed(nn.Module):
    """Three stages, the middle one of which is computed again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(16, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.tanh(self.stem(x))
        body = checkpoint(self.body, stem, use_reentrant=self.reentrant)
        result: Tensor = self.head(torch.tanh(body))
        return result


def no_norm() -> nn.Module:
    """Three stages, 0, 2 and 4, and no buffers."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def split_by_stage(
    model: nn.Module,
    stages: Sequence[str],
    owners: dict[str, str],
    factors: dict[str, float],
    lr: Any,
    split: bool,
) -> list[dict[str, Any]]:
    """Parameter groups, the first of which spans two stages; ``split``: a real group a stage.

    The first group holds the first stage and one tensor of the second, the next holds all the
    rest at twice the rate.
    """
    named = dict(model.named_parameters())
    second = next(n for n in named if owners[n] == stages[1])
    first = [n for n in named if owners[n] == stages[0] or n == second]
    groups = [(first, 1.0), ([n for n in named if n not in first], 2.0)]
    if not split:
        return [{"params": [named[n] for n in names], "lr": lr * f} for names, f in groups if names]
    return [
        {"params": [named[n] for n in own], "lr": lr * f * factors[stage]}
        for names, f in groups
        for stage in stages
        if (own := [n for n in names if owners[n] == stage])
    ]


def difference(
    ours: tuple[nn.Module, Optimizer], theirs: tuple[nn.Module, Optimizer]
) -> str | None:
    """The first thing in which two runs are not equal bit for bit; None if there is none.

    Parameters, buffers and the optimizer's state of each parameter are compared, by name.
    """
    for (name, a), b in zip(
        ours[0].state_dict().items(), theirs[0].state_dict().values(), strict=True
    ):
        if not torch.equal(a, b):
            return f"{name} by up to {float((a.double() - b.double()).abs().max()):.3g}"
    pairs = zip(ours[0].named_parameters(), theirs[0].parameters(), strict=True)
    for (name, p), q in pairs:
        mine, other = ours[1].state.get(p, {}), theirs[1].state.get(q, {})
        if mine.keys() != other.keys():
            return f"the state of {name} has {sorted(mine)}, not {sorted(other)}"
        for key, a in mine.items():
            b = other[key]
            equal = torch.equal(a, b) if isinstance(a, Tensor) else a == b
            if not equal:
                return f"{key} of {name}: {a} is not {b}"
    return None
