"""A random stream that is the same on every device.

Dropout draws from torch's generator of the input's device, so ``torch.manual_seed`` gives other masks on a GPU than on
the CPU. A :class:`Philox` stream gives the same masks everywhere:

    stream = dlkit.random.Philox(seed)
    y = dlkit.functional.dropout(x, 0.1, generator=stream)
    with dlkit.random.use(stream):      # or: for every dropout of dlkit in this block
        y = model(x)
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch

__all__ = ["Philox", "use"]


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


class Philox:
    """A stream of random numbers for dropout: one seed, and an offset that each call moves on.

    Under CUDA-graph capture it raises: what it drew is a constant there, and each replay would repeat it. torch's own
    CUDA generators draw afresh.

    Args:
        seed: an integer of 64 bits, signed or not.
    """

    def __init__(self, seed: int = 0) -> None:
        # A tensor, which an op advances in place: a compiler sees no Python number that would be a constant to it.
        self._state = torch.zeros(2, dtype=torch.int64, device="cpu")
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> "Philox":
        """Starts the stream of ``seed`` from its beginning.

        Raises:
            TypeError: seed is not an int.
            ValueError: seed has more than 64 bits.
        """
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"Philox: expected seed to be an int, got {type(seed).__name__}")
        self.load_state_dict({"seed": seed, "offset": 0})
        return self

    def state_dict(self) -> dict[str, int]:
        """``{"seed": ..., "offset": ...}``: where the stream stands."""
        seed, offset = self._state.tolist()
        return {"seed": seed % 2**64, "offset": offset % 2**64}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from where another stream stood.

        Raises:
            ValueError: a number has more than 64 bits, or the offset is no multiple of 4.
        """
        for name in ("seed", "offset"):
            if not -(2**63) <= state[name] < 2**64:
                raise ValueError(f"Philox: expected {name} of 64 bits, got {state[name]}")
        if state["offset"] % 4:
            raise ValueError(f"Philox: expected offset to be a multiple of 4, got {state['offset']}")
        self._state.copy_(torch.tensor([_signed(state["seed"]), _signed(state["offset"])], dtype=torch.int64))

    def __repr__(self) -> str:
        return "Philox(seed={seed}, offset={offset})".format(**self.state_dict())


_default: Philox | None = None


def default() -> Philox | None:
    """The stream that :func:`use` made the default, or None: torch's generators."""
    return _default


@contextlib.contextmanager
def use(stream: Philox) -> Iterator[Philox]:
    """Makes ``stream`` the default of every function and module of dlkit in the block, in all threads.

    Args:
        stream: the stream to draw from; each call moves it on.

    Yields:
        ``stream``.

    Raises:
        TypeError: ``stream`` is not a :class:`Philox`.
    """
    global _default
    if not isinstance(stream, Philox):
        raise TypeError(f"use(): expected stream to be a dlkit.random.Philox, got {type(stream).__name__}")
    before, _default = _default, stream
    try:
        yield stream
    finally:
        _default = before
