"""OnePass: the arguments of the optimizers, and the step, which runs a plan of the tensors (_plan.py).

torch's constructor, param groups, state and hooks stay; only step() is dlkit's. OnePass is a line of classes, each of
which adds one thing in a file of its own: states, masters, checkpoints, averages, plans, and here the step.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlkit.optim._clip import check_finite
from dlkit.optim._options import (
    CLIPPING,
    DAMPENING,
    EMA_DECAY,
    GROUP_OPTIONS,
    LR,
    Options,
    check_group,
    is_stochastic,
    name_of_dtype,
)
from dlkit.optim._plan import READY, Plan, PlanningOptimizer
from dlkit.optim._state import Shared
from dlkit.optim._tensors import local

_LOST = "lost"  # in place of a process group, which can be neither pickled nor copied


class OnePass(PlanningOptimizer):
    """step() in one pass over memory; mixed into a subclass of torch's optimizer of the same name.

    The first five arguments belong to the optimizer as a whole, the others may differ between param groups.

    Keyword Args:
        max_norm (float): before the update, gradients are scaled so that the 2-norm of all of them together is at most
            this, as :func:`torch.nn.utils.clip_grad_norm_` does; the norm before that is ``optimizer.grad_norm``, a
            tensor. ``p.grad`` keeps its values, unless ``clip_gradients_in_place=True``. The gradients are read once
            more.
        norm_type (float): the order of that norm; only 2.
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
            not used.
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
            if key not in CLIPPING and key not in GROUP_OPTIONS:
                raise TypeError(f"{name}.__init__() got an unexpected keyword argument {key!r}")
        for key, default in CLIPPING.items():
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
        """Sets the attributes with which a new optimizer and a copy begin."""
        self.__dict__.setdefault("grad_norm", None)
        self.__dict__.setdefault("_shared", Shared())
        self._plan: Plan | None = None
        self._versions = torch.classes.dlkit.OptimVersions()
        self._embeddings = None

    # Each optimizer defines these.

    def _numbers(self, group: dict[str, Any], average: float) -> tuple[float, ...]:
        """A group's hyperparameters in the order of OPTIONS, but for the last two."""
        raise NotImplementedError

    def _still_states(self, group: dict[str, Any]) -> int:
        """Which states stand still in bf16 unless they are rounded stochastically: bit s for state s."""
        raise NotImplementedError

    def _row(self, group: dict[str, Any]) -> tuple[float, ...]:
        """A group's hyperparameters in the order of OPTIONS."""
        average = 0.0 if group.get("ema_decay") is None else self._decay(group)
        numbers = self._numbers(group, average)
        if not is_stochastic(group):
            return (*numbers, 0.0, 0.0)
        return (*numbers, float(bool(group.get("stochastic_rounding"))), float(self._still_states(group)))

    # Groups and state.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.defaults.update(self._group_options)
        if isinstance(param_group, dict):
            # ZeroRedundancyOptimizer copies the arguments of the whole optimizer into its groups.
            same = {key for key in CLIPPING if key in param_group and param_group[key] == getattr(self, key)}
            param_group = {key: value for key, value in param_group.items() if key not in same}
            for key in CLIPPING:
                if key in param_group:
                    raise ValueError(
                        f"{type(self).__name__}(): {key} is of the whole optimizer, since the norm is that of all "
                        f"gradients, and a param group has it; give it to {type(self).__name__}() itself"
                    )
            check_group(type(self).__name__, {**self.defaults, **param_group})
        super().add_param_group(param_group)
        self._normalise(self.param_groups[-1])
        self._plan = self._embeddings = None

    def _normalise(self, group: dict[str, Any]) -> None:
        if group.get("state_dtype") is not None:
            group["state_dtype"] = name_of_dtype(group["state_dtype"])
        if group.get("ema_decay") is not None:
            group.setdefault("ema_steps", 0)
        if is_stochastic(group):
            group.setdefault("rounding_steps", 0)

    def __getstate__(self) -> dict[str, Any]:
        self._finish_offloading()
        kept = {key: getattr(self, key) for key in (*CLIPPING, "_group_options")}
        kept["_swapped"] = self._shared.swapped
        if kept["process_group"] is not None:
            kept["process_group"] = _LOST
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        swapped = state.pop("_swapped", None) if "_swapped" in state else None
        super().__setstate__(state)
        for key, value in CLIPPING.items():
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

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step.

        Args:
            closure: reevaluates the model and returns the loss; optional.

        Returns:
            The result of ``closure``, or None without one.

        Raises:
            RuntimeError: an option cannot be served here; every parameter and state is as it was.
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
                if self._run(plan, True) == READY:
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

    def _run(self, plan: Plan, gather_first: bool) -> int:
        """Runs OptimPlan.step and returns its result."""
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
            options += [v for row in rows for v in (*row[:DAMPENING], 0.0, *row[DAMPENING + 1 :])]
            rates += rates
        norm = None
        if self.max_norm is not None:
            norm = self.grad_norm = self._norm(plan, grad_scale)
            if self.error_if_nonfinite and not self._is_skipped(found_inf):
                try:
                    check_finite(norm, self.norm_type)
                except RuntimeError:
                    plan.runs.release(0)
                    raise
        seed = self._next_seed() if plan.stochastic else None
        write = grad_scale is not None or (norm is not None and self.clip_gradients_in_place)
        if plan.averages:
            self._start_averages()
        status: int
        if gather_first and seed is None and grad_scale is None and found_inf is None and not rates:
            status = plan.step_default(options)
        else:
            status = plan.step(
                gather_first, options, rates, norm, self.max_norm or 0.0, grad_scale, found_inf, write, seed
            )
        if status == READY:
            if not gather_first:
                self._keep(plan)
            self._finish(plan, rows, found_inf)
        return status

    def _finish(self, plan: Plan, rows: list[tuple[float, ...]], found_inf: Tensor | None) -> None:
        """The work of a step after the kernels."""
        if plan.fresh and not self._is_skipped(found_inf):
            self._plan = None  # momentum buffers are filled now: the next step needs another plan
        if plan.copies:
            self._copy_written(plan)
        if plan.averages and not (found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf != 0)):
            idle = [plan.where[k] for k in plan.runs.idle()]
            idle += [where for where in plan.waiting if "ema" in self.state[self._param_at(where)]]
            if idle:
                decays = [rows[group][EMA_DECAY] for group, _ in idle]
                self._move_idle_averages([*map(self._param_at, idle)], decays, found_inf)
            self._count_averages([row[LR] for row in rows])

    def _next_seed(self) -> int:
        """The number of this step, the same in every process: replicas must round alike."""
        groups = [group for group in self.param_groups if is_stochastic(group)]
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
    def _norm(self, plan: Plan, grad_scale: Tensor | None) -> Tensor:
        norm = self._norm_of_scaled(plan)
        return norm if grad_scale is None else norm / grad_scale.to(norm.device)

    def _norm_of_scaled(self, plan: Plan) -> Tensor:
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

    # Masters whose parameter was written.

    @torch.no_grad()
    def _restart_written(self, plan: Plan) -> None:
        """Before a step: remainders of what was written since the last one start again at 0."""
        written = {plan.masters[k] for k in plan.runs.written()}
        if not written and not plan.copies:
            return
        for where in plan.masters:
            param = self._param_at(where)  # one without state gets a new state in this step
            if self._has_master(param) and self._restart_remainder(param, where in written):
                plan.copies, plan.contents = True, None  # the state has one more entry

    @torch.no_grad()
    def _copy_written(self, plan: Plan) -> None:
        """Copies parameters after a step, for the next step to compare with."""
        params = [param for param in map(self._param_at, plan.masters) if "param_copy" in self.state[param]]
        torch._foreach_copy_([local(self.state[param]["param_copy"]) for param in params], [*map(local, params)])

    # Steps that dlkit does not serve.

    def _extras(self) -> list[str]:
        """The options in use that torch's optimizers do not have."""
        extras = [] if self.max_norm is None else ["max_norm"]
        for group in self.param_groups:
            # A decay of 0 counts as set.
            extras += [name for name in GROUP_OPTIONS if group.get(name) is not None and group[name] is not False]
        return extras

    def _torch_step(self, reason: str, closure: Callable[[], Any] | None) -> Any:
        """torch's own step, where dlkit has no kernel."""
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
