"""Learning-rate schedules of torch.optim.lr_scheduler on one MLP, and the range test that finds a learning rate."""

import contextlib
import io
import json
import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 70
SUMMARY = "constant, step, exponential, cosine, warm-up with cosine, one-cycle; a learning-rate finder"
LOOK_AT = (
    "the loss where a schedule lowers the rate: it falls at once. In the range test: where the loss is lowest, and "
    "where it rises again."
)
FIGURE_SIZE = (12, 8)
LR = 0.1

Optimizer = torch.optim.Optimizer


def step(optimizer: Optimizer, steps: int) -> Any:
    """A tenth of the rate after half of the training, and again after three quarters."""
    return lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4], gamma=0.1)


def exponential(optimizer: Optimizer, steps: int) -> Any:
    """Down to a hundredth at the end."""
    return lr_scheduler.ExponentialLR(optimizer, 0.01 ** (1 / steps))


def cosine(optimizer: Optimizer, steps: int) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, steps)


def warm_up_cosine(optimizer: Optimizer, steps: int) -> Any:
    """The rate rises for a tenth of the training and falls for the rest."""
    rising = max(1, steps // 10)
    rise = lr_scheduler.LinearLR(optimizer, 0.01, total_iters=rising)
    fall = lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - rising))
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], [rising])


def one_cycle(optimizer: Optimizer, steps: int) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=steps)


SCHEDULES = {
    "constant": None,
    "step": step,
    "exponential": exponential,
    "cosine": cosine,
    "warm-up + cosine": warm_up_cosine,
    "one-cycle": one_cycle,
}


def configurations(setting: Setting) -> list[Configuration]:
    return [
        Configuration(
            name,
            partial(models.mlp, norm=nn.BatchNorm1d),
            optimizer="SGD",
            lr=LR,
            options={"momentum": 0.9},
            schedule=schedule,
            epochs=10,
        )
        for name, schedule in SCHEDULES.items()
    ]


def rates(schedule: Any, steps: int) -> list[float]:
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR, momentum=0.9)
    if schedule is None:
        return [LR] * steps
    scheduler, found = schedule(optimizer, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def finish(results: Any, setting: Setting) -> str:
    """The range test, by Lightning's Tuner; kept in lr_find.json."""
    import warnings

    from lightning.pytorch.tuner import Tuner

    from dlkit.lab import training

    run = results.first("constant")
    kept = setting.output / "schedules" / "lr_find.json"
    if not kept.is_file():
        task = training.Task(run.configuration, run.data, run.layers, run.seed)
        trainer = run.trainer(-1, logger=False, callbacks=[], enable_checkpointing=False, enable_progress_bar=False)
        # Its own progress bar cannot be turned off.
        quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with warnings.catch_warnings(), quiet:
            warnings.simplefilter("ignore")
            finder = Tuner(trainer).lr_find(task, min_lr=1e-5, max_lr=10.0, num_training=200, update_attr=False)
        assert finder is not None
        training.write(kept, json.dumps({**finder.results, "suggestion": finder.suggestion()}) + "\n")
    found = json.loads(kept.read_text())
    return (
        f"Range test: a tenth of the rate with the lowest loss is {tenth_of_best(found):.1e}. Lightning suggests "
        f"{found['suggestion']:.1e}, where the loss falls steepest over a linear axis of rates."
    )


def tenth_of_best(found: dict[str, Any]) -> float:
    """The rule of thumb: a tenth of the rate with the lowest loss. The first steps, as yet unsmoothed, are left out."""
    return min(zip(found["loss"][10:], found["lr"][10:], strict=True))[1] / 10


def draw(figure: Any, results: Any, setting: Setting) -> None:
    (top, loss), (finder, accuracy) = figure.subplots(2, 2)
    run = results.first(results.names[0])
    steps = report.steps(run)[-1]
    for color, (name, schedule) in zip(report.COLORS, SCHEDULES.items(), strict=False):
        top.plot(rates(schedule, steps), color=color, label=name, linewidth=1.8)
    report.tidy(top, "the schedules", "step", "learning rate")
    report.curves(loss, results, "train_loss")
    report.tidy(loss, "training loss", "epoch", "nats")
    loss.set_yscale("log")
    loss.legend(frameon=False, fontsize=9)
    report.curves(accuracy, results, "val_accuracy")
    report.tidy(accuracy, "validation accuracy", "epoch")

    found = json.loads((setting.output / "schedules" / "lr_find.json").read_text())
    finder.semilogx(found["lr"], found["loss"], color="black")
    for rate, style, text in (
        (LR, ":", "taken above"),
        (tenth_of_best(found), "-.", "a tenth of the best"),
        (found["suggestion"], "--", "Lightning's suggestion"),
    ):
        finder.axvline(rate, color="gray", linestyle=style, label=f"{text}: {rate:.1e}")
    begun = found["loss"][10:]  # the smoothing needs some steps
    finder.set_ylim(0.8 * min(begun), 1.1 * max(begun[: len(begun) // 2]))
    report.tidy(finder, "range test: 200 steps at a rising rate", "learning rate", "training loss, smoothed")
    finder.legend(frameon=False)
