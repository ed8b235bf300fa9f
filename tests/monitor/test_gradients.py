"""Norms, alignment and zero gradients against slow computations in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from densitylr import Baseline, find_stages
from densitylr.monitor import Alignment, Norms, StageNorms, zero_gradients


def net() -> nn.Sequential:
    """A stage with a matrix and vectors, one with a matrix, one with two; vectors do not count."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 5, bias=False), nn.Bilinear(5, 5, 4)
    )


MATRICES = {"0": ["0.weight"], "2": ["2.weight"], "3": ["3.weight"]}


def flat(tensors: list[Tensor]) -> np.ndarray:
    return np.concatenate([t.detach().double().numpy().ravel() for t in tensors])


def close(found: float, expected: float) -> None:
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("maximize", [False, True])
@given(
    gaps=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    begin=st.integers(0, 3),
)
def test_norms_against_float64(maximize: bool, gaps: list[int], seed: int, begin: int) -> None:
    model, draw = net(), np.random.default_rng(seed)
    parameters = dict(model.named_parameters())
    ascending = {id(p) for p in parameters.values()} if maximize else set()
    norms = Norms(find_stages(model), gradients=True, updates=True, ascending=ascending)
    before, step, last = {n: p.detach().clone() for n, p in parameters.items()}, begin, 0
    for gap in [0, *gaps]:
        for p in parameters.values():
            p.data += torch.from_numpy(draw.standard_normal(p.shape)).float() * bool(gap)
            p.grad = torch.from_numpy(draw.standard_normal(p.shape)).float()
        step += gap
        found = norms.measure(step)
        assert list(found) == list(MATRICES)
        for name, members in MATRICES.items():
            w = flat([parameters[n] for n in members])
            g = flat([parameters[n].grad for n in members])  # type: ignore[misc]
            u = w - flat([before[n] for n in members])
            down = g if maximize else -g
            close(found[name].weight, np.linalg.norm(w))
            close(found[name].gradient, np.linalg.norm(g))
            close(
                found[name].update, np.linalg.norm(u) / (step - last) if step > last else math.nan
            )
            moved = step > last and u.any()
            cosine = down @ u / np.linalg.norm(g) / np.linalg.norm(u) if moved else math.nan
            close(found[name].alignment, cosine)
        before, last = {n: p.detach().clone() for n, p in parameters.items()}, step


def test_what_is_not_asked_for_is_not_known() -> None:
    model = net()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norms = Norms(find_stages(model), gradients=False, updates=False)
    for step in (0, 5):
        found = norms.measure(step)
        for name, (weight, *rest) in found.items():
            assert weight > 0, name
            assert all(map(math.isnan, rest))
    assert all(map(math.isnan, StageNorms()))
    found = Norms(find_stages(model), gradients=True, updates=False).measure(3)
    assert found["2"].gradient == pytest.approx(math.sqrt(45))
    assert math.isnan(found["2"].update)


def test_a_stage_without_a_matrix_counts_all_it_has() -> None:
    class Gains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.full((4,), 2.0)), nn.Parameter(torch.full((), 3.0))

    stages = {"gains": find_stages(nn.Sequential(nn.Linear(2, 2)))["0"]}
    gains = Gains()
    object.__setattr__(stages["gains"], "parameters", dict(gains.named_parameters()))
    gains.a.grad = torch.full((4,), 0.5)
    found = Norms(stages, gradients=True, updates=False).measure(0)["gains"]
    assert found.weight == pytest.approx(5.0)
    assert found.gradient == pytest.approx(1.0)  # b has none


def test_a_gradient_that_is_sparse_or_a_weight_of_another_shape_is_left_out() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    norms = Norms(find_stages(model), gradients=True, updates=True)
    model(torch.tensor([1, 2])).sum().backward()
    assert model[0].weight.grad.is_sparse
    with torch.no_grad():
        model[0].weight += 1
        model[1].weight.data = torch.ones(2, 4)
    model[1].weight.grad = None
    found = norms.measure(2)
    assert math.isnan(found["0"].gradient)
    assert found["0"].update == pytest.approx(math.sqrt(15) / 2)
    assert math.isnan(found["0"].alignment)
    assert found["1"].weight == pytest.approx(math.sqrt(8))
    assert math.isnan(found["1"].update)
    assert math.isnan(found["1"].gradient)
    with torch.no_grad():  # from here on it is compared again
        model[1].weight.data = torch.full((2, 4), 3.0)
    assert norms.measure(3)["1"].update == pytest.approx(2 * math.sqrt(8))


def test_complex_weights_have_the_norm_of_both_parts() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data.zero_()
    model[0].mixing = nn.Parameter(torch.full((2, 2), 3 + 4j))
    norms = Norms(find_stages(model), gradients=True, updates=True)
    model[0].mixing.grad = torch.full((2, 2), 1j)
    with torch.no_grad():
        model[0].mixing -= torch.full((2, 2), 2j)
    found = norms.measure(1)["0"]
    assert found.weight == pytest.approx(2 * abs(3 + 2j))
    assert found.gradient == pytest.approx(2.0)
    assert found.update == pytest.approx(4.0)
    assert found.alignment == pytest.approx(1.0)


def test_half_precision_and_large_weights_do_not_overflow() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False)).half()
    model[0].weight.data.fill_(6e4)
    model[0].weight.grad = torch.full((2, 2), 6e4).half()
    found = Norms(find_stages(model), gradients=True, updates=False).measure(0)["0"]
    assert found.weight == found.gradient == pytest.approx(1.2e5, rel=1e-3)


def test_gradients_that_are_not_finite_are_measured_as_that() -> None:
    model = nn.Sequential(nn.Bilinear(2, 2, 2), nn.Linear(2, 2))
    stages = find_stages(model, {"both": "*"})
    norms = Norms(stages, gradients=True, updates=True)
    for p, value in zip(model.parameters(), (math.inf, 1.0, -math.inf, 1.0), strict=True):
        p.data += 1
        p.grad = torch.full_like(p, value)
    found = norms.measure(1)["both"]
    assert found.gradient == math.inf
    assert math.isfinite(found.weight)
    assert not math.isfinite(found.alignment)


def test_what_is_measured_is_not_written_to() -> None:
    model = net()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    kept = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]  # type: ignore
    norms = Norms(find_stages(model), gradients=True, updates=True)
    alignment = Alignment(Baseline.capture(model, pretrained=False), ascending=[])
    alignment.add(list(MATRICES))
    norms.measure(1)
    for p, (weight, gradient) in zip(model.parameters(), kept, strict=True):
        assert torch.equal(p, weight)
        assert p.grad is not None
        assert torch.equal(p.grad, gradient)


@pytest.mark.parametrize("ascending", [(), ("0.",), ("0.", "1.", "2.", "3.")])
def test_alignment_of_parameters_that_go_up_their_gradient(ascending: tuple[str, ...]) -> None:
    model = net()
    up = {id(p) for n, p in model.named_parameters() if ascending and n.startswith(ascending)}
    alignment = Alignment(Baseline.capture(model, pretrained=False), ascending=up)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.data += torch.randn_like(p)
        p.grad = torch.randn_like(p)
    alignment.add(["0", "2", "3"])
    found = alignment.take(4)
    for name, prefixes in (("0", ("0.", "1.")), ("2", ("2.",)), ("3", ("3.",))):
        own = [(n, p) for n, p in model.named_parameters() if n.startswith(prefixes)]
        way = flat([p.detach().double() - start[n].double() for n, p in own])
        down = flat([p.grad * (1 if id(p) in up else -1) for _, p in own])  # type: ignore
        close(found[name], down @ way / np.linalg.norm(down) / np.linalg.norm(way))


def test_an_alignment_goes_on_from_the_first_weights_of_another_run() -> None:
    model, other = net(), net()
    with torch.no_grad():
        other[0].weight += 1
    ours, theirs = (Alignment(Baseline.capture(m, pretrained=False)) for m in (model, other))
    state = theirs.state_dict()
    assert list(state["first_weights"]) == ["0", "2", "3"]
    state["first_weights"]["2"] = None  # those at hand are kept
    del state["first_weights"]["3"]
    state["first_weights"]["0"]["0.bias"] = torch.zeros(99)  # of another shape
    ours.load_state_dict(state)
    kept = ours.state_dict()["first_weights"]
    assert list(kept) == ["0", "2"]
    assert kept["0"].keys() == {"0.weight", "1.weight", "1.bias"}
    assert torch.equal(kept["0"]["0.weight"], other[0].weight.detach().ravel())
    assert torch.equal(kept["2"]["2.weight"], model[2].weight.detach().ravel())
    for p in model.parameters():
        p.grad = -torch.ones_like(p)
    ours.add(["0", "2", "3"])
    found = ours.take(0)
    assert found["0"] < 0  # these weights lie below those of the other run
    assert math.isnan(found["3"])


# Gradients that are exactly zero


def seen(displacement: float = 0.0, estimator: str = "twin") -> dict[str, Any]:
    return {"displacement": displacement, "estimator": estimator}


def graded(model: nn.Module, value: float) -> nn.Module:
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    return model


@pytest.mark.parametrize(
    ("displacement", "estimator", "looked"),
    [
        (0.0999, "twin", True),
        (0.1, "twin", False),
        (0.3999, "first-probe", True),
        (0.3999, "last-twin", True),
        (0.4, "last-twin", False),
        (math.nan, "twin", False),
    ],
)
def test_gradients_of_a_stage_that_moves_are_not_looked_at(
    displacement: float, estimator: str, looked: bool
) -> None:
    model = graded(net(), 0.0)
    numbers = {"0": seen(displacement, estimator), "2": seen(9.0), "3": seen(9.0)}
    assert zero_gradients(5, numbers, find_stages(model)) == ({"0"} if looked else set())


def test_before_the_first_step_none_is_called_zero() -> None:
    stages = find_stages(graded(net(), 0.0))
    numbers = dict.fromkeys(stages, seen())
    assert zero_gradients(0, numbers, stages) == set()
    assert zero_gradients(1, numbers, stages) == {"0", "2", "3"}


@given(st.lists(st.sampled_from(["zero", "none", "last", "first", "nan", "tiny"]), min_size=7))
def test_a_stage_is_alive_if_any_element_of_any_gradient_is_not_zero(kinds: list[str]) -> None:
    model = net()
    expected: dict[str, list[bool]] = {"0": [], "2": [], "3": []}
    for (name, p), kind in zip(model.named_parameters(), kinds, strict=False):
        p.grad = None if kind == "none" else torch.zeros_like(p)
        if p.grad is not None and kind != "zero":
            at = 0 if kind == "first" else -1
            value = {"nan": math.nan, "tiny": 1e-45}.get(kind, -1.0)
            p.grad.view(-1)[at] = value
        if kind != "none":
            expected["0" if name[0] == "1" else name[0]].append(kind != "zero")
    stages = find_stages(model)
    found = zero_gradients(3, dict.fromkeys(stages, seen()), stages)
    assert found == {name for name, alive in expected.items() if alive and not any(alive)}


def test_a_sparse_gradient_is_looked_at_as_well() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    numbers = {"0": seen(), "1": seen(9.0)}
    for factor, zero in ((0.0, {"0"}), (1.0, set())):
        model.zero_grad()
        (factor * model(torch.tensor([1, 2]))).sum().backward()
        assert zero_gradients(3, numbers, find_stages(model)) == zero


def test_of_a_stage_that_is_alive_one_gradient_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    plain = Tensor.any

    def counting(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read.append(self.numel())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "any", counting)
    stages = find_stages(graded(net(), 1.0))
    assert zero_gradients(3, dict.fromkeys(stages, seen()), stages) == set()
    assert sorted(read) == [4, 9, 45]  # the smallest of each
