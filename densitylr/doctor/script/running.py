"""Run a script or a module as ``__main__``, so that it cannot tell it is not alone.

``sys.argv``, ``sys.path[0]``, ``sys.orig_argv`` and ``sys.modules["__main__"]`` are what they
would be, so that pickles refer to ``__main__``, and processes that are spawned import the script
and not the doctor. How it ends is kept, too: see `run`.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import pkgutil
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import TracebackType

__all__ = ["Target", "interpreter", "run"]

_HERE = str(Path(__file__).parents[2]) + os.sep


class Target:
    """What is to be run: a file, a directory or archive with a ``__main__.py``, or a module.

    Args:
        name: a path, or a module's name.
        arguments: what follows it on the command line.
        module: it is a module's name, as after ``python -m``.
    """

    def __init__(self, name: str, arguments: Sequence[str] = (), *, module: bool = False) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.module = module

    @property
    def label(self) -> str:
        """A short name: that of the file without its ending, or that of the module."""
        return self.name if self.module else Path(self.name).resolve().stem

    def command(self) -> list[str]:
        """The arguments with which Python itself runs it."""
        return [*(["-m"] if self.module else []), self.name, *self.arguments]


def run(target: Target, afterwards: Callable[[BaseException | None], object]) -> None:
    """Run it, call ``afterwards`` with what ended it, and end as it would have ended alone.

    What Python prints about an exception is printed before ``afterwards`` is called, from the
    script's own frames on. Nothing is called in a child that the script forked, nor where there
    was nothing to run: Python's own error is all then.

    Args:
        target: what to run.
        afterwards: called with the exception that ended the script, or None.

    Raises:
        BaseException: what the script raised, silenced where it has been printed already, so
            that the interpreter ends with its exit code or signal.
    """
    process = os.getpid()
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    try:
        _execute(target, main)
    except SystemExit as stop:
        if os.getpid() != process:
            raise
        code = stop.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
        if _begun(main):
            afterwards(stop)
        raise SystemExit(code) from None
    except BaseException as error:
        if os.getpid() != process:
            raise
        with contextlib.suppress(Exception):  # it may be closed, as Python does not mind either
            sys.stdout.flush()
        error.__traceback__ = _own_frames(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        sys.excepthook = lambda *_: None
        if _begun(main):
            afterwards(error)
        raise
    else:
        if os.getpid() == process:
            afterwards(None)


def _begun(main: types.ModuleType) -> bool:
    """Whether its code has been found and compiled: only then has it a file."""
    return hasattr(main, "__file__")


def _execute(target: Target, main: types.ModuleType) -> None:
    sys.modules["__main__"] = main
    sys.orig_argv = [*interpreter(), *target.command()]
    sys.argv = [target.name, *target.arguments]
    if target.module:
        _begin_path_with(os.getcwd())
        sys.argv[0] = "-m"
        # What `python -m` itself calls: its errors, frames and names are those of Python.
        runpy._run_module_as_main(target.name)  # type: ignore[attr-defined]
    elif pkgutil.get_importer(target.name) is not None:  # a directory or an archive
        sys.path[: 0 if sys.flags.safe_path else 1] = [os.path.abspath(target.name)]
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
    else:
        _run_file(target.name, main)


def _run_file(name: str, main: types.ModuleType) -> None:
    path = os.path.abspath(name)
    try:
        source = Path(path).read_bytes()
    except OSError as error:
        print(
            f"{interpreter()[0]}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    _begin_path_with(os.path.dirname(os.path.realpath(path)))
    code = compile(source, path, "exec", dont_inherit=True)
    main.__dict__.update(
        __file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path)
    )
    exec(code, main.__dict__)


def _begin_path_with(folder: str) -> None:
    """Put ``folder`` where Python has put the doctor's own; with ``-P`` there is none."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def interpreter() -> list[str]:
    """Python and its own options, as they were typed."""
    given = sys.orig_argv
    if "-m" in given and given[given.index("-m") + 1 :][:1] == ["densitylr"]:
        return given[: given.index("-m")]
    return given[:1]


def _own_frames(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the doctor's frames, which come first."""
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_HERE):
        trace = trace.tb_next
    return trace
