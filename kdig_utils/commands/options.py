"""Kinds of numbers that options take."""

import argparse
import contextlib


class Span(float):
    """A span of time, 0 or more; raises ArgumentTypeError for what is none, `nan` included."""

    def __new__(cls, text: str) -> "Span":
        with contextlib.suppress(ValueError):
            if float(text) >= 0:
                return super().__new__(cls, text)
        raise argparse.ArgumentTypeError(f"{text!r} is no span of time: give 0 or more, as 9")


class Count(int):
    """A whole number, 1 or more; raises ArgumentTypeError for what is none."""

    def __new__(cls, text: str) -> "Count":
        with contextlib.suppress(ValueError):
            if int(text) >= 1:
                return super().__new__(cls, text)
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more: give one, as 4")
