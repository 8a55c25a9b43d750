"""Generated bad inputs end in a sentence of the package, with value and remedy; harmless ones give the right result."""

from fractions import Fraction

import pytest
from bad_files import read_calls
from generated_inputs import SURFACES, line, tried

from kdig_utils.method.checks import check_number

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


def test_what_is_drawn_too_rarely_is_refused_as_well() -> None:
    calls = [f'-1,"teacher first, student",{name},0,1.5,2,M' for name in ("teacher", "student")]
    content = "\n".join(["process,order,network,call,ms,threads,machine", *calls, ""]).encode()
    with pytest.raises(ValueError, match=r"theirs\.csv, row 1, process.*-1.*measure again"):
        read_calls(content)
    with pytest.raises(ValueError, match=r"error = .*choose one above 0"):
        check_number("error", Fraction(10**400))
