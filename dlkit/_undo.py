"""The handle of a change that holds until it is undone, by undo() or at the end of a `with` block."""

from collections.abc import Callable
from typing import Any

from typing_extensions import Self


class Undo:
    """A change that holds from the call that made it until ``undo()`` or the end of a ``with`` block."""

    def __init__(self, undo: Callable[[], None], text: str) -> None:
        self._undo: Callable[[], None] | None = undo
        self._text = text

    def undo(self) -> None:
        """Undoes the change. A second call does nothing."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.undo()

    def __repr__(self) -> str:
        return self._text + ("" if self._undo else " (undone)")
