"""The packages are what the design says they are; and each rule can fail."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import architecture
from tests.architecture import (
    RULES,
    SURFACE,
    TREES,
    Limits,
    Violation,
    check,
    circles,
    crowds,
    direction,
    faces,
    lengths,
    main,
)
from tests.support import ROOT
from tests.support.imports import Module, read

Write = Callable[[dict[str, str]], dict[str, Module]]


@pytest.fixture(scope="module")
def found() -> dict[str, list[Violation]]:
    return check(ROOT)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files, each below ``densitylr`` unless it says otherwise, and reads them all."""

    def tree(files: dict[str, str]) -> dict[str, Module]:
        for name, text in files.items():
            path = tmp_path / (name if name.startswith(TREES) else f"densitylr/{name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")
            for folder in path.parents:
                if folder == tmp_path:
                    break
                (folder / "__init__.py").touch()
        return read(tmp_path, TREES)

    return tree


def said(violations: object) -> list[str]:
    return [str(violation) for violation in violations]  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", [*RULES, "surface"])
def test_the_repository_keeps_the_rule(found: dict[str, list[Violation]], rule: str) -> None:
    if found[rule]:
        pytest.fail("\n".join(said(found[rule])), pytrace=False)


# Reading


def test_imports_are_found_wherever_they_are_written(write: Write) -> None:
    tree = write(
        {
            "model/stages.py": "",
            "model/ranks.py": """
                from typing import TYPE_CHECKING
                if TYPE_CHECKING:
                    from densitylr.model.stages import Stage
                else:
                    import numpy
                if not TYPE_CHECKING:
                    import scipy.stats
                try:
                    from . import stages as here
                except ImportError:
                    from ..model.stages import Stage, find_stages
                class Ranks:
                    import json
                    def all(self):
                        import torch.distributed as dist
            """,
        }
    )
    made = tree["densitylr.model.ranks"].imports[1:]
    assert [(i.target, i.name) for i in made] == [
        ("densitylr.model.stages", "Stage"),
        ("numpy", None),
        ("scipy.stats", None),
        ("densitylr.model.stages", None),
        ("densitylr.model.stages", "Stage"),
        ("densitylr.model.stages", "find_stages"),
        ("json", None),
        ("torch.distributed", None),
    ]
    assert [i.target for i in made if i.typing] == ["densitylr.model.stages"]
    assert [i.target for i in made if i.late] == ["torch.distributed"]


# Circles


@pytest.mark.parametrize(
    "back",
    [
        "from densitylr.model.a import f",
        "def g():\n    from densitylr.model.a import f",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from densitylr.model.a import f",
        "from densitylr.model import f",
    ],
)
def test_a_circle_of_modules(write: Write, back: str) -> None:
    files = {"model/__init__.py": "from densitylr.model.a import f", "model/b.py": ""}
    files["model/a.py"] = "from densitylr.model.b import g"
    assert said(circles(write(files))) == []
    (circle,) = said(circles(write({"model/b.py": back})))
    assert circle.startswith("circles: densitylr/model/")
    assert "densitylr.model.a → densitylr.model.b → densitylr.model" in circle


def test_a_circle_of_packages_without_one_of_modules(write: Write) -> None:
    files = {
        "model/a.py": "import densitylr.history.a",
        "history/a.py": "",
        "history/b.py": "",
        "model/b.py": "",
    }
    assert said(circles(write(files))) == []
    tree = write({"history/b.py": "import densitylr.model.b"})
    assert said(circles(tree)) == [
        "circles: densitylr: packages: densitylr.history → densitylr.model → densitylr.history"
    ]


def test_a_circle_of_a_package_and_a_module_beside_it(write: Write) -> None:
    tree = write(
        {
            "experiments/report/page.py": "import experiments.data",
            "experiments/report/charts.py": "",
            "experiments/data.py": "import experiments.report.charts",
        }
    )
    (circle,) = said(circles(tree))
    assert circle == (
        "circles: experiments: packages: experiments.data → experiments.report → experiments.data"
    )


# Direction


@pytest.mark.parametrize(
    ("importer", "text", "because"),
    [
        ("model/a.py", "from densitylr.monitor import x", "model is below monitor"),
        ("monitor/a.py", "from densitylr.policy import x", "monitor is beside policy"),
        ("diagnosis/a.py", "import densitylr.policy", "diagnosis is beside policy"),
        ("recovery/a.py", "from densitylr import controller", "recovery is below controller"),
        ("controller/a.py", "from densitylr import DensityLR", "controller is below __init__"),
        ("controller/a.py", "import experiments.data", "densitylr is below experiments"),
        ("monitor/measure/a.py", "import densitylr.monitor.b", "measure is below b"),
        ("doctor/script/a.py", "import densitylr.doctor.watch", "script is below watch"),
        ("doctor/watch/a.py", "import densitylr.doctor.cli", "watch is below cli"),
    ],
)
def test_an_import_that_does_not_go_down(
    write: Write, importer: str, text: str, because: str
) -> None:
    files = {f"{p}/__init__.py": "" for p in ("monitor", "policy", "controller", "doctor/watch")}
    files |= {"experiments/data.py": "", "monitor/b.py": "", "doctor/cli.py": ""}
    (broken,) = said(direction(write({**files, importer: f"\n{text}"})))
    assert broken.startswith(f"direction: densitylr/{importer}:2: {because} and may not import ")


def test_imports_that_go_down(write: Write) -> None:
    tree = write(
        {
            "__init__.py": "from densitylr.controller import DensityLR",
            "__main__.py": "from densitylr.doctor.cli import main",
            "model/a.py": "",
            "monitor/measure/a.py": "from densitylr.model.a import x",
            "monitor/b.py": "from densitylr.monitor.measure.a import x",
            "monitor/c.py": "import densitylr.monitor.b",
            "recovery/a.py": "from densitylr.monitor.b import x",
            "controller/__init__.py": "import densitylr.recovery.a",
            "integrations/fastai.py": "from densitylr import DensityLR",
            "doctor/script/a.py": "",
            "doctor/watch/a.py": "import densitylr.doctor.script.a\nimport densitylr.monitor.b",
            "doctor/cli.py": "from densitylr.doctor.watch.a import x",
            "experiments/a.py": "import densitylr.doctor.cli",
        }
    )
    assert said(direction(tree)) == []


def test_a_pair_that_is_written_down_is_allowed(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = write({"model/a.py": "", "history/a.py": "import densitylr.model.a"})
    assert len(said(direction(tree))) == 1
    monkeypatch.setattr(architecture, "BESIDE", frozenset({("history", "model")}))
    assert said(direction(tree)) == []


def test_every_package_has_a_place(write: Write) -> None:
    assert said(direction(write({"utilities/a.py": "", "monitor/any.py": ""}))) == [
        "direction: densitylr.utilities: has no place in ORDER of tests/architecture.py"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "import torch",
        "from torch.optim import SGD",
        "import densitylr.doctor.watch.losses",  # its package imports torch
        "from densitylr import History",  # found when it is asked for, and needs torch
    ],
)
def test_torch_where_it_may_not_be(write: Write, text: str) -> None:
    files = {
        "__init__.py": "if TYPE_CHECKING:\n    from densitylr.history.history import History",
        "history/history.py": "import torch",
        "doctor/watch/__init__.py": "import torch",
        "doctor/watch/losses.py": "",
        "doctor/cli.py": f"try:\n    {text}\nexcept ImportError:\n    pass",
    }
    (broken,) = said(direction(write(files)))
    assert broken.startswith("direction: densitylr/doctor/cli.py: imports torch at once: ")
    assert broken.endswith(" → torch")
    late = f"def f():\n    {text}\nif TYPE_CHECKING:\n    import torch"
    assert said(direction(write({"doctor/cli.py": late}))) == []


def test_pictures_only_where_they_are_drawn(write: Write) -> None:
    tree = write(
        {
            "plots/__init__.py": "from densitylr.plots.curves import rates",
            "plots/curves.py": "from matplotlib.figure import Figure",
            "doctor/report/page.py": """
                from densitylr.plots import rates
                if TYPE_CHECKING:
                    from matplotlib.figure import Figure
                def draw():
                    from densitylr import plots
            """,
            "history/a.py": "def draw():\n    import matplotlib.pyplot",
            "history/b.py": "import hydra",
            "experiments/a.py": "import hydra\nimport matplotlib",
        }
    )
    assert said(direction(tree)) == [
        "direction: densitylr/doctor/report/page.py:2: densitylr.plots needs matplotlib: import it "
        "in the function that draws",
        "direction: densitylr/history/a.py:2: only densitylr.plots imports matplotlib",
        "direction: densitylr/history/b.py:1: Hydra is for experiments",
    ]


# Crowds and lengths


def test_a_folder_with_too_many_modules(write: Write) -> None:
    tree = write(
        {
            **{f"model/{name}.py": "" for name in ("a", "b", "c", "d", "e", "f", "__main__")},
            "model/g/a.py": "",
            **{f"integrations/host{i}.py": "" for i in range(9)},
        }
    )
    assert said(crowds(tree)) == []
    assert said(crowds(write({"model/h.py": ""}))) == [
        "crowds: densitylr/model: 8 modules, at most 7: a, b, c, d, e, f, g, h"
    ]


def test_a_layer_with_too_many_packages(write: Write) -> None:
    assert said(crowds(write({}), Limits(packages=3))) == [
        "crowds: densitylr: 4 packages in a layer, at most 3: monitor, policy, plots, diagnosis"
    ]


def test_a_file_that_is_too_long(write: Write) -> None:
    assert said(lengths(write({"model/a.py": "\n" * 450}))) == []
    assert said(lengths(write({"experiments/b/c.py": "# on\n" * 451}))) == [
        "lengths: experiments/b/c.py: 451 lines, at most 450"
    ]


# Faces and the surface


@pytest.fixture
def faced(write: Write) -> dict[str, Module]:
    return write(
        {
            "__init__.py": '__all__ = ["Reading"]',
            "history/__init__.py": '__all__: list[str] = ["Reading"]',
            "history/records.py": "",
            "monitor/__init__.py": '__all__ = ["Monitor"]',
            "monitor/measure/__init__.py": '__all__ = ["tabulate"]',
            "monitor/measure/buffer.py": "",
            "integrations/csv.py": '__all__ = ["CSVSink"]',
        }
    )


@pytest.mark.usefixtures("faced")
@pytest.mark.parametrize(
    ("text", "because"),
    [
        (
            "from densitylr.history.records import Reading, Decision",
            "densitylr.history.records is past the face of densitylr.history: Reading, Decision",
        ),
        (
            "from densitylr.history import records",
            "densitylr.history.records is past the face of densitylr.history: all of it",
        ),
        (
            "import densitylr.monitor.measure.buffer",
            "densitylr.monitor.measure.buffer is past the face of densitylr.monitor: all of it",
        ),
        (
            "def f():\n    from densitylr.history import Decision, Reading",
            "not in __all__ of densitylr.history: Decision",
        ),
        ("from densitylr.history import *", "not in __all__ of densitylr.history: *"),
        ("from densitylr import History", "not in __all__ of densitylr: History"),
        (
            "from densitylr.integrations.csv import Writer",
            "not in __all__ of densitylr.integrations.csv: Writer",
        ),
    ],
)
@pytest.mark.parametrize("importer", ["densitylr/controller/a.py", "experiments/a.py"])
def test_an_import_past_a_face(write: Write, importer: str, text: str, because: str) -> None:
    line = 1 + text.startswith("def")
    assert said(faces(write({importer: text}))) == [f"faces: {importer}:{line}: {because}"]


@pytest.mark.usefixtures("faced")
def test_imports_by_a_face_and_within_a_package(write: Write) -> None:
    outside = """
        import densitylr
        from densitylr import Reading, history
        from densitylr.history import Reading
        from densitylr.monitor import Monitor, measure
        from densitylr.monitor.measure import tabulate
        from densitylr.integrations import csv
        from densitylr.integrations.csv import CSVSink
    """
    within = "from densitylr.monitor.measure.buffer import Probe\nimport densitylr.monitor.b"
    files = {"experiments/a.py": outside, "controller/a.py": outside, "monitor/b.py": ""}
    assert said(faces(write({**files, "monitor/a.py": within}))) == []


@pytest.mark.usefixtures("faced")
def test_the_surface_is_kept_in_one_file(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / SURFACE).parent.mkdir()
    assert len(check(tmp_path)["surface"]) == 5
    assert main([str(tmp_path), "--write-surface"]) == 0
    assert (tmp_path / SURFACE).read_text().splitlines()[:4] == [
        "densitylr",
        "    Reading",
        "densitylr.history",
        "    Reading",
    ]
    assert "densitylr.history" in capsys.readouterr().out
    write({"history/__init__.py": '__all__ = ["Decision"]'})
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[:2] == [
        "surface: tests/public_surface.txt: densitylr.history: Reading is listed and not public",
        "surface: tests/public_surface.txt: densitylr.history: Decision is public and not listed",
    ]
