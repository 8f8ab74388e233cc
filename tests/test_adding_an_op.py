"""docs/adding_an_op.md: the files of its small example op compile unchanged."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = dict(
    re.findall(
        r"^`((?:csrc|dlkit)/[\w/.]+)`[^\n]*(?:\n[^\n]+)*\n\n```\w+\n(.*?)^```",
        (ROOT / "docs/adding_an_op.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
)
KERNELS = {
    "cpu.cpp": ["-std=c++20"],
    "cuda.cu": ["-std=c++20", "-DDLKIT_CUDA_ON_CPU", f"-I{ROOT}/tests/support/cuda_on_cpu", "-xc++"],
}


def test_the_files_are_all_there():
    folder, name = "csrc/relu_squared", "relu_squared.py"
    wanted = {f"{folder}/{file}" for file in ("kernel.h", "cpu.cpp", "cuda.cu", "op.cpp")}
    assert set(FILES) == wanted | {f"dlkit/triton/{name}", f"dlkit/functional/_{name}", f"dlkit/nn/{name}"}
    for path, text in FILES.items():
        if path.endswith(".py"):
            compile(text, path, "exec")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("file", KERNELS)
def test_kernels_compile(tmp_path, file):
    (tmp_path / "common").symlink_to(ROOT / "csrc/common")
    folder = tmp_path / "relu_squared"
    folder.mkdir()
    for path, text in FILES.items():
        if path.startswith("csrc/"):
            (folder / Path(path).name).write_text(text)
    subprocess.run(["g++", "-fsyntax-only", "-Wno-psabi", *KERNELS[file], str(folder / file)], check=True)
