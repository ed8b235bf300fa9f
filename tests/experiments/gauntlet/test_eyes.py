"""Other eyes, other rules and rivals: what each of them must and must not do."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from densitylr import (
    Baseline,
    Decision,
    DensityLR,
    DensityMonitor,
    Needs,
    Observation,
    Policy,
    Repair,
    find_stages,
)
from experiments.gauntlet.cells import ABLATIONS
from experiments.gauntlet.cells.ablations import OtherEyes, Trace, ablation, close
from experiments.gauntlet.cells.eyes import Density, Eyes, FastaiThreshold, OutputChange, behind
from experiments.train.arms import RIVALS, evaluation_mode, rival
from experiments.train.tasks import NETS, TASKS, build, task
from tests.support.fixed import batches, hooks_of, loss_of, net, one_step, probes, same
from tests.support.readings import Play, reading

LOOKING = ("first-probe", "post-norm", "fastai", "output-change")
TRACE: Trace = [(0, {"0": 1.0}), (4, {"0": 4.0}), (6, {"0": 1e9})]


def made(name: str, model: nn.Module, seed: int = 0) -> Policy:
    return ablation(name, model, seed, TRACE if name == "replay" else None)


def trained(
    name: str | None, rates: Mapping[str, float], steps: int = 30, **options: bool
) -> tuple[nn.Module, DensityLR | None, Tensor]:
    """A small training, of one batch again and again, which no estimator mistakes for a move;
    None: without us.
    """
    model = net()
    policy = made(name, model) if name else None
    groups = [
        {"params": list(stage.parameters.values()), "lr": rates[stage.name]}
        for stage in find_stages(model).values()
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    wrapped = DensityLR(optimizer, model, every=2, policy=policy, **options) if policy else None
    torch.manual_seed(3)
    for batch in batches(1) * steps:
        one_step(model, wrapped or optimizer, batch)
    return model, wrapped, torch.get_rng_state()


STARVED = {"0": 1e-5, "3": 0.05, "5": 0.1}
FLAT = dict.fromkeys(STARVED, 0.1)


# The contract of every ablation


@pytest.mark.parametrize("name", ABLATIONS)
def test_flat_rates_train_bit_for_bit_as_without(name: str) -> None:
    bare, _, random_state = trained(None, FLAT)
    ours, wrapped, ours_random_state = trained(name, FLAT)
    assert same(bare, ours)
    assert torch.equal(random_state, ours_random_state)
    assert wrapped is not None
    assert wrapped.history.decisions == []


@pytest.mark.parametrize("name", ABLATIONS)
def test_observing_leaves_training_alone(name: str) -> None:
    bare, _, random_state = trained(None, STARVED)
    ours, wrapped, ours_random_state = trained(name, STARVED, observe_only=True)
    assert same(bare, ours)
    assert torch.equal(random_state, ours_random_state)
    assert wrapped is not None
    assert wrapped.history.decisions


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_starved_stage_is_raised_and_none_above_the_largest_rate(name: str) -> None:
    # Behind batch norm there is nothing to see, which raises the rate as well.
    _, wrapped, _ = trained(name, STARVED)
    assert wrapped is not None
    assert any(d.kind == "raise" for d in wrapped.history.decisions)
    if name != "random-boost":
        assert wrapped.scales["0"] > 1
    for stage, own in STARVED.items():
        scales = wrapped.history.series(stage, "scale")
        assert (scales >= 1).all()
        assert (scales * own <= 0.1 * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", sorted(set(ABLATIONS) - {"update-ratio", "gradient-norm"}))
@given(
    moved=st.lists(st.tuples(*[st.floats(0, 0.3) | st.just(math.nan)] * 3), min_size=1, max_size=8),
    rates=st.lists(
        st.tuples(*[st.sampled_from([0.0, 1e-6, 1e-3, 0.1])] * 3), min_size=8, max_size=8
    ),
)
def test_within_one_and_the_cap_under_any_schedule(
    name: str, moved: list[tuple[float, ...]], rates: list[tuple[float, ...]]
) -> None:
    model = net()
    policy = made(name, model)
    game = Play(policy, dict(zip(STARVED, rates[0], strict=True)))
    for i, now in enumerate(moved):
        own = dict(zip(STARVED, rates[i], strict=True))
        ceiling = max(own.values())
        before = game.scales
        seen = dict(zip(STARVED, now, strict=True))
        if isinstance(policy, OtherEyes):
            policy.eyes.collect = lambda seen=seen: seen
        decisions = game.see(reading(2 * i, seen), own)
        for stage, scale in game.scales.items():
            assert scale >= 1
            assert own[stage] == 0 or scale * own[stage] <= ceiling * (1 + 2e-6)
        for decision in decisions:
            assert decision.scale_before == before[decision.stage]
            assert decision.scale == game.scales[decision.stage]
            assert own[decision.stage] > 0


def test_names_and_traces_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="an ablation is one of density"):
        ablation("hope", net(), 0)
    with pytest.raises(ValueError, match="trace is for 'replay'"):
        ablation("replay", net(), 0)
    with pytest.raises(ValueError, match="trace is for 'replay'"):
        ablation("density", net(), 0, TRACE)
    assert ablation("density", net(), 0) == Repair()


@pytest.mark.parametrize("net_name", sorted(set(NETS) - {"resnet18"}))
@pytest.mark.parametrize("name", LOOKING)
def test_every_network_can_be_looked_at(net_name: str, name: str) -> None:
    model, data = build(net_name, 0), task(TASKS[net_name])
    policy = made(name, model)
    optimizer = DensityLR(torch.optim.SGD(model.parameters(), lr=0.01), model, policy=policy)
    eyes = policy.eyes
    for i in range(2):
        F.cross_entropy(model(data.train_x[i * 8 :][:8]), data.train_y[i * 8 :][:8]).backward()
        if i == 0:
            moved = {n: float(d) for n, d in eyes._seen.items()}
            assert set(moved) == {t for s in optimizer.stages.values() for t in s.layers}
            assert all(d < 1e-5 for d in moved.values())
        optimizer.step()
    assert not eyes._seen


# Eyes


def watched(view: type, **options: object) -> tuple[nn.Module, Eyes, DensityLR, list[dict]]:
    """A training with eyes and what they saw at each reading."""
    model = net()
    eyes = Eyes(model, view, **options)
    rows: list[dict[str, float]] = []

    class Recorder(Policy):
        needs = Needs(twins=True)

        def update(self, state, seen):  # type: ignore[no-untyped-def]
            rows.append(eyes.collect())
            return {}, state

    optimizer = DensityLR(
        torch.optim.SGD(model.parameters(), lr=0.1), model, every=3, policy=Recorder()
    )
    return model, eyes, optimizer, rows


def outputs(model: nn.Module, x: Tensor, upto: int) -> Tensor:
    """The output of the first ``upto`` layers in training mode, without a trace of the call."""
    return copy.deepcopy(model).train()[:upto](x).detach()


def test_output_change_is_the_slow_formula() -> None:
    model, _, optimizer, rows = watched(OutputChange)
    untrained = {i: copy.deepcopy(model[i]).double() for i in (0, 3, 5)}
    expected = []
    for step, batch in enumerate(batches(10)):
        if step in probes(3, 10):
            row = {}
            for i, twin in untrained.items():
                x = outputs(model, batch[0], i).double() if i else batch[0].double()
                now = copy.deepcopy(model[i]).double()(x).detach()
                then = twin(x).detach()
                row[str(i)] = float(((now - then).square().mean() / then.square().mean()).sqrt())
            expected.append(row)
        one_step(model, optimizer, batch)
    assert len(rows) == len(expected) == len(probes(3, 10))
    assert rows[0] == {"0": 0.0, "3": 0.0, "5": 0.0}
    for seen, row in zip(rows[1:], expected[1:], strict=True):
        assert seen == pytest.approx(row, rel=1e-4)
    assert rows[-1]["3"] > 0.01


@pytest.mark.parametrize(
    ("view", "place", "at"),
    [
        (Density, None, {"0": 1, "3": 4, "5": 6}),
        (Density, behind, {"0": 2, "3": 5, "5": 6}),
        (FastaiThreshold, None, {"0": 1, "3": 4, "5": 6}),
    ],
)
def test_shares_are_the_slow_count_against_the_first_probe(
    view: type, place: object, at: dict[str, int]
) -> None:
    model, _, optimizer, rows = watched(view, **({"place": place} if place else {}))
    shares: list[dict[str, float]] = []
    scales: dict[str, float] = {}
    for step, batch in enumerate(batches(10)):
        if step in probes(3, 10):
            row = {}
            for stage, upto in at.items():
                a = outputs(model, batch[0], upto)
                scales.setdefault(stage, float(a.double().square().mean().sqrt()))
                near = a.abs() <= 0.1 * scales[stage] if view is Density else a <= 0.05
                row[stage] = (int(near.sum()) + 0.5) / (a.numel() + 1)
            shares.append(row)
        one_step(model, optimizer, batch)
    for seen, row in zip(rows, shares, strict=True):
        for stage, share in row.items():
            assert seen[stage] == pytest.approx(abs(math.log(share / shares[0][stage])), abs=1e-9)


def test_first_probe_is_what_the_monitor_says_without_twins() -> None:
    model, _, optimizer, rows = watched(Density)
    displacements = []
    untwinned = Baseline.capture(model, pretrained=True)
    with DensityMonitor(model, every=None, baseline=untwinned) as monitor:
        for step, batch in enumerate(batches(8)):
            if step in probes(3, 8):
                monitor.arm()
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            seen = monitor.collect(step)
            if seen is not None:
                displacements.append({n: s.displacement for n, s in seen.stages.items()})
            optimizer.step()
    assert len(rows) == len(displacements)
    for ours, theirs in zip(rows, displacements, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)


def test_behind_a_layer_is_its_norm_or_else_its_activation() -> None:
    bn, plain, vit = build("cnn_bn", 0), build("cnn_plain", 0), build("vit", 0)
    assert behind(bn, bn[0]) is bn[1]
    assert behind(plain, plain[0]) is plain[1]
    assert behind(plain, plain[-1]) is plain[-1]
    block = vit.blocks[0]
    assert behind(vit, block.qkv) is block.qkv
    assert behind(vit, block.mlp[0]) is block.mlp[1]


@pytest.mark.parametrize("name", LOOKING)
def test_hooks_vanish_after_close_and_with_the_policy(name: str) -> None:
    model = net()
    bare = hooks_of(model)
    policy = made(name, model)
    assert hooks_of(model) == bare + 3
    close(policy)
    close(policy)
    assert hooks_of(model) == bare
    policy = made(name, model)
    copied = copy.deepcopy(model)
    loss_of(copied, batches(1)[0]).backward()
    del policy
    gc.collect()
    assert hooks_of(model) == bare
    close(Repair())


def test_a_bare_monitor_and_evaluation_are_not_read() -> None:
    model = net()
    policy = made("first-probe", model)
    with DensityMonitor(model, every=1):
        loss_of(model, batches(1)[0])
        optimizer = DensityLR(torch.optim.SGD(model.parameters(), lr=0.1), model, policy=policy)
        with torch.no_grad():
            model(batches(1)[0][0])
        assert not policy.eyes._seen
        loss_of(model, batches(1)[0]).backward()
        assert len(policy.eyes._seen) == 3
        optimizer.close()


# Other rules


def ruled(
    policy: Policy, moved: list[dict[str, float]], rates: Mapping[str, float]
) -> tuple[list[dict[str, float]], list[Decision]]:
    game, rows, decisions = Play(policy, rates), [], []
    for i, now in enumerate(moved):
        decisions += game.see(reading(5 * i, now))
        rows.append(game.scales)
    return rows, decisions


def test_gradient_norm_is_auto_rgn_under_the_largest_rate() -> None:
    """By norms of the weights and the gradients of the stages, in their proportions."""
    policy, relative = ablation("gradient-norm", net(), 0), {"0": 0.5, "3": 1.0, "5": 0.25}

    def scales(rates: dict[str, float], updates: int, **changed: float) -> list[dict[str, float]]:
        game, rows = Play(policy, rates), []
        for i in range(updates):
            seen = reading(5 * i, dict.fromkeys(rates, 0.0))
            views = {
                name: dataclasses.replace(
                    game._view(name, rates, None, game.scales[name], seen.stages[name]),
                    weight_norm=2.0,
                    gradient_norm=2.0 * changed.get(f"at_{name}", relative[name]),
                )
                for name in rates
            }
            game.run.update(Observation(seen.step, views))
            rows.append(game.scales)
        return rows

    rates = {"0": 0.01, "3": 0.1, "5": 0.08}
    rows = scales(rates, 7)
    assert rows[0] == pytest.approx({"0": 5.0, "3": 1.0, "5": 1.0})
    assert rows[-1] == pytest.approx(rows[0])
    rows = scales({"0": 1e-4, "3": 0.1, "5": 0.1}, 3)
    assert [row["0"] for row in rows] == pytest.approx([16, 256, 500])
    assert set(scales(rates, 1, at_0=math.nan)[0].values()) == {1.0}


def test_constant_boost_is_the_geometric_mean_of_the_room() -> None:
    rates = {"0": 1e-4, "3": 1e-2, "5": 1.0}
    rows, decisions = ruled(
        ablation("constant-boost", net(), 0), [dict.fromkeys(rates, 0.0)], rates
    )
    assert rows[0] == pytest.approx({"0": 1000.0, "3": 100.0, "5": 1.0})
    assert [d.stage for d in decisions] == ["0", "3"]


def test_random_boost_makes_the_raises_of_the_law_elsewhere() -> None:
    rates = {"0": 1e-3, "3": 1e-3, "5": 1e-3, "top": 1e3}
    moved = [{"0": 0.0, "3": 0.5, "5": 0.5, "top": 0.5}] * 4
    law, _ = ruled(Repair(), moved, rates)
    ends = []
    for seed in range(6):
        rows, _ = ruled(ablation("random-boost", net(), seed), moved, rates)
        again, _ = ruled(ablation("random-boost", net(), seed), moved, rates)
        assert rows == again
        assert math.prod(rows[-1].values()) == pytest.approx(law[-1]["0"])
        ends.append(rows[-1])
    assert len({tuple(end.values()) for end in ends}) > 1


def test_replay_follows_the_steps_of_the_trace() -> None:
    rates = {"0": 1e-3, "3": 0.1}
    trace = [(7, {"0": 20.0, "3": 3.0}), (0, {"0": 4.0})]
    rows, decisions = ruled(ablation("replay", net(), 0, trace), [{"0": 0.0, "3": 0.0}] * 4, rates)
    assert [row["0"] for row in rows] == [4.0, 4.0, 20.0, 20.0]
    assert {row["3"] for row in rows} == {1.0}
    assert [d.step for d in decisions] == [0, 10]


def test_stages_of_ones_own_can_be_controlled_by_each() -> None:
    for name in ("update-ratio", "gradient-norm", "constant-boost", "random-boost"):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapped = DensityLR(optimizer, model, policy=made(name, model), stages={"all": "*"})
        for batch in batches(6):
            one_step(model, wrapped, batch)
        assert wrapped.scales == {"all": 1.0}


# Rivals


def digits(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    data = task("digits")
    for i in range(start, start + steps):
        x, y = data.train_x[i * 32 % 1600 :][:32], data.train_y[i * 32 % 1600 :][:32]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_loss(model: nn.Module) -> float:
    data = task("digits")
    model.eval()
    with torch.no_grad():
        loss = float(F.cross_entropy(model(data.test_x[:200]), data.test_y[:200]))
    model.train()
    return loss


test_loss.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_learns(name: str) -> None:
    model = build("mlp_shallow", 0)
    optimizer = rival(name, model)
    before = test_loss(model)
    digits(model, optimizer, 100)
    with evaluation_mode(optimizer):
        assert test_loss(model) < 0.97 * before


@pytest.mark.parametrize("name", RIVALS)
def test_evaluating_does_not_change_training(name: str) -> None:
    models = []
    for look in (False, True):
        model = build("cnn_bn", 0, dropout=0.1)
        optimizer = rival(name, model)
        for i in range(4):
            digits(model, optimizer, 2, 2 * i)
            if look:
                trained_weights = copy.deepcopy(model)
                with evaluation_mode(optimizer, [task("digits").train_x[:32]]):
                    averaging = name in ("schedule-free", "dog", "ldog")
                    assert i == 0 or same(model, trained_weights) != averaging
                assert same(model, trained_weights)
                assert model.training
        models.append(model)
    assert same(*models)


def test_schedule_free_takes_statistics_of_the_weights_it_is_judged_by() -> None:
    model = build("cnn_bn", 0)
    optimizer = rival("schedule-free", model)
    digits(model, optimizer, 20)
    x = task("digits").train_x[:256]
    with evaluation_mode(optimizer, [x] * 100):
        expected = model[0](x).mean((0, 2, 3))
        assert torch.allclose(model[1].running_mean, expected, atol=1e-3)


def test_averaging_is_the_formula_of_shamir_and_zhang() -> None:
    model = build("mlp_shallow", 0)
    optimizer = rival("dog", model)
    average = None
    for t in range(1, 6):
        digits(model, optimizer, 1, t)
        now = model[1].weight.detach().double()
        share = 9 / (8 + t)
        average = now if average is None else (1 - share) * average + share * now
    with evaluation_mode(optimizer):
        assert average is not None
        assert torch.allclose(model[1].weight.double(), average, atol=1e-7)


def test_any_other_optimizer_is_evaluated_as_it_is() -> None:
    model = net()
    with evaluation_mode(torch.optim.SGD(model.parameters(), lr=0.1)):
        pass


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"'prodigyopt'.*pip install 'densitylr\[rivals\]'"):
        rival("prodigy", net())
    with pytest.raises(ValueError, match="a rival is one of prodigy"):
        rival("hope", net())
