"""Each example runs as it stands, and shows what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


def output_of(example: str, *arguments: str, where: Path) -> str:
    """What an example prints, run in a folder of its own."""
    # MLflow leaves its current experiment in the environment.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *arguments],
        cwd=where,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lightning_bars(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    said = output_of("lightning_bars.py", where=tmp_path)
    fixed, repaired = map(float, re.findall(r"accuracy (\d\.\d+)", said))
    assert repaired > fixed + 0.1
    assert "conv1 is starved since step 2" in said


def test_sinks(tmp_path: Path) -> None:
    for host in ("tensorboard", "wandb", "mlflow"):
        pytest.importorskip(host)
    said = output_of("sinks.py", "here", where=tmp_path)
    assert "lifted off" in said
    written = {path.name for path in (tmp_path / "here").iterdir()}
    assert written == {"density.csv", "tensorboard", "wandb", "mlflow.db"}
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
