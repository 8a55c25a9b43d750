"""The ledger: each finished run once, with the spec that it was made from."""

import csv
import io
import json
import os
import platform
import re
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from kdig_utils.locks import locked
from kdig_utils.method import models
from kdig_utils.method.checks import Sha256, shown
from kdig_utils.method.spec import RunSpec, Spec, TeacherSpec
from kdig_utils.paths import replacing, repository_root

Md5 = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Percent = Annotated[float | None, Field(ge=0, le=100)]
Amount = Annotated[float | None, Field(ge=0)]
Count = Annotated[int | None, Field(gt=0)]


class Row(BaseModel):
    """A finished run as the ledger tells it, accuracies in per cent; a blank cell has the default."""

    model_config = ConfigDict(allow_inf_nan=False)

    run_id: Annotated[str, Field(pattern="^[0-9a-f]{12}$")]
    campaign: str = ""
    method: str
    k: int
    seed: int
    pairing: str = ""
    epochs: int
    train_fraction: float
    test_accuracy: Annotated[float, Field(ge=0, le=100)]
    validation_accuracy: Percent = None
    train_loss: Amount = None
    parameters: Count = None
    macs: Count = None
    seconds: Amount = None
    device: str = ""
    train_images: Count = None
    test_images: Count = None
    data_md5: Md5 = ""
    teacher_sha256: Sha256 = ""
    weights_sha256: Sha256 = ""
    commit: str = ""
    python: str = ""
    torch: str = ""
    torchvision: str = ""
    finished: Annotated[str, AfterValidator(lambda time: datetime.fromisoformat(time) and time)] = ""
    spec: str
    compiled: str = ""
    sample_accuracy: Percent = None


COLUMNS = tuple(Row.model_fields)
LATER_COLUMNS = ("compiled", "sample_accuracy")  # which a pack or a ledger from before them lacks
NUMBER_COLUMNS = tuple(name for name, field in Row.model_fields.items() if field.annotation is not str)
# Whole numbers stay whole where a row has none.
COUNTS = {name: "Int64" for name in NUMBER_COLUMNS if Row.model_fields[name].annotation in (int, int | None)}
MARKERS = re.compile(rb"^(<{7}|={7}|>{7}|\|{7})", re.MULTILINE)  # of git, where two branches changed a file
RESTORE = "restore it from git, or update the package if a newer one wrote it"


class Ledger:
    """The table of finished runs, `results/runs.csv`: each run once, accuracies in per cent.

    Several processes may append at the same time; a reader always sees a whole file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> pd.DataFrame:
        """All rows; an empty table with the right columns if nothing was run yet.

        Raises:
            ValueError: the file is cut or changed, or has a row that contradicts its spec or is out of range.
        """
        if not self.path.is_file():
            return pd.DataFrame(columns=list(COLUMNS))
        return table_of(self.path.read_bytes(), str(self.path), RESTORE).copy()

    def find(self, spec: Spec) -> pd.Series | None:
        """The row of this run, or None if it was not run yet."""
        rows = self.read().query("run_id == @spec.run_id")
        return None if rows.empty else rows.iloc[0]

    def append(self, spec: RunSpec | TeacherSpec, **measured: object) -> None:
        """Add the row of a finished run; a run that is already there is left as it is.

        Raises:
            ValueError: there is no column for something that was measured, or a value is out of range.
        """
        self.merge(pd.DataFrame([{**_told(spec), "spec": json.dumps(asdict(spec), sort_keys=True), **measured}]))

    def merge(self, table: pd.DataFrame) -> list[str]:
        """Add the rows of another ledger; runs that are already there are left as they are.

        Returns:
            The identities of the runs that were added.

        Raises:
            ValueError: the ledger, or a row that would be new, is not valid; nothing was written then.
            OSError: the rows could not be written, or were not there afterwards.
        """
        if unknown := set(table.columns) - set(COLUMNS):
            raise ValueError(f"the ledger has no column {min(unknown)}: choose from {', '.join(COLUMNS)}")
        with locked(self.path):
            rows = self.read()
            new = table.reindex(columns=list(COLUMNS)).query("run_id not in @rows.run_id")
            if len(new):
                remedy = "nothing was written: correct the row"
                new = table_of(new.to_csv(index=False).encode(), f"rows for {self.path.name}", remedy)
                together = [*rows.to_dict("records"), *new.to_dict("records")]
                content = pd.DataFrame(together, columns=list(COLUMNS)).astype(COUNTS).to_csv(index=False).encode()
                with replacing(self.path) as part:
                    part.write_bytes(content)
                if self.path.read_bytes() != content:
                    raise OSError(f"{self.path} does not hold what was just written: set KDIG_ROOT to another disk")
        return list(new["run_id"])


@lru_cache(maxsize=4)
def table_of(content: bytes, name: str, remedy: str) -> pd.DataFrame:
    """The rows of a ledger's content, each checked.

    Raises:
        ValueError: names the file as `name`, the line, the column, its value and the `remedy`.
    """
    reader = csv.reader(io.StringIO(_whole(content, name, remedy), newline=""), strict=True)
    rows: dict[str, Row] = {}
    try:
        columns = _columns(next(reader))
        for cells in reader:
            row = _row(columns, tuple(cells))
            if row.run_id in rows:
                raise ValueError(f"run_id = {row.run_id!r} is there twice")
            rows[row.run_id] = row
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{name}, line {reader.line_num}: {error}; {remedy}") from error
    table = pd.DataFrame(map(vars, rows.values()), columns=list(COLUMNS))
    return table.astype({column: float for column in NUMBER_COLUMNS if table[column].dtype == object})


def _whole(content: bytes, name: str, remedy: str) -> str:
    """The text of a ledger that ends with its last line and was not left in the middle of a merge of git."""
    if marker := MARKERS.search(content):
        line = content.count(b"\n", 0, marker.start()) + 1
        both = "take out the lines of the markers, which keeps the rows of both sides"
        raise ValueError(f"{name}, line {line}: git left a conflict marker, {marker[0].decode()}; {both}, or {remedy}")
    if not content.endswith(b"\n"):  # the last number of a row that was cut may look whole
        raise ValueError(f"{name} ends within a line: {remedy}; a last row that is whole lacks only its line break")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text ({error}): {remedy}") from error


def _columns(header: list[str]) -> tuple[str, ...]:
    """The columns of a ledger's first line; raises ValueError where they are not those of `Row`, in its order."""
    wanted = [name for name in COLUMNS if name in header or name not in LATER_COLUMNS]
    if header != wanted:
        odd = min(set(header) ^ set(wanted), default=None)
        wrong = f"{odd!r} is {'unknown' if odd in header else 'missing'}" if odd else "they stand in another order"
        raise ValueError(f"the columns are not those of a ledger, {wrong}")
    return tuple(header)


@lru_cache(maxsize=1 << 14)
def _row(columns: tuple[str, ...], cells: tuple[str, ...]) -> Row:
    """A row whose cells are in their ranges and say what its spec says; raises ValueError else."""
    if len(cells) != len(columns):
        raise ValueError(f"the row has {len(cells)} cells of {len(columns)}")
    try:
        row = Row.model_validate({name: cell for name, cell in zip(columns, cells, strict=True) if cell})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cell = "" if first["type"] == "missing" else first["input"]
        raise ValueError(f"{first['loc'][0]} = {shown(cell)} is wrong ({first['msg']})") from None
    for name, value in _told(spec_of(vars(row))).items():
        if getattr(row, name) != value:
            raise ValueError(f"{name} = {shown(getattr(row, name))} contradicts its spec, which gives {value!r}")
    return row


def _told(spec: Spec) -> dict[str, object]:
    """What a spec says of its row; `train_images` of 0 says nothing of how many there were."""
    told = {name: getattr(spec, name) for name in COLUMNS if hasattr(spec, name)}
    return {name: value for name, value in told.items() if name != "train_images" or value}


def spec_of(row: Mapping[str, Any]) -> RunSpec | TeacherSpec:
    """The spec that a ledger row was made from.

    Raises:
        ValueError: the row's spec is no JSON object, or a field of it has a wrong value.
    """
    return _spec_of(TeacherSpec if row["method"] == "teacher" else RunSpec, row["spec"])


@lru_cache(maxsize=1 << 14)
def _spec_of(kind: type[RunSpec] | type[TeacherSpec], text: str) -> RunSpec | TeacherSpec:
    try:
        values = dict(json.loads(text))
        return kind(**{field.name: values[field.name] for field in fields(kind) if field.name in values})
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"spec = {shown(text)} gives no {kind.__name__}: {error}") from None


def student_spec(row: Mapping[str, Any]) -> RunSpec:
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

    A machine that is lent has the files of one commit and may have the git folder of an earlier one. A copy has none,
    whatever repository it lies in. Where git refuses the clone a warning says why: an error would lose a finished run.
    """
    if named := os.environ.get("KDIG_COMMIT"):
        return named
    root = repository_root()
    if not (root / ".git").exists():
        return ""
    alone = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}  # git looks for no repository further up

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, env=alone, capture_output=True, text=True, check=True).stdout

    try:
        commit, changed = git("rev-parse", "--short=12", "HEAD").strip(), git("status", "--porcelain", "kdig_utils")
        return commit + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join((getattr(error, "stderr", "") or str(error)).split())
        warnings.warn(f"the ledger will not name the code's commit: set KDIG_COMMIT to it ({reason})", stacklevel=2)
        return ""
