"""Give parts of a parameter group different rates for the duration of one optimizer step.

The user's groups, their order, keys and objects are what they were as soon as the step is over,
or, if the step raised, as soon as anybody looks again through `Scaling.heal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

__all__ = ["Scaling"]

Group = dict[str, Any]


class Scaling:
    """Scales learning rates of an optimizer between `apply` and `restore`.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._groups: list[Group] | None = None  # the user's own list, while a step is running
        self._rates: list[tuple[Group, Any, Any]] = []  # the user's and ours, scaled in place
        self._parts: list[tuple[Group, Group, Any]] = []  # of a group, a part with our rate

    def apply(self, factors: Sequence[Sequence[float]]) -> None:
        """Scale: one factor for each parameter of each group. All ones change nothing at all.

        A group whose factors are all equal is scaled in place; another is replaced by one
        shallow copy for each distinct factor.
        """
        self.heal()
        if all(f == 1.0 for row in factors for f in row):
            return
        groups = self.optimizer.param_groups
        self._groups = groups
        stepping: list[Group] = []
        for group, row in zip(groups, factors, strict=True):
            distinct = list(dict.fromkeys(row))
            if len(distinct) <= 1:
                if distinct and distinct[0] != 1.0:
                    rate = group["lr"]
                    group["lr"] = _scaled(rate, distinct[0])
                    self._rates.append((group, rate, group["lr"]))
                stepping.append(group)
                continue
            for factor in distinct:
                members = [p for p, f in zip(group["params"], row, strict=True) if f == factor]
                part = {**group, "params": members, "lr": _scaled(group["lr"], factor)}
                self._parts.append((group, part, part["lr"]))
                stepping.append(part)
        if self._parts:
            self.optimizer.param_groups = stepping

    def restore(self) -> None:
        """End the step: the user's groups and rates again, with what the step wrote into them.

        Raises:
            RuntimeError: the step has set a rate itself. The user's rates are back then.
        """
        if self._groups is None:
            return
        for group, part, _ in self._parts:  # all parts of a group say the same
            group.update({k: v for k, v in part.items() if k not in ("params", "lr")})
        stepped = [(part, ours) for _, part, ours in self._parts]
        stepped += [(group, ours) for group, _, ours in self._rates]
        written = [(g["lr"], ours) for g, ours in stepped if g["lr"] is not ours]
        self._put_back()
        if written:
            found, ours = written[0]
            raise RuntimeError(
                f"{type(self.optimizer).__name__} has set a rate in its own step, to {found} where "
                f"it was scaled to {ours}, and whether the scale is to be part of it cannot be "
                "told: set rates between steps, as a scheduler does"
            )

    def heal(self) -> None:
        """Undo what a step that raised has left; the user's groups lose nothing by it."""
        if self._groups is not None:
            # Someone who has set another rate since the step failed meant it.
            self._rates = [scaled for scaled in self._rates if scaled[0]["lr"] is scaled[2]]
            self._put_back()

    def _put_back(self) -> None:
        for group, rate, _ in self._rates:
            group["lr"] = rate
        if self._parts and self._groups is not None:
            self.optimizer.param_groups = self._groups
        self._groups = None
        self._rates, self._parts = [], []


def _scaled(rate: Any, factor: float) -> Any:
    """A new object: a tensor rate may be one object shared by all groups."""
    if isinstance(rate, torch.Tensor):
        return rate.detach().clone().mul_(factor)
    return rate * factor
