"""Ensembles: five trainings that differ only in their seed, and their joint answers."""

import functools
from dataclasses import replace
from typing import Any

import torch

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 170
SUMMARY = "5 seeds: each by itself, their probabilities averaged, voted, stacked"
LOOK_AT = "how much more the five together know than the best of them, for five times the work."
SEEDS, QUICK_SEEDS = 5, 3
IMAGES, HELD_OUT = 10_000, 2_000


def without_the_last(data: Any) -> Any:
    """The last training images are kept for the stacking, which must not learn from images that the five have seen."""
    kept = len(data.train_images) - min(HELD_OUT, len(data.train_images) // 5)
    return replace(data, train_images=data.train_images[:kept], train_labels=data.train_labels[:kept])


def configurations(setting: Setting) -> list[Configuration]:
    cnn = functools.partial(models.small_cnn, dropout=0.1)
    return [Configuration("cnn", cnn, data=without_the_last, images=IMAGES, lr=2e-3, epochs=6, batch_size=64)]


def probabilities(run: Any, images: torch.Tensor) -> torch.Tensor:
    model = run.model("last")
    with torch.inference_mode():
        return torch.cat([model(some).softmax(1) for some in images.split(500)]).cpu()


@functools.lru_cache(maxsize=1)
def accuracies(results: Any) -> dict[str, float]:
    """The accuracy of each network, then of the ways to join them, on the validation images."""
    from sklearn.linear_model import LogisticRegression

    runs = results.runs("cnn")
    data = runs[0].setting.data
    labels, count = data.test_labels.cpu(), len(runs[0].data.train_images)
    held_out = data.train_images[-min(HELD_OUT, len(data.train_images) // 5) :]
    assert count + len(held_out) <= len(data.train_images)
    each = torch.stack([probabilities(run, data.test_images) for run in runs])
    votes = torch.nn.functional.one_hot(each.argmax(2), data.classes).sum(0)
    known = {f"seed {run.seed}": (p.argmax(1) == labels).float().mean() for run, p in zip(runs, each, strict=True)}
    averaged = each.mean(0)
    known["averaged"] = (averaged.argmax(1) == labels).float().mean()
    # Among equally many votes the averaged probability decides.
    known["voted"] = ((votes + averaged).argmax(1) == labels).float().mean()
    stack = LogisticRegression(max_iter=1_000)
    seen = torch.cat([probabilities(run, held_out) for run in runs], 1).log().clamp(min=-20)
    stack.fit(seen.numpy(), data.train_labels[-len(held_out) :].cpu().numpy())
    given = stack.predict(torch.cat(list(each), 1).log().clamp(min=-20).numpy())
    known["stacked"] = (torch.tensor(given) == labels).float().mean()
    return {name: float(value) for name, value in known.items()}


def draw(figure: Any, results: Any, setting: Setting) -> None:
    axes = figure.subplots()
    known = accuracies(results)
    seeds = len(known) - 3
    colors = [report.COLORS[5]] * seeds + [report.COLORS[0], report.COLORS[2], report.COLORS[1]]
    bars = axes.bar(list(known), list(known.values()), 0.65, color=colors)
    axes.bar_label(bars, fmt="%.4f", fontsize=9)
    values = list(known.values())
    mean = sum(values[:seeds]) / seeds
    axes.axhline(mean, color="gray", linestyle=":", linewidth=1, label=f"mean of one: {mean:.4f}")
    reach = max(values) - min(values) or 0.01
    axes.set_ylim(min(values) - reach, min(1.0, max(values) + 0.4 * reach))
    report.tidy(axes, "validation accuracy (the axis does not begin at 0)")
    axes.legend(frameon=False, loc="upper left")


def finish(results: Any, setting: Setting) -> str:
    known = accuracies(results)
    return "\n".join(f"{name:<10}{value:.4f}" for name, value in known.items())
