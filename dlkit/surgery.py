"""replace() and restore(): torch.nn layers to their fused twins and back, in place, by changing __class__.

Parameters, buffers, hooks, the training flag and state_dict stay what and where they are.
"""

from typing import NamedTuple, TypeVar

import torch

import dlkit.nn

TWINS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.LayerNorm: dlkit.nn.LayerNorm,
    torch.nn.RMSNorm: dlkit.nn.RMSNorm,
}

Model = TypeVar("Model", bound=torch.nn.Module)


class Change(NamedTuple):
    """What became of one layer: its name in the model, its class before and after, and why."""

    name: str
    before: type[torch.nn.Module]
    after: type[torch.nn.Module]
    reason: str

    def __str__(self) -> str:
        def label(cls: type) -> str:
            return f"{cls.__module__}.{cls.__qualname__}"

        outcome = "left as it is" if self.before is self.after else f"now {label(self.after)}"
        return f"{self.name or '(the model itself)'}: {label(self.before)}, {outcome}: {self.reason}"


def replace(model: Model, *, report: list[Change] | None = None) -> Model:
    """Turns every layer of ``model`` that has a fused twin into it, in place, and returns ``model``.

    Exactly torch's own classes are changed. A subclass, or a layer whose forward was replaced on the instance, may do
    something else and is left alone.

    Args:
        model: any module; itself a layer, perhaps.
        report: a list that receives a :class:`Change` for each layer changed, and for each that was left and could have
            been meant. ``print(*report, sep="\\n")`` shows it.
    """
    return _change(model, TWINS, "has a fused twin", report)


def restore(model: Model, *, report: list[Change] | None = None) -> Model:
    """Undoes :func:`replace`: every dlkit layer that has a twin in torch.nn becomes it, in place. Returns ``model``."""
    return _change(model, {twin: original for original, twin in TWINS.items()}, "is torch's layer again", report)


def _change(
    model: Model,
    table: dict[type[torch.nn.Module], type[torch.nn.Module]],
    reason: str,
    report: list[Change] | None,
) -> Model:
    changes = []
    for name, module in model.named_modules():
        before = type(module)
        related = next((cls for cls in table if isinstance(module, cls)), None)
        if related is None or before in table.values():
            continue
        if before is not related:
            left = f"it is a subclass of {related.__module__}.{related.__qualname__}, which may do something else"
            changes.append(Change(name, before, before, left))
        elif "forward" in vars(module):
            changes.append(Change(name, before, before, "its forward was replaced on the instance"))
        else:
            module.__class__ = table[before]
            changes.append(Change(name, before, table[before], reason))
    if report is not None:
        report.extend(changes)
    return model
