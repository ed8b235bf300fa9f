"""Run a script as it would run alone, and find places in its source.

Nothing here imports torch before the script has done so.
"""

from densitylr.doctor.script.foreign import Foreign
from densitylr.doctor.script.importing import when_imported
from densitylr.doctor.script.losses import SEED, Losses, last_tenth, read, seed_all
from densitylr.doctor.script.running import Target, interpreter, run
from densitylr.doctor.script.source import Call, call_in_script, line_in_script

__all__ = [
    "SEED",
    "Call",
    "Foreign",
    "Losses",
    "Target",
    "call_in_script",
    "interpreter",
    "last_tenth",
    "line_in_script",
    "read",
    "run",
    "seed_all",
    "when_imported",
]
