"""bench models and bench calls: the input they refuse, their files and output, in runs of a second."""

import argparse
import json
import os
import re

import pytest
import torch
from dlkit.bench import _calls, _models
from dlkit.bench._runner import Settings

from dlkit import bench

BRIEF = Settings(budget_s=0.0, sample_s=1e-5, min_rounds=2, warm_up_s=0)


pytestmark = pytest.mark.usefixtures("one_thread")


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser, arguments)
    return parser.parse_args(arguments)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(_models, "apart", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(_models, "SAMPLE_S", 0.001)
    monkeypatch.setattr(_models, "MEMORY", ("default",))
    monkeypatch.setattr(_models, "_memory", lambda *arguments: 5 << 20)


def run(path, *arguments):
    threads = str(torch.get_num_threads())
    budget = ["--budget", "0.001", "--threads", threads, "--json", str(path)]
    return bench.main(parsed("models", "--models", "mlp", *budget, *arguments))


def test_a_run_checks_times_and_writes(in_process, tmp_path, capsys):
    path = tmp_path / "new" / "models.json"
    assert run(path, "--against", "native_best,ceiling") == 0
    report = json.loads(path.read_text())
    (entry,) = report["models"]
    assert abs(sum(report["shares"]["mlp"].values()) - 1) < 1e-6
    assert (entry["model"], entry["memory"], entry["target"]) == ("mlp", "default", 1.7)
    assert list(entry["contestants"]) == ["native", "native_best", "dlkit", "ceiling"]
    for figures in entry["contestants"].values():
        assert figures["status"] == "ok" and figures["peak_bytes"] == 5 << 20
        assert 0 < figures["min_ms"] <= figures["q1_ms"] <= figures["median_ms"] <= figures["q3_ms"]
    printed = capsys.readouterr().out
    assert "mlp, default, native_best" in printed and f"written: {path}" in printed
    assert "\nmlp: dlkit's ops are " in printed


def test_who_fails_is_shown_and_not_timed(in_process, tmp_path, capsys, monkeypatch):
    honest = _models.losses

    def losses(name, contestant):
        if contestant == "native_best":
            raise RuntimeError("no such setting\nmore")
        return [value + (contestant == "dlkit") for value in honest(name, contestant)]

    monkeypatch.setattr(_models, "losses", losses)
    path = tmp_path / "models.json"
    assert run(path, "--against", "native_best") == 1
    found = json.loads(path.read_text())["models"][0]["contestants"]
    assert found["native"]["status"] == "ok" and "median_ms" in found["native"]
    assert found["dlkit"]["status"] == "wrong" and "median_ms" not in found["dlkit"]
    assert found["native_best"] == {"status": "error", "message": "RuntimeError: no such setting"}
    assert "error: RuntimeError: no such setting" in capsys.readouterr().out


def test_a_process_that_dies_ends_its_model_alone(monkeypatch):
    monkeypatch.setattr(_models, "MEMORY", ("default",))
    monkeypatch.setattr(_models, "apart", lambda *arguments: _dies())
    printed = []
    report = _models.run(["mlp", "gpt"], ["native", "dlkit"], 1, 0.001, echo=printed.append)
    assert [entry["contestants"]["dlkit"]["status"] for entry in report["models"]] == ["error", "error"]
    assert "the process ended with status -9" in printed[-1] and report["shares"] == {}


def _dies():
    raise RuntimeError("the process ended with status -9")


def test_an_interrupt_keeps_what_was_measured(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(_models, "MEMORY", ("default", "reuse"))

    def apart(function, name, contestants, reuse, *arguments):
        if reuse:
            raise KeyboardInterrupt
        return {name: {"status": "ok", "median_ms": 1.0, "q1_ms": 1.0, "q3_ms": 1.0} for name in contestants}

    monkeypatch.setattr(_models, "apart", apart)
    report = _models.run(["mlp"], ["native", "dlkit"], 1, 0.001, echo=lambda line: None)
    assert report["interrupted"] and len(report["models"]) == 1
    monkeypatch.setattr(_models, "MEMORY", ("reuse",))
    assert bench.main(parsed("models", "--models", "mlp", "--json", str(tmp_path / "never.json"))) == 130
    assert not (tmp_path / "never.json").exists()


def test_a_folder_that_cannot_be_written_loses_no_table(in_process, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "models.json", "--against", "native") == 1
    caught = capsys.readouterr()
    assert "mlp, default, dlkit" in caught.out and "cannot write" in caught.err


def test_every_model_is_fused_and_loses_its_dropout():
    for name in _models.WORKLOADS:
        torch.manual_seed(0)
        workload = _models.workload_of(name)
        model = workload.make(False)
        (inputs, _), *_ = workload.batches()
        assert torch.equal(model(inputs[:2]), model(inputs[:2]))
        trained = _models.trainer(name, "dlkit")
        left = [
            module
            for module in trained.model.modules()
            if type(module).__module__ in ("torch.nn.modules.dropout", "torch.nn.modules.normalization")
        ]
        assert not left
        bare = _models.bare(workload.make(True))
        assert not any("norm" in type(module).__name__.lower() for module in bare.modules())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["nothing"], "expected --models mlp, cnn"),
        (["timm:no_such_model"], "timm (has no model|is not installed|cannot be imported)"),
        (["hf:no_such_model"], "transformers (has no model|is not installed|cannot be imported)"),
        (["timm:resnet18,wide"], "expected option=value after the comma, got 'wide'"),
    ],
)
def test_a_model_that_nobody_knows_is_refused_at_once(names, message, capsys):
    assert bench.main(parsed("models", "--models", *names)) == 2
    assert re.search(message, capsys.readouterr().err)


def test_profile_names_what_the_step_is_made_of(tmp_path):
    shares = _models.shares("mlp", torch.get_num_threads(), tmp_path / "mlp.json")
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert any(name.startswith("dlkit::batch_norm") for name in shares)
    assert json.loads((tmp_path / "mlp.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_processes_apart():
    assert _models.apart(abs, -3) == 3
    with pytest.raises(RuntimeError, match="ended with status 3"):
        _models.apart(_exit, 3)


def _exit(status):
    os._exit(status)


def test_calls_of_every_op_agree_with_native_hop_by_hop():
    """All hops give the same result. dropout's masks differ from native's: only its shape is compared."""
    for name, make in _calls.cases().items():
        for n in (1, 4096):
            levels = make(n)
            calls = [call for call in (levels.native, levels.module, levels.functional, levels.op) if call]
            outputs = [call() for call in calls]
            if not levels.leaves:
                continue
            assert len(calls) == 4, name
            first, *others = [output if isinstance(output, tuple) else (output,) for output in outputs]
            for other in others:
                for a, b in zip(first, other, strict=True):
                    assert a.shape == b.shape and b.requires_grad, name
                    if "Drop" not in name:
                        torch.testing.assert_close(a, b)


def test_calls_prints_hops_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_calls, "SIZES", (1, 16))
    monkeypatch.setattr(
        _calls, "Settings", lambda **_: Settings(budget_s=0.0, sample_s=1e-5, min_rounds=2, warm_up_s=0)
    )
    path = tmp_path / "calls.json"
    assert bench.main(parsed("calls", "--filter", "AddLayerNorm", "--json", str(path))) == 0
    cases = json.loads(path.read_text())["cases"]
    assert [(case["op"], case["elements"]) for case in cases] == [
        (name, n) for name in ("AddLayerNorm", "DropoutAddLayerNorm") for n in (1, 16)
    ]
    for case in cases:
        hops, us = case["hops"], case["us"]
        assert tuple(hops) == _calls.HOPS
        assert abs(sum(hops.values()) - us["dlkit_both"]) < 1e-9 * us["dlkit_both"]
        assert us["native_both"] > 0 and us["native"] > 0
    assert "AddLayerNorm, 16" in capsys.readouterr().out


def test_calls_of_an_optimizer_have_no_hops():
    entry = _calls.measure("AdamW", 16, BRIEF)
    assert entry["hops"] == {} and set(entry["us"]) == {"native", "dlkit"}
    assert _calls.line(entry).startswith("AdamW, 16")
    entry["rounds_slower_than_native"] = {"forward": 0.8}
    assert _calls.line(entry).endswith("slower: forward")
