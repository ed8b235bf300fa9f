"""Suites of cells: Hydra checks keys and types of the schema, `expand` the values."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore

from densitylr import find_stages
from experiments.gauntlet.cells.cell import ARMS, OPTIMIZERS, Cell, parse_arm
from experiments.gauntlet.cells.conditions import condition
from experiments.train.arms import LAYERWISE
from experiments.train.tasks import NETS, build

__all__ = ["Block", "GauntletConfig", "expand", "register"]


@dataclass
class Block:
    """Every combination of the lists is a cell; ``random-0..49`` stands for fifty conditions."""

    nets: list[str] = field(default_factory=lambda: list(NETS))
    optimizers: list[str] = field(default_factory=lambda: list(OPTIMIZERS))
    conditions: list[str] = field(default_factory=lambda: ["flat"])
    arms: list[str] = field(default_factory=lambda: ["fixed", "repair"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    batches: list[int] = field(default_factory=lambda: [32])
    starts: list[float] = field(default_factory=lambda: [1.0])
    steps: int = 150
    schedule: str = "cosine"


@dataclass
class GauntletConfig:
    title: str = "Gauntlet"
    blocks: dict[str, Block] = field(default_factory=dict)
    output: str = "outputs/gauntlet"
    workers: int = 2


def register() -> None:
    """Make the schema known to Hydra as ``gauntlet_schema``."""
    ConfigStore.instance().store(name="gauntlet_schema", node=GauntletConfig)


def expand(config: GauntletConfig) -> list[Cell]:
    """All cells of a suite, in order, each once.

    Raises:
        ValueError: a name that does not exist, or a number that cannot be used.
    """
    if config.workers < 1:
        raise ValueError(f"workers must be positive, got {config.workers!r}")
    cells: dict[Cell, None] = {}
    for name, block in config.blocks.items():
        _check(name, block)
        conditions = [c for text in block.conditions for c in _spread(text)]
        for net, optimizer, batch, start in itertools.product(
            block.nets, block.optimizers, block.batches, block.starts
        ):
            for what in conditions:
                if not _exists(net, what):
                    continue
                for seed, arm in itertools.product(block.seeds, block.arms):
                    cell = Cell(
                        net, optimizer, what, arm, seed, batch, block.steps, block.schedule, start
                    )
                    cells[cell] = None
    return list(cells)


def _spread(text: str) -> list[str]:
    found = re.fullmatch(r"(.*-)(\d+)\.\.(\d+)", text)
    if not found:
        return [text]
    return [f"{found[1]}{i}" for i in range(int(found[2]), int(found[3]) + 1)]


def _check(name: str, block: Block) -> None:
    known = {
        "nets": tuple(NETS),
        "optimizers": (*OPTIMIZERS, *LAYERWISE),
    }
    for key, choices in known.items():
        for value in getattr(block, key):
            if value not in choices:
                raise ValueError(
                    f"blocks.{name}.{key}: must be of {', '.join(choices)}, got {value!r}"
                )
    for arm in block.arms:
        if arm not in ARMS:
            try:
                parse_arm(arm)
            except ValueError as error:
                raise ValueError(f"blocks.{name}.arms: {error}") from None
    for key in ("batches", "starts", "seeds"):
        for value in getattr(block, key):
            if value < 0 or (value == 0 and key != "seeds"):
                raise ValueError(f"blocks.{name}.{key}: must be positive, got {value!r}")
    if block.steps < 1:
        raise ValueError(f"blocks.{name}.steps must be positive, got {block.steps!r}")
    if block.schedule not in ("cosine", "constant"):
        raise ValueError(
            f"blocks.{name}.schedule must be cosine or constant, got {block.schedule!r}"
        )
    stages = list(find_stages(build("mlp_deep", 0)))
    for text in block.conditions:
        condition(_spread(text)[0], stages)


def _exists(net: str, what: str) -> bool:
    """Not every condition can be put on every network."""
    if what in ("gelu", "silu", "tanh"):
        return not net.startswith(("resnet", "gru", "gpt"))
    if what == "dropout":
        return net.startswith(("mlp", "cnn"))
    if what == "dead":  # a unit is dead only before a ReLU
        return net.startswith(("mlp", "cnn", "resnet"))
    return True
