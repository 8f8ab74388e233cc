"""Runs an experiment: trains the runs that are not finished, prints the table, draws the figure."""

import argparse
import contextlib
import errno
import functools
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from matplotlib.figure import Figure

from dlkit.lab import experiment, report
from dlkit.lab.data import DataError, load
from dlkit.lab.experiment import Setting
from dlkit.lab.training import Refused, Run, folder_name, main_process, train, write

METRIC = ("val_accuracy", "max")


def say(line: str) -> None:
    print(line, flush=True)


def setting_of(args: argparse.Namespace) -> Setting:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch sees no GPU here")
    if args.threads:
        torch.set_num_threads(args.threads)
    data = load(args.data or ("digits" if args.quick else None))
    layers = ("torch", "dlkit") if args.layers == "both" else (args.layers,)
    return Setting(
        data=data.to(device),
        layers=layers,
        seeds=args.seeds or 0,
        epochs=args.epochs,
        device=device,
        strategy=args.strategy,
        devices=args.devices,
        precision=args.precision,
        output=Path(args.output or ("lab-results-quick" if args.quick else "lab-results")),
        quick=args.quick,
    )


def runs_of(name: str, module: ModuleType, setting: Setting) -> list[Run]:
    seeds = setting.seeds or getattr(module, "QUICK_SEEDS" if setting.quick else "SEEDS", 1)
    metric = getattr(module, "METRIC", METRIC)
    configurations = module.configurations(setting)
    folders = [folder_name(each.name) for each in configurations]
    assert len(set(folders)) == len(folders), f"{name}: two configurations share a folder"
    return [
        Run(name, configuration, setting, layers, seed, metric)
        for configuration in configurations
        for seed in range(seeds)
        for layers in setting.layers
    ]


def do(name: str, setting: Setting) -> None:
    """Runs one experiment and writes its figure and table."""
    module = experiment.load(name)
    print(f"\n{name}: {module.SUMMARY}", flush=True)
    start = time.perf_counter()
    folder, shown = setting.output / name, setting.data.name
    results: Any
    if hasattr(module, "run"):
        text, results = module.run(setting)
        parts = [text]
    else:
        if hasattr(module, "search"):
            metric = getattr(module, "METRIC", METRIC)
            runs = module.search(setting, functools.partial(Run, name, setting=setting, metric=metric), say)
        else:
            runs = runs_of(name, module, setting)
            train(runs, say)
        if not main_process():
            return
        results, shown = report.Results(runs), runs[0].data.name
        parts = [report.table(results), report.parity(results)]
        if hasattr(module, "finish"):
            parts.append(module.finish(results, setting))
        write(folder / "results.csv", report.results_csv(results))
    text = "\n\n".join(part for part in [*parts, f"Look at: {module.LOOK_AT}"] if part)
    figure = Figure(figsize=getattr(module, "FIGURE_SIZE", (11, 4.5)), layout="constrained")
    module.draw(figure, results, setting)
    figure.suptitle(f"{name}: {shown}", fontsize=13, fontweight="bold")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write(folder / f"{name}.png", picture.getvalue())
    write(folder / "table.txt", text + "\n")
    print(f"\n{text}\n\n{folder / name}.png, after {time.perf_counter() - start:.0f} s", flush=True)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """A user's mistake, a full disk and Ctrl-C end the program with one line and a status that is not 0."""
    try:
        yield
    except (DataError, Refused) as error:
        raise SystemExit(f"dlkit lab: {error}") from error
    except OSError as error:
        if error.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EACCES,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EEXIST,
        ):
            raise
        where = f" {error.filename}" if error.filename else ""
        raise SystemExit(f"dlkit lab: cannot write{where}: {error.strerror}; what was finished is kept") from error
    except KeyboardInterrupt as error:
        raise SystemExit("dlkit lab: interrupted; the same command goes on after the last finished epoch") from error


def run(args: argparse.Namespace) -> int:
    if not main_process():
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  (until the process ends)
    with one_line():
        setting = setting_of(args)
        data = setting.data
        print(f"{data.name} from {data.source}; validation on its {len(data.test_images):,} test images")
        if args.experiment != "all":
            do(args.experiment, setting)
            return 0
        refused = 0
        for name in experiment.names():
            try:
                do(name, setting)
            except Refused as error:  # the other experiments still run
                print(f"dlkit lab: {error}", file=sys.stderr, flush=True)
                refused = 1
    return refused
