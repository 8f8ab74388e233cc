"""What the optimizers share: a plan of the tensors that is kept between steps, and the step that runs it.

torch's constructor, param groups, state and hooks stay; only step() is dlkit's. A plan (torch.classes.dlkit.OptimPlan)
knows the tensors of all groups. It holds none of them alive: before each step one C function checks, at some 5 ns an
object, that groups and state still hold the same tensors. Gradients are fetched at each step, in C++. So a step costs
Python nothing per parameter: 200 parameters take some 15 us of it, where torch's step takes 1 ms.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlkit import _C
from dlkit.optim import _masters
from dlkit.optim._average import AveragingOptimizer
from dlkit.optim._state import GROUP_OPTIONS, Shared, name_of_dtype, names_of, other_form
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

# The columns of `options` in dlkit::optim_step_, one row a group.
OPTIONS = (
    "lr",
    "weight_decay",
    "eps",
    "beta1",
    "beta2",
    "momentum",
    "dampening",
    "alpha",
    "ema_decay",
    "decoupled_weight_decay",
    "nesterov",
    "maximize",
    "stochastic_rounding",
    "stochastic_states",
)
_LR, _DAMPENING, _EMA_DECAY = (OPTIONS.index(name) for name in ("lr", "dampening", "ema_decay"))
_STATES = 3
_READY, _STATE_MISSING, _NOT_DENSE = range(3)  # what OptimPlan.gather returns

# Arguments of the whole optimizer, beyond torch's; those of groups are GROUP_OPTIONS.
_CLIPPING = {
    "max_norm": None,
    "norm_type": 2.0,
    "error_if_nonfinite": False,
    "clip_gradients_in_place": False,
    "process_group": None,
}


class Options(TypedDict, total=False):
    """dlkit's own keyword arguments; OnePass says what each does."""

    max_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    clip_gradients_in_place: bool
    process_group: Any
    master_weights: bool
    stochastic_rounding: bool
    state_dtype: torch.dtype | str | None
    ema_decay: float | None
    ema_warmup: bool


_LOST = "lost"  # in place of a process group, which can be neither pickled nor copied

# A moving average that keeps more than this of itself stands still in bf16: what it loses in a step rounds away.
_STANDS_STILL = 1 - 2.0**-7


def host_rate(lr: Any) -> float:
    """A group's learning rate, or 0 where it is on a device: kernels read it there, and asking would wait for it."""
    return 0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def stands_still(decay: Any) -> bool:
    """Whether an average with this decay has to be rounded stochastically where it is kept in 16 bits."""
    return float(decay) > _STANDS_STILL


def scalar_dtype(fused: bool | None = None) -> torch.dtype:
    """torch's rule for step counters."""
    return torch.float64 if not fused and torch.get_default_dtype() == torch.float64 else torch.float32


class _Plan:
    """The tensors of a step, and what they were found in. `where` says of each the group and the place in it."""

    def __init__(self, versions: Any = None, unserved: str = "") -> None:
        self.unserved = unserved  # why only torch's own step will do
        if not unserved:
            self.runs = torch.classes.dlkit.OptimPlan(versions)
            self.step, self.step_plainly = self.runs.step, self.runs.step_plainly
        self.where: list[tuple[int, int]] = []
        self.masters: list[tuple[int, int]] = []  # of those that have a remainder
        self.waiting: list[
            tuple[int, int]
        ] = []  # parameters that have some state, and lack other until a gradient comes
        self.copies = False  # some masters have a copy of what the last step wrote
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


class OnePass(AveragingOptimizer):
    """step() in one pass over memory; mixed into a subclass of torch's optimizer of the same name.

    The first five arguments belong to the optimizer as a whole, the others may differ between param groups.

    Keyword Args:
        max_norm (float): before the update, gradients are scaled so that the 2-norm of all of them together is at most
            this, as :func:`torch.nn.utils.clip_grad_norm_` does; the norm before that is ``optimizer.grad_norm``, a
            tensor. Unlike there ``p.grad`` keeps its values, unless ``clip_gradients_in_place=True``. Costs one more
            reading of the gradients.
        norm_type (float): 2.
        error_if_nonfinite (bool): raise RuntimeError, with nothing changed, where that norm is NaN or infinite. Waits
            for the device.
        clip_gradients_in_place (bool): write the scaled gradients to ``p.grad``.
        process_group (ProcessGroup or DeviceMesh): with ``max_norm``, the norm is that of the gradients of all its
            processes: needed where each process has parameters of its own (FSDP1's flat parameters, pipeline stages).
            DTensors (FSDP2, tensor parallelism) and ZeroRedundancyOptimizer need none; for DDP it would be wrong.
        master_weights (bool): bf16 and fp16 parameters are kept as fp32 ones in two halves, the parameter itself and
            16 bits in ``state["remainder"]``. Exact for bf16 down to 2^-134; for fp16 from 2^-16 to 65504 in magnitude,
            and within 2^-40 below. States are fp32 then, unless ``state_dtype`` says otherwise. A parameter that is
            written between steps keeps what was written. Its remainders start again at 0, and from then on a copy of
            it in ``state["param_copy"]``, 2 bytes an element, tells which elements are written. A write through
            ``p.data`` goes unseen before there is such a copy; then zeros, infinities and NaN are exact, and others
            within half a unit of the last place of what was written.
        stochastic_rounding (bool): bf16 and fp16 parameters without master weights, and their states in 16 bits, are
            rounded up or down at random, so that small updates count on average. The seed is the number of the step, in
            the group's ``rounding_steps``: the same in every process, and after a checkpoint. torch's generators are
            left alone.
        state_dtype (torch.dtype or "int8"): how moments are stored: torch.float32, torch.bfloat16, or "int8", a code
            of 8 bits an element and a scale every 256 (Dettmers et al. 2022). None: as torch does, in the parameter's.
            In bf16 the averages that would stand still (second moments, and others with a decay above 0.992) are
            rounded stochastically, in the same way, which makes a step on a CPU slower than with fp32 moments. With
            "int8", tensors below 4,096 elements and the weights of nn.Embedding keep fp32.
        ema_decay (float): keeps ``ema = ema_decay * ema + (1 - ema_decay) * p`` of each parameter, in fp32 at least,
            from the parameter before its first step on, at every step, whether it has a gradient or not. See
            :meth:`ema`, :meth:`ema_state_dict`, :meth:`ema_parameters` and :meth:`reset_ema`.
        ema_warmup (bool): the decay of step n is at most n / (9 + n), so that the start is soon forgotten.

    Gradients may be fp32 for bf16 and fp16 parameters and the reverse. Under torch.amp.GradScaler the step behaves as
    torch's: with ``fused=True`` it unscales gradients itself, writes them back so, and leaves everything as it is where
    one of them is not finite; otherwise the scaler does. Where no kernel serves (``differentiable=True``, sparse
    gradients, other dtypes and devices) torch's own step runs; with one of the arguments above, step() raises. Inside
    torch.compile torch's own step runs too, and with one of them dlkit's kernels, outside the graph.
    """

    max_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    clip_gradients_in_place: bool
    process_group: Any
    grad_norm: Tensor | None  # of the last step with max_norm
    grad_scale: Tensor | None  # set by a GradScaler while it calls step()
    found_inf: Tensor | None

    def _accept(self, options: Options) -> None:
        """Takes dlkit's own arguments; called before torch's constructor."""
        name = type(self).__name__
        for key in options:
            if key not in _CLIPPING and key not in GROUP_OPTIONS:
                raise TypeError(f"{name}.__init__() got an unexpected keyword argument {key!r}")
        for key, default in _CLIPPING.items():
            setattr(self, key, options.get(key, default))
        self._reset()
        self._group_options: dict[str, Any] = {key: value for key, value in options.items() if key in GROUP_OPTIONS}
        if "state_dtype" in self._group_options:
            self._group_options["state_dtype"] = name_of_dtype(self._group_options["state_dtype"])
        if self.max_norm is not None and not self.max_norm >= 0:
            raise ValueError(f"{name}(): expected max_norm of at least 0, got {self.max_norm}")
        if self.norm_type != 2:
            raise ValueError(f"{name}(): expected norm_type of 2, got {self.norm_type}")
        if self.process_group is None and self.max_norm is not None:
            if "torch.distributed.optim.zero_redundancy_optimizer" in sys.modules:
                from dlkit.optim import _distributed

                self.process_group = _distributed.group_of_zero_optimizer()
        elif self.process_group is not None and self.max_norm is None:
            raise ValueError(f"{name}(): expected max_norm with process_group, got None")

    def _reset(self) -> None:
        """What a new optimizer and a copy begin with."""
        self.__dict__.setdefault("grad_norm", None)
        self.__dict__.setdefault("_shared", Shared())
        self._plan: _Plan | None = None
        self._versions = torch.classes.dlkit.OptimVersions()
        self._embeddings = None

    # What each optimizer says of itself.

    def _numbers(self, group: dict[str, Any], average: float) -> tuple[float, ...]:
        """A group's hyperparameters in the order of OPTIONS, but for the last two."""
        raise NotImplementedError

    def _still_states(self, group: dict[str, Any]) -> int:
        """Which states stand still in bf16 unless they are rounded stochastically: bit s for state s."""
        raise NotImplementedError

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """The states in the order of csrc/optim/kernel.h; None where this group has none."""
        raise NotImplementedError

    def _creation_order(self, group: dict[str, Any]) -> list[str]:
        return [name for name in self._state_names(group) if name is not None]

    _counts_steps = True
    _sparse_error = ""  # empty: torch serves sparse gradients

    def _row(self, group: dict[str, Any]) -> tuple[float, ...]:
        """A group's hyperparameters in the order of OPTIONS."""
        average = 0.0 if group.get("ema_decay") is None else self._decay(group)
        numbers = self._numbers(group, average)
        if not self._is_stochastic(group):
            return (*numbers, 0.0, 0.0)
        return (*numbers, float(bool(group.get("stochastic_rounding"))), float(self._still_states(group)))

    @staticmethod
    def _is_stochastic(group: dict[str, Any]) -> bool:
        """Whether something of this group is rounded stochastically."""
        return group.get("stochastic_rounding") or group.get("state_dtype") in ("bfloat16", torch.bfloat16)

    # Groups and state.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.defaults.update(self._group_options)
        if isinstance(param_group, dict):
            # ZeroRedundancyOptimizer copies the arguments of the whole optimizer into its groups.
            same = {key for key in _CLIPPING if key in param_group and param_group[key] == getattr(self, key)}
            param_group = {key: value for key, value in param_group.items() if key not in same}
            for key in _CLIPPING:
                if key in param_group:
                    raise ValueError(
                        f"{type(self).__name__}(): {key} is of the whole optimizer, since the norm is that of all "
                        f"gradients, and a param group has it; give it to {type(self).__name__}() itself"
                    )
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._normalise(self.param_groups[-1])
        self._plan = self._embeddings = None

    def _normalise(self, group: dict[str, Any]) -> None:
        if group.get("state_dtype") is not None:
            group["state_dtype"] = name_of_dtype(group["state_dtype"])
        if group.get("ema_decay") is not None:
            group.setdefault("ema_steps", 0)
        if self._is_stochastic(group):
            group.setdefault("rounding_steps", 0)

    def __getstate__(self) -> dict[str, Any]:
        self._finish_offloading()
        kept = {key: getattr(self, key) for key in (*_CLIPPING, "_group_options")}
        kept["_swapped"] = self._shared.swapped
        if kept["process_group"] is not None:
            kept["process_group"] = _LOST
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        swapped = state.pop("_swapped", None) if "_swapped" in state else None
        super().__setstate__(state)
        for key, value in _CLIPPING.items():
            self.__dict__.setdefault(key, value)
        self._reset()
        for group, kept in zip(self.param_groups, self._kept_options or [{}] * len(self.param_groups), strict=True):
            for key, value in {**self._group_options, **kept}.items():
                group.setdefault(key, value)
        if self._loading is not None:
            self._take_loaded()
        if swapped is not None:
            self._shared.swapped = swapped
        for group in self.param_groups:
            self._normalise(group)

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

    def _structure(self) -> list[Any]:
        """What a plan depends on besides the objects in groups and state."""
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

    def _unserved(self, group: dict[str, Any], param: Tensor, label: str) -> str:
        """Why dlkit cannot step this parameter; empty where it can."""
        if param.dtype not in SERVED:
            return f"{label} is of {param.dtype}"
        if group.get("fused") and param.is_complex():
            return f"fused=True, and {label} is complex"
        if group.get("capturable") and param.device.type == "cpu":
            return "capturable=True on the CPU"
        if not has_kernels(param.device, "optim_step_"):
            return f"{label} is on {param.device}"
        plain = type(param) in (Tensor, torch.nn.Parameter)
        if not plain and not is_dtensor(param) and torch._C._dispatch_keys(param).has(torch._C.DispatchKey.Python):
            return f"{label} is a {type(param).__name__}"
        return ""

    def _label(self, g: int, i: int) -> str:
        """What errors call a parameter."""
        names = self.param_groups[g].get("param_names")
        return f"parameter {i} of group {g}" + (f" ({names[i]!r})" if names else "")

    def _make_plan(self) -> _Plan:
        plan = _Plan(self._versions)
        plan.structure = self._structure()
        stateless: list[Tensor] = []
        stepped: list[tuple[int, int, Tensor]] = []
        seen: set[int] = set()
        for g, group in enumerate(self.param_groups):
            if group["differentiable"]:
                return _Plan(unserved="differentiable=True")
            self._check_group(group)
            for i, param in enumerate(group["params"]):
                if param.grad is None and not self.state.get(param):
                    stateless.append(param)  # whatever it is: frozen parameters of any kind do no harm
                    continue
                label = self._label(g, i)
                unserved = self._unserved(group, param, label)
                if id(param) in seen:
                    unserved = f"{label} is there twice"
                if unserved:
                    return _Plan(unserved=unserved)
                seen.add(id(param))
                stepped.append((g, i, param))
                if not group.get("master_weights") and param in self.state:
                    for half in ("remainder", "param_copy"):  # of masters that were switched off
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
        plan.stochastic = any(map(self._is_stochastic, self.param_groups))
        plan.averages = any(group.get("ema_decay") is not None for group in self.param_groups)
        return plan

    def _param_at(self, where: tuple[int, int]) -> Tensor:
        return self.param_groups[where[0]]["params"][where[1]]

    def _current_plan(self) -> _Plan | None:
        """The plan of the last step, if nothing has changed since."""
        plan = self._plan
        if plan is None or plan.contents is None or plan.structure != self._structure():
            return None
        return plan if _C.holds(plan.contents, *self._containers()) else None

    def _gradients(self, plan: _Plan) -> list[Tensor | None] | None:
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

    def _ready_plan(self) -> _Plan:
        """A plan that has taken hold of the gradients, or one that says why torch's step is needed."""
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
            return _Plan(unserved="a gradient is sparse")
        return plan

    def _keep(self, plan: _Plan) -> None:
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

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step.

        Args:
            closure: reevaluates the model and returns the loss; optional.

        Returns:
            What ``closure`` returns, or None without one.

        Raises:
            RuntimeError: something was asked for that cannot be done here; every parameter and state is as it was.
        """
        if self._shared.swapped is not None:
            self._refuse_if_swapped("step")
        if torch.compiler.is_compiling():
            return self._step_outside_graphs(closure) if self._extras() else self._bare_torch_step(closure)
        if self.defaults["differentiable"]:
            return self._torch_step("differentiable=True", closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            if self._shared.swapped is not None:
                self._refuse_if_swapped("step")
        try:
            plan = self._current_plan()
            if plan is not None and plan.simple and self.max_norm is None:
                if self._run(plan, True) == _READY:
                    return loss
                plan.runs.release(0)
            plan = self._ready_plan()
            if plan.unserved:
                self._torch_step(plan.unserved, None)
            else:
                self._run(plan, False)
        except BaseException:
            # A GradScaler takes its attributes away only after a step that returns.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise
        return loss

    @torch._disable_dynamo
    def _step_outside_graphs(self, closure: Callable[[], Any] | None) -> Any:
        return OnePass.step(self, closure)

    def _run(self, plan: _Plan, gather_first: bool) -> int:
        """What OptimPlan.step returns."""
        if plan.captures:
            check = "_accelerator_graph_capture_health_check"  # torch up to 2.10: _cuda_...
            (getattr(self, check, None) or self._cuda_graph_capture_health_check)()
        grad_scale, found_inf = self._scaling()
        if plan.masters:
            self._restart_written(plan)
        rows = [self._row(group) for group in self.param_groups]
        rates = self._device_rates()
        options = [value for row in rows for value in row]
        if plan.fresh:
            options += [v for row in rows for v in (*row[:_DAMPENING], 0.0, *row[_DAMPENING + 1 :])]
            rates += rates
        norm = None
        if self.max_norm is not None:
            norm = self.grad_norm = self._norm(plan, grad_scale)
            if self.error_if_nonfinite and not self._is_skipped(found_inf) and not math.isfinite(norm.item()):
                plan.runs.release(0)
                raise RuntimeError(
                    f"The total norm of order {self.norm_type} for gradients from `parameters` is non-finite, so it "
                    "cannot be clipped. To disable this error and scale the gradients by the non-finite norm anyway, "
                    "set `error_if_nonfinite=False`"
                )
        seed = self._next_seed() if plan.stochastic else None
        write = grad_scale is not None or (norm is not None and self.clip_gradients_in_place)
        if plan.averages:
            self._start_averages()
        status: int
        if gather_first and seed is None and grad_scale is None and found_inf is None and not rates:
            status = plan.step_plainly(options)
        else:
            status = plan.step(
                gather_first, options, rates, norm, self.max_norm or 0.0, grad_scale, found_inf, write, seed
            )
        if status == _READY:
            if not gather_first:
                self._keep(plan)
            self._finish(plan, rows, found_inf)
        return status

    def _finish(self, plan: _Plan, rows: list[tuple[float, ...]], found_inf: Tensor | None) -> None:
        """What a step leaves to do besides the kernels' work."""
        if plan.fresh and not self._is_skipped(found_inf):
            self._plan = None  # the next one finds full buffers
        if plan.copies:
            self._copy_written(plan)
        if plan.averages and not (found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf != 0)):
            idle = [plan.where[k] for k in plan.runs.idle()]
            idle += [where for where in plan.waiting if "ema" in self.state[self._param_at(where)]]
            if idle:
                decays = [rows[group][_EMA_DECAY] for group, _ in idle]
                self._move_idle_averages([*map(self._param_at, idle)], decays, found_inf)
            self._count_averages([row[_LR] for row in rows])

    def _next_seed(self) -> int:
        """The number of this step, the same in every process: replicas must round alike."""
        groups = [group for group in self.param_groups if self._is_stochastic(group)]
        seed = max(group.get("rounding_steps", 0) for group in groups) + 1
        for group in groups:
            group["rounding_steps"] = seed
        return seed

    def _scaling(self) -> tuple[Tensor | None, Tensor | None]:
        """(grad_scale, found_inf) that a GradScaler has set, as tensors. Without gradients it sets found_inf to 0."""
        if "found_inf" not in self.__dict__ and "grad_scale" not in self.__dict__:
            return None, None
        found = [self.__dict__.get(name) for name in ("grad_scale", "found_inf")]
        scale, found_inf = (
            value
            if value is None or isinstance(value, Tensor)
            else torch.full((), float(value), dtype=torch.float32, device="cpu")
            for value in found
        )
        return scale, found_inf

    def _is_skipped(self, found_inf: Tensor | None) -> bool:
        return found_inf is not None and bool(found_inf != 0)

    def _device_rates(self) -> list[Tensor]:
        """Learning rates that are on a device and stay there, one a group; none where all are numbers."""
        rates = [group["lr"] for group in self.param_groups]
        if set(map(type, rates)) == {float}:
            return []
        devices = [rate.device for rate in rates if isinstance(rate, Tensor) and rate.device.type != "cpu"]
        if not devices:
            return []
        return [
            rate.to(devices[0], torch.float32).reshape(())
            if isinstance(rate, Tensor)
            else torch.full((), rate, dtype=torch.float32, device=devices[0])  # a copy would stop a graph's recording
            for rate in rates
        ]

    @torch.no_grad()
    def _norm(self, plan: _Plan, grad_scale: Tensor | None) -> Tensor:
        norm = self._norm_of_scaled(plan)
        return norm if grad_scale is None else norm / grad_scale.to(norm.device)

    def _norm_of_scaled(self, plan: _Plan) -> Tensor:
        lost = isinstance(self.process_group, str)
        if lost or (plan.flat_shards and self.process_group is None):
            plan.runs.release(0)
            why = "a copy has none" if lost else "FSDP1 gives each process other ones"
            raise RuntimeError(
                f"{type(self).__name__}.step(): max_norm needs the process group of all gradients, since {why}; set "
                "optimizer.process_group, or give process_group= to the constructor"
            )
        if plan.wrapped or self.process_group is not None:
            from dlkit.optim import _distributed

            return _distributed.norm(map(self._param_at, plan.where), self.process_group)
        norms: list[Tensor] = plan.runs.norms()
        if len(norms) > 1:
            first = norms[0]
            return torch.linalg.vector_norm(torch.stack([n.to(first.device, torch.float64) for n in norms])).to(
                first.dtype
            )
        return norms[0] if norms else torch.zeros((), device="cpu")

    # Masters: half of each is the parameter, which the user may write to.

    def _restart_remainder(self, param: Tensor, written: bool) -> bool:
        """A remainder starts again at 0 where its parameter was written. True if the state got a copy to compare."""
        state = self.state[param]
        remainder, copy = _masters.bits(local(state["remainder"])), state.get("param_copy")
        if copy is not None:
            remainder.masked_fill_(_masters.bits(local(param.detach())) != _masters.bits(local(copy)), 0)
        elif written:  # what was written and what was not cannot be told apart yet
            remainder.zero_()
            state["param_copy"] = param.detach().clone()
            return True
        return False

    @torch.no_grad()
    def _restart_written(self, plan: _Plan) -> None:
        """Before a step: remainders of what was written since the last one start again at 0."""
        written = {plan.masters[k] for k in plan.runs.written()}
        if not written and not plan.copies:
            return
        for where in plan.masters:
            param = self._param_at(where)  # one that was taken out of the state begins anew in this step
            if self._has_master(param) and self._restart_remainder(param, where in written):
                plan.copies, plan.contents = True, None  # the state has an entry more

    @torch.no_grad()
    def _copy_written(self, plan: _Plan) -> None:
        """After a step, for the next one to compare with."""
        params = [param for param in map(self._param_at, plan.masters) if "param_copy" in self.state[param]]
        torch._foreach_copy_([local(self.state[param]["param_copy"]) for param in params], [*map(local, params)])

    def _trust_params(self, params: list[Tensor]) -> None:
        """What was written to them is what the last step left."""
        self._versions.trust([local(param) for param in params if self._has_master(param)])

    @torch.no_grad()
    def _restart_written_masters(self) -> None:
        """As _restart_written, without a plan."""
        params = [param for _, param in self._params() if self._has_master(param)]
        if not params:
            return
        for param, changed in zip(params, self._versions.changed([*map(local, params)]), strict=True):
            self._restart_remainder(param, changed)
            if "param_copy" in self.state[param]:
                self.state[param]["param_copy"].copy_(param)

    # What dlkit does not serve.

    def _extras(self) -> list[str]:
        """What was asked for that torch's optimizers do not have."""
        extras = [] if self.max_norm is None else ["max_norm"]
        for group in self.param_groups:
            # A decay of 0 is set, too.
            extras += [name for name in GROUP_OPTIONS if group.get(name) is not None and group[name] is not False]
        return extras

    def _torch_step(self, reason: str, closure: Callable[[], Any] | None) -> Any:
        """torch's own step, for what dlkit does not serve."""
        extras = self._extras()
        if extras:
            raise RuntimeError(
                f"{type(self).__name__}.step(): {extras[0]} needs dlkit's kernels, which do not serve {reason}"
            )
        if getattr(self, "found_inf", None) is not None:
            return self._torch_step_scaled(closure)
        return self._bare_torch_step(closure)

    def _torch_step_scaled(self, closure: Callable[[], Any] | None) -> Any:
        """Under a GradScaler that leaves the scaling to the step (fused=True)."""
        grad_scale, found_inf = self._scaling()
        if self._is_skipped(found_inf):
            return None
        self.grad_scale = self.found_inf = None
        try:
            if grad_scale is not None:
                for group in self.param_groups:
                    for param in group["params"]:
                        if param.grad is not None:
                            param.grad.div_(grad_scale.to(param.grad.device))
            return self._bare_torch_step(closure)
        finally:
            self.grad_scale, self.found_inf = grad_scale, found_inf

    _torch_class: Any = Optimizer
    _unwrapped_torch_step: Any = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "_torch_class" in cls.__dict__:
            cls._unwrapped_torch_step = staticmethod(inspect.unwrap(cls._torch_class.step))

    def _bare_torch_step(self, closure: Callable[[], Any] | None) -> Any:
        """torch's step without its wrappers: ours runs the hooks, and theirs break a compiled graph in two places."""
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return self._unwrapped_torch_step(self, closure)
