"""The forms in which states are kept, saved and loaded.

In memory a state `exp_avg` is one of two forms: a floating tensor under torch's own name, or `exp_avg_codes` and
`exp_avg_scale`, 8 bits an element. So torch's optimizer either finds the numbers that it expects or no such state.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlkit.optim import _int8, _masters
from dlkit.optim._tensors import FLOATING, SIXTEEN_BITS, average_dtype, is_dtensor, is_flat_shard, like, local

# What dlkit adds to torch's param groups.
GROUP_OPTIONS = {
    "master_weights": False,
    "stochastic_rounding": False,
    "state_dtype": None,
    "ema_decay": None,
    "ema_warmup": False,
}
STATE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "float16": torch.float16,
}
LEAST_CODED = 4096  # elements: smaller tensors gain nothing from 8 bits, and are often scales and biases


def name_of_dtype(dtype: Any) -> Any:
    """`state_dtype` as it stands in groups: a string, which every tool for checkpoints can store."""
    if isinstance(dtype, str):
        return dtype.removeprefix("torch.")
    return str(dtype).removeprefix("torch.") if dtype in FLOATING else dtype


def embedding_weights() -> set[int]:
    """The ids of the weights of all embeddings that are alive. Looking through them takes some 50 ms."""
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    found = [item for item in gc.get_objects() if issubclass(type(item), kinds)]
    return {id(module._parameters.get("weight")) for module in found if "_parameters" in module.__dict__}


def names_of(key: str) -> tuple[str, str, str]:
    """The entries that a state may have."""
    return key, f"{key}_codes", f"{key}_scale"


def other_form(name: str) -> tuple[str, ...]:
    """The entries that replace this one when its state changes between a floating tensor and codes."""
    base = name.removesuffix("_codes").removesuffix("_scale")
    return (f"{base}_codes",) if name == base else (base,)


class Shared:
    """What an optimizer and a wrapper around it both have to see, in one object that is changed in place.

    Lightning's and Fabric's wrappers are subclasses that forward only the attributes that they do not find.
    """

    def __init__(self) -> None:
        self.swapped: list[tuple[Tensor, Tensor, bool]] | None = None  # (parameter, its own weights, holds its average)
        self.offloading: Any = None  # an event after which offloaded states have arrived


class StatefulOptimizer(Optimizer):
    """What the optimizers do with their states besides a step; see OnePass for the arguments."""

    _loading: dict[str, Any] | None = None  # what load_state_dict() was given, while it runs
    _kept_options: list[dict[str, Any]] | None = None  # those of the groups before, which torch's state dicts lack
    _embeddings: set[int] | None = None
    _shared: Shared
    _algorithm = ""
    _all_states: tuple[str, ...] = ()  # every state that the optimizer can have, whatever its flags are

    def _creation_order(self, group: dict[str, Any]) -> list[str]:
        """The states in the order in which torch's state dict has them."""
        raise NotImplementedError

    def _params(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for param in group["params"]:
                yield group, param

    # Forms.

    def _state_type(self, group: dict[str, Any], param: Tensor) -> torch.dtype:
        """The dtype of a parameter's states; torch.uint8 stands for codes and scales."""
        wanted = name_of_dtype(group.get("state_dtype"))
        if wanted is None:
            masters = group.get("master_weights") and param.dtype in SIXTEEN_BITS
            return torch.float32 if masters else param.dtype
        if STATE_DTYPES.get(wanted) == param.dtype:
            return param.dtype
        if param.dtype not in (torch.float32, *SIXTEEN_BITS) or wanted not in ("int8", "float32", "bfloat16"):
            name = type(self).__name__
            raise ValueError(f"{name}.step(): expected a state_dtype that goes with {param.dtype}, got {wanted!r}")
        if wanted != "int8":
            return STATE_DTYPES[wanted]
        if param.numel() < LEAST_CODED or self._is_embedding(param):
            return torch.float32
        if is_flat_shard(param):
            # FSDP1 cuts a state as it cuts the parameter, and would cut the scales so.
            raise ValueError(
                f"{type(self).__name__}.step(): expected no state_dtype='int8' with the flat parameters of FSDP1; use "
                "fully_shard (FSDP2) or another state_dtype"
            )
        return torch.uint8

    def _is_embedding(self, param: Tensor) -> bool:
        if self._embeddings is None:
            self._embeddings = embedding_weights()
        return id(param) in self._embeddings

    def _is_signed(self, key: str) -> bool:
        return not key.endswith(("_sq", "square_avg"))

    def _new_state(self, key: str, wanted: torch.dtype, param: Any) -> dict[str, Tensor]:
        """The entries of a state that is 0 throughout."""
        if wanted != torch.uint8:
            return {key: torch.zeros_like(param, dtype=wanted)}
        zero, part = _int8.zero(self._is_signed(key)), local(param)
        codes = torch.full_like(part, zero, dtype=torch.uint8, memory_format=torch.contiguous_format)
        return {f"{key}_codes": like(param, codes), f"{key}_scale": _int8.scales(part)}

    def _read_state(self, key: str, entries: dict[str, Any], param: Any) -> Any:
        """A state's numbers as a floating tensor, from either form, or None where there is no such state."""
        device = local(param).device
        codes, scale = entries.get(f"{key}_codes"), entries.get(f"{key}_scale")
        if isinstance(codes, Tensor) and isinstance(scale, Tensor):
            values = _int8.decode(local(codes).to(device), local(scale).to(device), self._is_signed(key))
            return like(param, values)
        value = entries.get(key)
        if not isinstance(value, Tensor):
            return None
        if value.dtype == torch.uint8 and isinstance(scale, Tensor):
            # Version 0.1 kept codes under torch's own name, and blocks in the order of memory.
            return _int8.decode_memory_order(value.to(device), scale.to(device), self._is_signed(key))
        return value

    def _write_state(self, key: str, wanted: torch.dtype, values: Any, param: Any) -> dict[str, Tensor]:
        """The entries that keep these numbers."""
        device = local(param).device
        if wanted != torch.uint8:
            if wanted.is_complex and not values.is_complex():
                wanted = values.dtype  # as torch leaves it; a step says what is wrong
            return {key: values.to(dtype=wanted) if is_dtensor(values) else values.to(device, wanted)}
        if is_dtensor(param) and not is_dtensor(values):
            raise ValueError(f"{type(self).__name__}: expected {key} of a DTensor to be one, got a Tensor")
        codes, scale = _int8.encode_decoded(local(values).to(device), self._is_signed(key))
        return {f"{key}_codes": like(param, codes), f"{key}_scale": scale}

    def _is_in_form(self, key: str, wanted: torch.dtype, state: dict[str, Any]) -> bool:
        value = state.get(f"{key}_codes" if wanted == torch.uint8 else key)
        return isinstance(value, Tensor) and (value.dtype == torch.uint8) == (wanted == torch.uint8)

    def _in_form(self, group: dict[str, Any], param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """The state as its group and parameter want it now: after a change of state_dtype, or a cast of the parameter.

        `state` itself where it is so already, else a copy, since a step may still raise.
        """
        formed = state
        for key in self._creation_order(group):
            values, wanted = None, self._state_type(group, param)
            if not self._is_in_form(key, wanted, state):
                values = self._read_state(key, state, param)
            elif wanted != torch.uint8 and state[key].dtype != wanted:
                if group.get("state_dtype") is None and param.dtype in SIXTEEN_BITS:
                    wanted = torch.float32  # what was wider before a cast would lose by 16 bits, or overflow
                if state[key].dtype != wanted and not state[key].is_complex():
                    values = state[key]
            if values is not None:
                kept = {name: value for name, value in formed.items() if name not in names_of(key)}
                formed = {**kept, **self._write_state(key, wanted, values, param)}
        counter = state.get("step")
        if counter is not None and not (
            isinstance(counter, Tensor) and counter.dtype in (torch.float32, torch.float64)
        ):
            device = counter.device if isinstance(counter, Tensor) else torch.device("cpu")
            formed = {**formed, "step": torch.as_tensor(counter, dtype=torch.float32, device=device)}
        if "ema" in state and param.is_floating_point() and state["ema"].dtype != average_dtype(param):
            formed = {**formed, "ema": state["ema"].to(average_dtype(param))}
        return formed

    # Saving and loading.

    def state_dict(self, *, consolidate: bool = False) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`.

        8-bit states have names of their own (``exp_avg_codes``, ``exp_avg_scale``), except those of DTensors, which are
        given as fp32 DTensors, so that a checkpoint can be cut anew.

        Args:
            consolidate: everything in fp32 under torch's names, so that a run can go on without dlkit: states in full,
                masters as ``master_param`` (also :meth:`master_parameters`), none of dlkit's options in groups. Such a
                state dict can be loaded by dlkit, too.

        Raises:
            RuntimeError: averaged weights are swapped in.
        """
        self._refuse_if_swapped("state_dict")
        self._restart_written_masters()

        def convert(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            return self._converted(saved, consolidate)

        handle = self.register_state_dict_post_hook(convert, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def _converted(self, saved: dict[str, Any], consolidate: bool) -> dict[str, Any]:
        numbers = [index for group in saved["param_groups"] for index in group["params"]]
        for index, (group, param) in zip(numbers, self._params(), strict=True):
            state = saved["state"].get(index)
            if state is None:
                continue
            coded = [key for key in self._creation_order(group) if f"{key}_codes" in state]
            if not consolidate and not (coded and is_dtensor(param)) and not (coded and self._algorithm == "sgd"):
                continue
            saved["state"][index] = state = dict(state)
            for key in self._creation_order(group):
                if key in coded and not consolidate and not is_dtensor(param):
                    # torch's SGD takes a missing buffer for a first step. An empty one makes it raise.
                    state[key] = torch.empty(0, dtype=torch.uint8, device=param.device)
                    continue
                values = self._read_state(key, state, param)
                if values is not None and (key in coded or consolidate):
                    state[key] = values.float() if values.dtype in SIXTEEN_BITS else values
                for name in names_of(key)[1:]:
                    state.pop(name, None)
            if consolidate:
                if self._has_master(param):
                    state["master_param"] = self._exact(param)
                for key in ("remainder", "param_copy"):
                    state.pop(key, None)
        if consolidate:
            saved["param_groups"] = [
                {key: value for key, value in group.items() if key not in GROUP_OPTIONS}
                for group in saved["param_groups"]
            ]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.load_state_dict`: of this class, of torch's, consolidated or of version 0.1.

        States are brought into the form that the groups ask for. Where the dict has a ``master_param`` and the group
        ``master_weights``, the parameter is set to it, rounded.

        Raises:
            RuntimeError: averaged weights are swapped in.
        """
        self._refuse_if_swapped("load_state_dict")
        given: dict[str, Any] = {}
        # Hooks may put another dictionary in its place. This hook is the last one, and sees what is loaded.
        handle = self.register_load_state_dict_pre_hook(lambda _, loaded: given.update(loaded))
        self._loading = given
        self._kept_options = [{key: group[key] for key in GROUP_OPTIONS if key in group} for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)
        finally:
            self._loading = self._kept_options = None
            handle.remove()

    def _take_loaded(self) -> None:
        """torch has cast every state to the parameter's dtype. This gives them the forms that they are to have."""
        assert self._loading is not None
        given = self._loading
        numbers = [index for group in given["param_groups"] for index in group["params"]]
        for index, (group, param) in zip(numbers, self._params(), strict=True):
            if index in given["state"] and param in self.state:
                self._take_loaded_state(group, param, given["state"][index], self.state[param])
        for group, before in zip(self.param_groups, given["param_groups"], strict=True):
            if group.get("ema_decay") is not None and "ema_steps" not in before:
                group["ema_steps"] = int(any("ema" in self.state.get(param, {}) for param in group["params"]))

    def _take_loaded_state(
        self, group: dict[str, Any], param: Tensor, given: dict[str, Any], state: dict[str, Any]
    ) -> None:
        """`state` gets the entries of `given` in their order, each in the form that it is to have."""
        wanted, device = self._state_type(group, param), local(param).device
        masters = bool(group.get("master_weights")) and param.dtype in SIXTEEN_BITS
        taken: dict[str, Any] = {}
        for name, value in given.items():
            key = name.removesuffix("_codes").removesuffix("_scale")
            if key in self._all_states:
                if key not in taken and f"{key}_codes" not in taken:
                    formed = self._loaded_form(key, wanted, given, param)
                    taken.update({name: state[name]} if formed is None else formed)
            elif name in ("remainder", "param_copy"):
                if masters and "master_param" not in given:
                    moved = value if is_dtensor(value) else value.to(device)
                    taken[name] = moved.view(param.dtype) if moved.dtype == torch.int16 else moved
            elif name == "master_param":
                if masters:
                    high, rest = _masters.split(local(value).to(device, torch.float32), param.dtype)
                    with torch.no_grad():
                        local(param).copy_(high)
                    taken["remainder"] = like(param, rest)
            elif name == "ema":
                taken[name] = value if is_dtensor(value) else value.to(device)
            else:
                taken[name] = state[name]
        state.clear()
        state.update(taken)

    def _loaded_form(
        self, key: str, wanted: torch.dtype, given: dict[str, Any], param: Tensor
    ) -> dict[str, Any] | None:
        """The entries of a state, also of one that its group does not use at present; None where it is no tensor."""
        codes, scale = given.get(f"{key}_codes"), given.get(f"{key}_scale")
        if wanted == torch.uint8 and isinstance(codes, Tensor) and isinstance(scale, Tensor):
            device = local(param).device
            return {
                f"{key}_codes": like(param, local(codes).to(device)),
                f"{key}_scale": local(scale).to(device),
            }
        numbers = self._read_state(key, given, param)
        return None if numbers is None else self._write_state(key, wanted, numbers, param)

    def master_parameters(self) -> Iterator[Tensor]:
        """The parameters at full precision, in the order of the groups: fp32 masters where there are any.

        Yields:
            Copies of the parameters' shapes: fp32 for 16-bit parameters, else in the parameter's dtype.

        Raises:
            RuntimeError: averaged weights are swapped in.
        """
        self._refuse_if_swapped("master_parameters")
        self._restart_written_masters()
        return (self._exact(param) for _, param in self._params())

    def _restart_written_masters(self) -> None:
        raise NotImplementedError

    def _exact(self, param: Tensor) -> Tensor:
        if self._has_master(param):
            return like(param, _masters.join(local(param), local(self.state[param]["remainder"])))
        whole = param.detach()
        return whole.float() if param.dtype in SIXTEEN_BITS else whole.clone()

    def _has_master(self, param: Tensor) -> bool:
        """A parameter that was cast to fp32 in the meantime has none, whatever its state still holds."""
        return param.dtype in SIXTEEN_BITS and param in self.state and "remainder" in self.state[param]

    # Between two devices.

    @torch.no_grad()
    def offload_states(self) -> None:
        """Moves all states to the CPU's memory, so that the device has room for something else between two steps.

        From CUDA the copies go to pinned memory and are not waited for. Nothing happens to what is on the CPU already.
        A step raises until :meth:`onload_states` has been called.
        """
        self._move_states(lambda param: torch.device("cpu"))

    @torch.no_grad()
    def onload_states(self) -> None:
        """Moves all states to the devices of their parameters, without waiting for the copies."""
        self._move_states(lambda param: local(param).device)

    def _move_states(self, target: Any) -> None:
        on_device = {id(param): group.get("capturable") or group.get("fused") for group, param in self._params()}
        moved = False
        for param, state in self.state.items():
            if not isinstance(param, Tensor):
                continue
            for key, value in state.items():
                if not isinstance(value, Tensor) or (key == "step" and not on_device.get(id(param))):
                    continue
                part, device = local(value), target(param)
                if part.device == device:
                    continue
                if device.type == "cpu" and part.is_cuda:
                    copy = torch.empty_like(part, device=device, pin_memory=True)
                    copy.copy_(part, non_blocking=True)
                else:
                    copy = part.to(device, non_blocking=part.is_pinned())
                moved = moved or part.is_cuda
                if is_dtensor(value):
                    value._local_tensor = copy  # type: ignore[attr-defined]
                else:
                    state[key] = copy
        if moved:
            self._shared.offloading = torch.cuda.Event()
            self._shared.offloading.record()

    def _finish_offloading(self) -> None:
        """Before the CPU reads states that are still on their way."""
        if self._shared.offloading is not None:
            self._shared.offloading.synchronize()
            self._shared.offloading = None

    def _refuse_if_swapped(self, method: str) -> None:
        self._finish_offloading()
        if self._shared.swapped is not None:
            raise RuntimeError(
                f"{type(self).__name__}.{method}(): averaged weights are swapped in; call swap_ema() first, or leave "
                "the block of `with optimizer.ema()`"
            )

    def _check_group(self, group: dict[str, Any]) -> None:
        name, given, decay = type(self).__name__, group.get("state_dtype"), group.get("ema_decay")
        if name_of_dtype(given) not in (None, "int8", *STATE_DTYPES):
            raise ValueError(
                f"{name}(): expected state_dtype of torch.float32, torch.bfloat16 or 'int8', got {given!r}"
            )
        if decay is not None and not 0 <= decay <= 1:
            raise ValueError(f"{name}(): expected ema_decay between 0 and 1, got {decay}")
        if group.get("ema_warmup") and decay is None:
            raise ValueError(f"{name}(): expected ema_decay with ema_warmup=True, got None")
        if group.get("master_weights") and group.get("stochastic_rounding"):
            raise ValueError(f"{name}(): expected master_weights or stochastic_rounding, got both")
