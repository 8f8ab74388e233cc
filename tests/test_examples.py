"""The scripts in examples/ run, each in its own process and with tiny settings, and print the expected text."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# script: its arguments, a library that it needs, text that it prints
EXAMPLES = {
    "training_loop": ("--steps 3 --batch 16 --width 32", None, r"now dlkit\.nn\.layer_norm\.LayerNorm.*accuracy 0\.\d"),
    "cnn": ("--steps 1 --batch 2 --size 32", "torchvision", "17 BatchNorm layers fused, 3 left.*restored: 20 layers"),
    "transformer": ("--steps 2 --batch 2 --width 16", "transformers", r"12 layers replaced.*averaged weights \d"),
    "ddp": ("--steps 2 --batch 8", None, "equal in all processes: True"),
    "checkpoint": ("--steps 3", None, r"difference from torch throughout: (0\.00e\+00|\d\.\d\de-(0[7-9]|1\d))"),
}
# transformers imports torchvision too, whose wheel may be for another build of torch.
AFTER_TORCHVISION = """
import runpy, sys
import support.torchvision_models
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    arguments, library, promised = EXAMPLES[name]
    if library and not importlib.util.find_spec(library):
        pytest.skip(f"{library} is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    start = ["-c", AFTER_TORCHVISION] if importlib.util.find_spec("torchvision") and library else []
    command = [sys.executable, *start, str(ROOT / "examples" / f"{name}.py"), *arguments.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(promised, done.stdout, re.DOTALL), done.stdout
