"""What the repository shows the world: its address, its chapters, and the README's table of results."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from kdig_utils.analysis import claims, laboratory, plan, scorecard, verdicts
from kdig_utils.experiments import campaigns, evidence, teachers
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.method.spec import METHODS, RunSpec, TeacherSpec
from kdig_utils.paths import repository_root

README_QUESTIONS = ("L1", "L2", "L3", "L4")  # of the laptop protocol
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# Where a file of the book names the book's own repository; other links to GitHub are other people's.
OWN_ADDRESS = re.compile(
    r"(?:colab\.research\.google\.com/github/|git clone [^\n\"]*?https://github\.com/"
    r"|repository-code: https://github\.com/|\burl: https://github\.com/)([\w-]+/[\w-]+)"
)
TEACHER_SIGNALS = {"kd": "answers", "ig": "reasons", "at": "attention"}  # by the part of a method's name


def address() -> str:
    """The public address of the repository, `https://github.com/OWNER/NAME`, from `[project.urls]` in pyproject.toml.

    Raises:
        ValueError: it is no address of a GitHub repository.
    """
    path = repository_root() / "pyproject.toml"
    found = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    if not re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+", found):
        raise ValueError(f"Repository = {found!r} in {path.name} is not of the form https://github.com/OWNER/NAME")
    return found


def notebooks() -> list[Path]:
    """The chapters that compute, in reading order: those of the table of contents, and no copy that a reader made."""
    contents = repository_root() / "_toc.yml"
    text = contents.read_text(encoding="utf-8") if contents.is_file() else ""
    listed = re.findall(r"^ *- file: (notebooks/\d\d_\w+)", text, re.MULTILINE)
    return [contents.parent / f"{name}.ipynb" for name in listed]


def stale_addresses() -> Iterator[tuple[Path, str, str]]:
    """Each file that names another repository as the book's own, with that `OWNER/NAME`, and its text put right."""
    root, own = repository_root(), address().removeprefix("https://github.com/")
    named = [root / name for name in ("README.md", "CITATION.cff", "_config.yml")]
    for path in filter(Path.is_file, (*named, *sorted(root.glob("book/*.md")), *notebooks())):
        text = path.read_text(encoding="utf-8")
        for slug in sorted(set(OWN_ADDRESS.findall(text)) - {own}):
            text = re.sub(rf"(github\.com/|google\.com/github/){re.escape(slug)}\b", rf"\g<1>{own}", text)
            folder = re.escape(slug.split("/")[1])  # that a clone makes
            text = re.sub(rf"(\bcd (?:-q )?){folder}\b", rf"\g<1>{own.split('/')[1]}", text)
            yield path, slug, text


def results_table(ledger: pd.DataFrame) -> str:
    """What the README shows, in Markdown: the laptop laboratory, claims by kind of evidence, methods, and the queue."""
    tables = (claims_table(ledger), methods_table(ledger), queue_table(ledger))
    return "\n\n".join([laboratory_table(laboratory.contrasts(laboratory.accuracies(laboratory.read()))), *tables])


def laboratory_table(contrasts: pd.DataFrame) -> str:
    """The contrasts of `README_QUESTIONS`, in points, with what was expected of them before the runs."""
    titles = {name: question["title"] for name, question in laboratory.registered()["questions"].items()}
    lines = ["| question | compared, in points of test accuracy | found | expected |", "|---|---|---|---|"]
    for row in contrasts[contrasts["question"].isin(README_QUESTIONS)].itertuples():
        question = titles.pop(row.question, "")
        lines.append(f"| {question} | {row.text} | {laboratory.in_words(row)} | {row.prediction} |")
    return "\n".join(lines)


def claims_table(ledger: pd.DataFrame) -> str:
    """How many claims of each kind of evidence have which verdict; what a clock must settle is in chapter 16."""
    card = scorecard.scorecard(ledger)
    counts = scorecard.by_kind(card[card["evidence"] != evidence.TIMED])
    lines = [f"| evidence that settles the claim | {' | '.join(verdicts.VERDICTS)} |", "|---" * 7 + "|"]
    lines += [f"| {kind} | {' | '.join(str(n or '') for n in counts.loc[kind])} |" for kind in counts.index]
    return "\n".join(lines)


def methods_table(ledger: pd.DataFrame) -> str:
    """Students of `campaigns.main_runs` and their teacher beside the paper's; a row for each method, run or not.

    Below stands a better teacher that has no students of the paper's size yet.
    """
    students = campaigns.main_runs(ledger)
    shown = {"teacher": teachers.of(students, ledger), **dict(iter(students.groupby("method")))}
    headings = "| method | learns from labels and | seeds | epochs | test accuracy | evidence | in the paper |"
    lines = [headings, "|---" * 7 + "|"]
    for method in ("teacher", *METHODS):
        signals = ", ".join(TEACHER_SIGNALS[part] for part in TEACHER_SIGNALS if part in method.split("_"))
        runs = claims.lookup("teacher.accuracy" if method == "teacher" else f"ablation_runs.{method}")
        for cells in _cells_of(shown.get(method, ledger.head(0))):
            lines.append(f"| `{method}` | {signals} | {cells} | {np.mean(runs):.2f} % |")
    for _index, row in teachers.waiting(ledger).iterrows():
        spec = spec_of(row)
        trained = getattr(spec, "recipe", "") or f"{spec.epochs} epochs by this book's code"
        words = f"{row['test_accuracy']:.2f} % (run `{row['run_id']}`). How it was trained: {trained}."
        lines += ["", f"A better teacher has no students of the paper's size yet: {words}"]
    return "\n".join(lines)


def _cells_of(runs: pd.DataFrame) -> Iterator[str]:
    """Seeds, epochs, mean accuracy with standard deviation, and kind of evidence: once for each number of epochs."""
    if runs.empty:
        yield f" | | | {evidence.NOT_RUN}"
    for _epochs, group in runs.groupby("epochs"):
        accuracy = group["test_accuracy"].astype(float)
        spread = f" ± {accuracy.std():.2f}" if len(group) > 1 else ""
        budget = ", or ".join(dict.fromkeys(_budget(spec_of(row)) for _index, row in group.iterrows()))
        kind = evidence.in_words(evidence.of_runs(group))
        yield f"{len(group)} | {budget} | {accuracy.mean():.2f}{spread} % | {kind}"


def _budget(spec: RunSpec | TeacherSpec) -> str:
    """Epochs, and of a teacher where it started and by which recipe, in words."""
    if isinstance(spec, RunSpec):
        return str(spec.epochs)
    continued = "after an earlier short training" if spec.initial_sha256 else ""
    return ", ".join(filter(None, [str(spec.epochs), continued, spec.recipe]))


def queue_table(ledger: pd.DataFrame) -> str:
    """How many runs of each stage of the queue the ledger holds, and how many claims it settles; in its order."""
    stages = plan.stages(plan.plan(ledger))
    lines = ["| stage of the queue, in its order | runs done | settles claims |", "|---|---|---|"]
    lines += [f"| {row.stage} | {row.done} of {row.runs} | {row.claims or ''} |" for row in stages.itertuples()]
    return "\n".join(lines)


def readme_with(table: str) -> str:
    """The text of the README with `table` between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    text = (repository_root() / "README.md").read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}, once each, around its table of results")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
