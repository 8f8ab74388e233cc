"""python -m dlkit info | bench | lab | report"""

import argparse
import importlib
import os
import platform
import sys

COMMANDS = {
    "info": "versions, what was built in, and which backend serves each op on each device",
    "bench": "measure ops against torch eager, torch.compile and installed peers",
    "report": "which norms and dropouts of a model dlkit's kernels do, which not, and why",
    "lab": "experiments on training deep networks, on real data",
}


def info() -> None:
    import torch

    import dlkit
    from dlkit import _backends

    facts = importlib.import_module("dlkit._build_facts")

    cuda = ", ".join(_backends.cuda_architectures()) or "none"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    built = f"torch {facts.TORCH_VERSION}"
    if facts.CUDA_VERSION:
        built += f", CUDA {facts.CUDA_VERSION}"
    rows = [
        ("dlkit", f"{dlkit.__version__}, built against {built}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'absent'}, GPU: {gpu}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("CPU kernels", f"{_backends.cpu_capability()} in use, {torch.get_num_threads()} threads"),
        ("CUDA kernels", cuda),
        ("triton", "installed" if _backends.has_triton() else "not installed"),
    ]
    for name, value in rows:
        print(f"{name:<14}{value}")
    print()
    serving = {device: _backends.serving(device) for device in ("cpu", "cuda")}
    width = max(len(backend) for backend, _ in serving.values()) + 2
    ops = _backends.ops()
    name_width = max(map(len, ops)) + 2
    for op in ops:
        for device, (backend, reason) in serving.items():
            print(f"{op:<{name_width}}{device:<6}{backend:<{width}}{reason}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dlkit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    wanted = next((argument for argument in sys.argv[1:] if argument in COMMANDS), None)
    homes = {"report": "dlkit._reach"}  # dlkit.report is a function
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == wanted and name != "info":
            importlib.import_module(homes.get(name, f"dlkit.{name}")).add_arguments(command)
    arguments = parser.parse_args()
    if arguments.command == "info":
        info()
        return 0
    home = homes.get(arguments.command, f"dlkit.{arguments.command}")
    return importlib.import_module(home).main(arguments) or 0


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, for example `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
