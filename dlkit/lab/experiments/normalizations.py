"""Batch, layer, group and instance normalization and none, in one small CNN, at batch sizes from 2 to 128.

The learning rate is proportional to the batch size, so that all runs move equally far per image.
"""

from functools import partial
from typing import Any

from torch import nn

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 110
SUMMARY = "Batch, Layer, Group, Instance norm and none in one CNN, at batch sizes 2, 8, 32 and 128"
LOOK_AT = "BatchNorm at a batch size of 2, where its statistics are those of two images."
FIGURE_SIZE = (12, 4.5)
BATCH_SIZES = (2, 8, 32, 128)


def layer_norm(channels: int) -> nn.Module:
    """Over channels and space of each image."""
    return nn.GroupNorm(1, channels)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


def instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


NORMS: dict[str, models.Layer | None] = {
    "none": None,
    "BatchNorm": nn.BatchNorm2d,
    "LayerNorm": layer_norm,
    "GroupNorm": group_norm,
    "InstanceNorm": instance_norm,
}


def configurations(setting: Setting) -> list[Configuration]:
    return [
        Configuration(
            f"{name}, batch {batch}",
            partial(models.small_cnn, norm=norm),
            optimizer="SGD",
            lr=0.1 * batch / 128,
            options={"momentum": 0.9},
            images=200 if setting.quick else 5_000,  # a batch of 2 makes many steps
            batch_size=batch,
            epochs=3,
        )
        for name, norm in NORMS.items()
        for batch in BATCH_SIZES
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    left, right = figure.subplots(1, 2)
    for color, name in zip(report.COLORS, NORMS, strict=False):
        values = [results.mean(f"{name}, batch {batch}") for batch in BATCH_SIZES]
        left.plot(range(len(BATCH_SIZES)), values, marker="o", color=color, label=name)
        losses = [results.mean(f"{name}, batch {batch}", "train_loss") for batch in BATCH_SIZES]
        right.plot(range(len(BATCH_SIZES)), losses, marker="o", color=color, label=name)
    for axes in (left, right):
        axes.set_xticks(range(len(BATCH_SIZES)), [str(batch) for batch in BATCH_SIZES])
    report.tidy(left, "validation accuracy after the last epoch", "batch size")
    report.tidy(right, "training loss of the last epoch", "batch size", "nats")
    left.legend(frameon=False)
