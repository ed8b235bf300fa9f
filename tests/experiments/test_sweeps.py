"""Sweeps: other launchers, jobs that fail, kills at random moments, and two sweeps at once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.kill_test import kill_repeatedly
from experiments.train import execute as train_module
from experiments.train.config import register
from experiments.train.runs import find_runs
from tests.support import ROOT

TINY = ["model.width=0.125", "data.batch_size=16", "eval_every=100", "max_steps=2", "threads=1"]
register()
LAUNCHERS = {"cores": "joblib", "slurm_local": "submitit", "ray": "ray"}


def train(output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.train", "--multirun", *TINY, *overrides]
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(
        [*command, f"output={output}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | quiet,
    )


def run_here(output: Path, *overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return train_module.run(compose("config", [*TINY, *overrides, f"output={output}"]))


@pytest.mark.parametrize("launch", LAUNCHERS)
def test_a_job_that_fails_leaves_the_others_running(tmp_path: Path, launch: str) -> None:
    package = f"hydra_plugins.hydra_{LAUNCHERS[launch]}_launcher"
    try:
        missing = importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        missing = True
    if missing:
        pytest.skip(f"{package} is not installed (extra sweeps)")
    # The first jobs are the ones that fail.
    stages = "profile.stage=conv9,conv1"
    done = train(tmp_path, f"launch={launch}", "profile=one_stage", stages, "seed=0,1")
    assert done.returncode == 1
    runs = {(run.config["profile"]["stage"], run.seed): run for run in find_runs([tmp_path])}
    assert {job: run.status for job, run in runs.items()} == {
        ("conv9", 0): "failed",
        ("conv9", 1): "failed",
        ("conv1", 0): "done",
        ("conv1", 1): "done",
    }
    assert "profile.stage must be one of conv1" in runs["conv9", 0].reason
    for trace in (found := list(tmp_path.glob("*/traceback.txt"))):
        assert "in profile_rates" in trace.read_text(encoding="utf-8")
    assert len(found) == 2
    assert all(run.config["threads"] == 1 for run in runs.values())
    alone = run_here(tmp_path / "alone", "profile=one_stage", "profile.stage=conv1")
    assert runs["conv1", 0].hashes == alone["hashes"]


def test_a_serial_sweep_goes_on_after_a_job_that_fails(tmp_path: Path) -> None:
    done = train(tmp_path, "profile=one_stage", "profile.stage=conv9,conv1")
    assert done.returncode == 1
    assert sorted(run.status for run in find_runs([tmp_path])) == ["done", "failed"]
    assert "traceback.txt" in done.stderr


def test_a_slurm_job_asks_for_the_cores_it_uses() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", ["launch=slurm", "threads=3"], return_hydra_config=True)
    assert config.hydra.launcher._target_.endswith("SlurmLauncher")
    assert config.hydra.launcher.cpus_per_task == config.threads == 3


def test_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    tally = kill_repeatedly(3, tmp_path)
    assert (tally.kills, tally.lost, tally.double, tally.broken) == (3, 0, 0, 0)
    assert str(tally).startswith("3 kills, 0 lost, 0 double")


@pytest.mark.parametrize("name", ["run.json", "metrics.csv", "history.npz"])
def test_a_damaged_result_is_trained_again(tmp_path: Path, name: str) -> None:
    first = run_here(tmp_path)
    (record,) = tmp_path.glob("*/run.json")
    damaged = record.with_name(name)
    damaged.write_bytes(damaged.read_bytes()[:-40])
    assert find_runs([tmp_path])[0].status == "broken"
    again = run_here(tmp_path)
    assert again["hashes"] == first["hashes"]
    assert find_runs([tmp_path])[0].status == "done"
    assert json.loads(record.read_text(encoding="utf-8")) == again


def test_what_a_killed_run_left_half_written_is_cleared(tmp_path: Path) -> None:
    run_here(tmp_path)
    (record,) = tmp_path.glob("*/run.json")
    partial = record.with_name(".history.npz.7.partial")
    partial.write_bytes(b"half")
    record.unlink()
    run_here(tmp_path)
    assert record.exists()
    assert not partial.exists()


def test_two_sweeps_at_once_do_a_run_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.train", *TINY, "max_steps=30"]
    both = [
        subprocess.Popen(
            [*command, f"output={tmp_path}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    assert sum("as before" in words for words in said) == 1
    assert all("done, accuracy" in words for words in said)
