"""Transfer: a CNN that has learnt classes 0-4 is to learn 5-9 from few images."""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 160
SUMMARY = "a CNN trained on classes 0-4, frozen, then its last layers unfrozen, on 5-9, against from scratch"
LOOK_AT = (
    "what the layers learnt on other classes are worth at the first epochs, and whether from scratch overtakes them."
)
FIRST, FEW, UNFREEZE_AFTER = "classes 0-4", 200, 8
# torchvision's weights for ImageNet, used only if they are on disk: nothing is downloaded.
BACKBONE = "resnet18-f37072fd.pth"


def classes(data: Any, low: int, high: int, images: int | None = None) -> Any:
    """The images of classes low to high - 1, numbered from 0."""

    def chosen(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        of = (labels >= low) & (labels < high)
        return inputs[of], labels[of] - low

    train, test = chosen(data.train_images, data.train_labels), chosen(data.test_images, data.test_labels)
    return replace(
        data, train_images=train[0][:images], train_labels=train[1][:images], test_images=test[0], test_labels=test[1]
    )


def head(model: nn.Sequential) -> list[nn.Module]:
    """The dense layer and the logits, which are always trained anew."""
    return list(model)[next(at for at, layer in enumerate(model) if isinstance(layer, nn.Flatten)) :]


def last_block(model: nn.Sequential) -> list[nn.Module]:
    """The last convolution and the layers that belong to it."""
    at = [index for index, layer in enumerate(model) if isinstance(layer, nn.Conv2d)][-1]
    return list(model)[at:]


def learnt(unfreeze_after: int | None) -> list[Any]:
    """Takes the convolutions of the run on classes 0-4, and freezes them; their last block until `unfreeze_after`.

    Frozen layers keep their running statistics.
    """
    from lightning.pytorch.callbacks import Callback

    from dlkit.lab.training import folder_name, read_checkpoint

    class Learnt(Callback):
        def on_fit_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch or module.history:
                return
            first = module.folder.parent.parent / folder_name(FIRST) / module.folder.name
            known = read_checkpoint(first, "best")["state_dict"]
            theirs = {name.removeprefix("model."): value for name, value in known.items() if name.startswith("model.")}
            own = {id(param) for layer in head(module.model) for param in layer.parameters()}
            own_names = {name for name, param in module.model.named_parameters() if id(param) in own}
            kept = {name: value for name, value in theirs.items() if name not in own_names}
            module.model.load_state_dict(kept, strict=False)

        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            model = module.model
            unfrozen = unfreeze_after is not None and trainer.current_epoch >= unfreeze_after
            trained = {id(layer) for layer in (last_block(model) if unfrozen else head(model))}
            for layer in model:
                layer.requires_grad_(id(layer) in trained)
                layer.train(id(layer) in trained)

    return [Learnt()]


class Backbone(nn.Module):
    """torchvision's ResNet-18 with its own weights, frozen, and a linear layer; images become 3 x 64 x 64."""

    def __init__(self, data: Any, weights: Path) -> None:
        super().__init__()
        import torchvision

        self.body = torchvision.models.resnet18()
        self.body.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.body.fc = nn.Identity()
        self.body.requires_grad_(False)
        self.head = nn.Linear(512, data.classes)

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        large = nn.functional.interpolate(images.unsqueeze(1), (64, 64), mode="bilinear")
        return self.head(self.body(large.expand(-1, 3, -1, -1)))


def backbone() -> Path | str:
    """The path of torchvision's weights, or the reason why they are not used."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    path = Path(torch.hub.get_dir()) / "checkpoints" / BACKBONE
    return path if path.is_file() else f"{path} is not there"


def configurations(setting: Setting) -> list[Configuration]:
    few = partial(classes, low=5, high=10, images=FEW)
    plain = partial(Configuration, model=models.small_cnn, data=few, lr=2e-3, epochs=30, batch_size=32)
    found = backbone()
    return [
        plain(FIRST, data=partial(classes, low=0, high=5), epochs=3, batch_size=128),
        plain("5-9 from scratch"),
        plain("5-9, frozen", callbacks=partial(learnt, None)),
        plain("5-9, unfrozen later", callbacks=partial(learnt, 1 if setting.quick else UNFREEZE_AFTER)),
        *([plain("5-9, ResNet-18 frozen", partial(Backbone, weights=found))] if isinstance(found, Path) else []),
    ]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    left, right = figure.subplots(1, 2)
    names = results.names[1:]
    report.curves(left, results, "train_loss", names)
    report.curves(right, results, "val_accuracy", names)
    few = len(results.first(names[0]).data.train_images)
    report.tidy(left, f"training loss on {few} images of classes 5-9", "epoch", "nats")
    report.tidy(right, "validation accuracy on classes 5-9", "epoch")
    for axes in (left, right):
        axes.axvline(1.5 if setting.quick else UNFREEZE_AFTER + 0.5, color="gray", linewidth=0.8, linestyle=":")
    right.legend(frameon=False, loc="lower right")


def finish(results: Any, setting: Setting) -> str:
    found = backbone()
    return "" if isinstance(found, Path) else f"Without a backbone that knows ImageNet: {found}."
