"""What the ledger says of each claim: one row a claim, with the paper's number, ours, its verdict and its evidence."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from kdig_utils.analysis import claims, printed, verdicts
from kdig_utils.analysis.claims import Claim
from kdig_utils.analysis.comparisons import Compare, family, holm, interaction, runs_by_method, unpaired
from kdig_utils.analysis.counted import COMPUTED
from kdig_utils.analysis.eligibility import Candidates, by_seed
from kdig_utils.analysis.permutation import sign_flips
from kdig_utils.analysis.sample_size import best_of_normal
from kdig_utils.analysis.verdicts import NOT_RUN, NOT_TESTABLE, REPRODUCED, RESERVATIONS, UNDECIDED
from kdig_utils.experiments import evidence, teachers
from kdig_utils.method.spec import METHODS

CONCEPTUAL = "matched"  # as the paper's text means it; claims.yml has the pairing of the released scripts
NUMBERS = ("value", "gap", "reach", "low", "high", "p", "p_level", "p_exact", "p_holm", "p_level_holm", "best", "short")
UNPAIRED = ("student", "teacher")  # take nothing from a teacher
DIGITS = {"%": ".2f", "points": "+.2f", "M": ".2f", "": ",.0f", "rank correlation": "+.3f", "relative": ".0e"}
Speedups = Mapping[int, tuple[float, float, float]]


@dataclass(frozen=True)
class _Evidence:
    """All that claims are held against: runs of the ledger, times, and measured explanations."""

    runs: Candidates
    speedups: Speedups
    explanations: pd.DataFrame | None


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
    held = _Evidence(Candidates(ledger), speedups or {}, explanations)
    direct = _judged(claims.claims(), held)
    paired = [
        replace(claim, settings={**claim.settings, "pairing": CONCEPTUAL})  # runs that give each image its own signals
        for claim in claims.claims()
        if claim.depends_on_pairing and claim.measure != "imagenet"
    ]
    conceptual = {row["name"]: row for row in _judged(paired, held)}
    conflicts = conflicting()
    none = {**dict.fromkeys(("value", "low", "high"), np.nan), "verdict": "", "interim": False}
    for row in direct:
        other = conceptual.get(row["name"], none)
        row |= {f"matched_{name}": other[name] for name in none}
        row["conflicts"] = ", ".join(conflicts.get(row["name"], ()))
    return pd.DataFrame(direct)


def _judged(chosen: Sequence[Claim], held: _Evidence) -> list[dict]:
    rows = [_row(claim, held) for claim in chosen]
    for name, tests in verdicts.families().items():
        its = [(row, claim) for row, claim in zip(rows, chosen, strict=True) if claim.family == name]
        _correct(its, len(tests))
    for row, claim in zip(rows, chosen, strict=True):
        row["verdict"] = _verdict(row, claim)
        row["found"] = claim.evidence if row["verdict"] in (*verdicts.DECIDED, UNDECIDED) else evidence.NOT_RUN
    return rows


def _verdict(row: dict, claim: Claim) -> str:
    if np.isnan(row["value"]):
        return NOT_TESTABLE if claim.measure in claims.OUT_OF_REACH and not row["reason"] else NOT_RUN
    verdict = str(verdicts.judge(claim, row, verdicts.level(row["runs"], claim.seeds)))
    return UNDECIDED if row["interim"] and verdict in (REPRODUCED, RESERVATIONS) else verdict


def _correct(its: list[tuple[dict, Claim]], tests: int) -> None:
    """Holm's correction over one registered family, which has the same size whatever was run."""
    # An interim p does not help the others: it is not final.
    by_test = {verdicts.comparison_of(claim): np.nan if row["interim"] else row["p"] for row, claim in its}
    corrected = dict(zip(by_test, holm(list(by_test.values()), tests), strict=True))
    for row, claim in its:
        final = corrected[verdicts.comparison_of(claim)]
        row["p_holm"] = min(row["p"] * tests, 1.0) if row["interim"] else final
    if alike := [row for row, claim in its if claim.measure == "no_difference"]:
        for row, p in zip(alike, holm([row["p_level"] for row in alike]), strict=True):
            row["p_level_holm"] = p


def _row(claim: Claim, held: _Evidence) -> dict:
    """The claim, with what there is of evidence, not judged yet."""
    unknown = {**dict.fromkeys(NUMBERS, np.nan), "runs": 0, "reason": "", "short_budget": "", "interim": False}
    row = {**asdict(claim), "paths": claim.value, "claimed": claim.claimed, **unknown}
    if claim.measure == "teacher":
        return row | _first_counting_teacher(claim, held.runs)
    if claim.measure in claims.ACCURACY_MEASURES:
        return row | _from_ledger(claim, held.runs)
    if claim.measure == "map_similarity":
        return row | _from_explanations(claim, held)
    if claim.measure == "printed_imagenet":
        return row | printed.imagenet_gain(*claim.methods)
    if claim.measure == "latency_ratio":
        value, low, high = held.speedups.get(claim.k, (np.nan,) * 3)
        return row | {"value": value, "low": low, "high": high, "gap": value - claim.claimed}
    if claim.measure in COMPUTED:
        value = COMPUTED[claim.measure](claim.methods[0] if claim.methods else "", claim.k)
        return row | {"value": value, "gap": value - claim.claimed}
    return row


def _first_counting_teacher(claim: Claim, runs: Candidates) -> dict:
    if counting := runs.counting(claim):
        accuracy = float(counting[0].test_accuracy)
        return {"value": accuracy, "gap": accuracy - claim.claimed, "runs": 1}
    taught = set(teachers.with_students(runs.table).index)
    return _short(claim, [(run, lacks) for run, lacks in runs.of(claim) if run.Index in taught])


def _from_ledger(claim: Claim, runs: Candidates) -> dict:
    """Our estimate from the runs that count; without any, what is missing, and the figure of the runs there are."""
    column = "above_teacher" if claim.measure == "teacher_gap" else "test_accuracy"
    by_method = {method: by_seed(runs.counting(claim), method, column) for method in METHODS}
    values = _shared(by_method[method] for method in claim.methods)
    if not values.size:
        return _short(claim, [(run, lacks) for run, lacks in runs.of(claim) if run.method in claim.methods])
    if claim.measure == "direction":  # the paper gives no number: nothing of its luck comes in
        return _found(claim, values, (np.nan, 0))
    return _found(claim, values, verdicts.pooled_deviation([list(its.values()) for its in by_method.values()]))


def _shared(by_method: Iterable[dict[int, float]]) -> NDArray:
    """The values of each method, (methods, seeds), at the seeds that all of them have."""
    runs = list(by_method)
    seeds = [seed for seed in runs[0] if all(seed in its for its in runs)]
    return np.array([[its[seed] for seed in seeds] for its in runs])


def _found(claim: Claim, values: NDArray, spread: tuple[float | NDArray, int]) -> dict:
    """The numbers of a claim on students from its runs, (methods, seeds)."""
    runs = values.shape[1]
    measured = verdicts.measure(claim, list(values), claim.claimed, spread, verdicts.level(runs, claim.seeds))
    exact = sign_flips(claims.signed_sum(list(values))) if len(values) > 1 else np.nan
    found = {name: float(number) for name, number in measured.items()} | {"p_exact": exact}
    return {**found, "runs": runs, "best": float(values[0].max()), "interim": runs < claim.seeds}


def _from_explanations(claim: Claim, held: _Evidence) -> dict:
    """Rank correlation of the students' maps with the teacher's: first method minus second, paired by seed."""
    nothing = pd.DataFrame(columns=["run_id", "measure", "value"])
    table = nothing if held.explanations is None or held.explanations.empty else held.explanations
    measured = table[table["measure"] == "spearman"].drop_duplicates("run_id").set_index("run_id")["value"]
    similar = [
        run._replace(test_accuracy=measured[run.run_id]) for run in held.runs.counting(claim) if run.run_id in measured
    ]
    values = _shared(by_seed(similar, method) for method in claim.methods)
    if not values.size:
        return {"reason": "no explanation was measured of students that count"}
    return _found(claim, values, (np.nan, 0))


def _short(claim: Claim, candidates: list[tuple[pd.Series, str]]) -> dict:
    """The figure of the runs that do not settle it, at the largest budget that all methods of the claim have."""
    complete = [its for its in _by_budget(candidates) if set(claim.methods) <= {run.method for run, _lacks in its}]
    if not complete:
        missing = [method for method in claim.methods if method not in {run.method for run, _lacks in candidates}]
        return {"reason": f"no run of {' and '.join(missing)}" if missing else "no budget in common"}
    largest, lacks = zip(*complete[-1], strict=True)
    column = "above_teacher" if claim.measure == "teacher_gap" else "test_accuracy"
    means = [pd.Series(by_seed(largest, method, column), dtype=float).mean() for method in claim.methods]
    runs = min(sum(run.method == method for run in largest) for method in claim.methods)
    budget = f"{evidence.in_words(evidence.of_runs(pd.DataFrame(largest)))}, {largest[0].train_images:,.0f} images"
    return {
        "short": float(claims.signed_sum(means)),
        "short_budget": f"{budget}, {runs} run{'s' if runs > 1 else ''}",
        "reason": max(lacks, key=len) or "no seed that all methods have",
    }


def _by_budget(candidates: list[tuple[pd.Series, str]]) -> list[list[tuple[pd.Series, str]]]:
    """The measured runs of one budget and one pairing each, the largest budget last."""
    measured = [(run, lacks) for run, lacks in candidates if not np.isnan(run.test_accuracy)]
    found = []
    for budget in sorted({(run.train_images, run.epochs) for run, _lacks in measured}):
        its = [(run, lacks) for run, lacks in measured if (run.train_images, run.epochs) == budget]
        pairings = {run.pairing for run, _lacks in its if run.method not in UNPAIRED}
        for pairing in sorted(pairings) or [""]:
            found.append([one for one in its if one[0].method in UNPAIRED or one[0].pairing == pairing])
    return found


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
    """Of the gap between the means behind two numbers of the paper, if its runs deviate so from one another."""
    means, variances = [], []
    for claim in (one, other):
        above, wobble = best_of_normal(claim.paper_runs) if claim.statistic == "best" else (0, claim.paper_runs**-0.5)
        means.append(claim.claimed - above * deviation)
        variances.append((wobble * deviation) ** 2)
    return float(2 * stats.t.sf(abs(means[0] - means[1]) / sum(variances) ** 0.5, df))


def registered_comparisons(rows: pd.DataFrame, compare: Compare = unpaired) -> pd.DataFrame:
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


def written(value: float, unit: str) -> str:
    """A number of the scorecard with its unit, as tables show it; empty if there is none."""
    if np.isnan(value):
        return ""
    if unit in ("×", "ms"):
        return f"{round(value, 2):.10g} {unit}"
    return f"{value:{DIGITS[unit]}} {unit}".rstrip()


def claimed(row: Mapping) -> str:
    """The paper's number of a row with its unit, or the bound that its words imply; empty if they imply none."""
    bound = "at most " if row["measure"] == "explaining_over_training" else ""
    return bound + written(row["claimed"], row["unit"])
