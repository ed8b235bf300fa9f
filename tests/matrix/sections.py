"""The sections of the matrix, each a module here with a function ``cells()``."""

from __future__ import annotations

import importlib

from tests.matrix.cells import Cell

__all__ = ["SECTIONS", "cells_of"]

SECTIONS = (
    "optimizers",
    "schedulers",
    "loop",
    "lifecycle",
    "compiling",
    "checkpoints",
    "cuda",
    "distributed",
    "hosts",
    "hosts_lightning",
    "sinks",
)


def cells_of(section: str) -> list[Cell]:
    """The cells of a section, in the order of the table; two of one name are an error."""
    found: list[Cell] = importlib.import_module(f"tests.matrix.{section}").cells()
    names = [str(cell) for cell in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"cells with one name: {twice}")
    return found
