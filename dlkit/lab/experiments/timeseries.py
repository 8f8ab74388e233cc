"""Forecasts: the next number of a noisy sine with a trend, from the 50 before it, by LSTM and GRU."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 150
SUMMARY = "LSTM, LSTM of 3 layers and GRU on a noisy sine with a trend, with and without LayerNorm and dropout"
LOOK_AT = "how near each comes to the noise, which nobody can forecast; whether LayerNorm and dropout help them."
METRIC = ("val_mae", "min")
FIGURE_SIZE = (12, 4.6)
STEPS, NOISE = 50, 0.1
TRAIN, TEST = 2_000, 400


def series() -> Tensor:
    """A sine of period 25 with a slower one, a trend of 1 in 1,000 steps, and normal noise of deviation 0.1."""
    at = torch.arange(STEPS + TRAIN + STEPS + TEST, dtype=torch.float64)
    clean = torch.sin(2 * math.pi * at / 25) + 0.5 * torch.sin(2 * math.pi * at / 83) + at / 1_000
    noise = torch.randn(len(at), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (clean + NOISE * noise).float()


def windows(data: Any) -> Any:
    """50 numbers and the one after them; the validation windows begin where the training ends."""
    cut = series().to(data.train_images.device).unfold(0, STEPS + 1, 1)
    train, test = cut[:TRAIN], cut[TRAIN + STEPS :]
    return replace(
        data, name="noisy sine with a trend", source="made here", train_images=train[:, :-1], train_labels=train[:, -1],
        test_images=test[:, :-1], test_labels=test[:, -1],
    )  # fmt: skip


def error(data: Any) -> dict[str, Any]:
    from torchmetrics import MeanAbsoluteError

    return {"mae": MeanAbsoluteError()}


def configurations(setting: Setting) -> list[Configuration]:
    plain = partial(Configuration, data=windows, metrics=error, loss=nn.MSELoss, lr=3e-3, epochs=25, batch_size=64)
    kinds = {
        "LSTM": partial(models.Forecaster, kind="LSTM"),
        "LSTM, 3 layers": partial(models.Forecaster, kind="LSTM", layers=3),
        "GRU": partial(models.Forecaster, kind="GRU"),
    }
    return [
        plain(f"{name}{end}", partial(model, **options))
        for name, model in kinds.items()
        for end, options in (("", {}), (" + LayerNorm, dropout", {"norm": True, "dropout": 0.1}))
    ]


def baselines() -> dict[str, float]:
    """The mean absolute error of repeating the last number, and of knowing all but the noise."""
    test = series()[TRAIN + STEPS :].unfold(0, STEPS + 1, 1)
    return {
        "the last number again": float((test[:, -1] - test[:, -2]).abs().mean()),
        "the noise itself": NOISE * math.sqrt(2 / math.pi),
    }


def draw(figure: Any, results: Any, setting: Setting) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    shown = slice(0, 60)
    truth = results.first(results.names[0]).data.test_labels[shown].cpu()
    left.plot(truth, color="black", marker=".", markersize=3, linewidth=0.6, label="truth")
    for index in (0, 2, 4):
        run = results.first(results.names[index])
        with torch.inference_mode():
            forecast = run.model()(run.data.test_images[shown]).cpu()
        left.plot(forecast, color=report.COLORS[index // 2], linewidth=1.5, label=results.names[index])
    report.tidy(left, "each number forecast from the 50 before it", "step of the validation part")
    left.legend(frameon=False, ncols=2, loc="upper left")
    left.margins(y=0.25)

    known = baselines()
    rows = range(len(results.names))
    values = [results.mean(name) for name in results.names]
    colors = [report.COLORS[row // 2] for row in rows]
    bars = right.barh(rows, values, 0.65, color=colors)
    for row, bar in enumerate(bars):
        bar.set_alpha(0.55 if row % 2 else 1.0)
    right.bar_label(bars, fmt=" %.4f", fontsize=8)
    for (name, value), style in zip(known.items(), ("--", ":"), strict=True):
        right.axvline(value, color="black", linewidth=1, linestyle=style, label=f"{name}: {value:.4f}")
    right.set_yticks(rows, results.names, fontsize=8)
    right.invert_yaxis()
    right.margins(x=0.12)
    right.locator_params(axis="x", nbins=5)
    report.tidy(right, "mean absolute error, validation")
    right.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize=8)


def finish(results: Any, setting: Setting) -> str:
    return "For comparison: " + ", ".join(f"{name} {value:.4f}" for name, value in baselines().items()) + "."
