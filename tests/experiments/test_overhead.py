"""The benchmark's arithmetic, and one tiny run of all of it. No time is asserted."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.overhead.__main__ import main
from experiments.overhead.arms import CASES, Case, time_case
from experiments.overhead.counts import compiled, copies, growth, identical_losses
from experiments.overhead.measure import summary
from experiments.overhead.page import render
from experiments.overhead.tables import (
    amortised,
    case_rows,
    lines,
    median_interval,
    probes,
    readme_tables,
    table,
    verdicts,
)
from experiments.overhead.watchers import WATCHERS, installed
from tests.support import ROOT
from tests.support.fixed import probes as slow_probes

KEPT = ROOT / "experiments" / "overhead" / "results" / "cpu.json"
CPU = torch.device("cpu")


@pytest.fixture
def kept() -> dict[str, Any]:
    return json.loads(KEPT.read_text(encoding="utf-8"))


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    draw = random.Random(0)
    for n in (7, 20, 41):
        hits = 0
        for _ in range(2000):
            middle, low, high = median_interval([draw.expovariate(1.0) for _ in range(n)])
            assert low <= middle <= high
            hits += low <= math.log(2) <= high
        assert hits / 2000 > 0.94
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        median_interval([])


@pytest.mark.parametrize("steps", [1, 20, 157, 938, 10_000])
def test_costs_are_spread_over_the_steps(steps: int) -> None:
    count = probes(steps)
    assert count == len(slow_probes(5, steps))
    looked = set(slow_probes(5, steps))
    one_by_one = statistics.fmean(3.0 if step in looked else 0.25 for step in range(steps))
    assert amortised(3.0, 0.25, steps, count) == pytest.approx(one_by_one)
    assert probes(steps, steady=True) >= count


def test_the_committed_numbers_fit_together(kept: dict[str, Any]) -> None:
    text = table(kept)
    assert len({line.count("|") for line in text.splitlines() if "|" in line}) == 1
    rows = case_rows(kept["cases"]["mnist"])
    assert [row["name"] in text for row in rows].count(False) == 1  # the floor is for the page
    for found in kept["cases"].values():
        for row in case_rows(found):
            assert row["probe"][1] <= row["probe"][0] <= row["probe"][2]
            shares = [s["share"] for s in row["spread"]]
            assert all(a >= b for a, b in itertools.pairwise(shares))


def test_a_line_fails_when_its_number_is_too_large(kept: dict[str, Any]) -> None:
    def state(text: str) -> bool | None:
        return next(line["holds"] for line in lines(kept) if text in line["text"])

    arms = kept["cases"]["mnist"]["arms"]
    bare = arms["bare"]["total"][0]
    for cost, holds in ((bare / 1000, True), (bare, False)):
        arms["repair"]["probe"] = [cost] * 3
        assert state("at most 1 %") is holds
    arms["repair"]["probe"], arms["floor"]["probe"] = [3.0] * 3, [1.0] * 3
    assert state("times as long as a sum") is True
    arms["floor"]["probe"] = [0.9] * 3
    assert state("times as long as a sum") is False
    kept["copies"]["copies"] = 2
    assert state("one copy") is False
    del arms["fastai"], arms["fastai-cpu"]
    assert state("a tenth") is None
    assert state("on a GPU") is None


def test_a_small_run() -> None:
    times, taps = time_case(CASES["mlp"], 8, 2, CPU, ("bare", "repair", "recover", "floor"))
    assert taps == sum(isinstance(m, nn.Linear) for m in CASES["mlp"].build().modules())
    assert all(len(v) == 2 for own in times.values() for v in own.values())
    arms = summary(times, taps, [0.0])
    assert set(arms) == {"bare", "repair", "recover", "floor"}
    for name in ("repair, quiet", "repair, probe", "recover, quiet"):
        assert min(times[name]["hooks"]) > 0


def test_other_monitors_are_timed_where_they_are_installed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages say on being imported
        times, _ = time_case(CASES["mlp"], 8, 2, CPU, ("bare", *WATCHERS))
    assert set(times) - {"bare"} == {name for name in WATCHERS if installed(name)}
    for name in times.keys() - {"bare"}:
        assert min(times[name]["hooks"]) > 0


def test_what_is_counted() -> None:
    case: Case = CASES["mlp"]
    assert copies(case, 8, CPU) == {"copies": 1, "scalars": 0, "still": 3, "devices": 1}
    assert identical_losses(case, 8, 3, CPU) == {"steps": 3, "losses": True, "weights": True}
    grown = growth(steps=2000, budget=16)
    assert grown["objects"] <= 0
    assert grown["largest"] <= 16
    found = compiled(steps=4)
    assert [found[k] for k in ("graphs", "breaks", "recompilations")] == [1, 0, 0]


def test_the_page_asks_the_network_for_nothing(kept: dict[str, Any]) -> None:
    page = render(kept, "others were <busy>")
    assert "Others were &lt;busy&gt;." in page
    assert not any(word in page for word in ("http://", "https://", "src=", "url("))
    for line in lines(kept):
        assert line["evidence"].replace("<", "&lt;") in page


def test_a_kept_file_is_shown_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: dict[str, Any]
) -> None:
    document = tmp_path / "document.md"
    blocks = "a\n<!-- cost -->\n{}\n<!-- /cost -->\nb\n<!-- asked -->\n{}\n<!-- /asked -->\nc\n"
    document.write_text(blocks.format("old", "old"), encoding="utf-8")
    assert main(["--show", str(KEPT), str(KEPT), "--write", str(document)]) == 0
    shown = table(kept), verdicts([kept, kept])
    assert capsys.readouterr().out.strip() == "\n\n".join(shown)
    expected = blocks.format(*shown)
    assert document.read_text(encoding="utf-8") == expected


def test_a_file_with_composer_is_shown_apart(kept: dict[str, Any]) -> None:
    apart = json.loads(json.dumps(kept))
    apart["cases"]["mnist"]["arms"]["composer"] = kept["cases"]["mnist"]["arms"]["fastai"]
    shown = readme_tables([kept, apart])
    usual = readme_tables([kept])
    assert shown == usual | {"composer": table(apart)}
    assert "Composer" in shown["composer"]
    assert "Composer" not in shown["cost"]
    assert readme_tables([apart]) == {"composer": table(apart)}
