"""Reports: tables and models as static HTML pages, CSV, JSON and LaTeX files."""

from robench.reporting.site import FORMATS, write_leaderboards

__all__ = ["FORMATS", "write_leaderboards"]
