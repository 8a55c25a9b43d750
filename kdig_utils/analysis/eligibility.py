"""Which runs of the ledger count as a test of a claim, and what the others lack."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from kdig_utils.analysis.claims import Claim, claims, teacher_goal
from kdig_utils.experiments import brief, evidence
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.method.spec import METHODS, RunSpec


class Candidates:
    """The runs of a ledger, as `prepared` has them, by the claims that they could test; the oldest first."""

    def __init__(self, ledger: pd.DataFrame) -> None:
        self.table = prepared(ledger)
        self._runs = list(self.table.sort_values("date", kind="stable").itertuples())
        self._known: dict[tuple, list[tuple[pd.Series, str]]] = {}  # many claims rest on the same runs

    def of(self, claim: Claim) -> list[tuple[pd.Series, str]]:
        """The runs of the claim's size and protocol, whatever their method, each with what it lacks to count."""
        teacher = claim.measure == "teacher"
        key = (teacher and claim.name, claim.k, claim.seeds, claim.registered, claim.protocol, str(claim.settings))
        if key not in self._known:
            alike = [run for run in self._runs if teacher or (run.k, run.protocol) == (claim.k, claim.protocol)]
            methods = ("teacher",) if teacher else METHODS
            self._known[key] = [(run, shortfall(run, claim)) for run in alike if run.method in methods]
        return self._known[key]

    def counting(self, claim: Claim) -> list[pd.Series]:
        """The runs of the claim's size and protocol that count, whatever their method."""
        return [run for run, lacks in self.of(claim) if not lacks]


def prepared(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger with what decides whether a run counts.

    Returns:
        Its columns; those of `with_teacher_accuracy`; other_settings and other_than_brief, in words what a run has
        that is not as the paper's and as the brief protocol's, and protocol, the name of its own, empty for all but
        those of the brief one and those near it: claims on the paper see neither; date; and first_teacher, whether a
        student has the first teacher, by date, that is good enough: a second one cannot take back a result.
    """
    table, setting = with_teacher_accuracy(ledger), brief.chosen(ledger)
    specs = [spec_of(row) for _index, row in table.iterrows()]
    students = [spec if isinstance(spec, RunSpec) else None for spec in specs]
    other = [evidence.unlike(spec, brief.spec(spec.method, 0, setting)) if spec else "a teacher" for spec in students]
    near = ["another brief run" if spec and brief.includes(spec) else "" for spec in students]
    table = table.assign(
        other_settings=[evidence.unlike(spec) if spec else "" for spec in students],
        other_than_brief=other,
        protocol=[named if lacks else brief.NAME for lacks, named in zip(other, near, strict=True)],
        date=pd.to_datetime(table["finished"], format="ISO8601", utc=True, errors="coerce"),
    )
    return table.assign(first_teacher=table["teacher_sha256"].isin(_first_teacher(table)))


def with_teacher_accuracy(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger with teacher_accuracy, in per cent, and above_teacher, in points; NaN without the run's teacher."""
    measured = ledger[ledger["method"] == "teacher"].dropna(subset="test_accuracy").drop_duplicates("weights_sha256")
    accuracy = measured.set_index("weights_sha256")["test_accuracy"]
    found = ledger["teacher_sha256"].map(accuracy).astype(float)
    return ledger.assign(teacher_accuracy=found, above_teacher=ledger["test_accuracy"].astype(float) - found)


def _first_teacher(table: pd.DataFrame) -> pd.Series:
    settings = next(claim.settings for claim in claims() if "teacher_accuracy" in claim.settings)
    good = (table["method"] == "teacher") & (table["test_accuracy"].astype(float) >= teacher_goal())
    for name in ("test_images", "data_md5"):
        good &= table[name] == settings[name]
    enough = table[good & table["date"].notna() & table["weights_sha256"].ne("")]
    return enough.sort_values(["date", "weights_sha256"])["weights_sha256"].head(1)


def shortfall(run: pd.Series, claim: Claim) -> str:
    """What a row of `prepared` lacks to count as a test of `claim`, in words; empty if it counts."""
    settings = claim.settings
    lacks = [
        f"{getattr(run, name):,.0f} {words} in place of {settings[name]:,}"
        for name, words in (("train_images", "training images"), ("test_images", "test images"))
        if getattr(run, name) != settings[name]
    ]
    lacks += [
        f"{words} {getattr(run, name)} in place of {settings[name]}"
        for name, words in (("train_fraction", "a share of"), ("data_md5", "images with the MD5"))
        if name in settings and getattr(run, name) != settings[name]
    ]
    lacks += [] if np.isfinite(run.test_accuracy) else ["no test accuracy"]
    lacks += _teacher_lacks(run, claim) if run.method == "teacher" else _student_lacks(run, claim)
    if not lacks and not run.date > pd.Timestamp(claim.registered):
        lacks.append(f"it ended {run.finished or 'at no known time'}, the claim was registered {claim.registered}")
    return "; ".join(lacks)


def _teacher_lacks(run: pd.Series, claim: Claim) -> list[str]:
    # Reaching the number with less work is enough; missing it counts only at the full budget.
    if "epochs" not in claim.settings:
        return ["a teacher"]
    if run.test_accuracy >= claim.claimed - claim.tolerance or run.epochs >= claim.settings["epochs"]:
        return []
    return [f"{run.epochs:.0f} of {claim.settings['epochs']} epochs"]


def _student_lacks(run: pd.Series, claim: Claim) -> list[str]:
    settings = claim.settings
    if "pairing" not in settings:
        return ["a student"]
    other = run.other_than_brief if claim.protocol == brief.NAME else run.other_settings
    lacks = [other] if other else []
    if run.seed not in range(claim.seeds):
        lacks.append(f"seed {run.seed}: the claim is judged on seeds 0 to {claim.seeds - 1}")
    if run.method == "student":
        return lacks
    if run.pairing != settings["pairing"]:
        lacks.append(f"the pairing {run.pairing} in place of {settings['pairing']}")
    if not run.teacher_accuracy >= settings["teacher_accuracy"]:
        found = f"of {run.teacher_accuracy:.1f} %" if run.teacher_accuracy > 0 else "that is not in the ledger"
        lacks.append(f"a teacher {found} in place of one of {settings['teacher_accuracy']} %")
    elif not run.first_teacher:
        lacks.append("another teacher than the first that is good enough")
    return lacks


def by_seed(runs: Iterable[pd.Series], method: str, column: str = "test_accuracy") -> dict[int, float]:
    """A column of a method's runs by seed: of several runs with one seed the first that has it."""
    found: dict[int, float] = {}
    for run in runs:
        if run.method == method and not np.isnan(value := float(getattr(run, column))):
            found.setdefault(run.seed, value)
    return dict(sorted(found.items()))
