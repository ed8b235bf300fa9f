"""The gauntlet's page: right numbers, every section, one file that needs nothing else."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.gauntlet.cells import Cell
from experiments.gauntlet.page import page, sections
from experiments.gauntlet.page.__main__ import main
from experiments.gauntlet.verdict import judge
from tests.experiments.gauntlet.records import gauntlet, record
from tests.experiments.pages import Page
from tests.support import ROOT

Record = dict[str, Any]
COMMAND = "python -m experiments.gauntlet suite=made-up"


@pytest.fixture(scope="module")
def whole() -> str:
    """The page of a whole gauntlet, figures and all."""
    return page.render(gauntlet(), "Made up", COMMAND)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and words only: figures take most of the time."""
    for name in ("closed_dots", "search_lines"):
        monkeypatch.setattr(sections, name, lambda *args: None)


def rows(html: str, section: str) -> list[list[str]]:
    """The cells of every table row in a section, header rows included."""
    part = html[html.index(f'<section aria-labelledby="{section}">') :]
    part = part[: part.index("</section>")]
    found = re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL)
    return [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)]
        for row in found
    ]


def words(records: list[Record], **options: Any) -> str:
    return Page(page.render(records, "Made up", COMMAND, **options)).text


def download(html: str) -> list[dict[str, str]]:
    found = re.search(r'href="data:text/csv;charset=utf-8;base64,([^"]+)"', html)
    assert found is not None
    return list(csv.DictReader(io.StringIO(base64.b64decode(found[1]).decode())))


def test_page_is_sound_and_needs_no_network(whole: str) -> None:
    assert len(whole.encode()) < 3_000_000
    assert not re.search(r"https?:|//\w", re.sub(r"base64,[^\"]*", "", whole))
    parsed = Page(whole)
    for tag, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            if value := attributes.get(name):
                assert value.startswith("data:"), (tag, name, value[:60])
        if tag == "img":
            assert attributes.get("alt")
        if tag == "th":
            assert attributes.get("scope") in ("col", "row", "colgroup")
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("table") == tags.count("caption") == 9
    # Two optimizers with starved cells; searches of one network with 150 and with 300 steps.
    assert tags.count("figure") == tags.count("figcaption") == 2 + 2
    style = whole[whole.index("<style>") : whole.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme" in style
    assert "@media print" in style


def test_sections_stand_in_order_and_none_is_left_out(whole: str) -> None:
    assert [int(n) for n in re.findall(r"<h2[^>]*>(\d+)\.", whole)] == list(range(1, 11))
    assert "left out" not in whole


def test_same_records_same_bytes_in_any_order(whole: str) -> None:
    records = gauntlet()
    random.Random(0).shuffle(records)
    assert page.render(records, "Made up", COMMAND) == whole


@pytest.mark.usefixtures("no_figures")
def test_of_a_cell_that_is_there_twice_the_last_counts() -> None:
    html = page.render([record(accuracy=0.1), record(accuracy=0.2)], "Made up", COMMAND)
    assert [row["accuracy"] for row in download(html)] == ["0.2"]


@pytest.mark.usefixtures("no_figures")
def test_what_is_not_there_is_left_out_in_a_line() -> None:
    records = [record(), record("one-first")]
    text = words(records)
    assert text.count("this section is left out") == 6
    assert "None of the demands can be judged on these records." in text
    assert text.count("No runs.") == len(list(judge(records)))


def test_no_records_are_an_error_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^there are no records to report on: train some"):
        page.write_page([], "Made up", COMMAND, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_figures")
def test_every_judgement_is_on_the_page_with_its_failures() -> None:
    """Half of what the whole gauntlet promises is broken; the page says which half."""
    records = gauntlet()
    for r in records:
        if r["arm"] == "repair" and r["condition"] in ("one-first", "rate-zero"):
            r["accuracy"], r["named"] = 0.5, [["head", "dead", 3]]
        if r["arm"] == "repair" and r["condition"] == "usable":
            r["named_at_end"] = [["first", "starved", 5]]
    # The reference: by hand, from what was broken above.
    expected = {
        "Starved: at": "Fails.",
        "Healthy:": "Fails.",
        "Pretrained:": "Holds.",
        "Starved: named": "Fails.",
        "All-starved: named": "Holds.",
        "Hot: named": "Holds.",
        "Collapse: named": "Holds.",
        "Beyond: named": "Fails.",
        "Every family together: named": "Fails.",
        "Collapse: with": "Holds.",
        "Free: on average": "Fails.",
    }
    text = words(records)
    for demand, state in expected.items():
        assert f"{state} {demand}" in text
    assert "5 of the 11 demands that these records can answer are met." in text
    for judgement in judge(records):
        assert judgement.evidence in text
        for line in judgement.failures:
            assert line.strip() in text
    assert "closed 25%" in text  # (0.5 - 0.4) / (0.8 - 0.4)


@pytest.mark.usefixtures("no_figures")
def test_verdict_sentence_with_one_demand() -> None:
    records = [record("usable"), record("usable", "repair")]
    others = len(list(judge(records))) - 1
    sentence = "The one demand that these records can answer is met."
    assert f"{sentence} For {others} there are no runs." in words(records)


@pytest.mark.usefixtures("no_figures")
def test_a_long_list_of_failures_is_cut_and_says_so() -> None:
    records = [record()]
    for i in range(130):
        records += [record(f"random-{i}", accuracy=0.2), record(f"random-{i}", "repair", 0.3)]
    text = words(records)
    assert "130 fall short" in text
    assert "And 30 more." in text


def test_runs_are_counted(whole: str) -> None:
    head, *counted = rows(whole, "run")
    assert head[:4] == ["network", "optimizer", "fixed", "repair"]
    records = gauntlet()
    for row in counted:
        mine = [r for r in records if (r["net"], r["optimizer"]) == (row[0], row[1])]
        for arm, count in zip(head[2:], row[2:], strict=True):
            if arm == "conditions":
                assert int(count) == len({r["condition"] for r in mine})
                break
            assert int(count) == sum(r["arm"] == arm for r in mine)
        assert row[-4:] == ["0, 1", "60, 150, 300", "32", "0"]


@pytest.mark.usefixtures("no_figures")
def test_missing_and_diverged_runs_are_accounted_for() -> None:
    cells = [Cell("gru", "sgd", seed=seed) for seed in range(4)]
    records = [record(seed=0), record(seed=1, test_loss=None)]
    html = page.render(records, "Made up", COMMAND, cells)
    text = Page(html).text
    assert "Planned: 4 cells; finished: 2; missing: 2. In 1 the test loss is not finite" in text
    assert "gru sgd flat fixed seed 3 batch 32 steps 150 cosine start 1.0" in text
    assert [row["test_loss"] for row in download(html)] == ["1.2", ""]
    assert "what was planned is not known" in words(records)


def random_cells() -> list[Record]:
    draw = random.Random(5)
    records = []
    for net in ("gru", "mlp_shallow"):
        for seed in range(3):
            records.append(record(accuracy=draw.randrange(80, 90) / 100, net=net, seed=seed))
            for profile in ("geometric-1e-1", "one-first", "random-0", "random-1"):
                fixed = draw.randrange(20, 95) / 100
                records.append(record(profile, "fixed", fixed, seed, net))
                for arm in ("repair", "fastai"):
                    accuracy = draw.randrange(75, 92) / 100
                    records.append(record(profile, arm, accuracy, seed, net))
    return records


def slow(records: list[Record], net: str, profile: str, arm: str) -> tuple[float, float, float]:
    """Mean accuracy with fixed rates, of the arm, and with flat rates."""

    def mean(condition: str, arm: str) -> float:
        return statistics.fmean(
            r["accuracy"]
            for r in records
            if (r["net"], r["condition"], r["arm"]) == (net, condition, arm)
        )

    return mean(profile, "fixed"), mean(profile, arm), mean("flat", "fixed")


@pytest.mark.usefixtures("no_figures")
def test_gaps_and_the_heat_map_are_those_of_a_slow_reference() -> None:
    records = random_cells()
    html = page.render(records, "Made up", COMMAND)
    table = rows(html, "starved")
    shares = {row[0]: row for row in table[2:5]}
    heads = next(row for row in table if row[:2] == ["network", "optimizer"])
    heat = {row[0]: dict(zip(heads[2:], row[2:], strict=True)) for row in table[6:]}
    for net in ("gru", "mlp_shallow"):
        gaps, passed, drawn = [], 0, []
        for profile in ("geometric-1e-1", "one-first", "random-0", "random-1"):
            fixed, repaired, flat = slow(records, net, profile, "repair")
            there = flat - fixed >= 0.02
            share = (repaired - fixed) / (flat - fixed)
            passed += share >= 0.9 if there else repaired >= flat - 0.02
            if there:
                gaps.append(share)
            if profile.startswith("random"):
                drawn += [share] if there else []
            elif there:
                name = profile.replace("geometric-", "geo ")
                assert heat[net][name] == f"{100 * share:.0f}".replace("-", "−")
        assert heat[net]["random"] == f"{100 * statistics.fmean(drawn):.0f}"
        closed = f"{100 * statistics.fmean(gaps):.0f} %"
        assert shares[net] == [net, *(2 * ["4", f"{25 * passed} %", closed])]


@pytest.mark.usefixtures("no_figures")
def test_ablations_leave_what_a_slow_reference_says() -> None:
    records = random_cells()
    left: dict[str, list[float]] = {"repair": [], "fastai": []}
    for arm, gaps in left.items():
        for net in ("gru", "mlp_shallow"):
            for profile in ("geometric-1e-1", "one-first", "random-0", "random-1"):
                fixed, treated, flat = slow(records, net, profile, arm)
                gaps += [flat - treated] if flat - fixed >= 0.02 else []
    for row in rows(page.render(records, "Made up", COMMAND), "ablations")[1:]:
        gaps = left.pop(row[0])
        assert row[1:3] == ["8", str(len(gaps))]
        assert row[3] == f"{statistics.fmean(gaps):+.4f}".replace("-", "−")
    assert left == {}


def test_ablations_stand_on_common_cells(whole: str) -> None:
    found = {row[0]: row[1:] for row in rows(whole, "ablations")[1:]}
    assert found == {
        "repair": ["6", "6", "0.0000", "100 %", "100 %"],
        "density": ["6", "6", "0.0000", "100 %", "100 %"],
        "fastai": ["6", "6", "+0.2000", "50 %", "0 %"],
    }
    fewer = [r for r in gauntlet() if r["arm"] != "fastai" or r["condition"] == "one-first"]
    result = sections.ablated(fewer)
    assert result is not None
    assert result["common"] == 2
    assert [row["own"] for row in result["rows"]] == [6, 6, 2]


def test_naming_counts(whole: str) -> None:
    found = {row[1]: row for row in rows(whole, "naming")[1:]}
    assert found["geometric-1e-6"] == [
        "starved", "geometric-1e-6", "4", "4", "4", "100.0 %", "0", "5.0",
    ]  # fmt: skip
    assert found["spike"][-1] == "5.0"  # since its onset, which is at step 60


@pytest.mark.usefixtures("no_figures")
def test_steps_to_a_name_are_a_median_over_names_that_fit() -> None:
    records = [
        record(
            "geometric-1e-6",
            "repair",
            seed=seed,
            named=[["first", "starved", since], ["second", "dead", 0], ["head", "hot", 1]],
        )
        for seed, since in enumerate((4, 10, 30))
    ]
    (row,) = sections.naming(records)
    assert (row["ill"], row["rightly"], row["wrong"], row["steps"]) == (3, 0, 3, 10)


def test_healthy_counts(whole: str) -> None:
    assert rows(whole, "healthy")[1:] == [
        [name, "4", "0", "0", "4", "0"] for name in ("flat", "usable", "pretrained")
    ]
    loud = [
        record("usable"),
        record("usable", "repair", raised=["first"], weights="others"),
        record("usable", "repair", seed=1, named_at_end=[["first", "hot", 9]]),
    ]
    (row,) = sections.healthy(loud)
    assert row == {
        "condition": "usable",
        "runs": 2,
        "alarmed": 1,
        "acted": 1,
        "paired": 1,
        "changed": 1,
    }


def test_search_is_compared_with_flat_runs_of_the_same_length(whole: str) -> None:
    found = {tuple(row[1:5]): row[5:] for row in rows(whole, "search")[1:]}
    long, short = "300 steps, cosine", "150 steps, cosine"
    for start in ("0.0001", "0.01", "1"):
        assert found["sgd", "free", start, long] == ["2", "0.7500", "0.8000", "−0.0500", "2"]
    assert found["sgd", "prodigy", "its own", long] == ["2", "0.8500", "0.8000", "+0.0500", "2"]
    for start in ("0.0001", "100"):  # all-1e-4 and hot-all-100
        assert found["adamw", "warmup", start, short] == ["2", "0.7000", "0.8000", "−0.1000", "2"]
    assert len(found) == 2 * (3 + 1 + 4)


@pytest.mark.usefixtures("no_figures")
def test_search_without_a_flat_run_claims_no_difference() -> None:
    result = sections.search([record(arm="free", start=0.1), record(steps=60)])
    assert result is not None
    (row,) = result["rows"]
    assert (row["flat"], row["difference"], row["pairs"]) == (None, None, 0)


def test_recovery_table(whole: str) -> None:
    table = rows(whole, "recovery")[1:]
    assert [row[1:3] for row in table] == [
        ["sgd", "poison"], ["sgd", "spike"], ["adamw", "poison"], ["adamw", "spike"],
    ]  # fmt: skip
    for row in table:
        assert row[3:] == ["0.1000", "0.7900", "0.8000", "−0.0100", "2", "yes"]


def test_download_holds_every_record(whole: str) -> None:
    records = sections.in_order(gauntlet())
    found = download(whole)
    assert len(found) == len(records) == len(rows(whole, "raw")) - 1
    for row, r in zip(found, records, strict=True):
        for name, value in r.items():
            text = (
                json.dumps(value, separators=(",", ":")) if type(value) in (list, dict) else value
            )
            assert row[name] == ("" if text is None else str(text)), name


@pytest.mark.usefixtures("no_figures")
def test_many_records_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    records = gauntlet()
    monkeypatch.setattr(page, "LARGEST_TABLE", 10)
    html = page.render(records, "Made up", COMMAND)
    assert len(download(html)) == len(records)
    cells = rows(html, "raw")[1:]
    assert len(cells) == len(records) / 2  # two seeds each
    monkeypatch.setattr(page, "LARGEST_CSV", 1000)
    html = page.render(records, "Made up", COMMAND)
    found = download(html)
    assert len(found) == len(cells)
    assert "too many for one page" in html
    assert {row["runs"] for row in found} == {"2"}
    assert found[0]["accuracy"] == "0.8"


@pytest.mark.usefixtures("no_figures")
def test_the_largest_suite_stays_below_three_megabytes() -> None:
    records = []
    for optimizer in ("sgd", "adamw", "rmsprop"):
        for net in ("gru", "mlp_deep", "cnn_bn", "mixer"):
            for seed in range(5):
                at: dict[str, Any] = {"net": net, "optimizer": optimizer, "seed": seed}
                records.append(record(**at))
                for i in range(60):
                    for arm, accuracy in (("fixed", 0.2), ("repair", 0.3)):
                        records.append(record(f"random-{i}", arm, accuracy, **at))
    assert len(records) > 7000
    assert len(page.render(records, "Made up", COMMAND).encode()) < 2_900_000


def test_names_from_records_are_escaped() -> None:
    text = page.render([record()], "<b>1 & 2</b>", "python '<x>'")
    assert "<b>1" not in text
    assert "&lt;x&gt;" in text


@pytest.mark.usefixtures("no_figures")
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(json.dumps(r) + "\n" for r in gauntlet())
    plain, packed = tmp_path / "cells.jsonl", tmp_path / "packed" / "cells.jsonl.gz"
    packed.parent.mkdir()
    plain.write_text(lines + '{"net": "gr')  # cut off by a kill
    packed.write_bytes(gzip.compress(lines.encode()))
    assert main([str(plain)]) == 0
    assert main([str(packed), "--output", str(tmp_path / "packed.html")]) == 0
    assert f"{len(gauntlet())} cells read" in capsys.readouterr().out
    first, second = ((tmp_path / n).read_text() for n in ("report.html", "packed.html"))
    assert first.replace("cells.jsonl", "cells.jsonl.gz") == second
    assert "python -m experiments.gauntlet.page cells.jsonl<" in first
    assert str(tmp_path) not in first


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cells.jsonl", None, "there is no file"),
        ("cells.jsonl", b"", "there is no finished cell in"),
        ("cells.jsonl", b"[1, 2]\n", "does not hold cells of the gauntlet"),
        ("cells.jsonl", b'{"net": "gru"}\n', "does not hold cells of the gauntlet"),
        ("cells.jsonl", b"\xff\n", "does not hold cells of the gauntlet"),
        (
            "cells.jsonl.gz",
            gzip.compress(b"{}", mtime=0)[:-9],
            "does not hold cells of the gauntlet",
        ),
        ("cells.jsonl.gz", b"plain", "ot a gzipped file"),
    ],
)
def test_unusable_files_are_one_sentence(
    name: str,
    content: bytes | None,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / name)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "report.html").exists()


def test_command_that_trained_the_cells() -> None:
    arguments = ["suite=starved", "output=/tmp/here", "workers=8", "title=A b"]
    expected = "python -m experiments.gauntlet suite=starved 'title=A b'"
    assert page.command_line(arguments) == expected


def test_a_finished_suite_writes_its_page(tmp_path: Path) -> None:
    """Every cell of the suite is there already, so nothing is trained."""
    made = [
        record(name, arm, seed=seed, optimizer=optimizer)
        for optimizer in ("sgd", "adamw")
        for seed in (0, 1)
        for name in ("flat", "usable", "geometric-1e-3", "head-only", "one-first")
        for arm in ("fixed", "repair")
    ]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    smaller = ["blocks.healthy.nets=[gru]", "blocks.starved.nets=[gru]"]
    arguments = ["suite=quick", *smaller, f"output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.gauntlet", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"40 cells\n{tmp_path / 'report.html'}\n"
    html = (tmp_path / "report.html").read_text()
    assert "Planned: 40 cells; finished: 40; missing: 0." in html
    assert "<h1>Gauntlet, quick" in html
    assert f"python -m experiments.gauntlet suite=quick {' '.join(map(repr, smaller))}" in (
        html.replace("&#39;", "'")
    )
    assert str(tmp_path) not in html
