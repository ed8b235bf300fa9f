"""Which stage is ill, of what; and silence where nothing is."""

from __future__ import annotations

import math

import pytest
import torch
from fixed import batches, net, one_step
from readings import history_of, stage_reading
from torch import nn

from densitylr import Decision, DensityLR, Diagnosis, History
from densitylr.diagnosis import STILL_STEPS, diagnose

HEALTHY = [stage_reading(min(0.3, 0.05 * i)) for i in range(12)]
STILL = [stage_reading(0.001)] * 12


def kinds(found: list[Diagnosis]) -> list[tuple[str, str]]:
    return [(d.stage, d.kind) for d in found]


def raised(step: int, stage: str, kind: str = "raise", scale: float = 4.0) -> Decision:
    reason = f"near-zero density 0.080, untrained 0.080, after {step} steps; too little"
    return Decision(
        step, stage, kind, scale / 4, scale, scale / 4 * 1e-4, scale * 1e-4, reason + "; rate x"
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
    assert found.action == "rate ×16 to 1.6e-03 in 2 decisions; lifted off at step 20"
    assert str(found).startswith("a is starved since step 10: ")
    del decisions[20]
    history = history_of({"a": HEALTHY, "b": HEALTHY}, {"a": 1e-4, "b": 0.1}, decisions=decisions)
    assert diagnose(history)[0].action.endswith("not yet lifted off")
    assert diagnose(history, observe_only=True)[0].action.startswith("only observed; it would")
    # In a search a raise is no sign of illness.
    assert diagnose(history, mode="free") == []


def test_all_still_needs_enough_probes_and_no_decision() -> None:
    rates = {"a": 1e-6, "b": 1e-6}
    history = history_of({"a": STILL, "b": STILL}, rates)
    found = diagnose(history)
    assert kinds(found) == [("a", "starved"), ("b", "starved")]
    assert "no stage has moved by more than 3 % in 55 steps" in found[0].evidence
    assert "mode='free'" in found[0].action
    few = {"a": STILL[: STILL_STEPS // 5], "b": STILL[: STILL_STEPS // 5]}
    assert diagnose(history_of(few, rates)) == []
    decided = history_of({"a": STILL, "b": STILL}, rates, decisions={5: [raised(5, "a")]})
    assert kinds(diagnose(decided)) == [("a", "starved")]


def test_what_was_never_read_is_not_called_still() -> None:
    unread = [stage_reading(math.nan)] * 12
    assert diagnose(history_of({"a": unread, "b": STILL}, {"a": 0.1, "b": 0.1})) == []


def test_a_bare_monitor_has_no_rates_to_judge() -> None:
    assert diagnose(history_of({"a": STILL}, {})) == []


def test_frozen() -> None:
    history = history_of({"a": HEALTHY, "b": STILL, "c": HEALTHY}, {"a": 0.1, "b": 0.0, "c": 0.1})
    found = diagnose(history, frozen=["c"])
    assert kinds(found) == [("b", "frozen"), ("c", "frozen")]
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
    assert diagnose(history_of({"a": trace[:5]}, {"a": 0.1})) == []  # once is not enough
    # Sparse from the start, as an embedding or a gate may be.
    sparse = [stage_reading(0.5, near_zero_present=s) for s in (0.5, 0.7, 0.7, 0.7)]
    assert diagnose(history_of({"a": sparse}, {"a": 0.1})) == []


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
