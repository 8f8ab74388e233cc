"""Ten ways against overfitting, one at a time and all together, on the same small CNN and few images."""

from functools import partial
from typing import Any

from torch import nn

from dlkit.lab import augment, models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 130
SUMMARY = "weight decay, L2, label smoothing, Mixup, CutMix, cutout, augmentation, early stopping, dropout; and all"
LOOK_AT = (
    "the gap between the two bars of each row, and whether a smaller gap also is a higher validation accuracy: "
    "the two are not the same."
)
FIGURE_SIZE = (11, 5)
IMAGES = 4_000


def configurations(setting: Setting) -> list[Configuration]:
    classes = setting.data.classes
    plain = partial(
        Configuration, model=models.small_cnn, optimizer="AdamW", lr=2e-3, options={"weight_decay": 0.0}, epochs=15,
        batch_size=64, images=IMAGES,
    )  # fmt: skip
    smoothing = partial(nn.CrossEntropyLoss, label_smoothing=0.1)
    dropout = partial(models.small_cnn, dropout=0.3)
    return [
        plain("none"),
        plain("weight decay 0.1", options={"weight_decay": 0.1}),
        plain("L2 0.001", optimizer="Adam", options={"weight_decay": 0.001}),
        plain("label smoothing 0.1", loss=smoothing),
        plain("Mixup", augment=partial(augment.mixup, classes=classes)),
        plain("CutMix", augment=partial(augment.cutmix, classes=classes)),
        plain("cutout", augment=augment.erase),
        plain("rotation, zoom, contrast", augment=augment.shake),
        plain("early stopping", patience=2),
        plain("dropout 0.3", model=dropout),
        plain(
            "all together",
            model=dropout,
            options={"weight_decay": 0.1},
            loss=smoothing,
            augment=partial(augment.everything, classes=classes),
            patience=8,
        ),
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    axes, gaps = figure.subplots(1, 2, width_ratios=(1.6, 1), sharey=True)
    rows = range(len(results.names))
    train = [results.mean(name, "train_accuracy") for name in results.names]
    val = [results.mean(name, "val_accuracy") for name in results.names]
    axes.barh([row - 0.19 for row in rows], train, 0.36, color=report.COLORS[4], label="training")
    axes.barh([row + 0.19 for row in rows], val, 0.36, color=report.COLORS[0], label="validation")
    for row, value in zip(rows, val, strict=True):
        axes.text(value, row + 0.19, f"{value:.3f} ", ha="right", va="center", color="white", fontsize=8)
    axes.axvline(val[0], color="gray", linewidth=0.8, linestyle=":")
    axes.set_yticks(rows, results.names)
    axes.invert_yaxis()
    low = min(train + val)
    axes.set_xlim(max(0.0, low - 0.25 * (1 - low)), 1.0)
    report.tidy(axes, "accuracy after the last epoch, both in evaluation mode")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    gaps.barh(rows, [100 * (a - b) for a, b in zip(train, val, strict=True)], 0.6, color=report.COLORS[1])
    report.tidy(gaps, "gap, percentage points")
