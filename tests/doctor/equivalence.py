"""Does the doctor decide what ``DensityLR(observe_only=True)`` decides? ``python -m
tests.doctor.equivalence`` prints a line a configuration, and ends with 1 where one differs.

The same network is trained twice from one seed: once under the controller, once as the doctor
observes it, through global optimizer hooks.
"""

from __future__ import annotations

import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from densitylr import DensityLR, History, find_stages
from densitylr.doctor.watch import ModelDiscovery

__all__ = ["CONFIGURATIONS", "Configuration", "both", "differences"]

STEPS = 60


class _Words(nn.Module):
    """An embedding, a recurrent layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 24)
        self.rnn = nn.GRU(24, 32, batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class _Attention(nn.Module):
    """One transformer layer with layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x.view(len(x), 5, 4))).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 5)),
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(320, 3),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "gru": _Words,
    "transformer": _Attention,
}

Rates = Callable[[int, int], float]

PROFILES: dict[str, Rates] = {
    "flat": lambda i, n: 1.0,
    "geometric": lambda i, n: 1e-3 ** (1 - i / (n - 1)),
    "starved first": lambda i, n: 1e-6 if i == 0 else 1.0,
    "starved tenth": lambda i, n: 0.1 if i == 0 else 1.0,
    "hot head": lambda i, n: 0.1 if i < n - 1 else 100.0,
    "rate zero": lambda i, n: 0.0 if i == 0 else 1e-3 if i == 1 else 1.0,
    "all starved": lambda i, n: 1e-7,
}

OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "ascent": lambda groups: torch.optim.SGD(groups, lr=0.1, maximize=True),
}

BASE = {"rmsprop": 3e-3, "adamw": 3e-3}
"""The largest rate; 0.1 for SGD."""


@dataclass(frozen=True)
class Configuration:
    """What is trained.

    Attributes:
        network, profile, optimizer: names.
        loop: ``plain``, ``closure``, ``accumulated``, ``cosine``, ``warm-up`` from a rate of 0, or
            ``one-cycle``.
        frozen: the second stage has no trainable parameter.
        trained: the network was trained before.
    """

    network: str
    profile: str
    optimizer: str = "momentum"
    loop: str = "plain"
    frozen: bool = False
    trained: bool = False

    def __str__(self) -> str:
        parts = [self.network, self.profile, self.optimizer, self.loop]
        return ", ".join([*parts, *["frozen"] * self.frozen, *["trained"] * self.trained])


CONFIGURATIONS = [
    *itertools.starmap(Configuration, itertools.product(NETWORKS, PROFILES)),
    *(Configuration("mlp", p, o) for p in ("geometric", "hot head") for o in OPTIMIZERS),
    *(Configuration("cnn", "starved first", o) for o in ("rmsprop", "adamw")),
    *(
        Configuration("mlp", "geometric", loop=loop)
        for loop in ("closure", "accumulated", "cosine", "warm-up", "one-cycle")
    ),
    *(Configuration(n, "geometric", frozen=True) for n in ("mlp", "gru", "transformer")),
    *(Configuration(n, "geometric", trained=True) for n in ("mlp", "cnn")),
]


def _batches(network: str) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    while True:
        if network == "gru":
            x = torch.randint(12, (64, 7), generator=draw)
            yield x, x[:, 0] % 3
        else:
            x = torch.randn(64, 20, generator=draw)
            yield x, x[:, :3].argmax(1)


def _schedule(loop: str, optimizer: Optimizer) -> Any:
    lambdas = {
        "cosine": lambda step: 1 - step / STEPS,
        "warm-up": lambda step: min(1.0, step / 10),
        "one-cycle": lambda step: 0.1 + 0.9 * min(step, STEPS - step) / (STEPS / 2),
    }
    if loop not in lambdas:
        return None
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambdas[loop])


def _train(what: Configuration, model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    schedule = _schedule(what.loop, optimizer)
    batches = _batches(what.network)
    for _ in range(steps):
        if what.loop == "closure":
            x, y = next(batches)

            def closure(x: Tensor = x, y: Tensor = y) -> Any:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            continue
        for _ in range(2 if what.loop == "accumulated" else 1):
            x, y = next(batches)
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


def _made(what: Configuration) -> tuple[nn.Module, Callable[[], Optimizer]]:
    torch.manual_seed(0)
    model = NETWORKS[what.network]()
    stages = list(find_stages(model).values())
    if what.trained:
        _train(what, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), 100)
    if what.frozen:
        for parameter in stages[1].parameters.values():
            parameter.requires_grad_(False)
    base, factor = BASE.get(what.optimizer, 0.1), PROFILES[what.profile]
    groups = [
        {"params": list(stage.parameters.values()), "lr": base * factor(i, len(stages))}
        for i, stage in enumerate(stages)
    ]
    return model, lambda: OPTIMIZERS[what.optimizer](groups)


def both(what: Configuration) -> tuple[Any, Any]:
    """The controller and the doctor's observer, each after a training from the same seed."""
    model, make = _made(what)
    controller = DensityLR(make(), model, observe_only=True)
    _train(what, model, controller, STEPS)
    discovery = ModelDiscovery()
    model, make = _made(what)
    discovery.attach()
    try:
        _train(what, model, make(), STEPS)
    finally:
        discovery.detach()
    (observer,) = discovery.observers
    return controller, observer


def differences(what: Configuration) -> list[str]:
    """In what the doctor differs; empty where it decides alike."""
    controller, observer = both(what)
    ours: History = controller.history
    theirs: History = observer.history
    found = []
    if ours.steps.tolist() != theirs.steps.tolist():
        found.append(f"readings at {ours.steps.tolist()} and {theirs.steps.tolist()}")
    if ours.decisions != theirs.decisions:
        pairs = itertools.zip_longest(ours.decisions, theirs.decisions)
        first = next((a, b) for a, b in pairs if a != b)
        found.append(f"{len(ours.decisions)} and {len(theirs.decisions)} decisions: {first}")
    kinds = [
        [(d.stage, d.kind, d.since_step) for d in who.diagnose()] for who in (controller, observer)
    ]
    if kinds[0] != kinds[1]:
        found.append(f"diagnoses {kinds[0]} and {kinds[1]}")
    return found


def main() -> int:
    """Print the table; 1 where a configuration differs."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("densitylr").setLevel(logging.ERROR)
    different = 0
    for what in CONFIGURATIONS:
        found = differences(what)
        different += bool(found)
        print(f"{'differs' if found else 'same':8} {what}", *found, sep="\n         ")
    print(f"{len(CONFIGURATIONS) - different} of {len(CONFIGURATIONS)} configurations decide alike")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
