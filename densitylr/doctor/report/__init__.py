"""What is said of a run: verdicts on stages, advice, the report in a terminal and as a page."""

from densitylr.doctor.report.folder import write
from densitylr.doctor.report.live import LiveTable
from densitylr.doctor.report.report import Report, report
from densitylr.doctor.report.terminal import text

__all__ = ["LiveTable", "Report", "report", "text", "write"]
