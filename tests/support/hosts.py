"""What the hosts of the sinks hold, read back by their own readers where there is one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from densitylr import History

NUMBERS = ("near_zero", "untrained", "displacement", "rms", "nonfinite")
"""Those of a reading that are shown as curves."""


def expected(history: History) -> dict[tuple[str, int], float]:
    """The curves by name and step, taken from the history's own series."""
    curves = {}
    for number in (*NUMBERS, "rate", "scale"):
        for stage in history.stages:
            values = history.series(stage, number)
            for step, value in zip(history.steps.tolist(), values.tolist(), strict=True):
                curves[f"densitylr/{number}/{stage}", step] = value
    return curves


def events(folder: Path) -> Any:
    """The events of TensorBoard below a folder, all of them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}
    )
    found.Reload()
    return found


def curves_in(found: Any) -> dict[tuple[str, int], float]:
    """Scalars by name and step, of what `events` returned."""
    return {
        (tag, event.step): event.value
        for tag in found.Tags()["scalars"]
        for event in found.Scalars(tag)
    }


def records_in(path: Path) -> list[bytes]:
    """The records of a .wandb file: a LevelDB log with a file header of seven bytes.

    A record is cut to fit into blocks of 32 KiB; each piece begins with its check sum, length
    and kind: whole, first, middle, last.
    """
    data, block, header = path.read_bytes(), 2**15, 7
    assert data[:4] == b":W&B"
    records, at, parts = [], header, b""
    while at + header <= len(data):
        if block - at % block < header:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):
            records.append(parts)
            parts = b""
    return records


def stored(folder: Path) -> list[dict[str, Any]]:
    """The rows of the one offline run below a folder, from its .wandb file."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # whoever writes the file may do so after run.finish
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in records_in(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def metrics_of(run_id: str) -> dict[tuple[str, int], float]:
    """The metrics of an MLflow run by name and step."""
    import mlflow

    client = mlflow.MlflowClient()
    return {
        (name, point.step): point.value
        for name in client.get_run(run_id).data.metrics
        for point in client.get_metric_history(run_id, name)
    }
