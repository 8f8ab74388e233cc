"""BatchNorm in an MLP: with and without, plain SGD, batches of 128, 15 epochs."""

from functools import partial
from typing import Any

from torch import nn

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 20
SUMMARY = "an MLP 784-256-128-64-10 with and without BatchNorm, plain SGD"
LOOK_AT = "how much further the loss is after the first epochs with BatchNorm, at the same learning rate."


def configurations(setting: Setting) -> list[Configuration]:
    plain = partial(Configuration, optimizer="SGD", lr=0.01, batch_size=128, epochs=15)
    return [
        plain("without", models.mlp),
        plain("with BatchNorm", partial(models.mlp, norm=nn.BatchNorm1d)),
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    report.loss_and_accuracy(figure, results)
