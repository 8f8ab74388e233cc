"""The lab: its commands and their files; a killed command resumes; dlkit's and torch's runs agree."""

import argparse
import csv
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from dlkit import lab

for package in lab.PACKAGES:
    pytest.importorskip(package, reason="the lab's packages are not installed: pip install 'dlkit[lab]'")

import yaml  # noqa: E402  (after the skips above)

from dlkit.lab import course, experiment, models, training  # noqa: E402
from dlkit.lab.data import Dataset  # noqa: E402
from dlkit.lab.experiment import Configuration, Setting  # noqa: E402


@pytest.fixture(scope="module")
def data() -> Dataset:
    """200 images of 8x8 in 4 classes that can be learned, 80 more to validate on."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(280) % 4
    images = torch.randn(4, 8, 8, generator=generator)[labels] + 0.7 * torch.randn(280, 8, 8, generator=generator)
    return Dataset("made", "here", images[:200], labels[:200], images[200:], labels[200:])


def setting(data: Dataset, output: Path, **options) -> Setting:
    return Setting(data=data, output=output, **options)


SMALL = partial(models.mlp, widths=(16, 12), norm=torch.nn.BatchNorm1d, dropout=0.2)


def small(**options) -> Configuration:
    return Configuration("small", **{"model": SMALL, "epochs": 4, "batch_size": 20, **options})


def make(setting: Setting, configuration: Configuration, layers: str = "dlkit", seed: int = 0) -> training.Run:
    return training.Run("some", configuration, setting, layers, seed, ("val_accuracy", "max"))


def numbers(run: training.Run) -> list[dict[str, float]]:
    """The metrics of each epoch, without its time."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]


def arguments(*text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    lab.add_arguments(parser)
    return parser.parse_args(list(text))


def started(*text: str) -> subprocess.Popen:
    """`python -m dlkit lab ...` on digits with one thread, in a process that Ctrl-C reaches: processes that a shell
    starts in the background ignore it, tests included."""
    code = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "runpy.run_module('dlkit', run_name='__main__', alter_sys=True)"
    line = [sys.executable, "-c", code, "lab", *text, "--data", "digits", "--threads", "1"]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environ())


def command(*text: str) -> None:
    """The same in this process."""
    threads = torch.get_num_threads()
    try:
        assert lab.main(arguments(*text, "--data", "digits", "--threads", "1")) == 0
    finally:
        torch.set_num_threads(threads)


def environ() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


# One run


def test_a_run_learns_and_writes_its_folder(data, tmp_path):
    run = make(setting(data, tmp_path), small())
    run.advance()
    assert run.finished and run.value() > 0.5
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "results.json", "tensorboard"}
    assert list((run.folder / "tensorboard").glob("events.*"))
    with (run.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert float(rows[-1]["val_accuracy"]) == run.value()
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (config["experiment"], config["layers"], config["lr"], config["epochs"]) == ("some", "dlkit", 1e-3, 4)
    assert "BatchNormReLU1d" not in config["model"] and "BatchNorm1d(16" in config["model"]


def test_metrics_are_those_of_the_model(data, tmp_path):
    run = make(setting(data, tmp_path), small())
    run.advance()
    model = run.model()
    assert any(type(layer).__module__.startswith("dlkit.nn") for layer in model.modules())
    with torch.no_grad():
        for images, labels, part in (
            (data.test_images, data.test_labels, "val"),
            (data.train_images, data.train_labels, "train"),
        ):
            right = (model(images).argmax(1) == labels).double().mean()
            assert run.value(f"{part}_accuracy") == pytest.approx(float(right), abs=1e-6)
        loss = torch.nn.functional.cross_entropy(model(data.test_images), data.test_labels)
    assert run.value("val_loss") == pytest.approx(float(loss), abs=1e-5)


def test_the_best_checkpoint_is_of_the_best_epoch(data, tmp_path):
    run = make(setting(data, tmp_path), small(lr=0.05, epochs=6))
    run.advance()
    model = run.model("best")
    with torch.no_grad():
        right = (model(data.test_images).argmax(1) == data.test_labels).double().mean()
    assert float(right) == pytest.approx(run.best(), abs=1e-6)


@pytest.mark.parametrize("layers", ["dlkit", "torch"])
def test_epoch_by_epoch_is_the_same_as_at_once(data, tmp_path, layers):
    options = {"schedule": torch.optim.lr_scheduler.CosineAnnealingLR, "patience": 3}
    whole = make(setting(data, tmp_path / "whole"), small(**options), layers)
    whole.advance()
    for _ in range(4):  # each time as a new process
        parts = make(setting(data, tmp_path / "parts"), small(**options), layers)
        parts.advance(1)
    assert parts.finished
    assert numbers(parts) == numbers(whole)
    one, other = (torch.load(run.folder / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_finished_runs_are_not_run_again(data, tmp_path, monkeypatch):
    some = setting(data, tmp_path)
    run = make(some, small(epochs=1))
    run.advance()
    monkeypatch.setattr(training.Run, "_fit", lambda *_: pytest.fail("trained again"))
    again = make(some, small(epochs=1))
    again.advance()
    assert again.finished and numbers(again) == numbers(run)


def test_early_stopping_ends_a_run_for_good(data, tmp_path):
    some = setting(data, tmp_path)
    stopped = small(epochs=50, lr=0.5, patience=2, optimizer="SGD")
    run = make(some, stopped)
    run.advance()
    losses = run.column("val_loss")
    assert run.finished and len(losses) < 50
    assert min(losses) == losses[-3]
    whole = numbers(run)
    while not (again := make(setting(data, tmp_path / "again"), stopped)).finished:
        again.advance(1)
    assert numbers(again) == whole


def test_probes_look_before_and_after(data, tmp_path):
    run = make(setting(data, tmp_path), small(probe=first_weight))
    run.advance()
    assert set(run.probes) == {"start", "end"} and run.probes["start"] != run.probes["end"]
    torch.manual_seed(0)
    assert run.probes["start"] == first_weight(SMALL(data), data)
    assert run.probes["end"] == first_weight(run.model(), data)
    # Killed after the training and before the probe.
    (run.folder / "results.json").unlink()
    again = make(setting(data, tmp_path), small(probe=first_weight))
    again.advance()
    assert again.probes == run.probes and numbers(again) == numbers(run)


def first_weight(model: torch.nn.Module, data: Dataset) -> float:
    return next(model.parameters()).flatten()[0].item()


@pytest.mark.parametrize("optimizer", ["SGD", "RMSprop", "Adam", "AdamW"])
def test_dlkits_run_is_torchs(data, tmp_path, optimizer):
    model = partial(models.mlp, widths=(16,), norm=torch.nn.LayerNorm, activation=torch.nn.GELU)
    configuration = small(model=model, optimizer=optimizer, max_norm=0.5, epochs=2)
    ours, theirs = (make(setting(data, tmp_path), configuration, layers) for layers in ("dlkit", "torch"))
    training.train([theirs, ours], lambda line: None)
    for mine, other in zip(numbers(ours), numbers(theirs), strict=True):
        assert mine == pytest.approx(other, rel=1e-4)


def test_what_torch_lacks_is_dlkits_too():
    torch.manual_seed(0)
    x = torch.randn(64, 4, 6, 6)
    for layer in (models.DropPath(0.3), models.DropBlock2d(0.3, 3)):
        twin = training.to_dlkit(torch.nn.Sequential(layer))
        assert "dlkit" in repr(twin)
        dropped = (twin(x) == 0).double().mean()
        assert dropped == pytest.approx(float((layer(x) == 0).double().mean()), abs=0.1) and 0.1 < dropped < 0.5
        assert torch.equal(twin.eval()(x), x)
    linear = models.DropConnectLinear(6, 5, 0.3)
    twin = training.to_dlkit(torch.nn.Sequential(linear))
    assert "dlkit" in repr(twin)
    assert not torch.equal(twin(x), twin(x))
    torch.testing.assert_close(twin.eval()(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


# Refused input, and a full disk


def test_a_folder_of_something_else_is_refused(data, tmp_path):
    some = setting(data, tmp_path)
    run = make(some, small(epochs=1))
    run.advance()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(training.Refused, match=r"another configuration \(lr: 0.001, now 0.1\)"):
        make(some, small(epochs=1, lr=0.1))
    with pytest.raises(training.Refused, match="epochs: 1, now 3"):
        make(some, small(epochs=3))
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    (run.folder / "config.yaml").write_text("just words")
    with pytest.raises(training.Refused, match="not the configuration of a run"):
        make(some, small(epochs=1))
    (run.folder / "config.yaml").unlink()
    with pytest.raises(training.Refused, match="not empty and has no config"):
        make(some, small(epochs=1))


def test_a_batch_that_cannot_be_divided_is_refused(data, tmp_path):
    with pytest.raises(training.Refused, match="batches of 20 cannot be divided among --devices 3"):
        make(setting(data, tmp_path, devices=3), small())


def test_a_full_disk_keeps_the_last_epoch(data, tmp_path, monkeypatch):
    some = setting(data, tmp_path)
    whole = make(setting(data, tmp_path / "whole"), small())
    whole.advance()
    make(some, small()).advance(2)
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.name == "last.ckpt.part":
            write_bytes(path, content[:100])
            raise OSError(28, "No space left on device", str(path))
        return write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(SystemExit, match=r"cannot write .*last.ckpt.part: No space left"), course.one_line():
            make(some, small()).advance()
    assert not list(tmp_path.rglob("*.part"))
    run = make(some, small())
    run.advance()
    assert numbers(run) == numbers(whole)


# The command


def test_every_experiment_is_described():
    assert experiment.names()[0] == "fashion-mnist"
    orders = [experiment.load(name).ORDER for name in experiment.names()]
    assert orders == sorted(set(orders))
    for name in experiment.names():
        module = experiment.load(name)
        assert module.SUMMARY and module.LOOK_AT and callable(module.draw)
        assert sum(hasattr(module, way) for way in ("configurations", "run", "search")) == 1


@pytest.mark.slow
def test_list_and_help_import_nothing_heavy(capsys):
    code = (
        "import sys; sys.argv = ['dlkit', 'lab', *sys.argv[1:]]\n"
        "from dlkit.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'lightning', 'matplotlib', 'sklearn', 'kornia', 'optuna', 'captum', 'pooch'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    for option in ("--help", ""):
        done = subprocess.run(
            [sys.executable, "-c", code, *option.split()], capture_output=True, text=True, env=environ()
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
        if not option:
            assert all(name in done.stdout for name in experiment.names())


def test_a_package_for_another_torch_ends_with_one_line(monkeypatch):
    def fail(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    given = arguments("batchnorm")
    monkeypatch.setattr(lab.importlib, "import_module", fail)
    with pytest.raises(SystemExit, match=r"torchvision::nms.*uninstall it") as raised:
        lab.main(given)
    assert "\n" not in str(raised.value)


def test_missing_packages_end_with_one_line(monkeypatch):
    monkeypatch.setattr(lab, "PACKAGES", (*lab.PACKAGES, "no_such_package"))
    with pytest.raises(SystemExit, match=r"needs no_such_package: run  pip install 'dlkit\[lab\]'"):
        lab.main(arguments("batchnorm"))


@pytest.mark.parametrize("option", ["--epochs", "--seeds", "--devices", "--threads"])
def test_numbers_below_one_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        arguments("batchnorm", option, "0")
    assert "at least 1" in capsys.readouterr().err


def test_an_unknown_experiment_is_refused(capsys):
    with pytest.raises(SystemExit):
        arguments("batch-norm")
    assert "invalid choice: 'batch-norm'" in capsys.readouterr().err


def test_no_data_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match="nowhere: has none of Fashion-MNIST's files"):
        lab.main(arguments("batchnorm", "--data", str(tmp_path / "nowhere"), "--output", str(tmp_path)))


@pytest.mark.slow
def test_both_layers_are_compared(tmp_path, capsys):
    options = ["--data", "digits", "--layers", "both", "--seeds", "2", "--epochs", "2", "--output", str(tmp_path)]
    assert lab.main(arguments("sgd-adamw", "--quick", *options)) == 0
    printed = capsys.readouterr().out
    assert "validation on its 360 test images" in printed
    folder = tmp_path / "sgd-adamw"
    assert (folder / "sgd-adamw.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "table.txt").read_text().strip() in printed
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2
    parity = [line.split() for line in printed.splitlines() if line.startswith("AdamW 3e-4") and " to " in line]
    difference, low, high = float(parity[0][2]), float(parity[0][3]), float(parity[0][5])
    assert low <= difference <= high


def test_the_interval_is_students():
    from dlkit.lab.report import interval

    # scipy's t.ppf(0.975, 2) is 4.3027; the deviation of 1, 2, 3 is 1.
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert interval([1.0]) != interval([1.0])


@pytest.mark.slow
def test_interrupted_and_killed_and_gone_on(tmp_path):
    """Ctrl-C in the first training, SIGKILL in the second; the same command then ends as an uninterrupted one."""
    text = ["dropout", "--epochs", "12"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for name, number in (("without", signal.SIGINT), ("dropout", signal.SIGKILL)):
        process = started(*text, "--output", str(broken))
        folder = broken / "dropout" / name / "seed0-dlkit"
        while not (folder / "last.ckpt").is_file() and process.poll() is None:
            time.sleep(0.001)
        process.send_signal(number)
        _, said = process.communicate()
        assert not (folder / "results.json").exists(), "it had ended before the signal came"
        if number == signal.SIGINT:
            assert process.returncode == 1
            assert said.strip().splitlines()[-1].startswith("dlkit lab: interrupted; the same command goes on")
        else:
            assert process.returncode == -signal.SIGKILL
    command(*text, "--output", str(broken))
    command(*text, "--output", str(whole))
    for name in ("without", "dropout"):
        files = [folder / "dropout" / name / "seed0-dlkit" / "metrics.csv" for folder in (whole, broken)]
        one, other = ([row.rsplit(",", 1)[0] for row in path.read_text().splitlines()] for path in files)
        assert one == other and len(one) == 1 + 12


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """Two processes give the weights of one, without BatchNorm and with SyncBatchNorm."""
    text = ["batchnorm", "--quick", "--epochs", "2"]
    command(*text, "--output", str(tmp_path / "one"))
    for strategy in ("ddp", "fsdp"):
        process = started(*text, "--devices", "2", "--strategy", strategy, "--output", str(tmp_path / strategy))
        _, said = process.communicate()
        assert process.returncode == 0, said
        for name in ("without", "with-batchnorm"):
            one, two = (
                torch.load(tmp_path / where / "batchnorm" / name / "seed0-dlkit" / "last.ckpt", weights_only=True)
                for where in ("one", strategy)
            )
            assert one["global_step"] == two["global_step"] == 14
            assert one["state_dict"].keys() == two["state_dict"].keys()
            for key, value in one["state_dict"].items():
                torch.testing.assert_close(two["state_dict"][key], value, rtol=1e-5, atol=1e-6)
