"""What long work says while it runs, line by line."""

import math
import time
from collections.abc import Callable

Report = Callable[[str], None]


def print_line(line: str) -> None:
    """Print at once, also into a pipe or a file."""
    print(line, flush=True)


def print_now_and_then(seconds: float) -> Report:
    """A report that prints a line if `seconds` have passed since the last one: many runs have much to say."""
    printed = -math.inf

    def report(line: str) -> None:
        nonlocal printed
        if time.monotonic() - printed >= seconds:
            print_line(line)
            printed = time.monotonic()

    return report


def first_line(error: Exception) -> str:
    """What an error says, in one line for a log."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
