"""What is in force until it is undone: as a context manager, or by undo()."""

from collections.abc import Callable
from typing import Any


class Undo:
    """In force from the call that gave it on; ``undo()``, or the end of a ``with`` block, ends it. Once."""

    def __init__(self, undo: Callable[[], None], text: str) -> None:
        self._undo: Callable[[], None] | None = undo
        self._text = text

    def undo(self) -> None:
        """Ends it; again does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> "Undo":
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def __repr__(self) -> str:
        return self._text + ("" if self._undo else " (undone)")
