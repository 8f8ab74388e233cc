"""The full recipe: a residual network with everything that the course has shown to help."""

from functools import partial
from typing import Any

from torch import nn

from dlkit.lab import augment, models, report
from dlkit.lab.experiment import QUICK_IMAGES, Configuration, Setting
from dlkit.lab.experiments.schedules import warm_up_cosine

ORDER = 190
SUMMARY = (
    "a residual network with BatchNorm, He, dropout, AdamW, warm-up + cosine, clipping, label smoothing, EMA and flips"
)
LOOK_AT = "how long the validation accuracy rises, while the learning rate falls."
BATCH = 128


def average(decay: float) -> list[Any]:
    """EMA of weights and statistics; validation and checkpoints are of the averages."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    return [EMAWeightAveraging(decay=decay)]


def ema(setting: Setting, images: int | None = None) -> Any:
    """An average over about half an epoch, whatever the number of steps in one."""
    count = min(images or 10**9, len(setting.data.train_images), QUICK_IMAGES if setting.quick else 10**9)
    return partial(average, round(1 - 2 / max(4, count // BATCH), 4))


def decayed(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for weights of matrix products and convolutions, not for biases and norms."""
    matrices = [param for param in model.parameters() if param.dim() > 1]
    others = [param for param in model.parameters() if param.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]


def smoothed() -> nn.Module:
    return nn.CrossEntropyLoss(label_smoothing=0.1)


def mirrored(setting: Setting) -> bool:
    """Whether images may be mirrored: clothes may, but a mirrored digit is no digit."""
    return setting.data.name == "Fashion-MNIST"


def recipe(setting: Setting, name: str = "recipe", images: int | None = None, **changes: Any) -> Configuration:
    """The configuration. `changes` replace the parts that the ablation takes away."""
    parts: dict[str, Any] = {
        "model": partial(models.ResidualNet, dropout=0.2),
        "optimizer": "AdamW",
        "lr": 3e-3,
        "parameters": decayed,
        "schedule": warm_up_cosine,
        "max_norm": 1.0,
        "loss": smoothed,
        "augment": augment.flip if mirrored(setting) else None,
        "callbacks": ema(setting, images),
        "epochs": 12,
        "batch_size": BATCH,
        "images": images,
    }
    return Configuration(name, **{**parts, **changes})


def configurations(setting: Setting) -> list[Configuration]:
    return [recipe(setting)]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    run = results.first("recipe")
    epochs = range(1, len(run.history) + 1)
    left, middle, right = figure.subplots(1, 3)
    report.columns(left, run, {"train_loss": 1, "val_loss": 0})
    report.tidy(left, "loss, with label smoothing", "epoch", "nats")
    report.columns(middle, run, {"train_accuracy": 1, "val_accuracy": 0})
    report.tidy(middle, "accuracy of the averaged weights", "epoch")
    known = [value for name in ("train_accuracy", "val_accuracy") for value in run.column(name)[1:]]
    if known:  # the average of the first epoch is mostly of the start
        middle.set_ylim(min(known) - 0.01, max(known) + 0.01)
    right.plot(epochs, run.column("lr"), marker=".", color="gray")
    report.tidy(right, "learning rate at the epoch's end", "epoch")
