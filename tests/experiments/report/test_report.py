"""The report: right numbers, every run named, one file that needs nothing else."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats as scipy_stats

from experiments.report import report
from experiments.report.__main__ import main
from experiments.report.comparison import Study, benches, study_of
from experiments.report.sections import heatmaps, sections
from experiments.train.runs import find_runs, read_run
from tests.experiments.fake_runs import LEVEL, fake_run, fake_sweep
from tests.experiments.pages import Page, words


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and words only: figures take most of the time and have tests of their own."""
    for name in ("curve", "heatmaps"):
        monkeypatch.setattr(sections, name, lambda *args: None)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_sweep(tmp_path_factory.mktemp("sweep"), seeds=3)


@pytest.fixture(scope="module")
def page(sweep: Path) -> str:
    """The whole report of the sweep, figures and all."""
    return report.render(find_runs([sweep]))


def test_page_is_sound_and_needs_no_network(page: str) -> None:
    assert len(page.encode()) < 3_000_000
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            if value := attributes.get(name):
                assert value.startswith(("data:", "#")), (tag, name, value[:60])
        if tag == "img":
            assert attributes.get("alt")
        if tag == "th":
            assert attributes.get("scope") in ("col", "row")
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("table") == tags.count("caption") > 5
    assert tags.count("figure") == tags.count("figcaption") == 8 + 1 + 2 * 4 + 1
    assert "prefers-color-scheme" in style
    assert "@media print" in style


def test_page_says_what_was_judged_on(sweep: Path, page: str) -> None:
    assert "loss are those of the test set." in page
    runs = find_runs([sweep])
    for run in runs[:-1]:
        run.config["data"]["holdout"] = 0.5
    said = "the test set in some runs, in others of examples held out of the training set"
    assert said in report.render(runs)
    for run in runs:
        del run.config["data"]
    assert "those of unknown examples" in report.render(runs)


def test_sections_stand_in_order(page: str) -> None:
    numbers = [int(n) for n in re.findall(r"<h2[^>]*>(\d+)\.", page)]
    assert numbers == list(range(1, 15))


def test_same_runs_same_bytes(sweep: Path, page: str, tmp_path: Path) -> None:
    copy = tmp_path / sweep.name
    shutil.copytree(sweep, copy)
    assert report.render(find_runs([copy])) == page


def test_verdict_has_the_numbers_of_an_independent_computation(page: str, sweep: Path) -> None:
    final = {
        (run["arm"], run["seed"]): run["final"]["accuracy"]
        for path in sweep.rglob("run.json")
        if (run := json.loads(path.read_text()))
    }
    treated, baseline, flat = (
        np.array([final[arm, seed] for seed in range(3)])
        for arm in ("geometric/repair", "geometric/fixed", "flat/fixed")
    )
    interval = scipy_stats.ttest_rel(treated, baseline).confidence_interval(0.95)
    text = Page(page).text
    beside = scipy_stats.ttest_rel(treated, flat).confidence_interval(0.95)
    said = re.search(r"flat/fixed\D* [^(]*\(95 % paired-t interval (\S+) to (\S+), n = 3", text)
    assert said is not None
    found = [float(number.replace("−", "-")) for number in said.groups()]
    assert found == pytest.approx([beside.low, beside.high], abs=5e-5)
    assert f"geometric/repair has {np.mean(treated - baseline):.4f} higher accuracy" in text
    assert f"+{interval.low:.4f} to +{interval.high:.4f}, n = 3 seeds" in text
    closed = (treated - baseline).mean() / (flat - baseline).mean()
    assert f"closed {closed:.2f} of the gap in accuracy" in text
    assert "identical bit for bit in 3 of 3 seeds" in text


def test_csv_and_table_hold_every_run(page: str) -> None:
    href = next(a["href"] for t, a in Page(page).tags if t == "a" and "download" in a)
    assert href
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(href.split(",")[1]).decode())))
    assert len(rows) == 12
    assert {row["arm"] for row in rows} == set(LEVEL)
    assert float(rows[0]["accuracy"]) > 0.8


def test_heatmap_needs_one_scale_and_survives_an_empty_history(sweep: Path) -> None:
    runs = find_runs([sweep])[:2]
    picture = heatmaps(runs)
    assert picture is not None
    assert picture.wide
    assert heatmaps([]) is None


@pytest.mark.usefixtures("no_figures")
class TestAccounting:
    def test_damaged_files_are_named_with_the_reason(self, tmp_path: Path) -> None:
        fake_sweep(tmp_path, seeds=2)
        paths = [fake_run(tmp_path, "geometric/repair", seed) for seed in range(10, 17)]
        history = paths[0] / "history.npz"
        history.write_bytes(history.read_bytes()[:500])
        (paths[1] / "metrics.csv").write_text("step,seconds\n1,2\n")
        text = (paths[2] / "run.json").read_text()
        (paths[2] / "run.json").write_text(text[: len(text) // 2])
        (paths[3] / "metrics.csv").unlink()
        (paths[4] / "metrics.csv").write_text(
            "step,seconds,train_loss,test_loss,accuracy,macro_f1\n1,2,x,,,\n"
        )
        (paths[5] / "metrics.csv").write_bytes(b"\xff\xfe\x00")
        (paths[6] / "config.yaml").write_text("seed: [")
        (tmp_path / "foreign").mkdir()
        (tmp_path / "foreign" / "run.json").write_text('{"name": "something else"}')
        (tmp_path / "list").mkdir()
        (tmp_path / "list" / "run.json").write_text("[]")
        runs = {run.label: run for run in find_runs([tmp_path])}
        broken = {k: r.reason for k, r in runs.items() if r.status == "broken"}
        assert len(broken) == 9
        page = words(tmp_path)
        for label, reason in broken.items():
            assert label in page
            assert reason in page
        for start in ("history.npz:", "metrics.csv: no column", "run.json:", "config.yaml:"):
            assert any(reason.startswith(start) for reason in broken.values())
        assert "metrics.csv is missing from a finished run" in broken.values()
        assert "run.json: arm is missing" in broken.values()
        assert "run.json: expected an object, got list" in broken.values()
        assert "n = 2 seeds" in page

    def test_a_broken_run_is_still_placed_by_its_config(self, tmp_path: Path) -> None:
        folder = fake_run(tmp_path, "flat/fixed", 4)
        (folder / "run.json").write_text("{")
        run = read_run(folder)
        assert (run.status, run.arm, run.optimizer, run.seed) == ("broken", "flat/fixed", "sgd", 4)

    def test_the_density_controller_is_named_by_its_mode(self, tmp_path: Path) -> None:
        folder = fake_run(tmp_path, "flat/repair", 4)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["controller"] = {"name": "density", "mode": "warmup"}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "run.json").unlink()
        assert read_run(folder).arm == "flat/warmup"

    def test_killed_and_never_started_runs_are_counted(self, tmp_path: Path) -> None:
        fake_sweep(tmp_path, seeds=2)
        killed = fake_run(tmp_path, "flat/fixed", 5)
        (killed / "run.json").unlink()
        hydra = killed / ".hydra"
        hydra.mkdir()
        (hydra / "config.yaml").write_text("seed: 5")  # Hydra's own copy is no run
        runs = find_runs([tmp_path])
        assert len(runs) == 9
        (bench,) = benches(runs, study_of(runs)[0])
        counts = dict(bench.accounting())
        assert counts["flat/fixed"]["planned"] == 3
        assert counts["flat/fixed"]["incomplete"] == 1
        assert counts["geometric/repair"]["missing"] == 1
        for row in counts.values():
            assert row["planned"] == row["done"] + row["incomplete"] + row["missing"]

    def test_diverged_run_without_a_value_is_excluded_and_says_so(self, tmp_path: Path) -> None:
        fake_sweep(tmp_path, seeds=3)
        fake_run(tmp_path, "geometric/fixed", 3, status="diverged")
        fake_run(tmp_path, "geometric/repair", 3)
        text = words(tmp_path)
        assert (
            "Seed 3 is not in the mean: geometric/fixed diverged without a final accuracy" in text
        )
        assert "n = 3 seeds" in text

    def test_diverged_run_with_a_value_counts_and_says_so(self, tmp_path: Path) -> None:
        fake_sweep(tmp_path, seeds=3)
        fake_run(tmp_path, "geometric/fixed", 3, status="diverged", accuracy=0.1)
        fake_run(tmp_path, "geometric/repair", 3)
        text = words(tmp_path)
        assert "geometric/fixed diverged with seed 3 and counts with 0.1000" in text
        assert "n = 4 seeds" in text

    def test_failed_run_never_counts(self, tmp_path: Path) -> None:
        fake_sweep(tmp_path, seeds=2)
        fake_run(tmp_path, "geometric/fixed", 2, status="failed", accuracy=0.9)
        fake_run(tmp_path, "geometric/repair", 2)
        text = words(tmp_path)
        assert "Seed 2 is not in the mean: geometric/fixed failed" in text
        assert "n = 2 seeds" in text

    def test_an_arm_that_was_never_run_is_said_once(self, tmp_path: Path) -> None:
        for seed in range(5):
            fake_run(tmp_path, "flat/fixed", seed)
        text = words(tmp_path)
        assert text.count("geometric/repair was run under no seed.") == 1
        assert "No seed has a value of accuracy for both" in text
        assert "is not in the mean" not in text

    def test_a_second_outcome_of_a_seed_is_set_aside_and_named(self, tmp_path: Path) -> None:
        fake_sweep(tmp_path / "a", seeds=2)
        fake_run(tmp_path / "b", "flat/fixed", 0)
        runs = find_runs([tmp_path, tmp_path / "a"])  # overlapping folders: nothing twice
        assert len(runs) == 9
        (second,) = [run for run in runs if run.status == "duplicate"]
        assert "/b/" in second.label
        assert "/a/sgd/flat-fixed/0 is the same optimizer, arm and seed" in second.reason
        assert second.label in words(tmp_path)

    def test_different_settings_are_pointed_out(self, tmp_path: Path) -> None:
        fake_sweep(tmp_path, seeds=2)
        path = tmp_path / "sgd" / "flat-fixed" / "0" / "config.yaml"
        path.write_text(path.read_text().replace("epochs: 1", "epochs: 3"))
        assert "More than the arm differs: epochs is not the same: 1, 3." in words(tmp_path)

    def test_different_starts_are_pointed_out(self, tmp_path: Path) -> None:
        fake_sweep(tmp_path, seeds=2)
        path = tmp_path / "sgd" / "flat-fixed" / "0" / "run.json"
        path.write_text(path.read_text().replace('"i0"', '"other"'))
        runs = find_runs([tmp_path])
        (bench,) = benches(runs, study_of(runs)[0])
        assert bench.same_start(0) == ("no", "yes")
        assert bench.same_start(1) == ("yes", "yes")


@pytest.mark.usefixtures("no_figures")
class TestComparison:
    def test_one_seed_claims_nothing(self, tmp_path: Path) -> None:
        text = words(fake_sweep(tmp_path, seeds=1))
        assert "n = 1 seed" in text
        assert "one pair gives no interval" in text
        assert "identical bit for bit in 1 of 1 seed." in text

    def test_no_difference_is_not_distinguishable(self, tmp_path: Path) -> None:
        for seed in range(4):
            for arm, shift in (("geometric/fixed", 0.0), ("geometric/repair", (-1) ** seed / 100)):
                fake_run(tmp_path, arm, seed, accuracy=0.9 + shift)
        text = words(tmp_path)
        assert "are not distinguishable in accuracy" in text

    def test_without_a_study_every_controlled_arm_meets_its_fixed_twin(
        self, tmp_path: Path
    ) -> None:
        fake_sweep(tmp_path, seeds=2, study=None)
        runs = find_runs([tmp_path])
        study, notes = study_of(runs)
        assert (study, notes) == (Study(), [])
        (bench,) = benches(runs, study)
        pairs = [(c.treated, c.baseline) for c in bench.contrasts()]
        assert pairs == [
            ("geometric/repair", "geometric/fixed"),
            ("flat/repair", "flat/fixed"),
        ]
        assert "No pair was declared" in words(tmp_path)

    def test_a_lone_controlled_arm_is_no_comparison(self, tmp_path: Path) -> None:
        fake_run(tmp_path, "geometric/repair", study=None)
        text = words(tmp_path)
        assert "there is nothing to compare" in text
        assert "Every decision in geometric/repair, seed 0." in text

    def test_null_fields_of_a_study_are_defaults(self, tmp_path: Path) -> None:
        study = {"title": "T", "treated": None, "reference": None, "smallest_effect": None}
        fake_run(tmp_path, study=study)
        assert study_of(find_runs([tmp_path]))[0] == Study(title="T")

    def test_every_optimizer_has_its_verdict(self, tmp_path: Path) -> None:
        fake_sweep(tmp_path, seeds=2)
        fake_sweep(tmp_path, seeds=3, optimizer="adam")
        text = words(tmp_path)
        assert re.search(r"adam: geometric/repair .* n = 3 seeds.* sgd:", text)
        assert re.search(r"sgd: geometric/repair .* n = 2 seeds", text)

    def test_censored_steps_are_stated(self, tmp_path: Path) -> None:
        for seed in range(3):
            for arm, accuracy in (
                ("flat/fixed", 0.95),
                ("geometric/fixed", 0.7),
                ("geometric/repair", 0.94),
            ):
                fake_run(tmp_path, arm, seed, accuracy=accuracy + seed / 1000)
        runs = find_runs([tmp_path])
        (bench,) = benches(runs, study_of(runs)[0])
        assert bench.target == pytest.approx(0.95 * 0.951)
        effect = next(e for e in bench.contrasts()[0].effects if e.metric == "steps")
        assert effect.baseline == 150
        assert effect.treated < 100
        assert "3 of 3 runs of geometric/fixed never reached the target" in effect.note
        assert effect.note in words(tmp_path)

    def test_holm_covers_the_secondary_metrics_only(self, sweep: Path) -> None:
        runs = find_runs([sweep])
        (bench,) = benches(runs, study_of(runs)[0])
        primary, *secondary = bench.contrasts()[0].effects
        assert primary.metric == "accuracy"
        assert primary.p == 0.25
        assert primary.p_holm is None
        assert [e.p_holm for e in secondary] == [0.75] * 3

    def test_text_from_a_run_cannot_become_markup(self, tmp_path: Path) -> None:
        fake_run(tmp_path, reason="<script>alert(1)</script>", status="diverged")
        assert "<script>alert" not in report.render(find_runs([tmp_path]))


@pytest.mark.usefixtures("no_figures")
class TestCommand:
    def test_writes_beside_the_runs_and_prints_where(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fake_sweep(tmp_path, seeds=1)
        assert main([str(tmp_path)]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == str(tmp_path / "report.html")
        assert Path(last).read_text(encoding="utf-8").startswith("<!doctype html>")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "sgd"]

    def test_output_can_be_chosen(self, tmp_path: Path) -> None:
        fake_run(tmp_path / "runs")
        assert main([str(tmp_path / "runs"), "--output", str(tmp_path / "r.html")]) == 0
        assert (tmp_path / "r.html").exists()

    @pytest.mark.parametrize("name", ["", "absent"])
    def test_no_run_is_one_clear_line(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert str(tmp_path / name) in error
        assert list(tmp_path.iterdir()) == []

    def test_only_unreadable_runs_still_make_a_report(self, tmp_path: Path) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "run.json").write_text("nonsense")
        assert "no result" in words(tmp_path)

    def test_unwritable_output_is_one_clear_line(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        fake_run(tmp_path)
        assert main([str(tmp_path), "--output", str(tmp_path / "no" / "r.html")]) == 1
        assert capsys.readouterr().err.startswith("error: ")
