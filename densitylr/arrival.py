"""How a raise comes into force: as it would, had momentum begun with it. No tensors.

Momentum builds up at the start of training: in the t-th step a rate has ``1 - momentum**t`` of its
effect. A stage that was starved has a full buffer when its rate is raised, of gradients from before
anything else had learned, so that its first step at the new rate would be up to ``1 / (1 -
momentum)`` times as long as the first step of a run that had this rate from the start. In small
GPTs under SGD that ended at chance. So of a raise ``(1 - momentum**k) / (1 - momentum**t)`` is in
force in the k-th step after it: what it would be with gradients from there on only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["FULL", "Arrival"]

FULL = 10_000
"""Steps after which every buffer is full."""


class Arrival:
    """What is in force of the scales that were decided.

    Args:
        momentum: of the optimizer, where it begins with an empty buffer; 0 for one whose steps do
            not grow with it, as Adam's.
        nesterov: it is Nesterov's, which is one step ahead.
    """

    def __init__(self, momentum: float = 0.0, nesterov: bool = False) -> None:
        self.momentum, self.ahead = momentum, int(nesterov)
        self.steps = 0  # that have begun; `FULL` for a buffer of unknown age
        self.late: dict[str, float] = {}  # what is missing of each scale, were the buffer full

    def advance(self) -> None:
        """A step begins."""
        self.steps += 1
        self.late = {name: part * self.momentum for name, part in self.late.items()}

    def anew(self, scales: Mapping[str, float]) -> None:
        """Between two steps: what is above a scale of 1 comes into force from the next one on."""
        kept = self._kept(0) - self._kept(self.steps)
        self.late = {name: (scale - 1) * kept for name, scale in scales.items() if scale > 1}

    def changed(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        """New scales were decided, for the step that has begun last."""
        for name, scale in after.items():
            if scale > before[name]:
                kept = self._kept(1) - self._kept(self.steps)
                self.late[name] = self.late.get(name, 0.0) + (scale - before[name]) * kept
            elif name in self.late:
                self.late[name] *= scale / before[name]

    def in_force(self, scales: Mapping[str, float]) -> dict[str, float]:
        """What is in force of ``scales``, the last that were decided, in the step begun last."""
        full = 1 - self._kept(max(1, self.steps))
        return {name: scale - self.late.get(name, 0.0) / full for name, scale in scales.items()}

    def _kept(self, steps: int) -> float:
        """What momentum still lacks in a step, of so many gradients in a row."""
        return self.momentum ** (steps + self.ahead)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"steps": self.steps, "late": dict(self.late)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.late = state["steps"], dict(state["late"])
