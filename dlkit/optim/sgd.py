"""SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from dlkit.optim._optimizer import OnePass, Options, host_rate, stands_still


class SGD(OnePass, torch.optim.SGD):
    """:class:`torch.optim.SGD`, with the same arguments, state and results, in one pass over memory.

    For the arguments beyond torch's (``max_norm``, ``master_weights``, ``stochastic_rounding``, ``state_dtype``,
    ``ema_decay``, ...) see :class:`dlkit.optim._optimizer.OnePass`.

    Source: `torch.optim.SGD <https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html>`_.
    """

    _algorithm = "sgd"
    _all_states = ("momentum_buffer",)
    _counts_steps = False
    _torch_class = torch.optim.SGD

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._accept(options)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _numbers(self, group: dict[str, Any], average: float) -> tuple[float, ...]:
        lr, weight_decay, momentum = host_rate(group["lr"]), float(group["weight_decay"]), float(group["momentum"])
        nesterov, maximize = float(group["nesterov"]), float(group["maximize"])
        return (
            lr, weight_decay, 0.0, 0.0, 0.0, momentum, float(group["dampening"]), 0.0, average, 0.0, nesterov, maximize,
        )  # fmt: skip

    def _still_states(self, group: dict[str, Any]) -> int:
        return int(stands_still(group["momentum"]))

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("momentum_buffer" if group["momentum"] != 0 else None, None, None)
