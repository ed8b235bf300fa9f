"""The report's statistics against slow definitions, other implementations, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from experiments.report.comparison import Estimate, gap_closed, paired_difference, signed
from experiments.report.comparison.stats import holm, sign_flip_p, verdict

numbers = st.floats(-10, 10).map(lambda x: round(x, 3))


def test_interval_is_scipys_paired_interval() -> None:
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 12):
        a, b = rng.normal(size=n), rng.normal(size=n)
        ours = paired_difference(a, b, level=0.9)
        theirs = scipy_stats.ttest_rel(a, b).confidence_interval(0.9)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
        assert ours.effect == pytest.approx(np.mean(a - b))
        assert ours.n == n


@pytest.mark.parametrize("n", [3, 5])
def test_interval_covers_at_its_level(n: int) -> None:
    rng = np.random.default_rng(1)
    trials = 4000
    hits = 0
    for _ in range(trials):
        e = paired_difference(rng.normal(0.3, 1, n), rng.normal(0, 1, n))
        assert e.low is not None
        assert e.high is not None
        hits += e.low <= 0.3 <= e.high
    assert abs(hits / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_one_pair_and_none_have_no_interval() -> None:
    one = paired_difference([0.9], [0.8])
    assert (one.low, one.high, one.n) == (None, None, 1)
    assert not one.distinguishable
    none = paired_difference([], [])
    assert math.isnan(none.effect)
    assert none.n == 0


def test_equal_numbers_are_not_distinguishable() -> None:
    same = paired_difference([0.9, 0.8, 0.7], [0.9, 0.8, 0.7])
    assert (same.effect, same.low, same.high) == (0, 0, 0)
    assert not same.distinguishable


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match=r"treated.*2.*baseline.*1"):
        paired_difference([1, 2], [1])
    with pytest.raises(ValueError, match=r"baseline must be finite, got nan"):
        paired_difference([1, 2], [1, math.nan])
    with pytest.raises(ValueError, match=r"level must lie in \(0, 1\), got 95"):
        paired_difference([1, 2], [1, 2], level=95)
    with pytest.raises(ValueError, match="level must lie"):
        gap_closed([1, 2], [1, 2], [1, 2], level=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=7))
def test_sign_flip_is_brute_force(d: list[float]) -> None:
    observed = abs(math.fsum(d))
    patterns = list(itertools.product((1, -1), repeat=len(d)))
    hits = sum(
        abs(math.fsum(s * x for s, x in zip(p, d, strict=True))) >= observed - 1e-9
        for p in patterns
    )
    assert sign_flip_p(d) == pytest.approx(hits / len(patterns))


def test_sign_flip_is_scipys_permutation_test() -> None:
    d = np.array([0.3, 0.1, -0.2, 0.7, 0.4, 0.25])
    theirs = scipy_stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=10**6
    )
    assert sign_flip_p(d) == pytest.approx(theirs.pvalue)


def test_sign_flip_sampled_agrees_with_exact_and_repeats() -> None:
    rng = np.random.default_rng(3)
    d = rng.normal(0.4, 1, 17)
    signs = 1.0 - 2.0 * ((np.arange(2**17)[:, None] >> np.arange(17)) & 1)
    exact = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12)
    assert sign_flip_p(d) == pytest.approx(exact, abs=0.005)
    assert sign_flip_p(d) == sign_flip_p(d)
    # Never 0, however clear: the observed pattern is one of them.
    assert sign_flip_p(np.ones(30), draws=500) == pytest.approx(1 / 501)


def test_sign_flip_has_a_floor() -> None:
    assert sign_flip_p([1.0, 2.0, 3.0]) == 0.25
    assert sign_flip_p([0.0, 0.0]) == 1.0
    assert sign_flip_p([]) == 1.0


def holm_by_hand(p: list[float]) -> list[float]:
    """Smallest level at which the step-down procedure, done literally, rejects each."""
    levels = sorted({min(1.0, q * k) for q in p for k in range(1, len(p) + 1)} | {1.0})
    result = []
    for i in range(len(p)):
        for level in levels:
            order = sorted(range(len(p)), key=lambda j: p[j])
            rejected = set()
            for rank, j in enumerate(order):
                if p[j] * (len(p) - rank) > level:
                    break
                rejected.add(j)
            if i in rejected or level == 1.0:
                result.append(level)
                break
    return result


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_the_step_down_procedure(p: list[float]) -> None:
    assert holm(p) == pytest.approx(holm_by_hand(p))


def test_holm_example_and_refusal() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        holm([0.1, 1.5])


def test_fieller_is_the_inversion_of_the_paired_test() -> None:
    rng = np.random.default_rng(4)
    for n in (3, 5, 10):
        fixed = rng.normal(0.9, 0.005, n)
        flat = fixed + rng.normal(0.05, 0.008, n)
        controlled = fixed + rng.normal(0.045, 0.008, n)
        gap = gap_closed(controlled, fixed, flat)
        assert gap.bounded
        assert gap.low is not None
        assert gap.high is not None
        grid = np.linspace(gap.low - 1, gap.high + 1, 4001)
        d = (controlled - fixed) - grid[:, None] * (flat - fixed)
        p = scipy_stats.ttest_1samp(d, 0, axis=1).pvalue
        kept = grid[p >= 0.05]
        step = grid[1] - grid[0]
        assert (kept.min(), kept.max()) == pytest.approx((gap.low, gap.high), abs=step)
        assert np.all(np.diff(np.flatnonzero(p >= 0.05)) == 1)


def test_fieller_covers_at_its_level() -> None:
    rng = np.random.default_rng(5)
    trials = 3000
    hits = 0
    for _ in range(trials):
        fixed = rng.normal(0, 1, 5)
        flat = fixed + rng.normal(5, 0.5, 5)
        controlled = fixed + rng.normal(4, 0.5, 5)
        gap = gap_closed(controlled, fixed, flat)
        hits += gap.low is None or gap.high is None or gap.low <= 0.8 <= gap.high
    assert abs(hits / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_a_gap_that_may_be_zero_has_no_bounded_share() -> None:
    gap = gap_closed([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1.0, -1.0, 0.5])
    assert not gap.bounded
    assert gap.low is None
    assert gap_closed([1.0], [0.0], [2.0]).fraction == 0.5
    assert not gap_closed([1.0], [0.0], [2.0]).bounded
    assert math.isnan(gap_closed([1.0, 2.0], [0.0, 0.0], [0.0, 0.0]).fraction)
    assert gap_closed([], [], []).n == 0


def test_a_gap_without_noise_is_a_point() -> None:
    gap = gap_closed([1.0, 1.0], [0.0, 0.0], [2.0, 2.0])
    assert (gap.fraction, gap.low, gap.high, gap.bounded) == (0.5, 0.5, 0.5, True)


def test_verdict_claims_what_the_interval_carries() -> None:
    def say(low: float, high: float, smallest: float | None = None) -> str:
        return verdict("a", "b", "accuracy", Estimate((low + high) / 2, low, high, 5), smallest)

    assert say(0.01, 0.03) == (
        "a has 0.0200 higher accuracy than b "
        "(95 % paired-t interval +0.0100 to +0.0300, n = 5 seeds)."
    )
    assert "lower accuracy" in say(-0.03, -0.01)
    assert "not distinguishable" in say(-0.01, 0.03)
    assert "not distinguishable" in say(0.0, 0.03)
    assert "is excluded" in say(-0.001, 0.002, 0.005)
    assert "is not excluded" in say(-0.001, 0.006, 0.005)
    assert "is not excluded" in say(-0.006, 0.001, 0.005)
    assert "excluded" not in say(-0.001, 0.006)
    assert "whole interval is beyond 0.005" in say(0.01, 0.03, 0.005)
    assert "reaches below 0.005" in say(0.001, 0.03, 0.005)
    assert "that is less than 0.005" in say(0.001, 0.002, 0.005)


def test_verdict_of_one_seed_and_none() -> None:
    one = verdict("a", "b", "accuracy", paired_difference([0.9], [0.8]))
    assert "+0.1000" in one
    assert "n = 1" in one
    assert "no interval" in one
    assert "no result" in verdict("a", "b", "accuracy", paired_difference([], []))


def test_signs_are_typographic() -> None:
    assert signed(-0.5, 1) == "−0.5"
    assert signed(0.5, 1) == "+0.5"
    assert signed(-0.00001) == "0.0000"
