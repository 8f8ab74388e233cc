"""The inputs of the activation functions of five hidden layers, before and after some training.

Without normalization the distribution of each layer's inputs moves as the layers before it learn; a normalization ties
its mean and deviation down.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dlkit.lab import models, report
from dlkit.lab.data import Dataset
from dlkit.lab.experiment import Configuration, Setting

ORDER = 10
SUMMARY = "what reaches the activations of 5 layers, with and without normalization"
LOOK_AT = (
    "how far the dark histogram (after training) has moved from the light one (before), and how its width changes "
    "from layer to layer."
)
FIGURE_SIZE = (11, 10)
DEPTH = 5
IMAGES = 1_000  # for the histograms
RANGE = 6.0  # of the histograms; values outside count at their ends
BINS = 60


def histograms(model: nn.Module, data: Dataset) -> list[dict[str, Any]]:
    """For each layer: counts, mean and standard deviation of the input of its activation function."""
    found: list[Tensor] = []
    for layer in model.modules():
        if isinstance(layer, nn.Tanh):
            layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.no_grad():
        model(data.train_images[:IMAGES])
    return [
        {
            "counts": torch.histc(x.clamp(-RANGE, RANGE), BINS, -RANGE, RANGE).tolist(),
            "mean": float(x.mean()),
            "std": float(x.std()),
        }
        for x in found
    ]


def configurations(setting: Setting) -> list[Configuration]:
    norms: dict[str, models.Layer | None] = {"none": None, "BatchNorm": nn.BatchNorm1d, "LayerNorm": nn.LayerNorm}
    return [
        Configuration(
            name,
            partial(models.deep_mlp, depth=DEPTH, width=100, norm=norm),
            optimizer="SGD",
            lr=0.1,
            epochs=5,
            probe=histograms,
        )
        for name, norm in norms.items()
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    panels = figure.subplots(DEPTH, len(results.names), sharex=True, squeeze=False)
    edges = [-RANGE + 2 * RANGE * index / BINS for index in range(BINS + 1)]
    for column, name in enumerate(results.names):
        probes = results.first(name).probes
        for layer in range(DEPTH):
            axes = panels[layer][column]
            for moment, alpha in (("start", 0.35), ("end", 0.9)):
                facts = probes[moment][layer]
                axes.stairs(
                    facts["counts"],
                    edges,
                    fill=moment == "start",
                    color=report.COLORS[column],
                    alpha=alpha,
                    linewidth=1.6,
                    label=f"{'before' if moment == 'start' else 'after'}: {facts['mean']:+.2f} ± {facts['std']:.2f}",
                )
            report.tidy(axes, name if layer == 0 else "")
            axes.set_yticks([])
            axes.legend(frameon=False, fontsize=8, loc="upper left", handlelength=1, borderaxespad=0)
            if column == 0:
                axes.set_ylabel(f"layer {layer + 1}")
    for axes in panels[-1]:
        axes.set_xlabel("input of tanh")


def finish(results: Any, setting: Setting) -> str:
    rows = [["input of the activation", *(f"layer {layer + 1}" for layer in range(DEPTH))]]
    for name in results.names:
        for moment in ("start", "end"):
            probes = results.first(name).probes[moment]
            rows.append([f"{name}, {moment}", *(f"{each['mean']:+.2f} ± {each['std']:.2f}" for each in probes)])
    return report.aligned(rows)
