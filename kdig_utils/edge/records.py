"""A row of times, as the benchmark writes it and chapter 14 reads what others sent: what each field may hold."""

import datetime
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

LONGEST = 1000


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


COLUMNS = list(Row.model_fields)
