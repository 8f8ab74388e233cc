"""dlkit's ops and layers in random calls, against torch's and exact results; see layers."""

import json
from pathlib import Path

import pytest

from fuzz import layers
from fuzz.shared import Settings, seed_of_the_day

FOUND = json.loads((Path(__file__).parent / "found_layers.json").read_text())


@pytest.mark.parametrize("case", FOUND, ids=lambda case: f"{case['op']}-{case['what'].split(':')[0]}".replace(" ", "-"))
def test_found_calls(case):
    """What once went wrong, each in its smallest form."""
    if case["backend"] not in layers.BACKENDS:
        pytest.skip(f"no {case['backend']}")
    with Settings():
        layers.replay(case)


@pytest.mark.parametrize("part", range(4))
def test_calls_of_the_day(part):
    """Other ones every day: a failure prints its case, and DLKIT_TEST_SEED=n repeats it or draws others."""
    first = seed_of_the_day() * 10 + part * 300
    shown = [f"seeds from {first} on; DLKIT_TEST_SEED={seed_of_the_day()} repeats them"]
    found = layers.run(300, first, show=shown.append)
    assert not found, "\n".join(map(str, shown))
