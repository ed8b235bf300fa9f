"""Each example of a host finds an ill run, and repairs it."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.matrix.cells import UnavailableError
from tests.support import ROOT
from tests.support.host_runs import fastai

EXAMPLES = ROOT / "examples"


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("huggingface_trainer", "transformers"),
        ("accelerate_loop", "accelerate"),
        ("fastai_learner", "fastai"),
        ("timm_vit", "timm"),
    ],
)
def test_an_example_finds_and_repairs(
    name: str, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(host)
    if host == "fastai":
        try:
            fastai()  # which warns when it is imported
        except UnavailableError as why:
            pytest.skip(str(why))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    found = re.search(
        r"accuracy: .* (0\.\d+|1\.0+), .* (0\.\d+), .* (0\.\d+|1\.0+)$", printed, re.M
    )
    assert found is not None
    flat, ill, repaired = map(float, found.groups())
    assert ill < flat - 0.1
    assert repaired > ill + 0.8 * (flat - ill)
    assert re.search(r"is starved since step [24]:", printed)  # 4 where the schedule starts from 0
