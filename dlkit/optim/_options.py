"""dlkit's options of the constructors, and a group's hyperparameters as the kernels read them."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor

from dlkit._optim_row import Row
from dlkit.optim._tensors import FLOATING

# The columns of `options` in dlkit::optim_step_, one row a group.
OPTIONS = Row._fields
LR, DAMPENING, EMA_DECAY = (OPTIONS.index(name) for name in ("lr", "dampening", "ema_decay"))

# Arguments of the whole optimizer, beyond torch's.
CLIPPING = {
    "max_norm": None,
    "norm_type": 2.0,
    "error_if_nonfinite": False,
    "clip_gradients_in_place": False,
    "process_group": None,
}

# Options that dlkit adds to torch's param groups.
GROUP_OPTIONS = {
    "master_weights": False,
    "stochastic_rounding": False,
    "state_dtype": None,
    "ema_decay": None,
    "ema_warmup": False,
}
STATE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "float16": torch.float16,
}

# A moving average that keeps more than this share of itself stands still in bf16: its decay per step rounds to 0.
_STANDS_STILL = 1 - 2.0**-7


class Options(TypedDict, total=False):
    """dlkit's own keyword arguments; OnePass says what each does."""

    max_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    clip_gradients_in_place: bool
    process_group: Any
    master_weights: bool
    stochastic_rounding: bool
    state_dtype: torch.dtype | str | None
    ema_decay: float | None
    ema_warmup: bool


def name_of_dtype(dtype: Any) -> Any:
    """`state_dtype` as groups store it: a string, which every tool for checkpoints can store."""
    if isinstance(dtype, str):
        return dtype.removeprefix("torch.")
    return str(dtype).removeprefix("torch.") if dtype in FLOATING else dtype


def host_rate(lr: Any) -> float:
    """A group's learning rate, or 0 if it is on a device: kernels read it there, and reading it here would wait."""
    return 0.0 if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)


def stands_still(decay: Any) -> bool:
    """Whether an average with this decay has to be rounded stochastically where it is kept in 16 bits."""
    return float(decay) > _STANDS_STILL


def is_stochastic(group: dict[str, Any]) -> bool:
    """Whether parameters or states of this group are rounded stochastically."""
    return group.get("stochastic_rounding") or group.get("state_dtype") in ("bfloat16", torch.bfloat16)


def check_group(optimizer: str, group: dict[str, Any]) -> None:
    """Raises ValueError where dlkit's options of a group are out of range, or contradict each other."""
    given, decay = group.get("state_dtype"), group.get("ema_decay")
    if name_of_dtype(given) not in (None, "int8", *STATE_DTYPES):
        raise ValueError(
            f"{optimizer}(): expected state_dtype of torch.float32, torch.bfloat16 or 'int8', got {given!r}"
        )
    if decay is not None and not 0 <= decay <= 1:
        raise ValueError(f"{optimizer}(): expected ema_decay between 0 and 1, got {decay}")
    if group.get("ema_warmup") and decay is None:
        raise ValueError(f"{optimizer}(): expected ema_decay with ema_warmup=True, got None")
    if group.get("master_weights") and group.get("stochastic_rounding"):
        raise ValueError(f"{optimizer}(): expected master_weights or stochastic_rounding, got both")
