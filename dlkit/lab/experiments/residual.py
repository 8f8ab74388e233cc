"""Plain against residual convolutional networks of 10, 20 and 40 layers, all with BatchNorm, on 5,000 images."""

from functools import partial
from typing import Any

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 100
SUMMARY = "plain against residual networks of 10, 20 and 40 layers"
LOOK_AT = (
    "how the training loss of the plain networks (dashed) rises with the depth, and that of the residual ones does not."
)
DEPTHS = (10, 20, 40)


def configurations(setting: Setting) -> list[Configuration]:
    return [
        Configuration(
            f"{kind}, {depth} layers",
            partial(models.deep_cnn, depth=depth, residual=kind == "residual"),
            optimizer="SGD",
            lr=0.05,
            options={"momentum": 0.9, "weight_decay": 1e-4},
            images=5_000,
            epochs=6,
        )
        for depth in DEPTHS
        for kind in ("plain", "residual")
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    left, right = figure.subplots(1, 2)
    for index, name in enumerate(results.names):
        style: dict[str, Any] = {
            "color": report.COLORS[index // 2],
            "linestyle": "--" if name.startswith("plain") else "-",
        }
        report.curves(left, results, "train_loss", [name], **style)
        report.curves(right, results, "val_accuracy", [name], **style)
    report.tidy(left, "training loss", "epoch", "nats")
    report.tidy(right, "validation accuracy", "epoch")
    left.legend(frameon=False)
