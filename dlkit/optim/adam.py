"""Adam and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from dlkit.optim._optimizer import OnePass, Options, host_rate, stands_still

_SPARSE = "Adam does not support sparse gradients, please consider SparseAdam instead"


class _AdamFamily(OnePass):
    _algorithm = "adam"
    _all_states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _sparse_error = _SPARSE
    _torch_class = torch.optim.Adam

    def _numbers(self, group: dict[str, Any], average: float) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        decoupled, maximize = float(group["decoupled_weight_decay"]), float(group["maximize"])
        numbers = map(float, (group["weight_decay"], group["eps"], beta1, beta2))
        return (host_rate(group["lr"]), *numbers, 0.0, 0.0, 0.0, average, decoupled, 0.0, maximize)

    def _still_states(self, group: dict[str, Any]) -> int:
        return 2 + stands_still(group["betas"][0])

    def _state_names(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None)


class Adam(_AdamFamily, torch.optim.Adam):
    """:class:`torch.optim.Adam`, with the same arguments, state and results, in one pass over memory.

    For the arguments beyond torch's (``max_norm``, ``master_weights``, ``stochastic_rounding``, ``state_dtype``,
    ``ema_decay``, ...) see :class:`dlkit.optim._optimizer.OnePass`.

    Source: `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._accept(options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class AdamW(_AdamFamily, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`, with the same arguments, state and results, in one pass over memory.

    For the arguments beyond torch's (``max_norm``, ``master_weights``, ``stochastic_rounding``, ``state_dtype``,
    ``ema_decay``, ...) see :class:`dlkit.optim._optimizer.OnePass`.

    Source: `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._accept(options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
