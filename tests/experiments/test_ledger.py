"""The ledger: a table of finished runs that survives crowds and full disks."""

import errno
import multiprocessing
import os
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from filelock import SoftFileLock

from kdig_utils.experiments.ledger import COLUMNS, Ledger, code_commit, of_one_teacher, provenance, spec_of
from kdig_utils.method.spec import RunSpec, TeacherSpec

PROCESSES, ROWS_EACH = 4, 6


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results" / "runs.csv")


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


@pytest.mark.parametrize("digits", ["012345678901", "123456789012", "1234e5678901", "000000000000"])
def test_hexadecimal_digits_are_never_taken_for_a_number(ledger: Ledger, digits: str) -> None:
    """One commit in 150 is digits alone, or digits around an e, which a table reader takes for a number."""
    md5, sha256 = (digits * 6)[:32], (digits * 6)[:64]
    spec = RunSpec("kd", data_md5=md5, teacher_sha256=sha256)
    ledger.append(spec, campaign="main", test_accuracy=90.0, commit=digits, weights_sha256=sha256)
    row = ledger.find(spec)
    found = [row[name] for name in ("commit", "data_md5", "weights_sha256", "teacher_sha256")]
    assert found == [digits, md5, sha256, sha256]


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
    [
        b"a,b\n1,2\n",
        b"",
        b"\x00\xff\xfe damaged",
        b'run_id,campaign\n"x,1\n<<<<<<< HEAD\n1,2,3,4\n',
        (",".join(COLUMNS) + ",of_tomorrow\n").encode(),
        (",".join(COLUMNS[::-1]) + "\n").encode(),
    ],
    ids=["other columns", "empty", "binary", "merge conflict", "of a newer version", "another order"],
)
def test_file_that_is_no_ledger_is_named_and_kept(ledger: Ledger, content: bytes) -> None:
    ledger.path.parent.mkdir()
    ledger.path.write_bytes(content)
    for use in (ledger.read, lambda: ledger.append(RunSpec("kd"), campaign="main", test_accuracy=90.0)):
        with pytest.raises(ValueError, match="restore it from git") as caught:
            use()
        assert str(ledger.path) in str(caught.value)
    assert ledger.path.read_bytes() == content


def test_a_row_that_the_disk_did_not_keep_is_not_reported(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, content: write(path, content[:-5]))
        with pytest.raises(OSError, match="another disk"):
            ledger.append(RunSpec("student"), campaign="main", test_accuracy=90.0)


@pytest.mark.parametrize("where", ["replace", "write_bytes"])
def test_full_disk_leaves_the_old_ledger(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    ledger.append(RunSpec("student"), campaign="main", test_accuracy=90.0)
    before = ledger.path.read_bytes()

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os if where == "replace" else Path, where, full)
        with pytest.raises(OSError, match=r"cannot write runs\.csv in .*disk is full: free some space") as caught:
            ledger.append(RunSpec("kd"), campaign="main", test_accuracy=90.0)
    assert caught.value.errno == errno.ENOSPC
    assert ledger.path.read_bytes() == before
    assert not list(ledger.path.parent.glob(".*.part"))
    ledger.append(RunSpec("kd"), campaign="main", test_accuracy=90.0)
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
            ledger.append(RunSpec("kd"), campaign="main", test_accuracy=90.0)
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
