"""Measures one op: checks every contestant against a float64 reference, then times those that passed, interleaved.

One process, A B C A B C, medians. A sample is a loop long enough to make the timer's resolution negligible. The floor
is a contestant too: a copy that moves the least bytes the op must move, sampled in the same rounds, where noise affects
it as the others. On a GPU the time is the device's own, taken with events after a short sleep kernel, during which the
host queues every call; the host's time per call is recorded too, and inputs rotate through more memory than the L2
holds.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import gc
import importlib
import itertools
import math
import operator
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

import dlkit

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DIRECTIONS = ("forward", "backward", "forward_backward")

# A contestant turns input tensors into a function and its arguments; what it returns is one tensor or a tuple of them.
Contestant = Callable[..., tuple[Callable[..., Any], tuple[Any, ...]]]
Call = Callable[[], Any]
Settle = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One row of the table. `forward` runs without autograd, `backward` only the backward pass, on a retained graph."""

    variant: str
    direction: str
    shape: tuple[int, ...]
    dtype: str
    layout: str = ""  # contiguous or channels_last where the op knows both; part of the id

    @property
    def id(self) -> str:
        parts = (self.variant, self.direction, "x".join(map(str, self.shape)), self.dtype, self.layout)
        return "/".join(filter(None, parts))

    @property
    def memory_format(self) -> torch.memory_format:
        if self.layout != "channels_last":
            return torch.contiguous_format
        return torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


class Inputs(NamedTuple):
    tensors: tuple[Tensor, ...]  # a contestant's arguments; those that require a gradient get one
    grad_outputs: tuple[Tensor, ...]  # one for each output


class Spec(Protocol):
    """The names that an op's file defines; the module is the spec."""

    def cases(self, mode: str, device: str) -> list[Case]:
        """`mode` is quick, default or sweep."""

    def memory_cases(self, device: str) -> list[Case]:
        """The cases whose memory is measured, in the direction forward_backward."""

    def inputs(self, case: Case, device: str, generator: torch.Generator) -> Inputs:
        """Fresh random inputs."""

    def contestants(self, case: Case, device: str) -> dict[str, Contestant]:
        """By name, "native" first; torch.compile of native is added by the runner."""

    def reference(self, case: Case) -> Callable[..., Any]:
        """The formula in plain torch, called with the input tensors in float64."""

    def tolerances(self, case: Case) -> Sequence[float]:
        """Largest error allowed, over the largest value of the reference: of each output, then of each gradient."""

    def minimal_bytes(self, case: Case) -> int:
        """The least memory traffic of one call: every input read once, every output written once."""


@dataclass(frozen=True)
class Settings:
    mode: str = "default"
    device: str = "cpu"
    budget_s: float = 2.0
    min_rounds: int = 7
    max_rounds: int = 60
    sample_s: float = 0.002
    warm_up_s: float = 0.05
    compile: bool = False
    allocator: str = "default"  # or reuse_cpu_memory
    against: tuple[str, ...] | None = None  # contestants beside native and dlkit; None: all that the spec has
    seed: int = 0


class Sample(NamedTuple):
    seconds: float  # per call, on the device that computes
    host_seconds: float  # per call, until the host is free again
    page_faults: float  # per call


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def prepare(function: Callable[..., Any], arguments: tuple[Any, ...], inputs: Inputs, direction: str) -> Call:
    """One call of `direction`: a callable that returns the outputs, the gradients, or both."""
    if direction == "forward":
        return functools.partial(function, *arguments)
    leaves = [tensor for tensor in inputs.tensors if tensor.requires_grad]
    if direction == "backward":
        outputs = function(*arguments)
        return functools.partial(torch.autograd.grad, outputs, leaves, inputs.grad_outputs, retain_graph=True)

    def forward_backward() -> tuple[Tensor, ...]:
        outputs = function(*arguments)
        return (*_as_tuple(outputs), *torch.autograd.grad(outputs, leaves, inputs.grad_outputs))

    return forward_backward


def compiled(native: Contestant) -> Contestant:
    """torch.compile of the native expression, static shapes. One compilation for all input sets of a case."""
    cache: dict[Callable[..., Any], Callable[..., Any]] = {}

    def bind(*tensors: Tensor) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        function, arguments = native(*tensors)
        if function not in cache:
            # The tracer skips torch's own functions unless a frame outside torch calls them.
            target = function if isinstance(function, torch.nn.Module) else lambda *given: function(*given)
            cache[function] = torch.compile(target, dynamic=False)
        return cache[function], arguments

    return bind


def peer(module: str, function: str, arguments: Callable[..., tuple[Any, ...]]) -> Contestant:
    """Another library's function, imported when it is first called: a failure to load is only its own error."""
    return lambda *tensors: (getattr(importlib.import_module(module), function), arguments(*tensors))


def expected_outputs(spec: Spec, case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """The results that a contestant should return for `inputs`, in float64."""

    def widen(tensor: Tensor) -> Tensor:
        wide = tensor.detach().double() if tensor.is_floating_point() else tensor
        return wide.requires_grad_(tensor.requires_grad)

    exact = Inputs(tuple(map(widen, inputs.tensors)), tuple(map(widen, inputs.grad_outputs)))
    return tuple(
        tensor.detach() for tensor in _as_tuple(prepare(spec.reference(case), exact.tensors, exact, case.direction)())
    )


def expected_dtypes(inputs: Inputs, direction: str) -> list[torch.dtype]:
    """The dtypes of the outputs, then of the gradients: a gradient has its tensor's dtype."""
    outputs = [tensor.dtype for tensor in inputs.grad_outputs]
    gradients = [tensor.dtype for tensor in inputs.tensors if tensor.requires_grad]
    return {"forward": outputs, "backward": gradients, "forward_backward": outputs + gradients}[direction]


def errors(
    call: Call, expected: Sequence[Tensor], dtypes: Sequence[torch.dtype], settle: Settle | None = None
) -> list[float]:
    """Largest error of each tensor over the largest value expected; infinite for a wrong shape or dtype, or a NaN."""
    # The allocator reuses blocks that the previous contestant has just freed, with its correct outputs still in them: a
    # kernel that writes nothing would pass. Such blocks are therefore filled with NaN first.
    poison = [
        torch.full(tensor.shape, math.nan, dtype=dtype, device=tensor.device)
        for tensor, dtype in zip(expected, dtypes, strict=True)
    ]
    del poison
    outputs = _as_tuple(call())
    if settle is not None:
        outputs = settle(outputs)
    found = [math.inf] * max(len(expected), len(outputs))
    for index, (output, wanted, dtype) in enumerate(zip(outputs, expected, dtypes, strict=False)):
        if output.shape != wanted.shape or output.dtype != dtype or wanted.numel() == 0:
            continue
        error = ((output.detach().double() - wanted).abs().max() / wanted.abs().max()).item()
        found[index] = math.inf if math.isnan(error) else error
    return found


def by_tolerance(values: Sequence[float], allowed: Sequence[float]) -> list[float]:
    """The largest of the values that have the same tolerance: one for each tolerance, as an optimizer has thousands."""
    worst: dict[float, float] = {}
    for value, limit in zip(values, allowed, strict=True):
        worst[limit] = max(value, worst.get(limit, 0.0))
    return list(worst.values())


def sample_cpu(calls: Sequence[Call], loops: int) -> Sample:
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    for _ in range(loops):
        for call in calls:
            call()
    seconds = (time.perf_counter() - start) / (loops * len(calls))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return Sample(seconds, seconds, faults / (loops * len(calls)))


# A queue holds about a thousand launches, at some 4 us each for the host; one more would stall it, and the device
# would wait for the host.
QUEUE_S, QUEUE_CALLS = 0.004, 64


def sample_cuda(calls: Iterator[Call], count: int, host_seconds: float) -> Sample:
    """The next `count` of `calls`. `host_seconds`: about how long the host takes to queue them; the device sleeps for
    that long first and then finds them all."""
    cuda: Any = torch.cuda
    begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    cuda._sleep(int(1.5 * host_seconds * 2e9))  # in clock cycles, at about 2 GHz
    begin.record()
    start = time.perf_counter()
    for call in itertools.islice(calls, count):
        call()
    host = time.perf_counter() - start
    end.record()
    end.synchronize()
    return Sample(begin.elapsed_time(end) / 1e3 / count, host / count, 0.0)


def spin(device: str, seconds: float = 1.0) -> None:
    """Keeps a GPU busy until its clocks are high."""
    if device != "cuda":
        return
    tensor, until = torch.ones(1 << 24, device=device), time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(100):
            tensor.mul_(1.0)
        torch.cuda.synchronize()


def calibrated(calls: Sequence[Call], settings: Settings) -> Callable[[], Sample]:
    """Warms `calls` up and returns a sampler whose loop lasts about `sample_s`."""
    on_gpu = settings.device == "cuda"
    host_seconds, began = math.inf, time.perf_counter()
    passes = 0
    while passes < 2 or time.perf_counter() - began < settings.warm_up_s:
        start = time.perf_counter()
        for call in calls:
            call()
        host_seconds = min(host_seconds, time.perf_counter() - start)
        if on_gpu:
            torch.cuda.synchronize()
        passes += 1
    if on_gpu:
        each = host_seconds / len(calls)
        count = max(1, min(QUEUE_CALLS, int(QUEUE_S / each)))
        return functools.partial(sample_cuda, itertools.cycle(calls), count, each * count)
    loops = max(1, math.ceil(settings.sample_s / host_seconds))
    return functools.partial(sample_cpu, calls, loops)


T = TypeVar("T")


def interleave(
    samplers: Mapping[str, Callable[[], T]], budget_s: float, min_rounds: int, max_rounds: int
) -> dict[str, list[T]]:
    """Samples A B C A B C until the budget is spent, at least `min_rounds` and at most `max_rounds` times each.

    The first round is dropped: it only brings caches into the state of later rounds.
    """
    samples: dict[str, list[T]] = {name: [] for name in samplers}
    began = time.perf_counter()
    for round_index in range(max_rounds + 1):
        for name, sampler in samplers.items():
            value = sampler()
            if round_index > 0:
                samples[name].append(value)
        if round_index >= min_rounds and time.perf_counter() - began > budget_s:
            break
    return samples


def copies(total_bytes: int, device: str, sets: int = 1) -> dict[str, list[Call]]:
    """Ways to move `total_bytes` (half read, half written), for the floor of a case that moves as many.

    On a CPU torch's copy has no streaming stores and reads each line that it writes; the C library's memmove has them
    for blocks above a threshold (1 MB on some machines, 240 MB where it overestimates the cache), and two halves on two
    threads can be a third faster. The better of the two is the floor.
    """
    elements = max(1, total_bytes // 8)
    sources = [torch.rand(elements, device=device) for _ in range(sets)]
    target = torch.empty_like(sources[0])
    ways: dict[str, list[Call]] = {"copy_": [functools.partial(target.copy_, source) for source in sources]}
    if device == "cpu" and total_bytes >= 16 << 20:
        threads = torch.get_num_threads()
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        part = math.ceil(elements / threads) * 4
        offsets = range(0, elements * 4, part)

        def memmove() -> None:
            waiting = [
                pool.submit(
                    ctypes.memmove,
                    target.data_ptr() + offset,
                    sources[0].data_ptr() + offset,
                    min(part, elements * 4 - offset),
                )
                for offset in offsets
            ]
            for future in waiting:
                future.result()

        ways["memmove"] = [memmove]
    return ways


def summary(samples: Sequence[Sample], device: str) -> dict[str, float]:
    times = sorted(sample.seconds * 1e6 for sample in samples)
    first, median, third = statistics.quantiles(times, n=4, method="inclusive")
    figures = {"median_us": median, "min_us": times[0], "q1_us": first, "q3_us": third, "samples": len(times)}
    if device == "cuda":
        figures["host_us"] = statistics.median(sample.host_seconds for sample in samples) * 1e6
    else:
        figures["page_faults"] = statistics.median(sample.page_faults for sample in samples)
    return figures


def _input_sets(spec: Spec, case: Case, settings: Settings) -> list[Inputs]:
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    sets = [spec.inputs(case, settings.device, generator)]
    if settings.device == "cuda":
        size = sum(tensor.nbytes for group in sets[0] for tensor in group)
        wanted = math.ceil(4 * torch.cuda.get_device_properties(0).L2_cache_size / max(size, 1))
        sets += [spec.inputs(case, "cuda", generator) for _ in range(min(max(wanted, 2), 64) - 1)]
    return sets


def _memory(settings: Settings) -> contextlib.AbstractContextManager[Any]:
    """Memory that calls reuse, and that is returned after a case, since the blocks of all sizes would add up.

    By default every block above 32 MB is mapped anew at each call: an output of 128 MB costs 32,769 page faults, which
    take longer than the work itself.
    """
    return dlkit.reuse_cpu_memory() if settings.allocator == "reuse_cpu_memory" else contextlib.nullcontext()


@contextlib.contextmanager
def _measuring(case: Case, settings: Settings) -> Iterator[None]:
    """Autograd is on only where the case needs it, and samples run without garbage collection."""
    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(case.direction != "forward"), contextlib.ExitStack() as stack:
            stack.enter_context(_memory(settings))
            if settings.compile:
                from torch._functorch import config

                torch.compiler.reset()
                # A compiled backward that may overwrite its saved tensors refuses a retained graph.
                stack.enter_context(config.patch(donated_buffer=False))
            yield
    finally:
        gc.enable()


def contestants(spec: Spec, case: Case, settings: Settings) -> dict[str, Contestant]:
    found = spec.contestants(case, settings.device)
    if settings.compile:
        found = {"native": found["native"], "compile": compiled(found["native"]), **found}
    if settings.against is None:
        return found
    return {name: value for name, value in found.items() if name in ("native", "dlkit", *settings.against)}


def input_bytes(spec: Spec, case: Case) -> int:
    """Size of the case's main tensor, or the spec's own count instead (an optimizer's parameters)."""
    elements: int = spec.elements(case) if hasattr(spec, "elements") else case.numel
    return elements * case.itemsize


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def measure(spec: Spec, case: Case, settings: Settings) -> dict[str, Any]:
    """Checks and times every contestant of one case. Returns its entry of the result file."""
    results: dict[str, dict[str, Any]] = {}
    samplers: dict[str, Callable[[], Sample]] = {}
    least = spec.minimal_bytes(case)
    with _measuring(case, settings):
        sets = _input_sets(spec, case, settings)
        with torch.enable_grad():
            expected = expected_outputs(spec, case, sets[0])
        dtypes = expected_dtypes(sets[0], case.direction)
        allowed = spec.tolerances(case)
        # The spec of a random op has settled(case, inputs): it fills in the reference's values where chance decides.
        settle = spec.settled(case, sets[0]) if hasattr(spec, "settled") else None
        ready: dict[str, list[Call]] = {}
        for name, contestant in contestants(spec, case, settings).items():
            try:
                calls = [prepare(*contestant(*inputs.tensors), inputs, case.direction) for inputs in sets]
                found = errors(calls[0], expected, dtypes, settle)
            except Exception as error:
                results[name] = {"status": "error", "message": _message(error)}
                continue
            exact = len(found) == len(allowed) and all(map(operator.le, found, allowed))
            # Native is the user's present code and stays the baseline even where it is inexact: on a CPU its bf16
            # weight gradients are summed in bf16 and have errors of 10% at 8192 rows. All others must be right.
            status = "ok" if exact else "inexact" if name == "native" and all(map(math.isfinite, found)) else "wrong"
            if len(found) == len(allowed):
                found = by_tolerance(found, allowed)
            # JSON has no infinity: null stands for a wrong shape, a wrong dtype or NaN.
            results[name] = {
                "status": status,
                "errors": [error if math.isfinite(error) else None for error in found],
            }
            if status != "wrong":
                ready[name] = calls
        del expected
        ways = copies(least, settings.device, len(sets))
        for name, calls in [*ready.items(), *ways.items()]:
            try:
                samplers[name] = calibrated(calls, settings)
            except Exception as error:
                if name in ways:
                    raise
                results[name] = {"status": "error", "message": _message(error)}
                del ready[name]
        samples = interleave(samplers, settings.budget_s, settings.min_rounds, settings.max_rounds)

    for name in ready:
        results[name].update(summary(samples[name], settings.device))
        if name != "native" and "native" in ready:
            # The time that a training loop sees: the slower of host and device.
            slower = [
                max(mine.seconds, mine.host_seconds) > max(native.seconds, native.host_seconds)
                for mine, native in zip(samples[name], samples["native"], strict=True)
            ]
            results[name]["rounds_slower_than_native"] = sum(slower) / len(slower)
    floors = {name: summary(samples[name], settings.device) for name in ways}
    fastest = min(floors, key=lambda name: floors[name]["median_us"])
    floor = {key: floors[fastest][key] for key in ("median_us", "q1_us", "q3_us")}
    return {
        "id": case.id,
        **asdict(case),
        "bytes": least,
        "input_bytes": input_bytes(spec, case),
        "tolerances": by_tolerance(allowed, allowed),
        "floor": {**floor, "by": fastest, "gb_per_s": least / floor["median_us"] / 1e3},
        "contestants": results,
    }


def failed(spec: Spec, case: Case, error: Exception) -> dict[str, Any]:
    """The entry of a case that could not be measured at all: its inputs or its reference did not fit into memory."""
    reason = {"status": "error", "message": _message(error)}
    return {
        "id": case.id,
        **asdict(case),
        "bytes": spec.minimal_bytes(case),
        "input_bytes": input_bytes(spec, case),
        "tolerances": [],
        "floor": None,
        "contestants": {"native": reason, "dlkit": reason},
    }


def copy_bandwidth(settings: Settings) -> list[dict[str, Any]]:
    """Copy bandwidth over size: bytes read and written, and GB/s of each way (median).

    in_place writes where it has read, which means that no line is read only to be overwritten: beyond the caches it
    shows the bandwidth that kernels with streaming stores can reach and copies cannot. It is no floor, since half as
    much memory must fit into a cache.
    """
    rows = []
    for exponent in (16, 20, 23, 25, 27, 28):
        with _memory(settings):
            ways = copies(1 << exponent, settings.device)
            ways["in_place"] = [torch.rand((1 << exponent) // 8, device=settings.device).neg_]
            samplers = {name: calibrated(calls, settings) for name, calls in ways.items()}
            samples = interleave(samplers, settings.budget_s / 10, settings.min_rounds, settings.max_rounds)
        row: dict[str, Any] = {"bytes": 1 << exponent}
        for name, taken in samples.items():
            row[name] = (1 << exponent) / statistics.median(sample.seconds for sample in taken) / 1e9
        rows.append(row)
    return rows


def _peak_cpu(call: Call) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler logs its start and stop on stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    del kept
    kineto = profiler.profiler
    assert kineto is not None and kineto.kineto_results is not None
    held = peak = 0
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _peak_cuda(call: Call) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def peak_memory(spec: Spec, case: Case, settings: Settings) -> dict[str, Any]:
    """Peak bytes allocated by one forward and backward, outputs and gradients included, and the part beyond these."""
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    inputs = spec.inputs(case, settings.device, generator)
    entry: dict[str, Any] = {"id": case.id, "contestants": {}}
    with _measuring(case, settings):
        for name, contestant in contestants(spec, case, settings).items():
            try:
                call = prepare(*contestant(*inputs.tensors), inputs, "forward_backward")
                results = {tensor.data_ptr(): tensor.nbytes for tensor in _as_tuple(call())}
                peak = _peak_cpu(call) if settings.device == "cpu" else _peak_cuda(call)
            except Exception as error:
                entry["contestants"][name] = {"message": _message(error)}
                continue
            # Two gradients may be one tensor: it counts once.
            outputs = sum(results.values())
            entry["contestants"][name] = {"peak_bytes": peak, "output_bytes": outputs, "beyond_bytes": peak - outputs}
    return entry


def load(name: str) -> Spec:
    return cast(Spec, importlib.import_module(f".{name}", __package__))
