"""The brief protocol: the paper's networks, images and losses in 20 epochs, with one cycle of the learning rate.

It makes breadth possible where the paper's 100 epochs are too long: the whole comparison, seed by seed, within minutes
of a GPU. It is a protocol of its own, registered before its runs (claims.yml) and never mixed with the paper's. One
setting is the default; three alternatives are registered beside it, and the choice between the four is made once, on
5,000 held-out training images, with a seed that no claim uses.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pandas as pd

from kdig_utils.experiments.ledger import student_spec
from kdig_utils.method.spec import RunSpec

NAME = "brief"
EPOCHS = 20
SCHEDULE = "one_cycle"
SEEDS = 5
CHOICE_SEED = 1000
CHOICE_IMAGES = 5000
METHODS = ("student", "kd", "ig", "kd_ig")
PAIRINGS = ("shuffled", "matched")  # the direct and the conceptual replication


class Setting(NamedTuple):
    """What the choice is about: the highest rate of the cycle, and the size of a batch."""

    learning_rate: float
    batch_size: int


DEFAULT = Setting(4e-3, 64)
ALTERNATIVES = (Setting(2e-3, 64), Setting(8e-3, 64), Setting(8e-3, 128))
SETTINGS = (DEFAULT, *ALTERNATIVES)


def spec(method: str, seed: int, setting: Setting = DEFAULT, pairing: str = "matched") -> RunSpec:
    """A run of the protocol."""
    return RunSpec(method, seed=seed, epochs=EPOCHS, schedule=SCHEDULE, pairing=pairing, **setting._asdict())


def candidates() -> list[RunSpec]:
    """The four runs between which the choice is made, the default first."""
    return [replace(spec("student", CHOICE_SEED, setting), validation_images=CHOICE_IMAGES) for setting in SETTINGS]


def specs(setting: Setting = DEFAULT) -> list[RunSpec]:
    """All runs that the protocol's claims need, seeds outermost; `student`, which has no teacher, once a seed."""
    return [
        spec(method, seed, setting, pairing=pairing)
        for seed in range(SEEDS)
        for method in METHODS
        for pairing in (("matched",) if method == "student" else PAIRINGS)
    ]


def includes(run: RunSpec) -> bool:
    """Whether a student's run was made in this protocol, those that make the choice included."""
    return (run.epochs, run.schedule) == (EPOCHS, SCHEDULE) and Setting(run.learning_rate, run.batch_size) in SETTINGS


def setting_of(run: RunSpec) -> Setting | None:
    """The setting of a run of the protocol; None for all other runs, and for those that made the choice."""
    return Setting(run.learning_rate, run.batch_size) if includes(run) and not run.validation_images else None


def chosen(ledger: pd.DataFrame, scaled: Callable[[RunSpec], RunSpec] = lambda spec: spec) -> Setting:
    """The setting of the protocol: the one in use; before that, the best on validation images of those that were tried.

    The first run of the protocol settles it for good: nothing that is tried later can change it. Where nothing was
    tried it is the default.

    Args:
        scaled: how the study of this ledger measures a spec, `Study.scaled`.
    """
    in_use = {_measure(scaled(spec("student", 0, setting))): setting for setting in SETTINGS}
    to_try = {scaled(run): setting for run, setting in zip(candidates(), SETTINGS, strict=True)}
    students = ledger[ledger["method"] != "teacher"]
    ended = pd.to_datetime(students["finished"], format="ISO8601", utc=True, errors="coerce")
    best, chosen_so_far = -1.0, DEFAULT
    for _index, row in students.loc[ended.sort_values(kind="stable").index].iterrows():
        run = student_spec(row)
        if not run.validation_images and (setting := in_use.get(_measure(run))):
            return setting
        setting = to_try.get(replace(run, data_md5=""))
        if setting and row["validation_accuracy"] > best:
            best, chosen_so_far = row["validation_accuracy"], setting
    return chosen_so_far


def _measure(run: RunSpec) -> tuple[object, ...]:
    return run.k, run.train_fraction, run.epochs, run.schedule, run.learning_rate, run.batch_size
