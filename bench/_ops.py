"""The command `bench [OP …]`: picks cases and contestants, prints a table as it measures, writes JSON and the page."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

import dlkit

from . import BadInput, _compare, _machine, _report, _runner, specs
from ._arguments import check_common, checked, listed, result_path
from ._runner import DTYPES, Case, Settings, Spec

# Contestant: the module it comes from. They have GPU kernels only.
PEERS = {"liger": "liger_kernel", "quack": "quack", "bitsandbytes": "bitsandbytes"}
CONTESTANTS = ("native", "compile", "foreach", "fused", *PEERS)  # foreach and fused: torch's other optimizer loops
SMALL = 1 << 20


def absent(names: Sequence[str], device: str) -> dict[str, str]:
    """The contestants among `names` that cannot take part, and why."""
    found = {name: "not installed" for name in names if name in PEERS and not importlib.util.find_spec(PEERS[name])}
    if device == "cpu":
        found.update({name: "GPU only" for name in names if name in PEERS and name not in found})
    return found


def chosen(spec: Spec, settings: Settings, sizes: str | None, dtypes: Sequence[str], only: str) -> list[Case]:
    return [
        case
        for case in spec.cases(settings.mode, settings.device)
        if only in case.id and case.dtype in dtypes and (sizes != "small" or _runner.input_bytes(spec, case) <= SMALL)
    ]


def compiled_cases(spec: Spec, cases: Sequence[Case], mode: str, device: str) -> set[Case]:
    """The cases in which torch.compile takes part: all, but with --quick one for each op and direction.

    None on a GPU, which rotates through up to 64 sets of inputs: each would be compiled separately.

    A compilation takes 1.5 to 3 s (the first one 12 s; 0.1 s from inductor's cache on disk): --quick therefore takes
    only the largest case of the op's first variant in fp32.
    """
    if device == "cuda" and getattr(spec, "COMPILED_PER_SET", False):
        return set()
    if mode != "quick":
        return set(cases)
    candidates = [
        case
        for case in cases
        if case.variant == cases[0].variant and case.dtype == "fp32" and case.direction != "forward_backward"
    ]
    return {
        max(
            (case for case in candidates if case.direction == direction),
            key=lambda case: _runner.input_bytes(spec, case),
        )
        for direction in {case.direction for case in candidates}
    }


@contextlib.contextmanager
def progress(total: float) -> Iterator[tuple[Callable[[str], None], Callable[[str, float], None]]]:
    """(echo, advance): prints a line, and moves a bar with the time left; no bar without a terminal or without tqdm."""
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=total, bar_format="{l_bar}{bar}| {elapsed}, {remaining} left", leave=False) as bar:

            def advance(name: str, amount: float) -> None:
                bar.set_description_str(name, refresh=False)
                bar.update(amount)

            yield tqdm.write, advance
    else:
        yield lambda text: print(text, flush=True), lambda name, amount: None


def run(
    plan: Mapping[str, tuple[Spec, Sequence[Case]]],
    settings: Settings,
    left_out: Mapping[str, str] | None = None,
    only: str = "",
) -> dict[str, Any]:
    """Measures the cases of each op, a table line each. Returns the result file's content.

    An interrupt (Ctrl-C) ends the run early; the finished cases are returned.
    """
    report: dict[str, Any] = {
        **_machine.header(settings.device),
        "settings": {**asdict(settings), "filter": only},
        "allocator": settings.allocator,
        "interrupted": False,
        "absent": dict(left_out or {}),
        "copy_bandwidth": [],
        "ops": list(plan),
        "cases": [],
        "memory": [],
    }
    with_compile = {
        name: compiled_cases(spec, cases, settings.mode, settings.device) if settings.compile else set()
        for name, (spec, cases) in plan.items()
    }

    def cost(spec: Spec, case: Case, compile: bool) -> float:
        """About how many seconds a case takes: sampling, the check in float64, a compilation."""
        return 0.1 + settings.budget_s + _runner.input_bytes(spec, case) / 1e8 + 3 * compile

    total = sum(cost(spec, case, case in with_compile[name]) for name, (spec, cases) in plan.items() for case in cases)
    if settings.compile:
        importlib.import_module("torch._inductor.compile_fx")  # the first compilation would load it
        torch._logging.set_logs(all=logging.ERROR)
    # The collection before each case then looks only at that case's objects: 1 ms instead of 80, or 200 with inductor.
    gc.collect()
    gc.freeze()
    with progress(total) as (echo, advance):
        try:
            _runner.spin(settings.device)
            report["copy_bandwidth"] = _runner.copy_bandwidth(settings)
            echo(_report.heading(report))
            for name, (spec, cases) in plan.items():
                picked = {case: replace(settings, compile=case in with_compile[name]) for case in cases}
                names = list(
                    dict.fromkeys(who for case in cases for who in _runner.contestants(spec, case, picked[case]))
                )
                width = max(len(case.id) for case in cases)
                echo("\n" + _report.line(_report.columns(names), width))
                for case in cases:
                    try:
                        entry = _runner.measure(spec, case, picked[case])
                    except Exception as error:
                        entry = _runner.failed(spec, case, error)
                    report["cases"].append({"op": name, **entry})
                    echo(_report.line(_report.row(entry, names), width))
                    advance(name, cost(spec, case, case in with_compile[name]))
                if settings.mode == "quick":
                    continue
                for case in spec.memory_cases(settings.device):
                    if only in case.id:
                        report["memory"].append({"op": name, **_runner.peak_memory(spec, case, settings)})
        except KeyboardInterrupt:
            if not report["cases"]:
                raise
            report["interrupted"] = True
        echo("\n" + _report.footnotes(report))
    return report


def main(args: argparse.Namespace) -> int:
    if args.compare:
        return _compare.main(*args.compare)
    ops = checked("OP", args.ops, specs()) or specs()
    dtypes = listed("--dtype", args.dtype, list(DTYPES))
    against = listed("--against", args.against, CONTESTANTS)
    checked("--sizes", [] if args.sizes is None else [args.sizes], ("small", "all"))
    checked("--allocator", [args.allocator], ("reuse", "default"))
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checked("--device", [device], ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("expected --device cpu, as torch sees no GPU here; got 'cuda'")
    check_common(args)
    if args.html and importlib.util.find_spec("plotly") is None:
        raise BadInput("--html needs plotly: pip install plotly")
    if args.threads:
        torch.set_num_threads(args.threads)

    # --quick picks its own few cases, of which "small" leaves some, but "all" are all.
    sweep = args.sizes == "all" or (args.sizes == "small" and not args.quick)
    mode = "sweep" if sweep else "quick" if args.quick else "default"
    gone = absent(against, device)
    reuses = False
    if device == "cpu" and args.allocator == "reuse":
        with dlkit.reuse_cpu_memory() as memory:  # some systems lack it
            reuses = memory.active
    settings = Settings(
        mode=mode,
        device=device,
        budget_s=args.budget or {"quick": 0.05, "default": 2.0, "sweep": 1.0}[mode],
        compile="compile" in against,
        allocator="reuse_cpu_memory" if reuses else "default",
        against=tuple(name for name in against if name not in gone),
    )
    if args.quick and device == "cuda":
        settings = replace(settings, budget_s=args.budget or 0.2, min_rounds=10)
    elif args.quick:
        settings = replace(settings, budget_s=args.budget or 0.05, min_rounds=3, sample_s=0.0005, warm_up_s=0.0)
    gone |= {name: "left out" for name in CONTESTANTS[1:] if name not in against}  # native takes part
    plan = {}
    for name in ops:
        spec = _runner.load(name)
        if cases := chosen(spec, settings, args.sizes, dtypes, args.filter):
            plan[name] = (spec, cases)
    if not plan:
        raise BadInput(f"no case has --dtype {','.join(dtypes)} and --filter {args.filter!r} in its name")
    report = run(plan, settings, gone, args.filter)
    # All ops are not named.
    parts = (*args.ops, _machine.slug(report["machine"]), args.sizes, "quick" if args.quick else None)
    saved = _report.save(result_path(args, *parts), report)
    if args.html:
        from . import _page

        saved = _report.save_text(args.html, _page.html(report)) and saved
    right = all(entry["contestants"].get("dlkit", {}).get("status") == "ok" for entry in report["cases"])
    return int(not (saved and right))
