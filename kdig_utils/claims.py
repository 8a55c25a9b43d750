"""The paper's claims, each with the number, our measure of it, and what would settle it, written down before the runs.

`claims.yml` lists them; every number of the paper is looked up in `paper.json`, so that none is typed twice. What each
verdict means is fixed in `judge`.
"""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
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
from kdig_utils.paths import repository_root
from kdig_utils.runs import RunSpec

VERDICTS = ("reproduced", "reproduced with reservations", "not reproduced", "not testable here", "not run yet")
REPRODUCED, RESERVATIONS, NOT_REPRODUCED, NOT_TESTABLE, NOT_RUN = VERDICTS
SIGNIFICANCE = 0.05
UNDECIDED = "undecided, too few runs to tell"
RELEASED_PAIRING = "shuffled"  # as the authors' scripts pair (paper.json, released_code)
# Fields of a spec that a claim names itself or that change no result by intent; all others must be the paper's, which
# are RunSpec's defaults: a field added later is compared as well.
FREE_FIELDS = frozenset(
    ("method", "k", "seed", "pairing", "teacher_sha256", "data_md5", "train_fraction", "validation_images", "n_steps")
)


class Estimate(NamedTuple):
    """Our number for a claim: interval, p-value against no difference, number of runs, and the best of them.

    The interval is the 95 % one, and for `no_difference` the 90 % one: what two one-sided tests at 5 % look at.
    """

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
        value: path into paper.json, as `headline.kd_accuracy`; two paths mean their difference, for a latency_ratio
            their quotient; of a list, its mean.
        measure: one of `MEASURES`.
        unit: of the number.
        methods: the methods whose runs or networks are measured; two for a difference.
        settings: what a run must have to count, besides the paper's values of the other fields of its spec.
        seeds: runs of each method that are needed.
        tolerance: the largest distance from the paper's number that counts as the same, in its unit; for
            `no_difference` the largest distance from 0, whatever the paper's own difference is.
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
        if not second:
            return first
        return first / second[0] if self.measure == "latency_ratio" else first - second[0]

    @property
    def depends_on_pairing(self) -> bool:
        """Whether its runs take anything from a teacher, so that it matters which image a signal belongs to."""
        return "pairing" in self.settings and set(self.methods) != {"student"}


@cache
def paper() -> dict:
    """Facts and figures of the reproduced work, as in paper.json; treat it as read-only."""
    return json.loads(files("kdig_utils").joinpath("paper.json").read_text(encoding="utf-8"))


def lookup(path: str) -> float | list:
    """The value at a dotted path of paper.json, list positions included; a key may hold a dot, as `2.19`.

    Raises:
        KeyError: there is no such path.
    """
    found, rest = paper(), path
    while rest:
        names = map(str, range(len(found))) if isinstance(found, list) else found if isinstance(found, dict) else ()
        step = max((name for name in names if f"{rest}.".startswith(f"{name}.")), key=len, default=None)
        if step is None:
            raise KeyError(f"paper.json has no {path!r}: nothing at {rest!r}")
        found = found[int(step)] if isinstance(found, list) else found[step]
        rest = rest[len(step) + 1 :]
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


def scorecard(ledger: pd.DataFrame, speedups: Mapping[int, tuple[float, float, float]] | None = None) -> pd.DataFrame:
    """One row a claim, with the paper's number, ours, and the verdict.

    Args:
        ledger: as `Ledger.read()` returns it.
        speedups: teacher's over student's time and its interval, by the student's k, from `latency.speedup`.

    Returns:
        The fields of `Claim`, and claimed; value, low, high, p, runs, best (of the runs that count, else NaN);
        p_holm, corrected over the differences that were tested; verdict; reason; short, the figure of the runs that do
        not count, with their budget in words in short_budget (NaN and empty if there are none); released_value and
        released_verdict, from runs that pair as the released scripts do (NaN and empty if there are not enough).
    """
    table = with_teacher_accuracy(ledger)
    table["other_settings"] = [other_settings(row) for _index, row in table.iterrows()]
    rows = _judged([_measured_row(claim, table, speedups or {}) for claim in claims()])
    released = _judged([_measured_row(as_released(claim), table, {}) for claim in claims() if claim.depends_on_pairing])
    by_name = {row["name"]: row for row in released}
    return pd.DataFrame([weigh_pairing(row, by_name.get(row["name"])) for row in rows])


def as_released(claim: Claim) -> Claim:
    """The same claim on runs that pair images and signals as the authors' released scripts do."""
    return replace(claim, settings={**claim.settings, "pairing": RELEASED_PAIRING})


def weigh_pairing(row: dict, released: dict | None) -> dict:
    """The row of `scorecard` with what the released pairing gives; if only one pairing agrees, reservations apply."""
    if released is None or released["verdict"] == NOT_RUN:
        return row | {"released_value": np.nan, "released_verdict": ""}
    row = row | {"released_value": released["value"], "released_verdict": released["verdict"]}
    if {row["verdict"], released["verdict"]} == {REPRODUCED, NOT_REPRODUCED}:
        row["reason"] += f"; {released['verdict']} with the released pairing"
        row["verdict"] = RESERVATIONS
    return row


def _judged(rows: list[dict]) -> list[dict]:
    for row, p_holm in zip(rows, _holm_over_tests(rows), strict=True):
        row["p_holm"] = p_holm
        row["verdict"], reason = judge(row)
        row["reason"] = row["reason"] or reason
    return rows


def _holm_over_tests(rows: list[dict]) -> list[float]:
    """Holm's correction over the tests, not the claims: two claims on one comparison are one test."""
    tests = [(row["methods"], row["k"], row["settings"].get("train_images")) for row in rows]
    tested = [row["measure"] == "difference" and np.isfinite(row["p"]) for row in rows]
    distinct = {test: row["p"] for test, row, counts in zip(tests, rows, tested, strict=True) if counts}
    corrected = dict(zip(distinct, _holm(list(distinct.values())), strict=True))
    return [corrected[test] if counts else np.nan for test, counts in zip(tests, tested, strict=True)]


def _holm(p_values: list[float]) -> np.ndarray:
    corrected = np.array(p_values, dtype=float)
    tested = np.isfinite(corrected)
    if tested.any():
        corrected[tested] = multipletests(corrected[tested], method="holm")[1]
    return corrected


def with_teacher_accuracy(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger with teacher_accuracy, in per cent, and above_teacher, in points; NaN without the run's teacher."""
    teachers = ledger[ledger["method"] == "teacher"].drop_duplicates("weights_sha256")
    accuracy = teachers.set_index("weights_sha256")["test_accuracy"]
    found = ledger["teacher_sha256"].map(accuracy).astype(float)
    return ledger.assign(teacher_accuracy=found, above_teacher=ledger["test_accuracy"].astype(float) - found)


def _measured_row(claim: Claim, table: pd.DataFrame, speedups: Mapping[int, tuple[float, float, float]]) -> dict:
    row = {**asdict(claim), "claimed": claim.claimed, "reason": "", "short": np.nan, "short_budget": ""}
    if claim.measure in LEDGER_MEASURES:
        return row | _from_ledger(claim, table)
    if claim.measure in MODEL_MEASURES:
        return row | Estimate(MODEL_MEASURES[claim.measure](claim.methods[0], claim.k))._asdict()
    if claim.measure in PAPER_MEASURES:
        return row | Estimate(PAPER_MEASURES[claim.measure]())._asdict()
    timed = speedups.get(claim.k, (np.nan,)) if claim.measure == "latency_ratio" else (np.nan,)
    return row | Estimate(*timed)._asdict()


def _from_ledger(claim: Claim, table: pd.DataFrame) -> dict:
    """Our estimate if enough runs count; if not, what is missing, and the figure of the runs there are."""
    of_size = (table["k"] == claim.k) | (table["method"] == "teacher")
    candidates = table[table["method"].isin(claim.methods) & of_size].copy()
    candidates["lacks"] = [shortfall(run, claim) for _index, run in candidates.iterrows()]
    counting = candidates[candidates["lacks"] == ""]
    by_method = _by_method(claim, counting)
    if min(map(len, by_method)) >= claim.seeds:
        return LEDGER_MEASURES[claim.measure](by_method)._asdict()
    return Estimate(np.nan)._asdict() | _short(claim, candidates)


def _by_method(claim: Claim, runs: pd.DataFrame) -> list[np.ndarray]:
    column = "above_teacher" if claim.measure == "teacher_gap" else "test_accuracy"
    return [accuracies(runs, method, column) for method in claim.methods]


def shortfall(run: pd.Series, claim: Claim) -> str:
    """What a row of the ledger lacks to count as a test of `claim`, in words; empty if it counts.

    Args:
        run: a row with the columns that `with_teacher_accuracy` adds, and other_settings.
    """
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
    settings, lacks = claim.settings, [run["other_settings"]] if run["other_settings"] else []
    if run["method"] != "student" and run["pairing"] != settings["pairing"]:
        lacks.append(f"pairing {run['pairing']}, not {settings['pairing']}")
    if run["method"] != "student" and not run["teacher_accuracy"] >= settings["teacher_accuracy"]:
        found = f"{run['teacher_accuracy']:.1f} %" if run["teacher_accuracy"] > 0 else "not in the ledger"
        lacks.append(f"teacher {found}, needs {settings['teacher_accuracy']} %")
    return lacks


def other_settings(run: pd.Series, ignoring: Collection[str] = ()) -> str:
    """The fields of a student's spec, but those in `ignoring`, that are not the paper's, in words; empty if none."""
    if run["method"] == "teacher":
        return ""
    spec = json.loads(run["spec"])
    compared = [field for field in fields(RunSpec) if field.name not in {*FREE_FIELDS, *ignoring}]
    other = [field for field in compared if spec.get(field.name, field.default) != field.default]
    return "; ".join(f"{field.name.replace('_', ' ')} {spec[field.name]}, not {field.default}" for field in other)


def accuracies(runs: pd.DataFrame, method: str, column: str = "test_accuracy") -> np.ndarray:
    """Test accuracies of a method's runs, in per cent, or another column of them, one a seed."""
    return runs[runs["method"] == method].sort_values("seed").drop_duplicates("seed")[column].to_numpy(float)


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
    values = _by_method(claim, largest)
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


def difference(by_method: list[np.ndarray], confidence: float = 1 - SIGNIFICANCE) -> Estimate:
    """Difference of two means with Welch's interval and p-value."""
    first, second = by_method
    test = stats.ttest_ind(first, second, equal_var=False)
    low, high = test.confidence_interval(confidence)
    value, runs = float(first.mean() - second.mean()), min(len(first), len(second))
    return Estimate(value, float(low), float(high), p=float(test.pvalue), runs=runs)


def no_difference(by_method: list[np.ndarray]) -> Estimate:
    """The same with the 90 % interval of `comparisons.equivalence`: it lies within ± a margin exactly if p < 0.05."""
    return difference(by_method, 1 - 2 * SIGNIFICANCE)


@cache
def _size(method: str, k: int) -> tuple[int, int]:
    model = model_for(method, k)
    return models.count_parameters(model), models.count_macs(model)


LEDGER_MEASURES: dict[str, Callable[[list[np.ndarray]], Estimate]] = {
    "mean": mean,
    "best": mean,
    "teacher": mean,
    "teacher_gap": mean,
    "difference": difference,
    "no_difference": no_difference,
}
MODEL_MEASURES: dict[str, Callable[[str, int], float]] = {
    "parameters": lambda method, k: float(_size(method, k)[0]),
    "million_macs": lambda method, k: _size(method, k)[1] / 1e6,
    "compression_factor": lambda method, k: _size("teacher", 0)[0] / _size(method, k)[0],
}
# A sentence of the paper against the list beside it.
PAPER_MEASURES: dict[str, Callable[[], float]] = {
    "least_factor": lambda: min(lookup("literature_on_cifar10.factors")),
    "largest_factor": lambda: max(lookup("literature_on_cifar10.factors")),
    "least_change": lambda: min(lookup("literature_on_cifar10.accuracy_changes")),
    "largest_change": lambda: max(lookup("literature_on_cifar10.accuracy_changes")),
}
OUT_OF_REACH = {
    "authors_device": "needs the authors' machine",
    "other_work": "needs another group's networks and recipe",
}
MEASURES = (*LEDGER_MEASURES, *MODEL_MEASURES, *PAPER_MEASURES, *OUT_OF_REACH, "latency_ratio")


def judge(row: Mapping) -> tuple[str, str]:
    """The verdict of a row of the scorecard, and the reason in words. The rules were fixed before any run counted.

    Reproduced:
        a number within the tolerance of the paper's (of a teacher, also above it); a best of n if the mean of our runs
        is; a difference if Welch's test shows it after Holm's correction and its size is; no difference if two
        one-sided tests show it smaller than the tolerance: the whole 90 % interval lies within ± tolerance of 0.
    Reproduced with reservations, whichever applies first:
        - a number is within the tolerance, but its interval reaches beyond twice the tolerance: too few runs;
        - a number is outside, but its interval reaches within: chance may explain it;
        - a best of n: only our own best is within the tolerance, the mean is not;
        - a difference is shown, but in another size, or only without the correction;
        - undecided, too few runs to tell: a difference is not shown, but its interval holds the paper's number; or of
          two methods that should not differ, neither that they do is shown nor that they do not;
        - reproduced with one pairing, not reproduced with the other (`weigh_pairing`).
    Not testable here: needs what only others have. Not run yet: no run, or not enough of them, with the settings.
    Not reproduced: anything else. So for two methods that should not differ: Welch's test shows that they do.
    """
    if row["measure"] in OUT_OF_REACH:
        return NOT_TESTABLE, OUT_OF_REACH[row["measure"]]
    if np.isnan(row["value"]):
        return NOT_RUN, "not measured"
    return RULES.get(row["measure"], _judge_number)(row)


def _judge_number(row: Mapping) -> tuple[str, str]:
    gap, tolerance = row["value"] - row["claimed"], row["tolerance"]
    words = f"{gap:+.3g}, tolerance {tolerance:g}" if gap else "exactly"
    if row["measure"] == "teacher" and gap > 0:
        return REPRODUCED, words
    if _within(row, tolerance):
        wide = row["low"] < row["claimed"] - 2 * tolerance or row["high"] > row["claimed"] + 2 * tolerance
        return (RESERVATIONS, f"{words}, but the interval is wide") if wide else (REPRODUCED, words)
    reaches = row["low"] <= row["claimed"] + tolerance and row["high"] >= row["claimed"] - tolerance
    return (RESERVATIONS if reaches else NOT_REPRODUCED), words


def _judge_best(row: Mapping) -> tuple[str, str]:
    if _within(row, row["tolerance"]):
        return _judge_number(row)
    agrees = abs(row["best"] - row["claimed"]) <= row["tolerance"]
    words = f"best of {row['runs']}: {row['best']:.2f}, mean {row['value']:.2f}"
    return (RESERVATIONS if agrees else NOT_REPRODUCED), words


def _judge_difference(row: Mapping) -> tuple[str, str]:
    words = f"{row['low']:+.2f} to {row['high']:+.2f}, p = {row['p']:.2g}, corrected {row['p_holm']:.2g}"
    if row["p"] >= SIGNIFICANCE and row["low"] <= row["claimed"] <= row["high"]:
        return RESERVATIONS, f"{UNDECIDED}: {words}"
    if row["p"] >= SIGNIFICANCE or row["value"] * row["claimed"] <= 0:
        return NOT_REPRODUCED, words
    shown = row["p_holm"] < SIGNIFICANCE
    return (REPRODUCED if shown and _within(row, row["tolerance"]) else RESERVATIONS), words


def _judge_no_difference(row: Mapping) -> tuple[str, str]:
    words = f"90 % interval {row['low']:+.2f} to {row['high']:+.2f}, tolerance {row['tolerance']:g} from 0"
    if -row["tolerance"] < row["low"] and row["high"] < row["tolerance"]:
        return REPRODUCED, words
    shown = row["p"] < SIGNIFICANCE
    return (NOT_REPRODUCED, f"p = {row['p']:.2g}, {words}") if shown else (RESERVATIONS, f"{UNDECIDED}: {words}")


def _within(row: Mapping, tolerance: float) -> bool:
    return bool(abs(row["value"] - row["claimed"]) <= tolerance)


RULES: dict[str, Callable[[Mapping], tuple[str, str]]] = {
    "best": _judge_best,
    "difference": _judge_difference,
    "no_difference": _judge_no_difference,
}


def written(value: float, unit: str) -> str:
    """A number of the scorecard with its unit, as tables show it; empty if there is none."""
    if np.isnan(value):
        return ""
    if unit in ("×", "ms"):
        return f"{round(value, 2):.10g} {unit}"
    digits = {"%": ".2f", "points": "+.2f", "M": ".2f", "": ",.0f"}[unit]
    return f"{value:{digits}} {unit}".rstrip()


def reasons(row: Mapping) -> str:
    """One paragraph on a row of the scorecard: what is claimed, what we have, how it was judged, where it is shown."""
    said = f"The paper gives {written(row['claimed'], row['unit'])} ({row['source']})."
    parts = [said, _evidence(row), _judgement(row), _pairing_in_words(row)]
    return " ".join([*filter(None, parts), f"Shown in {chapter_link(row['chapter'])}."])


def chapter_link(chapter: str) -> str:
    """A Markdown link from one notebook to another, or its number in words if the chapter is not there yet."""
    number = f"chapter {chapter[:2]}"
    exists = (repository_root() / "notebooks" / f"{chapter}.ipynb").is_file()
    return f"[{number}]({chapter}.ipynb)" if exists else f"{number}, which is not written yet"


def _evidence(row: Mapping) -> str:
    if row["verdict"] == NOT_TESTABLE:
        return f"That {row['reason']}: a number to know, not one that we can test."
    if row["verdict"] == NOT_RUN:
        return _what_is_missing(row)
    ours, spread = written(row["value"], row["unit"]), ""
    if np.isfinite(row["low"]):
        confidence = 90 if row["measure"] == "no_difference" else 95
        spread = f", {confidence} % interval {written(row['low'], row['unit'])} to {written(row['high'], row['unit'])}"
    runs = f", {row['runs']} runs a method" if row["runs"] > 1 else ""
    return f"{EVIDENCE.get(row['measure'], 'Our runs give')} {ours}{spread}{runs}."


EVIDENCE = {
    **dict.fromkeys(MODEL_MEASURES, "We count, from the architecture,"),
    **dict.fromkeys(PAPER_MEASURES, "The list beside that sentence gives, as paper.json records it,"),
    "latency_ratio": "This machine, at steady state with 64 images, gives",
    "teacher": "Our teacher reaches",
}


def _what_is_missing(row: Mapping) -> str:
    if row["measure"] == "latency_ratio":
        return "It was not timed in this session."
    short = f" Shorter runs ({row['short_budget']}) gave {written(row['short'], row['unit'])}, which tests nothing."
    return f"No run settles it yet: {row['reason']}." + (short if row["short_budget"] else "") + f" {_price(row)}"


def _price(row: Mapping) -> str:
    if row["measure"] == "teacher":
        return f"It takes one teacher trained for {row['settings']['epochs']} epochs, or one that gets there sooner."
    methods, images = " and ".join(f"`{method}`" for method in row["methods"]), row["settings"]["train_images"]
    epochs = paper()["training"]["epochs"]
    return f"It takes {row['seeds']} runs of {methods} with k = {row['k']}, {epochs} epochs and {images:,} images."


def _judgement(row: Mapping) -> str:
    if row["verdict"] in (NOT_RUN, NOT_TESTABLE):
        return ""
    return f"{TESTS.get(row['measure'], TESTS['mean'])} Hence *{row['verdict']}* ({row['reason']})."


TESTS = {
    "mean": "It is the same if within the tolerance, and surely so if its interval stays within twice the tolerance.",
    "best": "A best of n depends on n, so the mean of our runs has to lie within the tolerance of it.",
    "teacher": "A teacher within the tolerance, or better, will do.",
    "difference": "It needs Welch's test, Holm's correction over all differences tested, and the size.",
    "no_difference": "That two methods are alike needs two one-sided tests: the interval within the tolerance of 0.",
    **dict.fromkeys((*MODEL_MEASURES, *PAPER_MEASURES), "It should be the same to the last digit printed."),
    "latency_ratio": "It may be off by a fifth, as machines differ.",
}


def _pairing_in_words(row: Mapping) -> str:
    if not row["released_verdict"]:
        return ""
    found = written(row["released_value"], row["unit"])
    return f"Paired as in the released scripts, the runs give {found}: {row['released_verdict']}."
