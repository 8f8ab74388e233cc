"""The pixels that decide for a CNN: integrated gradients, occlusion and SHAP values, by Captum."""

import functools
from typing import Any

import torch
from torch import Tensor

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 220
SUMMARY = "integrated gradients, occlusion and SHAP values of a CNN, by Captum"
LOOK_AT = (
    "whether the three agree on what speaks for the class (blue) and against it (red); the last row is an image that "
    "the network takes for another class."
)
SHOWN = 5
FIGURE_SIZE = (6.6, 1.5 * (SHOWN + 1) + 0.4)


def configurations(setting: Setting) -> list[Configuration]:
    cnn = functools.partial(models.small_cnn, dropout=0.1)
    return [Configuration("cnn", cnn, images=20_000, lr=2e-3, epochs=5, batch_size=128)]


def chosen(run: Any, model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(images, true classes, given classes): the first ones of some classes that are right, and one that is wrong."""
    images, labels = run.data.test_images[:2_000], run.data.test_labels[:2_000]
    with torch.inference_mode():
        given = torch.cat([model(some).argmax(1) for some in images.split(500)])
    right = [
        int(((labels == c) & (given == c)).nonzero()[0])
        for c in labels.unique()
        if ((labels == c) & (given == c)).any()
    ]
    wrong = (labels != given).nonzero().flatten().tolist()[:1]
    at = torch.tensor(right[:: max(1, len(right) // SHOWN)][:SHOWN] + wrong)
    return images[at], labels[at], given[at]


def attributions(model: Any, images: Tensor, given: Tensor) -> dict[str, Tensor]:
    """Each pixel's part in the logit of the class that was given, against an image that is all background."""
    from captum.attr import IntegratedGradients, Occlusion, ShapleyValueSampling

    model.requires_grad_(False)
    background = torch.full_like(images, float(images.min()))
    side = max(2, images.shape[-1] // 7)
    rows, columns = (torch.arange(size, device=images.device) // side for size in images.shape[1:])
    patches = rows[:, None] * (int(columns[-1]) + 1) + columns
    torch.manual_seed(0)
    return {
        "integrated gradients": IntegratedGradients(model).attribute(
            images, background, target=given, n_steps=32, internal_batch_size=256
        ),
        "occlusion": Occlusion(model).attribute(
            images, (side, side), strides=max(1, side // 2), baselines=float(images.min()), target=given,
            perturbations_per_eval=16,
        ),
        "SHAP values": ShapleyValueSampling(model).attribute(
            images, background, target=given, feature_mask=patches[None], n_samples=20,
            perturbations_per_eval=16,
        ),
    }  # fmt: skip


def draw(figure: Any, results: Any, setting: Setting) -> None:
    run = results.first("cnn")
    model = run.model("best")
    images, labels, given = chosen(run, model)
    found = {name: each.detach().cpu() for name, each in attributions(model, images, given).items()}
    names = report.class_names(setting.data)
    grid = figure.subplots(len(images), 1 + len(found), squeeze=False)
    for row, (true, taken) in enumerate(zip(labels.tolist(), given.tolist(), strict=True)):
        grid[row, 0].imshow(images[row].cpu(), cmap="gray")
        text = names[true] if true == taken else f"{names[true]},\ntaken for\n{names[taken]}"
        grid[row, 0].set_ylabel(text, rotation=0, ha="right", va="center")
        for column, (name, each) in enumerate(found.items(), 1):
            reach = float(each[row].abs().quantile(0.99)) or 1.0
            grid[row, column].imshow(each[row], cmap="RdBu", vmin=-reach, vmax=reach)
            if row == 0:
                grid[row, column].set_title(name, fontsize=9)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
