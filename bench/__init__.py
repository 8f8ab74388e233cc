"""Benchmarks: `python -m dlkit bench [OP …]` measures ops, `bench models` training steps, `bench calls` single calls;
`bench table FILE …`, `bench plot FILE …` and `bench overview MODELS OPS` show result files.

Every file in this folder whose name does not begin with an underscore is the spec of one op: its cases, inputs,
contestants and reference. The runner (`_runner.py`) and the report (`_report.py`) know no op. Everything else is a
command: a word in COMMANDS, and a module with `add_arguments(parser)` and `main(args)`. Nothing but the standard
library is imported before a command runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).parent

# word: its module in this folder, its help text
COMMANDS = {
    "table": ("_table", "print result files as Markdown tables"),
    "models": ("_models", "training steps of four models: time, memory, profile"),
    "calls": ("_calls", "the cost of one call from Python on small tensors, hop by hop"),
    "memory": ("_memory", "what reuse_cpu_memory() gains and costs"),
    "language_model": ("_language_model", "a language model trained with each loss: losses and memory"),
    "plot": ("_plot", "draw result files: a PNG, or the page that --html writes"),
    "overview": ("_overview", "draw whole steps and headline ops beside torch's, as bars"),
}


def specs() -> list[str]:
    """Names of the ops that have a spec."""
    commands = {module for module, _ in COMMANDS.values()}
    return sorted(path.stem for path in _FOLDER.glob("[!_]*.py") if path.stem not in commands)


def add_arguments(parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> None:
    """Adds the arguments of `python -m dlkit bench` to `parser`: those of a command if `given` begins with its word.

    `given` is by default the process's own arguments. argparse itself cannot tell a list of ops from a command.
    """
    words = sys.argv[2:] if given is None else given
    if words and words[0] in COMMANDS:
        module, text = COMMANDS[words[0]]
        command = parser.add_subparsers(required=True).add_parser(words[0], help=text, description=text)
        command.set_defaults(bench_command=module)
        importlib.import_module(f"{__name__}.{module}").add_arguments(command)
        return
    parser.set_defaults(bench_command="_ops")
    parser.usage = "%(prog)s [OP ...] [options] | " + " | ".join(f"{word} ..." for word in COMMANDS)
    parser.epilog = "Instead of ops: " + "; ".join(f"{word}: {text}" for word, (_, text) in COMMANDS.items()) + "."
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: all of {', '.join(specs())}")
    parser.add_argument("--device", metavar="cpu|cuda", help="default: cuda where torch sees a GPU")
    parser.add_argument("--dtype", metavar="fp32,bf16,...", help="default: those of the cases")
    parser.add_argument(
        "--sizes",
        metavar="small|all",
        help="all: 16 elements to 128 MB; small: up to 1 MB (of the few of --quick with it); default: representative",
    )
    parser.add_argument("--quick", action="store_true", help="few cases and rounds: all ops in less than a minute")
    parser.add_argument("--filter", default="", metavar="SUBSTRING", help="only cases whose name contains this")
    parser.add_argument(
        "--against",
        metavar="native,compile,...",
        help="contestants beside native, which is always measured; default: all that are installed",
    )
    parser.add_argument(
        "--allocator",
        metavar="reuse|default",
        default="reuse",
        help="CPU memory: dlkit.reuse_cpu_memory() for every contestant (default), or as it comes",
    )
    importlib.import_module(f"{__name__}._arguments").add_common(parser, "a case, checks excluded")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with plots, needs no network; wants plotly")
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar=("OLD.json", "NEW.json"),
        help="measure nothing: what became slower between two result files, or, with several new ones, is slower in "
        "each of them; exit status 1 if anything is",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the parsed command. Returns the exit status: 2 for bad input, 1 where dlkit was wrong or slower."""
    try:
        status: int = importlib.import_module(f"{__name__}.{args.bench_command}").main(args)
    except BadInput as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted before anything was measured", file=sys.stderr)
        return 130
    return status


class BadInput(Exception):
    """A user's mistake, in one line."""
