"""Five optimizers on the MLP and on a small CNN: 10,000 images, at most 15 epochs, stopped early.

The learning rates are the customary ones, not tuned for each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from dlkit.lab import models, report
from dlkit.lab.data import Dataset
from dlkit.lab.experiment import Configuration, Setting

ORDER = 40
SUMMARY = "SGD, SGD with momentum, RMSprop, Adam and AdamW, on the MLP and on a CNN"
LOOK_AT = "how soon each falls and where it stops; a curve ends where 3 epochs brought no lower validation loss."
FIGURE_SIZE = (11, 8)

OPTIMIZERS: dict[str, tuple[str, float, dict[str, float]]] = {
    "SGD": ("SGD", 0.01, {}),
    "momentum": ("SGD", 0.01, {"momentum": 0.9}),
    "RMSprop": ("RMSprop", 1e-3, {}),
    "Adam": ("Adam", 1e-3, {}),
    "AdamW": ("AdamW", 1e-3, {"weight_decay": 0.01}),
}
MODELS: dict[str, Callable[[Dataset], nn.Module]] = {
    "MLP": partial(models.mlp, norm=nn.BatchNorm1d),
    "CNN": models.small_cnn,
}


def configurations(setting: Setting) -> list[Configuration]:
    return [
        Configuration(
            f"{model}, {name}", make, kind, lr, dict(options), images=10_000, batch_size=64, epochs=15, patience=3
        )
        for model, make in MODELS.items()
        for name, (kind, lr, options) in OPTIMIZERS.items()
    ]


def short(name: str) -> str:
    return name.split(", ")[1]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    panels = figure.subplots(2, 2)
    for row, model in enumerate(MODELS):
        for column, (metric, title) in enumerate(
            (("train_loss", "training loss"), ("val_accuracy", "validation accuracy"))
        ):
            axes = panels[row][column]
            for color, name in zip(report.COLORS, OPTIMIZERS, strict=False):
                # The curves of Adam and AdamW coincide: one is dashed.
                style: dict[str, Any] = {"color": color, "linestyle": "--" if name == "AdamW" else "-"}
                report.curves(axes, results, metric, [f"{model}, {name}"], label=short, **style)
            report.tidy(axes, f"{model}: {title}", "epoch" if row else "", "nats" if column == 0 else "")
        panels[row][0].set_yscale("log")
    panels[0][1].legend(frameon=False, loc="lower right")
