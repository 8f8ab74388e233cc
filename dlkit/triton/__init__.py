"""The Triton backend: each op's kernels in a file of its own, under the names and signatures of the C++ ops.

Needs triton, so dlkit imports it only where triton is wanted.
"""

from __future__ import annotations

import importlib
import pkgutil

import torch

# The functions of each file without an underscore.
FUNCTIONS = {
    name: function
    for module in pkgutil.iter_modules(__path__)
    if not module.name.startswith("_")
    for name, function in importlib.import_module(f"{__name__}.{module.name}").FUNCTIONS.items()
}

_libraries: list[torch.library.Library] = []  # a registration lasts as long as its Library


def register(library_name: str = "dlkit", dispatch_key: str = "CUDA") -> None:
    """Makes the Triton functions the implementation of ``torch.ops.<library_name>.*`` for ``dispatch_key``.

    The ops themselves must be defined already. Call it once per key.
    """
    library = torch.library.Library(library_name, "IMPL", dispatch_key)
    for name, function in FUNCTIONS.items():
        library.impl(name, function)
    _libraries.append(library)
