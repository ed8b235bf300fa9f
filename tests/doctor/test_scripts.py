"""Ten scripts as people write them: the same numbers under the doctor, and the right diagnosis."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from densitylr import History
from tests.doctor.table import SCRIPTS, Example, doctored, run

ALL = """
import runpy, sys
for script in sys.argv[1:]:
    for variant in ([], ["--ill"]):
        sys.argv = [script, *variant]
        runpy.run_path(script, run_name="__main__")
        print("<end>", flush=True)
"""


@functools.cache
def alone_numbers(needs: str) -> dict[str, list[str]]:
    """The last numbers of both variants without the doctor, of all scripts with these needs.

    They share a process, as starting one costs more than training.
    """
    scripts = [example for example in SCRIPTS if example.needs == needs]
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "all.py"
        program.write_text(ALL)
        done = run([str(program), *(str(example.path) for example in scripts)], Path(folder))
    assert done.code == 0, done.stderr
    lines = [part.strip().splitlines()[-1] for part in done.stdout.split("<end>\n")[:-1]]
    return {e.name: lines[2 * i : 2 * i + 2] for i, e in enumerate(scripts)}


@pytest.mark.parametrize("example", SCRIPTS, ids=lambda e: e.name)
def test_same_number_and_right_diagnosis(example: Example, tmp_path: Path) -> None:
    if example.missing:
        pytest.skip(example.missing)
    for number, arguments, illness in zip(
        alone_numbers(example.needs)[example.name],
        ([], ["--ill"]),
        ({}, example.illness),
        strict=True,
    ):
        seen = doctored(example, tmp_path, *arguments)
        assert seen.code == 0, seen.stderr
        assert seen.number == number
        assert seen.words, seen.stderr
        assert {key: word for key, word in seen.words.items() if word != "learning"} == illness
        assert ("nothing to do" in seen.stderr) == (not illness) or example.name == "gan"
    folders = sorted((tmp_path / "densitylr-doctor").iterdir())
    assert [f.name for f in folders] == [f"{example.name}-{n}" for n in (1, 2)]
    for folder in folders:
        assert (folder / "index.html").stat().st_size
        assert all(len(History.load(file)) for file in folder.glob("*.npz"))
