"""The paper's claims: what each says, where, how it is measured, and what would settle it, registered before the runs.

`claims.yml` lists them; every number of the paper is looked up in `paper.json`, so that none is typed twice. What each
verdict means is in `verdicts`, what the ledger says of each claim in `scorecard`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict
from pydantic.dataclasses import dataclass

from kdig_utils import paths
from kdig_utils.experiments import evidence

SIGNIFICANCE = 0.05
ACCURACY_MEASURES = ("accuracy", "teacher", "teacher_gap", "difference", "no_difference", "interaction", "direction")
OUT_OF_REACH = {
    "authors_device": "needs the authors' machine",
    "other_work": "needs another group's networks and recipe",
    "imagenet": "needs images of ImageNet, which nobody may pass on; the next claim is on the authors' own figures",
}
# All that a claim can be about: accuracies, networks, axioms, the paper's lists, what is out of reach, times and maps.
MEASURES = (
    *ACCURACY_MEASURES,
    *("parameters", "million_macs", "compression_factor"),
    *("sensitivity", "implementation_invariance", "explaining_over_training"),
    *("least_factor", "largest_factor", "least_change", "largest_change"),
    *OUT_OF_REACH,
    *("printed_imagenet", "latency_ratio", "map_similarity"),
)
STATISTICS = ("mean", "best")
CLAIMS = Path(str(files("kdig_utils"))) / "claims.yml"


class _Parts(BaseModel):
    """The parts of claims.yml, which its head explains."""

    model_config = ConfigDict(extra="forbid")

    registrations: list[dict[str, str]]
    wording: dict[str, str]
    rules: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    protocols: dict[str, dict[str, Any]]
    groups: dict[str, dict[str, Any]]
    claims: list[dict[str, Any]]


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Claim:
    """One claim and what settles it: the fields of claims.yml, whose head explains them.

    Raises:
        ValueError: unknown measure, statistic or kind of evidence, a negative tolerance, or a field of another type.
    """

    name: str
    group: str  # the question that it belongs to, a key of `groups()`
    text: str
    source: str
    value: tuple[str | int | float, ...]
    measure: str  # one of `MEASURES`
    unit: str
    evidence: str  # one of `evidence.KINDS`, a protocol with its name
    methods: tuple[str, ...]  # whose runs or networks are measured; two for a difference, four for an interaction
    settings: Mapping[str, Any]
    seeds: int
    chapter: str  # the notebook that shows it
    registered: str
    statistic: str = "mean"
    paper_runs: int = 1
    family: str = ""
    tolerance: int | float = 0.0  # as it is written, for the digest
    k: int = 5

    def __post_init__(self) -> None:
        for name, value, known in (("measure", self.measure, MEASURES), ("statistic", self.statistic, STATISTICS)):
            if value not in known:
                raise ValueError(f"claim {self.name} has unknown {name} {value!r}: use {', '.join(known)}")
        if self.tolerance < 0:
            raise ValueError(f"claim {self.name} has tolerance {self.tolerance}: give a distance, 0 or more")
        evidence.check(self.evidence)

    @property
    def claimed(self) -> float:
        """The paper's number, or the bound that its words imply; NaN if they imply none."""
        numbers = [float(np.mean(lookup(part))) if isinstance(part, str) else part for part in self.value]
        if self.measure == "latency_ratio" and len(numbers) == 2:
            return numbers[0] / numbers[1]
        return float(signed_sum(numbers)) if numbers else math.nan

    @property
    def protocol(self) -> str:
        """The name of the protocol whose runs it is about; empty if these are runs at the paper's settings."""
        return evidence.protocol_in(self.evidence)

    @property
    def depends_on_pairing(self) -> bool:
        """Whether its runs take anything from a teacher, so that it matters which image a signal belongs to."""
        return "pairing" in self.settings and set(self.methods) != {"student"}


def signed_sum(parts: Sequence[ArrayLike]) -> NDArray:
    """Of a claim's numbers, or of its methods' runs: first - second, or (first - second) - (third - fourth)."""
    signs = (1, -1, -1, 1)
    return sum((sign * np.asarray(part, float) for sign, part in zip(signs, parts, strict=False)), np.zeros(()))


@cache
def paper() -> dict:
    """Facts and figures of the reproduced work, as in paper.json; treat it as read-only."""
    path = Path(str(files("kdig_utils"))) / "paper.json"
    with paths.reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def lookup(path: str) -> Any:
    """The value at a dotted path of paper.json, list positions included; a key may hold a dot, as `2.19`.

    Raises:
        KeyError: there is no such path.
    """
    found, rest = paper(), path
    while rest:
        its = range(len(found)) if isinstance(found, list) else found if isinstance(found, dict) else ()
        steps = {str(step): step for step in its}
        step = max((name for name in steps if f"{rest}.".startswith(f"{name}.")), key=len, default=None)
        if step is None:
            raise KeyError(f"paper.json has no {path!r}: nothing at {rest!r}")
        found, rest = found[steps[step]], rest[len(step) + 1 :]
    return found


@cache
def claims() -> tuple[Claim, ...]:
    """All claims, in the order of claims.yml."""
    return read(CLAIMS)


def teacher_goal() -> float:
    """Test accuracy, in per cent, that the claims on training need of their teacher."""
    return next(claim.settings["teacher_accuracy"] for claim in claims() if "teacher_accuracy" in claim.settings)


def groups() -> dict[str, str]:
    """The questions that the claims belong to: name and title, in reading order."""
    return {name: group["title"] for name, group in _claims_file()["groups"].items()}


def protocols() -> dict[str, dict]:
    """Other protocols than the paper's, as they are registered: by name; treat them as read-only."""
    return _claims_file()["protocols"]


def shown(registered: str) -> str:
    """The words of a contrast as they are shown: corrected where a later, dated entry of claims.yml says so."""
    return str(_claims_file()["wording"].get(registered, registered))


def margin() -> float:
    """The book's one margin of equivalence, in points of test accuracy: a smaller difference is of no interest."""
    return float(_claims_file()["rules"]["margin"])


def interim_significance() -> float:
    """The level of a look before the planned number of seeds."""
    return float(_claims_file()["rules"]["interim_significance"])


def registrations() -> list[dict[str, str]]:
    """When claims and rules were written down or changed, and what: date, what, and the digest of what it covers."""
    return [dict(entry) for entry in _claims_file()["registrations"]]


@cache
def _claims_file() -> dict:
    with paths.reading(CLAIMS):
        return contents(CLAIMS)


def contents(path: Path) -> dict:
    """What a file of claims holds, each part of its kind; ValueError where it is damaged, which `read` explains."""
    try:
        return _Parts.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).model_dump()
    except yaml.YAMLError as error:
        raise ValueError(error) from error


def read(path: Path) -> tuple[Claim, ...]:
    """The claims of a file.

    Raises:
        ValueError: it is damaged; the message names the file, and the claim and the field if it is in one.
    """
    with paths.reading(path):
        content = contents(path)
    found = []
    for entry in content["claims"]:
        with paths.reading(path.with_name(f"{path.name}, claim {entry.get('name')}")):
            found.append(_claim(entry, content))
    return tuple(found)


def _claim(entry: dict, content: dict) -> Claim:
    merged = {**content["groups"][entry["group"]], **entry}
    del merged["title"]
    name = merged["settings"]
    protocol = content["protocols"].get(name) or {"settings": content["settings"][name], "registered": ""}
    dated = [merged["registered"], content["rules"]["registered"], protocol["registered"]]  # all as 2026-11-27T16:00Z
    value = merged["value"] if isinstance(merged["value"], list) else [merged["value"]]
    named = merged["methods"]
    lists = {"value": tuple(value), "methods": tuple(named) if isinstance(named, list) else named}
    return Claim(**{**merged, **lists, "settings": protocol["settings"], "registered": max(dated)})
