"""torchvision.models, also where torchvision's compiled part does not load: its wheels on PyPI want torch's CUDA build.

The models need none of it, but `import torchvision` needs the schemas of two ops, and transformers imports it too.
"""

import importlib.util
from pathlib import Path

import torch

_found = importlib.util.find_spec("torchvision")
try:
    torch.ops.load_library(next(Path(_found.origin).parent.glob("_C*.so")))
except OSError:
    for _op in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_op}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from torchvision.models import ConvNeXt, VisionTransformer, convnext, resnet18  # noqa: E402

__all__ = ["ConvNeXt", "VisionTransformer", "convnext", "resnet18"]
