"""Ten scripts as people write them: the same numbers under the doctor, and the right diagnosis."""

from __future__ import annotations

from pathlib import Path

import pytest

from densitylr import History
from tests.doctor_table import SCRIPTS, Example, alone, doctored, run

TWICE = """
import runpy, sys
for variant in ([], ["--ill"]):
    sys.argv = [sys.argv[-1] if not variant else sys.argv[0], *variant]
    runpy.run_path(sys.argv[0], run_name="__main__")
    print("<end>")
"""


def both_alone(example: Example, folder: Path) -> list[str]:
    """The last numbers of both variants without the doctor, from one process to save its start."""
    program = folder / "twice.py"
    program.write_text(TWICE)
    done = run([str(program), str(example.path)], folder)
    assert done.code == 0, done.stderr
    parts = done.stdout.split("<end>\n")[:2]
    return [part.strip().splitlines()[-1] for part in parts]


@pytest.mark.parametrize("example", SCRIPTS, ids=lambda e: e.name)
def test_same_number_and_right_diagnosis(example: Example, tmp_path: Path) -> None:
    if example.missing:
        pytest.skip(example.missing)
    numbers = both_alone(example, tmp_path)
    for number, arguments, illness in zip(
        numbers, ([], ["--ill"]), ({}, example.illness), strict=True
    ):
        seen = doctored(example, tmp_path, *arguments)
        assert seen.code == 0, seen.stderr
        assert seen.number == number
        assert {key: word for key, word in seen.words.items() if word != "learning"} == illness
        assert set(illness) < set(seen.words) or not illness
        assert seen.words, seen.stderr
        assert ("nothing to do" in seen.stderr) == (not illness) or example.name == "gan"
    folders = sorted((tmp_path / "densitylr-doctor").iterdir())
    assert [f.name for f in folders] == [f"{example.name}-{n}" for n in (1, 2)]
    for folder in folders:
        assert (folder / "index.html").stat().st_size
        assert all(len(History.load(file)) for file in folder.glob("*.npz"))


def test_one_script_alone_in_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    """What `both_alone` saves is no difference: a process may run both variants."""
    plain = SCRIPTS[0]
    assert both_alone(plain, tmp_path)[1] == alone(plain, tmp_path, "--ill").number
