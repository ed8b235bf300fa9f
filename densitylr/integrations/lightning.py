"""One line in a Lightning Trainer: ``callbacks=[DensityCallback()]``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from densitylr.controller import STATE_KEY, DensityLR
from densitylr.history import Decision, Reading, Sink, scalars

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the older name of the same
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]

__all__ = ["DensityCallback"]


class DensityCallback(Callback):
    """Put a `DensityLR` around the optimizer of a fit, or report on the one that is there.

    Where ``configure_optimizers`` returns a plain optimizer, a `DensityLR` is made of it and of
    the LightningModule when fitting starts. It acts through the optimizer's own step hooks: the
    Trainer keeps the optimizer it knows, and schedulers, precision, clipping, accumulation and
    other callbacks are what they are without us. What it knows is stored in the checkpoint as
    this callback's state; a checkpoint of a run without the callback loads, too, and the other
    way round.

    Where ``configure_optimizers`` returns `DensityLR` objects, they are reported on, and their
    states are in the checkpoint as those of optimizers are.

    Every reading goes to the Trainer's loggers under ``densitylr/``, over
    ``trainer.global_step``; the progress bar shows ``least_moved``, the displacement of the
    stage that has moved least; and what is wrong is printed when fitting ends.

    Args:
        mode: as for `DensityLR`, like all ``options``.
        sinks: further `Sink` objects, which get every reading.
        verbose: print the diagnosis when fitting ends.
        options: the other arguments of `DensityLR`: ``stages`` (of the LightningModule),
            ``every``, ``policy``, ``pretrained``, ``observe_only``, ``recover``.

    Attributes:
        optimizers: the `DensityLR` objects of the last fit; there is one, unless
            ``configure_optimizers`` returned several. Those that the callback made are closed
            when fitting ends; their history stays.

    Raises:
        ValueError: when fitting starts, as `DensityLR` does; with several plain optimizers; or
            with arguments for a `DensityLR` that is there already.

    Example::

        density = DensityCallback()
        Trainer(max_epochs=1, callbacks=[density]).fit(module, loader)
        density.optimizers[0].history.save("history.npz")
    """

    def __init__(
        self,
        mode: str | None = None,
        *,
        sinks: Sequence[Sink] = (),
        verbose: bool = True,
        **options: Any,
    ) -> None:
        self.options = options if mode is None else {"mode": mode, **options}
        self.sinks = tuple(sinks)
        self.verbose = verbose
        self.optimizers: list[DensityLR] = []
        self._made = False
        self._loaded: dict[str, Any] | None = None
        self._subscribed: list[tuple[DensityLR, Sink]] = []
        self._least = math.nan

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None  # what an earlier call of the Trainer may have left

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()
        self.optimizers, self._made = [], False  # until nothing can fail any more
        found: list[Optimizer] = trainer.strategy.optimizers
        there = [optimizer for optimizer in found if isinstance(optimizer, DensityLR)]
        if there and self.options:
            raise ValueError(
                "configure_optimizers returns a DensityLR already: give it "
                f"{', '.join(self.options)} there, not to DensityCallback"
            )
        if not there and len(found) != 1:
            raise ValueError(
                f"configure_optimizers returns {len(found)} optimizers, and each needs to know "
                "its part of the model: return DensityLR(optimizer, part) there, for each"
            )
        made = not there
        if made:
            there = [DensityLR(found[0], pl_module, **self.options)]
        self.optimizers, self._made = there, made
        for i, optimizer in enumerate(there):
            prefix = "densitylr" if len(there) == 1 else f"densitylr/{i}"
            for sink in (_Report(self, trainer, prefix), *self.sinks):
                optimizer.history.subscribe(sink)
                self._subscribed.append((optimizer, sink))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state, self._loaded = self._loaded, None
        if state and self._made:  # the optimizer has its own by now
            (optimizer,) = self.optimizers
            optimizer.load_state_dict({**optimizer.inner.state_dict(), **state})

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        for known in self.optimizers:
            if self._made and known.inner is getattr(optimizer, "_optimizer", optimizer):
                known.before_zero_grad()  # a DensityLR sees to it itself

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if math.isfinite(self._least):
            pl_module.log("least_moved", self._least, prog_bar=True, logger=False)
            self._least = math.nan

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.verbose:
            for optimizer in self.optimizers:
                for diagnosis in optimizer.diagnose():
                    trainer.print(f"densitylr: {diagnosis}")
        self._release()

    def on_exception(self, *_: Any) -> None:
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """What the `DensityLR` that we made adds to the state of its optimizer."""
        if not self._made:
            return {}
        state = self.optimizers[0].state_dict()
        return {STATE_KEY: state[STATE_KEY]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)

    def _release(self) -> None:
        for optimizer, sink in self._subscribed:
            optimizer.history.unsubscribe(sink)
        self._subscribed = []
        if self._made:
            for optimizer in self.optimizers:
                optimizer.close()


class _Report:
    """A sink for the Trainer's loggers and its progress bar."""

    def __init__(self, callback: DensityCallback, trainer: Trainer, prefix: str) -> None:
        self.callback, self.trainer, self.prefix = callback, trainer, prefix

    def write(
        self,
        reading: Reading,
        rates: Mapping[str, float],
        scales: Mapping[str, float],
        decisions: Sequence[Decision],
    ) -> None:
        moved = [seen.displacement for name, seen in reading.stages.items() if rates[name] > 0]
        self.callback._least = min((d for d in moved if math.isfinite(d)), default=math.nan)
        for logger in self.trainer.loggers:
            logger.log_metrics(
                scalars(reading, rates, scales, self.prefix), step=self.trainer.global_step
            )

    def close(self) -> None:
        """The loggers are the Trainer's to close."""
