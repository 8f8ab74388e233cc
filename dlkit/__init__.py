"""Fused layers and optimizers for PyTorch: drop-ins that are faster, use less memory and give the same results.

import dlkit
model = dlkit.replace(model)   # norms, dropouts and losses get dlkit's kernels, in place
opt = dlkit.optim.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)   # clipping and AdamW in one pass over memory
"""

import importlib
from types import ModuleType

from dlkit import _backends

_backends.load()

from dlkit import (  # noqa: E402  (the ops exist only once the library is loaded)
    _registries,
    functional,
    nn,
    optim,
    random,
)
from dlkit._adopt import register  # noqa: E402
from dlkit._override import override, patch  # noqa: E402
from dlkit._reach import report  # noqa: E402
from dlkit.fusion import fuse  # noqa: E402
from dlkit.memory import reuse_cpu_memory  # noqa: E402
from dlkit.surgery import Change, replace, restore  # noqa: E402

_registries.register()


def __getattr__(name: str) -> ModuleType:
    if name == "init":  # loaded when first asked for
        return importlib.import_module("dlkit.init")
    raise AttributeError(f"module 'dlkit' has no attribute {name!r}")


__version__ = "0.2.0"
__all__ = [
    "Change",
    "__version__",
    "functional",
    "fuse",
    "init",
    "nn",
    "optim",
    "override",
    "patch",
    "random",
    "register",
    "replace",
    "report",
    "restore",
    "reuse_cpu_memory",
]
