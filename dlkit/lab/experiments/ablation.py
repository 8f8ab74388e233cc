"""The recipe without one thing at a time, over three seeds; narrower, and on part of the images."""

import statistics
from functools import partial
from typing import Any

from torch import nn

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting
from dlkit.lab.experiments.recipe import mirrored, recipe

ORDER = 200
SUMMARY = "the recipe, then without one thing at a time"
LOOK_AT = "which differences are larger than the spread over the seeds (the lines); the others say nothing."
SEEDS = 3
IMAGES = 5_000


def configurations(setting: Setting) -> list[Configuration]:
    net = partial(models.ResidualNet, width=16, dropout=0.2)

    def run(name: str, **changes: Any) -> Configuration:
        return recipe(setting, name, **{"images": IMAGES, "epochs": 6, "model": net, **changes})

    return [
        run("recipe"),
        run("without residual", model=partial(net, residual=False)),
        run("without BatchNorm", model=partial(net, norm=False)),
        run("without He", model=partial(net, he=False)),
        run("without dropout", model=partial(net, dropout=0.0)),
        run("without weight decay", parameters=None, options={"weight_decay": 0.0}),
        run("without schedule", schedule=None),
        run("without clipping", max_norm=None),
        run("without smoothing", loss=nn.CrossEntropyLoss),
        run("without EMA", callbacks=None),
        *([run("without flips", augment=None)] if mirrored(setting) else []),
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    axes = figure.subplots()
    values = {name: [run.value() for run in results.runs(name)] for name in results.names}
    order = sorted(values, key=lambda name: (name != "recipe", statistics.fmean(values[name])))
    rows = range(len(order))
    means = [statistics.fmean(values[name]) for name in order]
    colors = [report.COLORS[0] if name == "recipe" else report.COLORS[5] for name in order]
    low = [mean - min(values[name]) for mean, name in zip(means, order, strict=True)]
    high = [max(values[name]) - mean for mean, name in zip(means, order, strict=True)]
    axes.barh(rows, means, 0.65, xerr=(low, high), color=colors, error_kw={"capsize": 3, "linewidth": 1.2})
    whole = means[0]
    axes.axvline(whole, color="gray", linewidth=0.8, linestyle=":")
    reach = max(max(v) for v in values.values()) - min(min(v) for v in values.values()) or 0.01
    right = max(max(v) for v in values.values()) + 0.04 * reach
    axes.set_xlim(min(min(v) for v in values.values()) - 0.3 * reach, right + 0.14 * reach)
    for row, mean in zip(rows, means, strict=True):
        difference = f"  {100 * (mean - whole):+.1f}" if row else ""
        axes.text(right, row, f"{mean:.4f}{difference}", va="center", fontsize=8)
    axes.set_yticks(rows, order)
    axes.invert_yaxis()
    seeds = len(results.runs("recipe"))
    report.tidy(axes, f"validation accuracy, mean and range of {seeds} seeds; difference from the recipe in points")
