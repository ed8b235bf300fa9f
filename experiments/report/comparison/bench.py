"""Arms against each other, seed by seed: which to compare, by what, and what came out.

One `Bench` holds the runs of one optimizer on one task. A `Contrast` sets a controlled arm
against the one with the same learning rates and no controller, with the reference arm as what
was possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from experiments.report.comparison.declaration import LABELS, Study
from experiments.report.comparison.grid import settle
from experiments.report.comparison.stats import (
    Estimate,
    Gap,
    gap_closed,
    holm,
    paired_difference,
    sign_flip_p,
    verdict,
)
from experiments.train.runs import STATUSES, Run

__all__ = ["HIGHER_IS_BETTER", "Bench", "Contrast", "Effect", "benches"]

HIGHER_IS_BETTER = ("accuracy", "macro_f1")


@dataclass(frozen=True)
class Effect:
    """One metric of a contrast.

    Attributes:
        metric: key in `LABELS`.
        treated, baseline: means over the seeds that have both; NaN for none.
        difference: treated minus baseline.
        p: of the sign-flip test; None below two seeds.
        p_holm: adjusted over the secondary metrics; None for the primary one.
        note: what the numbers alone would hide.
    """

    metric: str
    treated: float
    baseline: float
    difference: Estimate
    p: float | None
    p_holm: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Contrast:
    """A treated arm against its baseline.

    Attributes:
        treated, baseline: arms.
        declared: named by the study, and so no afterthought.
        effects: the primary metric first.
        gap: share of the way to the reference; None where the baseline is the reference.
        same, compared: seeds with bit-identical final weights, of those with both hashes.
        sentence: the verdict.
        beside: the verdict on the treated arm against the reference; None as with ``gap``.
        remarks: seeds left out of the primary metric, with the reason, and diverged runs in it.
    """

    treated: str
    baseline: str
    declared: bool
    effects: list[Effect]
    gap: Gap | None
    same: int
    compared: int
    sentence: str
    beside: str | None
    remarks: list[str]


@dataclass
class Bench:
    """The runs of one optimizer on one task.

    Attributes:
        optimizer: its name, with the task where there are several.
        study: what was declared.
        every: all of its runs, mishaps included.
        runs: those at the rate and the ratios that are compared.
        others: those at other ones, or on tuning seeds.
        rate: the compared one; None if unknown.
        arms: names, the declared ones first.
        seeds: every seed seen in any arm: what was planned.
        table: outcomes by arm and seed.
        target: the primary metric at which the target is reached; None without a reference.
    """

    optimizer: str
    study: Study
    every: list[Run]
    runs: list[Run] = field(init=False)
    others: list[Run] = field(init=False)
    rate: float | None = field(init=False)
    arms: list[str] = field(init=False)
    seeds: list[int] = field(init=False)
    table: dict[tuple[str, int], Run] = field(init=False)
    target: float | None = field(init=False)

    def __post_init__(self) -> None:
        study = self.study
        self.runs, self.others = settle(self.every, study)
        self.rate = next((run.rate for run in self.runs if run.rate is not None), None)
        seen = {run.arm for run in self.runs if run.arm}
        named = (study.reference, study.baseline, study.treated, study.harmless)
        self.arms = [a for a in dict.fromkeys(named) if a and a in seen]
        self.arms += sorted(seen - set(self.arms))
        self.seeds = sorted({run.seed for run in self.runs if run.seed is not None})
        self.table = {
            (run.arm, run.seed): run for run in self.runs if run.counts and run.seed is not None
        }
        values = [v for s in self.seeds if (v := self.value(study.reference, s, "accuracy"))]
        self.target = study.target * float(np.mean(values)) if values else None

    def value(self, arm: str, seed: int, metric: str) -> float | None:
        """Final value of a metric, or None; ``"steps"`` is the step that reached the target."""
        run = self.table.get((arm, seed))
        if run is None:
            return None
        return self.steps_to_target(run)[0] if metric == "steps" else run.metric(metric)

    def status(self, arm: str, seed: int) -> str:
        """Status of the outcome of an arm and seed; empty where there is none."""
        return run.status if (run := self.table.get((arm, seed))) else ""

    def steps_to_target(self, run: Run) -> tuple[float | None, bool]:
        """First evaluated step at the target; the last step and True where it was never reached."""
        if self.target is None or run.curves is None or not run.curves["step"].size:
            return None, False
        step, accuracy = run.curves["step"], run.curves["accuracy"]
        reached = np.flatnonzero(accuracy >= self.target)
        return (float(step[reached[0]]), False) if reached.size else (float(step.max()), True)

    def accounting(self) -> list[tuple[str, dict[str, int]]]:
        """For every arm: planned, each status, and never started."""
        rows = []
        for arm in [*self.arms, ""]:
            runs = [run for run in self.runs if run.arm == arm]
            if not arm and not runs:
                continue
            counts = _statuses(runs)
            started = {run.seed for run in runs}
            counts["planned"] = len(self.seeds) if arm else 0
            counts["missing"] = sum(seed not in started for seed in self.seeds) if arm else 0
            rows.append((arm or "unknown arm", counts))
        for arm in sorted({run.arm for run in self.others}):
            counts = _statuses([run for run in self.others if run.arm == arm])
            counts |= {"planned": sum(counts.values()) - counts["duplicate"], "missing": 0}
            rows.append((f"{arm}, other rates or tuning", counts))
        return rows

    def contrasts(self) -> list[Contrast]:
        """The declared contrast first, then every controlled arm against its fixed twin."""
        study = self.study
        pairs: dict[tuple[str, str], bool] = {}
        if study.treated and study.baseline:
            pairs[study.treated, study.baseline] = True
        if study.harmless:
            pairs[study.harmless, study.reference] = True
        reference_profile = study.reference.split("/")[0]
        for arm in sorted(self.arms, key=lambda a: a.split("/")[0] == reference_profile):
            fixed = arm.split("/")[0] + "/fixed"
            if arm != fixed and fixed in self.arms:
                pairs.setdefault((arm, fixed), False)
        return [self._contrast(*pair, declared=declared) for pair, declared in pairs.items()]

    def same_start(self, seed: int) -> tuple[str, str]:
        """Whether the arms of a seed share initial weights and batches: yes, no or unknown."""
        answers = []
        for kind in ("initial", "batches"):
            hashes = [
                run.hashes.get(kind) for arm in self.arms if (run := self.table.get((arm, seed)))
            ]
            known = {h for h in hashes if h}
            if len(known) > 1:
                answers.append("no")
            else:
                answers.append("yes" if len(hashes) > 1 and None not in hashes else "unknown")
        return answers[0], answers[1]

    def _contrast(self, treated: str, baseline: str, declared: bool) -> Contrast:
        study, label = self.study, LABELS[self.study.primary]
        metrics = [study.primary, *(m for m in LABELS if m != study.primary)]
        effects = [self._effect(treated, baseline, metric) for metric in metrics]
        tested = [i for i, e in enumerate(effects) if i and e.p is not None]
        for i, p in zip(tested, holm([effects[i].p or 0.0 for i in tested]), strict=True):
            old = effects[i]
            effects[i] = Effect(
                old.metric, old.treated, old.baseline, old.difference, old.p, p, old.note
            )
        gap = self._gap(treated, baseline)
        beside = None
        if gap is not None:
            difference = self._effect(treated, study.reference, study.primary).difference
            beside = verdict(treated, study.reference, label, difference, study.smallest_effect)
        return Contrast(
            treated,
            baseline,
            declared,
            effects,
            gap,
            *self._identical(treated, baseline),
            verdict(treated, baseline, label, effects[0].difference, study.smallest_effect),
            beside,
            self._remarks((treated, baseline)),
        )

    def _effect(self, treated: str, baseline: str, metric: str) -> Effect:
        pairs = [
            (seed, a, b)
            for seed in self.seeds
            if (a := self.value(treated, seed, metric)) is not None
            and (b := self.value(baseline, seed, metric)) is not None
        ]
        ours, theirs = [p[1] for p in pairs], [p[2] for p in pairs]
        difference = paired_difference(ours, theirs)
        notes = []
        if metric == "steps":
            for arm in (treated, baseline):
                late = sum(self.steps_to_target(self.table[arm, p[0]])[1] for p in pairs)
                if late:
                    notes.append(
                        f"{late} of {len(pairs)} runs of {arm} never reached the target and enter "
                        "with their last step: the means are of the steps within this budget"
                    )
        if len(pairs) > 1 and difference.low == difference.high and difference.effect:
            notes.append("all differences are equal, so the interval has no width")
        return Effect(
            metric,
            float(np.mean(ours)) if ours else math.nan,
            float(np.mean(theirs)) if theirs else math.nan,
            difference,
            sign_flip_p([x - y for x, y in zip(ours, theirs, strict=True)])
            if len(pairs) > 1
            else None,
            note="; ".join(notes),
        )

    def _gap(self, treated: str, baseline: str) -> Gap | None:
        reference = self.study.reference
        if reference not in self.arms or reference in (treated, baseline):
            return None
        columns: list[list[float]] = [[], [], []]
        for seed in self.seeds:
            values = [
                self.value(a, seed, self.study.primary) for a in (treated, baseline, reference)
            ]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                for column, value in zip(columns, known, strict=True):
                    column.append(value)
        return gap_closed(columns[0], columns[1], columns[2])

    def _identical(self, treated: str, baseline: str) -> tuple[int, int]:
        pairs = []
        for seed in self.seeds:
            runs = [self.table.get((arm, seed)) for arm in (treated, baseline)]
            hashes = [run.hashes.get("final") for run in runs if run]
            if len(hashes) == 2 and all(hashes):
                pairs.append(hashes[0] == hashes[1])
        return sum(pairs), len(pairs)

    def _remarks(self, arms: Sequence[str]) -> list[str]:
        metric = LABELS[self.study.primary]
        known = {run.arm for run in self.runs}
        notes = [f"{arm} was run under no seed." for arm in arms if arm not in known]
        for seed in self.seeds:
            for arm in (a for a in arms if a in known):
                value = self.value(arm, seed, self.study.primary)
                status = self.status(arm, seed)
                if value is None:
                    mishaps = [r.status for r in self.runs if (r.arm, r.seed) == (arm, seed)]
                    why = f"{status} without a final {metric}" if status else ""
                    why = why or (mishaps[0] if mishaps else "never started")
                    notes.append(f"Seed {seed} is not in the mean: {arm} {why}.")
                elif status == "diverged":
                    notes.append(f"{arm} diverged with seed {seed} and counts with {value:.4f}.")
        return notes


def _statuses(runs: Sequence[Run]) -> dict[str, int]:
    return {status: sum(run.status == status for run in runs) for status in STATUSES}


def benches(runs: Sequence[Run], study: Study) -> list[Bench]:
    """The runs by task and optimizer; those of which not even that is known belong to none."""
    tasks = sorted({run.task for run in runs if run.optimizer and run.task})
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.optimizer:
            task = run.task or (tasks[0] if len(tasks) == 1 else "")
            found.setdefault((run.optimizer, task), []).append(run)
    several = len({task for _, task in found}) > 1
    return [
        Bench(f"{name}, {task or 'unknown task'}" if several else name, study, found[name, task])
        for name, task in sorted(found)
    ]
