"""What dlkit's own options mean, on top of torch's optimizers in plain Python.

max_norm        torch's clip_grad_norm_ on copies of the gradients, the norm in fp64
master_weights  an fp32 parameter beside each 16-bit one; where the 16 bits are not the rounded master's, the user wrote
                them, and the master starts anew from there
ema_decay       an average that starts at the parameter before its first gradient and moves at every step from then on
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fuzz.optimizer_world import FLOATING, SIXTEEN_BITS


def rounded(master: Tensor, dtype: torch.dtype) -> Tensor:
    """To bf16 half away from zero, to fp16 half to even, as csrc/optim/math.h says."""
    if dtype != torch.bfloat16:
        return master.to(dtype)
    bits = master.contiguous().view(torch.int32)
    cut = ((bits.long() + 0x8000) >> 16 << 16).to(torch.int32).view(torch.float32)
    return torch.where(master.isfinite(), cut, master).to(dtype)


def average_of(optimizer: Any, param: Tensor) -> Tensor:
    """The running average: the parameter itself where it has had no step."""
    averages = getattr(optimizer, "averages", None)
    if averages is not None:
        return averages.get(param, param.detach())
    return optimizer.state.get(param, {}).get("ema", param.detach())


class Oracle:
    """Mixed into a class of torch's."""

    torch_step: Any

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.max_norm = kwargs.pop("max_norm", None)
        self.error_if_nonfinite = kwargs.pop("error_if_nonfinite", False)
        self.clip_gradients_in_place = kwargs.pop("clip_gradients_in_place", False)
        self.own = {key: kwargs.pop(key) for key in ("master_weights", "ema_decay") if key in kwargs}
        self.grad_norm: Tensor | None = None
        self.masters: dict[Tensor, Tensor] = {}
        self.averages: dict[Tensor, Tensor] = {}
        self.moved = False  # has there been a step with a learning rate?
        self.used: dict[Tensor, Tensor] = {}  # the fp32 values that the last step began with
        self.raw: dict[Tensor, Tensor] = {}  # the gradients before they were clipped
        self.factor = 1.0  # of the gradients in the last step
        self.stepped = False  # in this operation
        super().__init__(params, *args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({**self.own, **param_group})  # type: ignore[misc]

    def forget(self, param: Any, heir: Any = None) -> None:
        """The user took this parameter's state away, or gave it to another one."""
        for kept in (self.masters, self.averages):
            found = kept.pop(param, None)
            if heir is not None and found is not None:
                kept[heir] = found

    def _parameters(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"]]  # type: ignore[attr-defined]

    def _master(self, param: Tensor) -> Tensor:
        master, fresh = self.masters.get(param), param.detach().float()
        if master is None:
            return fresh
        kept = rounded(master, param.dtype)
        same = (kept == param) | (kept.isnan() & param.isnan())
        return torch.where(same, master, fresh)

    def _exact(self, group: dict[str, Any], param: Tensor) -> Tensor:
        masters = group.get("master_weights") and param.dtype in SIXTEEN_BITS
        return self._master(param) if masters else param.detach()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._raw is not None:
            raise RuntimeError("averaged weights are swapped in")
        grads = {p: p.grad for _, p in self._parameters() if p.grad is not None}
        self.raw = {p: grad.clone() for p, grad in grads.items() if grad.layout == torch.strided}
        if self.clip_gradients_in_place and self.max_norm is not None:
            for grad in grads.values():
                if grad.layout == torch.strided and not grad.is_conj():
                    (torch.view_as_real(grad) if grad.is_complex() else grad).mul_(1.0)  # raises where elements share
                    # memory, as clip_grad_norm_ does
        factor = 1.0
        if self.max_norm is not None:
            squares = [torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in grads.values()]
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in squares))
            self.grad_norm = torch.tensor(norm, dtype=torch.float64, device="cpu")
            if self.error_if_nonfinite and not math.isfinite(norm):
                raise RuntimeError("not finite")
            factor = self.max_norm / (norm + 1e-6)
            factor = 1.0 if factor > 1 else factor
        self.factor, self.used, self.stepped = factor, {}, True
        averages = dict(self.averages)
        for group, param in self._parameters():
            averaged = param.is_complex() or param.dtype in FLOATING
            # Before the first step that has a rate, steps only make the states, as checkpoint tools do.
            new = param in grads if param not in self.averages else not self.moved
            if group.get("ema_decay") is not None and averaged and new:
                kind = torch.float32 if param.dtype in SIXTEEN_BITS else param.dtype
                self.averages[param] = self._exact(group, param).to(kind, copy=True)
        whole: dict[Tensor, Tensor] = {}
        for group, param in self._parameters():
            if param not in grads or param in whole:
                continue
            if group.get("master_weights") and param.dtype in SIXTEEN_BITS:
                whole[param] = param.data
                master = self._master(param)
                self.used[param] = master.clone()
                param.grad = None
                param.data = master
                param.grad = grads[param].float() * factor
            elif factor != 1.0:
                param.grad = grads[param] * factor
        raised = True
        try:
            type(self).torch_step(self)
            raised = False
        finally:
            if raised:
                self.averages = averages
            for param, data in whole.items():
                master, param.grad = param.data, None
                if not raised:
                    data.copy_(rounded(master, data.dtype))
                    # What overflows in fp16 is infinite, as csrc/optim/math.h says.
                    self.masters[param] = torch.where(data.isinf(), data.float(), master)
                param.data = data
            if self.clip_gradients_in_place and factor != 1.0 and not raised:
                for grad in {id(grad): grad for grad in grads.values()}.values():  # one that is shared, once
                    grad.mul_(factor)
            for param, grad in grads.items():
                param.grad = grad
        for group, param in self._parameters():
            if group.get("ema_decay") is not None and param in self.averages:
                average = self.averages[param]
                average.lerp_(self._exact(group, param).to(average.dtype), 1 - group["ema_decay"])
        averaged = [group for group in self.param_groups if group.get("ema_decay") is not None]  # type: ignore[attr-defined]
        self.moved = self.moved or any(float(group["lr"]) != 0 for group in averaged)
        return loss

    def ema_parameters(self) -> Any:
        for group, param in self._parameters():
            if group.get("ema_decay") is not None:
                yield average_of(self, param)

    _raw: Any = None

    @torch.no_grad()
    def swap_ema(self) -> None:
        if self._raw is not None:
            for param, kept in self._raw:
                param.copy_(kept)
            self._raw = None
            return
        found = [(group, p) for group, p in self._parameters() if group.get("ema_decay") is not None]
        self._raw = [(param, param.detach().clone()) for _, param in found]
        for _, param in found:
            param.copy_(average_of(self, param))


def unhooked(step: Any) -> Any:
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step


ORACLES: dict[str, Any] = {
    kind: type(
        f"Oracle{kind}",
        (Oracle, getattr(torch.optim, kind)),
        {"torch_step": staticmethod(lambda self, kind=kind: unhooked(getattr(torch.optim, kind).step)(self))},
    )
    for kind in ("AdamW", "Adam", "SGD", "RMSprop")
}
