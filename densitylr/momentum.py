"""Momentum correction: a raise acts on the gradients from there on, not on those in the buffer.

torch's SGD adds up gradients in a buffer, ``b = m b + g``, and steps by ``lr * b``: a raise of the
rate applies to all old gradients at once. Those of a stage that was starved are from before
anything else had learned, and a full buffer of them makes the first step at the new rate up to
``1 / (1 - m)`` times as long as the first step of a run that had it from the start. In small GPTs
that ended at chance. With the buffer multiplied by ``old rate / new rate`` what the weights are
moving by stays, and new gradients build up at the new rate, as they do at the start of training
(Goyal et al., 2017, arXiv:1706.02677, section 2.3: *momentum correction*).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.optim import SGD, Optimizer, RMSprop

from densitylr.stages import Stage

__all__ = ["correct_momentum"]


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
