"""Training recipes on real data: the same model with torch.nn's layers and with dlkit's, side by side.

This file is only the command line, and imports nothing heavy, so that `python -m dlkit --help` stays quick.
A recipe is a module here with `run(args)`; a new one adds a line to RECIPES.
"""

import argparse
import importlib
import importlib.util

RECIPES = ("fashion_mnist",)
MODELS = ("mlp", "transformer", "batch_norm_mlp", "residual_cnn")  # as in models.py

# What the optional extra dlkit[lab] installs: import name -> package name.
PACKAGES = {"matplotlib": "matplotlib", "numpy": "numpy", "pooch": "pooch", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {value}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--data", metavar="DIR", help="folder with the data set's files (default: search, see README)")
    parser.add_argument("--model", choices=(*MODELS, "all"), default="all")
    parser.add_argument("--epochs", type=_positive, metavar="N", help="default: set per model to fit in 3 minutes")
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="default: set per model")
    parser.add_argument("--limit", type=_positive, metavar="N", help="training images to use; default: set per model")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the initial weights and the batches")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    parser.add_argument("--output", default="lab-results", metavar="DIR", help="for the plot and the figures")


def main(args: argparse.Namespace) -> int:
    """Runs a recipe and returns the exit status; a user's mistake ends it with one sentence (SystemExit)."""
    missing = [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"dlkit lab needs {', '.join(missing)}: run  pip install {' '.join(missing)}")
    importlib.import_module(f"{__name__}.{args.recipe}").run(args)
    return 0
