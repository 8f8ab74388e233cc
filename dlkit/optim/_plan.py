"""The plan: which tensors a step goes over, kept from one step to the next.

A plan (torch.classes.dlkit.OptimPlan) knows the tensors of all groups. It holds none of them alive: before each step
one C function checks, at some 5 ns an object, that groups and state still hold the same tensors. Gradients are fetched
at each step, in C++. A step therefore runs no Python per parameter: 200 parameters take some 15 us, where torch's
step takes 1 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlkit import _C
from dlkit.optim._average import AveragingOptimizer
from dlkit.optim._options import check_group, is_stochastic
from dlkit.optim._state import names_of, other_form
from dlkit.optim._tensors import (
    SERVED,
    SIXTEEN_BITS,
    average_dtype,
    has_kernels,
    is_dtensor,
    is_flat_shard,
    layers_without_overlap,
    local,
)

READY, _STATE_MISSING, _NOT_DENSE = range(3)  # what OptimPlan.gather returns
_STATES = 3


class Plan:
    """The tensors of a step, and the containers that hold them. `where` has the group and place of each."""

    def __init__(self, versions: Any = None, unserved: str = "") -> None:
        self.unserved = unserved  # why only torch's own step will do
        if not unserved:
            self.runs = torch.classes.dlkit.OptimPlan(versions)
            self.step, self.step_default = self.runs.step, self.runs.step_default
        self.where: list[tuple[int, int]] = []
        self.masters: list[tuple[int, int]] = []  # the places of parameters with a remainder
        self.waiting: list[tuple[int, int]] = []  # parameters that lack some of their states until a gradient comes
        self.copies = False  # some masters have a copy of the parameter after the last step
        self.averages = False
        self.stochastic = False
        self.wrapped = False  # there are DTensors: their local parts are stepped
        self.flat_shards = False  # there are flat parameters of FSDP1
        self.fresh = False  # there are momentum buffers that no step has filled yet
        self.simple = False  # step() may gather gradients itself
        self.captures = False  # a graph of the device may be recording
        self.pending: list[tuple[Tensor, dict[str, Tensor]]] = []  # new state, which a step that raises must not leave
        self.contents: Any = None
        self.structure: list[Any] = []


def scalar_dtype(fused: bool | None = None) -> torch.dtype:
    """torch's rule for step counters."""
    return torch.float64 if not fused and torch.get_default_dtype() == torch.float64 else torch.float32


class PlanningOptimizer(AveragingOptimizer):
    """The part of OnePass that makes plans."""

    _plan: Plan | None
    _sparse_error = ""  # empty: torch serves sparse gradients

    def _current_plan(self) -> Plan | None:
        """The plan of the last step, if nothing has changed since."""
        plan = self._plan
        if plan is None or plan.contents is None or plan.structure != self._structure():
            return None
        return plan if _C.holds(plan.contents, *self._containers()) else None

    def _ready_plan(self) -> Plan:
        """A plan that has gathered the gradients, or one with the reason why torch's step is needed."""
        plan = self._current_plan() or self._make_plan()
        self._plan = None
        if plan.unserved:
            return plan
        status = plan.runs.gather(self._gradients(plan))
        while status == _STATE_MISSING:
            plan = self._make_plan()
            if plan.unserved:
                return plan
            status = plan.runs.gather(self._gradients(plan))
        if status == _NOT_DENSE:
            if self._sparse_error:
                raise RuntimeError(self._sparse_error)
            return Plan(unserved="a gradient is sparse")
        return plan

    def _keep(self, plan: Plan) -> None:
        """Puts new state where it belongs; the next step finds this plan."""
        if plan.pending or plan.contents is None:
            for param, new in plan.pending:
                state = self.state[param]
                for key in [key for key in state if any(name in new for name in other_form(key))]:
                    del state[key]
                state.update(new)
            plan.pending = []
            plan.contents = _C.contents(*self._containers())
            plan.simple = not plan.wrapped and not plan.fresh and not plan.stochastic  # a seed is drawn once
        self._plan = plan

    # Changes that outdate a plan.

    def _structure(self) -> list[Any]:
        """The values on which a plan depends, besides the objects in groups and state."""
        return [
            (
                self._state_names(group),
                group.get("fused"),
                group.get("capturable"),
                group.get("master_weights"),
                group.get("stochastic_rounding"),
                group.get("state_dtype"),
                group.get("ema_decay") is None,
            )
            for group in self.param_groups
        ]

    def _containers(self) -> list[Any]:
        return [self.state, *(group["params"] for group in self.param_groups)]

    # Making one.

    def _make_plan(self) -> Plan:
        plan = Plan(self._versions)
        plan.structure = self._structure()
        stateless: list[Tensor] = []
        stepped: list[tuple[int, int, Tensor]] = []
        seen: set[int] = set()
        for g, group in enumerate(self.param_groups):
            if group["differentiable"]:
                return Plan(unserved="differentiable=True")
            check_group(type(self).__name__, group)
            for i, param in enumerate(group["params"]):
                if param.grad is None and not self.state.get(param):
                    stateless.append(param)  # not checked: frozen parameters of any kind do no harm
                    continue
                label = self._label(g, i)
                unserved = self._unserved(group, param, label)
                if id(param) in seen:
                    unserved = f"{label} is there twice"
                if unserved:
                    return Plan(unserved=unserved)
                seen.add(id(param))
                stepped.append((g, i, param))
                if not group.get("master_weights") and param in self.state:
                    for half in ("remainder", "param_copy"):  # left from master_weights=True, now off
                        self.state[param].pop(half, None)

        runs: dict[Any, list[list[Any]]] = {}
        layers = layers_without_overlap([local(param) for _, _, param in stepped])
        for layer, (g, i, param) in zip(layers, stepped, strict=True):
            group, label = self.param_groups[g], self._label(g, i)
            found, new = self._arrays(group, param, label)
            if new and param.grad is None:  # a state begins with the first gradient
                stateless.append(param)
                plan.waiting.append((g, i))
                continue
            if new:
                plan.pending.append((param, new))
            names = self._state_names(group)
            # torch's SGD takes a new buffer's first gradient as it is: no dampening, on a buffer of zeros.
            before = self.state.get(param, {})
            fresh = not self._counts_steps and names[0] is not None
            fresh = fresh and not any(isinstance(before.get(key), Tensor) for key in names_of(str(names[0])))
            plan.fresh = plan.fresh or fresh
            stored = [found.get(f"{key}_codes", found.get(str(key))) for key in names]
            scaled = [found.get(f"{key}_scale") for key in names]
            rest = [found.get(key) for key in ("remainder", "ema", "step")]
            arrays = [None if value is None else local(value) for value in (*stored, *scaled, *rest)]
            row = [local(param), *arrays, g + fresh * len(self.param_groups), label, (g, i)]
            plan.wrapped = plan.wrapped or is_dtensor(param)
            plan.flat_shards = plan.flat_shards or is_flat_shard(param)
            plan.captures = plan.captures or (self._counts_steps and param.device.type != "cpu")
            plan.copies = plan.copies or ("remainder" in found and "param_copy" in self.state.get(param, {}))
            key = (layer, param.device, *(value is None for value in row))
            columns = runs.setdefault(key, [[] for _ in row])
            for column, value in zip(columns, row, strict=True):
                if value is not None:
                    column.append(value)
        for _, (params, *columns, remainders, ema, steps, numbers, labels, where) in sorted(
            runs.items(), key=lambda run: run[0][0]
        ):
            states, scales = columns[:_STATES], columns[_STATES:]
            plan.runs.add(self._algorithm, params, states, scales, remainders, ema, steps, numbers, labels)
            plan.where += where
            if remainders:
                plan.masters += where
        if stateless:
            plan.runs.watch(stateless)
        plan.stochastic = any(map(is_stochastic, self.param_groups))
        plan.averages = any(group.get("ema_decay") is not None for group in self.param_groups)
        return plan

    def _unserved(self, group: dict[str, Any], param: Tensor, label: str) -> str:
        """The reason why dlkit cannot step this parameter; empty if it can."""
        if param.dtype not in SERVED:
            return f"{label} is of {param.dtype}"
        if group.get("fused") and param.is_complex():
            return f"fused=True, and {label} is complex"
        if group.get("capturable") and param.device.type == "cpu":
            return "capturable=True on the CPU"
        if not has_kernels(param.device, "optim_step_kernel_"):
            return f"{label} is on {param.device}"
        plain = type(param) in (Tensor, torch.nn.Parameter)
        if not plain and not is_dtensor(param) and torch._C._dispatch_keys(param).has(torch._C.DispatchKey.Python):
            return f"{label} is a {type(param).__name__}"
        return ""

    def _arrays(self, group: dict[str, Any], param: Tensor, label: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(everything that a step of `param` needs by name, the part of it that is new)."""
        kept: dict[str, Any] = self.state.get(param, {})
        state = self._in_form(group, param, kept) if kept else kept
        wanted = self._state_type(group, param)
        needed = ["step"] if self._counts_steps else []
        for key in self._creation_order(group):
            needed += [f"{key}_codes", f"{key}_scale"] if wanted == torch.uint8 else [key]
        extras = ["remainder"] if group.get("master_weights") and param.dtype in SIXTEEN_BITS else []
        extras += ["ema"] if group.get("ema_decay") is not None else []
        new: dict[str, Tensor] = {key: value for key, value in state.items() if kept.get(key) is not value}
        for key in (*needed, *extras):
            if state.get(key) is not None or key in new:
                continue
            if key in needed and self._counts_steps and state and param.grad is not None:
                raise KeyError(key)  # as torch does where a flag was set after the state was made
            if key == "step":
                on_device = group.get("capturable") or group.get("fused")
                dtype, device = scalar_dtype(group.get("fused")), param.device if on_device else "cpu"
                new[key] = torch.zeros((), dtype=dtype, device=device)
            elif key == "remainder":
                new[key] = torch.zeros_like(param)
            elif key == "ema":
                new[key] = self._exact(param).to(average_dtype(param))
            else:
                new.update(self._new_state(key.removesuffix("_codes"), wanted, param))
        found: dict[str, Any] = {key: new.get(key, state.get(key)) for key in (*needed, *extras)}
        for key, value in found.items():
            if key == "step":
                continue
            if not key.endswith("_scale") and value.shape != param.shape:
                raise RuntimeError(
                    f"{type(self).__name__}.step(): expected {key} of {label} to be {list(param.shape)} as the "
                    f"parameter is, got {list(value.shape)}"
                )
            if local(value).device != local(param).device:
                raise RuntimeError(
                    f"{type(self).__name__}.step(): expected {key} of {label} on {local(param).device} as the "
                    f"parameter is, got {local(value).device}; after offload_states() call onload_states()"
                )
        return found, new

    def _label(self, g: int, i: int) -> str:
        """The name of a parameter in error messages."""
        names = self.param_groups[g].get("param_names")
        return f"parameter {i} of group {g}" + (f" ({names[i]!r})" if names else "")

    def _param_at(self, where: tuple[int, int]) -> Tensor:
        return self.param_groups[where[0]]["params"][where[1]]

    def _gradients(self, plan: Plan) -> list[Tensor | None] | None:
        """For gather(): None where C++ can fetch them itself."""
        if not plan.wrapped:
            return None
        found: list[Tensor | None] = []
        for param in map(self._param_at, plan.where):
            grad: Any = param.grad
            if grad is not None and is_dtensor(param):
                if is_dtensor(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
                    grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
                grad = local(grad)
            found.append(grad)
        return found
