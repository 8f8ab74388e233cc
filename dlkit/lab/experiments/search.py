"""A search for dropout rate, width and learning rate by Optuna, which ends trials that lie below the median."""

from functools import partial
from typing import Any

from dlkit.lab import models, report
from dlkit.lab.experiment import QUICK_EPOCHS, Configuration, Setting

ORDER = 210
SUMMARY = "dropout rate, width and learning rate with Optuna and median pruning"
LOOK_AT = "which of the three matters; how many trials were ended early, and whether those still rose."
FIGURE_SIZE = (14, 4.4)
TRIALS, QUICK_TRIALS, EPOCHS = 30, 8, 6
WARM_UP = 1  # epochs before a trial may be ended
SPACE = ("dropout", "width", "lr")


def suggest(trial: Any) -> dict[str, Any]:
    return {
        "dropout": round(trial.suggest_float("dropout", 0.0, 0.6), 3),
        "width": trial.suggest_int("width", 16, 512, log=True),
        "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
    }


def configuration(number: int, dropout: float, width: int, lr: float, epochs: int) -> Configuration:
    mlp = partial(models.mlp, widths=(width, width), dropout=dropout)
    return Configuration(f"trial {number:02}", mlp, lr=lr, images=10_000, epochs=epochs, batch_size=128)


def search(setting: Setting, make: Any, say: Any) -> list[Any]:
    """The study runs anew each time, from one seed: it asks for the same trials, and those on disk answer at once."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=0)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=WARM_UP)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
    epochs = setting.epochs or (QUICK_EPOCHS if setting.quick else EPOCHS)
    runs = []
    for number in range(QUICK_TRIALS if setting.quick else TRIALS):
        trial = study.ask()
        values = suggest(trial)
        run = make(configuration=configuration(number, **values, epochs=epochs), layers=setting.layers[-1], seed=0)
        before = len(run.history)
        for epoch in range(epochs):
            if epoch >= len(run.history):
                run.advance(1)
            trial.report(run.history[epoch]["val_accuracy"], epoch)
            if epoch + 1 < epochs and trial.should_prune():
                break
        run.pruned = epoch + 1 < epochs
        run.values = values
        if run.pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, run.history[-1]["val_accuracy"])
        if len(run.history) > before:
            text = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            end = ", ended early" if run.pruned else ""
            say(f"  {run}: {text}: {len(run.history)} epochs, val_accuracy {run.value():.4f}{end}")
        runs.append(run)
    runs[0].study = study
    return runs


def importances(results: Any) -> dict[str, float]:
    """The share of the accuracy's variance that each parameter explains (fANOVA), over trials not ended early."""
    import optuna

    study = results.all[0].study
    return dict(
        optuna.importance.get_param_importances(study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))
    )


def draw(figure: Any, results: Any, setting: Setting) -> None:
    left, middle, right = figure.subplots(1, 3, width_ratios=(0.9, 1.1, 1.1))
    known = importances(results)
    names = sorted(known, key=lambda name: -known[name])
    bars = left.barh(names, [known[name] for name in names], 0.6, color=report.COLORS[0])
    left.bar_label(bars, fmt=" %.2f")
    left.invert_yaxis()
    left.margins(x=0.15)
    report.tidy(left, "importance (share of the variance)")
    for run in results.all:
        color = "#b0b0b0" if run.pruned else report.COLORS[0]
        column = run.column("val_accuracy")
        middle.plot(
            range(1, len(column) + 1), column, marker=".", linewidth=1, color=color, zorder=1 if run.pruned else 2
        )
    best = max(run.value() for run in results.all)
    bottom = max(best - 0.25, min(run.value() for run in results.all) - 0.01)
    below = sum(run.value() < bottom for run in results.all)
    lower = f"; {below} lie lower" if below else ""
    report.tidy(middle, f"each trial; grey: ended early{lower}", "epoch", "validation accuracy")
    for pruned, marker in ((True, "x"), (False, "o")):
        runs = [run for run in results.all if run.pruned == pruned]
        points = right.scatter(
            [run.values["lr"] for run in runs], [run.value() for run in runs], marker=marker,
            c=[run.values["width"] for run in runs], cmap="viridis", vmin=16, vmax=512, s=36,
        )  # fmt: skip
    right.set_xscale("log")
    for axes in (middle, right):
        axes.set_ylim(bottom, best + 0.01)
    figure.colorbar(points, ax=right, label="width")
    report.tidy(right, "last accuracy; crosses: ended early", "learning rate")


def finish(results: Any, setting: Setting) -> str:
    whole = [run for run in results.all if not run.pruned]
    best = max(whole, key=lambda run: run.value())
    text = ", ".join(f"{name} {value:.3g}" for name, value in best.values.items())
    epochs = sum(len(run.history) for run in results.all)
    full = len(results.all) * best.configuration.epochs
    return (
        f"The best, {best.configuration.name}: {text}, val_accuracy {best.value():.4f}. "
        f"{len(results.all) - len(whole)} of {len(results.all)} trials were ended early: {epochs} epochs instead of "
        f"{full}.\n" + "Importance: " + ", ".join(f"{name} {value:.2f}" for name, value in importances(results).items())
    )
