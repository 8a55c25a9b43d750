"""What the ledger says of each claim: one row a claim, with the paper's number, ours, its verdict and its evidence."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch.fx.experimental.optimization import fuse

from kdig_utils import artifacts, claims, evidence, imagenet, models, verdicts
from kdig_utils.artifacts import model_for
from kdig_utils.claims import Claim
from kdig_utils.comparisons import holm, sign_flips
from kdig_utils.integrated_gradients import integrated_gradients
from kdig_utils.runs import METHODS, of_one_teacher
from kdig_utils.verdicts import NOT_RUN, NOT_TESTABLE, UNDECIDED

DIRECT, CONCEPTUAL = "shuffled", "matched"  # as the released scripts pair; as the paper's text means it
FOUND = ("value", "gap", "reach", "low", "high", "p", "p_level")
EMPTY = {**dict.fromkeys((*FOUND, "p_exact", "p_holm", "p_level_holm", "best", "short"), np.nan), "runs": 0}
Speedups = Mapping[int, tuple[float, float, float]]


def scorecard(
    ledger: pd.DataFrame, speedups: Speedups | None = None, explanations: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row a claim, in the order of claims.yml.

    Args:
        ledger: as `Ledger.read()` returns it.
        speedups: teacher's over student's time and its interval, by the student's k, from `latency.speedup`.
        explanations: the table of measured explanations, `results/explanations.csv`.

    Returns:
        The fields of `Claim`, and: claimed; value, low, high (95 %; 99.9 % at an interim look), gap to the paper's
        number, its reach; p, p_exact (sign flips), p_holm, p_level (two one-sided tests), p_level_holm; runs, best;
        interim; verdict, reason, found (the kind of evidence that there is, `not run yet` without any); conflicts, the
        claims with which it cannot hold together; short and short_budget, what runs gave that do not count; and
        matched_value and matched_verdict, the conceptual replication, where pairing matters.
    """
    table = with_teacher_accuracy(ledger)
    table["other_settings"] = [evidence.other_settings(row) for _index, row in table.iterrows()]
    direct = _judged(claims.claims(), table, speedups or {}, explanations)
    matched = _judged([as_matched(claim) for claim in claims.claims() if claim.depends_on_pairing], table, {}, None)
    conceptual = {row["name"]: row for row in matched}
    conflicts = conflicting()
    for row in direct:
        other = conceptual.get(row["name"], {"value": np.nan, "verdict": ""})
        row |= {"matched_value": other["value"], "matched_verdict": other["verdict"]}
        row["conflicts"] = ", ".join(conflicts.get(row["name"], ()))
    return pd.DataFrame(direct)


def as_matched(claim: Claim) -> Claim:
    """The same claim on runs that give each image its own signals: the conceptual replication."""
    return replace(claim, settings={**claim.settings, "pairing": CONCEPTUAL})


def _judged(
    chosen: Sequence[Claim], table: pd.DataFrame, speedups: Speedups, explanations: pd.DataFrame | None
) -> list[dict]:
    known: dict[tuple, tuple[pd.DataFrame, pd.DataFrame]] = {}  # many claims rest on the same runs
    rows = [_measured(claim, table, known, speedups, explanations) for claim in chosen]
    _correct(rows, chosen)
    for row, claim in zip(rows, chosen, strict=True):
        row["verdict"] = _verdict(row, claim)
        row["found"] = claim.evidence if row["verdict"] in (*verdicts.DECIDED, UNDECIDED) else evidence.NOT_RUN
    return rows


def _verdict(row: dict, claim: Claim) -> str:
    if np.isnan(row["value"]):
        return NOT_TESTABLE if claim.measure in claims.OUT_OF_REACH and not row["reason"] else NOT_RUN
    return str(verdicts.judge(claim, row, verdicts.level(row["runs"], claim.seeds)))


def _correct(rows: list[dict], chosen: Sequence[Claim]) -> None:
    """Holm's correction over each registered family; a family of the same size whatever was run."""
    for name, family in verdicts.families().items():
        its = [(row, claim) for row, claim in zip(rows, chosen, strict=True) if claim.family == name]
        by_test = {verdicts.comparison_of(claim): row["p"] for row, claim in its}
        corrected = dict(zip(by_test, holm(list(by_test.values()), len(family)), strict=True))
        alike = [row for row, claim in its if claim.measure == "no_difference"]
        levels = holm([row["p_level"] for row in alike], len(alike)) if alike else ()
        for row, claim in its:
            row["p_holm"] = corrected[verdicts.comparison_of(claim)]
        for row, p in zip(alike, levels, strict=True):
            row["p_level_holm"] = p


def with_teacher_accuracy(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger with teacher_accuracy, in per cent, and above_teacher, in points; NaN without the run's teacher."""
    teachers = ledger[ledger["method"] == "teacher"].drop_duplicates("weights_sha256")
    accuracy = teachers.set_index("weights_sha256")["test_accuracy"]
    found = ledger["teacher_sha256"].map(accuracy).astype(float)
    return ledger.assign(teacher_accuracy=found, above_teacher=ledger["test_accuracy"].astype(float) - found)


def _measured(
    claim: Claim, table: pd.DataFrame, known: dict, speedups: Speedups, explanations: pd.DataFrame | None
) -> dict:
    fixed = {**asdict(claim), "paths": claim.value, "claimed": claim.claimed}
    row = {**fixed, **EMPTY, "reason": "", "short_budget": "", "interim": False}
    if claim.measure in claims.ACCURACY_MEASURES:
        return row | _from_ledger(claim, *_candidates(claim, table, known))
    if claim.measure == "map_similarity":
        return row | _from_explanations(claim, table, explanations)
    if claim.measure == "imagenet" and (folder := imagenet.folder()):
        return row | _from_imagenet(claim, table, folder)
    if claim.measure == "latency_ratio":
        value, low, high = speedups.get(claim.k, (np.nan,) * 3)
        return row | {"value": value, "low": low, "high": high, "gap": value - claim.claimed}
    if claim.measure in COMPUTED:
        value = COMPUTED[claim.measure](claim.methods[0] if claim.methods else "", claim.k)
        return row | {"value": value, "gap": value - claim.claimed}
    return row


def _candidates(claim: Claim, table: pd.DataFrame, known: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the claim's size with what each lacks; and of those that count a column a method, a row a seed."""
    wanted = ("teacher",) if claim.measure == "teacher" else METHODS
    column = "above_teacher" if claim.measure == "teacher_gap" else "test_accuracy"
    key = (claim.k, wanted, column, claim.registered, *sorted(claim.settings.items()))
    if key not in known:
        of_size = (table["k"] == claim.k) | (table["method"] == "teacher")
        rows = table[of_size & table["method"].isin(wanted)].copy()
        rows["lacks"] = [shortfall(run, claim) for _index, run in rows.iterrows()]
        counting = of_one_teacher(rows[rows["lacks"] == ""])
        by_method = [by_seed(counting, method, column) for method in wanted]
        known[key] = rows, pd.concat(by_method, axis=1).sort_index()
    return known[key]


def _from_ledger(claim: Claim, candidates: pd.DataFrame, runs: pd.DataFrame) -> dict:
    """Our estimate from the runs that count; without any, what is missing, and the figure of the runs there are."""
    its = runs[list(claim.methods)].dropna()
    if its.empty:
        return _short(claim, candidates[candidates["method"].isin(claim.methods)])
    if claim.measure == "teacher":
        value = float(its.iloc[:, 0].max())
        return {"value": value, "gap": value - claim.claimed, "runs": len(its), "best": value}
    return _found(claim, its, verdicts.pooled_deviation([runs[method].dropna() for method in runs]))


def _found(claim: Claim, runs: pd.DataFrame, spread: tuple) -> dict:
    """The numbers of a claim on students from its runs, a column a method and a row a seed."""
    significance = verdicts.level(len(runs), claim.seeds)
    values = list(runs.to_numpy(float).T)
    found = verdicts.measure(claim, values, claim.claimed, *spread, significance)
    found = {name: float(number) for name, number in found.items()}
    found |= {"runs": len(runs), "best": float(values[0].max()), "interim": len(runs) < claim.seeds}
    if len(values) > 1:
        signs = (1, -1, -1, 1)
        found["p_exact"] = sign_flips(sum(sign * value for sign, value in zip(signs, values, strict=False)))
    return found


def _from_explanations(claim: Claim, table: pd.DataFrame, explanations: pd.DataFrame | None) -> dict:
    """Rank correlation of the students' maps with the teacher's: first method minus second, paired by seed."""
    counting = _counting(claim, table)
    if explanations is None or counting.empty:
        return {"reason": "no explanation was measured of students that count"}
    measured = explanations[explanations["measure"] == "spearman"].set_index("run_id")["value"]
    similar = counting.assign(similarity=counting["run_id"].map(measured)).dropna(subset="similarity")
    pairs = [by_seed(similar, method, "similarity") for method in claim.methods]
    runs = pd.concat(pairs, axis=1, join="inner").sort_index()
    if runs.empty:
        return {"reason": "no explanation was measured of students that count"}
    return _found(claim, runs, (np.nan, 0))


def _from_imagenet(claim: Claim, table: pd.DataFrame, folder: Path) -> dict:
    """How much better the published student of the first method is than that of the second, if both count."""
    counting = _counting(claim, table)
    names = [f"{method}_k{claim.k}" for method in claim.methods]
    published = artifacts.manifest()
    if not all(published.get(name, {}).get("run_id") in set(counting["run_id"]) for name in names):
        return {"reason": f"no published weights, {' and '.join(names)}, of runs that count"}
    return imagenet.gain(*map(artifacts.load, names), *imagenet.read(folder)) | {"runs": 1}


def _counting(claim: Claim, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the claim's methods and size that count."""
    its = table[(table["k"] == claim.k) & table["method"].isin(claim.methods)]
    lacks = pd.Series([shortfall(run, claim) for _index, run in its.iterrows()], its.index, dtype=object)
    return of_one_teacher(its[lacks == ""])


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
    lacks += _teacher_lacks(run, claim) if run["method"] == "teacher" else _student_lacks(run, claim)
    if not lacks and not str(run["finished"]) > claim.registered:
        lacks.append(f"it ended {run['finished']}, before the claim was registered ({claim.registered})")
    return "; ".join(lacks)


def _teacher_lacks(run: pd.Series, claim: Claim) -> list[str]:
    # Reaching the number with less work is enough; missing it counts only at the full budget.
    if "epochs" not in claim.settings:
        return ["a teacher"]
    if run["test_accuracy"] >= claim.claimed - claim.tolerance or run["epochs"] >= claim.settings["epochs"]:
        return []
    return [f"{run['epochs']:.0f} of {claim.settings['epochs']} epochs"]


def _student_lacks(run: pd.Series, claim: Claim) -> list[str]:
    settings, lacks = claim.settings, [run["other_settings"]] if run["other_settings"] else []
    if "pairing" not in settings:
        return ["a student"]
    if run["method"] != "student" and run["pairing"] != settings["pairing"]:
        lacks.append(f"pairing {run['pairing']}, not {settings['pairing']}")
    if run["method"] != "student" and not run["teacher_accuracy"] >= settings["teacher_accuracy"]:
        found = f"{run['teacher_accuracy']:.1f} %" if run["teacher_accuracy"] > 0 else "not in the ledger"
        lacks.append(f"teacher {found}, needs {settings['teacher_accuracy']} %")
    return lacks


def by_seed(runs: pd.DataFrame, method: str, column: str = "test_accuracy") -> pd.Series:
    """A column of a method's runs, in per cent if it is an accuracy, by seed: each seed once."""
    its = runs[runs["method"] == method].drop_duplicates("seed")
    return its.set_index("seed")[column].astype(float).dropna().sort_index().rename(method)


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
    column = "above_teacher" if claim.measure == "teacher_gap" else "test_accuracy"
    means = [by_seed(largest, method, column).mean() for method in claim.methods]
    runs = min(int((largest["method"] == method).sum()) for method in claim.methods)
    budget = f"{evidence.in_words(evidence.of_runs(largest))}, {largest['train_images'].iloc[0]:,.0f} images"
    return {
        "short": sum(sign * mean for sign, mean in zip((1, -1, -1, 1), means, strict=False)),
        "short_budget": f"{budget}, {runs} run{'s' if runs > 1 else ''}",
        "reason": max(largest["lacks"], key=len),
    }


def conflicting() -> dict[str, list[str]]:
    """Which claims cannot both hold of one recipe, by the paper's own numbers: by name, both ways.

    The sweep has single runs at k = 5 of what the paper also ran ten times. A number of each is one draw: their gap is
    held against the reach of both lucks, with the deviation of the paper's ten runs (Holm over all such pairs).
    """
    deviation, df = verdicts.papers_spread()
    numbers = [claim for claim in claims.claims() if claim.measure == "accuracy" and claim.k == 5]
    sweep = [claim for claim in numbers if claim.group == "compression"]
    tens = [claim for claim in numbers if claim.group in ("ablation", "headline")]
    pairs = [(one, other) for one in sweep for other in tens if one.methods == other.methods]
    p_values = [_p_of_gap(one, other, deviation, df) for one, other in pairs]
    found: dict[str, list[str]] = {}
    for (one, other), p in zip(pairs, holm(p_values, len(pairs)), strict=True):
        if p < claims.SIGNIFICANCE:
            found.setdefault(one.name, []).append(other.name)
            found.setdefault(other.name, []).append(one.name)
    return found


def _p_of_gap(one: Claim, other: Claim, deviation: float, df: int) -> float:
    means, variances = zip(*(verdicts.implied_mean(claim, deviation) for claim in (one, other)), strict=True)
    return float(2 * stats.t.sf(abs(means[0] - means[1]) / sum(variances) ** 0.5, df))


def by_kind(card: pd.DataFrame) -> pd.DataFrame:
    """The scorecard's headline: for each kind of evidence that claims need, how many have which verdict.

    Kinds are never added up: a count of parameters settles nothing about training.
    """
    counts = pd.crosstab(card["evidence"], card["verdict"])
    kinds = [kind for kind in evidence.KINDS if kind in counts.index]
    return counts.reindex(index=kinds, columns=list(verdicts.VERDICTS), fill_value=0)


def headline(card: pd.DataFrame) -> str:
    """The scorecard in one sentence a kind: of how many claims the evidence is there, and what it says."""
    parts = []
    for kind, row in by_kind(card).iterrows():
        tested = row[[*verdicts.DECIDED, UNDECIDED]]
        said = ", ".join(f"{count} {verdict}" for verdict, count in tested.items() if count)
        parts.append(f"{kind}: {tested.sum()} of {row.sum()} claims tested" + (f" ({said})" if said else ""))
    return "; ".join(parts)


@cache
def _size(method: str, k: int) -> tuple[int, int]:
    model = model_for(method, k)
    return models.count_parameters(model), models.count_macs(model)


def explaining_over_training(_method: str, k: int) -> float:
    """Work to explain each training image once, over the work to train one student, in multiply-accumulates.

    A step of Integrated Gradients passes forward and back to the image; a step of training also to the weights.
    """
    steps, epochs = 50, claims.lookup("training.epochs")
    return steps * 2 * _size("teacher", 0)[1] / (epochs * 3 * _size("student", k)[1])


@cache
def sensitivity(_method: str, k: int) -> float:
    """Share of trials in which sensitivity holds (arXiv 1703.01365, section 2): a student with random weights.

    Image and baseline differ in one value. Where the answer differs, that value gets attribution; all others get none.
    """
    student, image = _random_student(k)
    trials = []
    for place in range(0, image.numel(), image.numel() // 8):
        baseline = image.clone()
        baseline.view(-1)[place] = 1 - baseline.view(-1)[place]
        found = integrated_gradients(student, image, baseline, torch.tensor([0]), n_steps=8).view(-1)
        changed = bool(student(image)[0, 0] != student(baseline)[0, 0])
        elsewhere = torch.cat([found[:place], found[place + 1 :]])
        trials.append(bool((found[place] != 0) == changed and not elsewhere.any()))
    return float(np.mean(trials))


@cache
def implementation_invariance(_method: str, k: int) -> float:
    """Largest difference of two attributions of one function, relative to the largest attribution, in float64.

    The function is a student with random weights; once with its batch normalisation, once with it in the convolutions.
    """
    student, image = _random_student(k)
    one, other = (
        integrated_gradients(network, image, torch.zeros_like(image), torch.tensor([0]), n_steps=16)
        for network in (student, fuse(student))
    )
    return float((one - other).abs().max() / one.abs().max())


def _random_student(k: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """A student in float64 whose batch normalisation does something, and an image; the same at every call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        student = models.student(k)
        student(torch.rand(16, 3, 32, 32))  # moves the running statistics
        return student.double().eval().requires_grad_(False), torch.rand(1, 3, 32, 32, dtype=torch.float64)


# What can be computed without runs, from (method, k). The last four hold a sentence of the paper against its own list.
COMPUTED = {
    "parameters": lambda method, k: float(_size(method, k)[0]),
    "million_macs": lambda method, k: _size(method, k)[1] / 1e6,
    "compression_factor": lambda method, k: _size("teacher", 0)[0] / _size(method, k)[0],
    "explaining_over_training": explaining_over_training,
    "sensitivity": sensitivity,
    "implementation_invariance": implementation_invariance,
    "least_factor": lambda _method, _k: min(claims.lookup("literature_on_cifar10.factors")),
    "largest_factor": lambda _method, _k: max(claims.lookup("literature_on_cifar10.factors")),
    "least_change": lambda _method, _k: min(claims.lookup("literature_on_cifar10.accuracy_changes")),
    "largest_change": lambda _method, _k: max(claims.lookup("literature_on_cifar10.accuracy_changes")),
}
