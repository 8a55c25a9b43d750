"""Campaigns: the lists of runs behind the paper's tables, and their rows in a ledger.

Rows are found by their specs, whichever campaign trained them first: the seeds that two campaigns share are trained
once.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pandas as pd

from kdig_utils.experiments.ledger import of_one_teacher, spec_of
from kdig_utils.method import models
from kdig_utils.method.checks import check_choice
from kdig_utils.method.spec import MAIN_METHODS, METHODS, RunSpec, TeacherSpec

SEEDS = 10
COMPRESSION_SEEDS = 5
RESAMPLES = 60
RESAMPLED_METHODS = ("student", "kd", "kd_ig", "kd_ig_at")
COMPONENT_SEEDS = 6  # as many as draws: three seeds would leave the seed two degrees of freedom (chapter 09)
COMPONENT_DRAWS = 6
PRECISION_SEEDS = 3
PRIMARY_SEEDS = 20  # of the alignment laboratory's primary question: the own map against another image's
CONTROLS = ("index-matched", "edges", "black")  # of its other questions, beside no overlay


def grid(seeds: int, **values: Sequence) -> list[RunSpec]:
    """Every seed with every combination of these values of a spec's fields; the last named changes fastest."""
    combinations = itertools.product(range(seeds), *values.values())
    return [RunSpec(seed=seed, **dict(zip(values, chosen, strict=True))) for seed, *chosen in combinations]


def shuffled(specs: Iterable[RunSpec]) -> list[RunSpec]:
    """These runs with shuffled signals, as the released scripts have them; `student` uses none and is left out."""
    return [dataclasses.replace(spec, pairing="shuffled") for spec in specs if spec.uses_teacher]


def by_seed(*lists: list[RunSpec]) -> list[RunSpec]:
    """Several lists as one, seeds outermost."""
    return sorted(itertools.chain(*lists), key=lambda spec: spec.seed)


def answers(alpha: float, temperature: float) -> list[RunSpec]:
    """Stored, shuffled and online answers where distillation is heard: at the setting that validation prefers."""
    setting: dict[str, Sequence] = {"method": ["kd"], "alpha": [alpha], "temperature": [temperature]}
    return by_seed(grid(SEEDS, **setting, pairing=["matched", "shuffled"]), grid(SEEDS, **setting, answers=["online"]))


# Eight methods at the paper's settings, each map with its own image.
ablation = partial(grid, SEEDS, method=METHODS)
# Eight sizes of the student.
compression = partial(grid, COMPRESSION_SEEDS, k=models.REMOVABLE_BLOCKS, method=MAIN_METHODS)
# Stratified draws of 80 % of the training images.
monte_carlo = partial(grid, RESAMPLES, method=RESAMPLED_METHODS, train_fraction=[0.8])

CAMPAIGNS: dict[str, Callable[[], list[RunSpec]]] = {
    "ablation": ablation,
    "pairing": lambda: shuffled(ablation()),
    "compression": compression,
    "compression-pairing": lambda: shuffled(compression()),
    "monte-carlo": monte_carlo,
    "monte-carlo-pairing": lambda: shuffled(monte_carlo()),
    # The plan of the alignment laboratory: its primary question, then its controls and the online answers.
    "alignment": lambda: by_seed(
        grid(PRIMARY_SEEDS, method=["ig"], pairing=["matched", "shuffled"]),
        [*grid(SEEDS, method=["student"]), *grid(SEEDS, method=["ig"], pairing=CONTROLS)],
        grid(SEEDS, method=["kd"], answers=["online"]),
    ),
    # Each draw of images with each seed: which of the two moves the accuracy.
    "components": lambda: grid(
        COMPONENT_SEEDS, method=["kd_ig"], sample_seed=range(COMPONENT_DRAWS), train_fraction=[0.8]
    ),
    # The control of the arithmetic: the first seeds of two methods of the ablation again, in float32.
    "precision": lambda: grid(PRECISION_SEEDS, method=["student", "kd_ig"], precision=["float32"]),
}


def specs(name: str) -> list[RunSpec]:
    """The runs of a campaign, seeds outermost, so that a part of it is balanced.

    Raises:
        ValueError: unknown campaign.
    """
    check_choice("campaign", name, CAMPAIGNS)
    return CAMPAIGNS[name]()


def rows(ledger: pd.DataFrame, name: str) -> pd.DataFrame:
    """The ledger rows that belong to a campaign: those with its settings, of the teacher that most of these have."""
    return rows_of(ledger, specs(name))


def rows_of(ledger: pd.DataFrame, wanted: Iterable[RunSpec]) -> pd.DataFrame:
    """The rows with the settings of these specs, of the teacher that most of them have, whatever data they had."""
    run_ids = {spec.run_id for spec in wanted}
    return of_one_teacher(_those(ledger, lambda spec: spec.bare_id in run_ids)).reset_index(drop=True)


def main_runs(ledger: pd.DataFrame) -> pd.DataFrame:
    """The students that stand for the study: the paper's settings at k = 5, one number of epochs and one teacher.

    Whichever campaign trained them. Of several numbers of epochs the one at which most of `MAIN_METHODS` were run, and
    of those the largest; of several teachers the one with the most students.
    """

    def is_main(spec: RunSpec | TeacherSpec) -> bool:
        return spec.setting("epochs", "n_steps") == RunSpec(spec.method).setting("epochs", "n_steps")

    def completeness(runs: pd.DataFrame) -> tuple[int, int]:
        return len(set(runs["method"]) & set(MAIN_METHODS)), int(runs["epochs"].max())

    alike = _those(ledger[ledger["method"] != "teacher"], is_main)
    budgets = (of_one_teacher(runs) for _epochs, runs in alike.groupby("epochs"))
    return max(budgets, key=completeness, default=alike).reset_index(drop=True)


def _those(table: pd.DataFrame, holds: Callable[[RunSpec | TeacherSpec], bool]) -> pd.DataFrame:
    chosen = [holds(spec_of(row)) for _index, row in table.iterrows()]
    return table[pd.Series(chosen, index=table.index, dtype=bool)]


def progress(ledger: pd.DataFrame) -> pd.DataFrame:
    """What is done of each campaign: columns campaign, runs, done, left, hours (of the runs left, at the pace so far).

    A run takes what the campaign's own runs took, or those of the ledger with as many epochs, each on its device;
    `hours` is NaN where there is no such run yet.
    """
    lines = []
    for name in CAMPAIGNS:
        wanted, done = specs(name), rows(ledger, name)
        alike = done if len(done) else ledger[ledger["epochs"] == wanted[0].epochs].query("method != 'teacher'")
        left = len(wanted) - done["run_id"].nunique()
        hours = 0.0 if not left else left * alike["seconds"].astype(float).mean() / 3600
        lines.append({"campaign": name, "runs": len(wanted), "done": len(wanted) - left, "left": left, "hours": hours})
    return pd.DataFrame(lines)
