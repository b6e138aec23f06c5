"""Where templates are found, and what they may call."""

from __future__ import annotations

import functools
from pathlib import Path

import jinja2

from robench.reporting import formatting


@functools.cache
def environment() -> jinja2.Environment:
    """Return where templates are found, with the filters that they use."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in ("percent", "count", "duration", "size", "shown", "interval", "sortable"):
        environment.filters[name] = getattr(formatting, name)
    # jinja has a length of its own
    environment.filters["distance"] = formatting.length
    return environment
