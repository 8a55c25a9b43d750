"""Campaigns: the lists of runs behind the paper's tables, and the packs in which finished runs travel.

A campaign is a list of specs. Its rows are found in the ledger by their specs, whichever campaign trained them first:
the seeds that two campaigns share are trained once.
"""

import dataclasses
from collections.abc import Callable, Iterable

import pandas as pd

from kdig_utils.experiments.ledger import of_one_teacher, spec_of
from kdig_utils.method import models
from kdig_utils.method.pairings import PAIRINGS
from kdig_utils.method.spec import MAIN_METHODS, METHODS, RunSpec

SEEDS = 10
COMPRESSION_SEEDS = 5
RESAMPLES = 60
RESAMPLED_METHODS = ("student", "kd", "kd_ig", "kd_ig_at")
COMPONENT_SEEDS = 3
COMPONENT_DRAWS = 12
PRECISION_SEEDS = 3


def ablation() -> list[RunSpec]:
    """Eight methods, ten seeds, k = 5: the paper's settings, each map with its own image."""
    return [RunSpec(method, seed=seed) for seed in range(SEEDS) for method in METHODS]


def pairing() -> list[RunSpec]:
    """The same with shuffled signals, as the released scripts have them.

    `student` uses no signals: its runs are those of the ablation.
    """
    return _shuffled(ablation())


def _shuffled(specs: list[RunSpec]) -> list[RunSpec]:
    return [dataclasses.replace(spec, pairing="shuffled") for spec in specs if spec.uses_teacher]


def compression() -> list[RunSpec]:
    """Eight sizes of the student, four methods, five seeds, each map with its own image."""
    return [
        RunSpec(method, k=k, seed=seed)
        for seed in range(COMPRESSION_SEEDS)
        for k in models.REMOVABLE_BLOCKS
        for method in MAIN_METHODS
    ]


def compression_pairing() -> list[RunSpec]:
    """The sizes with shuffled signals, as the released scripts have them."""
    return _shuffled(compression())


def monte_carlo() -> list[RunSpec]:
    """Four methods on sixty stratified draws of 80 % of the training images."""
    return [RunSpec(method, seed=seed, train_fraction=0.8) for seed in range(RESAMPLES) for method in RESAMPLED_METHODS]


def monte_carlo_pairing() -> list[RunSpec]:
    """The sixty draws with shuffled signals, as the released scripts have them."""
    return _shuffled(monte_carlo())


def alignment() -> list[RunSpec]:
    """The controls of the alignment laboratory, k = 5: what is blended in, and what the teacher is asked about.

    `matched`, `shuffled` and no overlay at all are in the ablation and in pairing.
    """
    blended = [
        RunSpec(method, seed=seed, pairing=control)
        for seed in range(SEEDS)
        for method in ("ig", "kd_ig")
        for control in PAIRINGS
        if control not in ("matched", "shuffled")
    ]
    asked = [RunSpec("kd", seed=seed, answers="online") for seed in range(SEEDS)]
    return sorted(blended + asked, key=lambda spec: spec.seed)


def components() -> list[RunSpec]:
    """Each of twelve draws of images trained with each of three seeds: which of the two moves the accuracy."""
    return [
        RunSpec("kd_ig", seed=seed, sample_seed=draw, train_fraction=0.8)
        for seed in range(COMPONENT_SEEDS)
        for draw in range(COMPONENT_DRAWS)
    ]


def answers(alpha: float, temperature: float) -> list[RunSpec]:
    """Stored, shuffled and online answers where distillation is heard: at the setting that validation prefers."""
    ways = ({"pairing": "matched"}, {"pairing": "shuffled"}, {"answers": "online"})
    return [
        RunSpec("kd", seed=seed, alpha=alpha, temperature=temperature, **way) for seed in range(SEEDS) for way in ways
    ]


def precision() -> list[RunSpec]:
    """The control of the engine: the first seeds of two methods of the ablation again, in float32."""
    return [
        RunSpec(method, seed=seed, precision="float32")
        for seed in range(PRECISION_SEEDS)
        for method in ("student", "kd_ig")
    ]


CAMPAIGNS: dict[str, Callable[[], list[RunSpec]]] = {
    "ablation": ablation,
    "pairing": pairing,
    "compression": compression,
    "compression-pairing": compression_pairing,
    "monte-carlo": monte_carlo,
    "monte-carlo-pairing": monte_carlo_pairing,
    "alignment": alignment,
    "components": components,
    "precision": precision,
}


def specs(name: str) -> list[RunSpec]:
    """The runs of a campaign, seeds outermost, so that a part of it is balanced.

    Raises:
        ValueError: unknown campaign.
    """
    if name not in CAMPAIGNS:
        raise ValueError(f"unknown campaign {name!r}: choose one of {', '.join(CAMPAIGNS)}")
    return CAMPAIGNS[name]()


def rows(ledger: pd.DataFrame, name: str) -> pd.DataFrame:
    """The ledger rows that belong to a campaign: those with its settings, of the teacher that most of these have."""
    return rows_of(ledger, specs(name))


def rows_of(ledger: pd.DataFrame, wanted: Iterable[RunSpec]) -> pd.DataFrame:
    """The rows with the settings of these specs, of the teacher that most of them have, whatever data they had."""
    run_ids = {spec.run_id for spec in wanted}
    belongs = [spec_of(row).bare_id in run_ids for _index, row in ledger.iterrows()]
    found = ledger[pd.Series(belongs, index=ledger.index, dtype=bool)]
    return of_one_teacher(found).reset_index(drop=True)


def main_runs(ledger: pd.DataFrame) -> pd.DataFrame:
    """The students that stand for the study: the paper's settings at k = 5, one number of epochs and one teacher.

    Whichever campaign trained them. Of several numbers of epochs the one at which most of `MAIN_METHODS` were run, and
    of those the largest; of several teachers the one with the most students.
    """
    students = ledger[ledger["method"] != "teacher"]
    belongs = [_has_main_settings(spec_of(row)) for _index, row in students.iterrows()]
    alike = students[pd.Series(belongs, index=students.index, dtype=bool)]
    budgets = (of_one_teacher(runs) for _epochs, runs in alike.groupby("epochs"))
    return max(budgets, key=_completeness, default=alike).reset_index(drop=True)


def _has_main_settings(spec: RunSpec) -> bool:
    return spec.setting("epochs", "n_steps") == RunSpec(spec.method).setting("epochs", "n_steps")


def _completeness(runs: pd.DataFrame) -> tuple[int, int]:
    return len(set(runs["method"]) & set(MAIN_METHODS)), int(runs["epochs"].max())


def bare_run_ids(ledger: pd.DataFrame) -> set[str]:
    """The identities that the ledger's students would have without teacher and data: those of a campaign's specs."""
    return {spec_of(row).bare_id for _index, row in ledger.iterrows()}


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
