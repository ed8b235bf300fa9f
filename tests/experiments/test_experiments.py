"""The experiments: configs, data, arms, loop and the run folder, on small real trainings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig
from sklearn.metrics import accuracy_score, f1_score

from densitylr import History, find_stages
from experiments.train import execute as train_module
from experiments.train.arms import OptimizerConfig, ProfileConfig, build_optimizer, profile_rates
from experiments.train.config import check, register
from experiments.train.loop import batches, evaluate
from experiments.train.tasks import DataConfig, ModelConfig, build_model, fingerprint
from experiments.train.tasks import data as data_module
from tests.support import ROOT

CONF = ROOT / "conf"
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("suite", "launch")  # launchers are optional: test_sweeps.py
)
SUITES = sorted(path.stem for path in CONF.glob("suite/*.yaml"))
register()
SMALL = ["model.width=0.125", "data.batch_size=32", "eval_every=100"]


def configured(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def run(tmp_path: Path, *overrides: str) -> dict:
    return train_module.run(configured(*SMALL, *overrides, f"output={tmp_path}"))


def folder_of(tmp_path: Path) -> Path:
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    return folder


@pytest.fixture(scope="module")
def dataset() -> data_module.Dataset:
    return data_module.load(DataConfig(name="mnist-sample"))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_makes_a_usable_config(option: str) -> None:
    from omegaconf import OmegaConf

    check(OmegaConf.to_object(configured(option)))


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_is_one_of_cells(suite: str) -> None:
    from omegaconf import OmegaConf

    from experiments.gauntlet.cells import GauntletConfig, expand, register

    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_object(compose("gauntlet", [f"suite={suite}"]))
    assert isinstance(config, GauntletConfig)
    assert expand(config)


def test_the_recover_arm_mends_what_the_repair_arm_names() -> None:
    from experiments.gauntlet.cells import Cell, run_cell

    arms = {
        arm: run_cell(Cell("mlp_shallow", "sgd", "spike", arm)) for arm in ("repair", "recover")
    }
    assert arms["repair"]["accuracy"] < 0.5 < arms["recover"]["accuracy"]
    for record in arms.values():
        assert ["1", "collapsed", 65] in record["named_at_end"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("profile.ratio=3", "profile.ratio must be in (0, 1], got 3.0"),
        ("profile.name=steep", "profile.name must be one of flat"),
        ("optimizer.lr=0", "optimizer.lr must be positive, got 0.0"),
        ("controller.mode=repare", "controller.mode must be one of repair, warmup, free"),
        ("max_steps=0", "max_steps must be positive or null, got 0"),
        ("profile=one_stage profile.stage=conv9", "profile.stage must be one of conv1"),
    ],
)
def test_a_wrong_value_is_named_before_anything_runs(
    tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        run(tmp_path, *override.split())
    assert words in str(error.value)


def test_a_wrong_key_is_one_clear_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", "optimizer.rate=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "Key 'rate' not in 'OptimizerConfig'" in done.stderr


def test_the_bundled_sample_is_small_and_whole(dataset: data_module.Dataset) -> None:
    assert dataset.train_x.shape == (10_000, 1, 28, 28)
    assert dataset.test_x.shape == (2_000, 1, 28, 28)
    assert set(dataset.train_y.tolist()) == set(dataset.test_y.tolist()) == set(range(10))
    assert abs(dataset.train_x.mean()) < 0.05
    assert abs(dataset.train_x.std() - 1) < 0.05
    assert sum(p.stat().st_size for p in data_module.SAMPLE.rglob("*.gz")) < 3_000_000


def test_no_data_and_no_network_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(data_module, "MNIST", unreachable)
    with pytest.raises(FileNotFoundError, match="data=mnist_sample"):
        data_module.load(DataConfig(name="mnist", root="nowhere"))


@given(n=st.integers(1, 200), size=st.integers(1, 50), seed=st.integers(0, 5))
def test_batches_are_full_disjoint_and_seeded(n: int, size: int, seed: int) -> None:
    first = list(batches(n, size, 2, seed))
    again = list(batches(n, size, 2, seed))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    per_epoch = n // size
    assert len(first) == 2 * per_epoch
    for epoch in (first[:per_epoch], first[per_epoch:]):
        seen = [i for batch in epoch for i in batch.tolist()]
        assert len(seen) == len(set(seen)) == per_epoch * size
        assert set(seen) <= set(range(n))


def test_the_metrics_are_scikit_learns() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 4)
    x, y = torch.randn(97, 5), torch.randint(0, 4, (97,))
    got = evaluate(model, x, y, batch_size=10)
    logits = model(x).detach()
    predicted = logits.argmax(1)
    assert got["accuracy"] == pytest.approx(accuracy_score(y, predicted))
    assert got["macro_f1"] == pytest.approx(f1_score(y, predicted, average="macro"))
    log_p = logits.double().log_softmax(1)
    assert got["test_loss"] == pytest.approx(-log_p[torch.arange(97), y].mean().item(), rel=1e-5)
    assert model.training


@pytest.fixture(scope="module")
def stages() -> dict:
    return find_stages(build_model(ModelConfig(name="resnet18", width=0.125)))


@given(ratio=st.floats(1e-6, 1.0), lr=st.floats(1e-6, 1.0))
def test_profiles_are_what_they_say(stages: dict, ratio: float, lr: float) -> None:
    names = list(stages)

    def rates(name: str, **more: object) -> np.ndarray:
        config = ProfileConfig(name=name, ratio=ratio, **more)
        found = profile_rates(config, lr, stages)
        assert list(found) == names
        return np.array(list(found.values())) / lr

    np.testing.assert_allclose(rates("flat"), 1)
    np.testing.assert_allclose(rates("geometric"), np.geomspace(ratio, 1, 6), rtol=1e-9)
    np.testing.assert_allclose(rates("slice"), [0.1] * 5 + [1])
    one = rates("one-stage", stage="conv3_x")
    np.testing.assert_allclose(one, [1, 1, ratio, 1, 1, 1])
    drawn = rates("random", seed=3)
    assert ((drawn >= ratio * (1 - 1e-9)) & (drawn <= 1 + 1e-9)).all()
    np.testing.assert_array_equal(drawn, rates("random", seed=3))


def test_every_parameter_has_the_rate_of_its_stage() -> None:
    model = build_model(ModelConfig(name="resnet18", width=0.125))
    stages = find_stages(model)
    rates = profile_rates(ProfileConfig(name="geometric", ratio=1e-3), 0.1, stages)
    optimizer = build_optimizer(OptimizerConfig(name="sgd", lr=0.1), rates, stages)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    conv1 = next(g for g in optimizer.param_groups if g["name"] == "conv1")
    assert conv1["lr"] == pytest.approx(1e-4)
    assert {id(p) for p in conv1["params"]} == {
        id(p) for p in [*model.conv1.parameters(), *model.bn1.parameters()]
    }


def test_the_narrow_network_is_the_wide_one_with_fewer_channels() -> None:
    wide = build_model(ModelConfig(name="resnet18"))
    narrow = build_model(ModelConfig(name="resnet18", width=0.25))
    assert [n for n, _ in wide.named_parameters()] == [n for n, _ in narrow.named_parameters()]
    assert narrow.conv1.weight.shape == (16, 1, 7, 7)
    assert narrow(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_repair_on_a_flat_rate_changes_nothing(tmp_path: Path, optimizer: str) -> None:
    common = [f"optimizer={optimizer}", "max_steps=12"]
    fixed = run(tmp_path, *common)
    repair = run(tmp_path, *common, "controller=density")
    assert fixed["hashes"] == repair["hashes"]
    assert repair["diagnoses"] == []
    assert fixed["final"] == repair["final"]


def test_arms_of_a_seed_start_alike_and_see_the_same_batches(tmp_path: Path) -> None:
    arms = [
        run(tmp_path, "max_steps=3", *arm)
        for arm in ([], ["profile=geometric", "controller=density"], ["controller=free"])
    ]
    other = run(tmp_path, "max_steps=3", "seed=1")
    for key in ("initial", "batches"):
        assert len({arm["hashes"][key] for arm in arms}) == 1
        assert other["hashes"][key] != arms[0]["hashes"][key]
    assert len({arm["hashes"]["final"] for arm in arms}) == 3


def test_the_story_conv1_is_named_and_repaired(tmp_path: Path) -> None:
    record = run(tmp_path, "profile=geometric", "controller=density", "max_steps=45", "seed=7")
    named = {d["stage"]: d for d in record["diagnoses"]}
    assert named["conv1"]["kind"] == "starved"
    assert named["conv1"]["since_step"] <= 40
    assert record["scales"]["conv1"] >= 16
    assert record["scales"]["fc"] == 1
    history = History.load(folder_of(tmp_path) / "history.npz")
    assert history.series("conv1", "displacement")[-1] > 0.1  # lifted off
    assert history.steps.tolist() == [*range(0, 20, 2), *range(20, 45, 5)]


def test_a_finished_run_is_not_run_again_and_a_killed_one_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(tmp_path, "max_steps=2")
    folder = folder_of(tmp_path)
    assert {p.name for p in folder.iterdir() if not p.name.startswith(".")} == {
        "config.yaml",
        "history.npz",
        "metrics.csv",
        "run.json",
    }
    stamp = (folder / "run.json").stat().st_mtime_ns
    assert run(tmp_path, "max_steps=2") == first
    assert "as before" in capsys.readouterr().out
    assert (folder / "run.json").stat().st_mtime_ns == stamp
    (folder / "run.json").unlink()
    again = run(tmp_path, "max_steps=2")
    assert again["hashes"] == first["hashes"]
    assert run(tmp_path, "max_steps=2", "force=true")["hashes"] == first["hashes"]


def test_a_diverged_run_is_an_outcome(tmp_path: Path) -> None:
    record = run(tmp_path, "optimizer.lr=1e12", "optimizer.schedule=constant", "max_steps=20")
    assert record["status"] == "diverged"
    assert record["steps"] < 20
    assert 0 <= record["final"]["accuracy"] <= 0.3
    on_disk = json.loads((folder_of(tmp_path) / "run.json").read_text())
    assert on_disk["final"]["test_loss"] is None


def test_a_bug_is_recorded_and_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(train_module, "train", broken)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "max_steps=2")
    record = json.loads((folder_of(tmp_path) / "run.json").read_text())
    assert record["status"] == "failed"
    assert "ZeroDivisionError: a bug" in record["reason"]
    assert "broken" in record["traceback"]
    monkeypatch.undo()
    assert run(tmp_path, "max_steps=2")["status"] == "done"


def test_the_ablation_raises_rates_without_density(tmp_path: Path) -> None:
    record = run(
        tmp_path,
        "profile=geometric",
        "profile.ratio=1e-5",
        "controller=update_ratio",
        "max_steps=12",
    )
    history = History.load(folder_of(tmp_path) / "history.npz")
    decided = [d.scale for d in history.decisions if d.stage == "conv1"]
    assert decided == [4.0 ** (i + 1) for i in range(len(history) - 1)]  # all probes but the first
    assert record["scales"]["conv1"] == decided[-1]
    assert all("update / weight" in d.reason for d in history.decisions)


def test_a_fingerprint_sees_one_bit() -> None:
    model = torch.nn.Linear(3, 3)
    before = fingerprint(model)
    with torch.no_grad():
        model.weight[1, 2] = torch.nextafter(model.weight[1, 2], torch.tensor(9.0))
    assert fingerprint(model) != before


def test_the_command_line_trains_and_reports(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.train", "--multirun", *SMALL]
    command += ["max_steps=2", "threads=1", "profile=flat,geometric", f"output={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "flat/fixed sgd seed 0: done, accuracy" in done.stdout
    command = [sys.executable, "-m", "experiments.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.splitlines()[-1].split()[-1])
    assert "geometric/fixed" in path.read_text(encoding="utf-8")
