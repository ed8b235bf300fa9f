"""Hugging Face's Trainer, its optimizers and its checkpoints."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from densitylr import DensityLR
from densitylr.integrations.huggingface import DensityCallback
from tests.support.fixed import Fixed, hooks_of, probes, same, same_state
from tests.support.host_runs import bert, halves, seed, trainer

FIRST = "bert.encoder.layer.0"
RATES = (1e-7, 3e-3)
SAVING = {"save_strategy": "steps", "save_steps": 6}


def starved(model):
    return torch.optim.AdamW(halves(model, RATES))


def train(made):
    seed()  # of the dropout
    made.train()


def bare_optimizer(made):
    """The torch optimizer inside accelerate's and ours."""
    inner = made.optimizer.optimizer
    return inner.inner if isinstance(inner, DensityLR) else inner


def assert_equal(a, b):
    assert same(a.model, b.model)
    assert same_state(bare_optimizer(a), bare_optimizer(b))


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (True, {}),
        (False, {"gradient_accumulation_steps": 3}),
        (False, {"bf16": True}),
        (False, {"lr_scheduler_type": "cosine", "warmup_steps": 5, "weight_decay": 0.1}),
    ],
)
def test_flat_rates_train_bit_for_bit_as_without(tmp_path, given, options):
    bare = trainer(tmp_path, **options)
    callback = DensityCallback()
    ours = trainer(tmp_path, [callback], **options)
    if given:
        ours.optimizer = DensityLR(ours.create_optimizer(), ours.model)
    for made in (bare, ours):
        train(made)
    assert_equal(bare, ours)
    assert callback.controller.history.steps.tolist() == probes(5, 24)
    assert callback.controller.history.decisions == []


@pytest.mark.parametrize("given", [False, True])
def test_scales_are_real_group_rates(tmp_path, given):
    fixed = Fixed({FIRST: 1 / 8})
    # The trainer's own is fused, and decays nothing.
    like = {} if given else {"fused": True, "weight_decay": 0.0}
    real = trainer(
        tmp_path, optimizer=lambda m: torch.optim.AdamW(halves(m, (2**-12, 2**-9)), **like)
    )
    if given:
        ours = trainer(
            tmp_path,
            optimizer=lambda m: DensityLR(
                torch.optim.AdamW(m.parameters(), lr=2**-9), m, policy=fixed
            ),
        )
    else:
        callbacks = [DensityCallback(policy=fixed)]
        ours = trainer(tmp_path, callbacks, learning_rate=2**-9)
    for made in (real, ours):
        train(made)
    assert fixed.asked == probes(5, 24)
    assert same(real.model, ours.model)


def test_a_starved_layer_is_repaired_and_the_schedule_stays_the_trainers(tmp_path):
    callback = DensityCallback()
    runs = []
    for callbacks in ([], [callback]):
        made = trainer(tmp_path, callbacks, starved, lr_scheduler_type="cosine", warmup_steps=4)
        train(made)
        runs.append(made)
    assert [d.stage for d in callback.controller.diagnose() if d.kind == "starved"] == [FIRST]
    assert callback.controller.scales[FIRST] > 1e3
    rates = [[g["lr"] for g in bare_optimizer(made).param_groups] for made in runs]
    assert rates[0] == rates[1]
    logged = [[e["learning_rate"] for e in made.state.log_history[:-1]] for made in runs]
    assert logged[0] == logged[1]
    start = bert().bert.encoder.layer[0]
    moved = [
        sum(
            float((p - q).detach().square().sum())
            for p, q in zip(
                made.model.bert.encoder.layer[0].parameters(), start.parameters(), strict=True
            )
        )
        for made in runs
    ]
    assert moved[1] > 1e4 * moved[0]


@pytest.mark.parametrize("given", [False, True])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tmp_path, given):
    def make(folder, **options):
        if given:
            return trainer(
                tmp_path / folder,
                optimizer=lambda m: DensityLR(starved(m), m, every=4),
                **SAVING,
                **options,
            )
        return trainer(tmp_path / folder, [DensityCallback(every=4)], starved, **SAVING, **options)

    def controller(made):
        if given:
            return made.optimizer.optimizer
        (callback,) = (c for c in made.callback_handler.callbacks if hasattr(c, "controller"))
        return callback.controller

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    # Stopped before the layer has lifted off, so that its twin still matters.
    checkpoint = tmp_path / "whole" / "checkpoint-6"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 24
    assert_equal(whole, resumed)
    assert controller(whole).scales == controller(resumed).scales
    assert controller(whole).scales[FIRST] > 1
    decided = [controller(made).history.decisions for made in (whole, resumed)]
    assert decided[0] == decided[1]
    assert min(d.step for d in decided[0]) < 6 < max(d.step for d in decided[0])
    assert controller(resumed).history.steps.tolist() == [
        s for s in controller(whole).history.steps if s >= 6
    ]
    # The layer that is called first is looked at in every step, as before.
    watched = [controller(made)._loop.monitor.watched for made in (whole, resumed)]
    assert watched[0] == watched[1] != frozenset()
    assert hooks_of(whole.model) == hooks_of(resumed.model)


def test_our_state_is_plain_numbers_beside_the_trainers(tmp_path):
    made = trainer(tmp_path, [DensityCallback(recover=True)], starved, **SAVING)
    made.train()
    text = (tmp_path / "checkpoint-24" / "trainer_state.json").read_text(encoding="utf-8")
    saved = json.loads(text)["stateful_callbacks"]["DensityCallback"]["attributes"]["_saved"]
    assert saved["policy"]["scales"][FIRST] > 1
    assert saved["steps"] == 24
    # A trainer without the callback resumes it, too.
    bare = trainer(tmp_path, optimizer=starved, max_steps=25, **{**SAVING, "save_steps": 30})
    bare.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path)))
    assert bare.state.global_step == 25


def test_a_checkpoint_of_a_run_without_us_is_taken_for_trained_weights(tmp_path):
    trainer(tmp_path, optimizer=starved, **SAVING).train()
    made = trainer(tmp_path, [callback := DensityCallback()], starved, max_steps=30, **SAVING)
    with pytest.warns(UserWarning, match="the weights look trained"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert set(callback.controller.scales.values()) == {1.0}


def test_training_again_goes_on_with_the_same_controller(tmp_path):
    made = trainer(tmp_path, [callback := DensityCallback()], starved, max_steps=4)
    made.train()
    first = callback.controller
    made.train()
    assert callback.controller is first
    assert first.history.steps.tolist() == probes(5, 8)


class Reporter(TrainerCallback):
    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(dict(logs))


def test_readings_are_in_the_log_and_reach_later_callbacks(tmp_path):
    before, callback, after = Reporter(), DensityCallback(("near_zero", "scale")), Reporter()
    made = trainer(tmp_path, [before, callback, after], starved)
    made.train()
    history = callback.controller.history
    names = {f"densitylr/{n}/{s}" for n in ("near_zero", "scale") for s in history.stages}
    for entry, reported in zip(made.state.log_history[:-1], after.logged[:-1], strict=True):
        assert {k for k in entry if k.startswith("densitylr")} == names
        assert reported.items() <= entry.items()
    assert entry[f"densitylr/scale/{FIRST}"] == history.series(FIRST, "scale")[-1]
    assert not any(names & logs.keys() for logs in (*before.logged, after.logged[-1]))
    callbacks = made.callback_handler.callbacks
    callbacks.sort(key=lambda c: not isinstance(c, DensityCallback))
    made.train()
    assert names <= before.logged[-2].keys()


def test_a_number_that_there_is_not_is_refused_before_training():
    with pytest.raises(ValueError, match="no number 'accuracy'; there are near_zero, "):
        DensityCallback(("near_zero", "accuracy"))
