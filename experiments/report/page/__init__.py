"""What every page is made of: templates, line charts, pictures, and tables in documents."""

from experiments.report.page.documents import csv_uri, environment, fill, save
from experiments.report.page.pictures import Picture, rendered
from experiments.report.page.svg import ARM_COLOURS, Chart, Line, Mark, chart, stage_colours

__all__ = [
    "ARM_COLOURS",
    "Chart",
    "Line",
    "Mark",
    "Picture",
    "chart",
    "csv_uri",
    "environment",
    "fill",
    "rendered",
    "save",
    "stage_colours",
]
