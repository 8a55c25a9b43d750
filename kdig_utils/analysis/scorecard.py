"""What the ledger says of each claim: one row a claim, with the paper's number, ours, its verdict and its evidence."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from kdig_utils.analysis import claims, imagenet, verdicts
from kdig_utils.analysis.claims import Claim
from kdig_utils.analysis.comparisons import family, holm, interaction, runs_by_method, sign_flips, unpaired
from kdig_utils.analysis.counted import COMPUTED
from kdig_utils.analysis.verdicts import NOT_RUN, NOT_TESTABLE, REPRODUCED, RESERVATIONS, UNDECIDED
from kdig_utils.experiments import brief, evidence, teachers
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.method import artifacts
from kdig_utils.method.spec import METHODS

CONCEPTUAL = "matched"  # as the paper's text means it; claims.yml has the pairing of the released scripts
FOUND = ("value", "gap", "reach", "low", "high", "p", "p_level")
EMPTY = {**dict.fromkeys((*FOUND, "p_exact", "p_holm", "p_level_holm", "best", "short"), np.nan), "runs": 0}
Speedups = Mapping[int, tuple[float, float, float]]


def scorecard(
    ledger: pd.DataFrame, speedups: Speedups | None = None, explanations: pd.DataFrame | None = None
) -> pd.DataFrame:
    """One row a claim, in the order of claims.yml.

    Args:
        ledger: as `Ledger.read()` returns it.
        speedups: teacher's over student's time and its interval, by the student's k, from `timing.speedup`.
        explanations: the table of measured explanations, `results/explanations.csv`.

    Returns:
        The fields of `Claim`, and: claimed; value, low, high (95 %; 99.9 % at an interim look), gap to the paper's
        number, its reach; p, p_exact (sign flips), p_holm, p_level (two one-sided tests), p_level_holm; runs, best;
        interim; verdict, reason, found (the kind of evidence that there is, `not run yet` without any); conflicts, the
        claims that one recipe can hardly meet together with it; short and short_budget, what runs gave that do not
        count; and value, low, high, verdict and interim of the conceptual replication, as matched_value and so on.
    """
    table = _with_protocols(with_teacher_accuracy(ledger))
    table["date"] = pd.to_datetime(table["finished"], format="ISO8601", utc=True, errors="coerce")
    table["first_teacher"] = _first_teacher(table)
    direct = _judged(claims.claims(), table, speedups or {}, explanations)
    paired = [claim for claim in claims.claims() if claim.depends_on_pairing and claim.measure != "imagenet"]
    matched = _judged([as_matched(claim) for claim in paired], table, {}, explanations)
    conceptual = {row["name"]: row for row in matched}
    conflicts = conflicting()
    for row in direct:
        none = {**dict.fromkeys(("value", "low", "high"), np.nan), "verdict": "", "interim": False}
        other = conceptual.get(row["name"], none)
        row |= {f"matched_{name}": other[name] for name in none}
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
    verdict = str(verdicts.judge(claim, row, verdicts.level(row["runs"], claim.seeds)))
    return UNDECIDED if row["interim"] and verdict in (REPRODUCED, RESERVATIONS) else verdict


def _correct(rows: list[dict], chosen: Sequence[Claim]) -> None:
    """Holm's correction over each registered family; a family of the same size whatever was run."""
    for name, tests in verdicts.families().items():
        its = [(row, claim) for row, claim in zip(rows, chosen, strict=True) if claim.family == name]
        # An interim p does not help the others: it is not final.
        by_test = {verdicts.comparison_of(claim): np.nan if row["interim"] else row["p"] for row, claim in its}
        corrected = dict(zip(by_test, holm(list(by_test.values()), len(tests)), strict=True))
        alike = [row for row, claim in its if claim.measure == "no_difference"]
        levels = holm([row["p_level"] for row in alike], len(alike)) if alike else ()
        for row, claim in its:
            final = corrected[verdicts.comparison_of(claim)]
            row["p_holm"] = min(row["p"] * len(tests), 1.0) if row["interim"] else final
        for row, p in zip(alike, levels, strict=True):
            row["p_level_holm"] = p


def with_teacher_accuracy(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger with teacher_accuracy, in per cent, and above_teacher, in points; NaN without the run's teacher."""
    measured = ledger[ledger["method"] == "teacher"].dropna(subset="test_accuracy").drop_duplicates("weights_sha256")
    accuracy = measured.set_index("weights_sha256")["test_accuracy"]
    found = ledger["teacher_sha256"].map(accuracy).astype(float)
    return ledger.assign(teacher_accuracy=found, above_teacher=ledger["test_accuracy"].astype(float) - found)


def _with_protocols(table: pd.DataFrame) -> pd.DataFrame:
    """The table with what a run has that is not as a protocol wants it, and with protocol, the name of its own.

    other_settings is about the paper's, other_than_brief about the brief protocol. The name is empty for all runs but
    those of the brief protocol and those near it: claims on the paper see neither.
    """
    setting = brief.chosen(table)
    specs = [None if row["method"] == "teacher" else spec_of(row) for _index, row in table.iterrows()]
    other = [evidence.unlike(spec, brief.spec(spec.method, 0, setting)) if spec else "a teacher" for spec in specs]
    near = ["another brief run" if spec and brief.includes(spec) else "" for spec in specs]
    return table.assign(
        other_settings=[evidence.unlike_the_paper(spec) if spec else "" for spec in specs],
        other_than_brief=other,
        protocol=[named if lacks else brief.NAME for lacks, named in zip(other, near, strict=True)],
    )


def _first_teacher(table: pd.DataFrame) -> pd.Series:
    """Whether a student has the first teacher, by date, that is good enough: a second one cannot take back a result."""
    settings = next(claim.settings for claim in claims.claims() if "teacher_accuracy" in claim.settings)
    good = table["test_accuracy"].astype(float) >= settings["teacher_accuracy"]
    for name in ("test_images", "data_md5"):
        good &= table[name] == settings[name]
    enough = table[good & (table["method"] == "teacher") & table["date"].notna() & table["weights_sha256"].ne("")]
    first = enough.sort_values(["date", "weights_sha256"])["weights_sha256"].head(1)
    return table["teacher_sha256"].isin(first)


def _measured(
    claim: Claim, table: pd.DataFrame, known: dict, speedups: Speedups, explanations: pd.DataFrame | None
) -> dict:
    fixed = {**asdict(claim), "paths": claim.value, "claimed": claim.claimed}
    row = {**fixed, **EMPTY, "reason": "", "short_budget": "", "interim": False}
    if claim.measure == "teacher":
        return row | _first_counting_teacher(claim, table)
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


def _first_counting_teacher(claim: Claim, table: pd.DataFrame) -> dict:
    its = table[table["method"] == "teacher"].copy()
    its["lacks"] = [shortfall(run, claim) for _index, run in its.iterrows()]
    counting = its[its["lacks"] == ""].sort_values("date")["test_accuracy"].astype(float)
    if counting.empty:
        return _short(claim, its[its.index.isin(teachers.with_students(table).index)])
    return {"value": counting.iloc[0], "gap": counting.iloc[0] - claim.claimed, "runs": 1}


def _candidates(claim: Claim, table: pd.DataFrame, known: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of the claim's size and protocol with what each lacks; of those that count a column a method."""
    column = "above_teacher" if claim.measure == "teacher_gap" else "test_accuracy"
    key = (claim.k, claim.seeds, column, claim.registered, claim.protocol, *sorted(claim.settings.items()))
    if key not in known:
        alike = (table["k"] == claim.k) & (table["protocol"] == claim.protocol)
        rows = table[alike & table["method"].isin(METHODS)].sort_values("date")
        rows["lacks"] = [shortfall(run, claim) for _index, run in rows.iterrows()]
        counting = rows[rows["lacks"] == ""]
        by_method = [by_seed(counting, method, column) for method in METHODS]
        known[key] = rows, pd.concat(by_method, axis=1).sort_index()
    return known[key]


def _from_ledger(claim: Claim, candidates: pd.DataFrame, runs: pd.DataFrame) -> dict:
    """Our estimate from the runs that count; without any, what is missing, and the figure of the runs there are."""
    its = runs[list(claim.methods)].dropna()
    if its.empty:
        return _short(claim, candidates[candidates["method"].isin(claim.methods)])
    if claim.measure == "direction":  # the paper gives no number: nothing of its luck comes in
        return _found(claim, its, (np.nan, 0))
    return _found(claim, its, verdicts.pooled_deviation([runs[method].dropna() for method in runs]))


def _found(claim: Claim, runs: pd.DataFrame, spread: tuple) -> dict:
    """The numbers of a claim on students from its runs, a column a method and a row a seed."""
    significance = verdicts.level(len(runs), claim.seeds)
    values = list(runs.to_numpy(float).T)
    found = verdicts.measure(claim, values, claim.claimed, *spread, significance)
    found = {name: float(number) for name, number in found.items()}
    found |= {"runs": len(runs), "best": float(values[0].max()), "interim": len(runs) < claim.seeds}
    if len(values) > 1:
        found["p_exact"] = sign_flips(sum(sign * value for sign, value in zip(claims.SIGNS, values, strict=False)))
    return found


def _from_explanations(claim: Claim, table: pd.DataFrame, explanations: pd.DataFrame | None) -> dict:
    """Rank correlation of the students' maps with the teacher's: first method minus second, paired by seed."""
    counting = _counting(claim, table)
    if explanations is None or explanations.empty or counting.empty:
        return {"reason": "no explanation was measured of students that count"}
    its = explanations[explanations["measure"] == "spearman"].drop_duplicates("run_id")
    measured = its.set_index("run_id")["value"]
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
    return its[lacks == ""]


def shortfall(run: pd.Series, claim: Claim) -> str:
    """What a row of the ledger lacks to count as a test of `claim`, in words; empty if it counts.

    Args:
        run: a row with the columns that `with_teacher_accuracy` and `_with_protocols` add.
    """
    settings = claim.settings
    lacks = [
        f"{run[name]:,.0f} {name.replace('_', ' ')}, not {settings[name]:,}"
        for name in ("train_images", "test_images")
        if run[name] != settings[name]
    ]
    lacks += [
        f"{name.replace('_', ' ')} {run[name]}, not {settings[name]}"
        for name in ("train_fraction", "data_md5")
        if name in settings and run[name] != settings[name]
    ]
    lacks += _teacher_lacks(run, claim) if run["method"] == "teacher" else _student_lacks(run, claim)
    if not lacks and not run["date"] > pd.to_datetime(claim.registered, utc=True):
        lacks.append(f"it ended {run['finished'] or 'at no known time'}, the claim was registered {claim.registered}")
    return "; ".join(lacks)


def _teacher_lacks(run: pd.Series, claim: Claim) -> list[str]:
    # Reaching the number with less work is enough; missing it counts only at the full budget.
    if "epochs" not in claim.settings:
        return ["a teacher"]
    if run["test_accuracy"] >= claim.claimed - claim.tolerance or run["epochs"] >= claim.settings["epochs"]:
        return []
    return [f"{run['epochs']:.0f} of {claim.settings['epochs']} epochs"]


def _student_lacks(run: pd.Series, claim: Claim) -> list[str]:
    settings, other = claim.settings, run[f"other_than_{claim.protocol}" if claim.protocol else "other_settings"]
    lacks = [other] if other else []
    if "pairing" not in settings:
        return ["a student"]
    if run["seed"] not in range(claim.seeds):
        lacks.append(f"seed {run['seed']}: the claim is judged on seeds 0 to {claim.seeds - 1}")
    if run["method"] != "student" and run["pairing"] != settings["pairing"]:
        lacks.append(f"pairing {run['pairing']}, not {settings['pairing']}")
    if run["method"] != "student" and not run["teacher_accuracy"] >= settings["teacher_accuracy"]:
        found = f"{run['teacher_accuracy']:.1f} %" if run["teacher_accuracy"] > 0 else "not in the ledger"
        lacks.append(f"teacher {found}, needs {settings['teacher_accuracy']} %")
    elif run["method"] != "student" and not run["first_teacher"]:
        lacks.append("another teacher than the first that is good enough")
    return lacks


def by_seed(runs: pd.DataFrame, method: str, column: str = "test_accuracy") -> pd.Series:
    """A column of a method's runs, in per cent if it is an accuracy, by seed: each seed once."""
    its = runs[runs["method"] == method].dropna(subset=column).drop_duplicates("seed")
    return its.set_index("seed")[column].astype(float).sort_index().rename(method)


def _short(claim: Claim, candidates: pd.DataFrame) -> dict:
    """The figure of the runs that do not settle it, at the largest budget that all methods of the claim have."""
    measured = candidates.dropna(subset="test_accuracy")
    alone = measured["method"].isin(("student", "teacher"))
    measured = measured.assign(paired=measured["pairing"].where(~alone, ""))
    complete = [
        part
        for _budget, group in measured.groupby(["train_images", "epochs"])
        for pairing in sorted(set(group["paired"]) - {""}) or [""]
        if set(claim.methods) <= set((part := group[group["paired"].isin(("", pairing))])["method"])
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
        "short": sum(sign * mean for sign, mean in zip(claims.SIGNS, means, strict=False)),
        "short_budget": f"{budget}, {runs} run{'s' if runs > 1 else ''}",
        "reason": max(largest["lacks"], key=len) or "no seed that all methods have",
    }


def conflicting() -> dict[str, list[str]]:
    """Which claims one recipe can hardly meet together, by the paper's own numbers: by name.

    The sweep has single runs at k = 5 of what the paper also ran ten times. A number of each is one draw: their gap is
    held against the reach of both lucks, with the deviation of the paper's ten runs (Holm over all such pairs). And
    where the paper calls a difference none that is above the margin, the means of both methods say otherwise: that
    claim alone is marked.
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
    for claim in claims.claims():
        if claim.measure == "no_difference" and abs(claim.claimed) > claims.margin():
            means = [mean.name for mean in tens if mean.group == "ablation" and {*mean.methods} < {*claim.methods}]
            found[claim.name] = means
    return found


def _p_of_gap(one: Claim, other: Claim, deviation: float, df: int) -> float:
    means, variances = zip(*(verdicts.implied_mean(claim, deviation) for claim in (one, other)), strict=True)
    return float(2 * stats.t.sf(abs(means[0] - means[1]) / sum(variances) ** 0.5, df))


def registered_comparisons(rows: pd.DataFrame, compare: Callable[..., NamedTuple] = unpaired) -> pd.DataFrame:
    """The nine comparisons of the family `ten runs` on rows of one experiment, as chapters 08 and 16 show them.

    Args:
        compare: `comparisons.unpaired`, or `comparisons.paired` for runs that share their seeds.

    Returns:
        As `comparisons.family`, with Holm's correction over all nine; the last row is the interaction of KD and IG.

    Raises:
        ValueError: a method was not run, or cannot be compared.
    """
    tests = [methods for methods, *_runs in verdicts.families()["ten runs"]]
    pairs, ((both, one, other, neither),) = [t for t in tests if len(t) == 2], [t for t in tests if len(t) == 4]
    table = family(rows, pairs, compare)
    runs = runs_by_method(rows)
    together = (
        interaction(rows) if compare is unpaired else compare(runs[both] - runs[one], runs[other] - runs[neither])
    )
    last = {"first": f"{both} − {one}", "second": f"({other} − {neither})", **together._asdict()}
    table = pd.concat([table, pd.DataFrame([last])], ignore_index=True)
    return table.assign(**{f"{name}_holm": holm(table[name]) for name in ("p", "p_permutation")})


def by_kind(card: pd.DataFrame) -> pd.DataFrame:
    """The scorecard's headline: for each kind of evidence that claims need, how many have which verdict.

    Kinds are never added up: a count of parameters settles nothing about training.
    """
    counts = pd.crosstab(card["evidence"], card["verdict"])
    return counts.reindex(index=evidence.in_order(counts.index), columns=list(verdicts.VERDICTS), fill_value=0)


def headline(card: pd.DataFrame) -> str:
    """The scorecard in one sentence a kind: of how many claims the evidence is there, and what it says."""
    parts = []
    for kind, row in by_kind(card).iterrows():
        tested = row[[*verdicts.DECIDED, UNDECIDED]]
        said = ", ".join(f"{count} {verdict}" for verdict, count in tested.items() if count)
        parts.append(f"{kind}: {tested.sum()} of {row.sum()} claims tested" + (f" ({said})" if said else ""))
    return "; ".join(parts)
