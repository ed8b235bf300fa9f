"""The training loop: plain, seeded, and silent about who sets the learning rates."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from densitylr import DensityLR
from experiments.train.arms import evaluation_mode
from experiments.train.tasks import Dataset

__all__ = ["Outcome", "batches", "evaluate", "train"]

Row = dict[str, float | int | None]


@dataclass
class Outcome:
    """What a training came to.

    Attributes:
        diverged: the training loss became NaN or infinite, and training was ended.
        steps: optimizer steps taken.
        train_seconds: wall time of the steps, evaluation left out.
        final: accuracy, macro_f1, test_loss and train_loss at the end.
        rows: one a step, with the evaluations where they took place.
        batch_hash: SHA-256 of the batch indices, in order.
    """

    diverged: bool = False
    steps: int = 0
    train_seconds: float = 0.0
    final: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    batch_hash: str = ""


def batches(n: int, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Indices of shuffled full batches, ``[size]`` each; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator)
        yield from order[: n - n % size].view(-1, size)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    data: Dataset,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    eval_every: int,
    max_steps: int | None = None,
    tick: Callable[[float], None] = lambda loss: None,
) -> Outcome:
    """Minimise the cross-entropy and evaluate every ``eval_every`` steps and at the end.

    Args:
        tick: called after each step with its training loss.

    Raises:
        ValueError: there is less than one batch of training images.
    """
    if len(data.train_x) < batch_size:
        raise ValueError(
            f"batch_size must be at most the {len(data.train_x)} training images, got {batch_size}"
        )
    outcome = Outcome()
    # For a rival that is judged by other weights than it trains.
    sample = data.train_x[: 50 * batch_size].split(batch_size)

    def judged() -> Row:
        with evaluation_mode(optimizer, sample):
            return evaluate(model, data.test_x, data.test_y)

    digest = hashlib.sha256()
    model.train()
    for index in batches(len(data.train_x), batch_size, epochs, seed):
        if outcome.steps == max_steps:
            break
        digest.update(index.numpy().tobytes())
        start = time.perf_counter()
        loss = F.cross_entropy(model(data.train_x[index]), data.train_y[index])
        value = loss.item()
        outcome.diverged = not math.isfinite(value)
        if not outcome.diverged:
            loss.backward()
            if isinstance(optimizer, DensityLR):
                optimizer.observe_loss(loss)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        outcome.steps += 1
        outcome.train_seconds += time.perf_counter() - start
        row: Row = {
            "step": outcome.steps,
            "seconds": outcome.train_seconds,
            "train_loss": None if outcome.diverged else value,
        }
        if outcome.steps % eval_every == 0 and not outcome.diverged:
            row |= judged()
        outcome.rows.append(row)
        tick(value)
        if outcome.diverged:
            break
    outcome.batch_hash = digest.hexdigest()
    if "accuracy" not in outcome.rows[-1]:
        outcome.rows[-1] |= judged()
    last = outcome.rows[-1]
    outcome.final = {k: last[k] for k in ("accuracy", "macro_f1", "test_loss", "train_loss")}
    return outcome


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 500) -> Row:
    """Accuracy, macro-averaged F1 and mean cross-entropy; leaves the model in training mode.

    Macro-F1 is the unweighted mean over classes of ``2 tp / (2 tp + fp + fn)``, as
    ``sklearn.metrics.f1_score(average="macro", zero_division=0)`` over the classes seen in either.
    """
    model.eval()
    logits = torch.cat([model(part) for part in x.split(batch_size)])
    model.train()
    predicted = logits.argmax(1)
    loss = F.cross_entropy(logits, y).item()
    classes = torch.unique(torch.cat([y, predicted]))
    scores = []
    for c in classes:
        hit = ((predicted == c) & (y == c)).sum().item()
        scores.append(2 * hit / ((predicted == c).sum().item() + (y == c).sum().item()))
    return {
        "accuracy": (predicted == y).float().mean().item(),
        "macro_f1": sum(scores) / len(scores),
        "test_loss": loss if math.isfinite(loss) else None,
    }
