"""The models of the lab, in plain torch.nn as a user writes them: nothing here knows dlkit.

Each is a function of the data, for the size of the images and the number of classes, and of what an experiment varies.

Each norm stands where it usually does: LayerNorm after a linear layer and before each half of a transformer block,
BatchNorm between a linear layer or a convolution and its ReLU. The transformer block is written out because
torch.nn.TransformerEncoderLayer has a fused inference path that never calls its LayerNorm modules.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[int], nn.Module]


class Images(Protocol):
    """The facts of the data that a model needs; data.Dataset has them."""

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def classes(self) -> int: ...


class Shape(NamedTuple):
    """Images without the data."""

    image_size: tuple[int, int]
    classes: int


WIDTHS = (256, 128, 64)  # of the course's MLP, 784-256-128-64-10


def mlp(
    data: Images,
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

    def __init__(self, data: Images, width: int = 256, depth: int = 4, heads: int = 8, dropout: float = 0.1) -> None:
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


class PlainBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class ResidualBlock(PlainBlock):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); the shortcut is x itself where its shape allows."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__(inputs, width, stride)
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

    def __init__(self, data: Images, width: int = 16) -> None:
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


def cnn(
    data: Images,
    blocks: Sequence[Sequence[int]] = ((32, 32), (64, 64)),
    dense: int = 128,
    norm: Layer | None = nn.BatchNorm2d,
    activation: Callable[[], nn.Module] = nn.ReLU,
    dropout: float = 0.25,
    dense_dropout: float = 0.5,
) -> nn.Sequential:
    """Blocks of 3x3 convolutions, each halved by a maximum; a dense layer; the logits. Images [batch, height, width].

    Args:
        blocks: the channels of each block's convolutions.
        norm: makes the norm after each convolution, called with its channels.
        dropout: after each block.
        dense_dropout: after the dense layer.
    """
    layers: list[nn.Module] = [nn.Unflatten(1, (1, -1))]
    channels, side = 1, min(data.image_size)
    for block in blocks:
        for width in block:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=norm is None)
            layers += [convolution, *([norm(width)] if norm else []), activation()]
            channels = width
        layers += [nn.MaxPool2d(2), *([nn.Dropout(dropout)] if dropout else [])]
        side //= 2
    layers += [nn.Flatten(), nn.Linear(channels * side**2, dense), activation()]
    layers += [nn.Dropout(dense_dropout)] if dense_dropout else []
    return nn.Sequential(*layers, nn.Linear(dense, data.classes))


# An eighth of the work of cnn() as it is: for experiments that compare many trainings.
SMALL = ((16,), (32,), (32,))


def small_cnn(data: Images, norm: Layer | None = nn.BatchNorm2d, dropout: float = 0.0) -> nn.Sequential:
    return cnn(data, SMALL, 64, norm, dropout=dropout, dense_dropout=dropout)


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def deep_mlp(
    data: Images,
    depth: int,
    width: int = 64,
    norm: Layer | None = None,
    activation: Callable[[], nn.Module] = nn.Tanh,
    residual: bool = False,
    initialize: Callable[[nn.Module], None] | None = None,
) -> nn.Sequential:
    """`depth` hidden layers of one width. With `residual`, each but the first adds to its input.

    Args:
        initialize: called with each hidden linear layer, and with the one that gives the logits.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    features = math.prod(data.image_size)
    for index in range(depth):
        hidden = [nn.Linear(features, width), *([norm(width)] if norm else []), activation()]
        layers += [Residual(*hidden)] if residual and index else hidden
        features = width
    model = nn.Sequential(*layers, nn.Linear(features, data.classes))
    if initialize is not None:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                initialize(layer)
    return model


def deep_cnn(data: Images, depth: int, residual: bool, width: int = 16) -> nn.Sequential:
    """`depth` weighted layers: a convolution, blocks of two on a quarter of the side, a linear layer on the mean."""
    block = ResidualBlock if residual else PlainBlock
    blocks = [block(width, width, 1) for _ in range((depth - 2) // 2)]
    return nn.Sequential(
        nn.Unflatten(1, (1, -1)),
        nn.Conv2d(1, width, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, data.classes),
    )


# Layers that torch.nn lacks, in plain torch. training.py names dlkit's functions for them.


class DropPath(nn.Module):
    """Drops whole samples, after the branch of a residual block (https://arxiv.org/abs/1603.09382)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.p
        return x * kept / (1 - self.p)


class DropBlock2d(nn.Module):
    """Drops squares of each channel (https://arxiv.org/abs/1810.12890)."""

    def __init__(self, p: float, block_size: int) -> None:
        super().__init__()
        self.p, self.block_size = p, block_size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        height, width = x.shape[2:]
        size = min(self.block_size, height, width)
        corners = (height - size + 1) * (width - size + 1)
        seeds = torch.rand(*x.shape[:2], height - size + 1, width - size + 1, device=x.device)
        seeds = (seeds < self.p / size**2 * height * width / corners).to(x.dtype)
        kept = 1 - F.max_pool2d(F.pad(seeds, [size - 1] * 4), size, 1)
        return x * kept * (kept.numel() / kept.sum())


class DropConnectLinear(nn.Linear):
    """Drops weights (https://proceedings.mlr.press/v28/wan13.html): one mask for the whole batch."""

    def __init__(self, in_features: int, out_features: int, p: float) -> None:
        super().__init__(in_features, out_features)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.dropout(self.weight, self.p, self.training), self.bias)


class ResidualNet(nn.Module):
    """A stem at full size, a residual block at half and one at a quarter of it, dropout, the logits.

    Images [batch, height, width] to logits. Without `residual` nothing goes around the blocks; without `he`, weights
    are torch's.
    """

    def __init__(
        self, data: Images, width: int = 32, dropout: float = 0.2, he: bool = True, residual: bool = True,
        norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        block: Callable[..., nn.Module] = ResidualBlock if residual else PlainBlock
        self.blocks = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 4 * width, 2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, data.classes)
        if not norm:
            without_norms(self)
        if he:
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.blocks(self.stem(images.unsqueeze(1))).mean((2, 3))))


def without_norms(model: nn.Module) -> None:
    """Takes out every BatchNorm, and gives the convolutions the bias that it made needless."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, nn.Conv2d):
                child.bias = nn.Parameter(torch.zeros(child.out_channels))


class Forecaster(nn.Module):
    """A recurrent network, and from its last state the next number. Series [batch, steps] to forecasts [batch].

    The output is added to the last number of the series: the network learns the step, which does not grow with a trend.

    Args:
        kind: "LSTM" or "GRU".
        norm: a LayerNorm after each recurrent layer.
        dropout: after each recurrent layer.
    """

    def __init__(
        self, data: Images, kind: str = "LSTM", layers: int = 1, width: int = 48, norm: bool = False,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        make = getattr(nn, kind)
        self.layers = nn.ModuleList(make(width if index else 1, width, batch_first=True) for index in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm else nn.Identity() for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 1)

    def forward(self, series: Tensor) -> Tensor:
        last = series[:, -1]
        x = (series - series.mean(1, keepdim=True)).unsqueeze(2)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.dropout(norm(layer(x)[0]))
        return last + self.head(x[:, -1]).squeeze(1)
