"""dlkit's layers and optimizers inside the libraries people use. A file whose library is not installed is skipped.

make test-integration installs the libraries. Nothing is downloaded: models come from configurations, data from seeds.
"""

import os
import sys

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
os.environ.setdefault("TQDM_DISABLE", "1")

import support.models  # noqa: F401  (torchvision must load before transformers imports it)


def pytest_collection_modifyitems(items):
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # the libraries' own, many and not about dlkit


@pytest.fixture(autouse=True)
def small(one_thread):
    """One thread for all tests, since their tensors are tiny."""


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Resets Accelerate, which keeps precision, device and accumulation of a process's first Accelerator."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
