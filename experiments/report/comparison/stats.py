"""Paired statistics for few seeds: intervals, permutation tests, shares of a gap, and sentences.

Every arm of a study runs under the same seeds, so everything here works on per-seed
differences. Intervals are Student-t: with ten seeds or fewer a bootstrap covers too little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = ["Estimate", "Gap", "gap_closed", "holm", "paired_difference", "sign_flip_p", "verdict"]

Numbers = Sequence[float] | npt.NDArray[np.float64]
_EXACT = 16  # 2**16 sign patterns of 16 numbers are 8 MB


@dataclass(frozen=True)
class Estimate:
    """A mean per-seed difference.

    Attributes:
        effect: the mean, in the metric's unit; NaN for ``n == 0``.
        low, high: ends of the interval; None for ``n < 2``, where there is no spread to judge by.
        n: pairs.
        level: nominal coverage of the interval.
    """

    effect: float
    low: float | None
    high: float | None
    n: int
    level: float = 0.95

    @property
    def distinguishable(self) -> bool:
        """There is an interval and it excludes 0."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Gap:
    """The share of a gap that was closed.

    Attributes:
        fraction: ratio of the means, 1 when the whole gap is closed; NaN if the gap is 0.
        low, high: ends of the Fieller interval; None unless it is bounded.
        n: seeds with all three numbers.
        bounded: False where the gap itself cannot be told from 0, so that no bounded set of
            shares has the nominal coverage; False as well for ``n < 2``.
    """

    fraction: float
    low: float | None
    high: float | None
    n: int
    bounded: bool


def paired_difference(treated: Numbers, baseline: Numbers, level: float = 0.95) -> Estimate:
    r"""Mean of the per-seed differences and its paired-t interval.

    .. math:: \bar d \pm t_{(1 + level)/2,\; n - 1}\; s_d / \sqrt n

    Args:
        treated, baseline: one number a seed, in the same order of seeds.
        level: nominal coverage, in (0, 1).

    Raises:
        ValueError: unequal lengths, a number that is not finite, or a level outside (0, 1).
    """
    d = _same_seeds(treated=treated, baseline=baseline)
    return _mean_interval(d[0] - d[1], level)


def sign_flip_p(differences: Numbers, draws: int = 100_000, seed: int = 0) -> float:
    """Two-sided p-value of the mean when the sign of every difference is a coin toss.

    Up to 16 differences all sign patterns are counted and the p-value is exact, never below
    ``2 ** (1 - n)``. Beyond that ``draws`` patterns are drawn, and the observed one counts as
    one of them, ``(1 + hits) / (1 + draws)``, so that the test stays valid (Phipson and Smyth,
    2010).

    Args:
        differences: one number a seed.
        draws, seed: size and seed of the Monte Carlo sample, unused up to 16 differences.

    Returns:
        p in (0, 1]; 1 for no differences.

    Raises:
        ValueError: a number is not finite.
    """
    (d,) = _same_seeds(differences=differences)
    n = d.size
    if n == 0:
        return 1.0
    threshold = abs(d.sum()) - 1e-12 * np.abs(d).sum()  # equal sums differ in their last bits
    if n <= _EXACT:
        bits = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(np.abs((1.0 - 2.0 * bits) @ d) >= threshold))
    rng = np.random.default_rng(seed)
    hits = 0
    for start in range(0, draws, 10_000):
        signs = rng.choice((-1.0, 1.0), size=(min(10_000, draws - start), n))
        hits += int(np.sum(np.abs(signs @ d) >= threshold))
    return (1 + hits) / (1 + draws)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a family of p-values, in the order given.

    The i-th smallest of m becomes the largest of ``(m - j) p_(j)`` over ``j <= i`` (j from 0),
    and at most 1.

    Raises:
        ValueError: a p-value is outside [0, 1].
    """
    for value in p:
        if not 0 <= value <= 1:
            raise ValueError(f"a p-value must lie in [0, 1], got {value}")
    adjusted = [0.0] * len(p)
    floor = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        floor = max(floor, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = floor
    return adjusted


def gap_closed(controlled: Numbers, fixed: Numbers, flat: Numbers, level: float = 0.95) -> Gap:
    r"""Share of the gap between ``fixed`` and ``flat`` that ``controlled`` closed.

    The estimate is the ratio of means, ``mean(controlled - fixed) / mean(flat - fixed)``. The
    interval is Fieller's (1954): the shares q for which a paired t test does not reject that

    .. math:: d_i(q) = (controlled_i - fixed_i) - q\,(flat_i - fixed_i)

    has mean 0. That is a quadratic inequality in q; it is bounded exactly when the gap itself
    differs from 0 at the same level.

    Args:
        controlled, fixed, flat: one number a seed, in the same order of seeds.
        level: nominal coverage, in (0, 1).

    Raises:
        ValueError: unequal lengths, a number that is not finite, or a level outside (0, 1).
    """
    _check_level(level)
    c, x, f = _same_seeds(controlled=controlled, fixed=fixed, flat=flat)
    n = c.size
    if n == 0:
        return Gap(math.nan, None, None, 0, False)
    a, b = c - x, f - x
    ma, mb = float(a.mean()), float(b.mean())
    fraction = ma / mb if mb != 0 else math.nan
    if n < 2:
        return Gap(fraction, None, None, n, False)
    t2 = float(stats.t.ppf((1 + level) / 2, n - 1)) ** 2 / n
    (va, vab), (_, vb) = np.cov(a, b)
    square, half, constant = mb**2 - t2 * vb, ma * mb - t2 * vab, ma**2 - t2 * va
    if square <= 0:
        return Gap(fraction, None, None, n, False)
    # The estimate itself solves the inequality, so a negative value can only be rounding.
    root = math.sqrt(max(0.0, half**2 - square * constant))
    low, high = float((half - root) / square), float((half + root) / square)
    return Gap(fraction, low, high, n, True)


def verdict(
    treated: str,
    baseline: str,
    metric: str,
    estimate: Estimate,
    smallest_effect: float | None = None,
    digits: int = 4,
) -> str:
    """One sentence with effect, interval and n, that claims no more than these carry.

    Args:
        treated, baseline: names of the arms.
        metric: what was measured, as it is to be read.
        estimate: of treated minus baseline.
        smallest_effect: the smallest difference declared to matter, in the metric's unit.
        digits: decimals.
    """
    n = estimate.n
    if n == 0:
        both = f"both {treated} and {baseline}"
        return f"No seed has a value of {metric} for {both}: there is no result."
    effect = signed(estimate.effect, digits)
    if estimate.low is None or estimate.high is None:
        return (
            f"{treated} differs from {baseline} by {effect} in {metric} (n = 1 seed): "
            "one pair gives no interval, so nothing is claimed."
        )
    numbers = (
        f"{100 * estimate.level:.0f} % paired-t interval {signed(estimate.low, digits)} to "
        f"{signed(estimate.high, digits)}, n = {n} seeds"
    )
    if not estimate.distinguishable:
        text = (
            f"{treated} and {baseline} are not distinguishable in {metric}: "
            f"mean difference {effect} ({numbers})"
        )
        if smallest_effect:
            inside = max(-estimate.low, estimate.high) < smallest_effect
            text += (
                f"; a difference as large as {smallest_effect:g}, declared to matter, is "
                f"{'excluded' if inside else 'not excluded'}"
            )
        return text + "."
    word = "higher" if estimate.effect > 0 else "lower"
    size = f"{abs(estimate.effect):.{digits}f}"
    text = f"{treated} has {size} {word} {metric} than {baseline} ({numbers})"
    if smallest_effect:
        near, far = sorted((abs(estimate.low), abs(estimate.high)))
        where = (
            "the whole interval is beyond"
            if near >= smallest_effect
            else "that is less than"
            if far < smallest_effect
            else "the interval reaches below"
        )
        text += f"; {where} {smallest_effect:g}, the smallest effect declared to matter"
    return text + "."


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, typographic minus included; no sign for what rounds to 0."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return text[1:]
    return text.replace("-", "−")


def _mean_interval(d: npt.NDArray[np.float64], level: float) -> Estimate:
    _check_level(level)
    n = d.size
    if n == 0:
        return Estimate(math.nan, None, None, 0, level)
    mean = float(d.mean())
    if n < 2:
        return Estimate(mean, None, None, n, level)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * d.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n, level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")


def _same_seeds(**columns: Numbers) -> list[npt.NDArray[np.float64]]:
    arrays = {name: np.asarray(column, dtype=np.float64) for name, column in columns.items()}
    lengths = {name: array.size for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"paired numbers need one value a seed in every arm, got {lengths}")
    for name, array in arrays.items():
        if array.ndim != 1:
            raise ValueError(f"{name} must be one row of numbers, got shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return list(arrays.values())
