"""What passes from the monitor to the policy and on to the history: plain numbers, no tensors.

A `Decision` and a `Diagnosis` hold a cause and numbers. Their sentences are made from these, in
`densitylr.history.sentences`, when they are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from densitylr.history import sentences
from densitylr.history.causes import Cause, Finding

__all__ = [
    "LIFT_OFF",
    "Count",
    "Decision",
    "Diagnosis",
    "Finite",
    "Number",
    "Reading",
    "Size",
    "StageReading",
    "restored",
]

Number = float | int | str | bool
"""What a decision rests on; text is a name, such as that of a limit."""

Count = Annotated[int, lambda n: 0 <= n < 2**53]
Size = Annotated[float, lambda x: 0 <= x < math.inf]
Finite = Annotated[float, math.isfinite]
"""What `restored` holds these numbers to."""

LIFT_OFF = 0.1
"""Displacement at which a stage has lifted off: it learns."""


@dataclass(frozen=True)
class StageReading:
    """The statistics of one stage at one reading. Shares and moments are means over its layers.

    Attributes:
        near_zero: share of the outputs with ``|a| < 0.1 * rms0``.
        untrained: the same share for the untrained twin on the same input, or at the first
            reading where there is no twin.
        displacement: mean over layers of ``|ln(near_zero / untrained)|``; NaN if not read.
        estimator: where ``untrained`` comes from: ``"twin"``, ``"last-twin"`` (the twin was
            released; its last value is kept), ``"first-probe"``, or ``"mixed"``.
        near_zero_present: share of the outputs with ``|a| <= 0.1 * rms``.
        mean, rms, rms0: in the units of the activation; ``rms0`` is the untrained ``rms``.
        count: finite outputs read.
        nonfinite: NaN and infinite outputs seen.
        histogram: counts of ``|a| / rms0``, int64 ``[BINS]``, in the bins of
            `densitylr.history.EDGES`; `densitylr.history.BOUNDS` has their ends, for a picture.
        example_variance: share of the mean square that is variance between the examples of the
            batch; NaN if it was not asked for, or for fewer than 8 examples.
        peak_rms: the largest RMS of a training forward since the last reading, this one included;
            of the first layer alone where only that is watched. Infinite if a sampled output was
            not finite, NaN if it was not asked for.
        zero_gradient: 1 if every gradient of the stage was exactly zero, so that no learning
            rate moves it; 0 otherwise, and where the gradients were not looked at because the
            stage moves.
        alignment: mean over the steps since the last reading, this one included, of the cosine
            between the descent direction (minus the gradient) and the displacement of the
            stage's weights from their first values; NaN where it was not measured.
    """

    near_zero: float
    untrained: float
    displacement: float
    estimator: str
    near_zero_present: float
    mean: float
    rms: float
    rms0: float
    count: int
    nonfinite: int
    histogram: np.ndarray = field(repr=False, compare=False)
    example_variance: float = math.nan
    peak_rms: float = math.nan
    zero_gradient: float = 0.0
    alignment: float = math.nan


@dataclass(frozen=True)
class Reading:
    """All stages at one reading, taken in the forward pass before optimizer step ``step``."""

    step: Count
    stages: dict[str, StageReading]


@dataclass(frozen=True)
class Decision:
    """A change of one stage's scale.

    Attributes:
        step: optimizer steps done when it was taken; the next step uses ``scale``.
        stage: the stage's name.
        kind: ``"raise"``, ``"lower"``, ``"lift-off"`` (displacement no longer changes the scale;
            in a search, once all stages have lifted off) or ``"recover"`` (training collapsed; one
            decision for all stages, under the name of the one that showed it).
        scale_before, scale: the factor on the user's rate, before and from now on.
        rate_before, rate: the resulting learning rates.
        cause: why.
        numbers: what the cause rests on, by name.
        since: of a ``"recover"``: step of the first evidence.
    """

    step: Count
    stage: str
    kind: str
    scale_before: Size
    scale: Size
    rate_before: Size
    rate: Size
    cause: Cause = Cause.POLICY
    numbers: Mapping[str, Number] = field(default_factory=dict)
    since: Count | None = None

    @property
    def reason(self) -> str:
        """One sentence with the numbers."""
        return sentences.reason(self)

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}"


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a stage.

    Attributes:
        stage: the stage's name.
        kind: ``"starved"``, ``"hot"``, ``"dead"``, ``"bad gain"``, ``"collapsed"``,
            ``"non-finite"``, ``"bad batch"`` or ``"frozen"``.
        since_step: the optimizer step of the first evidence.
        finding: what was found.
        numbers: what the finding rests on and what was done about it, by name: numbers, and the
            first and the last `Decision` where there were some.
    """

    stage: str
    kind: str
    since_step: int
    finding: Finding
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def evidence(self) -> str:
        """The numbers it rests on, in words."""
        return sentences.evidence(self)

    @property
    def action(self) -> str:
        """What was done, or what to do."""
        return sentences.action(self)

    def __str__(self) -> str:
        has = "has a" if self.kind.startswith("bad") else "is"
        return (
            f"{self.stage} {has} {self.kind} since step {self.since_step}: "
            f"{self.evidence}; {self.action}"
        )


def restored(kind: Any, plain: Any) -> Any:
    """A value from what a checkpoint has of it: dataclasses have become dictionaries, and tuples,
    where it went through JSON, lists.

    Args:
        kind: the type of the value: a dataclass, a container of known types, a union, a class, or
            one of these with a condition (`Count`).
        plain: of plain numbers, strings, lists and dictionaries.

    Raises:
        ValueError: it is not of that type, or a field is missing that has no default.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return plain
    if origin is Annotated:
        value = restored(args[0], plain)
        if not args[1](value):
            raise ValueError(f"{value!r} is out of range")
        return value
    if origin in (Union, types.UnionType):
        return _one_of(args, plain)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(plain, Mapping):
        hints = _fields(kind)
        if unknown := plain.keys() - hints.keys():
            raise ValueError(f"a {kind.__name__} has no {sorted(unknown, key=str)}")
        try:
            return kind(**{name: restored(hints[name], value) for name, value in plain.items()})
        except TypeError as error:
            raise ValueError(str(error)) from error
    if origin is not None and issubclass(origin, Mapping) and isinstance(plain, Mapping):
        return {restored(args[0], k): restored(args[1], v) for k, v in plain.items()}
    if origin is not None and issubclass(origin, Sequence) and isinstance(plain, (list, tuple)):
        if origin is not tuple:
            return [restored(args[0], value) for value in plain]
        if len(args) == len(plain):
            return tuple(restored(of, value) for of, value in zip(args, plain, strict=True))
    elif kind is float and isinstance(plain, int) and not isinstance(plain, bool):
        return float(plain)
    elif isinstance(kind, type) and issubclass(kind, Enum) and isinstance(plain, str):
        return kind(plain)
    elif isinstance(kind, type) and isinstance(plain, kind):
        if kind is int and isinstance(plain, bool):
            raise ValueError(f"{plain!r} is no number")
        return plain
    raise ValueError(f"{plain!r:.80} is no {getattr(kind, '__name__', kind)}")


def _one_of(kinds: tuple[Any, ...], plain: Any) -> Any:
    for kind in sorted(kinds, key=lambda kind: kind is not type(plain)):
        try:
            return restored(kind, plain)
        except ValueError:
            continue
    raise ValueError(f"{plain!r:.80} is out of place")


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass."""
    return get_type_hints(kind, include_extras=True)
