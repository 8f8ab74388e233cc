"""LayerNorm and dropout 0.15: one of them, both, and none: 3,000 steps by AdamW at 3e-4."""

from functools import partial
from typing import Any

from torch import nn

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 60
SUMMARY = "with and without LayerNorm, with and without dropout 0.15: 3,000 steps by AdamW"
LOOK_AT = "what each changes alone and what both change: speed on the left, the end on the right."
FIGURE_SIZE = (15, 4.5)


def configurations(setting: Setting) -> list[Configuration]:
    steps = partial(Configuration, optimizer="AdamW", lr=3e-4, batch_size=128, epochs=20, epoch_steps=150)
    return [
        steps("neither", models.mlp),
        steps("LayerNorm", partial(models.mlp, norm=nn.LayerNorm)),
        steps("dropout", partial(models.mlp, dropout=0.15)),
        steps("both", partial(models.mlp, norm=nn.LayerNorm, dropout=0.15)),
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    panels = figure.subplots(1, 3)
    for axes, (column, title) in zip(
        panels,
        (("train_loss", "training loss"), ("val_loss", "validation loss"), ("val_accuracy", "validation accuracy")),
        strict=True,
    ):
        report.curves(axes, results, column, x=report.steps)
        report.tidy(axes, title, "step", "nats" if "loss" in column else "")
    panels[-1].legend(frameon=False, loc="lower right")
