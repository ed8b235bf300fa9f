"""A policy that decides nothing: every stage at a scale of its own, from the first step on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from densitylr import Needs, Observation, Policy, StageView
from densitylr.policy import StageNeeds


@dataclass
class Fixed(Policy):
    """All of its stages are for ever undecided, as those of ``repair`` are until they lift off."""

    scales: Mapping[str, float] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    needs = Needs(twins=True)
    within_user_rates = True
    corrects_momentum = True

    def init(self, stages: Mapping[str, StageView]) -> tuple[dict[str, float], Any]:
        return {name: self.scales.get(name, 1.0) for name in stages}, list(stages)

    def update(self, state: Any, seen: Observation) -> tuple[dict[str, float], Any]:
        self.asked.append(seen.step)
        return {}, state

    def requires(self, state: Any) -> dict[str, StageNeeds]:
        return {name: StageNeeds(undecided=True) for name in state}


def net() -> nn.Sequential:
    """Three stages: 0 with its norm, 3, 5."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Linear(16, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )


def batches(n: int, seed: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(16, 6, generator=generator) for _ in range(n)]
    return [(x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()) for x in inputs]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def one_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]
) -> None:
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def probes(every: int, steps: int) -> list[int]:
    """The steps with a reading where nothing is decided: half of ``every`` apart during the first
    20, then ``every``, then a twentieth of the steps so far, up to ten times ``every``.
    """
    found = [0]
    while found[-1] < steps:
        last = found[-1]
        later = min(max(every, last // 20), 10 * every)
        found.append(last + (max(1, every // 2) if last < 20 else later))
    return found[:-1]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def same(a: nn.Module, b: nn.Module) -> bool:
    """Parameters and buffers equal bit for bit."""
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    """Optimizer states equal bit for bit, in the order of the parameters."""
    left, right = a.state_dict()["state"], b.state_dict()["state"]
    if left.keys() != right.keys():
        return False
    return all(
        left[i].keys() == right[i].keys()
        and all(
            torch.equal(v, right[i][k]) if isinstance(v, Tensor) else v == right[i][k]
            for k, v in left[i].items()
        )
        for i in left
    )


def numbers_of(state: Any) -> Any:
    """A state dict with lists in the place of its tensors, to be compared with ``==``."""
    if isinstance(state, Tensor):
        return state.tolist()
    if isinstance(state, Mapping):
        return {key: numbers_of(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [numbers_of(value) for value in state]
    return state
