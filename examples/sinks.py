"""A run that is repaired, written to every sink that is installed, while it runs.

``python examples/sinks.py [FOLDER]`` trains a small network whose first layer has a rate ten
thousand times too small, and writes what was seen and decided below FOLDER (``outputs/sinks``)
as CSV, and for TensorBoard, Weights & Biases (offline) and MLflow (a local file) where those are
installed: ``pip install 'densitylr[tensorboard,wandb,mlflow]'``. It calls no network.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from densitylr import DensityLR, Sink
from densitylr.integrations.csv import CSVSink


@contextmanager
def tensorboard(folder: Path) -> Iterator[Sink]:
    from densitylr.integrations.tensorboard import TensorBoardSink

    sink = TensorBoardSink(folder / "tensorboard")
    yield sink
    sink.close()
    print(f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")


@contextmanager
def wandb(folder: Path) -> Iterator[Sink]:
    import wandb

    from densitylr.integrations.wandb import WandbSink

    with wandb.init(project="densitylr", mode="offline", dir=str(folder)) as run:
        yield WandbSink(run, commit=True)  # nothing else logs to this run
        rows = run.step
    print(f"Weights & Biases: {rows} rows in {folder / 'wandb'}")


@contextmanager
def mlflow(folder: Path) -> Iterator[Sink]:
    import mlflow

    from densitylr.integrations.mlflow import MLflowSink

    store = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(store)
    with mlflow.start_run() as run:
        yield MLflowSink()
    found = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    print(f"MLflow: {len(found)} metrics; mlflow ui --backend-store-uri {store}")


def train(sinks: list[Sink]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    groups = [{"params": model[0].parameters(), "lr": 1e-5}, {"params": model[2:].parameters()}]
    optimizer = DensityLR(torch.optim.SGD(groups, lr=1e-1, momentum=0.9), model)
    for sink in sinks:
        optimizer.history.subscribe(sink)
    for step in range(201):
        x = torch.randn(128, 20)
        loss = nn.functional.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    print(*optimizer.history.decisions, sep="\n")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/sinks")
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", WANDB_SILENT="true")
    sinks: list[Sink] = [CSVSink(folder / "density.csv")]
    with ExitStack() as open_sinks:
        for host in (tensorboard, wandb, mlflow):
            if importlib.util.find_spec(host.__name__):
                sinks.append(open_sinks.enter_context(host(folder)))
            else:
                print(f"{host.__name__} is not installed: nothing is written for it")
        train(sinks)
    print(f"CSV: {len((folder / 'density.csv').read_text().splitlines()) - 1} rows in {folder}")


if __name__ == "__main__":
    main()
