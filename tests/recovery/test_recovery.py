"""Going back after a collapse: never in a healthy run, exactly to the snapshot, never for good."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from densitylr import DensityLR, History, Observation, Reading, Repair, simulate
from densitylr.diagnosis import CollapseDetector
from densitylr.history import collapse_evidence
from densitylr.monitor.layers import example_variance, rms
from densitylr.policy import PolicyRun, StageNeeds, StageView
from densitylr.recovery import Recovery, recovery
from tests.support.fixed import (
    Fixed,
    batches,
    loss_of,
    net,
    numbers_of,
    one_step,
    probes,
    same,
    same_state,
)
from tests.support.readings import stage_reading

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}

pytestmark = pytest.mark.filterwarnings("ignore:.*are NaN or infinite:RuntimeWarning")


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def spoiled(batch: tuple[Tensor, Tensor], value: float = math.nan) -> tuple[Tensor, Tensor]:
    return batch[0] * value, batch[1]


def lifted(wrapped: DensityLR, stage: str) -> bool:
    """Whether a stage of ``repair`` has lifted off."""
    return wrapped._loop.run.now.state.stages[stage].lifted_at is not None


def events(wrapped: DensityLR) -> list[Any]:
    return [d for d in wrapped.history.decisions if d.kind == "recover"]


# As if it were not there


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_healthy_run_is_the_bare_one_bit_for_bit(name: str) -> None:
    bare, ours = net(), net()
    plain = OPTIMIZERS[name](bare.parameters())
    wrapped = DensityLR(OPTIMIZERS[name](ours.parameters()), ours, every=2, recover=True)
    states = []
    for model, optimizer in ((bare, plain), (ours, wrapped)):
        torch.manual_seed(9)
        for batch in batches(60):
            one_step(model, optimizer, batch)
        states.append(torch.get_rng_state())
    assert same(bare, ours)
    assert same_state(plain, wrapped.inner)
    assert torch.equal(*states)
    assert wrapped.history.decisions == []
    assert set(wrapped.scales.values()) == {1.0}
    assert wrapped.diagnose() == []


def test_it_is_not_asked_for_without_recover() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1)
    for i, batch in enumerate(batches(6)):
        one_step(model, wrapped, spoiled(batch) if i == 3 else batch)
    assert events(wrapped) == []
    assert "recovery" not in wrapped.state_dict()["densitylr"][0]
    assert all(math.isnan(peak) for peak in wrapped.history.series("3", "peak_rms"))
    assert not torch.isfinite(model[0].weight).all()


def test_recover_and_observe_only_exclude_each_other() -> None:
    model = net()
    inner = sgd(model)
    with pytest.raises(ValueError, match="recover=True goes back to a snapshot, observe_only=True"):
        DensityLR(inner, model, recover=True, observe_only=True)
    assert "_densitylr" not in vars(inner)


# Going back


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("step_inner", [False, True])
@pytest.mark.parametrize("at", [0, 1, 4, 6])
def test_after_nan_everything_is_that_of_the_snapshot(
    name: str, step_inner: bool, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A reading every step: a NaN batch at a step is seen there and taken back after it."""
    ours, bare = net(), net()
    inner = OPTIMIZERS[name](ours.parameters())
    plain = OPTIMIZERS[name](bare.parameters())
    wrapped = DensityLR(inner, ours, every=1, recover=True)
    rate = inner.param_groups[0]["lr"]
    tensors = [*ours.parameters(), *ours.buffers()]
    data = batches(12)
    for i in range(at):
        one_step(ours, inner if step_inner else wrapped, data[i])
    for i in range(max(0, at - 1)):
        one_step(bare, plain, data[i])
    with torch.no_grad():
        bare(data[max(0, at - 1)][0])  # a snapshot is taken after the forward: norms have seen it
    one_step(ours, inner if step_inner else wrapped, spoiled(data[at]))
    if at == 0:  # no healthy state has been seen
        assert events(wrapped) == []
        return
    assert same(ours, bare)
    assert same_state(plain, inner)
    assert all(a is b for a, b in zip(tensors, [*ours.parameters(), *ours.buffers()], strict=True))
    assert [g["lr"] for g in inner.param_groups] == [rate]
    (event,) = events(wrapped)
    assert (event.step, event.since, event.stage) == (at, at, "0")
    assert f"went back to step {at - 1}" in event.reason
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    # Afterwards it trains on as the bare one does: the rates are those that were healthy.
    for i in range(at + 1, 12):
        one_step(ours, inner if step_inner else wrapped, data[i])
        one_step(bare, plain, data[i])
    assert same(ours, bare)
    (named,) = wrapped.diagnose()
    assert (named.stage, named.kind, named.since_step) == ("0", "collapsed", at)
    assert named.action.startswith(f"went back to step {at - 1}, rates capped at")


def train(
    recover: bool, spike: range, factor: float = 300.0, steps: int = 150
) -> tuple[nn.Module, DensityLR, float]:
    model = net()
    wrapped = DensityLR(sgd(model), model, recover=recover)
    scheduler = lr_scheduler.CosineAnnealingLR(wrapped, steps)
    for i, batch in enumerate(batches(steps)):
        if i in spike:
            wrapped.param_groups[0]["lr"] *= factor
        one_step(model, wrapped, batch)
        if i in spike:
            wrapped.param_groups[0]["lr"] /= factor
        scheduler.step()
    model.eval()
    with torch.no_grad():
        loss = float(sum(loss_of(model, b) for b in batches(30, seed=6)) / 30)
    return model, wrapped, loss


def test_a_spike_of_the_rate_is_mended_and_without_recover_is_not() -> None:
    spike = range(62, 70)
    _, _, healthy = train(True, range(0))
    _, bare, ill = train(False, spike)
    _, wrapped, mended = train(True, spike)
    assert events(bare) == []
    (event,) = events(wrapped)
    assert 62 <= event.since <= event.step <= 70
    assert "the largest that was healthy" in event.reason
    assert ill > 2 * healthy
    assert mended < 1.3 * healthy
    # The user's rates are the user's.
    assert wrapped.param_groups[0]["lr"] == pytest.approx(bare.param_groups[0]["lr"])
    # The rest of the spike ran at the cap, the rest of the schedule as it was.
    scale = wrapped.history.series("0", "scale")
    assert scale[wrapped.history.steps == event.step] < 0.01
    assert scale[-1] == 1
    assert [d.kind for d in wrapped.diagnose()] == ["collapsed"]
    scales, decisions = simulate(Repair(), wrapped.history)
    assert decisions == []
    assert set(scales) == {"0", "3", "5"}


def test_a_rate_that_collapses_again_is_quartered_until_we_give_up() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, policy=Fixed({"3": 0.5}), recover=True)
    data = batches(32)
    caps = []
    for i, batch in enumerate(data):
        one_step(model, wrapped, spoiled(batch) if i % 2 == 0 and i > 3 else batch)
        assert wrapped.param_groups[0]["lr"] == 0.05
        caps.append(dict(wrapped._loop.recovery.cap))  # type: ignore[union-attr]
    found = events(wrapped)
    assert len(found) == 7
    for k in range(6):
        assert found[k].rate == pytest.approx(0.05 / 4**k)
    # A stage that has not lifted off may still be raised, up to a quarter of the largest rate.
    assert caps[-1] == pytest.approx(dict.fromkeys(("0", "3", "5"), 0.05 / 4**5))
    assert wrapped.scales["5"] == pytest.approx(0.25**5)
    assert "gave up after 6 recoveries in a row" in found[-1].reason
    assert not torch.isfinite(model[0].weight).all()
    assert {"non-finite", "collapsed"} == {d.kind for d in wrapped.diagnose()}


def test_a_collapse_long_after_the_last_is_another_one() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    bad = (5, 65)
    for i, batch in enumerate(batches(bad[-1] + 3)):
        one_step(model, wrapped, spoiled(batch) if i in bad else batch)
    assert [(d.step, d.rate) for d in events(wrapped)] == [(i, 0.05) for i in bad]


def test_a_rate_of_zero_stays_zero_and_a_pretrained_stage_is_capped_too() -> None:
    model = net()
    groups = [
        {"params": model[:3].parameters()},
        {"params": model[3].parameters(), "lr": 0.0},
        {"params": model[5].parameters(), "lr": 0.01},
    ]
    wrapped = DensityLR(
        torch.optim.SGD(groups, lr=0.05), model, every=1, pretrained=True, recover=True
    )
    before = model[3].weight.detach().clone()
    for i, batch in enumerate(batches(12)):
        if i == 6:
            for group in wrapped.param_groups:
                group["lr"] *= 100
        one_step(model, wrapped, spoiled(batch) if i == 6 else batch)
    assert wrapped.scales == {"0": 1.0, "3": 1.0, "5": 1.0} | {
        "0": pytest.approx(0.01),
        "5": pytest.approx(0.01),
    }
    assert torch.equal(model[3].weight, before)
    assert [g["lr"] for g in wrapped.param_groups] == pytest.approx([5.0, 0.0, 1.0])


def test_a_schedule_that_starts_at_zero_is_not_capped_there() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    wrapped.param_groups[0]["lr"] = 0.0
    for i, batch in enumerate(batches(4)):
        one_step(model, wrapped, spoiled(batch) if i == 1 else batch)
        wrapped.param_groups[0]["lr"] = 0.05
    assert len(events(wrapped)) == 1
    assert list(wrapped.scales.values()) == pytest.approx([0.25] * 3)


def test_parameters_outside_the_model_go_back_too() -> None:
    model = net()
    outside = nn.Parameter(torch.ones(3))
    inner = torch.optim.Adam([*model.parameters(), outside], lr=0.1)
    wrapped = DensityLR(inner, model, every=1, recover=True)
    trace = []
    for i, batch in enumerate(batches(5)):
        wrapped.zero_grad()
        trace.append(outside.detach().clone())
        x, y = spoiled(batch) if i == 4 else batch
        (nn.functional.cross_entropy(model(x), y) + outside.sum()).backward()
        wrapped.step()
    assert torch.equal(outside.detach(), trace[3])
    assert inner.state[outside]["step"] == 3


class Tempered(nn.Module):
    """What it multiplies its outputs with is in no stage, so that no reading sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.temperature = nn.Parameter(torch.ones(1))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.temperature


def test_no_state_with_nan_is_gone_back_to_although_its_reading_is_healthy() -> None:
    model = Tempered()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    for i, batch in enumerate(batches(16)):
        wrapped.zero_grad()
        loss_of(model, batch).backward()
        if i == 10:
            model.temperature.grad.fill_(math.nan)  # type: ignore[union-attr]
        wrapped.step()
    (event,) = events(wrapped)
    assert event.step == 12
    assert "went back to step 10" in event.reason
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_collapse_that_comes_again_at_once_goes_back_further() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    for i, batch in enumerate(batches(8)):
        one_step(model, wrapped, spoiled(batch) if i in (5, 6) else batch)
    first, second = events(wrapped)
    assert "went back to step 4" in first.reason
    assert "went back to step 3" in second.reason


def test_there_are_never_more_than_two_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
    most = []

    class Counted(recovery.Snapshot):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.update({id(tensor): tensor for tensor in self.tensors.values()})
            most.append(len(alive))

    monkeypatch.setattr(recovery, "Snapshot", Counted)
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    for i, batch in enumerate(batches(9)):
        one_step(model, wrapped, spoiled(batch) if i == 5 else batch)
    assert max(most) == 2 * len([*model.parameters(), *model.buffers()])
    wrapped.close()
    assert len(alive) == 0


def test_later_there_are_fewer_snapshots_but_one_before_a_rate_jumps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = []

    class Noted(recovery.Snapshot):
        def __init__(self, step: int, *args: Any) -> None:
            super().__init__(step, *args)
            taken.append(step)

    monkeypatch.setattr(recovery, "Snapshot", Noted)
    model = net()
    wrapped = DensityLR(sgd(model, lr=1e-3), model, every=1, recover=True)
    for i, batch in enumerate(batches(300)):
        if i == 290:
            wrapped.param_groups[0]["lr"] = 1e-2
        one_step(model, wrapped, batch)
    assert taken[:20] == list(range(20))
    gaps = {at: at - before for before, at in itertools.pairwise(taken)}
    assert 290 in gaps
    assert all(gap == max(1, at // 20) for at, gap in gaps.items() if 20 <= at < 290)


@pytest.mark.parametrize("spike", [False, True])
def test_a_snapshot_after_a_step_at_a_far_larger_rate_is_not_gone_back_to(spike: bool) -> None:
    """Even if the rate rose and fell between two readings, at which it was the usual one."""
    model = net()
    wrapped = DensityLR(sgd(model, lr=1e-3), model, every=4, recover=True)  # each second step
    for i, batch in enumerate(batches(14)):
        wrapped.param_groups[0]["lr"] = 1e-2 if spike and i == 9 else 1e-3
        one_step(model, wrapped, spoiled(batch) if i == 12 else batch)
    assert set(wrapped.history.series("0", "rate")) == {1e-3}
    (event,) = events(wrapped)
    assert f"went back to step {8 if spike else 10}" in event.reason


def test_while_a_collapse_is_suspected_the_twin_of_a_stage_that_lifts_off_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net()
    groups = [{"params": model[:3].parameters(), "lr": 1e-4}, {"params": model[3:].parameters()}]
    wrapped = DensityLR(torch.optim.SGD(groups, lr=0.1), model, every=2, recover=True)
    monkeypatch.setattr(Recovery, "healthy", property(lambda self: False))
    *most, last = batches(80)
    for batch in most:
        one_step(model, wrapped, batch)
    assert lifted(wrapped, "0")
    assert wrapped._loop.monitor._layers["0"].twin is not None
    monkeypatch.undo()
    one_step(model, wrapped, last)
    one_step(model, wrapped, last)
    assert wrapped._loop.monitor._layers["0"].twin is None


def test_a_collapse_that_comes_again_is_seen_though_the_snapshot_is_old() -> None:
    """What is gone back to is older than the last healthy readings; they are known all the same."""
    model = net()
    wrapped = DensityLR(sgd(model, lr=1e-3), model, every=1, recover=True)
    data = batches(760)
    for i, batch in enumerate(data):
        one_step(model, wrapped, spoiled(batch, 100.0) if i >= 750 else batch)
    first, *later = events(wrapped)
    assert "RMS of its activations" in first.reason
    assert f"went back to step {first.step}" not in first.reason
    assert len(later) >= 3
    assert all("RMS of its activations" in event.reason for event in later)


def test_a_stage_that_lifted_off_stays_so_although_we_go_back() -> None:
    """Its twin is gone: it could not be judged anew."""

    class Late(Fixed):
        """Stage 0 lifts off at step 401."""

        def init(self, stages: Any) -> Any:
            return super().init(stages)[0], dict.fromkeys(stages, False)

        def update(self, state: Any, seen: Observation) -> Any:
            return {}, {name: name == "0" and seen.step >= 401 for name in seen.stages}

        def requires(self, state: Any) -> dict[str, StageNeeds]:
            return {name: StageNeeds(undecided=not lifted) for name, lifted in state.items()}

    model = net()
    policy = Late({"0": 2.0, "3": 1.0, "5": 1.0})
    groups = [{"params": model[:3].parameters(), "lr": 1e-4}, {"params": model[3:].parameters()}]
    wrapped = DensityLR(
        torch.optim.SGD(groups, lr=1e-3), model, every=1, recover=True, policy=policy
    )
    for i, batch in enumerate(batches(407)):
        one_step(model, wrapped, spoiled(batch) if i == 406 else batch)
    assert len(events(wrapped)) == 1
    assert "0" not in wrapped._loop.run.undecided


def test_a_sparse_buffer_is_kept_too() -> None:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: CSR is in beta state
        model.register_buffer("adjacency", torch.eye(4).to_sparse_csr())
        wrapped = DensityLR(sgd(model), model, every=1, recover=True)
        for i, batch in enumerate(batches(8)):
            one_step(model, wrapped, spoiled(batch) if i == 5 else batch)
    assert len(events(wrapped)) == 1
    assert torch.equal(model.adjacency.to_dense(), torch.eye(4))  # type: ignore[operator, union-attr]


def test_a_buffer_that_has_changed_its_shape_is_left_alone() -> None:
    model = net()
    model.register_buffer("cache", torch.zeros(1))
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    for i, batch in enumerate(batches(8)):
        if i == 5:
            model.cache = torch.ones(9)
        one_step(model, wrapped, spoiled(batch) if i == 5 else batch)
    assert len(events(wrapped)) == 1
    assert torch.equal(model.cache, torch.ones(9))  # type: ignore[arg-type]


def test_the_policy_does_not_decide_upon_a_collapse_and_keeps_its_twin() -> None:
    model = net()
    groups = [{"params": model[:3].parameters(), "lr": 1e-6}, {"params": model[3:].parameters()}]
    wrapped = DensityLR(torch.optim.SGD(groups, lr=0.05), model, every=1, recover=True)
    for i, (x, y) in enumerate(batches(6)):
        if i == 4:  # finite for the most part, and further away than any lift-off
            with torch.no_grad():
                model[0].weight.mul_(50)
            x[0] = math.nan
        one_step(model, wrapped, (x, y))
    assert [d.kind for d in wrapped.history.decisions if d.step == 4] == ["recover"]
    assert wrapped.history.series("0", "displacement")[4] > 1
    assert not lifted(wrapped, "0")
    assert wrapped._loop.monitor._layers["0"].twin is not None


def test_the_policy_counts_no_step_that_was_taken_back() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, mode="warmup", every=5, recover=True)
    for i, batch in enumerate(batches(24)):
        before, behind = wrapped._loop.run.now.state, wrapped._loop.run.now.behind
        one_step(model, wrapped, spoiled(batch) if i == 20 else batch)
    (event,) = events(wrapped)
    target = int(event.reason.split("went back to step ")[1].split(",")[0])
    assert event.step == 20
    assert behind == 21 - target
    assert (before.stages["0"].started, before.step) == (0, target)


@pytest.mark.parametrize("every", [5, 26, 50])
def test_a_slow_collapse_that_comes_again_is_quartered_however_rare_the_readings(
    every: int,
) -> None:
    model = net()
    ours = Recovery(model, sgd(model))
    run = PolicyRun(Fixed(), {"a": StageView(0.05, 0.05, 1.0)})
    said = []
    for i, faint in enumerate([0.5] * 12 + [0.002] * 4):
        seen = Reading(every * i, {"a": stage_reading(peak_rms=1.0, example_variance=faint)})
        said.append(ours.see(seen.step, ours.look(seen), {"a": 0.05}, {"a": 1.0}, run))
        ours.go_back()
    reasons = [d.reason for d in said if d is not None]
    assert len(reasons) == 2
    assert "the largest that was healthy" in reasons[0]
    assert "a quarter of what they were" in reasons[1]


# Closures, skipped steps, checkpoints


class Often(torch.optim.SGD):
    """Evaluates its closure five times a step, as a line search does."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            losses = [closure() for _ in range(5)]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)
        return losses[-1]


def test_zero_grad_in_a_closure_looks_for_nothing() -> None:
    model = net()
    wrapped = DensityLR(Often(model.parameters(), lr=0.05), model, every=4, recover=True)
    ill: list[Tensor] = []
    for i, batch in enumerate(batches(20)):
        seen = []

        def closure(batch: Any = batch, i: int = i, seen: list[Tensor] = seen) -> Tensor:
            wrapped.zero_grad()
            seen.append(model[0].weight.detach().clone())
            loss = loss_of(model, spoiled(batch) if i == 9 else batch)
            loss.backward()
            return loss

        wrapped.step(closure)
        ill += [w for w in seen if not torch.equal(w, seen[0]) and torch.isfinite(w).all()]
    assert ill == []
    assert len(events(wrapped)) == 1
    assert wrapped.history.steps.tolist() == probes(4, 20)


def test_a_step_that_raised_is_over() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    data = batches(12)
    for batch in data[:4]:
        one_step(model, wrapped, batch)
    with pytest.raises(ZeroDivisionError):
        wrapped.step(lambda: 1 / 0)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    for batch in data[4:]:
        wrapped.zero_grad()
        loss_of(model, batch)
    assert len(events(wrapped)) == 1
    assert torch.isfinite(model[0].weight).all()


def test_forwards_without_a_step_are_not_decided_upon() -> None:
    """As those of the other half of a GAN, with zero_grad on both."""
    model, policy = net(), Fixed()
    wrapped = DensityLR(sgd(model), model, every=1, policy=policy, recover=True)
    for i, batch in enumerate(batches(60)):
        wrapped.zero_grad()
        loss_of(model, batch).backward()
        if i % 6 == 5:
            wrapped.step()
    assert policy.asked == wrapped.history.steps.tolist() == list(range(10))


def test_after_a_checkpoint_is_loaded_we_have_not_given_up() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    data = batches(40)
    for batch in data[:3]:
        one_step(model, wrapped, batch)
    good = copy.deepcopy((model.state_dict(), wrapped.state_dict()))
    for i in range(3, 30):
        one_step(model, wrapped, spoiled(data[i]) if i % 2 == 0 else data[i])
    assert "gave up" in events(wrapped)[-1].reason
    model.load_state_dict(good[0])
    wrapped.load_state_dict(good[1])
    for i in range(30, 40):
        one_step(model, wrapped, spoiled(data[i]) if i == 39 else data[i])
    assert "the largest that was healthy" in events(wrapped)[-1].reason
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_a_state_dict_that_the_optimizer_refuses_takes_no_snapshot_away() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    for batch in batches(3):
        one_step(model, wrapped, batch)
    other = wrapped.state_dict()
    other["param_groups"] = other["param_groups"] * 2
    before = numbers_of(wrapped.state_dict())
    with pytest.raises(ValueError, match="parameter group"):
        wrapped.load_state_dict(other)
    assert numbers_of(wrapped.state_dict()) == before
    one_step(model, wrapped, spoiled(batches(1)[0]))
    assert len(events(wrapped)) == 1
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_closures_go_back_too() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=4, recover=True)
    for i, batch in enumerate(batches(20)):

        def closure(batch: Any = batch, i: int = i) -> Tensor:
            wrapped.zero_grad()
            loss = loss_of(model, spoiled(batch) if i == 8 else batch)
            loss.backward()
            return loss

        wrapped.step(closure)
    assert len(events(wrapped)) == 1
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


def test_parameters_that_are_nan_mend_although_grad_scaler_takes_no_step() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=2, recover=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, batch in enumerate(batches(30)):
        if i == 9:
            with torch.no_grad():
                model[0].weight.fill_(math.nan)
        wrapped.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        scaler.step(wrapped)
        scaler.update()
    assert len(events(wrapped)) == 1
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())
    assert wrapped._loop.steps > 20


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_the_cap_goes_through_a_checkpoint() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    for i, batch in enumerate(batches(8)):
        one_step(model, wrapped, spoiled(batch) if i == 5 else batch)
    saved = through_a_file(wrapped.state_dict())
    other_model = net()
    other = DensityLR(sgd(other_model), other_model, every=1, recover=True)
    other.load_state_dict(saved)
    assert numbers_of(other.state_dict()) == numbers_of(wrapped.state_dict())
    other.param_groups[0]["lr"] = 0.5
    assert list(other.scales.values()) == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("saved_at", [8, 9])
def test_a_run_that_collapses_right_after_resumption_goes_back_to_the_checkpoint(
    model_first: bool, saved_at: int
) -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=2, recover=True)
    for batch in batches(saved_at):
        one_step(model, wrapped, batch)
    weights = through_a_file(model.state_dict())
    saved = through_a_file(wrapped.state_dict())
    other_model = net()
    with torch.no_grad():
        for p in other_model.parameters():
            p.add_(1.0)  # what is gone back to is not these
    other = DensityLR(sgd(other_model), other_model, every=2, recover=True, pretrained=False)
    for load in (
        lambda: other_model.load_state_dict(weights),
        lambda: other.load_state_dict(saved),
    )[:: 1 if model_first else -1]:
        load()
    for _ in range(2):  # one of the two is a reading
        if not events(other):
            one_step(other_model, other, spoiled(batches(1)[0]))
    (event,) = events(other)
    assert f"went back to step {saved_at}" in event.reason
    for name, p in other_model.named_parameters():
        assert torch.equal(p, weights[name]), name
    back = {k: numbers_of(v) for k, v in other.inner.state_dict()["state"].items()}
    assert back == numbers_of(saved["state"])
    if model_first:  # else a batch has gone through them before anybody could know
        assert numbers_of(other_model.state_dict()) == numbers_of(weights)


def test_a_checkpoint_of_a_collapse_is_nothing_to_go_back_to() -> None:
    """Then, and where no reading is in it, the first healthy one after resumption is."""
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    data = batches(12)
    for batch in data[:8]:
        one_step(model, wrapped, batch)
    saved = wrapped.state_dict()
    (ours,) = saved["densitylr"]
    for held in (
        {**ours["recovery"], "healthy": False},
        {**ours["recovery"], "healthy": False, "first": None, "recent": []},
    ):
        other_model = net()
        other_model.load_state_dict(model.state_dict())
        other = DensityLR(sgd(other_model), other_model, every=1, recover=True)
        state = {**saved, "densitylr": ({**ours, "recovery": held},)}
        other.load_state_dict(through_a_file(state))
        one_step(other_model, other, data[8])
        one_step(other_model, other, spoiled(data[9]))
        (event,) = events(other)
        assert "went back to step 8" in event.reason  # the reading before that step
    broken = net()
    broken.load_state_dict(model.state_dict())
    lost = DensityLR(sgd(broken), broken, every=1, recover=True)
    lost.load_state_dict(state)
    one_step(broken, lost, spoiled(data[9]))
    assert events(lost) == []


def test_a_collapse_shows_against_the_readings_of_the_checkpoint() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    data = batches(30)
    for batch in data[:25]:
        one_step(model, wrapped, batch)
    other_model = net()
    other_model.load_state_dict(model.state_dict())
    other = DensityLR(sgd(other_model), other_model, every=1, recover=True)
    other.load_state_dict(through_a_file(wrapped.state_dict()))
    for pair in ((model, wrapped), (other_model, other)):
        one_step(*pair, data[25])
        with torch.no_grad():
            pair[0][5].weight.mul_(1000.0)
        one_step(*pair, data[26])
    assert len(events(wrapped)) == 1
    assert "RMS of its activations" in events(wrapped)[0].reason
    assert events(other) == events(wrapped)
    assert same(model, other_model)


# The evidence, from readings alone

HEALTHY = {"example_variance": 0.5, "peak_rms": 1.0}


def watched(*last: dict[str, Any], step: int = 5) -> list[Any]:
    """What a `CollapseDetector` says to healthy readings and then to others."""
    detector = CollapseDetector()
    traces = [HEALTHY] * (1 + 2 * 20 // step) + list(last)
    return [
        detector.look(
            Reading(
                i * step,
                {n: stage_reading(**HEALTHY) for n in "acdefg"} | {"b": stage_reading(**numbers)},
            )
        )
        for i, numbers in enumerate(traces)
    ][-len(last) :]


@pytest.mark.parametrize(
    ("numbers", "needed", "reason"),
    [
        ({"nonfinite": 3}, 1, "3 of its activations are NaN"),
        ({"nonfinite": 3, "count": 0, "peak_rms": math.nan}, 1, "3 of its activations are NaN"),
        ({**HEALTHY, "peak_rms": math.inf}, 1, "not finite in a step since the last reading"),
        ({**HEALTHY, "peak_rms": math.nan}, 0, ""),  # nobody asked
        ({**HEALTHY, "peak_rms": 5.1}, 1, "RMS of its activations 5.1, at most 1 before"),
        ({**HEALTHY, "peak_rms": 4.9}, 0, ""),
        (
            {**HEALTHY, "example_variance": 0.0009},
            1,
            "0.09% of its mean square depends on the example",
        ),
        (
            {**HEALTHY, "example_variance": 0.009},
            2,
            "0.90% of its mean square depends on the example",
        ),
        ({**HEALTHY, "example_variance": 0.011}, 0, ""),
        ({**HEALTHY, "example_variance": math.nan}, 0, ""),
        ({**HEALTHY, "near_zero_present": 0.61}, 2, "61% of its outputs are below a tenth"),
        ({**HEALTHY, "near_zero_present": 0.59}, 0, ""),
        ({"count": 0, "example_variance": math.nan, "peak_rms": math.nan}, 0, ""),
    ],
)
def test_what_is_evidence(numbers: dict[str, Any], needed: int, reason: str) -> None:
    found = watched(numbers, numbers)
    assert [f is not None for f in found] == [needed == 1, needed > 0]
    if needed:
        seen = found[needed - 1]
        assert (seen.stage, seen.since) == ("b", 45)
        assert reason in collapse_evidence(seen.numbers)


def test_one_suspicious_reading_between_healthy_ones_is_nothing() -> None:
    faint = {**HEALTHY, "example_variance": 0.009}
    assert watched(faint, HEALTHY, faint, HEALTHY) == [None] * 4


@given(
    growth=st.lists(st.floats(0.2, 4.5), min_size=1, max_size=12),
    early=st.lists(st.floats(1e-6, 1e6), min_size=4, max_size=4),
    rates=st.floats(0.05, 1.0),
)
def test_no_growth_of_less_than_five_and_nothing_early_is_evidence(
    growth: list[float], early: list[float], rates: float
) -> None:
    detector, peak = CollapseDetector(), 1.0
    for i, factor in enumerate(early + growth):
        peak = peak * factor if i >= len(early) else factor
        seen = stage_reading(example_variance=rates, peak_rms=peak)
        assert detector.look(Reading(5 * i, {"a": seen})) is None


def test_nothing_counts_while_the_first_reading_is_one_of_the_recent() -> None:
    detector = CollapseDetector()
    said = [
        detector.look(Reading(50 * i, {"a": stage_reading(example_variance=0.5, peak_rms=6.0**i)}))
        for i in range(5)
    ]
    assert [found is not None for found in said] == [False] * 4 + [True]


def test_stages_that_fade_together_are_evidence() -> None:
    detector = CollapseDetector()
    said = []
    for i, ratio in enumerate([1.0] * 8 + [0.5] * 3 + [0.19] * 2):
        numbers = {
            name: stage_reading(peak_rms=1.0, example_variance=0.8 * ratio) for name in ("a", "b")
        }
        said.append(detector.look(Reading(5 * i, numbers)))
    assert said[:-1] == [None] * 12
    assert said[-1] is not None
    assert said[-1].since == 55
    assert "over all stages 38% as much" in collapse_evidence(said[-1].numbers)


def test_a_quiet_stage_that_lifts_off_late_is_healthy() -> None:
    detector = CollapseDetector()
    for i, peak in enumerate([0.01] * 8 + [0.5, 1.9]):
        stages = {
            "a": stage_reading(**HEALTHY),
            "b": stage_reading(peak_rms=peak, example_variance=0.5),
        }
        assert detector.look(Reading(5 * i, stages)) is None


# The statistics


@given(st.integers(8, 12), st.integers(1, 5), st.floats(-3, 3), st.integers(0, 99))
def test_example_variance_and_rms_against_float64(n: int, k: int, shift: float, seed: int) -> None:
    a = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) + shift
    rows = a.double().tolist()
    square = sum(x * x for row in rows for x in row) / (n * k)
    means = [sum(row[j] for row in rows) / n for j in range(k)]
    spread = sum((row[j] - means[j]) ** 2 for row in rows for j in range(k)) / (n * k)
    assert float(example_variance(a)) == pytest.approx(spread / square, rel=1e-4)
    assert float(example_variance(a.t(), 1)) == pytest.approx(spread / square, rel=1e-4)
    assert float(rms(a)) == pytest.approx(math.sqrt(square), rel=1e-5)
    assert float(example_variance(a[:1].expand(n, k))) == pytest.approx(0, abs=1e-6)


def test_example_variance_of_few_examples_is_unknown_and_rms_tells_of_nan() -> None:
    assert math.isnan(float(example_variance(torch.randn(7, 100))))
    assert math.isnan(float(rms(torch.tensor([1.0, math.nan]))))
    assert float(rms(torch.tensor([3.0, -math.inf]))) == math.inf


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rms_of_any_dtype(dtype: torch.dtype) -> None:
    found = rms(torch.tensor([3.0, 4.0], dtype=dtype))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(12.5**0.5)


def test_a_model_in_double_precision_is_watched_too() -> None:
    model = net().double()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    for i, (x, y) in enumerate(batches(5)):
        one_step(model, wrapped, spoiled((x.double(), y)) if i == 3 else (x.double(), y))
    assert len(events(wrapped)) == 1


def test_histories_keep_the_new_numbers(tmp_path: Any) -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, every=1, recover=True)
    for batch in batches(4):
        one_step(model, wrapped, batch)
    wrapped.history.save(tmp_path / "a.npz")
    again = History.load(tmp_path / "a.npz")
    for name in ("example_variance", "peak_rms"):
        assert (again.series("3", name) == wrapped.history.series("3", name)).all()
        assert (again.series("3", name) > 0).all()
