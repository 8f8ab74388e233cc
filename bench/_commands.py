"""The words after `python -m dlkit bench` that are no ops: models and calls. Standard library only, as __init__.py."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = ("mlp", "cnn", "transformer", "gpt")
CONTESTANTS = ("native", "native_best", "compile", "dlkit", "dlkit_best", "ceiling")
NAMES = ("models", "calls")


def _names(allowed: Sequence[str]) -> Any:
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


def add_parsers(commands: Any) -> None:
    """Adds the commands to the subparsers of bench."""
    models = commands.add_parser("models", help="training steps of four models: time, memory, profile")
    models.add_argument("--models", type=_names(MODELS), default=list(MODELS), metavar="A,B", help=",".join(MODELS))
    models.add_argument(
        "--against",
        type=_names(CONTESTANTS),
        default=list(CONTESTANTS),
        metavar="A,B",
        help=f"contestants beside native and dlkit: {','.join(CONTESTANTS)}",
    )
    models.add_argument("--profile", type=Path, metavar="DIR", help="instead: a trace of each model there, and shares")
    calls = commands.add_parser("calls", help="the cost of one call from Python on small tensors, hop by hop")
    calls.add_argument("--filter", default="", metavar="SUBSTRING", help="only ops whose name contains this")
    for command, budget in ((models, "a model and allocator, default 20"), (calls, "a case, default 0.3")):
        command.add_argument("--threads", type=_positive(int), metavar="N", help="CPU threads, default: torch's")
        command.add_argument("--budget", type=_positive(float), metavar="SECONDS", help=f"time to sample {budget}")
        command.add_argument("--json", type=Path, metavar="FILE", help="default: one in ./bench-results")


def main(args: argparse.Namespace) -> int:
    return importlib.import_module(f"._{args.bench_command}", __package__).main(args)
