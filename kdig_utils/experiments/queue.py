"""One queue of runs across all campaigns, ordered by what they settle: what the next quarter hour of a GPU trains.

A cut leaves whole seeds: all methods of a seed come before the next seed. Each run stands where it is first needed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import pandas as pd

from kdig_utils.experiments import brief, campaigns, profiling
from kdig_utils.experiments.reports import Report, TrainingDiverged
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.experiments.study import Study
from kdig_utils.method import models
from kdig_utils.method.precompute import SignalsNotFinished
from kdig_utils.method.spec import MAIN_METHODS, RunSpec

CAMPAIGN = "next"  # the queue's name in the ledger and on the command line
CARD_BYTES = 3.0e12  # a second, of an H100 in use; its data sheet says 3.35
CARD_VALUE_BYTES = 2  # bfloat16
TRAIN_IMAGES = 50_000
Scale = Callable[[RunSpec], RunSpec]
RunAll = Callable[..., list[str]]  # `Study.run_all`, or the same by other processes


class Group(NamedTuple):
    """Runs that belong together: one seed of one stage.

    Attributes:
        stage: what they are for.
        name: stage and seed.
        specs: the runs, without those of earlier groups.
    """

    stage: str
    name: str
    specs: tuple[RunSpec, ...]


def main_comparison(seed: int) -> list[RunSpec]:
    """The seven runs of a seed: `student`, and the others as the released scripts do it, then with their own maps."""
    taught = [method for method in MAIN_METHODS if method != "student"]
    specs = [RunSpec(method, seed=seed, pairing=pairing) for pairing in ("shuffled", "matched") for method in taught]
    return [RunSpec("student", seed=seed), *specs]


def groups(setting: brief.Setting = brief.DEFAULT) -> list[Group]:
    """The whole queue.

    Args:
        setting: that of the brief protocol (`brief.chosen`).
    """
    seen: set[RunSpec] = set()
    found = []
    for stage, part, specs in _stages(setting):
        new = tuple(spec for spec in specs if spec not in seen)
        seen.update(new)
        if new:
            found.append(Group(stage, f"{stage}{part}", new))
    return found


def _stages(setting: brief.Setting) -> Iterator[tuple[str, str, list[RunSpec]]]:
    def shortened(specs: Iterable[RunSpec]) -> list[RunSpec]:
        epochs, schedule = brief.EPOCHS, brief.SCHEDULE
        return [replace(spec, epochs=epochs, schedule=schedule, **setting._asdict()) for spec in specs]

    yield "choice of the brief setting", "", brief.candidates()
    for seed in range(brief.SEEDS):
        yield "brief: answers and reasons", f", seed {seed}", shortened(main_comparison(seed))
    for seed in range(campaigns.SEEDS):
        yield "answers and reasons", f", seed {seed}", main_comparison(seed)
    for seed, specs in _by_seed("alignment"):
        if seed < brief.SEEDS:
            yield "brief: controls of the map", f", seed {seed}", shortened(specs)
    for seed, specs in _by_seed("ablation", "pairing"):
        yield "all eight methods", f", seed {seed}", specs
    for k in reversed(models.REMOVABLE_BLOCKS):
        for seed, specs in _by_seed("compression", "compression-pairing"):
            yield "sizes", f", k = {k}, seed {seed}", [spec for spec in specs if spec.k == k]
    for name in ("alignment", "precision", "components"):
        for seed, specs in _by_seed(name):
            yield name, f", seed {seed}", specs
    for seed, specs in _by_seed("monte-carlo", "monte-carlo-pairing"):
        yield "resamples", f", draw {seed}", specs


def _by_seed(*names: str) -> list[tuple[int, list[RunSpec]]]:
    """The runs of these campaigns, seed by seed."""
    seed = attrgetter("seed")
    specs = sorted((spec for name in names for spec in campaigns.specs(name)), key=seed)
    return [(number, list(its)) for number, its in groupby(specs, key=seed)]


def train(study: Study, way: Way, deadline: float, report: Report, run_all: RunAll | None = None) -> None:
    """Train the next unfinished runs until `deadline` (`time.monotonic`).

    The setting of the brief protocol is chosen as soon as its candidates are done, before any other run. `run_all` may
    have them trained elsewhere (`cluster`); None is `Study.run_all`.

    Raises:
        TrainingDiverged: losses were not finite, now or earlier; all other runs were trained as far as time allowed.
    """
    with contextlib.suppress(TrainingDiverged):  # the whole queue holds the candidates too, and names them again
        _train(study, brief.candidates(), way, deadline, report, run_all)
    setting = brief.chosen(study.ledger.read(), study.scaled)
    report(f"the brief protocol: highest learning rate {setting.learning_rate:g}, batch {setting.batch_size}")
    _train(study, [spec for group in groups(setting) for spec in group.specs], way, deadline, report, run_all)


def _train(
    study: Study, specs: Iterable[RunSpec], way: Way, deadline: float, report: Report, run_all: RunAll | None
) -> None:
    try:
        (run_all or Study.run_all)(study, map(study.scaled, specs), CAMPAIGN, way, deadline, report)
    except SignalsNotFinished as error:
        report(str(error))


def images_of(spec: RunSpec) -> int:
    """Training images of a run on the full data set."""
    return round(spec.train_fraction * (TRAIN_IMAGES - spec.validation_images))


def is_measured(ledger: pd.DataFrame) -> bool:
    """Whether the ledger holds a student that a GPU trained, so that `speed` rests on a measurement."""
    return bool(len(_on_gpu(ledger)))


def _on_gpu(ledger: pd.DataFrame) -> pd.DataFrame:
    return ledger[(ledger["method"] != "teacher") & ~ledger["device"].fillna("CPU").str.startswith("CPU")]


def speed(ledger: pd.DataFrame) -> Callable[[RunSpec], float]:
    """Seconds an image of a run on a GPU: the median of the ledger's, in proportion to the bytes of a step by k.

    Without any, the floor: what a step moves if each operation reads and writes for itself, at `CARD_BYTES`.
    """
    batch, measured = RunSpec.batch_size, _on_gpu(ledger)
    moved = {
        k: profiling.step_bytes(models.student(k), batch, CARD_VALUE_BYTES, profiling.EAGER)
        for k in models.REMOVABLE_BLOCKS
    }
    counted = {k: size / batch / CARD_BYTES for k, size in moved.items()}
    images = measured["epochs"].astype(float) * measured["train_images"].astype(float)
    ratios = measured["seconds"].astype(float) / images / measured["k"].map(counted)
    ratio = float(ratios.median()) if len(ratios) else 1.0
    return lambda spec: ratio * counted[spec.k]
