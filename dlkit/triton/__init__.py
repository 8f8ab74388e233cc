"""The Triton backend: each op's kernels in a file of its own, under the names and signatures of the C++ ops.

Needs triton, so dlkit imports it only where triton is wanted.
"""

from __future__ import annotations

import torch

from . import batch_norm, bias_act_dropout, cross_entropy, dropblock2d, dropout, layer_norm, optim

FUNCTIONS = {
    **layer_norm.FUNCTIONS,
    **batch_norm.FUNCTIONS,
    **dropout.FUNCTIONS,
    **bias_act_dropout.FUNCTIONS,
    **dropblock2d.FUNCTIONS,
    **cross_entropy.FUNCTIONS,
    **optim.FUNCTIONS,
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
