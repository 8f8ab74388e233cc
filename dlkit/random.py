"""A random stream that is the same on every device.

Dropout draws from torch's generator of the input's device, so ``torch.manual_seed`` gives other masks on a GPU than on
the CPU. A :class:`Philox` stream gives the same masks everywhere:

    stream = dlkit.random.Philox(seed)
    y = dlkit.functional.dropout(x, 0.1, generator=stream)
    with dlkit.random.use(stream):      # or: for every dropout of dlkit in this block
        y = model(x)

Inside ``torch.utils.checkpoint``, in each of its modes, a block that is computed again gets the numbers again that a
stream or a ``generator=`` gave it in forward; the stream itself stays where it is, and need not be in use then. Any
other draw from it in a backward pass raises an error, because the mask to repeat is not known. That includes draws of
a checkpoint inside ``torch.compile``.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.checkpoint

from dlkit import _C

__all__ = ["Philox", "use"]


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


class Philox:
    """A stream of random numbers for dropout: one seed, and an offset that each call moves on.

    Copies and pickles go on from where the stream stood, each on its own.

    A draw under CUDA-graph capture raises a RuntimeError: the numbers are constants of the graph, and each replay would
    repeat them. torch's own CUDA generators draw afresh.

    Args:
        seed: an integer of 64 bits, signed or not.

    Raises:
        TypeError: seed is not an int.
        ValueError: seed has more than 64 bits.

    Source: `Parallel random numbers: as easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_, Philox4x32-10.
    """

    def __init__(self, seed: int = 0) -> None:
        # A tensor, which an op advances in place: a compiler would take a Python number for a constant.
        self._state = torch.zeros(2, dtype=torch.int64, device="cpu")
        if not torch.compiler.is_dynamo_compiling():
            _C.others_draw()
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> "Philox":
        """Starts the stream of ``seed`` from its beginning.

        Args:
            seed: an integer of 64 bits, signed or not.

        Returns:
            The stream itself.

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

        Args:
            state: what :meth:`state_dict` of that stream returned.

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


# Non-reentrant checkpoints are found by their hooks on saved tensors, reentrant ones by their Python frames.
_REENTRANT = torch.utils.checkpoint.CheckpointFunction
_FORWARD, _BACKWARD = _REENTRANT.forward.__code__, _REENTRANT.backward.__code__
DEFAULT, GENERATOR, STREAM = range(3)  # csrc/glue/random.h


class _Draws:
    """The draws of one checkpointed call of a function: (source, seed, offset), in order."""

    def __init__(self) -> None:
        self.drawn: list[tuple[int, int, int]] = []
        self.repeated: dict[Any, int] = {}  # by recomputation: the number of draws repeated


def _variables(hook: Callable[..., Any]) -> dict[str, Any]:
    """The variables that a function closes over, by name."""
    cells = hook.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(hook.__code__.co_freevars, cells, strict=True)}


def _checkpoints(hooks: list[Callable[..., Any]]) -> tuple[list[Any], Any, Any]:
    """(checkpoints that compute for the first time, the one that computes again or None, which time that is).

    Those outside of the one that computes again had these draws before.
    """
    first, again, time = [], None, None
    for hook in map(inspect.unwrap, hooks):
        kind = getattr(hook, "__qualname__", "")
        if kind.startswith("_checkpoint_hook."):
            first.append(_variables(hook)["frame"])
        elif kind.startswith("_recomputation_hook."):
            variables = _variables(hook)
            again, time = variables["target_frame_ref"](), variables["gid"]
            break
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _FORWARD:
            first.append(frame.f_locals["ctx"])
        elif frame.f_code is _BACKWARD and again is None:
            again, time = frame.f_locals["ctx"], torch._C._current_graph_task_id()
            break
        elif frame.f_code.co_name == "unpack_hook" and frame.f_locals.get("frame") is again is not None:
            break
        frame = frame.f_back  # type: ignore[assignment]
    return first, again, time


def _record(kind: int, seed: int, offset: int, hooks: list[Callable[..., Any]]) -> None:
    for checkpoint in _checkpoints(hooks)[0]:
        if not hasattr(checkpoint, "_dlkit_draws"):
            checkpoint._dlkit_draws = _Draws()
        checkpoint._dlkit_draws.drawn.append((kind, seed, offset))


def _replay(kind: int, seed: int, offset: int, hooks: list[Callable[..., Any]]) -> tuple[int, int] | None:
    """(seed, offset) of a draw that is made again; None for a first one, and for those that torch restores itself."""
    _, again, time = _checkpoints(hooks)
    if again is None:
        if kind != DEFAULT and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "dropout: a dlkit.random.Philox, or a torch.Generator that is not the default one, in a backward pass "
                "but not inside torch.utils.checkpoint in eager mode: which mask is to be repeated cannot be known. "
                "Put torch.compile inside the checkpoint and not around it, or draw from torch's default generator"
            )
        return None
    draws = getattr(again, "_dlkit_draws", None) or _Draws()
    position = draws.repeated.get(time, 0)
    draws.repeated[time] = position + 1
    before: tuple[int, int, int] = draws.drawn[position] if position < len(draws.drawn) else (DEFAULT, 0, 0)
    if before[0] != kind and (kind, before[0]) != (DEFAULT, STREAM):  # use() may have ended since
        raise RuntimeError(
            f"dropout: draw {position} of a checkpointed function is not from where it was in forward; a function that "
            "is computed again must draw as it did before"
        )
    if before[0] == DEFAULT:
        return None
    _record(*before, hooks)  # for checkpoints within
    return before[1:]


_C.watch_draws(_replay, _record)
# For kernels that draw in Python.
replay_draw = _C.replay_draw
record_draw = _C.record_draw
