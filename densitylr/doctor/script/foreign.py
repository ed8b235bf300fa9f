"""Optimizers that are seen to step but cannot be followed: fastai's own.

They are not a ``torch.optim.Optimizer``: they have no hooks and no lasting groups. The report says
that the models they train are not in it.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from densitylr.doctor.script.importing import when_imported

__all__ = ["Foreign"]

_OURS = "densitylr.integrations.fastai"


class Foreign:
    """Counts the steps of fastai's own optimizers, from the import of fastai on.

    Attributes:
        steps: those that no torch optimizer had a part in.
    """

    def __init__(self) -> None:
        self.steps = 0

    def attach(self) -> None:
        """Begin, for the rest of the process."""
        when_imported("fastai.optimizer", self._count)

    def notes(self) -> list[str]:
        """A sentence for the report; empty if no such optimizer was used."""
        if not self.steps:
            return []
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return [
            f"not watched: what {steps} of fastai's own optimizers trained, as they are no "
            "torch.optim.Optimizer: give the Learner cbs=DensityCallback(observe_only=True), from "
            "densitylr.integrations.fastai, or opt_func=partial(OptimWrapper, opt=torch.optim.Adam)"
        ]

    def _count(self) -> None:
        kind = sys.modules["fastai.optimizer"].Optimizer
        original = kind.step

        @functools.wraps(original)
        def step(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            # Within a DensityOptimizer it is the step of a torch optimizer, which is followed.
            self.steps += sys._getframe(1).f_globals.get("__name__") != _OURS
            return original(optimizer, *args, **kwargs)

        kind.step = step
