"""The ledger: each finished run once, with the spec that it was made from."""

import contextlib
import json
import os
import platform
import subprocess
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from kdig_utils.method import models
from kdig_utils.method.spec import RunSpec, Spec, TeacherSpec
from kdig_utils.paths import locked, replacing, repository_root

COLUMNS = (
    "run_id", "campaign", "method", "k", "seed", "pairing", "epochs", "train_fraction", "test_accuracy",
    "validation_accuracy", "train_loss", "parameters", "macs", "seconds", "device", "train_images", "test_images",
    "data_md5", "teacher_sha256", "weights_sha256", "commit", "python", "torch", "torchvision", "finished", "spec",
    "compiled", "sample_accuracy",
)  # fmt: skip
LATER_COLUMNS = ("compiled", "sample_accuracy")  # which a pack or a ledger from before them lacks
NUMBER_COLUMNS = (
    "k", "seed", "epochs", "train_fraction", "test_accuracy", "validation_accuracy", "train_loss", "parameters", "macs",
    "seconds", "train_images", "test_images", "sample_accuracy",
)  # fmt: skip
# A hash such as 12e45678 is text, never a number.
TEXT_COLUMNS = tuple(name for name in COLUMNS if name not in NUMBER_COLUMNS)
# Whole numbers stay whole where a row has none.
COUNTS = dict.fromkeys(("k", "seed", "epochs", "parameters", "macs", "train_images", "test_images"), "Int64")
NO_NUMBER = {name: ["", "nan"] for name in NUMBER_COLUMNS}


class Ledger:
    """The table of finished runs, `results/runs.csv`: each run once, accuracies in per cent.

    Several processes may append at the same time; a reader always sees a whole file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> pd.DataFrame:
        """All rows; an empty table with the right columns if nothing was run yet.

        Raises:
            ValueError: the file has other columns than a ledger.
        """
        if not self.path.is_file():
            return pd.DataFrame(columns=list(COLUMNS))
        try:
            table = pd.read_csv(
                self.path, dtype=dict.fromkeys(TEXT_COLUMNS, str), keep_default_na=False, na_values=NO_NUMBER
            )
        except ValueError as error:  # pandas' ParserError and EmptyDataError, and UnicodeDecodeError
            raise ValueError(f"{self.path} is damaged ({error}): restore it from git") from error
        later = [name for name in LATER_COLUMNS if name not in table.columns]
        table = table.assign(**{name: np.nan if name in NUMBER_COLUMNS else "" for name in later})
        if missing := [name for name in COLUMNS if name not in table.columns]:
            raise ValueError(
                f"{self.path} has no column {missing[0]}: it is not a ledger of this version; restore it from git"
            )
        return table

    def find(self, spec: Spec) -> pd.Series | None:
        """The row of this run, or None if it was not run yet."""
        rows = self.read().query("run_id == @spec.run_id")
        return None if rows.empty else rows.iloc[0]

    def append(self, spec: RunSpec | TeacherSpec, **measured: object) -> None:
        """Add the row of a finished run; a run that is already there is left as it is.

        Raises:
            ValueError: there is no column for something that was measured.
        """
        row = {
            **{name: getattr(spec, name) for name in COLUMNS if hasattr(spec, name)},
            "spec": json.dumps(asdict(spec), sort_keys=True),
            **measured,
        }
        if unknown := set(row) - set(COLUMNS):
            raise ValueError(f"the ledger has no column {min(unknown)}: choose from {', '.join(COLUMNS)}")
        self.merge(pd.DataFrame([row], columns=list(COLUMNS)))

    def merge(self, table: pd.DataFrame) -> list[str]:
        """Add the rows of another ledger; runs that are already there are left as they are.

        Returns:
            The identities of the runs that were added.

        Raises:
            OSError: the rows could not be written, or were not there afterwards.
        """
        with locked(self.path):
            rows = self.read().to_dict("records")
            known = {row["run_id"] for row in rows}
            new = [row for row in table.to_dict("records") if row["run_id"] not in known]
            if new:
                with replacing(self.path) as part:
                    text = pd.DataFrame([*rows, *new], columns=list(COLUMNS)).astype(COUNTS).to_csv(index=False)
                    part.write_bytes(content := text.encode())
                if self.path.read_bytes() != content:
                    raise OSError(
                        f"{self.path} does not hold run {new[0]['run_id']}, just written: set KDIG_ROOT to another disk"
                    )
        return [row["run_id"] for row in new]


def spec_of(row: pd.Series) -> RunSpec | TeacherSpec:
    """The spec that a ledger row was made from."""
    values = json.loads(row["spec"])
    kind = TeacherSpec if row["method"] == "teacher" else RunSpec
    return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})


def student_spec(row: pd.Series) -> RunSpec:
    """The spec of a student's row."""
    spec = spec_of(row)
    assert isinstance(spec, RunSpec)
    return spec


def of_one_teacher(rows: pd.DataFrame) -> pd.DataFrame:
    """The ledger rows of the teacher that has most of them, and those without one: students of two do not mix."""
    teachers = rows.loc[rows["teacher_sha256"].fillna("") != "", "teacher_sha256"]
    other = set(teachers) - set(teachers.mode()[:1])
    return rows[~rows["teacher_sha256"].isin(other)]


def outcome(network: nn.Module) -> dict[str, object]:
    """What a row says of the network that a run ended with, now."""
    return {
        "parameters": models.count_parameters(network),
        "macs": models.count_macs(network),
        "weights_sha256": models.weights_sha256(network),
        "finished": pd.Timestamp.now("UTC").strftime("%Y-%m-%dT%H:%MZ"),
    }


def provenance(device: torch.device) -> dict[str, str]:
    """Device, versions and code commit of this process, for the ledger."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "commit": code_commit(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
    }


def code_commit() -> str:
    """The commit of the code: `KDIG_COMMIT` where it is set, else git's, with `+` if the package has other changes.

    A machine that is lent has the files of one commit and may have the git folder of an earlier one.
    """
    if named := os.environ.get("KDIG_COMMIT"):
        return named
    root = repository_root()

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()

    with contextlib.suppress(FileNotFoundError):  # no git
        if commit := git("rev-parse", "--short=12", "HEAD"):
            return commit + ("+" if git("status", "--porcelain", "kdig_utils") else "")
    return ""
