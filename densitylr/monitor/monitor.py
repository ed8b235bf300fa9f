"""`DensityMonitor`: forward hooks that read the density of every stage, in any training loop."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from densitylr.history import History, Reading, StageReading, check_every, restored
from densitylr.model import Ranks, Stage, is_sharded, unwrap
from densitylr.monitor.baseline import Baseline
from densitylr.monitor.hooks import ForwardCounter, LayerHook, first_tensor
from densitylr.monitor.layers import WatchedLayer, layer_budget
from densitylr.monitor.measure import (
    COLUMN,
    EXAMPLE_VARIANCE_AT,
    PEAK_AT,
    Compared,
    SampleBuffer,
    pool_layers,
    pool_ranks,
    tabulate,
    unread,
)

__all__ = ["DensityMonitor"]

_log = logging.getLogger("densitylr")

Numbers = dict[str, dict[str, Any]]
"""The arguments of a `StageReading`, by stage."""


class DensityMonitor:
    """Watch the near-zero density of a model's stages, without touching its training.

    Every ``every``-th training forward of ``model`` is a reading: each weight layer's output is
    read once, before normalisation and activation, through a bounded sample, and one small buffer
    is copied to the host. Forwards in evaluation mode or without gradients, the second call of a
    shared layer, and the recomputation of activation checkpointing are not read. Under reentrant
    activation checkpointing only the recomputation runs with gradients enabled:
    `densitylr.DensityLR` reads that pass; a standalone monitor cannot, because its reading ends
    with the forward pass.

    Numbers, losses and random states are those of a run without the monitor. In several processes
    each monitor reads its own rank's examples; under ``fully_shard`` all ranks make one, as the
    first weights are put together for the twins.

    Args:
        model: the model to watch, not yet trained. Make the monitor before
            ``torch.compile(model)``.
        stages: as in `densitylr.find_stages`.
        every: training forwards from one reading to the next. None: only on `arm`.
        baseline: what stages are compared with; by default the model as it is now, with a twin of
            every stage.
        watching: read ``example_variance`` at each reading and ``peak_rms``, for which the RMS of
            each layer, of at most 1,024 outputs, is taken at every training forward.
        guard: read ``peak_rms`` of the layer that is called first, for which its RMS is taken at
            every training forward: there an outlier batch shows.
        quiet: do not warn of activations that are not finite.

    Attributes:
        history: a `densitylr.History` of all readings.
        stages: the `densitylr.Stage` objects by name.

    Raises:
        TypeError, ValueError: as in `densitylr.find_stages`, or ``every`` is not a positive
            integer. Nothing is hooked then.

    Example::

        with DensityMonitor(model) as monitor:
            train(model)
        monitor.history.series("conv1", "near_zero")
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Mapping[str, str | Sequence[str]] | None = None,
        every: int | None = 5,
        *,
        baseline: Baseline | None = None,
        watching: bool = False,
        guard: bool = False,
        quiet: bool = False,
    ) -> None:
        if every is not None:
            check_every(every)
        if baseline is None:
            baseline = Baseline.capture(model, stages, pretrained=False, first_weights=False)
        self.stages: dict[str, Stage] = baseline.stages
        self.history = History()
        self.every = every
        self.step = 0
        self.armed = False
        self.closed = False
        self.watching = watching
        self.watched: frozenset[str] = frozenset()
        self.order = torch.zeros(1)  # of the hooks, see `Watcher`
        self.on_failure: Callable[[str, Exception], object] | None = None
        self.ranks: Ranks | None = None  # set by the caller, which makes all of them collect
        self._variance_due = False
        self._warned: set[str] = set(self.stages if quiet else ())
        self._loaded: dict[str, float] = {}  # peaks of a checkpoint, until a forward of the layer
        self._buffers: dict[torch.device, SampleBuffer] = {}
        self._counts = {name: len(stage.layers) for name, stage in self.stages.items()}
        self._budget = layer_budget(sum(self._counts.values()))
        layers = {n: layer for s in self.stages.values() for n, layer in s.layers.items()}
        self._layers = {
            name: WatchedLayer(name, layer, row, baseline.twins[name], self._budget)
            for row, (name, layer) in enumerate(layers.items())
        }
        if watching:
            self.watched = frozenset(self._layers)
        self._guard_due = guard and not watching
        self._handles = [
            # Before fully_shard's own hook takes the weights away again.
            layer.register_forward_hook(
                LayerHook(self, name),
                with_kwargs=True,
                prepend=any(is_sharded(p) for p in layer.parameters()),
            )
            for name, layer in layers.items()
        ]
        if every is not None:
            root = unwrap(model)
            self._handles.append(root.register_forward_pre_hook(ForwardCounter(self, after=False)))
            self._handles.append(root.register_forward_hook(ForwardCounter(self, after=True)))

    def __enter__(self) -> DensityMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"every {self.every}"
        return f"DensityMonitor({len(self.stages)} stages, {len(self._layers)} layers, {state})"

    def close(self) -> None:
        """Remove all hooks and release the twins; the history stays. May be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._buffers.clear()
        for layer in self._layers.values():
            layer.release_twin()
        self.armed, self.watched, self.closed = False, frozenset(), True

    def arm(self, *, example_variance: bool = False) -> None:
        """Read each layer at its next training forward.

        Args:
            example_variance: read that, too, even if not ``watching``.

        Raises:
            RuntimeError: the monitor is closed.
        """
        if self.closed:
            raise RuntimeError("this DensityMonitor is closed: make a new one to go on watching")
        for layer in self._layers.values():
            layer.device = None
        if self._variance_due:  # at the last reading
            for buffer in self._buffers.values():
                buffer.rows[:, EXAMPLE_VARIANCE_AT] = math.nan
        self.armed, self._variance_due = True, example_variance or self.watching

    def disarm(self) -> None:
        """Read nothing until `arm`; what was read of a reading is thrown away."""
        self.armed = False

    def collect(
        self, step: int, add: Callable[[Numbers], None] = lambda numbers: None
    ) -> Reading | None:
        """End a reading: one copy to the host, one `densitylr.Reading` labelled ``step``.

        Args:
            step: optimizer steps done.
            add: adds numbers to those of the stages, which are a `StageReading`'s arguments.

        Returns:
            None if no layer was called since `arm`; the reading then goes on.
        """
        if not self.armed:
            return None
        devices = {layer.device for layer in self._layers.values() if layer.device is not None}
        if not (devices or self.ranks):
            return None
        table = self._read_from(devices)
        if self.ranks is not None:
            table = pool_ranks(self.ranks.gather(table, step))
            if not table[:, [COLUMN["count"], COLUMN["nonfinite"]]].any():  # on no rank
                return None
        self.armed = False
        numbers = pool_layers(self._counts, table)
        add(numbers)
        self.forget_peaks()
        self._warn_of_nonfinite(numbers, step)
        return Reading(step, {name: StageReading(**own) for name, own in numbers.items()})

    def forget_peaks(self) -> None:
        """The next ``peak_rms`` is over the forwards from here on."""
        self._loaded.clear()
        for buffer in self._buffers.values():
            buffer.forget_peaks()

    def state_dict(self) -> dict[str, Any]:
        """What the layers are compared with: weights of live twins and reference counts; and, of
        those that are watched, the peak since the last reading.
        """
        peaks = dict.fromkeys(self.watched, 0.0) | self._peaks_so_far()
        return {n: layer.state_dict() | {"peak": peaks.get(n)} for n, layer in self._layers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with what another monitor of such a model did; history and schedule stay.

        Raises:
            KeyError, ValueError: the state is damaged.
        """
        self.prepare(state)()

    def prepare(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Check a state dict; the result applies it.

        Raises:
            KeyError, ValueError: it is damaged.
        """
        layers = {n: layer for s in self.stages.values() for n, layer in s.layers.items()}
        known = {name: own for name, own in state.items() if name in layers}
        loads = [self._layers[name].prepare(own, layers[name]) for name, own in known.items()]
        peaks = {name: restored(float | None, own.get("peak")) for name, own in known.items()}

        def load() -> None:
            for load_layer in () if self.closed else loads:
                load_layer()
            for layer in self._layers.values():
                layer.device = None  # what was read is thrown away
            self._buffers.clear()  # which know the untrained RMS and the twins of before
            self._loaded = {name: peak for name, peak in peaks.items() if peak is not None}
            if self._guard_due and len(self._loaded) == 1:
                self._guard_due, self.watched = False, frozenset(self._loaded)

        return load

    def release_twin(self, stage: str) -> None:
        """Free the twins of a stage; later readings are compared with their last densities."""
        layers = [self._layers[name] for name in self.stages[stage].layers]
        alive = any(layer.twin is not None for layer in layers)
        for layer in layers:
            layer.release_twin()
        if alive and not (self.armed or self.watching):
            self._buffers.clear()  # in which nothing is kept now but room for its answers

    # Called by the hooks

    def read(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        """Look at a training forward of a layer."""
        layer = self._layers[name]
        a = first_tensor(output)
        due = self.armed and layer.device is None
        watched = name in self.watched
        if not (due or watched) or a is None or not a.numel():
            return
        if self._guard_due:  # the data come in where the first reading begins
            self._guard_due, watched, self.watched = False, True, frozenset([name])
        if a.is_cuda and not due and torch.cuda.is_current_stream_capturing():
            return  # a graph would go on writing where a new buffer may be made
        a = a.detach()
        here = self._buffers.get(a.device) or self._new_buffer(a.device)
        if watched and name in self._loaded:
            here.rows[layer.row, PEAK_AT] = self._loaded.pop(name)
        variance = due and self._variance_due
        layer.read(args, kwargs, a, here, due=due, watched=watched, variance=variance)

    def fail(self, doing: str, error: Exception) -> None:
        """End the watching after an error of ours; training goes on."""
        if self.on_failure is not None:
            self.on_failure(doing, error)
            return
        _log.error(
            "densitylr: %s failed, so nothing is watched any more; training goes on. Please report "
            "this.",
            doing,
            exc_info=error,
        )
        self.close()

    def forward_began(self) -> None:
        """A training forward of the whole model begins."""
        if self.every is not None and self.step % self.every == 0 and not self.closed:
            self.arm()

    def forward_ended(self) -> None:
        """It has ended."""
        reading = self.collect(self.step)
        if reading is not None:
            self.history.record(reading)
        self.step += 1

    def _read_from(self, devices: set[torch.device]) -> np.ndarray:
        """The rows of all layers, and what later readings refer to, from the buffers."""
        host = {d: self._buffers[d].finish().cpu().double().numpy() for d in devices}
        table = unread(len(self._layers))
        for device, rows in host.items():
            read = [layer for layer in self._layers.values() if layer.device == device]
            compared = [Compared(r.row, r.answered, r.reference, r.estimator) for r in read]
            table[[layer.row for layer in read]], references = tabulate(
                compared, self._buffers[device], rows
            )
            for layer in read:
                found = references[layer.row]
                layer.reference = found.reference
                layer.rms0 = layer.rms0 if found.rms0 is None else found.rms0
        return table

    def _warn_of_nonfinite(self, numbers: Numbers, step: int) -> None:
        for name, own in numbers.items():
            if own["nonfinite"] and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{name}: {own['nonfinite']} of {own['count'] + own['nonfinite']} activations "
                    f"read at step {step} are NaN or infinite; they are counted, never averaged",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _peaks_so_far(self) -> dict[str, float]:
        """The largest RMS since the last reading, of each watched layer that was called."""
        rows = [buffer.rows[:, PEAK_AT].tolist() for buffer in self._buffers.values()]
        found = {n: [column[self._layers[n].row] for column in rows] for n in self.watched}
        return {name: float(np.max(peaks)) for name, peaks in found.items() if peaks} | self._loaded

    def _new_buffer(self, device: torch.device) -> SampleBuffer:
        layers = self._layers.values()
        twins = [layer.row for layer in layers if layer.twin is not None]
        watched = [self._layers[name].row for name in self.watched]
        known = [layer.rms0 for layer in layers]
        buffer = SampleBuffer(known, twins, self._budget, device, watched=watched)
        self._buffers[device] = buffer
        return buffer
