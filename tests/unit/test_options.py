"""What of a command is kept as the way to make a number again."""

from __future__ import annotations

import pytest

from robench.cli.options import ARGUMENTS, command_line


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("eval --model m --workspace w --all", "robench eval --model m --all"),
        ("eval --workspace=/a/w --model m --data-root /data", "robench eval --model m"),
        ("eval --model m --dataset npz:/home/me/x.npz", "robench eval --model m --dataset npz:x.npz"),
        ("train r --out=w --set start=none", "robench train r --out=w --set start=none"),
        ("eval --workspace", "robench eval"),
    ],
)
def test_a_command_is_kept_without_the_places_of_this_machine(typed: str, kept: str) -> None:
    token = ARGUMENTS.set(typed.split())
    try:
        assert command_line() == kept
    finally:
        ARGUMENTS.reset(token)
