"""Checkers of exercises: each says right, or what is off.

A judge takes an answer and returns what is off with it, and nothing for a right one.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

Judge = Callable[[Any], str]
NOT_YET = "Not answered yet: put your answer in the place of the three dots."


def check(answer: Any, judge: Judge) -> None:
    """Print whether the reader's answer, a value or a function, is right, or what is off with it."""
    try:
        off = NOT_YET if answer is ... else judge(answer)
    except Exception as error:  # it is the reader's code that runs, and it may raise anything
        off = f"Not yet: it raises {type(error).__name__}: {error}"
    print(off or "Right.")


def number(right: float, tolerance: float, slips: Mapping[float, str] = MappingProxyType({})) -> Judge:
    """A number is right within `tolerance`; `slips` says of a likely wrong one, by its value, what went wrong."""

    def judge(answer: Any) -> str:
        value = float(answer)
        if abs(value - right) <= tolerance:
            return ""
        for slip, hint in slips.items():
            if math.isclose(value, slip, rel_tol=1e-3, abs_tol=tolerance):
                return f"Not yet: {hint}"
        for factor, hint in ((100, "are these per cent?"), (0.01, "is it a fraction?"), (-1, "look at the sign")):
            if math.isclose(value, right * factor, abs_tol=abs(tolerance * factor)):
                return f"Not yet: {value:g} is {factor:g} times the right number; {hint}"
        way = "too large" if value > right else "too small" if value < right else "no number"
        return f"Not yet: {value:g} is {way}."

    return judge


def choice(right: str, others: Mapping[str, str]) -> Judge:
    """A word is right; of each other one, `others` says what is off."""

    def judge(answer: Any) -> str:
        word = str(answer).strip().lower()
        known = {right.lower(): "", **{other.lower(): f"Not yet: {off}" for other, off in others.items()}}
        return known.get(word, f"Not yet: {answer!r} is none of {', '.join(sorted([right, *others]))}.")

    return judge


def function(
    right: Callable[..., Any],
    *cases: tuple[Any, ...],
    slips: Mapping[str, Callable[..., Any]] = MappingProxyType({}),
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> Judge:
    """A function is right where it gives the numbers that `right` gives, for each of these arguments.

    Args:
        slips: by its hint, a function that makes a likely mistake.
    """

    def judge(answer: Any) -> str:
        if not callable(answer):
            return f"Not yet: {answer!r} is no function."
        for place, case in enumerate(cases, start=1):
            found = answer(*case)
            if off := _difference(found, right(*case), rtol, atol):
                slipped = [hint for hint, wrong in slips.items() if not _difference(found, wrong(*case), rtol, atol)]
                return f"Not yet: {slipped[0] if slipped else f'case {place} of {len(cases)}: {off}'}"
        return ""

    return judge


def _difference(found: Any, wanted: Any, rtol: float, atol: float) -> str:
    if found is None or found is ...:
        return "the function returns nothing."
    found, wanted = (torch.as_tensor(value).detach().double() for value in (found, wanted))
    if found.shape != wanted.shape:
        return f"the shape is {tuple(found.shape)}, and should be {tuple(wanted.shape)}."
    if torch.allclose(found, wanted, rtol, atol):
        return ""
    return f"off by up to {(found - wanted).abs().max():.2g}, where the largest right value is {wanted.max():.3g}."
