"""The model as it was: which stages have a twin and first weights, and that they are copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from densitylr import Baseline, DensityLR, DensityMonitor, find_stages
from tests.support.fixed import batches, net, one_step, same


def trained() -> nn.Sequential:
    """A net whose middle stage has been trained, and whose last one is frozen."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[2].weight += 0.1
    model[3].requires_grad_(False)
    return model


def test_a_fresh_model_has_twins_and_first_weights_of_all_stages() -> None:
    model = net()
    baseline = Baseline.capture(model)
    assert list(baseline.stages) == list(find_stages(model)) == ["0", "3", "5"]
    assert baseline.twins.keys() == {"0", "3", "5"}
    assert all(twin is not None for twin in baseline.twins.values())
    assert {n: set(own) for n, own in baseline.first_weights.items()} == {
        "0": {"0.weight", "0.bias", "1.weight", "1.bias"},
        "3": {"3.weight", "3.bias"},
        "5": {"5.weight", "5.bias"},
    }
    assert not baseline.checks.excluded
    assert not baseline.sharded


def test_a_frozen_stage_has_a_twin_as_it_may_thaw() -> None:
    model = trained()
    baseline = Baseline.capture(model, pretrained=False)
    assert all(twin is not None for twin in baseline.twins.values())
    assert list(baseline.first_weights) == ["0", "2", "3"]


def test_a_trained_stage_has_neither() -> None:
    baseline = Baseline.capture(trained())
    # One trained stage is enough for all to be taken for trained; what is frozen keeps its twin.
    assert set(baseline.checks.excluded) == {"0", "2", "3"}
    assert [n for n, twin in baseline.twins.items() if twin is not None] == ["3"]
    assert baseline.first_weights == {}
    told = Baseline.capture(net(), pretrained=True)
    assert set(told.checks.excluded) == {"0", "3", "5"}
    assert set(told.twins.values()) == {None}
    assert told.first_weights == {}


def test_a_stage_of_a_bad_gain_alone_has_neither() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight *= 100
    baseline = Baseline.capture(model)
    assert list(baseline.checks.bad_gains) == ["0"]
    assert baseline.checks.trained == {}
    assert [n for n, twin in baseline.twins.items() if twin is not None] == ["2"]
    assert list(baseline.first_weights) == ["2"]


def test_first_weights_are_copies_and_bounded() -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 7))
    before = [p.detach().clone() for p in model.parameters()]
    baseline = Baseline.capture(model, pretrained=False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    kept = [w for own in baseline.first_weights.values() for w in own.values()]
    for first, weight in zip(kept, before, strict=True):
        assert first.numel() <= 2**14
        assert first.untyped_storage().nbytes() == first.numel() * first.element_size()
        assert set(first.tolist()) <= set(weight.ravel().tolist())
        assert not first.requires_grad
    assert torch.equal(kept[1], before[1])
    monitor = DensityMonitor(model, every=None, baseline=baseline)
    monitor.arm()
    model(torch.randn(8, 300))
    reading = monitor.collect(0)
    assert reading is not None
    assert all(s.displacement > 0.05 for s in reading.stages.values())  # twins are, too


def test_without_first_weights() -> None:
    baseline = Baseline.capture(net(), first_weights=False)
    assert baseline.first_weights == {}
    assert all(twin is not None for twin in baseline.twins.values())


def test_it_changes_nothing() -> None:
    model, other = net(), net()
    random = torch.get_rng_state()
    Baseline.capture(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(model, other)
    assert not any(m._forward_hooks for m in model.modules())


def test_stages_of_ones_own() -> None:
    baseline = Baseline.capture(net(), {"body": "[013]", "head": "5"})
    assert {n: list(s.layers) for n, s in baseline.stages.items()} == {
        "body": ["0", "3"],
        "head": ["5"],
    }
    assert baseline.twins.keys() == {"0", "3", "5"}
    with pytest.raises(ValueError, match="matches no module"):
        Baseline.capture(net(), {"body": "nothing"})


def test_a_run_that_loads_its_weights_first_goes_on_from_a_baseline_of_before() -> None:
    """As one that was wrapped before its weights were trained."""
    first = net()
    baseline = Baseline.capture(first)
    wrapped = DensityLR(torch.optim.SGD(first.parameters(), 0.1), first)
    for batch in batches(30):
        one_step(first, wrapped, batch)
    weights = copy.deepcopy(first.state_dict())
    readings = []
    for way in ("late", "early"):
        model = net()
        if way == "late":
            own = Baseline.capture(model)
            model.load_state_dict(weights)
            late = DensityLR(torch.optim.SGD(model.parameters(), 0.1), model, baseline=own)
        else:
            late = DensityLR(torch.optim.SGD(model.parameters(), 0.1), model)
            model.load_state_dict(weights)
        assert not late.excluded
        one_step(model, late, batches(1)[0])
        readings.append(late.history.readings[0])
    assert readings[0] == readings[1]
    assert max(s.displacement for s in readings[0].stages.values()) > 0.1
    assert set(baseline.twins) == {"0", "3", "5"}
