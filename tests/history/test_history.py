"""What is saved is what was seen; memory is bounded; a damaged file says so."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densitylr import Decision, History, Reading
from densitylr.history import BINS, BOUNDS, EDGES, Cause
from tests.support.readings import history_of, reading, stage_reading

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def decision(step: int, stage: str = "a", kind: str = "raise") -> Decision:
    numbers = {"near_zero": 0.079, "untrained": 0.08, "moved": 0.001, "spent": 0.01 * step}
    return Decision(step, stage, kind, 1.0, 4.0, 1e-3, 4e-3, Cause.SOLVED, numbers)


def assert_equal(a: History, b: History) -> None:
    assert a.budget == b.budget
    assert a.stages == b.stages
    assert a.decisions == b.decisions
    np.testing.assert_array_equal(a.steps, b.steps)
    for stage in a.stages:
        for field in dataclasses.fields(type(a.readings[0].stages[stage])):
            if field.name not in ("histogram", "estimator"):
                np.testing.assert_array_equal(
                    a.series(stage, field.name), b.series(stage, field.name)
                )
        for name in ("rate", "scale"):
            np.testing.assert_array_equal(a.series(stage, name), b.series(stage, name))
        np.testing.assert_array_equal(a.histogram(stage), b.histogram(stage))
        assert [r.stages[stage].estimator for r in a.readings] == [
            r.stages[stage].estimator for r in b.readings
        ]


@given(
    st.lists(
        st.tuples(NUMBERS, NUMBERS, st.integers(0, 2**53), st.sampled_from(["twin", "mixed"])),
        max_size=5,
    ),
    st.booleans(),
)
def test_round_trip_is_exact(
    tmp_path: Path, rows: list[tuple[float, float, int, str]], rated: bool
) -> None:
    history = History(budget=100)
    for i, (moved, mean, count, estimator) in enumerate(rows):
        stages = {
            name: stage_reading(
                near_zero=moved,
                displacement=moved,
                mean=mean,
                count=count,
                estimator=estimator,
                histogram=np.full(BINS, count // BINS),
            )
            for name in ("a", "ü.0")
        }
        rates = {"a": 0.1 * i, "ü.0": 1 / 3} if rated else None
        history.record(Reading(3 * i, stages), rates, rates, [decision(3 * i)])
    path = tmp_path / "history.npz"
    history.save(path)
    loaded = History.load(path)
    assert_equal(history, loaded)
    loaded.save(path)
    assert_equal(history, History.load(path))
    assert os.listdir(tmp_path) == ["history.npz"]


def test_a_loaded_history_goes_on() -> None:
    history = history_of({"a": [stage_reading(0.1)]}, {"a": 0.1})
    history.record(reading(5, {"a": 0.2}), {"a": 0.1}, {"a": 1.0})
    assert len(history) == 2
    assert history.series("a", "displacement").tolist() == [0.1, 0.2]


def test_series() -> None:
    history = history_of(
        {"a": [stage_reading(0.0), stage_reading(0.25)], "b": [stage_reading(), stage_reading()]},
        {"a": 0.5},
    )
    assert history.stages == ["a", "b"]
    assert history.steps.tolist() == [0, 5]
    assert history.series("a", "displacement").tolist() == [0.0, 0.25]
    assert history.series("a", "rate").tolist() == [0.5, 0.5]
    assert np.isnan(history.series("b", "rate")).all()
    assert history.histogram("a").shape == (2, BINS)
    with pytest.raises(KeyError, match="no stage 'c'; there are a, b"):
        history.series("c", "rms")
    with pytest.raises(KeyError, match="no number 'densty'"):
        history.series("a", "densty")
    assert repr(history) == "History(2 readings, steps 0–5, 0 decisions)"
    empty = History()
    assert empty.stages == []
    assert empty.series("a", "rms").shape == (0,)
    assert empty.histogram("a").shape == (0, BINS)
    with pytest.raises(ValueError, match="budget must be at least 16"):
        History(15)


def test_csv(tmp_path: Path) -> None:
    history = history_of(
        {"a": [stage_reading(0.0), stage_reading(0.125)], "b": [stage_reading()] * 2},
        {"a": 0.5},
        decisions={5: [decision(5)]},
    )
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["stage"]) for r in rows] == [
        ("0", "a"),
        ("0", "b"),
        ("5", "a"),
        ("5", "b"),
    ]
    moved = rows[2]
    assert float(moved["displacement"]) == 0.125
    assert int(moved["count"]) == 2**17
    assert float(moved["rate"]) == 0.5
    assert (moved["decision"], moved["reason"]) == ("raise", decision(5).reason)
    assert (rows[3]["decision"], rows[3]["rate"], rows[3]["estimator"]) == ("", "", "twin")


@pytest.mark.parametrize("budget", [16, 17, 40])
def test_thinning_keeps_the_beginning_the_end_and_what_was_decided(budget: int) -> None:
    history = History(budget)
    decided = {15, 70, 71, 333}
    for step in range(1000):
        decisions = [decision(step)] if step in decided else []
        history.record(reading(step, {"a": step / 1000}), {"a": 0.1}, {"a": 1.0}, decisions)
        assert len(history) <= budget
        assert history.steps[-1] == step
    steps = history.steps.tolist()
    assert steps[: budget // 8] == list(range(budget // 8))
    assert decided <= set(steps)
    assert [d.step for d in history.decisions] == sorted(decided)
    # Rates and readings stay together; the rest is spread over the whole run.
    assert steps == sorted(steps)
    assert history.series("a", "displacement").tolist() == [s / 1000 for s in steps]
    assert len(history.observations()) == len(steps)
    assert max(np.diff(steps)) <= 8 * 1000 // budget


def test_memory_is_bounded_even_if_every_reading_decides() -> None:
    history = History(16)
    for step in range(100):
        history.record(reading(step, {"a": 0.0}), decisions=[decision(step)])
    assert len(history) <= 16
    assert history.steps[-1] == 99
    assert history.steps[:2].tolist() == [0, 1]  # an eighth of them from the beginning


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "nothing.npz")
    with pytest.raises(OSError, match="nowhere"):
        History().save(tmp_path / "nowhere" / "history.npz")


def test_damaged_or_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "history.npz"
    history_of({"a": [stage_reading(0.1)] * 40}, {"a": 0.1}).save(path)
    good = path.read_bytes()
    overwritten = good[:200] + bytes(200) + good[400:]
    for content in (b"", b"not a zip at all", good[: len(good) // 2], overwritten):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"history\.npz is not a readable density history"):
            History.load(path)
    np.savez(path, weights=np.ones(3))
    with pytest.raises(ValueError, match="is not a readable density history"):
        History.load(path)
    np.savez(path, meta=json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99, this version reads 3"):
        History.load(path)
    np.savez(path, meta=np.array([{"format": 1}], dtype=object))  # a pickle
    with pytest.raises(ValueError, match="is not a readable density history"):
        History.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.npz"
    history = history_of({"a": [stage_reading(0.1)]}, {"a": 0.1})
    history.save(path)

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="disk full"):
        History().save(path)
    assert_equal(History.load(path), history)
    assert os.listdir(tmp_path) == ["history.npz"]


def test_state_dict_holds_the_decisions() -> None:
    history = history_of({"a": [stage_reading()]}, {"a": 1.0}, decisions={0: [decision(0)]})
    state = json.loads(json.dumps(history.state_dict()))
    other = history_of({"a": [stage_reading()] * 3}, {"a": 1.0})
    other.begin_with(History.decisions_of(state))
    assert other.decisions == history.decisions
    assert other.decisions[0].reason == history.decisions[0].reason
    assert isinstance(other.decisions[0].cause, Cause)
    assert len(other) == 0
    assert not math.isnan(other.decisions[0].rate)


@pytest.mark.parametrize(
    "damage",
    [
        {"cause": "because"},
        {"numbers": None},
        {"step": "3"},
        {"scale": -1.0},
        {"rate": "high"},
        {"rate": None},
        {"more": 1},
    ],
)
def test_a_damaged_decision_is_refused(damage: dict[str, object]) -> None:
    history = history_of({"a": [stage_reading()]}, {"a": 1.0}, decisions={0: [decision(0)]})
    state = history.state_dict()
    state["decisions"][0] |= damage
    with pytest.raises(ValueError, match="a decision is damaged"):
        History.decisions_of(state)


def test_bounds_are_the_edges_with_outer_bins_as_wide_as_their_neighbours() -> None:
    assert len(BOUNDS) == BINS + 1
    assert tuple(BOUNDS[1:-1]) == EDGES
    assert BOUNDS[1] / BOUNDS[0] == pytest.approx(BOUNDS[2] / BOUNDS[1])
    assert BOUNDS[-1] / BOUNDS[-2] == pytest.approx(BOUNDS[-2] / BOUNDS[-3])
    # As many outputs in each octave are the same density everywhere, whatever the bins.
    counts = 1000 * np.log2(BOUNDS[1:] / BOUNDS[:-1])
    history = history_of({"a": [stage_reading(histogram=counts)]}, {"a": 0.1})
    density = history.density("a")
    assert density == pytest.approx(np.full((1, BINS), 1 / np.log2(BOUNDS[-1] / BOUNDS[0])))
