"""Trains several versions of one model side by side in one loop, and times every step of each.

They start from the same weights and see the same batches. They take turns within each step, and the first one changes
from step to step: other load on the machine, and the contents of the caches, then affect all versions alike. The batch
is cut out of the data set once, outside the measured time. A step is zero_grad, forward, backward,
clipping and the optimizer; its time is the median over all steps but the first ones.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from dlkit.lab.data import Batches, Dataset
from dlkit.lab.training import EVALUATION_BATCH, accuracy, seed_of

WARM_UP_STEPS = 10


@dataclass
class Contestant:
    """A model with the objects that its training step needs.

    Args:
        optimizer: (parameters) -> the optimizer.
        clip: called between backward and the optimizer's step.
    """

    model: nn.Module
    optimizer: Callable[[Any], torch.optim.Optimizer]
    criterion: Callable[[Tensor, Tensor], Tensor]
    clip: Callable[[nn.Module], Any] | None = None
    schedule: Callable[[torch.optim.Optimizer, int], Any] | None = None


class Race(lightning.LightningModule):
    """`seconds` and `losses` have a list for each contestant, with an entry a step."""

    def __init__(
        self, contestants: dict[str, Contestant], data: Dataset, batch_size: int, epochs: int, seed: int
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.contestants, self.data, self.seed = contestants, data, seed
        self.batch_size = min(batch_size, len(data.train_images))
        self.steps = len(data.train_images) // self.batch_size
        self.epochs = epochs
        self.models = nn.ModuleList([each.model for each in contestants.values()])
        self.seconds: dict[str, list[float]] = {name: [] for name in contestants}
        self.losses: dict[str, list[Tensor]] = {name: [] for name in contestants}

    def train_dataloader(self) -> Batches:
        images, labels = self.data.train_images, self.data.train_labels
        return Batches(images, labels, self.batch_size, self.steps, lambda: seed_of(self.seed, self.current_epoch))

    def configure_optimizers(self) -> Any:
        found: list[dict[str, Any]] = []
        for each in self.contestants.values():
            found.append({"optimizer": each.optimizer(each.model.parameters())})
            if each.schedule is not None:
                found[-1]["lr_scheduler"] = each.schedule(found[-1]["optimizer"], self.steps * self.epochs)
        return found

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(seed_of(self.seed, self.current_epoch))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        # The optimizers without Lightning's wrappers: the step is timed as in a plain loop.
        turns = list(zip(self.contestants.items(), self.trainer.optimizers, strict=True))
        first = index % len(turns)
        for (name, each), optimizer in turns[first:] + turns[:first]:
            start = self._now()
            optimizer.zero_grad()
            loss = each.criterion(each.model(batch[0]), batch[1])
            loss.backward()
            if each.clip is not None:
                each.clip(each.model)
            optimizer.step()
            self.seconds[name].append(self._now() - start)
            self.losses[name].append(loss.detach())
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            scheduler.step()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def median_seconds(self, name: str) -> float:
        seconds = self.seconds[name]
        return statistics.median(seconds[min(WARM_UP_STEPS, len(seconds) // 2) :])

    @torch.inference_mode()
    def accuracy(self, name: str) -> float:
        """The accuracy of a contestant's model on the test images."""
        model = self.contestants[name].model.to(self.data.test_images.device).eval()
        metric = accuracy(self.data)["accuracy"].to(self.data.test_images.device)
        for images, labels in Batches(self.data.test_images, self.data.test_labels, EVALUATION_BATCH):
            metric.update(model(images), labels)
        model.train()
        return float(metric.compute())
