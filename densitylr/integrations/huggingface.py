"""Hugging Face's ``Trainer``: ``Trainer(…, callbacks=[DensityCallback()])``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers.trainer_callback import (
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments

from densitylr.controller import STATE_KEY, DensityLR, add_state
from densitylr.history import check_series
from densitylr.monitor import Baseline

__all__ = ["DensityCallback"]


class DensityCallback(TrainerCallback, ExportableState):
    """Let the activation density of a ``Trainer``'s model run its learning rates.

    At the start of training it puts a `DensityLR` around the optimizer that the trainer has made;
    schedule, gradient accumulation, clipping and precision stay the trainer's. What `DensityLR`
    has found is saved in each checkpoint's ``trainer_state.json``, and a run resumed from there
    goes on as if it had never stopped, provided that the trainer is made, as ever, with the
    untrained model.

    Where the trainer was given a `DensityLR`, as in
    ``Trainer(…, optimizers=(DensityLR(optimizer, model), None))``, or
    ``trainer.optimizer = DensityLR(trainer.create_optimizer(), model)`` before training, that one
    is used, its state is in ``optimizer.pt``, and the callback only logs.

    Whenever the trainer logs a loss, the last reading is added to it, in ``state.log_history``
    and for each callback after this one. Reporters (TensorBoard, W&B) come first in a trainer's
    list; to let them see it, too, put this callback before them::

        trainer.callback_handler.callbacks.sort(key=lambda c: not isinstance(c, DensityCallback))

    Args:
        numbers: what is logged of each stage, as ``"densitylr/number/stage"``: numbers of
            `History.series`, such as ``"near_zero"``, ``"rate"`` and ``"scale"``.
        **options: as for `DensityLR`.

    Attributes:
        controller: the `DensityLR`, from the start of training on.

    Raises:
        ValueError: no such number; and, at the start of training, as for `DensityLR`.
    """

    def __init__(self, numbers: Sequence[str] = ("near_zero", "scale"), **options: Any) -> None:
        check_series(numbers)
        self.numbers, self.options = tuple(numbers), options
        self.controller: DensityLR | None = None
        self._made = False  # the controller is ours to save
        self._untrained: tuple[nn.Module, Baseline] | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        # When training begins a checkpoint's weights are in the model: what is compared with the
        # untrained ones is taken now.
        if model is not None:
            stages, pretrained = self.options.get("stages"), self.options.get("pretrained")
            self._untrained = model, Baseline.capture(model, stages, pretrained=pretrained)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        untrained, self._untrained = self._untrained, None
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if isinstance(optimizer, DensityLR):
            self.controller = optimizer
        elif self.controller is None or self.controller.inner is not optimizer:
            if self.controller is not None:
                self.controller.close()
            assert model is not None
            ours = self._of_checkpoint(state)
            options = dict(self.options)
            if ours is not None and untrained is not None and untrained[0] is model:
                options["baseline"] = untrained[1]
            self.controller, self._made = DensityLR(optimizer, model, **options), True
            if ours is not None:
                self.controller.load_state_dict(add_state(optimizer.state_dict(), ours))
        # The trainer expects an entry there, and a checkpoint made without us has none.
        cast(dict[str, Any], state.stateful_callbacks).setdefault(type(self).__name__, self.state())

    def _of_checkpoint(self, state: TrainerState) -> dict[str, Any] | None:
        """What `state` had written to the checkpoint that training goes on from, if any."""
        callbacks = cast(dict[str, Any], state.stateful_callbacks)
        saved = callbacks.get(type(self).__name__) if state.global_step else None
        return saved["attributes"]["_saved"] if isinstance(saved, dict) else None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or self.controller is None:
            return
        history = self.controller.history
        found = {
            f"densitylr/{number}/{stage}": float(history.series(stage, number)[-1])
            for number in self.numbers
            for stage in history.stages
        }
        found = {name: value for name, value in found.items() if math.isfinite(value)}
        logs.update(found)
        state.log_history[-1].update(found)

    def state(self) -> dict[str, Any]:
        """What goes into ``trainer_state.json``: plain numbers; a policy of the user's does not."""
        options = {key: value for key, value in self.options.items() if key != "policy"}
        ours = None
        if self._made and self.controller:
            (ours,) = self.controller.state_dict()[STATE_KEY]
            # Tensors are not saved: the baseline of the run that goes on has them.
            measured = ours["measurements"] = dict(ours["measurements"])
            measured["layers"] = {
                name: {**layer, "twin": None if layer["twin"] is None else True}
                for name, layer in measured["layers"].items()
            }
            if "alignment" in measured:
                first = dict.fromkeys(measured["alignment"]["first_weights"])
                measured["alignment"] = {**measured["alignment"], "first_weights": first}
        return {"args": {"numbers": self.numbers, **options}, "attributes": {"_saved": ours}}
