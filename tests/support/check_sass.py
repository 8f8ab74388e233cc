"""Static checks of compiled CUDA kernels, no GPU needed: architectures, spills, registers, 128-bit global accesses.

    python check_sass.py build/lib/dlkit/_C.so --arch sm_80 sm_90 --ptx 120

reads the machine code that cuobjdump prints. A kernel spills where it uses local memory (LDL, STL or a stack frame).
Kernels say in their name whether they are a fast path: template arguments (T, PackBytes, ...), the second of which is
the number of bytes that one memory instruction moves. With PackBytes = 16 a kernel must hold 128-bit global loads (LDG
or, to shared memory, LDGSTS) and 128-bit stores (STG). With any other second argument it is no fast path. Every kernel
has launch bounds, and registers for a block of that many threads: no launch can ask for too many (the CUDA-on-CPU
harness refuses blocks beyond the bounds).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REGISTERS = 1 << 16  # of a multiprocessor; a thread gets a multiple of 8


@dataclass
class Kernel:
    arch: str
    name: str
    threads: int = 0  # the most in a block, by its launch bounds; 0 without them
    registers: int = 0
    shared: int = 0
    stack: int = 0
    loads: int = 0
    stores: int = 0
    local: int = 0

    @property
    def fast(self) -> bool:
        arguments = re.search(r"<(.*)>$", self.name)
        return arguments is not None and arguments[1].split(", ")[1:2] == ["16"]


def find_cuobjdump() -> str:
    """cuobjdump from PATH, the CUDA toolkit, or the installed triton package."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=f"{home}/bin")
    triton = importlib.util.find_spec("triton")
    if not found and triton and triton.origin:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    if not found:
        sys.exit("check_sass: no cuobjdump on PATH, in the CUDA toolkit or in the triton package (pip install triton)")
    return found


def demangle(names: list[str]) -> list[str]:
    """Kernel names without namespaces, return type and parameters: `forward_rows<BFloat16, 16, 32, 4>`."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = (re.sub(r"\(anonymous namespace\)::|\([\w:]+\)(?=\d)", "", line) for line in text.splitlines())
    return [re.sub(r"\w+::", "", re.sub(r"^void |\(.*\)$", "", line)) for line in short]


def read_kernels(binary: Path, cuobjdump: str) -> list[Kernel]:
    """One Kernel for every kernel and architecture in the binary."""

    def dump(option: str) -> str:
        return subprocess.run([cuobjdump, option, str(binary)], capture_output=True, text=True, check=True).stdout

    kernels: dict[tuple[str, str], Kernel] = {}
    arch, kernel = "", None
    for line in dump("-sass").splitlines():
        if match := re.match(r"\s*code for (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            kernel = kernels[arch, match[1]] = Kernel(arch, match[1])
        elif kernel and (match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)((?:\.\w+)*)", line)):
            kernel.loads += match[1] in ("LDG", "LDGSTS") and ".128" in match[2]
            kernel.stores += match[1] == "STG" and ".128" in match[2]
            kernel.local += match[1] in ("LDL", "STL")
    function = ""
    for line in dump("-res-usage").splitlines():  # it names no architecture where there is only one
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):$", line):
            function = match[1]
        elif (match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)) and (arch, function) in kernels:
            kernel = kernels[arch, function]
            kernel.registers, kernel.stack, kernel.shared = (int(value) for value in match.groups())
    # The ELF notes. cuobjdump prints all bytes beside them, too much to keep in memory.
    with subprocess.Popen([cuobjdump, "-elf", str(binary)], stdout=subprocess.PIPE, text=True, errors="replace") as elf:
        attribute = ""
        for line in elf.stdout or ():
            if match := re.search(r"^64-bit ELF: .*\bsm=(\d+\w*)", line):
                arch = f"sm_{match[1]}"
            elif match := re.match(r"\.nv\.info\.(\S+)$", line):
                function = match[1]
            elif match := re.match(r"\s*Attribute:\s+(\w+)", line):
                attribute = match[1]
            elif attribute == "EIATTR_MAX_THREADS" and (match := re.match(r"\s*Value:\s+(.*\S)", line)):
                kernels[arch, function].threads = math.prod(int(side, 16) for side in match[1].split())
    found = list(kernels.values())
    for kernel, name in zip(found, demangle([kernel.name for kernel in found]), strict=True):
        kernel.name = name
    return sorted(found, key=lambda kernel: (kernel.arch, kernel.name))


def problems(kernels: list[Kernel], expected: list[str]) -> list[str]:
    """One sentence for each problem; empty where there is none."""
    if not kernels:
        return ["there is no kernel in the binary"]
    present = {kernel.arch for kernel in kernels}
    wrong = [f"no machine code for {arch}" for arch in expected if arch not in present]
    for kernel in kernels:
        where = f"{kernel.name} on {kernel.arch}"
        if kernel.local or kernel.stack:
            wrong.append(f"{where} spills: {kernel.local} local-memory accesses, {kernel.stack} bytes of stack")
        if not kernel.threads:
            wrong.append(f"{where} has no launch bounds")
        elif -(-kernel.registers // 8) * 8 * kernel.threads > REGISTERS:
            wrong.append(f"{where} has {kernel.registers} registers, too many for {kernel.threads} threads")
        if kernel.fast and not kernel.loads:
            wrong.append(f"{where} has no 128-bit global load")
        if kernel.fast and not kernel.stores:
            wrong.append(f"{where} has no 128-bit global store")
    if not any(kernel.fast for kernel in kernels):
        wrong.append("no kernel has a second template argument of 16, so no fast path was checked")
    return wrong


def has_ptx(binary: Path, cuobjdump: str, arch: str) -> bool:
    listing = subprocess.run([cuobjdump, "-lptx", str(binary)], capture_output=True, text=True, check=True).stdout
    return f"sm_{arch}." in listing


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks the CUDA kernels in a binary without a GPU.")
    parser.add_argument("binary", type=Path, help="a .so, .o or .cubin")
    parser.add_argument("--arch", nargs="*", default=[], help="architectures that must be there, such as sm_80 sm_90")
    parser.add_argument("--ptx", help="architecture whose PTX must be there, such as 120")
    parser.add_argument("--quiet", action="store_true", help="print the summary only")
    options = parser.parse_args()
    cuobjdump = find_cuobjdump()
    kernels = read_kernels(options.binary, cuobjdump)
    wrong = problems(kernels, options.arch)
    if options.ptx and not has_ptx(options.binary, cuobjdump, options.ptx):
        wrong.append(f"no PTX for sm_{options.ptx}")
    if not options.quiet:
        columns = ("threads", "registers", "shared", "stack", "loads", "stores")
        print(f"{'arch':8}{'kernel':48}" + "".join(f"{column:>10}" for column in columns) + "  (128-bit)")
        for kernel in kernels:
            values = "".join(f"{getattr(kernel, column):10}" for column in columns)
            print(f"{kernel.arch:8}{kernel.name:48}{values}" + ("  fast path" if kernel.fast else ""))
    for sentence in wrong:
        print(f"check_sass: {sentence}", file=sys.stderr)
    fast = sum(kernel.fast for kernel in kernels)
    archs = ", ".join(sorted({kernel.arch for kernel in kernels}))
    print(f"{len(kernels)} kernels ({fast} fast paths) for {archs or 'no architecture'}: {len(wrong)} problems")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
