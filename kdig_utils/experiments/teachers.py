"""Which teacher stands where: the chapters show the best one that has students, whoever trains takes the best one.

In artifacts/ `teacher` is always the teacher of the published students. A better one waits as `next_teacher` until its
own students are published with it; then it becomes `teacher`.
"""

from pathlib import Path

import pandas as pd

from kdig_utils.experiments.ledger import Ledger, outcome
from kdig_utils.method import artifacts, models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.spec import TeacherSpec

NEXT = "next_teacher"


def best() -> str:
    """The name in artifacts/ of the teacher that new students learn from."""
    return NEXT if NEXT in artifacts.manifest() else "teacher"


def with_students(ledger: pd.DataFrame) -> pd.DataFrame:
    """The rows of teachers that students of the ledger learnt from; of all teachers if none has students."""
    teachers = _teachers_in(ledger)
    taught = teachers["weights_sha256"].isin(_named(ledger))
    return teachers[taught] if taught.any() else teachers


def of(students: pd.DataFrame, ledger: pd.DataFrame) -> pd.DataFrame:
    """The row of the teacher of these students, or none; where no student has one, of the best teacher there is."""
    teachers, names = _teachers_in(ledger), _named(students)
    return teachers[teachers["weights_sha256"].isin(names)] if names else _best_of(teachers)


def waiting(ledger: pd.DataFrame) -> pd.DataFrame:
    """The row of the best teacher, if it has no students while a worse one has; else no row."""
    chosen = _best_of(_teachers_in(ledger))
    return chosen[~chosen.index.isin(with_students(ledger).index)]


def adopt(
    file: Path, spec: TeacherSpec, ledger: Ledger, weights: Path, test: ImageSet, **known: object
) -> tuple[pd.Series, bool]:
    """Enter a teacher that other code trained: its weights, and its row, with the accuracy measured here.

    The weights are rounded to float16 first, so that a file of half the size holds the very network of the row.

    Args:
        file: safetensors, of our architecture, under torchvision's names.
        weights: the folder of the study's weights.
        known: what the ledger shall say of the training, as seconds and device.

    Returns:
        The row, and whether it is new: a network that is in the ledger already is left as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a damaged file, another architecture, no recipe, or a spec that another network has.
    """
    check_recipe(spec.recipe)
    network = artifacts.rounded(artifacts.read_weights(models.teacher(), file), "teacher", 0)
    sha256, rows = models.weights_sha256(network), ledger.read()
    if len(same := rows[rows["weights_sha256"] == sha256]):
        return same.iloc[0], False
    if (other := ledger.find(spec)) is not None:
        raise ValueError(f"run {other['run_id']} has this recipe and other weights: say in the recipe what differs")
    accuracy = models.accuracy(network, test)
    artifacts.save_weights(network, weights / f"{spec.run_id}.safetensors")
    ledger.append(spec, test_accuracy=round(accuracy, 6), test_images=len(test), **outcome(network), **known)
    return ledger.find(spec), True


def check_recipe(recipe: str) -> None:
    """Raise ValueError unless there is one."""
    if not recipe.strip():
        raise ValueError(f"the recipe {recipe!r} says nothing: say in one sentence how the teacher was trained")


def is_better_than_the_published(row: pd.Series) -> bool:
    """Whether this teacher's test accuracy is above that of every published one; the only measure that all have."""
    return all(float(row["test_accuracy"]) > entry["test_accuracy"] for entry in _published_teachers())


def name_of(row: pd.Series, ledger: pd.DataFrame) -> str:
    """What a teacher is published as: `next_teacher` while the published students have another one."""
    return NEXT if _teachers_of(_published(), ledger) - {row["weights_sha256"]} else "teacher"


def check_students(rows: pd.DataFrame, ledger: pd.DataFrame) -> None:
    """Raise ValueError unless, with these runs published, all published students have one teacher, published too."""
    students = rows[rows["method"] != "teacher"]
    names = {f"{row['method']}_k{row['k']}": row["run_id"] for _index, row in students.iterrows()}
    found = _teachers_of({**_published(), **names}, ledger)
    if len(found) > 1:
        words = " and ".join(sha256[:12] for sha256 in sorted(found))
        raise ValueError(
            f"the published students would have the teachers {words}: publish all methods of one teacher together"
        )
    there = {entry.get("weights_sha256") for entry in _published_teachers()} | set(rows["weights_sha256"])
    if missing := found - there:
        raise ValueError(f"teacher {min(missing)[:12]} of these students is not published: publish its run with them")


def promote(ledger: pd.DataFrame) -> bool:
    """Make `next_teacher` the teacher if all published students learnt from it; return whether it was made so."""
    entry = artifacts.manifest().get(NEXT)
    if entry is None or _teachers_of(_published(), ledger) != {entry["weights_sha256"]}:
        return False
    artifacts.rename(NEXT, "teacher")
    return True


def is_rounded_copy(name: str) -> bool:
    """Whether the published file holds other weights than its run ended with: students may not learn from it."""
    named = artifacts.manifest()[name].get("weights_sha256")
    return named is not None and models.weights_sha256(artifacts.load(name)) != named


def _teachers_in(ledger: pd.DataFrame) -> pd.DataFrame:
    return ledger[ledger["method"] == "teacher"]


def _best_of(teachers: pd.DataFrame) -> pd.DataFrame:
    return teachers.sort_values("test_accuracy", ascending=False, kind="stable").head(1)


def _named(rows: pd.DataFrame) -> set[str]:
    return set(rows["teacher_sha256"].fillna("")) - {""}


def _published() -> dict[str, str]:
    """The runs of the published students, by name."""
    return {name: entry["run_id"] for name, entry in artifacts.manifest().items() if entry["method"] != "teacher"}


def _published_teachers() -> list[dict]:
    return [entry for entry in artifacts.manifest().values() if entry["method"] == "teacher"]


def _teachers_of(names: dict[str, str], ledger: pd.DataFrame) -> set[str]:
    return _named(ledger[ledger["run_id"].isin(names.values())])
