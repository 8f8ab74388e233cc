"""A group's hyperparameters as the optimizers' kernels read them: csrc/optim/arguments.h has the same names.

It imports nothing of dlkit: Triton's kernels are compiled ahead without the extension.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """One row of `options` in dlkit::optim_step_. Flags are 0 or 1."""

    lr: float
    weight_decay: float
    eps: float
    beta1: float
    beta2: float
    momentum: float
    dampening: float
    alpha: float
    ema_decay: float
    decoupled_weight_decay: float
    nesterov: float
    maximize: float
    stochastic_rounding: float
    stochastic_states: float  # bit s: of state s
