"""State dicts: saved in dlkit's form or in torch's, and loaded from either and from version 0.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dlkit.optim import _masters
from dlkit.optim._masters import MasterOptimizer
from dlkit.optim._options import GROUP_OPTIONS
from dlkit.optim._state import names_of
from dlkit.optim._tensors import SIXTEEN_BITS, is_dtensor, like, local


class CheckpointedOptimizer(MasterOptimizer):
    """The part of OnePass that saves and loads."""

    _loading: dict[str, Any] | None = None  # what load_state_dict() was given, while it runs
    _kept_options: list[dict[str, Any]] | None = None  # dlkit's options of the groups, which torch's state dicts lack

    def state_dict(self, *, consolidate: bool = False) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`.

        8-bit states have names of their own (``exp_avg_codes``, ``exp_avg_scale``), except those of DTensors, which are
        given as fp32 DTensors, so that a checkpoint can be cut anew.

        Args:
            consolidate: everything in fp32 under torch's names, so that a run can go on without dlkit: states in full,
                masters as ``master_param`` (also ``master_parameters()``), none of dlkit's options in groups. Such a
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
        """As :meth:`torch.optim.Optimizer.load_state_dict`, for the state dicts below.

        The state dict may be one of this class, of torch's optimizer, consolidated, or of version 0.1.

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
        """Gives states the forms that their groups ask for; torch has cast each to the parameter's dtype."""
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
