"""One queue of runs across all campaigns, ordered by what they settle: what the next quarter hour of a GPU trains.

A cut leaves whole seeds: all methods of a seed come before the next seed. Each run stands where it is first needed.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import pandas as pd

from kdig_utils import artifacts, brief, campaigns, models, paths, profiling, teachers
from kdig_utils.claims import ACCURACY_MEASURES, Claim, claims
from kdig_utils.engine import Report, TrainingDiverged, Way
from kdig_utils.runs import MAIN_METHODS, RunSpec
from kdig_utils.signals import SignalsNotFinished
from kdig_utils.study import Study

CAMPAIGN = "next"  # the queue's name in the ledger and on the command line
CARD_BYTES = 3.0e12  # a second, of an H100 in use; its data sheet says 3.35
CARD_VALUE_BYTES = 2  # bfloat16
TRAIN_IMAGES = 50_000
Scale = Callable[[RunSpec], RunSpec]


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


def main_comparison(seed: int, protocol: Callable[..., RunSpec] = RunSpec) -> list[RunSpec]:
    """The seven runs of a seed: `student`, and the others as the released scripts do it, then with their own maps."""
    taught = [method for method in MAIN_METHODS if method != "student"]
    specs = [protocol(method, seed=seed, pairing=pairing) for pairing in ("shuffled", "matched") for method in taught]
    return [protocol("student", seed=seed), *specs]


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
    def short(method: str, seed: int, **changed: object) -> RunSpec:
        return brief.spec(method, seed, setting, **changed)

    yield "choice of the brief setting", "", brief.candidates()
    for seed in range(brief.SEEDS):
        yield "brief: answers and reasons", f", seed {seed}", main_comparison(seed, short)
    for seed in range(campaigns.SEEDS):
        yield "answers and reasons", f", seed {seed}", main_comparison(seed)
    for seed, specs in _by_seed(campaigns.alignment()):
        if seed < brief.SEEDS:
            yield "brief: controls of the map", f", seed {seed}", [_shortened(spec, setting) for spec in specs]
    for seed, specs in _by_seed([*campaigns.ablation(), *campaigns.pairing()]):
        yield "all eight methods", f", seed {seed}", specs
    for k in reversed(models.REMOVABLE_BLOCKS):
        sizes = [spec for spec in (*campaigns.compression(), *campaigns.compression_pairing()) if spec.k == k]
        for seed, specs in _by_seed(sizes):
            yield "sizes", f", k = {k}, seed {seed}", specs
    for name in ("alignment", "precision", "components"):
        for seed, specs in _by_seed(campaigns.specs(name)):
            yield name, f", seed {seed}", specs
    for seed, specs in _by_seed([*campaigns.monte_carlo(), *campaigns.monte_carlo_pairing()]):
        yield "resamples", f", draw {seed}", specs


def _by_seed(specs: Iterable[RunSpec]) -> list[tuple[int, list[RunSpec]]]:
    ordered = sorted(specs, key=lambda spec: spec.seed)
    return [(seed, [spec for spec in ordered if spec.seed == seed]) for seed in dict.fromkeys(s.seed for s in ordered)]


def _shortened(spec: RunSpec, setting: brief.Setting) -> RunSpec:
    return brief.spec(spec.method, spec.seed, setting, pairing=spec.pairing, answers=spec.answers)


def train(study: Study, way: Way | None, deadline: float, report: Report) -> None:
    """Train the next unfinished runs until `deadline` (`time.monotonic`).

    The setting of the brief protocol is chosen as soon as its candidates are done, before any other run. A run that
    diverges is noted in the folder `diverged` of the workspace, and passed over from then on.
    """
    _train(study, brief.candidates(), way, deadline, report)
    setting = brief.chosen(study.ledger.read(), study.scaled)
    report(f"the brief protocol: highest learning rate {setting.learning_rate:g}, batch {setting.batch_size}")
    _train(study, [spec for group in groups(setting) for spec in group.specs], way, deadline, report)


def _train(study: Study, specs: Iterable[RunSpec], way: Way | None, deadline: float, report: Report) -> None:
    noted = {path.stem for path in (study.folder / "diverged").glob("*.txt")}
    scaled = [spec for spec in map(study.scaled, specs) if study.completed(spec).run_id not in noted]
    try:
        study.run_all(scaled, CAMPAIGN, way, deadline, report)
    except TrainingDiverged as error:
        report(f"diverged: {error}")
        for run_id in re.findall(r"run (\w{12}):", str(error)):
            with paths.replacing(study.folder / "diverged" / f"{run_id}.txt") as part:
                part.write_text(f"{error}\n")
    except SignalsNotFinished as error:
        report(str(error))


def plan(ledger: pd.DataFrame, scaled: Scale = lambda spec: spec, teacher_sha256: str | None = None) -> pd.DataFrame:
    """The queue as a table: columns stage, group, runs, done, left, seconds, settles.

    `seconds` is what the runs left take on a GPU, one after the other: at the speed that the ledger's GPU runs had, or,
    without any, at the floor of their memory traffic (`speed`). `settles` names the claims whose last run, of the
    direct replication, is in the group.

    Args:
        scaled: how the study of this ledger measures a spec, `Study.scaled`.
        teacher_sha256: whose students count as done; None takes the best published teacher.
    """
    if teacher_sha256 is None:
        teacher_sha256 = artifacts.manifest().get(teachers.best(), {}).get("weights_sha256", "")
    ours = ledger[ledger["teacher_sha256"].fillna("").isin(["", teacher_sha256])]
    done, seconds_an_image = campaigns.bare_run_ids(ours), speed(ledger)
    queue = groups(brief.chosen(ledger, scaled))
    settled = settles(queue)
    lines = []
    for group in queue:
        left = [spec for spec in map(scaled, group.specs) if spec.run_id not in done]
        seconds = sum(spec.epochs * images_of(spec) * seconds_an_image(spec) for spec in left)
        counts = {"runs": len(group.specs), "done": len(group.specs) - len(left), "left": len(left)}
        names = ", ".join(settled.get(group.name, ()))
        lines.append({"stage": group.stage, "group": group.name, **counts, "seconds": seconds, "settles": names})
    return pd.DataFrame(lines)


def stages(table: pd.DataFrame) -> pd.DataFrame:
    """The same, a line a stage: stage, runs, done, left, seconds, claims (how many it settles)."""
    table = table.assign(claims=[len(names.split(", ")) if names else 0 for names in table["settles"]])
    sums = table.groupby("stage", sort=False)[["runs", "done", "left", "seconds", "claims"]].sum()
    return sums.reset_index()


def images_of(spec: RunSpec) -> int:
    """Training images of a run on the full data set."""
    return round(spec.train_fraction * (TRAIN_IMAGES - spec.validation_images))


def is_measured(ledger: pd.DataFrame) -> bool:
    """Whether the ledger holds a student that a GPU trained, so that `speed` rests on a measurement."""
    return bool(len(_on_gpu(ledger)))


def speed(ledger: pd.DataFrame) -> Callable[[RunSpec], float]:
    """Seconds an image of a run on a GPU: the median of the ledger's, in proportion to the bytes of a step by k.

    Without any, the floor: what a step moves if each operation reads and writes for itself, at `CARD_BYTES`.
    """
    on_gpu = _on_gpu(ledger)
    counted = {k: _bytes_an_image(k) / CARD_BYTES for k in models.REMOVABLE_BLOCKS}
    ratio = 1.0
    if len(on_gpu):
        images = on_gpu["epochs"].astype(float) * on_gpu["train_images"].astype(float)
        ratio = float((on_gpu["seconds"].astype(float) / images / on_gpu["k"].map(counted)).median())
    return lambda spec: ratio * counted[spec.k]


def _on_gpu(ledger: pd.DataFrame) -> pd.DataFrame:
    return ledger[(ledger["method"] != "teacher") & ~ledger["device"].fillna("CPU").str.startswith("CPU")]


def _bytes_an_image(k: int) -> float:
    batch = RunSpec.batch_size
    return profiling.step_bytes(models.student(k), batch, CARD_VALUE_BYTES, profiling.EAGER) / batch


def needed(claim: Claim, setting: brief.Setting) -> set[RunSpec]:
    """The runs of the direct replication that a claim about students waits for; empty for any other claim."""
    if claim.measure not in (*ACCURACY_MEASURES, "map_similarity") or "teacher" in claim.methods:
        return set()
    wanted = [(method, seed) for method in claim.methods for seed in range(claim.seeds)]
    pairing = {**dict.fromkeys(claim.methods, claim.settings["pairing"]), "student": RunSpec.pairing}
    if claim.protocol == brief.NAME:
        return {brief.spec(method, seed, setting, pairing=pairing[method]) for method, seed in wanted}
    fixed = {"k": claim.k, "train_fraction": claim.settings["train_fraction"]}
    return {RunSpec(method, seed=seed, pairing=pairing[method], **fixed) for method, seed in wanted}


def settles(queue: list[Group], setting: brief.Setting | None = None) -> dict[str, list[str]]:
    """The claims that each group of the queue settles, by its name: those whose last run stands in it."""
    place = {spec: number for number, group in enumerate(queue) for spec in group.specs}
    setting = setting or next(found for group in queue for spec in group.specs if (found := brief.setting_of(spec)))
    found: dict[str, list[str]] = {}
    for claim in claims():
        runs = needed(claim, setting)
        if runs and runs <= place.keys():
            found.setdefault(queue[max(place[spec] for spec in runs)].name, []).append(claim.name)
    return found


def progress_lines(ledger: pd.DataFrame) -> list[str]:
    """A line a stage of the queue: what is done, how long the rest takes, how many claims it settles."""
    known = "as measured" if is_measured(ledger) else "by the floor of a GPU's memory"
    return [
        f"{row.stage}: {row.done} of {row.runs} runs done"
        + (f", about {row.seconds / 60:.0f} min left {known}" if row.left else "")
        + (f"; settles {row.claims} claims" if row.claims else "")
        for row in stages(plan(ledger)).itertuples()
    ]
