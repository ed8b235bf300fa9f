"""What each module of a source tree imports and offers, without importing any of them."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Import", "Module", "read"]

_TYPING = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@dataclass(frozen=True)
class Import:
    """One imported thing.

    Attributes:
        target: the module it is taken from, or the module itself.
        name: what is taken from it; None where it is the module itself.
        line: where it is written.
        late: in a function, so not when the module is imported.
        typing: under ``if TYPE_CHECKING``, so never.
    """

    target: str
    name: str | None
    line: int
    late: bool = False
    typing: bool = False

    @property
    def at_once(self) -> bool:
        return not (self.late or self.typing)


@dataclass(frozen=True)
class Module:
    """One file; a package is named for its folder.

    Attributes:
        name: as it is imported.
        path: below the repository.
        lines: how many it has.
        imports: in the order in which they are written.
        public: its ``__all__``; None where it has none.
    """

    name: str
    path: str
    lines: int
    imports: tuple[Import, ...]
    public: tuple[str, ...] | None

    @property
    def is_package(self) -> bool:
        return self.path.endswith("/__init__.py")


def read(root: Path, folders: Sequence[str]) -> dict[str, Module]:
    """All modules in some folders of a repository, by name."""
    paths = [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]
    names = {_name(path.relative_to(root)): path for path in paths}
    found = {}
    for name, path in names.items():
        text = path.read_text(encoding="utf-8")
        syntax = ast.parse(text, str(path))
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        imports = tuple(_imports(syntax, package, names))
        where = path.relative_to(root).as_posix()
        found[name] = Module(name, where, len(text.splitlines()), imports, _public(syntax))
    return found


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(
    node: ast.AST, package: str, modules: Container[str], late: bool = False, typing: bool = False
) -> Iterator[Import]:
    """What is imported at a place and below it, a name that is a module's as that module."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, None, node.lineno, late, typing)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            target, name = (whole, None) if whole in modules else (base, alias.name)
            yield Import(target, name, node.lineno, late, typing)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in _TYPING:
        for child in node.body:
            yield from _imports(child, package, modules, late, True)
        for child in node.orelse:
            yield from _imports(child, package, modules, late, typing)
    else:
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, package, modules, late, typing)


def _public(syntax: ast.Module) -> tuple[str, ...] | None:
    for node in syntax.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
                return tuple(ast.literal_eval(node.value))
    return None
