"""One step of each optimizer in longdouble or fp64, with a bound on what correct arithmetic can differ by.

The bound of an element follows how rounding errors of `unit` (half an ulp of what the step computes in: fp32, or fp64
for fp64) travel through the formula, times SAFETY: a division by almost nothing, or a difference of almost equal
numbers, gives that element a wide bound, and no other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

SAFETY = 4.0
_TINY = {  # smallest normal number: below it an operation may flush or round by this much
    torch.float32: 2.0**-126,
    torch.float64: 2.0**-1022,
    torch.bfloat16: 2.0**-126,
    torch.float16: 2.0**-14,
}
Array = Any


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def array(tensor: Tensor, wide: bool) -> Array:
    found = real(tensor.detach()).double().numpy()
    return found.astype(np.longdouble) if wide else found


def number(value: Any) -> float:
    return float(value)


class Exact:
    """What a step makes of one parameter: {name: (values, bounds)}, "param" among them."""

    def __init__(
        self,
        kind: str,
        group: dict[str, Any],
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        factor: float = 1.0,
        slack: Any = 0.0,
        blur: float = 0.0,
    ) -> None:
        self.dtype = param.dtype.to_real() if param.is_complex() else param.dtype
        self.wide = self.dtype == torch.float64
        self.unit = 2.0**-53 if self.wide else 2.0**-24
        # A tensor among the hyperparameters makes torch compute with it in that tensor's type.
        tensors = any(isinstance(v, Tensor) for v in (group["lr"], group["weight_decay"], *group.get("betas", ())))
        self.hyper = 2.0**-24 if tensors else self.unit
        self.least = _TINY[torch.float64 if self.wide else torch.float32]
        self.p, self.g = array(param, self.wide), array(grad, self.wide) * factor
        self.dp, self.dg = np.zeros_like(self.p) + slack, (2 * self.unit + blur) * abs(self.g)
        self.group = group
        self.state = {k: array(v, self.wide) for k, v in state.items() if isinstance(v, Tensor)}
        self.results: dict[str, tuple[Array, Array]] = {}
        self.loose: Any = False  # where anything goes
        with np.errstate(all="ignore"):
            getattr(self, {"AdamW": "adam", "Adam": "adam", "SGD": "sgd", "RMSprop": "rmsprop"}[kind])()

    def old(self, name: str) -> Array:
        found = self.state.get(name)
        return np.zeros_like(self.p) if found is None or found.shape != self.p.shape else found

    def keep(self, name: str, values: Array, bounds: Array) -> None:
        with np.errstate(all="ignore"):
            # NaN: an infinity within the formula, divided by which gives 0 exactly.
            bounds = np.where(np.isnan(bounds), 0, SAFETY * bounds + 4 * self.least)
            moves = name in ("param", "momentum_buffer")
            self.results[name] = (values, np.where(self.loose, np.inf, bounds) if moves else bounds)

    def decay(self, decoupled: bool) -> None:
        """To the gradient that the formula takes; the decay of decoupled ones."""
        decay, lr = number(self.group["weight_decay"]), number(self.group["lr"])
        if self.group["maximize"]:
            self.g = -self.g
        if decay and decoupled:
            self.dp = self.dp + (4 * self.unit + 2 * self.hyper) * abs(self.p)
            self.p = self.p * (1 - lr * decay)
        elif decay:
            self.dg = (
                self.dg + abs(decay) * self.dp + 2 * (self.unit + self.hyper) * (abs(self.g) + abs(decay * self.p))
            )
            self.g = self.g + decay * self.p

    def average(self, old: Array, rest: float) -> tuple[Array, Array]:
        value = old + rest * (self.g - old)
        return value, abs(rest) * self.dg + (3 * self.unit + self.hyper) * (abs(old) + abs(self.g))

    def squares(self, old: Array, keep: float) -> tuple[Array, Array]:
        value = keep * old + (1 - keep) * self.g**2
        error = (1 - keep) * (2 * abs(self.g) * self.dg + self.dg**2)
        return value, error + (4 * self.unit + self.hyper) * (abs(keep * old) + self.g**2)

    def root(self, square: Array, error: Array) -> tuple[Array, Array]:
        value = np.sqrt(np.maximum(square, 0))
        spread = np.minimum(error / (2 * value), np.sqrt(error + self.least))
        spread = np.where(value == 0, np.sqrt(error), spread)
        return value, spread + 2 * self.unit * value

    def divide(self, top: Array, dtop: Array, bottom: Array, dbottom: Array) -> tuple[Array, Array]:
        value = top / bottom
        least = np.maximum(bottom - SAFETY * dbottom, 0)
        error = dtop / least + abs(top) * dbottom / (bottom * least) + 3 * self.unit * abs(value)
        return value, np.where(least > 0, error, np.where(dbottom > 0, np.inf, error))

    def move(self, update: Array, dupdate: Array, rate: float) -> None:
        step = rate * update
        bound = self.dp + abs(rate) * dupdate + (3 * self.unit + 2 * self.hyper) * abs(step)
        self.keep("param", self.p - step, bound + 2 * self.unit * (abs(self.p) + abs(step)))

    def adam(self) -> None:
        group = self.group
        beta1, beta2 = map(number, group["betas"])
        t = float(self.state["step"]) + 1 if "step" in self.state else 1.0
        self.decay(bool(group["decoupled_weight_decay"]))
        m, dm = self.average(self.old("exp_avg"), 1 - beta1)
        v, dv = self.squares(self.old("exp_avg_sq"), beta2)
        self.keep("exp_avg", m, dm)
        self.keep("exp_avg_sq", v, dv)
        if group["amsgrad"]:
            v = np.maximum(self.old("max_exp_avg_sq"), v)  # NaN where one of them is
            self.keep("max_exp_avg_sq", v, dv)
        correction1, root2 = 1 - beta1**t, np.sqrt(1 - beta2**t)
        root, droot = self.root(v, dv)
        bottom = root / root2 + number(group["eps"])
        update, dupdate = self.divide(m, dm, bottom, droot / root2 + (4 * self.unit + self.hyper) * bottom)
        self.move(update, dupdate, number(group["lr"]) / correction1)

    def sgd(self) -> None:
        group = self.group
        self.decay(False)
        g, dg, momentum = self.g, self.dg, number(group["momentum"])
        if momentum:
            if "momentum_buffer" in self.state:
                rest, old = 1 - number(group["dampening"]), self.old("momentum_buffer")
                g = momentum * old + rest * self.g
                dg = abs(rest) * self.dg + 3 * self.unit * (abs(momentum * old) + abs(rest * self.g))
            self.keep("momentum_buffer", g, dg)
            if group["nesterov"]:
                dg = self.dg + abs(momentum) * dg + 3 * self.unit * (abs(self.g) + abs(momentum * g))
                g = self.g + momentum * g
        self.move(g, dg, number(group["lr"]))

    def rmsprop(self) -> None:
        group = self.group
        alpha, momentum = number(group["alpha"]), number(group["momentum"])
        self.decay(False)
        v, dv = self.squares(self.old("square_avg"), alpha)
        self.keep("square_avg", v, dv)
        if group["centered"]:
            average, daverage = self.average(self.old("grad_avg"), 1 - alpha)
            self.keep("grad_avg", average, daverage)
            dv = dv + 2 * abs(average) * daverage + daverage**2 + 3 * self.unit * (v + average**2)
            v = v - average**2
            # torch takes the root of what rounding leaves below 0, NaN; dlkit takes 0 there, as it documents.
            self.loose = v - SAFETY * dv <= 0
        root, droot = self.root(v, dv)
        bottom = root + number(group["eps"])
        update, dupdate = self.divide(self.g, self.dg, bottom, droot + 2 * self.unit * bottom)
        if momentum > 0:
            old = self.old("momentum_buffer")
            dupdate = dupdate + 3 * self.unit * (abs(momentum * old) + abs(update))
            update = momentum * old + update
            self.keep("momentum_buffer", update, dupdate)
        self.move(update, dupdate, number(group["lr"]))


def agrees(found: Tensor, exact: tuple[Array, Array], extra: float = 0.0) -> Array:
    """Element by element: `found` is the exact value, rounded to found's type, within the bound (+ extra ulps)."""
    values, bounds = exact
    kind = found.dtype.to_real() if found.is_complex() else found.dtype
    info = torch.finfo(kind)
    ours = array(found, kind == torch.float64)
    with np.errstate(all="ignore"):
        rounding = (0.5 + extra) * np.maximum(
            info.eps * np.maximum(abs(values), abs(ours)), info.smallest_normal * info.eps
        )
        near = abs(ours - values) <= bounds + rounding
        over = np.isinf(ours) & (abs(values) + bounds >= info.max * (1 - info.eps)) & ((ours > 0) == (values > 0))
        same = (ours == values) | (np.isnan(ours) & np.isnan(values))
        return near | over | same | np.isinf(bounds)
