"""The user's parameter groups, seen by stage: whose rate is whose, which factor goes where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import SGD, Optimizer, RMSprop

from densitylr.stages import Stage

__all__ = ["StageRates", "startup"]


class StageRates:
    """The learning rates of stages, as the user's parameter groups have them at any moment.

    Args:
        optimizer: the user's optimizer; its groups are read anew at each call.
        stages: the stages by name.
    """

    def __init__(self, optimizer: Optimizer, stages: Mapping[str, Stage]) -> None:
        self.optimizer, self.stages = optimizer, stages
        self._owners = self._find_owners()

    def now(self) -> tuple[dict[str, float], float]:
        """The user's rate of each stage (its largest; 0 where nothing is trained), and the
        largest of all.
        """
        rates: dict[str, float] = {}
        for group, row in self._owned_groups():
            rate = float(group["lr"])
            members = zip(group["params"], row, strict=True)
            for owner in {o for p, o in members if o is not None and p.requires_grad}:
                rates[owner] = max(rate, rates.get(owner, 0.0))
        return {n: rates.get(n, 0.0) for n in self.stages}, max(rates.values(), default=0.0)

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


def startup(optimizer: Optimizer) -> dict[str, Any]:
    """What makes an optimizer's first steps smaller or larger than later ones, for `LiftOff`.

    SGD's and RMSprop's momentum begins with an empty buffer, and RMSprop's average of squares at
    zero. Adam and those like it correct for that; dampening as large as the momentum does, too.
    Where groups differ, the slowest to build up is what is waited for.
    """
    found: dict[str, Any] = {}
    if isinstance(optimizer, SGD | RMSprop):
        groups = [g for g in optimizer.param_groups if not g.get("dampening")]
        if heavy := [g for g in groups if 0 <= g["momentum"] < 1]:
            slowest = max(heavy, key=lambda g: float(g["momentum"]))
            found["momentum"] = float(slowest["momentum"])
            found["nesterov"] = bool(slowest.get("nesterov", False))
    if isinstance(optimizer, RMSprop):
        memories = [float(g["alpha"]) for g in optimizer.param_groups if 0 <= g["alpha"] < 1]
        found["memory"] = max(memories, default=0.0)
    return found
