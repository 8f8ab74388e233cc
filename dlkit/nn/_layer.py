"""How dlkit's layers meet tools that trace, compile or quantize a model and know torch.nn's layers by class."""

import sys
from types import FrameType
from typing import Any, ClassVar, NoReturn

import torch
from torch.fx import Proxy

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
FUSERS = (("torch.fx.experimental.optimization", "fuse"), ("torch.ao.quantization.quantize_fx", "fuse_fx"))


class Layer:
    """Mixed into every layer. Refuses tools that would give wrong results; the error names the remedy."""

    __jit_unused_properties__: ClassVar[list[str]] = ["qconfig"]

    def _get_name(self) -> str:
        """The name in repr(), which begins with `dlkit.` for dlkit's own classes."""
        name: str = super()._get_name()  # type: ignore[misc]
        return f"dlkit.{name}" if type(self).__module__.startswith("dlkit.") else name

    def _is_leaf(self, input: Proxy) -> bool:
        """Whether torch.fx traces a model around this layer. It traces into subclasses, as into those of torch.nn."""
        return type(self).__module__.startswith("dlkit.nn.") and input.tracer.root is not self  # type: ignore[attr-defined]

    def _call_node(self, input: Proxy, *args: Any, **kwargs: Any) -> Any:
        """One call of this layer in the graph, as of torch.nn's layers: train() and eval() still work later."""
        tracer: Any = input.tracer
        if type(tracer).__module__.startswith("torch.ao."):
            self._refuse("torch.ao.quantization")
        if isinstance(self, torch.nn.modules.batchnorm._BatchNorm):
            self._refuse_fusion()
        if "forward" in vars(self) or any(getattr(self, hooks) for hooks in HOOKS):  # traced with it
            return tracer.create_proxy("call_function", call_forward, (self, input, *args), kwargs)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *args), kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        self._refuse("torch.jit.script", "use torch.jit.trace or torch.export")

    @property
    def qconfig(self) -> Any:
        try:
            return vars(self)["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        if value is not None:
            self._refuse("torch.ao.quantization")
        vars(self)["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        del vars(self)["qconfig"]

    def _refuse_fusion(self) -> None:
        """Refuses torch's fusers: they trace a model and would silently leave an unknown BatchNorm."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            module, name = frame.f_globals.get("__name__"), frame.f_code.co_name
            if (module, name) in FUSERS:
                self._refuse(f"{module}.{name}")
            frame = frame.f_back

    def _refuse(self, tool: str, otherwise: str = "") -> NoReturn:
        from dlkit.surgery import can_restore, label  # which imports this module

        remedies = ["call dlkit.restore(model) first"] * can_restore(type(self)) + [otherwise] * bool(otherwise)
        raise TypeError(
            f"{tool} goes by the classes of torch.nn and does not know {label(type(self))}: "
            + (", or ".join(remedies) or "it has no counterpart there")
        )


def call_forward(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)
