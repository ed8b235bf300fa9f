"""Run many cells on the cores of one machine; what is done is not done again."""

from __future__ import annotations

import dataclasses
import gzip
import json
import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.gauntlet.cells.cell import Cell, run_cell

__all__ = ["read", "run_cells"]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Finished records by the key of their cell; a line cut off by a kill is left out.

    Args:
        path: lines of JSON, compressed if the name ends in ``.gz``; need not exist.
    """
    records = {}
    if path.exists():
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            fields = {f.name: record[f.name] for f in dataclasses.fields(Cell)}
            records[Cell(**fields).key] = record
    return records


def run_cells(cells: Sequence[Cell], path: Path, workers: int) -> dict[str, dict[str, Any]]:
    """Train the cells that ``path`` does not hold yet, one thread each, and append them to it.

    Raises:
        RuntimeError: a cell raised, which is a bug. The others have been trained and kept.
    """
    failed: list[tuple[Cell, BaseException]] = []
    done = read(path)
    todo = [cell for cell in dict.fromkeys(cells) if cell.key not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    if todo:
        before = path.read_bytes() if path.exists() else b""
        cut_off = bool(before) and not before.endswith(b"\n")
        with (
            open(path, "a", encoding="utf-8") as file,
            _pool(workers) as pool,
            tqdm(total=len(todo), unit="run", disable=None) as bar,
        ):
            file.write("\n" if cut_off else "")
            waiting = {pool.submit(run_cell, cell): cell for cell in todo}
            try:
                for future in as_completed(waiting):
                    bar.update()
                    error = future.exception()
                    if error is not None:
                        failed.append((waiting[future], error))
                        continue
                    file.write(json.dumps(future.result(), allow_nan=False) + "\n")
                    file.flush()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        done = read(path)
    if failed:
        cell, error = failed[0]
        raise RuntimeError(f"{len(failed)} of {len(todo)} cells failed, first {cell}") from error
    return {cell.key: done[cell.key] for cell in cells}


def _pool(workers: int) -> ProcessPoolExecutor:
    # Read before torch starts its threads: runs that share cores must not spin on them.
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _leave_interrupts_to_the_parent)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
