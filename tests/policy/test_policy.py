"""Repair, Warmup and Free as pure functions of readings and rates."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densitylr import Free, Policy, Reading, Repair, Warmup, simulate
from densitylr.history import LIFT_OFF
from densitylr.policy import lift_off, repair, search
from tests.support.readings import Play, history_of, play, reading, stage_reading

MOVED = st.one_of(st.floats(0, 0.3), st.floats(0, 1e-3), st.sampled_from([0.0, 0.1, 5.0, math.nan]))
TRACES = st.lists(st.tuples(MOVED, MOVED), min_size=1, max_size=25)
RATES = st.floats(1e-8, 10.0)
ALL = [Repair, Warmup, Free]


def test_the_constants() -> None:
    """What was measured, and what everything else in these tests counts on."""
    assert vars(Repair()) == {
        "lift_off": 0.1,
        "patience": 20,
        "growth_factor": 4.0,
        "max_raise": 16.0,
        "alignment": 0.03,
        "alignment_steps": 3,
        "alignment_window": 100,
        "settle": 2,
        "growth_tolerance": 1.0,
        "trust_exponent": 1.5,
        "trust_window": 4,
    }
    searching = {
        "start": 1e-4,
        "speed": 0.04,
        "visible": 0.001,
        "growth_factor": 4.0,
        "max_raise": 16.0,
        "min_factor": 0.05,
    }
    assert vars(Warmup()) == searching
    assert vars(Free()) == searching | {
        "alignment": 0.03,
        "alignment_growth": 1.5,
        "alignment_steps": 5,
        "alignment_window": 100,
        "max_scale": 1e10,
    }
    assert (LIFT_OFF, search.INFORMED, repair.LATE, lift_off.FULL) == (0.1, 0.25, 3, 10_000)


@given(TRACES, RATES, RATES)
def test_repair_only_raises_up_to_the_largest_rate_until_lift_off(
    traces: list[tuple[float, float]], a: float, b: float
) -> None:
    near_zero = 2**17 * 0.08
    rates = {"a": a, "b": b}
    states, decisions, game = play(Repair(), traces, rates)
    for k, name in enumerate(rates):
        cap = max(a, b) / rates[name]
        scales = [1.0, *(s[name] for s in states)]
        assert all(1 <= now <= max(1.0, cap) for now in scales)
        moved = [t[k] for t in traces]
        for i, (before, now) in enumerate(itertools.pairwise(scales)):
            most = max((m for m in moved[: i + 1] if math.isfinite(m)), default=0.0)
            expected = 0.1 * min(1.0, 5 * i / 20)
            if not math.isfinite(moved[i]) or most >= expected:
                assert now == before  # it is not behind, or has lifted off
                continue
            factor = expected / most if most else math.inf
            largest = max(16.0, expected * near_zero)
            factor = max(4.0, min(factor, largest))
            assert now == pytest.approx(max(1.0, min(cap, before * factor)))
        lift = next((i for i, m in enumerate(moved) if m >= 0.1), len(moved))
        assert len(set(scales[lift:])) <= 1
        assert game.memory(name).lifted_at == (5 * lift if lift < len(moved) else None)
        assert (name in game.run.undecided) == (lift == len(moved))
    largest = max(rates, key=lambda n: rates[n])
    assert all(d.stage != largest for d in decisions)
    assert {d.kind for d in decisions} <= {"raise", "lift-off"}


@given(TRACES, RATES)
def test_equal_rates_are_never_touched(traces: list[tuple[float, float]], rate: float) -> None:
    states, decisions, _ = play(Repair(), traces, {"a": rate, "b": rate})
    assert decisions == []
    assert all(set(scales.values()) == {1.0} for scales in states)


@given(TRACES, RATES, RATES)
def test_warmup_keeps_to_the_largest_rate_and_free_does_not_care(
    traces: list[tuple[float, float]], a: float, b: float
) -> None:
    rates = {"a": a, "b": b}
    for policy in (Warmup(), Free()):
        states, decisions, _ = play(policy, traces, rates)
        assert states[0] == {"a": 1e-4, "b": 1e-4}  # nothing has been spent
        for scales in states:
            for name, scale in scales.items():
                assert scale > 0
                if isinstance(policy, Warmup):
                    assert scale * rates[name] <= max(a, b) * (1 + 1e-12)
        assert {d.kind for d in decisions} <= {"raise", "lower", "lift-off"}


@given(TRACES, RATES, RATES, st.sampled_from(ALL))
def test_decisions_are_the_changes(
    traces: list[tuple[float, float]], a: float, b: float, kind: type[Policy]
) -> None:
    """Each change of a scale has one decision, and its sentence holds the numbers."""
    rates = {"a": a, "b": b}
    game = Play(kind(), rates)
    for i, moved in enumerate(traces):
        seen = reading(5 * i, dict(zip(rates, moved, strict=True)))
        before, undecided = game.scales, game.run.undecided
        decisions = game.see(seen)
        assert len({d.stage for d in decisions}) == len(decisions)
        by_stage = {d.stage: d for d in decisions}
        for name, scale in game.scales.items():
            decision = by_stage.get(name)
            if decision is None:
                assert scale == before[name]
                continue
            changed = (decision.step, decision.scale_before, decision.scale)
            assert changed == (5 * i, before[name], scale)
            assert decision.rate == rates[name] * decision.scale
            assert decision.rate_before == rates[name] * decision.scale_before
            if decision.kind == "raise":
                assert decision.scale > decision.scale_before
            elif decision.kind == "lower":
                assert decision.scale < decision.scale_before
            else:
                assert name in undecided - game.run.undecided
            numbers = re.findall(r"[\d.]+(?:e[+-]\d+)?", decision.reason)
            if math.isfinite(seen.stages[name].displacement):
                assert f"{seen.stages[name].near_zero:.3f}" in numbers
                assert f"{seen.stages[name].untrained:.3f}" in numbers
            else:
                assert decision.reason.startswith("not read after")
            assert f"after {5 * i} steps" in decision.reason
            assert f"{decision.rate:.1e}" in numbers
            assert str(decision) == f"{name}: {decision.reason}"


def test_the_search_solves_for_the_rate() -> None:
    """``rate = speed * sum of rates / displacement``, by a loop over every single step."""
    game = Play(Free(), {"a": 0.3})
    moved = [0.0, 0.0011, 0.003, 0.005, 0.02, 0.021, 0.07, 0.09]
    rate, spent, done, clipped = 0.3e-4, 0.0, 0, set()
    for i, displacement in enumerate(moved):
        # So many outputs are near zero that all of these displacements are seen.
        game.see(Reading(3 * i, {"a": stage_reading(displacement, count=2**40)}))
        while done < 3 * i:
            spent += rate
            done += 1
        if i:
            wanted = 0.04 * spent / displacement
            clipped.add((wanted > 4 * rate) - (wanted < rate / 20))
            rate = min(4 * rate, max(rate / 20, wanted))
        assert game.scales["a"] * 0.3 == pytest.approx(rate, rel=1e-12)
        assert game.memory("a").spent == pytest.approx(spent, rel=1e-12)
    assert clipped == {0, 1}


def test_a_rate_that_was_solved_for_falls_to_a_twentieth_at_most() -> None:
    game = Play(Free(), {"a": 1.0})
    for step in (0, 1):
        game.see(Reading(step, {"a": stage_reading(5.0 * step)}))
    assert game.scales["a"] == pytest.approx(1e-4 / 20, rel=1e-12)


def test_a_displacement_within_its_noise_is_not_solved_for() -> None:
    game = Play(Free(), {"a": 1.0})
    for step, count in ((0, 2**17), (5, 100), (10, 2**17)):
        # 0.02 is seen in 10,000 near-zero outputs, but not in 8.
        before = game.scales["a"]
        decisions = game.see(Reading(step, {"a": stage_reading(0.02, count=count)}))
        if step == 5:
            assert game.scales["a"] == pytest.approx(min(16, 0.1 / 0.02) * before)
            assert decisions[0].cause == "not visible"
            assert decisions[0].numbers["moved"] == 0.02
    assert decisions[0].cause == "solved"


def test_rate_zero_stays() -> None:
    for kind, start in zip(ALL, (1.0, 1e-4, 1e-4), strict=True):
        scales, decisions, game = play(kind(), [(0.0, 0.2)] * 8, {"a": 0.0, "b": 0.1})
        assert {d.stage for d in decisions} <= {"b"}
        assert scales[-1]["a"] == start
        assert getattr(game.memory("a"), "spent", 0) == 0
        assert "a" in game.run.undecided


def test_unread_stages_wait() -> None:
    scales, decisions, _ = play(Repair(), [(math.nan, 0.0)] * 8, {"a": 1e-4, "b": 0.1})
    assert decisions == []
    assert scales[-1] == {"a": 1.0, "b": 1.0}


def test_only_the_stages_it_was_given() -> None:
    game = Play(Repair(), {"a": 1e-3}, largest=0.1)
    for step in range(0, 50, 5):
        decisions = game.see(reading(step, {"a": 0.0, "b": 0.0}))
        assert {d.stage for d in decisions} <= {"a"}
    assert game.scales == {"a": pytest.approx(100)}


@given(TRACES, RATES, RATES, st.sampled_from(ALL), st.integers(0, 24))
def test_state_goes_through_json(
    traces: list[tuple[float, float]], a: float, b: float, kind: type[Policy], cut: int
) -> None:
    """A run that is interrupted and resumed decides what the whole run decides."""
    rates = {"a": a, "b": b}
    _, expected, whole = play(kind(), traces, rates)
    game, found = Play(kind(), rates), []
    for i, moved in enumerate(traces):
        if i == cut:
            game.resume()
        found += game.see(reading(5 * i, dict(zip(rates, moved, strict=True))))
    assert game.run.now == whole.run.now
    assert found == expected


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *[
            (Repair, name, value)
            for name in ("lift_off", "patience", "alignment_steps")
            for value in (0, -1, math.nan)
        ],
        *[(Repair, n, v) for n in ("growth_tolerance", "trust_exponent") for v in (0, -1)],
        *[(Repair, n, v) for n in ("growth_factor", "max_raise") for v in (1, 0.5, math.nan)],
        *[(Repair, n, -1) for n in ("alignment_window", "settle", "trust_window")],
        *[
            (kind, name, value)
            for kind in (Warmup, Free)
            for name in ("start", "speed", "visible")
            for value in (0, -1, math.nan)
        ],
        *[
            (k, n, v)
            for k in (Warmup, Free)
            for n in ("growth_factor", "max_raise")
            for v in (1, 0)
        ],
        *[(kind, "min_factor", v) for kind in (Warmup, Free) for v in (0, 1.5, math.nan)],
        *[(Free, n, v) for n in ("alignment_steps", "max_scale") for v in (0, -1)],
        *[(Free, "alignment_growth", v) for v in (1, 0.5)],
        (Free, "alignment_window", -1),
    ],
)
def test_constants_are_checked(kind: type[Policy], name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must (not )?be.*{value}"):
        kind(**{name: value})


def test_simulate_needs_rates() -> None:
    with pytest.raises(ValueError, match="holds no learning rates"):
        simulate(Repair(), history_of({"a": [stage_reading()] * 3}, {}))


def test_simulate_another_law_over_the_same_trace() -> None:
    trace = {"a": [stage_reading(0.0)] * 8, "b": [stage_reading(0.02 * i) for i in range(8)]}
    history = history_of(trace, {"a": 1e-3, "b": 0.1})
    scales, decisions = simulate(Repair(), history)
    assert scales["a"] == pytest.approx(100)
    assert scales["b"] == 1
    assert decisions[0].kind == "raise"
    # One that expects less than an output to change does not say that it has not.
    assert simulate(Repair(patience=10**12), history)[1] == []


def test_a_raise_is_by_growth_at_least() -> None:
    for moved in (0.99, 0.5, 0.26):
        game = Play(Repair(), {"a": 1e-3}, largest=1.0)
        for step in (0, 20):
            game.see(reading(step, {"a": moved * 0.1 * (step > 0)}))
        assert game.scales["a"] == 4


@pytest.mark.parametrize("count", [2**17, 32 * 10, 10])
def test_a_stage_is_judged_once_what_is_expected_can_be_seen(count: int) -> None:
    """Where even all of a lift-off cannot, once all of it is expected."""
    game, first = Play(Repair(), {"a": 1e-9}, largest=1.0), None
    for step in range(40):
        decisions = game.see(Reading(step, {"a": stage_reading(count=count)}))
        first = step if decisions and first is None else first
    outputs = 0.1 / 20 * count * 0.08  # expected at step 1
    assert first == min(20, math.ceil(1 / outputs))


# A plant whose displacement is proportional to the rate spent


def run_plant(
    policy: Policy, sensitivity: float, own: float, largest: float, every: int = 5, most: int = 60
) -> tuple[float, bool, int]:
    """The effective rate at the end, whether it lifted off, and after how many steps."""
    game, moved, step = Play(policy, {"a": own}, largest), 0.0, 0
    for _ in range(most):
        game.see(reading(step, {"a": moved}))
        if not game.run.undecided:
            break
        moved += sensitivity * own * game.scales["a"] * every
        step += every
    return own * game.scales["a"], not game.run.undecided, step


@given(st.floats(-4, 4), st.floats(-3, 3))
def test_free_finds_the_rate_of_a_linear_plant(log_sensitivity: float, log_own: float) -> None:
    """Over 8 decades of sensitivity and 6 of starting rate it lifts off at the wanted speed.

    On its way up a leap may go too far by up to 16 (or by what is missing to a lift-off); where
    this crosses it at once the rate is still lowered at lift-off. So the bound holds from
    above everywhere, and from below where the search began below the solution.
    """
    sensitivity, own = 10.0**log_sensitivity, 10.0**log_own
    wanted = 0.04 / sensitivity
    rate, lifted, _ = run_plant(Free(), sensitivity, own, own)
    assert lifted
    begun = own * 1e-4
    if 20 * wanted >= begun:
        # Solved for, or grown fourfold at each probe until three quarters of a lift-off
        # came within the last interval of 5 steps.
        slowest = 0.75 * 0.1 / 5 / sensitivity
        assert min(wanted / 4, slowest) * (1 - 1e-9) <= rate <= 4 * wanted
    else:  # lifted off within the first interval: one change of at most 1/20 is left
        assert rate == pytest.approx(begun / 20)


@given(st.floats(-4, 4), st.floats(0, 6))
def test_repair_of_a_linear_plant_stays_between_the_rates(log_s: float, log_gap: float) -> None:
    """A starved stage lifts off, if its neighbours' rate would have let it."""
    own, sensitivity = 10.0**-log_gap, 10.0**log_s
    rate, lifted, steps = run_plant(Repair(), sensitivity, own, 1.0)
    assert own <= rate <= 1 + 1e-12
    if sensitivity >= 0.01:  # at the largest rate it would need ten steps
        assert lifted
        assert steps <= 60


def test_free_stops_at_its_largest_scale_where_nothing_moves() -> None:
    game = Play(Free(), {"dead": 0.1})
    for step in range(0, 200, 5):
        game.see(reading(step, {"dead": 0.0}))
    assert game.scales == {"dead": 1e10}


def test_repair_gives_back_what_the_user_has_taken() -> None:
    game = Play(Repair(), {"early": 1e-3}, largest=0.1)
    for step in range(0, 40, 5):
        game.see(reading(step, {"early": 0.0 if step < 30 else 0.5}))
    assert game.scales == {"early": 100.0}
    assert not game.run.undecided
    (decision,) = game.see(reading(40, {"early": 0.5}), {"early": 1e-2})
    assert game.scales["early"] == pytest.approx(10)
    assert (decision.kind, decision.cause) == ("lower", "schedule")
    assert (decision.rate_before, decision.rate) == pytest.approx((1.0, 0.1))
    assert "your rates have changed; rate 1.0e+00 → 1.0e-01" in decision.reason


def test_what_schedules_take_back_is_told_at_each_halving() -> None:
    game, told, followed = Play(Repair(), {"early": 1e-3}, largest=0.1), [], 0
    for step in range(0, 2000, 5):
        largest = 0.1 * 0.998 ** max(0, step - 40)
        decisions = game.see(reading(step, {"early": 0.0 if step < 30 else 0.5}), None, largest)
        told += [d for d in decisions if d.kind == "lower"]
        if step > 40:
            assert game.scales["early"] == max(1.0, largest / 1e-3)
            followed += largest > 1e-3
    assert followed > 10 * len(told) > 0
    below = [100.0, *(d.scale for d in told)]
    assert all(now <= before / 2 for before, now in itertools.pairwise(below))
    # Not later than it could have been told, either.
    assert all(now > before / 2 * 0.998**5 for before, now in itertools.pairwise(below))
    assert len(told) <= math.log2(100)


@pytest.mark.parametrize("kind", [Repair, Warmup])
def test_rounding_of_a_schedule_is_no_change(kind: type[Policy]) -> None:
    game, scales = Play(kind(), {"early": 1e-3}, largest=0.1), []
    for step in range(0, 100, 5):
        rounded = 1e-3 * (1 + 1e-9 * math.sin(step))
        moved = {"early": 0.0 if step < 50 else 0.5}
        decisions = game.see(reading(step, moved), {"early": rounded})
        scales.append(game.scales["early"])
        if step > 50:
            assert not decisions
    assert scales[-1] == pytest.approx(100)
    assert len(set(scales[-9:])) == 1


@pytest.mark.parametrize("kind", ALL)
def test_a_stage_that_thaws_is_expected_to_move_from_then_on(kind: type[Policy]) -> None:
    """As one that trains from the first step on, whatever came before."""

    def asked(start: int, thaw: int) -> list[tuple[int, float, bool]]:
        game, found = Play(kind(), {"a": 0.0, "b": 0.1}), []
        for step in range(start, thaw + 60, 5):
            rates = {"a": 1e-5 if step >= thaw else 0.0, "b": 0.1}
            moved = 1e-4 * max(0, step - thaw)
            decisions = game.see(reading(step, {"a": moved, "b": 0.3}), rates)
            found += [
                (d.step - thaw, d.scale, d.kind == "raise") for d in decisions if d.stage == "a"
            ]
        return found

    assert asked(0, 100) == asked(100, 100)
    assert asked(0, 100)
