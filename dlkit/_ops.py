"""dlkit's ops as plain functions."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

_Call = importlib.import_module("dlkit._C").Call


def _serve_dtensors() -> None:
    """torch.distributed.tensor is too slow to import for those who have no DTensor."""
    if "torch.distributed.tensor" in sys.modules:
        importlib.import_module("dlkit._dtensor")


_serve_dtensors._dynamo_marked_constant = True  # type: ignore[attr-defined]  # TorchDynamo calls it while it traces


def op(name: str) -> Callable[..., Any]:
    """``torch.ops.dlkit.<name>``, its arguments by position in the schema's order, keyword-only ones too.

    A call costs 1.5 us less than by ``torch.ops`` (csrc/call.cpp). TorchDynamo cannot look into a C function and gets
    the overload itself.
    """
    overload = getattr(torch.ops.dlkit, name).default

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        _serve_dtensors()
        return overload(*args, **kwargs)

    call = _Call(dispatch, f"dlkit::{name}")
    arguments = overload._schema.arguments
    keywords = [argument.name for argument in arguments if argument.kwarg_only]
    positional = len(arguments) - len(keywords)

    def function(*args: Any) -> Any:
        if is_dynamo_compiling():
            _serve_dtensors()
            return overload(*args[:positional], **dict(zip(keywords, args[positional:], strict=False)))
        return call(*args)

    return function
