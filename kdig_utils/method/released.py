"""The trained students that the paper's authors released, and those of their public history: which, and where.

The files are not part of this repository. They lie in the authors' repository (`ADDRESS`, licence Apache-2.0), and each
is known by its SHA-256: the catalogue `released.csv` names path, commit, and what is known of the training.
"""

import hashlib
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from kdig_utils import paths
from kdig_utils.method import models
from kdig_utils.method.models import Student

ADDRESS = "https://raw.githubusercontent.com/nordlinglab/ModelCompression-IntegratedGradients"
VARIABLE = "KDIG_RELEASED"  # a folder that holds the files, under any names
BATCH_SIZE, TRAIN_IMAGES = 64, 50_000  # of the authors' trainings


@cache
def catalogue() -> pd.DataFrame:
    """What is known of each file, from its name or a notebook of the authors, and never guessed.

    Columns path and commit (in the authors' repository), sha256 of the file, method, k (found by which architecture
    takes the weights), train_fraction (named; else by the counter of updates, which is a whole number of epochs of one
    share alone), group (`last commit`, `sweep`, `earlier commits`), known_from (what says the method, and
    where the network's own behaviour contradicts it).
    """
    with files("kdig_utils").joinpath("released.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def fetch(digits: str = "") -> dict[str, Path]:
    """The files whose SHA-256 begins with `digits`, by their SHA-256.

    Those in the folder that `KDIG_RELEASED` names; without it, fetched from the authors.

    Raises:
        KeyError: no file of the catalogue begins so.
        FileNotFoundError: the folder lacks files of the catalogue.
    """
    wanted = catalogue()[catalogue()["sha256"].str.startswith(digits)]
    if wanted.empty:
        raise KeyError(f"no released network has a SHA-256 that begins with {digits!r}: see kdig_utils/released.csv")
    if folder := paths.named_folder(VARIABLE):
        there = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(folder.rglob("*.pt"))}
        if missing := [row.path for row in wanted.itertuples() if row.sha256 not in there]:
            raise FileNotFoundError(
                f"{VARIABLE}={folder} lacks {len(missing)} of {len(wanted)} networks, first {missing[0]}: put "
                f"them there, or unset {VARIABLE} to fetch them"
            )
        return {sha256: there[sha256] for sha256 in wanted["sha256"]}
    import pooch  # only where it is needed: it loads tqdm.auto, whose warning would stand in every notebook

    target, fetched = paths.workspace() / "released", {}
    for row in wanted.itertuples():
        address, name = f"{ADDRESS}/{row.commit}/{row.path}", f"{row.sha256[:12]}.pt"
        fetched[row.sha256] = Path(pooch.retrieve(address, f"sha256:{row.sha256}", name, target))
    return fetched


def network(digits: str) -> Student:
    """The one network whose SHA-256 begins with `digits`, twelve of them as a rule; see `fetch` and `load`."""
    ((sha256, path),) = fetch(digits).items()
    return load(path, int(catalogue().set_index("sha256").loc[sha256, "k"]))


def load(path: Path, k: int) -> Student:
    """The network of a file, in evaluation mode; it takes pixels in [0, 1].

    Raises:
        ValueError: these are no weights of a student with this `k`.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    network = models.load_state(models.student(k), {_name(name): value for name, value in state.items()}).eval()
    assert isinstance(network, Student)
    return network


def _name(theirs: str) -> str:
    """Torchvision's name of a tensor; theirs are split before and behind block 9 where attention was transferred."""
    theirs = theirs.replace("front_layers.", "features.").replace("middle_layer.", "features.9.")
    return re.sub(r"end_layers\.(\d+)", lambda block: f"features.{int(block[1]) + 10}", theirs)


def updates(network: nn.Module) -> int:
    """Training steps that the weights have behind them, by the odometer that batch normalisation keeps.

    It counts its updates in `num_batches_tracked`, one a batch, and a checkpoint saves the count with the weights.
    """
    (count,) = {int(value) for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    return count  # of all layers: they are updated together


def mean_colour(network: nn.Module) -> Tensor:
    """Mean red, green and blue, (3,), of the images that the first layer saw last, from the weights alone.

    It has no bias, and the batch normalisation behind it keeps the mean of each of its channels. But for the border,
    the mean of a convolution is that of its inputs times the sums of its weights: 32 equations with three unknowns.
    """
    state = network.state_dict()
    weights, means = state["features.0.0.weight"].sum((2, 3)), state["features.0.1.running_mean"]
    return torch.linalg.lstsq(weights, means[:, None]).solution.flatten()


def batches_an_epoch(train_fraction: float) -> int:
    """Batches of `BATCH_SIZE` in an epoch of this share of the 50,000 training images, the last one smaller."""
    return -(-round(TRAIN_IMAGES * train_fraction) // BATCH_SIZE)
