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
def test_random_calls(part):
    """Other calls each day. A failure prints its case, and DLKIT_TEST_SEED=n gives that day's again."""
    seed = seed_of_the_day()
    shown = [f"DLKIT_TEST_SEED={seed}"]
    found = layers.run(300, seed * 10 + part * 300, show=shown.append)
    assert not found, "\n".join(map(str, shown))
