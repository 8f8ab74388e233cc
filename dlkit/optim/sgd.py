"""SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from dlkit.optim._optimizer import OnePass
from dlkit.optim._options import Options, host_rate, stands_still


class SGD(OnePass, torch.optim.SGD):
    """:class:`torch.optim.SGD`, with the same arguments, state and results, in one pass over memory.

    The arguments from ``max_norm`` on are dlkit's own; :class:`dlkit.optim._optimizer.OnePass` says in full what each
    does. Those from ``master_weights`` on may differ between param groups.

    Args:
        params: parameters, (name, parameter) pairs or param groups, as torch's optimizers take them; see
            :func:`dlkit.optim.param_groups`.
        lr: the learning rate, a number or a tensor of one element.
        momentum: how much of itself the momentum buffer keeps at each step; 0: there is none.
        dampening: 1 - dampening is the factor of the gradient that enters the momentum buffer.
        weight_decay: the factor of the parameter that is added to its gradient.
        nesterov: Nesterov's momentum.
        maximize: step up the gradient instead of down.
        foreach: as in torch where torch's own step runs; dlkit's kernels ignore it.
        differentiable: record the step for autograd; torch's own step runs then.
        fused: as in torch for a GradScaler, whose scaling the step then does itself.

    Keyword Args:
        max_norm (float): clip: scale gradients so that the 2-norm of all of them together is at most this.
        norm_type (float): the order of the norm of ``max_norm``; only 2.
        error_if_nonfinite (bool): with ``max_norm``, raise where the norm is NaN or infinite, with nothing changed.
        clip_gradients_in_place (bool): with ``max_norm``, write the scaled gradients to ``p.grad``.
        process_group (ProcessGroup or DeviceMesh): with ``max_norm``, the processes over whose gradients the norm is
            taken, if each has parameters of its own.
        master_weights (bool): keep fp32 masters of bf16 and fp16 parameters.
        stochastic_rounding (bool): round 16-bit parameters without masters, and 16-bit states, up or down at random.
        state_dtype (torch.dtype or "int8"): how moments are stored: torch.float32, torch.bfloat16 or "int8"; None: as
            torch does.
        ema_decay (float): keep a running average of the weights, which keeps this share of itself at each step.
        ema_warmup (bool): with ``ema_decay``, let the average forget the first weights sooner.

    Raises:
        TypeError: an unknown keyword argument.
        ValueError: an argument is out of range, or contradicts another.

    Source: `torch.optim.SGD <https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html>`_; the momentum is
    that of `On the importance of initialization and momentum in deep learning
    <https://proceedings.mlr.press/v28/sutskever13.html>`_.
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
