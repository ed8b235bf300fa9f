"""timm: its models' stages, layer decay, and schedulers that write rates of their own."""

from __future__ import annotations

import pytest

pytest.importorskip("timm")

import timm
from timm.optim import create_optimizer_v2

from densitylr import DensityLR, find_stages
from densitylr.model import WeightChecks, check_weights
from tests.support.fixed import Fixed, hooks_of, probes, same, same_state
from tests.support.host_runs import TimmRun, vit

STAGES = {
    "vit_tiny_patch16_224": ["patch_embed", *(f"blocks.{i}" for i in range(12)), "head"],
    "resnet18": ["conv1", "conv2_x", "conv3_x", "conv4_x", "conv5_x", "fc"],
    "convnext_atto": ["stem", *(f"stages.{i}" for i in range(4)), "head"],
    "mixer_s32_224": ["stem", *(f"blocks.{i}" for i in range(8)), "head"],
    "efficientnet_b0": ["conv_stem", *(f"blocks.{i}" for i in range(7)), "conv_head", "classifier"],
}
SCALES = {"patch_embed": 4.0, "blocks.1": 0.25}


@pytest.mark.parametrize("name", STAGES)
def test_models_are_divided_into_blocks_and_read_untrained(name):
    model = timm.create_model(name, pretrained=False, num_classes=10)
    stages = find_stages(model)
    assert list(stages) == STAGES[name]
    assert check_weights(model, stages, None) == WeightChecks({}, {})


@pytest.mark.parametrize("options", [{}, {"opt": "sgd"}, {"opt": "lamb"}])
def test_without_layer_decay_it_trains_bit_for_bit_as_without(options):
    bare, ours = TimmRun(1.0, **options).train(), TimmRun(1.0, DensityLR, **options).train()
    assert same(bare.model, ours.model)
    assert same_state(bare.inner, ours.inner)
    assert ours.density.history.steps.tolist() == probes(5, 24)
    assert ours.density.history.decisions == []


def test_scales_are_real_group_rates():
    def wrap(inner, model):
        return DensityLR(inner, model, policy=Fixed(SCALES))

    real, ours = TimmRun(0.5), TimmRun(0.5, wrap)
    stages = find_stages(real.model)
    for name, scale in SCALES.items():
        own = {id(p) for p in stages[name].parameters.values()}
        for group in real.inner.param_groups:
            # Layer decay has a token, and the position embeddings, in groups of their own.
            held = {id(p) for p in group["params"]}
            assert held <= own or not held & own
            if held <= own:
                group["lr_scale"] *= scale
    real.schedule.step_update(0)
    real.train()
    ours.train()
    assert same(real.model, ours.model)


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb"])
def test_a_model_starved_by_layer_decay_is_repaired(opt):
    bare, ours = TimmRun(0.02, opt=opt).train(), TimmRun(0.02, DensityLR, opt=opt).train()
    starved = {d.stage for d in ours.density.diagnose() if d.kind == "starved"}
    assert {"patch_embed", "blocks.0"} <= starved
    assert ours.density.scales["patch_embed"] > 100
    # The scheduler was made after us, when all rates were one; its twins are there nevertheless.
    assert ours.density.history.readings[1].stages["patch_embed"].estimator == "twin"
    assert bare.rates == ours.rates


def test_a_checkpoint_goes_on_as_if_it_had_never_stopped():
    whole, resumed = TimmRun(0.02, DensityLR), TimmRun(0.02, DensityLR)
    whole.train(4)
    saved = whole.state_dict()
    assert "patch_embed" in whole.density._loop.run.undecided
    resumed.load_state_dict(saved)
    for run in (whole, resumed):
        run.train()
    assert same(whole.model, resumed.model)
    assert same_state(whole.inner, resumed.inner)
    assert whole.density.history.decisions == resumed.density.history.decisions
    assert whole.density.scales["patch_embed"] > 1


def test_lookahead_is_wrapped_around_us_and_refused_within():
    model = vit()
    lookahead = create_optimizer_v2(model, "lookahead_adamw", lr=1e-3, layer_decay=0.02)
    with pytest.raises(ValueError, match="Lookahead is a wrapper that never called"):
        DensityLR(lookahead, model)
    assert hooks_of(model) == 0
    ours = TimmRun(0.02, DensityLR, opt="lookahead_adamw").train()
    assert ours.density.scales["patch_embed"] > 100
    flat = [TimmRun(1.0, wrap, opt="lookahead_adamw").train() for wrap in (None, DensityLR)]
    assert same(flat[0].model, flat[1].model)
