"""Tests of the benchmark: its files and pictures, the contestants it refuses to time, the order of its samples."""

import argparse
import errno
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest
import torch
from dlkit.bench import (
    _arguments,
    _compare,
    _machine,
    _models,
    _ops,
    _report,
    _runner,
    batch_norm,
    dropout,
    group_norm,
    layer_norm,
    optim,
)
from dlkit.bench._runner import Case, Inputs, Settings

from dlkit import _C, bench

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = Settings(mode="quick", budget_s=0.0, min_rounds=2, sample_s=0.0, warm_up_s=0.0)


def doubling(**contestants):
    """A spec whose op doubles its input; `contestants` are functions of x."""

    def bind(function):
        return lambda x: (function, (x,))

    return SimpleNamespace(
        cases=lambda mode, device: [Case("doubling", "forward", (4, 8), "fp32")],
        memory_cases=lambda device: [],
        inputs=lambda case, device, generator: Inputs(
            (torch.randn(case.shape, generator=generator).requires_grad_(),), (torch.ones(case.shape),)
        ),
        contestants=lambda case, device: {name: bind(function) for name, function in contestants.items()},
        reference=lambda case: lambda x: 2 * x,
        tolerances=lambda case: (1e-6,),
        minimal_bytes=lambda case: 2 * case.numel * 4,
    )


def native(x):
    return x + x


def measured(direction="forward", **contestants):
    return _runner.measure(doubling(native=native, **contestants), Case("doubling", direction, (4, 8), "fp32"), QUICK)


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser, arguments)
    return parser.parse_args(arguments)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """(stdout, result file, page) of the small cases of all ops; without torch.compile, and with the fewest rounds."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "dlkit", "bench", "--quick", "--sizes", "small", "--device", "cpu"]
    command += ["--against", "native,liger", "--budget", "0.001", "--json", folder, "--html", folder / "page.html"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert not finished.stderr  # no progress bar where there is no terminal
    (path,) = folder.glob("*-quick.json")
    return finished.stdout, path, folder / "page.html"


@pytest.mark.slow
def test_quick_run_of_all_ops(quick_run):
    output, path, page = quick_run
    report = json.loads(path.read_text())
    assert path.name == _machine.slug(report["machine"]) + "-small-quick.json"
    assert f"written: {path}" in output and f"written: {page}" in output
    assert report["ops"] == bench.specs() and not report["interrupted"]
    assert "python -m dlkit bench --quick --sizes small --device cpu" in report["command"]
    assert set(report["absent"]) == {"liger", "compile", "foreach", "fused", "quack", "bitsandbytes"}
    assert "\nAbsent: liger (" in output and "compile (left out)" in output
    assert report["allocator"] == ("reuse_cpu_memory" if platform.libc_ver()[0] == "glibc" else "default")
    facts = {"cpu", "cores", "threads", "simd", "caches", "load_average", "torch", "dlkit", "python", "commit"}
    assert facts <= report["machine"].keys()
    assert all(row["copy_"] > 0 and row["in_place"] > 0 for row in report["copy_bandwidth"])


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.specs())
def test_quick_run_of_an_op(quick_run, name):
    output, path, _ = quick_run
    report = json.loads(path.read_text())
    spec = _runner.load(name)
    entries = [entry for entry in report["cases"] if entry["op"] == name]
    small = [case for case in spec.cases("quick", "cpu") if _runner.input_bytes(spec, case) <= 1 << 20]
    assert [entry["id"] for entry in entries] == [case.id for case in small]
    for entry in entries:
        assert entry["bytes"] > 0 and entry["input_bytes"] > 0
        assert 0 < entry["floor"]["q1_us"] <= entry["floor"]["median_us"] <= entry["floor"]["q3_us"]
        assert entry["id"] in output
        assert set(entry["contestants"]) == {"native", "dlkit"}
        for contestant, found in entry["contestants"].items():
            # Native's sums in bf16 have larger errors on one thread than on two.
            assert found["status"] in ("ok", "inexact" if contestant == "native" else "ok"), (entry["id"], found)
            assert report["allocator"] == "default" or found["page_faults"] < 1
            assert 0 < found["min_us"] <= found["q1_us"] <= found["median_us"] <= found["q3_us"]
            assert len(found["errors"]) == len(entry["tolerances"])


@pytest.mark.parametrize("name", [name for name in bench.specs() if name != "optim"])
def test_peak_memory_holds_outputs_and_gradients(name):
    spec = _runner.load(name)
    case = replace(spec.memory_cases("cpu")[0], shape=spec.cases("quick", "cpu")[0].shape)
    for found in _runner.peak_memory(spec, case, QUICK)["contestants"].values():
        tensors = 1 if name == "cross_entropy" else 2  # a loss is a number
        assert found["peak_bytes"] >= found["output_bytes"] >= tensors * case.numel * case.itemsize


def browsed(page, folder, *arguments):
    """(document, console, PNG) of `page` in headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium found")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", *arguments]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--screenshot={folder / 'page.png'}", page.as_uri()]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    console = [line for line in finished.stderr.splitlines() if ":CONSOLE" in line]
    return finished.stdout, console, folder / "page.png"


@pytest.mark.slow
def test_page_in_a_browser(quick_run, tmp_path):
    numpy, image = pytest.importorskip("numpy"), pytest.importorskip("PIL.Image")
    _, _, page = quick_run
    assert "http" not in re.sub(r"<script>.*?</script>", "", page.read_text(), flags=re.DOTALL)
    for dark in (False, True):
        scheme = "--blink-settings=preferredColorScheme=0" if dark else "--blink-settings=preferredColorScheme=1"
        document, console, picture = browsed(page, tmp_path, "--window-size=1000,1400", scheme)
        assert console == []
        # Two figures for every op but optim, whose steps have no backward; three layers each.
        drawn = int(re.search(r'data-drawn="(\d+)"', document).group(1))
        assert drawn >= 3 * (2 * len(bench.specs()) - 1)
        pixels = numpy.asarray(image.open(picture).convert("RGB"))
        assert pixels.shape == (1400, 1000, 3)
        assert (pixels[0, 0].mean() < 64) == dark
        different = (pixels != pixels[0, 0]).any(-1)
        assert 0.02 < different.mean() < 0.9 and different[-400:].any()


@pytest.mark.parametrize(
    "name, function",
    [
        ("off", lambda x: 2.001 * x),
        ("nan", lambda x: x * math.nan),
        ("one_nan", lambda x: torch.where(torch.arange(x.numel()).view_as(x) == 5, math.nan, 2 * x)),
        ("other_shape", lambda x: 2 * x[:1]),
        ("other_dtype", lambda x: (2 * x).double()),
        ("two_outputs", lambda x: (2 * x, x)),
        ("writes_nothing", lambda x: torch.empty_like(x)),
    ],
)
def test_wrong_contestant_is_shown_and_not_timed(name, function):
    entry = measured(dlkit=function)
    assert entry["contestants"]["native"]["status"] == "ok"
    assert entry["contestants"]["dlkit"]["status"] == "wrong"
    assert "median_us" not in entry["contestants"]["dlkit"]
    cells = _report.row(entry, ["native", "dlkit"])
    assert cells[2:4] == ["wrong", "-"]
    json.dumps(entry, allow_nan=False)


def test_wrong_gradient_is_shown_and_not_timed():
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad_output):
            return grad_output

    assert measured("backward", dlkit=native)["contestants"]["dlkit"]["status"] == "ok"
    assert measured("backward", dlkit=WrongGradient.apply)["contestants"]["dlkit"]["status"] == "wrong"


def test_gradient_has_the_dtype_of_its_tensor():
    x, weight = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True), torch.ones(3, requires_grad=True)
    inputs = Inputs((x, weight, torch.ones(3)), (torch.ones_like(x),))
    both = _runner.expected_dtypes(inputs, "forward_backward")
    assert both == [torch.bfloat16, torch.bfloat16, torch.float32]
    expected = (torch.ones(3, dtype=torch.float64),)
    assert _runner.errors(lambda: torch.ones(3), expected, both[2:]) == [0.0]
    assert _runner.errors(lambda: torch.ones(3).bfloat16(), expected, both[2:]) == [math.inf]


def test_a_result_has_one_error_for_each_tolerance():
    allowed = [1e-6, 1e-2, 1e-6, 1e-6]
    assert _runner.by_tolerance([1e-7, math.inf, 3e-7, 2e-7], allowed) == [3e-7, math.inf]
    assert _runner.by_tolerance(allowed, allowed) == [1e-6, 1e-2]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("variant", ["dropout", *dropout.ACTIVATIONS])
def test_wrong_dropout_is_shown_and_not_timed(variant, direction):
    activation = dropout.ACTIVATIONS.get(variant, lambda x: x)

    def act(x, *bias):
        return activation(sum(bias, x))

    def too_few(*given):
        return torch.nn.functional.dropout(act(*given), dropout.P - 0.05)

    def unscaled(*given):
        return torch.nn.functional.dropout(act(*given), dropout.P) * (1 - dropout.P)

    def shifted(*given):
        return torch.nn.functional.dropout(act(*given), dropout.P) * 1.001

    wrong = {function.__name__: function for function in (too_few, unscaled, shifted)}
    found = dropout.contestants(Case(variant, direction, (512, 128), "fp32"), "cpu")
    found |= {name: lambda *given, function=function: (function, given) for name, function in wrong.items()}
    spec = SimpleNamespace(**{**vars(dropout), "contestants": lambda case, device: found})
    entry = _runner.measure(spec, Case(variant, direction, (512, 128), "fp32"), QUICK)
    statuses = {name: result["status"] for name, result in entry["contestants"].items()}
    assert statuses == {"native": "ok", "dlkit": "ok", **dict.fromkeys(wrong, "wrong")}


def test_failing_contestant_does_not_stop_the_others():
    def failing(x):
        raise ValueError("no such kernel\nand more")

    found = measured(dlkit=failing, peer=lambda x: 2 * x)["contestants"]
    assert found["dlkit"] == {"status": "error", "message": "ValueError: no such kernel"}
    assert found["peer"]["status"] == "ok" and found["peer"]["median_us"] > 0


def test_inexact_native_stays_the_baseline():
    spec = doubling(native=lambda x: 2.01 * x, dlkit=native)
    entry = _runner.measure(spec, spec.cases("quick", "cpu")[0], QUICK)
    assert entry["contestants"]["native"]["status"] == "inexact"
    assert entry["contestants"]["native"]["median_us"] > 0
    assert _report.row(entry, ["native", "dlkit"])[1].endswith("*")


def test_samples_are_interleaved():
    order = []

    def sampler(name):
        return lambda: order.append(name) or len(order)

    samples = _runner.interleave({name: sampler(name) for name in "ABC"}, budget_s=0.0, min_rounds=3, max_rounds=9)
    assert "".join(order) == "ABC" * 4
    assert samples == {"A": [4, 7, 10], "B": [5, 8, 11], "C": [6, 9, 12]}  # the first round is dropped
    order.clear()
    _runner.interleave({name: sampler(name) for name in "AB"}, budget_s=1e9, min_rounds=1, max_rounds=5)
    assert "".join(order) == "AB" * 6


@pytest.mark.parametrize("megabytes", [1, 24])
def test_floor_copies_move_every_byte(megabytes):
    for name, (call,) in _runner.copies(megabytes << 20, "cpu").items():
        source, target = (cell for cell in _copied(call))
        target.zero_()
        call()
        assert torch.equal(source, target), name
        assert source.nbytes + target.nbytes == megabytes << 20


def _copied(call):
    """Source and target of a copy, read from the call."""
    if hasattr(call, "func"):
        return call.args[0], call.func.__self__
    kept = dict(zip(call.__code__.co_freevars, (cell.cell_contents for cell in call.__closure__), strict=True))
    return kept["sources"][0], kept["target"]


def times(median_us):
    return {"median_us": median_us, "q1_us": 0.95 * median_us, "q3_us": 1.05 * median_us}


def result_file(tmp_path):
    """A result file of two cases with figures that are easy to check by eye, in the old form of one op a file."""

    def entry(variant, direction, native_us, mine):
        return {
            "id": f"{variant}/{direction}/2x8/fp32",
            "variant": variant,
            "direction": direction,
            "shape": [2, 8],
            "dtype": "fp32",
            "bytes": 128,
            "tolerances": [1e-6],
            "floor": {**times(9.0), "by": "copy_", "gb_per_s": 1.0},
            "contestants": {"native": {"status": "ok", "errors": [0.0], **times(native_us)}, "dlkit": mine},
        }

    fast = {"status": "ok", "errors": [0.0], **times(10.0), "rounds_slower_than_native": 0.0}
    slow = {"status": "ok", "errors": [0.0], **times(40.0), "rounds_slower_than_native": 1.0}
    report = {
        "op": "layer_norm",
        "date": "2030-01-01T00:00:00+00:00",
        "machine": {
            "cpu": "Test CPU",
            "threads": 2,
            "simd": "AVX2",
            "load_average": 0.0,
            "torch": "2.13.0",
            "dlkit": "0.1.0",
            "commit": None,
        },
        "allocator": "reuse",
        "interrupted": False,
        "copy_bandwidth": [{"bytes": 1 << 28, "copy_": 30.0, "memmove": 40.0}],
        "cases": [entry("layer_norm", "forward", 20.0, fast), entry("layer_norm", "backward", 20.0, slow)],
        "memory": [],
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(report))
    return path


def test_markdown_table_of_a_file(tmp_path, capsys):
    assert bench.main(parsed("table", str(result_file(tmp_path)))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "Test CPU, 2 threads, AVX2" in lines[0]
    assert "copy_ 30.0, memmove 40.0" in lines[1] and "reuse" in lines[1]
    assert lines[3] == "| case | native us | dlkit us | vs native | spread | of floor |  |"
    assert lines[5] == "| layer_norm/forward/2x8/fp32 | 20 | 10 | 2.00 | ±5% | 0.90 |  |"
    assert lines[6] == "| layer_norm/backward/2x8/fp32 | 20 | 40 | 0.50 | ±5% | 0.23 | slower |"
    assert lines[8].startswith("2 cases; slower than native: 1,")


RESULTS = Path(bench.__file__).parent / "results"
KEPT = sorted(RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_table_of_every_file_that_is_kept(path, capsys):
    report = json.loads(path.read_text())
    assert bench.main(parsed("table", str(path))) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {"models": "models", "memory": "found", "language_model": "found"}.get(report.get("bench"), "cases")
    tables = [line for line in lines if line.startswith("| ")]
    assert len(tables) > len(report[rows]) and len([line for line in lines if line.startswith("| ---")]) >= 1
    # Pictures and comparisons accept only results of ops.
    status = bench.main(parsed("--compare", str(path), str(path)))
    captured = capsys.readouterr()
    if "bench" in report:
        assert status == 2 and captured.err.endswith(f"got one of bench {report['bench']}\n")
    else:
        assert status == 0 and "slower: 0, faster: 0" in captured.out


def test_table_of_several_ops(tmp_path):
    report = _report.load(result_file(tmp_path))
    assert report["ops"] == ["layer_norm"] and report["cases"][0]["input_bytes"] == 64
    other = {**report, "ops": ["other"], "cases": [entry | {"op": "other"} for entry in report["cases"]]}
    text = _report.markdown(_report.merged([report, other]))
    assert text.startswith("layer_norm, other on") and text.count("| case |") == 2 and "4 cases;" in text


def test_plot_of_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = str(result_file(tmp_path))
    assert bench.main(parsed("plot", file, file)) == 0
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"written: {tmp_path / 'result.png'}\n"


def changed(report, **changes):
    """A copy of `report` whose first case has other times, in us, of dlkit, native or the floor."""
    copy = json.loads(json.dumps(report))
    entry = copy["cases"][0]
    for name, time in changes.items():
        (entry["floor"] if name == "floor" else entry["contestants"][name]).update(times(time))
    return copy


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({}, ""),
        ({"dlkit": 12.0}, ""),  # twice the spreads of 10 +- 5% and 12 +- 5% overlap
        ({"dlkit": 17.0}, "slower"),
        ({"dlkit": 6.0}, "faster"),
        ({"dlkit": 17.0, "native": 34.0}, ""),  # the whole machine computes slower
        ({"dlkit": 17.0, "floor": 15.3}, ""),  # its memory is slower
        ({"native": 34.0}, ""),
    ],
)
def test_compare_wants_more_than_the_spread(tmp_path, capsys, changes, wanted):
    report = _report.load(result_file(tmp_path))
    paths = []
    for name, content in (("old.json", report), ("new.json", changed(report, **changes))):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(content))
    assert bench.main(parsed("--compare", *map(str, paths))) == (wanted == "slower")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("2 cases in both files;") and len(lines) == 1 + bool(wanted)
    if wanted:
        assert lines[0].startswith(f"{wanted}  layer_norm/forward/2x8/fp32") and "10.0 us -> " in lines[0]


@pytest.mark.parametrize("times_of_three, wanted", [((17.0, 17.0, 17.0), True), ((17.0, 10.0, 17.0), False)])
def test_compare_believes_several_files_that_agree(tmp_path, capsys, times_of_three, wanted):
    report = _report.load(result_file(tmp_path))
    paths = []
    for index, time in enumerate((10.0, *times_of_three)):
        paths.append(tmp_path / f"{index}.json")
        paths[-1].write_text(json.dumps(changed(report, dlkit=time)))
    assert bench.main(parsed("--compare", *map(str, paths))) == wanted
    assert f"in all files; slower: {int(wanted)}, faster: 0" in capsys.readouterr().out


def test_compare_names_what_cannot_be_compared(tmp_path):
    old = _report.load(result_file(tmp_path))
    new = changed(old)
    new["machine"]["cpu"], new["allocator"] = "Other CPU", "default"
    new["cases"][0]["contestants"]["dlkit"] = {"status": "wrong", "errors": [0.5]}
    new["cases"][1]["id"] = "layer_norm/backward/4x8/fp32"
    text, slower = _compare.compare(old, new)
    assert slower
    lines = text.splitlines()
    assert lines[0].startswith("warning: another machine: Test CPU") and "Other CPU" in lines[0]
    assert lines[1] == "warning: another allocator: reuse before, default now"
    assert lines[2].startswith("slower") and "10.0 us -> wrong" in lines[2]
    assert lines[3:5] == [
        "only in the old file: layer_norm/backward/2x8/fp32",
        "only in the new file: layer_norm/backward/4x8/fp32",
    ]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["softmax"], f"expected OP {', '.join(bench.specs())}; got 'softmax'"),
        (["--sizes", "tiny"], "expected --sizes small, all; got 'tiny'"),
        (["--dtype", "fp32,int8"], "expected --dtype fp64, fp32, bf16, fp16; got 'int8'"),
        (["--device", "tpu"], "expected --device cpu, cuda; got 'tpu'"),
        (["--against", "jax"], f"expected --against {', '.join(_ops.CONTESTANTS)}; got 'jax'"),
        (["--allocator", "arena"], "expected --allocator reuse, default; got 'arena'"),
        (["--threads", "0"], f"expected --threads from 1 to {os.cpu_count()}; got 0"),
        (["--capability", "sse9"], "expected --capability default"),
        (["--budget", "nan"], "expected --budget above 0; got nan"),
        (["--against", ""], f"expected --against {', '.join(_ops.CONTESTANTS)}; got ''"),
        (["models", "--models", "mlp,resnet"], "expected --models mlp, cnn, transformer, gpt; got 'resnet'"),
        (["models", "--against", "liger"], f"expected --against {', '.join(_models.CONTESTANTS)}; got 'liger'"),
        (["models", "--threads", "99999"], f"expected --threads from 1 to {os.cpu_count()}; got 99999"),
        (["calls", "--budget", "0"], "expected --budget above 0; got 0.0"),
        (["calls", "--filter", "Linear"], "expected --filter to be part of one of BatchNorm1d, "),
        (["optim", "--device", "cpu", "--allocator", "default", "--filter", "none"], "no case has "),
        (["table", "absent.json"], "cannot read absent.json: No such file or directory"),
        (["table", __file__], f"cannot read {__file__}: expected a result file of bench"),
        (["--compare", "old.json"], "expected --compare OLD.json NEW.json, got old.json only"),
        (["--compare", "absent.json", "absent.json"], "cannot read absent.json: No such file or directory"),
        (["plot", "absent.json", "--output", "x.svg"], "expected --output to end in .png or .html; got x.svg"),
    ],
)
def test_bad_input_is_one_line(arguments, sentence, capsys):
    assert bench.main(parsed(*arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"bench: {sentence}") and captured.err.count("\n") == 1


def test_result_that_cannot_be_written_is_kept_elsewhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_report.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    assert not _report.save_text(tmp_path / "file" / "result.json", "content")
    captured = capsys.readouterr()
    assert captured.err.startswith(f"bench: cannot write {tmp_path / 'file' / 'result.json'}: ")
    written = Path(captured.out.removeprefix("written: ").strip())
    assert written.name == "result.json" and written.read_text() == "content"
    monkeypatch.setattr(_report.tempfile, "tempdir", str(tmp_path / "file"))
    assert not _report.save_text(tmp_path / "file" / "result.json", "content")
    assert capsys.readouterr().err.count("\n") == 2


def test_a_full_disk_keeps_the_file_of_before(tmp_path, capsys, monkeypatch):
    path = tmp_path / "result.json"
    assert _report.save_text(path, "before")

    def full(part, text, **_):
        part.write_bytes(text[:3].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert not _report.save_text(path, "content")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    assert f"cannot write {path}: No space left on device" in capsys.readouterr().err


def test_memory_shows_each_way_and_which_one_failed(tmp_path, capsys, monkeypatch):
    def ended(command, **_):
        if command[-1] == failing:
            return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=0, stdout=f"x + x\t{command[-1]}'s\n")

    monkeypatch.setattr(subprocess, "run", ended)
    monkeypatch.setattr(_machine, "_commit", lambda: None)
    failing = None
    assert bench.main(parsed("memory", "--json", str(tmp_path))) == 0
    printed = capsys.readouterr().out
    assert "|  | as it comes | reuse_cpu_memory() |" in printed and "| x + x | default's | reuse's |" in printed
    (path,) = tmp_path.glob("memory-*.json")
    assert json.loads(path.read_text())["found"]["dlkit"] == {"x + x": "dlkit's"}
    failing = "torch"
    assert bench.main(parsed("memory", "--json", str(tmp_path))) == 1
    assert capsys.readouterr().err == "bench: memory --way torch ended with status 1\n"


def test_interrupt_keeps_what_was_measured(monkeypatch, capsys):
    monkeypatch.setattr(_runner, "copy_bandwidth", lambda settings: [{"bytes": 1 << 20, "copy_": 1.0}])
    spec = doubling(native=native, dlkit=native)
    (case,) = spec.cases("quick", "cpu")

    def stopped(x):
        raise KeyboardInterrupt

    other = doubling(native=native, dlkit=stopped)
    report = _ops.run({"first": (spec, [case]), "second": (other, [case]), "third": (spec, [case])}, QUICK)
    assert report["interrupted"] and [entry["op"] for entry in report["cases"]] == ["first"]
    assert "interrupted" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        _ops.run({"second": (other, [case])}, QUICK)


def test_case_without_memory_does_not_end_the_run(monkeypatch, capsys):
    monkeypatch.setattr(_runner, "copy_bandwidth", lambda settings: [{"bytes": 1 << 20, "copy_": 1.0}])
    spec = doubling(native=native, dlkit=native)
    (case,) = spec.cases("quick", "cpu")
    large = doubling(native=native, dlkit=native)
    large.inputs = lambda case, device, generator: torch.empty(1 << 62)
    report = _ops.run({"large": (large, [case]), "small": (spec, [case])}, QUICK)
    assert [entry["contestants"]["dlkit"]["status"] for entry in report["cases"]] == ["error", "ok"]
    assert "error: dlkit doubling/forward/4x8/fp32: RuntimeError" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 64), (0.01, 1)])
def test_a_gpu_s_sample_is_no_longer_than_its_queue(monkeypatch, seconds, most):
    """A longer one would stall the host, and the device would wait. The device sleeps until the last call is queued."""
    slept, made = [], []

    class Event:
        def __init__(self, enable_timing):
            self.record = self.synchronize = lambda: None
            self.elapsed_time = lambda end: 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def call():
        made.append(None)
        sleep(seconds)

    sampler = _runner.calibrated([call] * 3, replace(QUICK, device="cuda"))
    made.clear()
    sample = sampler()
    assert 1 <= len(made) <= most and slept[0] >= len(made) * seconds * 1e9
    assert sample.seconds == 1e-3 / len(made)


def test_compile_takes_part_once_a_direction_in_quick():
    for name in bench.specs():
        spec = _runner.load(name)
        cases = spec.cases("quick", "cpu")
        few = _ops.compiled_cases(spec, cases, "quick", "cpu")
        ways = {case.direction for case in few}
        assert "forward" in ways and ways <= {"forward", "backward"}
        assert len(few) == len(ways) and {case.dtype for case in few} == {"fp32"}
        assert _ops.compiled_cases(spec, cases, "default", "cpu") == set(cases)


def test_contestants_are_chosen_and_the_absent_named(monkeypatch):
    case = Case("AdamW", "forward", (1, 64), "fp32")
    names = lambda **changes: list(_runner.contestants(optim, case, replace(QUICK, **changes)))  # noqa: E731
    assert names() == ["native", "foreach", "fused", "dlkit"]
    assert names(against=("fused",)) == ["native", "fused", "dlkit"]
    assert names(against=(), compile=True) == ["native", "dlkit"]
    assert names(against=("compile",), compile=True) == ["native", "compile", "dlkit"]
    assert list(optim.contestants(case, "cuda"))[-1] == "bitsandbytes"
    assert list(layer_norm.contestants(Case("layer_norm", "forward", (4, 8), "fp32"), "cuda"))[2:] == ["liger", "quack"]
    monkeypatch.setattr(_ops, "PEERS", {"liger": "no_such_module", "quack": "json"})
    assert _ops.absent(["native", "liger", "quack"], "cpu") == {"liger": "not installed", "quack": "GPU only"}
    assert _ops.absent(["native", "quack"], "cuda") == {}


def test_peer_that_fails_to_load_is_an_error_of_its_own():
    spec = doubling(native=native, dlkit=native)
    found = spec.contestants(None, "cpu")
    spec.contestants = lambda case, device: found | {"liger": _runner.peer("no_such_module", "f", lambda x: (x,))}
    entry = _runner.measure(spec, spec.cases("quick", "cpu")[0], QUICK)
    assert entry["contestants"]["liger"]["message"] == "ModuleNotFoundError: No module named 'no_such_module'"
    assert entry["contestants"]["dlkit"]["status"] == "ok"


def test_page_shows_failures_and_escapes_them(tmp_path):
    _page = pytest.importorskip("dlkit.bench._page", reason="plotly")
    report = changed(_report.load(result_file(tmp_path)))
    forward, backward = (entry["contestants"] for entry in report["cases"])
    forward["liger"] = {"status": "error", "message": "ValueError: <b> & more"}
    backward["dlkit"] = {"status": "wrong", "errors": [0.25]}
    text = _page.html(report)
    assert '<td class="bad"><b>liger: error</b> ValueError: &lt;b&gt; &amp; more</td>' in text
    assert '<td class="bad"><b>dlkit: wrong</b> largest error 0.25 of the largest value</td>' in text
    assert re.search(r'<td class="up" [^>]*>2\.00</td>', text)


def test_every_spec_has_cases_of_every_mode():
    assert {"batch_norm", "group_norm", "layer_norm"} <= set(bench.specs())
    assert not set(bench.specs()) & set(bench.COMMANDS)
    for name in bench.specs():
        spec = _runner.load(name)
        for mode in ("quick", "default", "sweep"):
            ids = [case.id for case in spec.cases(mode, "cpu")]
            assert ids and len(ids) == len(set(ids)), (name, mode)
    small = _ops.chosen(layer_norm, replace(QUICK, mode="sweep"), "small", ["bf16"], "rms_norm")
    assert small and all(case.dtype == "bf16" and case.numel * 2 <= 1 << 20 for case in small)
    assert _runner.input_bytes(optim, Case("SGD", "forward", (100, 64, 100, 4096), "bf16")) == 100 * 4160 * 2


def test_spec_counts_bytes_and_outputs():
    # 4 x 8 fp32: 128 bytes a matrix, 32 a parameter, 16 a statistic.
    for variant, direction, expected, count in [
        ("layer_norm", "forward", 2 * 128 + 2 * 32, 1),
        ("rms_norm", "forward", 2 * 128 + 32, 1),
        ("layer_norm", "backward", 3 * 128 + 3 * 32 + 2 * 16, 3),
        ("add_rms_norm", "forward", 4 * 128 + 32, 2),
        ("add_rms_norm", "backward", 4 * 128 + 2 * 32 + 16, 3),
    ]:
        case = Case(variant, direction, (4, 8), "fp32")
        assert layer_norm.minimal_bytes(case) == expected, case.id
        assert len(layer_norm.tolerances(case)) == count, case.id


def test_batch_norm_spec_counts_bytes_and_outputs():
    # 4 x 8 x 2 x 2 bf16: 256 bytes a tensor, 32 a parameter or statistic, which are fp32.
    for variant, direction, expected, count in [
        ("batch_norm", "forward", 2 * 256 + 6 * 32, 1),
        ("batch_norm_relu", "forward", 2 * 256 + 6 * 32, 1),
        ("batch_norm_add_relu", "forward", 3 * 256 + 6 * 32, 1),
        ("batch_norm_eval", "forward", 2 * 256 + 4 * 32, 1),
        ("batch_norm", "backward", 3 * 256 + 5 * 32, 3),
        ("batch_norm_relu", "backward", 3 * 256 + 6 * 32, 3),
        ("batch_norm_add_relu", "backward", 5 * 256 + 5 * 32, 4),
        ("BatchNorm1d", "forward_backward", 5 * 256 + (6 + 2 + 5) * 32, 4),
    ]:
        case = Case(variant, direction, (4, 8, 2, 2), "bf16", "channels_last")
        assert batch_norm.minimal_bytes(case) == expected, case.id
        assert len(batch_norm.tolerances(case)) == count, case.id


def test_group_norm_spec_counts_bytes_and_outputs():
    # 2 x 64 x 3 fp32: 1536 bytes a tensor, 256 a parameter, 2 x 2 x 32 x 4 of statistics (2 x 2 x 64 x 4 by instance).
    for variant, direction, expected, count in [
        ("group_norm", "forward", 2 * 1536 + 2 * 256, 1),
        ("group_norm", "backward", 3 * 1536 + 3 * 256 + 512, 3),
        ("instance_norm", "backward", 3 * 1536 + 3 * 256 + 1024, 3),
        ("GroupNorm", "forward_backward", 5 * 1536 + 5 * 256 + 2 * 512, 4),
    ]:
        case = Case(variant, direction, (2, 64, 3), "fp32")
        assert group_norm.minimal_bytes(case) == expected, case.id
        assert len(group_norm.tolerances(case)) == count, case.id


@pytest.mark.parametrize("spec", [batch_norm, group_norm])
def test_layout_is_in_the_name_and_in_the_inputs(spec):
    generator = torch.Generator().manual_seed(0)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for case in spec.cases("sweep", "cpu"):
        images = len(case.shape) > 3
        assert case.id.rsplit("/", 1)[-1] in (("contiguous", "channels_last") if images else (case.dtype,))
        if case.numel > 1 << 16:
            continue
        inputs = spec.inputs(case, "cpu", generator)
        for tensor in (*inputs.tensors, *inputs.grad_outputs):
            if tensor.shape == case.shape:
                wanted = formats[len(case.shape)] if case.layout == "channels_last" else torch.contiguous_format
                assert tensor.is_contiguous(memory_format=wanted), case.id


@pytest.mark.parametrize("variant", ["batch_norm_relu", "batch_norm_add_relu"])
def test_no_gradient_where_rounding_decides_the_mask(variant):
    case = Case(variant, "backward", (64, 4, 8, 8), "bf16", "contiguous")
    inputs = batch_norm.inputs(case, "cpu", torch.Generator().manual_seed(0))
    y = batch_norm.reference(case)(*(tensor.detach().double() for tensor in inputs.tensors))
    (grad_output,) = inputs.grad_outputs
    assert (grad_output[(y > 0) & (y < 0.05)] == 0).all()
    assert (grad_output[y > 0.1] != 0).float().mean() > 0.99


def test_an_instruction_set_can_be_chosen(monkeypatch):
    before = _C.cpu_capability()
    monkeypatch.setenv("DLKIT_CPU_CAPABILITY", before)
    try:
        _arguments.check_common(parsed("layer_norm", "--capability", "default"))
        machine = _machine.facts("cpu")
        assert _C.cpu_capability() == machine["dlkit_simd"] == "default"
        assert _machine.slug(machine).endswith("-threads-default")
        assert machine["simd"] == "DEFAULT" or "(dlkit: default)" in _report.where(machine)
    finally:
        _C.set_cpu_capability(before)


def test_slug_and_settings_are_plain(monkeypatch):
    monkeypatch.delenv("DLKIT_CPU_CAPABILITY", raising=False)
    assert _machine.slug({"cpu": "AMD EPYC(TM) 9B14", "threads": 2}) == "amd-epyc-tm-9b14-2-threads"
    assert _machine.slug({"cpu": "any", "gpu": "NVIDIA H200", "threads": 2}) == "nvidia-h200"
    json.dumps({field.name: getattr(QUICK, field.name) for field in fields(QUICK)})
