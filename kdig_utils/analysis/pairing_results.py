"""What the runs of the ledger say about pairings: which overlay, and whose answers, help a student.

Accuracies are in per cent, by seed; their differences in points, always taken seed by seed.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from kdig_utils.analysis.claims import SIGNIFICANCE
from kdig_utils.analysis.comparisons import equivalence, holm, mean_interval, paired
from kdig_utils.experiments import campaigns
from kdig_utils.experiments.ledger import student_spec
from kdig_utils.method.spec import RunSpec

NOT_RUN = "not run yet"
NO_OVERLAY = "none"
PRIMARY = "shuffled"  # the control of the primary question, and the first of the plan
# The plan of 2026-11-28, before any run of it: the controls of `matched`, each with its number of seeds.
CONTROLS = {PRIMARY: campaigns.PRIMARY_SEEDS, **dict.fromkeys((NO_OVERLAY, *campaigns.CONTROLS), campaigns.SEEDS)}
GAINS = ("runs", "mean", "low", "high", "gain", "gain_low", "gain_high", "p", "p_holm")
DIFFERENCES = ("pairs", "difference", "low", "high", "p", "level_p")
# What `matched` must be, against which controls, for each thing that the laboratory could find out.
READINGS: dict[str, dict[str, str]] = {
    "the own map is better than another image's": {PRIMARY: "above"},
    "another image's map does as well": {PRIMARY: "level"},
    "the map's content matters, and so does its place": dict.fromkeys(CONTROLS, "above"),
    "content matters, and its place does not": {PRIMARY: "above", "index-matched": "level"},
    "edges do as well, and no teacher is needed": {"edges": "level"},
    "dimming does as well, and no map is needed": {"black": "level"},
    "nothing that is blended in makes a difference": dict.fromkeys(CONTROLS, "level"),
}


def with_overlays(ledger: pd.DataFrame) -> dict[str, pd.Series]:
    """Test accuracies of `student`, then of `ig` with its own map and under each control of the plan."""
    overlays = ("matched", *(name for name in CONTROLS if name != NO_OVERLAY))
    specs = {NO_OVERLAY: RunSpec("student"), **{name: RunSpec("ig", pairing=name) for name in overlays}}
    return _accuracies_of(ledger, specs)


def with_answers(ledger: pd.DataFrame, alpha: float, temperature: float) -> dict[str, pd.Series]:
    """Test accuracies of `kd` with stored, shuffled and online answers, after those of `student`."""
    kd = RunSpec("kd", alpha=alpha, temperature=temperature)
    shuffled, online = replace(kd, pairing="shuffled"), replace(kd, answers="online")
    specs = {"student": RunSpec("student"), "stored": kd, "shuffled": shuffled, "online": online}
    return _accuracies_of(ledger, specs)


def _accuracies_of(ledger: pd.DataFrame, specs: dict[str, RunSpec]) -> dict[str, pd.Series]:
    """By the campaigns' seeds, whichever trained them; all of the teacher that most of these runs have."""
    seeds = range(campaigns.PRIMARY_SEEDS)
    wanted = {replace(spec, seed=seed): name for name, spec in specs.items() for seed in seeds}
    rows, names = campaigns.rows_of(ledger, wanted), {run.run_id: name for run, name in wanted.items()}
    rows["name"] = [names[student_spec(row).bare_id] for _index, row in rows.iterrows()]
    if (twice := rows.duplicated(["name", "seed"])).any():
        row = rows[twice].iloc[0]
        raise ValueError(f"{row['name']} has seed {row['seed']} twice: choose the rows of one data set")
    by_seed = rows.set_index("seed").sort_index()
    return {name: by_seed.loc[by_seed["name"] == name, "test_accuracy"].astype(float).rename(name) for name in specs}


def gains(accuracies: dict[str, pd.Series]) -> pd.DataFrame:
    """Means, and what each gains over the first, a row each.

    Returns:
        Columns runs, mean with its 95 % interval low to high (per cent), gain over the first with its interval
        (points), p of the paired t-test and its Holm correction. NaN where there are fewer than two runs, or pairs.
    """
    baseline, *_others = accuracies.values()
    rows = {}
    for name, values in accuracies.items():
        rows[name] = dict(zip(GAINS, (len(values), *mean_interval(values)), strict=False))
        its, those = _at_shared_seeds(values, baseline)
        if values is not baseline and len(its) > 1:
            gain = paired(its, those)
            rows[name] |= {"gain": gain.difference, "gain_low": gain.low, "gain_high": gain.high, "p": gain.p}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(GAINS)).astype(float)
    return table.astype({"runs": int}).assign(p_holm=[np.nan, *holm(table["p"].iloc[1:])])


def differences(
    accuracies: dict[str, pd.Series], first: str, others: Mapping[str, int], margin: float, alone: bool = False
) -> pd.DataFrame:
    """The first minus each of the others, and whether they are level: two families of tests, judged by `judged`.

    That one gain is significant and another is not says nothing about their difference (Gelman & Stern 2006,
    doi 10.1198/000313006X152649): it takes a test of its own. Nor does a large p say that two are level: that takes
    a test of equivalence, with a margin in points that was fixed before looking.

    Args:
        others: with their planned seeds: no others count, and nothing is judged before all of them are there.
        alone: whether the first of the others is the primary question.

    Returns:
        Columns pairs, difference with its 95 % interval low to high (points), p of the paired t-test, level_p of the
        paired test of equivalence, and what `judged` makes of them: p_holm, level_p_holm and finding.
    """
    table = pd.DataFrame(index=list(others), columns=list(DIFFERENCES), dtype=float)
    for name, seeds in others.items():
        one, other = _at_shared_seeds(accuracies[first], accuracies[name].loc[lambda its, n=seeds: its.index < n])
        table.loc[name, "pairs"] = len(one)
        if len(one) > 1:
            found = paired(one, other)._asdict() | {"level_p": equivalence(one, other, margin, by_pairs=True).p}
            table.loc[name, list(DIFFERENCES[1:])] = [found[column] for column in DIFFERENCES[1:]]
    whole = table["pairs"] >= pd.Series(others)
    p, level_p = (table[column].where(whole).to_numpy() for column in ("p", "level_p"))
    corrected = zip(("p_holm", "level_p_holm", "finding"), judged(table["difference"], p, level_p, alone), strict=True)
    return table.astype({"pairs": int}).assign(**dict(corrected))


def judged(difference: ArrayLike, p: NDArray, level_p: NDArray, alone: bool) -> tuple[NDArray, NDArray, NDArray]:
    """Corrected p, corrected level_p and finding, (tests, ...): above, below, level, undecided, or without p not run.

    Holm's correction over all tests, made or not. If the first stands `alone`, as the primary question, it is not
    corrected, and the others are among themselves; and none of them is above or below unless the first is one of the
    two. So a wrong above or below, anywhere, has a chance of 5 % at most; a wrong level has it twice, in the first
    test and in the others.
    """
    first = int(alone)
    p_holm, level_p_holm = (np.concatenate([its[:first], holm(its[first:])]) for its in (p, level_p))
    p_holm = np.maximum(p_holm, p[:1]) if alone else p_holm
    shown, above = p_holm < SIGNIFICANCE, np.asarray(difference) > 0
    conditions = [np.isnan(p_holm), shown & above, shown, level_p_holm < SIGNIFICANCE]
    return p_holm, level_p_holm, np.select(conditions, [NOT_RUN, "above", "below", "level"], "undecided")


def _at_shared_seeds(first: pd.Series, second: pd.Series) -> tuple[pd.Series, pd.Series]:
    shared = first.index.intersection(second.index)
    return first[shared], second[shared]


def readings(controls: pd.DataFrame) -> dict[str, str]:
    """For each of `READINGS` whether matched minus `CONTROLS` makes it `supported`, `not supported` or `not run yet`.

    Not supported is not refuted: the difference that decides may be undecided.
    """
    supports = {}
    for reading, wanted in READINGS.items():
        found = dict(controls["finding"][list(wanted)])
        supports[reading] = "supported" if found == wanted else "not supported"
        if NOT_RUN in found.values():
            supports[reading] = NOT_RUN
    return supports
