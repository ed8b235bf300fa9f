# ruff: noqa: E402 (fastai is optional, and warns when it is imported)
"""fastai's learner, its own optimizers and its own schedules."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("fastai")

from tests.support.fixed import Fixed, hooks_of, probes, same
from tests.support.host_runs import FLAT, STARVED, fastai, layers, learner

fastai()
from fastai.callback.schedule import LRFinder
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD, Adam, Lamb, OptimWrapper, ranger

from densitylr import DensityLR
from densitylr.integrations.fastai import DensityCallback

# On load fastai names a class of numpy's by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning")

OPTIMIZERS = {
    "adam": Adam,
    "sgd": partial(SGD, mom=0.9),
    "lamb": Lamb,
    "ranger": ranger,
    "torch": partial(OptimWrapper, opt=torch.optim.AdamW),
}
SCALES = {"0": 0.25, "2": 2.0, "4": 1.0}


def state_of(learn):
    return [
        value
        for p, *_ in learn.opt.all_params()
        for value in learn.opt.state[p].values()
        if isinstance(value, torch.Tensor)
    ]


def assert_equal(a, b):
    assert same(a.model, b.model)
    assert len(state_of(a)) == len(state_of(b))
    assert all(map(torch.equal, state_of(a), state_of(b)))
    assert [dict(h) for h in a.opt.hypers] == [dict(h) for h in b.opt.hypers]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_flat_rates_train_bit_for_bit_as_without(name):
    bare, ours = learner(OPTIMIZERS[name]), learner(OPTIMIZERS[name], [DensityCallback()])
    for learn in (bare, ours):
        learn.fit_one_cycle(3, 0.01)
    assert_equal(bare, ours)
    assert ours.density.controller.history.steps.tolist() == probes(5, 24)
    assert ours.density.controller.history.decisions == []


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("split", [layers, None])
def test_scales_are_real_group_rates(name, split):
    options = {} if split else {"splitter": lambda model: list(model.parameters())}
    ours = learner(OPTIMIZERS[name], [DensityCallback(policy=Fixed(SCALES))], **options)
    real = learner(OPTIMIZERS[name])
    ours.fit(2, 0.01)
    real.fit(2, [0.0025, 0.02, 0.01])
    assert same(real.model, ours.model)
    assert all(map(torch.equal, state_of(real), state_of(ours)))
    assert {h["lr"] for h in ours.opt.hypers} == {0.01}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sliced_rates_are_repaired_and_hypers_stay_the_schedules(name):
    bare, ours = learner(OPTIMIZERS[name]), learner(OPTIMIZERS[name], [DensityCallback()])
    for learn in (bare, ours):
        learn.fit_one_cycle(4, slice(1e-7, 0.02))
    assert bare.recorder.hps == ours.recorder.hps
    assert bare.recorder.lrs == ours.recorder.lrs
    assert [h["lr"] for h in bare.opt.hypers] == [h["lr"] for h in ours.opt.hypers]
    found = {d.stage: d.kind for d in ours.density.controller.diagnose()}
    assert found["0"] == "starved"
    assert ours.density.controller.scales["0"] > 1e3
    assert ours.final_record[1] < bare.final_record[1]


def test_frozen_groups_stay_and_wake_up_when_unfrozen():
    bare, ours = learner(Adam), learner(Adam, [DensityCallback()])
    start = [p.clone() for p in ours.model[0].parameters()]
    for learn in (bare, ours):
        learn.freeze()
        learn.fit_one_cycle(1, 0.01)
    assert_equal(bare, ours)
    assert all(map(torch.equal, start, ours.model[0].parameters()))
    assert [p.requires_grad for p in ours.model[0].parameters()] == [False, False]
    assert "0" in [d.stage for d in ours.density.controller.diagnose() if d.kind == "frozen"]
    for learn in (bare, ours):
        learn.unfreeze()
        learn.fit(4, slice(1e-6, 0.02))
    assert ours.density.controller.scales["0"] > 1e2
    assert not torch.equal(bare.model[0].weight, ours.model[0].weight)
    assert [h["lr"] for h in bare.opt.hypers] == [h["lr"] for h in ours.opt.hypers]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loaded_learner_goes_on_as_if_it_had_never_stopped(name, tmp_path):
    whole = learner(OPTIMIZERS[name], [DensityCallback()], path=tmp_path)
    whole.fit(1, list(STARVED))
    assert "0" in whole.density.controller._loop.run.undecided
    whole.save("half")
    resumed = learner(OPTIMIZERS[name], [DensityCallback()], path=tmp_path)
    resumed.load("half")
    assert resumed.density.controller.scales == whole.density.controller.scales
    assert resumed.density.controller.scales["0"] > 1
    for learn in (whole, resumed):
        learn.fit(3, list(STARVED))
    assert_equal(whole, resumed)
    decided = [learn.density.controller.history.decisions for learn in (whole, resumed)]
    assert decided[0] == decided[1]


def test_a_learner_without_us_loads_what_we_saved_and_the_other_way_round(tmp_path):
    ours = learner(Adam, [DensityCallback()], path=tmp_path)
    bare = learner(Adam, path=tmp_path)
    ours.fit(1, list(STARVED))
    ours.save("ours")
    bare.load("ours")
    assert_equal(ours, bare)
    bare.save("bare")
    other = learner(Adam, [DensityCallback()], path=tmp_path)
    with pytest.warns(UserWarning, match="it is a bare optimizer's"):
        other.load("bare")
    assert_equal(other, bare)


@pytest.mark.parametrize("name", ["adam", "torch"])
def test_the_rate_finder_runs_without_us(name, tmp_path):
    cbs = [DensityCallback(mode="warmup")]
    bare = learner(OPTIMIZERS[name], path=tmp_path)
    ours = learner(OPTIMIZERS[name], cbs, path=tmp_path)
    for learn in (bare, ours):
        learn.fit(2, cbs=LRFinder(num_it=10))
    assert bare.recorder.losses == ours.recorder.losses
    assert len(ours.density.controller.history) == 0
    ours.fit(1, 0.01)
    assert ours.density.controller.history.steps.tolist() == probes(5, 8)
    assert ours.density.controller.scales != dict.fromkeys(("0", "2", "4"), 1.0)


def test_an_accumulated_batch_is_no_step():
    bare = learner(Adam, [GradientAccumulation(n_acc=64)])
    ours = learner(Adam, [GradientAccumulation(n_acc=64), DensityCallback(policy=Fixed())])
    for learn in (bare, ours):
        learn.fit(2, list(FLAT))
    assert same(bare.model, ours.model)
    assert ours.density.controller.history.steps.tolist() == probes(5, 8)


def test_a_step_that_raises_leaves_the_learners_groups():
    def refuse(p, **_):
        raise RuntimeError("no")

    ours = learner(Adam, [DensityCallback(policy=Fixed(SCALES))])
    ours.create_opt()
    native = ours.opt.opt
    native.cbs.append(refuse)
    lists, hypers = native.param_lists, native.hypers
    with pytest.raises(RuntimeError, match="no"):
        ours.fit(1, 0.01)
    assert native.param_lists is lists
    assert native.hypers is hypers
    assert {h["lr"] for h in hypers} == {0.01}


def test_the_table_has_a_column_for_each_stage():
    ours = learner(Adam, [DensityCallback(("near_zero", "scale"))])
    ours.fit(2, list(STARVED))
    names = [f"{s} {n}" for n in ("near_zero", "scale") for s in ("0", "2", "4")]
    assert list(ours.recorder.metric_names)[3:-1] == names
    history = ours.density.controller.history
    last = [history.series(s, n)[-1] for n in ("near_zero", "scale") for s in ("0", "2", "4")]
    assert list(ours.recorder.values[-1])[2:] == last


def test_added_for_one_fit_and_a_second_optimizer():
    ours = learner(Adam)
    ours.fit(1, 0.01)
    callback = DensityCallback(pretrained=False)
    ours.fit(3, list(STARVED), cbs=callback)
    assert callback.controller.scales["0"] > 1
    hooks = hooks_of(ours.model)
    first = callback.controller
    ours.fit(1, 0.01, cbs=callback, reset_opt=True)
    assert callback.controller is not first
    assert hooks_of(ours.model) == hooks


def test_an_exported_learner_is_loaded_and_trains(tmp_path):
    from fastai.learner import load_learner

    ours = learner(Adam, [DensityCallback()], path=tmp_path, lr=0.01)
    ours.fit(1)
    ours.logger = print
    ours.export()
    with pytest.warns(UserWarning, match="insecure pickle"):
        again = load_learner(tmp_path / "export.pkl")
    assert again.density.controller is None
    assert same(ours.model, again.model)
    again.create_opt()
    assert isinstance(again.density.controller, DensityLR)


def test_a_torch_optimizer_is_refused_with_the_way_to_pass_it():
    flat = {"splitter": lambda model: list(model.parameters())}
    with pytest.raises(TypeError, match=r"a Adam: for a torch optimizer, pass opt_func=partial"):
        learner(torch.optim.Adam, [DensityCallback()], **flat).create_opt()


def test_a_number_that_there_is_not_is_refused_before_training():
    with pytest.raises(ValueError, match="no number 'accuracy'; there are near_zero, "):
        DensityCallback(("near_zero", "accuracy"))
