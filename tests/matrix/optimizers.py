"""Every optimizer of ``torch.optim``, in each of its forms."""

from __future__ import annotations

import copy

import torch

from densitylr import DensityLR
from tests.matrix.cells import Cell


def cells() -> list[Cell]:
    return [Cell("optimizers", "SGD", "plain", _sgd)]


def _sgd() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    bare = copy.deepcopy(model)
    optimizers = (
        DensityLR(torch.optim.SGD(model.parameters(), lr=0.1), model),
        torch.optim.SGD(bare.parameters(), lr=0.1),
    )
    x = torch.randn(8, 4)
    for net, optimizer in zip((model, bare), optimizers, strict=True):
        net(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.weight, bare.weight)
