"""The command line: `python -m kdig_utils COMMAND`; each command has --help with examples."""

import argparse
import dataclasses
import importlib
import inspect
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import pandas as pd
import torch

from kdig_utils import paths
from kdig_utils.book import repository
from kdig_utils.book.status import artifact_lines, campaign_lines, checkpoint_line, finished, ledger_lines, signals_line
from kdig_utils.experiments import campaigns, hyperparameters, packs, publishing, teachers
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.side_by_side import SIDE_BY_SIDE, WAYS, TrainingDiverged, Way
from kdig_utils.experiments.study import PROFILES, TEACHER_RECIPE, Study, open_study, print_now_and_then
from kdig_utils.machine import keep_freed_memory
from kdig_utils.method import artifacts, cifar10, models, pairings
from kdig_utils.method.spec import METHODS, SCHEDULES, RunSpec, TeacherSpec

EXPECTED_ERRORS = (ValueError, KeyError, RuntimeError)  # and OSError: what the package raises on bad input


def data(_arguments: argparse.Namespace) -> int:
    """Fetch the official CIFAR-10 and check it."""
    root = cifar10.fetch()
    for split in ("train", "test"):
        images = cifar10.load(split, root)
        print(f"{images.name}, MD5 of pixels, labels and indices {images.md5}")
    print(f"CIFAR-10 is whole in {root}")
    return 0


def teacher(arguments: argparse.Namespace) -> int:
    """Train a teacher on the full data set, from random weights or from those of a file."""
    spec = TeacherSpec(
        seed=arguments.seed,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        validation_images=arguments.validation_images,
        batch_size=arguments.batch_size,
        schedule=arguments.schedule,
        cutout=arguments.cutout,
        label_smoothing=arguments.label_smoothing,
    )
    initial, study = None, trained_study(arguments.profile)
    if arguments.initial:
        initial = artifacts.read_weights(models.teacher(), arguments.initial)
        spec = dataclasses.replace(spec, initial_sha256=models.weights_sha256(initial))
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    keep_freed_memory()
    spec = dataclasses.replace(study.teacher_spec if arguments.profile == "smoke" else spec, data_md5=study.train.md5)
    row = study.run(spec, arguments.campaign, initial, deadline, WAYS[arguments.way])
    print(f"{spec.run_id} is not finished: run it again to go on" if row is None else finished(row))
    if arguments.pack:
        print(packed(study, [spec.run_id], arguments.pack, "teacher"))
    return 0


def adopt(arguments: argparse.Namespace) -> int:
    """Enter a teacher that other code trained, with its recipe in words; publish it if it is better than the published.

    Its accuracy is measured here, on all test images. There is no learning curve of it.
    """
    teachers.check_recipe(arguments.recipe)
    study, initial = open_study("full"), ""
    if arguments.initial:
        initial = models.weights_sha256(artifacts.read_weights(models.teacher(), arguments.initial))
    spec = TeacherSpec(
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        label_smoothing=arguments.label_smoothing,
        initial_sha256=initial,
        recipe=arguments.recipe,
    )
    artifacts.read_weights(models.teacher(), arguments.file)  # before the data are looked for
    keep_freed_memory()
    spec = dataclasses.replace(spec, data_md5=study.train.md5)
    known = {"campaign": "main", "train_images": len(study.train)}
    known |= {"seconds": arguments.seconds, "device": arguments.device}
    row, new = teachers.adopt(arguments.file, spec, study.ledger, study.folders["weights"], study.test, **known)
    print(finished(row) + ("" if new else "; it was in the ledger already"))
    if new and teachers.is_better_than_the_published(row):
        entry = publishing.publish_run(study, row)
        print(f"published as {entry['file']}, {entry['precision']}")
    return 0


def signals(arguments: argparse.Namespace) -> int:
    """Compute the published teacher's signals of all training images, once."""
    keep_freed_memory()
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    study = student_study(arguments.n_steps) if arguments.profile == "full" else trained_study(arguments.profile)
    found = study.signals_for(models.attention_tap(5), deadline)
    median, worst = (100 * float(found.error.quantile(share)) for share in (0.5, 0.99))
    print(
        f"signals of {len(found.logits):,} images; "
        f"completeness error {median:.2g} % (median), {worst:.2g} % (99th centile)"
    )
    return 0


def train(arguments: argparse.Namespace) -> int:
    """Train students of the published teacher on the full data set: every method with every k and seed."""
    specs = [
        RunSpec(
            method,
            k=k,
            seed=seed,
            epochs=arguments.epochs,
            pairing=arguments.pairing,
            train_fraction=arguments.train_fraction,
            validation_images=arguments.validation_images,
        )
        for method in arguments.method
        for k in arguments.k
        for seed in arguments.seed
    ]
    keep_freed_memory()
    study = student_study(arguments.n_steps)
    run_ids = study.run_all(specs, arguments.campaign)
    rows = study.ledger.read()
    print("\n".join(ledger_lines(rows[rows["run_id"].isin(run_ids)])))
    return 0


def campaign(arguments: argparse.Namespace) -> int:
    """Train the next runs of a campaign side by side, as long as the budget lasts; then say what is left.

    The campaign `next` is one queue over all campaigns, ordered by what the runs settle: --plan prints it. The ledger
    notes the code's commit; where the code is no git clone, set KDIG_COMMIT to it.
    """
    deadline = time.monotonic() + 60 * arguments.budget_minutes
    if arguments.plan:
        return plan(arguments)
    if not math.isfinite(arguments.budget_minutes):
        raise ValueError("a campaign needs --budget-minutes M: how long it may train")
    specs, diverged = [] if arguments.name == "next" else campaign_specs(arguments.name), None
    keep_freed_memory()
    study = student_study(RunSpec.n_steps) if arguments.profile == "full" else trained_study(arguments.profile)
    report, way = print_now_and_then(arguments.report_seconds), way_of(arguments, study.device)
    if arguments.name == "next":
        return next_runs(arguments, study, way, deadline, report)
    specs = [study.completed(study.scaled(spec)) for spec in specs]
    try:
        study.run_all(specs, arguments.name, way, deadline, report)
    except TrainingDiverged as error:
        diverged = error
    run_ids = [spec.run_id for spec in specs]
    done = study.ledger.read().query("run_id in @run_ids")
    print("\n".join(ledger_lines(done)))
    print(f"{arguments.name}: {len(done)} of {len(run_ids)} runs done")
    if arguments.pack:
        print(packed(study, run_ids, arguments.pack, arguments.name))
    if diverged:
        print(f"error: {diverged}", file=sys.stderr)
    return int(diverged is not None)


def way_of(arguments: argparse.Namespace, device: torch.device) -> Way:
    """How runs are trained: as the command says, or as suits the device."""
    at_once = SIDE_BY_SIDE[device.type] if arguments.at_once is None else arguments.at_once
    if at_once < 1:
        raise ValueError(f"--at-once {at_once} trains nothing: give at least 1")
    return WAYS[arguments.way]._replace(at_once=at_once)


def next_runs(
    arguments: argparse.Namespace, study: Study, way: Way, deadline: float, report: Callable[[str], None]
) -> int:
    """The next runs of the queue."""
    before = set(study.ledger.read()["run_id"])
    needed("experiments.queue").train(study, way, deadline, report)
    rows = study.ledger.read()
    done = rows[~rows["run_id"].isin(before)]
    print("\n".join([*ledger_lines(done), f"next: {len(done)} runs done now"]))
    if arguments.pack:
        print(packed(study, done["run_id"], arguments.pack, "next"))
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Print the queue: each group of runs, what is left of it, how long that takes, and what it settles."""
    if arguments.name != "next":
        raise ValueError(f"--plan shows the queue of all campaigns, not {arguments.name}: say `campaign next --plan`")
    queue, study = needed("analysis.plan"), open_study(arguments.profile)
    ledger = study.ledger.read()
    own = ledger.query("method == 'teacher'")["weights_sha256"].tail(1).to_list() if study.teacher_spec else []
    table = queue.plan(ledger, study.scaled, *(own if arguments.profile == "smoke" else []))
    for row in table[table["left"] > 0].itertuples():
        settles = f"; settles {row.settles}" if row.settles else ""
        print(f"{row.group}: {row.left} of {row.runs} runs left, about {row.seconds / 60:.1f} min{settles}")
    known = "as this ledger's GPU runs" if queue.is_measured(ledger) else "by the floor of a GPU's memory, not measured"
    print(f"in all {table['left'].sum()} of {table['runs'].sum()} runs, {table['seconds'].sum() / 3600:.1f} h, {known}")
    return 0


def probe(arguments: argparse.Namespace) -> int:
    """Check a way of training against the CPU; measure images a second with more and more runs side by side."""
    keep_freed_memory()
    if arguments.json:
        paths.check_writable(arguments.json.parent)
    for found in needed("experiments.probes").probe(WAYS[arguments.way], arguments.seconds):
        if arguments.json:
            with paths.replacing(arguments.json) as part:
                part.write_text(json.dumps(found) + "\n")
    print(json.dumps(found))
    return 0


def flight(arguments: argparse.Namespace) -> int:
    """Use a GPU that is lent for minutes: check, teacher, signals, the queue, explanations, first calls, all packed.

    Each stage goes on where it was stopped when the same command is given again; nothing that fails ends the flight.
    """
    goal = needed("analysis.claims").teacher_goal()
    needed("experiments.flight").fly(trained_study(arguments.profile), arguments.budget_minutes, arguments.pack, goal)
    return 0


def first_calls(arguments: argparse.Namespace) -> int:
    """Time first calls as the released scripts do, in fresh processes: teacher first, student first, on into warmth."""
    paths.check_writable(arguments.file.parent)
    count = needed("edge.timing").record_first_calls(arguments.file, arguments.seconds)
    print(f"{arguments.file.name}: {count} processes for each order of the networks")
    return 0


def trained_study(profile: str) -> Study:
    """The study of a profile that trains: full or smoke."""
    if profile == "published":
        raise ValueError("profile 'published' trains nothing: choose full, or smoke for a rehearsal")
    return open_study(profile)


def search(arguments: argparse.Namespace) -> int:
    """Choose a method's hyperparameters on validation images: trials, then the finalists again with fresh seeds."""
    deadline, searching = time.monotonic() + 60 * arguments.budget_minutes, needed("experiments.search")
    keep_freed_memory()
    study = student_study(RunSpec.n_steps) if arguments.profile == "full" else open_study(arguments.profile)
    options = {
        "at_once": arguments.at_once or SIDE_BY_SIDE[study.device.type],
        "deadline": deadline,
        "report": print_now_and_then(arguments.report_seconds),
    }
    trials = arguments.trials or searching.TRIALS
    rows = searching.search(study, arguments.method, trials, arguments.storage, **options)
    under_way = searching.trials_under_way(study, arguments.method, arguments.storage)
    if not under_way and time.monotonic() < deadline:
        rows = searching.confirm(study, arguments.method, **options)
    print(hyperparameters.choices(rows).round(2).to_string() if len(rows) else "no trial is finished yet")
    done, fresh = (~rows["fresh"]).sum(), rows["fresh"].sum()
    print(f"search {arguments.method}: {done} of {trials} trials, {fresh} runs with fresh seeds")
    if arguments.pack:
        print(packed(study, rows["run_id"], arguments.pack, f"search_{arguments.method}"))
    return 0


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


def unpack(arguments: argparse.Namespace) -> int:
    """Put the runs of a pack, brought back from another machine, into the ledger, their files beside it."""
    study = open_study(arguments.profile)
    added = packs.unpack(arguments.file, study.ledger, study.folders)
    for path in sorted(study.folders["flights"].glob("*_explanations.csv")):
        explanations = needed("analysis.explanations")
        explanations.record(explanations.read(path), study.explanations_path)
    print(f"{len(added)} runs added to {study.ledger.path.name}: {' '.join(added) or 'none of its runs was new'}")
    return 0


def explain(arguments: argparse.Namespace) -> int:
    """Measure the explanations of every run whose weights are here; goes on where it stopped."""
    if arguments.images % 20:
        raise ValueError(f"--images {arguments.images} is no multiple of 20: give one, as 100; half are corrupted")
    deadline, explanations = time.monotonic() + 60 * arguments.budget_minutes, needed("analysis.explanations")
    keep_freed_memory()
    study = student_study(RunSpec.n_steps) if arguments.profile == "full" else open_study(arguments.profile)
    effort = dataclasses.replace(
        explanations.Effort(), images=arguments.images, mosaics=arguments.images, corrupted=arguments.images // 2
    )
    path = arguments.table or study.explanations_path
    table = explanations.explain_runs(study, effort, path, deadline, print)
    print(f"{path.name}: {table.loc[table['run_id'] != '', 'run_id'].nunique()} networks explained")
    return 0


def latency(arguments: argparse.Namespace) -> int:
    """Time teacher and student in every runtime at hand; needs no data set."""
    needed("edge.benchmark").run(arguments.student, arguments.patience, arguments.json)
    return 0


def reproduce(arguments: argparse.Namespace) -> int:
    """Run the notebooks in a profile with papermill."""
    chapters = needed("book.reproduce")
    outcomes = chapters.reproduce(arguments.profile, arguments.only, arguments.resume)
    print("\n" + chapters.summary(outcomes))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def store(_arguments: argparse.Namespace) -> int:
    """Run the notebooks in profile published and put the executed copies in place of the committed ones."""
    chapters = needed("book.reproduce")
    changed = chapters.store(chapters.reproduce("published", resume=True))
    print(f"changed: {', '.join(changed) or 'none'}")
    return 0


def status(_arguments: argparse.Namespace) -> int:
    """Say what is there and what is missing."""
    damaged, ledger = publishing.damaged_artifacts(), Ledger(paths.ledger_path()).read()
    sections = {
        "ledger": ledger_lines(ledger),
        "queue": needed("analysis.plan").progress_lines(ledger),
        "campaigns": [*campaign_lines(ledger), answers_line(ledger)],
        "runs in progress": [checkpoint_line(path) for path in sorted(paths.workspace().glob("*/checkpoints/*.pt"))],
        "teacher signals": [
            signals_line(path.parent) for path in sorted(paths.workspace().glob("*/signals/*/done.npy"))
        ],
        "artifacts": artifact_lines(damaged),
    }
    for title, lines in sections.items():
        print(f"{title}\n  " + "\n  ".join(lines or ["none"]))
    return int(bool(damaged))


def publish(arguments: argparse.Namespace) -> int:
    """Put the weights of finished runs into artifacts/.

    The published students have one teacher: students of another one are published all together, with their teacher.
    """
    study = open_study("full")
    table = study.ledger.read().set_index("run_id", drop=False)
    if unknown := [run_id for run_id in arguments.run if run_id not in table.index]:
        raise ValueError(f"the ledger has no run {unknown[0]!r}: `python -m kdig_utils status` lists the runs")
    teachers.check_students(table.loc[arguments.run], table)
    for run_id in arguments.run:
        entry = publishing.publish_run(study, table.loc[run_id])
        print(f"{entry['file']}: run {run_id}, {entry['precision']}, {entry['test_accuracy']:.2f} % on the test images")
    if teachers.promote(table):
        print("next_teacher has students: it is teacher now")
    return 0


def readme(arguments: argparse.Namespace) -> int:
    """Fill the table of results in the README from the ledger."""
    ledger = Ledger(paths.ledger_path()).read()
    if arguments.check:
        current = (paths.repository_root() / "README.md").read_text()
        if current != repository.readme_with(repository.results_table(ledger)):
            raise ValueError("the table in README.md is not the ledger's: run `python -m kdig_utils readme`")
        print("README.md says what the ledger says")
    else:
        print("README.md " + ("got the ledger's table" if repository.write_results(ledger) else "was up to date"))
    return 0


def links(arguments: argparse.Namespace) -> int:
    """Write the public address of pyproject.toml into every file that links to it."""
    root = paths.repository_root()
    if arguments.check:
        if stale := list(repository.stale_addresses()):
            path, slug = stale[0]
            raise ValueError(f"{path.relative_to(root)} names {slug}: run `python -m kdig_utils links`")
        print(f"every file names {repository.address()}")
    else:
        changed = [str(path.relative_to(root)) for path in repository.write_address()]
        print(f"{repository.address()}: changed {', '.join(changed) or 'nothing'}")
    return 0


def student_study(n_steps: int) -> Study:
    """The full study with the best published teacher, which is loaded here, so that a damaged one is found at once."""
    study = open_study("full").with_best_teacher()
    study = dataclasses.replace(study, teacher_spec=None, specs=(), n_steps=n_steps)
    _teacher = study.teacher
    if teachers.is_rounded_copy(teachers.best()):
        raise ValueError(f"the published {teachers.best()} is a rounded copy: publish the teacher to learn from first")
    return study


def needed(name: str) -> ModuleType:
    """A module of the package that only some commands need, because of the packages that it needs itself."""
    try:
        return importlib.import_module(f"kdig_utils.{name}")
    except ModuleNotFoundError as error:
        package = error.name.split(".")[0]
        raise RuntimeError(f"{package} is not installed: pip install {package}, or '.[book,edge]'") from error


def answers_line(ledger: pd.DataFrame) -> str:
    """How far the campaign `answers` is; its settings are known when the search is done."""
    try:
        wanted = campaign_specs("answers")
    except (ValueError, RuntimeError) as error:
        return f"answers: {error}"
    done = len(campaigns.rows_of(ledger, wanted))
    return f"answers: {done} of {len(wanted)} runs done, {len(wanted) - done} left"


def packed(study: Study, run_ids: Iterable[str], folder: Path, name: str) -> str:
    """Pack these runs, as far as they are finished, with their files; say what was written and what was not."""
    rows = study.ledger.read().query("run_id in @run_ids")
    pack = packs.pack(study.ledger, rows["run_id"], study.files(rows), folder, name)
    left_out = "".join(f"\nleft out, no room: {path.parent.name}/{path.name}" for path in pack.left_out)
    return (
        "packed: " + ", ".join(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB)" for path in pack.pieces) + left_out
    )


EXAMPLES = {
    data: ("data", "data    # with KDIG_DATA=FOLDER in the environment: checks the files there"),
    teacher: (
        "teacher --epochs 50 --validation-images 5000 --cutout 16    # a candidate, judged by validation",
        "teacher --budget-minutes 9 --pack out    # the recipe, on all images, a part at a time",
        "teacher --epochs 4 --schedule one_cycle --learning-rate 0.04 --initial teacher.safetensors",
    ),
    adopt: (
        'adopt theirs.safetensors --recipe "Adam, 30 epochs, no augmentation" --epochs 30 --learning-rate 0.001',
        'adopt longer.safetensors --initial artifacts/teacher.safetensors --epochs 11 --recipe "SGD, by other code"',
    ),
    signals: ("signals", "signals --n-steps 8", "signals --budget-minutes 2    # goes on where it stopped"),
    train: (
        "train --method kd_ig",
        "train --method student kd ig kd_ig --seed 0 1 2",
        "train --method kd --k 9 --epochs 5 --campaign short",
    ),
    campaign: (
        "campaign next --plan",
        "campaign next --budget-minutes 9 --pack out",
        "campaign pairing --budget-minutes 9 --at-once 8 --way compiled",
        "campaign compression --budget-minutes 1 --profile smoke    # a rehearsal, tiny",
    ),
    probe: ("probe recorded", "probe compiled --seconds 5 --json compiled.json"),
    flight: ("flight --budget-minutes 9 --pack out", "flight --budget-minutes 6 --pack out --profile smoke"),
    first_calls: ("first-calls results/latency/first_calls/my_card.csv",),
    search: (
        "search --method kd --trials 30 --budget-minutes 240 --pack out",
        "search --method kd_ig --storage postgresql://me@host/search --budget-minutes 9    # one of several workers",
        "search --method kd --trials 4 --budget-minutes 1 --profile smoke    # a rehearsal, tiny",
    ),
    unpack: ("unpack out/ablation.tar.*",),
    explain: ("explain --profile published", "explain --images 1000 --budget-minutes 9 --table explanations.csv"),
    latency: ("latency", "latency --json my_device.json", "latency --patience 300    # time for every export"),
    reproduce: ("reproduce", "reproduce --profile smoke --only 03,06", "reproduce --profile full --resume"),
    store: ("store",),
    status: ("status",),
    publish: ("publish 2f1ac711c7eb    # status lists the runs", "publish 2f1ac711c7eb 6e99d614e029"),
    readme: ("readme", "readme --check"),
    links: ("links", "links --check"),
}


def command_line() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(prog="python -m kdig_utils", description=__doc__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    commands = {}
    for function, examples in EXAMPLES.items():
        commands[function] = subparsers.add_parser(
            function.__name__.replace("_", "-"),
            help=function.__doc__.splitlines()[0],
            description=inspect.cleandoc(function.__doc__),
            epilog="\n".join(["examples:", *(f"  python -m kdig_utils {line}" for line in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        commands[function].set_defaults(function=function)
    add_teacher_options(commands[teacher])
    add_adopt_options(commands[adopt])
    add_student_options(commands[train])
    for command in (commands[signals], commands[train]):
        command.add_argument(
            "--n-steps", type=int, default=RunSpec.n_steps, help="of the IG path; default: %(default)s"
        )
    for command in (commands[teacher], commands[train]):
        command.add_argument("--validation-images", type=int, default=0, help="held out; default: %(default)s")
        command.add_argument("--campaign", default="main", help="its name in the ledger; default: %(default)s")
    commands[signals].add_argument("--budget-minutes", type=span, default=math.inf, help="default: until it ends")
    for command in (commands[teacher], commands[campaign]):
        command.add_argument("--way", choices=tuple(WAYS), default="recorded", help="of training; default: %(default)s")
    for command in (commands[teacher], commands[signals]):
        command.add_argument("--profile", default="full", help="full, or smoke for a rehearsal; default: %(default)s")
    add_campaign_options(commands[campaign])
    add_flight_options(commands[probe], commands[flight], commands[first_calls])
    add_search_options(commands[search])
    commands[unpack].add_argument("file", nargs="+", type=Path, metavar="FILE", help="all pieces of a pack")
    commands[unpack].add_argument("--profile", default="full", help="whose ledger; default: %(default)s")
    add_explain_options(commands[explain])
    add_latency_options(commands[latency])
    add_reproduce_options(commands[reproduce])
    commands[publish].add_argument("run", nargs="+", metavar="RUN_ID", help="as in the ledger; status lists them")
    for command in (commands[readme], commands[links]):
        command.add_argument("--check", action="store_true", help="change nothing; fail if something would change")
    return parser


def span(text: str) -> float:
    """A span of time, 0 or more; raises ArgumentTypeError for what is none, `nan` included."""
    if not float(text) >= 0:
        raise argparse.ArgumentTypeError(f"{text} is no span of time: give 0 or more, as 9")
    return float(text)


def add_teacher_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command.add_argument("--epochs", type=int, default=TEACHER_RECIPE.epochs, help="default: %(default)s")
    command.add_argument(
        "--learning-rate", type=float, default=TEACHER_RECIPE.learning_rate, help="default: %(default)s"
    )
    command.add_argument("--batch-size", type=int, default=TEACHER_RECIPE.batch_size, help="default: %(default)s")
    command.add_argument("--schedule", default=TEACHER_RECIPE.schedule, help=f"of {' '.join(SCHEDULES)}; %(default)s")
    command.add_argument(
        "--cutout", type=int, default=TEACHER_RECIPE.cutout, help="side of the square; default: %(default)s"
    )
    command.add_argument("--label-smoothing", type=float, default=TEACHER_RECIPE.label_smoothing, help="%(default)s")
    command.add_argument("--pack", type=Path, metavar="FOLDER", help="write what must be carried home there")
    command.add_argument("--budget-minutes", type=span, default=math.inf, help="from now on; default: until it ends")
    command.add_argument("--initial", type=Path, metavar="FILE", help="safetensors to start from; else random weights")


def add_adopt_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, metavar="FILE", help="safetensors, under torchvision's names")
    command.add_argument("--recipe", required=True, metavar="TEXT", help="how it was trained, in one sentence")
    command.add_argument("--epochs", type=int, required=True, help="whole ones; the recipe may say more")
    command.add_argument("--initial", type=Path, metavar="FILE", help="the weights that it started from, if not random")
    command.add_argument("--batch-size", type=int, default=TeacherSpec.batch_size, help="default: %(default)s")
    command.add_argument("--learning-rate", type=float, default=TeacherSpec.learning_rate, help="default: %(default)s")
    command.add_argument("--weight-decay", type=float, default=0.0, help="default: %(default)s")
    command.add_argument("--label-smoothing", type=float, default=0.0, help="default: %(default)s")
    command.add_argument("--seconds", type=span, default=math.nan, help="that it took; default: not known")
    command.add_argument("--device", default="", help="that it took them on; default: not known")


def add_student_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", nargs="+", required=True, help=f"of {' '.join(METHODS)}")
    command.add_argument("--k", type=int, nargs="+", default=[5], help="feature blocks removed; default: 5")
    command.add_argument("--seed", type=int, nargs="+", default=[0], help="default: 0")
    command.add_argument("--epochs", type=int, default=RunSpec.epochs, help="default: %(default)s")
    command.add_argument("--pairing", default="matched", help=f"of {' '.join(pairings.PAIRINGS)}; default: %(default)s")
    command.add_argument("--train-fraction", type=float, default=1.0, help="of the images; default: %(default)s")


def add_campaign_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help=f"next, or of {' '.join(campaigns.CAMPAIGNS)} answers")
    command.add_argument("--plan", action="store_true", help="train nothing: print the queue of `next`")
    command.add_argument("--budget-minutes", type=span, default=math.inf, help="from now on, signals included")
    command.add_argument("--at-once", type=int, help="runs side by side; default: by device, and what its memory holds")
    command.add_argument("--pack", type=Path, metavar="FOLDER", help="write what must be carried home there")
    command.add_argument("--report-seconds", type=float, default=30.0, help="between two lines; default: %(default)s")
    command.add_argument("--profile", default="full", help="full, or smoke for a rehearsal; default: %(default)s")


def add_flight_options(
    probing: argparse.ArgumentParser, flying: argparse.ArgumentParser, calling: argparse.ArgumentParser
) -> None:
    probing.add_argument("way", choices=tuple(WAYS), help="of training")
    probing.add_argument("--seconds", type=span, default=2.0, help="for each number of runs; default: %(default)s")
    probing.add_argument("--json", type=Path, metavar="FILE", help="write what was found to this file")
    flying.add_argument("--budget-minutes", type=span, required=True, help="from now on, everything included")
    flying.add_argument("--pack", type=Path, metavar="FOLDER", required=True, help="what must be carried home")
    flying.add_argument("--profile", default="full", help="full, or smoke for a rehearsal; default: %(default)s")
    calling.add_argument("file", type=Path, metavar="FILE", help="a CSV file for the times")
    calling.add_argument("--seconds", type=span, default=40.0, help="about; default: %(default)s")


def add_search_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--method", required=True, help=f"of {' '.join(METHODS[1:])}")
    command.add_argument("--trials", type=int, help="of all workers together; default: as many as in chapter 07")
    command.add_argument("--storage", metavar="URL", help="an Optuna storage; default: an SQLite file in the workspace")
    command.add_argument("--budget-minutes", type=span, required=True, help="from now on, teacher signals included")
    command.add_argument("--at-once", type=int, help="runs side by side; default: by device, and what its memory holds")
    command.add_argument("--pack", type=Path, metavar="FOLDER", help="write what must be carried home there")
    command.add_argument("--report-seconds", type=float, default=30.0, help="between two lines; default: %(default)s")
    command.add_argument("--profile", default="full", help="full, or smoke for a rehearsal; default: %(default)s")


def add_explain_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", type=int, default=100, help="explained, a multiple of 20; default: %(default)s")
    command.add_argument("--budget-minutes", type=span, default=math.inf, help="no network starts later")
    command.add_argument("--table", type=Path, metavar="FILE", help="default: explanations.csv beside the ledger")
    command.add_argument("--profile", default="full", help="published uses the repository's images; default: full")


def add_latency_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--student", default="kd_ig_k5", help="a network of artifacts/; default: %(default)s")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    command.add_argument(
        "--patience", type=float, default=100.0, metavar="SECONDS", help="for everything; default: %(default)s"
    )


def add_reproduce_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--profile", default="published", help=f"of {' '.join(PROFILES)}; default: %(default)s")
    command.add_argument(
        "--only", type=lambda text: text.split(","), default=[], metavar="03,06", help="these chapters"
    )
    command.add_argument("--resume", action="store_true", help="pass over chapters whose executed copy is up to date")


def is_expected(error: Exception) -> bool:
    """Whether `error` is the package's own word on bad input, or the system's on a file, and no defect."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    raised_here = Path(innermost).is_relative_to(Path(__file__).parent)
    return isinstance(error, OSError) or (isinstance(error, EXPECTED_ERRORS) and raised_here)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: well. 1: a notebook failed, or an artifact is damaged. 2: bad input. 3: the GPU's memory is full. 130: stopped by
    hand.
    """
    arguments = command_line().parse_args(words)
    try:
        return arguments.function(arguments)
    except KeyboardInterrupt:
        resume = " with --resume" if "resume" in arguments and not arguments.resume else ""
        print(f"stopped; run the same command again{resume} to go on", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 3
    except Exception as error:
        if not is_expected(error):
            raise
        message = error.args[0] if isinstance(error, KeyError) else error
        print("error: " + " ".join(str(message).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
