"""The cost of one call from Python on 1 to 4,096 elements, dlkit's against native's, and which hop it goes to.

Each op is called at every hop from the user to the kernel, in turns; a hop costs what the level above it takes more:

    module      dlkit.nn's module, less the function
    functional  dlkit.functional's function, less the op
    autograd    the op with gradients asked for, less the op under no_grad
    dispatch    the op under no_grad on the fewest elements: dispatcher, checks, outputs
    kernel      the op under no_grad, less that
    backward    torch.autograd.grad through the module (or function, where there is none), less the call itself

torch's own side is its module, or what a user writes in place of a fused op. Optimizers are one whole step() of one
parameter, without hops.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkit
from dlkit._ops import op as dlkit_op

from . import BadInput, _arguments, _machine, _report
from ._runner import Sample, Settings, calibrated, interleave

SIZES = (1, 16, 256, 4096)
HOPS = ("module", "functional", "autograd", "dispatch", "kernel", "backward")
P, EPS = 0.5, 1e-5

batch_norm, group_norm, instance_norm = map(dlkit_op, ("batch_norm", "group_norm", "instance_norm"))

Call = Callable[[], Any]


class Levels(NamedTuple):
    """The same computation at every hop; None where there is no such one. `leaves` are what gradients are taken of."""

    leaves: list[Tensor]
    native: Call
    module: Call | None
    functional: Call | None
    op: Call | None


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def _levels(inputs: tuple[Tensor, ...], native: Callable[..., Any], module: Any, functional: Any, op: Any) -> Levels:
    calls = [None if call is None else functools.partial(call, *inputs) for call in (module, functional, op)]
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    return Levels([*inputs, *parameters], functools.partial(native, *inputs), *calls)


def _twin(native: nn.Module) -> nn.Module:
    """dlkit's layer with the very parameters of torch's."""
    twin: nn.Module = getattr(dlkit.nn, type(native).__name__).__new__(getattr(dlkit.nn, type(native).__name__))
    twin.__dict__ = dict(native.__dict__)
    return twin


def _rows(n: int) -> tuple[int, int]:
    return max(1, n // 64), min(n, 64)


def _row_norm(n: int, cls: type[nn.Module], add: bool, drop: bool) -> Levels:
    x, shape = _leaf(*_rows(n)), (min(n, 64),)
    norm = cls(shape, eps=EPS)
    is_layer = cls is nn.LayerNorm
    parameters = (norm.weight, norm.bias) if is_layer else (norm.weight,)
    base = "layer_norm" if is_layer else "rms_norm"
    if not add:
        function, op = getattr(dlkit.functional, base), dlkit_op(base)
        return _levels(
            (x,),
            norm,
            _twin(norm),
            lambda x: function(x, shape, *parameters, EPS),
            lambda x: op(x, shape, *parameters, EPS),
        )
    residual = torch.randn(x.shape).requires_grad_()
    name = f"dropout_add_{base}" if drop else f"add_{base}"
    function, op = getattr(dlkit.functional, name), dlkit_op(name)
    middle = "DropoutAdd" if drop else "Add"
    module_class = getattr(dlkit.nn, middle + cls.__name__)
    module = module_class(shape, P, eps=EPS, prenorm=True) if drop else module_class(shape, eps=EPS)
    for key, parameter in norm.named_parameters():
        setattr(module, key, parameter)

    def native(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = (F.dropout(x, P) if drop else x) + residual
        return norm(total), total

    if drop:
        return _levels(
            (x, residual),
            native,
            module,
            lambda x, residual: function(x, residual, shape, *parameters, P, EPS, prenorm=True),
            lambda x, residual: op(x, residual, shape, P, *parameters, EPS, None, None),
        )
    return _levels(
        (x, residual),
        native,
        module,
        lambda x, residual: function(x, residual, shape, *parameters, EPS),
        lambda x, residual: op(x, residual, shape, *parameters, EPS),
    )


def _batch_norm(n: int, relu: bool) -> Levels:
    channels = max(1, min(n // 2, 64))
    x = _leaf(max(2, n // channels), channels)  # one value a channel is no batch
    norm = nn.BatchNorm1d(channels)
    twin: Any = _twin(norm)
    if relu:
        twin.__class__ = dlkit.nn.BatchNormReLU1d
    state = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    function = dlkit.functional.batch_norm_relu if relu else dlkit.functional.batch_norm
    counted = norm.num_batches_tracked
    return _levels(
        (x,),
        (lambda x: torch.relu(norm(x))) if relu else norm,
        twin,
        lambda x: function(x, *state, True, 0.1, EPS),
        lambda x: batch_norm(x, *state, None, counted, True, 0.1, EPS, relu),
    )


def _group_norm(n: int) -> Levels:
    channels = max(2, min(n // 2, 32))
    x, groups = _leaf(1, channels, max(1, n // channels)), max(1, channels // 2)
    norm = nn.GroupNorm(groups, channels)
    parameters = (norm.weight, norm.bias)
    return _levels(
        (x,),
        norm,
        _twin(norm),
        lambda x: dlkit.functional.group_norm(x, groups, *parameters, EPS),
        lambda x: group_norm(x, groups, *parameters, EPS),
    )


def _instance_norm(n: int) -> Levels:
    channels = max(1, min(n // 2, 32))
    x = _leaf(1, channels, max(2, n // channels))
    norm = nn.InstanceNorm1d(channels, affine=True)
    parameters = (norm.weight, norm.bias)
    return _levels(
        (x,),
        norm,
        _twin(norm),
        lambda x: dlkit.functional.instance_norm(x, None, None, *parameters),
        lambda x: instance_norm(x, None, None, *parameters, True, 0.1, EPS),
    )


def _dropout(n: int, cls: type[nn.Module], name: str, mask_ndim: int, alpha: bool) -> Levels:
    x = _leaf(*_rows(n)) if mask_ndim == -1 else _leaf(1, *_rows(n))
    native, function = cls(P), getattr(dlkit.functional, name)
    op = dlkit_op("dropout")
    return _levels(
        (x,),
        native,
        _twin(native),
        lambda x: function(x, P, True),
        lambda x: op(x, P, mask_ndim, alpha, None, None),
    )


def _dropout_add(n: int) -> Levels:
    x, residual = _leaf(*_rows(n)), _leaf(*_rows(n))
    op = dlkit_op("dropout_add")
    return _levels(
        (x, residual),
        lambda x, residual: F.dropout(x, P) + residual,
        dlkit.nn.DropoutAdd(P),
        lambda x, residual: dlkit.functional.dropout_add(x, residual, P),
        lambda x, residual: op(x, residual, P, None, None),
    )


def _cross_entropy(n: int) -> Levels:
    x = _leaf(*_rows(n))
    target, op = torch.randint(0, x.shape[1], x.shape[:1]), dlkit_op("cross_entropy")
    native = nn.CrossEntropyLoss()
    twin = _twin(native)
    return _levels(
        (x,),
        lambda x: native(x, target),
        lambda x: twin(x, target),
        lambda x: dlkit.functional.cross_entropy(x, target),
        lambda x: op(x, target, None, 1, -100, 0.0, 0.0, 0.0, False)[0],
    )


def _optimizer(n: int, name: str, options: dict[str, Any]) -> Levels:
    steps = []
    for library in (torch.optim, dlkit.optim):
        parameter = nn.Parameter(torch.randn(n))
        parameter.grad = torch.randn(n)
        steps.append(getattr(library, name)([parameter], lr=1e-5, **options).step)
    native, mine = steps
    return Levels([], native, mine, None, None)


def _clip(n: int) -> Levels:
    parameter = nn.Parameter(torch.randn(n))
    parameter.grad = torch.randn(n)
    native, mine = (
        functools.partial(function, [parameter], 1e3)
        for function in (nn.utils.clip_grad_norm_, dlkit.optim.clip_grad_norm_)
    )
    return Levels([], native, None, mine, None)


CASES: dict[str, Callable[[int], Levels]] = {
    "LayerNorm": functools.partial(_row_norm, cls=nn.LayerNorm, add=False, drop=False),
    "RMSNorm": functools.partial(_row_norm, cls=nn.RMSNorm, add=False, drop=False),
    "AddLayerNorm": functools.partial(_row_norm, cls=nn.LayerNorm, add=True, drop=False),
    "AddRMSNorm": functools.partial(_row_norm, cls=nn.RMSNorm, add=True, drop=False),
    "DropoutAddLayerNorm": functools.partial(_row_norm, cls=nn.LayerNorm, add=True, drop=True),
    "DropoutAddRMSNorm": functools.partial(_row_norm, cls=nn.RMSNorm, add=True, drop=True),
    "BatchNorm1d": functools.partial(_batch_norm, relu=False),
    "BatchNormReLU1d": functools.partial(_batch_norm, relu=True),
    "GroupNorm": _group_norm,
    "InstanceNorm1d": _instance_norm,
    "Dropout": functools.partial(_dropout, cls=nn.Dropout, name="dropout", mask_ndim=-1, alpha=False),
    "Dropout1d": functools.partial(_dropout, cls=nn.Dropout1d, name="dropout1d", mask_ndim=2, alpha=False),
    "AlphaDropout": functools.partial(_dropout, cls=nn.AlphaDropout, name="alpha_dropout", mask_ndim=-1, alpha=True),
    "DropoutAdd": _dropout_add,
    "CrossEntropyLoss": _cross_entropy,
    "SGD": functools.partial(_optimizer, name="SGD", options={"momentum": 0.9}),
    "Adam": functools.partial(_optimizer, name="Adam", options={}),
    "AdamW": functools.partial(_optimizer, name="AdamW", options={}),
    "RMSprop": functools.partial(_optimizer, name="RMSprop", options={}),
    "clip_grad_norm_": _clip,
}


def _backward(call: Call, leaves: list[Tensor]) -> Call:
    outputs = call()
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    gradients = [torch.ones_like(output) for output in outputs]

    def run() -> None:
        torch.autograd.grad(call(), leaves, gradients)

    return run


def _without_grad(sampler: Callable[[], Sample]) -> Callable[[], Sample]:
    """Around the whole loop: entering no_grad at each call would cost more than the op."""

    def sample() -> Sample:
        with torch.no_grad():
            return sampler()

    return sample


def measure(name: str, n: int, settings: Settings) -> dict[str, Any]:
    """Microseconds a call: native and dlkit, forward (with gradients asked for) and with backward; dlkit's levels."""
    levels, smallest = CASES[name](n), CASES[name](min(SIZES))
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
    names = [name for name in CASES if args.filter in name]
    if not names:
        raise BadInput(f"expected --filter to be part of one of {', '.join(CASES)}; got {args.filter!r}")
    _arguments.check_common(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(budget_s=args.budget or 0.3, sample_s=0.0005, warm_up_s=0.01)
    report = run(names, settings)
    path = _arguments.result_path(args, "calls", _machine.slug(report["machine"]))
    return int(not _report.save(path, report))
