"""What the commands `models` and `calls` parse their arguments with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def names(allowed: Sequence[str]) -> Any:
    """A parser of "a,b" for argparse, whose error names what is allowed."""

    def parse(text: str) -> list[str]:
        given = [name for name in text.split(",") if name]
        unknown = [name for name in given if name not in allowed]
        if unknown or not given:
            raise argparse.ArgumentTypeError(
                f"expected some of {','.join(allowed)}, got {','.join(unknown) or 'nothing'}"
            )
        return [name for name in allowed if name in given]

    return parse


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


def add_common(command: argparse.ArgumentParser, budget: str) -> None:
    """Threads, the time to sample `budget`, and where the result goes."""
    command.add_argument("--threads", type=_positive(int), metavar="N", help="CPU threads, default: torch's")
    command.add_argument("--budget", type=_positive(float), metavar="SECONDS", help=f"time to sample {budget}")
    command.add_argument("--json", type=Path, metavar="FILE", help="default: one in ./bench-results")
