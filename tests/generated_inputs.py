"""Whether the package refuses what is bad: each input ends in a sentence of its own with value and remedy, or right."""

import atexit
import re
import shutil
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field

from bad_commands import Refused, commands
from bad_files import WORKSHOP, image_files, latency_files, ledgers
from bad_stores import artifact_files, checkpoint_files, pack_files, stores
from bad_values import Case, Cases, attributions, images, signal_settings, specs
from hypothesis import HealthCheck, Phase, given, seed, settings

from kdig_utils.__main__ import is_expected

REMEDY = re.compile(
    r"\b(give|choose|use|restore|correct|measure|remove|repair|resize|select|delete|compute|run|set|wrap|build|call|take|"
    r"convert|pass|bring|train|pack|leave|add|say|name|switch|attribute|free|see|take out|--help)\b"
)
NOT_OURS = re.compile(r"validation error|errors\.pydantic|Traceback")
SEED = 18
SURFACES: dict[str, Cases] = {
    "specs of runs": specs(),
    "settings of signals": signal_settings(),
    "ledgers": ledgers(),
    "latency files": latency_files(),
    "image files": image_files(),
    "images and overlays": images(),
    "attributions": attributions(),
    "signals stores": stores(),
    "packs": pack_files(),
    "published networks": artifact_files(),
    "checkpoints": checkpoint_files(),
    "command line": commands(),
}
atexit.register(shutil.rmtree, WORKSHOP, ignore_errors=True)


@dataclass
class Tally:
    """What came of the cases of a surface.

    Attributes:
        refused: bad inputs that ended in a documented exception.
        right: harmless inputs that gave exactly the right result.
        faults: the others, in words, and how many of each.
    """

    refused: int = 0
    right: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)


def tried(cases: Cases, count: int) -> Tally:
    """Try `count` generated cases; those that are alike count once."""
    tally, seen, begun = Tally(), set(), time.monotonic()

    @seed(SEED)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def each(case: Case) -> None:
        if case.what in seen:
            return
        seen.add(case.what)
        refusal, fault = outcome(case)
        if fault:
            tally.faults[f"{case.what[:200]}: {fault}"] += 1
        elif refusal:
            tally.refused += 1
        else:
            tally.right += 1

    each()
    tally.seconds = round(time.monotonic() - begun, 1)
    return tally


def outcome(case: Case) -> tuple[str, str]:
    """The refusal of a case, if it was refused, and what is wrong with what came of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = case.use()
    except Exception as error:
        words = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
        told = f"{type(error).__name__}: {words[:200]}"
        in_a_chapter = traceback.extract_tb(error.__traceback__)[-1].filename.endswith(".ipynb")
        if not (isinstance(error, Refused) or is_expected(error) or (in_a_chapter and isinstance(error, ValueError))):
            return words, f"an internal {told}"
        if not case.named:
            return words, f"harmless, and refused by {told}"
        if not any(name in words for name in case.named):
            return words, f"neither of {case.named} is named by {told}"
        if not REMEDY.search(words) or NOT_OURS.search(words):
            return words, f"no remedy in the package's words in {told}"
        return words, ""
    if case.right is None:
        return "", "accepted"
    return "", "" if case.right(result) else "another result"


def line(surface: str, tally: Tally) -> str:
    """The counts of a surface, and the first faults."""
    told = f"{surface}: {tally.refused} refused, {tally.right} harmless and right, {tally.faults.total()} faults"
    return "\n    ".join([f"{told}, {tally.seconds} s", *list(tally.faults)[:5]])
