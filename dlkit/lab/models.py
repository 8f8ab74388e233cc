"""The models of the lab, in plain torch.nn as a user writes them: nothing here knows dlkit.

Each is a function of the data, for the size of the images and the number of classes, and of what an experiment varies.

Each norm stands where it usually does: LayerNorm after a linear layer and before each half of a transformer block,
BatchNorm between a linear layer or a convolution and its ReLU. The transformer block is written out because
torch.nn.TransformerEncoderLayer has a fused inference path that never calls its LayerNorm modules.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from dlkit.lab.data import Dataset

Layer = Callable[[int], nn.Module]


WIDTHS = (256, 128, 64)  # of the course's MLP, 784-256-128-64-10


def mlp(
    data: "Dataset",
    widths: Sequence[int] = WIDTHS,
    norm: Layer | None = None,
    activation: Callable[[], nn.Module] = nn.ReLU,
    dropout: float | Sequence[float] = 0.0,
) -> nn.Sequential:
    """Linear, norm, activation and dropout for each width, then the logits. Images [batch, height, width].

    Args:
        norm: called with the width.
        dropout: one for all hidden layers, or one for each; a layer with 0 has none.
    """
    rates = [dropout] * len(widths) if isinstance(dropout, int | float) else dropout
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(data.image_size)
    for width, rate in zip(widths, rates, strict=True):
        layers += [nn.Linear(features, width), *([norm(width)] if norm else []), activation()]
        layers += [nn.Dropout(rate)] if rate else []
        features = width
    return nn.Sequential(*layers, nn.Linear(features, data.classes))


class Block(nn.Module):
    """A pre-norm transformer block: x + attention(norm(x)), x + feed_forward(norm(x)), a dropout on each addend."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        # Twice the width, not the usual four times: about a fifth less time a step.
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(query, key, value)
        x = x + self.dropout(self.projection(attention.transpose(1, 2).reshape(batch, tokens, width)))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class RowTransformer(nn.Module):
    """A transformer whose tokens are the rows of the image. Images [batch, height, width] to logits.

    The head sees all tokens: after 9,000 images that gives 84 % on Fashion-MNIST, the mean of the tokens 81 %.
    """

    def __init__(self, data: "Dataset", width: int = 256, depth: int = 4, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        rows, columns = data.image_size
        self.embedding = nn.Linear(columns, width)
        self.position = nn.Parameter(0.02 * torch.randn(rows, width))
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(rows * width, data.classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embedding(images) + self.position
        return self.head(self.norm(self.blocks(x)).flatten(1))


class ResidualBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); the shortcut is x itself where its shape allows."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if (inputs, stride) != (width, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        x += identity
        return self.relu(x)


class ResidualCnn(nn.Module):
    """A stem, three stages of one residual block, the mean over space. Images [batch, height, width] to logits."""

    def __init__(self, data: "Dataset", width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.stages = nn.Sequential(
            ResidualBlock(width, width, stride=1),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 4 * width, stride=2),
        )
        self.head = nn.Linear(4 * width, data.classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(images.unsqueeze(1))).mean((2, 3)))
