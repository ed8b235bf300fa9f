"""What the report says and draws of each optimizer, section by section."""

from experiments.report.sections.fairness import WITHIN, Row, tuned_sentence, width_words
from experiments.report.sections.figures import heatmaps
from experiments.report.sections.sections import gap_sentence, reading, same_sentence, section

__all__ = [
    "WITHIN",
    "Row",
    "gap_sentence",
    "heatmaps",
    "reading",
    "same_sentence",
    "section",
    "tuned_sentence",
    "width_words",
]
