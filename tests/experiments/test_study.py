"""The study: usable parts, packing without loss, a page that is its runs', and fresh tasks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from densitylr import DensityLR, find_stages
from experiments.report.comparison import benches, study_of
from experiments.study import __main__ as study
from experiments.study.packing import load, pack
from experiments.study.tables import FIGURES, TABLES
from experiments.train.config import check, register
from experiments.train.runs import find_runs
from experiments.train.tasks import DataConfig
from experiments.train.tasks import load as load_data
from experiments.train.tasks.fresh import LENGTH, SYMBOLS, brackets, digits, mlp, reader
from tests.experiments.fake_runs import STUDY, fake_run, fake_sweep
from tests.support import ROOT

register()


@pytest.mark.parametrize("part", study.PARTS)
def test_every_job_of_a_part_is_usable_and_declared(part: str) -> None:
    for command in study.commands(part):
        words = command[4:]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose("config", words[:1], return_hydra_config=True)
            params = dict(config.hydra.sweeper.params)
            given = {word.split("=")[0]: word for word in words}
            swept = [f"{key}={value}" for key, value in params.items() if key not in given]
            parsed = OverridesParser.create().parse_overrides([*words, *swept])
            (jobs,) = BasicSweeper.split_arguments(parsed, None)
            for job in (jobs[0], jobs[-1]):
                one = OmegaConf.to_object(compose("config", job))
                check(one)
                assert one.study.declared
                assert one.study.written
                assert one.threads == 1
                tuning = set(one.study.tuning_seeds)
                assert (one.seed in tuning) == ("seed=100,101" in words)


def test_the_story_has_ten_seeds_and_every_arm() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", ["experiment=story"], return_hydra_config=True)
    assert len(config.hydra.sweeper.params.seed.split(",")) >= 10
    assert config.data.holdout == 0.5


def test_overrides_are_stronger_than_a_part() -> None:
    (main, tuned, rivals) = study.commands("rate", ["seed=3", "launch=cores"])
    for command in (main, tuned, rivals):
        assert [word for word in command if word.startswith("seed=")] == ["seed=3"]
        assert "launch=cores" in command
    assert any(word.startswith("optimizer=prodigy") for word in rivals)


def test_an_unknown_part_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        study.main(["stroy"])
    assert "a part is one of story, rate, profile, fresh, got 'stroy'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs of every part and the folder they were packed into."""
    root = tmp_path_factory.mktemp("study")
    outputs, results = root / "outputs", root / "results"
    tuned = STUDY | {"tuning_seeds": [100, 101], "reference": "flat/fixed"}
    fake_sweep(outputs / "story", seeds=3)
    fake_run(outputs / "story", "flat/fixed", 9, status="failed")
    fake_sweep(outputs / "profile", seeds=2)
    fake_sweep(outputs / "fresh", seeds=2, study=tuned)
    for rate, accuracy in ((1e-4, 0.5), (0.01, 0.95), (1.0, 0.1)):
        for seed in (0, 1, 100):
            fake_run(outputs / "rate", "flat/fixed", seed, accuracy, rate=rate, study=tuned)
        fake_run(outputs / "rate", "flat/warmup", 0, 0.94, rate=rate, study=tuned)
    fake_run(outputs / "rate", "flat/fixed", 0, 0.93, optimizer="prodigy", rate=1.0, study=tuned)
    for part in study.PARTS:
        pack(find_runs([outputs / part]), results / part, densities=part == "story")
    return outputs, results


def test_packed_runs_compare_as_the_runs_do(packed: tuple[Path, Path]) -> None:
    outputs, results = packed
    before, after = find_runs([outputs / "story"]), load(results / "story")
    assert len(after) == 12  # the failed one is no outcome
    (one,), (other,) = (benches(runs, study_of(runs)[0]) for runs in (before[:], after))
    assert [c.effects for c in one.contrasts()] == [c.effects for c in other.contrasts()]
    assert [c.gap for c in one.contrasts()] == [c.gap for c in other.contrasts()]
    assert [c.same for c in one.contrasts()] == [c.same for c in other.contrasts()]
    seen = {run.arm for run in after if run.history is not None}
    assert seen == {run.arm for run in after}


def test_packing_twice_makes_the_same_bytes_and_no_path(
    packed: tuple[Path, Path], tmp_path: Path
) -> None:
    outputs, results = packed
    elsewhere = tmp_path / "elsewhere" / "story"
    shutil.copytree(outputs / "story", elsewhere)
    for path in elsewhere.rglob("run.json"):
        text = path.read_text()
        path.write_text(text.replace("experiment=repair", f"experiment=repair output={tmp_path}"))
    said = pack(find_runs([elsewhere]), tmp_path / "again", densities=True)
    assert said == "12 runs packed, 1 unfinished ones left out"
    for path in (results / "story").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_pack_is_named(packed: tuple[Path, Path], tmp_path: Path) -> None:
    data = (packed[1] / "story" / "runs.json.gz").read_bytes()
    (tmp_path / "runs.json.gz").write_bytes(data[:-50])
    with pytest.raises(ValueError, match=r"runs\.json\.gz is damaged"):
        load(tmp_path)


def test_every_table_and_figure_is_drawn_or_not_run(
    packed: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, table in TABLES.items():
        assert table(tmp_path) == "*not run*"
        assert re.search(r"^(\|.*\||\* .+)$", table(packed[1]), re.MULTILINE), name
    for figure in FIGURES.values():
        assert figure(tmp_path) is None
        drawn = figure(packed[1])
        assert drawn is not None
        assert drawn.startswith(b"\x89PNG")
        assert figure(packed[1]) == drawn


def test_the_rate_table_has_the_means_and_the_rivals(packed: tuple[Path, Path]) -> None:
    text = TABLES["rate"](packed[1])
    (fixed,) = [line for line in text.splitlines() if line.startswith("| flat/fixed")]
    assert [cell.strip() for cell in fixed.split("|")[2:5]] == ["0.500", "0.950", "0.100"]
    assert "| prodigy" in text
    assert "seeds 100, which are in no comparison" in text


def test_the_document_is_what_the_runs_say(
    packed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir()
    shutil.copyfile(study.DOCUMENT, page)
    shutil.copyfile(study.README, tmp_path / "README.md")
    monkeypatch.setattr(study, "DOCUMENT", page)
    monkeypatch.setattr(study, "README", tmp_path / "README.md")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    results = ["--results", str(packed[1])]
    assert study.main([*results, "--write"]) == 0
    assert study.main([*results, "--check"]) == 0
    assert {p.name for p in page.parent.iterdir()} == {"study.md", *FIGURES}
    page.write_text(page.read_text().replace("0.500", "0.600", 1))
    assert study.main([*results, "--check"]) == 1
    assert "docs/study.md says" in capsys.readouterr().err
    assert study.main([*results, "--write"]) == 0
    readme = tmp_path / "README.md"
    readme.write_text(
        readme.read_text().replace("| geometric/fixed  |", "| geometric/fixed | x", 1)
    )
    assert study.main([*results, "--check"]) == 1
    assert "README.md says" in capsys.readouterr().err


def test_the_committed_document_is_what_the_committed_runs_say() -> None:
    assert study.main(["--check"]) == 0


def test_bracket_strings_are_balanced_and_as_deep_as_they_say() -> None:
    train_x, train_y, test_x, test_y = brackets(500)
    assert (len(train_x), len(test_x)) == (400, 100)
    for row, depth in zip(torch.cat([train_x, test_x]), torch.cat([train_y, test_y]), strict=True):
        text = "".join(SYMBOLS[i] for i in row)
        assert len(text) == LENGTH
        deepest, open_ = 0, []
        for symbol in text:
            if symbol in "([":
                open_.append(symbol)
                deepest = max(deepest, len(open_))
            elif symbol in ")]":
                assert open_.pop() + symbol in ("()", "[]")
        assert open_ == []
        assert deepest == depth
    counts = np.bincount(torch.cat([train_y, test_y]).numpy())
    assert counts.tolist() == [50] * 10


def test_the_digits_are_scikit_learns_and_split_alike() -> None:
    x, y, held_x, held_y = digits()
    assert len(x) + len(held_x) == 1797
    assert x.shape[1:] == (1, 8, 8)
    assert set(held_y.tolist()) == set(y.tolist()) == set(range(10))
    assert torch.equal(digits()[0], x)


@pytest.mark.parametrize("build", [mlp, reader])
def test_a_fresh_network_has_stages_that_the_controller_takes(build: object) -> None:
    model = build()
    stages = find_stages(model)
    assert len(stages) >= 5
    groups = [{"params": list(s.parameters.values())} for s in stages.values()]
    DensityLR(torch.optim.SGD(groups, lr=0.1), model).close()


def test_held_out_images_are_in_no_batch() -> None:
    whole = load_data(DataConfig(name="mnist-sample"))
    data = load_data(DataConfig(name="mnist-sample", holdout=0.3))
    assert (len(data.train_x), len(data.test_x)) == (7000, 3000)
    both = torch.cat([data.train_x, data.test_x]).flatten(1).double()
    weights = torch.rand(784, dtype=torch.float64)  # a sum that tells images apart
    sums = torch.sort(both @ weights).values
    expected = torch.sort(whole.train_x.flatten(1).double() @ weights).values
    torch.testing.assert_close(sums, expected)
