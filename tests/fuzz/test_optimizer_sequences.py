"""dlkit's optimizers in random sequences of what users do, against torch's; see optimizer_machine."""

import json
from pathlib import Path

import pytest

from fuzz import optimizer_machine as machine
from fuzz.shared import Settings, seed_of_the_day

pytestmark = pytest.mark.sanitize

FOUND = json.loads((Path(__file__).parent / "found.json").read_text())


@pytest.mark.parametrize("case", FOUND, ids=lambda case: case["what"].split(":")[0].replace(" ", "-"))
def test_found_sequences(case):
    """What once went wrong, each in its shortest form."""
    with Settings():
        machine.replay(case["setup"], case["sequence"])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "count"), [("plain", 100), ("options", 80), ("coded", 20)])
def test_sequences_of_the_day(mode, count):
    """Other ones every day: a failure names its seed, and DLKIT_TEST_SEED=n repeats it or draws others."""
    first = seed_of_the_day()
    shown = [f"seed {first}; DLKIT_TEST_SEED={first} repeats it"]
    report = machine.run(count, first, mode, show=shown.append)
    assert not report.kinds, "\n".join(map(str, shown))
