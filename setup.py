"""Builds dlkit._C against the installed torch. Metadata is in pyproject.toml; the files to build are found in csrc/.

DLKIT_BUILD=auto|cpu|cuda, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CUDA_HOME, CXX, CXXFLAGS and LDFLAGS are honoured.
DLKIT_VERBOSE=1 prints every command with the compiler's output; DLKIT_CCACHE=0 turns ccache and sccache off. Every
csrc/*/cpu.cpp is compiled once per instruction set, and the best is chosen at run time: for those that this machine's
processor has, with DLKIT_CPU_KERNELS=all for every one, with DLKIT_CPU_KERNELS=baseline only for the lowest.
DLKIT_SEPARATE=1 compiles each file that includes torch on its own, for work on one of them. torch is imported only when
something is compiled: metadata and the sdist need none. The version is dlkit.__version__ with the torch and device of
the build, as in 0.2.0+torch2.13.cpu, and a wheel requires that torch: it does not load with another.
"""

import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import setuptools
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

MINIMUM_SETUPTOOLS = (70, 1)  # the first that makes wheels on its own
MINIMUM_TORCH = (2, 10)
DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
CUDA_ARCHITECTURE_NAMES = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}
CPU_CAPABILITIES = {  # each has the instructions of those before it
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
CPU_CAPABILITIES["avx512_bf16"] = [*CPU_CAPABILITIES["avx512"], "-mavx512bf16", "-DDLKIT_BF16_ONLY"]
# -O3 compiles half as long again, to copy loops, which the kernels do themselves where it pays.
KERNEL_FLAGS = ["-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# g++'s -O2 vectorizes few loops without the first two, and leaves branches that hold for a whole loop inside it without
# the third, which takes 5 % more time; clang's needs none of them. The other two turn off passes that take a sixth of
# the time and find nothing in these loops.
GCC_KERNEL_FLAGS = ["-ftree-vectorize", "-fvect-cost-model=dynamic", "-funswitch-loops"]
GCC_KERNEL_FLAGS += ["-fno-tree-vrp", "-fno-thread-jumps"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
GCC_WARNINGS, CLANG_WARNINGS = ["-Wno-maybe-uninitialized"], ["-Wno-unknown-pragmas"]
INSTALL = "pip install --no-build-isolation ."


def stop(cause: str, remedy: str) -> None:
    sys.exit(f"\ndlkit: {cause}; {remedy}\n")


def version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+\.\d+", version).group().split("."))


def check_setuptools() -> None:
    if version_tuple(setuptools.__version__) < MINIMUM_SETUPTOOLS and find_spec("wheel") is None:
        needed = ".".join(map(str, MINIMUM_SETUPTOOLS))
        stop(
            f"setuptools {setuptools.__version__} cannot make a wheel, {needed} or newer is needed",
            f"run: pip install --upgrade 'setuptools>={needed}' && {INSTALL}",
        )


def import_torch():
    try:
        import torch
    except ImportError:
        stop("torch is not installed in the environment that builds dlkit", f"run: pip install torch && {INSTALL}")
    if version_tuple(torch.__version__) < MINIMUM_TORCH:
        needed = ".".join(map(str, MINIMUM_TORCH))
        stop(
            f"torch {torch.__version__} is too old, {needed} or newer is needed",
            f"run: pip install --upgrade 'torch>={needed}' && {INSTALL}",
        )
    return torch


def find_cuda_home() -> Path | None:
    nvcc = shutil.which("nvcc")
    set_by_user = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = str(Path(nvcc).resolve().parent.parent) if nvcc else None
    candidates = [set_by_user] if set_by_user else [on_path, "/usr/local/cuda"]
    # The headers too: an nvcc on PATH may be a wrapper that lies elsewhere.
    needed = ("bin/nvcc", "include/cuda_runtime.h")
    found = (Path(path) for path in candidates if path and all((Path(path) / part).exists() for part in needed))
    return next(found, None)


def nvcc_version(cuda_home: Path) -> str:
    output = subprocess.run(
        [cuda_home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"release (\d+\.\d+)", output)
    return match.group(1) if match else "unknown"


@functools.cache  # prints its message only once
def choose_cuda(torch_version: str, torch_cuda: str | None) -> Path | None:
    """The CUDA toolkit to build with, or None for a build without CUDA."""
    wanted = os.environ.get("DLKIT_BUILD", "auto")
    if wanted not in ("auto", "cpu", "cuda"):
        stop(f"DLKIT_BUILD={wanted} is not one of auto, cpu, cuda", f"run: DLKIT_BUILD=auto {INSTALL}")
    if wanted == "cpu":
        return None
    home = find_cuda_home()
    if torch_cuda is None:
        cause = f"DLKIT_BUILD=cuda needs a CUDA build of torch, found {torch_version}"
        remedy = f"install one (https://pytorch.org/get-started) or run: DLKIT_BUILD=cpu {INSTALL}"
    elif home is None:
        cause = "DLKIT_BUILD=cuda needs nvcc, and none is on PATH, in $CUDA_HOME or in /usr/local/cuda"
        remedy = f"install the CUDA {torch_cuda} toolkit or run: DLKIT_BUILD=cpu {INSTALL}"
    elif nvcc_version(home).split(".")[0] != torch_cuda.split(".")[0]:
        cause = f"nvcc in {home} is of CUDA {nvcc_version(home)}, torch {torch_version} of CUDA {torch_cuda}"
        remedy = f"run: CUDA_HOME=<CUDA {torch_cuda} toolkit> {INSTALL}"
    else:
        return home
    if wanted == "cuda":
        stop(cause, remedy)
    if torch_cuda is not None:
        print(f"dlkit: building without CUDA kernels (Triton serves GPUs): {cause}; {remedy}", file=sys.stderr)
    return None


def metadata() -> dict[str, Any]:
    """Version and requirement, which name the torch of this environment where something is built with it."""
    source = Path(__file__).with_name("dlkit") / "__init__.py"
    version = re.search(r'^__version__ = "(.+)"', source.read_text(), re.MULTILINE).group(1)
    torch = find_spec("torch")
    facts = Path(torch.origin).with_name("version.py") if torch and torch.origin else Path()
    if "sdist" in sys.argv or not facts.is_file():
        return {"version": version, "install_requires": ["torch>=" + ".".join(map(str, MINIMUM_TORCH))]}
    found = dict(re.findall(r"^(__version__|cuda)\b.* = '(.+)'", facts.read_text(), re.MULTILINE))
    release, cuda = found["__version__"].split("+")[0], found.get("cuda")
    kernels = f"cu{cuda.replace('.', '')}" if cuda and choose_cuda(found["__version__"], cuda) else "cpu"
    local = f"torch{release.rpartition('.')[0]}.{kernels}"
    return {"version": f"{version}+{local}", "install_requires": [f"torch=={release}"]}


def cuda_architectures() -> list[str]:
    text = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES
    for name, numbers in CUDA_ARCHITECTURE_NAMES.items():
        text = text.replace(name, numbers)
    architectures = [part for part in re.split(r"[;,\s]+", text) if part]
    for part in architectures:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", part):
            stop(
                f"TORCH_CUDA_ARCH_LIST has {part!r}, expected entries like 9.0 or 9.0+PTX", f"run: unset it; {INSTALL}"
            )
    return architectures


def gencode(architectures: list[str]) -> list[str]:
    flags = []
    for part in architectures:
        number = part.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if part.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cpu_capabilities() -> tuple[list[str], str | None]:
    """The instruction sets to compile kernels for beyond the baseline, and the best if this processor's were chosen."""
    wanted = os.environ.get("DLKIT_CPU_KERNELS", "native")
    if wanted not in ("native", "all", "baseline"):
        stop(f"DLKIT_CPU_KERNELS={wanted} is not one of native, all, baseline", f"run: unset it; {INSTALL}")
    if wanted == "baseline" or platform.machine() not in ("x86_64", "AMD64"):
        return [], None
    found = processor_flags()
    if wanted == "all" or not found:
        return [*CPU_CAPABILITIES], None
    needed = {name: {flag[2:] for flag in flags if flag[:2] == "-m"} for name, flags in CPU_CAPABILITIES.items()}
    chosen = [name for name, flags in needed.items() if flags <= found]
    return chosen, chosen[-1] if chosen else "default"


def processor_flags() -> set[str]:
    """What this machine's processor can do, as compilers name it; empty where that is not known."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^flags\s*:(.*)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return set(match.group(1).replace("avx512_bf16", "avx512bf16").split()) if match else set()


def is_current(object_file: Path, command: list[str]) -> bool:
    """Whether object_file is newer than all it was made from and was made by this command."""
    record, dependencies = object_file.with_suffix(".command"), object_file.with_suffix(".d")
    if not (object_file.exists() and dependencies.exists() and record.exists()):
        return False
    if record.read_text() != shlex.join(command):
        return False
    made = object_file.stat().st_mtime
    names = dependencies.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return all(Path(name).exists() and Path(name).stat().st_mtime <= made for name in names)


def find_compiler_cache() -> list[str]:
    if os.environ.get("DLKIT_CCACHE", "1") == "0":
        return []
    return next(([found] for name in ("ccache", "sccache") if (found := shutil.which(name))), [])


def total_size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


class Progress:
    """Prints one line for each finished command, and its output only if it failed or with DLKIT_VERBOSE=1."""

    def __init__(self, count: int) -> None:
        self.count, self.ended, self.began = count, 0, time.monotonic()
        self.verbose = os.environ.get("DLKIT_VERBOSE") == "1"

    def run(self, what: str, command: list[str]) -> float:
        """Runs a command and returns the seconds it took."""
        began = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        now = time.monotonic()
        if done.returncode != 0:
            sys.exit(f"\n{shlex.join(command)}\n{done.stdout}\ndlkit: {what} failed; its output is above\n")
        self.ended += 1
        if self.verbose:
            print(shlex.join(command), done.stdout, sep="\n", end="")
        print(f"[{self.ended}/{self.count}] {what}, {now - self.began:.0f} s", flush=True)
        return now - began


class Build:
    """One shared library: collects compile commands, runs those whose inputs changed side by side, links."""

    def __init__(self, name: str) -> None:
        self.torch = import_torch()
        from torch.utils.cpp_extension import include_paths, library_paths

        self.compiler = shlex.split(os.environ.get("CXX", "g++" if shutil.which("g++") else "c++"))
        if shutil.which(self.compiler[0]) is None:
            stop(f"no C++ compiler: {self.compiler[0]} was not found", f"install g++ or set CXX, then run: {INSTALL}")
        version = subprocess.run([*self.compiler, "--version"], capture_output=True, text=True).stdout
        self.is_clang = "clang" in version
        self.extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        warnings = [*WARNINGS, *(CLANG_WARNINGS if self.is_clang else GCC_WARNINGS)]
        self.cxx = [*self.compiler, "-std=c++20", "-fPIC", "-fvisibility=hidden", *warnings]
        self.torch_includes = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
        self.library_folders = [*library_paths()]
        self.libraries = ["c10", "torch", "torch_cpu"]
        self.link_flags: list[str] = []
        # Objects stay: a second build compiles only changed files. Kernels do not include torch: their objects serve
        # every one.
        variant = hashlib.sha256(shlex.join(self.extra).encode()).hexdigest()[:8] if self.extra else ""
        self.folder = Path("build", "objects", name, variant)
        self.torch_folder = Path("build", "objects", f"{name}-torch{self.torch.__version__}", variant)
        self.commands: dict[Path, list[str]] = {}
        self.sizes: dict[Path, int] = {}  # of what each object is made from

    def add(self, source: Path, command: list[str], suffix: str = "") -> None:
        parts = [source, *source.parent.glob(f"{source.stem}/*.h")]
        self.add_object(self.folder / source.with_name(f"{source.stem}{suffix}.o"), command, source, parts)

    def add_object(self, object_file: Path, command: list[str], source: Path, parts: list[Path]) -> None:
        compiled = [*command, *self.extra, "-c", str(source), "-o", str(object_file)]
        self.commands[object_file] = [*compiled, "-MMD", "-MF", str(object_file.with_suffix(".d"))]
        self.sizes[object_file] = total_size(parts)

    def add_torch_files(self, sources: list[Path], command: list[str]) -> None:
        """Sources that include torch, put together into one file or, for more than two jobs, two of like size.

        Most of each one's time goes into torch's headers and what they define.
        """
        command = [*command, *self.torch_includes]
        if os.environ.get("DLKIT_SEPARATE") == "1":
            for source in sources:
                self.add_object(self.torch_folder / source.with_suffix(".o"), command, source, [source])
            return
        files: list[list[Path]] = [[] for _ in range(1 if jobs() <= 2 else 2)]
        for source in sorted(sources, key=lambda source: source.stat().st_size, reverse=True):
            min(files, key=total_size).append(source)
        for number, members in enumerate(files, 1):
            file = self.torch_folder / f"torch_{number}.cpp"
            # Python.h asks to come first.
            lines = ["#include <Python.h>", *(f'#include "{os.path.relpath(path, file.parent)}"' for path in members)]
            text = "\n".join(lines) + "\n"
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.read_text() != text:  # its object depends on it
                file.write_text(text)
            self.add_object(file.with_suffix(".o"), command, file, members)

    def compile(self, progress: Progress) -> None:
        stale = {item: command for item, command in self.commands.items() if not is_current(item, command)}
        progress.count += len(stale)
        cache = find_compiler_cache()

        def compile_one(item: Path) -> None:
            command = stale[item]
            item.parent.mkdir(parents=True, exist_ok=True)
            source = Path(command[command.index("-c") + 1])
            seconds = progress.run(f"{source} {item.stem.partition('-')[2]}".strip(), [*cache, *command])
            item.with_suffix(".command").write_text(shlex.join(command))
            item.with_suffix(".seconds").write_text(f"{seconds:.1f}")

        # The slowest first, which leaves none of them running alone at the end: by each one's last time, else by size.
        def expected_seconds(item: Path) -> float:
            record = item.with_suffix(".seconds")
            return float(record.read_text()) if record.exists() else self.sizes[item] / 2000

        order = sorted(stale, key=expected_seconds, reverse=True)
        with ThreadPoolExecutor(jobs()) as pool:
            try:
                list(pool.map(compile_one, order))
            finally:
                pool.shutdown(cancel_futures=True)

    def link(self, output: Path) -> None:
        progress = Progress(1)
        self.compile(progress)
        output.parent.mkdir(parents=True, exist_ok=True)
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        command = [*self.compiler, *shared, *self.extra, *map(str, self.commands), "-o", str(output)]
        command += [f"-L{path}" for path in self.library_folders] + [f"-l{name}" for name in self.libraries]
        command += [*self.link_flags, *shlex.split(os.environ.get("LDFLAGS", ""))]
        progress.run(f"link {output.name}", command)


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build = Build("dlkit")
        build.libraries.append("torch_python")
        if sys.platform != "darwin" and not build.extra:  # with flags of their own, users may want to debug
            build.link_flags.append("-s")
        cuda_home = choose_cuda(build.torch.__version__, build.torch.version.cuda)
        definitions = []
        if cuda_home:
            architectures = cuda_architectures()
            definitions = ["-DDLKIT_WITH_CUDA", f'-DDLKIT_CUDA_ARCHITECTURES="{";".join(architectures)}"']
            build.torch_includes.append(f"-isystem{cuda_home / 'include'}")
            build.libraries += ["c10_cuda", "torch_cuda", "cudart"]
            build.library_folders.append(str(cuda_home / "lib64"))
            nvcc = [str(cuda_home / "bin" / "nvcc"), "-std=c++17", "-O3", "--threads=0", "--expt-relaxed-constexpr"]
            nvcc += ["-Xcompiler=-fPIC", *gencode(architectures)]

        capabilities, best_capability = cpu_capabilities()
        sets = f"-DDLKIT_CPU_SETS={len(capabilities)}"
        kernel = [*build.cxx, *KERNEL_FLAGS, *([] if build.is_clang else GCC_KERNEL_FLAGS)]
        torch_files = []
        for source in map(Path, ext.sources):
            if source.name == "cpu.cpp":
                build.add(source, [*kernel, sets], "-baseline")
                for name in capabilities:
                    build.add(source, [*kernel, *CPU_CAPABILITIES[name], f"-DDLKIT_ISA={name}"], f"-{name}")
            elif source.suffix == ".cu":
                if cuda_home:
                    build.add(source, nvcc)
            else:
                torch_files.append(source)
        build.add_torch_files(torch_files, [*build.cxx, "-O2", sets, *definitions])

        output = Path(self.get_ext_fullpath(ext.name))
        build.link(output)
        facts = {
            "TORCH_VERSION": build.torch.__version__,
            "CUDA_VERSION": build.torch.version.cuda if cuda_home else None,
            "BUILD_CAPABILITY": best_capability,  # of the processor that the kernels were chosen for
        }
        lines = ["# What dlkit._C was built against; written by setup.py."]
        lines += [f"{name} = {value!r}" for name, value in facts.items()]
        output.with_name("_build_facts.py").write_text("\n".join(lines) + "\n")

    def copy_extensions_to_source(self) -> None:
        """For editable installs: the library and the facts beside it."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built, source = Path(self.build_lib, self.get_ext_filename(ext.name)), Path(*ext.name.split("."))
            shutil.copy(built.with_name("_build_facts.py"), source.with_name("_build_facts.py"))


class BuildCudaOnCpu(Command):
    """For the tests: every op once more, as dlkit_cuda_on_cpu::*, with the CUDA kernels run by the host's compiler."""

    description = "build the CUDA kernels for the CPU, for tests without a GPU"
    user_options: ClassVar = [("output=", None, "the library to write")]

    def initialize_options(self) -> None:
        self.output = "build/cuda_on_cpu/libdlkit_cuda_on_cpu.so"

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        build = Build("cuda_on_cpu")
        definitions = ["-DDLKIT_CUDA_ON_CPU", "-DDLKIT_LIBRARY=dlkit_cuda_on_cpu"]
        # nvcc fuses a product and a sum wherever it can; here the same shows bits that depend on it.
        # -O1 compiles in three fifths of the time of -O2; it fuses only with -fexpensive-optimizations.
        flags = ["-O1", "-fexpensive-optimizations", "-ffp-contract=fast"]
        if "fma" in processor_flags():
            flags.append("-mfma")
        found = [Path(source) for source in sources()]
        for source in found:
            if source.name == "cuda.cu":
                build.add(source, [*build.cxx, *flags, *definitions, "-Itests/support/cuda_on_cpu", "-xc++"])
        ops = [source for source in found if source.name == "op.cpp"]
        build.add_torch_files(ops, [*build.cxx, "-O1", *definitions])
        build.link(Path(self.output))


def sources() -> list[str]:
    root = Path(__file__).parent
    patterns = [
        "csrc/*.cpp",
        "csrc/glue/*.cpp",
        "csrc/common/cpu/*.cpp",
        "csrc/*/op.cpp",
        "csrc/*/cpu.cpp",
        "csrc/*/cuda.cu",
    ]
    return sorted(str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern))


check_setuptools()
setup(
    **metadata(),
    license="Apache-2.0",  # pyproject.toml has one form for setuptools below 77 and another from there on
    ext_modules=[Extension("dlkit._C", sources())],
    cmdclass={"build_ext": BuildExtension, "build_cuda_on_cpu": BuildCudaOnCpu},
)
