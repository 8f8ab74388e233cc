"""The CUDA-on-CPU harness refuses launches that a device would refuse."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = r"""
#include "launch.cuh"

using namespace dlkit::cuda;

namespace {

template <int Threads>
__global__ void __launch_bounds__(Threads) kernel(int* counter) {
  __shared__ float values[256];  // 1 KB
  values[threadIdx.x % 256] = 1;
  if (threadIdx.x == 0) *counter += int(values[0]);
}

int ran = 0;

void report(cudaError_t error) { std::printf("%s\n", cudaGetErrorString(error)); }

void tell(dim3 grid, dim3 block, size_t shared) {
  try {
    launch("kernel", kernel<256>, grid, block, shared, nullptr, &ran);
    report(cudaSuccess);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}

}  // namespace

int main() {
  for (const size_t shared : {47 << 10, (47 << 10) + 16}) {  // nobody asked for more
    cuda_on_cpu::launch(kernel<512>, 1, 512, shared, &ran);
    report(cudaGetLastError());
  }
  const size_t most = current_device().shared_per_block;
  tell(1, 256, most - (1 << 10));
  tell(1, 256, most - (1 << 10) + 16);
  tell(1, 257, 0);
  tell(dim3(1, 65535), 32, 0);
  tell(dim3(1, 65536), 32, 0);
  std::printf("%zu %d\n", most >> 10, ran);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    (folder / "program.cu").write_text(PROGRAM)
    includes = [f"-I{ROOT / part}" for part in ("csrc/common/cuda", "tests/support/cuda_on_cpu")]
    command = ["g++", "-std=c++20", "-DDLKIT_CUDA_ON_CPU", *includes, "-xc++", "program.cu", "-o", "program", "-ldl"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "program"


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "most"), [("80", 163), ("90", 227), ("100", 227), ("120", 99)])
def test_limits(program, arch, most):
    environment = {"DLKIT_CUDA_ON_CPU_ARCH": arch}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "no error",
        "invalid argument",
        "no error",
        "dlkit: kernel failed: invalid argument",
        "dlkit: kernel failed: too many resources requested for launch",
        "no error",
        "dlkit: kernel failed: invalid configuration argument",
        f"{most} {1 + 1 + 65535}",
    ]
