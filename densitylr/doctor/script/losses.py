"""The losses of a script, read where it calls ``backward()`` on them."""

from __future__ import annotations

import functools
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

from densitylr.doctor.script.source import line_in_script

__all__ = ["SEED", "Losses", "seed_all"]

SEED = 0


def seed_all(seed: int = SEED) -> None:
    """Seed ``random``, numpy and torch; a script that seeds them itself has the last word."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


class Losses:
    """Records every scalar on which ``backward()`` is called, by the line that calls it.

    What is recorded is what was handed over: a loss divided for accumulation, or multiplied by a
    ``GradScaler``, stays so.

    Attributes:
        values: the numbers by ``"file:line"``, in the order of the calls.
    """

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def attach(self) -> None:
        """Begin, for the rest of the process."""
        import torch

        original, values = torch.Tensor.backward, self.values

        @functools.wraps(original)
        def backward(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if tensor.numel() == 1:
                values.setdefault(line_in_script(), []).append(float(tensor.detach()))
            return original(tensor, *args, **kwargs)

        torch.Tensor.backward = backward  # type: ignore[assignment,method-assign]

    def save(self, path: Path, verdicts: list[str]) -> None:
        """Write them with the verdicts on the models, as JSON."""
        text = json.dumps({"losses": self.values, "verdicts": verdicts})
        path.write_text(text, encoding="utf-8")


def last_tenth(values: list[float]) -> float:
    """The mean of the last tenth of the values, of one at least; NaN where one is not finite."""
    end = values[-max(1, len(values) // 10) :]
    return sum(end) / len(end) if all(map(math.isfinite, end)) else math.nan


def read(path: Path) -> dict[str, Any]:
    """What `Losses.save` wrote; empty where nothing was written."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        print(f"densitylr: nothing was recorded in {path.stem}", file=sys.stderr)
        return {"losses": {}, "verdicts": []}
    return found
