"""RMSprop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from dlkit.optim._optimizer import OnePass, Options, host_rate, stands_still


class RMSprop(OnePass, torch.optim.RMSprop):
    """:class:`torch.optim.RMSprop`, with the same arguments, state and results, in one pass over memory.

    For the arguments beyond torch's (``max_norm``, ``master_weights``, ``stochastic_rounding``, ``state_dtype``,
    ``ema_decay``, ...) see :class:`dlkit.optim._optimizer.OnePass`.

    Source: `torch.optim.RMSprop <https://docs.pytorch.org/docs/stable/generated/torch.optim.RMSprop.html>`_.
    """

    _algorithm = "rmsprop"
    _all_states = ("square_avg", "momentum_buffer", "grad_avg")
    _sparse_error = "RMSprop does not support sparse gradients"
    _torch_class = torch.optim.RMSprop

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._accept(options)
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable
        )

    def _numbers(self, group: dict[str, Any], average: float) -> tuple[float, ...]:
        lr, weight_decay, eps = host_rate(group["lr"]), float(group["weight_decay"]), float(group["eps"])
        alpha, momentum = float(group["alpha"]), float(group["momentum"])
        return (lr, weight_decay, eps, 0.0, 0.0, momentum, 0.0, alpha, average, 0.0, 0.0, float(group["maximize"]))

    def _still_states(self, group: dict[str, Any]) -> int:
        return 1 + 2 * stands_still(group["alpha"]) + 4 * stands_still(group["momentum"])

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        average = "grad_avg" if group["centered"] else None
        return ("square_avg", average, "momentum_buffer" if group["momentum"] > 0 else None)

    def _creation_order(self, group: dict[str, Any]) -> list[str]:
        square_avg, grad_avg, buffer = self._state_names(group)
        return [name for name in (square_avg, buffer, grad_avg) if name is not None]
