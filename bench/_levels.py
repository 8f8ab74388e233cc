"""A call of an op at every hop from the user to the kernel, as `bench calls` measures it. A spec's CALLS make them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dlkit

P, EPS = 0.5, 1e-5  # of every dropout, of every norm

Call = Callable[[], Any]


class Levels(NamedTuple):
    """The same computation at every hop; None where one is missing. `leaves` are the tensors that get gradients."""

    leaves: list[Tensor]
    native: Call
    module: Call | None
    functional: Call | None
    op: Call | None


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def levels_of(inputs: tuple[Tensor, ...], native: Callable[..., Any], module: Any, functional: Any, op: Any) -> Levels:
    calls = [None if call is None else functools.partial(call, *inputs) for call in (module, functional, op)]
    parameters = list(module.parameters()) if isinstance(module, nn.Module) else []
    return Levels([*inputs, *parameters], functools.partial(native, *inputs), *calls)


def twin_of(native: nn.Module) -> nn.Module:
    """dlkit's layer that shares the parameters of torch's."""
    twin: nn.Module = getattr(dlkit.nn, type(native).__name__).__new__(getattr(dlkit.nn, type(native).__name__))
    twin.__dict__ = dict(native.__dict__)
    return twin


def rows_of(n: int) -> tuple[int, int]:
    return max(1, n // 64), min(n, 64)
