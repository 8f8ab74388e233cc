"""Six kinds of dropout in one small residual CNN, each where it belongs."""

from functools import partial
from typing import Any

from torch import nn

from dlkit.lab import models, report
from dlkit.lab.data import Dataset
from dlkit.lab.experiment import Configuration, Setting

ORDER = 120
SUMMARY = "standard, 2d, alpha (with SELU), DropConnect, DropBlock and DropPath in one CNN"
LOOK_AT = "the gap between training (dashed) and validation accuracy: which kinds narrow it, and what that costs."
FIGURE_SIZE = (13, 5)
RATE = 0.2
WIDTH = 32


def network(data: Dataset, kind: str) -> nn.Module:
    """A stem, two residual blocks with half the side each, a dense layer; dropout by its kind.

    Standard, 2d, alpha and DropBlock stand after each block, DropPath on its branch, DropConnect in the dense layer.
    Networks of SELUs keep their own scale and have no BatchNorm.
    """
    activation: Any = nn.SELU if kind in ("alpha", "SELU alone") else nn.ReLU
    self_normalizing = activation is nn.SELU

    def norm() -> list[nn.Module]:
        return [] if self_normalizing else [nn.BatchNorm2d(WIDTH)]

    def branch() -> list[nn.Module]:
        convolution = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=self_normalizing)
        return [convolution, *norm(), activation(), *([models.DropPath(RATE)] if kind == "DropPath" else [])]

    after_blocks: dict[str, Any] = {
        "standard": partial(nn.Dropout, RATE),
        "2d": partial(nn.Dropout2d, RATE),
        "alpha": partial(nn.AlphaDropout, RATE / 2),
        "DropBlock": partial(models.DropBlock2d, RATE, 3),
    }

    def drop() -> list[nn.Module]:
        return [after_blocks[kind]()] if kind in after_blocks else []

    side = min(data.image_size) // 4
    dense: Any = partial(models.DropConnectLinear, p=RATE) if kind == "DropConnect" else nn.Linear
    model = nn.Sequential(
        nn.Unflatten(1, (1, -1)),
        nn.Conv2d(1, WIDTH, 3, padding=1, bias=self_normalizing),
        *norm(),
        activation(),
        nn.MaxPool2d(2),
        models.Residual(*branch()),
        *drop(),
        nn.MaxPool2d(2),
        models.Residual(*branch()),
        *drop(),
        nn.Flatten(),
        dense(WIDTH * side**2, 64),
        activation(),
        nn.Linear(64, data.classes),
    )
    if self_normalizing:
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    return model


KINDS = ("none", "standard", "2d", "DropConnect", "DropBlock", "DropPath", "SELU alone", "alpha")


def configurations(setting: Setting) -> list[Configuration]:
    return [
        Configuration(kind, partial(network, kind=kind), lr=1e-3, images=5_000, batch_size=64, epochs=10)
        for kind in KINDS
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    report.curves(left, results, "val_accuracy")
    report.curves(left, results, "train_accuracy", label=lambda name: "", linestyle="--", marker="", alpha=0.6)
    report.tidy(left, "accuracy: training dashed, validation solid", "epoch")
    left.legend(frameon=False, ncols=2)
    for row, name in enumerate(results.names):
        train, validation = (results.mean(name, column) for column in ("train_accuracy", "val_accuracy"))
        color = report.COLORS[row]
        right.plot([validation, train], [row, row], color=color, linewidth=2)
        right.plot(validation, row, "o", color=color)
        right.plot(train, row, "o", color=color, markerfacecolor="white")
    right.set_yticks(range(len(results.names)), results.names)
    right.invert_yaxis()
    report.tidy(right, "after the last epoch: validation full, training hollow", "accuracy")
