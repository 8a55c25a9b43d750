"""Files of times that others sent: what a row may hold, and the tables of results/latency.

A file with a value that cannot be is left out, by a sentence that names file, row, field, value and remedy.
"""

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pandas as pd
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from kdig_utils import paths

BOOK = "epyc_2cpus"  # the book's own record in results/latency
REMEDY = "measure again with `python -m kdig_utils latency --json FILE`, or correct the file"
MOST_ROWS, LONGEST = 10_000, 1000


def printable(text: str) -> str:
    """The text as it may stand in a file: without control characters, tags or excess length."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text[:LONGEST])
    return kept.translate(str.maketrans("<>", "‹›"))


def _plain(text: str) -> str:
    if text != printable(text):
        raise ValueError("should be printable text without < and >")
    return text


Text = Annotated[str, Field(max_length=LONGEST), AfterValidator(_plain)]
Name = Annotated[Text, Field(min_length=1, max_length=500)]
Milliseconds = Annotated[float, Field(gt=1e-3, lt=1e7)]  # of any call; less than a microsecond is another unit
Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Percent = Annotated[float, Field(ge=0, le=100)]


class Row(BaseModel):
    """A row of the benchmark, and so of each file in results/latency; None where there is no figure."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: Name
    artifact: Name | None = None  # the published artifact
    k: Annotated[int, Field(ge=0)] | None = None  # blocks removed
    weights: Name | None = None  # first digits of `models.weights_sha256`
    runtime: Name
    precision: Name
    batch: Count
    threads: Count
    p50_ms: Milliseconds | None = None  # of settled calls
    p95_ms: Milliseconds | None = None
    p99_ms: Milliseconds | None = None
    cold_ms: Milliseconds | None = None  # the median call after other networks ran
    calls: Count | None = None
    speedup: Positive | None = None  # against the eager teacher in the same setting
    speedup_low: Positive | None = None
    speedup_high: Positive | None = None
    predicted_macs_ms: Positive | None = None  # `roofline.predicted`
    predicted_ms: Positive | None = None
    peak_gmacs: Positive | None = None
    bandwidth_gb: Positive | None = None
    accuracy: Percent | None = None
    accuracy_images: Count | None = None
    max_difference: Amount | None = None  # of logits, from the same network in eager PyTorch
    agreement: Percent | None = None  # of predictions with it
    import_ms: Amount | None = None  # of a fresh process, for one image and one thread (`serving.Server.open`)
    load_ms: Amount | None = None
    first_ms: Positive | None = None
    each_ms: Positive | None = None
    peak_mb: Positive | None = None
    bytes: Count | None = None
    status: Text  # `ok`, or what is missing
    machine: Name
    flags: Text | None = None
    cpus: Count | None = None
    load_average: Amount | None = None
    clock: Text | None = None
    system: Text | None = None
    versions: Text | None = None
    day: datetime.date
    note: Text | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "Row":
        """Percentiles and the ends of an interval rise, and what is `ok` has its time."""
        for names in (("p50_ms", "p95_ms", "p99_ms"), ("speedup_low", "speedup_high")):
            known = [value for name in names if (value := getattr(self, name)) is not None]
            if known != sorted(known):
                raise ValueError(f"{', '.join(names)} should rise")
        if self.p50_ms is None and self.status == "ok":
            raise ValueError("p50_ms should be there where the status is ok")
        return self


class FirstCall(BaseModel):
    """A call in a fresh process, as `timing.first_calls` records it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    process: Annotated[int, Field(ge=0)]
    order: Literal["teacher first, student", "student first, teacher"]
    network: Literal["teacher", "student"]
    call: Annotated[int, Field(ge=0)]
    ms: Milliseconds
    threads: Count
    machine: Name


COLUMNS = list(Row.model_fields)
SETTING = ["model", "runtime", "precision", "batch", "threads"]
CALL = ["process", "order", "network", "call"]
_ROWS = TypeAdapter(Annotated[list[Row], Field(min_length=1, max_length=MOST_ROWS)])
_CALLS = TypeAdapter(Annotated[list[FirstCall], Field(min_length=1, max_length=MOST_ROWS)])


def submitted(report: Callable[[str], None] = print) -> pd.DataFrame:
    """The rows of all files in results/latency, with the column `file`, the book's own first.

    Where there is no file, there is no row, but the columns are there. Files that `rows` refuses are left out, which
    `report` is told.
    """
    return _together("*.json", rows, COLUMNS, report)


def submitted_first_calls(report: Callable[[str], None] = print) -> pd.DataFrame:
    """The calls of all files in results/latency/first_calls, in the same way."""
    return _together("first_calls/*.csv", first_calls, list(FirstCall.model_fields), report)


def books_own(record: pd.DataFrame) -> pd.DataFrame:
    """The rows of the book's own machine, by the name of its file."""
    return record[record["file"] == BOOK]


def rows(path: Path) -> pd.DataFrame:
    """The rows of one file of the benchmark.

    Raises:
        ValueError: it is no JSON list of `Row`, or has a setting twice.
    """
    with paths.reading(path, REMEDY):
        found = _ROWS.validate_json(path.read_bytes())
    return _once(path, pd.DataFrame([row.model_dump(mode="json") for row in found]), SETTING)


def first_calls(path: Path) -> pd.DataFrame:
    """The calls of one file.

    Raises:
        ValueError: it is no CSV table of `FirstCall`, has a call twice, or a process that did not call both networks.
    """
    with paths.reading(path, REMEDY):
        found = _CALLS.validate_python(pd.read_csv(path, dtype=str).to_dict("records"))
    table = _once(path, pd.DataFrame([call.model_dump() for call in found]), CALL)
    alone = table.groupby(["process", "order"])["network"].nunique() < 2
    if alone.any():
        raise ValueError(f"{path.name}: process {alone.idxmax()[0]} called one network of two: {REMEDY}")
    return table


def _together(
    pattern: str, read: Callable[[Path], pd.DataFrame], columns: list[str], report: Callable[[str], None]
) -> pd.DataFrame:
    tables = []
    files = (paths.repository_root() / "results" / "latency").glob(pattern)
    for path in sorted(files, key=lambda path: (path.stem != BOOK, path.stem)):
        try:
            tables.append(read(path).assign(file=path.stem))
        except (ValueError, OSError) as error:
            report(f"left out: {error}")
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=[*columns, "file"])


def _once(path: Path, table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    if (twice := table.duplicated(keys)).any():
        setting = ", ".join(map(str, table.loc[twice.idxmax(), keys]))
        raise ValueError(f"{path.name}, row {twice.idxmax() + 1}: {setting} stands there twice: {REMEDY}")
    return table
