"""What travels from the monitor to the policy and on to the history: plain numbers, no tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

__all__ = ["Decision", "Diagnosis", "Reading", "StageReading"]


@dataclass(frozen=True)
class StageReading:
    """The statistics of one stage at one probe; shares and moments are means over its taps.

    Attributes:
        near_zero: share of outputs with ``|a| < 0.1 * rms0``.
        untrained: the same share for the untrained twin on the same input, or at the first
            probe where there is no twin.
        displacement: mean over taps of ``|ln(near_zero / untrained)|``; NaN if unread.
        estimator: where ``untrained`` comes from: ``"twin"``, ``"last-twin"`` (the twin was
            let go; its last value is kept), ``"first-probe"``, or ``"mixed"``.
        near_zero_absolute: share with ``|a| <= 0.05``.
        near_zero_present: share with ``|a| <= 0.1 * rms``.
        exactly_zero: share of exact zeros.
        mean, std, rms, rms0: in the units of the activation.
        count: finite outputs read.
        nonfinite: NaN and infinite outputs seen.
        histogram: counts of ``|a| / rms0`` in the bins of `densitylr.density.EDGES`; for a
            picture, `densitylr.history.BOUNDS` says where they begin and end.
        dormant: share of (at most 256) channels whose mean magnitude is at most 0.025 of the
            layer's.
        variety: share of the mean square that is variance over the examples of the batch; NaN
            if it was not asked for, or for fewer than 8 examples.
        peak: the largest RMS of a training forward since the last probe, this one included; of
            the first layer alone where only that is watched. Infinite if what was sampled of a
            forward was not finite, NaN if it was not asked for.
        zero_gradient: 1 if every gradient of the stage was exactly zero, so that no learning
            rate moves it; 0 otherwise, and where nobody looked (the stage moves).
        pull: mean over the steps since the last probe, this one included, of the cosine between
            the descent direction (minus the gradient) and the way that the stage's weights have
            come from where they began; NaN if nobody looked.
    """

    near_zero: float
    untrained: float
    displacement: float
    estimator: str
    near_zero_absolute: float
    near_zero_present: float
    exactly_zero: float
    mean: float
    std: float
    rms: float
    rms0: float
    count: int
    nonfinite: int
    histogram: np.ndarray = field(repr=False, compare=False)
    dormant: float = math.nan
    variety: float = math.nan
    peak: float = math.nan
    zero_gradient: float = 0.0
    pull: float = math.nan


@dataclass(frozen=True)
class Reading:
    """All stages at one probe, taken in the forward pass before optimizer step ``step``."""

    step: int
    stages: dict[str, StageReading]


@dataclass(frozen=True)
class Decision:
    """A change of one stage's scale, with its reason.

    Attributes:
        step: optimizer steps done when it was taken; the next step uses ``scale``.
        stage: the stage's name.
        kind: ``"raise"``, ``"lower"``, ``"lift-off"`` (displacement has no more to say; in a
            search, once all stages have lifted off) or ``"recover"`` (training collapsed; one
            decision for all stages, under the name of the one that showed it).
        scale_before, scale: the factor on the user's rate, before and from now on.
        rate_before, rate: the resulting learning rates.
        reason: one sentence with the numbers.
        since: of a ``"recover"``: step of the first evidence.
    """

    step: int
    stage: str
    kind: str
    scale_before: float
    scale: float
    rate_before: float
    rate: float
    reason: str
    since: int | None = None

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
        evidence: the numbers it rests on.
        action: what was done, or what to do.
    """

    stage: str
    kind: str
    since_step: int
    evidence: str
    action: str

    def __str__(self) -> str:
        has = "has a" if self.kind.startswith("bad") else "is"
        return (
            f"{self.stage} {has} {self.kind} since step {self.since_step}: "
            f"{self.evidence}; {self.action}"
        )
