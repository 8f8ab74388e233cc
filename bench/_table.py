"""The command `bench table FILE …`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import _report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")


def main(args: argparse.Namespace) -> int:
    print("\n\n".join(_report.markdown(_report.load(file)) for file in args.files))
    return 0
