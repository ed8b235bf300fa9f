"""What was seen and what was decided: the only memory, from which everything shown is drawn."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from densitylr.history.bins import BINS, BOUNDS
from densitylr.history.records import Decision, Reading, StageReading, restored
from densitylr.history.sinks import Sink, offer

__all__ = ["History", "check_series"]

_FORMAT = 3
_NUMBERS = tuple(
    f.name for f in dataclasses.fields(StageReading) if f.name not in ("estimator", "histogram")
)
_EXTRA = ("rate", "scale")

TABLE_HEADER = ("step", "stage", *_NUMBERS, "estimator", *_EXTRA, "decision", "reason")


def table_rows(
    reading: Reading,
    rates: Mapping[str, float],
    scales: Mapping[str, float],
    decisions: Mapping[str, Decision],
) -> Iterator[list[Any]]:
    """A row of `TABLE_HEADER` for each stage of a reading; ``decisions`` by stage."""
    for stage, seen in reading.stages.items():
        decision = decisions.get(stage)
        yield [
            reading.step,
            stage,
            *(getattr(seen, name) for name in _NUMBERS),
            seen.estimator,
            rates.get(stage, ""),
            scales.get(stage, ""),
            decision.kind if decision else "",
            decision.reason if decision else "",
        ]


def check_series(names: Iterable[str]) -> None:
    """Raise ValueError unless `History.series` knows all of these numbers."""
    for name in names:
        if name not in _NUMBERS + _EXTRA:
            raise ValueError(f"no number {name!r}; there are {', '.join(_NUMBERS + _EXTRA)}")


class History:
    """Readings, the rates and scales in force with them, and decisions, in bounded memory.

    When more than ``budget`` readings are held, the first eighth and those at which something
    was decided stay; of the others half as many stay, spread evenly over the steps.

    Args:
        budget: most readings to hold.

    Attributes:
        readings: list of `Reading`, by step.
        decisions: list of `Decision`, by step.
    """

    def __init__(self, budget: int = 4096) -> None:
        if budget < 16:
            raise ValueError(f"budget must be at least 16 readings, got {budget}")
        self.budget = budget
        self.readings: list[Reading] = []
        self.decisions: list[Decision] = []
        self._rates: list[dict[str, float]] = []
        self._scales: list[dict[str, float]] = []
        self._sinks: list[Sink] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sinks": []}  # open files: a copy writes nowhere

    def __len__(self) -> int:
        return len(self.readings)

    def __repr__(self) -> str:
        span = f", steps {self.readings[0].step}–{self.readings[-1].step}" if self.readings else ""
        return f"History({len(self)} readings{span}, {len(self.decisions)} decisions)"

    @property
    def stages(self) -> list[str]:
        """Stage names in the model's order."""
        return list(self.readings[-1].stages) if self.readings else []

    @property
    def steps(self) -> np.ndarray:
        """Optimizer steps done at each reading, int64 ``[readings]``."""
        return np.array([r.step for r in self.readings], dtype=np.int64)

    def series(self, stage: str, name: str) -> np.ndarray:
        """One number of one stage over time, float64 ``[readings]``.

        Args:
            stage: a name in `stages`.
            name: a number of `StageReading`, or ``"rate"`` (the user's learning rate; NaN under
                a bare monitor) or ``"scale"`` (our factor on it, in force for the next step).

        Raises:
            KeyError: no such stage or number.
        """
        self._check_stage(stage)
        if name in _EXTRA:
            rows = self._rates if name == "rate" else self._scales
            return np.array([row.get(stage, np.nan) for row in rows], dtype=float)
        if name not in _NUMBERS:
            raise KeyError(f"no number {name!r}; there are {', '.join(_NUMBERS + _EXTRA)}")
        return np.array([getattr(r.stages[stage], name) for r in self.readings], dtype=float)

    def traces(self) -> dict[str, dict[str, np.ndarray]]:
        """All numbers of each stage over time, each an array ``[readings]``: those of `series`,
        ``"step"``, and ``"twin"``, whether the stage was compared with its untrained twin.
        """
        steps = self.steps
        found = {}
        for stage in self.stages:
            seen = [reading.stages[stage] for reading in self.readings]
            own = {name: np.array([getattr(s, name) for s in seen], float) for name in _NUMBERS}
            own["rate"] = np.array([row.get(stage, np.nan) for row in self._rates], float)
            own["scale"] = np.array([row.get(stage, np.nan) for row in self._scales], float)
            own["step"] = steps
            own["twin"] = np.array([s.estimator == "twin" for s in seen])
            found[stage] = own
        return found

    def histogram(self, stage: str) -> np.ndarray:
        """Counts of ``|a| / rms0`` of one stage over time, int64 ``[readings, BINS]``."""
        self._check_stage(stage)
        if not self.readings:
            return np.zeros((0, BINS), dtype=np.int64)
        return np.stack([r.stages[stage].histogram for r in self.readings])

    def density(self, stage: str) -> np.ndarray:
        """Share of the outputs per octave of magnitude, float64 ``[readings, BINS]``.

        Unlike counts it depends neither on how many outputs were read, which changes when a
        stage's twin is let go, nor on the widths of the bins. The two outer bins, which have no
        end, count as wide as their neighbours (`BOUNDS`).
        """
        counts = self.histogram(stage)
        return counts / np.maximum(counts.sum(1, keepdims=True), 1) / np.diff(np.log2(BOUNDS))

    def record(
        self,
        reading: Reading,
        rates: Mapping[str, float] | None = None,
        scales: Mapping[str, float] | None = None,
        decisions: list[Decision] | tuple[Decision, ...] = (),
    ) -> None:
        """Add a reading, the user's rates and our scales after it, and what was decided at it."""
        self.readings.append(reading)
        self._rates.append(dict(rates or {}))
        self._scales.append(dict(scales or {}))
        self.decisions.extend(decisions)
        if len(self) > self.budget:
            self._thin()
        offer(self._sinks, reading, self._rates[-1], self._scales[-1], decisions)

    def subscribe(self, sink: Sink) -> None:
        """Write each further reading to ``sink`` as it is recorded, whatever is thinned out later.

        A sink that raises is removed with one RuntimeWarning, and training goes on. Sinks are not
        part of checkpoints and copies. The caller that created a sink closes it.

        Args:
            sink: a `densitylr.history.sinks.Sink`, of `densitylr.integrations` or one's own.
        """
        self._sinks.append(sink)

    def unsubscribe(self, sink: Sink) -> None:
        """Write nothing more to ``sink``; nothing happens if it is not, or no longer, known."""
        self._sinks = [known for known in self._sinks if known is not sink]

    def observations(self) -> list[tuple[Reading, dict[str, float], dict[str, float]]]:
        """Each reading with the user's rates and the scales in force after it."""
        return list(zip(self.readings, self._rates, self._scales, strict=True))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed ``.npz`` of plain arrays, in one piece or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        stages = self.stages
        meta = {
            "format": _FORMAT,
            "budget": self.budget,
            "stages": stages,
            "decisions": [_plain(d) for d in self.decisions],
            "estimators": [[r.stages[s].estimator for s in stages] for r in self.readings],
        }
        arrays: dict[str, Any] = {
            name: np.array([self.series(s, name) for s in stages]) for name in (*_NUMBERS, *_EXTRA)
        }
        arrays["histogram"] = np.array([self.histogram(s) for s in stages], dtype=np.int64)
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with open(partial, "wb") as file:
                np.savez_compressed(
                    file, allow_pickle=False, steps=self.steps, meta=json.dumps(meta), **arrays
                )
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a history, or is damaged.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
            meta = json.loads(str(arrays["meta"]))
            if meta["format"] != _FORMAT:
                raise ValueError(f"format {meta['format']}, this version reads {_FORMAT}")
            history = cls(meta["budget"])
            for i, step in enumerate(arrays["steps"]):
                stages = {}
                for k, stage in enumerate(meta["stages"]):
                    # A file written before a number existed goes without it.
                    read = [n for n in _NUMBERS if n in arrays]
                    numbers: dict[str, Any] = {n: float(arrays[n][k, i]) for n in read}
                    numbers["count"] = int(numbers["count"])
                    numbers["nonfinite"] = int(numbers["nonfinite"])
                    stages[stage] = StageReading(
                        **numbers,
                        estimator=meta["estimators"][i][k],
                        histogram=arrays["histogram"][k, i],
                    )
                history.readings.append(Reading(int(step), stages))
                for name, rows in (("rate", history._rates), ("scale", history._scales)):
                    values = zip(meta["stages"], arrays[name][:, i], strict=True)
                    rows.append({s: float(v) for s, v in values if not np.isnan(v)})
            history.decisions = [_decision(d) for d in meta["decisions"]]
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"{os.fspath(path)} is not a readable density history: {error}"
            ) from error
        return history

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a table: one row a reading and stage, with the decision taken there, if any."""
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(TABLE_HEADER)
            for reading, rates, scales in self.observations():
                decided = {d.stage: d for d in self.decisions if d.step == reading.step}
                table.writerows(table_rows(reading, rates, scales, decided))

    def state_dict(self) -> dict[str, Any]:
        """Nothing but the decisions: readings belong in `save`, not in a checkpoint."""
        return {"decisions": [_plain(d) for d in self.decisions]}

    @staticmethod
    def decisions_of(state: Mapping[str, Any]) -> list[Decision]:
        """The decisions in a `state_dict`.

        Raises:
            ValueError: one of them is damaged.
        """
        return [_decision(d) for d in state["decisions"]]

    def begin_with(self, decisions: list[Decision]) -> None:
        """Take the decisions of a checkpoint; readings start anew."""
        self.decisions = list(decisions)
        self.readings, self._rates, self._scales = [], [], []

    def _thin(self) -> None:
        steps, decided = self.steps, {d.step for d in self.decisions}
        early, last = self.budget // 8, len(self) - 1
        even = np.searchsorted(steps, np.linspace(steps[early], steps[last], self.budget // 2))
        chosen = {*range(early), *even.tolist(), last}
        keep = [i for i, step in enumerate(steps.tolist()) if i in chosen or step in decided]
        if len(keep) > self.budget:  # nearly every reading decided something: keep the newest
            keep = keep[:early] + keep[early - self.budget :]
        self.readings = [self.readings[i] for i in keep]
        self._rates = [self._rates[i] for i in keep]
        self._scales = [self._scales[i] for i in keep]

    def _check_stage(self, stage: str) -> None:
        if self.readings and stage not in self.readings[-1].stages:
            raise KeyError(f"no stage {stage!r}; there are {', '.join(self.stages)}")


def _plain(decision: Decision) -> dict[str, Any]:
    """A decision as a dictionary of numbers and strings."""
    cause, numbers = str(decision.cause), dict(decision.numbers)
    return {**dataclasses.asdict(decision), "cause": cause, "numbers": numbers}


def _decision(plain: Mapping[str, Any]) -> Decision:
    """The decision that `_plain` was made from.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found: Decision = restored(Decision, plain)
        str(found)
    except Exception as error:
        raise ValueError(f"a decision is damaged: {error}") from error
    return found
