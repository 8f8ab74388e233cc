"""Training steps of whole models: zero_grad, forward, loss, backward, clipping to norm 1, AdamW.

The contestants are: native, the model as people write it; native_best, torch's own fastest settings (fused AdamW,
foreach clipping, channels_last convolutions); compile, torch.compile of the model with these; dlkit, replace() and
fuse() and its AdamW(max_norm=1); dlkit_best, the same in channels_last, if there are convolutions; dlkit_graph, the
same through torch.compile(backend="dlkit"); ceiling, the model without norms and dropouts under the fused AdamW, about
the limit for faster ones. All start from the same weights and see the same batches. Parity comes first: with dropout
off the losses of the first steps must agree, or a contestant is not timed. Then they take turns of some steps each, in
which each finds its own weights in the caches as in training.

All is measured twice, each time in its own process: with default memory, and after dlkit.reuse_cpu_memory() for every
contestant. Peak memory is the growth of a process that trains only one contestant, the model included. Last, the
profiler gives the parts of dlkit's step.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkit
from dlkit.lab import models as lab

from . import _arguments, _machine, _report, _zoo
from ._runner import interleave

MAX_NORM, LR = 1.0, 1e-3
IMAGE, CLASSES = (28, 28), 10
SHAPE = lab.Shape(IMAGE, CLASSES)
BATCHES = 4
PARITY_STEPS = 4
# Rounding errors grow through AdamW, whose first steps have size lr for any gradient: after 4 steps native with another
# order of summation differs from itself by 1e-4.
TOLERANCE = 1e-3
SAMPLE_S = 0.05
MEMORY = ("default", "reuse")
MODELS = ("mlp", "cnn", "transformer", "gpt")
CONTESTANTS = ("native", "native_best", "compile", "dlkit", "dlkit_best", "dlkit_graph", "ceiling")


def cnn(image_size: tuple[int, int], classes: int, dropout: float = 0.25) -> nn.Module:
    """Two blocks of two convolutions (32-32-64-64 channels), each BatchNorm and ReLU; each ends with max-pool,
    dropout."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, image_size[0]))]
    inputs = 1
    for width in (32, 64):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
    features = inputs * (image_size[0] // 4) * (image_size[1] // 4)
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(features, 128),
        nn.ReLU(),
        nn.Dropout(2 * dropout),
        nn.Linear(128, classes),
    )


class Gpt(nn.Module):
    """A GPT-2-shaped stack of torch's pre-norm encoder layers with a causal mask. Tokens [batch, context] to logits."""

    def __init__(
        self, vocabulary: int = 65, context: int = 128, width: int = 384, depth: int = 6, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 6, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.embedding(tokens) + self.position)
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x)).flatten(0, 1)


class Workload(NamedTuple):
    make: Callable[[bool], nn.Module]  # with dropout or without
    batches: Callable[[], list[tuple[Tensor, Tensor]]]
    batch: int
    target: float | None = None  # speed-up over native on 2 cores that dlkit aims at
    loss: Callable[[Tensor, Tensor], Tensor] | None = None  # else cross entropy, each contestant's own


def _images(batch: int) -> list[tuple[Tensor, Tensor]]:
    """Random inputs and labels; a step costs the same whatever they are."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(batch, *IMAGE, generator=generator), torch.randint(CLASSES, (batch,), generator=generator))
        for _ in range(BATCHES)
    ]


def _tokens(batch: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(65, (batch, 129), generator=generator) for _ in range(BATCHES)]
    return [(some[:, :-1], some[:, 1:].flatten()) for some in tokens]


def _own(make: Callable[[], nn.Module], batches: Callable[[int], Any], batch: int, target: float) -> Workload:
    return Workload(
        lambda dropout: make() if dropout else without_dropout(make()), lambda: batches(batch), batch, target
    )


WORKLOADS = {
    "mlp": _own(lambda: lab.mlp(SHAPE, norm=nn.BatchNorm1d, dropout=(0.3, 0.3, 0.2)), _images, 128, 1.7),
    "cnn": _own(lambda: cnn(IMAGE, CLASSES), _images, 128, 1.4),
    "transformer": _own(lambda: lab.RowTransformer(SHAPE), _images, 32, 1.25),
    "gpt": _own(Gpt, _tokens, 4, 1.2),
}


@functools.cache
def workload_of(name: str) -> Workload:
    """One of WORKLOADS, or of another library: see _zoo.py."""
    return WORKLOADS[name] if name in WORKLOADS else Workload(**_zoo.load(name))


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def bare(model: nn.Module) -> nn.Module:
    """The model without its norms, whoever wrote them, and with dropouts of 0, which do nothing; a norm's own
    activation stays.
    """
    for parent in list(without_dropout(model).modules()):
        for name, child in list(parent.named_children()):
            inside = {inner for inner, _ in child.named_children()}
            if "norm" in type(child).__name__.lower() and inside <= {"act", "drop"}:  # not a head that has one
                setattr(parent, name, getattr(child, "act", nn.Identity()))
    return model


class Trainer:
    """One contestant: a model, its optimizer, and step(), one training step that returns the loss."""

    def __init__(
        self,
        contestant: str,
        model: nn.Module,
        data: list[tuple[Tensor, Tensor]],
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.data, self.steps = data, 0
        ours = contestant.startswith("dlkit")
        self.clips_apart = not ours
        self.foreach = None if contestant == "native" else True
        if ours:
            model = dlkit.fuse(dlkit.replace(model))
        elif contestant == "ceiling":
            model = bare(model)
        if contestant in ("native_best", "compile", "dlkit_best"):
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.parameters = list(model.parameters())
        self.optimizer: torch.optim.Optimizer
        if ours:
            self.optimizer = dlkit.optim.AdamW(self.parameters, lr=LR, max_norm=MAX_NORM)
        elif contestant == "native":
            self.optimizer = torch.optim.AdamW(self.parameters, lr=LR)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, fused=True)
        self.loss = loss or (dlkit.functional.cross_entropy if ours else F.cross_entropy)
        backends = {"compile": "inductor", "dlkit_graph": "dlkit"}
        self.model: Callable[[Tensor], Tensor] = model
        if contestant in backends:
            self.model = torch.compile(model, backend=backends[contestant])

    def step(self) -> Tensor:
        inputs, labels = self.data[self.steps % len(self.data)]
        self.steps += 1
        self.optimizer.zero_grad()
        loss: Tensor = self.loss(self.model(inputs), labels)
        loss.backward()
        if self.clips_apart:
            nn.utils.clip_grad_norm_(self.parameters, MAX_NORM, foreach=self.foreach)
        self.optimizer.step()
        return loss.detach()


def trainer(name: str, contestant: str, dropout: bool = True) -> Trainer:
    torch.manual_seed(0)
    workload = workload_of(name)
    return Trainer(contestant, workload.make(dropout and contestant != "ceiling"), workload.batches(), workload.loss)


def losses(name: str, contestant: str) -> list[float]:
    """The losses of the first steps, without dropout."""
    trained = trainer(name, contestant, dropout=False)
    return [trained.step().item() for _ in range(PARITY_STEPS)]


def measure(name: str, contestants: list[str], reuse: bool, threads: int, budget_s: float) -> dict[str, Any]:
    """Checks and times all contestants in this process."""
    torch.set_num_threads(threads)
    if reuse:
        dlkit.reuse_cpu_memory()
    results: dict[str, dict[str, Any]] = {}
    samplers: dict[str, Callable[[], list[float]]] = {}
    expected = losses(name, "native")
    for contestant in contestants:
        try:
            if contestant != "ceiling":
                found = losses(name, contestant)
                error = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
                exact = error <= TOLERANCE
                results[contestant] = {"status": "ok" if exact else "wrong", "losses": found}
                if not exact:
                    continue
            trained = trainer(name, contestant)
            for _ in range(3):
                began = time.perf_counter()
                trained.step()
            steps = max(1, math.ceil(SAMPLE_S / (time.perf_counter() - began)))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            results[contestant] = {"status": "error", "message": f"{type(error).__name__}: {lines[0]}"}
            continue
        results.setdefault(contestant, {"status": "ok"})
        samplers[contestant] = functools.partial(_sample, trained, steps)
    for contestant, turns in interleave(samplers, budget_s, 3, 200).items():
        milliseconds = sorted(1e3 * seconds for turn in turns for seconds in turn)
        first, median, third = statistics.quantiles(milliseconds, n=4, method="inclusive")
        results[contestant] |= {
            "median_ms": median,
            "min_ms": milliseconds[0],
            "q1_ms": first,
            "q3_ms": third,
            "steps": len(milliseconds),
        }
    return results


def _sample(trained: Trainer, steps: int) -> list[float]:
    """Seconds of each step, after an untimed one that finds the caches full of another contestant's weights."""
    trained.step()
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        trained.step()
        taken.append(time.perf_counter() - began)
    return taken


def _resident(peak: bool) -> int:
    """Bytes of this process in memory, now or at its peak."""
    word = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(word):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {word}")


def peak_memory(name: str, contestant: str, reuse: bool, threads: int) -> int | None:
    """The growth of this fresh process while it trains one contestant; None where the system does not tell it."""
    torch.set_num_threads(threads)
    if reuse:
        dlkit.reuse_cpu_memory()
    try:
        before = _resident(peak=False)
        trained = trainer(name, contestant)
        for _ in range(8):
            trained.step()
        return _resident(peak=True) - before
    except OSError:
        return None


def _answer(connection: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    connection.send(function(*arguments))
    connection.close()


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in its own process; RuntimeError where that dies."""
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload([__name__])  # imports torch once, runs nothing
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process ended with status {process.exitcode}") from None
    finally:
        if process.is_alive() and sys.exc_info()[0] is KeyboardInterrupt:
            process.terminate()
        process.join()


def _memory(name: str, contestant: str, reuse: bool, threads: int) -> int | None:
    try:
        return apart(peak_memory, name, contestant, reuse, threads)
    except RuntimeError:
        return None


def run(
    names: list[str], contestants: list[str], threads: int, budget_s: float, echo: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measures the models, a table each through `echo`. Returns the file's content; Ctrl-C keeps what there is."""
    report: dict[str, Any] = {
        "bench": "models",
        **_machine.header("cpu"),
        "settings": {"budget_s": budget_s, "max_norm": MAX_NORM, "lr": LR, "tolerance": TOLERANCE},
        "interrupted": False,
        "models": [],
        "shares": {},
    }
    echo(heading(report))
    echo(HEAD)
    try:
        for name in names:
            for memory in MEMORY:
                reuse = memory == "reuse"
                images = name == "cnn" or name.startswith(("timm:", "diffusers:"))
                taking_part = [one for one in contestants if one != "dlkit_best" or images]
                try:
                    found = apart(measure, name, taking_part, reuse, threads, budget_s)
                except RuntimeError as error:  # not a contestant's exception: its process died
                    found = {one: {"status": "error", "message": str(error)} for one in taking_part}
                for contestant, entry in found.items():
                    if entry["status"] == "ok":
                        entry["peak_bytes"] = _memory(name, contestant, reuse, threads)
                workload = workload_of(name)
                entry = {"model": name, "batch": workload.batch, "memory": memory, "contestants": found}
                report["models"].append(entry | {"target": workload.target})
                for line in lines(report["models"][-1]):
                    echo(line)
            if found["dlkit"]["status"] == "ok":
                report["shares"][name] = apart(shares, name, threads, None)
                echo(share_line(name, report["shares"][name]))
    except KeyboardInterrupt:
        if not report["models"]:
            raise
        report["interrupted"] = True
        echo(_report.INTERRUPTED)
    return report


HEAD = f"{'model, memory, contestant':<34}{'ms a step':>10}{'quartiles':>16}{'vs native':>11}{'peak MB':>9}"


def heading(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"Training steps on {machine['cpu']}, {machine['threads']} threads, {machine['simd']}; "
        f"torch {machine['torch']}, dlkit {machine['dlkit'] or 'not installed'}; {report['date']}."
        f"{_report.busy(machine)}"
    )


def markdown(report: dict[str, Any]) -> str:
    """A row for each model and kind of memory, in ms a step, and native's time over dlkit's beside its target."""
    names = [name for name in CONTESTANTS if any(name in entry["contestants"] for entry in report["models"])]
    rows = []
    for entry in report["models"]:
        times = {name: entry["contestants"].get(name, {}).get("median_ms") for name in names}
        cells = ["-" if time is None else _report.number(time) for time in times.values()]
        native, mine = times.get("native"), times.get("dlkit")
        ratio = f"{native / mine:.2f}" if native and mine else "-"
        target = f" ({entry['target']})" if entry["target"] else ""
        rows.append([f"{entry['model']}, {entry['memory']}", *cells, ratio + target])
    shown = [share_line(name, found) for name, found in report.get("shares", {}).items()]
    if report["interrupted"]:
        shown.append(_report.INTERRUPTED)
    head = ["ms a step", *names, "vs native (target)"]
    return "\n\n".join([heading(report), _report.table(head, rows), *shown])


def lines(entry: dict[str, Any]) -> list[str]:
    """A line of the table for each contestant; ratios are native's time over its."""
    native = entry["contestants"].get("native", {}).get("median_ms")
    found = []
    for contestant, figures in entry["contestants"].items():
        label = f"{entry['model']}, {entry['memory']}, {contestant}"
        if "median_ms" not in figures:
            why = figures.get("message") or f"losses {figures.get('losses')}"
            found.append(f"{label:<34}{figures['status']}: {why}")
            continue
        spread = f"{figures['q1_ms']:.2f}-{figures['q3_ms']:.2f}"
        ratio = f"{native / figures['median_ms']:.2f}" if native else "-"
        peak = figures.get("peak_bytes")
        shown = "-" if peak is None else f"{peak / 2**20:,.0f}"
        found.append(f"{label:<34}{figures['median_ms']:>10.2f}{spread:>16}{ratio:>11}{shown:>9}")
    return found


def shares(name: str, threads: int, trace: Path | None) -> dict[str, float]:
    """The share of each kind of op in dlkit's step, by its own time; writes a trace of some steps."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    torch.set_num_threads(threads)
    trained = trainer(name, "dlkit")
    for _ in range(3):
        trained.step()
    # Of five profiles the one of median time, since a thread's wait for its core counts for the op that waits.
    profiles = []
    for _ in range(5):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(3):
                with torch.profiler.record_function("step"):
                    trained.step()
        events = profiler.key_averages()
        profiles.append((sum(event.cpu_time_total for event in events if event.key == "step"), events, profiler))
    whole, events, profiler = sorted(profiles, key=lambda found: found[0])[2]
    if trace:
        profiler.export_chrome_trace(str(trace))
    found = {event.key: event.self_cpu_time_total / whole for event in events if event.key != "step"}
    found["Python and what no op is"] = 1 - sum(found.values())
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def share_line(name: str, found: dict[str, float]) -> str:
    """dlkit's share, and the largest ones of others."""
    own = sum(share for op, share in found.items() if "dlkit" in op.lower())
    others = [f"{op} {share:.1%}" for op, share in found.items() if "dlkit" not in op.lower()]
    return f"{name}: dlkit's ops are {own:.1%} of its step; {', '.join(others[:4])}"


def _profile(names: list[str], threads: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = apart(shares, name, threads, folder / f"{name}.json")
        print(share_line(name, found))
        for op, share in list(found.items())[:12]:
            print(f"  {share:6.1%}  {op}")
        print(f"written: {folder / name}.json", flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        metavar="A B",
        nargs="+",
        help=f"default: {' '.join(MODELS)}; or timm:NAME, hf:NAME, diffusers:NAME; options: hf:llama,hidden_size=512",
    )
    parser.add_argument(
        "--against",
        metavar="A,B",
        help=f"contestants beside native and dlkit: {','.join(CONTESTANTS)}",
    )
    parser.add_argument("--profile", type=Path, metavar="DIR", help="instead: a trace of each model there, and shares")
    _arguments.add_common(parser, "a model and allocator, default 20")


def _names(given: list[str] | None) -> list[str]:
    """Each word is a name of another library, with its options, or "a,b" of MODELS."""
    if given is None:
        return list(MODELS)
    names = []
    for word in given:
        if _zoo.is_name(word):
            workload_of(word)  # refuses an unknown name now
            names.append(word)
        else:
            names += _arguments.listed("--models", word, MODELS)
    return names


def main(args: argparse.Namespace) -> int:
    names = _names(args.models)
    against = _arguments.listed("--against", args.against, CONTESTANTS)
    _arguments.check_common(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    if args.profile:
        _profile(names, threads, args.profile)
        return 0
    contestants = [name for name in CONTESTANTS if name in {"native", "dlkit", *against}]
    report = run(names, contestants, threads, args.budget or 20.0)
    path = _arguments.result_path(args, "models", _machine.slug(report["machine"]))
    status = int(not _report.save(path, report))
    mine = [entry["contestants"].get("dlkit", {}).get("status") for entry in report["models"]]
    return status or int(any(found != "ok" for found in mine))
