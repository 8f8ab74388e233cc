"""The demo: two models with LayerNorm and two with BatchNorm, on torch's layers and optimizer and on dlkit's.

The two of each model share weights, batches and every step of the loop, which is timed: see race.py. The schedules are
the shortest that give a sensible accuracy (MLPs 89 %, CNN 85 %, transformer 83 %), so that all of it stays under three
minutes on two cores. The transformer costs 3 ms an image there and the CNN 1, which is why they see only part of the
data.
"""

import copy
import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlkit.lab import models, report
from dlkit.lab.data import Dataset
from dlkit.lab.experiment import QUICK_EPOCHS, Setting

ORDER = 0
SUMMARY = "the demo: four models on torch's layers and on dlkit's, the same losses in less time"
LOOK_AT = "the two losses on each other, their difference below, and the time of a step."
FIGURE_SIZE = (12, 12.4)
QUICK_IMAGES = 320  # the transformer is slow
MAX_NORM = 1.0  # gradients are clipped to it

# Differences of 0 have no place on a log scale; they are drawn here, a tenth of fp32's resolution.
LEAST_DIFFERENCE = 1e-8


@dataclass(frozen=True)
class Schedule:
    """How long to train: the first `images`, `epochs` times, in batches of `batch_size`."""

    images: int
    epochs: int
    batch_size: int
    lr: float = 1e-3


MODELS: dict[str, Callable[[Dataset], nn.Module]] = {
    "mlp": partial(models.mlp, widths=(512, 512, 512), norm=nn.LayerNorm, activation=nn.GELU),
    "transformer": models.RowTransformer,
    "batch_norm_mlp": partial(models.mlp, norm=nn.BatchNorm1d, dropout=(0.3, 0.3, 0.2)),
    "residual_cnn": models.ResidualCnn,
}

# (data set, model) -> schedule. Digits are 1,437 images of 8x8, so they need more epochs and get them cheaply.
SCHEDULES = {
    ("Fashion-MNIST", "mlp"): Schedule(images=60_000, epochs=3, batch_size=128),
    ("Fashion-MNIST", "transformer"): Schedule(images=2_560, epochs=3, batch_size=32),
    ("Fashion-MNIST", "batch_norm_mlp"): Schedule(images=60_000, epochs=3, batch_size=128),
    ("Fashion-MNIST", "residual_cnn"): Schedule(images=10_000, epochs=2, batch_size=32, lr=3e-3),
    ("digits", "mlp"): Schedule(images=1_437, epochs=20, batch_size=32),
    ("digits", "transformer"): Schedule(images=1_437, epochs=8, batch_size=32),
    ("digits", "batch_norm_mlp"): Schedule(images=1_437, epochs=20, batch_size=32),
    ("digits", "residual_cnn"): Schedule(images=1_437, epochs=6, batch_size=32, lr=3e-3),
}


def rise_and_fall(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The rate rises for the first fifth of the steps and falls to 0, as a short training needs."""
    warm_up = max(1, steps // 5)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )


def contestants(model: nn.Module, lr: float) -> dict[str, Any]:
    """torch's and dlkit's version of a model; dlkit's clips in its optimizer."""
    import dlkit
    from dlkit.lab import race, training

    twin = training.to_dlkit(copy.deepcopy(model))
    clip = partial(_clip, max_norm=MAX_NORM)
    # fused: torch's fastest AdamW; the default one takes 2.6 times as long.
    torchs = partial(torch.optim.AdamW, lr=lr, fused=True)
    dlkits = partial(dlkit.optim.AdamW, lr=lr, max_norm=MAX_NORM)
    return {
        "torch": race.Contestant(model, torchs, nn.functional.cross_entropy, clip, rise_and_fall),
        "dlkit": race.Contestant(twin, dlkits, dlkit.functional.cross_entropy, None, rise_and_fall),
    }


def _clip(model: nn.Module, max_norm: float) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def train(name: str, data: Dataset, schedule: Schedule, seed: int, device: str, folder: Path) -> dict[str, Any]:
    """The results of one model's race, as results.json holds them. Losses are of every training step, in nats."""
    import sys

    import lightning

    import dlkit
    from dlkit.lab import race, training

    torch.manual_seed(seed)
    pair = contestants(MODELS[name](data), schedule.lr)
    layers = [each for each in pair["dlkit"].model.modules() if type(each).__module__.startswith("dlkit.nn")]
    fused = (dlkit.nn.BatchNormReLU1d, dlkit.nn.BatchNormReLU2d)
    course = race.Race(pair, data, schedule.batch_size, schedule.epochs, seed)
    trainer = lightning.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=schedule.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stderr.isatty(),
        default_root_dir=folder,
    )
    training.fit(trainer, course)
    losses = {version: torch.stack(values).tolist() for version, values in course.losses.items()}
    found = {version: 1e3 * course.median_seconds(version) for version in pair}
    return {
        "model": name,
        "layers_replaced": len(layers),
        "layers_fused": sum(isinstance(layer, fused) for layer in layers),
        "training_images": len(data.train_images),
        "epochs": schedule.epochs,
        "batch_size": course.batch_size,
        "steps": len(losses["torch"]),
        **{version: {"test_accuracy": course.accuracy(version), "median_step_ms": found[version]} for version in pair},
        "speed_up": found["torch"] / found["dlkit"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
        "losses": losses,
    }


def machine() -> dict[str, str | int]:
    """The facts that a step time depends on."""
    import dlkit

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


def run(setting: Setting) -> tuple[str, list[dict[str, Any]]]:
    """Races each model that is not done yet. Returns the text below the figure, and the results of each."""
    from dlkit.lab import training

    if setting.devices > 1 or setting.precision != "32-true":
        raise training.Refused("fashion-mnist: runs in one process and in fp32")
    results = []
    for name in MODELS:
        schedule = SCHEDULES[setting.data.name, name]
        if setting.quick:
            schedule = replace(schedule, images=QUICK_IMAGES, epochs=min(schedule.epochs, QUICK_EPOCHS))
        if setting.epochs:
            schedule = replace(schedule, epochs=setting.epochs)
        folder = setting.output / "fashion-mnist" / name.replace("_", "-")
        data = setting.data.first(schedule.images)
        config = {"experiment": "fashion-mnist", "model": name, "data": data.name, "seed": 0, **asdict(schedule)}
        config |= {"device": setting.device, "threads": torch.get_num_threads()}
        training.take_up(folder, config)
        kept = folder / "results.json"
        if not kept.is_file():
            print(f"  {name}: {schedule.images:,} images, {schedule.epochs} epochs", flush=True)
            found = train(name, data, schedule, 0, setting.device, folder)
            training.write(kept, json.dumps({**found, "machine": machine(), "data": data.name}) + "\n")
        results.append(json.loads(kept.read_text()))
    return f"{table(results)}\n\n{caption(setting.data, results)}", results


def _layers(result: dict[str, Any]) -> str:
    count, fused = result["layers_replaced"], result["layers_fused"]
    return f"{count}, {fused} fused" if fused else str(count)


def table(results: list[dict[str, Any]]) -> str:
    rows = [["model", "layers", "test accuracy", "step time, ms", "speed-up", "largest loss difference"]]
    for result in results:
        ours, theirs = result["dlkit"], result["torch"]
        difference = f"{result['largest_loss_difference']:.1e}"
        rows += [
            [result["model"], "torch.nn", f"{theirs['test_accuracy']:.2%}", f"{theirs['median_step_ms']:.2f}", "", ""],
            [
                "",
                f"dlkit ({_layers(result)})",
                f"{ours['test_accuracy']:.2%}",
                f"{ours['median_step_ms']:.2f}",
                f"{result['speed_up']:.3f}x",
                difference,
            ],
        ]
    return report.aligned(rows)


def caption(data: Dataset, results: list[dict[str, Any]]) -> str:
    """The data, and the way in which the step time was taken."""
    from dlkit.lab.race import WARM_UP_STEPS

    lines = [
        f"{result['model']}: {result['training_images']:,} of {len(data.train_images):,} training images, "
        f"{result['epochs']} epochs, batches of {result['batch_size']}."
        for result in results
    ]
    facts = results[0]["machine"]
    device = facts["gpu"] if data.train_images.is_cuda else f"{facts['cpu']}, CPU threads: {facts['threads']}"
    lines += [
        f"fp32, AdamW with clipping, torch's and dlkit's, {device}.",
        "dlkit (n, m fused): n layers replaced, m of them one with the ReLU after it.",
        f"Step time: median after {WARM_UP_STEPS} steps; the two take turns on the same batches.",
        "Dropout draws other masks for each, so the losses of transformer and batch_norm_mlp differ by chance.",
        "Through BatchNorm a difference of rounding grows from step to step.",
    ]
    return "\n".join(lines)


def draw(figure: Any, results: list[dict[str, Any]], setting: Setting) -> None:
    """For each model both loss curves, and below them their difference."""
    panels = figure.subplots(4, 2, height_ratios=(3, 2) * 2)
    for index, result in enumerate(results):
        row, column = divmod(index, 2)
        _draw(panels[2 * row, column], panels[2 * row + 1, column], result)


def _draw(above: Any, below: Any, result: dict[str, Any]) -> None:
    losses = torch.tensor([result["losses"]["torch"], result["losses"]["dlkit"]], dtype=torch.float64)
    steps = losses.shape[1]
    # Single steps jump by more than the curve falls: 1/40 of the training is enough to see it.
    window = max(1, steps // 40)
    smooth = losses.unfold(1, window, 1).mean(2)
    styles: tuple[dict[str, Any], ...] = (
        {"color": report.TORCH_COLOR, "linewidth": 4.5},
        {"color": report.DLKIT_COLOR, "linewidth": 1.6, "linestyle": (0, (4, 3))},
    )
    for values, version, style in zip(smooth, ("torch", "dlkit"), styles, strict=True):
        facts = result[version]
        label = f"{version}: {facts['median_step_ms']:.1f} ms a step, accuracy {facts['test_accuracy']:.1%}"
        above.plot(range(window, steps + 1), values.tolist(), label=label, **style)
    report.tidy(above, f"{result['model']}, dlkit's layers: {_layers(result)}")
    above.set_ylabel("training loss, nats" if window == 1 else f"training loss, nats\n(mean of {window} steps)")
    above.legend(frameon=False, loc="upper right")

    difference = (losses[0] - losses[1]).abs().clamp(min=LEAST_DIFFERENCE)
    at = range(1, steps + 1)
    below.semilogy(at, difference.tolist(), ".", color=report.DLKIT_COLOR, markersize=3, alpha=0.5)
    below.axhline(torch.finfo(torch.float32).eps, color="gray", linewidth=1, linestyle=":")
    report.tidy(below, x="training step", y="difference of the\ntwo losses, nats")
    note = f"dotted: the resolution of fp32 at 1; equal losses are drawn at {LEAST_DIFFERENCE:.0e}"
    below.set_title(note, fontsize=9, color="dimgray", loc="left")
    below.set_ylim(LEAST_DIFFERENCE / 2, max(2 * float(difference.max()), 1e-5))
    above.sharex(below)
    above.tick_params(labelbottom=False)
