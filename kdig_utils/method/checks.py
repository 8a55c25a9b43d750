"""Values that a caller gives, checked where they come in: the message names the value and the remedy."""

import math
from collections.abc import Callable, Collection

# Whether a number is in its range, and what is said where it is not.
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "alpha": (lambda x: 0 <= x <= 1, "alpha {} is outside [0, 1]: it is the share of the distillation loss"),
    "batch_size": (lambda n: n >= 2, "batch size {} is too small for batch norm: give at least 2"),
    "cutout": (
        lambda n: 0 <= n <= 32,
        "cutout = {} is no side of a square in an image of 32 pixels: give 0 to 32",
    ),
    "epochs": (lambda n: n >= 1, "epochs = {} trains nothing: give at least 1"),
    "error": (lambda x: 0 < x < 1, "error = {} is not a relative error: choose one above 0 and below 1, as 0.01"),
    "gamma": (lambda x: 0 <= x < math.inf, "gamma {} is not a weight of 0 or more: the paper uses 0.8"),
    "internal_batch_size": (lambda n: n >= 1, "internal_batch_size = {} computes nothing: use at least 1"),
    "learning_rate": (lambda x: x > 0, "learning rate {} is not above 0: the paper uses 0.001"),
    "max_steps": (lambda n: n >= 4, "max_steps = {} is too few: use at least 4"),
    "n_steps": (lambda n: n >= 1, "n_steps = {} is too few: the paper uses 50"),
    "overlay_probability": (
        lambda x: 0 <= x <= 1,
        "overlay probability {} is outside [0, 1]: give the fraction of images to overlay",
    ),
    "temperature": (lambda x: 0 < x < math.inf, "temperature {} is not above 0 and finite: the paper uses 2.5"),
    "train_images": (lambda n: n >= 0, "train_images = {} is negative: give 0 to train on all images"),
    "train_fraction": (
        lambda x: 0 < x <= 1,
        "train_fraction {} is outside (0, 1]: give the share of images to train on",
    ),
    "validation_images": (lambda n: n >= 0, "validation_images = {} is negative: give 0 to train on all images"),
    "weight_decay": (lambda x: 0 <= x < math.inf, "weight decay {} is not a number of 0 or more: 0 is none"),
}


def check_number(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in the range that `RANGES` gives for `name`; NaN is in none."""
    is_in_range, otherwise = RANGES[name]
    if not is_in_range(value):
        raise ValueError(otherwise.format(value))


def check_choice(what: str, value: object, choices: Collection[object]) -> None:
    """Raise ValueError unless `value` is one of `choices`; the message lists them."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(map(str, choices))}")
