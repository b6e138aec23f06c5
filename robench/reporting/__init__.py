"""Reports: tables and model cards as static HTML pages and CSV files."""

from robench.reporting.papers import PAPER_FORMATS, write_papers
from robench.reporting.site import write_leaderboards

__all__ = ["PAPER_FORMATS", "write_leaderboards", "write_papers"]
