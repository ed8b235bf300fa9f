"""One cell of the gauntlet: one network trained once, and its results as one flat record."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from densitylr import DensityLR, Stage, find_stages
from densitylr.history import TAU
from densitylr.monitor.measure import near_zero_below
from densitylr.policy import MODES
from experiments.gauntlet.cells.ablations import ABLATIONS, Trace, ablation
from experiments.gauntlet.cells.conditions import SPIKE_STEPS, Condition, condition
from experiments.train.arms import LAYERWISE, RIVALS, evaluation_mode, layerwise, rival
from experiments.train.tasks import TASKS, Dataset, build, fingerprint, task

__all__ = [
    "ARMS",
    "GOOD_RATES",
    "NAMED_WITHIN",
    "OPTIMIZERS",
    "SCHEDULES",
    "Cell",
    "parse_arm",
    "run_cell",
]

OPTIMIZERS = ("sgd", "adamw", "rmsprop")
SCHEDULES = ("plateau", "linear-warmup")
ARMS = ("fixed", *MODES, "recover", *SCHEDULES, *RIVALS, *ABLATIONS)
WITHOUT_SCHEDULE = ("schedule-free", "dog", "ldog")
"""Rivals that average their weights instead of letting the rate decay."""

BATCH_NORM_BATCHES = 50
WARMING_UP = 0.1
"""Share of the steps over which a linear warm-up rises."""

LOSSES = 5
"""Steps whose mean loss ReduceLROnPlateau is given, as often as DensityLR takes a reading."""

NAMED_WITHIN = 40
"""Steps after its onset within which an illness must be named."""

GOOD_RATES = Path(__file__).with_name("good_rates.json")

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is trained.

    Attributes:
        net: a name in `NETS`.
        optimizer: a name in `OPTIMIZERS` or `LAYERWISE`.
        condition: as in `condition`.
        arm: ``fixed``; a mode of ``DensityLR``; ``recover`` (repair with ``recover=True``); a
            schedule instead of the cosine (``plateau``) or on top of it (``linear-warmup``); a
            rival, which has no use for the optimizer; an ablation; or a mode with other constants
            than the policy's own, as ``repair(lift_off=0.1, every=10, tau=0.2)``.
        seed: of weights and batches.
        batch: examples a step.
        steps: optimizer steps.
        schedule: ``cosine`` to zero, or ``constant``.
        start: factor on all rates, on top of the condition's.
        rate: the base rate; None: the net's good rate.
    """

    net: str
    optimizer: str
    condition: str = "flat"
    arm: str = "fixed"
    seed: int = 0
    batch: int = 32
    steps: int = 150
    schedule: str = "cosine"
    start: float = 1.0
    rate: float | None = None

    @property
    def key(self) -> str:
        return json.dumps(list(dataclasses.astuple(self)))


@functools.cache
def good_rates() -> dict[str, dict[str, float]]:
    """The tuned flat rate by network and optimizer, from `experiments.gauntlet.tune`."""
    return json.loads(GOOD_RATES.read_text(encoding="utf-8"))


def make_optimizer(
    name: str, stages: dict[str, Stage], rates: dict[str, float], decay: float
) -> Optimizer:
    """One group a stage; SGD with momentum 0.9, the others at torch's defaults."""
    groups = [
        {"params": list(stage.parameters.values()), "lr": rates[s]} for s, stage in stages.items()
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, weight_decay=decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, weight_decay=decay)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=1.0, weight_decay=decay)
    if name in LAYERWISE:
        return layerwise(name, groups, decay)
    known = ", ".join((*OPTIMIZERS, *LAYERWISE))
    raise ValueError(f"optimizer must be one of {known}, got {name!r}")


def run_cell(cell: Cell) -> Record:
    """Train the cell; numbers only, so that the record is a line of JSON."""
    began = time.perf_counter()
    with _quiet(), _near_zero_below(cell.arm):
        outcome, _ = _train(cell)
    return {**dataclasses.asdict(cell), **outcome, "seconds": round(time.perf_counter() - began, 2)}


def _train(cell: Cell) -> tuple[Record, Optimizer]:
    options = condition(cell.condition, list(find_stages(build(cell.net, cell.seed)))).net
    model = build(cell.net, cell.seed, **options)
    taken = find_stages(model)  # their names may differ under these options
    what = condition(cell.condition, list(taken))
    data = task(TASKS[cell.net])
    if what.data is not None:
        data = what.data(data)
    if what.pretrain:
        data = _pretrain(cell, model, taken, data)
    if what.prepare is not None:
        what.prepare(taken)
    rates = base_rates(cell, what)
    optimizer = make_optimizer(cell.optimizer, taken, rates, what.weight_decay)
    trained = _controlled(cell, optimizer, model)
    return train_cell(cell, what, model, trained, data), trained


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Neither warnings nor the log of a thousand runs on the terminal."""
    log = logging.getLogger("densitylr")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _near_zero_below(arm: str) -> Iterator[None]:
    """The threshold of near zero that an arm asks for; it is no option of the product."""
    with near_zero_below(parse_arm(arm)[1].get("tau", TAU) if "(" in arm else TAU):
        yield


def base_rates(cell: Cell, what: Condition) -> dict[str, float]:
    """The user's rate of each stage."""
    good = good_rates()[cell.net][cell.optimizer] if cell.rate is None else cell.rate
    return {s: good * cell.start * factor for s, factor in what.rates.items()}


def _controlled(cell: Cell, optimizer: Optimizer, model: nn.Module) -> Optimizer:
    if cell.arm in ("fixed", *SCHEDULES):
        return optimizer
    if cell.arm == "recover":
        return DensityLR(optimizer, model, recover=True)
    if cell.arm in MODES:
        return DensityLR(optimizer, model, mode=cell.arm)
    if cell.arm in RIVALS:
        return rival(cell.arm, model)
    if cell.arm in ABLATIONS:
        trace = _scales_of_another_seed(cell) if cell.arm == "replay" else None
        policy = ablation(cell.arm, model, cell.seed, trace)
        return DensityLR(optimizer, model, policy=policy)
    mode, constants = parse_arm(cell.arm)
    every = int(constants.pop("every", 5))
    constants.pop("tau", None)  # not of the policy: see `_near_zero_below`
    return DensityLR(optimizer, model, policy=MODES[mode](**constants), every=every)


def parse_arm(arm: str) -> tuple[str, dict[str, Any]]:
    """``repair(lift_off=0.1)`` as mode and constants.

    Raises:
        ValueError: it is no such text, or no constants of that policy.
    """
    found = re.fullmatch(r"(\w+)\((\w+=[\d.e+-]+(?:, ?\w+=[\d.e+-]+)*)\)", arm)
    if found is None or found[1] not in MODES:
        raise ValueError(
            f"arm must be one of {', '.join(ARMS)}, or a mode with constants, as "
            f"'repair(lift_off=0.1)', got {arm!r}"
        )
    pairs = (part.split("=") for part in found[2].replace(" ", "").split(","))
    constants = {name: float(value) for name, value in pairs}
    known = {*inspect.signature(MODES[found[1]]).parameters, "every", "tau"}
    if not constants.keys() <= known:
        raise ValueError(f"constants of {found[1]} are {', '.join(sorted(known))}, got {arm!r}")
    return found[1], constants


def _scales_of_another_seed(cell: Cell) -> Trace:
    other = dataclasses.replace(cell, arm="repair", seed=cell.seed + 1000)
    _, trained = _train(other)
    assert isinstance(trained, DensityLR)
    return [(r.step, scales) for r, _, scales in trained.history.observations()]


def train_cell(
    cell: Cell, what: Condition, model: nn.Module, optimizer: Optimizer, data: Dataset
) -> Record:
    """The training loop; the poisoned batch and the spike happen in here."""
    ours = optimizer if isinstance(optimizer, DensityLR) else None
    schedule = _schedule(cell, what, optimizer)
    generator = torch.Generator().manual_seed(cell.seed)
    order = torch.empty(0, dtype=torch.int64)
    named: list[list[Any]] = []
    losses: list[float] = []
    model.train()
    for step in range(cell.steps):
        if ours is not None and step == what.onset + NAMED_WITHIN:
            named = _names(ours)
        if len(order) < cell.batch:
            order = torch.randperm(len(data.train_x), generator=generator)
        index, order = order[: cell.batch], order[cell.batch :]
        x, y = data.train_x[index], data.train_y[index]
        if what.poison and step == what.onset:
            x, y = _poisoned(x, y, generator)
        loss = F.cross_entropy(model(x), y, label_smoothing=what.smoothing)
        losses.append(loss.item())
        loss.backward()
        if what.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), what.clip)
        optimizer.step()
        schedule(losses[-1])
        optimizer.zero_grad()
    seen = data.train_x[: BATCH_NORM_BATCHES * cell.batch].split(cell.batch)
    with evaluation_mode(optimizer, seen):
        tested = score(model, data)
    record: Record = {**tested, "train_loss": _finite(sum(losses[-10:]) / 10)}
    record["weights"] = fingerprint(model)[:16]
    if ours is not None:
        raised = [d for d in ours.history.decisions if d.kind == "raise"]
        record["named"] = named
        record["named_at_end"] = _names(ours)
        record["decisions"] = len(ours.history.decisions)
        record["raised"] = sorted({d.stage for d in raised})
        record["scales"] = {s: float(f"{v:.3g}") for s, v in ours.scales.items()}
    return record


def _names(optimizer: DensityLR) -> list[list[Any]]:
    return [[d.stage, d.kind, d.since_step] for d in optimizer.diagnose()]


def _schedule(cell: Cell, what: Condition, optimizer: Optimizer) -> Callable[[float], None]:
    """What sets the rates after a step, given its loss.

    Raises:
        ValueError: a spike of the rate is asked for where ReduceLROnPlateau sets it.
    """
    if cell.arm == "plateau":
        if what.spike != 1.0:
            raise ValueError(f"plateau sets the rate itself, so that it cannot be spiked: {cell}")
        plateau, recent = ReduceLROnPlateau(optimizer), list[float]()

        def look(loss: float) -> None:
            recent.append(loss)
            if len(recent) == LOSSES:
                plateau.step(sum(recent) / LOSSES)
                recent.clear()

        return look

    def factor(step: int) -> float:
        decay = 0.5 * (1 + math.cos(math.pi * step / cell.steps)) if cosine else 1.0
        risen = min(1.0, (step + 1) / (WARMING_UP * cell.steps)) if warming_up else 1.0
        spiked = what.spike if what.onset <= step < what.onset + SPIKE_STEPS else 1.0
        return spiked * decay * risen

    cosine = cell.schedule == "cosine" and cell.arm not in WITHOUT_SCHEDULE
    warming_up = cell.arm == "linear-warmup"
    scheduler = LambdaLR(optimizer, factor)
    return lambda loss: scheduler.step()


def _poisoned(x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A thousand times too large, or for symbols all the same; and random labels."""
    x = x * 1000 if x.is_floating_point() else torch.zeros_like(x)
    y = torch.randint(int(y.max()) + 1, y.shape, generator=generator)
    return x, y


def _pretrain(cell: Cell, model: nn.Module, stages: dict[str, Stage], data: Dataset) -> Dataset:
    """Train on one half of the classes (of the windows, for text); returns the other half."""
    labels = data.train_y.reshape(len(data.train_y), -1)
    first = labels[:, 0] < 5 if labels.shape[1] == 1 else torch.arange(len(labels)) % 2 == 0
    tested = data.test_y.reshape(len(data.test_y), -1)
    other = tested[:, 0] >= 5 if tested.shape[1] == 1 else torch.ones(len(tested), dtype=torch.bool)
    before = dataclasses.replace(data, train_x=data.train_x[first], train_y=data.train_y[first])
    rate = good_rates()[cell.net][cell.optimizer]
    optimizer = make_optimizer(cell.optimizer, stages, dict.fromkeys(stages, rate), 0.0)
    plain = Condition("healthy", dict.fromkeys(stages, 1.0))
    train_cell(dataclasses.replace(cell, arm="fixed"), plain, model, optimizer, before)
    return Dataset(
        data.train_x[~first], data.train_y[~first], data.test_x[other], data.test_y[other]
    )


@torch.no_grad()
def score(model: nn.Module, data: Dataset) -> Record:
    """Test accuracy and cross-entropy; a loss that is not finite is None, its accuracy counts."""
    model.eval()
    logits = torch.cat([model(part) for part in data.test_x.split(250)])
    model.train()
    loss = F.cross_entropy(logits, data.test_y).item()
    accuracy = (logits.argmax(1) == data.test_y).float().mean().item()
    return {"accuracy": round(accuracy, 5), "test_loss": _finite(loss)}


def _finite(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
