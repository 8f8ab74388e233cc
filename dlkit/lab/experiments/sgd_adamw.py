"""3,000 steps of the MLP by SGD at 1e-2 and by AdamW at 3e-4."""

from functools import partial
from typing import Any

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 50
SUMMARY = "3,000 steps by SGD 1e-2 against AdamW 3e-4"
LOOK_AT = "how many steps SGD without momentum needs for the loss that AdamW has after a few hundred."


def configurations(setting: Setting) -> list[Configuration]:
    steps = partial(Configuration, model=models.mlp, batch_size=128, epochs=20, epoch_steps=150)
    return [steps("SGD 1e-2", optimizer="SGD", lr=1e-2), steps("AdamW 3e-4", optimizer="AdamW", lr=3e-4)]


def draw(figure: Any, results: Any, setting: Setting) -> None:
    report.loss_and_accuracy(figure, results, by_step=True)
