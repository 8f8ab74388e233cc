"""Checks of Python arguments, and the exceptions of torch for wrong ones."""

import numbers
from typing import Any, NoReturn

import torch
from torch import Tensor

from dlkit import random

Generator = torch.Generator | random.Philox


def check_tensors(name: str, **tensors: Any) -> None:
    for argument, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}(): expected {argument} to be a Tensor, got {type(value).__name__}") from None


def number(name: str, argument: str, value: Any) -> Any:
    """``value``, a number, a scalar of NumPy or a tensor without dimensions, as a Python number."""
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, Tensor):
        if value.dim() == 0 and not value.is_complex() and not value.requires_grad:
            return value.item()
        kind = f"a {value.dtype} tensor of shape {list(value.shape)}" + " that requires grad" * value.requires_grad
    else:
        kind = type(value).__name__
        if isinstance(value, numbers.Real) and hasattr(value, "dtype"):
            return float(value)
    raise TypeError(f"{name}(): expected {argument} to be a float, got {kind}")


def check_probability(name: str, p: Any) -> Any:
    """``p`` as a Python number between 0 and 1."""
    p = number(name, "p", p)
    if p < 0 or p > 1:
        raise ValueError(f"{name}(): expected p between 0 and 1, got {p}")
    if p != p:
        raise RuntimeError(f"{name}(): expected p between 0 and 1, got {p}")
    return p


def check_flag(name: str, argument: str, value: Any) -> None:
    if value is not True and value is not False and not isinstance(value, torch.SymBool):
        raise TypeError(f"{name}(): expected {argument} to be a bool, got {type(value).__name__}")


def split_generator(name: str, generator: Generator | None) -> tuple[torch.Generator | None, Tensor | None]:
    """(generator, stream) as the ops take them: a torch.Generator or None, and the state of a Philox stream or None."""
    if generator is None:
        default = random.default()
        return None, None if default is None else default._state
    if isinstance(generator, random.Philox):
        return None, generator._state
    if isinstance(generator, torch.Generator):
        return generator, None
    raise TypeError(
        f"{name}(): expected generator to be a torch.Generator or a dlkit.random.Philox, got {type(generator).__name__}"
    )


def raise_norm(name: str, error: Exception, normalized_shape: Any, eps: Any, **tensors: Any) -> NoReturn:
    """Raises TypeError where an argument was of the wrong Python type, as torch does, else the error itself."""
    for argument, value in tensors.items():
        optional = argument in ("weight", "bias")
        if not isinstance(value, Tensor) and not (optional and value is None):
            raise TypeError(f"{name}(): expected {argument} to be a Tensor, got {type(value).__name__}") from None
    if not isinstance(normalized_shape, (list, tuple)) or any(
        not isinstance(size, (int, torch.SymInt)) for size in normalized_shape
    ):
        raise TypeError(
            f"{name}(): expected normalized_shape to be a tuple of ints, got {normalized_shape!r}"
        ) from None
    if eps is not None or "rms" not in name:
        number(name, "eps", eps)
    raise error


def raise_channels(name: str, error: Exception, tensors: dict[str, Any], **numbers_: Any) -> NoReturn:
    """As :func:`raise_norm`, for norms of channels. All ``tensors`` but input may be None; numbers may not."""
    for argument, value in tensors.items():
        if not isinstance(value, Tensor) and (argument == "input" or value is not None):
            raise TypeError(f"{name}(): expected {argument} to be a Tensor, got {type(value).__name__}") from None
    for argument, value in numbers_.items():
        number(name, argument, value)
    raise error
