"""Ledgers in which a truth was planted: rows as a finished run leaves them, made from specs and accuracies.

Tests import it as `ledgers`; conftest.py puts this folder on the path.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np
import pandas as pd

from kdig_utils.experiments.ledger import COLUMNS
from kdig_utils.method.spec import RunSpec, TeacherSpec

TEACHER = "a0" * 32  # a good one
# What a run on the whole, official data set, which ended after every claim was registered, has.
FULL = {
    "train_images": 50000,
    "test_images": 10000,
    "data_md5": "f1a75c270db6be9cd0f78ff22a443784",
    "finished": "2099-01-01T00:00Z",
}


def row_of(spec: RunSpec | TeacherSpec, accuracy: float, **facts: object) -> dict[str, object]:
    """The row of one run; `facts` are columns that its spec does not say, as `train_images` where it takes all."""
    said = {name: getattr(spec, name) for name in COLUMNS if hasattr(spec, name)}
    said["train_images"] = spec.train_images or None
    return {**said, "campaign": "any", "test_accuracy": accuracy, "spec": json.dumps(asdict(spec)), **facts}


def teacher_row(accuracy: float = 94.0, epochs: int = 200, **facts: object) -> dict[str, object]:
    """The row of a teacher that is good enough for the claims, unless it is changed."""
    spec = TeacherSpec(epochs=epochs, data_md5=str(FULL["data_md5"]))
    return {**row_of(spec, accuracy, weights_sha256=TEACHER, **FULL), **facts}


def student_rows(
    method: str, accuracies: Iterable[float], pairing: str = "shuffled", **changes: object
) -> list[dict[str, object]]:
    """Rows at the paper's settings, paired as the released scripts pair, one a seed.

    `changes` are fields of the spec, or of `FULL`.
    """
    facts = {**FULL, **{name: changes.pop(name) for name in FULL if name in changes}}
    taught = {"teacher_sha256": "" if method == "student" else TEACHER, "pairing": pairing}
    taught["data_md5"] = facts["data_md5"]
    specs = [RunSpec(method, **{"seed": seed, **taught, **changes}) for seed, _ in enumerate(accuracies)]
    return [row_of(spec, accuracy, **facts) for spec, accuracy in zip(specs, accuracies, strict=True)]


def table(rows: Iterable[dict[str, object]]) -> pd.DataFrame:
    """The rows with all columns of a ledger."""
    return pd.DataFrame(list(rows), columns=list(COLUMNS))


def bare(runs: dict[str, Sequence[float]], **facts: object) -> pd.DataFrame:
    """Accuracies by method, seeds 0, 1, ..., without specs: what a table of a paper has."""
    columns = ["campaign", "method", "seed", "test_accuracy"]
    rows = [("any", method, seed, value) for method, values in runs.items() for seed, value in enumerate(values)]
    own = {"k": 5, "epochs": 100, "pairing": "matched", "train_fraction": 1.0, **facts}
    return pd.DataFrame(rows, columns=columns).assign(**own)


def drawn(mean: float, seed: int, n: int = 10, spread: float = 0.3) -> list[float]:
    """Accuracies with exactly this mean and about the paper's spread."""
    noise = np.random.default_rng(seed).normal(size=n)
    return list(mean + spread * (noise - noise.mean()) / noise.std())
