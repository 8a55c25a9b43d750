"""What the runs of the ledger say about pairings: which overlay, and whose answers, help a student.

Accuracies are in per cent, by seed; their differences in points, always taken seed by seed.
"""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd

from kdig_utils.analysis.claims import SIGNIFICANCE
from kdig_utils.analysis.comparisons import equivalence, holm, mean_interval, paired
from kdig_utils.experiments import campaigns
from kdig_utils.experiments.ledger import student_spec
from kdig_utils.method.pairings import PAIRINGS
from kdig_utils.method.spec import RunSpec

NOT_RUN = "not run yet"
NO_OVERLAY = "none"
WITHOUT_OVERLAY = {"ig": "student", "kd_ig": "kd"}  # the same method without overlay
CONTROLS = (NO_OVERLAY, *(name for name in PAIRINGS if name != "matched"))
GAINS = ("runs", "mean", "low", "high", "gain", "gain_low", "gain_high", "p", "p_holm")
DIFFERENCES = ("pairs", "difference", "low", "high", "p", "p_holm", "level_p", "level_p_holm")
# What `matched` must be, against which controls, for each thing that the laboratory could find out.
READINGS: dict[str, dict[str, str]] = {
    "the map's content matters, and so does its place": dict.fromkeys(CONTROLS, "above"),
    "content matters, and its place does not": {"shuffled": "above", "index-matched": "level"},
    "form is enough, and no teacher is needed": {NO_OVERLAY: "above", "edges": "level"},
    "dimming is enough, without any map": {NO_OVERLAY: "above", "black": "level"},
    "whatever is blended in, it helps alike": {**dict.fromkeys(CONTROLS, "level"), NO_OVERLAY: "above"},
    "nothing that is blended in makes a difference": dict.fromkeys(CONTROLS, "level"),
}


def with_overlays(ledger: pd.DataFrame, method: str) -> dict[str, pd.Series]:
    """Test accuracies of `ig` or `kd_ig` under each pairing, after those of the same method without overlay."""
    specs = {NO_OVERLAY: RunSpec(WITHOUT_OVERLAY[method]), **{name: RunSpec(method, pairing=name) for name in PAIRINGS}}
    return _accuracies_of(ledger, specs)


def with_answers(ledger: pd.DataFrame, alpha: float, temperature: float) -> dict[str, pd.Series]:
    """Test accuracies of `kd` with stored, shuffled and online answers, after those of `student`."""
    kd = RunSpec("kd", alpha=alpha, temperature=temperature)
    shuffled, online = replace(kd, pairing="shuffled"), replace(kd, answers="online")
    specs = {"student": RunSpec("student"), "stored": kd, "shuffled": shuffled, "online": online}
    return _accuracies_of(ledger, specs)


def _accuracies_of(ledger: pd.DataFrame, specs: dict[str, RunSpec]) -> dict[str, pd.Series]:
    """By the campaigns' seeds, whichever campaign trained them; all of the teacher that most of these runs have."""
    wanted = {replace(spec, seed=seed): name for name, spec in specs.items() for seed in range(campaigns.SEEDS)}
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


def differences(accuracies: dict[str, pd.Series], first: str, others: Iterable[str], margin: float) -> pd.DataFrame:
    """The first minus each of the others, and whether they are level: two families of tests.

    That one gain is significant and another is not says nothing about their difference (Gelman & Stern 2006,
    doi 10.1198/000313006X152649): it takes a test of its own. Nor does a large p say that two are level: that takes
    a test of equivalence, with a margin in points that was fixed before looking.

    Returns:
        Columns pairs, difference with its 95 % interval low to high (points), p of the paired t-test, level_p of the
        paired test of equivalence, both with Holm's correction for all others, run or not, and finding: `above`,
        `below`, `level`, `undecided`, or `not run yet` with fewer than two pairs.
    """
    rows = {}
    for name in others:
        one, other = _at_shared_seeds(accuracies[first], accuracies[name])
        rows[name] = {"pairs": len(one)}
        if len(one) > 1:
            level = equivalence(one, other, margin, by_pairs=True)
            rows[name] |= paired(one, other)._asdict() | {"level_p": level.p}
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list(DIFFERENCES)).astype(float)
    table = table.astype({"pairs": int}).assign(p_holm=holm(table["p"]), level_p_holm=holm(table["level_p"]))
    shown, above = table["p_holm"] < SIGNIFICANCE, table["difference"] > 0
    conditions = [table["p_holm"].isna(), shown & above, shown, table["level_p_holm"] < SIGNIFICANCE]
    return table.assign(finding=np.select(conditions, [NOT_RUN, "above", "below", "level"], "undecided"))


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
