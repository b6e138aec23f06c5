"""Reports: tables and model cards as static HTML pages and CSV files."""

from robench.reporting.papers import write_latex
from robench.reporting.site import write_leaderboards

__all__ = ["write_latex", "write_leaderboards"]
