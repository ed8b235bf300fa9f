"""Which stage is ill, of what; and silence where nothing is."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from densitylr import Decision, DensityLR, Diagnosis, History, Reading, StageReading
from densitylr.diagnosis import STILL_STEPS, diagnose
from densitylr.history import Cause, Finding
from tests.support.fixed import batches, net, one_step
from tests.support.readings import history_of, stage_reading

HEALTHY = [stage_reading(min(0.3, 0.05 * i)) for i in range(12)]
STILL = [stage_reading(0.001)] * 12


def kinds(found: list[Diagnosis]) -> list[tuple[str, str]]:
    return [(d.stage, d.kind) for d in found]


def raised(step: int, stage: str, kind: str = "raise", scale: float = 4.0) -> Decision:
    before = scale if kind == "lift-off" else scale / 4
    numbers = {"near_zero": 0.08, "untrained": 0.08, "expected": 0.05}
    return Decision(
        step, stage, kind, before, scale, before * 1e-4, scale * 1e-4, Cause.STARVED, numbers
    )


def test_nothing() -> None:
    assert diagnose(History()) == []
    healthy = history_of({"a": HEALTHY, "b": HEALTHY}, {"a": 0.1, "b": 0.1})
    assert diagnose(healthy) == []
    # One that moves is enough: the others may be slow.
    assert diagnose(history_of({"a": HEALTHY, "b": STILL}, {"a": 0.1, "b": 0.1})) == []


def test_starved_and_repaired() -> None:
    decisions = {
        10: [raised(10, "a")],
        15: [raised(15, "a", scale=16.0)],
        20: [raised(20, "a", "lift-off", 16.0)],
    }
    history = history_of({"a": HEALTHY, "b": HEALTHY}, {"a": 1e-4, "b": 0.1}, decisions=decisions)
    (found,) = diagnose(history)
    assert (found.stage, found.kind, found.since_step) == ("a", "starved", 10)
    assert "untrained 0.080, after 10 steps" in found.evidence
    assert "1.0e-04" in found.evidence
    assert found.finding is Finding.RAISED
    assert found.action == "rate ×16 to 1.6e-03 in 2 decisions; lifted off at step 20"
    assert str(found).startswith("a is starved since step 10: ")
    del decisions[20]
    history = history_of({"a": HEALTHY, "b": HEALTHY}, {"a": 1e-4, "b": 0.1}, decisions=decisions)
    assert diagnose(history)[0].action.endswith("not yet lifted off")
    early = [stage_reading(0.2), *HEALTHY[1:]]  # at its own rate, which is no decision
    history = history_of({"a": early, "b": HEALTHY}, {"a": 1e-4, "b": 0.1}, decisions=decisions)
    assert diagnose(history)[0].action.endswith("had lifted off before")
    history = history_of({"a": HEALTHY, "b": HEALTHY}, {"a": 1e-4, "b": 0.1}, decisions=decisions)
    assert diagnose(history, observe_only=True)[0].action.startswith("only observed; it would")
    # In a search a raise is no sign of illness.
    assert diagnose(history, within_user_rates=False) == []


@pytest.mark.parametrize(("left", "starved"), [(1.0, False), (500.0, True)])
def test_a_stage_raised_towards_a_rate_that_is_too_high_was_not_starved(
    left: float, starved: bool
) -> None:
    up = raised(2, "a", scale=1000.0)
    cause = Cause.UNTRUSTED_MAXIMUM
    down = Decision(4, "a", "lower", 1000.0, left, 0.1, left * 1e-4, cause, {"growth": 20.0})
    rates = {"a": 1e-4, "b": 0.1}
    history = history_of({"a": HEALTHY, "b": HEALTHY}, rates, decisions={5: [up], 10: [down]})
    found = diagnose(history)
    assert kinds(found) == ([("a", "starved")] if starved else [])
    assert not starved or found[0].action.startswith("rate ×500 to 5.0e-02 in 2 decisions")
    # By a schedule it would have been.
    down = dataclasses.replace(down, cause=Cause.SCHEDULE)
    history = history_of({"a": HEALTHY, "b": HEALTHY}, rates, decisions={5: [up], 10: [down]})
    assert kinds(diagnose(history)) == [("a", "starved")]


def test_all_still_needs_enough_readings_and_no_decision() -> None:
    rates = {"a": 1e-6, "b": 1e-6}
    history = history_of({"a": STILL, "b": STILL}, rates)
    found = diagnose(history)
    assert kinds(found) == [("a", "starved"), ("b", "starved")]
    expected = "the outputs of no stage have changed by more than they vary between batches in 55"
    assert expected in found[0].evidence
    assert "mode='free'" in found[0].action
    assert STILL_STEPS == 35
    few = {"a": STILL[:7], "b": STILL[:7]}
    assert diagnose(history_of(few, rates)) == []
    enough = {"a": STILL[:8], "b": STILL[:8]}
    assert kinds(diagnose(history_of(enough, rates))) == [("a", "starved"), ("b", "starved")]
    both = {"a": STILL, "b": STILL}
    late = history_of(both, rates, decisions={30: [raised(30, "a", scale=16.0)]})
    assert kinds(diagnose(late)) == [("a", "starved")]
    early = history_of(both, rates, decisions={5: [raised(5, "a", scale=16.0)]})
    found = diagnose(early)
    assert kinds(found) == [("a", "starved"), ("b", "starved")]
    assert found[0].evidence != found[1].evidence


def test_what_was_trained_before_is_not_called_still() -> None:
    rates = {"a": 1e-6, "b": 1e-4}
    both = {"a": STILL, "b": STILL}
    assert diagnose(history_of(both, rates), excluded=["a", "b"]) == []
    a, b = diagnose(history_of(both, rates))
    assert a.action == "no rate is large enough: raise the learning rate, or use mode='free'"
    assert b.action.startswith("no group has a larger rate to go by")


def test_what_was_never_read_is_not_called_still() -> None:
    unread = [stage_reading(math.nan)] * 12
    assert diagnose(history_of({"a": unread, "b": STILL}, {"a": 0.1, "b": 0.1})) == []


def test_a_bare_monitor_has_no_rates_to_judge() -> None:
    assert diagnose(history_of({"a": STILL}, {})) == []


def test_frozen() -> None:
    history = history_of({"a": HEALTHY, "b": STILL, "c": HEALTHY}, {"a": 0.1, "b": 0.0, "c": 0.1})
    found = diagnose(history, frozen=["c"])
    assert kinds(found) == [("b", "frozen"), ("c", "frozen")]
    assert "rate of 0: give it one" in found[0].action
    assert found[1].action == "left alone"
    assert found[0].evidence == "its learning rate is 0"
    assert found[1].evidence == "none of its parameters has requires_grad"
    late = History()
    for i in range(6):
        late.record(history.readings[i], {"a": 0.1, "b": 0.1 if i < 4 else 0.0, "c": 0.1})
    assert [(d.stage, d.since_step) for d in diagnose(late)] == [("b", 20)]


def test_collapsed() -> None:
    shares = [0.08, 0.3, 0.7, 0.1, 0.65, 0.86, 0.9]
    trace = [stage_reading(0.5, near_zero_present=s) for s in shares]
    (found,) = diagnose(history_of({"a": trace}, {"a": 0.1}))
    assert (found.kind, found.since_step) == ("collapsed", 20)
    assert "90% of its outputs" in found.evidence
    assert "8% at first" in found.evidence
    assert diagnose(history_of({"a": trace[:6]}, {"a": 0.1})) == []  # twice is not enough
    # Sparse from the start, as an embedding or a gate may be.
    sparse = [stage_reading(0.5, near_zero_present=s) for s in (0.5, 0.7, 0.7, 0.7)]
    assert diagnose(history_of({"a": sparse}, {"a": 0.1})) == []


def grown(levels: list[float], **numbers: float) -> list[StageReading]:
    """A trace with these ratios of the RMS to the untrained one."""
    return [stage_reading(0.3, rms=level, **numbers) for level in levels]


def test_a_small_raise_is_help_and_no_illness() -> None:
    decisions = {5: [raised(5, "a", scale=3.0)], 10: [raised(10, "a", "lift-off", 3.0)]}
    history = history_of({"a": HEALTHY, "b": HEALTHY}, {"a": 0.03, "b": 0.1}, decisions=decisions)
    assert diagnose(history) == []


def test_hot_is_what_ran_away_at_once() -> None:
    hot = grown([1.0, 90.0, 300.0, *[500.0] * 9])
    history = history_of({"a": hot, "b": grown([1.0, 3.0, *[9.0] * 10])}, {"a": 1.0, "b": 1.0})
    (found,) = diagnose(history)
    assert (found.stage, found.kind, found.since_step) == ("a", "hot", 5)
    assert "90 times their untrained size after 5 steps at rate 1.0e+00" in found.evidence
    assert "mode='warmup'" in found.action
    assert diagnose(history, within_user_rates=False)[0].action == "lower the rate"
    # Forty times in the course of training is what learning does.
    slow = grown([1.35**i for i in range(12)])
    assert diagnose(history_of({"a": slow}, {"a": 1.0})) == []
    # One probe on a batch of other inputs is no sign.
    once = grown([1.0, 1.1, 1000.0, 1.1, *[1.2] * 8])
    assert diagnose(history_of({"a": once, "b": HEALTHY}, {"a": 1.0, "b": 1.0})) == []


def test_a_head_that_starts_from_zeros_is_not_hot() -> None:
    head = [stage_reading(0.3, rms=0.1 * i, rms0=0.0) for i in range(12)]
    assert diagnose(history_of({"a": HEALTHY, "b": head}, {"a": 0.1, "b": 0.1})) == []


def test_a_rate_that_stands_out_needs_less_to_be_hot() -> None:
    traces = {"a": grown([1.0, 5.0, 20.0, 20.0, 20.0]), "b": HEALTHY[:5], "c": HEALTHY[:5]}
    assert diagnose(history_of(traces, {"a": 0.1, "b": 0.1, "c": 0.1})) == []
    traces["a"] = grown([1.0, 20.0, 25.0, 26.0, 27.0])
    assert kinds(diagnose(history_of(traces, {"a": 1.0, "b": 0.1, "c": 0.1}))) == [("a", "hot")]
    # A head may be faster than all others.
    last = {"b": HEALTHY[:5], "c": HEALTHY[:5], "a": traces["a"]}
    assert diagnose(history_of(last, {"a": 1.0, "b": 0.1, "c": 0.1})) == []


def test_bounded_outputs_at_their_bounds_are_hot() -> None:
    trace = [stage_reading(), *grown([4.0] * 8, near_zero_present=0.4)]
    assert kinds(diagnose(history_of({"a": trace}, {"a": 0.1}))) == [("a", "hot")]


def test_a_sudden_growth_in_the_midst_of_training_that_stays() -> None:
    calm = [1.0 + 0.1 * i for i in range(10)]
    (found,) = diagnose(history_of({"a": grown([*calm, 40.0, 50.0, 50.0])}, {"a": 0.1}))
    assert (found.kind, found.since_step) == ("collapsed", 50)
    assert "grew 21.1 times from step 45 to step 50" in found.evidence
    # Later on probes are further apart.
    late = [*[2.0] * 30, 40.0, 50.0, 50.0]
    (found,) = diagnose(history_of({"a": grown(late)}, {"a": 0.1}, every=50))
    assert (found.kind, found.since_step) == ("collapsed", 1500)
    # So far apart and so soon that a healthy net may have grown by as much.
    soon = [1.0, 2.0, 2.0, 2.0, 40.0, 50.0, 50.0]
    assert diagnose(history_of({"a": grown(soon)}, {"a": 0.1}, every=50)) == []
    passing = grown([*calm, 40.0, 2.0, 2.0])
    assert diagnose(history_of({"a": passing}, {"a": 0.1})) == []


def test_dead_is_not_starved() -> None:
    dead = [stage_reading(0.0), *[stage_reading(0.0, zero_gradient=1.0)] * 9]
    rates = {"a": 1e-3, "b": 0.1}
    (found,) = diagnose(history_of({"a": dead, "b": HEALTHY[:10]}, rates))
    assert (found.stage, found.kind, found.since_step) == ("a", "dead", 5)
    assert "exactly zero at the last 9 readings" in found.evidence
    woken = [*dead[:9], stage_reading(0.2)]
    assert diagnose(history_of({"a": woken, "b": HEALTHY[:10]}, rates)) == []


@pytest.mark.parametrize(("zeros", "dead"), [(1, False), (2, True), (3, True)])
def test_one_reading_without_a_gradient_is_not_dead(zeros: int, dead: bool) -> None:
    trace = [*HEALTHY[:-zeros], *[stage_reading(0.3, zero_gradient=1.0)] * zeros]
    found = diagnose(history_of({"a": trace, "b": HEALTHY}, {"a": 0.1, "b": 0.1}))
    assert kinds(found) == ([("a", "dead")] if dead else [])
    if dead:
        assert found[0].since_step == 5 * (12 - zeros)
        assert found[0].numbers == {"readings": zeros, "rate": 0.1}


@pytest.mark.parametrize(("scale", "starved"), [(7.9, False), (8.0, False), (8.1, True)])
def test_a_raise_by_more_than_eight_is_one_of_a_starved_stage(scale: float, starved: bool) -> None:
    decisions = {5: [raised(5, "a", scale=scale)]}
    history = history_of({"a": HEALTHY, "b": HEALTHY}, {"a": 0.01, "b": 0.1}, decisions=decisions)
    assert kinds(diagnose(history)) == ([("a", "starved")] if starved else [])


def test_a_bad_gain_is_passed_on() -> None:
    history = history_of({"a": HEALTHY}, {"a": 0.1})
    (found,) = diagnose(history, bad_gains={"a": "0.weight: its spread is 100 times that of"})
    assert (found.kind, found.evidence[:8]) == ("bad gain", "0.weight")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.floats(1e-4, 0.1), speed=st.floats(0.03, 0.06))
def test_noise_alone_is_neither_movement_nor_an_explosion(
    seed: int, noise: float, speed: float
) -> None:
    draw = np.random.default_rng(seed)
    still = grown([math.exp(noise * draw.standard_normal()) for _ in range(12)])
    still = [stage_reading(0.01, rms=s.rms, estimator="first-probe") for s in still]
    found = kinds(diagnose(history_of({"a": still}, {"a": 0.1})))
    assert found in ([], [("a", "starved")])
    moving = [s.rms * math.exp(speed * 5 * i) for i, s in enumerate(still)]
    assert diagnose(history_of({"a": grown(moving)}, {"a": 0.1})) == []


BACK = "went back to step 45, rates capped at 2.0e-02, the largest that was healthy"
GAVE_UP = "gave up after 2 recoveries in a row: start again with a lower rate"


def recovered(step: int, stage: str, since: int, *, target: int | None = 45) -> Decision:
    """Where it went back to; None where it gave up."""
    numbers = {"sign": "exploded", "peak_rms": 40.0, "usual": 2.0, "again": False, "tries": 2}
    numbers |= {"gave_up": target is None, "target": target, "cap": 0.02}
    return Decision(step, stage, "recover", 1.0, 0.5, 0.1, 0.05, Cause.COLLAPSE, numbers, since)


def test_what_was_seen_while_training_wins_and_is_not_named_again() -> None:
    calm = [1.0 + 0.1 * i for i in range(10)]
    broken = grown([*calm, 40.0, 50.0, 1.9, 2.0, 2.1])
    traces = {"a": broken, "b": broken, "c": [stage_reading(0.3)] * 15}
    traces["c"][11] = stage_reading(0.3, nonfinite=3)
    rates = dict.fromkeys(traces, 0.1)
    alone = kinds(diagnose(history_of(traces, rates)))
    assert alone == [("a", "collapsed"), ("b", "collapsed"), ("c", "non-finite")]
    event = recovered(55, "a", 50)
    (found,) = diagnose(history_of(traces, rates, decisions={55: [event]}))
    assert (found.stage, found.kind, found.since_step) == ("a", "collapsed", 50)
    assert found.evidence == "RMS of its activations 40, at most 2 before"
    assert found.action == BACK
    # What comes later, elsewhere, is named.
    traces["b"] = [*broken, *grown([40.0] * 3)]
    traces |= {s: [*traces[s], *[traces[s][-1]] * 3] for s in "ac"}
    found = diagnose(history_of(traces, rates, decisions={55: [event]}))
    assert [(d.stage, d.kind, d.since_step) for d in found] == [
        ("a", "collapsed", 50),
        ("b", "collapsed", 75),
    ]


def test_a_hot_stage_that_was_taken_back_is_named_once() -> None:
    traces = {"a": grown([1.0, 90.0, 300.0, *[500.0] * 9]), "b": HEALTHY}
    event = recovered(20, "a", 20)
    history = history_of(traces, {"a": 1.0, "b": 1.0}, decisions={20: [event]})
    assert kinds(diagnose(history)) == [("a", "collapsed")]


def test_many_recoveries_of_a_stage_are_one_finding() -> None:
    events = {s: [recovered(s, "a", s - 5, target=s - 10)] for s in (20, 40)}
    events[50] = [recovered(50, "b", 50)]
    events[55] = [recovered(55, "a", 55, target=None)]
    first, second = diagnose(
        history_of({"a": HEALTHY, "b": HEALTHY}, {"a": 0.1, "b": 0.1}, decisions=events)
    )
    assert (first.kind, first.since_step) == ("collapsed", 15)
    before = "RMS of its activations 40, at most 2 before (the first of 3 times)"
    assert first.evidence == before
    assert first.action == f"at step 55 {GAVE_UP}"
    assert (second.stage, second.since_step, second.action) == ("b", 50, BACK)


def test_where_every_reading_is_of_a_collapse_it_is_still_named() -> None:
    history = history_of({"a": HEALTHY}, {"a": 0.1}, decisions={55: [recovered(55, "a", 0)]})
    assert kinds(diagnose(history)) == [("a", "collapsed")]


def test_one_bad_batch_does_not_hide_that_all_stand_still() -> None:
    still = [*STILL[:6], stage_reading(0.01, count=0, nonfinite=9, rms=math.nan), *STILL[7:]]
    event = recovered(30, "a", 30)
    found = diagnose(history_of({"a": still}, {"a": 1e-6}, decisions={30: [event]}))
    assert kinds(found) == [("a", "starved"), ("a", "collapsed")]


def test_a_stage_that_one_reading_missed_has_still_a_number() -> None:
    missed = stage_reading(math.nan, count=0, rms=math.nan, rms0=math.nan)
    (found,) = diagnose(history_of({"a": [*STILL[:6], missed, *STILL[7:]]}, {"a": 1e-6}))
    assert "varied by 0.0%" in found.evidence


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    events=st.lists(st.tuples(st.integers(0, 15), st.integers(0, 3), st.sampled_from("ab"))),
    within=st.booleans(),
)
def test_no_stage_is_named_twice_with_the_same_kind(
    seed: int, events: list[tuple[int, int, str]], within: bool
) -> None:
    draw = np.random.default_rng(seed)
    traces = {
        stage: [
            stage_reading(
                draw.choice([0.0, 0.3]),
                rms=math.exp(draw.choice([0.0, 0.1, 2.0, 5.0])),
                near_zero_present=draw.choice([0.08, 0.9]),
                nonfinite=int(draw.choice([0, 0, 0, 5])),
                zero_gradient=float(draw.choice([0.0, 1.0])),
            )
            for _ in range(16)
        ]
        for stage in "ab"
    }
    decisions: dict[int, list[Decision]] = {}
    for at, before, stage in events:
        made = [recovered(5 * at, stage, max(0, 5 * (at - before))), raised(5 * at, stage)]
        decisions.setdefault(5 * at, []).extend(made)
    history = history_of(traces, {"a": 0.1, "b": 0.0}, decisions=decisions)
    found = kinds(diagnose(history, within_user_rates=within, bad_gains={"a": "too large"}))
    assert len(found) == len(set(found))
    assert {(s, "collapsed") for _, _, s in events} <= set(found)
    assert not {(s, "hot") for _, _, s in events} & set(found)


def test_not_finite() -> None:
    trace = [*HEALTHY[:3], stage_reading(0.2, nonfinite=7), *HEALTHY[4:]]
    (found,) = diagnose(history_of({"a": trace}, {"a": 0.1}))
    assert (found.kind, found.since_step) == ("non-finite", 15)
    assert found.evidence.startswith("7 NaN or infinite")


# Real trainings


def train(model: nn.Module, optimizer: DensityLR, steps: int) -> list[tuple[str, str]]:
    for batch in batches(steps):
        one_step(model, optimizer, batch)
    return kinds(optimizer.diagnose())


def test_healthy_training_is_not_ill() -> None:
    model = net()
    assert train(model, DensityLR(torch.optim.SGD(model.parameters(), 0.1), model), 60) == []


def test_a_rate_too_small_for_everything() -> None:
    model = net()
    optimizer = DensityLR(torch.optim.SGD(model.parameters(), 1e-7), model)
    for batch in batches(1) * 50:  # always the same, as 48 outputs are a noisy density
        one_step(model, optimizer, batch)
    assert kinds(optimizer.diagnose()) == [(s, "starved") for s in ("0", "3", "5")]
    assert set(optimizer.scales.values()) == {1.0}


def test_one_stage_starved_and_one_without_a_rate() -> None:
    model = net()
    groups = [
        {"params": model[:3].parameters(), "lr": 1e-5},
        {"params": model[3].parameters(), "lr": 0.0},
        {"params": model[5].parameters()},
    ]
    optimizer = DensityLR(torch.optim.SGD(groups, lr=0.1, momentum=0.9), model)
    assert train(model, optimizer, 60) == [("0", "starved"), ("3", "frozen")]
    assert optimizer.scales["3"] == 1.0


def test_divergence() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = DensityLR(torch.optim.SGD(model.parameters(), lr=1e30), model, every=1)
    with pytest.warns(RuntimeWarning, match="NaN or infinite"):
        found = train(model, optimizer, 6)
    assert {kind for _, kind in found} == {"non-finite"}


def classify(
    model: nn.Module, rates: float | list[float], steps: int = 40, batch: int = 32
) -> tuple[list[Diagnosis], DensityLR]:
    """Train on ten noisy clusters, each weight layer at its rate; batches differ."""
    layers = [m for m in model if isinstance(m, nn.Linear)]  # type: ignore[attr-defined]
    each = rates if isinstance(rates, list) else [rates] * len(layers)
    groups = [{"params": m.parameters(), "lr": r} for m, r in zip(layers, each, strict=True)]
    optimizer = DensityLR(torch.optim.SGD(groups, lr=0.1, momentum=0.9), model)
    draw = torch.Generator().manual_seed(7)
    centres = torch.randn(10, 32, generator=draw)
    for _ in range(steps):
        labels = torch.randint(10, (batch,), generator=draw)
        inputs = centres[labels] + torch.randn(batch, 32, generator=draw)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return optimizer.diagnose(), optimizer


def classifier() -> nn.Sequential:
    torch.manual_seed(100)
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


@pytest.mark.parametrize("batch", [8, 32, 256])
@pytest.mark.parametrize("rate", [0.1, 0.03, 0.003])
def test_good_and_usable_rates_are_silent(rate: float, batch: int) -> None:
    assert classify(classifier(), rate, batch=batch)[0] == []


@pytest.mark.parametrize("batch", [8, 32, 256])
@pytest.mark.parametrize("rate", [1e-5, 1e-7, 1e-9])
def test_all_still_is_named_at_any_batch_size(rate: float, batch: int) -> None:
    found, optimizer = classify(classifier(), rate, batch=batch)
    assert kinds(found) == [("0", "starved"), ("2", "starved"), ("4", "starved")]
    assert set(optimizer.scales.values()) == {1.0}


@pytest.mark.filterwarnings("ignore:.*NaN or infinite:RuntimeWarning")
@pytest.mark.parametrize("rates", [[100.0] * 3, [100.0, 0.1, 0.1], [0.1, 100.0, 0.1]])
def test_a_hot_stage_is_named(rates: list[float]) -> None:
    found, _ = classify(classifier(), rates)
    ill = {d.stage for d in found if d.kind in ("hot", "non-finite")}
    assert {s for s, r in zip(("0", "2", "4"), rates, strict=True) if r > 1} <= ill


def test_dead_units_are_named_and_their_rate_is_left_alone() -> None:
    model = classifier()
    with torch.no_grad():
        model[2].bias.fill_(-5.0)
    found, optimizer = classify(model, [0.01, 0.01, 0.1])
    assert ("2", "dead") in kinds(found)
    assert ("0", "dead") in kinds(found)
    assert "starved" not in {d.kind for d in found}
    assert optimizer.scales["0"] == optimizer.scales["2"] == 1.0


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_a_bad_gain_is_named_with_its_ratio_and_left_alone(factor: float) -> None:
    model = classifier()
    with torch.no_grad():
        model[2].weight.mul_(factor)
    found, optimizer = classify(model, [1e-3, 1e-3, 0.1], steps=10)
    (bad,) = [d for d in found if d.kind == "bad gain"]
    assert bad.stage == "2"
    assert "times that of the nearest usual initialisation" in bad.evidence
    assert optimizer.scales["2"] == 1.0


def peaks(values: list[float], **numbers: float) -> list[StageReading]:
    return [stage_reading(0.3, peak_rms=value, **numbers) for value in values]


USUAL = [1.0, 1.1, 1.2, 1.0, 1.3, 1.1, 0.9, 1.0, 1.2]


@pytest.mark.parametrize("size", [200.0, math.inf])
def test_a_bad_batch_is_one_forward_out_of_line(size: float) -> None:
    trace = peaks([*USUAL, size, 1.2, 1.0])
    (found,) = diagnose(history_of({"a": trace, "b": HEALTHY}, {"a": 0.1, "b": 0.1}))
    assert (found.stage, found.kind, found.since_step) == ("a", "bad batch", 41)
    assert (
        f"{size:.3g} in a forward of steps 41 to 45, at most 1.3 before and 1.2" in found.evidence
    )


@pytest.mark.parametrize(
    "values",
    [
        [*USUAL, 200.0],  # who knows whether it will stay
        [*USUAL, 200.0, 210.0, 190.0],  # it stays
        [*USUAL[:6], 200.0, *USUAL[:5]],  # in the first steps
        [*USUAL, 12.0, 1.2, 1.0],  # less than ten times
        [*USUAL[:3], 150.0, *USUAL[4:], 200.0, 1.2, 1.0],  # not the first of its kind
        [1.0, 30.0, 0.2, 9.0, 1.3, 0.1, 7.0, 0.3, 2.0, 400.0, 1.2, 1.0],  # inputs are like that
        [math.nan] * 12,  # nobody looked
        [*USUAL, math.nan, 1.2, 1.0],  # that layer was not called
    ],
)
def test_no_bad_batch(values: list[float]) -> None:
    assert diagnose(history_of({"a": peaks(values)}, {"a": 0.1})) == []


@pytest.mark.parametrize("at", range(12))
@pytest.mark.parametrize("what", ["rate", "scale"])
def test_a_batch_is_not_blamed_for_what_a_rate_may_have_done(at: int, what: str) -> None:
    history = History()
    for i, seen in enumerate(peaks([*USUAL, 200.0, 1.2, 1.0])):
        own, scale = (1.0 if i == at and what == name else 0.01 for name in ("rate", "scale"))
        history.record(Reading(5 * i, {"a": seen}), {"a": own}, {"a": scale})
    # A jump at a reading acts until the next one; one long over explains nothing.
    assert kinds(diagnose(history)) == ([] if at in (8, 9, 10) else [("a", "bad batch")])


def test_what_was_not_finite_at_a_reading_is_that_and_no_bad_batch() -> None:
    trace = peaks([*USUAL, math.inf, 1.2, 1.0])
    trace[9] = dataclasses.replace(trace[9], nonfinite=5)
    assert kinds(diagnose(history_of({"a": trace}, {"a": 0.1}))) == [("a", "non-finite")]


def test_heavy_tails_are_no_bad_batch() -> None:
    draw = np.random.default_rng(0)
    found = 0
    for _ in range(50):
        inputs = np.exp(2 * draw.standard_normal((400, 5, 8)))
        rms = np.sqrt((inputs**2).mean(-1)).max(1)
        found += len(diagnose(history_of({"a": peaks(rms.tolist())}, {"a": 0.1})))
    assert found <= 1


def test_the_stage_where_the_data_come_in_is_asked_for_a_bad_batch() -> None:
    trace = peaks([*USUAL, 200.0, 1.2, 1.0])
    history = history_of({"a": trace, "b": trace}, {"a": 0.1, "b": 0.1})
    assert kinds(diagnose(history)) == [("a", "bad batch")]
    history = history_of({"head": HEALTHY, "b": trace}, {"head": 0.1, "b": 0.1})
    assert kinds(diagnose(history)) == [("b", "bad batch")]


@pytest.mark.parametrize("at", [30, 31, 34])
@pytest.mark.parametrize("mode", ["repair", "free"])
def test_a_poisoned_batch_is_seen_at_whatever_step(at: int, mode: str) -> None:
    model = net()
    wrapped = DensityLR(torch.optim.Adam(model.parameters(), 1e-3), model, mode=mode)
    for i, (x, y) in enumerate(batches(60)):
        one_step(model, wrapped, (x * 1000 if i == at else x, y))
    (found,) = [d for d in wrapped.diagnose() if d.kind == "bad batch"]
    assert found.stage == "0"
    assert at - 5 < found.since_step <= at


def test_training_without_a_bad_batch_has_none() -> None:
    model = net()
    wrapped = DensityLR(torch.optim.Adam(model.parameters(), 1e-2), model)
    for batch in batches(200):
        one_step(model, wrapped, batch)
    assert wrapped.diagnose() == []


def test_what_grew_from_a_bad_gain_is_not_hot() -> None:
    grew = grown([1.0, 90.0, 300.0, *[500.0] * 9])
    history = history_of({"a": grew, "b": HEALTHY}, {"a": 1.0, "b": 1.0})
    assert kinds(diagnose(history)) == [("a", "hot")]
    assert kinds(diagnose(history, bad_gains={"a": "its spread"})) == [("a", "bad gain")]


@pytest.mark.parametrize(
    ("displacement", "outputs", "moved"),
    [(0.05, 20, False), (0.17, 12, False), (0.5, 12, True), (0.05, 200, True), (0.01, 2000, False)],
)
def test_a_few_outputs_that_cross_zero_are_no_movement(
    displacement: float, outputs: int, moved: bool
) -> None:
    trace = [stage_reading(displacement, count=round(outputs / 0.08), near_zero=0.08)] * 12
    found = diagnose(history_of({"a": trace}, {"a": 1e-6}))
    assert kinds(found) == ([] if moved else [("a", "starved")])


def told(shares: list[float], level: float = 1.0) -> list[StageReading]:
    return [stage_reading(0.5, example_variance=v, rms=level) for v in shares]


FELL = [0.4, 0.3, 0.1, *[0.001] * 8]


def test_a_stage_that_went_mute_while_outputs_grew_is_hot() -> None:
    rates = {"a": 1.0, "b": 1.0, "head": 1.0}
    fell, grew, still = told(FELL), told([0.4] * 11, level=5.0), told([0.4] * 11)
    (found,) = diagnose(history_of({"a": fell, "b": grew, "head": still}, rates))
    assert (found.stage, found.kind, found.since_step) == ("a", "hot", 15)
    said = "0.10% of their mean square depends on the example, 40% untrained, after 15"
    assert said in found.evidence
    badly = diagnose(history_of({"a": fell, "b": grew, "head": still}, rates), bad_gains={"b": "x"})
    assert kinds(badly) == [("b", "bad gain")]
    # A decay of the weights does that, too, and a head may well grow.
    assert diagnose(history_of({"a": fell, "b": still, "head": grew}, rates)) == []
    # A head has no say, nor has a stage that told nothing to begin with.
    assert diagnose(history_of({"b": grew, "a": still, "head": fell}, rates)) == []
    little = told([0.05, *FELL[1:]])
    assert diagnose(history_of({"a": little, "b": grew, "head": still}, rates)) == []


@pytest.mark.parametrize(
    "shares",
    [
        [0.4, *[0.001] * 5, 0.3, *[0.001] * 2],  # it has told them apart since
        [0.4] * 6 + [0.001] * 3,  # three readings within 40 steps
        [0.4] * 9 + [0.001] * 8,  # in the midst of training
        [0.4, *[0.01] * 8],
        [0.4, *[math.nan] * 8],
        [0.4, *[0.001] * 3],  # too early to tell
    ],
)
def test_not_mute(shares: list[float]) -> None:
    n = len(shares)
    below = {"a": told(shares), "b": told([0.4] * n, level=5.0)}
    traces = {**below, "head": told([0.4] * n)}
    assert diagnose(history_of(traces, dict.fromkeys(traces, 1.0))) == []


def test_example_variance_is_read_in_the_first_steps_and_no_longer() -> None:
    model = net()
    wrapped = DensityLR(torch.optim.SGD(model.parameters(), 0.1), model)
    for batch in batches(70):
        one_step(model, wrapped, batch)
    share = wrapped.history.series("3", "example_variance")
    early = wrapped.history.steps <= 40
    assert np.isfinite(share[early]).all()
    assert np.isnan(share[~early]).all()
    assert early.any()
    assert not early.all()


def test_nothing_is_called_still_while_a_warm_up_raises_the_rate() -> None:
    history, flat = History(), History()
    for i, seen in enumerate(STILL):
        for into, rate in ((history, 1e-6 * (i + 1)), (flat, 1e-6)):
            into.record(Reading(5 * i, {"a": seen}), {"a": rate}, {"a": 1.0})
    assert diagnose(history) == []
    assert kinds(diagnose(flat)) == [("a", "starved")]


def test_hot_under_a_warm_up_from_zero_is_told_with_the_rate_that_did_it() -> None:
    history = History()
    for i, seen in enumerate(grown([1.0, 1.0, 90.0, 300.0, *[500.0] * 8])):
        history.record(Reading(4 * i, {"a": seen}), {"a": 0.5 * i}, {"a": 1.0})
    (found,) = diagnose(history)
    assert found.kind == "hot"
    assert "at rate 1.0e+00" in found.evidence
