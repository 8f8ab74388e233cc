"""The forms in which states are kept, and where.

In memory a state `exp_avg` is one of two forms: a floating tensor under torch's own name, or `exp_avg_codes` and
`exp_avg_scale`, 8 bits per element. torch's optimizer thus finds the numbers that it expects, or no such state.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlkit.optim import _int8
from dlkit.optim._options import STATE_DTYPES, name_of_dtype
from dlkit.optim._tensors import SIXTEEN_BITS, average_dtype, is_dtensor, is_flat_shard, like, local

LEAST_CODED = 4096  # elements: smaller tensors gain nothing from 8 bits, and are often scales and biases


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
    """Attributes that an optimizer and a wrapper around it share, in one object that is changed in place.

    Lightning's and Fabric's wrappers are subclasses that copy the optimizer's attributes and forward only others: a
    value that is set on the wrapper does not reach the optimizer.
    """

    def __init__(self) -> None:
        self.swapped: list[tuple[Tensor, Tensor, bool]] | None = None  # (parameter, its own weights, holds its average)
        self.offloading: Any = None  # an event after which offloaded states have arrived


class StatefulOptimizer(Optimizer):
    """The part of OnePass that makes states, changes their form and moves them."""

    _embeddings: set[int] | None = None
    _shared: Shared

    # Each optimizer defines these.

    _algorithm = ""
    _all_states: tuple[str, ...] = ()  # every state that the optimizer can have, whatever its flags are
    _counts_steps = True

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """The states in the order of csrc/optim/kernel.h; None where this group has none."""
        raise NotImplementedError

    def _creation_order(self, group: dict[str, Any]) -> list[str]:
        """The states in the order in which torch's state dict has them."""
        return [name for name in self._state_names(group) if name is not None]

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
            # FSDP1 cuts a state as it cuts the parameter, and would cut the scales in the same way.
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

    # Between two devices.

    @torch.no_grad()
    def offload_states(self) -> None:
        """Moves all states to the CPU's memory, so that the device has room for something else between two steps.

        From CUDA the copies go to pinned memory, and the call does not wait for them. States on the CPU stay.
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
        """Waits, before the CPU reads states, until their copies have arrived."""
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
