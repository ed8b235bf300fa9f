"""docs/doctor.md quotes what the doctor says."""

from __future__ import annotations

from tests.doctor_docs import DOCUMENT, filled


def test_the_document_shows_real_output() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert filled(document) == document
