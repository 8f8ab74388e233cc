"""The command `bench table FILE …`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from . import COMMANDS, _report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of ops, models, calls or memory")


def _markdown(path: Path) -> str:
    command = _report.read(path).get("bench")
    if command not in COMMANDS:
        return _report.markdown(_report.load(path))
    text: str = importlib.import_module(f".{COMMANDS[command][0]}", __package__).markdown(_report.read(path))
    return text


def main(args: argparse.Namespace) -> int:
    print("\n\n".join(map(_markdown, args.files)))
    return 0
