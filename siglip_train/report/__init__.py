"""The report of a run: `write_report` makes one HTML file that needs nothing beside it."""

from siglip_train.report.page import write_evaluation_report, write_report

__all__ = ["write_evaluation_report", "write_report"]
