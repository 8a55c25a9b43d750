"""Values that a caller gives, checked where they come in: the message names the value and the remedy."""

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Collection
from numbers import Integral, Real
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

T = TypeVar("T")


def whole(low: int, high: int = 1_000_000) -> Callable[[float], bool]:
    """Whether a number is a whole one from `low` to `high`."""
    return lambda n: low <= n <= high and n == int(n)


MOST = "to 1,000,000"
# Whether a number is in its range, and what it should have been where it is not.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "alpha": (lambda x: 0 <= x <= 1, "number from 0 to 1: give the share of the distillation loss"),
    "batch_size": (whole(2), f"whole number from 2 {MOST}: give at least 2, as batch norm needs them"),
    "cutout": (whole(0, 32), "side of a square in an image of 32 pixels: give 0 to 32"),
    "epochs": (whole(1), f"whole number from 1 {MOST}: give at least 1, the paper's students have 100"),
    "error": (lambda x: 0 < x < 1, "relative error: choose one above 0 and below 1, as 0.01"),
    "gamma": (lambda x: 0 <= x < math.inf, "weight of 0 or more: give one, as the paper's 0.8"),
    "internal_batch_size": (whole(1, 2**63), "whole number of 1 or more: use at least 1"),
    "label_smoothing": (lambda x: 0 <= x < 1, "number of 0 or more and below 1: give 0 for none"),
    "learning_rate": (lambda x: 0 < x < math.inf, "finite number above 0: give one, as the paper's 0.001"),
    "max_steps": (whole(4), f"whole number from 4 {MOST}: use at least 4"),
    "n_steps": (whole(1), f"whole number from 1 {MOST}: give one, as the paper's 50"),
    "overlay_probability": (lambda x: 0 <= x <= 1, "number from 0 to 1: give the fraction of images to overlay"),
    "sample_seed": (whole(0, 2**32 - 1), "whole number from 0 to 4,294,967,295: give None to draw with `seed`"),
    "seed": (whole(0, 2**32 - 1), "whole number from 0 to 4,294,967,295: give one, as 0"),
    "temperature": (lambda x: 0 < x < math.inf, "finite number above 0: give one, as the paper's 2.5"),
    "train_fraction": (lambda x: 0 < x <= 1, "number above 0 and up to 1: give the share of images to train on"),
    "train_images": (whole(0), f"whole number from 0 {MOST}: give 0 to train on all images"),
    "validation_images": (whole(0), f"whole number from 0 {MOST}: give 0 to train on all images"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "number of 0 or more: give 0 for none"),
}


def plain(value: object) -> int | float:
    """A real number, NumPy's as well, as Python's own and without a sign of zero; True, text and the like are none."""
    if isinstance(value, bool) or not isinstance(value, int | float | Real):
        raise ValueError("no number")
    try:
        return int(value) if isinstance(value, int | Integral) else float(value) + 0.0
    except OverflowError as error:
        raise ValueError("no number that a float holds") from error


Whole = Annotated[int, BeforeValidator(plain)]  # 9.0 is 9, and 9.5 is refused
Number = Annotated[float, BeforeValidator(plain)]
Text = Annotated[str, Field(strict=True, max_length=10_000)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def shown(value: object) -> str:
    """The value as it is written, shortened where it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # more digits than Python writes
        return f"{type(value).__name__} of thousands of digits"


def check_number(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a number in the range that `RANGES` gives for `name`; NaN is in none."""
    is_in_range, wanted = RANGES[name]
    try:
        holds = is_in_range(plain(value))
    except ValueError:
        holds = False
    if not holds:
        raise ValueError(f"{name} = {shown(value)} is no {wanted}")


def check_choice(what: str, value: object, choices: Collection[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`; the message lists them."""
    if not isinstance(value, str | Integral) or value not in choices:
        raise ValueError(f"unknown {what} {shown(value)}: choose one of {', '.join(map(str, choices))}")


@dataclass_transform(frozen_default=True)
def checked(cls: type[T]) -> type[T]:
    """A frozen dataclass whose values have the types of their fields, as pydantic coerces or refuses them.

    The constructor raises ValueError, in one sentence, for a value of another type, and for unknown or missing fields.
    """
    made: Any = dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    construct = made.__init__

    @functools.wraps(construct)
    def __init__(self: object, *values: object, **named: object) -> None:
        try:
            construct(self, *values, **named)
        except ValidationError as error:
            raise ValueError(_refusal(made, error)) from None

    made.__init__ = __init__
    return made


def _refusal(kind: Any, error: ValidationError) -> str:
    """What is wrong with the first wrong value that pydantic found, and what it should be."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # of `__post_init__`
        return str(first["ctx"]["error"])
    names, place, value = [field.name for field in dataclasses.fields(kind)], first["loc"][0], shown(first["input"])
    name = names[place] if isinstance(place, int) and place < len(names) else str(place)
    if first["type"] == "missing" or "argument" in first["type"]:
        return f"{kind.__name__}, {name}: {first['msg'].lower()}; give its fields, {', '.join(names)}"
    if name in kind.choices:
        return f"unknown {name} {value}: choose one of {', '.join(map(str, kind.choices[name]))}"
    wanted = RANGES[name][1] if name in RANGES else "text of at most 10,000 characters: give it in quotes"
    return f"{name} = {value} is no {wanted}"
