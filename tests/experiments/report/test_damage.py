"""Damaged and foreign files: every folder is in the report with its reason, whatever is in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.report import report
from experiments.report.sections import sections
from experiments.train.runs import find_runs
from tests.experiments.fake_runs import fake_run
from tests.experiments.pages import words

FILES = ("run.json", "config.yaml", "metrics.csv", "history.npz")
FOREIGN = (
    b"",
    b"{}",
    b"[1, 2",
    b"\xff\xfe\x00\x01",
    b"a: &a [*a]\n",
    b"seed: !!python/object:os.system {}\n",
    b'{"arm": "\\ud800", "optimizer": "sgd", "status": "done", "seed": 1}',
    b'{"arm": "a/b", "optimizer": "sgd", "status": "done", "seed": 1' + b"0" * 5000 + b"}",
    b"[" * 100_000,
    b"step,seconds,train_loss,test_loss,accuracy,macro_f1\nnan,1,1,1,1,1\n",
    b"step,seconds,train_loss,test_loss,accuracy,macro_f1\n2,1,,,,\n1,2,,,,\n",
    b"PK\x03\x04" + bytes(200),
)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("curve", "heatmaps"):
        monkeypatch.setattr(sections, name, lambda *args: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of whole runs."""
    root = tmp_path_factory.mktemp("whole")
    fake_run(root, "geometric/fixed", 0)
    fake_run(root, "geometric/repair", 0)
    return root


harm = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 0.999)),
    st.tuples(st.just("flip"), st.floats(0, 0.999), st.integers(1, 255)),
    st.tuples(st.just("replace"), st.sampled_from(FOREIGN)),
    st.tuples(st.just("replace"), st.binary(max_size=300)),
    st.tuples(st.just("remove")),
    st.tuples(st.just("folder")),
)


def damage(path: Path, what: tuple) -> None:
    data = bytearray(path.read_bytes())
    place = int(len(data) * what[1]) if what[0] in ("cut", "flip") else 0
    if what[0] == "cut":
        del data[place:]
    elif what[0] == "flip":
        data[place] ^= what[2]
    elif what[0] == "replace":
        data = bytearray(what[1])
    path.unlink()
    if what[0] == "folder":
        path.mkdir()
    elif what[0] != "remove":
        path.write_bytes(data)


@settings(max_examples=60)
@given(harms=st.dictionaries(st.sampled_from(FILES), harm, min_size=1))
def test_a_damaged_run_is_in_the_report(
    whole: Path, harms: dict[str, tuple], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("damaged") / "runs"
    shutil.copytree(whole, root)
    folder = root / "sgd" / "geometric-repair" / "0"
    for name, what in harms.items():
        damage(folder / name, what)
    page = root.parent / "report.html"
    left = any(folder.iterdir())
    assert report.write_report([root], page) == (2 if left else 1)
    text = page.read_text(encoding="utf-8")
    for run in find_runs([root]):
        assert run.label in text
        assert run.status == "done" or run.reason
    assert left == ("sgd/geometric-repair/0" in text)
    shutil.rmtree(root.parent)


@pytest.mark.parametrize("name", ["run.json", "history.npz"])
@given(share=st.floats(0, 0.99))
def test_a_truncated_record_or_history_never_counts(
    whole: Path, name: str, share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("cut") / "runs"
    shutil.copytree(whole, root)
    damage(root / "sgd" / "geometric-repair" / "0" / name, ("cut", share))
    (run,) = [r for r in find_runs([root]) if "geometric-repair" in r.label]
    assert run.status == "broken"
    assert run.reason.startswith(f"{name}:")
    shutil.rmtree(root.parent)


def test_strange_files_in_a_run_folder_are_named(tmp_path: Path) -> None:
    folder = fake_run(tmp_path, "flat/fixed")
    (folder / "weights.pt").write_bytes(b"x")
    (folder / ".lock").write_bytes(b"")
    assert "and that were not read" in (text := words(tmp_path))
    assert "sgd/flat-fixed/0: weights.pt." in text


def test_what_is_left_of_a_run_without_record_and_config_is_named(tmp_path: Path) -> None:
    folder = fake_run(tmp_path, "flat/fixed")
    (folder / "run.json").unlink()
    (folder / "config.yaml").unlink()
    (run,) = find_runs([tmp_path])
    assert (run.status, run.reason) == (
        "broken",
        "neither run.json nor config.yaml beside the files of a run",
    )
    assert run.reason in words(tmp_path)


def test_a_folder_behind_a_link_is_read_once(tmp_path: Path) -> None:
    fake_run(tmp_path / "elsewhere", "flat/fixed")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "runs", target_is_directory=True)
    assert [run.status for run in find_runs([tmp_path / "runs"])] == ["done"]
    assert len(find_runs([tmp_path])) == 1


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_run(tmp_path, "flat/fixed")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    runs = {run.label.split("/")[-1]: run for run in find_runs([tmp_path])}
    assert runs["closed"].reason == "cannot be listed: Permission denied"


def test_a_name_that_is_no_text_is_written_as_far_as_it_is(tmp_path: Path) -> None:
    fake_run(tmp_path / os.fsdecode(b"bad\xff"), "flat/fixed")
    report.write_report([tmp_path], tmp_path / "r.html")
    assert "/bad?/sgd/flat-fixed/0" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_traceback_is_shown_where_the_failure_is_named(tmp_path: Path) -> None:
    fake_run(tmp_path, "flat/fixed", status="failed", traceback="Traceback: in line_that_failed")
    assert "in line_that_failed" in words(tmp_path)
