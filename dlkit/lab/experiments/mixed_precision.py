"""Mixed precision: the same training in fp32, bf16, fp16 with a GradScaler, and with weights of bf16."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 180
SUMMARY = "fp32, bf16, fp16 with GradScaler, bf16 weights with master weights: time, memory, accuracy"
LOOK_AT = (
    "what 16 bits save in memory, and whether they save time: on a CPU they do so only where it multiplies bf16 itself."
)
FIGURE_SIZE = (12, 4.2)
KINDS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16, GradScaler": "16-mixed"}
MASTERS, PLAIN_16 = "bf16 weights, masters", "bf16 weights alone"


def configurations(setting: Setting) -> list[Configuration]:
    plain = partial(Configuration, model=models.small_cnn, images=10_000, lr=2e-3, epochs=4, batch_size=128)
    found = [plain(name, precision=precision) for name, precision in KINDS.items()]
    found.append(plain(PLAIN_16, precision="bf16-true"))
    if "torch" not in setting.layers:  # torch's optimizers have no master weights
        found.append(plain(MASTERS, precision="bf16-true", options={"master_weights": True}))
    return found


def memory(run: Any) -> dict[str, int]:
    """Bytes of one training step: weights, the optimizer's states, and tensors that forward saves for backward."""
    from dlkit.lab.training import Task

    configuration, device = run.configuration, run.setting.device
    task = Task(configuration, run.data, run.layers, run.seed).to(device)
    if configuration.precision == "bf16-true":
        task.to(torch.bfloat16)
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(configuration.precision)
    optimizer = task.configure_optimizers()
    images = run.data.train_images[: configuration.batch_size].to(next(task.model.parameters()).dtype, copy=True)
    labels = run.data.train_labels[: configuration.batch_size].clone()
    saved: dict[int, int] = {}
    weights = {param.untyped_storage().data_ptr() for param in task.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        loss = task.criterion(task.model(images), labels)
    loss.backward()
    optimizer.step()
    state = [each for known in optimizer.state.values() for each in known.values() if isinstance(each, Tensor)]
    return {
        "weights": sum(param.nbytes for param in task.model.parameters()),
        "optimizer": sum(each.nbytes for each in state),
        "saved for backward": sum(saved.values()),
    }


def draw(figure: Any, results: Any, setting: Setting) -> None:
    accuracy, seconds, size = figure.subplots(1, 3, sharey=True)
    names = results.names
    rows = range(len(names))
    colors = [report.COLORS[row] for row in rows]
    values = [results.mean(name) for name in names]
    bars = accuracy.barh(rows, values, 0.65, color=colors)
    accuracy.bar_label(bars, fmt=" %.3f", fontsize=8)
    report.tidy(accuracy, "validation accuracy")
    accuracy.set_xlim(max(0, min(values) - 0.1), max(values) + 0.04)
    bars = seconds.barh(rows, [results.first(name).epoch_seconds() for name in names], 0.65, color=colors)
    seconds.bar_label(bars, fmt=" %.2f", fontsize=8)
    report.tidy(seconds, "seconds an epoch")
    seconds.margins(x=0.15)
    left = [0.0] * len(names)
    for part, shade in zip(("weights", "optimizer", "saved for backward"), report.COLORS[6:], strict=False):
        sizes = [memory(results.first(name))[part] / 2**20 for name in names]
        size.barh(rows, sizes, 0.65, left=left, color=shade, label=part)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    for row, total in zip(rows, left, strict=True):
        size.text(total, row, f" {total:.1f}", va="center", fontsize=8)
    report.tidy(size, "memory of a step, MiB")
    size.margins(x=0.15)
    size.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)
    accuracy.set_yticks(rows, names)
    accuracy.invert_yaxis()


def finish(results: Any, setting: Setting) -> str:
    rows = [["bytes of a step", "weights", "optimizer", "saved for backward"]]
    rows += [[name, *(f"{value:,}" for value in memory(results.first(name)).values())] for name in results.names]
    text = report.aligned(rows)
    if "torch" in setting.layers:
        text += f"\nWithout `{MASTERS}`: torch's optimizers do not keep them."
    return text
