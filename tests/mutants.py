"""``python -m tests.mutants``: does a test notice when one thing in densitylr/ is changed?

Each mutation changes one comparison, constant, boolean operator, ``min`` or ``max`` in one file of
a copy of the project; the tests nearest to that file are run on the copy until one fails. Mutations
are drawn evenly over the packages from a seed. What is done is kept in the results file, so that an
interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

NEAREST = {
    "model": ["tests/model"],
    "history": ["tests/history", "tests/diagnosis"],
    "monitor": ["tests/monitor"],
    "policy": ["tests/policy"],
    "diagnosis": ["tests/diagnosis"],
    "recovery": ["tests/recovery"],
    "controller": [
        *(f"tests/controller/test_{name}.py" for name in ("momentum", "scaling", "controller")),
        *(f"tests/controller/test_{name}.py" for name in ("policies", "interrupted", "tampered")),
    ],
    "doctor": ["tests/doctor/test_finding.py", "tests/doctor/test_running.py"],
    "plots": ["tests/plots"],
}
"""The tests of each package of densitylr, those that fail fastest first."""

TIMEOUT = 400
"""Seconds for the tests of one mutation; one that hangs is killed."""

SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


@dataclass(frozen=True)
class Mutation:
    """One change of a file: the text between two places is replaced."""

    file: str
    line: int
    before: str
    after: str
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before} -> {self.after}"


def mutations(file: Path) -> Iterator[Mutation]:
    """Everything that can be changed in a file, type annotations and docstrings left out."""
    source = file.read_text(encoding="utf-8")
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text.encode()))
    encoded = source.encode()
    for node in ast.walk(ast.parse(source)):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]
        if not isinstance(node, ast.expr) or _in_annotation(node):
            continue
        changed = _changed(node)
        if changed is None:
            continue
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        before = encoded[begin:end].decode()
        after = ast.unparse(changed)
        if after != ast.unparse(node):
            name = str(file.relative_to(ROOT))
            yield Mutation(name, node.lineno, before, f"({after})", begin, end)


def _in_annotation(node: ast.AST) -> bool:
    while (above := getattr(node, "parent", None)) is not None:
        if isinstance(above, ast.arg | ast.AnnAssign) and above.annotation is node:
            return True
        if isinstance(above, ast.FunctionDef) and above.returns is node:
            return True
        if isinstance(above, ast.Subscript | ast.JoinedStr | ast.Raise):
            return True  # an index, a message
        node = above
    return False


def _changed(node: ast.expr) -> ast.expr | None:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
        return ast.Compare(node.left, [SWAPPED[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return ast.BoolOp(other, node.values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return ast.Constant(node.value * 2 if abs(node.value) > 1 else node.value + 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        other_op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        return ast.BinOp(node.left, other_op, node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        swapped = {"min": "max", "max": "min", "any": "all", "all": "any"}.get(node.func.id)
        if swapped:
            return ast.Call(ast.Name(swapped), node.args, node.keywords)
    return None


def drawn(number: int, seed: int) -> list[Mutation]:
    """So many mutations, the packages in turn, each from a random file."""
    draw = random.Random(seed)
    files = {p: sorted((ROOT / "densitylr" / p).rglob("*.py")) for p in NEAREST}
    found: list[Mutation] = []
    while len(found) < number:
        for own in files.values():
            possible = list(mutations(draw.choice(own)))
            if possible and (mutation := draw.choice(possible)) not in found:
                found.append(mutation)
    return found[:number]


def is_killed(mutation: Mutation, copy: Path) -> bool:
    """Whether the nearest tests fail on a copy of the project with the mutation in it."""
    file = copy / mutation.file
    kept = file.read_bytes()
    file.write_bytes(kept[: mutation.begin] + mutation.after.encode() + kept[mutation.end :])
    tests = NEAREST[Path(mutation.file).parts[1]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return True
    finally:
        file.write_bytes(kept)
    return done.returncode != 0


def main() -> int:
    """Run them; 1 where fewer than 90 % are killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--number", type=int, default=60, help="how many mutations (60)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (0)")
    parser.add_argument("--results", type=Path, help="a JSON file that is gone on with")
    options = parser.parse_args()
    known: dict[str, bool] = {}
    if options.results is not None and options.results.exists():
        known = json.loads(options.results.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        skipped = shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__", "results")
        shutil.copytree(ROOT, copy, ignore=skipped)
        for mutation in (chosen := drawn(options.number, options.seed)):
            if str(mutation) not in known:
                known[str(mutation)] = is_killed(mutation, copy)
                if options.results is not None:
                    options.results.write_text(json.dumps(known, indent=1), encoding="utf-8")
            print("killed  " if known[str(mutation)] else "SURVIVES", mutation, flush=True)
    killed = sum(known[str(mutation)] for mutation in chosen)
    print(f"{killed} of {len(chosen)} killed ({killed / len(chosen):.0%})")
    return int(killed < 0.9 * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
