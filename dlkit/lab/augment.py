"""Augmentations of a batch, by Kornia: (images [batch, height, width], labels) -> the same, changed.

Kornia draws from torch's generator. Pixels that are moved in or erased get the darkest value of the batch, which is the
background: the images are standardized, and 0 is gray. Mixup and CutMix give each image a mixture of two
classes, as probabilities [batch, classes].
"""

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _layer(name: str, **options: Any) -> Any:
    """The layer is made once: that costs more than a call."""
    import kornia.augmentation

    return getattr(kornia.augmentation, name)(**options)


def _on_background(images: Tensor, *layers: Any) -> Tensor:
    dark = images.amin()
    changed = (images - dark).unsqueeze(1)
    for layer in layers:
        changed = layer(changed)
    return changed.squeeze(1) + dark


def flip(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Left to right, every second image."""
    return _on_background(images, _layer("RandomHorizontalFlip", p=0.5)), labels


def shake(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation by up to 10 degrees, zoom by up to 10 %, contrast by up to 20 %."""
    affine = _layer("RandomAffine", degrees=10.0, scale=(0.9, 1.1), p=1.0)
    contrast = _layer("RandomContrast", contrast=(0.8, 1.2), clip_output=False, p=1.0)
    return _on_background(images, affine, contrast), labels


def erase(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cutout: a rectangle of 5 to 25 % of every second image becomes background."""
    return _on_background(images, _layer("RandomErasing", scale=(0.05, 0.25), ratio=(0.5, 2.0), p=0.5)), labels


def _mixed(layer: Any, images: Tensor, labels: Tensor, classes: int, of_first: bool = False) -> tuple[Tensor, Tensor]:
    """Kornia gives (first class, second class, part of the second), or with `of_first` the part of the first."""
    changed, pairs = layer(images.unsqueeze(1), labels)
    first, second, part = pairs.reshape(-1, 3).unbind(1)
    part = 1 - part if of_first else part
    weights = torch.zeros(len(labels), classes, device=images.device)
    weights.scatter_add_(1, first.long()[:, None], (1 - part)[:, None])
    weights.scatter_add_(1, second.long()[:, None], part[:, None])
    return changed.squeeze(1), weights


def mixup(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """A weighted mean of two images, and of their classes (https://arxiv.org/abs/1710.09412)."""
    return _mixed(_layer("RandomMixUpV2", p=1.0, data_keys=("input", "class")), images, labels, classes)


def cutmix(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """A rectangle of another image, and of its class as much as its area (https://arxiv.org/abs/1905.04899)."""
    layer = _layer("RandomCutMixV2", p=1.0, data_keys=("input", "class"), use_correct_lambda=True)
    return _mixed(layer, images, labels, classes, of_first=True)


def everything(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Rotation, zoom and contrast, erasing, then Mixup or CutMix, each for half of the batches."""
    images, _ = erase(*shake(images, labels))
    mix = mixup if torch.rand(()) < 0.5 else cutmix
    return mix(images, labels, classes)
