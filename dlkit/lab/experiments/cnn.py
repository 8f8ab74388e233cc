"""A convolutional network: two blocks (32-32, 64-64) with BatchNorm and dropout, a dense layer of 128."""

from functools import partial
from typing import Any

import torch

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 140
SUMMARY = "two blocks of convolutions with BatchNorm and dropout, AdamW, reduce-on-plateau, early stopping"
LOOK_AT = "where the learning rate falls and what the validation loss does there; which classes are taken for others."
FIGURE_SIZE = (14, 4.6)


def top_1_and_5(data: Any) -> dict[str, Any]:
    from torchmetrics.classification import MulticlassAccuracy

    plain = partial(MulticlassAccuracy, data.classes, average="micro", validate_args=False)
    return {"accuracy": plain(), "top5": plain(top_k=5)}


def reduce_on_plateau(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=0, threshold=0.01)


def configurations(setting: Setting) -> list[Configuration]:
    return [
        Configuration(
            "cnn",
            models.cnn,
            lr=1e-3,
            options={"weight_decay": 0.01},
            schedule=reduce_on_plateau,
            metrics=top_1_and_5,
            patience=3,
            epochs=8,
            batch_size=128,
        )
    ]


def confusion(run: Any) -> Any:
    """Counts [true class, given class] of the validation images, by the best checkpoint."""
    from torchmetrics.classification import MulticlassConfusionMatrix

    count = MulticlassConfusionMatrix(run.data.classes).to(run.setting.device)
    model = run.model("best")
    with torch.inference_mode():
        for images, labels in zip(run.data.test_images.split(500), run.data.test_labels.split(500), strict=True):
            count.update(model(images), labels)
    return count.compute().cpu()


def draw(figure: Any, results: Any, setting: Setting) -> None:
    run = results.first("cnn")
    loss, rate, matrix = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    epochs = range(1, len(run.history) + 1)
    report.columns(loss, run, {"train_loss": 1, "val_loss": 0})
    report.tidy(loss, "loss", "epoch", "nats")

    for column, color in (("val_accuracy", report.COLORS[0]), ("val_top5", report.COLORS[2])):
        rate.plot(epochs, run.column(column), marker=".", color=color, label=column.replace("val_", ""))
    report.tidy(rate, "validation accuracy; learning rate dotted", "epoch")
    right = rate.twinx()
    right.step(epochs, run.column("lr"), where="mid", color="gray", linestyle=":")
    right.set(yscale="log", ylabel="learning rate")
    right.spines["top"].set_visible(False)
    rate.legend(frameon=False, loc="center right")

    counts = confusion(run)
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    matrix.imshow(share, cmap="Blues", vmin=0, vmax=1)
    names = report.class_names(setting.data)
    for true in range(len(counts)):
        for given in range(len(counts)):
            if counts[true, given]:
                shade = "white" if share[true, given] > 0.5 else "black"
                matrix.text(given, true, int(counts[true, given]), ha="center", va="center", fontsize=7, color=shade)
    ticks = range(len(counts))
    matrix.set_xticks(ticks, names, rotation=45, ha="right", fontsize=8)
    matrix.set_yticks(ticks, names, fontsize=8)
    matrix.set(title="true class (row), given class (column)")


def finish(results: Any, setting: Setting) -> str:
    run = results.first("cnn")
    counts = confusion(run)
    names = report.class_names(setting.data)
    wrong = counts.clone().fill_diagonal_(0)
    worst = [divmod(int(index), len(counts)) for index in wrong.flatten().topk(3).indices]
    pairs = ", ".join(f"{names[true]} as {names[given]} {int(wrong[true, given])} times" for true, given in worst)
    best = max(run.history, key=lambda row: row["val_accuracy"])
    return (
        f"The best epoch, {int(best['epoch'])}: top-1 {best['val_accuracy']:.4f}, top-5 {best['val_top5']:.4f}. "
        f"Most often taken for another: {pairs}."
    )
