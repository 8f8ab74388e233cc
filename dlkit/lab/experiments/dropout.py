"""Dropout in the same MLP: 0.3, 0.3 and 0.2 after its hidden layers, and none; Adam, 20 epochs."""

from functools import partial
from typing import Any

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 30
SUMMARY = "the MLP with dropout 0.3/0.3/0.2 and without, Adam"
LOOK_AT = "the gap between training (dashed) and validation accuracy (solid), both in evaluation mode."


def configurations(setting: Setting) -> list[Configuration]:
    plain = partial(Configuration, optimizer="Adam", lr=1e-3, batch_size=128, epochs=20)
    return [
        plain("without", models.mlp),
        plain("dropout", partial(models.mlp, dropout=(0.3, 0.3, 0.2))),
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    left, right = figure.subplots(1, 2)
    report.curves(left, results, "val_accuracy")
    report.curves(left, results, "train_accuracy", label=lambda name: "", linestyle="--", marker="")
    report.tidy(left, "accuracy: training dashed, validation solid", "epoch")
    left.legend(frameon=False)
    for name, color in zip(results.names, report.COLORS, strict=False):
        rows = results.first(name).history
        gap = [row["train_accuracy"] - row["val_accuracy"] for row in rows]
        right.plot(range(1, len(gap) + 1), gap, marker=".", color=color, label=name)
    right.axhline(0, color="gray", linewidth=0.8)
    report.tidy(right, "gap: training - validation accuracy", "epoch")
