"""Reports: tables and models as static HTML pages, CSV, JSON and LaTeX files."""

from robench.reporting.papers import PAPER_FORMATS, write_papers
from robench.reporting.site import FORMATS, write_leaderboards

__all__ = ["FORMATS", "PAPER_FORMATS", "write_leaderboards", "write_papers"]
