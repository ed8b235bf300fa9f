"""What is changed in a healthy training, and which diagnosis is expected.

A condition's name is its definition: ``geometric-1e-3``, ``random-17``, ``hot-first-100``.
Rates are factors on the net's good rate (`good_rates.json`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from densitylr import Stage
from experiments.train.tasks import Dataset

__all__ = ["ACTIVATIONS", "HEALTHY", "ONSET", "Condition", "condition"]

ONSET = 60
"""Step at which a collapse is provoked: every healthy stage has lifted off by then."""

SPIKE_STEPS = 5
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
HEALTHY = (
    "flat",
    "usable",
    *ACTIVATIONS,
    "decay",
    "dropout",
    "smoothing",
    "clipping",
    "imbalanced",
    "constant-input",
)


@dataclass(frozen=True)
class Condition:
    """One condition, for one net.

    Attributes:
        family: healthy, starved, all-starved, hot, collapse, beyond or pretrained.
        rates: factor on the good rate, by stage.
        ill: stages that must be named; empty if none.
        kinds: what they may be called.
        onset: the step at which the illness begins.
        net: options for the network.
        weight_decay, smoothing, clip: of the optimizer, the loss and the gradient norm.
        prepare: changes the untrained model.
        data: changes the data.
        spike: factor on all rates during `SPIKE_STEPS` steps from ``onset`` on.
        poison: the batch of step ``onset`` is worthless.
        pretrain: the stages are trained before, on other classes.
    """

    family: str
    rates: Mapping[str, float]
    ill: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    onset: int = 0
    net: Mapping[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.0
    smoothing: float = 0.0
    clip: float | None = None
    prepare: Callable[[Mapping[str, Stage]], None] | None = None
    data: Callable[[Dataset], Dataset] | None = None
    spike: float = 1.0
    poison: bool = False
    pretrain: bool = False


def condition(name: str, stages: list[str]) -> Condition:
    """The condition of this name for a net of these stages.

    Raises:
        ValueError: no such condition.
    """
    try:
        return _condition(name, stages)
    except (KeyError, ValueError) as error:
        raise ValueError(f"no condition {name!r} (see conf/suite)") from error


def _condition(name: str, stages: list[str]) -> Condition:
    flat = dict.fromkeys(stages, 1.0)
    places = {"first": stages[0], "middle": stages[len(stages) // 2 - (len(stages) == 2)]}
    places |= {"last-but-one": stages[-2], "last": stages[-1]}
    head, *rest = name.split("-", 1)
    tail = rest[0] if rest else ""
    if name in HEALTHY:
        return _healthy(name, flat)
    if head == "geometric":
        return _starved(_geometric(float(tail), stages))
    if head == "random":
        draw = random.Random(int(tail))
        exponents = {s: draw.uniform(-6, 0) for s in stages}
        top = max(exponents.values())  # the largest is the good rate
        return _starved({s: 10 ** (e - top) for s, e in exponents.items()})
    if name == "head-only":
        return _starved({s: 1.0 if s == stages[-1] else 1e-5 for s in stages})
    if head == "one":
        return _starved(flat | {places[tail]: 1e-4})
    if head == "all":
        rates = dict.fromkeys(stages, float(tail))
        return Condition("all-starved", rates, tuple(stages), ("starved",))
    if head == "hot":
        where, times = tail.rsplit("-", 1)
        hot = stages if where == "all" else [places[where]]
        rates = flat | dict.fromkeys(hot, float(times))
        return Condition("hot", rates, tuple(hot), ("hot", "collapsed", "non-finite"))
    if name in ("spike", "poison"):
        kinds = ("collapsed", "non-finite", "hot")
        what = Condition("collapse", flat, tuple(stages), kinds, ONSET)
        if name == "poison":
            return dataclasses.replace(what, kinds=(*kinds, "bad batch"), poison=True)
        return dataclasses.replace(what, spike=100.0)
    first = stages[0]
    if name == "rate-zero":
        return Condition("beyond", flat | {first: 0.0}, (first,), ("frozen",))
    if name == "frozen":
        return Condition("beyond", flat, (first,), ("frozen",), prepare=_freeze)
    if name == "dead":
        return Condition("beyond", flat, (first,), ("dead",), prepare=_kill)
    if head == "gain":
        prepare = _Gain(float(tail))
        return Condition("beyond", flat, (first,), ("bad gain",), prepare=prepare)
    if name == "pretrained":
        return Condition("pretrained", _geometric(1e-3, stages), pretrain=True)
    raise KeyError(name)


def _geometric(ratio: float, stages: list[str]) -> dict[str, float]:
    last = max(1, len(stages) - 1)
    return {s: ratio ** (1 - i / last) for i, s in enumerate(stages)}


def _starved(rates: Mapping[str, float]) -> Condition:
    """Stages at less than a hundredth of the largest rate must be named."""
    top = max(rates.values())
    ill = tuple(s for s, r in rates.items() if r < top / 100)
    return Condition("starved", rates, ill, ("starved",))


def _healthy(name: str, flat: Mapping[str, float]) -> Condition:
    plain = Condition("healthy", flat)
    if name in ACTIVATIONS:
        return dataclasses.replace(plain, net={"activation": ACTIVATIONS[name]})
    changes: dict[str, dict[str, Any]] = {
        "flat": {},
        "usable": {"rates": dict.fromkeys(flat, 0.1)},
        "decay": {"weight_decay": 0.1},
        "dropout": {"net": {"dropout": 0.3}},
        "smoothing": {"smoothing": 0.2},
        "clipping": {"clip": 0.1},
        "imbalanced": {"data": _imbalanced},
        "constant-input": {"data": _half_constant},
    }
    return dataclasses.replace(plain, **changes[name])


def _imbalanced(data: Dataset) -> Dataset:
    """Four fifths of the training examples are of the first classes (or the first windows)."""
    labels = data.train_y.reshape(len(data.train_y), -1)[:, 0]
    common, rare = (labels < 2).nonzero()[:, 0], (labels >= 2).nonzero()[:, 0]
    keep = torch.cat([common, rare[: max(1, len(common) // 4)]])
    return dataclasses.replace(data, train_x=data.train_x[keep], train_y=data.train_y[keep])


def _half_constant(data: Dataset) -> Dataset:
    """The upper half of every image, or of every text the first half, is the same."""

    def blank(x: Tensor) -> Tensor:
        x = x.clone()
        half = x.shape[-2] // 2 if x.ndim == 4 else x.shape[-1] // 2
        if x.ndim == 4:
            x[..., :half, :] = x.min()
        else:
            x[..., :half] = 0
        return x

    return dataclasses.replace(data, train_x=blank(data.train_x), test_x=blank(data.test_x))


def _freeze(stages: Mapping[str, Stage]) -> None:
    for parameter in next(iter(stages.values())).parameters.values():
        parameter.requires_grad_(False)


def _kill(stages: Mapping[str, Stage]) -> None:
    """The first stage's units never fire: the bias before their ReLU is far below zero."""
    biases = [p for n, p in next(iter(stages.values())).parameters.items() if n.endswith("bias")]
    with torch.no_grad():
        biases[-1].fill_(-20.0)


@dataclass(frozen=True)
class _Gain:
    factor: float

    def __call__(self, stages: Mapping[str, Stage]) -> None:
        with torch.no_grad():
            for parameter in next(iter(stages.values())).parameters.values():
                if parameter.ndim >= 2:
                    parameter.mul_(self.factor)
