"""bench models on models of timm, transformers and diffusers: losses are native's, the ceiling has no norms."""

import pytest
import torch
from dlkit.bench import _models
from support import architectures  # noqa: F401  (torchvision's models, also where its compiled part does not load)

NAMES = ("timm:resnet18", "timm:deit_tiny_patch16_224,drop_path_rate=0.1,depth=2", "hf:llama", "hf:bert", "hf:gpt2")
NAMES += ("diffusers:UNet2DModel",)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_natives(name, monkeypatch):
    monkeypatch.setattr(_models._zoo, "IMAGES", 2)
    monkeypatch.setattr(_models._zoo, "TEXTS", 2)
    expected = torch.tensor(_models.losses(name, "native"))
    for contestant in ("dlkit", "dlkit_graph"):
        found = torch.tensor(_models.losses(name, contestant))
        torch.testing.assert_close(found, expected, rtol=_models.TOLERANCE, atol=0)
    assert _models.trainer(name, "ceiling").step().isfinite()
