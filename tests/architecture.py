"""``python -m tests.architecture``: whether the packages still are what the design says they are.

It reads the imports of ``densitylr`` and ``experiments`` without importing anything, checks the
six rules below, prints a line for each violation (exit code 1) and a table of the packages.
``--write-surface`` writes ``tests/public_surface.txt`` anew, the one list of all public names.

1. circles: no module, and no package, imports itself by way of others.
2. direction: packages import what is below them; few things import torch or matplotlib.
3. crowds: few modules in a folder, few packages in a layer.
4. lengths: no long file.
5. faces: from outside, a package is imported by its ``__init__``, and only what that lists.
6. surface: what is public is what ``tests/public_surface.txt`` says.

An import counts wherever it is written: in a function and under ``if TYPE_CHECKING``, too. Only
where it matters when something is imported (torch, matplotlib) are those two passed over. Modules
that are imported by a name in a string are not seen.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tests.support import ROOT
from tests.support.imports import Import, Module, read

__all__ = ["Limits", "Violation", "check", "main"]


@dataclass(frozen=True)
class Limits:
    """How much there may be of each."""

    modules: int = 7
    """files and packages in a folder"""
    packages: int = 4
    """packages in a layer of ``densitylr``"""
    lines: int = 450
    """lines in a file, blank ones and comments included"""


LIMITS = Limits()

TREES = ("densitylr", "experiments")

REST = "*"
FACE = "__init__"
ORDER: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (("densitylr",), ("experiments",)),
    "densitylr": (
        ("model", "history"),
        ("monitor", "policy", "plots", "diagnosis"),
        ("recovery",),
        ("controller",),
        (FACE,),
        ("integrations",),
        ("doctor",),
        ("__main__",),
    ),
    "densitylr.monitor": (("measure",), (REST,)),
    "densitylr.doctor": (("script",), ("watch",), ("report",), ("compare",), ("cli",)),
}
"""What a folder has, from low to high. Each imports only what is below it; what is in one level
does not import its neighbours, but for what ``*`` stands for: whatever is named nowhere else.
"""

BESIDE: frozenset[tuple[str, str]] = frozenset()
"""Pairs (importer, imported) within a level that are allowed all the same. None is needed."""

CROWDED = ("densitylr", "densitylr.integrations")
"""Folders that may have any number of modules: the first is judged by its layers, the second is
one module for each host, and no host knows of another.
"""

WITHOUT_TORCH = (
    "densitylr",
    "densitylr.__main__",
    "densitylr.doctor.cli",
    "densitylr.doctor.compare",
    "densitylr.doctor.script",
    "densitylr.doctor.script.*",
)
"""Imported before the user's script is, which may set OMP_NUM_THREADS and the like first."""

SURFACE = Path("tests") / "public_surface.txt"


@dataclass(frozen=True)
class Violation:
    """A broken rule: where, and in what way."""

    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.what}"


Tree = Mapping[str, Module]


def _inside(name: str, folder: str) -> bool:
    return folder == "" or name == folder or name.startswith(f"{folder}.")


def _child(name: str, folder: str) -> str:
    """The part of a folder that a module within it belongs to: a file, a package, or the face."""
    rest = name[len(folder) :].lstrip(".")
    return rest.partition(".")[0] or FACE


def _within(tree: Tree, folder: str) -> Iterator[tuple[Module, Import, str, str]]:
    """Imports from one part of a folder in another, with the names of the two parts."""
    for module in tree.values():
        for made in module.imports:
            if made.target in tree and _inside(module.name, folder):
                if not _inside(made.target, folder):
                    continue
                importer, imported = _child(module.name, folder), _child(made.target, folder)
                if importer != imported:
                    yield module, made, importer, imported


def _folders(tree: Tree) -> list[str]:
    return ["", *(name for name, module in tree.items() if module.is_package)]


# Circles


def circles(tree: Tree) -> Iterator[Violation]:
    """Modules that import themselves by way of others, then packages that do."""
    modules = {
        name: {i.target for i in module.imports if i.target in tree and i.target != name}
        for name, module in tree.items()
    }
    for circle in _circles(modules):
        yield Violation("circles", tree[circle[0]].path, f"modules: {' → '.join(circle)}")
    for folder in _folders(tree):
        parts: dict[str, set[str]] = {}
        for _, _, importer, imported in _within(tree, folder):
            if FACE not in (importer, imported):
                parts.setdefault(importer, set()).add(imported)
        for circle in _circles(parts):
            names = [f"{folder}.{part}".lstrip(".") for part in circle]
            if any(name not in tree or tree[name].is_package for name in names):
                where = folder.replace(".", "/") or "."
                yield Violation("circles", where, f"packages: {' → '.join(names)}")


def _circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """A shortest circle for each knot of nodes that lead to one another."""
    reached = {node: _paths(graph, node) for node in graph}
    done: set[str] = set()
    found = []
    for node in sorted(graph):
        if node in done or node not in reached[node]:
            continue
        knot = {n for n in reached[node] if n in graph and node in reached[n]}
        done |= knot
        found.append(min((reached[n][n] for n in sorted(knot)), key=len))
    return found


def _paths(graph: Mapping[str, set[str]], start: str) -> dict[str, list[str]]:
    """A shortest way from a node to each that it leads to, itself only if there is a circle."""
    ways: dict[str, list[str]] = {}
    waiting = [[start]]
    while waiting:
        way = waiting.pop(0)
        for after in sorted(graph.get(way[-1], ())):
            if after not in ways:
                ways[after] = [*way, after]
                waiting.append(ways[after])
    return ways


# Direction


def direction(tree: Tree) -> Iterator[Violation]:
    """Imports that go up or sideways, and torch and matplotlib where they may not be."""
    for folder, levels in ORDER.items():
        yield from order(tree, folder, levels)
    yield from torch_first(tree)
    yield from pictures(tree)


def order(tree: Tree, folder: str, levels: Sequence[Sequence[str]]) -> Iterator[Violation]:
    """Imports that do not go down, level by level, within a folder."""
    height = {part: i for i, level in enumerate(levels) for part in level}
    rest = height.get(REST)
    missing = {_child(n, folder) for n in tree if _inside(n, folder)} - {FACE} - set(height)
    if rest is None:
        for part in sorted(missing):
            where = f"{folder}.{part}".lstrip(".")
            yield Violation("direction", where, "has no place in ORDER of tests/architecture.py")
    for module, made, importer, imported in _within(tree, folder):
        low, high = height.get(imported, rest), height.get(importer, rest)
        if low is None or high is None or (FACE in (importer, imported) and FACE not in height):
            continue
        where = f"{module.path}:{made.line}"
        if low > high:
            what = f"{importer} is below {imported} and may not import {made.target}"
            yield Violation("direction", where, what)
        elif low == high != rest and (importer, imported) not in BESIDE:
            what = f"{importer} is beside {imported} and may not import {made.target}"
            yield Violation("direction", where, what)


def torch_first(tree: Tree) -> Iterator[Violation]:
    """Modules that may be imported before the user's script, and that import torch with them."""
    loads = {name: set(_loaded(tree, module)) for name, module in tree.items()}
    for name, module in tree.items():
        if any(fnmatch(name, pattern) for pattern in WITHOUT_TORCH):
            way = _paths(loads, name).get("torch")
            if way:
                what = f"imports torch at once: {' → '.join(way)}"
                yield Violation("direction", module.path, what)


def _loaded(tree: Tree, module: Module) -> Iterator[str]:
    """What is imported together with a module: its packages and those of what it imports, too,
    and the home of a name that a face resolves when it is asked for.
    """
    names = [module.name]
    for made in module.imports:
        if made.at_once:
            names.append(made.target)
            face = tree[made.target].imports if made.target in tree else ()
            names += [i.target for i in face if i.typing and i.name == made.name]
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:n]) for n in range(1, len(parts) + 1))


def pictures(tree: Tree) -> Iterator[Violation]:
    """matplotlib outside of plots, plots where it is not asked for, and Hydra anywhere."""
    for module in tree.values():
        if not _inside(module.name, "densitylr") or _inside(module.name, "densitylr.plots"):
            continue
        for made in module.imports:
            where, top = f"{module.path}:{made.line}", made.target.partition(".")[0]
            if top == "matplotlib" and not made.typing:
                yield Violation("direction", where, "only densitylr.plots imports matplotlib")
            elif _inside(made.target, "densitylr.plots") and made.at_once:
                what = "densitylr.plots needs matplotlib: import it in the function that draws"
                yield Violation("direction", where, what)
            elif top in ("hydra", "omegaconf"):
                yield Violation("direction", where, "Hydra is for experiments")


# Crowds and lengths


def crowds(tree: Tree, limits: Limits = LIMITS) -> Iterator[Violation]:
    """Folders with too many files and packages, layers with too many packages."""
    for folder in _folders(tree)[1:]:
        parts = {_child(n, folder) for n in tree if _inside(n, folder)} - {FACE, "__main__"}
        if len(parts) > limits.modules and folder not in CROWDED:
            what = f"{len(parts)} modules, at most {limits.modules}: {', '.join(sorted(parts))}"
            yield Violation("crowds", folder.replace(".", "/"), what)
    for layer in ORDER["densitylr"]:
        if len(layer) > limits.packages:
            what = f"{len(layer)} packages in a layer, at most {limits.packages}"
            yield Violation("crowds", "densitylr", f"{what}: {', '.join(layer)}")


def lengths(tree: Tree, limits: Limits = LIMITS) -> Iterator[Violation]:
    """Files that are too long."""
    for module in tree.values():
        if module.lines > limits.lines:
            what = f"{module.lines} lines, at most {limits.lines}"
            yield Violation("lengths", module.path, what)


# Faces and the surface


def faces(tree: Tree) -> Iterator[Violation]:
    """Imports from densitylr past a package's face, and of names that the face does not list."""
    for module in tree.values():
        wrong: dict[tuple[int, str], list[str]] = {}
        for made in module.imports:
            if made.target not in tree or not _inside(made.target, "densitylr"):
                continue
            package = f"densitylr.{_child(made.target, 'densitylr')}"
            if module.name != "densitylr" and _inside(module.name, package):
                continue
            target = tree[made.target]
            if not _is_face(target):
                what = f"{made.target} is past the face of {package}"
            elif made.name is not None and made.name not in (target.public or ()):
                what = f"not in __all__ of {made.target}"
            else:
                continue
            wrong.setdefault((made.line, what), []).append(made.name or "all of it")
        for (line, what), names in wrong.items():
            yield Violation("faces", f"{module.path}:{line}", f"{what}: {', '.join(names)}")


def _is_face(module: Module) -> bool:
    """Packages, and the modules of integrations, each of which has a host of its own."""
    return module.is_package or module.name.startswith("densitylr.integrations.")


def surface(tree: Tree) -> str:
    """Every public name: a line for each face, and one for each of its names below it."""
    lines = []
    for name, module in sorted(tree.items()):
        if _inside(name, "densitylr") and _is_face(module) and module.public:
            lines += [name, *(f"    {public}" for public in sorted(module.public))]
    return "".join(f"{line}\n" for line in lines)


def differences(tree: Tree, written: str) -> Iterator[Violation]:
    """Names that are public and not in the list, and the other way round."""
    now = _qualified(surface(tree))
    for line in difflib.ndiff(_qualified(written), now):
        if line.startswith("+ "):
            yield Violation("surface", SURFACE.as_posix(), f"{line[2:]} is public and not listed")
        elif line.startswith("- "):
            yield Violation("surface", SURFACE.as_posix(), f"{line[2:]} is listed and not public")


def _qualified(text: str) -> list[str]:
    """The names of a list of the surface, each with its face."""
    found, face = [], ""
    for line in text.splitlines():
        if line.startswith(" "):
            found.append(f"{face}: {line.strip()}")
        else:
            face = line
    return found


# All of it

RULES: dict[str, Callable[[Tree], Iterator[Violation]]] = {
    "circles": circles,
    "direction": direction,
    "crowds": crowds,
    "lengths": lengths,
    "faces": faces,
}


def check(root: Path = ROOT) -> dict[str, list[Violation]]:
    """The violations of each rule in a repository."""
    tree = read(root, TREES)
    found = {rule: list(broken(tree)) for rule, broken in RULES.items()}
    file = root / SURFACE
    written = file.read_text(encoding="utf-8") if file.exists() else ""
    found["surface"] = list(differences(tree, written))
    return found


def summary(tree: Tree) -> str:
    """A line for each package: its own files, their lines, the longest, its public names."""
    rows = [("package", "files", "lines", "longest", "public")]
    for folder in _folders(tree)[1:]:
        own = [m for m in tree.values() if m.path.rpartition("/")[0] == folder.replace(".", "/")]
        longest = max(own, key=lambda module: module.lines)
        file = longest.path.rpartition("/")[2]
        public = len(tree[folder].public or ())
        lines = sum(module.lines for module in own)
        rows.append((folder, str(len(own)), str(lines), f"{longest.lines} {file}", str(public)))
    return "\n".join(f"{a:<26}{b:>6}{c:>7}  {d:<26}{e:>6}" for a, b, c, d, e in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architecture")
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="another repository")
    parser.add_argument("--write-surface", action="store_true", help=f"write {SURFACE} anew")
    options = parser.parse_args(argv)
    tree = read(options.root, TREES)
    if options.write_surface:
        (options.root / SURFACE).write_text(surface(tree), encoding="utf-8")
    found = check(options.root)
    for violation in (v for violations in found.values() for v in violations):
        print(violation)
    print(summary(tree))
    print(", ".join(f"{rule}: {len(broken) or 'none'}" for rule, broken in found.items()))
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
