"""Commands that make runs: data, teachers, signals, students, campaigns, and what carries them home."""

import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Annotated, Any

from kdig_utils import paths
from kdig_utils.book.status import finished, ledger_lines
from kdig_utils.commands.laptop_runs import laptop_campaign, side_by_side, trainer
from kdig_utils.commands.options import Count, Span
from kdig_utils.experiments import campaigns, hyperparameters, laptop, packs, publishing, queue, teachers
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.reports import Report, print_now_and_then
from kdig_utils.experiments.side_by_side import WAYS, Way
from kdig_utils.experiments.steps import TrainingDiverged
from kdig_utils.experiments.study import TEACHER_RECIPE, Study, open_study
from kdig_utils.machine import keep_freed_memory
from kdig_utils.method import artifacts, cifar10, models, pairings
from kdig_utils.method.spec import METHODS, RunSpec, TeacherSpec

UNTIL_THE_END = Span("inf")
Minutes = Annotated[Span, "from now on"]
Profile = Annotated[str, "full, or smoke for a rehearsal"]
PackFolder = Annotated[Path | None, "write what must be carried home into this folder"]
Initial = Annotated[Path | None, "safetensors that it starts from; else random weights"]
Recipe = Annotated[
    TeacherSpec, "seed epochs learning_rate batch_size schedule cutout label_smoothing validation_images"
]
KnownOfOthers = Annotated[TeacherSpec, "batch_size learning_rate weight_decay label_smoothing"]
WayName = Annotated[str, "of training", {"choices": tuple(WAYS)}]
AtOnce = Annotated[Count | None, "runs side by side; default: by device, and what its memory holds"]
ReportSeconds = Annotated[Span, "between two lines"]
Steps = Annotated[int, "of the IG path"]
Campaign = Annotated[str, "its name in the ledger"]


def data() -> None:
    """Fetch the official CIFAR-10 and check it; with KDIG_DATA=FOLDER in the environment, check the files there."""
    root = cifar10.fetch()
    for split in ("train", "test"):
        images = cifar10.load(split, root)
        print(f"{images.name}, MD5 of pixels, labels and indices {images.md5}")
    print(f"CIFAR-10 is whole in {root}")


def teacher(
    *,
    recipe: Recipe = TEACHER_RECIPE,
    initial: Initial = None,
    profile: Profile = "full",
    campaign: Campaign = "main",
    way: WayName = "recorded",
    budget_minutes: Minutes = UNTIL_THE_END,
    pack: PackFolder = None,
) -> None:
    """Train a teacher on the full data set, from random weights or from those of a file."""
    study, deadline = training_study(profile), time.monotonic() + 60 * budget_minutes
    spec, network = started_from(recipe, initial)
    spec = replace((study.teacher_spec if profile == "smoke" else None) or spec, data_md5=study.train.md5)
    row = study.run(spec, campaign, network, deadline, WAYS[way])
    print(f"{spec.run_id} is not finished: run it again to go on" if row is None else finished(row))
    carry_home(study, [spec.run_id], pack, "teacher")


def adopt(
    file: Annotated[Path, "safetensors, under torchvision's names"],
    *,
    recipe: Annotated[str, "how it was trained, in one sentence"],
    epochs: Annotated[int, "whole ones; the recipe may say more"],
    known: KnownOfOthers = TeacherSpec(weight_decay=0.0, label_smoothing=0.0),
    initial: Initial = None,
    seconds: Annotated[Span | None, "that it took; default: not known"] = None,
    device: Annotated[str | None, "that it took them on; default: not known"] = None,
) -> None:
    """Enter a teacher that other code trained, with its recipe in words; publish it if it is better than the published.

    Its accuracy is measured here, on all test images. There is no learning curve of it.
    """
    teachers.check_recipe(recipe)
    spec, _network = started_from(replace(known, epochs=epochs, recipe=recipe), initial)
    artifacts.read_weights(models.teacher(), file)  # before the data are looked for
    study = training_study("full")
    spec = replace(spec, data_md5=study.train.md5)
    facts = {"campaign": "main", "train_images": len(study.train), "seconds": seconds, "device": device}
    row, new = teachers.adopt(file, spec, study.ledger, study.folders["weights"], study.test, **facts)
    print(finished(row) + ("" if new else "; it was in the ledger already"))
    if new and teachers.is_better_than_the_published(row):
        entry = publishing.publish_run(study, row)
        print(f"published as {entry['file']}, {entry['precision']}")


def signals(
    *, n_steps: Steps = RunSpec.n_steps, budget_minutes: Minutes = UNTIL_THE_END, profile: Profile = "full"
) -> None:
    """Compute the published teacher's signals of all training images, once."""
    deadline = time.monotonic() + 60 * budget_minutes
    found = student_study(profile, n_steps).signals_for(models.attention_tap(5), deadline)
    median, worst = (100 * float(found.error.quantile(share)) for share in (0.5, 0.99))
    print(
        f"signals of {len(found.logits):,} images; "
        f"completeness error {median:.2g} % (median), {worst:.2g} % (99th centile)"
    )


def train(
    *,
    method: Annotated[Sequence[str], f"of {' '.join(METHODS)}"],
    k: Annotated[Sequence[int], "feature blocks removed from the teacher"] = (5,),
    seed: Annotated[Sequence[int], "of each run"] = (0,),
    pairing: Annotated[str, f"of {' '.join(pairings.PAIRINGS)}"] = "matched",
    setting: Annotated[RunSpec, "epochs train_fraction validation_images"] = RunSpec("student"),
    n_steps: Steps = RunSpec.n_steps,
    campaign: Campaign = "main",
) -> None:
    """Train students of the published teacher on the full data set: every method with every k and seed."""
    setting = replace(setting, pairing=pairing)
    specs = [replace(setting, method=name, k=blocks, seed=n) for name in method for blocks in k for n in seed]
    study = student_study("full", n_steps)
    run_ids = study.run_all(specs, campaign)
    rows = study.ledger.read()
    print("\n".join(ledger_lines(rows[rows["run_id"].isin(run_ids)])))


def campaign(
    name: Annotated[str, f"next, or of {' '.join(campaigns.CAMPAIGNS)} answers"],
    *,
    plan: Annotated[bool, "train nothing: print the queue of `next`"] = False,
    budget_minutes: Annotated[Span, "from now on, signals included"] = UNTIL_THE_END,
    at_once: AtOnce = None,
    workers: Annotated[Count, "processes on this machine that share the runs, each of one thread"] = Count("1"),
    scheduler: Annotated[str | None, "of Dask, as tcp://host:8786, whose workers share the runs; default: none"] = None,
    way: WayName = "recorded",
    pack: PackFolder = None,
    report_seconds: ReportSeconds = Span("30"),
    profile: Profile = "full",
) -> int:
    """Train the next runs of a campaign side by side, as long as the budget lasts; then say what is left.

    The campaign `next` is one queue over all campaigns, ordered by what the runs settle: --plan prints it. The ledger
    notes the code's commit; where the code is no git clone, set KDIG_COMMIT to it. The campaign `laptop` needs no GPU.
    """
    deadline = time.monotonic() + 60 * budget_minutes
    if plan:
        return print_plan(name, profile)
    if name != laptop.NAME and math.isinf(budget_minutes):
        raise ValueError("a campaign needs --budget-minutes M: how long it may train")
    with trainer(scheduler, workers) as (run_all, device):
        how = side_by_side(WAYS[way], at_once, device), deadline, print_now_and_then(report_seconds), run_all
        return laptop_campaign(profile, *how) if name == laptop.NAME else study_campaign(name, profile, pack, *how)


def study_campaign(name: str, profile: str, pack: Path | None, way: Way, *how: Any) -> int:
    """Train the next runs of a campaign of the whole study, say what is left, pack; return the exit status."""
    specs, study = [] if name == "next" else campaign_specs(name), student_study(profile)
    specs, before = [study.completed(study.scaled(spec)) for spec in specs], study.ledger.read()["run_id"]
    problem = train_or_say_why(study, name, specs, way, *how)
    rows = study.ledger.read()
    done = rows[rows["run_id"].isin([spec.run_id for spec in specs]) if specs else ~rows["run_id"].isin(before)]
    words = f"of {len(specs)} runs done" if specs else "runs done now"
    print("\n".join([*ledger_lines(done), f"{name}: {len(done)} {words}"]))
    carry_home(study, done["run_id"], pack, name)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
    return int(bool(problem))


def train_or_say_why(
    study: Study, name: str, specs: list[RunSpec], way: Way, deadline: float, report: Report, run_all: queue.RunAll
) -> str:
    """Train these runs of a campaign, or the queue where there are none; return what diverged, if anything did."""
    try:
        if specs:
            run_all(study, specs, name, way, deadline, report)
        else:
            queue.train(study, way, deadline, report, run_all)
    except TrainingDiverged as error:
        return str(error)
    return ""


def campaign_specs(name: str) -> list[RunSpec]:
    """The runs of a campaign; those of `answers` wait for what validation prefers."""
    if name != "answers":
        return campaigns.specs(name)
    preferred = hyperparameters.preferred(Ledger(paths.ledger_path()).read())
    if preferred is None:
        raise ValueError(
            "the campaign answers needs the alpha that validation prefers: run "
            "`python -m kdig_utils search --method kd` first"
        )
    return campaigns.answers(**preferred)


def print_plan(name: str, profile: str) -> int:
    """Print the queue: each group of runs, what is left of it, how long that takes, and what it settles."""
    from kdig_utils.analysis import plan as queue

    if name != "next":
        raise ValueError(f"--plan shows the queue of all campaigns, not {name}: say `campaign next --plan`")
    study = open_study(profile)
    ledger = study.ledger.read()
    own = ledger.query("method == 'teacher'")["weights_sha256"].tail(1).to_list() if profile == "smoke" else []
    table = queue.plan(ledger, study.scaled, *own)
    for row in table[table["left"] > 0].itertuples():
        settles = f"; settles {row.settles}" if row.settles else ""
        print(f"{row.group}: {row.left} of {row.runs} runs left, about {row.seconds / 60:.1f} min{settles}")
    known = "as this ledger's GPU runs" if queue.is_measured(ledger) else "by the floor of a GPU's memory, not measured"
    print(f"in all {table['left'].sum()} of {table['runs'].sum()} runs, {table['seconds'].sum() / 3600:.1f} h, {known}")
    return 0


def search(
    *,
    method: Annotated[str, f"of {' '.join(METHODS[1:])}"],
    budget_minutes: Annotated[Span, "from now on, teacher signals included"],
    trials: Annotated[Count | None, "of all workers together; default: as many as in chapter 07"] = None,
    storage: Annotated[str | None, "URL of an Optuna storage; default: an SQLite file in the workspace"] = None,
    at_once: AtOnce = None,
    pack: PackFolder = None,
    report_seconds: ReportSeconds = Span("30"),
    profile: Profile = "full",
) -> None:
    """Choose a method's hyperparameters on validation images: trials, then the finalists again with fresh seeds."""
    from kdig_utils.experiments import search as searching

    deadline, asked = time.monotonic() + 60 * budget_minutes, trials or searching.TRIALS
    study = student_study(profile)
    how = side_by_side(Way(), at_once, study.device.type).at_once, deadline, print_now_and_then(report_seconds)
    rows = searching.search(study, method, asked, storage, *how)
    if not searching.trials_under_way(study, method, storage) and time.monotonic() < deadline:
        rows = searching.confirm(study, method, *how)
    print(hyperparameters.choices(rows).round(2).to_string() if len(rows) else "no trial is finished yet")
    fresh = rows["fresh"].sum()
    print(f"search {method}: {len(rows) - fresh} of {asked} trials, {fresh} runs with fresh seeds")
    carry_home(study, rows["run_id"], pack, f"search_{method}")


def probe(
    way: WayName,
    *,
    seconds: Annotated[Span, "for each number of runs"] = Span("2"),
    json: Annotated[Path | None, "write what was found to this file"] = None,
) -> None:
    """Check a way of training against the CPU; measure images a second with more and more runs side by side."""
    from kdig_utils.experiments import probes

    keep_freed_memory()
    if json:
        paths.check_writable(json.parent)
    text = ""
    for found in probes.probe(WAYS[way], seconds):
        text = dumps(found)
        if json:
            with paths.replacing(json) as part:
                part.write_text(text + "\n")
    print(text)


def flight(
    *,
    budget_minutes: Annotated[Span, "from now on, everything included"],
    pack: Annotated[Path, "folder for what must be carried home"],
    profile: Profile = "full",
) -> None:
    """Use a GPU that is lent for minutes: check, teacher, signals, the queue, explanations, first calls, all packed.

    Each stage goes on where it was stopped when the same command is given again; nothing that fails ends the flight.
    """
    from kdig_utils.analysis import claims
    from kdig_utils.experiments import flight as flights

    flights.fly(training_study(profile), budget_minutes, pack, claims.teacher_goal())


def unpack(
    file: Annotated[Sequence[Path], "all pieces of a pack"], *, profile: Annotated[str, "whose ledger"] = "full"
) -> None:
    """Put the runs of a pack, brought back from another machine, into the ledger, their files beside it."""
    from kdig_utils.experiments import flight as flights

    study = open_study(profile)
    added = packs.unpack(file, study.ledger, study.folders)
    for path in sorted(study.folders["flights"].glob(f"*{flights.LAPTOP_RUNS}")):
        added += Ledger(laptop.own_ledger_path(profile)).merge(Ledger(path).read())
    for path in sorted(study.folders["flights"].glob("*_explanations.csv")):
        from kdig_utils.analysis import explanations

        explanations.record(explanations.read(path), study.explanations_path)
    print(f"{len(added)} runs added to {study.ledger.path.name}: {' '.join(added) or 'none of its runs was new'}")


# What several commands do


def training_study(profile: str) -> Study:
    """The study of a profile that trains: full or smoke."""
    if profile == "published":
        raise ValueError("profile 'published' trains nothing: choose full, or smoke for a rehearsal")
    keep_freed_memory()
    return open_study(profile)


def student_study(profile: str, n_steps: int = RunSpec.n_steps) -> Study:
    """The study that students are trained in, in `full` with the best published teacher.

    The teacher is loaded here, so that a damaged one is found at once.
    """
    study = training_study(profile)
    if profile != "full":
        return study
    study = replace(study.with_best_teacher(), teacher_spec=None, specs=(), n_steps=n_steps)
    _teacher = study.teacher
    if teachers.is_rounded_copy(teachers.best()):
        raise ValueError(f"the published {teachers.best()} is a rounded copy: publish the teacher to learn from first")
    return study


def started_from(spec: TeacherSpec, path: Path | None) -> tuple[TeacherSpec, models.Teacher | None]:
    """The spec and the network of a teacher that starts from the weights of a file, if there is one."""
    if path is None:
        return spec, None
    network = models.teacher()
    artifacts.read_weights(network, path)
    return replace(spec, initial_sha256=models.weights_sha256(network)), network


def carry_home(study: Study, run_ids: Iterable[str], folder: Path | None, name: str) -> None:
    """Pack these runs, as far as they are finished, with their files; say what was written and what was not."""
    if folder is None:
        return
    rows = study.ledger.read().query("run_id in @run_ids")
    pack = packs.pack(rows, packs.belongings(rows, study.folders), folder, name)
    print("packed: " + ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in pack.pieces))
    for path in pack.left_out:
        print(f"left out, no room: {path.parent.name}/{path.name}")
