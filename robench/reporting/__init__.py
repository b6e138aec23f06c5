"""Reports: tables and models as static HTML pages, CSV, JSON and LaTeX files."""

from robench.reporting.papers import write_latex
from robench.reporting.site import FORMATS, write_leaderboards

__all__ = ["FORMATS", "write_latex", "write_leaderboards"]
