"""What is wrong with which stage: diagnoses from a history, and signs of a collapse in a
reading."""

from densitylr.diagnosis.collapse import RECENT, CollapseDetector, CollapseSign
from densitylr.diagnosis.diagnoses import STILL_STEPS, diagnose
from densitylr.diagnosis.drift import has_moved

__all__ = [
    "RECENT",
    "STILL_STEPS",
    "CollapseDetector",
    "CollapseSign",
    "diagnose",
    "has_moved",
]
