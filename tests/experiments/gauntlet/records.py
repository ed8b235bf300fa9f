"""Made-up records of the gauntlet: one function a record, and a whole gauntlet of them."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]

ILL = {  # of the network gru, whose stages are first, second and head
    "geometric-1e-3": ("first",),
    "geometric-1e-6": ("first", "second"),
    "one-first": ("first",),
    "all-1e-4": ("first", "second", "head"),
    "hot-all-100": ("first", "second", "head"),
    "hot-middle-100": ("second",),
    "spike": ("first", "second", "head"),
    "poison": ("first", "second", "head"),
    "rate-zero": ("first",),
    "gain-100": ("first",),
}
KIND = {
    "geometric": "starved",
    "one": "starved",
    "all": "starved",
    "hot": "hot",
    "spike": "collapsed",
    "poison": "collapsed",
    "rate": "frozen",
    "gain": "bad gain",
}


def names_of(condition: str) -> list[list[Any]]:
    """What would be named rightly, five steps after the onset."""
    onset = 60 if condition in ("spike", "poison") else 0
    kind = KIND.get(condition.split("-")[0], "")
    return [[stage, kind, onset + 5] for stage in ILL.get(condition, ())]


def record(
    condition: str = "flat",
    arm: str = "fixed",
    accuracy: float = 0.8,
    seed: int = 0,
    net: str = "gru",
    optimizer: str = "sgd",
    **changes: Any,
) -> Record:
    """A run; with an arm other than ``fixed``, what a controller adds to it."""
    made: Record = {
        "net": net,
        "optimizer": optimizer,
        "condition": condition,
        "arm": arm,
        "seed": seed,
        "batch": 32,
        "steps": 150,
        "schedule": "cosine",
        "start": 1.0,
        "rate": None,
        "accuracy": accuracy,
        "test_loss": round(2 - accuracy, 5),
        "train_loss": 1.5,
        "weights": f"{net}-{optimizer}-{condition}-{seed}",
        "seconds": 1.0,
    }
    if arm != "fixed":
        names = names_of(condition)
        made |= {"named": names, "named_at_end": names, "decisions": 0, "raised": []}
        made["scales"] = {"first": 1.0, "second": 1.0, "head": 1.0}
    return made | changes


def gauntlet() -> list[Record]:
    """All families and arms, and everything well."""
    records = []
    for optimizer in ("sgd", "adamw"):
        for seed in (0, 1):
            at = {"seed": seed, "optimizer": optimizer}
            for steps in (60, 150, 300):
                records.append(record(steps=steps, **at))
            for name in ("flat", "usable"):
                records += [record(name, arm, steps=60, **at) for arm in ("fixed", "repair")]
            records += [record("pretrained", arm, **at) for arm in ("fixed", "repair")]
            for name in ("geometric-1e-3", "geometric-1e-6", "one-first"):
                records.append(record(name, accuracy=0.4, **at))
                for arm, accuracy in (("repair", 0.8), ("density", 0.8), ("fastai", 0.6)):
                    records.append(record(name, arm, accuracy, **at))
            for name in ("all-1e-4", "hot-all-100", "hot-middle-100", "rate-zero", "gain-100"):
                records.append(record(name, accuracy=0.2, **at))
                records.append(record(name, "repair", 0.2, **at))
            for name in ("all-1e-4", "hot-all-100"):
                records += [record(name, arm, 0.7, **at) for arm in ("warmup", "free")]
            for start in (1e-4, 1e-2, 1.0):
                records.append(record(arm="free", accuracy=0.75, steps=300, start=start, **at))
            records.append(record(arm="prodigy", accuracy=0.85, steps=300, **at))
            for name in ("spike", "poison"):
                for arm, accuracy in (("fixed", 0.1), ("repair", 0.1), ("recover", 0.79)):
                    records.append(record(name, arm, accuracy, **at))
    unique = {str([v for k, v in r.items() if k in list(r)[:10]]): r for r in records}
    return list(unique.values())
