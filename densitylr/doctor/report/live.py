"""A quiet table on the terminal while a script trains; needs rich and a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from densitylr.doctor.report.terminal import sparkline
from densitylr.doctor.report.verdicts import FINE, ILL, states

if TYPE_CHECKING:
    from rich.table import Table

    from densitylr.doctor.watch import ModelDiscovery

__all__ = ["LiveTable"]

PAUSE = 1.0
"""Seconds from one drawing to the next."""


class LiveTable:
    """Drawn anew once a second at most, from the optimizer steps: there is no thread.

    Args:
        discovery: whose models are shown.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(self, discovery: ModelDiscovery) -> None:
        from rich.console import Console
        from rich.live import Live

        self.discovery = discovery
        self._live = Live(
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # else what the script prints goes elsewhere
        )
        self._drawn = 0.0

    @staticmethod
    def possible() -> bool:
        """Whether there is a terminal to draw on."""
        return sys.stderr is not None and sys.stderr.isatty()

    def stepped(self) -> None:
        """To be called after each optimizer step."""
        now = time.monotonic()
        if now - self._drawn < PAUSE:
            return
        if not self._drawn:
            self._live.start()
        self._drawn = now
        self._live.update(self._table(), refresh=True)

    def stop(self) -> None:
        """Take the table off the terminal."""
        self._live.stop()

    def _table(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for name in ("model", "step", "stage", "state", "density", "rate"):
            table.add_column(name, no_wrap=True)
        for observer in self.discovery.observers:
            for number, state in enumerate(states(observer)):
                first = (escape(observer.name), str(observer.steps)) if not number else ("", "")
                colour = "red" if state.word in ILL else "green" if state.word in FINE else "yellow"
                table.add_row(
                    *first,
                    escape(state.stage),
                    f"[{colour}]{state.word}[/]",
                    sparkline(state.density),
                    f"{state.rate:.1e}",
                )
        return table
