"""Arguments that the commands share. A mistake in them is BadInput: one line that lists the valid values."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dlkit._backends import CAPABILITIES

from . import BadInput


def add_common(parser: argparse.ArgumentParser, budget: str) -> None:
    """Threads, instruction set, the time to sample `budget`, and where the result goes."""
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads, default: torch's")
    parser.add_argument(
        "--capability",
        metavar="|".join(CAPABILITIES),
        help="the instruction set of dlkit's CPU kernels, default: the best that is here. torch's is set by the "
        "environment variable ATEN_CPU_CAPABILITY",
    )
    parser.add_argument("--budget", type=float, metavar="SECONDS", help=f"time to sample {budget}")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    folder = Path("bench-results")
    parser.add_argument("--json", type=Path, default=folder, metavar="FILE", help=f"or a folder; default: {folder}/")


def check_common(args: argparse.Namespace) -> None:
    cores = os.cpu_count() or 1
    if args.threads is not None and not 1 <= args.threads <= cores:
        raise BadInput(f"expected --threads from 1 to {cores}; got {args.threads}")
    if args.budget is not None and not args.budget > 0:
        raise BadInput(f"expected --budget above 0; got {args.budget}")
    if args.capability is not None:
        _choose(args.capability)


def _choose(capability: str) -> None:
    from dlkit import _C

    best = _C.cpu_capability()
    if capability not in CAPABILITIES[: CAPABILITIES.index(best) + 1]:
        can = ", ".join(CAPABILITIES[: CAPABILITIES.index(best) + 1])
        raise BadInput(f"expected --capability {can}, which this processor has; got {capability!r}")
    _C.set_cpu_capability(capability)
    os.environ["DLKIT_CPU_CAPABILITY"] = capability  # for processes that this one starts


def checked(what: str, given: Sequence[str], valid: Sequence[str]) -> list[str]:
    """`given` without repetitions, if all of it is valid."""
    for word in given:
        if word not in valid:
            raise BadInput(f"expected {what} {', '.join(valid)}; got {word!r}")
    return list(dict.fromkeys(given))


def listed(what: str, text: str | None, valid: Sequence[str]) -> list[str]:
    """The words of "a,b"; all valid ones where nothing was given."""
    return list(valid) if text is None else checked(what, text.split(","), valid)


def result_path(args: argparse.Namespace, *parts: str | None) -> Path:
    """`--json` itself, or in that folder a name made of `parts`."""
    path: Path = args.json
    return path if path.suffix == ".json" else path / ("-".join(filter(None, parts)) + ".json")
