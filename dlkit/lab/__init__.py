"""The classic experiments on training deep networks, each one command, on dlkit's layers and optimizers.

Without the name of an experiment it lists them, in the order of a course. Lightning trains, TensorBoard logs,
torchmetrics measures, matplotlib draws.
"""

import argparse
import importlib
import importlib.util

from dlkit.lab import experiment

# The packages of the optional extra dlkit[lab], by their import names.
PACKAGES = (
    "captum",
    "kornia",
    "lightning",
    "matplotlib",
    "numpy",
    "optuna",
    "pooch",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "tqdm",
    "yaml",
)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choices = (*experiment.names(), "all")
    parser.add_argument("experiment", nargs="?", choices=choices, metavar="EXPERIMENT", help="one of the list, or all")
    parser.add_argument("--data", metavar="DIR", help="folder with Fashion-MNIST's files, or digits (default: search)")
    parser.add_argument("--layers", choices=("dlkit", "torch", "both"), default="dlkit", help="both: also compare them")
    parser.add_argument("--seeds", type=_positive, metavar="N", help="trainings of each configuration")
    parser.add_argument("--epochs", type=_positive, metavar="N", help="of each training (default: the experiment's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="ddp", help="for more devices than one")
    parser.add_argument(
        "--devices", type=_positive, default=1, metavar="N", help="processes; each takes part of a batch"
    )
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), default="32-true")
    parser.add_argument("--output", metavar="DIR", help="default: lab-results, with --quick lab-results-quick")
    parser.add_argument("--quick", action="store_true", help="a few epochs on part of the data, digits unless --data")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")


def main(args: argparse.Namespace) -> int:
    """Runs an experiment and returns the exit status. A user's mistake raises SystemExit with one sentence."""
    if args.experiment is None:
        width = max(map(len, experiment.names()))
        for name in experiment.names():
            print(f"{name:<{width}}  {experiment.load(name).SUMMARY}")
        return 0
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"dlkit lab needs {', '.join(missing)}: run  pip install 'dlkit[lab]'")
    try:
        course = importlib.import_module(f"{__name__}.course")
    except (ImportError, RuntimeError) as error:
        # torchmetrics imports torchvision where there is one, and one built for another torch raises.
        raise SystemExit(
            f"dlkit lab: a package cannot be imported ({error}). If it was built for another torch, as torchvision "
            "often is, install one for this torch or uninstall it"
        ) from error
    status: int = course.run(args)
    return status
