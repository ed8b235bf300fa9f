"""accelerate: `DensityLR` goes through ``prepare`` as any optimizer does, in either order."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("accelerate")

from densitylr import DensityLR
from tests.support.fixed import Fixed, hooks_of, probes, same, same_state
from tests.support.host_runs import STARVED, AccelerateRun, forget_accelerator, seed

SCALES = {"0": 0.25, "2": 2.0, "4": 1.0}


@pytest.fixture(autouse=True)
def _alone():
    """accelerate's settings are those of the process."""
    yield
    forget_accelerator()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}]
)
def test_flat_rates_train_bit_for_bit_as_without(late, options):
    bare, ours = (
        AccelerateRun(**options).train(),
        AccelerateRun(wrap=DensityLR, late=late, **options).train(),
    )
    assert same(bare.model, ours.model)
    assert same_state(bare.inner, ours.inner)
    steps = 16 // options.get("gradient_accumulation_steps", 1)
    assert ours.density.history.steps.tolist() == probes(5, steps)
    assert ours.density.history.decisions == []


@pytest.mark.parametrize("late", [False, True])
def test_scales_are_real_group_rates(late):
    def wrap(inner, model):
        return DensityLR(inner, model, policy=Fixed(SCALES))

    real = AccelerateRun([0.01 * s for s in SCALES.values()]).train()
    ours = AccelerateRun(wrap=wrap, late=late).train()
    for p, q in zip(real.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # the cosine of a scaled rate
    assert [g["lr"] for g in ours.optimizer.param_groups] == ours.schedule.get_last_lr()


def test_a_starved_stage_is_repaired():
    bare, ours = AccelerateRun(STARVED).train(), AccelerateRun(STARVED, DensityLR).train()
    assert [d.stage for d in ours.density.diagnose() if d.kind == "starved"] == ["0"]
    assert ours.density.scales["0"] > 1e3
    assert [g["lr"] for g in bare.optimizer.param_groups] == [
        g["lr"] for g in ours.optimizer.param_groups
    ]


def test_a_saved_state_goes_on_as_if_it_had_never_stopped(tmp_path):
    whole = AccelerateRun(STARVED, DensityLR)
    whole.train(1)
    assert "0" in whole.density._loop.run.undecided
    whole.accelerator.save_state(tmp_path)
    resumed = AccelerateRun(STARVED, DensityLR)
    resumed.accelerator.load_state(tmp_path)
    assert resumed.density.scales == whole.density.scales
    assert resumed.density.scales["0"] > 1
    for run in (whole, resumed):
        seed()
        run.train(2)
    assert same(whole.model, resumed.model)
    assert same_state(whole.inner, resumed.inner)
    assert whole.density.history.decisions == resumed.density.history.decisions


def test_the_prepared_optimizer_itself_is_refused():
    run = AccelerateRun()
    with pytest.raises(ValueError, match="AcceleratedOptimizer is a wrapper that never called"):
        DensityLR(run.optimizer, run.model)
    assert hooks_of(run.model) == 0
