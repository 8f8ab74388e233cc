"""The results of an experiment's runs: a table for the terminal, results.csv, and helpers for the figures."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dlkit.lab.training import Run

# Colours that colour-blind people can tell apart (Okabe and Ito); after these the line's style tells.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d31", "#7f7f7f", "#5e3c99")
TORCH_COLOR, DLKIT_COLOR = "#f0a04b", "#1b3a5c"


class Results:
    """The finished runs of one experiment, in the order of its configurations.

    With --layers both, `names`, `runs` and the figures have only dlkit's runs; the table has both.
    """

    def __init__(self, runs: Sequence["Run"]) -> None:
        self.all = list(runs)
        self.layers = list(dict.fromkeys(run.layers for run in runs))
        self.drawn = [run for run in runs if run.layers == self.layers[-1]]
        self.names = list(dict.fromkeys(run.configuration.name for run in runs))

    def runs(self, name: str, layers: str | None = None) -> list["Run"]:
        """The runs of a configuration, one per seed."""
        wanted = layers or self.layers[-1]
        return [run for run in self.all if run.configuration.name == name and run.layers == wanted]

    def first(self, name: str) -> "Run":
        return self.runs(name)[0]

    def mean(self, name: str, column: str | None = None, layers: str | None = None) -> float:
        """The mean over the seeds of the metric, or of another column, after the last epoch."""
        return statistics.fmean(run.value(column) for run in self.runs(name, layers))


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def interval(differences: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of paired differences, by Student's t; NaN for fewer than two."""
    from scipy.stats import t  # scikit-learn brings it

    if len(differences) < 2:
        return math.nan
    return float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / math.sqrt(len(differences))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """The rows as text, a rule after the first; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(pairs)
        ).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _with_spread(values: Sequence[float]) -> str:
    text = f"{statistics.fmean(values):.4f}"
    return f"{text} ± {spread(values):.4f}" if len(values) > 1 else text


def table(results: Results) -> str:
    """Metric after the last epoch and at its best, training accuracy, seconds an epoch; by configuration."""
    trained = [name for name in results.names if results.first(name).history]
    if not trained:
        return ""
    metric = results.first(trained[0]).metric[0]
    train = metric.replace("val_", "train_")
    rows = [["", "layers", "epochs", metric, "best", train, "train_loss", "val_loss", "s an epoch"]]
    for name in trained:
        for layers in results.layers:
            runs = results.runs(name, layers)
            rows.append(
                [
                    name if layers == results.layers[0] else "",
                    layers,
                    f"{statistics.fmean(len(run.history) for run in runs):.0f}",
                    _with_spread([run.value() for run in runs]),
                    _with_spread([run.best() for run in runs]),
                    f"{statistics.fmean(run.value(train) for run in runs):.4f}",
                    f"{statistics.fmean(run.value('train_loss') for run in runs):.4f}",
                    f"{statistics.fmean(run.value('val_loss') for run in runs):.4f}",
                    f"{statistics.median(run.epoch_seconds() for run in runs):.2f}",
                ]
            )
    return aligned(rows)


def parity(results: Results) -> str:
    """dlkit against torch: the difference of the final metric with its 95 % interval, and the time of an epoch."""
    if len(results.layers) < 2:
        return ""
    trained = [name for name in results.names if results.first(name).history]
    rows = [["dlkit - torch", "difference", "95 % interval", "torch, s", "dlkit, s", "torch / dlkit"]]
    for name in trained:
        pairs = list(zip(results.runs(name, "torch"), results.runs(name, "dlkit"), strict=True))
        differences = [ours.value() - theirs.value() for theirs, ours in pairs]
        mean, half = statistics.fmean(differences), interval(differences)
        # Only epochs that both ran, one after the other.
        times = [
            (theirs["seconds"], ours["seconds"])
            for run, twin in pairs
            for theirs, ours in list(zip(run.history, twin.history, strict=False))[1:]
            or [(run.history[0], twin.history[0])]
        ]
        ratio = statistics.median(theirs / ours for theirs, ours in times)
        rows.append(
            [
                name,
                f"{mean:+.4f}",
                "one seed" if math.isnan(half) else f"{mean - half:+.4f} to {mean + half:+.4f}",
                f"{statistics.median(theirs for theirs, _ in times):.3f}",
                f"{statistics.median(ours for _, ours in times):.3f}",
                f"{ratio:.3f}",
            ]
        )
    return aligned(rows) + "\nTimes are of the training part of an epoch; the two took turns, epoch by epoch."


def results_csv(results: Results) -> str:
    lines = ["configuration,layers,seed,epochs,metric,last,best,seconds_an_epoch"]
    for run in results.all:
        if run.history:
            facts = [
                run.layers,
                run.seed,
                len(run.history),
                run.metric[0],
                run.value(),
                run.best(),
                run.epoch_seconds(),
            ]
            lines.append(",".join([f'"{run.configuration.name}"', *map(str, facts)]))
    return "\n".join(lines) + "\n"


# Drawing

FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


def class_names(data: Any) -> Sequence[str]:
    return FASHION if data.name == "Fashion-MNIST" else [str(label) for label in range(data.classes)]


def tidy(axes: "Axes", title: str = "", x: str = "", y: str = "") -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(title=title, xlabel=x, ylabel=y)
    if x in ("epoch", "step"):
        axes.locator_params("x", integer=True)


def columns(axes: "Axes", run: "Run", colors: dict[str, int]) -> None:
    """Columns of a run by epoch, each in COLORS[number], with a legend."""
    for column, number in colors.items():
        name = column.replace("_", " ")
        axes.plot(range(1, len(run.history) + 1), run.column(column), marker=".", color=COLORS[number], label=name)
    axes.legend(frameon=False)


def curves(
    axes: "Axes",
    results: Results,
    column: str,
    names: Iterable[str] | None = None,
    label: Callable[[str], str] = str,
    x: Callable[["Run"], Sequence[float]] | None = None,
    **style: Any,
) -> None:
    """A column of the metrics by epoch, one line per configuration: the mean over the seeds, their range shaded."""
    for name in results.names if names is None else names:
        runs = [run for run in results.runs(name) if run.history]
        if not runs:
            continue
        length = min(len(run.history) for run in runs)
        at = list(x(runs[0]) if x else range(1, length + 1))[:length]
        values = list(zip(*(run.column(column)[:length] for run in runs), strict=True))
        color = COLORS[results.names.index(name) % len(COLORS)]
        middle = [statistics.fmean(each) for each in values]
        marks = {"marker": "."} if length < 20 else {}
        axes.plot(at, middle, **{"color": color, "label": label(name), "linewidth": 1.8, **marks, **style})
        if len(runs) > 1:
            axes.fill_between(
                at, [min(each) for each in values], [max(each) for each in values], color=color, alpha=0.15
            )


def steps(run: "Run") -> list[int]:
    """For `x` of curves(): the number of training steps at the end of each epoch."""
    each = run.configuration.epoch_steps or len(run.data.train_images) // run.configuration.batch_size
    return [each * (epoch + 1) for epoch in range(len(run.history))]


def loss_and_accuracy(
    figure: "Figure", results: Results, names: Iterable[str] | None = None, by_step: bool = False
) -> None:
    """The usual two pictures: training loss and validation accuracy by epoch."""
    wanted = list(results.names if names is None else names)
    left, right = figure.subplots(1, 2)
    x = steps if by_step else None
    curves(left, results, "train_loss", wanted, x=x)
    curves(right, results, "val_accuracy", wanted, x=x)
    tidy(left, "training loss", "step" if by_step else "epoch", "nats")
    tidy(right, "validation accuracy", "step" if by_step else "epoch")
    right.legend(frameon=False, loc="lower right")
