"""Train one arm, or with ``--multirun`` many: ``python -m experiments.train profile=geometric``."""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.train.config import register
from experiments.train.execute import run

register()


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    try:
        overrides = hydra_config.overrides.task
        run(raw, " ".join(["python -m experiments.train", *overrides]))
    except (ValueError, FileNotFoundError, ImportError) as error:
        # One clear line instead of Hydra's traceback: these are the user's to mend.
        print(f"error: {error}", file=sys.stderr)
        if hydra_config.mode == RunMode.MULTIRUN:
            raise  # the launcher goes on with the other jobs and ends with this error
        sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(
            "stopped: what was finished is kept, and the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(130)
