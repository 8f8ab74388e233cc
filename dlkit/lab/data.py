"""Fashion-MNIST from its four IDX files (https://github.com/zalandoresearch/fashion-mnist), or digits without them.

Where the files are looked for, first hit wins: the folder asked for, $DLKIT_DATA, the per-user cache, the folder of
Debian's package dataset-fashion-mnist, a download into that cache. Files that are there but broken are an error that
names the file: training on something else in silence would be worse than stopping. Images become fp32 with the
training set's mean 0 and deviation 1, the whole set in one tensor, so that a batch is one indexing.

The lab validates on the data set's own test images, which no training sees. Where a run keeps its best epoch or stops
early, it chooses by them, so that "best" is a little too good; the table has the last epoch too.
"""

import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

# File -> sha256 of its canonical .gz (whose md5 is in the data set's README).
FILES = {
    "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}


class DataError(Exception):
    """A data file is missing from a folder that should have it, or is broken. The message names it."""


@dataclass
class Dataset:
    """Images are fp32 [count, height, width], labels int64 [count]."""

    name: str
    source: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor

    def to(self, device: str) -> "Dataset":
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def first(self, count: int) -> "Dataset":
        """The data set with only its first training images."""
        return replace(self, train_images=self.train_images[:count], train_labels=self.train_labels[:count])

    @property
    def image_size(self) -> tuple[int, int]:
        return self.train_images.shape[1], self.train_images.shape[2]

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1


class Batches:
    """Takes the place of a DataLoader: batches of inputs and targets, each cut out of the whole by one indexing.

    With `epoch_seed`, `steps` batches in the random order that its value gives, and process `rank` of `ranks` takes its
    part of each; else everything in its own order.
    """

    def __init__(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        batch_size: int,
        steps: int | None = None,
        epoch_seed: Callable[[], int] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size
        self.steps = math.ceil(len(inputs) / batch_size) if steps is None else steps
        self.epoch_seed, self.rank, self.ranks = epoch_seed, rank, ranks

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.epoch_seed is None:
            yield from zip(self.inputs.split(self.batch_size), self.targets.split(self.batch_size), strict=True)
            return
        generator = torch.Generator().manual_seed(self.epoch_seed())
        count, wanted = len(self.inputs), self.steps * self.batch_size
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(math.ceil(wanted / count))])
        order = order[:wanted].view(self.steps, self.ranks, self.batch_size // self.ranks)[:, self.rank]
        for batch in order.to(self.inputs.device):
            yield self.inputs[batch], self.targets[batch]


def read_idx(path: Path) -> "np.ndarray":
    """The uint8 array of an IDX file, gzipped if it is called *.gz.

    The format: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as a big-endian
    32-bit integer, the elements.
    """
    import numpy as np

    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(f"{path}: not an IDX file of bytes: expected it to begin 00 00 08, got {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path}: ends within its header, after {len(content)} bytes of {start}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=content[3], offset=4))
    if len(content) - start != math.prod(shape):
        raise DataError(f"{path}: expected {math.prod(shape)} bytes for its shape {shape}, got {len(content) - start}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_split(images_path: Path, labels_path: Path) -> "tuple[np.ndarray, np.ndarray]":
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or images.size == 0:
        raise DataError(f"{images_path}: expected images [count, height, width], got the shape {images.shape}")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{labels_path}: expected {len(images)} labels, one an image, got the shape {labels.shape}")
    return images, labels


def _dataset(name: str, source: str, *arrays: "np.ndarray") -> Dataset:
    train_images, train_labels, test_images, test_labels = (torch.tensor(array) for array in arrays)
    train_images, test_images = train_images.float(), test_images.float()
    std, mean = torch.std_mean(train_images)
    train_images, test_images = ((images - mean) / std for images in (train_images, test_images))
    return Dataset(name, source, train_images, train_labels.long(), test_images, test_labels.long())


def cache_folder() -> Path:
    import pooch

    return Path(pooch.os_cache("dlkit")) / "fashion-mnist"


def _find(folder: Path) -> list[Path]:
    """Where the folder has each of FILES, plain or gzipped; [] if it has none. Some but not all is an error."""
    found = {name: path for name in FILES for path in (folder / f"{name}.gz", folder / name) if path.is_file()}
    missing = [name for name in FILES if name not in found]
    if found and missing:
        raise DataError(f"{folder}: has part of Fashion-MNIST, but not {', '.join(missing)}")
    return [found[name] for name in FILES if name in found]


def download(folder: Path) -> None:
    """Fetches missing files; one attempt, no retry. Raises OSError offline, ValueError on a wrong hash."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    # 5 s to connect, 10 s without a byte: a machine behind a silent firewall soon goes on without.
    fetch = pooch.HTTPDownloader(progressbar=True, timeout=(5, 10))
    for name, sha256 in FILES.items():
        pooch.retrieve(f"{URL}{name}.gz", f"sha256:{sha256}", f"{name}.gz", folder, downloader=fetch)


def _fashion_mnist(folder: Path, paths: list[Path]) -> Dataset:
    train, test = _read_split(paths[0], paths[1]), _read_split(paths[2], paths[3])
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(f"{paths[2]}: expected images of {train[0].shape[1:]} as in training, got {test[0].shape[1:]}")
    return _dataset("Fashion-MNIST", str(folder), *train, *test)


def _digits(reason: str) -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images.reshape(-1, 8, 8), labels, test_size=360, random_state=0, stratify=labels)
    return _dataset("digits", f"scikit-learn's load_digits{reason}", parts[0], parts[2], parts[1], parts[3])


def load(folder: str | None = None) -> Dataset:
    """Reads Fashion-MNIST, or digits if it cannot be had; `source` names the data taken and the reason.

    `folder` is where to read it from, and nowhere else; or "digits".

    Raises DataError where `folder` is given and lacks the files, or where the files found are broken.
    """
    if folder == "digits":
        return _digits("")
    if folder is not None:
        paths = _find(Path(folder))
        if not paths:
            raise DataError(f"{folder}: has none of Fashion-MNIST's files ({', '.join(FILES)}, plain or .gz)")
        return _fashion_mnist(Path(folder), paths)
    cache = cache_folder()
    # An interrupted download leaves part of the files in the cache; download() below completes it.
    complete_cache = [cache] if all((cache / f"{name}.gz").is_file() for name in FILES) else []
    from_environment = [Path(os.environ["DLKIT_DATA"])] if os.environ.get("DLKIT_DATA") else []
    for place in (*from_environment, *complete_cache, DEBIAN):
        if paths := _find(place):
            return _fashion_mnist(place, paths)
    try:
        download(cache)
    except (OSError, ValueError) as error:
        return _digits(f", as Fashion-MNIST is not on this machine and its download failed ({type(error).__name__})")
    return _fashion_mnist(cache, _find(cache))
