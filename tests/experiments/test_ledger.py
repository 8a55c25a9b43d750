"""Runs and the ledger: stable identities, early errors, and a table that survives crowds and full disks."""

import dataclasses
import errno
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from filelock import SoftFileLock

import kdig_utils
from kdig_utils.experiments.ledger import COLUMNS, Ledger, code_commit, of_one_teacher, provenance, spec_of
from kdig_utils.method.spec import METHODS, RunSpec, TeacherSpec

PROCESSES, ROWS_EACH = 4, 6
OTHER_VALUES = {
    "method": "kd", "k": 7, "seed": 1, "epochs": 99, "batch_size": 128, "learning_rate": 1e-2, "alpha": 0.02,
    "temperature": 3.0, "gamma": 0.7, "overlay_probability": 0.2, "pairing": "shuffled", "train_fraction": 0.8,
    "validation_images": 5000, "teacher_sha256": "ab", "n_steps": 20, "data_md5": "cd",
    "precision": "float32", "answers": "online", "sample_seed": 4, "schedule": "one_cycle",
    "stem_stride": 2, "weight_decay": 5e-4, "initial": "teacher", "train_images": 2500,
}  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results" / "runs.csv")


# Identity


def test_identity_of_a_run_is_pinned() -> None:
    """The committed ledger, curves and weights are filed under these: another value here orphans every run."""
    assert RunSpec("kd_ig").run_id == "c205e981730b"
    assert RunSpec("student", seed=3, epochs=2).run_id == "1f56ec16899b"
    assert TeacherSpec().run_id == "b6246adfe320"


def test_every_field_changes_the_identity() -> None:
    assert set(OTHER_VALUES) == {field.name for field in dataclasses.fields(RunSpec)}
    base = RunSpec("kd_ig")
    identities = [dataclasses.replace(base, **{name: value}).run_id for name, value in OTHER_VALUES.items()]
    assert len({base.run_id, *identities}) == 1 + len(OTHER_VALUES)


def test_a_default_that_is_written_out_is_the_same_run() -> None:
    assert RunSpec("kd", k=5, seed=0, epochs=100, temperature=2.5).run_id == RunSpec("kd").run_id


def test_methods_and_defaults_are_the_papers(paper: dict) -> None:
    assert tuple(METHODS) == tuple(method for method in paper["ablation_runs"] if method in METHODS)
    assert len(METHODS) == 8
    spec, settings = RunSpec("kd_ig_at"), paper["training"]
    for name in ("epochs", "batch_size", "learning_rate", "alpha", "temperature", "gamma", "overlay_probability"):
        assert getattr(spec, name) == settings[name]
    assert spec.k == paper["student"]["main_k"]


@pytest.fixture
def paper() -> dict:
    return json.loads((Path(kdig_utils.__file__).parent / "paper.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_method(method: str) -> None:
    spec = RunSpec(method)
    parts = [part for part in ("kd", "ig", "at") if spec.uses(part)]
    assert "_".join(parts) == ("" if method == "student" else method)
    assert spec.uses_teacher == bool(parts)


# Ranges


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"method": "KD"}, r"unknown method 'KD': choose one of student, kd"),
        ({"method": "ig_kd"}, "unknown method 'ig_kd'"),
        ({"k": 4}, "unknown k 4: choose one of 3, 5"),
        ({"k": 19}, "unknown k 19"),
        ({"temperature": 0}, "temperature 0 is not above 0"),
        ({"temperature": -2.5}, "temperature -2.5 is not above 0"),
        ({"alpha": -0.1}, r"alpha -0.1 is outside \[0, 1\]"),
        ({"alpha": float("nan")}, r"alpha nan is outside \[0, 1\]"),
        ({"overlay_probability": -0.1}, r"overlay probability -0.1 is outside \[0, 1\]"),
        ({"overlay_probability": 1.1}, r"overlay probability 1.1 is outside \[0, 1\]"),
        ({"pairing": "index"}, "unknown pairing 'index'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"batch_size": 1}, "batch size 1"),
        ({"learning_rate": 0.0}, "learning rate 0.0"),
        ({"learning_rate": float("nan")}, "learning rate nan"),
        ({"train_fraction": 0.0}, "train_fraction 0.0"),
        ({"train_fraction": 1.2}, "train_fraction 1.2"),
        ({"gamma": -0.1}, "gamma -0.1"),
        ({"gamma": float("nan")}, "gamma nan"),
        ({"n_steps": 0}, "n_steps = 0"),
        ({"validation_images": -1}, "validation_images = -1"),
        ({"precision": "int8"}, "unknown precision 'int8': choose one of native, float32"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_value_outside_its_range_is_named(changed: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RunSpec(**{"method": "kd_ig", **changed})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "learning_rate", "validation_images"])
def test_teachers_ranges_too(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name.replace('_', '.')}.* -1"):
        TeacherSpec(**{name: -1})


@pytest.mark.parametrize("change", [{"schedule": "linear"}, {"cutout": -1}, {"cutout": 33}, {"precision": "half"}])
def test_wrong_teacher_settings_name_value_and_remedy(change: dict) -> None:
    (value,) = change.values()
    with pytest.raises(ValueError, match=rf"{value}.*(choose|give)"):
        TeacherSpec(**change)


def test_a_spec_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunSpec("kd").temperature = -1


# The ledger


def test_no_ledger_is_an_empty_table_with_its_columns(ledger: Ledger) -> None:
    assert ledger.read().empty
    assert tuple(ledger.read().columns) == COLUMNS
    assert ledger.find(RunSpec("kd")) is None


def test_a_row_gives_its_spec_back(ledger: Ledger) -> None:
    specs = [
        RunSpec("kd_ig", seed=4, learning_rate=3e-4, teacher_sha256="0" * 64),
        RunSpec("student"),
        TeacherSpec(epochs=3),
    ]
    for spec in specs:
        ledger.append(spec, campaign="main", test_accuracy=91.23)
    for spec in specs:
        row = ledger.find(spec)
        assert spec_of(row) == spec
        assert row["test_accuracy"] == 91.23
        assert row["method"] == spec.method


def test_a_run_is_entered_once(ledger: Ledger) -> None:
    ledger.append(RunSpec("kd"), campaign="main", test_accuracy=90.0)
    before = ledger.path.read_bytes()
    ledger.append(RunSpec("kd"), campaign="main", test_accuracy=99.0)
    assert ledger.path.read_bytes() == before


def test_appending_leaves_earlier_rows_as_they_were(ledger: Ledger) -> None:
    ledger.append(
        RunSpec("student"), campaign="main", test_accuracy=90.12, macs=1_700_000, seconds=3.4, commit="012345678901"
    )
    ledger.append(RunSpec("kd"), campaign="main", test_accuracy=91.0)  # has no macs and no commit
    line = ledger.path.read_text().splitlines()[1]
    ledger.append(RunSpec("ig"), campaign="main", test_accuracy=92.0, commit="1234e5678901")
    assert ledger.path.read_text().splitlines()[1] == line


@pytest.mark.parametrize("digits", ["012345678901", "123456789012", "1234e5678901"])
def test_hexadecimal_digits_are_never_taken_for_a_number(ledger: Ledger, digits: str) -> None:
    """One commit in 150 is digits alone, or digits around an e, which a table reader takes for a number."""
    spec = RunSpec("kd", data_md5=digits, teacher_sha256=digits)
    ledger.append(spec, campaign="main", commit=digits, weights_sha256=digits)
    row = ledger.find(spec)
    assert [row[name] for name in ("commit", "weights_sha256", "data_md5", "teacher_sha256")] == [digits] * 4


def append_rows(path: Path, process: int) -> None:
    for i in range(ROWS_EACH):
        # Two neighbours share half of their runs, so that the same run arrives from two processes.
        Ledger(path).append(RunSpec("student", seed=process * ROWS_EACH // 2 + i), campaign="main", test_accuracy=90.0)


def test_four_processes_at_once_lose_nothing_and_double_nothing(ledger: Ledger) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append_rows, args=(ledger.path, i)) for i in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    seeds = sorted(ledger.read()["seed"])
    assert seeds == list(range((PROCESSES + 1) * ROWS_EACH // 2))
    print(f"{PROCESSES * ROWS_EACH} appends of {len(seeds)} runs from {PROCESSES} processes")


def test_unknown_column_is_refused_before_anything_is_written(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="no column accuracy: choose from run_id"):
        ledger.append(RunSpec("kd"), campaign="main", accuracy=91.0)
    assert not ledger.path.exists()


@pytest.mark.parametrize(
    "content",
    [b"a,b\n1,2\n", b"", b"\x00\xff\xfe damaged", b'run_id,campaign\n"x,1\n<<<<<<< HEAD\n1,2,3,4\n'],
    ids=["other columns", "empty", "binary", "merge conflict"],
)
def test_file_that_is_no_ledger_is_named_and_kept(ledger: Ledger, content: bytes) -> None:
    ledger.path.parent.mkdir()
    ledger.path.write_bytes(content)
    for use in (ledger.read, lambda: ledger.append(RunSpec("kd"), campaign="main")):
        with pytest.raises(ValueError, match="restore it from git") as caught:
            use()
        assert str(ledger.path) in str(caught.value)
    assert ledger.path.read_bytes() == content


@pytest.mark.parametrize("where", ["replace", "to_csv"])
def test_full_disk_leaves_the_old_ledger(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    ledger.append(RunSpec("student"), campaign="main")
    before = ledger.path.read_bytes()

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "replace") if where == "replace" else (pd.DataFrame, "to_csv")), full)
        with pytest.raises(OSError, match=r"cannot write runs\.csv in .*disk is full: free some space") as caught:
            ledger.append(RunSpec("kd"), campaign="main")
    assert caught.value.errno == errno.ENOSPC
    assert ledger.path.read_bytes() == before
    assert not list(ledger.path.parent.glob(".*.part"))
    ledger.append(RunSpec("kd"), campaign="main")
    assert len(ledger.read()) == 2


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("where", ["temporary file", "lock", "folder"])
def test_read_only_folder_is_named_with_a_remedy(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, code: int, where: str
) -> None:
    def refuse(path: object = "", *_arguments: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch:
        target = {
            "temporary file": (tempfile, "mkstemp"),
            "lock": (SoftFileLock, "acquire"),
            "folder": (Path, "mkdir"),
        }[where]
        patch.setattr(*target, refuse)
        with pytest.raises(OSError, match=r"cannot write runs\.csv in .*(read-only|may not be written)") as caught:
            ledger.append(RunSpec("kd"), campaign="main")
    assert caught.value.errno == code
    assert str(ledger.path.parent) in str(caught.value)


def test_environment_says_what_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    found = provenance(torch.device("cpu"))
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert set(found) <= set(COLUMNS)
    assert found["device"].startswith("CPU")
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    assert code_commit() == ""  # not a clone
    monkeypatch.setenv("KDIG_COMMIT", "0123abc")
    assert code_commit() == "0123abc"


def test_a_clone_names_its_own_commit_unless_it_is_told_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lent machine has the files of one commit and the git folder of an earlier one."""
    if not code_commit():
        pytest.skip("needs the git repository: this is a copy without it")
    monkeypatch.setenv("KDIG_COMMIT", "0123abc")
    assert code_commit() == "0123abc"


# Of a ledger


def test_rows_of_the_teacher_with_most_of_them_stay_and_those_without_a_teacher() -> None:
    rows = pd.DataFrame({"teacher_sha256": ["b", "", "a", "b", "", "a", "b"], "row": range(7)})
    assert of_one_teacher(rows)["row"].tolist() == [0, 1, 3, 4, 6]
    assert of_one_teacher(rows[:0]).empty
    students = rows[rows["teacher_sha256"] == ""]
    assert of_one_teacher(students).equals(students)


@pytest.mark.parametrize("method", ["", "ig_kd", "kd_kd", "kd_", "kdd", "teacher"])
def test_a_method_is_made_of_parts_in_their_order(method: str) -> None:
    with pytest.raises(ValueError, match="method"):
        RunSpec(method)


def test_what_a_method_does_not_read_is_no_part_of_its_setting() -> None:
    """Runs that differ in nothing that their method reads are repetitions, whatever else their specs say."""
    assert RunSpec("ig", alpha=0.5).setting() == RunSpec("ig").setting()
    assert RunSpec("kd", alpha=0.5).setting() != RunSpec("kd").setting()
    assert RunSpec("student", pairing="shuffled").setting() == RunSpec("student", seed=3).setting()
    assert RunSpec("at", pairing="shuffled").setting() != RunSpec("at").setting()
