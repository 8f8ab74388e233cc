"""Ten initializations: their effect on activations and gradients of a deep MLP before training, and on 3 epochs."""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dlkit.lab import models, report
from dlkit.lab.data import Dataset
from dlkit.lab.experiment import Configuration, Setting

ORDER = 80
SUMMARY = "zeros, Gaussians, Xavier, He, orthogonal, LSUV and scaled Xavier; tanh and ReLU"
LOOK_AT = (
    "whose lines stay level: a deviation that grows or shrinks from layer to layer, in the activations or in the "
    "gradients, shows in the curves on the right."
)
FIGURE_SIZE = (15, 12)
DEPTH = 8
IMAGES = 1_000  # for the distributions
BINS = 60
LEAST = 1e-12  # zeros have no place on a log scale
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"tanh": nn.Tanh, "ReLU": nn.ReLU}


def _xavier(weight: Tensor, times: float) -> None:
    nn.init.xavier_normal_(weight, gain=times)


INITIALIZATIONS: dict[str, Callable[[Tensor], Any] | None] = {
    "zeros": nn.init.zeros_,
    "N(0, 0.01)": partial(nn.init.normal_, std=0.01),
    "N(0, 1)": nn.init.normal_,
    "Xavier uniform": nn.init.xavier_uniform_,
    "Xavier normal": nn.init.xavier_normal_,
    "He": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,
    "LSUV": None,
    "Xavier x0.1": partial(_xavier, times=0.1),
    "Xavier x10": partial(_xavier, times=10.0),
}


def _apply(layer: nn.Module, initialize: Callable[[Tensor], Any]) -> None:
    initialize(layer.weight)  # type: ignore[arg-type]
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def network(data: Dataset, activation: str, initialization: str) -> nn.Module:
    initialize = INITIALIZATIONS[initialization]
    make = partial(models.deep_mlp, data, DEPTH, 128, activation=ACTIVATIONS[activation])
    if initialize is not None:
        return make(initialize=partial(_apply, initialize=initialize))
    from dlkit.init import lsuv_

    model = make()
    lsuv_(model, data.train_images[:IMAGES])
    return model


def flow(model: nn.Module, data: Dataset) -> dict[str, list[Any]]:
    """By hidden layer: the deviation of its activations and of the loss's gradient by them, and their distribution."""
    activations: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        activations.append(output)

    for layer in model.modules():
        if isinstance(layer, tuple(ACTIVATIONS.values())):  # type: ignore[arg-type]
            layer.register_forward_hook(keep)
    logits = model(data.train_images[:IMAGES])
    nn.functional.cross_entropy(logits, data.train_labels[:IMAGES]).backward()
    gradients = [each.grad if each.grad is not None else torch.zeros_like(each) for each in activations]
    return {
        "activations": [float(each.detach().std()) for each in activations],
        "gradients": [float(each.std()) for each in gradients],
        "activation bins": [_bins(each) for each in activations],
        "gradient bins": [_bins(each) for each in gradients],
    }


def _bins(values: Tensor) -> list[float]:
    """A histogram of log10 of the sizes of values, from 1e-12 to 1e3, as shares."""
    sizes = values.detach().abs().clamp(LEAST, 1e3).log10()
    return (torch.histc(sizes, BINS, -12, 3) / sizes.numel()).tolist()


def configurations(setting: Setting) -> list[Configuration]:
    return [
        Configuration(
            f"{activation}, {name}",
            partial(network, activation=activation, initialization=name),
            optimizer="SGD",
            lr=0.01,
            options={"momentum": 0.9},
            images=10_000,
            epochs=3,
            probe=flow,
        )
        for activation in ACTIVATIONS
        for name in INITIALIZATIONS
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    panels = figure.subplots(4, 3, height_ratios=(3, 3, 2, 2))
    layers = range(1, DEPTH + 1)
    for row, activation in enumerate(ACTIVATIONS):
        lines, curves = panels[row], panels[row][2]
        for color, name in zip(report.COLORS, INITIALIZATIONS, strict=True):
            run = results.first(f"{activation}, {name}")
            for axes, what in zip(lines, ("activations", "gradients"), strict=False):
                values = [max(each, LEAST) for each in run.probes["start"][what]]
                axes.semilogy(layers, values, marker=".", color=color, label=name)
            curves.plot(
                range(len(run.history) + 1),
                [math.nan, *run.column("val_accuracy")],
                marker=".",
                color=color,
                label=f"{name}: {run.value():.3f}",
            )
        report.tidy(lines[0], f"{activation}: deviation of the activations", "layer")
        report.tidy(lines[1], f"{activation}: deviation of the gradients", "layer")
        report.tidy(curves, f"{activation}: validation accuracy", "epoch")
        curves.set_xlim(0.9, None)
        curves.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _distributions(panels[2:], results)


@functools.cache
def _edges() -> list[float]:
    return [-12 + 15 * index / BINS for index in range(BINS + 1)]


def _distributions(panels: Any, results: Any) -> None:
    """Layer by layer as colours, for the plain, the smallest and the right choice."""
    for row, (activation, names) in enumerate(
        (("tanh", ("N(0, 0.01)", "Xavier normal", "N(0, 1)")), ("ReLU", ("N(0, 0.01)", "Xavier normal", "He")))
    ):
        for axes, name in zip(panels[row], names, strict=True):
            for what, color in (("activation bins", report.COLORS[0]), ("gradient bins", report.COLORS[1])):
                for layer, shares in enumerate(results.first(f"{activation}, {name}").probes["start"][what]):
                    alpha = 0.25 + 0.75 * layer / (DEPTH - 1)
                    axes.stairs(
                        shares,
                        _edges(),
                        color=color,
                        alpha=alpha,
                        label=what.split()[0] + "s" if layer == DEPTH - 1 else None,
                    )
            report.tidy(
                axes, f"{activation}, {name}: sizes by layer, last darkest", "log10 of the absolute value; 0 is at -12"
            )
            axes.set_yticks([])
    panels[0][0].legend(frameon=False, fontsize=8)
