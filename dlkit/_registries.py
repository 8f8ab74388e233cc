"""dlkit's layers in the tables of libraries that look layers up by their exact class.

A table is filled when its library is imported, before dlkit or after it. Without the entries torch.ao.quantization
finds nothing to fuse. Opacus refuses BatchNorm, which mixes samples that should stay private, and would not recognize
dlkit's.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import itertools
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from dlkit.fusion import ACTING, FUSED
from dlkit.surgery import TWINS, restore

fused = (*FUSED.values(), *ACTING.values())


def _quantization(mappings: ModuleType) -> None:
    """For fuse_modules() and fuse_modules_qat(), which turn dlkit's layers into torch's fused ones."""
    table = mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD
    for classes, fuser in list(table.items()):
        norm = next((cls for cls in classes if cls in FUSED), None)
        if norm is None:
            continue

        def fuse(is_qat: bool, *layers: torch.nn.Module, fuser: Callable[..., Any] = fuser) -> Any:
            return fuser(is_qat, *map(restore, layers))

        def refuse(is_qat: bool, *layers: Any) -> Any:
            next(layer for layer in layers if type(layer) in fused)._refuse("torch.ao.quantization")

        table[tuple(TWINS.get(cls, cls) for cls in classes)] = fuse
        for relu, cls_fused in itertools.product((torch.nn.ReLU, torch.nn.Identity), (FUSED[norm], ACTING[norm])):
            swapped = {norm: cls_fused, torch.nn.ReLU: relu}
            table[tuple(swapped.get(cls, cls) for cls in classes)] = refuse


def _privacy_validators(validators: ModuleType) -> None:
    validator = validators.ModuleValidator
    for original, twin in TWINS.items():
        if original in validator.VALIDATORS:
            validator.VALIDATORS[twin] = validator.VALIDATORS[original]
        if original in validator.FIXERS:
            validator.FIXERS[twin] = _restoring(validator.FIXERS[original])
    for original, taken in (*FUSED.items(), *ACTING.items()):
        if original in validator.VALIDATORS:
            validator.VALIDATORS[taken] = validator.VALIDATORS[original]
            validator.FIXERS[taken] = lambda layer, **_: layer._refuse("opacus")


def _restoring(fix: Callable[..., Any]) -> Callable[..., Any]:
    return lambda layer, **options: fix(restore(layer), **options)


def _privacy_gradients(grad_sample: ModuleType) -> None:
    samplers = grad_sample.GradSampleModule.GRAD_SAMPLERS
    samplers.update({twin: samplers[original] for original, twin in TWINS.items() if original in samplers})


def _compilers(registry: ModuleType) -> None:
    """torch.compile's backends, by name. An installed dlkit is found by its entry points too, before it is imported."""
    for name in ("dlkit", "dlkit_inductor"):
        point = importlib.metadata.EntryPoint(name, f"dlkit.dynamo:{name}", "torch_dynamo_backends")
        registry._BACKENDS.setdefault(name, point)


TABLES: dict[str, Callable[[ModuleType], None]] = {
    "torch._dynamo.backends.registry": _compilers,
    "torch.ao.quantization.fuser_method_mappings": _quantization,
    "opacus.validators": _privacy_validators,
    "opacus.grad_sample": _privacy_gradients,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of TABLES as the other finders do, and fills their tables once they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in TABLES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            TABLES[fullname](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    for name, fill in TABLES.items():
        if name in sys.modules:
            fill(sys.modules[name])
    sys.meta_path.insert(0, _Finder())
