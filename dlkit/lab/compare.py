"""Trains one model twice in one loop, with torch's layers and optimizer and with dlkit's, and times every step of both.

Both start from the same weights and see the same batches. They take turns within each step, and who goes first
alternates, so that whatever else the machine does, and whatever the first leaves in the caches, meets both alike.
Cutting the batch out of the data set happens once, outside the time of either. A step is zero_grad, forward, backward,
clipping and the optimizer; its time is the median over all steps but the first ones.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dlkit
from dlkit.lab.data import Dataset

WARM_UP_STEPS = 10
MAX_NORM = 1.0  # gradients are clipped to it

# Makes the twin: turns a model of torch.nn's layers into one of dlkit's, in place or not.
Rewrite = Callable[[nn.Module], nn.Module]


def replace_and_fuse(model: nn.Module) -> nn.Module:
    return dlkit.fuse(dlkit.replace(model))


FUSED = (dlkit.nn.BatchNormReLU1d, dlkit.nn.BatchNormReLU2d)


@dataclass(frozen=True)
class Schedule:
    """How long to train: `images` of the training set (at most), `epochs` times, in batches of `batch_size`."""

    images: int
    epochs: int
    batch_size: int
    lr: float = 1e-3


class Contestant:
    """One of the two: a model, its optimizer, and what it did so far."""

    def __init__(self, model: nn.Module, schedule: Schedule, steps: int, optimizer: str) -> None:
        self.model = model
        self.clips_apart = optimizer == "torch"
        self.optimizer: torch.optim.Optimizer
        if self.clips_apart:
            # fused: torch's fastest AdamW; the default one takes 2.6 times as long.
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, fused=True)
        else:
            self.optimizer = dlkit.optim.AdamW(model.parameters(), lr=schedule.lr, max_norm=MAX_NORM)
        warm_up = max(1, steps // 5)
        # The learning rate rises for the first fifth and falls to 0: what so short a training needs.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
        )
        self.seconds: list[float] = []
        self.losses: list[Tensor] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        _synchronize(images.device)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        cross_entropy = F.cross_entropy if self.clips_apart else dlkit.functional.cross_entropy
        loss = cross_entropy(self.model(images), labels)
        loss.backward()
        if self.clips_apart:
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        _synchronize(images.device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.detach())
        self.scheduler.step()

    def median_seconds(self) -> float:
        return statistics.median(self.seconds[min(WARM_UP_STEPS, len(self.seconds) // 2) :])

    @torch.inference_mode()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of `images` whose label the model gives."""
        self.model.eval()
        right = sum(
            int((self.model(some).argmax(1) == wanted).sum())
            for some, wanted in zip(images.split(500), labels.split(500), strict=True)
        )
        self.model.train()
        return right / len(labels)


@dataclass
class Result:
    """What the comparison of one model found. Losses are the training loss of every step, in nats.

    `layers` of the twin are dlkit's, `fused` of these do the work of those behind them too.
    """

    model: str
    layers: int
    fused: int
    schedule: Schedule
    torch_accuracy: float
    dlkit_accuracy: float
    torch_seconds: float
    dlkit_seconds: float
    torch_losses: list[float] = field(repr=False)
    dlkit_losses: list[float] = field(repr=False)

    @property
    def speed_up(self) -> float:
        return self.torch_seconds / self.dlkit_seconds

    @property
    def largest_loss_difference(self) -> float:
        return max(abs(a - b) for a, b in zip(self.torch_losses, self.dlkit_losses, strict=True))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    name: str, model: nn.Module, data: Dataset, schedule: Schedule, seed: int, rewrite: Rewrite = dlkit.replace
) -> Result:
    """Trains `model` by torch's optimizer and its copy with dlkit's layers, made by `rewrite`, by dlkit's.

    `data` is on the device to use.
    """
    device = data.train_images.device
    twin = rewrite(copy.deepcopy(model))
    layers = [module for module in twin.modules() if type(module).__module__.startswith("dlkit.nn")]
    if not layers:
        raise RuntimeError(f"{rewrite.__name__}() changed no layer of the {name}: there is nothing to compare")

    # The data and the batches come from a generator of their own, so that they are the same for every model and device.
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data.train_images), generator=generator)[: schedule.images]
    batch_size = min(schedule.batch_size, len(chosen))
    schedule = Schedule(len(chosen), schedule.epochs, batch_size, schedule.lr)
    steps = schedule.epochs * (len(chosen) // batch_size)
    torchs, dlkits = (
        Contestant(each.to(device), schedule, steps, optimizer)
        for each, optimizer in ((model, "torch"), (twin, "dlkit"))
    )

    seconds_between_lines = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=steps, desc=f"{name:<14}", unit="step", mininterval=seconds_between_lines) as progress:
        for _ in range(schedule.epochs):
            order = chosen[torch.randperm(len(chosen), generator=generator)].to(device)
            for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
                images, labels = data.train_images[batch], data.train_labels[batch]
                for contestant in (torchs, dlkits) if progress.n % 2 == 0 else (dlkits, torchs):
                    contestant.step(images, labels)
                progress.update()
        progress.set_postfix_str("testing")
        torch_accuracy, dlkit_accuracy = (
            each.accuracy(data.test_images, data.test_labels) for each in (torchs, dlkits)
        )

    return Result(
        name,
        len(layers),
        sum(isinstance(layer, FUSED) for layer in layers),
        schedule,
        torch_accuracy,
        dlkit_accuracy,
        torchs.median_seconds(),
        dlkits.median_seconds(),
        torch.stack(torchs.losses).tolist(),
        torch.stack(dlkits.losses).tolist(),
    )
