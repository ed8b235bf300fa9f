"""Every sink: a run that is repaired, written while it runs and read back."""

from __future__ import annotations

import csv
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from densitylr import History, Sink
from densitylr.integrations.csv import CSVSink
from tests.matrix.cells import Cell, need
from tests.matrix.hosts_lightning import looped
from tests.support import hosts

SILENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
}


def cells() -> list[Cell]:
    tried = {
        "CSV": _csv,
        "TensorBoard": _tensorboard,
        "Weights & Biases (offline)": _wandb,
        "MLflow (local)": _mlflow,
    }
    return [Cell("sinks", name, "read back", _in_a_folder(run)) for name, run in tried.items()]


def _in_a_folder(run: Callable[[Path], None]) -> Callable[[], None]:
    def cell() -> None:
        before = dict(os.environ)
        os.environ.update(SILENT)
        try:
            with tempfile.TemporaryDirectory() as folder:
                run(Path(folder))
        finally:
            os.environ.clear()
            os.environ.update(before)

    return cell


def _written(sink: Sink) -> History:
    _, optimizer = looped(factor=1e-4, sinks=[sink])
    sink.close()
    assert optimizer.history.decisions
    return optimizer.history


def _csv(folder: Path) -> None:
    history = _written(CSVSink(folder / "density.csv"))
    with open(folder / "density.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for stage in history.stages:
        read = [float(row["displacement"]) for row in rows if row["stage"] == stage]
        assert read == history.series(stage, "displacement").tolist()


def _tensorboard(folder: Path) -> None:
    need("tensorboard", "tensorboard")
    from densitylr.integrations.tensorboard import TensorBoardSink

    history = _written(TensorBoardSink(folder))
    wanted = {k: float(np.float32(v)) for k, v in hosts.expected(history).items()}
    assert hosts.curves_in(hosts.events(folder)) == wanted


def _wandb(folder: Path) -> None:
    wandb = need("wandb", "wandb")
    from densitylr.integrations.wandb import WandbSink

    with wandb.init(project="density", dir=str(folder)) as run:
        history = _written(WandbSink(run, commit=True))
    rows = {row["densitylr/step"]: row for row in hosts.stored(folder)}
    for (name, step), value in hosts.expected(history).items():
        assert rows[step][name] == value


def _mlflow(folder: Path) -> None:
    mlflow = need("mlflow", "mlflow")
    from densitylr.integrations.mlflow import MLflowSink

    with warnings.catch_warnings():
        # What its own tables say to a newer SQLAlchemy.
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy", DeprecationWarning)
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        with mlflow.start_run() as run:
            history = _written(MLflowSink())
        assert hosts.metrics_of(run.info.run_id) == hosts.expected(history)
