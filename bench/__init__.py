"""Benchmarks: `python -m dlkit bench OP`, `bench table FILE.json`, `bench plot FILE.json`.

Every file in this folder whose name does not begin with an underscore is the spec of one op: what is measured, on which
inputs, by whom and against which reference. The runner (`_runner.py`) and the report (`_report.py`) know no op.
Nothing but the standard library is imported before a command runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from . import _commands

_FOLDER = Path(__file__).parent


def specs() -> list[str]:
    """Names of the ops that have a spec."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if not path.stem.startswith("_"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what follows `python -m dlkit bench` to `parser`."""
    commands = parser.add_subparsers(dest="bench_command", required=True, metavar="OP|models|calls|table|plot")
    for name in specs():
        command = commands.add_parser(name, help=f"measure {name}: a table here, JSON under --output")
        mode = command.add_mutually_exclusive_group()
        mode.add_argument("--quick", action="store_const", const="quick", dest="mode", help="small cases, seconds")
        mode.add_argument("--sweep", action="store_const", const="sweep", dest="mode", help="16 elements to 128 MB")
        command.set_defaults(mode="default")
        command.add_argument("--filter", default="", metavar="SUBSTRING", help="only cases whose name contains this")
        command.add_argument("--compile", action="store_true", help="torch.compile of the native op as well (slow)")
        command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
        command.add_argument("--threads", type=int, metavar="N", help="CPU threads, default: torch's")
        command.add_argument("--budget", type=float, metavar="SECONDS", help="time to sample a case, checks excluded")
        command.add_argument(
            "--allocator",
            choices=("reuse", "default"),
            default="reuse",
            help="CPU memory: kept by the process between calls (default), or glibc's own habit",
        )
        command.add_argument(
            "--output", type=Path, default=Path("bench-results"), metavar="PATH", help="folder or .json file to write"
        )
    _commands.add_parsers(commands)
    table = commands.add_parser("table", help="print a result file as a Markdown table")
    table.add_argument("file", type=Path)
    plot = commands.add_parser("plot", help="draw a result file as a PNG: ratio to native over size")
    plot.add_argument("file", type=Path)
    plot.add_argument("--output", type=Path, metavar="PNG", help="default: beside the file")


def main(args: argparse.Namespace) -> int:
    """Runs the command that `add_arguments` parsed. Returns the exit status: 1 where dlkit failed its parity check."""
    if args.bench_command in _commands.NAMES:
        return _commands.main(args)
    if args.bench_command not in ("table", "plot"):
        from . import _runner

        return _runner.main(args)

    from . import _report

    try:
        report: dict[str, Any] = json.loads(args.file.read_text())
    except (OSError, ValueError) as error:
        print(f"cannot read {args.file}: {error}")
        return 1
    if args.bench_command == "table":
        print(_report.markdown(report))
        return 0
    try:
        print(_report.plot(report, args.output or args.file.with_suffix(".png")))
    except ImportError:
        print("bench plot needs matplotlib: pip install matplotlib")
        return 1
    return 0
