"""What one reading shows of a collapse, at the very bounds; healthy readings show nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest

from densitylr import Reading, StageReading
from densitylr.diagnosis import RECENT, CollapseDetector, CollapseSign
from tests.support.readings import stage_reading


def at(step: int, **stages: StageReading) -> Reading:
    return Reading(step, stages)


def usual(peak: float = 1.0, example_variance: float = 0.5, **numbers: Any) -> StageReading:
    return stage_reading(0.3, peak_rms=peak, example_variance=example_variance, **numbers)


def after(
    healthy: dict[str, StageReading], now: dict[str, StageReading], step: int = 60
) -> CollapseSign | None:
    """What is made of a reading, after four healthy ones."""
    detector = CollapseDetector()
    for before in (0, 20, 40, 50):
        assert detector.look(at(before, **healthy)) is None
        assert detector.healthy
    return detector.look(at(step, **now))


@pytest.mark.parametrize(
    ("quiet", "exploded"),
    [
        (0.49, False),
        (1.5, False),  # fifteen times what it was, but no more than the loudest stage may be
        (2.0, False),
        (2.01, True),
    ],
)
def test_a_quiet_stage_may_grow_up_to_twice_the_loudest(quiet: float, exploded: bool) -> None:
    healthy = {"quiet": usual(0.1), "loud": usual(1.0)}
    sign = after(healthy, {"quiet": usual(quiet), "loud": usual(1.0)})
    assert (sign is not None) == exploded
    if sign is not None:
        assert (sign.stage, sign.since, sign.sure) == ("quiet", 60, True)
        assert sign.numbers == {"sign": "exploded", "peak_rms": quiet, "usual": 0.1}


@pytest.mark.parametrize(("loud", "exploded"), [(4.9, False), (5.0, False), (5.01, True)])
def test_a_loud_stage_may_grow_up_to_fivefold(loud: float, exploded: bool) -> None:
    healthy = {"quiet": usual(0.1), "loud": usual(1.0)}
    sign = after(healthy, {"quiet": usual(0.1), "loud": usual(loud)})
    assert (sign is not None) == exploded


@pytest.mark.parametrize(("step", "counts"), [(19, False), (20, True)])
def test_in_the_first_steps_a_net_may_change_by_any_factor(step: int, counts: bool) -> None:
    detector = CollapseDetector()
    for before in (0, 1, 2, 3):
        detector.look(at(before, a=usual(1.0)))
    assert (detector.look(at(step, a=usual(100.0))) is not None) == counts


@pytest.mark.parametrize(
    ("share", "sign", "sure"),
    [
        (0.201, None, False),  # 0.4 of what it was
        (0.199, "all alike", False),
        (0.0101, "all alike", False),
        (0.0099, "alike", False),  # 0.02
        (0.00101, "alike", False),
        (0.00099, "alike", True),  # 0.002
    ],
)
def test_how_much_less_may_depend_on_the_example(
    share: float, sign: str | None, sure: bool
) -> None:
    healthy = {"a": usual(), "b": usual()}
    detector = CollapseDetector()
    for before in (0, 20, 40, 50):
        detector.look(at(before, **healthy))
    both = {"a": usual(example_variance=share), "b": usual(example_variance=share)}
    found = detector.look(at(60, **both))
    assert detector.healthy == (sign is None)
    if found is None and sign is not None:  # the next reading has to show it, too
        found = detector.look(at(65, **both))
        assert found is not None
        assert not found.sure
    assert (found.numbers["sign"] if found else None) == sign
    if found is not None:
        assert (found.since, found.stage, found.sure) == (60, "a", sure)


@pytest.mark.parametrize(
    ("first", "share", "ill"),
    [(0.1, 0.6, False), (0.1, 0.61, True), (0.31, 0.61, False), (0.3, 0.61, True)],
)
def test_how_many_outputs_may_be_near_zero(first: float, share: float, ill: bool) -> None:
    detector = CollapseDetector()
    for before in (0, 20, 40, 50):
        detector.look(at(before, a=usual(near_zero_present=first)))
    for step in (60, 65):
        found = detector.look(at(step, a=usual(near_zero_present=share)))
    assert (found is not None) == ill
    assert found is None or found.numbers == {"sign": "near zero", "share": share, "first": first}


@pytest.mark.parametrize(
    ("numbers", "sign"),
    [
        ({"nonfinite": 3}, {"sign": "non-finite", "nonfinite": 3}),
        ({"peak": math.inf}, {"sign": "non-finite step"}),
    ],
)
def test_what_is_not_finite_counts_from_the_first_step_on(
    numbers: dict[str, Any], sign: dict[str, Any]
) -> None:
    found = CollapseDetector().look(at(0, a=usual(), b=usual(**numbers)))
    assert found is not None
    assert (found.stage, found.since, found.sure, found.numbers) == ("b", 0, True, sign)


def test_a_reading_is_compared_with_the_last_three_healthy_ones() -> None:
    assert RECENT == 3
    detector = CollapseDetector()
    peaks = [1.0, 4.0, 2.0, 2.0, 2.0]
    for i, peak in enumerate(peaks):
        assert detector.look(at(20 * i, a=usual(peak))) is None
    assert [r.step for r in detector.recent] == [40, 60, 80]
    # Five times 2, though 4 has been seen before them.
    assert detector.look(at(100, a=usual(10.1))) is not None
    assert [r.step for r in detector.recent] == [40, 60, 80]
    detector.go_back([at(0, a=usual(4.0))])
    assert detector.look(at(120, a=usual(10.1))) is None


def test_a_stage_that_was_not_read_shows_nothing() -> None:
    unread = stage_reading(math.nan, count=0, peak_rms=50.0)
    assert after({"a": usual(), "b": usual()}, {"a": usual(), "b": unread}) is None
