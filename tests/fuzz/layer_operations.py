"""What the layers' machine runs: each operation of dlkit, torch's own way to the same, and the exact result.

An operation draws its shape and options, names its tensors, and gives three functions of them: `ours`, `torchs` and
`exact` (NumPy's longdouble). Masks come from the reference of the stream. An exact result is a pair: the values, and
element by element the size of what was added up for them, which is what rounding goes by.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as native
from support import reference
from torch import Tensor

import dlkit
import dlkit.functional as fused
from dlkit import _native
from dlkit._activation import ACTIVATIONS, activated
from dlkit.random import Philox
from fuzz import layer_tensors as tensors

Case = dict[str, Any]
Named = dict[str, Any]
Pair = tuple[np.ndarray, np.ndarray]

EPS = (1e-5, 1e-5, 1e-5, 1e-12, 1e-30, 1e-3, 1.0, 1e10, 0.0)
PROBABILITIES = (0.5, 0.1, 0.3, 0.9, 0.0, 1.0, 1e-9, 1 - 1e-9, 2.0**-20)


@dataclasses.dataclass(frozen=True)
class Operation:
    name: str
    rank: tuple[int, int]
    draw: Callable[[random.Random, list[int]], Named]  # options
    shapes: Callable[[Case], dict[str, list[int]]]  # of all tensors that there are, input first
    ours: Callable[[Named, Named], dict[str, Tensor]]
    torchs: Callable[[Named, Named], dict[str, Tensor]]
    forward: Callable[[Named, Named], dict[str, Pair]] | None = None
    backward: Callable[[Named, Named, dict[str, np.ndarray]], dict[str, Pair]] | None = None
    modules: Callable[[Named, Named], Any] | None = None
    undecided: Callable[[Named, Named], np.ndarray] | None = None  # where rounding decides what a ReLU does
    twin: Callable[[Named, Named], Any] | None = None  # torch's op of the same name, for what it refuses
    weight: int = 2


def size_of(*terms: np.ndarray) -> np.ndarray:
    return sum(np.abs(term) for term in terms)  # type: ignore[return-value]


def unbroadcast(pair: Pair, shape: Any) -> Pair:
    """Summed to a shape that was broadcast."""
    results = []
    for array in pair:
        extra = array.ndim - len(shape)
        array = array.sum(tuple(range(extra))) if extra else array
        along = tuple(i for i, size in enumerate(shape) if size == 1 and array.shape[i] != 1)
        results.append(array.sum(along, keepdims=True) if along else array)
    return results[0], results[1]


# Norms. What is normalized is seen in a shape in which statistics and parameters are along axes.


@dataclasses.dataclass(frozen=True)
class View:
    shape: tuple[int, ...]
    statistics: tuple[int, ...]  # axes that share a mean
    parameters: tuple[int, ...]  # the shape of weight and bias


def view_of(kind: str, t: Named, o: Named) -> View:
    shape = tuple(t["input"].shape if t.get("sum") is None else t["sum"].shape)
    if kind in ("layer_norm", "rms_norm"):
        cols = math.prod(o["normalized_shape"])
        rows = math.prod(shape[: len(shape) - len(o["normalized_shape"])])
        return View((rows, cols), (1,), (1, cols))
    batch, channels, space = shape[0], shape[1], math.prod(shape[2:])
    if kind == "batch_norm":
        return View((batch, channels, space), (0, 2), (1, channels, 1))
    groups = o["groups"] if kind == "group_norm" else channels
    return View((batch, groups, channels // groups, space), (2, 3), (1, groups, channels // groups, 1))


class ExactNorm:
    def __init__(self, kind: str, x: np.ndarray, t: Named, o: Named) -> None:
        self.view, self.shape = view_of(kind, t, o), x.shape
        self.x, self.rms = x.reshape(self.view.shape), kind == "rms_norm"
        axes = self.view.statistics
        self.given = not o.get("training", True)
        self.range = torch.float64 if t["input"].dtype == torch.float64 else torch.float32  # of what adds up
        eps = o["eps"]
        if eps is None:
            eps = torch.finfo(self.range).eps
        if self.given:
            mean, var = (tensors.exact(t[f"old_{name}"]) for name in ("running_mean", "running_var"))
            mean, self.var = mean.reshape(self.view.parameters), var.reshape(self.view.parameters)
        else:
            mean = np.zeros_like(self.x[..., :1]) if self.rms else self.x.mean(axes, keepdims=True)
            self.var = ((self.x - mean) ** 2).mean(axes, keepdims=True)
        self.mean, self.rstd = mean, 1 / np.sqrt(self.var + np.longdouble(eps))
        self.xhat = (self.x - mean) * self.rstd
        middle = np.abs(mean) if self.given else np.abs(self.x).mean(axes, keepdims=True)
        self.terms = (np.abs(self.x) + (0 if self.rms else middle)) * self.rstd  # of xhat
        self.weight = self.parameter(t.get("weight"), 1)
        self.bias = self.parameter(t.get("bias"), 0)

    def parameter(self, p: Tensor | None, otherwise: int) -> np.ndarray:
        if p is None:
            return np.full(self.view.parameters, otherwise, np.longdouble)
        return tensors.exact(p).reshape(self.view.parameters)

    def forward(self) -> Pair:
        y = self.xhat * self.weight
        size = size_of(self.terms * self.weight, self.bias + 0 * y)
        return (y + self.bias).reshape(self.shape), size.reshape(self.shape)

    def backward(self, grad: np.ndarray, size: np.ndarray) -> dict[str, Pair]:
        """`size`: what was added up for the gradient."""
        grad, size = grad.reshape(self.view.shape), size.reshape(self.view.shape)
        weighted, axes = grad * self.weight, self.view.statistics
        large = size * np.abs(self.weight)
        if self.given:
            found = self.rstd * weighted
            terms = np.abs(self.rstd) * large
        else:
            first = 0 if self.rms else weighted.mean(axes, keepdims=True)
            second = self.xhat * (weighted * self.xhat).mean(axes, keepdims=True)
            found = self.rstd * (weighted - first - second)
            terms = self.rstd * (
                large
                + (0 if self.rms else large.mean(axes, keepdims=True))
                + self.terms * (large * self.terms).mean(axes, keepdims=True)
            )
            if self.view.statistics != (0, 2):  # torch's BatchNorm adds fp32 up in fp64, and so has no sums too large
                sums = (large * self.terms * np.maximum(1, 1 / self.rstd)).sum(axes, keepdims=True)
                terms = np.where(sums < np.longdouble(torch.finfo(self.range).max) / 16, terms, np.inf)
            # What is made of gradients near the range's end loses bits before these factors take it away from there.
            info = torch.finfo(self.range)
            factor = np.maximum(np.maximum(np.abs(self.x - self.mean), np.abs(self.weight)), 1)
            factor = factor * np.maximum(self.rstd, 1)
            terms = np.maximum(terms, 16 * np.longdouble(info.smallest_normal) * factor)
        along = tuple(i for i, size in enumerate(self.view.parameters) if size == 1)

        def total(a: np.ndarray, size: np.ndarray) -> Pair:
            # An axis of one parameter is none to add along.
            axes_ = tuple(i for i in along if not (self.view.parameters[i] == grad.shape[i] == 1))
            # The rows of a block, the samples, and what a lane has of a slice are added up one by one, equal terms too.
            # A channel of BatchNorm has runs of 4,096 elements, by at least 16 lanes.
            run = min(grad.size // grad.shape[1], 4096) / 512
            slices = grad.shape[-1] / 32 if self.view.statistics == (2, 3) else 0
            growth = max(1, run if self.view.statistics == (0, 2) else len(a) / 32, slices)
            return a.sum(axes_).reshape(-1), growth * size.sum(axes_).reshape(-1)

        return {
            "input": (found.reshape(self.shape), terms.reshape(self.shape)),
            "weight": total(grad * self.xhat, size * self.terms),
            "bias": total(grad, size),
        }


def torch_norm(kind: str, x: Tensor, t: Named, o: Named) -> Tensor:
    weight, bias = t.get("weight"), t.get("bias")
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch's backwards fail without
    if weight is not None and kind == "batch_norm":
        weight = weight.contiguous()  # torch's backward reads one with gaps beyond it
    if kind == "layer_norm":
        return native.layer_norm(x, o["normalized_shape"], weight, bias, o["eps"])
    if kind == "rms_norm":
        return native.rms_norm(x, o["normalized_shape"], weight, o["eps"])
    if kind == "group_norm":
        # torch's backward crashes where channels_last input needs no gradient.
        y = native.group_norm(x if x.requires_grad else x.contiguous(), o["groups"], weight, bias, o["eps"])
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        kept = not x.requires_grad and last is not None and x.is_contiguous(memory_format=last)
        return y.contiguous(memory_format=last) if kept else y
    running = t.get("running_mean"), t.get("running_var")
    function = native.batch_norm if kind == "batch_norm" else native.instance_norm
    return function(x, *running, weight, bias, o["training"], o["momentum"], o["eps"])


def draw_rows(rng: random.Random, shape: list[int]) -> Named:
    count = rng.choice([1, 1, 1, len(shape), rng.randint(1, len(shape))])
    options = {"normalized_shape": shape[len(shape) - count :], "eps": rng.choice(EPS)}
    return options | {"weight": rng.random() < 0.8, "bias": rng.random() < 0.7}


def draw_rms(rng: random.Random, shape: list[int]) -> Named:
    options = draw_rows(rng, shape) | {"bias": False}
    return options | {"eps": None} if rng.random() < 0.4 else options


def draw_channels(rng: random.Random, shape: list[int]) -> Named:
    running = rng.random() < 0.7
    return {
        "eps": rng.choice(EPS[:-1]),
        "weight": rng.random() < 0.8,
        "bias": rng.random() < 0.7,
        "running": running,
        "training": not running or rng.random() < 0.7,
        "momentum": rng.choice([0.1, 0.1, 0.3, 1.0, 0.0, 0.9]),
        "sync": rng.random() < 0.2,
    }


def draw_groups(rng: random.Random, shape: list[int]) -> Named:
    divisors = [g for g in range(1, shape[1] + 1) if shape[1] % g == 0] or [1]
    options = {"groups": rng.choice(divisors), "eps": rng.choice(EPS)}
    return options | {"weight": rng.random() < 0.8, "bias": rng.random() < 0.7}


def with_residual(draw: Any, required: bool) -> Any:
    def drawn(rng: random.Random, shape: list[int]) -> Named:
        options = draw(rng, shape)
        kinds = ["same"] * 6 + ["broadcast", "other type", "number"] + ["none"] * (0 if required else 5)
        return options | {"residual": rng.choice(kinds), "other": rng.choice(tensors.DTYPES)}

    return drawn


def with_activation(draw: Any) -> Any:
    def drawn(rng: random.Random, shape: list[int]) -> Named:
        options = draw(rng, shape)
        slope = rng.choice([0.01, 0.01, 0.2, 0.0, 1.0])
        return options | {"activation": rng.choice(list(ACTIVATIONS)), "negative_slope": slope}

    return drawn


def with_dropout(draw: Any) -> Any:
    def drawn(rng: random.Random, shape: list[int]) -> Named:
        return draw(rng, shape) | {"p": rng.choice(PROBABILITIES), "training": rng.random() < 0.9}

    return drawn


def norm_shapes(case: Case) -> dict[str, list[int]]:
    shape, o = case["shape"], case["options"]
    found = {"input": shape}
    kind = o.get("residual", "none")
    if kind != "none":
        broadcast = [size if i % 2 else 1 for i, size in enumerate(shape)]
        found["residual"] = {"broadcast": broadcast, "number": []}.get(kind, shape)
    width = list(o["normalized_shape"]) if "normalized_shape" in o else shape[1:2]
    for name in ("weight", "bias"):
        if o[name]:
            found[name] = width
    if o.get("running"):
        found |= {"running_mean": width, "running_var": width}
    return found


def scale_of(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


def keep(o: Named, shape: Any) -> np.ndarray:
    """Which elements stay."""
    p = o["p"] if o.get("training", True) else 0.0
    count = math.prod(shape)
    return reference.keep_mask(o["seed"], 0, p, count).reshape(tuple(shape))


def stream(o: Named) -> Philox | None:
    return None if o.get("bad") else Philox(o["seed"])  # torch's take no generator


def torch_drop(x: Tensor, o: Named) -> Tensor:
    p = o["p"] if o.get("training", True) else 0.0
    if p == 0:
        return x
    mask = torch.from_numpy(keep(o, x.shape))
    return torch.where(mask, x * scale_of(p), torch.zeros((), dtype=x.dtype))


def exact_drop(x: np.ndarray, o: Named) -> np.ndarray:
    p = np.longdouble(o["p"] if o.get("training", True) else 0.0)
    return np.where(keep(o, x.shape), x / (1 - p), 0) if p < 1 else np.zeros_like(x)


def outputs_of(t: Named, found: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    results = dict(zip(names, found if isinstance(found, tuple) else (found,), strict=True))
    return results | {name: t[name] for name in ("running_mean", "running_var") if name in t}


def norm_operation(
    name: str,
    kind: str,
    draw: Any,
    ours: Any,
    *,
    add: bool = False,
    drop: bool = False,
    acts: bool = False,
    **rest: Any,
) -> Operation:
    """`add`: normalizes input + residual, which is an output too; `acts`: residual and activation follow the norm."""
    names = ("y", "sum") if add else ("y",)

    def torchs(t: Named, o: Named) -> dict[str, Tensor]:
        x = t["input"]
        if add:
            x = (torch_drop(x, o) if drop else x) + t["residual"]
        y = torch_norm(kind, x, t, o if not drop else o | {"training": True})
        if acts:
            y = y if t.get("residual") is None else y + t["residual"]
            y = activated(y, ACTIVATIONS[o.get("activation", "relu")], o.get("negative_slope", 0.0))
        return outputs_of(t, (y, x) if add else y, names)

    def total(t: Named, o: Named) -> Pair:
        x, residual = tensors.exact(t["input"]), tensors.exact(t["residual"])
        x = exact_drop(x, o) if drop else x
        return x + residual, size_of(x + 0 * residual, residual + 0 * x)

    def norm(t: Named, o: Named) -> ExactNorm:
        # What is normalized is the sum as it was rounded.
        x = tensors.exact(t["sum"] if add else t["input"])
        return ExactNorm(kind, x, t, o if not drop else o | {"training": True})

    def forward(t: Named, o: Named) -> dict[str, Pair]:
        exact = norm(t, o)
        results = {"y": exact.forward()}
        if add:
            results["sum"] = total(t, o)
        if acts:
            z, size = given_to_activation(results["y"], t)
            value, slope, _, _ = behind_norm(z, size, t, o)
            # Behind a kink that rounding passes the value moves as on its other side.
            steep = STEEPEST if o.get("activation", "relu") in KINKS else np.abs(slope)
            results["y"] = value, np.abs(value) + steep * size
        if "old_running_mean" in t and o["training"]:
            results |= moved(exact, t, o)
        return results

    def backward(t: Named, o: Named, grads: dict[str, np.ndarray]) -> dict[str, Pair]:
        exact, grad = norm(t, o), grads["y"]
        size = np.abs(grad)
        if acts:
            _, slope, terms, bent = behind_norm(*given_to_activation(exact.forward(), t), t, o)
            grad, size = np.where(slope == 0, 0, grad * slope), size * (terms + bent)
        found = exact.backward(grad, size)
        if acts and t.get("residual") is not None:
            found["residual"] = unbroadcast((grad, size), t["residual"].shape)
        if add:
            value, size = (a + b for a, b in zip(found["input"], (grads["sum"], np.abs(grads["sum"])), strict=True))
            found["residual"] = unbroadcast((value, size), t["residual"].shape)
            dropped = (exact_drop(value, o), exact_drop(size, o)) if drop else (value, size)
            found["input"] = unbroadcast(dropped, t["input"].shape)
        return found

    def undecided(t: Named, o: Named) -> np.ndarray:
        exact, eps = norm(t, o), torch.finfo(t["input"].dtype).eps
        z, size = exact.forward()
        if t.get("residual") is not None:
            residual = tensors.exact(t["residual"])
            z, size = z + residual, size + np.abs(residual)
        places = np.zeros(z.shape, bool)
        for kink in KINKS.get(o.get("activation", "relu"), ()):
            places |= np.abs(z - kink) <= 64 * eps * (size + abs(kink)) + 1e-6
        return places

    rest |= {"undecided": undecided if acts else None, "twin": torchs if name == kind else None}
    return Operation(name, rest.pop("rank"), draw, norm_shapes, ours, torchs, forward, backward, **rest)


# Where the slope of an activation jumps, and the steepest of these slopes.
KINKS = {"relu": (0,), "relu6": (0, 6), "leaky_relu": (0,), "hardswish": (-3, 3)}
STEEPEST = 1.5


def given_to_activation(normed: Pair, t: Named) -> Pair:
    """The norm, and the residual after it."""
    z, size = normed
    if t.get("residual") is not None:
        residual, kind_of_sum = tensors.exact(t["residual"]), torch.result_type(t["input"], t["residual"])
        # The norm is rounded to the input's type, the sum to the wider of both.
        coarser = torch.finfo(t["input"].dtype).eps / torch.finfo(kind_of_sum).eps
        z, size = z + residual, size * max(1.0, coarser) + np.abs(residual)
    return z, size


def behind_norm(
    z: np.ndarray, size: np.ndarray, t: Named, o: Named
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Value, slope, what was added up for the slope, and how much of z's own error comes to be the slope's."""
    name = o.get("activation", "relu")
    value, slope, terms = activation(name, z, t["input"].dtype == torch.float64, o.get("negative_slope", 0.0))
    with np.errstate(all="ignore"):
        small = np.minimum(np.abs(z), 40)
        if name.startswith("gelu"):
            curvature = np.exp(-(small**2) / 2) * (2 + small**2) / 2.5
            terms = terms + np.minimum(np.abs(z), 1)  # as of the op that has a bias
        elif name == "silu":
            curvature = np.exp(-small) * (2 + small)
        else:
            curvature = np.where(np.abs(z) < 3, 1 / 3, 0) if name == "hardswish" else np.zeros(z.shape)
        bent = np.where(curvature > 0, curvature * size, 0)
    return value, slope, terms, bent


def moved(exact: ExactNorm, t: Named, o: Named) -> dict[str, Pair]:
    count = math.prod(exact.view.shape[i] for i in exact.view.statistics)
    on_cpu = o["backend"].startswith("cpu-")
    with np.errstate(all="ignore"):
        found = {"running_mean": exact.mean, "running_var": exact.var * np.longdouble(count) / (count - 1)}
    results, f = {}, np.longdouble(o["momentum"])
    for name, values in found.items():
        values = values.reshape(exact.view.shape[0], -1).mean(0) if exact.view.statistics == (2, 3) else values
        old = tensors.exact(t[f"old_{name}"])
        new = values.reshape(old.shape)
        size = np.abs(new)
        if name == "running_mean":  # of which the terms may cancel
            size = np.abs(exact.x).mean(tuple(i for i in range(exact.x.ndim) if i != 1))
        elif t["input"].dtype == torch.float64 and not on_cpu:  # runs are put together by means that are rounded
            size = size + (np.abs(exact.mean) * np.sqrt(exact.var)).reshape(-1, len(old)).mean(0)
        if name == "running_var":  # deviations from a mean that is rounded
            unit = np.longdouble(torch.finfo(t[name].dtype).eps)
            rounding = np.longdouble(2) ** (-51 if on_cpu or t["input"].dtype == torch.float64 else -22)
            size = size + ((exact.mean * rounding) ** 2 / unit).reshape(-1, len(old)).mean(0)
        results[name] = (1 - f) * old + f * new, size_of((1 - f) * old, f * size.reshape(old.shape))
    return results


def ours_rows(t: Named, o: Named) -> Any:
    return {"y": fused.layer_norm(t["input"], o["normalized_shape"], t.get("weight"), t.get("bias"), o["eps"])}


def ours_rms(t: Named, o: Named) -> Any:
    return {"y": fused.rms_norm(t["input"], o["normalized_shape"], t.get("weight"), o["eps"])}


def ours_add_rows(t: Named, o: Named) -> Any:
    given = (t["input"], t["residual"], o["normalized_shape"], t.get("weight"), t.get("bias"), o["eps"])
    return outputs_of(t, fused.add_layer_norm(*given), ("y", "sum"))


def ours_add_rms(t: Named, o: Named) -> Any:
    given = (t["input"], t["residual"], o["normalized_shape"], t.get("weight"), o["eps"])
    return outputs_of(t, fused.add_rms_norm(*given), ("y", "sum"))


def ours_drop_add_rows(t: Named, o: Named) -> Any:
    given = (t["input"], t["residual"], o["normalized_shape"], t.get("weight"), t.get("bias"), o["p"], o["eps"])
    found = fused.dropout_add_layer_norm(*given, o["training"], True, generator=stream(o))
    return outputs_of(t, found, ("y", "sum"))


def ours_drop_add_rms(t: Named, o: Named) -> Any:
    given = (t["input"], t["residual"], o["normalized_shape"], t.get("weight"), o["p"], o["eps"])
    found = fused.dropout_add_rms_norm(*given, o["training"], True, generator=stream(o))
    return outputs_of(t, found, ("y", "sum"))


def ours_batch(t: Named, o: Named) -> Any:
    given = (t["input"], t.get("running_mean"), t.get("running_var"), t.get("weight"), t.get("bias"))
    rest = (o["training"], o["momentum"], o["eps"])
    if "residual" not in o:
        return outputs_of(t, fused.batch_norm(*given, *rest), ("y",))
    if "activation" in o:
        after = t.get("residual"), o["activation"], o["negative_slope"]
        return outputs_of(t, fused.batch_norm_act(*given, *rest, *after), ("y",))
    return outputs_of(t, fused.batch_norm_relu(*given, *rest, t.get("residual")), ("y",))


def ours_instance(t: Named, o: Named) -> Any:
    given = (t["input"], t.get("running_mean"), t.get("running_var"), t.get("weight"), t.get("bias"))
    return outputs_of(t, fused.instance_norm(*given, o["training"], o["momentum"], o["eps"]), ("y",))


def ours_group(t: Named, o: Named) -> Any:
    given = (t["input"], o["groups"], t.get("weight"), t.get("bias"), o["eps"])
    if "activation" in o:
        return {"y": fused.group_norm_act(*given, t.get("residual"), o["activation"], o["negative_slope"])}
    return {"y": fused.group_norm(*given)}


# Modules: the same call by a layer that has the tensors for parameters and buffers.


def fill(module: torch.nn.Module, t: Named, o: Named) -> torch.nn.Module:
    for name in ("weight", "bias"):
        if name in module._parameters:
            module._parameters[name] = t.get(name)
    for name in ("running_mean", "running_var"):
        if name in module._buffers:
            module._buffers[name] = t.get(name)
    return module.train(o.get("training", True))


def rows_module(kind: str, names: tuple[str, ...], inputs: tuple[str, ...]) -> Any:
    def run(t: Named, o: Named) -> Any:
        dropped = {"p": o["p"], "prenorm": True} if "p" in o else {}
        module = getattr(dlkit.nn, kind)(o["normalized_shape"], eps=o["eps"], **dropped)
        with dlkit.random.use(stream(o)):
            return outputs_of(t, fill(module, t, o)(*(t[name] for name in inputs)), names)

    return run


def channels_module(kind: str) -> Any:
    def run(t: Named, o: Named) -> Any:
        # By dimensions: BatchNorm1d takes [N, C] and [N, C, L]. Others have no layer.
        rank = max(1, t["input"].dim() - 2)
        sync = o["sync"] and kind.startswith("BatchNorm") and t["input"].numel()
        layer = getattr(dlkit.nn, f"Sync{kind}" if sync else f"{kind}{rank}d")
        tracked = "running_mean" in t
        after = {name: o[name] for name in ("activation", "negative_slope") if name in o}
        module = layer(t["input"].size(1), o["eps"], o["momentum"], True, tracked, **after)
        if not tracked and kind == "InstanceNorm":
            o = o | {"training": True}
        given = (t["input"], *([t["residual"]] if t.get("residual") is not None else []))
        return outputs_of(t, fill(module, t, o)(*given), ("y",))

    return run


def group_module(t: Named, o: Named) -> Any:
    sizes = (o["groups"], t["input"].size(1), o["eps"])
    if "activation" not in o:
        return {"y": fill(dlkit.nn.GroupNorm(*sizes), t, o)(t["input"])}
    module = dlkit.nn.GroupNormAct(*sizes, activation=o["activation"], negative_slope=o["negative_slope"])
    return {"y": fill(module, t, o)(t["input"], t.get("residual"))}


# Dropout and its variants: y = keep ? x * scale + shift : dropped, keep by the leading dimensions.

SELU = 1.7580993408473766


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    rank: tuple[int, int]
    mask_rank: Callable[[int], int]
    alpha: bool = False
    module: str = ""


VARIANTS = (
    Variant("dropout", (0, 5), lambda rank: rank, module="Dropout"),
    Variant("dropout1d", (2, 3), lambda rank: rank - 1, module="Dropout1d"),
    Variant("dropout2d", (3, 5), lambda rank: 2, module="Dropout2d"),
    Variant("dropout3d", (4, 5), lambda rank: 2 if rank == 5 else 1, module="Dropout3d"),
    Variant("alpha_dropout", (0, 4), lambda rank: rank, True, module="AlphaDropout"),
    Variant("feature_alpha_dropout", (2, 5), lambda rank: 2, True, module="FeatureAlphaDropout"),
    Variant("drop_path", (1, 4), lambda rank: 1, module="DropPath"),
)


def draw_dropout(rng: random.Random, shape: list[int]) -> Named:
    return {"p": rng.choice(PROBABILITIES), "training": rng.random() < 0.9, "inplace": rng.random() < 0.15}


def factors(variant: Variant, p: float) -> tuple[np.longdouble, np.longdouble, np.longdouble]:
    """(scale, shift, what is dropped becomes)."""
    p = np.longdouble(p)
    if not variant.alpha:
        return np.longdouble(0) if p == 1 else 1 / (1 - p), np.longdouble(0), np.longdouble(0)
    if p == 1:
        return np.longdouble(0), np.longdouble(0), np.longdouble(0)
    a = 1 / np.sqrt((1 - p) * (1 + p * np.longdouble(SELU) ** 2))
    b = np.longdouble(SELU) * a * p
    return a, b, b - a * np.longdouble(SELU)


def dropout_operation(variant: Variant) -> Operation:
    function = getattr(fused, variant.name)

    def mask_of(o: Named, shape: Any) -> np.ndarray:
        rank = variant.mask_rank(len(shape))
        return keep(o, shape[:rank]).reshape(tuple(shape[:rank]) + (1,) * (len(shape) - rank))

    def given(t: Named, o: Named) -> Tensor:
        return t["input"].clone() if o.get("inplace", False) and t["input"].requires_grad else t["input"]

    def ours(t: Named, o: Named) -> Any:
        return {"y": function(given(t, o), o["p"], o["training"], o.get("inplace", False), generator=stream(o))}

    def module(t: Named, o: Named) -> Any:
        layer = getattr(dlkit.nn, variant.module)(o["p"], o.get("inplace", False)).train(o["training"])
        with dlkit.random.use(stream(o)):
            return {"y": layer(given(t, o))}

    def twin(t: Named, o: Named) -> Any:
        return getattr(native, variant.name)(t["input"], o["p"], o["training"], o.get("inplace", False))

    def off(o: Named) -> bool:
        return o["p"] == 0 or not o["training"]

    def torchs(t: Named, o: Named) -> Any:
        if variant.alpha and o.get("via") == "module":
            o = o | {"inplace": False}  # torch's layers take it and do not pass it on
        x = given(t, o)
        if off(o):
            return {"y": x}
        scale, shift, dropped = (float(v) for v in factors(variant, o["p"]))
        mask = torch.from_numpy(mask_of(o, x.shape))
        y = torch.where(mask, x * scale + shift if variant.alpha else x * scale, torch.tensor(dropped, dtype=x.dtype))
        return {"y": x.copy_(y) if o.get("inplace", False) else y}

    def forward(t: Named, o: Named) -> Any:
        x = tensors.exact(t["input"])
        if off(o):
            return {"y": (x, np.abs(x))}
        scale, shift, dropped = factors(variant, o["p"])
        mask = mask_of(o, x.shape)
        return {
            "y": (
                np.where(mask, x * scale + shift, dropped),
                np.where(mask, size_of(x * scale, shift), size_of(dropped, 2 * shift)),
            )
        }

    def backward(t: Named, o: Named, grads: dict[str, np.ndarray]) -> Any:
        grad = grads["y"]
        if not off(o):
            grad = np.where(mask_of(o, grad.shape), grad * factors(variant, o["p"])[0], 0)
        return {"input": (grad, np.abs(grad))}

    return Operation(
        variant.name, variant.rank, draw_dropout, lambda case: {"input": case["shape"]}, ours, torchs, forward,
        backward, module, twin=twin if hasattr(native, variant.name) else None, weight=1,
    )  # fmt: skip


def dropout_add() -> Operation:
    def draw(rng: random.Random, shape: list[int]) -> Named:
        return with_residual(lambda *_: {"p": rng.choice(PROBABILITIES), "training": rng.random() < 0.9}, True)(
            rng, shape
        )

    def shapes(case: Case) -> dict[str, list[int]]:
        return {k: v for k, v in norm_shapes(case | {"options": case["options"] | {"weight": 0, "bias": 0}}).items()}

    def ours(t: Named, o: Named) -> Any:
        return {"y": fused.dropout_add(t["input"], t["residual"], o["p"], o["training"], generator=stream(o))}

    def module(t: Named, o: Named) -> Any:
        with dlkit.random.use(stream(o)):
            return {"y": dlkit.nn.DropoutAdd(o["p"]).train(o["training"])(t["input"], t["residual"])}

    def forward(t: Named, o: Named) -> Any:
        x, residual = exact_drop(tensors.exact(t["input"]), o), tensors.exact(t["residual"])
        return {"y": (x + residual, size_of(x + 0 * residual, residual + 0 * x))}

    def backward(t: Named, o: Named, grads: dict[str, np.ndarray]) -> Any:
        grad = grads["y"]
        dropped = exact_drop(grad, o)
        return {
            "input": (dropped, np.abs(dropped)),
            "residual": unbroadcast((grad, np.abs(grad)), t["residual"].shape),
        }

    def torchs(t: Named, o: Named) -> Any:
        return {"y": torch_drop(t["input"], o) + t["residual"]}

    return Operation("dropout_add", (1, 5), draw, shapes, ours, torchs, forward, backward, module)


def dropblock() -> Operation:
    def draw(rng: random.Random, shape: list[int]) -> Named:
        return draw_dropout(rng, shape) | {"p": rng.choice([0.1, 0.3, 0.0, 0.5]), "block": rng.choice([1, 2, 3, 5, 7])}

    def mask_of(o: Named, shape: Any) -> tuple[np.ndarray, np.longdouble]:
        samples, channels, height, width = shape
        size = min(o["block"], height, width)
        mask = np.ones(shape, bool)
        if o["p"] == 0 or not o["training"] or not mask.size:
            return mask, np.longdouble(1)
        rows, columns = height - size + 1, width - size + 1
        share = o["p"] / size**2 * height * width / (rows * columns)
        seeds = ~reference.keep_mask(o["seed"], 0, min(1.0, share), samples * channels * rows * columns)
        for n, c, i, j in np.argwhere(seeds.reshape(samples, channels, rows, columns)):
            mask[n, c, i : i + size, j : j + size] = False
        return mask, np.longdouble(mask.size) / max(int(mask.sum()), 1)

    def given(t: Named, o: Named) -> Tensor:
        return t["input"].clone() if o.get("inplace", False) and t["input"].requires_grad else t["input"]

    def ours(t: Named, o: Named) -> Any:
        rest = (o["p"], o["block"], o["training"], o.get("inplace", False))
        return {"y": fused.dropblock2d(given(t, o), *rest, generator=stream(o))}

    def module(t: Named, o: Named) -> Any:
        layer = dlkit.nn.DropBlock2d(o["p"], o["block"], o.get("inplace", False)).train(o["training"])
        with dlkit.random.use(stream(o)):
            return {"y": layer(given(t, o))}

    def torchs(t: Named, o: Named) -> Any:
        x = given(t, o)
        if o["p"] == 0 or not o["training"]:
            return {"y": x}
        mask, scale = mask_of(o, x.shape)
        y = torch.where(torch.from_numpy(mask), x * float(scale), torch.zeros((), dtype=x.dtype))
        return {"y": x.copy_(y) if o.get("inplace", False) else y}

    def scaled(x: np.ndarray, o: Named) -> Pair:
        mask, scale = mask_of(o, x.shape)
        y = np.where(mask, x * scale, 0)
        return y, np.abs(y)

    return Operation(
        "dropblock2d", (4, 4), draw, lambda case: {"input": case["shape"]}, ours, torchs,
        lambda t, o: {"y": scaled(tensors.exact(t["input"]), o)},
        lambda t, o, grads: {"input": scaled(grads["y"], o)}, module, weight=1,
    )  # fmt: skip


def activation(
    name: str, x: np.ndarray, double: bool, negative_slope: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The value, the derivative, and what was added up for that."""
    with np.errstate(all="ignore"):
        if name == "relu":
            value = np.where(x < 0, 0, x)
            slope = np.where(x <= 0, np.longdouble(0), 1)  # of NaN too: as torch
            return value, slope, slope
        if name == "leaky_relu":
            slope = np.where(x > 0, np.longdouble(1), negative_slope)
            return np.where(x > 0, x, x * np.longdouble(negative_slope)), slope, slope
        if name == "relu6":
            slope = np.where((x <= 0) | (x >= 6), np.longdouble(0), 1)  # of NaN 1, as ReLU's; torch's is 0
            return np.clip(x, 0, 6), slope, slope
        if name == "hardswish":
            # Of NaN torch's vectors make NaN, and its last elements 1.
            slope = np.where(x < -3, 0, np.where((x > 3) | np.isnan(x), 1, x / 3 + 0.5))
            terms = np.where(np.abs(x) > 3, slope, np.abs(x) / 3 + 0.5)
            return np.where(x <= -3, 0, np.where(x >= 3, x, x * (x + 3) / 6)), slope, terms
        if name == "silu":
            share = 1 / (1 + np.exp(-x))
            inner = np.where(np.isinf(x), 0, x * share * (1 - share))
            return np.where(x == -np.inf, 0, x * share), share + inner, share + np.abs(inner)
        if name == "gelu":
            if double:
                share = np.array([reference._normal_distribution(v) if abs(v) < 200 else np.longdouble(v > 0)
                                  for v in x.reshape(-1)], np.longdouble).reshape(x.shape)  # fmt: skip
                share = np.where(np.isnan(x), x, share)
            else:
                # Not ndtr, which torch makes of 1 + erf: nothing is left of its tail.
                share = torch.erfc(torch.from_numpy(-x.astype(np.float64) / 2**0.5)).numpy().astype(np.longdouble) / 2
            inner = x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.longdouble(np.pi))
            inner = np.where(np.isinf(x), 0, inner)
            return np.where(x == -np.inf, 0, x * share), share + inner, share + np.abs(inner)
        factor, cubic = np.sqrt(8 / np.longdouble(np.pi)), np.longdouble(0.044715)
        share = 1 / (1 + np.exp(-factor * (x + cubic * x**3)))
        inner = x * share * (1 - share) * factor * (1 + 3 * cubic * x**2)
        inner = np.where(np.isinf(x) | (np.abs(x) > 100), 0, inner)
        return np.where(x == -np.inf, 0, x * share), share + inner, share + np.abs(inner)


def activation_operation(name: str) -> Operation:
    def draw(rng: random.Random, shape: list[int]) -> Named:
        options = {"p": rng.choice(PROBABILITIES), "training": rng.random() < 0.9, "bias": rng.random() < 0.7}
        return options | {"activation": rng.choice(["gelu", "gelu_tanh"]) if name == "gelu" else "relu"}

    def shapes(case: Case) -> dict[str, list[int]]:
        found = {"input": case["shape"]}
        return found | {"bias": case["shape"][-1:]} if case["options"]["bias"] else found

    def approximate(o: Named) -> str:
        return "tanh" if o["activation"] == "gelu_tanh" else "none"

    def ours(t: Named, o: Named) -> Any:
        given = (t["input"], t.get("bias"), o["p"], o["training"])
        if name == "relu":
            return {"y": fused.bias_relu_dropout(*given, generator=stream(o))}
        return {"y": fused.bias_gelu_dropout(*given, approximate(o), generator=stream(o))}

    def torchs(t: Named, o: Named) -> Any:
        x = t["input"] if t.get("bias") is None else (t["input"] + t["bias"]).to(t["input"].dtype)
        return {"y": torch_drop(native.relu(x) if name == "relu" else native.gelu(x, approximate=approximate(o)), o)}

    def active(t: Named, o: Named) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        x = tensors.exact(t["input"])
        bias = tensors.exact(t["bias"]) if t.get("bias") is not None else np.longdouble(0)
        return x + bias, *activation(o["activation"], x + bias, t["input"].dtype == torch.float64)

    def forward(t: Named, o: Named) -> Any:
        x, value, slope, _ = active(t, o)
        bias = tensors.exact(t["bias"]) if t.get("bias") is not None else np.longdouble(0)
        terms = size_of(x - bias, bias)  # the sum of input and bias may cancel
        size = np.abs(value) + np.abs(slope) * np.where(np.isfinite(terms), terms, 0)
        if name == "gelu":  # an exponential that would be subnormal is 0
            info = torch.finfo(torch.float64 if t["input"].dtype == torch.float64 else torch.float32)
            size = np.maximum(size, info.smallest_normal / (4 * info.eps))
        return {"y": (exact_drop(value, o), exact_drop(size, o))}

    def backward(t: Named, o: Named, grads: dict[str, np.ndarray]) -> Any:
        x, _, slope, size = active(t, o)
        grad = exact_drop(grads["y"], o)
        size = size + (np.minimum(np.abs(x), 1) if name == "gelu" else 0)
        mask = slope == 0 if name == "relu" else ~keep(o, x.shape)  # what is dropped has a gradient of 0
        found = np.where(mask, 0, grad * slope), np.where(mask, 0, np.abs(grad) * size)
        results = {"input": found}
        if t.get("bias") is not None:
            value, terms = unbroadcast(found, t["bias"].shape)
            rows = x.size // max(1, value.size)
            results["bias"] = value, terms * max(1, rows / 32)  # rows are added up one by one, equal ones too
        return results

    return Operation(f"bias_{name}_dropout", (1, 4), draw, shapes, ours, torchs, forward, backward)


def cross_entropy() -> Operation:
    """Targets come from the seed. What torch makes of it is the yardstick: its own errors are of many kinds."""

    def draw(rng: random.Random, shape: list[int]) -> Named:
        return {
            "reduction": rng.choice(["mean", "sum", "none"]),
            "smoothing": rng.choice([0.0, 0.0, 0.1, 1.0]),
            "soft": rng.random() < 0.3,
            "weighted": rng.random() < 0.3,
            "softcap": rng.choice([None, None, None, 5.0]),
            "z_scale": rng.choice([0.0, 0.0, 1e-3]),
        }

    def shapes(case: Case) -> dict[str, list[int]]:
        found = {"input": case["shape"]}
        return found | {"weight": case["shape"][1:2]} if case["options"]["weighted"] else found

    def target_of(t: Named, o: Named) -> Tensor:
        x, generator = t["input"], torch.Generator().manual_seed(o["seed"])
        if o["soft"]:
            return torch.randn(x.shape, generator=generator).softmax(1).to(x.dtype)
        target = torch.randint(0, max(1, x.shape[1]), (x.shape[0], *x.shape[2:]), generator=generator)
        return torch.where(torch.rand(target.shape, generator=generator) < 0.1, -100, target)

    def options(o: Named) -> Named:
        return {"label_smoothing": o["smoothing"], "lse_square_scale": o["z_scale"]}

    def ours(t: Named, o: Named) -> Any:
        given = t["input"], target_of(t, o), t.get("weight")
        return {"y": fused.cross_entropy(*given, reduction=o["reduction"], softcap=o["softcap"], **options(o))}

    def module(t: Named, o: Named) -> Any:
        layer = dlkit.nn.CrossEntropyLoss(t.get("weight"), reduction=o["reduction"], softcap=o["softcap"], **options(o))
        return {"y": layer(t["input"], target_of(t, o))}

    def torchs(t: Named, o: Named) -> Any:
        code = ("none", "mean", "sum").index(o["reduction"])
        given = t["input"], target_of(t, o), t.get("weight"), code, -100
        return {"y": _native.cross_entropy(*given, *options(o).values(), o["softcap"] or 0.0)[0]}

    return Operation("cross_entropy", (2, 4), draw, shapes, ours, torchs, modules=module)


def linear_cross_entropy() -> Operation:
    """The unfused is the yardstick, which rounds the logits to 16 bits where the fused does not."""

    def draw(rng: random.Random, shape: list[int]) -> Named:
        return {
            "classes": rng.choice([1, 2, 5, 17, 40]),
            "reduction": rng.choice(["mean", "sum", "none"]),
            "smoothing": rng.choice([0.0, 0.0, 0.1]),
            "linear_bias": rng.random() < 0.5,
            "weighted": rng.random() < 0.3,
            "softcap": rng.choice([None, None, None, 5.0]),
            "z_scale": rng.choice([0.0, 0.0, 1e-3]),
        }

    def shapes(case: Case) -> dict[str, list[int]]:
        o = case["options"]
        found = {"input": case["shape"], "linear_weight": [o["classes"], case["shape"][1]]}
        found |= {"linear_bias": [o["classes"]]} if o["linear_bias"] else {}
        return found | {"weight": [o["classes"]]} if o["weighted"] else found

    def target_of(t: Named, o: Named) -> Tensor:
        generator = torch.Generator().manual_seed(o["seed"])
        target = torch.randint(0, o["classes"], t["input"].shape[:1], generator=generator)
        return torch.where(torch.rand(target.shape, generator=generator) < 0.1, -100, target)

    def ours(t: Named, o: Named) -> Any:
        loss = fused.linear_cross_entropy(
            t["input"], t["linear_weight"], target_of(t, o), linear_bias=t.get("linear_bias"), weight=t.get("weight"),
            reduction=o["reduction"], label_smoothing=o["smoothing"], lse_square_scale=o["z_scale"],
            softcap=o["softcap"],
        )  # fmt: skip
        return {"y": loss}

    def torchs(t: Named, o: Named) -> Any:
        code = ("none", "mean", "sum").index(o["reduction"])
        logits = native.linear(t["input"], t["linear_weight"], t.get("linear_bias"))
        given = logits, target_of(t, o), t.get("weight"), code, -100
        return {"y": _native.cross_entropy(*given, o["smoothing"], o["z_scale"], o["softcap"] or 0.0)[0]}

    return Operation("linear_cross_entropy", (2, 2), draw, shapes, ours, torchs)


ALL = (
    norm_operation(
        "layer_norm", "layer_norm", draw_rows, ours_rows, rank=(1, 5), weight=3,
        modules=rows_module("LayerNorm", ("y",), ("input",)),
    ),
    norm_operation(
        "rms_norm", "rms_norm", draw_rms, ours_rms, rank=(1, 5), weight=3,
        modules=rows_module("RMSNorm", ("y",), ("input",)),
    ),
    norm_operation(
        "add_layer_norm", "layer_norm", with_residual(draw_rows, True), ours_add_rows, add=True, rank=(1, 4),
        modules=rows_module("AddLayerNorm", ("y", "sum"), ("input", "residual")),
    ),
    norm_operation(
        "add_rms_norm", "rms_norm", with_residual(draw_rms, True), ours_add_rms, add=True, rank=(1, 4),
        modules=rows_module("AddRMSNorm", ("y", "sum"), ("input", "residual")),
    ),
    norm_operation(
        "dropout_add_layer_norm", "layer_norm", with_residual(with_dropout(draw_rows), True), ours_drop_add_rows,
        add=True, drop=True, rank=(1, 4),
        modules=rows_module("DropoutAddLayerNorm", ("y", "sum"), ("input", "residual")),
    ),
    norm_operation(
        "dropout_add_rms_norm", "rms_norm", with_residual(with_dropout(draw_rms), True), ours_drop_add_rms,
        add=True, drop=True, rank=(1, 4),
        modules=rows_module("DropoutAddRMSNorm", ("y", "sum"), ("input", "residual")),
    ),
    norm_operation(
        "batch_norm", "batch_norm", draw_channels, ours_batch, rank=(2, 5), weight=4,
        modules=channels_module("BatchNorm"),
    ),
    norm_operation(
        "batch_norm_relu", "batch_norm", with_residual(draw_channels, False), ours_batch, acts=True, rank=(2, 5),
        weight=4, modules=channels_module("BatchNormReLU"),
    ),
    norm_operation(
        "batch_norm_act", "batch_norm", with_activation(with_residual(draw_channels, False)), ours_batch, acts=True,
        rank=(2, 5), weight=4, modules=channels_module("BatchNormAct"),
    ),
    norm_operation(
        "group_norm_act", "group_norm", with_activation(with_residual(draw_groups, False)), ours_group, acts=True,
        rank=(2, 5), weight=3, modules=group_module,
    ),
    norm_operation(
        "group_norm", "group_norm", draw_groups, ours_group, rank=(2, 5), weight=3, modules=group_module,
    ),
    norm_operation(
        "instance_norm", "instance_norm", draw_channels, ours_instance, rank=(3, 5),
        modules=channels_module("InstanceNorm"),
    ),
    *(dropout_operation(variant) for variant in VARIANTS),
    dropout_add(),
    dropblock(),
    activation_operation("gelu"),
    activation_operation("relu"),
    cross_entropy(),
    linear_cross_entropy(),
)  # fmt: skip

OPERATIONS = {operation.name: operation for operation in ALL}
