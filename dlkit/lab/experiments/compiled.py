"""The training step eager, under torch.compile, with dlkit, and with both."""

import copy
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import nn

from dlkit.lab import models, report
from dlkit.lab.experiment import Configuration, Setting

ORDER = 230
SUMMARY = "the time of a training step eager, under torch.compile, with dlkit, with both"
LOOK_AT = "what torch.compile adds where dlkit's kernels already do the norms, and what it costs before the first step."
FIGURE_SIZE = (12, 4.2)
WAYS = ("torch", "torch, compiled", "dlkit", "dlkit, compiled")
STEPS, QUICK_STEPS = 40, 6
BACKEND = "inductor"  # torch.compile's own


def models_of(setting: Setting) -> dict[str, Any]:
    mlp = partial(models.mlp, norm=nn.BatchNorm1d, dropout=0.3)
    if setting.quick:
        return {"MLP with BatchNorm": mlp}
    return {"MLP with BatchNorm": mlp, "small CNN": models.small_cnn, "transformer": models.RowTransformer}


def step_times(model: nn.Module, data: Any, batch: int, steps: int, backend: str) -> dict[str, Any]:
    """way -> {"first": seconds of the first step, "median": of the others}; the four take turns, step by step."""
    import dlkit
    from dlkit.lab.training import to_dlkit

    images, labels = data.train_images[:batch], data.train_labels[:batch]
    ways: dict[str, Any] = {}
    for way in WAYS:
        own = copy.deepcopy(model)
        own = to_dlkit(own) if "dlkit" in way else own
        if "dlkit" in way:
            optimizer: Any = dlkit.optim.AdamW(own.parameters(), lr=1e-3, max_norm=1.0)
        else:
            optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3, fused=True)
        run: Any = own
        if "compiled" in way:
            torch._dynamo.reset()
            run = torch.compile(own, backend=backend)
        ways[way] = (own, run, optimizer, dlkit.functional if "dlkit" in way else nn.functional)
        # A way with another result is not timed.
        with torch.no_grad():
            torch.testing.assert_close(own.eval()(images), model.eval()(images), rtol=1e-3, atol=1e-3)
        own.train()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(steps + 1):
        for way in WAYS if turn % 2 == 0 else reversed(WAYS):
            own, run, optimizer, functional = ways[way]
            start = _now(images)
            loss = functional.cross_entropy(run(images), labels)
            loss.backward()
            if "dlkit" not in way:
                nn.utils.clip_grad_norm_(own.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            times[way].append(_now(images) - start)
    return {way: {"first": each[0], "median": statistics.median(each[1:])} for way, each in times.items()}


def _now(images: Any) -> float:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


def measured(model: nn.Module, data: Any, batch: int, steps: int, backend: Any) -> dict[str, Any]:
    """The probe. If torch.compile fails, for example for lack of a compiler, the result says why; nothing is raised."""
    try:
        return step_times(model, data, batch, steps, backend)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return {"failed": " ".join(str(error).split())[:160]}


def configurations(setting: Setting) -> list[Configuration]:
    probe = partial(measured, batch=128, steps=QUICK_STEPS if setting.quick else STEPS, backend=BACKEND)
    return [
        Configuration(name, model, epochs=0, convert=False, probe=probe) for name, model in models_of(setting).items()
    ]


def found(results: Any) -> dict[str, dict[str, Any]]:
    return {
        name: results.first(name).probes["start"]
        for name in results.names
        if "failed" not in results.first(name).probes["start"]
    }


def draw(figure: Any, results: Any, setting: Setting) -> None:
    known = found(results)
    colors = (report.TORCH_COLOR, report.COLORS[4], report.DLKIT_COLOR, report.COLORS[5])
    if not known:
        figure.subplots().set(title="torch.compile does not run here", xticks=[], yticks=[])
        return
    for axes, (name, times) in zip(figure.subplots(1, len(known), squeeze=False)[0], known.items(), strict=True):
        values = [1e3 * times[way]["median"] for way in WAYS]
        bars = axes.barh(WAYS, values, 0.65, color=colors)
        axes.bar_label(bars, [f" {value:.2f}" for value in values], fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        report.tidy(axes, f"{name}: ms a step")


def finish(results: Any, setting: Setting) -> str:
    rows = [["ms a step", *WAYS, "first compiled step, s"]]
    for name, times in found(results).items():
        first = " and ".join(f"{times[way]['first']:.1f}" for way in WAYS if "compiled" in way)
        rows.append([name, *(f"{1e3 * times[way]['median']:.2f}" for way in WAYS), first])
    failed = [
        f"{name}: {results.first(name).probes['start']['failed']}"
        for name in results.names
        if "failed" in results.first(name).probes["start"]
    ]
    return "\n".join([report.aligned(rows), *failed])
