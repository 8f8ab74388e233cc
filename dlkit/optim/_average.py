"""The running average of the weights (EMA).

Each parameter's average is `state["ema"]`, in fp32 at least. The kernels move it in the same pass as the parameter;
those of parameters without a gradient are moved here. A group counts the moves in `ema_steps`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dlkit.optim._state import StatefulOptimizer
from dlkit.optim._tensors import local


class AveragingOptimizer(StatefulOptimizer):
    """The part of OnePass that keeps and hands out averages."""

    _versions: Any

    def _ema_steps(self) -> int:
        """How often averages have moved. A group that came later, or took parameters of another, counts on."""
        return max((group.get("ema_steps", 0) for group in self.param_groups if _is_averaged(group)), default=0)

    def _decay(self, group: dict[str, Any]) -> float:
        """What the average keeps of itself at this step."""
        decay = float(group["ema_decay"])
        if group.get("ema_warmup"):
            steps = self._ema_steps()
            decay = min(decay, (1 + steps) / (10 + steps))
        return decay

    def _start_averages(self) -> None:
        """Before a step. Until one has a learning rate, averages begin at the weights as they are.

        A tool for checkpoints makes states by a step of learning rate 0, and loads the weights only then.
        """
        if self._ema_steps() == 0:
            for group in self.param_groups:
                if _is_averaged(group):
                    self._averages_become_weights(group)

    @torch.no_grad()
    def _averages_become_weights(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            average = self.state[param].get("ema") if param in self.state else None
            if average is not None:
                average.copy_(self._exact(param))

    @torch.no_grad()
    def _move_idle_averages(self, idle: list[Tensor], decays: list[float], found_inf: Tensor | None) -> None:
        """Of parameters that had no gradient in this step."""
        for param, decay in zip(idle, decays, strict=True):
            average, rest = local(self.state[param]["ema"]), 1 - decay
            weights = local(self._exact(param)).to(average.dtype)
            if found_inf is None:
                average.lerp_(weights, rest)
            else:  # asks nothing of the device
                average.lerp_(weights, rest * (found_inf.to(average.device) == 0).to(average.dtype).reshape(()))

    def _count_averages(self, rates: list[float]) -> None:
        """Averages have moved, unless no step has had a learning rate yet."""
        averaged = [(group, rate) for group, rate in zip(self.param_groups, rates, strict=True) if _is_averaged(group)]
        steps = self._ema_steps()
        moved = steps > 0 or any(rate != 0 or _is_on_device(group["lr"]) for group, rate in averaged)
        for group, _ in averaged:
            group["ema_steps"] = steps + moved

    # For the user.

    def ema_parameters(self, model: nn.Module | None = None) -> Iterator[Tensor]:
        """The averaged weights; a parameter that has had no step yet gives itself.

        Args:
            model: the order is that of ``model.parameters()``, all of them. None: the order of the param groups, those
                with ``ema_decay``.
        """
        if model is None:
            params = [p for group, p in self._params() if _is_averaged(group)]
        else:
            params = list(model.parameters())
        for param in params:
            yield self._average_of(param)

    def _average_of(self, param: Tensor) -> Tensor:
        average = self.state[param].get("ema") if param in self.state else None
        return param.detach() if average is None else average

    def ema_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """``model.state_dict()`` with the averaged weights in place of the parameters, in the parameters' dtypes.

        Buffers, and parameters that this optimizer does not average, are the model's own. A model of the same kind
        loads it by ``load_state_dict``.
        """
        named = dict(model.named_parameters(remove_duplicate=False))
        result = model.state_dict()
        with torch.no_grad():
            for name in result:
                param = named.get(name)
                if param is not None and param in self.state and "ema" in self.state[param]:
                    result[name] = self.state[param]["ema"].to(param.dtype)
        return result

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Puts the averaged weights into the parameters; called again, puts the parameters' own back, bit for bit.

        In between, step(), state_dict() and load_state_dict() raise. A copy of the optimizer (deepcopy, pickle) is
        swapped as well. Better: ``with optimizer.ema():``.

        Raises:
            RuntimeError: no group has ``ema_decay``, or the parameters were written while averages were swapped in.
        """
        name = type(self).__name__
        if self._shared.swapped is not None:
            for param, _, version in self._shared.swapped:
                if local(param)._version != version:
                    raise RuntimeError(
                        f"{name}.swap_ema(): the parameters were written while averaged weights were swapped in; call "
                        "reset_ema() to go on from what was written"
                    )
            for param, kept, _ in self._shared.swapped:
                param.copy_(kept)
            self._trust_params([param for param, _, _ in self._shared.swapped])
            self._shared.swapped = None
            return
        params = [p for group, p in self._params() if _is_averaged(group)]
        if not params:
            raise RuntimeError(f"{name}.swap_ema(): expected ema_decay to be set, got None")
        self._restart_written_masters()
        swapped = [(param, param.detach().clone()) for param in params]
        for param, average in zip(params, list(self.ema_parameters()), strict=True):
            param.copy_(average)
        self._shared.swapped = [(param, kept, local(param)._version) for param, kept in swapped]

    @contextlib.contextmanager
    def ema(self) -> Iterator[None]:
        """``with optimizer.ema():`` the parameters are the averaged weights inside the block."""
        self._refuse_if_swapped("ema")
        self.swap_ema()
        try:
            yield
        finally:
            if self._shared.swapped is not None:
                self.swap_ema()

    @torch.no_grad()
    def reset_ema(self) -> None:
        """Averages begin again at the weights as they are now; swapped in, they become the weights."""
        self._shared.swapped = None
        for group in self.param_groups:
            if _is_averaged(group):
                group["ema_steps"] = 0
                self._averages_become_weights(group)

    def _trust_params(self, params: list[Tensor]) -> None:
        raise NotImplementedError

    def _restart_written_masters(self) -> None:
        raise NotImplementedError


def _is_averaged(group: dict[str, Any]) -> bool:
    return group.get("ema_decay") is not None


def _is_on_device(rate: Any) -> bool:
    return isinstance(rate, Tensor) and rate.device.type != "cpu"
