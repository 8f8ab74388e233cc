"""Installing and loading: every failure gives one sentence with the cause and the command that mends it."""

import importlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

import dlkit
from dlkit import _C, _backends

ROOT = Path(__file__).parents[1]


def build(tmp_path, *, torch_module=None, root=ROOT, **environment):
    """Runs setup.py build_ext with `torch_module` in place of torch; returns (exit status, output)."""
    if torch_module is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(torch_module)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), **environment}
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def fake_torch(version, cuda):
    return f"""
import types
__version__ = {version!r}
version = types.SimpleNamespace(cuda={cuda!r})
"""


def fake_utils(tmp_path):
    utils = tmp_path / "torch" / "utils"
    utils.mkdir(parents=True)
    (utils / "__init__.py").touch()
    (utils / "cpp_extension.py").write_text("def include_paths(): return []\ndef library_paths(): return []\n")
    (tmp_path / "torch").joinpath("__init__.py").touch()


def fake_nvcc(folder, release):
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n")
    nvcc.chmod(0o755)
    (folder / "include").mkdir()
    (folder / "include" / "cuda_runtime.h").touch()
    return str(folder)


def assert_one_sentence(output, *parts):
    lines = [line for line in output.splitlines() if line.startswith("dlkit: ")]
    assert len(lines) == 1, output
    for part in parts:
        assert part in lines[0], lines[0]
    assert "Traceback" not in output


def test_without_torch(tmp_path):
    status, output = build(tmp_path, torch_module="raise ImportError('none here')")
    assert status != 0
    assert_one_sentence(output, "torch is not installed", "pip install torch && pip install --no-build-isolation .")


def test_with_an_old_torch(tmp_path):
    status, output = build(tmp_path, torch_module=fake_torch("2.9.1+cpu", None))
    assert status != 0
    assert_one_sentence(output, "torch 2.9.1+cpu is too old, 2.10 or newer", "pip install --upgrade 'torch>=2.10'")


def test_with_an_old_setuptools(tmp_path):
    command = tmp_path / "setuptools" / "command"
    command.mkdir(parents=True)
    (command / "__init__.py").touch()
    (command / "build_ext.py").write_text("build_ext = object")
    (tmp_path / "setuptools" / "__init__.py").write_text(
        "import sys; sys.modules['wheel'] = None; __version__ = '65.5.0'; Command = Extension = setup = object"
    )
    status, output = build(tmp_path)
    assert status != 0
    assert_one_sentence(output, "setuptools 65.5.0 cannot make a wheel", "pip install --upgrade 'setuptools>=70.1'")


CUDA_CASES = {
    "torch without CUDA": (
        ("2.13.0+cpu", None),
        "13.0",
        ["needs a CUDA build of torch, found 2.13.0+cpu", "DLKIT_BUILD=cpu"],
    ),
    "nvcc of another major": (("2.13.0+cu130", "13.0"), "12.4", ["is of CUDA 12.4", "of CUDA 13.0", "CUDA_HOME="]),
}


@pytest.mark.parametrize("case", CUDA_CASES)
def test_cuda_asked_for_and_impossible(tmp_path, case):
    (version, cuda), release, parts = CUDA_CASES[case]
    fake_utils(tmp_path)
    (tmp_path / "torch" / "__init__.py").write_text(fake_torch(version, cuda))
    home = fake_nvcc(tmp_path / "toolkit", release)
    status, output = build(tmp_path, DLKIT_BUILD="cuda", CUDA_HOME=home)
    assert status != 0
    assert_one_sentence(output, *parts)


def test_cuda_asked_for_without_nvcc(tmp_path):
    fake_utils(tmp_path)
    (tmp_path / "torch" / "__init__.py").write_text(fake_torch("2.13.0+cu130", "13.0"))
    status, output = build(tmp_path, DLKIT_BUILD="cuda", CUDA_HOME=str(tmp_path / "nowhere"))
    assert status != 0
    assert_one_sentence(output, "needs nvcc", "install the CUDA 13.0 toolkit")


@pytest.mark.slow
def test_unknown_build_kind_and_architecture(tmp_path):
    status, output = build(tmp_path, DLKIT_BUILD="gpu")
    assert status != 0
    assert_one_sentence(output, "DLKIT_BUILD=gpu is not one of auto, cpu, cuda")


FAKE_COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in
    -o) touch "$2";;
    -MF) echo "object: csrc/common/scalar.h" > "$2";;
  esac
  shift
done
"""


@pytest.mark.slow
def test_a_second_torch_takes_the_kernels_that_the_first_one_made(tmp_path):
    root, compiler = tmp_path / "tree", tmp_path / "compiler"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "dlkit").mkdir()
    shutil.copy(ROOT / "dlkit" / "__init__.py", root / "dlkit")  # holds the version
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(0o755)
    fake_utils(tmp_path)

    def compiled(version):
        """Names of the compiled sources."""
        (tmp_path / "torch" / "__init__.py").write_text(fake_torch(version, None))
        status, output = build(
            tmp_path, root=root, DLKIT_BUILD="cpu", CXX=str(compiler), MAX_JOBS="1", DLKIT_VERBOSE="1"
        )
        assert status == 0, output
        commands = [line.split() for line in output.splitlines() if str(compiler) in line and " -c " in line]
        return [Path(command[command.index("-c") + 1]).name for command in commands]

    first = compiled("2.13.0+cpu")
    second = compiled("2.14.0+cpu")
    assert "cpu.cpp" in first and second == [name for name in first if name != "cpu.cpp"] == ["torch_1.cpp"]
    assert compiled("2.13.0+cpu") == compiled("2.14.0+cpu") == []
    (root / "csrc" / "common" / "scalar.h").touch()
    assert compiled("2.14.0+cpu").count("cpu.cpp") == first.count("cpu.cpp")


@pytest.fixture
def setup_script(monkeypatch):
    """The names that setup.py defines."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    return runpy.run_path("setup.py")["cpu_capabilities"].__globals__


AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@pytest.mark.parametrize(
    ("processor", "wanted", "chosen"),
    [
        ({"sse2"}, "native", ([], "default")),
        (AVX2, "native", (["avx2"], "avx2")),
        (AVX2 | {"avx512f"}, "native", (["avx2"], "avx2")),
        (AVX512, "native", (["avx2", "avx512"], "avx512")),
        (AVX512 | {"avx512bf16"}, "native", (["avx2", "avx512", "avx512_bf16"], "avx512_bf16")),
        (set(), "native", (["avx2", "avx512", "avx512_bf16"], None)),  # a processor that does not say
        (AVX2, "all", (["avx2", "avx512", "avx512_bf16"], None)),
        (AVX2, "baseline", ([], None)),
    ],
)
def test_kernels_are_built_for_this_processor(setup_script, monkeypatch, processor, wanted, chosen):
    monkeypatch.setenv("DLKIT_CPU_KERNELS", wanted)
    monkeypatch.setitem(setup_script, "processor_flags", lambda: processor)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert setup_script["cpu_capabilities"]() == chosen
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert setup_script["cpu_capabilities"]() == ([], None)


def test_the_build_and_the_library_read_the_processor_alike(setup_script, monkeypatch):
    monkeypatch.setenv("DLKIT_CPU_KERNELS", "native")
    _, best = setup_script["cpu_capabilities"]()
    assert best in (None, _C.processor_capability())
    assert list(_backends.CAPABILITIES[1:]) == list(setup_script["CPU_CAPABILITIES"])


OTHER_SETS = _backends.CAPABILITIES[_backends.CAPABILITIES.index(_C.processor_capability()) + 1 :]


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not shutil.which("g++"), reason="needs g++ for x86"
)
@pytest.mark.parametrize("op", sorted(path.parent.name for path in (ROOT / "csrc").glob("*/cpu.cpp")))
@pytest.mark.parametrize("capability", OTHER_SETS)
def test_kernels_for_other_processors_compile(setup_script, capability, op):
    flags = [*setup_script["CPU_CAPABILITIES"][capability], f"-DDLKIT_ISA={capability}", "-std=c++20", "-Wno-psabi"]
    subprocess.run(["g++", "-fsyntax-only", *flags, f"csrc/{op}/cpu.cpp"], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("built_for", "processor", "warns"),
    [
        ("avx2", "avx2", False),
        ("avx2", "default", False),
        (None, "avx512_bf16", False),
        ("avx2", "avx512", True),
        ("default", "avx2", True),
    ],
)
def test_a_better_processor_than_the_one_of_the_build(built_for, processor, warns):
    message = _backends.left_out_kernels(built_for, processor)
    assert (message is not None) == warns
    assert not warns or (built_for in message and processor in message and "run: DLKIT_CPU_KERNELS=all pip" in message)


@pytest.mark.slow
@pytest.mark.skipif(_C.processor_capability() == "default", reason="needs a processor with AVX2")
def test_import_warns_on_a_better_processor():
    code = """
import sys
from importlib.util import module_from_spec, spec_from_file_location

spec = spec_from_file_location("dlkit._build_facts", sys.argv[1])
facts = sys.modules["dlkit._build_facts"] = module_from_spec(spec)
spec.loader.exec_module(facts)
facts.BUILD_CAPABILITY = "default"
import dlkit
"""
    path = importlib.import_module("dlkit._build_facts").__file__
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning: dlkit's CPU kernels were built on a processor that has at most default") == 1


@pytest.mark.parametrize(
    ("built", "found", "problem"),
    [
        (("2.13.0+cpu", None), ("2.13.0+cpu", None), None),
        (("2.13.0+cpu", None), ("2.13.0+cu130", "13.0"), None),
        (("2.13.0+cpu", None), ("2.12.1+cpu", None), "built against torch 2.13.0+cpu, found torch 2.12.1+cpu"),
        (("2.13.0+cu130", "13.0"), ("2.13.0+cpu", None), "with CUDA 13.0, found torch 2.13.0+cpu with CUDA absent"),
    ],
)
def test_torch_changed_under_the_library(built, found, problem):
    message = _backends.mismatch(*built, *found)
    assert (message is None) == (problem is None)
    assert problem is None or (problem in message and "run: pip install" in message)


@pytest.mark.slow
def test_import_says_so(tmp_path):
    """Imports the whole package, with build facts of another torch."""
    package = tmp_path / "dlkit"
    shutil.copytree(ROOT / "dlkit", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_build_facts.py").write_text("TORCH_VERSION = '2.9.0+cpu'\nCUDA_VERSION = None\n")
    for facts, text in ((True, "built against torch 2.9.0+cpu, found"), (False, "compiled part is missing")):
        if not facts:
            (package / "_build_facts.py").write_text("raise ImportError")
        done = subprocess.run(
            [sys.executable, "-c", "import dlkit"], cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )  # fmt: skip
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode != 0 and text in last and "run: pip install" in last, done.stderr


def run_dlkit(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "dlkit", *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.slow
def test_info():
    done = run_dlkit("info")
    assert done.returncode == 0, done.stderr
    words = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for start in (f"torch {torch.__version__}", "CPU kernels", "CUDA kernels", "layer_norm cpu C++"):
        assert any(line.startswith(start) for line in words), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "avx2"])
def test_instruction_set_can_be_lowered(name):
    done = run_dlkit("info", DLKIT_CPU_CAPABILITY=name)
    assert f"CPU kernels   {name} in use" in done.stdout


@pytest.mark.slow
def test_native_backend_leaves_everything_to_torch():
    code = (
        "import torch, dlkit; x = torch.randn(3, 5, requires_grad=True)\n"
        "a, b = dlkit.functional.layer_norm(x, (5,)), torch.nn.functional.layer_norm(x, (5,))\n"
        "assert torch.equal(a, b) and a.grad_fn.name() == b.grad_fn.name() == 'NativeLayerNormBackward0', a.grad_fn\n"
        "y, total = dlkit.functional.add_rms_norm(x, x, (5,)); assert torch.equal(total, x + x)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "DLKIT_BACKEND": "native"}
    )
    assert done.returncode == 0, done.stderr
    assert "DLKIT_BACKEND=native" in run_dlkit("info", DLKIT_BACKEND="native").stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cuda", "nonsense"])
def test_backend_that_cannot_be(name):
    if name == "cuda" and _backends.cuda_architectures():
        pytest.skip("this build has CUDA kernels")
    done = run_dlkit("info", DLKIT_BACKEND=name)
    assert done.returncode != 0 and f"DLKIT_BACKEND={name}" in done.stderr.strip().splitlines()[-1]


def test_pre_commit_and_docs_use_the_tools_of_make_lint():
    pinned = dict(line.split("==") for line in (ROOT / "lint-requirements.txt").read_text().split() if "==" in line)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = dict(re.findall(r"repo: \S+/(?:mirrors-)?(\S+?)(?:-pre-commit)?\n\s+rev: v(\S+)", hooks))
    assert found == {name: pinned[name] for name in ("ruff", "clang-format")}
    assert re.search(r"ruff==([\d.]+)", (ROOT / "pyproject.toml").read_text())[1] == pinned["ruff"]


def metadata_with(torch_folder, **environment):
    """Version and requirements that setup.py reports with the torch in this folder."""
    code = "import sys, runpy, setuptools; kept = {}; setuptools.setup = kept.update; sys.argv = ['setup.py']"
    code += "; runpy.run_path('setup.py'); print(kept['version'], *kept['install_requires'])"
    env = {**os.environ, "PYTHONPATH": str(torch_folder), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_version_and_requirement_name_the_torch_it_is_built_against(tmp_path):
    folder = tmp_path / "torch"
    folder.mkdir()
    (folder / "__init__.py").touch()
    assert metadata_with(tmp_path) == [dlkit.__version__, "torch>=2.10"]  # as without torch
    facts = "from typing import Optional\n__version__ = '2.12.1+cu130'\ncuda: Optional[str] = '13.0'\n"
    (folder / "version.py").write_text(facts)
    nvcc = fake_nvcc(tmp_path / "cuda", "13.1")
    with_cuda = metadata_with(tmp_path, DLKIT_BUILD="cuda", CUDA_HOME=nvcc)
    assert with_cuda == [f"{dlkit.__version__}+torch2.12.cu130", "torch==2.12.1"]
    without = metadata_with(tmp_path, DLKIT_BUILD="cpu")
    assert without == [f"{dlkit.__version__}+torch2.12.cpu", "torch==2.12.1"]
