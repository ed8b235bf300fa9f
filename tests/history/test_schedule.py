"""Readings are dense early and while something is decided, rare after, and never stop."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densitylr.history import EARLY, PATIENCE, YOUNG, ReadingSchedule, check_every
from tests.support.fixed import probes


def walk(schedule: ReadingSchedule, steps: int, decisions: set[int], start: int = 0) -> list[int]:
    read = []
    for step in range(start, steps):
        if step >= schedule.due:
            read.append(step)
            schedule.read(step, step in decisions)
    return read


@given(st.integers(1, 30), st.integers(1, 4000))
def test_where_nothing_is_decided(every: int, steps: int) -> None:
    assert walk(ReadingSchedule(every), steps, set()) == probes(every, steps)


@given(st.integers(1, 30), st.sets(st.integers(0, 3000)))
def test_gaps_are_bounded_and_a_decision_makes_them_short(every: int, decisions: set[int]) -> None:
    read = walk(ReadingSchedule(every), 3000, decisions)
    for before, after in itertools.pairwise(read):
        if before < 20:
            assert after - before == max(1, every // 2)
        else:
            assert every <= after - before <= 10 * every
            assert before not in decisions or after - before == every


@given(st.integers(1, 30), st.integers(0, 3000), st.integers(1, 500))
def test_a_late_beginning_is_a_beginning(every: int, start: int, steps: int) -> None:
    late = walk(ReadingSchedule(every), start + steps, set(), start)
    assert [step - start for step in late] == probes(every, steps)


@given(st.integers(1, 30))
def test_a_steady_schedule(every: int) -> None:
    read = [step for step in walk(ReadingSchedule(every, steady=True), 2000, set()) if step >= 20]
    assert {b - a for a, b in itertools.pairwise(read)} == {every}


@given(st.integers(1, 30), st.sets(st.integers(0, 500)), st.integers(0, 500))
def test_it_goes_on_where_it_was(every: int, decisions: set[int], stop: int) -> None:
    whole = walk(ReadingSchedule(every), 500, decisions)
    first = ReadingSchedule(every)
    before = walk(first, stop, decisions)
    second = ReadingSchedule(every)
    second.load_state_dict(first.state_dict())
    after = [s for s in range(stop, 500) if s >= second.due and not second.read(s, s in decisions)]
    assert before + after == whole


def test_the_constants() -> None:
    assert (EARLY, PATIENCE, YOUNG) == (20, 20, 40)


@pytest.mark.parametrize(("step", "young"), [(0, True), (49, True), (50, True), (51, False)])
def test_training_is_young_for_forty_steps_from_its_first_reading(step: int, young: bool) -> None:
    schedule = ReadingSchedule(5)
    assert schedule.young(10**9)
    schedule.read(10, False)
    assert schedule.young(step) == young


@pytest.mark.parametrize("every", [0, -1, 2.0, True, "5", None])
def test_every_is_a_positive_integer(every: object) -> None:
    with pytest.raises(ValueError, match=f"positive number of steps, got {every!r}"):
        check_every(every)  # type: ignore[arg-type]
