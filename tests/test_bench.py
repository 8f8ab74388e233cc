"""The benchmark runner on itself: what it writes, what it refuses to time, in which order it samples."""

import argparse
import json
import math
import platform
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from dlkit.bench import _machine, _report, _runner, batch_norm, group_norm, layer_norm
from dlkit.bench._runner import Case, Inputs, Settings

from dlkit import bench

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
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("name", bench.specs())
def test_quick_mode_end_to_end(tmp_path, name):
    spec = _runner.load(name)
    command = [sys.executable, "-m", "dlkit", "bench", name, "--quick", "--device", "cpu", "--output", tmp_path]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (path,) = tmp_path.glob(f"{name}-*-quick.json")
    report = json.loads(path.read_text())
    assert f"written: {path}" in finished.stdout
    assert report["op"] == name and not report["interrupted"]
    assert report["allocator"] == ("reuse" if platform.libc_ver()[0] == "glibc" else "default")
    facts = {"cpu", "cores", "threads", "simd", "caches", "load_average", "torch", "dlkit", "python", "commit"}
    assert facts <= report["machine"].keys()
    assert all(row["copy_"] > 0 for row in report["copy_bandwidth"])
    assert [entry["id"] for entry in report["cases"]] == [case.id for case in spec.cases("quick", "cpu")]
    for entry in report["cases"]:
        assert entry["bytes"] > 0 and entry["floor"]["median_us"] > 0
        assert entry["id"] in finished.stdout
        for contestant in ("native", "dlkit"):
            found = entry["contestants"][contestant]
            # Native's sums in bf16 are off by more on one thread than on two.
            assert found["status"] in ("ok", "inexact" if contestant == "native" else "ok"), (entry["id"], found)
            assert 0 < found["min_us"] <= found["q1_us"] <= found["median_us"] <= found["q3_us"]
            assert len(found["errors"]) == len(entry["tolerances"])
    cases = {case.id: case for case in spec.memory_cases("cpu")}
    assert [entry["id"] for entry in report["memory"]] == list(cases)
    for entry in report["memory"]:
        case = cases[entry["id"]]
        found = entry["contestants"]["native"]
        assert found["peak_bytes"] >= found["output_bytes"] >= 2 * case.numel * case.itemsize


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
    """Source and target of a copy, found where the call keeps them."""
    if hasattr(call, "func"):
        return call.args[0], call.func.__self__
    kept = dict(zip(call.__code__.co_freevars, (cell.cell_contents for cell in call.__closure__), strict=True))
    return kept["sources"][0], kept["target"]


def result_file(tmp_path):
    """A result file of two cases with figures that are easy to check by eye."""

    def entry(variant, direction, native_us, mine):
        return {
            "id": f"{variant}/{direction}/2x8/fp32",
            "variant": variant,
            "direction": direction,
            "shape": [2, 8],
            "dtype": "fp32",
            "bytes": 128,
            "tolerances": [1e-6],
            "floor": {"median_us": 9.0, "by": "copy_", "gb_per_s": 1.0},
            "contestants": {"native": {"status": "ok", "errors": [0.0], "median_us": native_us}, "dlkit": mine},
        }

    fast = {"status": "ok", "errors": [0.0], "median_us": 10.0, "rounds_slower_than_native": 0.0}
    slow = {"status": "ok", "errors": [0.0], "median_us": 40.0, "rounds_slower_than_native": 1.0}
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
    assert lines[3] == "| case | native us | dlkit us | vs native | of floor |  |"
    assert lines[5] == "| layer_norm/forward/2x8/fp32 | 20 | 10 | 2.00 | 0.90 |  |"
    assert lines[6] == "| layer_norm/backward/2x8/fp32 | 20 | 40 | 0.50 | 0.23 | slower |"
    assert lines[8].startswith("2 cases; slower than native: 1,")


def test_plot_of_a_file(tmp_path):
    pytest.importorskip("matplotlib")
    assert bench.main(parsed("plot", str(result_file(tmp_path)))) == 0
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_layouts(tmp_path):
    pytest.importorskip("matplotlib")
    path = result_file(tmp_path)
    report = json.loads(path.read_text())
    forward, backward = report["cases"]
    report["cases"] = [forward | {"layout": layout} for layout in ("contiguous", "channels_last")] + [backward]
    assert _report.plot(report, tmp_path / "layouts.png").read_bytes().startswith(b"\x89PNG")


def test_unreadable_file_is_one_sentence(tmp_path, capsys):
    assert bench.main(parsed("table", str(tmp_path / "absent.json"))) == 1
    assert capsys.readouterr().out.startswith(f"cannot read {tmp_path / 'absent.json'}: ")


def test_every_spec_is_a_command():
    assert {"batch_norm", "group_norm", "layer_norm"} <= set(bench.specs())
    for name in bench.specs():
        assert parsed(name, "--sweep").mode == "sweep"
        spec = _runner.load(name)
        for mode in ("quick", "default", "sweep"):
            ids = [case.id for case in spec.cases(mode, "cpu")]
            assert ids and len(ids) == len(set(ids)), (name, mode)


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


def test_slug_and_settings_are_plain():
    assert _machine.slug({"cpu": "AMD EPYC(TM) 9B14", "threads": 2}) == "amd-epyc-tm-9b14-2-threads"
    assert _machine.slug({"cpu": "any", "gpu": "NVIDIA H200", "threads": 2}) == "nvidia-h200"
    json.dumps({field.name: getattr(QUICK, field.name) for field in fields(QUICK)})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunables of glibc")
def test_kept_memory_takes_no_page_faults():
    code = """
import resource, sys, torch
from dlkit.bench import _machine
if sys.argv[1] == "reuse":
    _machine.keep_memory()
x = torch.ones(16 << 20)
x + x
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8): x + x
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    taken = {}
    for mode in ("reuse", "default"):
        finished = subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        taken[mode] = int(finished.stdout)
    assert taken["reuse"] < taken["default"] / 20, taken
