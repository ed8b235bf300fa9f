"""The user's parameter groups, by stage: their rates, their scaling for one step, their momentum.

Parts of a group get different rates for the duration of one optimizer step (`ScaledGroups`). The
user's groups, their order, keys and objects are what they were as soon as the step is over, whether
it has raised or not; if it raised where the user's own optimizer was stepped directly, as soon as
the next step begins.

*Momentum correction*: torch's SGD adds up gradients in a buffer, ``b = m b + g``,
and steps by ``lr * b``: a raise of the rate applies to all old gradients at once. Those of a stage
that was starved are from before anything else had learned, and a full buffer of them makes the
first step at the new rate up to ``1 / (1 - m)`` times as long as the first step of a run that had
it from the start. In small GPTs that ended at chance. With the buffer multiplied by ``old rate /
new rate`` what the weights are moving by stays, and new gradients build up at the new rate, as they
do at the start of training (Goyal et al., 2017, arXiv:1706.02677, section 2.3: *momentum
correction*).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim import SGD, Optimizer, RMSprop

from densitylr.model import Stage
from densitylr.policy import BuildUp

__all__ = [
    "RateSource",
    "ScaledGroups",
    "StageRate",
    "StageRates",
    "build_up_of",
    "correct_momentum",
]


class StageRate(NamedTuple):
    """The user's learning rate of a stage, and what goes with it.

    Attributes:
        lr: the largest of its parameter groups; 0 where nothing is trained.
        max_lr: the largest of any stage that the same optimizer trains.
        optimizer: the class name of that optimizer; empty where there is none.
        build_up: of that optimizer.
    """

    lr: float
    max_lr: float
    optimizer: str
    build_up: BuildUp


class RateSource(Protocol):
    """Where a control loop gets the user's rates from."""

    stages: Mapping[str, Stage]

    def now(self) -> dict[str, StageRate]:
        """The rate of each stage, in the model's order."""


class StageRates:
    """The learning rates of stages, as the user's parameter groups have them at any moment.

    Args:
        optimizer: the user's optimizer; its groups are read anew at each call.
        stages: the stages by name.
        build_up: of the optimizer.
    """

    def __init__(
        self, optimizer: Optimizer, stages: Mapping[str, Stage], build_up: BuildUp | None = None
    ) -> None:
        self.optimizer, self.stages = optimizer, stages
        self.build_up = build_up or BuildUp()
        self._owners = self._find_owners()

    def now(self) -> dict[str, StageRate]:
        """The user's rate of each stage."""
        rates: dict[str, float] = {}
        for group, row in self._owned_groups():
            rate = float(group["lr"])
            members = zip(group["params"], row, strict=True)
            for owner in {o for p, o in members if o is not None and p.requires_grad}:
                rates[owner] = max(rate, rates.get(owner, 0.0))
        largest, kind = max(rates.values(), default=0.0), type(self.optimizer).__name__
        return {
            name: StageRate(rates.get(name, 0.0), largest, kind, self.build_up)
            for name in self.stages
        }

    def factors(
        self, scales: Mapping[str, float], groups: Iterable[Mapping[str, Any]]
    ) -> list[list[float]]:
        """The scale of each parameter's stage, for each parameter of each group.

        Args:
            scales: by stage; 1 for a stage that is not in it.
            groups: those that are stepped, of parameters that are all in the user's groups.
        """
        owned = {
            id(p): owner
            for group, row in self._owned_groups()
            for p, owner in zip(group["params"], row, strict=True)
        }
        return [[scales.get(owned[id(p)] or "", 1.0) for p in group["params"]] for group in groups]

    def _owned_groups(self) -> list[tuple[dict[str, Any], list[str | None]]]:
        """The user's parameter groups, each with the stages of its parameters."""
        groups = self.optimizer.param_groups
        if [len(g["params"]) for g in groups] != [len(row) for row in self._owners]:
            self._owners = self._find_owners()  # a group was added
        return list(zip(groups, self._owners, strict=True))

    def _find_owners(self) -> list[list[str | None]]:
        """The stage of each parameter of each group; None for a parameter outside the model."""
        by_id = {id(p): n for n, stage in self.stages.items() for p in stage.parameters.values()}
        return [
            [by_id.get(id(p)) for p in group["params"]] for group in self.optimizer.param_groups
        ]


def build_up_of(optimizer: Optimizer) -> BuildUp:
    """What makes an optimizer's first steps smaller or larger than its later ones.

    SGD's and RMSprop's momentum begins with an empty buffer, and RMSprop's average of squares at
    zero. Adam and those like it correct for that; dampening as large as the momentum does, too. If
    groups differ, the largest momentum (the slowest to build up) is used.
    """
    if not isinstance(optimizer, SGD | RMSprop):
        return BuildUp()
    momentum, nesterov, memory = 0.0, False, 0.0
    groups = [g for g in optimizer.param_groups if not g.get("dampening")]
    if heavy := [g for g in groups if 0 <= g["momentum"] < 1]:
        slowest = max(heavy, key=lambda g: float(g["momentum"]))
        momentum, nesterov = float(slowest["momentum"]), bool(slowest.get("nesterov", False))
    if isinstance(optimizer, RMSprop):
        memories = [float(g["alpha"]) for g in optimizer.param_groups if 0 <= g["alpha"] < 1]
        memory = max(memories, default=0.0)
    return BuildUp(momentum, memory, nesterov)


@torch.no_grad()
def correct_momentum(
    optimizer: Optimizer,
    stages: Mapping[str, Stage],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> None:
    """Keep what the weights of each raised stage are moving by; a lower scale applies at once.

    Args:
        optimizer: whose buffers are multiplied, in place: torch's SGD or RMSprop, or one derived
            from them. Nothing is done to another: Adam's steps do not grow with its momentum.
        stages: the stages by name.
        before: scale of each stage until now.
        after: scale from here on.
    """
    if not isinstance(optimizer, SGD | RMSprop):
        return
    for name, stage in stages.items():
        if after[name] <= before[name]:
            continue
        for parameter in stage.parameters.values():
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            if buffer is not None:
                buffer.mul_(before[name] / after[name])


Group = dict[str, Any]


class _Plan(NamedTuple):
    """What is changed for a step. Made before anything is written, so that all can be put back.

    Attributes:
        groups: the user's own list of groups.
        stepping: what takes its place; the same list, if no group is split.
        rates: of each group that is scaled in place, the user's rate and ours.
        parts: of each group that is split, its parts, and the rate of each.
    """

    groups: list[Group]
    stepping: list[Group]
    rates: list[tuple[Group, Any, Any]]
    parts: list[tuple[Group, Group, Any]]


class ScaledGroups:
    """Scales learning rates of an optimizer between `apply` and `restore`.

    Whatever is interrupted, and wherever: `heal` puts the user's groups and rates back.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._plan: _Plan | None = None  # while a step is running

    def apply(self, factors: Sequence[Sequence[float]]) -> None:
        """Scale: one factor for each parameter of each group. All ones change nothing at all.

        A group whose factors are all equal is scaled in place; another is replaced by one
        shallow copy for each distinct factor.
        """
        self.heal()
        if all(f == 1.0 for row in factors for f in row):
            return
        plan = self._plan = _plan(self.optimizer.param_groups, factors)
        for group, _, ours in plan.rates:
            group["lr"] = ours
        if plan.parts:
            self.optimizer.param_groups = plan.stepping

    def restore(self) -> None:
        """End the step: the user's groups and rates again, with what the step wrote into them.

        Raises:
            RuntimeError: the step has set a rate itself. The user's rates are back then.
        """
        plan = self._plan
        if plan is None:
            return
        for group, part, _ in plan.parts:  # all parts of a group say the same
            group.update({k: v for k, v in part.items() if k not in ("params", "lr")})
        stepped = [(part, ours) for _, part, ours in plan.parts]
        stepped += [(group, ours) for group, _, ours in plan.rates]
        written = [(g["lr"], ours) for g, ours in stepped if g["lr"] is not ours]
        for group, rate, _ in plan.rates:
            group["lr"] = rate
        self.heal()
        if written:
            found, ours = written[0]
            raise RuntimeError(
                f"{type(self.optimizer).__name__} has set a rate in its own step, to {found} where "
                f"it was scaled to {ours}, and whether the scale is to be part of it cannot be "
                "told: set rates between steps, as a scheduler does"
            )

    def heal(self) -> None:
        """Undo what is left of a step; may be called at any time, and again where it was
        interrupted.

        What is not ours any more was set since by somebody who meant it.
        """
        if self._plan is None:
            return
        for group, rate, ours in self._plan.rates:
            if group["lr"] is ours:
                group["lr"] = rate
        if self.optimizer.param_groups is self._plan.stepping:
            self.optimizer.param_groups = self._plan.groups
        self._plan = None


def _plan(groups: list[Group], factors: Sequence[Sequence[float]]) -> _Plan:
    """How each group is scaled; nothing is changed yet."""
    plan = _Plan(groups, [], [], [])
    for group, row in zip(groups, factors, strict=True):
        distinct = list(dict.fromkeys(row))
        if len(distinct) <= 1:
            plan.stepping.append(group)
            if distinct and distinct[0] != 1.0:
                plan.rates.append((group, group["lr"], _scaled(group["lr"], distinct[0])))
            continue
        for factor in distinct:
            members = [p for p, f in zip(group["params"], row, strict=True) if f == factor]
            part = {**group, "params": members, "lr": _scaled(group["lr"], factor)}
            plan.stepping.append(part)
            plan.parts.append((group, part, part["lr"]))
    return plan


def _scaled(rate: Any, factor: float) -> Any:
    """A new object: a tensor rate may be one object shared by all groups."""
    if isinstance(rate, torch.Tensor):
        return rate.detach().clone().mul_(factor)
    return rate * factor
