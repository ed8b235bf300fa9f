"""``python -m tests.docs.doctor`` fills docs/doctor.md and README.md with what the doctor says."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.doctor.table import environment
from tests.support import ROOT

__all__ = ["DOCUMENTS", "filled"]

COMMANDS = {
    "ill": ["train.py", "--ill"],
    "healthy": ["train.py"],
    "compare": ["--compare", "train.py", "--ill"],
}
DOCUMENTS = {ROOT / "docs" / "doctor.md": tuple(COMMANDS), ROOT / "README.md": ("ill",)}
"""Which blocks a document has."""


@functools.cache
def said(name: str) -> str:
    """What is printed on stderr, from a folder with the example script as ``train.py``."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "examples" / "scripts" / "plain_loop.py", Path(folder) / "train.py")
        done = subprocess.run(
            [sys.executable, "-m", "densitylr", *COMMANDS[name]],
            cwd=folder,
            env={**environment(), "COLUMNS": "100"},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        text = done.stderr.replace(str(Path(folder).resolve()) + "/", "")
    if name == "compare":  # what each run says of itself has been shown
        text = text[text.index("densitylr: two runs") :]
    command = " ".join(["python -m densitylr", *COMMANDS[name]])
    return f"```\n$ {command}\n{text.strip()}\n```"


def filled(path: Path) -> str:
    """The document with each of its blocks replaced by what is printed now."""
    document = path.read_text(encoding="utf-8")
    for name in DOCUMENTS[path]:
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)"
        if len(re.findall(pattern, document, re.DOTALL)) != 1:
            raise ValueError(f"{path.name} must have one block named {name!r}")
        text = said(name)
        document = re.sub(
            pattern, lambda m, text=text: m[1] + text + m[2], document, flags=re.DOTALL
        )
    return document


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(filled(path), encoding="utf-8")
