"""Readings and decisions in MLflow."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

import mlflow
from mlflow.entities import Metric, RunTag

from densitylr.history import Decision, Reading, scalars

__all__ = ["MLflowSink"]

_METRICS, _TAGS = 1000, 100
"""Most that MLflow takes at once."""


class MLflowSink:
    """Scalars as metrics, and each decision as a tag ``prefix.decision.<step>.<stage>``.

    MLflow has no histograms, so none are written. Characters that it does not allow in a name
    become underscores.

    Args:
        run_id: the run; the active one by default.
        prefix: what all names begin with.

    Raises:
        ValueError: there is no active run.
    """

    def __init__(self, run_id: str | None = None, prefix: str = "densitylr") -> None:
        if run_id is None:
            active = mlflow.active_run()
            if active is None:
                raise ValueError(
                    "there is no active MLflow run: call mlflow.start_run first, or pass run_id"
                )
            run_id = active.info.run_id
        self.run_id, self.prefix = run_id, prefix
        self._client = mlflow.MlflowClient()

    def write(
        self,
        reading: Reading,
        rates: Mapping[str, float],
        scales: Mapping[str, float],
        decisions: Sequence[Decision],
    ) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(_allowed(name), value, now, reading.step)
            for name, value in scalars(reading, rates, scales, self.prefix).items()
        ]
        for i in range(0, len(metrics), _METRICS):
            self._client.log_batch(self.run_id, metrics=metrics[i : i + _METRICS], synchronous=True)
        tags = [
            RunTag(_allowed(f"{self.prefix}.decision.{d.step}.{d.stage}"), f"{d.kind}: {d.reason}")
            for d in decisions
        ]
        for i in range(0, len(tags), _TAGS):
            self._client.log_batch(self.run_id, tags=tags[i : i + _TAGS], synchronous=True)

    def close(self) -> None:
        """Everything is written at once, and the run is the user's to end."""


def _allowed(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)
