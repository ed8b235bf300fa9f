"""One cell of the compatibility matrix: what is tried, and what came out."""

from __future__ import annotations

import importlib
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

__all__ = ["Cell", "Outcome", "UnavailableError", "need", "refusal", "try_cell"]


class UnavailableError(Exception):
    """What a cell needs is not on this machine; the message says what, and why."""


@dataclass(frozen=True)
class Outcome:
    """``kind`` is passed, refused, unavailable or failed; all but the first give a reason."""

    kind: str
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Cell:
    """``run`` returns None where all went well, and `refusal`'s sentence where that was right.

    It raises `UnavailableError` where this machine cannot tell, and anything else where it failed.
    """

    section: str
    row: str
    column: str
    run: Callable[[], str | None]

    def __str__(self) -> str:
        return f"{self.section}: {self.row}: {self.column}"


def need(module: str, extra: str | None = None) -> ModuleType:
    """Import an optional dependency, or say that it is not here.

    Raises:
        UnavailableError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = f"; pip install 'densitylr[{extra}]'" if extra else ""
        raise UnavailableError(f"{module} cannot be imported ({error}){install}") from error


def refusal(act: Callable[[], object]) -> str:
    """The sentence with which ``act`` is refused: a ValueError, TypeError or RuntimeError.

    Raises:
        AssertionError: it was not refused.
    """
    try:
        act()
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    raise AssertionError("this should have been refused, and was not")


def try_cell(cell: Cell) -> Outcome:
    """Run a cell; no exception but those that end the program leaves it."""
    start = time.perf_counter()
    try:
        reason = cell.run()
        kind = "passed" if reason is None else "refused"
    except UnavailableError as why:
        kind, reason = "unavailable", str(why)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind = "failed"
        reason = f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"
    return Outcome(kind, reason or "", time.perf_counter() - start)
