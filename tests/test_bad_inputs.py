"""Generated bad inputs end in a sentence of the package, with value and remedy; harmless ones give the right result."""

import pytest
from generated_inputs import SURFACES, line, tried

EXAMPLES = 150  # of each surface; benchmarks/bad_inputs.py tries many more


@pytest.mark.parametrize("surface", SURFACES)
def test_what_is_bad_is_refused_in_words_and_what_is_harmless_is_right(surface: str) -> None:
    tally = tried(SURFACES[surface], EXAMPLES)
    print(line(surface, tally))
    assert not tally.faults, line(surface, tally)
    assert tally.refused > EXAMPLES / 3
