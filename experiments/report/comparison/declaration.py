"""What a study declared before its runs, and whether the runs kept to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.train.runs import Run

__all__ = ["LABELS", "Study", "discrepancies", "judged_on", "study_of", "when"]

LABELS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "test_loss": "loss",
    "steps": "steps to target",
}


@dataclass(frozen=True)
class Study:
    """What was declared before the runs; None where nothing was.

    Attributes:
        title, declared: text.
        primary: the metric the verdict rests on.
        reference: the arm that shows what was possible.
        baseline, treated: the arms compared.
        harmless: the arm that must equal the reference.
        smallest_effect: the smallest difference of the primary metric that matters.
        written: the day on which this was written, ISO 8601.
        target: share of the reference's mean accuracy that counts as reached.
        tuning_seeds: seeds that chose the fixed rate and are compared with nothing else.
    """

    title: str = "Controlled against fixed learning rates"
    declared: str | None = None
    primary: str = "accuracy"
    reference: str = "flat/fixed"
    baseline: str | None = None
    treated: str | None = None
    harmless: str | None = None
    smallest_effect: float | None = None
    written: str | None = None
    target: float = 0.95
    tuning_seeds: tuple[int, ...] = ()


def study_of(runs: Sequence[Run]) -> tuple[Study, list[str]]:
    """The declaration the runs carry, and what is wrong with it."""
    found = [s for run in runs if isinstance(s := run.config.get("study"), dict)]
    if not found:
        return Study(), []
    notes = []
    if any(s != found[0] for s in found):
        notes.append("The runs carry different declarations; the first one is used.")
    known = {k: v for k, v in found[0].items() if k in Study.__dataclass_fields__ and v is not None}
    if known.get("primary", "accuracy") not in LABELS:
        notes.append(f"The declared metric {known.pop('primary')!r} is unknown; accuracy is used.")
    numbers = {"smallest_effect": _positive, "target": _positive, "tuning_seeds": _seeds}
    for name, read in numbers.items():
        if name in known and (value := read(known.pop(name))) is not None:
            known[name] = value
    for name in known.keys() - numbers.keys():
        known[name] = str(known[name])
    return Study(**known), notes


def when(study: Study, runs: Sequence[Run]) -> tuple[str, bool]:
    """When the declaration was written, against the runs' own clocks, and whether that is amiss."""
    began = sorted(run.started for run in runs if run.started)
    first = f"the first run started {began[0]}" if began else "no run says when it started"
    if study.written is None:
        return f"When this was written is not recorded; {first}.", False
    early = [at for at in began if at[:10] < study.written[:10]]
    if early:
        return (
            f"Written {study.written}, but {len(early)} of {len(began)} runs started before that "
            f"day, the first {began[0]}: for those it was no declaration.",
            True,
        )
    return f"Written {study.written}; {first}.", False


def judged_on(runs: Sequence[Run]) -> str:
    """What accuracy, macro-F1 and loss are of, in words: the test set, or held-out examples."""
    data = [d for run in runs if isinstance(d := run.config.get("data"), dict)]
    held = sorted({_positive(d.get("holdout")) is not None for d in data})
    words = ("the test set", "examples held out of the training set; the test set is not touched")
    return " in some runs, in others of ".join(words[h] for h in held) or "unknown examples"


def _positive(value: object) -> float | None:
    try:
        number = abs(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if 0 < number < math.inf else None


def _seeds(value: object) -> tuple[int, ...] | None:
    seeds = value if isinstance(value, list) else []
    return tuple(s for s in seeds if isinstance(s, int) and not isinstance(s, bool))


def discrepancies(runs: Sequence[Run]) -> list[str]:
    """Settings in which runs of one optimizer differ although only arm and seed should."""
    notes = []
    shared, own = (
        ("epochs", "max_steps", "eval_every", "data", "model", "optimizer"),
        ("profile", "controller"),
    )
    for keys, arms in ((shared, [None]), (own, sorted({r.arm for r in runs}))):
        for arm in arms:
            settings: dict[str, set[str]] = {}
            for run in runs:
                if arm in (None, run.arm):
                    for key in keys:
                        for name, value in _flat(key, run.config.get(key)):
                            settings.setdefault(name, set()).add(value)
            for name, values in sorted(settings.items()):
                if len(values) > 1:
                    where = f" within {arm}" if arm else ""
                    notes.append(f"{name} is not the same{where}: {', '.join(sorted(values))}")
    return notes


def _flat(name: str, value: object) -> list[tuple[str, str]]:
    if not isinstance(value, dict):
        return [(name, str(value))]
    # Where the data lie differs between machines and changes nothing.
    inner = [(k, v) for k, v in value.items() if k not in ("root", "path")]
    return [pair for key, v in inner for pair in _flat(f"{name}.{key}", v)]
