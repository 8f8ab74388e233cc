"""The lab's data: the files, their places, and the batches made from them. No test uses the network."""

import gzip
import struct
from pathlib import Path

import pytest
import torch

for package in ("numpy", "pooch", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="the lab's packages are not installed: pip install 'dlkit[lab]'")

import numpy as np  # noqa: E402  (after the skips above)
import pooch  # noqa: E402

from dlkit.lab import data  # noqa: E402

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
    """An empty cache and Debian folder for the test, no $DLKIT_DATA, and no network."""
    monkeypatch.delenv("DLKIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(data, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(data, "download", refuse_download)
    return tmp_path


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
    # Each place has a different number of images, which shows the place that was read.
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
    # A partial download in the cache is ignored.
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

    monkeypatch.setattr(pooch, "HTTPDownloader", FromHere)
    with pytest.raises(ValueError, match="hash"):
        data.download(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.gz"))


def test_digits_can_be_asked_for(places):
    write_fashion_mnist(places / "debian")
    loaded = data.load("digits")
    assert (loaded.name, loaded.source) == ("digits", "scikit-learn's load_digits")
    assert len(loaded.first(100).train_images) == 100


def test_batches_depend_on_the_epoch_seed_alone():
    inputs, targets = torch.arange(20), torch.arange(20) * 10

    def drawn(seed: int, **options: int) -> list[tuple[list[int], list[int]]]:
        batches = data.Batches(inputs, targets, 4, 5, lambda: seed, **options)
        return [(some.tolist(), wanted.tolist()) for some, wanted in batches]

    once = drawn(1)
    assert once == drawn(1) != drawn(2)
    assert sorted(each for some, _ in once for each in some) == list(range(20))
    assert all(wanted == [10 * each for each in some] for some, wanted in once)
    # Two processes together have the batches of one.
    halves = drawn(1, rank=0, ranks=2), drawn(1, rank=1, ranks=2)
    assert [left[0] + right[0] for left, right in zip(*halves, strict=True)] == [some for some, _ in once]


def test_more_steps_than_one_pass():
    batches = data.Batches(torch.arange(10), torch.arange(10), 4, 6, lambda: 0)
    drawn = torch.cat([some for some, _ in batches])
    assert len(batches) == 6 and drawn.shape == (24,)
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:20].tolist()) == list(range(10))


def test_evaluation_batches_hold_everything_once():
    batches = list(data.Batches(torch.arange(10), torch.arange(10), 4))
    assert [some.tolist() for some, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
