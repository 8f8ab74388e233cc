"""Random sequences of what users do, done to dlkit's optimizer and to torch's; whatever differs is shrunk and shown.

    python -m fuzz.optimizer_machine --sequences 20000 --seed 0           (from tests/, or with PYTHONPATH=tests)
    python -m fuzz.optimizer_machine --seconds 600 --mode options
    python -m fuzz.optimizer_machine --against torch                      torch against itself: must find nothing

Both sides have parameters of their own with the same bits. After every operation all that a user can see is compared,
to the bit where no step was taken, within a rounding bound of that one step where one was (4 ulps of torch's result, or
the bound of optimizer_formulas; 16-bit values by the formula and half an ulp). Then the reference takes over dlkit's
values: a difference within the bound does not grow, and the comparison never touches dlkit's own tensors.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import time
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fuzz import optimizer_world as world
from fuzz.optimizer_formulas import Exact, agrees, array
from fuzz.optimizer_operations import OPERATIONS, TORCH_STATES
from fuzz.optimizer_oracle import ORACLES, average_of, rounded
from fuzz.optimizer_world import FLOATING, SIXTEEN_BITS, Setup, Side
from fuzz.shared import Difference, Settings

Sequence = list[tuple[str, dict[str, Any]]]


def classes_of(library: str) -> dict[str, Any]:
    if library == "oracle":
        return ORACLES
    if library == "torch":
        return {kind: getattr(torch.optim, kind) for kind in world.KINDS}
    import dlkit

    return {kind: getattr(dlkit.optim, kind) for kind in world.KINDS}


# Comparing.


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit as far as values go: NaN is NaN."""
    if a.layout != b.layout:
        return False
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if a.dtype.itemsize == 1 and a.dtype != b.dtype:
        return False
    if a.dtype == torch.float8_e4m3fn:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    if a.dtype == b.dtype and a.shape == b.shape:
        return torch.equal(a, b) or (
            (a.is_floating_point() or a.is_complex()) and bool(((a == b) | (a.isnan() & b.isnan())).all())
        )
    return False


def close(a: Tensor, b: Tensor, ulps: float) -> Any:
    """Element by element within `ulps` of b, NaN where b is NaN. Arrays of reals."""
    kind = b.dtype.to_real() if b.is_complex() else b.dtype
    x, y = array(a, kind == torch.float64), array(b, kind == torch.float64)
    info = torch.finfo(kind)
    with np.errstate(all="ignore"):
        bound = ulps * np.maximum(info.eps * abs(y), info.smallest_normal * info.eps)
        good = (abs(x - y) <= bound) | (x == y) | (np.isnan(x) & np.isnan(y))
        if b.is_complex():  # one part that is not finite spoils both in some of torch's operations
            both = (~np.isfinite(x)).any(-1, keepdims=True) & (~np.isfinite(y)).any(-1, keepdims=True)
            good = good | both
        return good


def form(tensor: Tensor) -> tuple[Any, ...]:
    strides = tensor.stride() if tensor.layout == torch.strided and tensor.numel() > 1 else None
    return tensor.dtype, tuple(tensor.shape), tensor.layout, strides


def seen(result: Any) -> Any:
    """A return value as it is compared."""
    if isinstance(result, Tensor):
        return [result.dtype, result.double().tolist() if not result.is_complex() else str(result.tolist())]
    if isinstance(result, (list, tuple)):
        return [seen(item) for item in result]
    return result


class Before:
    """The reference's values before an operation."""

    def __init__(self, side: Side) -> None:
        self.params = [p.detach().clone() for p in side.params]
        self.states = [
            {
                side.index(p): {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
                for p, state in optimizer.state.items()
                if isinstance(p, Tensor)
            }
            for optimizer in side.optimizers
        ]
        self.versions = [p._version for p in side.params]

    def restore(self, side: Side) -> None:
        """After a step that raised: torch may have done a part of it."""
        with torch.no_grad():
            for param, kept in zip(side.params, self.params, strict=False):
                if not same(param, kept):
                    param.copy_(kept)
        for optimizer, states in zip(side.optimizers, self.states, strict=True):
            for param in [p for p in optimizer.state if isinstance(p, Tensor)]:
                kept = states.get(side.index(param))
                if kept is None:
                    del optimizer.state[param]
                    continue
                for key in list(optimizer.state[param]):
                    if key not in kept:
                        del optimizer.state[param][key]
                for key, value in kept.items():
                    if isinstance(value, Tensor) and not same(optimizer.state[param][key], value):
                        optimizer.state[param][key].copy_(value)


class Pair:
    """dlkit's side, the reference, and how they are compared."""

    def __init__(self, setup: Setup, library: str = "dlkit") -> None:
        self.extras = {
            key: world.dtype_of(value) if key == "state_dtype" and value != "int8" else value
            for key, value in setup.get("extras", {}).items()
        }
        self.ended = False
        sides, errors = [], []
        reference = "oracle" if self.extras else "torch"
        self.masters = bool(self.extras.get("master_weights"))
        for name in ("oracle" if self.extras and library == "torch" else library, reference):
            try:
                sides.append(Side(classes_of(name), setup, self.extras, name == "oracle"))
                errors.append(None)
            except Exception as error:
                errors.append(error)
        self.check_errors("making the optimizer", *errors)
        if errors[0] is not None:
            self.ended = True
            return
        self.ours, self.theirs = sides
        self.compare("making the optimizer", None, False)

    def check_errors(self, where: str, ours: Any, theirs: Any) -> None:
        kinds = [None if error is None else type(error).__name__ for error in (ours, theirs)]
        if kinds[0] != kinds[1] and not (theirs is not None and isinstance(ours, type(theirs))):
            text = str(ours or theirs).strip().splitlines() or [""]
            raise Difference(f"{where}: dlkit {_outcome(kinds[0])}, torch {_outcome(kinds[1])}", text[0][:200])

    def do(self, name: str, arguments: dict[str, Any]) -> None:
        operation = OPERATIONS[name]
        before = Before(self.theirs)
        versions = [p._version for p in self.ours.params]
        results, errors = [], []
        for side in (self.ours, self.theirs):
            for optimizer in side.optimizers:
                if side.oracle:
                    optimizer.used, optimizer.factor, optimizer.stepped = {}, 1.0, False
            try:
                results.append(operation.run(side, **arguments))
                errors.append(None)
            except Exception as error:
                error.__traceback__ = None  # frames would hold tensors
                results.append(None)
                errors.append(error)
        if errors[0] is None and isinstance(errors[1], TypeError) and "but got NoneType" in str(errors[1]):
            self.ended = True  # torch's fused SGD, where some buffers are missing
            return
        # A tensor as lr with foreach; foreach's nesterov, which writes into gradients.
        foreach = "as a Tensor is not supported" in str(errors[1]) or "refers to a single memory" in str(errors[1])
        foreach = foreach and any(group.get("foreach") for group in self.theirs.optimizer.param_groups)
        torch_refuses = foreach or self.widened()
        if errors[0] is None and errors[1] is not None and torch_refuses:
            self.ended = True  # dlkit need not
            return
        if self.extras and isinstance(errors[0], RuntimeError) and any(text in str(errors[0]) for text in REFUSED):
            self.ended = True
            return
        several = torch_refuses or bool(self.extras)
        if errors[0] is None or errors[1] is None or not several:
            self.check_errors(name, *errors)  # where there is more than one reason, either may come first
        if errors[0] is not None:
            if not name_of_step(name) or self.hooked():
                self.ended = True  # half-done on both sides
                return
            try:
                self.compare(name, None, False)
            except Difference:
                before.restore(self.theirs)
                self.compare(f"{name} that raised", None, False)
            return
        if name == "swap_averages":
            self.compare_swapped(*results)
        elif seen(results[0]) != seen(results[1]) and not _numbers_near(*results):
            raise Difference(f"{name}: another result", f"{seen(results[0])} and {seen(results[1])}"[:300])
        self.compare(name, before, operation.steps)
        for i, (version, param, other) in enumerate(
            zip(versions, self.ours.params, self.theirs.params, strict=False)  # there may be new ones
        ):
            # A copy has versions of its own; a shared one is counted wherever it is written.
            if operation.steps and (param._version > version) < (other._version > before.versions[i]):
                raise Difference(f"{name}: autograd is not told that a parameter changed", f"parameter {i}")
        self.follow()

    def widened(self) -> bool:
        """Is there what torch refuses at times and dlkit need not?

        Gradients that are conjugated, sparse or of another dtype, and states of another dtype.
        """
        for param in self.ours.params:
            grad = param.grad
            if grad is not None and (grad.dtype != param.dtype or grad.is_conj() or grad.layout != torch.strided):
                return True
            if self.mixed(self.ours, param):
                return True
        return any(self.mixed(self.theirs, param) for param in self.theirs.params)

    def mixed(self, side: Side, param: Tensor) -> bool:
        """Has the parameter states of another dtype?"""
        state = self.owner(side, param).state.get(param, {})
        return any(
            isinstance(v, Tensor) and v.dtype != param.dtype
            for k, v in state.items()
            if k in TORCH_STATES and k != "step"
        )

    def hooked(self) -> bool:
        """Do hooks change weights, states or rates within a step, beyond what can be seen after it?"""
        return any(handle.changes for handle in self.theirs.hooks)

    def compare_swapped(self, ours: Any, theirs: Any) -> None:
        if ours is None:
            return
        if ours[1] != theirs[1] and ours[1] is None:
            raise Difference("swap_averages: a step was taken in between")
        for a, b in zip(ours[0], theirs[0], strict=True):
            if not same(a, b) and not close(a, b, 2).all():
                raise Difference("swap_averages: other averages are swapped in")

    def compare(self, where: str, before: Before | None, stepped: bool) -> None:
        ours, theirs = self.ours, self.theirs
        for a, b in zip(ours.optimizers, theirs.optimizers, strict=True):
            self.compare_groups(where, a, b)
        aliases = collections.Counter(p.untyped_storage().data_ptr() for p in theirs.params if p.numel())
        for i, (a, b) in enumerate(zip(ours.params, theirs.params, strict=True)):
            if (*form(a), a.requires_grad) != (*form(b), b.requires_grad):
                raise Difference(f"{where}: another form of a parameter", f"parameter {i}: {form(a)} and {form(b)}")
            if not stepped or not any(g.get("foreach") and g.get("nesterov") for g in theirs.optimizer.param_groups):
                self.compare_grads(where, i, a.grad, b.grad)  # torch's foreach writes its update into p.grad there
            states = [
                (optimizer.state.get(p, {}), p in optimizer.state)
                for side, p in ((ours, a), (theirs, b))
                for optimizer in [self.owner(side, p)]
            ]
            self.compare_state_form(where, i, *states)
            exact = None
            tied = b.numel() > 0 and aliases[b.untyped_storage().data_ptr()] > 1
            pairs = [("param", a, b)]
            pairs += [(k, states[0][0][k], v) for k, v in states[1][0].items() if k in TORCH_STATES]
            for key, x, y in pairs:
                if not isinstance(y, Tensor):
                    if x != y:
                        raise Difference(f"{where}: another {key}", f"parameter {i}: {x} and {y}")
                    continue
                if same(x, y):
                    continue
                if not stepped or before is None:
                    raise Difference(f"{where}: {_called(key)} differs", _show(i, key, x, y))
                if exact is None and name_of_step(where):
                    exact = self.exact(i, b, before)
                self.check_values(where, i, key, x, y, exact, before, tied)
        if self.extras:
            self.compare_own(where, stepped)
        scales = [None if side.scaler._scale is None else float(side.scaler._scale) for side in (ours, theirs)]
        if scales[0] != scales[1]:
            raise Difference(f"{where}: another scale", f"{scales[0]} and {scales[1]}")

    def owner(self, side: Side, param: Tensor) -> Any:
        """The optimizer that has the parameter, else the first."""
        for optimizer in side.optimizers[1:]:
            if param in optimizer.state or any(param is p for g in optimizer.param_groups for p in g["params"]):
                return optimizer
        return side.optimizers[0]

    def compare_groups(self, where: str, a: Any, b: Any) -> None:
        if len(a.param_groups) != len(b.param_groups):
            raise Difference(f"{where}: another number of groups")
        for g, h in zip(a.param_groups, b.param_groups, strict=True):
            names = [[key for key in group if key not in OWN and not key.startswith("ema_")] for group in (g, h)]
            if names[0] != names[1] if not self.extras else sorted(names[0]) != sorted(names[1]):
                raise Difference(f"{where}: other entries in a group", f"{names[0]} and {names[1]}")
            if [self.ours.index(p) for p in g["params"]] != [self.theirs.index(p) for p in h["params"]]:
                raise Difference(f"{where}: other parameters in a group")
            for key in names[1]:
                x, y = g[key], h[key]
                if key != "params" and (type(x) is not type(y) or seen(x) != seen(y)):
                    raise Difference(f"{where}: another {key} in a group", f"{x!r} and {y!r}")
        defaults = [{k: seen(v) for k, v in optimizer.defaults.items()} for optimizer in (a, b)]
        if not self.extras and defaults[0] != defaults[1]:  # the oracle's optimizer is not made anew where dlkit's is
            raise Difference(f"{where}: other defaults", f"{a.defaults} and {b.defaults}")

    def compare_grads(self, where: str, i: int, a: Tensor | None, b: Tensor | None) -> None:
        if (a is None) != (b is None):
            raise Difference(f"{where}: a gradient is {'gone' if a is None else 'there'}, torch's is not")
        if a is None or b is None or same(a, b):
            return
        sparse = torch.strided not in (a.layout, b.layout)
        if form(a)[:3] != form(b)[:3] or not close(*((a, b) if not sparse else (a.to_dense(), b.to_dense())), 2).all():
            factor = self.theirs.optimizer.factor if self.extras else 1.0
            if (
                factor != 1.0
                and not sparse
                and (abs(array(a, False) - array(b, False)) <= 1e-6 * abs(array(b, False))).all()
            ):
                return  # a factor that is an fp32 one  # unscaling or clipping rounds
            raise Difference(f"{where}: a gradient differs", _show(i, "gradient", a, b))

    def compare_state_form(self, where: str, i: int, ours: Any, theirs: Any) -> None:
        (a, in_a), (b, in_b) = ours, theirs
        if not self.extras and in_a != in_b:
            raise Difference(f"{where}: state is {'there' if in_a else 'missing'}, torch's is not", f"parameter {i}")
        names = [[key for key in state if key in TORCH_STATES or not self.extras] for state in (a, b)]
        if (sorted(names[0]) != sorted(names[1])) if self.extras else (names[0] != names[1]):
            raise Difference(f"{where}: other states", f"parameter {i}: {names[0]} and {names[1]}")
        for key in names[1]:
            # SGD's buffer: torch's is a copy of the first gradient, strides included; dlkit's is as the parameter.
            parts = 3 if key == "momentum_buffer" else 4
            other = isinstance(a[key], Tensor) and isinstance(b[key], Tensor) and a[key].dtype != b[key].dtype
            if other and key != "step" and self.widened():
                self.ended = True  # dlkit's states are of the parameter's dtype
                return
            if isinstance(b[key], Tensor) and (
                not isinstance(a[key], Tensor) or form(a[key])[:parts] != form(b[key])[:parts]
            ):
                raise Difference(
                    f"{where}: another form of {_called(key)}", f"parameter {i}, {key}: {form(a[key])}, {form(b[key])}"
                )

    def exact(self, i: int, param: Tensor, before: Before) -> Any:
        """The formula on what the reference had before this step; None where that is not all there was."""
        optimizer = self.owner(self.theirs, param)
        found = [g for g in optimizer.param_groups for p in g["params"] if p is param]
        grad, start = param.grad, before.params[i] if i < len(before.params) else None
        if len(found) != 1 or start is None or grad is None or grad.layout != torch.strided or self.hooked():
            return None
        if start.shape != param.shape or start.dtype != param.dtype or grad.shape != param.shape:
            return None
        position = self.theirs.optimizers.index(optimizer)
        state = before.states[position].get(i, {}) if position < len(before.states) else {}
        if any(isinstance(v, Tensor) and v.layout != torch.strided for v in state.values()):
            return None
        factor, slack, blur = 1.0, 0.0, 0.0
        if not self.masters and self.mixed(self.theirs, param):
            return None
        if found[0].get("foreach") and found[0].get("nesterov"):
            return None  # torch writes its update into p.grad
        if self.extras:
            factor, grad = optimizer.factor, optimizer.raw.get(param, grad)
            if factor != 1.0 and any(g.dtype not in (torch.float64, torch.complex128) for g in optimizer.raw.values()):
                blur = 2.0**-22  # the norm of fp32 gradients is added up in fp32, for fp64 parameters too
            if self.masters and param.dtype in SIXTEEN_BITS:
                start = optimizer.used.get(param, start.float())
                # Masters are not compared: they part by a few roundings, and by half an ulp of the 16 bits where the
                # user wrote the weights and nothing tells which elements.
                size = abs(array(start, False))
                slack = 2.0**-20 * float(np.nanmax(size, initial=0.0, where=np.isfinite(size)))
                if i in self.ours.writes:
                    slack = slack + 0.5 * torch.finfo(param.dtype).eps * np.maximum(size, 1e-4)
        return Exact(self.theirs.kind, found[0], start, grad, state, factor, slack, blur)

    def check_values(
        self, where: str, i: int, key: str, x: Tensor, y: Tensor, exact: Any, before: Before, tied: bool
    ) -> None:
        if x.layout != torch.strided or y.layout != torch.strided or not x.is_floating_point() | x.is_complex():
            raise Difference(f"{where}: {_called(key)} differs", _show(i, key, x, y))
        sixteen = y.dtype in SIXTEEN_BITS
        # Two or three operations that round otherwise: 4 ulps of the result. 16 bits go by the formula alone.
        good = close(x, y, 0 if sixteen else 4)
        if good.all():
            return
        if exact is not None and key in exact.results and not tied:
            good = good | agrees(x, exact.results[key])
        elif exact is None or tied:
            # Hooks, shared memory: no formula says what goes on within the step. 1e-5 of what is largest, or 20 % where
            # 16 bits take part; nothing where torch is wrong on its own: its roots below 0, its overflow in fp16, its
            # fused kernels' reading of gradients that are not dense.
            groups = [g for optimizer in self.theirs.optimizers for g in optimizer.param_groups]
            apart = any(g.get("centered") or g.get("fused") for g in groups)
            if y.dtype == torch.float16 or apart or (tied and any(g.get("foreach") for g in groups)):
                return  # foreach takes what is shared all at once
            largest = max(float(abs(array(t, False)[np.isfinite(array(t, False))]).max(initial=0)) for t in (x, y))
            tensors = [
                t for p in self.theirs.params for t in (p, *self.owner(self.theirs, p).state.get(p, {}).values())
            ]
            rough = any(isinstance(t, Tensor) and t.dtype in SIXTEEN_BITS for t in tensors)
            good = good | (abs(array(x, False) - array(y, False)) <= (0.2 if rough else 1e-5) * largest)
        if not good.all():
            nan = bool((np.isnan(array(x, False)) != np.isnan(array(y, False)))[~good].any())
            much = "is not NaN where torch's is, or the other way" if nan else "differs"
            raise Difference(f"{where}: {_called(key)} {much}", _show(i, key, x, y, exact, good))

    def compare_own(self, where: str, stepped: bool) -> None:
        """grad_norm and the averages."""
        a, b = self.ours.optimizer, self.theirs.optimizer
        if a.max_norm is not None and b.stepped and "raised" not in where:
            if a.grad_norm is None or a.grad_norm.device.type != "cpu":
                raise Difference(f"{where}: no grad_norm, or not on the CPU", str(a.grad_norm))
            x, y = float(a.grad_norm), float(b.grad_norm)
            # fp32 within a block, fp64 between blocks; beyond fp32's range it is infinite.
            near = abs(x - y) <= 4e-7 * abs(y) + 1e-30 or (x != x and y != y) or x == y
            if not near and not (x == float("inf") and y > 1e18) and not (y < 1e-18 and x < 1e-18):
                raise Difference(f"{where}: another grad_norm", f"{x} and {y}")
        places = collections.Counter(q.untyped_storage().data_ptr() for q in self.theirs.params if q.numel())
        shared = {place for place, count in places.items() if count > 1}
        for i, (p, q) in enumerate(zip(self.ours.params, self.theirs.params, strict=True)):
            found = [g for g in b.param_groups for other in g["params"] if other is q]
            if not found or found[0].get("ema_decay") is None or q.dtype not in FLOATING:
                continue
            if q.untyped_storage().data_ptr() in shared or found[0].get("centered"):
                continue  # an average may be taken between two updates; torch's roots below 0 are NaN
            if len(found) > 1 or not bool(q.isfinite().all()):
                continue  # the master of what overflowed in 16 bits may be finite
            x, y = average_of(a, p), average_of(b, q)
            if x.dtype != y.dtype:
                if "ema" not in a.state.get(p, {}) and q in b.averages:
                    x = x.to(y.dtype)  # not stepped yet: the parameter itself
                else:
                    raise Difference(f"{where}: another form of an average", f"{form(x)} and {form(y)}")
            rest = 1 - found[0]["ema_decay"]
            xs, ys, ps, qs = (array(t, False) for t in (x, y, p, q))
            info = torch.finfo(x.dtype)
            with np.errstate(all="ignore"):
                bound = 8 * info.eps * (abs(ys) + abs(qs)) + 2 * rest * abs(ps - qs)
                if self.masters and q.dtype in SIXTEEN_BITS:
                    info = torch.finfo(q.dtype)  # from the 16 bits or from the master, also where a write was
                    bound = bound + 2 * info.eps * np.maximum(abs(qs), info.smallest_normal)
                good = (abs(xs - ys) <= bound + 1e-30) | (xs == ys) | (np.isnan(xs) & np.isnan(ys))
                good = good | (np.isfinite(ps) & ~np.isfinite(qs))  # the parameter may be so, see Exact.rmsprop
            if not good.all():
                raise Difference(f"{where}: an average differs", _show(i, "average", x, y, None, good))

    @torch.no_grad()
    def follow(self) -> None:
        """The reference takes over dlkit's values, which are within the bound: errors do not add up."""
        for i, (a, b) in enumerate(zip(self.ours.params, self.theirs.params, strict=True)):
            if not same(a, b):
                if self.masters and b.dtype in SIXTEEN_BITS and b in self.theirs.optimizer.masters:
                    self.theirs.optimizer.masters[b] = _toward(self.theirs.optimizer.masters[b], b, a)
                    if not close(a, b, 2).all():  # by more than a rounding: the master is not known any more
                        self.ours.writes.add(i)
                b.copy_(a)
            if a.grad is not None and not same(a.grad, b.grad):
                b.grad.copy_(a.grad)
            states = [self.owner(side, p).state.get(p, {}) for side, p in ((self.ours, a), (self.theirs, b))]
            for key, value in states[1].items():
                if isinstance(value, Tensor) and not same(states[0][key], value):
                    value.copy_(states[0][key])
            if self.extras and b in self.theirs.optimizer.averages:
                average = average_of(self.ours.optimizer, a)
                self.theirs.optimizer.averages[b].copy_(average)


# What dlkit says it cannot do with its own options.
REFUSED = ("is there twice", "a gradient is sparse", "capturable=True on the CPU", "serve differentiable", "is complex")


class CodedPair:
    """State in fewer bits (`state_dtype`): no values to compare with, but invariants.

    Weights stay finite and near those of fp32 states: within a share of how far torch's fp32 steps have moved the
    farthest element so far. Saving, loading, copying and another layout change less: another side does without them.
    """

    # Of all moves so far. bf16 keeps 8 bits of a moment. int8 keeps a small second moment to a factor of about 2.
    SHARES: ClassVar = {torch.bfloat16: 0.2, "int8": 1.0}

    def __init__(self, setup: Setup, library: str = "dlkit") -> None:
        self.ended = False
        given = setup["extras"]["state_dtype"]
        self.stored = given if given == "int8" else world.dtype_of(given)
        extras = {} if library == "torch" else {"state_dtype": self.stored}
        made = classes_of(library)
        self.sides = [Side(made, setup, extras), Side(made, setup, extras, True), Side(classes_of("torch"), setup, {})]
        self.sides[1].still = True
        self.moved: dict[int, float] = {}

    def do(self, name: str, arguments: dict[str, Any]) -> None:
        operation = OPERATIONS[name]
        before = [p.detach().double() for p in self.sides[2].params]
        errors = []
        for side in self.sides:
            try:
                operation.run(side, **arguments)
                errors.append(None)
            except Exception as error:
                error.__traceback__ = None
                errors.append(error)
        if errors[0] is not None and errors[1] is None:
            raise Difference(f"{name} raises {type(errors[0]).__name__}", str(errors[0])[:200])
        if any(errors):
            self.ended = True
            return
        for i, (ours, still, plain) in enumerate(zip(*(side.params for side in self.sides), strict=True)):
            x, y, z = (p.detach().double() for p in (ours, still, plain))
            if operation.steps and i < len(before) and z.numel():
                self.moved[i] = self.moved.get(i, 0.0) + float((z - before[i]).abs().max())
            rounding = 4 * len(self.moved) * torch.finfo(ours.dtype).eps * float(z.abs().max()) if z.numel() else 0
            bound = self.SHARES[self.stored] * self.moved.get(i, 0.0)
            if not x.isfinite().all():
                raise Difference(f"{name}: a parameter is not finite", f"parameter {i}")
            # Another layout may cut other blocks, so codes are rounded anew.
            for other, share, text in ((z, 1, "fp32 states"), (y, 0.25, "a side without copies and layouts")):
                far = float((x - other).abs().max()) if x.numel() else 0.0
                if far > share * bound + rounding:
                    raise Difference(
                        f"{name}: a parameter is far from {text}", f"parameter {i}: by {far}, bound {share * bound}"
                    )


# What a sequence for CodedPair is made of.
CODED = {
    "step": {"grads": ["plain", "plain", "transposed", "strided"], "closure": [False], "context": ["none"]},
    "zero_grad": {},
    "move_parameter": {},
    "write_weights": {"how": ["zero_", "mask", "clamp_", "fill_", "neg_"]},
    "change_layout": {},
    "save_and_load": {"how": ["itself", "new", "file"]},
    "copy_everything": {},
    "replace_state": {},
    "scale_rate": {"factor": [0.5]},
    "add_scheduler": {"which": ["StepLR"]},
    "step_scheduler": {},
}


def draw_coded(rng: random.Random) -> tuple[Setup, Sequence]:
    kind = rng.choice(world.KINDS)
    shapes = [[64, 64], [8, 16, 8, 4], [5000], [3], [8, 32], [17, 300]]
    entries = {
        "AdamW": {"betas": [[0.9, 0.999], [0.5, 0.7]], "amsgrad": [False, True]},
        "SGD": {"momentum": [0.9, 0.5], "nesterov": [False, True]},
        "RMSprop": {"alpha": [0.99, 0.5], "momentum": [0, 0.9]},
    }
    chosen = entries["AdamW" if kind == "Adam" else kind]
    options = {"lr": 0.01, **{key: rng.choice(values) for key, values in chosen.items()}}
    groups = []
    for _ in range(rng.choice([1, 2])):
        specs = [
            [rng.choice(shapes), rng.choice(["float32"] * 3 + ["bfloat16"]), rng.choice(world.LAYOUTS), True]
            for _ in range(rng.choice([1, 2]))
        ]
        groups.append({"params": specs})
    extras = {"state_dtype": rng.choice(["bfloat16", "int8"])}
    sequence = []
    for name in rng.choices(list(CODED), [OPERATIONS[name].weight for name in CODED], k=rng.choice([4, 8, 12, 20])):
        drawn = OPERATIONS[name].draw(rng, kind)
        drawn.update({key: rng.choice(choices) for key, choices in CODED[name].items()})
        sequence.append((name, drawn))
    return {"kind": kind, "options": options, "extras": extras, "groups": groups, "second": []}, sequence


OWN = ("master_weights", "stochastic_rounding", "state_dtype", "ema_decay")


def name_of_step(where: str) -> bool:
    return where.startswith("step")


def _outcome(kind: str | None) -> str:
    return "goes on" if kind is None else f"raises {kind}"


def _called(key: str) -> str:
    return {"param": "a parameter", "step": "a step counter"}.get(key, "a state")


def _show(i: int, key: str, x: Tensor, y: Tensor, exact: Any = None, good: Any = None) -> str:
    text = f"parameter {i}, {key}, {str(y.dtype)[6:]}{list(y.shape)}"
    if x.layout != torch.strided or y.layout != torch.strided or x.shape != y.shape or not x.numel():
        return f"{text}: {x.layout} {list(x.shape)} and {y.layout} {list(y.shape)}"
    if x.dtype == torch.float8_e4m3fn or not (x.is_floating_point() or x.is_complex()):
        return text
    if good is None:
        good = close(x, y, 0)
    bad = ~np.asarray(good)
    if not bad.any():
        return text
    at = tuple(index[0] for index in np.nonzero(bad)) if bad.ndim else ()
    text += f" at {[int(a) for a in at]}: {array(x, False)[at]!r}, torch {array(y, False)[at]!r}"
    if exact is not None and key in exact.results:
        text += f", exactly {exact.results[key][0][at]!r} within {float(exact.results[key][1][at]):.3g}"
    return text


def _numbers_near(a: Any, b: Any) -> bool:
    a, b = (x if isinstance(x, list) else [x] for x in (a, b))
    if len(a) != len(b) or not all(isinstance(x, (float, Tensor)) for x in (*a, *b)):
        return False
    return all(
        abs(float(x) - float(y)) <= 1e-6 * abs(float(y)) or str(float(x)) == str(float(y))
        for x, y in zip(a, b, strict=True)
    )


def _toward(master: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    """The nearest fp32 value that rounds to `ours`, where that is not what the master rounds to."""
    result = master.clone()
    wide = ours.float()
    differs = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    if not differs.any():
        return result
    low, high = wide.clone(), torch.where(master.isfinite(), master, wide)  # low rounds to ours, high does not
    for _ in range(40):
        middle = (low.double() * 0.5 + high.double() * 0.5).float()
        fits = rounded(middle, ours.dtype) == ours
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(differs, low, result)


# Running, drawing and shrinking.


def difference(setup: Setup, sequence: Sequence, library: str = "dlkit") -> tuple[Difference | None, int]:
    """The first difference, and how many operations there were until then."""
    done = 0
    try:
        pair: Any = (CodedPair if "state_dtype" in setup["extras"] else Pair)(setup, library)
        for name, arguments in sequence:
            if pair.ended:
                break
            done += 1
            pair.do(name, arguments)
    except Difference as found:
        found.__traceback__ = None
        return found, done
    return None, done


EXTRAS = {
    "max_norm": [1.0, 0.1, 1e6, 0.0],
    "ema_decay": [0.9, 0.5, 0.0],
    "master_weights": [True],
}


def draw(seed: int, mode: str, without: Any = ()) -> tuple[Setup, Sequence]:
    rng = random.Random(seed)
    if mode == "coded":
        return draw_coded(rng)
    extras: dict[str, Any] = {}
    dtypes = None
    if mode == "options":
        for key in rng.sample(list(EXTRAS), rng.choice([1, 1, 2, 3])):
            extras[key] = rng.choice(EXTRAS[key])
        if "max_norm" in extras:
            extras["error_if_nonfinite"] = rng.random() < 0.2
            extras["clip_gradients_in_place"] = rng.random() < 0.2
        if "master_weights" in extras:
            dtypes = ["bfloat16", "bfloat16", "bfloat16", "float16", "float32"]
    setup = world.draw_setup(rng, dtypes, extras)
    if mode == "options":
        for group in [setup["options"], *setup["groups"]]:
            for key in ("differentiable", "capturable", "fused", "foreach"):
                group.pop(key, None)
            if isinstance(group.get("lr"), dict):
                group["lr"] = 0.05  # dlkit's optimizer is made anew at times, from the tensor as it is then
            if "master_weights" in extras:
                group.pop("centered", None)  # where torch's root is NaN and dlkit's is not, masters part
    allowed = [op for op in OPERATIONS.values() if not (op.own if mode == "plain" else op.plain)]
    allowed = [op for op in allowed if op.name not in without]
    weights = [op.weight for op in allowed]
    sequence: Sequence = []
    for op in rng.choices(allowed, weights, k=rng.choice([3, 6, 8, 12, 12, 20])):
        arguments = op.draw(rng, setup["kind"])
        if mode == "options" and arguments.get("entry", [""])[0] in ("centered", *world.RARE):
            continue  # the oracle runs on torch's single-tensor step
        sequence.append((op.name, arguments))
    return setup, sequence


def shrink(setup: Setup, sequence: Sequence, what: str, library: str) -> tuple[Setup, Sequence]:
    """Drops operations, parameters, groups and entries, and takes the simplest arguments, while `what` stays."""

    def fails(setup: Setup, sequence: Sequence) -> bool:
        found, _ = difference(setup, sequence, library)
        return found is not None and found.what == what

    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(sequence))):
            shorter = sequence[:i] + sequence[i + 1 :]
            if fails(setup, shorter):
                sequence, changed = shorter, True
        for smaller in _smaller(setup):
            if fails(smaller, sequence):
                setup, changed = smaller, True
                break
        for i, (name, arguments) in enumerate(sequence):
            for key, choices in OPERATIONS[name].choices.items():
                if callable(choices) or arguments[key] == choices[0]:
                    continue
                simpler = sequence[:i] + [(name, {**arguments, key: choices[0]})] + sequence[i + 1 :]
                if fails(setup, simpler):
                    sequence, arguments, changed = simpler, simpler[i][1], True
    return setup, sequence


def _smaller(setup: Setup) -> Any:
    groups = setup["groups"]
    if setup["second"]:
        yield {**setup, "second": []}
    for name in ("options", "extras"):
        for key in setup[name]:
            yield {**setup, name: {k: v for k, v in setup[name].items() if k != key}}
    for g in range(len(groups)):
        if len(groups) > 1:
            yield {**setup, "groups": groups[:g] + groups[g + 1 :]}
        group = groups[g]
        replaced: list[Any] = [{k: v for k, v in group.items() if k != key} for key in group if key != "params"]
        for i, spec in enumerate(group["params"]):
            if len(group["params"]) > 1:
                replaced.append({**group, "params": group["params"][:i] + group["params"][i + 1 :]})
            for j, simple in enumerate(([3], "float32", "contiguous", True)):
                if spec[j] != simple:
                    other = [*spec[:j], simple, *spec[j + 1 :]]
                    replaced.append({**group, "params": group["params"][:i] + [other] + group["params"][i + 1 :]})
        for other in replaced:
            yield {**setup, "groups": groups[:g] + [other] + groups[g + 1 :]}


_PLACES = ("seed", "leave", "index", "group", "position", "source", "target", "a", "b")  # which one, not how


def kind_of(setup: Setup, sequence: Sequence, what: str) -> tuple[Any, ...]:
    """What makes two failures one: the difference, the operations with what is not simplest, unusual dtypes."""
    names = []
    for name, arguments in sequence:
        special = [
            f"{key}={arguments[key]}"
            for key, choices in OPERATIONS[name].choices.items()
            if not callable(choices) and key not in _PLACES and arguments[key] != choices[0]
        ]
        if name == "set_entry":
            special.append(str(arguments["entry"][0]))
        names.append(f"{name}({', '.join(special)})")
    dtypes = sorted({spec[1] for group in setup["groups"] for spec in group["params"]} - {"float32"})
    return (what, tuple(dict.fromkeys(names)), tuple(dtypes), tuple(sorted(setup["extras"])))


def script(setup: Setup, sequence: Sequence) -> str:
    """What replays a sequence."""
    lines = ["from fuzz.optimizer_machine import replay", "replay(", f"    {setup!r},", "    ["]
    lines += [f"        ({name!r}, {arguments!r})," for name, arguments in sequence]
    return "\n".join([*lines, "    ],", ")"])


def replay(setup: Setup, sequence: Sequence, library: str = "dlkit") -> None:
    """Raises the difference, if there is one."""
    found, done = difference(setup, [(name, arguments) for name, arguments in sequence], library)
    if found is not None:
        raise AssertionError(f"operation {done} of {len(sequence)}: {found}")


class Report:
    """Failures, each kind once."""

    def __init__(self) -> None:
        self.kinds: dict[Any, list[Any]] = {}  # kind: [count, seed, mode, setup, sequence, text]
        self.rough: collections.Counter[Any] = collections.Counter()

    def add(self, seed: int, mode: str, setup: Setup, sequence: Sequence, found: Difference, library: str) -> Any:
        """The kind, if it is a new one. Of one difference in words, the first twelve are shrunk, the others counted."""
        self.rough[found.what] += 1
        if self.rough[found.what] > 12:
            return None
        setup, sequence = shrink(setup, sequence, found.what, library)
        kind = kind_of(setup, sequence, found.what)
        if kind in self.kinds:
            self.kinds[kind][0] += 1
            return None
        text = str(difference(setup, sequence, library)[0])
        self.kinds[kind] = [1, seed, mode, setup, sequence, text]
        return kind


def run(
    sequences: int | None,
    seed: int,
    mode: str,
    library: str = "dlkit",
    seconds: float | None = None,
    show: Any = print,
    without: Any = (),
) -> Report:
    report, start, done = Report(), time.perf_counter(), 0
    with Settings():
        while (sequences is None or done < sequences) and (seconds is None or time.perf_counter() - start < seconds):
            this = mode if mode != "all" else ("plain", "plain", "options", "plain", "options", "coded")[done % 6]
            setup, sequence = draw(seed + done, this, without)
            found, length = difference(setup, sequence, library)
            if found is not None:
                kind = report.add(seed + done, this, setup, sequence[:length], found, library)
                if kind is not None:
                    entry = report.kinds[kind]
                    show(f"\n# {len(report.kinds)}. {entry[5]}\n# mode {this}, seed {seed + done}")
                    show(script(entry[3], entry[4]))
                    sys.stdout.flush()
            done += 1
    taken = time.perf_counter() - start
    show(f"\n{done} sequences in {taken:.0f} s ({1e3 * taken / max(done, 1):.1f} ms each), {len(report.kinds)} kinds")
    for what, count in report.rough.most_common():
        show(f"  {count:6d}  {what}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=["plain", "options", "coded", "all"], default="all")
    parser.add_argument("--against", choices=["dlkit", "torch"], default="dlkit", help="torch: torch against itself")
    parser.add_argument("--without", default="", help="operations to leave out, with commas between them")
    parser.add_argument("--json", help="write what was found to this file, as fuzz/found.json has it")
    arguments = parser.parse_args()
    if arguments.sequences is None and arguments.seconds is None:
        arguments.sequences = 1000
    report = run(
        arguments.sequences,
        arguments.seed,
        arguments.mode,
        arguments.against,
        arguments.seconds,
        without=arguments.without.split(","),
    )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([{"what": e[5], "setup": e[3], "sequence": e[4]} for e in report.kinds.values()], file)
    raise SystemExit(1 if report.kinds else 0)


if __name__ == "__main__":
    main()
