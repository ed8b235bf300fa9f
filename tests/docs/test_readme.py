"""The README does what it says, and quotes only what committed results give."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from experiments.claims import claims
from experiments.gauntlet.law import README_TABLES, TABLES
from experiments.overhead.tables import readme_tables
from experiments.report.page import fill
from tests.matrix.sections import SECTIONS, cells_of
from tests.support import ROOT

RESULTS = ROOT / "experiments" / "claims" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", README, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_code_runs_and_repairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "history.npz").exists()
    (found,) = names["opt"].diagnose()
    assert str(found) in " ".join(README.split())


def test_the_claims_are_those_of_the_committed_runs() -> None:
    expected = "\n".join(str(claim) for claim in claims(RESULTS))
    assert block("claims").strip() == f"```\n{expected}\n```"


def test_the_cost_is_that_of_the_committed_benchmark() -> None:
    folder = ROOT / "experiments" / "overhead" / "results"
    kept = [
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("cpu.json", "cpu_1_thread.json", "composer.json")
    ]
    for name, text in readme_tables(kept).items():
        assert block(name).strip() == text


def test_the_law_is_told_by_the_committed_records() -> None:
    law = (ROOT / "docs" / "law.md").read_text(encoding="utf-8")
    assert fill(law, TABLES) == law
    assert fill(README, README_TABLES) == README


def test_a_document_without_the_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="one block named 'gauntlet'"):
        fill("no block", README_TABLES)


def test_the_matrix_has_every_cell_and_none_that_failed() -> None:
    shown = set()
    rows: list[list[str]] = []
    for line in [*block("matrix").splitlines(), ""]:
        if line.startswith("|"):
            rows.append([entry.strip() for entry in line.strip("|").split("|")])
        elif rows:
            (section, *columns), _, *body = rows
            for row, *entries in body:
                for column, entry in zip(columns, entries, strict=True):
                    assert re.fullmatch(r"✓|(refused|n/a) \(\d+\)", entry), (row, column, entry)
                    shown.add((section, row, column))
            rows = []
    cells = {(c.section, c.row, c.column) for name in SECTIONS for c in cells_of(name)}
    assert shown == cells


def test_what_the_readme_points_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    targets = re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)
    assert {"compare", "test"} <= set(commands) <= set(targets)
