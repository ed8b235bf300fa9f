"""Probes are dense early and while something is decided, rare after, and never stop."""

from __future__ import annotations

import itertools

from fixed import probes
from hypothesis import given
from hypothesis import strategies as st

from densitylr.cadence import EARLY, RARE, Cadence


def walk(cadence: Cadence, steps: int, decisions: set[int], start: int = 0) -> list[int]:
    looked = []
    for step in range(start, steps):
        if step >= cadence.due:
            looked.append(step)
            cadence.looked(step, step in decisions)
    return looked


@given(st.integers(1, 30), st.integers(1, 4000))
def test_where_nothing_is_decided(every: int, steps: int) -> None:
    assert walk(Cadence(every), steps, set()) == probes(every, steps)


@given(st.integers(1, 30), st.sets(st.integers(0, 3000)))
def test_gaps_are_bounded_and_a_decision_makes_them_short(every: int, decisions: set[int]) -> None:
    looked = walk(Cadence(every), 3000, decisions)
    for before, after in itertools.pairwise(looked):
        if before < EARLY:
            assert after - before == max(1, every // 2)
        else:
            assert every <= after - before <= RARE * every
            assert before not in decisions or after - before == every


@given(st.integers(1, 30), st.integers(0, 3000), st.integers(1, 500))
def test_a_late_beginning_is_a_beginning(every: int, start: int, steps: int) -> None:
    late = walk(Cadence(every), start + steps, set(), start)
    assert [step - start for step in late] == probes(every, steps)


@given(st.integers(1, 30))
def test_a_steady_cadence(every: int) -> None:
    looked = [step for step in walk(Cadence(every, steady=True), 2000, set()) if step >= EARLY]
    assert {b - a for a, b in itertools.pairwise(looked)} == {every}


@given(st.integers(1, 30), st.sets(st.integers(0, 500)), st.integers(0, 500))
def test_it_goes_on_where_it_was(every: int, decisions: set[int], stop: int) -> None:
    whole = walk(Cadence(every), 500, decisions)
    first = Cadence(every)
    before = walk(first, stop, decisions)
    second = Cadence(every, due=first.due, decided=first.decided, first=first.first)
    after = [
        s for s in range(stop, 500) if s >= second.due and not second.looked(s, s in decisions)
    ]
    assert before + after == whole
