"""Cells of the gauntlet: what a condition does, and that what is done is not done again."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from densitylr import find_stages
from densitylr.history import TAU
from densitylr.monitor.measure import statistics
from experiments.gauntlet.cells import (
    ARMS,
    OPTIMIZERS,
    Block,
    Cell,
    GauntletConfig,
    condition,
    expand,
    read,
    run_cell,
    run_cells,
)
from experiments.gauntlet.cells.cell import _schedule, good_rates, make_optimizer
from experiments.gauntlet.cells.conditions import HEALTHY
from experiments.gauntlet.verdict.conduct import ILL_LOSS
from experiments.train.arms import LAYERWISE
from experiments.train.tasks import LENGTH, NETS, SYMBOLS, TASKS, build, task

SMALL = Cell("mlp_shallow", "sgd", steps=12)


def test_the_same_cell_is_the_same_run_and_a_healthy_one_is_left_alone() -> None:
    bare = run_cell(SMALL)
    again = run_cell(SMALL)
    ours = run_cell(dataclasses.replace(SMALL, arm="repair"))
    for key in ("weights", "accuracy", "test_loss", "train_loss"):
        assert bare[key] == again[key] == ours[key]
    assert ours["raised"] == []
    assert ours["decisions"] == 0
    other = run_cell(dataclasses.replace(SMALL, seed=1))
    assert other["weights"] != bare["weights"]
    json.dumps(ours, allow_nan=False)


def test_a_starved_stage_is_raised_and_named() -> None:
    record = run_cell(Cell("mlp_shallow", "sgd", "one-first", "repair", steps=42))
    assert record["raised"] == ["1"]
    assert [(s, k) for s, k, _ in record["named"]] == [("1", "starved")]
    assert record["scales"]["1"] > 100
    assert record["scales"]["3"] == 1


def test_a_spike_lasts_and_a_poisoned_batch_does_harm() -> None:
    flat = run_cell(dataclasses.replace(SMALL, steps=70))
    for what in ("spike", "poison"):
        ill = run_cell(dataclasses.replace(SMALL, steps=70, condition=what))
        assert ill["accuracy"] < flat["accuracy"] - ILL_LOSS


def test_nothing_can_be_said_of_what_is_frozen() -> None:
    for name in ("frozen", "rate-zero"):
        record = run_cell(Cell("mlp_shallow", "sgd", name, "repair", steps=42))
        assert [(s, k) for s, k, _ in record["named"]] == [("1", "frozen")]


@pytest.mark.parametrize("arm", [a for a in ARMS if a not in ("fixed", "recover")])
def test_every_arm_trains(arm: str) -> None:
    record = run_cell(dataclasses.replace(SMALL, arm=arm, condition="one-first"))
    assert 0 <= record["accuracy"] <= 1


def test_an_arm_may_have_a_threshold_of_its_own_for_near_zero() -> None:
    """Below one that everything is below, nothing seems to move, and all is raised to the end."""
    hot = Cell("mlp_shallow", "sgd", "hot-last-10", steps=42)
    taus = ("", f", tau={TAU}", ", tau=1000")
    arms = [
        f"repair(growth_tolerance=1e6{tau})" for tau in taus
    ]  # the rate is hot, and would not be trusted
    own, same, blind = (run_cell(dataclasses.replace(hot, arm=arm)) for arm in arms)
    assert own["weights"] == same["weights"]
    assert own["scales"]["1"] < blind["scales"]["1"] == pytest.approx(10)
    assert statistics.TAU == TAU


@pytest.mark.parametrize("name", LAYERWISE)
def test_layerwise_optimizers_take_the_rates_of_a_profile(name: str) -> None:
    """A stage at a rate of nearly zero stays where it was, and the others move."""
    model = build("mlp_shallow", 0)
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    rates = {"1": 1e-30, "3": 0.01}
    optimizer = make_optimizer(name, find_stages(model), rates, 0.0)
    assert [g["lr"] for g in optimizer.param_groups] == [*rates.values()]
    data = task(TASKS["mlp_shallow"])
    torch.nn.functional.cross_entropy(model(data.train_x[:8]), data.train_y[:8]).backward()
    optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, first[n]) is n.startswith("1."), n


def test_a_plateau_lowers_rates_where_losses_do_not_fall() -> None:
    def rates(arm: str, losses: list[float]) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        what = condition("flat", ["a", "b"])
        move = _schedule(Cell("gru", "sgd", arm=arm, steps=100), what, optimizer)
        seen = []
        for loss in losses:
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            move(loss)
        return seen

    level, falling = rates("plateau", [1.0] * 100), rates("plateau", [*range(100, 0, -1)])
    assert set(falling) == {1.0}
    assert set(level[:60]) == {1.0}  # the first of five steps and ten in which nothing is better
    assert level[60] == pytest.approx(0.1)
    rising, usual = rates("linear-warmup", [1.0] * 100), rates("fixed", [1.0] * 100)
    shares = [a / b for a, b in zip(rising, usual, strict=True)]
    assert shares == pytest.approx([min(1, (k + 1) / 10) for k in range(100)])


def test_a_rate_that_a_plateau_sets_has_no_spike() -> None:
    with pytest.raises(ValueError, match="plateau sets the rate itself"):
        run_cell(dataclasses.replace(SMALL, condition="spike", arm="plateau"))


@pytest.mark.parametrize("name", HEALTHY)
def test_every_healthy_condition_trains(name: str) -> None:
    record = run_cell(dataclasses.replace(SMALL, condition=name, arm="repair"))
    assert record["raised"] == []


@pytest.mark.parametrize("net", NETS)
def test_every_network_takes_its_task(net: str) -> None:
    model = build(net, 0)
    data = task(TASKS[net])
    loss = torch.nn.functional.cross_entropy(model(data.train_x[:2]), data.train_y[:2])
    assert math.isfinite(loss.item())
    known = OPTIMIZERS if net == "resnet18" else (*OPTIMIZERS, *LAYERWISE)
    assert set(good_rates()[net]) == set(known)
    assert len(find_stages(model)) >= 2


def test_the_text_is_predicted_one_symbol_ahead_and_tested_on_other_windows() -> None:
    data = task("text")
    assert data.train_x.shape[1] == LENGTH
    assert torch.equal(data.train_x[:, 1:], data.train_y[:, :-1])
    assert int(data.train_x.max()) < len(SYMBOLS)
    assert torch.equal(data.train_y[:-1, -1], data.train_x[1:, 0])
    assert torch.equal(data.train_y[-1, -1], data.test_x[0, 0])


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_random_profiles_keep_the_good_rate_as_their_largest(number: int, n: int) -> None:
    stages = [str(i) for i in range(n)]
    what = condition(f"random-{number}", stages)
    assert max(what.rates.values()) == 1
    assert min(what.rates.values()) >= 1e-6
    assert set(what.ill) == {s for s, r in what.rates.items() if r < 0.01}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_conditions_have_one_rate(name: str) -> None:
    what = condition(name, ["a", "b", "c"])
    assert len(set(what.rates.values())) == 1
    assert what.ill == ()


@pytest.mark.parametrize("name", ["flatt", "geometric", "one-nowhere", "hot-first", "random-x"])
def test_no_such_condition(name: str) -> None:
    with pytest.raises(ValueError, match=f"no condition '{name}'"):
        condition(name, ["a", "b", "c"])


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    cells = [dataclasses.replace(SMALL, seed=s, steps=2) for s in (0, 1)]
    first = run_cells(cells[:1], path, workers=1)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"net": "mlp_sh')  # killed in the middle of a line
    both = run_cells(cells, path, workers=1)
    assert both[cells[0].key] == first[cells[0].key]  # seconds included: it is the same run
    assert set(read(path)) == {c.key for c in cells}
    before = path.read_bytes()
    run_cells(cells, path, workers=1)
    assert path.read_bytes() == before


def test_a_cell_that_fails_leaves_the_others(tmp_path: Path) -> None:
    good = dataclasses.replace(SMALL, steps=2)
    bad = dataclasses.replace(good, optimizer="none")
    with pytest.raises(RuntimeError, match=r"1 of 2 cells failed.*'none'"):
        run_cells([bad, good], tmp_path / "cells.jsonl", workers=1)
    assert set(read(tmp_path / "cells.jsonl")) == {good.key}


def config(**changes: object) -> GauntletConfig:
    block = {"nets": ["mlp_shallow"], "optimizers": ["sgd"], **changes}
    return GauntletConfig(blocks={"b": Block(**block)})  # type: ignore[arg-type]


def test_blocks_are_products() -> None:
    cells = expand(config(conditions=["random-0..3"], seeds=[5, 6]))
    assert [(c.condition, c.seed, c.arm) for c in cells] == [
        (f"random-{i}", seed, arm)
        for i in range(4)
        for seed in (5, 6)
        for arm in ("fixed", "repair")
    ]
    assert len(expand(config(seeds=[0, 1], batches=[8, 32], starts=[0.1, 1.0]))) == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"nets": ["perceptron"]},
        {"optimizers": ["lbfgs"]},
        {"arms": ["repairs"]},
        {"arms": ["repair(colour=1)"]},
        {"batches": [0]},
        {"starts": [-1.0]},
        {"steps": 0},
        {"schedule": "linear"},
        {"conditions": ["flatt"]},
    ],
)
def test_what_a_block_cannot_hold(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"got|no condition"):
        expand(config(**changes))
