"""How much of the gradient that reaches the last hidden layer arrives at the first, by depth and scale of the weights.

Nothing is trained: each cell is one backward pass of a fresh network on 256 images. The weights are Xavier's, times
the scale; the gradients are those of the loss by the outputs of the layers.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dlkit.lab import models, report
from dlkit.lab.data import Dataset
from dlkit.lab.experiment import Configuration, Setting

ORDER = 90
SUMMARY = "gradients through 10 to 50 layers, by initial scale; with and without normalization and residuals"
LOOK_AT = (
    "blue (vanishing) and red (exploding) cells, and how narrow the pale stripe between them is without normalization."
)
FIGURE_SIZE = (14, 7)
DEPTHS = (10, 20, 30, 40, 50)
SCALES = (0.01, 0.1, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
IMAGES = 256
LIMIT = 12.0  # of the colours, in powers of ten
ACTIVATIONS = {"tanh": nn.Tanh, "ReLU": nn.ReLU}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "BatchNorm": {"norm": nn.BatchNorm1d},
    "residual": {"residual": True},
    "BatchNorm, residual": {"norm": nn.BatchNorm1d, "residual": True},
}


def _scaled(layer: nn.Linear, scale: float) -> None:
    nn.init.xavier_normal_(layer.weight, gain=scale)
    nn.init.zeros_(layer.bias)


def networks(data: Dataset, activation: str, variant: str) -> nn.ModuleList:
    """One for each depth and scale."""
    make: Any = partial(models.deep_mlp, data, activation=ACTIVATIONS[activation], **VARIANTS[variant])
    return nn.ModuleList(
        make(depth=depth, initialize=partial(_scaled, scale=scale)) for depth in DEPTHS for scale in SCALES
    )


def ratios(model: nn.Module, data: Dataset) -> list[list[float]]:
    """[depth][scale]: log10 of the gradient by the first hidden layer's output over that by the last's, in 2-norms."""
    images, labels = data.train_images[:IMAGES], data.train_labels[:IMAGES]

    def one() -> Iterator[float]:
        for network in model.children():
            inputs: list[Tensor] = []  # of the linear layers

            def keep(_: nn.Module, args: tuple[Tensor], inputs: list[Tensor] = inputs) -> None:
                inputs.append(args[0])

            for layer in network.modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_pre_hook(keep)
            logits = network(images)
            first, last = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), (inputs[1], inputs[-1]))
            ratio = torch.log10(first.double().norm() / last.double().norm())
            # A gradient too small for fp32 is 0, and as vanished as can be; one that overflowed has exploded.
            yield float(torch.nan_to_num(ratio, nan=LIMIT).clamp(-LIMIT, LIMIT))

    values = one()
    return [[next(values) for _ in SCALES] for _ in DEPTHS]


def configurations(setting: Setting) -> list[Configuration]:
    return [
        Configuration(
            f"{activation}, {variant}",
            partial(networks, activation=activation, variant=variant),
            epochs=0,
            probe=ratios,
        )
        for activation in ACTIVATIONS
        for variant in VARIANTS
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    panels = figure.subplots(len(ACTIVATIONS), len(VARIANTS), sharex=True, sharey=True)
    for axes, name in zip(panels.flat, results.names, strict=True):
        values = results.first(name).probes["start"]
        image = axes.imshow(values, cmap="RdBu_r", vmin=-LIMIT, vmax=LIMIT, aspect="auto")
        for row, cells in enumerate(values):
            for column, value in enumerate(cells):
                color = "white" if abs(value) > 0.6 * LIMIT else "black"
                text = f"{value:+.0f}" if abs(value) >= 0.5 else "0"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
        axes.set_title(name)
        axes.set_xticks(range(len(SCALES)), [f"{scale:g}" for scale in SCALES], fontsize=8)
        axes.set_yticks(range(len(DEPTHS)), [str(depth) for depth in DEPTHS])
    for axes in panels[-1]:
        axes.set_xlabel("scale of the weights")
    for axes in panels[:, 0]:
        axes.set_ylabel("hidden layers")
    figure.colorbar(image, ax=panels, label="log10 of the gradient at the first hidden layer / at the last", shrink=0.8)


def finish(results: Any, setting: Setting) -> str:
    rows = [["log10 of first / last, 50 layers", *(f"scale {scale:g}" for scale in SCALES)]]
    for name in results.names:
        rows.append([name, *(f"{value:+.1f}" for value in results.first(name).probes["start"][-1])])
    return report.aligned(rows)
