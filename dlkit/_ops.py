"""dlkit's ops as plain functions."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling
from torch.jit import is_tracing
from torch.nn.utils._expanded_weights.expanded_weights_impl import ExpandedWeight

from dlkit import _native
from dlkit._C import Call

if torch.__version__ >= "2.12":
    is_exporting = torch.compiler.is_exporting
else:

    def is_exporting() -> bool:
        """What torch.compiler.is_exporting() returns; TorchDynamo takes that one for true in all that it compiles."""
        return torch.compiler._is_exporting_flag


def _serve_dtensors() -> None:
    """torch.distributed.tensor is too slow to import for those who have no DTensor."""
    if "torch.distributed.tensor" in sys.modules:
        importlib.import_module("dlkit._dtensor")


_serve_dtensors._dynamo_marked_constant = True  # type: ignore[attr-defined]  # TorchDynamo calls it while it traces


def op(name: str, native: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``torch.ops.dlkit.<name>``, its arguments by position in the schema's order, keyword-only ones too.

    A call costs 1.5 us less than by ``torch.ops`` (csrc/glue/call.cpp). TorchDynamo cannot look into a C function and
    gets the overload itself. Programs that torch.export, torch.jit.trace and torch.onnx make may run where dlkit is not
    installed: they get ``native``, the same in torch's own ops, by default dlkit._native's function of that name. The
    weights of :func:`torch.nn.utils._per_sample_grad.call_for_per_sample_grads` get it too: they know only torch's ops.
    """
    overload = getattr(torch.ops.dlkit, name).default
    if native is not None:
        setattr(_native, name, native)  # for later calls of op() with this name
    native = getattr(_native, name)
    arguments = overload._schema.arguments
    keywords = [argument.name for argument in arguments if argument.kwarg_only]
    positional = len(arguments) - len(keywords)

    def unusual(*args: Any, **keywords: Any) -> Any:
        """Serves subclasses of Tensor, function modes and tracing."""
        if is_exporting() or is_tracing() or any(isinstance(arg, ExpandedWeight) for arg in args):
            return native(*args, **keywords)
        _serve_dtensors()
        return overload(*args, **keywords)

    call = Call(unusual, f"dlkit::{name}")

    def function(*args: Any) -> Any:
        if is_dynamo_compiling():
            _serve_dtensors()
            run = native if is_exporting() else overload
            return run(*args[:positional], **dict(zip(keywords, args[positional:], strict=False)))
        return call(*args)

    function.__name__ = function.__qualname__ = name  # as it stands in printed graphs
    return function
