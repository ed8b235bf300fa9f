"""The eyes: forward hooks that read the density of every stage, in any training loop."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from densitylr.density import (
    BINS,
    COLUMNS,
    loudness,
    measure,
    near_zero_count,
    rms,
    row_dtype,
    variety,
)
from densitylr.history import History
from densitylr.records import Reading, StageReading
from densitylr.stages import Stage, find_stages, unwrap
from densitylr.twin import Args, Kwargs, Sampler, first_tensor, make_twin

__all__ = ["DensityMonitor"]

_AT = {name: i for i, name in enumerate(COLUMNS)}


class _Tap:
    """A weight layer that is read, its twin, and what it is compared with."""

    def __init__(self, name: str, layer: nn.Module, row: int, twin: bool) -> None:
        self.name = name
        self.row = row
        self.sampler = Sampler(layer)
        self.twin = make_twin(layer, self.sampler) if twin else None
        self.estimator = "twin" if self.twin else "first-probe"
        self.rms0: Tensor | None = None
        self.reference: Tensor | None = None  # finite and near-zero counts
        self.device: torch.device | None = None  # where it was read at this probe

    def read(self, args: Args, kwargs: Kwargs, a: Tensor, out: Tensor) -> None:
        """Fill row ``out`` from the layer's call, with the twin's answer beside it."""
        a = self.sampler.batched(a)
        sample = self.sampler(a)
        answer = self.twin(args, kwargs, self.sampler.rows(a)) if self.twin else None
        if answer is not None:
            self.rms0 = rms(answer)
            self.reference = torch.stack(near_zero_count(answer, self.rms0))
        elif self.rms0 is None:
            self.rms0 = rms(sample)
        self.rms0 = self.rms0.to(sample.device)
        measure(sample, self.rms0, out)
        if self.reference is None:
            self.reference = out[[_AT["count"], _AT["near_zero"]]].clone()
        out[_AT["reference_count"] : _AT["reference_near_zero"] + 1] = self.reference

    def watch(self, a: Tensor, out: Tensor, probe: bool) -> None:
        """Keep the peak in row ``out``; at a probe, the variety over the examples, too."""
        sample = self.sampler(a)
        peak = out[_AT["peak"]]
        torch.maximum(peak, loudness(sample).to(peak.dtype), out=peak)
        if probe:
            out[_AT["variety"]] = variety(sample, min(self.sampler.examples, sample.ndim - 1))

    def let_twin_go(self) -> None:
        if self.twin is not None:
            self.twin = None
            self.estimator = "first-probe" if self.reference is None else "last-twin"

    def state_dict(self) -> dict[str, Any]:
        return {
            "estimator": self.estimator,
            "rms0": self.rms0,
            "reference": self.reference,
            "twin": self.twin.state_dict() if self.twin else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], layer: nn.Module) -> None:
        self.estimator, self.rms0 = state["estimator"], state["rms0"]
        self.reference = state["reference"]
        self.twin = make_twin(layer, self.sampler) if state["twin"] is not None else None
        if self.twin is not None:
            self.twin.load_state_dict(state["twin"])


class _TapHook:
    """A forward hook that does not keep the monitor alive, and is inert in a copied model."""

    def __init__(self, monitor: DensityMonitor, tap: str) -> None:
        self.monitor = weakref.ref(monitor)
        self.tap = tap

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        monitor = self.monitor()
        if monitor is None or not (monitor.armed or monitor.watching):
            return
        if module.training and torch.is_grad_enabled():
            monitor._read(self.tap, args, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_hook, ()


class _RootHook:
    """Counts training forwards of the whole model, for a monitor that drives itself."""

    def __init__(self, monitor: DensityMonitor, after: bool) -> None:
        self.monitor = weakref.ref(monitor)
        self.after = after

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        monitor = self.monitor()
        if monitor is not None and module.training and torch.is_grad_enabled():
            monitor._forward_ended() if self.after else monitor._forward_began()

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_hook, ()


def _nothing(*args: Any) -> None:
    """What a copied or unpickled hook does."""


def _inert_hook() -> Any:
    return _nothing


class DensityMonitor:
    """Watch the near-zero density of a model's stages, without touching its training.

    Every ``every``-th training forward of ``model`` is a probe: each weight layer's output is
    read once, before normalisation and activation, through a bounded sample, and one small
    buffer is copied to the host. Forwards in evaluation mode or without gradients, the second
    call of a shared layer, and the recomputation of activation checkpointing are not read.
    Numbers, losses and random states are those of a run without the monitor.

    Args:
        model: the model to watch, not yet trained. Make the monitor before
            ``torch.compile(model)``.
        stages: as in `find_stages`.
        every: training forwards from one probe to the next. None: only on `arm`.
        twins: stages whose untrained twins are kept, by name; all of them by default.
        watching: read `StageReading.variety` at each probe and `StageReading.peak`, for which
            the RMS of each tap is taken at every training forward.

    Attributes:
        history: a `History` of all readings.
        stages: the `Stage` objects by name.

    Raises:
        TypeError, ValueError: as in `find_stages`, or ``every`` is not a positive integer.
            Nothing is hooked then.

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
        twins: Collection[str] | None = None,
        watching: bool = False,
    ) -> None:
        if every is not None:
            check_every(every)
        self.stages: dict[str, Stage] = find_stages(model, stages)
        self.history = History()
        self.every = every
        self.step = 0
        self.armed = False
        self.closed = False
        self.watching = watching
        self._warned: set[str] = set()
        self._buffers: dict[torch.device, Tensor] = {}
        self._taps: dict[str, _Tap] = {}
        for stage in self.stages.values():
            for name, layer in stage.taps.items():
                twin = twins is None or stage.name in twins
                self._taps[name] = _Tap(name, layer, len(self._taps), twin)
        self._handles = [
            layer.register_forward_hook(_TapHook(self, name), with_kwargs=True)
            for stage in self.stages.values()
            for name, layer in stage.taps.items()
        ]
        if every is not None:
            root = unwrap(model)
            self._handles.append(root.register_forward_pre_hook(_RootHook(self, after=False)))
            self._handles.append(root.register_forward_hook(_RootHook(self, after=True)))

    def __enter__(self) -> DensityMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"every {self.every}"
        return f"DensityMonitor({len(self.stages)} stages, {len(self._taps)} taps, {state})"

    def close(self) -> None:
        """Remove all hooks and let the twins go; the history stays. May be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._buffers.clear()
        for tap in self._taps.values():
            tap.let_twin_go()
        self.armed, self.watching, self.closed = False, False, True

    def arm(self) -> None:
        """Read each tap at its next training forward.

        Raises:
            RuntimeError: the monitor is closed.
        """
        if self.closed:
            raise RuntimeError("this DensityMonitor is closed: make a new one to go on watching")
        for tap in self._taps.values():
            tap.device = None
        self.armed = True

    def collect(self, step: int) -> Reading | None:
        """End a probe: one copy to the host, one `Reading` labelled ``step``.

        Returns:
            None if no tap was called since `arm`; the probe then goes on.
        """
        used = {tap.device for tap in self._taps.values() if tap.device is not None}
        if not self.armed or not used:
            return None
        self.armed = False
        host = {d: self._buffers[d].cpu().double().numpy() for d in used}
        rows = {
            tap.name: (tap, host[tap.device][tap.row])
            for tap in self._taps.values()
            if tap.device is not None
        }
        reading = Reading(
            step, {s.name: _combine(s, rows, self.watching) for s in self.stages.values()}
        )
        self.forget_peaks()
        for name, seen in reading.stages.items():
            if seen.nonfinite and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"{name}: {seen.nonfinite} of {seen.count + seen.nonfinite} activations read "
                    f"at step {step} are NaN or infinite; they are counted, never averaged",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return reading

    def forget_peaks(self) -> None:
        """The next `StageReading.peak` is over the forwards from here on."""
        for buffer in self._buffers.values():
            buffer[:, _AT["peak"]] = 0

    def let_twin_go(self, stage: str) -> None:
        """Free the untrained copies of a stage; later readings refer to their last answer."""
        for name in self.stages[stage].taps:
            self._taps[name].let_twin_go()

    def state_dict(self) -> dict[str, Any]:
        """What each tap is compared with, twins included, by the tap's name."""
        return {name: tap.state_dict() for name, tap in self._taps.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare the taps that are known with what they were compared with."""
        for stage in self.stages.values():
            for name, layer in stage.taps.items():
                if name in state:
                    self._taps[name].load_state_dict(state[name], layer)

    def _read(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        tap = self._taps[name]
        a = first_tensor(output)
        probe = self.armed and tap.device is None
        if not (probe or self.watching) or a is None or not a.numel():
            return
        with torch.no_grad():
            if a.device not in self._buffers:
                shape = (len(self._taps), len(COLUMNS) + BINS)
                self._buffers[a.device] = torch.zeros(
                    shape, dtype=row_dtype(a.device), device=a.device
                )
            row = self._buffers[a.device][tap.row]
            if probe:
                tap.read(args, kwargs, a.detach(), row)
            if self.watching:
                tap.watch(a.detach(), row, probe)
        if probe:
            tap.device = a.device

    def _forward_began(self) -> None:
        if self.every is not None and self.step % self.every == 0 and not self.closed:
            self.arm()

    def _forward_ended(self) -> None:
        reading = self.collect(self.step)
        if reading is not None:
            self.history.record(reading)
        self.step += 1


def check_every(every: int) -> None:
    """Raise ValueError unless ``every`` is a positive integer."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a positive number of steps, got {every!r}")


def _combine(
    stage: Stage, rows: Mapping[str, tuple[_Tap, np.ndarray]], watched: bool
) -> StageReading:
    """Means over the taps of a stage that were read and hold a finite element."""
    own = [rows[name] for name in stage.taps if name in rows]
    nonfinite = int(sum(row[_AT["nonfinite"]] for _, row in own))
    histogram = sum((row[len(COLUMNS) :] for _, row in own), np.zeros(BINS)).astype(np.int64)
    live = [(tap, row) for tap, row in own if row[_AT["count"]] and row[_AT["reference_count"]]]
    if not live:
        unread = dict.fromkeys(_AVERAGED, math.nan)
        return StageReading(
            **unread,
            untrained=math.nan,
            displacement=math.nan,
            estimator="first-probe",
            count=0,
            nonfinite=nonfinite,
            histogram=histogram,
        )
    averaged = _AVERAGED + (_WATCHED if watched else ())
    shares = []
    references = []
    moved = []
    for _, row in live:
        n, near = row[_AT["count"]], row[_AT["near_zero"]]
        n0, near0 = row[_AT["reference_count"]], row[_AT["reference_near_zero"]]
        shares.append({k: row[_AT[k]] / (n if k in _SHARES else 1) for k in averaged})
        references.append(near0 / n0)
        # Half a count more keeps the logarithm finite and equal counts at exactly zero.
        moved.append(abs(math.log((near + 0.5) / (n + 1)) - math.log((near0 + 0.5) / (n0 + 1))))
    estimators = {tap.estimator for tap, _ in live}
    return StageReading(
        **{k: float(np.mean([share[k] for share in shares])) for k in averaged},
        untrained=float(np.mean(references)),
        displacement=float(np.mean(moved)),
        estimator=estimators.pop() if len(estimators) == 1 else "mixed",
        count=int(sum(row[_AT["count"]] for _, row in live)),
        nonfinite=nonfinite,
        histogram=histogram,
    )


_SHARES = ("near_zero", "near_zero_absolute", "near_zero_present", "exactly_zero")
_AVERAGED = (*_SHARES, "mean", "std", "rms", "rms0")
_WATCHED = ("variety", "peak")
