"""The eyes: forward hooks that read the density of every stage, in any training loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from densitylr.averages import combine, tabulate
from densitylr.cadence import check_every
from densitylr.distributed import Ranks, is_sharded
from densitylr.history import History
from densitylr.hooks import RootHook, TapHook
from densitylr.probe import PEAK_AT, VARIETY_AT, Probe
from densitylr.records import Reading
from densitylr.sampling import tap_budget
from densitylr.stages import Stage, find_stages, unwrap
from densitylr.taps import Tap
from densitylr.twin import first_tensor

__all__ = ["DensityMonitor"]


class DensityMonitor:
    """Watch the near-zero density of a model's stages, without touching its training.

    Every ``every``-th training forward of ``model`` is a probe: each weight layer's output is
    read once, before normalisation and activation, through a bounded sample, and one small
    buffer is copied to the host. Forwards in evaluation mode or without gradients, the second
    call of a shared layer, and the recomputation of activation checkpointing are not read. (Within
    ``checkpoint(…, use_reentrant=True)`` nothing but the recomputation has gradients: `DensityLR`
    reads that, a monitor with ``every`` has ended its probe by then.)
    Numbers, losses and random states are those of a run without the monitor. In several
    processes each monitor reads its own rank's examples; under ``fully_shard`` all ranks make
    one, as the first weights are put together for the twins.

    Args:
        model: the model to watch, not yet trained. Make the monitor before
            ``torch.compile(model)``.
        stages: as in `find_stages`.
        every: training forwards from one probe to the next. None: only on `arm`.
        twins: stages whose untrained twins are kept, by name; all of them by default.
        watching: read `StageReading.variety` at each probe and `StageReading.peak`, for which
            the RMS of each tap, of at most 1,024 outputs, is taken at every training forward.
        guard: read `StageReading.peak` of the tap that is called first, for which its RMS is
            taken at every training forward: there a batch shows that is out of line.
        exact: read every output instead of a sample of at most 131,072 a probe (and 65,536 of a
            tap whose twin answers). It takes memory for as many outputs as the largest tap
            has, times the number of taps: for small models, to see what sampling does.

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
        guard: bool = False,
        exact: bool = False,
    ) -> None:
        if every is not None:
            check_every(every)
        self.stages: dict[str, Stage] = find_stages(model, stages)
        self.history = History()
        self.every = every
        self.step = 0
        self.armed = self._varied = False
        self.closed = False
        self.watching = watching
        self.watched: frozenset[str] = frozenset()
        self._order = torch.zeros(1)
        self.ranks: Ranks | None = None  # set by whoever sees to it that all of them collect
        self._warned: set[str] = set()
        self._loaded: dict[str, float] = {}  # peaks of a checkpoint, until a forward of the tap
        self._probes: dict[torch.device, Probe] = {}
        self._taps: dict[str, Tap] = {}
        taps = sum(len(stage.taps) for stage in self.stages.values())
        self._budget = None if exact else tap_budget(taps)
        for stage in self.stages.values():
            for name, layer in stage.taps.items():
                twin = twins is None or stage.name in twins
                self._taps[name] = Tap(name, layer, len(self._taps), twin=twin, budget=self._budget)
        if watching:
            self.watched = frozenset(self._taps)
        self._guard_due = guard and not watching
        self._handles = [
            # Before fully_shard's own hook takes the weights away again.
            layer.register_forward_hook(
                TapHook(self, name),
                with_kwargs=True,
                prepend=any(is_sharded(p) for p in layer.parameters()),
            )
            for stage in self.stages.values()
            for name, layer in stage.taps.items()
        ]
        if every is not None:
            root = unwrap(model)
            self._handles.append(root.register_forward_pre_hook(RootHook(self, after=False)))
            self._handles.append(root.register_forward_hook(RootHook(self, after=True)))

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
        self._probes.clear()
        for tap in self._taps.values():
            tap.let_twin_go()
        self.armed, self.watched, self.closed = False, frozenset(), True

    def wants(self, tap: str) -> bool:
        """Whether the next training forward of a tap may have to be looked at."""
        return self.armed or tap in self.watched

    def arm(self, *, variety: bool = False) -> None:
        """Read each tap at its next training forward.

        Args:
            variety: read `StageReading.variety`, too, though nobody is ``watching``.

        Raises:
            RuntimeError: the monitor is closed.
        """
        if self.closed:
            raise RuntimeError("this DensityMonitor is closed: make a new one to go on watching")
        for tap in self._taps.values():
            tap.device = None
        if self._varied:  # at the last probe
            for probe in self._probes.values():
                probe.rows[:, VARIETY_AT] = math.nan
        self.armed, self._varied = True, variety or self.watching

    def collect(self, step: int) -> Reading | None:
        """End a probe: one copy to the host, one `Reading` labelled ``step``.

        Returns:
            None if no tap was called since `arm`; the probe then goes on.
        """
        devices = {tap.device for tap in self._taps.values() if tap.device is not None}
        if not self.armed or not (devices or self.ranks):
            return None
        host = {d: self._probes[d].finish().cpu().double().numpy() for d in devices}
        table = tabulate(list(self._taps.values()), self._probes, host)
        if self.ranks is not None:
            table = self.ranks.combined(table, step)
            if not table[:, :2].any():  # no outputs, finite or not, on any rank
                return None
        self.armed = False
        reading = Reading(step, combine(self.stages, table))
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
        self._loaded.clear()
        for probe in self._probes.values():
            probe.forget_peaks()

    def state_dict(self) -> dict[str, Any]:
        """What the taps are compared with: weights of live twins and reference counts; and, of
        those that are watched, the peak since the last probe.
        """
        peaks = dict.fromkeys(self.watched, 0.0) | self._peaks_so_far()
        return {n: tap.state_dict() | {"peak": peaks.get(n)} for n, tap in self._taps.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with what another monitor of such a model did; history and cadence stay."""
        layers = {name: layer for s in self.stages.values() for name, layer in s.taps.items()}
        for name in () if self.closed else state.keys() & layers.keys():
            self._taps[name].load_state_dict(state[name], layers[name])
        for tap in self._taps.values():
            tap.device = None  # what was read of a probe is thrown away
        self._probes.clear()  # which know the untrained RMS and the twins of before
        self._loaded = {n: p for n in state if (p := state[n].get("peak")) is not None}
        if self._guard_due and len(self._loaded) == 1:
            self._guard_due, self.watched = False, frozenset(self._loaded)

    def let_twin_go(self, stage: str) -> None:
        """Free the untrained copies of a stage; later readings refer to their last answer."""
        taps = [self._taps[name] for name in self.stages[stage].taps]
        alive = any(tap.twin is not None for tap in taps)
        for tap in taps:
            tap.let_twin_go()
        if alive and not (self.armed or self.watching):
            self._probes.clear()  # in which nothing is kept now but room for its answers

    def _peaks_so_far(self) -> dict[str, float]:
        """The largest RMS since the last probe, of each watched tap that was called."""
        rows = [probe.rows[:, PEAK_AT].tolist() for probe in self._probes.values()]
        found = {n: [column[self._taps[n].row] for column in rows] for n in self.watched}
        return {name: float(np.max(peaks)) for name, peaks in found.items() if peaks} | self._loaded

    def _read(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        tap = self._taps[name]
        a = first_tensor(output)
        probe = self.armed and tap.device is None
        watched = name in self.watched
        if not (probe or watched) or a is None or not a.numel():
            return
        if self._guard_due:  # the data come in where the first probe begins
            self._guard_due, watched, self.watched = False, True, frozenset([name])
        if a.is_cuda and not probe and torch.cuda.is_current_stream_capturing():
            return  # a graph would go on writing where a new probe may be made
        a = a.detach()
        here = self._probes.get(a.device) or self._new_probe(a.device)
        if probe:
            tap.read(args, kwargs, a, here)
            tap.device = a.device
        if watched:
            if name in self._loaded:
                here.rows[tap.row, PEAK_AT] = self._loaded.pop(name, 0.0)
            tap.keep_peak(a, here.peaks[tap.row])
        if probe and self._varied:
            tap.read_variety(a, here.rows[tap.row])

    def _new_probe(self, device: torch.device) -> Probe:
        taps = self._taps.values()
        twins = [tap.row for tap in taps if tap.twin is not None]
        watched = [self._taps[name].row for name in self.watched]
        known = [tap.rms0 for tap in taps]
        probe = Probe(known, twins, self._budget or 0, device, watched=watched)
        self._probes[device] = probe
        return probe

    def _forward_began(self) -> None:
        if self.every is not None and self.step % self.every == 0 and not self.closed:
            self.arm()

    def _forward_ended(self) -> None:
        reading = self.collect(self.step)
        if reading is not None:
            self.history.record(reading)
        self.step += 1
