"""Does a network know how sure it is? Reliability diagram and expected calibration error."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

BINS = 15  # of equal width, each open below and closed above


def reliability(probabilities: Tensor, labels: Tensor) -> pd.DataFrame:
    """The reliability diagram: images by confidence, in `BINS` (Guo et al. 2017, arXiv 1706.04599).

    Args:
        probabilities: (N, classes), each row adding up to 1.
        labels: true classes, (N,).

    Returns:
        One row a bin: low, high, images, confidence and accuracy (both in [0, 1]; NaN where a bin is empty).

    Raises:
        ValueError: no images, not a label for each, or rows that are no probabilities.
    """
    values = probabilities.detach().cpu().double()
    if len(values) == 0 or len(values) != len(labels):
        raise ValueError(f"{len(values)} rows of probabilities and {len(labels)} labels: give one label for each row")
    if float(values.min()) < 0 or float((values.sum(1) - 1).abs().max()) > 1e-3:
        raise ValueError("the rows are no probabilities: apply softmax to logits first")
    confidence, answer = (found.numpy() for found in values.max(1))
    edges = np.linspace(0, 1, BINS + 1)
    images = pd.DataFrame({"confidence": confidence, "accuracy": (answer == labels.cpu().numpy()).astype(float)})
    groups = images.groupby(np.searchsorted(edges[1:-1], confidence))
    table = pd.DataFrame({"low": edges[:-1], "high": edges[1:]})
    table["images"] = groups.size().reindex(table.index, fill_value=0)
    return table.join(groups.mean())


def expected_calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Mean distance of accuracy from confidence over the bins of `reliability`, weighted by their images, in [0, 1]."""
    table = reliability(probabilities, labels)
    gap = (table["accuracy"] - table["confidence"]).abs().fillna(0.0)
    return float(gap @ table["images"] / table["images"].sum())


def error_if_calibrated(probabilities: Tensor, draws: int = 200, seed: int = 0) -> np.ndarray:
    """What `expected_calibration_error` would be if the network were calibrated, (draws,): it is never zero.

    Each draw takes labels from the network's own probabilities: what is left is the noise of so many images in bins.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(probabilities.cpu().double(), draws, replacement=True, generator=generator)
    return np.array([expected_calibration_error(probabilities, column) for column in labels.T])
