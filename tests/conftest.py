"""Fresh memory is NaN in every test: an element a kernel did not write cannot pass. Inputs differ between tests."""

import os
import zlib

import pytest
import torch
from support import backends

from dlkit import _C

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true",
        help="two cases of each test, with this processor's best kernels; none that is slow, aot or distributed",
    )  # fmt: skip


def pytest_report_header():
    here, elsewhere = (", ".join(one.name for one in some) or "none" for some in (backends.HERE, backends.ELSEWHERE))
    return f"backends: {here}; not on this machine: {elsewhere}"


def pytest_make_parametrize_id(val):
    """Shapes and dtypes as people write them: 2x3x4, float32, bfloat16/float32 for an input and its parameters."""
    if isinstance(val, torch.dtype):
        return str(val).removeprefix("torch.")
    if isinstance(val, tuple) and val and all(isinstance(one, torch.dtype) for one in val):
        return "/".join(pytest_make_parametrize_id(one) for one in val)
    if isinstance(val, tuple) and val and all(type(one) is int for one in val):
        return "x".join(map(str, val))
    return None


def pytest_collection_modifyitems(config, items):
    """Marks tests by their names and files. The longest run first, to let the processes finish together."""
    for item in items:
        if "backend" in item.fixturenames:
            item.add_marker("kernel")
        if any(getattr(value, "__module__", "") == "support.processes" for value in vars(item.module).values()):
            item.add_marker("distributed")
    items.sort(key=lambda item: item.get_closest_marker("aot") is None)
    if config.getoption("quick"):
        chosen = quick(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


def quick(items):
    """The last two cases of each test, since the first of several sizes or layouts is usually the plainest."""
    best = f"cpu-{_C.cpu_capability()}"
    cases = {}
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if any(item.get_closest_marker(name) for name in ("slow", "aot", "distributed")):
            continue
        if backend is None or backend.name == best:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return {item for some in cases.values() for item in some[-2:]}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed(request):
    """DLKIT_TEST_SEED=n gives every test different inputs; the seed is shown with a failure."""
    value = zlib.crc32(request.node.nodeid.encode()) + int(os.environ.get("DLKIT_TEST_SEED", "0"))
    torch.manual_seed(value)
    return value


@pytest.fixture(params=backends.HERE, ids=lambda backend: backend.name)
def backend(request):
    """Every backend of this machine's hardware; the CPU's kernels count once for each instruction set."""
    if request.param.missing:
        pytest.skip(request.param.missing)
    with request.param.active():
        yield request.param


@pytest.fixture
def one_thread():
    """One thread: beside other work, two threads take seconds for small tensors when one of them waits for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
