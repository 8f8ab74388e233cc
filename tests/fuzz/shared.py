"""What both machines share: how a difference is told, the state of the process while they run, the seed of the day."""

from __future__ import annotations

import datetime
import os
import warnings
from typing import Any

import torch


class Difference(Exception):
    """What a user would see; `what` says it without values, so that equal kinds have equal texts."""

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(f"{what}: {detail}" if detail else what)
        self.what = what


class Settings:
    """One thread, no warnings, fresh memory full of NaN while a machine runs."""

    def __enter__(self) -> None:
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *_: Any) -> None:
        self.warnings.__exit__(None, None, None)
        torch.use_deterministic_algorithms(self.deterministic)
        torch.set_num_threads(self.threads)


def seed_of_the_day() -> int:
    """Another one every day; DLKIT_TEST_SEED=n repeats a day's or draws others."""
    given = os.environ.get("DLKIT_TEST_SEED")
    return int(given) if given else datetime.datetime.now(datetime.timezone.utc).date().toordinal() * 1000
