"""report(): which norms and dropouts of a model dlkit's kernels do, and which not, and why.

Given an example, the model runs on it once while every op of torch is watched. A norm is an op of that name, or the
square root of a mean of squares or of a variance by which a larger tensor is multiplied or divided: so it is seen
whoever wrote it, in a layer or not. A dropout is an op of that name, or a tensor times a mask of random bits. Work is
counted in elements of the tensor that is normalized or dropped.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from dlkit import _adopt, _trial, surgery

KINDS = ("norm", "dropout", "activation", "loss")
OURS = {
    "norm": ("layer_norm_forward", "dropout_layer_norm_forward", "batch_norm_forward", "batch_norm_apply"),
    "dropout": ("dropout_forward", "dropout_forward_", "dropout_add_forward", "dropout_layer_norm_forward"),
}
DROPBLOCK = ("dropblock2d_forward", "dropblock2d_forward_")
NATIVE_NORMS = {
    "native_layer_norm",
    "_fused_rms_norm",
    "native_group_norm",
    "native_batch_norm",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
}
ROOTS = {"rsqrt", "rsqrt_", "sqrt", "sqrt_", "pow"}
# What leaves a mean a mean, a root a root, and a mask a mask.
PASSES = {"_to_copy", "add", "add_", "sub", "rsub", "div", "div_", "clamp", "clamp_min", "clone", "detach", "bernoulli"}
PASSES |= {"view", "expand", "squeeze", "unsqueeze", "permute", "floor", "floor_", "ge", "gt", "le", "lt"}


class Row(NamedTuple):
    """What of one kind is done in one way at one place."""

    kind: str
    what: str
    reached: bool
    reason: str  # by what it is reached, or why it is left
    times: int  # layers, or with an example calls
    elements: int  # 0 without an example


class Report:
    """Rows, and what they come to. ``print(report)`` shows it; the last line is the sum."""

    def __init__(self, rows: list[Row], ran: bool) -> None:
        self.rows, self.ran = rows, ran

    def share(self, kind: str) -> float:
        """The share of the work of one kind, "norm" or "dropout", that is reached; 1 where there is none.

        Work is elements if an example was given, else layers.
        """
        rows = [row for row in self.rows if row.kind == kind]
        work = [(row.elements if self.ran else row.times, row.reached) for row in rows]
        total = sum(amount for amount, _ in work)
        return sum(amount for amount, reached in work if reached) / total if total else 1.0

    def summary(self) -> str:
        """One line: ``reached 25 of 25 norms, 0 of 12 dropouts: F.dropout in BartEncoderLayer.forward``."""
        parts = []
        for kind in ("norm", "dropout"):
            rows = [row for row in self.rows if row.kind == kind]
            reached = sum(row.times for row in rows if row.reached)
            part = f"{reached} of {sum(row.times for row in rows)} {kind}s"
            parts.append(part + f" ({self.share(kind):.0%} of their elements)" * (self.ran and bool(rows)))
        left = dict.fromkeys(r.what for r in self.rows if not r.reached and r.kind in ("norm", "dropout"))
        return "reached " + ", ".join(parts) + (": left " + ", ".join(left) if left else "")

    def __str__(self) -> str:
        lines = []
        for row in sorted(self.rows, key=lambda row: (KINDS.index(row.kind), not row.reached, -row.elements)):
            amount = f"{row.times} times" + (f", {row.elements:,} elements" if row.elements else "")
            state = "reached" if row.reached else "left"
            lines.append(f"{row.kind:<11}{state:<8}{row.what}, {amount}: {row.reason}")
        return "\n".join([*lines, self.summary()])


def report(model: torch.nn.Module, example: Any = None) -> Report:
    """What dlkit does in ``model``, and what it leaves, with the reason.

    Call it after :func:`dlkit.replace` and inside of :func:`dlkit.override`, if you use them. The model, its buffers
    and torch's generators are left as they were. Put the model in training mode to see its dropouts.

    Args:
        model: any module.
        example: what to call it with: a dict of keyword arguments, a tuple of positional ones, or one tensor. Without
            it layers are counted, and functions that a forward() calls are not seen.

    Returns:
        A ``Report``.
    """
    rows = [row for row in _layers(model) if example is None or row.kind in ("activation", "loss")]
    if example is not None:
        rows += _watch(model, example)
    merged: dict[tuple[str, str, bool, str], list[int]] = {}
    for row in rows:
        amount = merged.setdefault(row[:4], [0, 0])
        amount[0] += row.times
        amount[1] += row.elements
    return Report([Row(*key, *amount) for key, amount in merged.items()], example is not None)


def _layers(model: torch.nn.Module) -> Iterator[Row]:
    for module in model.modules():
        cls = type(module)
        kind = _kind(module)
        if kind:
            reason = _served_by(module)
            yield Row(kind, cls.__name__, bool(reason), reason or _why_left(module), 1, 0)


def _kind(module: torch.nn.Module) -> str:
    name, home = type(module).__name__, type(module).__module__
    if home == "torch.nn.modules.loss" or isinstance(module, torch.nn.modules.loss._Loss):
        return "loss"
    if isinstance(module, torch.nn.MultiheadAttention):
        return "dropout" if module.dropout else ""
    if isinstance(module, torch.nn.modules.dropout._DropoutNd) or surgery.DROPS.search(name):
        return "dropout"
    related = any(isinstance(module, cls) for cls in (*surgery.NORMS, torch.nn.SyncBatchNorm))
    if related or _trial.looks_like_norm(module) or (_adopt.adopted(type(module)) and "norm" in name.lower()):
        return "norm"
    return "activation" if home == "torch.nn.modules.activation" else ""


def _served_by(module: torch.nn.Module) -> str:
    adopted = _adopt.adopted(type(module))
    if adopted:
        return module.extra_repr().rpartition("dlkit: ")[2]
    return surgery.label(type(module)) if type(module).__module__.startswith("dlkit.nn.") else ""


def _why_left(module: torch.nn.Module) -> str:
    if _kind(module) in ("activation", "loss") and type(module) not in surgery.TWINS:
        return "dlkit has no kernel for it alone"
    cls, reason = surgery._replacement(module, True)
    return "dlkit.replace() serves it, and was not called" if cls else reason


# Watching


def _watch(model: torch.nn.Module, example: Any) -> list[Row]:
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type not in ("cpu", "meta")}
    watch = _Watch(model)
    try:
        with torch.random.fork_rng(devices=list(devices)), _Functions(watch), watch:
            if isinstance(example, Mapping):
                model(**example)
            elif isinstance(example, tuple):
                model(*example)
            else:
                model(example)
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return watch.rows


class _Functions(TorchFunctionMode):
    """Notes which of torch's functions is running."""

    def __init__(self, watch: "_Watch") -> None:
        self.running = watch.running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.running.append(func)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.running.pop()


class _Watch(TorchDispatchMode):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.modules = {id(module) for module in model.modules()}
        self.running: list[Any] = []
        self.rows: list[Row] = []
        # What a tensor is, of those that are alive: a "mean", the "root" of one, or a "mask".
        self.known: dict[int, tuple[str, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        library, _, name = func._schema.name.partition("::")
        if library == "dlkit":
            self._see_ours(name, func, args)
        elif name in NATIVE_NORMS:
            self._add("norm", args[0].numel(), False)
        elif name == "native_dropout":
            if args[2] and args[1] > 0:
                self._add("dropout", args[0].numel(), False)
        else:
            self._follow(name, args, result)
        return result

    def _see_ours(self, name: str, func: Any, args: Any) -> None:
        p = next((value for a, value in zip(func._schema.arguments, args, strict=False) if a.name == "p"), 1)
        for kind, names in OURS.items():
            if name in names and (kind == "norm" or p > 0):
                self._add(kind, args[0].numel(), True)
        if name in DROPBLOCK or (name == "bias_act_dropout_forward" and p > 0):
            self._add("dropout", args[0].numel(), True)

    def _follow(self, name: str, args: Any, result: Any) -> None:
        """Notes what the result is, and where a root or a mask meets a larger tensor."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        known = [t for t in tensors if id(t) in self.known]
        kinds = {self.known[id(t)][0] for t in known}
        made = result[0] if isinstance(result, tuple) and result else result
        if not isinstance(made, Tensor):
            return
        reduced = bool(tensors) and made.numel() < tensors[0].numel()
        kind = ""
        if name in ("bernoulli_", "rand", "rand_like"):
            kind = "mask"
        elif reduced and name in ("sum", "mean", "var", "var_mean"):
            kind = "sum" if name == "sum" else "mean"
        elif kinds == {"sum"} and name in ("div", "mul") and len(tensors) == 1:
            kind = "mean"  # undivided it is the square of a length
        elif (reduced and name in ("std", "std_mean")) or ("mean" in kinds and name in ROOTS):
            kind = "root"
        elif name in ("mul", "mul_", "div", "div_") and len(tensors) == 2:
            if len(known) == 1 and kinds == {"root"} and made.numel() > known[0].numel():
                self._add("norm", made.numel(), False)
            elif len(known) == 1 and kinds == {"mask"} and name in ("mul", "mul_"):
                self._add("dropout", made.numel(), False)
        elif len(kinds) == 1 and name in PASSES and made.numel() == known[0].numel():
            kind = kinds.pop()
        if kind:
            self.known[id(made)] = (kind, made)

    def _add(self, kind: str, elements: int, reached: bool) -> None:
        module, where = self._place()
        reason, function = "", self._function()
        if reached:
            reason = (module is not None and _served_by(module)) or f"dlkit.override() of {function}"
            self.rows.append(
                Row(kind, type(module).__name__ if module is not None else where, True, reason, 1, elements)
            )
            return
        if module is not None and _kind(module) == kind and not function:
            what, reason = type(module).__name__, _why_left(module)
            if _served_by(module):
                reason = f"{_served_by(module)} is for other dtypes, shapes or layouts"
        elif module is not None and _kind(module) == kind and not _served_by(module):
            what, reason = type(module).__name__, _why_left(module)
        else:
            what = f"{function} in {where}" if function else f"code in {where}"
            reason = "dlkit.override() serves functions of torch" if function else "it is written in elementary ops"
        self.rows.append(Row(kind, what, False, reason, 1, elements))

    def _function(self) -> str:
        for func in self.running:
            name = getattr(func, "__name__", "")
            if "norm" in name or "drop" in name or name == "scaled_dot_product_attention":
                path = (resolve_name(func) or name).replace("torch.nn.functional.", "F.").replace("torch._C._nn.", "F.")
                return path
        return ""

    def _place(self) -> tuple[torch.nn.Module | None, str]:
        """The innermost module of the model that is running, and the function of it."""
        frame = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self", frame.f_locals.get("module"))
            if id(owner) in self.modules and isinstance(owner, torch.nn.Module):
                name = frame.f_code.co_name
                if name.startswith(("_call_impl", "_wrapped_call_impl")):
                    name = "forward"
                return owner, f"{type(owner).__name__}.{name}"
            frame = frame.f_back  # type: ignore[assignment]
        return None, "the model"


# python -m dlkit report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", help="module:function that returns a model, or (model, example)")
    parser.add_argument("--as-is", action="store_true", help="do not call dlkit.replace() first")
    parser.add_argument("--override", action="store_true", help="inside of dlkit.override()")


def main(arguments: argparse.Namespace) -> int:
    import dlkit

    module, _, path = arguments.factory.partition(":")
    if not path:
        raise SystemExit(f"dlkit report: expected module:function, got {arguments.factory}")
    sys.path.insert(0, "")
    factory: Any = importlib.import_module(module)
    for name in path.split("."):
        factory = getattr(factory, name)
    made = factory()
    model, example = made if isinstance(made, tuple) else (made, None)
    if not arguments.as_is:
        dlkit.replace(model)
    with dlkit.override() if arguments.override else contextlib.nullcontext():
        print(report(model, example))
    return 0
