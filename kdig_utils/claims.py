"""The paper's claims, each with the number, our measure of it, and what would settle it, written down before the runs.

`claims.yml` lists them; every number of the paper is looked up in `paper.json`, so that none is typed twice.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from scipy import stats
from statsmodels.stats.multitest import multipletests

from kdig_utils import models
from kdig_utils.artifacts import model_for

VERDICTS = ("reproduced", "reproduced with reservations", "not reproduced", "not testable here", "not run yet")
REPRODUCED, RESERVATIONS, NOT_REPRODUCED, NOT_TESTABLE, NOT_RUN = VERDICTS
SIGNIFICANCE = 0.05
# What a spec must share with paper.json's `training` to be a run at the paper's settings.
TRAINING = ("epochs", "batch_size", "learning_rate", "alpha", "temperature", "gamma", "overlay_probability")


class Estimate(NamedTuple):
    """Our number for a claim: 95 % interval, p-value against no difference, number of runs, and the best of them."""

    value: float
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan
    runs: int = 0
    best: float = np.nan


@dataclass(frozen=True)
class Claim:
    """One quantitative claim and what settles it.

    Attributes:
        name: short and unique.
        group: the question that it belongs to, a key of `groups()`.
        text: what is claimed, for a reader.
        source: where.
        value: path into paper.json, as `headline.kd_accuracy`; two paths mean their difference; of a list, its mean.
        measure: one of `MEASURES`.
        unit: of the number.
        methods: the methods whose runs or networks are measured; two for a difference.
        settings: what a run must have to count, besides paper.json's `training`.
        seeds: runs of each method that are needed.
        tolerance: the largest distance from the paper's number that counts as the same, in its unit.
        chapter: the notebook that shows it.
        k: feature blocks removed.

    Raises:
        ValueError: unknown measure, or a negative tolerance.
    """

    name: str
    group: str
    text: str
    source: str
    value: tuple[str, ...]
    measure: str
    unit: str
    methods: tuple[str, ...]
    settings: Mapping[str, object]
    seeds: int
    tolerance: float
    chapter: str
    k: int = 5

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"claim {self.name} has unknown measure {self.measure!r}: use {', '.join(MEASURES)}")
        if self.tolerance < 0:
            raise ValueError(f"claim {self.name} has tolerance {self.tolerance}: give a distance, 0 or more")

    @property
    def claimed(self) -> float:
        """The paper's number."""
        first, *second = (float(np.mean(lookup(path))) for path in self.value)
        return first - second[0] if second else first


@cache
def paper() -> dict:
    """Facts and figures of the reproduced work, as in paper.json; treat it as read-only."""
    return json.loads(files("kdig_utils").joinpath("paper.json").read_text(encoding="utf-8"))


def lookup(path: str) -> float | list:
    """The value at a dotted path of paper.json, list positions included.

    Raises:
        KeyError: there is no such path.
    """
    found = paper()
    for step in path.split("."):
        try:
            found = found[int(step)] if isinstance(found, list) else found[step]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise KeyError(f"paper.json has no {path!r}: nothing at {step!r}") from error
    return found


@cache
def claims() -> tuple[Claim, ...]:
    """All claims, in the order of claims.yml."""
    content = _claims_file()
    return tuple(_claim(entry, content) for entry in content["claims"])


def groups() -> dict[str, str]:
    """The questions that the claims belong to: name and title, in reading order."""
    return {name: group["title"] for name, group in _claims_file()["groups"].items()}


@cache
def _claims_file() -> dict:
    return yaml.safe_load(files("kdig_utils").joinpath("claims.yml").read_text(encoding="utf-8"))


def _claim(entry: dict, content: dict) -> Claim:
    merged = {**content["groups"][entry["group"]], **entry}
    merged.pop("title")
    value = merged["value"] if isinstance(merged["value"], list) else [merged["value"]]
    settings = content["settings"][merged["settings"]]
    return Claim(**{**merged, "value": tuple(value), "methods": tuple(merged["methods"]), "settings": settings})


def scorecard(ledger: pd.DataFrame, measured: Mapping[str, Estimate] | None = None) -> pd.DataFrame:
    """One row a claim, with the paper's number, ours, and the verdict.

    Args:
        ledger: as `Ledger.read()` returns it.
        measured: estimates that no ledger holds, by measure: `latency_ratio`, from `latency.speedup`.

    Returns:
        The fields of `Claim`, and claimed; value, low, high, p, runs, best (of the runs that count, else NaN);
        p_holm, corrected over the differences that were tested; verdict; reason; short, the figure of the runs that do
        not count, with their budget in words in short_budget (NaN and empty if there are none).
    """
    table = with_teacher_accuracy(ledger)
    rows = [_measured_row(claim, table, measured or {}) for claim in claims()]
    for row, p_holm in zip(rows, _holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p_holm
        row["verdict"], reason = judge(row)
        row["reason"] = row["reason"] or reason
    return pd.DataFrame(rows)


def effects(runs: Mapping[str, list[float]], pairs: list[tuple[str, str]]) -> pd.DataFrame:
    """Differences of means with Welch's test, its 95 % interval, and Holm's correction over all `pairs`.

    Args:
        runs: accuracies of each method.
        pairs: methods to compare, first minus second.

    Returns:
        Columns first, second, value, low, high, p, runs, best, p_holm.
    """
    rows = [{"first": a, "second": b, **difference([np.array(runs[a]), np.array(runs[b])])._asdict()} for a, b in pairs]
    return pd.DataFrame(rows).assign(p_holm=_holm([row["p"] for row in rows]))


def _holm(p_values: list[float]) -> np.ndarray:
    corrected = np.array(p_values, dtype=float)
    tested = np.isfinite(corrected)
    if tested.any():
        corrected[tested] = multipletests(corrected[tested], method="holm")[1]
    return corrected


def with_teacher_accuracy(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger with the column teacher_accuracy, in per cent: NaN if the run's teacher is not in the ledger."""
    teachers = ledger[ledger["method"] == "teacher"].drop_duplicates("weights_sha256")
    accuracy = teachers.set_index("weights_sha256")["test_accuracy"]
    return ledger.assign(teacher_accuracy=ledger["teacher_sha256"].map(accuracy).astype(float))


def _measured_row(claim: Claim, table: pd.DataFrame, measured: Mapping[str, Estimate]) -> dict:
    row = {**asdict(claim), "claimed": claim.claimed, "reason": "", "short": np.nan, "short_budget": ""}
    if claim.measure in LEDGER_MEASURES:
        return row | _from_ledger(claim, table)
    if claim.measure in MODEL_MEASURES:
        return row | Estimate(MODEL_MEASURES[claim.measure](claim.methods[0], claim.k))._asdict()
    return row | Estimate(*measured.get(claim.measure, (np.nan,)))._asdict()


def _from_ledger(claim: Claim, table: pd.DataFrame) -> dict:
    """Our estimate if enough runs count; if not, what is missing, and the figure of the runs there are."""
    of_size = (table["k"] == claim.k) | (table["method"] == "teacher")
    candidates = table[table["method"].isin(claim.methods) & of_size].copy()
    candidates["lacks"] = [shortfall(run, claim) for _index, run in candidates.iterrows()]
    counting = candidates[candidates["lacks"] == ""]
    by_method = [accuracies(counting, method) for method in claim.methods]
    if min(map(len, by_method)) >= claim.seeds:
        return LEDGER_MEASURES[claim.measure](by_method)._asdict()
    return Estimate(np.nan)._asdict() | _short(claim, candidates)


def shortfall(run: pd.Series, claim: Claim) -> str:
    """What a ledger row lacks to count as a test of `claim`, in words; empty if it counts."""
    lacks = [
        f"{run[name]:,.0f} {name.replace('_', ' ')}, not {claim.settings[name]:,}"
        for name in ("train_images", "test_images")
        if run[name] != claim.settings[name]
    ]
    return "; ".join(lacks + (_teacher_lacks(run, claim) if claim.measure == "teacher" else _student_lacks(run, claim)))


def _teacher_lacks(run: pd.Series, claim: Claim) -> list[str]:
    # Reaching the number with less work is enough; missing it counts only at the full budget.
    if run["test_accuracy"] >= claim.claimed - claim.tolerance or run["epochs"] >= claim.settings["epochs"]:
        return []
    return [f"{run['epochs']:.0f} of {claim.settings['epochs']} epochs"]


def _student_lacks(run: pd.Series, claim: Claim) -> list[str]:
    spec, wanted, settings = json.loads(run["spec"]), paper()["training"], claim.settings
    other = [name for name in TRAINING if spec[name] != wanted[name]]
    lacks = [f"{name.replace('_', ' ')} {spec[name]:g}, not {wanted[name]:g}" for name in other]
    if run["method"] != "student" and run["pairing"] != settings["pairing"]:
        lacks.append(f"pairing {run['pairing']}, not {settings['pairing']}")
    if run["method"] != "student" and not run["teacher_accuracy"] >= settings["teacher_accuracy"]:
        found = f"{run['teacher_accuracy']:.1f} %" if run["teacher_accuracy"] > 0 else "not in the ledger"
        lacks.append(f"teacher {found}, needs {settings['teacher_accuracy']} %")
    return lacks


def accuracies(runs: pd.DataFrame, method: str) -> np.ndarray:
    """Test accuracies of a method's runs, in per cent, one a seed."""
    return runs[runs["method"] == method].sort_values("seed").drop_duplicates("seed")["test_accuracy"].to_numpy(float)


def _short(claim: Claim, candidates: pd.DataFrame) -> dict:
    """The figure of the runs that do not settle it, at the largest budget that all methods of the claim have."""
    complete = [
        group
        for _budget, group in candidates.fillna({"pairing": ""}).groupby(["train_images", "epochs", "pairing"])
        if set(claim.methods) <= set(group["method"])
    ]
    if not complete:
        missing = [method for method in claim.methods if method not in set(candidates["method"])]
        return {"reason": f"no run of {' and '.join(missing)}" if missing else "no budget in common"}
    largest = complete[-1]
    values = [accuracies(largest, method) for method in claim.methods]
    first, *second = (float(value.mean()) for value in values)
    return {
        "short": first - second[0] if second else first,
        "short_budget": _budget_in_words(largest.iloc[0], min(map(len, values))),
        "reason": max(largest["lacks"], key=len) or f"{min(map(len, values))} of {claim.seeds} seeds",
    }


def _budget_in_words(run: pd.Series, runs: int) -> str:
    continued = " after earlier ones" if json.loads(run["spec"]).get("initial_sha256") else ""
    counted = "1 run" if runs == 1 else f"{runs} runs"
    return f"{run['epochs']:.0f} epochs{continued}, {run['train_images']:,.0f} images, {counted}"


def mean(by_method: list[np.ndarray]) -> Estimate:
    """Mean of one method's accuracies with its 95 % t-interval; no interval for a single run."""
    (values,) = by_method
    interval = stats.ttest_1samp(values, 0).confidence_interval() if len(values) > 1 else (np.nan, np.nan)
    return Estimate(float(values.mean()), *map(float, interval), runs=len(values), best=float(values.max()))


def difference(by_method: list[np.ndarray]) -> Estimate:
    """Difference of two means with Welch's 95 % interval and p-value."""
    first, second = by_method
    test = stats.ttest_ind(first, second, equal_var=False)
    low, high = test.confidence_interval()
    value, runs = float(first.mean() - second.mean()), min(len(first), len(second))
    return Estimate(value, float(low), float(high), p=float(test.pvalue), runs=runs)


@cache
def _size(method: str, k: int) -> tuple[int, int]:
    model = model_for(method, k)
    return models.count_parameters(model), models.count_macs(model)


LEDGER_MEASURES: dict[str, Callable[[list[np.ndarray]], Estimate]] = {
    "mean": mean,
    "best": mean,
    "teacher": mean,
    "difference": difference,
}
MODEL_MEASURES: dict[str, Callable[[str, int], float]] = {
    "parameters": lambda method, k: float(_size(method, k)[0]),
    "million_macs": lambda method, k: _size(method, k)[1] / 1e6,
    "compression_factor": lambda method, k: _size("teacher", 0)[0] / _size(method, k)[0],
}
MEASURES = (*LEDGER_MEASURES, *MODEL_MEASURES, "latency_ratio", "authors_device")


def judge(row: Mapping) -> tuple[str, str]:
    """The verdict of a row of the scorecard, and the reason in words. The rules were fixed before the runs.

    A difference is reproduced if Welch's test shows it after Holm's correction and its size agrees; with reservations
    if it is shown only without the correction, or in another size. A best of n is reproduced if the mean of our runs
    agrees with it; with reservations if only our own best of n does. Any other number is reproduced if ours lies within
    the tolerance; with reservations if only its interval reaches there. A better teacher than the paper's is welcome.
    """
    if row["measure"] == "authors_device":
        return NOT_TESTABLE, "needs the authors' machine"
    if np.isnan(row["value"]):
        return NOT_RUN, "not measured"
    if row["measure"] == "difference":
        return _judge_difference(row)
    gap, tolerance = row["value"] - row["claimed"], row["tolerance"]
    words = f"{gap:+.3g}, tolerance {tolerance:g}" if gap else "exactly"
    if abs(gap) <= tolerance or (row["measure"] == "teacher" and gap > 0):
        return REPRODUCED, words
    if row["measure"] == "best":
        agrees = abs(row["best"] - row["claimed"]) <= tolerance
        words = f"best of {row['runs']}: {row['best']:.2f}, mean {row['value']:.2f}"
        return (RESERVATIONS if agrees else NOT_REPRODUCED), words
    reaches = row["low"] <= row["claimed"] + tolerance and row["high"] >= row["claimed"] - tolerance
    return (RESERVATIONS if reaches else NOT_REPRODUCED), words


def _judge_difference(row: Mapping) -> tuple[str, str]:
    words = f"{row['low']:+.2f} to {row['high']:+.2f}, p = {row['p']:.2g}, corrected {row['p_holm']:.2g}"
    if row["p"] >= SIGNIFICANCE or row["value"] * row["claimed"] <= 0:
        return NOT_REPRODUCED, words
    agrees = abs(row["value"] - row["claimed"]) <= row["tolerance"]
    return (REPRODUCED if agrees and row["p_holm"] < SIGNIFICANCE else RESERVATIONS), words


def written(value: float, unit: str) -> str:
    """A number of the scorecard with its unit, as tables show it; empty if there is none."""
    if np.isnan(value):
        return ""
    digits = {"%": ".2f", "points": "+.2f", "×": ".1f", "M": ".2f", "ms": ".0f", "": ",.0f"}[unit]
    return f"{value:{digits}} {unit}".rstrip()
