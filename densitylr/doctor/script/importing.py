"""Be called as soon as a module has been imported, by whomever."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["when_imported"]


def when_imported(name: str, act: Callable[[], object]) -> None:
    """Call ``act()`` once, right after the import of a module has succeeded, or now.

    Args:
        name: a module's name.
        act: called before the ``import`` statement returns; what it raises, the statement raises.
    """
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder(MetaPathFinder):
    """Finds one module, where all others would, and gives it a loader that tells."""

    def __init__(self, name: str, act: Callable[[], object]) -> None:
        self.name, self.act = name, act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)  # not there now; it may be later
            return None
        spec.loader = _Loader(spec.loader, self.act)
        return spec


class _Loader(Loader):
    """The module's own loader, and a call after it; the module keeps its own."""

    def __init__(self, own: Loader, act: Callable[[], object]) -> None:
        self.own, self.act = own, act

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        self.act()
