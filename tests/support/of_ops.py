"""The data that tests of all ops need of each op. Tables in the op's own test file have it, and a new op adds its own:

OP_ARGUMENTS {op: arguments by position that fit, with every optional tensor}, for test_arguments.py OP_CALLS {name:
(function of (F, *tensors), shapes, torch's way to the same)}, for calls.py OP_RANDOM {name: (function of (F, *tensors,
**generator), shapes)}, the same for random ones OP_LAYERS {class: (arguments, shapes of the inputs)}, for layers.py and
test_saved_tensors.py aot_cases a function of (file of dlkit/triton, dtype), for triton_aot.py
"""

import importlib
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]


def table(name: str) -> dict[str, Any]:
    """The merged tables of that name in tests/test_<op>.py, for each <op> that is a folder of csrc/."""
    merged: dict[str, Any] = {}
    for folder in sorted((TESTS.parent / "csrc").iterdir()):
        if not (TESTS / f"test_{folder.name}.py").exists():
            continue
        module = importlib.import_module(f"test_{folder.name}")
        if getattr(module.__spec__, "_initializing", False):
            raise ImportError(f"{module.__name__} imports what reads its tables: import that in the test")
        found = getattr(module, name, {})
        assert not merged.keys() & found.keys(), f"{name} of {module.__name__}: {merged.keys() & found.keys()} again"
        merged |= found
    return merged
