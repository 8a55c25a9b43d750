"""Commands that measure what is there, show it and publish it."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd

from kdig_utils import paths
from kdig_utils.book import status as told
from kdig_utils.commands.make_runs import UNTIL_THE_END, campaign_specs, student_study
from kdig_utils.commands.options import Count, Span
from kdig_utils.experiments import campaigns, publishing, teachers
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.study import PROFILES, open_study
from kdig_utils.machine import keep_freed_memory
from kdig_utils.method import artifacts

Watch = Annotated[
    Span | None, "show the runs under way, again every so many seconds", {"nargs": "?", "const": Span("10")}
]
Check = Annotated[bool, "change nothing; fail if something would change"]


def first_calls(
    file: Annotated[Path, "a CSV file for the times"], *, seconds: Annotated[Span, "about"] = Span("40")
) -> None:
    """Time first calls as the released scripts do, in fresh processes: teacher first, student first, on into warmth."""
    from kdig_utils.edge import timing

    paths.check_writable(file.parent)
    count = timing.record_first_calls(file, seconds)
    print(f"{file.name}: {count} processes for each order of the networks")


def latency(
    *,
    student: Annotated[str, "of artifacts/, or 12 digits of a released SHA-256"] = "kd_ig_k5",
    json: Annotated[Path | None, "write the rows to this file"] = None,
    patience: Annotated[Span, "seconds for everything"] = Span("100"),
) -> None:
    """Time teacher and student in every runtime at hand; needs no data set."""
    from kdig_utils.edge import benchmark

    benchmark.run(student, patience, json)


def explain(
    *,
    images: Annotated[Count, "explained, a multiple of 20"] = Count("100"),
    budget_minutes: Annotated[Span, "no network starts later"] = UNTIL_THE_END,
    table: Annotated[Path | None, "CSV file; default: explanations.csv beside the ledger"] = None,
    profile: Annotated[str, "full, smoke, or published, which uses the repository's images"] = "full",
) -> None:
    """Measure the explanations of every run whose weights are here; goes on where it stopped."""
    from kdig_utils.analysis import examination, explanations

    if images % 20:
        raise ValueError(f"--images {images} is no multiple of 20: give one, as 100; half are corrupted")
    deadline = time.monotonic() + 60 * budget_minutes
    keep_freed_memory()
    study = open_study(profile) if profile == "published" else student_study(profile)
    path = table or study.explanations_path
    effort = examination.Effort(images=images, mosaics=images, corrupted=images // 2)
    found = explanations.explain_runs(study, effort, path, deadline, print)
    print(f"{path.name}: {found.loc[found['run_id'] != '', 'run_id'].nunique()} networks explained")


def reproduce(
    *,
    profile: Annotated[str, f"of {' '.join(PROFILES)}"] = "published",
    only: Annotated[str | None, "these chapters, as 03,06"] = None,
    resume: Annotated[bool, "pass over chapters whose executed copy is up to date"] = False,
) -> int:
    """Run the notebooks in a profile, headlessly."""
    from kdig_utils.book import reproduce as chapters

    outcomes = chapters.reproduce(profile, None if only is None else only.split(","), resume)
    print("\n" + chapters.summary(outcomes))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def store() -> None:
    """Run the notebooks in profile published and put the executed copies in place of the committed ones."""
    from kdig_utils.book import reproduce as chapters

    changed = chapters.store(chapters.reproduce("published", resume=True))
    print(f"changed: {', '.join(changed) or 'none'}")


def status(*, watch: Watch = None) -> int:
    """Say what is there, missing or damaged; with --watch what is trained now, how fast, and what went wrong."""
    from kdig_utils.analysis import plan
    from kdig_utils.book import watch as watching

    if watch is not None:
        watching.watch(watch)
        return 0
    ledger, folder, needed = Ledger(paths.ledger_path()).read(), paths.workspace(), "claims.yml or manifest.json"
    runs, stores = sorted(folder.glob("*/checkpoints/*.pt")), sorted(folder.glob("*/signals/*/done.npy"))
    again, joined = "delete it to start afresh", "\n  ".join
    sections = {
        "ledger": joined(told.ledger_lines(ledger)),
        "queue": told.described(needed, lambda _file: joined(plan.progress_lines(ledger))),
        "campaigns": told.described(needed, lambda _file: joined([*told.campaign_lines(ledger), answers_line(ledger)])),
        "runs in progress": joined(told.described(path, told.checkpoint_line, again) for path in runs),
        "teacher signals": joined(told.described(path.parent, told.signals_line, again) for path in stores),
        "artifacts": told.described(
            "manifest.json",
            lambda _file: joined(told.described(name, told.artifact_line) for name in artifacts.manifest()),
        ),
    }
    for title, lines in sections.items():
        print(f"{title}\n  {lines or 'none'}")
    return int(any(f": {told.DAMAGED} (" in lines for lines in sections.values()))


def answers_line(ledger: pd.DataFrame) -> str:
    """How far the campaign `answers` is; its settings are known when the search is done."""
    try:
        wanted = campaign_specs("answers")
    except (ValueError, ModuleNotFoundError) as error:
        return f"answers: {error}"
    done = len(campaigns.rows_of(ledger, wanted))
    return f"answers: {done} of {len(wanted)} runs done, {len(wanted) - done} left"


def publish(run_id: Annotated[Sequence[str], "as in the ledger; status lists them"]) -> None:
    """Put the weights of finished runs into artifacts/.

    The published students have one teacher: students of another one are published all together, with their teacher.
    """
    study = open_study("full")
    table = study.ledger.read().set_index("run_id", drop=False)
    if unknown := [name for name in run_id if name not in table.index]:
        raise ValueError(f"the ledger has no run {unknown[0]!r}: `python -m kdig_utils status` lists the runs")
    teachers.check_students(table.loc[run_id], table)
    for name in run_id:
        entry = publishing.publish_run(study, table.loc[name])
        print(f"{entry['file']}: run {name}, {entry['precision']}, {entry['test_accuracy']:.2f} % on the test images")
    if teachers.promote(table):
        print("next_teacher has students: it is teacher now")


def readme(*, check: Check = False) -> None:
    """Fill the table of results in the README from the ledger."""
    from kdig_utils.book import repository

    path = paths.repository_root() / "README.md"
    text = repository.readme_with(repository.results_table(Ledger(paths.ledger_path()).read()))
    if path.read_text(encoding="utf-8") == text:
        print("README.md says what the ledger says")
    elif check:
        raise ValueError("the table in README.md is not the ledger's: run `python -m kdig_utils readme`")
    else:
        with paths.replacing(path) as part:
            part.write_text(text, encoding="utf-8")
        print("README.md got the ledger's table")


def links(*, check: Check = False) -> None:
    """Write the public address of pyproject.toml into every file that links to it."""
    from kdig_utils.book import repository

    changed = []
    for path, slug, text in repository.stale_addresses():
        changed.append(str(path.relative_to(paths.repository_root())))
        if check:
            raise ValueError(f"{changed[-1]} names {slug}: run `python -m kdig_utils links`")
        with paths.replacing(path) as part:
            part.write_text(text, encoding="utf-8")
    print(f"{repository.address()}: changed {', '.join(changed) or 'nothing'}")
