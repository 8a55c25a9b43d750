"""Does a network know how sure it is? Its expected calibration error, beside that of a calibrated network."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BINS = 15  # of equal width, each open below and closed above
DRAWS = 200


class Calibration(NamedTuple):
    """The error, with the 95 % interval of the basic bootstrap, which takes back the upward bias of so many bins.

    `null` is the mean error if the network were calibrated, right as often as it says: it is never zero. 95 % of its
    draws lie between `null_low` and `null_high`. All networks get the same draws of images.
    """

    error: float
    low: float
    high: float
    null: float
    null_low: float
    null_high: float


def bins_of(confidence: NDArray) -> NDArray:
    """The bin of each confidence, from 0."""
    return np.clip(np.ceil(BINS * confidence) - 1, 0, BINS - 1).astype(int)


def expected_calibration_error(confidence: NDArray, right: NDArray) -> float:
    """Mean distance of accuracy from confidence over `BINS`, weighted by their images (Guo et al., arXiv 1706.04599).

    Args:
        confidence: probability of the predicted class, (N,).
        right: whether it is the true one, (N,).

    Raises:
        ValueError: a confidence outside [0, 1], no image, or not as many answers as confidences.
    """
    if not (len(confidence) == len(right) > 0 and ((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError(
            f"{len(confidence)} confidences from {np.min(confidence, initial=np.inf)} to "
            f"{np.max(confidence, initial=-np.inf)} of {len(right)} answers: give one in [0, 1] for each image"
        )
    return float(np.abs(np.bincount(bins_of(confidence), right - confidence)).sum() / len(right))


def calibration(confidence: NDArray, right: NDArray) -> Calibration:
    """The error of one network; arguments and errors as for `expected_calibration_error`."""
    rng, count, error = np.random.default_rng(0), len(right), expected_calibration_error(confidence, right)
    again = [expected_calibration_error(confidence[d], right[d]) for d in rng.integers(count, size=(DRAWS, count))]
    null = [expected_calibration_error(confidence, rng.random(count) < confidence) for _draw in range(DRAWS)]
    low, high = np.maximum(0, 2 * error - np.quantile(again, (0.975, 0.025)))
    null_low, null_high = np.quantile(null, (0.025, 0.975))
    return Calibration(error, float(low), float(high), float(np.mean(null)), float(null_low), float(null_high))
