"""docs/doctor.md and README.md quote what the doctor says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.doctor import DOCUMENTS, filled


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_the_document_shows_real_output(path: Path) -> None:
    assert filled(path) == path.read_text(encoding="utf-8")
