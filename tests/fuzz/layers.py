"""Random calls of every op and layer of dlkit, each against torch's way to the same and an exact result.

    python -m fuzz.layers --cases 100000 --seed 0 --processes 2      (from tests/, or with PYTHONPATH=tests)
    python -m fuzz.layers --cases 1000000 --log fuzz.log             goes on from the log where it was ended
    python -m fuzz.layers --seconds 600 --op batch_norm

A case is plain data. An error is measured against the exact result, as a share of what was added up for an element and
in units of the output's epsilon. It may be twice torch's largest of the same tensor, and 4: where it is more, other
draws of the same case decide, since one small tensor says little about torch's error. Where the exact result is not
finite, or torch's own is not where the exact one is, only what both agree on is asked for.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import json
import math
import multiprocessing
import random
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import backends
from torch import Tensor

from fuzz import layer_tensors as tensors
from fuzz.layer_blocks import BLOCKS
from fuzz.layer_operations import OPERATIONS as OPS
from fuzz.layer_operations import Case, Named, Operation, Pair
from fuzz.shared import Difference, Settings, seed_of_the_day

OPERATIONS = OPS | BLOCKS
BACKENDS = {backend.name: backend for backend in backends.HERE if not backend.missing and backend.device == "cpu"}
ON_CPU = [name for name in BACKENDS if name.startswith("cpu-")]
CONTEXTS = ("none",) * 12 + ("no_grad", "inference", "autocast", "create_graph", "bad", "bad")
ROUND = ("normal", "shifted", "wide")  # values of which rounding alone is to be seen
CHUNK = 500


# Drawing.


def draw(seed: int, only: str = "") -> Case:
    rng = random.Random(seed)
    names = [only] if only else list(OPERATIONS)
    operation = OPERATIONS[rng.choices(names, [OPERATIONS[name].weight for name in names])[0]]
    backend = rng.choice(ON_CPU)
    others = [name for name in BACKENDS if name not in ON_CPU]
    if others and rng.random() < 0.05:
        backend = rng.choices(others, [1 if name == "triton" else 12 for name in others])[0]
    large = backend in ON_CPU and rng.random() < 0.01
    elements = 300_000 if large else 200 if backend == "triton" else rng.choice([30, 300, 3000])
    if operation.forward is None:  # layers of several ops: attention's weights are the square of a length
        large, elements = False, rng.choice([8, 40])
    shape = tensors.draw_shape(rng, *operation.rank, elements)
    if operation.forward is None:
        shape = [max(size, 1) for size in shape]
    dtype = rng.choice(tensors.DTYPES)
    case: Case = {"op": operation.name, "shape": shape, "dtype": dtype, "seed": seed, "backend": backend}
    case["parameters"] = rng.choice([dtype, dtype, "float32"]) if dtype != "float64" else dtype
    case["options"] = operation.draw(rng, shape)
    if case["options"].get("activation") == "gelu" and dtype == "float64" and math.prod(shape) > 1000:
        case["dtype"] = case["parameters"] = "float32"  # its exact values take long
    case["context"] = rng.choice(CONTEXTS)
    case["via"] = "module" if operation.modules is not None and rng.random() < 0.25 else "function"
    plain = rng.random() < 0.5 or operation.forward is None
    case["tensors"] = {name: tensors.draw_spec(rng, plain) for name in operation.shapes(case)}
    if dtype == "float64" and case["options"].get("eps") == 0 and case["tensors"]["input"]["values"] == "tiny":
        case["options"]["eps"] = 1e-30  # the cube of rstd is beyond the range
    for name in ("running_mean", "running_var"):
        if name in case["tensors"]:
            layout = rng.choice(["contiguous", "contiguous", "sliced", "offset"])
            case["tensors"][name] = {"values": "positive" if name == "running_var" else "normal", "layout": layout}
    for name in ("weight", "bias"):  # within the range, and so with 1 / sqrt(var + eps) for a factor
        if case["tensors"].get(name, {}).get("values") in ("huge", "one infinity", "denormal"):
            case["tensors"][name]["values"] = "wide"
    differentiable = [name for name in case["tensors"] if not name.startswith("running")]
    case["needs"] = [name for name in differentiable if rng.random() < 0.75]
    case["grads"] = {"y": tensors.draw_spec(rng, plain), "sum": tensors.draw_spec(rng, plain)}
    case["threads"] = rng.choice([2, 3]) if large else 1
    if case["context"] in ("bad", "create_graph") and operation.forward is None:
        case["context"] = "none"
    if case["context"] == "bad":
        case["bad"] = rng.choice(list(BAD))
    return case


# Running.


@contextlib.contextmanager
def served_by(name: str) -> Iterator[None]:
    """The public ops run on the kernels of that backend: an instruction set, or what else takes the CPU's tensors."""
    backend = BACKENDS[name]
    with contextlib.ExitStack() as stack:
        stack.enter_context(backend.active())
        if not backend.instruction_set:
            library = torch.library.Library("dlkit", "IMPL", "CPU")
            stack.callback(library._destroy)
            for op in KERNEL_OPS:
                library.impl(op, backend.op(op), allow_override=True)
        yield


KERNEL_OPS = (
    "layer_norm_forward", "layer_norm_backward", "dropout_layer_norm_forward", "dropout_layer_norm_backward",
    "batch_norm_forward", "batch_norm_backward", "dropout_forward", "dropout_apply", "dropout_forward_",
    "dropout_add_forward", "bias_act_dropout_forward", "bias_act_dropout_backward", "dropblock2d_forward",
    "dropblock2d_apply", "dropblock2d_forward_", "cross_entropy_forward", "cross_entropy_backward",
)  # fmt: skip


def dtype_of(case: Case, name: str) -> str:
    if name == "residual" and case["options"]["residual"] in ("other type", "number"):
        return case["options"]["other"]
    if name == "input" or name == "residual":
        return case["dtype"]
    return case["parameters"]


def build(case: Case) -> Named:
    generator = torch.Generator().manual_seed(case["seed"])
    shapes = OPERATIONS[case["op"]].shapes(case)
    return {
        name: tensors.make(shape, dtype_of(case, name), case["tensors"][name], generator)
        for name, shape in shapes.items()
    }


def options_of(case: Case) -> Named:
    return {**case["options"], "seed": case["seed"], "via": case["via"]}


def leaves_of(case: Case, given: Named, dtype: torch.dtype | None = None) -> Named:
    module, leaves = case["via"] == "module", {}
    differentiable = case["context"] not in ("no_grad", "inference")
    for name, tensor in given.items():
        leaf = tensors.stand_in(tensor)
        leaf = leaf if dtype is None else leaf.to(dtype)
        needs = name in case["needs"] and differentiable
        if module and name in ("weight", "bias"):
            leaf = torch.nn.Parameter(leaf, requires_grad=needs)
        leaves[name] = leaf.requires_grad_(needs)
    return leaves


@contextlib.contextmanager
def context(name: str) -> Iterator[None]:
    entered = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }.get(name, contextlib.nullcontext)
    with entered():
        yield


def grads_for(case: Case, given: Named, outputs: Named) -> dict[str, Tensor]:
    """Gradients of the outputs; none where rounding decides what a ReLU does."""
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    found = {}
    for name in ("y", "sum"):
        if name not in outputs:
            continue
        dtype = str(outputs[name].dtype)[6:]
        grad = tensors.make(list(outputs[name].shape), dtype, case["grads"][name], generator)
        undecided = OPERATIONS[case["op"]].undecided
        if undecided is not None and grad.numel():
            with np.errstate(all="ignore"):
                places = torch.from_numpy(undecided(given, options_of(case)))
            if places.any():
                grad = grad.clone() if 0 in grad.stride() else grad
                grad[places] = 0
        found[name] = grad
    return found


def differentiate(case: Case, leaves: Named, outputs: Named, grads: Named) -> Named:
    """Gradients by the leaf's name; with create_graph those of a sum of these as well."""
    named = [name for name in outputs if name in grads and outputs[name].requires_grad]
    wanted = [name for name in leaves if leaves[name].requires_grad]
    if not named or not wanted:
        return {}
    twice = case["context"] == "create_graph"
    given = [grads[name].detach().clone().requires_grad_() if twice else grads[name] for name in named]
    found = torch.autograd.grad(
        [outputs[name] for name in named], [leaves[name] for name in wanted], given,
        create_graph=twice, allow_unused=True,
    )  # fmt: skip
    results = {f"grad_{name}": grad for name, grad in zip(wanted, found, strict=True)}
    if twice:
        generator = torch.Generator().manual_seed(case["seed"] + 2)
        sums = [
            (grad.double() * torch.randn(grad.shape, dtype=torch.float64, generator=generator)).sum()
            for grad in found
            if grad is not None and grad.requires_grad
        ]
        if sums:
            sources = [leaves[name] for name in wanted] + given
            again = torch.autograd.grad(sum(sums), sources, allow_unused=True)  # type: ignore[arg-type]
            names = [*wanted, *(f"output {name}" for name in named)]
            results |= {f"twice_{name}": grad for name, grad in zip(names, again, strict=True)}
    return results


def run_one(case: Case, function: Any, given: Named, grads: Named | None, dtype: torch.dtype | None = None) -> Named:
    """Outputs, buffers and gradients. `grads` is filled by the first that has outputs."""
    leaves = leaves_of(case, given, dtype)
    with context(case["context"]):
        outputs = function(leaves, options_of(case))
    if not grads and grads is not None:
        grads |= grads_for(case, given, outputs)
    made = grads or {}
    if dtype is not None:
        made = {name: grad.to(dtype) for name, grad in made.items()}
    results = differentiate(case, leaves, outputs, made)
    return {name: tensor.detach() for name, tensor in outputs.items()} | {
        name: None if tensor is None else tensor.detach() for name, tensor in results.items()
    }


def outcome(call: Any) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except Exception as error:
        error.__traceback__ = None
        return None, error


def ours_of(case: Case) -> Any:
    operation = OPERATIONS[case["op"]]
    return operation.modules if case["via"] == "module" else operation.ours


def check(case: Case) -> dict[str, tuple[float, float]]:
    """Raises a Difference; returns the errors (ours, torch's) by output, where rounding alone is to be seen."""
    operation = OPERATIONS[case["op"]]
    given = build(case)
    if case["context"] == "bad":
        check_bad(case, operation, given)
        return {}
    grads: Named = {}
    theirs, their_error = outcome(lambda: run_one(case, operation.torchs, given, grads))
    with served_by(case["backend"]):
        ours, our_error = outcome(lambda: run_one(case, ours_of(case), given, grads))
        if isinstance(their_error, IndexError) and our_error is None and given["input"].numel() == 0:
            return {}  # torch's instance_norm in evaluation
        check_errors(our_error, their_error)
        if our_error is not None:
            return {}
        if case["threads"] > 1:
            check_threads(case, given, grads, ours)
    with np.errstate(all="ignore"):
        return compare(case, operation, given, grads, ours, theirs)


def check_errors(ours: Exception | None, theirs: Exception | None) -> None:
    kinds = [None if error is None else type(error).__name__ for error in (ours, theirs)]
    if kinds[0] == kinds[1] or (theirs is not None and isinstance(ours, type(theirs))):
        return
    text = str(ours or theirs).strip().splitlines() or [""]
    told = [f"raises {kind}" if kind else "goes on" for kind in kinds]
    raise Difference(f"dlkit {told[0]}, torch {told[1]}", text[0][:200])


def check_threads(case: Case, given: Named, grads: Named, ours: Named) -> None:
    if case["context"] == "create_graph" or case["options"].get("residual") in ("broadcast", "number"):
        return  # torch adds up there, and its bits depend on the threads
    before = torch.get_num_threads()
    try:
        for threads in (case["threads"], before):
            torch.set_num_threads(threads)
            again = run_one(case, ours_of(case), given, grads)
            for name, tensor in again.items():
                if tensor is not None and not same_bits(tensor, ours[name]):
                    raise Difference(f"{name}: other bits with another number of threads")
    finally:
        torch.set_num_threads(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def exact_of(case: Case, operation: Operation, given: Named, grads: Named, results: Named) -> dict[str, Pair]:
    o, t = {**options_of(case), "backend": case["backend"]}, dict(given)
    for name in ("running_mean", "running_var"):
        if name in t:
            t[f"old_{name}"] = t[name]
    if "sum" in results:
        t["sum"] = results["sum"]
    assert operation.forward is not None and operation.backward is not None
    found = operation.forward(t, o)
    wanted = [name for name in results if name.startswith("grad_")]
    if wanted:
        arrays = {name: tensors.exact(grad) for name, grad in grads.items()}
        found |= {f"grad_{name}": pair for name, pair in operation.backward(t, o, arrays).items()}
    return found


def compare(
    case: Case, operation: Operation, given: Named, grads: Named, ours: Named, theirs: Named
) -> dict[str, tuple[float, float]]:
    errors = {}
    for name, y in theirs.items():
        x = ours[name]
        if (x is None) != (y is None) and not name.startswith("twice_"):  # there none is zeros
            raise Difference(f"{name}: dlkit gives {'none' if x is None else 'one'}, torch does not")
        if x is None or y is None:
            continue
        if x.shape != y.shape or x.dtype != y.dtype:
            raise Difference(f"{name}: another form", f"{list(x.shape)} {x.dtype}, torch {list(y.shape)} {y.dtype}")
        if name == "y" and case["op"] in AS_TORCH and 1 not in x.shape and x.stride() != y.stride():
            raise Difference("y: other strides", f"{x.stride()}, torch {y.stride()}")
    twice = case["context"] == "create_graph"
    if twice and not (rounds_only(case) and group_size(case) > 2):
        return {}  # both go by torch's formulas, but not by the same; of two values all cancels
    if set(ours) != set(theirs) and not twice:
        raise Difference("other results", f"{list(ours)} and {list(theirs)}")
    if given["input"].numel() == 0:
        for name, x in ours.items():
            if name.startswith("running") and same_bits(x, given[name]):
                continue  # torch rounds them to the input's type
            if x is not None and theirs.get(name) is not None and not same_bits(x, theirs[name]):
                raise Difference(f"{name}: another result of an empty input")
        return {}
    if overflows(case):
        return {}
    if operation.forward is None:
        return compare_wide(case, operation, given, grads, ours, theirs, "") if rounds_only(case) else {}
    exact = exact_of(case, operation, given, grads, ours)
    alike = "sum" not in ours or same_bits(ours["sum"], theirs["sum"])
    exact_theirs = exact if alike else exact_of(case, operation, given, grads, theirs)
    for name, x in ours.items():
        if x is None or not x.numel() or name.startswith("twice_"):
            continue
        if name not in exact:
            if not same_bits(x, given[name]):
                raise Difference(f"{name}: changed")
            continue
        errors[name] = errors_of(case, name, x, theirs[name], exact[name], exact_theirs[name])
    if twice:
        errors |= compare_wide(case, operation, given, grads, ours, theirs, "twice_")
    return errors


def overflows(case: Case) -> bool:
    """Whether something on the way is beyond the range of the type it is worked out in. Squares: torch's LayerNorm and
    RMSNorm give 0, NaN or what is wrong there, as dlkit's norms do; its BatchNorm adds fp32 up in fp64."""
    options = case["options"]
    values = [case["tensors"].get(name, {}).get("values") for name in ("input", "residual")]
    wider = options.get("residual") == "other type" and options["other"] != "float16"
    if "eps" not in options or (case["dtype"] == "float16" and not wider):  # whose squares are within fp32
        return False
    if "huge" in values:
        return True
    # A large eps makes what is normalized smaller than any number, and a gradient times a weight is too large before it
    # makes that small again: torch's LayerNorm has it too. A GPU multiplies gradients by deviations in fp32, torch's
    # CUDA kernel as well.
    large_eps = (options["eps"] or 0) > 1
    huge = any(spec["values"] == "huge" for spec in case["grads"].values())
    return (large_eps and (huge or "denormal" in values)) or (huge and case["backend"] not in ON_CPU)


def group_size(case: Case) -> float:
    """How many values share a statistic."""
    shape, o = case["shape"], case["options"]
    if "normalized_shape" in o:
        return math.prod(o["normalized_shape"])
    if case["op"].startswith("batch_norm"):
        return math.prod(shape) / max(1, shape[1])
    if case["op"].startswith(("group_norm", "instance_norm")):
        return math.prod(shape[1:]) / max(1, o.get("groups", shape[1]))
    return math.inf


AS_TORCH = ("layer_norm", "rms_norm", "batch_norm", "group_norm")


def rounds_only(case: Case) -> bool:
    specs = [*case["tensors"].values(), *case["grads"].values()]
    expanded = [name for name, spec in case["tensors"].items() if spec["layout"] == "expanded"]
    of_several, twice = OPERATIONS[case["op"]].forward is None, case["context"] == "create_graph"
    if twice:
        expanded += [name for name, spec in case["grads"].items() if spec["layout"] == "expanded"]
    if (of_several and expanded) or (twice and {"input", "y"} & set(expanded)):
        return False  # equal terms that cancel, a variance of 0: all is noise
    if twice and case["tensors"]["input"]["values"] == "shifted":
        return False  # each formula loses other digits of a large mean
    return all(spec["values"] in (*ROUND, "positive") for spec in specs) and case["options"].get("eps") not in (
        0.0, 1e-30, 1e-12,
    )  # fmt: skip


def errors_of(
    case: Case, name: str, ours: Tensor, theirs: Tensor, exact: Pair, exact_theirs: Pair
) -> tuple[float, float]:
    # The gradient of a number is the sum of elements' gradients, which are of the input's type.
    of_number = name == "grad_residual" and case["options"].get("residual") == "number"
    kinds = [ours.dtype, getattr(torch, case["dtype"])] if of_number else [ours.dtype]
    info = max(map(torch.finfo, kinds), key=lambda info: info.eps)
    x, y = tensors.exact(ours), tensors.exact(theirs)
    e, size, f, size_theirs = (a.reshape(x.shape) for a in (*exact, *exact_theirs))
    floor = 16 * np.longdouble(info.smallest_normal)  # below, intermediate results lose bits
    unit = info.eps * np.maximum(size, floor)
    far = np.abs(x - e) / unit
    if case["backend"] == "cpu-avx512_bf16" and ours.dtype == torch.bfloat16:
        far = np.where((x == 0) & (np.abs(e) < floor), 0, far)  # its instruction rounds what is denormal to 0
    far_theirs = np.abs(y - f) / (info.eps * np.maximum(size_theirs, floor))
    # What is within rounding of the type's range may be infinite.
    over = np.abs(e) >= info.max * (1 - info.eps)
    # Where a term is beyond the range of what it is computed in, a result within it is luck.
    range_ = torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32).max / 16
    if name == "grad_residual" and case["options"].get("residual") in ("number", "broadcast"):
        range_ = min(
            range_, torch.finfo(getattr(torch, case["dtype"])).max / 16
        )  # elements' gradients, of which this is the sum
    good_theirs = np.isfinite(y) & np.isfinite(f) & (size_theirs < range_)
    good_theirs &= far_theirs * info.eps < max(0.01, 16 * info.eps)
    finite = np.isfinite(e) & ~over
    wrong = finite & ~np.isfinite(x) & good_theirs & (np.abs(e) + unit < info.max)
    if wrong.any():
        raise Difference(f"{name}: not finite where torch's is right", show(wrong, x, y, e))
    wrong = np.isnan(e) & np.isnan(y) & ~np.isnan(x)
    if any(spec["values"] == "one infinity" for spec in case["grads"].values()):
        wrong &= np.isfinite(x)  # infinity times a deviation, which rounding may keep from 0
    # Without an eps equal values are 0 / 0, but rounding may keep their variance from 0.
    if wrong.any() and case["options"].get("eps") != 0:
        raise Difference(f"{name}: not NaN where torch's is", show(wrong, x, y, e))
    infinite = (
        (np.isinf(e) | (over & (size_theirs < range_)))
        & (np.sign(y) == np.sign(e))
        & (np.isinf(y) | (np.abs(y) == info.max))
    )
    if name.startswith("running") and case["backend"] not in ON_CPU:
        infinite &= ~np.isnan(x)  # deviations from an infinite pivot are NaN
    wrong = infinite & ~((np.sign(x) == np.sign(e)) & (np.isinf(x) | (np.abs(x) >= info.max * (1 - 2 * info.eps))))
    if wrong.any():
        raise Difference(f"{name}: not infinite where torch's is", show(wrong, x, y, e))
    judged = finite & good_theirs
    mine = float(far[judged & np.isfinite(x)].max(initial=0))
    return mine, float(far_theirs[judged].max(initial=0))


def compare_wide(
    case: Case, operation: Operation, given: Named, grads: Named, ours: Named, theirs: Named, which: str
) -> dict[str, tuple[float, float]]:
    """What has no exact result, against torch's in fp64: second derivatives, layers of several ops."""
    right = run_one(case, operation.torchs, given, dict(grads), torch.float64)
    errors = {}
    for name, x in ours.items():
        if not name.startswith(which) or x is None or not x.numel() or theirs[name] is None:
            continue
        e = tensors.exact(right[name])
        # torch's in fp64 is not exact itself, nor has it one formula for all norms.
        kind = torch.bfloat16 if case["context"] == "autocast" and x.dtype == torch.float32 else x.dtype
        unit = (64 if kind in (torch.bfloat16, torch.float16) else 16) * (
            1e-7 if kind == torch.float64 else torch.finfo(kind).eps
        )
        unit *= max(float(np.abs(e).max(initial=0)), 1e-3)  # what cancels leaves noise
        mine, torchs = (np.abs(tensors.exact(t) - e) / unit for t in (x, theirs[name]))
        judged = np.isfinite(torchs)
        if name == "twice_output y" and operation.undecided is not None:
            judged &= ~operation.undecided(given, options_of(case)).reshape(judged.shape)
        errors[name] = float(mine[judged].max(initial=0)), float(torchs[judged].max(initial=0))
    return errors


def show(bad: np.ndarray, x: np.ndarray, y: np.ndarray, e: np.ndarray) -> str:
    at = tuple(int(index[0]) for index in np.nonzero(bad)) if bad.ndim else ()
    return f"at {list(at)}: {float(x[at])!r}, torch {float(y[at])!r}, exactly {float(e[at])!r}"


FACTOR, MORE = 2.0, 4.0


def beyond(ours: float, theirs: float) -> bool:
    return not ours <= FACTOR * theirs + MORE


def find(case: Case) -> Difference | None:
    """The difference of a case, if there is one. Errors of rounding are settled by other draws of it."""
    try:
        errors = check(case)
        suspects = [name for name, pair in errors.items() if beyond(*pair)]
        if not suspects:
            return None
        worst = {name: list(errors[name]) for name in suspects}
        again = {name: [0.0, errors[name][1]] for name in suspects}
        # Of few elements an error hangs on how far their terms cancel: seldom, and then by much.
        for seed in range(32 if math.prod(case["shape"]) > 1_000 else 256):
            found = check({**case, "seed": case["seed"] + 7919 * (seed + 1), "threads": 1})
            for name in suspects:
                if name in found:
                    again[name] = [max(a, b) for a, b in zip(again[name], found[name], strict=True)]
        for name in suspects:
            seldom = worst[name][0] > 8 * again[name][1] + 8 * MORE
            if beyond(*again[name]) or seldom:
                mine, torchs = max(worst[name][0], again[name][0]), again[name][1]
                raise Difference(f"{name}: error beyond torch's", f"{mine:.3g} eps, torch's at most {torchs:.3g}")
    except Difference as found:
        found.__traceback__ = None
        return found
    except Exception as error:  # of the comparison; those of the ops are looked at in check()
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Difference(f"the comparison raises {type(error).__name__}", f"{error}, {place.name}:{place.lineno}")
    return None


# Bad arguments: which exception.


def _longer(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.dim() else tensor.expand(3)


BAD: dict[str, Any] = {
    "weight too long": lambda t, o: t.update(weight=_longer(t["weight"])),
    "bias too long": lambda t, o: t.update(bias=_longer(t["bias"])),
    "weight of integers": lambda t, o: t.update(weight=t["weight"].to(torch.int64)),
    "weight is a number": lambda t, o: t.update(weight=t["weight"] and 1.0),
    "weight on meta": lambda t, o: t.update(weight=t["weight"].to("meta")),
    "input of integers": lambda t, o: t.update(input=t["input"].nan_to_num().to(torch.int64)),
    "input of booleans": lambda t, o: t.update(input=t["input"].nan_to_num().to(torch.bool)),
    "input is complex": lambda t, o: t.update(input=t["input"].to(torch.complex64)),
    "input is None": lambda t, o: t.update(input=None),
    "input is a list": lambda t, o: t.update(input=[1.0]),
    "input without dimensions": lambda t, o: t.update(input=torch.tensor(1.0)),
    "input of one dimension": lambda t, o: t.update(input=torch.ones(3)),
    "residual too long": lambda t, o: t.update(residual=t["residual"].new_zeros([7, *t["residual"].shape, 11])),
    "residual is None": lambda t, o: t.update(residual=t["residual"] and None),
    "running_mean alone": lambda t, o: t.update(running_mean=t["running_mean"], running_var=None),
    "running_mean too long": lambda t, o: t.update(running_mean=_longer(t["running_mean"])),
    "eps is a string": lambda t, o: o.update(eps=str(o["eps"])),
    "eps is negative": lambda t, o: o.update(eps=-abs(o["eps"]) - 1e-3),
    "eps is NaN": lambda t, o: o.update(eps=o["eps"] * math.nan),
    "momentum is a string": lambda t, o: o.update(momentum=str(o["momentum"])),
    "normalized_shape too long": lambda t, o: o.update(normalized_shape=[3, *o["normalized_shape"]]),
    "normalized_shape is another": lambda t, o: o.update(normalized_shape=[n + 1 for n in o["normalized_shape"]]),
    "normalized_shape is empty": lambda t, o: o.update(normalized_shape=o["normalized_shape"][:0]),
    "normalized_shape of floats": lambda t, o: o.update(normalized_shape=[float(n) for n in o["normalized_shape"]]),
    "groups is 0": lambda t, o: o.update(groups=o["groups"] * 0),
    "groups is negative": lambda t, o: o.update(groups=-o["groups"]),
    "groups does not divide": lambda t, o: o.update(groups=o["groups"] * 0 + t["input"].size(1) + 1),
    "groups is a float": lambda t, o: o.update(groups=float(o["groups"])),
}


# What dlkit refuses by intent where torch goes on.
STRICTER = ("weight of integers", "bias of integers", "running_mean alone")


def check_bad(case: Case, operation: Operation, given: Named) -> None:
    """The exceptions of both. Nothing where the case has no such argument, or more than one reason to refuse."""
    results = []
    case["options"].pop("inplace", None)
    if case["options"].get("p") == 1:  # of which torch asks less
        case["options"]["p"] = 0.5
    if ("bias" in given and "weight" not in given) or given["input"].numel() == 0:
        return  # torch's is called with a weight then; of nothing, each of its ops asks something else
    twin = operation.twin or operation.torchs
    if outcome(lambda: twin({name: tensor.clone() for name, tensor in given.items()}, options_of(case)))[1] is not None:
        return
    for function in (operation.ours, twin):
        leaves, options = {name: tensor.clone() for name, tensor in given.items()}, {**options_of(case), "bad": True}
        try:
            BAD[case["bad"]](leaves, options)
        except (KeyError, RuntimeError, AttributeError, IndexError, TypeError):
            return
        results.append(outcome(lambda f=function, t=leaves, o=options: f(t, o))[1])
    ours, theirs = results
    if case["bad"].startswith("input of") and isinstance(ours, RuntimeError) and isinstance(theirs, RuntimeError):
        return  # a NotImplementedError or its base, by torch's layout and parameters
    # torch's own Python stumbles over some; where torch has no such op there is no type to agree on.
    stumbles = isinstance(theirs, (AttributeError, IndexError, ZeroDivisionError))
    if ours is not None and (operation.twin is None or stumbles):
        if not isinstance(ours, (TypeError, ValueError, RuntimeError, type(theirs))):
            raise Difference(f"dlkit raises {type(ours).__name__}", str(ours)[:200])
        return
    if ours is None or case["bad"] not in STRICTER:
        check_errors(ours, theirs)


# Shrinking.


def simpler(case: Case) -> Iterator[Case]:
    """The same case with one thing less."""

    def but(**changes: Any) -> Case:
        return {**copy.deepcopy(case), **changes}

    if case["context"] not in ("none", "bad"):
        yield but(context="none")
    if case["via"] != "function":
        yield but(via="function")
    if case["backend"] != "cpu-default":
        yield but(backend="cpu-default")
    if case["threads"] > 1:
        yield but(threads=1)
    for name in case["needs"]:
        yield but(needs=[other for other in case["needs"] if other != name])
    for group in ("tensors", "grads"):
        for name, spec in case[group].items():
            for key, plain in (("layout", "contiguous"), ("values", "normal")):
                if spec[key] not in (plain, "positive"):
                    changed = copy.deepcopy(case[group])
                    changed[name][key] = plain
                    yield but(**{group: changed})
    o = case["options"]
    for key, plain in PLAIN_OPTIONS.items():
        if o.get(key, "none") not in (plain, "none"):
            yield but(options={**o, key: plain})
    for name in ("weight", "bias", "running"):
        if o.get(name) is True and (name != "running" or o["training"]):
            fewer = but(options={**o, name: False})
            fewer["needs"] = [n for n in fewer["needs"] if n != name]
            fewer["tensors"] = {n: spec for n, spec in fewer["tensors"].items() if not n.startswith(name)}
            yield fewer
    after = case["op"].endswith(("_relu", "_act"))
    if o.get("residual") in ("none", "same") and after and "residual" in case["tensors"]:
        fewer = but(options={**o, "residual": "none"}, needs=[n for n in case["needs"] if n != "residual"])
        del fewer["tensors"]["residual"]
        yield fewer
    shape = case["shape"]
    for d, size in enumerate(shape):
        for smaller in sorted({1, 2, size // 2, size - 1}):
            if not 0 < smaller < size or (d == 1 and "groups" in o and smaller % o["groups"]):
                continue
            changed = [*shape[:d], smaller, *shape[d + 1 :]]
            options = dict(o)
            if "normalized_shape" in o:
                options["normalized_shape"] = changed[len(shape) - len(o["normalized_shape"]) :]
            yield but(shape=changed, options=options)
    if case["dtype"] != "float32":
        yield but(dtype="float32", parameters="float32")
    if case["parameters"] != case["dtype"]:
        yield but(parameters=case["dtype"])


PLAIN_OPTIONS = {
    "eps": 1e-5, "p": 0.5, "training": True, "momentum": 0.1, "residual": "same", "inplace": False, "groups": 1,
    "sync": False, "negative_slope": 0.01,
}  # fmt: skip


def shrink(case: Case, what: str) -> Case:
    tries, changed = 0, True
    while changed and tries < 300:
        changed = False
        for candidate in simpler(case):
            tries += 1
            found = find(candidate)
            if found is not None and found.what == what:
                case, changed = candidate, True
                break
    return case


def kind_of(case: Case, what: str) -> tuple[Any, ...]:
    """What makes two failures one."""
    specs = {f"{name} {spec[key]}" for group in ("tensors", "grads") for name, spec in case[group].items()
             for key in spec if spec[key] not in ("contiguous", "normal", "positive")}  # fmt: skip
    return case["op"], what, case["context"], case.get("bad"), tuple(sorted(specs))


def replay(case: Case) -> None:
    """Raises the difference, if there is one."""
    found = find(case)
    if found is not None:
        raise AssertionError(f"{case['op']}: {found}")


# Many.


def run_chunk(first: int, count: int, only: str = "", seconds: float = math.inf) -> dict[str, Any]:
    """{"done": cases by op, "found": [[kind, case, text]]}. Of one difference in words, the first three are shrunk."""
    done: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[Any] = collections.Counter()
    found, start = [], time.monotonic()
    with Settings():
        for seed in range(first, first + count):
            if time.monotonic() - start > seconds:
                break
            case = draw(seed, only)
            done[case["op"]] += 1
            difference = find(case)
            if difference is None:
                continue
            rough = case["op"], difference.what
            seen[rough] += 1
            if seen[rough] <= 3:
                case = shrink(case, difference.what)
                difference = find(case) or difference
            found.append([list(kind_of(case, difference.what)), case, str(difference)])
    return {"first": first, "done": done, "found": found}


def run(
    cases: int | None,
    seed: int,
    processes: int = 1,
    only: str = "",
    seconds: float | None = None,
    log: Path | None = None,
    show: Any = print,
) -> list[Any]:
    """Every kind of difference once, as [case, text]; shown as they are found."""
    done: collections.Counter[str] = collections.Counter()
    kinds: dict[Any, Any] = {}
    start, earlier = time.monotonic(), {}

    def take(result: dict[str, Any]) -> None:
        done.update(result["done"])
        for kind, case, text in result["found"]:
            key = json.dumps(kind)
            if key in kinds:
                continue
            kinds[key] = [case, text]
            show(f"\n# {len(kinds)}. {case['op']}: {text}\n{json.dumps(case)}")
            sys.stdout.flush()

    if log is not None and log.exists():
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            earlier[entry["first"]] = entry
            take(entry)
    size = min(CHUNK, cases or CHUNK)
    total = cases if cases is not None else 10**9
    jobs = [(first, min(size, seed + total - first), only) for first in range(seed, seed + min(total, 10**7), size)
            if first not in earlier]  # fmt: skip
    limit = math.inf if seconds is None else seconds

    def keep(result: dict[str, Any]) -> None:
        take(result)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(result) + "\n")

    if processes == 1:
        for job in jobs:
            left = limit - (time.monotonic() - start)
            if left <= 0:
                break
            keep(run_chunk(*job, left))
    else:
        # A process that dies raises BrokenProcessPool here; multiprocessing's own pool would start it anew for ever.
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
            try:
                for future in concurrent.futures.as_completed([pool.submit(run_chunk, *job) for job in jobs]):
                    keep(future.result())
                    if time.monotonic() - start > limit:
                        break
            finally:
                pool.shutdown(cancel_futures=True)
    show(f"\n{sum(done.values())} cases, {len(kinds)} kinds of differences")
    for name, count in sorted(done.items()):
        show(f"  {count:8d}  {name}")
    return list(kinds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=seed_of_the_day())
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--op", default="", choices=["", *OPERATIONS])
    parser.add_argument("--log", type=Path, help="what was done; a run with the same seed goes on from there")
    parser.add_argument("--json", type=Path, help="write the cases found to this file, as found_layers.json has them")
    arguments = parser.parse_args()
    if arguments.cases is None and arguments.seconds is None:
        arguments.cases = 10_000
    found = run(arguments.cases, arguments.seed, arguments.processes, arguments.op, arguments.seconds, arguments.log)
    if arguments.json is not None:
        lines = ",\n".join(json.dumps({"what": text, **case}) for case, text in found)
        arguments.json.write_text(f"[\n{lines}\n]\n")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
