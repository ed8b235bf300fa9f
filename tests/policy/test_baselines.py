"""Each published rule against its paper, in a computation of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from densitylr import Decision, DensityLR, Observation, Policy, StageView
from densitylr.policy import (
    Hypergradient,
    Lars,
    LayerwiseDecay,
    MuP,
    Plateau,
    PolicyRun,
    UpdateRatio,
)
from tests.support.fixed import batches, loss_of, net


def view(lr: float = 0.1, max_lr: float = 1.0, scale: float = 1.0, **numbers: Any) -> StageView:
    return StageView(lr, max_lr, scale, **numbers)


def scales_of(policy: Policy, stages: Mapping[str, StageView]) -> dict[str, float]:
    run = PolicyRun(policy, stages)
    run.update(Observation(0, stages))
    return run.scales


@given(st.floats(1e-10, 1e10), st.floats(1e-10, 1e10), st.floats(1e-6, 1))
def test_lars_is_the_trust_ratio(weight: float, gradient: float, trust: float) -> None:
    """You et al. 2017, equation 6 without decay: eta times |w| over |grad|."""
    stages = {"a": view(weight_norm=weight, gradient_norm=gradient)}
    found = scales_of(Lars(trust), stages)["a"]
    assert math.log(found) == pytest.approx(
        math.log(trust) + math.log(weight) - math.log(gradient), rel=1e-9, abs=1e-9
    )


@pytest.mark.parametrize(("weight", "gradient"), [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0)])
def test_lars_keeps_its_scale_where_there_is_no_ratio(weight: float, gradient: float) -> None:
    """As the paper's own code does for weights or gradients of zero."""
    assert scales_of(Lars(), {"a": view(weight_norm=weight, gradient_norm=gradient)}) == {"a": 1.0}


@given(st.floats(0, 1e-2), st.floats(1e-3, 1e3), st.floats(1, 30), st.floats(1e-3, 1))
def test_the_update_ratio(ratio: float, weight: float, scale: float, lr: float) -> None:
    """Karpathy 2022: about 1e-3. Fourfold at once, and no further than the largest rate."""
    stages = {"a": view(lr, 1.0, scale, weight_norm=weight, update_norm=ratio * weight)}
    (found,) = (c.scale for c in UpdateRatio().update(None, Observation(0, stages))[0].values())
    wanted = scale * 4 if ratio * weight < 1e-3 * weight else scale
    assert found == max(1.0, min(1.0 / lr, wanted))


def test_the_update_ratio_leaves_alone_what_is_not_known_or_has_no_rate() -> None:
    unknown = view(weight_norm=1.0)
    frozen = view(0.0, weight_norm=1.0, update_norm=0.0)
    assert scales_of(UpdateRatio(), {"a": unknown, "b": frozen}) == {"a": 1.0, "b": 1.0}


@given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_mup_is_one_over_the_fan_in(fan_in: int, base: int) -> None:
    """Yang et al. 2022, table 3: hidden weights under Adam."""
    run = PolicyRun(MuP(base), {"a": view(fan_in=fan_in), "b": view(fan_in=2 * fan_in)})
    assert run.scales["a"] * fan_in == pytest.approx(base)
    assert run.scales["a"] / run.scales["b"] == pytest.approx(2)


def test_mup_goes_by_the_first_layer_of_a_stage() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Flatten(), nn.Linear(128, 4))
    wrapped = DensityLR(torch.optim.Adam(model.parameters()), model, policy=MuP(base=150))
    assert wrapped.scales == {"0": 150 / (3 * 5 * 5), "2": 150 / 128}


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.floats(1e-3, 0.5))
def test_hypergradients_multiply_what_they_have(cosines: list[float], rate: float) -> None:
    """Baydin et al. 2018, the multiplicative rule: log a is a sum of rate times cosine."""
    run = PolicyRun(Hypergradient(rate), {"a": view()})
    for step, cosine in enumerate(cosines):
        seen = {"a": view(scale=run.scales["a"], update_alignment=cosine)}
        run.update(Observation(step, seen))
    assert math.log(run.scales["a"]) == pytest.approx(rate * math.fsum(cosines), abs=1e-12)
    last = run.scales["a"]
    run.update(Observation(99, {"a": view(scale=last, update_alignment=math.nan)}))
    assert run.scales["a"] == last


@given(st.integers(1, 12), st.floats(0.1, 1))
def test_each_layer_has_a_part_of_the_rate_of_the_next(stages: int, decay: float) -> None:
    """Howard and Ruder 2018, section 3.2: from the last layer down, divided by 2.6 each time."""
    names = [f"layer{i}" for i in range(stages)]
    found = [
        PolicyRun(LayerwiseDecay(decay), dict.fromkeys(names, view())).scales[n] for n in names
    ]
    assert found[-1] == 1
    assert np.diff(np.log(found)) == pytest.approx(np.full(stages - 1, -math.log(decay)))
    (lower, _) = PolicyRun(LayerwiseDecay(), {"a": view(), "head": view()}).scales.values()
    assert lower == pytest.approx(1 / 2.6)


@given(
    st.lists(st.one_of(st.floats(0.1, 3), st.sampled_from([1.0, 0.999, 0.9985])), max_size=60),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_a_plateau_is_what_torch_takes_for_one(
    losses: list[float], patience: int, steps: int
) -> None:
    """``ReduceLROnPlateau`` on the means of so many losses."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=1e-3, eps=0.0
    )
    run = PolicyRun(Plateau(0.5, patience, steps), {"a": view(), "b": view()})
    decisions: list[Decision] = []
    for step, loss in enumerate(losses):
        seen = {name: view(scale=scale) for name, scale in run.scales.items()}
        decisions += run.update(Observation(step, seen, loss))
        run.update(Observation(step, seen, None))  # a step whose loss nobody has told
        if (step + 1) % steps == 0:
            scheduler.step(sum(losses[step + 1 - steps : step + 1]) / steps)
        assert run.scales == dict.fromkeys("ab", optimizer.param_groups[0]["lr"])
    assert len(decisions) == 2 * round(-math.log2(run.scales["a"]))


def train(policy: Policy, steps: int = 12, **settings: Any) -> tuple[DensityLR, nn.Module]:
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapped = DensityLR(inner, model, policy=policy, pretrained=False, **settings)
    for batch in batches(steps):
        wrapped.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        wrapped.observe_loss(loss)
        wrapped.step()
    return wrapped, model


def test_lars_in_training_takes_the_steps_of_lars() -> None:
    """By hand: each stage moves by lr * trust * |w| / |g| of its gradient, norms over matrices."""
    _, model = train(Lars(trust=0.01))
    other = net()
    stages = (("0.", "1."), ("3.",), ("5.",))
    for batch in batches(12):
        other.zero_grad()
        loss_of(other, batch).backward()
        for prefixes in stages:
            own = [p for n, p in other.named_parameters() if n.startswith(prefixes)]
            matrices = [p for p in own if p.ndim >= 2]
            weight = math.sqrt(sum(float(p.detach().double().square().sum()) for p in matrices))
            gradient = math.sqrt(sum(float(p.grad.double().square().sum()) for p in matrices))
            with torch.no_grad():
                for p in own:
                    p -= 0.05 * 0.01 * weight / gradient * p.grad
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_hypergradients_in_training_follow_successive_gradients() -> None:
    """Plain SGD moves against its gradient, so the cosine is that of two gradients in a row."""
    wrapped, _ = train(Hypergradient(rate=0.1), steps=15)
    model = net()
    log_scale, before = dict.fromkeys("035", 0.0), {}
    for batch in batches(15):
        model.zero_grad()
        loss_of(model, batch).backward()
        for stage in "035":
            g = model[int(stage)].weight.grad.double().ravel().numpy().copy()
            if stage in before:
                b = before[stage]
                log_scale[stage] += 0.1 * float(g @ b / np.linalg.norm(g) / np.linalg.norm(b))
            before[stage] = g
        with torch.no_grad():
            for name, p in model.named_parameters():
                stage = "0" if name[0] == "1" else name[0]
                p -= 0.05 * math.exp(log_scale[stage]) * p.grad
    for stage, scale in wrapped.scales.items():
        assert math.log(scale) == pytest.approx(log_scale[stage], abs=1e-4)
    assert any(abs(value) > 0.05 for value in log_scale.values())


def test_a_plateau_in_training_lowers_all_rates() -> None:
    wrapped, _ = train(Plateau(patience=0, steps=1, threshold=0.9), steps=8)
    assert len(set(wrapped.scales.values())) == 1
    assert next(iter(wrapped.scales.values())) < 1
    kinds = {(d.kind, d.cause) for d in wrapped.history.decisions}
    assert kinds <= {("lower", "policy")}
