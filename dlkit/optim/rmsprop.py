"""RMSprop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from dlkit.optim._optimizer import OnePass
from dlkit.optim._options import Options, host_rate, stands_still


class RMSprop(OnePass, torch.optim.RMSprop):
    """:class:`torch.optim.RMSprop`, with the same arguments, state and results, in one pass over memory.

    The arguments from ``max_norm`` on are dlkit's own; :class:`dlkit.optim._optimizer.OnePass` says in full what each
    does. Those from ``master_weights`` on may differ between param groups.

    Args:
        params: parameters, (name, parameter) pairs or param groups, as torch's optimizers take them; see
            :func:`dlkit.optim.param_groups`.
        lr: the learning rate, a number or a tensor of one element.
        alpha: how much of itself the running average of the squared gradient keeps at each step.
        eps: added to the denominator.
        weight_decay: the factor of the parameter that is added to its gradient.
        momentum: how much of itself the momentum buffer keeps at each step; 0: there is none.
        centered: divide by the gradient's standard deviation: subtract the square of its running average.
        capturable: keep step counters on the device, so that a CUDA graph can capture the step.
        foreach: as in torch where torch's own step runs; dlkit's kernels ignore it.
        maximize: step up the gradient instead of down.
        differentiable: record the step for autograd; torch's own step runs then.

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

    Source: `torch.optim.RMSprop <https://docs.pytorch.org/docs/stable/generated/torch.optim.RMSprop.html>`_; centered:
    `Generating Sequences With Recurrent Neural Networks <https://arxiv.org/abs/1308.0850>`_.
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
