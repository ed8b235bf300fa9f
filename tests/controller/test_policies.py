"""Somebody else's policy: what it is shown, and what becomes of what it says."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densitylr import DensityLR, Needs, Observation, Policy
from densitylr.history import Cause
from densitylr.policy import Change, MuP
from tests.support.fixed import batches, loss_of, net, one_step, same

STEPS = 12


class Shown(Policy):
    """Keeps what it is shown, in the order of the steps."""

    needs = Needs(every=1, activations=False, gradients=True, weights=True, updates=True, loss=True)

    def update(self, state: Any, seen: Observation) -> Any:
        self.__dict__.setdefault("seen", []).append(seen)
        return {}, state


class Halving(Policy):
    """Halves the first stage whenever its loss has not fallen; all it knows is in its state."""

    needs = Needs(every=1, activations=False, loss=True)

    def init(self, stages: Any) -> Any:
        return dict.fromkeys(stages, 1.0), {"losses": (), "turns": 0}

    def update(self, state: Any, seen: Observation) -> Any:
        losses = (*state["losses"], seen.loss)[-2:]
        first, view = next(iter(seen.stages.items()))
        worse = len(losses) == 2 and losses[1] >= losses[0]
        scales = {first: Change(view.scale / 2)} if worse else {}
        return scales, {"losses": losses, "turns": state["turns"] + worse}


def begin(policy: Any, **options: Any) -> tuple[nn.Module, DensityLR]:
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, DensityLR(inner, model, policy=policy, **options)


def told(model: nn.Module, wrapped: DensityLR, batch: tuple[Tensor, Tensor]) -> float:
    """A step whose loss the policy is told of."""
    wrapped.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    wrapped.observe_loss(loss)
    wrapped.step()
    return loss.item()


def matrices(model: nn.Module, index: int) -> Tensor:
    return model[index].weight.detach().double().flatten()  # type: ignore[index, union-attr]


def test_it_is_shown_norms_of_weights_gradients_and_updates_and_the_loss() -> None:
    model, wrapped = begin(Shown())
    wanted: list[dict[str, Any]] = []
    before = {i: matrices(model, i) for i in (0, 3, 5)}
    for batch in batches(STEPS):
        wrapped.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        now = {i: matrices(model, i) for i in before}
        gradients = {i: model[i].weight.grad.double().flatten().clone() for i in before}
        wanted.append({"loss": loss.item(), "now": now, "gradients": gradients, "before": before})
        before = now
        wrapped.observe_loss(loss)
        wrapped.step()
    seen = wrapped.policy.seen
    assert [observation.step for observation in seen] == list(range(STEPS))
    for step, (observation, row) in enumerate(zip(seen, wanted, strict=True)):
        assert observation.loss == row["loss"]
        for i in row["now"]:
            view, update = observation.stages[str(i)], row["now"][i] - row["before"][i]
            assert (view.lr, view.max_lr, view.scale, view.reading) == (0.05, 0.05, 1.0, None)
            assert view.optimizer == "SGD"
            assert view.build_up.momentum == 0.9
            assert view.fan_in == model[i].in_features
            assert view.weight_norm == pytest.approx(float(row["now"][i].norm()))
            assert view.gradient_norm == pytest.approx(float(row["gradients"][i].norm()))
            assert math.isnan(view.alignment)
            if not step:
                assert math.isnan(view.update_norm)
                assert math.isnan(view.update_alignment)
                continue
            assert view.update_norm == pytest.approx(float(update.norm()))
            cosine = -update.dot(row["gradients"][i]) / update.norm() / row["gradients"][i].norm()
            assert view.update_alignment == pytest.approx(float(cosine))


def test_what_it_does_not_need_is_not_measured() -> None:
    class Little(Shown):
        needs = Needs(every=3, activations=False, weights=True)

    model, wrapped = begin(Little())
    for batch in batches(7):
        one_step(model, wrapped, batch)
    seen = wrapped.policy.seen
    assert [observation.step for observation in seen] == [0, 3, 6]
    assert {observation.loss for observation in seen} == {None}
    views = [view for observation in seen for view in observation.stages.values()]
    assert all(view.weight_norm > 0 and math.isnan(view.gradient_norm) for view in views)
    assert all(math.isnan(view.update_norm) and view.reading is None for view in views)


@pytest.mark.parametrize("as_number", [False, True])
def test_a_closure_gives_the_loss(as_number: bool) -> None:
    model, wrapped = begin(Shown())
    losses = []
    for batch in batches(STEPS):

        def closure(batch: Any = batch) -> Any:
            wrapped.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            losses.append(loss.item())
            return loss.item() if as_number else loss

        wrapped.step(closure)
    assert [observation.loss for observation in wrapped.policy.seen] == losses


def test_it_is_missed_once_if_nobody_tells_the_loss() -> None:
    model, wrapped = begin(Shown())
    data = batches(30)
    for batch in data[:9]:
        one_step(model, wrapped, batch)  # a warning is an error here
    with pytest.warns(UserWarning, match=r"Shown needs the loss, and 10 steps .* observe_loss"):
        one_step(model, wrapped, data[9])
    for batch in data[10:]:
        one_step(model, wrapped, batch)
    told(model, wrapped, data[0])
    losses = [observation.loss for observation in wrapped.policy.seen]
    assert losses[:-1] == [None] * 30
    assert losses[-1] is not None


def test_a_loss_that_is_told_now_and_then_is_not_missed() -> None:
    model, wrapped = begin(Shown())
    for i, batch in enumerate(batches(30)):
        (told if i % 9 == 8 else one_step)(model, wrapped, batch)
    known = [observation.loss is not None for observation in wrapped.policy.seen]
    assert known == [i % 9 == 8 for i in range(30)]


def test_a_first_scale_with_a_reason_is_a_decision() -> None:
    model, wrapped = begin(MuP(base=8))
    assert wrapped.scales == {"0": 8 / 6, "3": 0.5, "5": 1.0}
    for batch in batches(8):
        one_step(model, wrapped, batch)
    found = [(d.step, d.stage, d.kind, d.scale_before, d.scale) for d in wrapped.history.decisions]
    assert found == [(0, "0", "raise", 1.0, 8 / 6), (0, "3", "lower", 1.0, 0.5)]
    assert {d.cause for d in wrapped.history.decisions} == {Cause.POLICY}
    assert [d.rate for d in wrapped.history.decisions] == pytest.approx([0.05 * 8 / 6, 0.025])
    assert wrapped.history.decisions[0].reason.startswith("after 0 steps; set by the policy; rate")


@pytest.mark.parametrize("policy", ["repair", Halving, object(), 3])
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"policy must be a densitylr\.policy\.Policy, got"):
        DensityLR(inner, model, policy=policy)
    assert "_densitylr" not in vars(inner)


def test_an_error_of_a_policy_of_the_user_s_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Policy):
        def update(self, state: Any, seen: Observation) -> Any:
            return {"nowhere": 1.0}, state

    monkeypatch.setattr("densitylr.controller.loop.STRICT", False)
    model, wrapped = begin(Wrong())
    with pytest.raises(ValueError, match=r"Wrong gave scales for \['nowhere'\]"):
        one_step(model, wrapped, batches(1)[0])
    assert [group["lr"] for group in wrapped.param_groups] == [0.05]


def test_ranks_must_agree_on_the_policy_and_its_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    facts: list[dict[str, str]] = []

    class Two:
        sharded = False

        def check_agreement(self, found: dict[str, str]) -> None:
            facts.append(found)
            raise ValueError("they differ")

    monkeypatch.setattr("densitylr.controller.controller.find_ranks", lambda *_: Two())
    for policy in (MuP(), MuP(base=8), Halving(), MuP(base=8)):
        with pytest.raises(ValueError, match="they differ"):
            begin(policy)
    found = [fact["policy"] for fact in facts]
    assert found == ["MuP(base=64)", "MuP(base=8)", "Halving()", "MuP(base=8)"]
    others = [{k: v for k, v in fact.items() if k != "policy"} for fact in facts]
    assert others[0] == others[1] == others[2]


def test_its_state_comes_back_from_a_checkpoint() -> None:
    data = batches(40)
    whole, straight = begin(Halving())
    for batch in data:
        told(whole, straight, batch)
    first, wrapped = begin(Halving())
    for batch in data[:17]:
        told(first, wrapped, batch)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": wrapped.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, resumed = begin(Halving(), pretrained=False)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in data[17:]:
            told(again, resumed, batch)
    assert same(whole, again)
    assert resumed.scales == straight.scales
    assert resumed.history.decisions == straight.history.decisions
    (ours,) = resumed.state_dict()["densitylr"]
    (theirs,) = straight.state_dict()["densitylr"]
    assert ours["policy"] == theirs["policy"]
    assert ours["policy"]["state"]["turns"] > 1


def test_a_state_that_no_checkpoint_can_hold_is_refused_at_once() -> None:
    class Odd(Policy):
        def init(self, stages: Any) -> Any:
            return {}, torch.zeros(1)

    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="got a Tensor"):
        DensityLR(inner, model, policy=Odd())
    assert not inner._optimizer_step_pre_hooks


def test_after_a_checkpoint_there_is_no_update_at_first() -> None:
    """A checkpoint does not hold what they were before."""
    data = batches(8)
    model, wrapped = begin(Shown(), pretrained=False)
    for batch in data[:5]:
        told(model, wrapped, batch)
    other, resumed = begin(Shown(), pretrained=False)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    for batch in data[5:]:
        told(model, wrapped, batch)
        told(other, resumed, batch)
    straight, found = (
        [observation.stages["0"].update_norm for observation in run.policy.seen[-3:]]
        for run in (wrapped, resumed)
    )
    assert math.isnan(found[0])
    assert found[1:] == straight[1:]


@pytest.mark.filterwarnings("ignore:.*are NaN or infinite:RuntimeWarning")
def test_after_going_back_there_is_no_update_either() -> None:
    model, wrapped = begin(Shown(), every=1, recover=True)
    for i, (x, y) in enumerate(batches(10)):
        told(model, wrapped, (x * math.nan if i == 6 else x, y))
    assert [d.step for d in wrapped.history.decisions] == [6]
    norms = [observation.stages["0"].update_norm for observation in wrapped.policy.seen]
    assert [math.isnan(norm) for norm in norms[1:]] == [i == 7 for i in range(1, 10)]
