"""The form of an experiment: the runs that it compares, each a Configuration, and the Setting of the command line.

An experiment is a module in dlkit/lab/experiments/, found by itself. It has

    ORDER           its place in the course, a number
    SUMMARY         one line that names what it compares
    LOOK_AT         the part of the figure to look at
    configurations  (setting) -> the list of Configuration to train
    draw            (figure, results, setting) -> None, draws into a matplotlib Figure

and, where the defaults do not fit,

    SEEDS           how many seeds it takes unless --seeds says otherwise; 1
    QUICK_SEEDS     the same of --quick; 1
    METRIC          the column of the table, ("val_accuracy", "max")
    FIGURE_SIZE     in inches
    finish          (results, setting) -> lines below the table
    search          (setting, make, say) -> the runs, where what they showed decides what comes next, in place of
                    configurations; make(configuration=, layers=, seed=) gives a Run. See search.py
    run             (setting) -> (text, the second argument of draw), instead of configurations: for what is no
                    training of runs one after the other

Nothing here, and nothing that an experiment imports at its top, is heavy: `lab --help` lists them all.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from dlkit.lab.data import Dataset

# The size of a training with --quick.
QUICK_EPOCHS = 3
QUICK_IMAGES = 1_000
QUICK_STEPS = 10  # of an "epoch" of epoch_steps


@dataclass(frozen=True)
class Setting:
    """The options of the command line. `layers` are those to train: ("dlkit",), ("torch",) or both."""

    data: "Dataset"
    layers: tuple[str, ...] = ("dlkit",)
    seeds: int = 1
    epochs: int | None = None
    device: str = "cpu"
    strategy: str = "ddp"
    devices: int = 1
    precision: str = "32-true"
    output: Path = Path("lab-results")
    quick: bool = False


@dataclass(frozen=True)
class Configuration:
    """One of the runs that an experiment compares.

    Everything callable is named in the run's config.yaml, so it is a function or a functools.partial of one.

    Args:
        name: in the legend, the table and the folder.
        model: (data) -> a model of torch.nn's layers, which maps a batch of inputs to logits (or forecasts).
        optimizer: the name of a class in torch.optim and dlkit.optim, with `lr` and `options` its arguments.
        parameters: (model) -> what the optimizer gets, if not model.parameters().
        max_norm: the norm to which gradients are clipped.
        schedule: (optimizer, steps of the whole training) -> a scheduler of torch.optim, called each step; one that
            looks at the validation loss (ReduceLROnPlateau) each epoch.
        epochs: 0: nothing is trained, only `probe` looks.
        epoch_steps: the number of steps of an epoch, if that is not one pass over the data.
        images: the number of training images, the same ones for every seed.
        loss: makes the criterion; () -> module(outputs, targets).
        metrics: (data) -> name -> torchmetrics.Metric(outputs, targets); None: the accuracy.
        augment: (inputs, targets) -> (inputs, targets), of each training batch, drawn by torch's generator.
        patience: stop early after so many epochs without a lower validation loss.
        data: (data) -> the data of this run, made from those of the command line.
        probe: (model, data) -> what json can hold, asked before the training and after it, in training mode.
        callbacks: () -> further Lightning callbacks.
        precision: of Lightning's Trainer; None: the command line's.
        convert: turn the model into dlkit's where the command line says so; False: leave it.
    """

    name: str
    model: Callable[["Dataset"], nn.Module]
    optimizer: str = "AdamW"
    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)
    parameters: Callable[[nn.Module], Iterable[Any]] | None = None
    max_norm: float | None = None
    schedule: Callable[..., Any] | None = None
    epochs: int = 10
    epoch_steps: int | None = None
    batch_size: int = 128
    images: int | None = None
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    metrics: Callable[["Dataset"], dict[str, Any]] | None = None
    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    patience: int | None = None
    data: Callable[["Dataset"], "Dataset"] | None = None
    probe: Callable[[nn.Module, "Dataset"], Any] | None = None
    callbacks: Callable[[], list[Any]] | None = None
    precision: str | None = None
    convert: bool = True


def describe(value: Any) -> Any:
    """A value as config.yaml holds it: a function by its name, a partial by its name and arguments."""
    if isinstance(value, functools.partial):
        arguments = [str(describe(each)) for each in value.args]
        arguments += [f"{name}={describe(each)}" for name, each in value.keywords.items()]
        return f"{describe(value.func)}({', '.join(arguments)})"
    if isinstance(value, dict):
        return {str(name): describe(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [describe(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def names() -> list[str]:
    """The experiments, in the order of the course."""
    return [module.__name__.rsplit(".", 1)[1].replace("_", "-") for module in _modules()]


def load(name: str) -> ModuleType:
    return importlib.import_module(f"dlkit.lab.experiments.{name.replace('-', '_')}")


@functools.cache
def _modules() -> Sequence[ModuleType]:
    package = importlib.import_module("dlkit.lab.experiments")
    found = [
        importlib.import_module(f"{package.__name__}.{each.name}") for each in pkgutil.iter_modules(package.__path__)
    ]
    return sorted(found, key=lambda module: module.ORDER)
