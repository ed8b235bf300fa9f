"""Runs at other rates, tuning seeds, steps to the target, and the declaration's date."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from experiments.report.comparison import (
    Point,
    Study,
    benches,
    by_rate,
    reached,
    study_of,
    untuned,
    when,
    width,
)
from experiments.report.page import Line, Mark, chart, stage_colours
from experiments.report.sections import sections
from experiments.train.runs import find_runs
from tests.experiments.fake_runs import STUDY, fake_run, fake_sweep
from tests.experiments.pages import words

TUNED = STUDY | {"tuning_seeds": [100, 101]}


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("curve", "heatmaps"):
        monkeypatch.setattr(sections, name, lambda *args: None)


def tune(root: Path, rates: dict[float, float]) -> None:
    for rate, accuracy in rates.items():
        for seed in TUNED["tuning_seeds"]:
            fake_run(root, "geometric/fixed", seed, accuracy + seed / 1e6, rate=rate, study=TUNED)


def test_the_tuned_rate_is_named_and_its_seeds_are_compared_with_nothing(tmp_path: Path) -> None:
    fake_sweep(tmp_path, seeds=3, study=TUNED)
    tune(tmp_path, {0.001: 0.7, 0.01: 0.9, 0.1: 0.8})
    text = words(tmp_path)
    assert "geometric/fixed was tried at 0.001, 0.01, 0.1 on seeds 100, 101" in text
    assert "That is the rate compared." in text
    assert "n = 3 seeds" in text
    assert "was given, not tuned" not in text
    assert "both tuned and compared" not in text


def test_a_rate_that_tuning_does_not_favour_is_pointed_out(tmp_path: Path) -> None:
    fake_sweep(tmp_path, seeds=2, study=TUNED)
    tune(tmp_path, {0.001: 0.7, 0.01: 0.9, 0.1: 0.93})
    text = words(tmp_path)
    assert "at 0.1, the end of the grid, so a better rate may lie beyond it" in text
    assert "Compared is 0.01: not the rate that tuning favours." in text


def test_tuning_runs_count_in_a_curve_only_where_there_are_no_others(tmp_path: Path) -> None:
    fake_run(tmp_path, "geometric/fixed", 0, 0.8, study=TUNED)
    tune(tmp_path, {0.01: 0.9, 0.1: 0.5})
    runs = find_runs([tmp_path])
    points = by_rate(untuned(runs, study_of(runs)[0]), "accuracy")["geometric/fixed"]
    assert [(p.at, p.seeds) for p in points] == [(0.01, (0,)), (0.1, (100, 101))]


def test_without_tuning_the_report_says_what_that_leaves_open(tmp_path: Path) -> None:
    text = words(fake_sweep(tmp_path, seeds=2))
    assert "The fixed rate, 0.01, was given, not tuned on other seeds" in text
    assert "whether another fixed rate would have done better is not known" in text


def test_other_rates_are_no_duplicates_and_make_a_curve(tmp_path: Path) -> None:
    fake_sweep(tmp_path, seeds=2)
    for seed in range(2):
        for rate, fixed, ours in ((1e-4, 0.3, 0.94), (1.0, 0.1, 0.93)):
            fake_run(tmp_path, "geometric/fixed", seed, fixed, rate=rate)
            fake_run(tmp_path, "geometric/repair", seed, ours, rate=rate)
    runs = find_runs([tmp_path])
    assert {run.status for run in runs} == {"done"}
    (bench,) = benches(runs, study_of(runs)[0])
    assert (len(bench.runs), len(bench.others), bench.rate) == (8, 8, 0.01)
    means = {p.at: p.mean for p in by_rate(bench.every, "accuracy")["geometric/fixed"]}
    assert means[1e-4] == pytest.approx(0.3)
    text = words(tmp_path)
    assert "How wrong may the rate be?" in text
    assert "geometric/fixed, other rates or tuning" in text
    assert "n = 2 seeds" in text


def test_rivals_without_a_rate_stand_beside_and_are_no_comparison(tmp_path: Path) -> None:
    fake_sweep(tmp_path, seeds=2)
    for seed in range(2):
        fake_run(tmp_path, "flat/fixed", seed, 0.93, optimizer="prodigy", rate=1.0)
        fake_run(tmp_path, "geometric/repair", seed, 0.94, rate=1.0)
    text = words(tmp_path)
    assert "Optimizers without a rate on the same task, mean final accuracy: prodigy 0.9300" in text
    assert "prodigy: there is no controlled arm" not in text


rates = st.lists(st.sampled_from([1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]), min_size=1, unique=True)


@given(at=rates, seed=st.integers(0, 99))
def test_the_width_is_the_longest_stretch_of_good_rates(at: list[float], seed: int) -> None:
    at = sorted(at)
    values = np.random.default_rng(seed).choice([0.5, 0.9], len(at)).tolist()
    points = [Point(a, v, v, v, 1, 0, (0,)) for a, v in zip(at, values, strict=True)]
    decades, edge = width(points, 0.9, 0.02, higher=True)
    stretches = [
        (math.log10(at[j] / at[i]), i == 0 or j == len(at) - 1)
        for i in range(len(at))
        for j in range(i, len(at))
        if all(v == 0.9 for v in values[i : j + 1])
    ]
    if not stretches:
        assert math.isnan(decades)
    else:
        longest = max(d for d, _ in stretches)
        assert decades == pytest.approx(longest)
        assert edge in {e for d, e in stretches if math.isclose(d, longest)}
    mirrored = [Point(p.at, -p.mean, -p.low, -p.high, 1, 0, (0,)) for p in points]
    assert width(mirrored, -0.9, 0.02, higher=False) == pytest.approx((decades, edge), nan_ok=True)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=20).filter(
        lambda rows: any(not late for _, late in rows)
    )
)
def test_the_share_at_the_target_is_scipys_estimate(rows: list[tuple[int, bool]]) -> None:
    found = reached("flat/fixed", [(float(step), late) for step, late in rows])
    steps = [[s for s, late in rows if late is kind] for kind in (False, True)]
    survival = scipy_stats.ecdf(scipy_stats.CensoredData(uncensored=steps[0], right=steps[1])).sf
    for at, share in found.share:
        assert share == pytest.approx(1 - survival.evaluate([at])[0])
    assert len(found.steps) == len(steps[0])


def test_a_median_that_was_not_reached_is_a_bound(tmp_path: Path) -> None:
    for seed in range(3):
        fake_run(tmp_path, "flat/fixed", seed, accuracy=0.95)
        fake_run(tmp_path, "geometric/fixed", seed, accuracy=0.7)
    assert "geometric/fixed 3 0 3 more than 150 – –" in words(tmp_path)


def test_the_target_is_the_declared_share(tmp_path: Path) -> None:
    fake_sweep(tmp_path, seeds=2, study=STUDY | {"target": 0.8})
    runs = find_runs([tmp_path])
    (bench,) = benches(runs, study_of(runs)[0])
    values = [bench.value("flat/fixed", seed, "accuracy") for seed in bench.seeds]
    assert bench.target == pytest.approx(0.8 * np.mean(values))


def test_a_declaration_written_after_a_run_is_none(tmp_path: Path) -> None:
    fake_sweep(tmp_path, seeds=2, study=STUDY | {"written": "2026-03-02"})
    early = tmp_path / "sgd" / "flat-fixed" / "0" / "run.json"
    text = early.read_text()
    late = [p for p in tmp_path.rglob("run.json") if p != early]
    for path in late:
        path.write_text(
            path.read_text().replace("{", '{"started": "2026-03-02T08:00:00+00:00",', 1)
        )
    runs = find_runs([tmp_path])
    study = study_of(runs)[0]
    said = "Written 2026-03-02; the first run started 2026-03-02T08:00:00+00:00."
    assert when(study, runs) == (said, False)
    early.write_text(text.replace("{", '{"started": "2026-03-01T23:00:00+00:00",', 1))
    sentence, amiss = when(study, find_runs([tmp_path]))
    assert amiss
    assert "1 of 8 runs started before that day" in sentence
    assert sentence in words(tmp_path)


def test_a_wrong_entry_of_a_declaration_is_a_default(tmp_path: Path) -> None:
    study = {"title": "T", "target": "high", "tuning_seeds": 3, "smallest_effect": -0.01}
    fake_run(tmp_path, study=study)
    expected = Study(title="T", smallest_effect=0.01)
    assert study_of(find_runs([tmp_path]))[0] == expected


def test_a_chart_leaves_out_what_its_axis_cannot_show() -> None:
    points = [(1.0, 1.0), (2.0, 0.0), (3.0, 10.0), (4.0, math.nan), (5.0, 100.0)]
    drawn = chart(
        [Line("a", points, ("#000000", "#ffffff"))], x="x", y="y", alt="A", caption="C", log_y=True
    )
    assert drawn is not None
    (path,) = [part for part in drawn.svg.split("<path") if 'class="line"' in part]
    assert path.count("M") == 3  # three single points: every neighbour is missing
    assert "nan" not in drawn.svg
    line = Line("a", [(1.0, -1.0)], ("#000000", "#ffffff"))
    assert chart([line], x="x", y="y", alt="A", caption="C", log_y=True) is None


def test_a_mark_says_what_it_is_and_cannot_become_markup() -> None:
    line = Line("a", [(0.0, 0.0), (1.0, 1.0)], ("#000000", "#ffffff"))
    mark = Mark(1.0, 1.0, "raise", "<b>why</b>", ("#000000", "#ffffff"), "#row")
    drawn = chart([line], [mark], x="x", y="y", alt="A", caption="C")
    assert drawn is not None
    assert '<a href="#row" aria-label="&lt;b&gt;why&lt;/b&gt;">' in drawn.svg
    assert "<title>&lt;b&gt;why&lt;/b&gt;</title>" in drawn.svg
    assert "<b>" not in drawn.svg


def test_stages_have_colours_of_their_own() -> None:
    for count in (1, 2, 6, 12):
        colours = stage_colours(count)
        for paper in (0, 1):
            assert len({c[paper] for c in colours}) == count
