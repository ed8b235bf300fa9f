"""What lift-off means, and how far a rate has reached the weights. Pure functions.

A stage that learns changes the distribution of its own outputs within a few dozen steps; a starved
one does not. Its *displacement* ``D = |ln(near-zero density / untrained density)|`` tells them
apart (`densitylr.StageReading`). A stage *has lifted off* once ``D`` has reached `LIFT_OFF`.
"""

from __future__ import annotations

import math

from densitylr.history import LIFT_OFF, StageReading
from densitylr.policy.base import BuildUp

__all__ = ["check_constants", "effective_steps", "expected_displacement", "visible"]

FULL = 10_000
"""Steps after which every buffer is taken to be full."""


def effective_steps(start: int, stop: int, build_up: BuildUp) -> float:
    """How many steps at full effect the steps ``start`` … ``stop - 1`` amount to.

    With a constant gradient g, a buffer that begins empty holds ``g (1 - momentum**t) /
    (1 - momentum)`` in step t = 1, 2, …, and is one step ahead with Nesterov's momentum. An average
    of squares that begins at zero is ``g² (1 - memory**t)``; RMSprop divides by its root, before
    the momentum.

    Args:
        start, stop: steps since the stage began, counted from 0.
        build_up: the optimizer's momentum and memory.
    """
    start, stop = max(0, start), max(0, stop)
    momentum, memory = build_up.momentum, build_up.memory
    if start >= FULL or not (momentum or memory):
        return float(stop - start)
    if not memory:
        ahead = 1 + build_up.nesterov
        lacking = momentum ** (start + ahead) - momentum ** (stop + ahead)
        return stop - start - lacking / (1 - momentum)
    if not momentum:
        return sum(1 / math.sqrt(1 - memory**t) for t in range(start + 1, stop + 1))
    held, total = 0.0, 0.0
    for t in range(1, stop + 1):
        held = momentum * held + (1 - momentum) / math.sqrt(1 - memory**t)
        total += held if t > start else 0.0
    return total


def expected_displacement(
    steps: int, build_up: BuildUp, *, patience: int, lift_off: float = LIFT_OFF
) -> float:
    """What a stage that learns has moved by: ``lift_off * min(1, effective steps / patience)``."""
    built_up = BuildUp(build_up.momentum, 0.0, build_up.nesterov)
    return lift_off * min(1.0, effective_steps(0, steps, built_up) / patience)


def visible(displacement: float, reading: StageReading, least: float) -> bool:
    """Whether a displacement is above ``least`` and above its sampling noise.

    With n near-zero outputs counted the noise is of the order of ``1 / sqrt(n)``; twice that is
    asked for.
    """
    near_zero = max(1.0, reading.count * reading.untrained)
    return displacement >= max(least, 2 / math.sqrt(near_zero))


def check_constants(
    policy: object,
    *,
    positive: tuple[str, ...] = (),
    above_one: tuple[str, ...] = (),
    not_negative: tuple[str, ...] = (),
) -> None:
    """Raise ValueError, with the name and the value, for a constant of a policy out of its
    range."""
    rules = (
        (positive, lambda value: value > 0, "must be positive"),
        (above_one, lambda value: value > 1, "must be greater than 1"),
        (not_negative, lambda value: value >= 0, "must not be negative"),
    )
    for names, holds, rule in rules:
        for name in names:
            value = getattr(policy, name)
            if not holds(value):
                raise ValueError(f"{name} {rule}, got {value!r}")
