"""`python -m robench`, and the installed command: a Ctrl-C counts from the first import on."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        from robench.cli import main as command_line
    except KeyboardInterrupt:
        print("robench: interrupted; nothing was begun", file=sys.stderr)
        sys.exit(130)
    command_line()


if __name__ == "__main__":
    main()
