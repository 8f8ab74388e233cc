"""The running average of the weights (EMA).

Each parameter's average is `state["ema"]`, in fp32 at least. The kernels move it in the same pass as the parameter;
averages of parameters without a gradient are moved here. A group counts the moves in `ema_steps`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dlkit.optim._checkpoint import CheckpointedOptimizer
from dlkit.optim._tensors import local


class AveragingOptimizer(CheckpointedOptimizer):
    """The part of OnePass that keeps and hands out averages."""

    def _ema_steps(self) -> int:
        """The number of times that averages have moved: the largest of all groups, for groups that were added later."""
        return max((group.get("ema_steps", 0) for group in self.param_groups if _is_averaged(group)), default=0)

    def _decay(self, group: dict[str, Any]) -> float:
        """The share of itself that the average keeps at this step."""
        decay = float(group["ema_decay"])
        if group.get("ema_warmup"):
            steps = self._ema_steps()
            decay = min(decay, (1 + steps) / (10 + steps))
        return decay

    def _start_averages(self) -> None:
        """Called before a step. Until a step has a learning rate above 0, averages begin at the present weights.

        Tools for checkpoints make states by a step with a learning rate of 0, and load the weights only after it.
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
        """Moves the averages of parameters that had no gradient in this step."""
        for param, decay in zip(idle, decays, strict=True):
            average, rest = local(self.state[param]["ema"]), 1 - decay
            weights = local(self._exact(param)).to(average.dtype)
            if found_inf is None:
                average.lerp_(weights, rest)
            else:  # does not wait for the device
                average.lerp_(weights, rest * (found_inf.to(average.device) == 0).to(average.dtype).reshape(()))

    def _count_averages(self, rates: list[float]) -> None:
        """Counts a move of the averages, unless no step has had a learning rate above 0 yet."""
        averaged = [(group, rate) for group, rate in zip(self.param_groups, rates, strict=True) if _is_averaged(group)]
        steps = self._ema_steps()
        moved = steps > 0 or any(rate != 0 or _is_on_device(group["lr"]) for group, rate in averaged)
        for group, _ in averaged:
            group["ema_steps"] = steps + moved

    # For the user.

    def ema_parameters(self, model: nn.Module | None = None) -> Iterator[Tensor]:
        """The averaged weights; a parameter that has had no step yet gives itself.

        Args:
            model: gives the parameters and their order, by ``model.parameters()``. None: the param groups with
                ``ema_decay``, in their order.

        Yields:
            Tensors of the parameters' shapes, fp32 or fp64; without a step, in the parameter's dtype.
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

        Args:
            model: the model whose parameters this optimizer trains.

        Returns:
            A dict with the keys, shapes and dtypes of ``model.state_dict()``.

        Raises:
            RuntimeError: ``model.state_dict()`` does not hold one of the averaged parameters.
        """
        result = model.state_dict(keep_vars=True)
        missing = {id(param): name for name, param in model.named_parameters() if self._is_kept(param)}
        with torch.no_grad():
            for name, value in result.items():
                if not isinstance(value, Tensor):
                    continue
                missing.pop(id(value), None)
                kept = self._is_kept(value)
                result[name] = self.state[value]["ema"].to(value.dtype) if kept else value.detach()
        if missing:
            raise RuntimeError(
                f"{type(self).__name__}.ema_state_dict(): the model's state_dict() does not hold its parameter "
                f"{min(missing.values())!r}; use `with optimizer.ema():` and model.state_dict()"
            )
        return result

    def _is_kept(self, param: Tensor) -> bool:
        return param in self.state and "ema" in self.state[param]

    @torch.no_grad()
    def swap_ema(self, *, discard: bool = False) -> None:
        """Puts the averaged weights into the parameters; called again, puts the parameters' own back, bit for bit.

        In between, step(), state_dict(), load_state_dict() and master_parameters() raise. A copy of the optimizer
        (deepcopy, pickle) is swapped as well. ``with optimizer.ema():`` makes both calls.

        Args:
            discard: put the parameters' own weights back even where they were written in between.

        Raises:
            RuntimeError: no group has ``ema_decay``; an average has another shape than its parameter; or the parameters
                were written while averages were swapped in.
        """
        name = type(self).__name__
        if self._shared.swapped is not None:
            swapped = self._shared.swapped
            if not discard and any(held and not _same_bits(p, self._average_of(p)) for p, _, held in swapped):
                raise RuntimeError(
                    f"{name}.swap_ema(): the parameters were written while averaged weights were swapped in; call "
                    "swap_ema(discard=True) to put the trained weights back, or reset_ema() to go on from what was "
                    "written"
                )
            for param, kept, _ in swapped:
                param.copy_(kept)
            self._trust_params([param for param, _, _ in swapped])
            self._shared.swapped = None
            return
        params = [p for group, p in self._params() if _is_averaged(group)]
        if not params:
            raise RuntimeError(f"{name}.swap_ema(): expected ema_decay to be set, got None")
        averages = [self._average_of(param) for param in params]
        for param, average in zip(params, averages, strict=True):
            if average.shape != param.shape:
                raise RuntimeError(
                    f"{name}.swap_ema(): expected an average of shape {list(param.shape)} as its parameter, got "
                    f"{list(average.shape)}"
                )
        self._restart_written_masters()
        self._shared.swapped = [(param, param.detach().clone(), False) for param in params]
        for param, average in zip(params, averages, strict=True):
            param.copy_(average)
        # If parameters share memory, only the last of them holds its average.
        pairs = zip(self._shared.swapped, averages, strict=True)
        self._shared.swapped = [(param, kept, _same_bits(param, average)) for (param, kept, _), average in pairs]

    @contextlib.contextmanager
    def ema(self) -> Iterator[None]:
        """``with optimizer.ema():`` the parameters are the averaged weights inside the block.

        If the block raises, the parameters' own weights are put back, even if they were written in the block.
        """
        self._refuse_if_swapped("ema")
        self.swap_ema()
        try:
            yield
        except BaseException:
            if self._shared.swapped is not None:
                self.swap_ema(discard=True)
            raise
        if self._shared.swapped is not None:
            self.swap_ema()

    @torch.no_grad()
    def reset_ema(self) -> None:
        """Lets the averages begin again at the present weights. Averages that are swapped in become the weights."""
        self._shared.swapped = None
        self._restart_written_masters()
        for group in self.param_groups:
            if _is_averaged(group):
                group["ema_steps"] = 0
                self._averages_become_weights(group)


def _same_bits(param: Tensor, average: Tensor) -> bool:
    """Whether the parameter is the average in its dtype. NaN is itself."""
    a, b = local(param.detach()), local(average).to(param.dtype)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _is_averaged(group: dict[str, Any]) -> bool:
    return group.get("ema_decay") is not None


def _is_on_device(rate: Any) -> bool:
    return isinstance(rate, Tensor) and rate.device.type != "cpu"
