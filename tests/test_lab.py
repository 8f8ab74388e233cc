"""The lab: data files and where they are found, models, the comparison, what it writes. No test uses the network."""

import argparse
import gzip
import json
import struct
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "numpy", "pooch", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="the lab's packages are not installed: pip install 'dlkit[lab]'")

import numpy as np  # noqa: E402  (after the skips above)

import dlkit  # noqa: E402
from dlkit import lab  # noqa: E402
from dlkit.lab import compare, data, fashion_mnist, models  # noqa: E402

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = data.FILES


def write_idx(path: Path, array: np.ndarray) -> None:
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion_mnist(folder: Path, train: int = 64, test: int = 20, suffix: str = ".gz") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for count, images, labels in ((train, TRAIN_IMAGES, TRAIN_LABELS), (test, TEST_IMAGES, TEST_LABELS)):
        write_idx(folder / f"{images}{suffix}", random.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{labels}{suffix}", np.arange(count) % 10)
    return folder


def refuse_download(folder: Path) -> None:
    raise OSError("no network in tests")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """An own, empty cache and Debian folder, no $DLKIT_DATA, and no network."""
    monkeypatch.delenv("DLKIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(data, "download", refuse_download)
    return tmp_path


def arguments(*text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    lab.add_arguments(parser)
    return parser.parse_args(["fashion_mnist", *text])


# Data


@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("shape", [(7,), (3, 5, 4), (0,)])
def test_idx_round_trip(tmp_path, suffix, shape):
    array = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    write_idx(tmp_path / f"file{suffix}", array)
    read = data.read_idx(tmp_path / f"file{suffix}")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, array)


def test_images_are_standardized_and_labels_kept(places):
    folder = write_fashion_mnist(places / "asked")
    loaded = data.load(str(folder))
    raw = torch.tensor(data.read_idx(folder / f"{TRAIN_IMAGES}.gz"), dtype=torch.float64)
    expected = (raw - raw.mean()) / raw.std()
    torch.testing.assert_close(loaded.train_images.double(), expected, rtol=1e-5, atol=1e-5)
    assert loaded.train_labels.tolist() == [index % 10 for index in range(64)]
    assert (loaded.image_size, loaded.classes, len(loaded.test_images)) == ((28, 28), 10, 20)


def damage_magic(content: bytes) -> bytes:
    return b"\x00\x00\x0d" + content[3:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_magic, "not an IDX file"),
        (lambda content: b"", "not an IDX file"),
        (lambda content: content[:10], "ends within its header"),
        (lambda content: content[:-1], "expected 50176 bytes for its shape (64, 28, 28), got 50175"),
        (lambda content: content + b"\x00", "expected 50176 bytes for its shape (64, 28, 28), got 50177"),
    ],
)
def test_damaged_file_is_named(places, damage, message):
    path = write_fashion_mnist(places / "debian", suffix="") / TRAIN_IMAGES
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError) as error:
        data.load()
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda content: b"<html>not found</html>"])
def test_damaged_gzip_is_named(places, damage):
    path = write_fashion_mnist(places / "debian") / f"{TEST_IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.DataError) as error:
        data.load()
    assert str(error.value).startswith(f"{path}: cannot be read")


def test_files_that_do_not_fit_together(places):
    folder = write_fashion_mnist(places / "debian")
    write_idx(folder / f"{TEST_LABELS}.gz", np.zeros(19))
    with pytest.raises(data.DataError, match=f"{TEST_LABELS}.gz: expected 20 labels"):
        data.load()
    write_idx(folder / f"{TEST_LABELS}.gz", np.zeros(20))
    write_idx(folder / f"{TEST_IMAGES}.gz", np.zeros((20, 8, 8)))
    with pytest.raises(data.DataError, match=f"{TEST_IMAGES}.gz: expected images of"):
        data.load()


def test_part_of_the_files_is_an_error(places):
    (write_fashion_mnist(places / "debian") / f"{TEST_LABELS}.gz").unlink()
    with pytest.raises(data.DataError, match=TEST_LABELS):
        data.load()


def test_folder_asked_for_must_have_the_files(places):
    write_fashion_mnist(places / "debian")
    with pytest.raises(data.DataError, match="has none of Fashion-MNIST's files"):
        data.load(str(places / "nowhere"))


def test_search_order(places, monkeypatch):
    # Each place has another number of images, so that what was read shows where it was found.
    asked = write_fashion_mnist(places / "asked", train=11)
    environment = write_fashion_mnist(places / "environment", train=12, suffix="")
    cache = write_fashion_mnist(places / "cache", train=13)
    write_fashion_mnist(places / "debian", train=14)
    monkeypatch.setenv("DLKIT_DATA", str(environment))

    def images(folder: Path | None = None) -> int:
        return len(data.load(str(folder) if folder else None).train_images)

    assert images(asked) == 11
    assert images() == 12
    monkeypatch.setenv("DLKIT_DATA", str(places / "empty"))
    assert images() == 13
    # What an interrupted download leaves in the cache does not count.
    (cache / f"{TEST_LABELS}.gz").unlink()
    assert images() == 14


def test_download_fills_the_cache(places, monkeypatch):
    monkeypatch.setattr(data, "download", lambda folder: write_fashion_mnist(folder, train=15))
    assert len(data.load().train_images) == 15
    monkeypatch.setattr(data, "download", refuse_download)
    loaded = data.load()
    assert len(loaded.train_images) == 15
    assert loaded.source == str(places / "cache")


@pytest.mark.parametrize("failure", [OSError("offline"), ValueError("wrong hash")])
def test_digits_where_nothing_is_found(monkeypatch, failure):
    def fail(folder: Path) -> None:
        raise failure

    monkeypatch.setattr(data, "download", fail)
    loaded = data.load()
    assert loaded.name == "digits"
    assert "download failed" in loaded.source
    assert (loaded.image_size, loaded.classes) == ((8, 8), 10)
    assert (len(loaded.train_images), len(loaded.test_images)) == (1437, 360)


def test_download_checks_the_hash(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real download(), fed from a local file

    class FromHere:
        def __init__(self, **options):
            pass

        def __call__(self, url, output_file, pooch, check_only=False):
            Path(output_file).write_bytes(b"a captive portal's page")

    monkeypatch.setattr(data.pooch, "HTTPDownloader", FromHere)
    with pytest.raises(ValueError, match="hash"):
        data.download(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.gz"))


# Training


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("image_size", [(28, 28), (8, 8)])
def test_two_steps_give_the_same_losses(places, name, image_size):
    torch.manual_seed(0)
    # fp64: in fp32 a ReLU's input may round to the other side of 0, and AdamW's first step makes 1e-4 of that.
    images, labels = torch.randn(16, *image_size, dtype=torch.float64), torch.arange(16) % 10
    some = data.Dataset("some", "here", images, labels, images, labels)
    model = models.MODELS[name](image_size, 10).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # each draws masks of its own
    start = {key: value.clone() for key, value in model.state_dict().items()}
    schedule = compare.Schedule(images=16, epochs=1, batch_size=8)
    result = compare.compare(name, model, some, schedule, 0, fashion_mnist.REWRITES[name])
    assert len(result.torch_losses) == len(result.dlkit_losses) == 2
    expected = {"mlp": (3, 0), "transformer": (17, 0), "batch_norm_mlp": (6, 3), "residual_cnn": (9, 7)}
    assert (result.layers, result.fused) == expected[name]
    assert any(not torch.equal(start[key], value) for key, value in model.state_dict().items())
    # The second loss comes after an update of all weights, so it compares the gradients too. 1e-13 is 200 roundings of
    # a loss of 2.3.
    assert result.largest_loss_difference < 1e-13
    assert result.torch_losses[0] != result.torch_losses[1]


def test_contestants_differ_only_in_their_norms(places, monkeypatch):
    seen: dict[type, list[torch.Tensor]] = {}
    step = compare.Contestant.step

    def spy(self, images, labels):
        norm = next(module for module in self.model.modules() if isinstance(module, torch.nn.LayerNorm))
        seen.setdefault(type(norm), []).append(images)
        step(self, images, labels)

    monkeypatch.setattr(compare.Contestant, "step", spy)
    loaded = data.load(str(write_fashion_mnist(places / "asked")))
    compare.compare("mlp", models.mlp((28, 28), 10), loaded, compare.Schedule(64, 2, 16), seed=0)
    ours, theirs = seen[dlkit.nn.LayerNorm], seen[torch.nn.LayerNorm]
    assert len(ours) == len(theirs) == 8
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_model_has_a_schedule_and_a_twin():
    assert lab.MODELS == tuple(models.MODELS) == tuple(fashion_mnist.REWRITES)
    pairs = {(name, model) for name in ("Fashion-MNIST", "digits") for model in lab.MODELS}
    assert set(fashion_mnist.SCHEDULES) == pairs


def test_nothing_to_compare_is_an_error():
    images, labels = torch.randn(4, 8, 8), torch.arange(4)
    some = data.Dataset("some", "here", images, labels, images, labels)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
    with pytest.raises(RuntimeError, match="changed no layer"):
        compare.compare("plain", model, some, compare.Schedule(4, 1, 2), seed=0)


# The command


def test_command_writes_plot_and_figures(places, capsys):
    folder = write_fashion_mnist(places / "asked")
    output = places / "results"
    options = ["--data", str(folder), "--epochs", "1", "--limit", "32", "--batch-size", "16", "--output", str(output)]
    assert lab.main(arguments(*options)) == 0

    assert (output / "fashion_mnist.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((output / "fashion_mnist.json").read_text())
    assert [result["model"] for result in figures["results"]] == list(lab.MODELS)
    for result in figures["results"]:
        assert (result["training_images"], result["batch_size"], result["steps"]) == (32, 16, 2)
        assert result["torch"]["median_step_ms"] > 0
        assert result["speed_up"] == result["torch"]["median_step_ms"] / result["dlkit"]["median_step_ms"]
    printed = capsys.readouterr().out
    assert f"Fashion-MNIST from {folder}" in printed
    assert "32 of 64 training images" in printed


def test_command_on_digits(places, capsys):
    output = places / "results"
    assert lab.main(arguments("--model", "mlp", "--epochs", "2", "--output", str(output))) == 0
    assert capsys.readouterr().out.startswith("digits from scikit-learn's load_digits, as Fashion-MNIST is not on")
    figures = json.loads((output / "digits.json").read_text())
    assert figures["results"][0]["dlkit"]["test_accuracy"] > 0.5
    assert (output / "digits.png").is_file()


def test_command_ends_with_one_sentence(places, monkeypatch):
    with pytest.raises(SystemExit, match="nowhere: has none of"):
        lab.main(arguments("--data", str(places / "nowhere"), "--output", str(places / "results")))
    monkeypatch.setitem(lab.PACKAGES, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit, match="pip install no-such-package"):
        lab.main(arguments())


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--limit", "--threads"])
def test_numbers_below_one_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        arguments(option, "0")
    assert "at least 1" in capsys.readouterr().err
