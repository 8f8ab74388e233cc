"""Fresh memory is NaN in every test: an element a kernel did not write cannot pass. Inputs differ between tests."""

import os
import zlib

import pytest
import torch
from support import backends

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores


def pytest_collection_modifyitems(items):
    """Tests that take a backend are marked. The longest come first, so that the processes finish together."""
    for item in items:
        if "backend" in item.fixturenames:
            item.add_marker("kernel")
    items.sort(key=lambda item: "test_triton_aot" not in item.nodeid)


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed(request):
    """DLKIT_TEST_SEED=n gives every test other inputs; the seed is shown with a failure."""
    value = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("DLKIT_TEST_SEED", "0"))
    torch.manual_seed(value)
    return value


@pytest.fixture(params=backends.ALL, ids=lambda backend: backend.name)
def backend(request):
    """Every backend that can run here; the CPU's kernels count once for each instruction set."""
    if request.param.missing:
        pytest.skip(request.param.missing)
    with request.param.active():
        yield request.param


@pytest.fixture
def one_thread():
    """Where other work runs, two threads of which one waits for a core take seconds for small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
