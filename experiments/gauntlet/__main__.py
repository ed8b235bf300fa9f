"""``python -m experiments.gauntlet suite=quick``: train every cell of a suite, and judge."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from experiments.gauntlet.cells import GauntletConfig, expand, register, run_cells
from experiments.gauntlet.page import command_line, write_page

register()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="gauntlet")
def main(raw: DictConfig) -> None:
    config = OmegaConf.to_object(raw)
    assert isinstance(config, GauntletConfig)
    try:
        cells = expand(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    output = Path(config.output)
    try:
        records = list(run_cells(cells, output / "cells.jsonl", config.workers).values())
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from {output / 'cells.jsonl'}", file=sys.stderr)
        sys.exit(130)
    print(f"{len(records)} cells")
    if records:
        write_page(records, config.title, command_line(sys.argv[1:]), output / "report.html", cells)
        print(output / "report.html")


if __name__ == "__main__":
    main()
