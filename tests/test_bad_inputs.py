"""Generated bad inputs end in a sentence of the package, with value and remedy; harmless ones give the right result."""

import pytest
from generated_inputs import SURFACES, line, tried

# Of each surface: as many as show that a check is gone, whichever it is. benchmarks/bad_inputs.py tries many more.
EXAMPLES = {
    "specs of runs": 1200, "settings of signals": 250, "ledgers": 500, "latency files": 600, "image files": 60,
    "images and overlays": 250, "attributions": 500, "signals stores": 300, "packs": 200, "published networks": 200,
    "checkpoints": 200, "command line": 350,
}  # fmt: skip


@pytest.mark.parametrize("surface", SURFACES)
def test_what_is_bad_is_refused_in_words_and_what_is_harmless_is_right(surface: str) -> None:
    tally = tried(SURFACES[surface], EXAMPLES[surface])
    print(line(surface, tally))
    assert not tally.faults, line(surface, tally)
    assert tally.refused > EXAMPLES[surface] / 3
