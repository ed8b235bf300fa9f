"""The command line: ``python -m densitylr [options] script.py [its own arguments]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from densitylr.doctor.script import Foreign, Losses, Target, run, seed_all, when_imported

if TYPE_CHECKING:
    from densitylr.doctor.report import LiveTable
    from densitylr.doctor.watch import ModelDiscovery

__all__ = ["main"]

EXAMPLES = """\
examples:
  python -m densitylr train.py --epochs 3          the script's own arguments come after it
  python -m densitylr -m package.train             a module, as after python -m
  python -m densitylr --repair train.py            the same run, with DensityLR acting
  python -m densitylr --compare train.py           both, side by side
  python -m densitylr --output report train.py     where to put the page

The script runs as it would alone: same numbers, same output, same exit code. The
report comes at the end, on stderr.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the doctor; ends as the script ends."""
    parser = _parser()
    options = parser.parse_args(argv)
    target = Target(options.script, options.arguments, module=options.module)
    output = Path(options.output or "densitylr-doctor")
    place = output.absolute()
    there = next(p for p in (place, *place.parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        parser.error(f"--output: {output} cannot be made, as {there} is no folder to write to")
    if options.compare and options.live:
        parser.error("--live shows a run while it trains, --compare compares two that have ended")
    if options.compare:
        from densitylr.doctor.compare import compare

        return compare(target, options.mode or "repair", output)
    Doctor(
        target,
        options.mode,
        output,
        live=options.live,
        record=Path(options.record) if options.record else None,
    ).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m densitylr",
        description="Run a training script unchanged, and say which stages of its network learn, "
        "which do not, and what repairs it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("script", help="the script to run, or with -m the module")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="…", help="the script's own arguments"
    )
    parser.add_argument("-m", dest="module", action="store_true", help="it is a module's name")
    parser.add_argument("--live", action="store_true", help="show a live table while it trains")
    acting = parser.add_mutually_exclusive_group()
    for mode, does in (
        ("repair", "raise the rate of starved stages"),
        ("warmup", "find the rates from 1e-4 of yours upwards"),
        ("free", "the same without a cap; for a schedule that decays"),
    ):
        acting.add_argument(
            f"--{mode}", dest="mode", action="store_const", const=mode, help=f"act: {does}"
        )
    parser.add_argument(
        "--compare", action="store_true", help="run it twice, as it is and acting, from one seed"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="where the page goes, in a new folder (default: densitylr-doctor)",
    )
    parser.add_argument("--record", help=argparse.SUPPRESS)  # of --compare: losses, from a seed
    return parser


class Doctor:
    """One run of a script under watch.

    Args:
        target: what to run.
        mode: None to watch only; else the mode of the `DensityLR` that acts.
        output: the folder for the folder of results.
        live: show a table while it trains.
        record: a file for the losses, which are read then; all seeds are set before the run.
    """

    def __init__(
        self,
        target: Target,
        mode: str | None,
        output: Path,
        *,
        live: bool = False,
        record: Path | None = None,
    ) -> None:
        self.target, self.mode, self.live = target, mode, live
        self.output = output.absolute()  # the script may change its working directory
        self.losses = Losses() if record is not None else None
        self.record = record.absolute() if record is not None else None
        self.discovery: ModelDiscovery | None = None
        self.foreign = Foreign()
        self._table: LiveTable | None = None

    def run(self) -> None:
        """Run the script, then say what was found; ends as the script ends."""
        # Of several ranks one is enough, and all would see the same.
        if os.environ.get("RANK", "0") == "0":
            when_imported("torch", self._attach)
            run(self.target, self._afterwards)
        else:
            run(self.target, lambda ended: None)

    def _attach(self) -> None:
        from densitylr.doctor.watch import ModelDiscovery

        if self.losses is not None:
            self.losses.attach()
            seed_all()
        self.foreign.attach()
        discovery = self.discovery = ModelDiscovery(self.mode)
        if self.live:
            self._draw(discovery)
        discovery.attach()
        os.register_at_fork(after_in_child=discovery.detach)

    def _draw(self, discovery: ModelDiscovery) -> None:
        from densitylr.doctor.report import LiveTable

        if not LiveTable.possible():
            return
        try:
            self._table = LiveTable(discovery)
        except ImportError:
            print("densitylr: --live needs rich: pip install 'densitylr[doctor]'", file=sys.stderr)
        else:
            discovery.stepped = self._table.stepped

    def _afterwards(self, ended: BaseException | None) -> None:
        try:
            self._report(_ending(ended))
        except KeyboardInterrupt:
            print("densitylr: interrupted, no diagnosis", file=sys.stderr)
        except Exception as error:
            print(f"densitylr: no diagnosis: {type(error).__name__}: {error}", file=sys.stderr)

    def _report(self, ending: str) -> None:
        command = " ".join(["python", *self.target.command()])
        if self.discovery is None:
            ended = f", {ending}" if ending else ""
            print(
                f"\ndensitylr: {command}{ended}: no diagnosis, as it never imported torch in this "
                "process",
                file=sys.stderr,
            )
            return
        self.discovery.detach()
        if self.discovery.made:  # else it is said why there is no diagnosis at all
            self.discovery.notes += self.foreign.notes()
        if self._table is not None:
            self._table.stop()
        from densitylr.doctor.report import report, text

        found = report(self.discovery, command, ending)
        print("\n" + text(found), file=sys.stderr)
        if self.losses is not None and self.record is not None:
            self.losses.save(self.record, [f"{p.title}: {p.verdict}" for p in found.models])
        if found.models:
            from densitylr.doctor.report import write

            folder = write(found, self.output, self.target.label)
            print(f"\n{folder / 'index.html'}", file=sys.stderr)


def _ending(ended: BaseException | None) -> str:
    if ended is None or (isinstance(ended, SystemExit) and not ended.code):
        return ""
    if isinstance(ended, KeyboardInterrupt):
        return "interrupted"
    if isinstance(ended, SystemExit):
        return f"which ended with exit code {ended.code if isinstance(ended.code, int) else 1}"
    return f"which failed with {type(ended).__name__}"
