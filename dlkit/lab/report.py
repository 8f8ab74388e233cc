"""What a comparison found: a table for the terminal, a plot of the loss curves, and a JSON file with the figures."""

import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import dlkit
from dlkit.lab.compare import WARM_UP_STEPS, Result
from dlkit.lab.data import Dataset

TORCH_COLOR, DLKIT_COLOR = "#f0a04b", "#1b3a5c"

# Differences of 0 have no place on a log scale; they are drawn here, a tenth of fp32's resolution.
LEAST_DIFFERENCE = 1e-8


def machine() -> dict[str, str | int]:
    """The facts that a step time depends on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {
        "cpu": processor,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dlkit": dlkit.__version__,
    }


def _layers(result: Result) -> str:
    return f"{result.layers}, {result.fused} fused" if result.fused else str(result.layers)


def table(results: Sequence[Result]) -> str:
    rows = [("model", "layers", "test accuracy", "step time, ms", "speed-up", "largest loss difference")]
    for result in results:
        rows += [
            (result.model, "torch.nn", f"{result.torch_accuracy:.2%}", f"{1e3 * result.torch_seconds:.2f}", "", ""),
            (
                "",
                f"dlkit ({_layers(result)})",
                f"{result.dlkit_accuracy:.2%}",
                f"{1e3 * result.dlkit_seconds:.2f}",
                f"{result.speed_up:.3f}x",
                f"{result.largest_loss_difference:.1e}",
            ),
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    # Words to the left, figures to the right.
    lines = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zipped))
        for zipped in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:]])


def caption(data: Dataset, results: Sequence[Result]) -> str:
    """What was trained on and how the step time was taken."""
    lines = [
        f"{result.model}: {result.schedule.images:,} of {len(data.train_images):,} training images of {data.name}, "
        f"{result.schedule.epochs} epochs, batches of {result.schedule.batch_size}, "
        f"tested on {len(data.test_images):,}."
        for result in results
    ]
    facts = machine()
    device = facts["gpu"] if data.train_images.is_cuda else f"{facts['cpu']}, CPU threads: {facts['threads']}"
    lines += [
        f"fp32, AdamW with clipping, torch's and dlkit's, {device}.",
        "dlkit (n, m fused): n layers replaced, m of them one with the ReLU behind.",
        f"Step time: median after {WARM_UP_STEPS} steps; the two take turns on the same batches.",
    ]
    if any(result.model in ("transformer", "batch_norm_mlp") for result in results):
        lines.append(
            "Dropout draws other masks for each, so the losses of transformer and batch_norm_mlp differ by chance."
        )
    if any(result.fused for result in results):
        lines.append("Through BatchNorm a difference of rounding grows from step to step.")
    return "\n".join(lines)


def write_json(path: Path, data: Dataset, results: Sequence[Result], seed: int) -> None:
    content = {
        "data": {"name": data.name, "source": data.source, "image_size": data.image_size},
        "machine": machine(),
        "device": data.train_images.device.type,
        "seed": seed,
        "results": [
            {
                "model": result.model,
                "layers_replaced": result.layers,
                "layers_fused": result.fused,
                "training_images": result.schedule.images,
                "epochs": result.schedule.epochs,
                "batch_size": result.schedule.batch_size,
                "steps": len(result.torch_losses),
                "torch": {"test_accuracy": result.torch_accuracy, "median_step_ms": 1e3 * result.torch_seconds},
                "dlkit": {"test_accuracy": result.dlkit_accuracy, "median_step_ms": 1e3 * result.dlkit_seconds},
                "speed_up": result.speed_up,
                "largest_loss_difference": result.largest_loss_difference,
            }
            for result in results
        ],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    return np.convolve(values, np.full(window, 1 / window), mode="valid")


def _draw(loss_axes: Axes, difference_axes: Axes, result: Result) -> None:
    losses = np.array(result.torch_losses), np.array(result.dlkit_losses)
    steps = len(losses[0])
    # Single steps jump by more than the curve falls: 1/40 of the training is enough to see it.
    window = max(1, steps // 40)
    at = np.arange(window, steps + 1)
    labels = (
        f"torch.nn: {1e3 * result.torch_seconds:.1f} ms a step, accuracy {result.torch_accuracy:.1%}",
        f"dlkit: {1e3 * result.dlkit_seconds:.1f} ms a step, accuracy {result.dlkit_accuracy:.1%}",
    )
    styles: tuple[dict[str, Any], ...] = (
        {"color": TORCH_COLOR, "linewidth": 4.5},
        {"color": DLKIT_COLOR, "linewidth": 1.6, "linestyle": (0, (4, 3))},
    )
    for values, label, style in zip(losses, labels, styles, strict=True):
        loss_axes.plot(at, _smooth(values, window), label=label, **style)
    loss_axes.set_title(f"{result.model}, dlkit's layers: {_layers(result)}", fontsize=13)
    loss_axes.set_ylabel("training loss, nats" if window == 1 else f"training loss, nats\n(mean of {window} steps)")
    loss_axes.legend(frameon=False, loc="upper right")

    difference = np.maximum(np.abs(losses[0] - losses[1]), LEAST_DIFFERENCE)
    difference_axes.semilogy(np.arange(1, steps + 1), difference, ".", color=DLKIT_COLOR, markersize=3, alpha=0.5)
    difference_axes.axhline(float(np.finfo(np.float32).eps), color="gray", linewidth=1, linestyle=":")
    note = f"dotted: the resolution of fp32 at 1; equal losses are drawn at {LEAST_DIFFERENCE:.0e}"
    difference_axes.set_title(note, fontsize=9, color="dimgray", loc="left")
    difference_axes.set_ylim(LEAST_DIFFERENCE / 2, max(2 * difference.max(), 1e-5))
    difference_axes.set_ylabel("difference of the\ntwo losses, nats")
    difference_axes.set_xlabel("training step")
    loss_axes.sharex(difference_axes)
    loss_axes.tick_params(labelbottom=False)
    for axes in (loss_axes, difference_axes):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)


def write_plot(path: Path, data: Dataset, results: Sequence[Result]) -> None:
    """For each model both loss curves, and below them their difference; two models side by side."""
    columns = min(len(results), 2)
    rows = math.ceil(len(results) / columns)
    # Figure and not pyplot: it draws with Agg and leaves the caller's matplotlib backend alone.
    figure = Figure(figsize=(1 + 5.5 * columns, 0.4 + 6 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=(3, 2) * rows)
    for index, result in enumerate(results):
        row, column = divmod(index, columns)
        _draw(axes[2 * row, column], axes[2 * row + 1, column], result)
    figure.suptitle(f"{data.name}, trained on torch.nn and on dlkit", fontsize=14, fontweight="bold")
    figure.savefig(path, dpi=130)
