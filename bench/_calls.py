"""The cost of one call from Python on 1 to 4,096 elements, dlkit's against native's, and its share of each hop.

Each op is called at every hop from the user to the kernel, in turns; a hop's cost is the difference to the hop below:

    module      dlkit.nn's module, less the function
    functional  dlkit.functional's function, less the op
    autograd    the op with gradients asked for, less the op under no_grad
    dispatch    the op under no_grad on the fewest elements: dispatcher, checks, outputs
    kernel      the op under no_grad, less that
    backward    torch.autograd.grad through the module (or function, where there is none), less the call itself

torch's side is its module, or a user's code in place of a fused op. Optimizers are one whole step() of one parameter,
without hops.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import BadInput, _arguments, _machine, _report, specs
from ._levels import Call, Levels, P
from ._runner import Sample, Settings, calibrated, interleave

SIZES = (1, 16, 256, 4096)
HOPS = ("module", "functional", "autograd", "dispatch", "kernel", "backward")


@functools.cache
def cases() -> dict[str, Callable[[int], Levels]]:
    """The calls of every spec that has CALLS."""
    found: dict[str, Callable[[int], Levels]] = {}
    for name in specs():
        found |= getattr(importlib.import_module(f"{__package__}.{name}"), "CALLS", {})
    return found


def _backward(call: Call, leaves: list[Tensor]) -> Call:
    outputs = call()
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    gradients = [torch.ones_like(output) for output in outputs]

    def run() -> None:
        torch.autograd.grad(call(), leaves, gradients)

    return run


def _without_grad(sampler: Callable[[], Sample]) -> Callable[[], Sample]:
    """Enters no_grad around the whole loop: entering it at each call would cost more than the op."""

    def sample() -> Sample:
        with torch.no_grad():
            return sampler()

    return sample


def measure(name: str, n: int, settings: Settings) -> dict[str, Any]:
    """Microseconds a call: native and dlkit, forward (with gradients asked for) and with backward; dlkit's levels."""
    levels, smallest = cases()[name](n), cases()[name](min(SIZES))
    mine = levels.module or levels.functional
    assert mine is not None
    calls: dict[str, Call] = {"native": levels.native, "dlkit": mine}
    if levels.leaves:
        calls["native_both"] = _backward(levels.native, levels.leaves)
        calls["dlkit_both"] = _backward(mine, levels.leaves)
    if levels.op is not None and levels.functional is not None and smallest.op is not None:
        calls |= {"functional": levels.functional, "op": levels.op}
        calls |= {"op_no_grad": levels.op, "op_smallest": smallest.op}
    gc.collect()
    gc.disable()
    try:
        samplers = {}
        for key, call in calls.items():
            with torch.set_grad_enabled(key not in ("op_no_grad", "op_smallest")):
                samplers[key] = calibrated([call], settings)
            if key in ("op_no_grad", "op_smallest"):
                samplers[key] = _without_grad(samplers[key])
        samples = interleave(samplers, settings.budget_s, settings.min_rounds, settings.max_rounds)
    finally:
        gc.enable()
    us = {key: statistics.median(sample.seconds for sample in taken) * 1e6 for key, taken in samples.items()}
    entry: dict[str, Any] = {"op": name, "elements": n, "us": us, "hops": {}}
    for direction, suffix in (("forward", ""), ("forward_backward", "_both")):
        pairs = zip(samples.get("dlkit" + suffix, []), samples.get("native" + suffix, []), strict=True)
        slower = [a.seconds > b.seconds for a, b in pairs]
        if slower:
            entry.setdefault("rounds_slower_than_native", {})[direction] = sum(slower) / len(slower)
    if "op" in us:
        entry["hops"] = {
            "module": us["dlkit"] - us["functional"],
            "functional": us["functional"] - us["op"],
            "autograd": us["op"] - us["op_no_grad"],
            "dispatch": us["op_smallest"],
            "kernel": us["op_no_grad"] - us["op_smallest"],
            "backward": us["dlkit_both"] - us["dlkit"],
        }
    return entry


def slower(entry: dict[str, Any]) -> list[str]:
    """The directions in which native was faster, in three rounds of four at least."""
    return [name for name, often in entry["rounds_slower_than_native"].items() if often >= 0.75]


HEAD = (
    f"{'op, elements':<26}{'native':>8}{'dlkit':>8}{'ratio':>7}{'native+b':>10}{'dlkit+b':>9}{'ratio':>7}  "
    + "".join(f"{hop:>11}" for hop in HOPS)
)


def line(entry: dict[str, Any]) -> str:
    """A line of the table, in microseconds; +b is with backward."""
    us = entry["us"]
    text = f"{entry['op'] + ', ' + str(entry['elements']):<26}"
    for suffix, width in (("", 8), ("_both", 9)):
        if "dlkit" + suffix in us:
            native, mine = us["native" + suffix], us["dlkit" + suffix]
            text += f"{native:>{width + bool(suffix)}.2f}{mine:>{width}.2f}{native / mine:>7.2f}"
        else:
            text += f"{'-':>10}{'-':>9}{'-':>7}"
    hops = "".join(f"{entry['hops'][hop]:>11.2f}" for hop in HOPS) if entry["hops"] else f"{'-':>11}" * len(HOPS)
    flag = ", ".join(slower(entry))
    return f"{text}  {hops}" + (f"  slower: {flag}" if flag else "")


def markdown(report: dict[str, Any]) -> str:
    """A row for each op and size, in microseconds."""
    times = {"native": "native", "dlkit": "dlkit", "native + backward": "native_both", "dlkit + backward": "dlkit_both"}
    rows = []
    for entry in report["cases"]:
        figures = [entry["us"].get(key) for key in times.values()] + [entry["hops"].get(hop) for hop in HOPS[:-1]]
        cells = ["-" if value is None else f"{round(value, 1) + 0:.1f}" for value in figures]  # + 0: no "-0.0"
        rows.append([f"{entry['op']}, {entry['elements']}", *cells])
    return f"{heading(report)}\n\n{_report.table(['op, elements', *times, *HOPS[:-1]], rows)}\n\n{footnotes(report)}"


def heading(report: dict[str, Any]) -> str:
    machine = report["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    return f"Microseconds a call on {where}.{_report.busy(machine)}"


def footnotes(report: dict[str, Any]) -> str:
    behind = [f"{entry['op']} of {entry['elements']}" for entry in report["cases"] if slower(entry)]
    text = f"{len(report['cases'])} cases; slower than native: {', '.join(behind) or 'none'}"
    return text + (f"\n{_report.INTERRUPTED}" if report["interrupted"] else "")


def run(names: list[str], settings: Settings, echo: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures every size of the ops, a line each through `echo`. Returns the file's content; Ctrl-C keeps the rest."""
    report: dict[str, Any] = {
        "bench": "calls",
        **_machine.header("cpu"),
        "settings": {"budget_s": settings.budget_s, "p": P},
        "interrupted": False,
        "cases": [],
    }
    echo(heading(report))
    echo(HEAD)
    try:
        for name in names:
            for n in SIZES:
                report["cases"].append(measure(name, n, settings))
                echo(line(report["cases"][-1]))
    except KeyboardInterrupt:
        if not report["cases"]:
            raise
        report["interrupted"] = True
    echo(footnotes(report))
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--filter", default="", metavar="SUBSTRING", help="only ops whose name contains this")
    _arguments.add_common(parser, "a case, default 0.3")


def main(args: argparse.Namespace) -> int:
    names = [name for name in cases() if args.filter in name]
    if not names:
        raise BadInput(f"expected --filter to be part of one of {', '.join(cases())}; got {args.filter!r}")
    _arguments.check_common(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(budget_s=args.budget or 0.3, sample_s=0.0005, warm_up_s=0.01)
    report = run(names, settings)
    path = _arguments.result_path(args, "calls", _machine.slug(report["machine"]))
    return int(not _report.save(path, report))
