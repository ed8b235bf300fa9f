"""Where in the script a call came from, and what the script calls the things in it.

Code objects know the exact range of the call that a frame is in, so the words of the
script can be read from its file, and no variable is inspected.
"""

from __future__ import annotations

import ast
import itertools
import linecache
import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

__all__ = ["Call", "call_in_script", "line_in_script"]

_HERE = str(Path(__file__).parents[2])
_LIBRARIES = (
    _HERE,
    *(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")),
    "<",  # frozen modules and generated code
)


@dataclass(frozen=True)
class Call:
    """A call in the source of a script.

    Attributes:
        file: its path.
        line: the line that the call begins on.
        text: the call's words, ``model(x)``; empty where they are not known.
        function: what is called, ``model``; empty where it is not known.
        assigned: the name that the result is given at once, ``loss``; else empty.
        within: the qualified name of the function or class that it stands in.
    """

    file: str
    line: int
    text: str = ""
    function: str = ""
    assigned: str = ""
    within: str = ""

    def __str__(self) -> str:
        return f"{Path(self.file).name}, line {self.line}"


def call_in_script() -> Call | None:
    """The innermost call that is going on in code of no installed library, or None.

    Its words are left out where a library other than torch stands in between: it is not the
    script then that calls what was called.
    """
    direct = True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        file = frame.f_code.co_filename
        direct = direct and (file.startswith(_HERE) or f"{os.sep}torch{os.sep}" in file)
        frame = frame.f_back
    if frame is None:
        return None
    return _call(frame) if direct else Call(frame.f_code.co_filename, frame.f_lineno)


def line_in_script() -> str:
    """``file:line`` of the innermost frame of no installed library; empty if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _call(frame: FrameType) -> Call:
    file = frame.f_code.co_filename
    positions = itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None)
    first, last, start, end = next(positions, (None, None, None, None))
    if first is None or last is None or start is None or end is None:
        return Call(file, frame.f_lineno)
    lines = linecache.getlines(file)[first - 1 : last]
    if not lines:
        return Call(file, first)
    encoded = [line.encode() for line in lines]  # columns count bytes
    encoded[-1] = encoded[-1][:end]
    text = b"".join([encoded[0][start:], *encoded[1:]]).decode(errors="replace")
    call = _parsed(text)
    function = ast.unparse(call.func) if call is not None else ""
    assigned = _assigned(lines[0].encode()[:start].decode())
    return Call(file, first, text, function, assigned, frame.f_code.co_qualname)


def _parsed(text: str) -> ast.Call | None:
    try:
        found = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    return found if isinstance(found, ast.Call) else None


def _assigned(before: str) -> str:
    """The one name in ``name =``; empty for anything else."""
    target, equals, rest = before.strip().partition("=")
    target = target.partition(":")[0].strip()
    named = target.replace(".", "_").isidentifier()
    return target if equals and named and not rest.strip() else ""
