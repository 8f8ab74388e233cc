"""What the optimizers share: a plan of the tensors that is kept between steps, and the step that runs it.

torch's constructor, param groups, state and hooks stay; only step() is dlkit's. A plan (torch.classes.dlkit.OptimPlan)
holds the tensors of all groups. It is made anew when groups or state no longer hold the very objects it was made from,
which one C function checks at about 5 ns an object; gradients are fetched at each step, in C++. So a step costs Python
nothing per parameter: 200 parameters take some 15 us of it, where torch's step takes 1 ms.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlkit.optim import _int8

_C = importlib.import_module("dlkit._C")

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
_DAMPENING = OPTIONS.index("dampening")
_STATES = 3
_READY, _STATE_MISSING, _NOT_DENSE = range(3)  # what OptimPlan.gather returns

# What dlkit adds to torch's arguments. The first four are the optimizer's, the others can differ between groups.
_CLIPPING = {"max_norm": None, "norm_type": 2.0, "error_if_nonfinite": False, "clip_gradients_in_place": False}
_GROUP_OPTIONS = {"master_weights": False, "stochastic_rounding": False, "state_dtype": None, "ema_decay": None}

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_FLOATING = (torch.float32, torch.float64, *_SIXTEEN_BITS)
_SERVED = (*_FLOATING, torch.complex64, torch.complex128)


def average_dtype(param: Tensor) -> torch.dtype:
    """What the running average of a parameter is kept in."""
    return torch.float32 if param.dtype in _SIXTEEN_BITS else param.dtype


def is_dtensor(tensor: Tensor) -> bool:
    """Without importing torch.distributed."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return not plain and hasattr(tensor, "_local_tensor") and hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """This process's part of a DTensor; any other tensor itself."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def host_rate(lr: Any) -> float:
    """A group's learning rate, or 0 where it is on a device: kernels read it there, and asking would wait for it."""
    return 0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step function without the wrapper that runs hooks, which ours has already."""
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


def scalar_dtype(fused: bool | None = None) -> torch.dtype:
    """torch's rule for step counters."""
    return torch.float64 if not fused and torch.get_default_dtype() == torch.float64 else torch.float32


class _Plan:
    """The tensors of a step, and what they were found in."""

    def __init__(self, unserved: str = "") -> None:
        self.unserved = unserved  # why only torch's own step will do
        self.runs = torch.classes.dlkit.OptimPlan()
        self.step, self.step_plainly = self.runs.step, self.runs.step_plainly
        self.params: list[Any] = []
        self.wrapped = False  # holds DTensors: their local parts are stepped
        self.fresh = False  # holds momentum buffers that no step has filled yet
        self.simple = False  # step() may gather gradients itself
        self.stochastic = False
        self.captures = False  # a graph of the device may be recording
        self.pending: list[tuple[Tensor, dict[str, Tensor]]] = []  # new state, which a step that raises must not leave
        self.contents: list[Any] = []
        self.structure: list[Any] = []

    def gradients(self) -> list[Tensor | None] | None:
        """For gather(): None where C++ can fetch them itself."""
        if not self.wrapped:
            return None
        found: list[Tensor | None] = []
        for param in self.params:
            grad = param.grad
            if grad is not None and is_dtensor(param):
                if is_dtensor(grad) and grad.placements != param.placements:
                    grad = grad.redistribute(placements=param.placements)
                grad = local(grad)
            found.append(grad)
        return found


class OnePass(Optimizer):
    """step() in one pass over memory; mixed into a subclass of torch's optimizer of the same name.

    Args, beyond torch's, by keyword:
        max_norm (float): before the update, gradients are scaled so that the 2-norm of all of them together is at most
            this, as :func:`torch.nn.utils.clip_grad_norm_` does; the norm before that is ``optimizer.grad_norm``, a
            tensor. Unlike there ``p.grad`` keeps its values, unless ``clip_gradients_in_place=True``.
        norm_type (float): 2.
        error_if_nonfinite (bool): raise RuntimeError, with nothing changed, where that norm is NaN or infinite.
        clip_gradients_in_place (bool): write the scaled gradients to ``p.grad``.
        master_weights (bool): bf16 and fp16 parameters are kept as fp32 ones in two halves, the parameter itself and
            16 bits in ``state["remainder"]``. Exact for bf16; for fp16 from 2^-17 to 65504 in magnitude, and within
            2^-41 below. States are fp32 then, unless ``state_dtype`` says otherwise.
        stochastic_rounding (bool): bf16 and fp16 parameters without master weights are rounded up or down at random,
            so that small updates count on average. Each step draws its seed from torch's default CPU generator.
        state_dtype (torch.dtype or "int8"): how moments are stored: torch.float32, torch.bfloat16, or "int8", a code
            of 8 bits an element and a scale every 256 (Dettmers et al. 2022). None: as torch does, in the parameter's.
        ema_decay (float): keeps ``ema = ema_decay * ema + (1 - ema_decay) * p`` of each parameter, in fp32 at least,
            from the parameter before its first step on; see :meth:`ema_parameters` and :meth:`swap_ema`.

    Under torch.amp.GradScaler the step unscales gradients itself, writes them back so, and leaves everything as it is
    where one of them is not finite. Where no kernel serves (``differentiable=True``, sparse gradients, other dtypes and
    devices, inside torch.compile) torch's own step runs; it refuses what is said above.
    """

    max_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    clip_gradients_in_place: bool
    grad_norm: Tensor | None  # of the last step with max_norm
    grad_scale: Tensor | None  # set by a GradScaler while it calls step()
    found_inf: Tensor | None
    _algorithm = ""

    def _accept(self, options: dict[str, Any]) -> None:
        """Takes dlkit's own arguments; called before torch's constructor."""
        name = type(self).__name__
        for key in options:
            if key not in _CLIPPING and key not in _GROUP_OPTIONS:
                raise TypeError(f"{name}.__init__() got an unexpected keyword argument {key!r}")
        for key, default in _CLIPPING.items():
            setattr(self, key, options.get(key, default))
        self.grad_norm = None
        self._plan: _Plan | None = None
        self._swapped: list[tuple[Tensor, Tensor]] | None = None
        self._group_options = {key: value for key, value in options.items() if key in _GROUP_OPTIONS}
        if self.max_norm is not None and not self.max_norm >= 0:
            raise ValueError(f"{name}(): expected max_norm of at least 0, got {self.max_norm}")
        if self.norm_type != 2:
            raise ValueError(f"{name}(): expected norm_type of 2, got {self.norm_type}")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return not any(group["differentiable"] for group in self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """torch sets it with fused=True."""

    # What each optimizer says of itself.

    def _row(self, group: dict[str, Any]) -> tuple[float, ...]:
        """A group's hyperparameters in the order of OPTIONS."""
        raise NotImplementedError

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """The states in the order of csrc/optim/kernel.h; None where this group has none."""
        raise NotImplementedError

    def _creation_order(self, group: dict[str, Any]) -> list[str]:
        """The states in the order in which torch's state dict has them."""
        return [name for name in self._state_names(group) if name is not None]

    _counts_steps = True
    _sparse_error = ""  # empty: torch serves sparse gradients

    # Groups and state.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.defaults.update(self._group_options)
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._plan = None

    def _check_group(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        dtype, decay = group.get("state_dtype"), group.get("ema_decay")
        if dtype not in (None, "int8", *_FLOATING):
            raise ValueError(
                f"{name}(): expected state_dtype of torch.float32, torch.bfloat16 or 'int8', got {dtype!r}"
            )
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"{name}(): expected ema_decay between 0 and 1, got {decay}")
        if group.get("master_weights") and group.get("stochastic_rounding"):
            raise ValueError(f"{name}(): expected master_weights or stochastic_rounding, got both")

    def __getstate__(self) -> dict[str, Any]:
        kept = (*_CLIPPING, "_group_options")
        return {**super().__getstate__(), **{key: self.__dict__[key] for key in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("grad_norm", None)
        self._plan = None
        self._swapped = None
        for group in self.param_groups:
            for key, value in self._group_options.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, except that states keep the dtypes of this optimizer, not always the parameter's."""
        given: dict[str, Any] = {}
        # Hooks may put another dictionary in its place: the last hook sees what is loaded.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: given.update(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        old = [index for group in given["param_groups"] for index in group["params"]]
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        for index, (group, param) in zip(old, params, strict=True):
            if index in given["state"] and param in self.state:
                self._restore_types(group, param, given["state"][index], self.state[param])

    def _restore_types(
        self, group: dict[str, Any], param: Tensor, given: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """torch has cast every state to the parameter's dtype; this gives `state` those of `given` that are to be."""
        names = self._creation_order(group)
        for key, value in given.items():
            if not isinstance(value, Tensor) or key == "step":
                continue
            if key in ("remainder", "ema"):
                state[key] = value.to(param.device)
            elif key in names:
                self._restore_state(key, group, param, given, state)

    def _restore_state(
        self, key: str, group: dict[str, Any], param: Tensor, given: dict[str, Any], state: dict[str, Any]
    ) -> None:
        signed, wanted = self._is_signed(key), self._state_type(group, param)
        value, scale = given[key].to(param.device), given.get(f"{key}_scale")
        if value.dtype == torch.uint8 and scale is not None:
            scale = scale.to(param.device)
            if wanted == torch.uint8:
                state[key], state[f"{key}_scale"] = value, scale
                return
            value = _int8.decode(value, scale, signed)
            del state[f"{key}_scale"]
        if wanted == torch.uint8:
            state[key], state[f"{key}_scale"] = _int8.encode(value, signed)
        else:
            state[key] = value.to(wanted)

    def _is_signed(self, key: str) -> bool:
        return not key.endswith(("_sq", "square_avg"))

    def _state_type(self, group: dict[str, Any], param: Tensor) -> torch.dtype:
        wanted = group.get("state_dtype")
        if wanted is None:
            masters = group.get("master_weights") and param.dtype in _SIXTEEN_BITS
            return torch.float32 if masters else param.dtype
        if wanted == param.dtype:
            return param.dtype
        if param.dtype not in (torch.float32, *_SIXTEEN_BITS) or wanted not in ("int8", torch.float32, torch.bfloat16):
            name = type(self).__name__
            raise ValueError(f"{name}.step(): expected a state_dtype that goes with {param.dtype}, got {wanted!r}")
        return torch.uint8 if wanted == "int8" else wanted

    def _arrays(self, group: dict[str, Any], param: Tensor, label: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(everything that a step of `param` needs by name, the part of it that is new)."""
        state: dict[str, Any] = self.state.get(param, {})
        new: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}

        def get(key: str, make: Callable[[], Tensor], needed: bool = False) -> None:
            value = state.get(key)
            if value is None:
                if needed and state:
                    raise KeyError(key)  # as torch does where a flag was set after the state was made
                value = new[key] = make()
            found[key] = value

        if self._counts_steps:
            on_device = group.get("capturable") or group.get("fused")
            dtype, device = scalar_dtype(group.get("fused")), param.device if on_device else "cpu"
            get("step", lambda: torch.zeros((), dtype=dtype, device=device), needed=True)
        wanted = self._state_type(group, param)
        if wanted == torch.uint8 and is_dtensor(param):
            # A checkpoint could not cut the scales as it cuts the states.
            raise ValueError(
                f"{type(self).__name__}.step(): expected no state_dtype='int8' for DTensors, and {label} is one"
            )
        for key in self._creation_order(group):
            needed = self._counts_steps
            if wanted == torch.uint8:
                zero = _int8.zero(self._is_signed(key))
                get(key, lambda zero=zero: torch.full_like(param, zero, dtype=torch.uint8), needed)  # type: ignore[misc]
                get(f"{key}_scale", lambda: _int8.scales(local(param)), needed)
            else:
                get(key, lambda: torch.zeros_like(param, dtype=wanted), needed)
            if found[key].shape != param.shape:
                raise RuntimeError(
                    f"{type(self).__name__}.step(): expected {key} of {label} to be {list(param.shape)} as the "
                    f"parameter is, got {list(found[key].shape)}"
                )
        if group.get("master_weights") and param.dtype in _SIXTEEN_BITS:
            get("remainder", lambda: torch.zeros_like(param, dtype=torch.int16))
        if group.get("ema_decay") is not None:
            get("ema", lambda: param.detach().to(average_dtype(param), copy=True))
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
        if group["differentiable"]:
            return "differentiable=True"
        if param.dtype not in _SERVED:
            return f"{label} is of {param.dtype}"
        if group.get("fused") and param.is_complex():
            return f"fused=True, and {label} is complex"
        if group.get("capturable") and param.device.type == "cpu":
            return "capturable=True on the CPU"
        if not torch._C._dispatch_has_kernel_for_dispatch_key("dlkit::optim_step_", param.device.type.upper()):
            return f"{label} is on {param.device}"
        plain = type(param) in (Tensor, torch.nn.Parameter)
        if not plain and not is_dtensor(param) and torch._C._dispatch_keys(param).has(torch._C.DispatchKey.Python):
            return f"{label} is a {type(param).__name__}"
        return ""

    def _make_plan(self) -> _Plan:
        plan = _Plan()
        plan.structure = self._structure()
        runs: dict[Any, list[list[Any]]] = {}
        stateless: list[Tensor] = []
        seen: set[int] = set()
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                label = f"parameter {i} of group {g}" + (f" ({names[i]!r})" if names else "")
                unserved = self._unserved(group, param, label)
                if id(param) in seen:
                    unserved = f"{label} is there twice"
                if unserved:
                    return _Plan(unserved)
                seen.add(id(param))
                if param.grad is None and not self.state.get(param):
                    stateless.append(param)
                    continue
                found, new = self._arrays(group, param, label)
                if new:
                    plan.pending.append((param, new))
                states = self._state_names(group)
                # torch's SGD takes a new buffer's first gradient as it is: no dampening, on a buffer of zeros.
                fresh = not self._counts_steps and states[0] in new
                plan.fresh = plan.fresh or fresh
                stored = [local(found[key]) if key in found else None for key in states]
                scaled = [found.get(f"{key}_scale") for key in states]
                rest = [local(found[key]) if key in found else None for key in ("remainder", "ema", "step")]
                row = [local(param), *stored, *scaled, *rest, g + fresh * len(self.param_groups), label]
                plan.wrapped = plan.wrapped or is_dtensor(param)
                plan.captures = plan.captures or (self._counts_steps and param.device.type != "cpu")
                key = (param.device, *(value is None for value in row))
                columns = runs.setdefault(key, [[] for _ in (*row, None)])
                for column, value in zip(columns, (*row, param), strict=True):
                    if value is not None:
                        column.append(value)
        for params, *columns, remainders, ema, steps, numbers, labels, whole in runs.values():
            arrays, scales = columns[:_STATES], columns[_STATES:]
            plan.runs.add(self._algorithm, params, arrays, scales, remainders, ema, steps, numbers, labels)
            plan.params += whole
        if stateless:
            plan.runs.watch(stateless)
        plan.stochastic = any(group.get("stochastic_rounding") for group in self.param_groups)
        return plan

    def _current_plan(self) -> _Plan | None:
        """The plan of the last step, if nothing has changed since."""
        plan = self._plan
        if plan is None or not _C.holds(plan.contents, *self._containers()) or plan.structure != self._structure():
            return None
        return plan

    def _ready_plan(self) -> _Plan:
        """A plan that has taken hold of the gradients, or one that says why torch's step is needed."""
        plan = self._current_plan() or self._make_plan()
        self._plan = None
        if plan.unserved:
            return plan
        status = plan.runs.gather(plan.gradients())
        if status == _STATE_MISSING:
            plan = self._make_plan()
            status = plan.runs.gather(plan.gradients())
        if status == _NOT_DENSE:
            if self._sparse_error:
                raise RuntimeError(self._sparse_error)
            return _Plan("a gradient is sparse")
        return plan

    def _keep(self, plan: _Plan) -> None:
        """Puts new state where it belongs; the next step finds this plan."""
        if plan.pending or not plan.contents:
            for param, new in plan.pending:
                self.state[param].update(new)
            plan.pending = []
            plan.contents = _C.contents(*self._containers())
            plan.simple = not plan.wrapped and not plan.fresh
        self._plan = plan

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step; returns what ``closure`` does, which reevaluates the model, or None without one."""
        if torch.compiler.is_compiling():
            return self._step_outside_graphs(closure) if self._extras() else self._torch_step("torch.compile", closure)
        if self.defaults["differentiable"]:
            return self._torch_step("differentiable=True", closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
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
        return loss

    @torch._disable_dynamo
    def _step_outside_graphs(self, closure: Callable[[], Any] | None) -> Any:
        return _unhooked(type(self).step)(self, closure)

    def _run(self, plan: _Plan, gather_first: bool) -> int:
        """What OptimPlan.step returns."""
        if self._swapped is not None:
            plan.runs.release(0)
            raise RuntimeError(f"{type(self).__name__}.step(): averaged weights are swapped in; call swap_ema() first")
        if plan.captures:
            check = "_accelerator_graph_capture_health_check"  # torch up to 2.10: _cuda_...
            (getattr(self, check, None) or self._cuda_graph_capture_health_check)()
        amp = self.__dict__
        grad_scale: Tensor | None = amp.get("grad_scale")
        found_inf: Tensor | None = amp.get("found_inf")
        groups = self.param_groups
        rows = [(*self._row(group), float(bool(group.get("stochastic_rounding"))), 0.0) for group in groups]
        rates = self._device_rates()
        if plan.fresh:
            rows += [(*row[:_DAMPENING], 0.0, *row[_DAMPENING + 1 :]) for row in rows]
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
        seed = None
        if plan.stochastic:
            seed = int(torch.empty((), dtype=torch.int64).random_())
        write = grad_scale is not None or (norm is not None and self.clip_gradients_in_place)
        options = [value for row in rows for value in row]
        if not gather_first:
            self._keep(plan)
        status: int
        if gather_first and seed is None and grad_scale is None and found_inf is None and not rates:
            status = plan.step_plainly(options)
        else:
            status = plan.step(
                gather_first, options, rates, norm, self.max_norm or 0.0, grad_scale, found_inf, write, seed
            )
        if plan.fresh and not self._is_skipped(found_inf):
            self._plan = None  # the next one finds full buffers
        return status

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
        if plan.wrapped:
            from dlkit.optim import _distributed

            norm = _distributed.norm(plan.params)
        else:
            norms: list[Tensor] = plan.runs.norms()
            if not norms:
                return torch.zeros(())
            norm = norms[0]
            if len(norms) > 1:
                norm = torch.linalg.vector_norm(torch.stack([n.to(norm.device, torch.float64) for n in norms])).to(
                    norm.dtype
                )
        return norm if grad_scale is None else norm / grad_scale.to(norm.device)

    def _extras(self) -> list[str]:
        """What was asked for that torch's optimizers do not have."""
        extras = [] if self.max_norm is None else ["max_norm"]
        for group in self.param_groups:
            extras += [name for name in _GROUP_OPTIONS if group.get(name)]
        return extras

    def _torch_step(self, reason: str, closure: Callable[[], Any] | None) -> Any:
        """torch's own step, for what dlkit does not serve."""
        extras = self._extras()
        if extras:
            raise RuntimeError(
                f"{type(self).__name__}.step(): {extras[0]} needs dlkit's kernels, which do not serve {reason}"
            )
        if not torch.compiler.is_compiling() and getattr(self, "found_inf", None) is not None:
            return self._torch_step_scaled(closure)
        return _unhooked(self._torch_class.step)(self, closure)

    def _torch_step_scaled(self, closure: Callable[[], Any] | None) -> Any:
        """Under a GradScaler, which leaves all of it to us."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), self.found_inf
        if self._is_skipped(found_inf):
            return None
        self.grad_scale = self.found_inf = None
        try:
            if grad_scale is not None:
                for group in self.param_groups:
                    for param in group["params"]:
                        if param.grad is not None:
                            param.grad.div_(grad_scale.to(param.grad.device))
            return _unhooked(self._torch_class.step)(self, closure)
        finally:
            self.grad_scale, self.found_inf = grad_scale, found_inf

    _torch_class: Any = Optimizer

    # The running average of the weights.

    def ema_parameters(self) -> Iterator[Tensor]:
        """The averaged weights, in the order of the parameters; a parameter that has had no step yet gives itself."""
        for group in self.param_groups:
            if group.get("ema_decay") is not None:
                for param in group["params"]:
                    yield self.state[param]["ema"] if "ema" in self.state.get(param, {}) else param.detach()

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Puts the averaged weights into the parameters; called again, puts the parameters' own back, bit for bit.

        No step can be taken in between.
        """
        if self._swapped is not None:
            for param, kept in self._swapped:
                param.copy_(kept)
            self._swapped = None
            return
        params = [p for group in self.param_groups if group.get("ema_decay") is not None for p in group["params"]]
        if not params:
            raise RuntimeError(f"{type(self).__name__}.swap_ema(): expected ema_decay to be set, got None")
        self._swapped = [(param, param.detach().clone()) for param in params]
        for param, average in zip(params, self.ema_parameters(), strict=True):
            param.copy_(average)
