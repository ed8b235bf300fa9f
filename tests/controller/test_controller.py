"""The optimizer around the optimizer: like the bare one, but for the scales during a step."""

from __future__ import annotations

import copy
import gc
import io
import logging
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from densitylr import DensityLR, Free, Repair, Warmup, find_stages, simulate
from tests.support.fixed import (
    Fixed,
    batches,
    hooks_of,
    loss_of,
    net,
    numbers_of,
    one_step,
    probes,
    same,
    same_state,
)

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=False),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}
SCALES = {"0": 0.25, "3": 2.0, "5": 1.0}


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def starved(model: nn.Module, lr: float = 0.1, factor: float = 1e-4) -> torch.optim.SGD:
    """The first stage with next to no rate."""
    groups = [
        {"params": list(model[:3].parameters()), "lr": lr * factor},
        {"params": list(model[3:].parameters())},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


# As if it were not there


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"policy": Fixed()}, {"pretrained": True}])
def test_flat_rates_train_bit_for_bit_as_without(name: str, options: dict[str, Any]) -> None:
    bare, ours = net(), net()
    plain = OPTIMIZERS[name](bare.parameters())
    wrapped = DensityLR(OPTIMIZERS[name](ours.parameters()), ours, every=2, **options)
    states = []
    for model, optimizer in ((bare, plain), (ours, wrapped)):
        torch.manual_seed(9)
        for batch in batches(9):
            one_step(model, optimizer, batch)
        states.append(torch.get_rng_state())
    assert same(bare, ours)
    assert same_state(plain, wrapped.inner)
    assert torch.equal(*states)
    assert wrapped.history.steps.tolist() == probes(2, 9)
    assert wrapped.history.decisions == []
    assert set(wrapped.scales.values()) == {1.0}


@pytest.mark.parametrize("mode", ["repair", "warmup", "free"])
def test_observe_only_decides_but_does_nothing(mode: str) -> None:
    bare, ours = net(), net()
    plain = starved(bare)
    wrapped = DensityLR(starved(ours), ours, mode=mode, every=2, observe_only=True)
    for model, optimizer in ((bare, plain), (ours, wrapped)):
        for batch in batches(20):
            one_step(model, optimizer, batch)
    assert same(bare, ours)
    assert same_state(plain, wrapped.inner)
    assert wrapped.history.decisions
    assert set(wrapped.scales.values()) == {1.0}
    assert set(wrapped.history.series("0", "scale")) == {1.0}


def test_pretrained_true_abstains() -> None:
    bare, ours = net(), net()
    plain, wrapped = starved(bare), DensityLR(starved(ours), ours, every=1, pretrained=True)
    for model, optimizer in ((bare, plain), (ours, wrapped)):
        for batch in batches(8):
            one_step(model, optimizer, batch)
    assert same(bare, ours)
    assert wrapped.history.decisions == []
    assert len(wrapped.history) == 8


def test_weights_that_were_trained_are_left_alone_with_a_warning() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.add_(0.5)
    wrapped = DensityLR(starved(model), model, every=1)
    with pytest.warns(UserWarning, match=r"weights look trained.*left alone: 0 \("):
        one_step(model, wrapped, batches(8)[0])
    for batch in batches(8)[1:]:  # and no more
        one_step(model, wrapped, batch)
    assert wrapped.scales["0"] == 1.0
    assert not [d for d in wrapped.history.decisions if d.stage == "0"]
    model = net()
    with torch.no_grad():
        model[0].weight.add_(0.5)
    one_step(model, DensityLR(starved(model), model, pretrained=False), batches(1)[0])


def test_weights_that_our_own_run_has_trained_are_not_warned_of() -> None:
    model = net()
    wrapped = DensityLR(starved(model), model, every=1)
    for batch in batches(20):
        one_step(model, wrapped, batch)
    assert wrapped.scales["0"] > 1
    other = net()
    other.load_state_dict(model.state_dict())  # before there is an optimizer, as is usual
    resumed = DensityLR(starved(other), other, every=1)
    assert "0" in resumed.excluded  # or this would show nothing
    resumed.load_state_dict(through_a_file(wrapped.state_dict()))
    for batch in batches(4, seed=6):
        one_step(model, wrapped, batch)
        one_step(other, resumed, batch)
    assert same(model, other)
    # One that has no such state is warned of, as ever.
    another = net()
    another.load_state_dict(model.state_dict())
    bare = DensityLR(starved(another), another)
    with pytest.warns(UserWarning, match="no DensityLR state"):
        bare.load_state_dict(wrapped.inner.state_dict())
    with pytest.warns(UserWarning, match="the weights look trained"):
        one_step(another, bare, batches(1)[0])


# Scaled


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("step_inner", [False, True])
def test_scales_are_real_group_rates(name: str, step_inner: bool) -> None:
    real, ours = net(), net()
    children = [c for c in real if list(c.parameters())]
    plain = OPTIMIZERS[name]([{"params": list(c.parameters())} for c in children])
    for group, factor in zip(plain.param_groups, (0.25, 0.25, 2.0, 1.0), strict=True):
        group["lr"] *= factor
    inner = OPTIMIZERS[name](ours.parameters())
    wrapped = DensityLR(inner, ours, policy=Fixed(SCALES), every=3)
    rate = inner.param_groups[0]["lr"]
    for batch in batches(7):
        one_step(real, plain, batch)
        one_step(ours, inner if step_inner else wrapped, batch)
        assert len(wrapped.param_groups) == 1
        assert wrapped.param_groups[0]["lr"] == rate
    assert same(real, ours)
    assert wrapped.policy.asked == probes(3, 7)
    assert wrapped.scales == SCALES


def test_repair_raises_a_starved_stage_and_stops_at_lift_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bare, ours = net(), net()
    plain, wrapped = starved(bare), DensityLR(starved(ours), ours, every=2)
    before = ours[0].weight.detach().clone()
    with caplog.at_level(logging.INFO, logger="densitylr"):
        for batch in batches(60):
            one_step(ours, wrapped, batch)
    for batch in batches(60):
        one_step(bare, plain, batch)
    moved, moved_bare = (float((m[0].weight - before).detach().norm()) for m in (ours, bare))
    assert moved > 10 * moved_bare
    kinds = [d.kind for d in wrapped.history.decisions]
    assert kinds[0] == "raise"
    assert {d.stage for d in wrapped.history.decisions} == {"0"}
    assert 1 < wrapped.scales["0"] <= 1e4
    assert wrapped.scales["3"] == wrapped.scales["5"] == 1
    # Told once as a warning, then as information.
    levels = [r.levelno for r in caplog.records]
    assert levels == [logging.WARNING] + [logging.INFO] * (len(kinds) - 1)
    assert "near-zero density" in caplog.records[0].getMessage()
    assert [d.stage for d in wrapped.diagnose()] == ["0"]
    assert "0 ×" in repr(wrapped)


def test_recorded_run_says_the_same_in_simulation() -> None:
    for observe_only in (False, True):
        for mode in ("repair", "warmup", "free"):
            model = net()
            wrapped = DensityLR(
                starved(model), model, mode=mode, every=2, observe_only=observe_only
            )
            for batch in batches(30):
                one_step(model, wrapped, batch)
            scales, decisions = simulate(wrapped.policy, wrapped.history, wrapped.build_up)
            assert decisions == wrapped.history.decisions
            assert decisions
            assert scales == wrapped._loop.run.scales


def test_observe_only_may_be_set_for_a_while() -> None:
    ours, bare = net(), net()
    plain = starved(bare)
    wrapped = DensityLR(starved(ours), ours, policy=Fixed({"0": 100.0}))
    wrapped.observe_only = True
    for batch in batches(3):
        one_step(ours, wrapped, batch)
        one_step(bare, plain, batch)
    assert same(ours, bare)
    assert set(wrapped.scales.values()) == {1.0}
    wrapped.observe_only = False
    assert wrapped.scales["0"] == 100.0
    one_step(ours, wrapped, batches(1)[0])
    one_step(bare, plain, batches(1)[0])
    assert wrapped.scales["0"] == 100.0
    assert not same(ours, bare)


def test_gradient_accumulation_reads_once_a_step() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model, policy=Fixed(), every=1)
    for _ in range(3):
        for batch in batches(4):
            (loss_of(model, batch) / 4).backward()
        wrapped.step()
        wrapped.zero_grad()
    assert wrapped.policy.asked == [0, 1, 2]
    assert wrapped.history.series("0", "count").tolist() == [16 * 16] * 3
    assert all(p.grad is None for p in model.parameters())
    loss_of(model, batches(1)[0]).backward()
    wrapped.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())


# Schedulers

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=12),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (i + 1)),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 3),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)],
        milestones=[4],
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_write_the_rates_they_write_without(name: str) -> None:
    traces = []
    for wrap in (False, True):
        model = net()
        optimizer: Optimizer = sgd(model)
        if wrap:
            optimizer = DensityLR(optimizer, model, policy=Fixed(SCALES), every=2)
        scheduler = SCHEDULERS[name](optimizer)
        trace = []
        for batch in batches(11):
            one_step(model, optimizer, batch)
            scheduler.step(*([1.0] if name == "plateau" else []))
            group = optimizer.param_groups[0]
            trace.append((group["lr"], group["momentum"], scheduler.get_last_lr()))
        traces.append(trace)
    assert traces[0] == traces[1]
    assert len({lr for lr, _, _ in traces[0]}) > 1


# Steps that fail or are skipped


class Failing(torch.optim.SGD):
    fail = False

    def step(self, closure: Any = None) -> Any:
        if self.fail:
            raise RuntimeError("no step")
        return super().step(closure)


@pytest.mark.parametrize("step_inner", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_three_failed_steps_leave_the_rates(step_inner: bool, grouped: bool) -> None:
    ours, real = net(), net()
    parts: Any = [{"params": c.parameters()} for c in ours] if grouped else ours.parameters()
    inner = Failing(parts, lr=0.1)
    wrapped = DensityLR(inner, ours, policy=Fixed(SCALES))
    groups = wrapped.param_groups
    stepped = inner if step_inner else wrapped
    first, second = batches(2)
    one_step(ours, stepped, first)
    inner.fail = True
    for _ in range(3):
        with pytest.raises(RuntimeError, match="no step"):
            stepped.step()
        if not step_inner:
            assert wrapped.param_groups is groups
            assert all(g["lr"] == 0.1 for g in groups)
    inner.fail = False
    one_step(ours, stepped, second)
    assert wrapped.param_groups is groups
    assert all(g["lr"] == 0.1 for g in groups)
    plain = torch.optim.SGD([{"params": list(c.parameters())} for c in real], lr=0.1)
    for group, factor in zip(plain.param_groups, (0.25, 0.25, 1, 2.0, 1, 1), strict=True):
        group["lr"] *= factor
    for batch in (first, second):
        one_step(real, plain, batch)
    assert same(ours, real)


def test_a_closure_is_called_once_and_may_raise() -> None:
    model = net()
    wrapped = DensityLR(sgd(model, 0.1), model, policy=Fixed(SCALES), every=1)
    batch = batches(1)[0]

    def closure() -> Tensor:
        wrapped.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        calls.append(loss.item())
        if len(calls) == 2:
            raise RuntimeError("in the closure")
        return loss

    calls: list[float] = []
    assert wrapped.step(closure).item() == calls[0]
    with pytest.raises(RuntimeError, match="in the closure"):
        wrapped.step(closure)
    assert [g["lr"] for g in wrapped.param_groups] == [0.1]
    wrapped.step(closure)
    assert len(calls) == 3
    assert wrapped.policy.asked


@pytest.mark.parametrize("name", ["sgd", "adam foreach"])
@pytest.mark.parametrize("step_inner", [False, True])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_with_a_closure_everything_is_as_without(
    name: str, step_inner: bool, by_keyword: bool
) -> None:
    """Its forward is read, and its gradients looked at, in the step that it is called in."""
    runs = []
    for closed in (False, True):
        model = net()
        inner = OPTIMIZERS[name]([{"params": c.parameters()} for c in (model[:3], model[3:])])
        inner.param_groups[0]["lr"] *= 1e-4
        own = [group["lr"] for group in inner.param_groups]
        wrapped = DensityLR(inner, model, every=2)
        stepped = inner if step_inner else wrapped
        for batch in batches(30):

            def closure(
                batch: Any = batch, model: Any = model, wrapped: Any = wrapped, own: Any = own
            ) -> Tensor:
                assert [group["lr"] for group in wrapped.param_groups] == own
                loss = loss_of(model, batch)
                wrapped.zero_grad(set_to_none=False)
                loss.backward()
                return loss

            if not closed:
                closure()
                stepped.step()
            elif by_keyword:
                stepped.step(closure=closure)
            else:
                stepped.step(closure)
        assert wrapped.scales["0"] > 1
        runs.append((model, wrapped))
    (apart, one), (within, other) = runs
    assert same(apart, within)
    assert same_state(one, other)
    assert one.history.decisions == other.history.decisions
    assert one.history.readings == other.history.readings
    assert one.scales == other.scales


def test_a_rate_that_a_closure_sets_is_the_user_s() -> None:
    ours, real = net(), net()
    wrapped = DensityLR(sgd(ours), ours, policy=Fixed({"0": 0.5, "3": 0.5, "5": 0.5}), every=1)
    plain = sgd(real)
    for factor, model, optimizer in ((1.0, ours, wrapped), (0.5, real, plain)):
        for i, batch in enumerate(batches(6)):

            def closure(
                i: int = i,
                batch: Any = batch,
                factor: float = factor,
                model: nn.Module = model,
                optimizer: Any = optimizer,
            ) -> Tensor:
                optimizer.param_groups[0]["lr"] = factor * 0.1 / (i + 1)
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert same(ours, real)
    assert wrapped.param_groups[0]["lr"] == 0.1 / 6


def test_a_step_that_grad_scaler_skips_is_no_step() -> None:
    ours, real = net(), net()
    wrapped = DensityLR(sgd(ours), ours, policy=Fixed(SCALES), every=1)
    parts = [{"params": c.parameters()} for c in real]
    plain = torch.optim.SGD(parts, lr=0.05, momentum=0.9)
    for group, factor in zip(plain.param_groups, (0.25, 0.25, 1, 2.0, 1, 1), strict=True):
        group["lr"] *= factor
    for model, optimizer in ((ours, wrapped), (real, plain)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i, batch in enumerate(batches(5)):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch)).backward()
            if i == 2:
                model[0].weight.grad[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512
    assert same(ours, real)
    assert wrapped.policy.asked == [0, 1, 2, 3]


def test_unscaling_is_left_to_grad_scaler() -> None:
    model = net()
    inner = torch.optim.Adam(model.parameters(), fused=True)
    assert inner._step_supports_amp_scaling
    wrapped = DensityLR(inner, model)
    assert not getattr(wrapped, "_step_supports_amp_scaling", False)


# Checkpoints


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_resuming_goes_on_as_if_never_stopped() -> None:
    """Scales that are not 1, in the midst of a search, between two readings."""
    whole = net()
    straight = DensityLR(starved(whole), whole, every=5, policy=Repair())
    for batch in batches(33):
        one_step(whole, straight, batch)
    resumed, saved = net(), {}
    for steps in (range(13), range(13, 33)):
        wrapped = DensityLR(starved(resumed), resumed, every=5, policy=Repair(), pretrained=False)
        if saved:
            wrapped.load_state_dict(through_a_file(saved))
        for i in steps:
            one_step(resumed, wrapped, batches(33)[i])
        saved = wrapped.state_dict()
        wrapped.close()
        assert wrapped.history.steps.tolist() == [s for s in probes(5, 40) if s in steps]
    assert straight.scales["0"] > 1
    assert [d.scale for d in straight.history.decisions] == [
        d.scale for d in wrapped.history.decisions
    ]
    assert same(whole, resumed)


def test_state_dict_round_trip() -> None:
    model = net()
    wrapped = DensityLR(starved(model), model, every=1)
    for batch in batches(25):
        one_step(model, wrapped, batch)
    assert wrapped.scales["0"] > 1
    other_model = net()
    other = DensityLR(starved(other_model), other_model, every=1)
    other.load_state_dict(through_a_file(wrapped.state_dict()))
    assert other.scales == wrapped.scales
    assert other.history.decisions == wrapped.history.decisions
    assert same_state(other.inner, wrapped.inner)
    assert numbers_of(through_a_file(other.state_dict())) == numbers_of(wrapped.state_dict())
    # Lifted stages need no twin any more.
    assert wrapped._loop.run.now.state.stages["0"].lifted_at is not None
    assert other._loop.monitor._layers["0"].twin is None


def test_bare_and_wrapped_checkpoints_are_exchanged() -> None:
    model = net()
    wrapped = DensityLR(sgd(model), model)
    for batch in batches(3):
        one_step(model, wrapped, batch)
    bare = sgd(net())
    bare.load_state_dict(through_a_file(wrapped.state_dict()))
    assert same_state(bare, wrapped.inner)
    again = net()
    ours = DensityLR(sgd(again), again)
    with pytest.warns(UserWarning, match="no DensityLR state"):
        ours.load_state_dict(through_a_file(bare.state_dict()))
    assert same_state(bare, ours.inner)
    assert set(ours.scales.values()) == {1.0}
    one_step(again, ours, batches(1)[0])


class Recurrent(nn.Module):
    """Its first stage is called whole, so that its twin is a copied module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gru, self.head = nn.GRU(3, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x.unflatten(1, (2, 3)))[0][:, -1])


@pytest.mark.parametrize("mode", ["repair", "free"])
@pytest.mark.parametrize("make", [net, Recurrent])
@pytest.mark.parametrize("stop", [0, 1, 5, 12])
def test_a_resumed_run_is_the_one_that_never_stopped(
    make: Callable[[], nn.Module], mode: str, stop: int
) -> None:
    """It starts from other weights, and knows from the checkpoint what the first were."""

    def begin(size: float = 1.0) -> tuple[nn.Module, DensityLR]:
        model = make()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(size)
        first, *rest = find_stages(model).values()
        groups = [{"params": list(first.parameters.values()), "lr": 1e-5}]
        groups += [{"params": list(stage.parameters.values()), "lr": 0.1} for stage in rest]
        inner = torch.optim.SGD(groups, momentum=0.9)
        return model, DensityLR(inner, model, mode=mode, every=2, pretrained=False)

    data = batches(40)
    whole, never = begin()
    for batch in data:
        one_step(whole, never, batch)
    assert never.history.decisions
    model, wrapped = begin()
    for batch in data[:stop]:
        one_step(model, wrapped, batch)
    saved = through_a_file({"model": model.state_dict(), "optimizer": wrapped.state_dict()})
    again, resumed = begin(1.5)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for batch in data[stop:]:
        one_step(again, resumed, batch)
    assert same(whole, again)
    assert same_state(never, resumed)
    assert never.history.decisions == resumed.history.decisions
    assert resumed.history.readings == [r for r in never.history.readings if r.step >= stop]


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("done", [5, 6, 7])
def test_a_run_that_is_taken_back_goes_on_like_a_new_one(done: int, between: bool) -> None:
    """To before its first step, in the midst of a reading or not (``between`` forward and step)."""

    def begin() -> tuple[nn.Module, DensityLR]:
        model = net()
        return model, DensityLR(starved(model), model, pretrained=False)

    data = batches(30)
    model, wrapped = begin()
    saved = copy.deepcopy((model.state_dict(), wrapped.state_dict()))
    for batch in data[:done]:
        one_step(model, wrapped, batch)
    if between:
        loss_of(model, data[done])
    model.load_state_dict(saved[0])
    wrapped.load_state_dict(saved[1])
    never, new = begin()
    for batch in data:
        one_step(model, wrapped, batch)
        one_step(never, new, batch)
    assert new.history.decisions
    assert same(model, never)
    assert wrapped.history.readings == new.history.readings


def test_a_resumed_run_keeps_the_twins_that_the_other_one_has() -> None:
    """Which are of use is decided once, not again at the rates of the step it goes on from."""
    data = batches(16)
    runs = []
    for stop in (None, 6):
        model = net()
        wrapped = DensityLR(starved(model, factor=0.1), model, pretrained=False)
        for step, batch in enumerate(data):
            # A schedule of one group alone: for a while all rates are equal.
            wrapped.param_groups[0]["lr"] = 0.1 if 4 <= step < 8 else 0.01
            if step == stop:
                saved = copy.deepcopy((model.state_dict(), wrapped.state_dict()))
                model = net()
                wrapped = DensityLR(starved(model, factor=0.1), model, pretrained=False)
                model.load_state_dict(saved[0])
                wrapped.load_state_dict(saved[1])
            one_step(model, wrapped, batch)
        runs.append(wrapped.history.readings)
    assert runs[1] == [reading for reading in runs[0] if reading.step >= 6]


def test_a_checkpoint_of_another_mode_or_model_changes_nothing() -> None:
    model = net()
    warm = DensityLR(sgd(model), model, mode="warmup")
    for batch in batches(3):
        one_step(model, warm, batch)
    fresh = net()
    wrapped = DensityLR(sgd(fresh), fresh)
    with pytest.raises(ValueError, match="is of policy Warmup, this DensityLR has Repair"):
        wrapped.load_state_dict(warm.state_dict())
    other = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))
    strange = DensityLR(sgd(other), other, mode="warmup")
    with pytest.raises(ValueError, match=r"has stages \['3', '5'\]"):
        strange.load_state_dict(warm.state_dict())
    assert not wrapped.state
    assert not strange.state
    assert strange.scales == {"0": 1e-4, "1": 1e-4}


# What can go wrong at construction


class Prodigy(torch.optim.SGD):
    pass


class AdamWScheduleFree(torch.optim.SGD):
    pass


class NoRate(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            del group["lr"]


class NoneRate(torch.optim.SGD):
    """As Hugging Face's Adafactor is by default, which finds its rate itself."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.param_groups[0]["lr"] = None


class Decaying(torch.optim.Optimizer):
    """Gradient descent that multiplies its own rate at each step."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])
            group["lr"] *= 0.99


class DecayingOutside(torch.optim.SGD):
    """The same by a subclass whose step calls its parent's: torch calls the hooks of both."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.99
        return loss


def test_a_step_that_sets_its_rate_itself_is_refused_when_it_is_scaled() -> None:
    model, flat, bare = net(), net(), net()
    plain = Decaying(bare.parameters(), 0.1)
    wrapped = DensityLR(Decaying(flat.parameters(), 0.1), flat)
    for batch in batches(3):
        one_step(bare, plain, batch)
        one_step(flat, wrapped, batch)
    assert same(flat, bare)
    inner = Decaying(model.parameters(), 0.1)
    scaled = DensityLR(inner, model, policy=Fixed({"3": 2.0}))
    with pytest.raises(
        RuntimeError, match=r"Decaying has set a rate in its own step, to 0\.\d+ wh"
    ):
        one_step(model, scaled, batches(1)[0])
    assert [group["lr"] for group in inner.param_groups] == [0.1]


def test_a_step_within_a_step_is_one() -> None:
    assert sgd(net())  # whose class has the hooks from now on
    model = net()
    groups = [{"params": model[:2].parameters(), "lr": 1e-6}, {"params": model[2:].parameters()}]
    inner = DecayingOutside(groups, lr=0.1)
    wrapped = DensityLR(inner, model)
    for batch in batches(30):
        one_step(model, wrapped, batch)
    assert wrapped.scales["0"] > 1
    assert wrapped.state_dict()["densitylr"][0]["steps"] == 30
    bare = 1e-6
    for _ in range(30):
        bare *= 0.99
    assert inner.param_groups[0]["lr"] == bare


@pytest.mark.parametrize(
    ("mode", "policy"), [("repair", Repair), ("warmup", Warmup), ("free", Free)]
)
def test_a_mode_is_the_short_name_of_a_policy(mode: str, policy: Any) -> None:
    """A policy is not judged as what ``mode`` says."""
    runs = []
    for options in ({"policy": policy()}, {"mode": mode}, {"mode": "repair", "policy": policy()}):
        model = net()
        wrapped = DensityLR(sgd(model), model, **options)
        assert wrapped.policy == policy()
        for batch in batches(40):
            one_step(model, wrapped, batch)
        runs.append((model, list(map(str, wrapped.diagnose()))))
    (first, said), *others = runs
    assert all(same(first, model) and said == again for model, again in others)


def test_a_missing_stage() -> None:
    model = net()
    inner = torch.optim.SGD(model[:3].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"none of the 2 trainable parameters of stage '3'"):
        DensityLR(inner, model)
    assert hooks_of(model) == 0
    model[3:].requires_grad_(False)
    wrapped = DensityLR(inner, model)
    one_step(model, wrapped, batches(1)[0])
    assert [(d.stage, d.kind) for d in wrapped.diagnose()] == [("3", "frozen"), ("5", "frozen")]


def test_an_optimizer_of_another_model() -> None:
    with pytest.raises(ValueError, match="no parameter of this model: it was made for another"):
        DensityLR(sgd(net()), net())


def test_a_wrapper_that_nothing_refers_to_is_missed() -> None:
    model, bare = net(), net()
    inner, other = starved(model), starved(bare)
    DensityLR(inner, model)
    gc.collect()
    first, second = batches(2)
    one_step(bare, other, first)
    one_step(bare, other, second)
    for batch in (first, second):
        with pytest.warns(UserWarning, match="the DensityLR of this SGD is gone"):
            one_step(model, inner, batch)
    assert same(model, bare)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (sgd, {"mode": "magic"}, ValueError, "mode must be one of repair, warmup, free"),
        (sgd, {"every": 0}, ValueError, "every must be a positive number of steps"),
        (sgd, {"stages": {"a": "nothing"}}, ValueError, "matches no module or parameter"),
        (lambda m: torch.optim.LBFGS(m.parameters()), {}, ValueError, "LBFGS takes a single"),
        (lambda m: torch.optim.Rprop(m.parameters()), {}, ValueError, "at its first step only"),
        (lambda m: Prodigy(m.parameters(), lr=1.0), {}, ValueError, "Prodigy estimates one"),
        (lambda m: NoRate(m.parameters()), {}, ValueError, "has no 'lr' to scale"),
        (lambda m: NoneRate(m.parameters()), {}, ValueError, r"param_groups\[0\] .* has lr=None"),
        (lambda m: "adam", {}, TypeError, r"must be a torch\.optim\.Optimizer, got str"),
    ],
)
def test_a_failed_construction_leaves_no_trace(
    make: Callable[[nn.Module], Any], options: dict[str, Any], error: type, message: str
) -> None:
    model = net()
    inner = make(model)
    before = dict(vars(inner)) if isinstance(inner, Optimizer) else {}
    with pytest.raises(error, match=message):
        DensityLR(inner, model, **options)
    assert hooks_of(model) == 0
    if before:
        assert vars(inner) == before
        assert not inner._optimizer_step_pre_hooks
        assert not inner._optimizer_step_post_hooks


def test_models_that_cannot_be_watched_leave_no_trace_either() -> None:
    inner = sgd(net())
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        DensityLR(inner, "model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no weight layer"):
        DensityLR(inner, nn.Sequential(nn.BatchNorm1d(3)))
    assert "_densitylr" not in vars(inner)
    assert not inner._optimizer_step_pre_hooks


def test_wrapping_twice() -> None:
    model = net()
    inner = sgd(model)
    wrapped = DensityLR(inner, model)
    hooks = hooks_of(model)
    for optimizer in (inner, wrapped):
        with pytest.raises(ValueError, match=r"(SGD has|optimizer is) a DensityLR already"):
            DensityLR(optimizer, model)
    assert hooks_of(model) == hooks
    wrapped.close()
    assert hooks_of(model) == 0
    assert not inner._optimizer_step_pre_hooks
    again = DensityLR(inner, model)
    # One that was let go without close() does not block the optimizer for ever.
    gone = weakref.ref(again)
    del again
    gc.collect()
    assert gone() is None
    third = DensityLR(inner, model)
    one_step(model, third, batches(1)[0])  # without a warning that the second is gone
    assert len(third.history) == 1


def test_schedule_free_is_warned_about() -> None:
    model = net()
    with pytest.warns(UserWarning, match="stays in its averaging weights"):
        DensityLR(AdamWScheduleFree(model.parameters(), lr=0.1), model)


# An optimizer like any other


def test_it_is_the_inner_optimizer_to_everybody() -> None:
    model = net()
    inner = sgd(model)
    wrapped = DensityLR(inner, model)
    assert isinstance(wrapped, Optimizer)
    assert wrapped.param_groups is inner.param_groups
    assert wrapped.state is inner.state
    assert wrapped.defaults is inner.defaults
    assert list(wrapped.stages) == list(find_stages(model))
    with pytest.raises(AttributeError):
        _ = wrapped.no_such_attribute
    wrapped.param_groups[0]["lr"] = 0.7
    assert inner.param_groups[0]["lr"] == 0.7
    assert inner.__class__.__name__ in repr(wrapped)
    seen = []
    wrapped.register_step_post_hook(lambda *_: seen.append(1))
    one_step(model, wrapped, batches(1)[0])
    assert seen == [1]


@pytest.mark.parametrize("through_inner", [False, True])
def test_a_group_that_is_added_later_is_scaled_too(through_inner: bool) -> None:
    ours, real = net(), net()
    inner = torch.optim.SGD([*ours[0].parameters(), ours[3].weight, *ours[5].parameters()], lr=0.1)
    wrapped = DensityLR(inner, ours, policy=Fixed(SCALES), every=1)
    batch, second = batches(2)
    one_step(ours, wrapped, batch)
    added = {"params": [ours[3].bias, *ours[1].parameters()], "lr": 0.4}
    (inner if through_inner else wrapped).add_param_group(added)
    one_step(ours, wrapped, second)
    groups = [
        {"params": list(real[0].parameters()), "lr": 0.025},
        {"params": [real[3].weight], "lr": 0.2},
        {"params": list(real[5].parameters()), "lr": 0.1},
    ]
    plain = torch.optim.SGD(groups, lr=1.0)
    one_step(real, plain, batch)
    plain.add_param_group({"params": [real[3].bias], "lr": 0.8})
    plain.add_param_group({"params": list(real[1].parameters()), "lr": 0.1})
    one_step(real, plain, second)
    assert same(ours, real)
    assert [g["lr"] for g in wrapped.param_groups] == [0.1, 0.4]


@pytest.mark.parametrize("through_inner", [False, True])
def test_a_stage_that_is_added_later_is_repaired(through_inner: bool) -> None:
    model = net()
    first = [*model[0].parameters(), *model[1].parameters()]
    for p in first:
        p.requires_grad_(False)
    inner = torch.optim.SGD([*model[3].parameters(), *model[5].parameters()], lr=0.1)
    wrapped = DensityLR(inner, model)
    data = batches(30)
    for batch in data[:6]:
        one_step(model, wrapped, batch)
    for p in first:
        p.requires_grad_(True)
    (inner if through_inner else wrapped).add_param_group({"params": first, "lr": 1e-6})
    for batch in data[6:]:
        one_step(model, wrapped, batch)
    assert wrapped.scales["0"] > 1
    assert [(d.stage, d.kind) for d in wrapped.diagnose()] == [("0", "starved")]


def test_the_rate_of_a_stage_is_its_largest_and_zero_when_frozen() -> None:
    model = net()
    model[3].weight.requires_grad_(False)
    groups = [
        {"params": model[:3].parameters(), "lr": 0.1},
        {"params": [model[3].weight], "lr": 5.0},
        {"params": [model[3].bias], "lr": 0.2},
        {"params": model[5].parameters(), "lr": 0.0},
    ]
    wrapped = DensityLR(torch.optim.SGD(groups, lr=1.0), model, every=1, pretrained=False)
    one_step(model, wrapped, batches(1)[0])
    rates = {s: wrapped.history.series(s, "rate")[0] for s in wrapped.stages}
    assert rates == {"0": 0.1, "3": 0.2, "5": 0.0}
    assert [(d.stage, d.kind) for d in wrapped.diagnose()] == [("5", "frozen")]


def test_copies_are_refused_but_parts_can_be_copied() -> None:
    model = net()
    inner = sgd(model)
    wrapped = DensityLR(inner, model, policy=Fixed(SCALES))
    for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"save state_dict\(\), and make a new one"):
            attempt(wrapped)
    one_step(model, wrapped, batches(1)[0])
    # A copied inner optimizer is a bare one.
    twin_model, twin = copy.deepcopy((model, inner))
    assert not twin._optimizer_step_pre_hooks
    one_step(twin_model, twin, batches(1)[0])
    assert twin.param_groups[0]["lr"] == 0.05
    assert DensityLR(twin, twin_model, pretrained=False).scales == {"0": 1, "3": 1, "5": 1}


def test_closed_trains_on_plainly() -> None:
    ours, bare = net(), net()
    wrapped = DensityLR(starved(ours), ours, policy=Fixed(SCALES), every=1)
    wrapped.close()
    wrapped.close()
    assert hooks_of(ours) == 0
    assert set(wrapped.scales.values()) == {1.0}
    plain = starved(bare)
    for batch in batches(3):
        one_step(ours, wrapped, batch)
        one_step(bare, plain, batch)
    assert same(ours, bare)
    assert len(wrapped.history) == 0


def test_a_compiled_step_scales_too() -> None:
    ours, eager = net(), net()
    wrapped = DensityLR(sgd(ours), ours, policy=Fixed(SCALES), every=2)
    plain = DensityLR(sgd(eager), eager, policy=Fixed(SCALES), every=2)
    compiled = torch.compile(wrapped.step, backend="eager")
    for batch in batches(5):
        one_step(eager, plain, batch)
        wrapped.zero_grad()
        loss_of(ours, batch).backward()
        compiled()
    assert all(
        torch.allclose(a, b) for a, b in zip(ours.parameters(), eager.parameters(), strict=True)
    )
    assert wrapped.policy.asked == plain.policy.asked == probes(2, 5)
    assert [g["lr"] for g in wrapped.param_groups] == [0.05]


def test_parameters_outside_the_model_keep_their_rate() -> None:
    model = net()
    outside = nn.Parameter(torch.ones(3))
    inner = torch.optim.SGD([*model.parameters(), outside], lr=0.1)
    wrapped = DensityLR(inner, model, policy=Fixed(SCALES))
    outside.grad = torch.ones(3)
    loss_of(model, batches(1)[0]).backward()
    wrapped.step()
    assert torch.equal(outside.detach(), torch.ones(3) - 0.1)


def test_scale_holds_for_a_tensor_rate() -> None:
    ours, real = net(), net()
    rate = torch.tensor(0.01)
    wrapped = DensityLR(
        torch.optim.Adam(ours.parameters(), lr=rate, foreach=False), ours, policy=Fixed(SCALES)
    )
    groups = [
        {"params": list(real[i].parameters()), "lr": torch.tensor(0.01) * f}
        for i, f in ((0, 0.25), (1, 0.25), (3, 2.0), (5, 1.0))
    ]
    plain = torch.optim.Adam(groups, lr=torch.tensor(0.01), foreach=False)
    for batch in batches(4):
        one_step(ours, wrapped, batch)
        one_step(real, plain, batch)
    assert same(ours, real)
    assert isinstance(wrapped.param_groups[0]["lr"], Tensor)
    assert torch.equal(wrapped.param_groups[0]["lr"], torch.tensor(0.01))


def test_with_one_flat_rate_only_the_last_stage_has_a_twin() -> None:
    model = net()
    wrapped = DensityLR(torch.optim.SGD(model.parameters(), lr=0.05), model)
    one_step(model, wrapped, batches(1)[0])
    twins = {n: layer.twin is not None for n, layer in wrapped._loop.monitor._layers.items()}
    assert twins == {"0": False, "3": False, "5": True}


def test_a_schedule_made_later_decides_which_stages_have_twins() -> None:
    model = net()
    groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters()}]
    wrapped = DensityLR(torch.optim.SGD(groups, lr=0.1, momentum=0.9), model)
    schedule = lr_scheduler.LambdaLR(
        wrapped, [lambda step: 1e-5 * min(1, step / 2), lambda step: min(1, step / 2)]
    )
    for batch in batches(12):
        one_step(model, wrapped, batch)
        schedule.step()
    # At the first step every rate was 0, which says nothing about who has room.
    seen = [reading.stages["0"].estimator for reading in wrapped.history.readings]
    assert seen[:4] == ["twin"] * 4
    assert wrapped._loop.monitor._layers["5"].twin is None
    assert wrapped.scales["0"] > 1


@pytest.mark.parametrize("which", [0, 2, 3])
def test_one_trained_stage_is_enough_to_leave_the_model_alone(which: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64), nn.Linear(64, 8))
    with torch.no_grad():
        model[which].weight.add_(0.2)
    groups = [{"params": m.parameters(), "lr": r} for m, r in ((model[0], 1e-3), (model[2], 1e-3))]
    groups.append({"params": model[3].parameters(), "lr": 0.1})
    optimizer = DensityLR(torch.optim.SGD(groups, lr=0.1), model)
    model(torch.randn(16, 8)).sum().backward()
    with pytest.warns(UserWarning, match=rf"left alone: 0, 2 .*{which}.weight: mean"):
        optimizer.step()
    assert sorted(optimizer.excluded) == ["0", "2", "3"]


def checkpointing_functions() -> Any:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    return pytest.importorskip("torch.distributed.checkpoint.state_dict")


def test_the_step_with_which_torch_makes_state_is_none_of_ours() -> None:
    functions = checkpointing_functions()
    asked, bare = (net() for _ in range(2))
    optimizers = [DensityLR(sgd(model), model, every=1) for model in (asked, bare)]
    functions.get_optimizer_state_dict(asked, optimizers[0])
    for batch in batches(3):
        one_step(asked, optimizers[0], batch)
        one_step(bare, optimizers[1], batch)
    assert optimizers[0].history.steps.tolist() == optimizers[1].history.steps.tolist() == [0, 1, 2]
    assert same(asked, bare)


def test_torchs_function_for_state_dicts_drops_ours_and_loading_says_so() -> None:
    functions = checkpointing_functions()
    model = net()
    wrapped = DensityLR(starved(model), model)
    taken = functions.get_optimizer_state_dict(model, wrapped)
    bare = functions.get_optimizer_state_dict(model, wrapped.inner)
    assert taken.keys() == bare.keys()
    assert taken["param_groups"] == bare["param_groups"]
    with pytest.warns(UserWarning, match=r"get_optimizer_state_dict, which drops ours"):
        functions.set_optimizer_state_dict(model, wrapped, taken)
