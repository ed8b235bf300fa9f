"""Readings and decisions as a CSV file that grows while training runs."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from densitylr.history import TABLE_HEADER, Decision, Reading, table_rows

__all__ = ["CSVSink"]


class CSVSink:
    """A table with one row a reading and stage, the columns being those of `History.to_csv`.

    The file is opened for each reading and closed again, so that it is whole whenever training
    stops. Where it exists already it is continued: rows of the first step written, and of later
    ones, are dropped, so that steps go up after a checkpoint has been loaded.

    Args:
        path: the file; its folder must exist.

    Raises:
        ValueError: the file is not such a table.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._continued = False
        if self.path.exists():
            self._rows()

    def write(
        self,
        reading: Reading,
        rates: Mapping[str, float],
        scales: Mapping[str, float],
        decisions: Sequence[Decision],
    ) -> None:
        if not self._continued:
            self._keep_before(reading.step)
            self._continued = True
        decided = {d.stage: d for d in decisions}
        rows = io.StringIO(newline="")
        table = csv.writer(rows)
        table.writerows(table_rows(reading, rates, scales, decided))
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            file.write(rows.getvalue())

    def close(self) -> None:
        """Nothing is left to be done."""

    def _rows(self) -> list[list[str]]:
        """What the file holds, without its header."""
        with open(self.path, newline="", encoding="utf-8") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
        if header != list(TABLE_HEADER):
            raise ValueError(
                f"{self.path} exists and is no table of readings: its first row is {header[:3]} …, "
                f"not {list(TABLE_HEADER[:3])} …"
            )
        return rows

    def _keep_before(self, step: int) -> None:
        kept = self._rows() if self.path.exists() else []
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            with open(partial, "w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(TABLE_HEADER)
                table.writerows(row for row in kept if int(row[0]) < step)
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
