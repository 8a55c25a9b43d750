"""Teachers: each row says by which recipe; the best with students is shown; students of two never stand together."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from kdig_utils import __main__ as command_line
from kdig_utils.analysis import scorecard
from kdig_utils.book import repository, status
from kdig_utils.commands import make_runs
from kdig_utils.experiments import evidence, study, teachers
from kdig_utils.experiments.ledger import Ledger, spec_of
from kdig_utils.method import artifacts, models
from kdig_utils.method.cifar10 import ImageSet, first_of_each_class
from kdig_utils.method.spec import MAIN_METHODS, RunSpec, TeacherSpec

OLD, NEW = "a" * 64, "b" * 64
RECIPE = "Adam, by other code"
THEIRS = TeacherSpec(epochs=11, initial_sha256=OLD, recipe=RECIPE)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_train: ImageSet, sample_test: ImageSet) -> Path:
    """An empty clone of the book with 100 images in place of the official data set, and accuracies that a test sets."""
    for name in ("notebooks", "kdig_utils", "artifacts", "results"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path / "workspace"))
    few = {name: images.subset(first_of_each_class(images.labels, 10)) for name, images in
           {"train": sample_train, "test": sample_test}.items()}  # fmt: skip
    monkeypatch.setattr(study.cifar10, "fetch", lambda: Path())
    monkeypatch.setattr(study.cifar10, "load", lambda split, root=None: few[split])
    return tmp_path


@pytest.fixture
def ledger(clone: Path) -> Ledger:
    return Ledger(clone / "results" / "runs.csv")


@pytest.fixture
def file(clone: Path) -> Path:
    """The weights of another code's teacher."""
    return weights_of(models.teacher(seed=1), clone / "theirs.safetensors")


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Say what the next network that is measured reaches."""
    return lambda value: monkeypatch.setattr(teachers.models, "accuracy", lambda network, images: value)


def weights_of(network: torch.nn.Module, path: Path) -> Path:
    artifacts.save_weights(network, path)
    return path


def adopt(file: Path, recipe: str = RECIPE) -> int:
    return command_line.main(["adopt", str(file), "--recipe", recipe, "--epochs", "11", "--seconds", "4200"])


def finish(ledger: Ledger, folder: Path, spec: RunSpec | TeacherSpec, accuracy: float = 75.0) -> pd.Series:
    """A finished run, with weights in the workspace."""
    network = artifacts.model_for(spec.method, spec.k).eval()
    artifacts.save_weights(network, folder / "workspace" / "full" / "weights" / f"{spec.run_id}.safetensors")
    sha256 = models.weights_sha256(network)
    ledger.append(spec, campaign="main", test_accuracy=accuracy, test_images=100, weights_sha256=sha256)
    return ledger.find(spec)


def enter(ledger: Ledger, teacher: TeacherSpec, sha256: str, accuracy: float, students: tuple[str, ...] = ()) -> None:
    ledger.append(teacher, weights_sha256=sha256, test_accuracy=accuracy, train_images=50000, campaign="main")
    for method in students:
        taught = "" if method == "student" else sha256
        ledger.append(RunSpec(method, epochs=3, teacher_sha256=taught), test_accuracy=75.0, train_images=50000)


# A recipe is part of what a teacher is


def test_a_teacher_with_a_recipe_is_another_run_than_one_without(ledger: Ledger) -> None:
    plain, other = TeacherSpec(epochs=11), TeacherSpec(epochs=11, recipe=RECIPE)
    assert len({plain.run_id, other.run_id, TeacherSpec(epochs=11, recipe="SGD").run_id}) == 3
    ledger.append(other, test_accuracy=91.0)
    assert spec_of(ledger.find(other)) == other


@pytest.mark.parametrize("recipe", ["two\nlines", " edges ", "two  spaces"])
def test_a_recipe_is_one_line_of_words(recipe: str) -> None:
    with pytest.raises(ValueError, match="one line of words"):
        TeacherSpec(recipe=recipe)


def test_status_and_evidence_name_the_recipe(ledger: Ledger) -> None:
    enter(ledger, THEIRS, NEW, 91.0)
    assert RECIPE in "".join(status.ledger_lines(ledger.read()))
    assert evidence.of_runs(ledger.read()) == [
        evidence.protocol("11 epochs of the teacher after earlier ones, by a recipe of its own")
    ]


# Which teacher is shown


def test_the_table_shows_the_teacher_of_its_students_and_below_it_a_better_one_that_waits(ledger: Ledger) -> None:
    enter(ledger, TeacherSpec(epochs=4), OLD, 89.0, MAIN_METHODS)
    enter(ledger, THEIRS, NEW, 91.5)
    rows, _empty, below = repository.methods_table(ledger.read()).rpartition("\n\n")
    assert "| `teacher` |  | 1 | 4 | 89.00 % |" in rows
    assert "91.50" not in rows
    assert RECIPE in below
    assert "91.50 %" in below


def test_students_of_two_teachers_do_not_mix_in_the_table(ledger: Ledger) -> None:
    enter(ledger, TeacherSpec(epochs=4), OLD, 89.0, MAIN_METHODS)
    enter(ledger, THEIRS, NEW, 91.5, ("kd",))
    for seed in (1, 2):
        for method in MAIN_METHODS[1:]:
            ledger.append(RunSpec(method, epochs=3, teacher_sha256=NEW, seed=seed), test_accuracy=79.0)
    table = repository.methods_table(ledger.read())
    assert f"| `teacher` |  | 1 | 11, after an earlier short training, {RECIPE} | 91.50 % |" in table
    assert "89.00" not in table
    assert "waits" not in table
    assert "| `kd_ig` | answers, reasons | 2 | 3 | 79.00 ± 0.00 % |" in table


def test_students_whose_teacher_is_unknown_stand_beside_no_other(ledger: Ledger) -> None:
    enter(ledger, TeacherSpec(epochs=4), OLD, 89.0)
    ledger.append(RunSpec("kd", epochs=3, teacher_sha256=NEW), test_accuracy=75.0)
    line = next(line for line in repository.methods_table(ledger.read()).splitlines() if "`teacher`" in line)
    assert "not run yet" in line


def test_the_scorecard_takes_its_meanwhile_from_the_teacher_that_has_students(ledger: Ledger) -> None:
    def meanwhile() -> float:
        table = ledger.read().assign(seed=0, finished="2027-01-01T00:00Z", test_images=10000)
        return scorecard.scorecard(table).set_index("name").loc["teacher", "short"]

    enter(ledger, TeacherSpec(epochs=4), OLD, 89.0, MAIN_METHODS)
    enter(ledger, THEIRS, NEW, 91.5)
    assert meanwhile() == pytest.approx(89.0)
    enter(ledger, THEIRS, NEW, 91.5, ("kd", "kd_ig"))
    assert meanwhile() == pytest.approx(91.5)


# A teacher that other code trained


def test_its_row_says_what_is_known_and_its_file_holds_the_network_of_the_row(
    ledger: Ledger, file: Path, accuracy: Callable
) -> None:
    accuracy(91.5)
    assert adopt(file) == 0
    (row,) = ledger.read().to_dict("records")
    assert (row["test_accuracy"], row["seconds"], row["epochs"], row["commit"]) == (91.5, 4200, 11, "")
    entry, published = artifacts.manifest()["teacher"], artifacts.load("teacher")
    assert entry["precision"] == "float16"
    assert entry["weights_sha256"] == row["weights_sha256"] == models.weights_sha256(published)
    assert not teachers.is_rounded_copy("teacher")
    kept = study.open_study("full").weights(spec_of(ledger.read().iloc[0]))
    assert models.weights_sha256(kept) == row["weights_sha256"]


def test_the_same_file_twice_adds_one_row(
    ledger: Ledger, file: Path, accuracy: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy(91.5)
    assert adopt(file) == 0
    before = ledger.path.read_bytes()
    assert adopt(file) == 0
    assert adopt(file, "in other words") == 0
    assert "in the ledger already" in capsys.readouterr().out
    assert ledger.path.read_bytes() == before


@pytest.mark.parametrize(
    ("damage", "remedy"),
    [("cut", "restore or train it again"), ("student", "build the architecture"), ("absent", "restore the file")],
)
def test_a_file_that_is_no_teacher_is_one_line_and_changes_nothing(
    damage: str, remedy: str, clone: Path, ledger: Ledger, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = file.read_bytes()
    if damage == "absent":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(whole[:-100])
    else:
        weights_of(models.student(5), file)
    assert adopt(file) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert remedy in line
    assert not ledger.path.exists()
    assert not artifacts.manifest()
    assert not list(clone.glob("workspace/**/*.safetensors"))


def test_two_networks_need_two_recipes(
    ledger: Ledger, file: Path, accuracy: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy(91.5)
    assert adopt(file) == 0
    weights_of(models.teacher(seed=2), file)
    assert adopt(file) == 2
    assert "say in the recipe what differs" in capsys.readouterr().err
    assert len(ledger.read()) == 1


# Artifacts: the students that are published have one teacher


@pytest.fixture
def published(clone: Path, ledger: Ledger) -> Path:
    """A teacher with one student of its own, both published."""
    teacher = finish(ledger, clone, TeacherSpec(epochs=4), 89.0)
    student = finish(ledger, clone, RunSpec("kd", epochs=3, teacher_sha256=teacher["weights_sha256"]))
    assert command_line.main(["publish", teacher["run_id"], student["run_id"]]) == 0
    return clone


def test_a_better_teacher_waits_until_its_students_are_published(
    published: Path, ledger: Ledger, file: Path, accuracy: Callable
) -> None:
    accuracy(91.5)
    shown = artifacts.manifest()["teacher"]
    assert adopt(file) == 0
    assert artifacts.manifest()["teacher"] == shown
    new = artifacts.manifest()[teachers.NEXT]["weights_sha256"]
    assert study.open_study("published").teacher_sha256 == shown["weights_sha256"]
    assert make_runs.student_study("full", 2).teacher_sha256 == new
    assert len(study.open_study("published").kinds("teacher")) == 1

    student = finish(ledger, published, RunSpec("kd", epochs=3, teacher_sha256=new))
    assert command_line.main(["publish", student["run_id"]]) == 0
    assert artifacts.manifest()["teacher"]["weights_sha256"] == new
    assert models.weights_sha256(artifacts.load("teacher")) == new
    assert teachers.NEXT not in artifacts.manifest()
    assert all(": whole, " in status.artifact_line(name) for name in artifacts.manifest())
    assert len(ledger.read()) == 4, "no row was lost"


def test_a_worse_teacher_is_entered_and_not_published(
    published: Path, ledger: Ledger, file: Path, accuracy: Callable
) -> None:
    accuracy(88.0)
    before = artifacts.manifest()
    assert adopt(file) == 0
    assert len(ledger.read()) == 3
    assert artifacts.manifest() == before


def test_published_students_of_two_teachers_are_refused(
    published: Path, ledger: Ledger, file: Path, accuracy: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy(91.5)
    assert adopt(file) == 0
    new = artifacts.manifest()[teachers.NEXT]["weights_sha256"]
    student = finish(ledger, published, RunSpec("kd_ig", epochs=3, teacher_sha256=new))
    before = artifacts.manifest()
    assert command_line.main(["publish", student["run_id"]]) == 2
    assert "publish all methods of one teacher together" in capsys.readouterr().err
    stranger = finish(ledger, published, RunSpec("kd", epochs=2, teacher_sha256=OLD))
    assert command_line.main(["publish", stranger["run_id"]]) == 2
    assert f"teacher {OLD[:12]} of these students is not published" in capsys.readouterr().err
    assert artifacts.manifest() == before


def test_who_is_only_looked_at_may_be_rounded_and_nobody_learns_from_a_rounded_copy(
    published: Path, ledger: Ledger, file: Path, accuracy: Callable
) -> None:
    accuracy(91.5)
    assert artifacts.manifest()["teacher"]["precision"] == "float32"
    assert adopt(file) == 0
    shown = artifacts.manifest()["teacher"]
    assert command_line.main(["publish", shown["run_id"]]) == 0
    assert artifacts.manifest()["teacher"]["precision"] == "float16"
    assert teachers.is_rounded_copy("teacher")
    assert study.open_study("published").teacher_sha256 == shown["weights_sha256"]
    (published / "artifacts" / "manifest.json").write_text(
        (published / "artifacts" / "manifest.json").read_text().replace(f'"{teachers.NEXT}": ', '"gone": ')
    )
    with pytest.raises(ValueError, match="rounded copy: publish the teacher to learn from"):
        make_runs.student_study("full", 2)


def test_the_committed_students_have_the_committed_teacher() -> None:
    """Nothing in the chapters compares a published student with another teacher than its own."""
    book = study.open_study("published")
    rows = book.ledger.read().set_index("run_id")
    entries = [entry for entry in artifacts.manifest().values() if entry["method"] not in ("teacher", "student")]
    assert {rows.loc[entry["run_id"], "teacher_sha256"] for entry in entries} == {book.teacher_sha256}
    assert models.weights_sha256(artifacts.load(teachers.best())) in set(rows["weights_sha256"])
