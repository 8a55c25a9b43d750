"""Rows from outside: what is cut, changed by hand, merged badly or made up is named, and nothing is built on it."""

import csv
import os
import time
from pathlib import Path

import pandas as pd
import pytest

from kdig_utils.experiments.ledger import COLUMNS, LATER_COLUMNS, Ledger
from kdig_utils.method.spec import RunSpec, TeacherSpec


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results" / "runs.csv")


@pytest.fixture
def whole(ledger: Ledger) -> Ledger:
    """A ledger of three runs, with all that a run leaves and with as little as there may be."""
    facts = {"campaign": "main", "parameters": 543498, "macs": 58696640, "seconds": 12.5, "device": "CPU, 1 threads"}
    facts |= {"train_images": 50000, "test_images": 10000, "weights_sha256": "ab" * 32, "finished": "2026-11-22T22:29Z"}
    ledger.append(TeacherSpec(epochs=3), test_accuracy=89.34, train_loss=0.5, sample_accuracy=52.9, **facts)
    ledger.append(RunSpec("kd", teacher_sha256="cd" * 32), test_accuracy=74.52, sample_accuracy=58.35, **facts)
    ledger.append(RunSpec("student", seed=1), test_accuracy=70.0)
    return ledger


def changed(path: Path, line: int, cells: dict[str, str]) -> None:
    """Write other cells into a line of a ledger, the header's being 1."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    for name, cell in cells.items():
        lines[line - 1][COLUMNS.index(name)] = cell
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


WRONG = {
    "test_accuracy": ["", "1e9", "-3", "74.52 %", "100.01", "nan", "inf", "x"],
    "validation_accuracy": ["-0.1", "101"],
    "sample_accuracy": ["101", "NaN"],
    "train_loss": ["-1", "inf"],
    "seconds": ["-1", "1h"],
    "parameters": ["0", "-5", "2.5"],
    "macs": ["0"],
    "train_images": ["0", "-1"],
    "test_images": ["many"],
    "run_id": ["not_a_hash", "", "0123456789ab", "7693EE7D0701"],
    "method": ["kd_ig", "teacher", "", "sorcery"],
    "k": ["7", "", "five"],
    "seed": ["1", "-1"],
    "epochs": ["99", "2.5"],
    "train_fraction": ["0.8", "nan"],
    "pairing": ["shuffled", ""],
    "data_md5": ["ab" * 16, "none"],
    "teacher_sha256": ["", "ab" * 32, "a good teacher"],
    "weights_sha256": ["ab" * 31, "AB" * 32],
    "finished": ["yesterday", "2026-13-22T22:29Z"],
    "spec": ["", "{}", "[1]", "{", "null", '{"method": "kd", "alpha": NaN}',
        '{"method": "kd", "seed": true}', "[" * 50_000],
}  # fmt: skip


def test_a_row_that_is_out_of_range_or_contradicts_its_spec_is_named_and_nothing_is_appended(whole: Ledger) -> None:
    good = whole.path.read_bytes()
    for column, cells in WRONG.items():
        for cell in cells:
            changed(whole.path, 3, {column: cell})
            damaged = whole.path.read_bytes()
            for use in (whole.read, lambda: whole.append(RunSpec("ig"), test_accuracy=1.0)):
                with pytest.raises(ValueError, match=r"line 3: .*restore it from git") as caught:
                    use()
                assert str(whole.path) in str(caught.value)
                assert not any(word in str(caught.value) for word in ("type=", "http", "validation error"))
                assert {column, "spec", "run_id", "method"} & set(str(caught.value).replace(" = ", " ").split()), column
            assert whole.path.read_bytes() == damaged
            whole.path.write_bytes(good)
    print(f"{sum(map(len, WRONG.values()))} wrong cells")


@pytest.mark.parametrize(("column", "value"), [("test_accuracy", 120.0), ("test_accuracy", float("nan")), ("macs", -1)])
def test_a_measured_value_out_of_range_is_not_entered(whole: Ledger, column: str, value: float) -> None:
    before = whole.path.read_bytes()
    with pytest.raises(ValueError, match=f"{column} = .*nothing was written"):
        whole.append(RunSpec("ig"), **{"test_accuracy": 90.0, column: value})
    assert whole.path.read_bytes() == before


def test_rows_of_another_ledger_are_checked_before_they_are_merged(whole: Ledger, tmp_path: Path) -> None:
    home, rows = Ledger(tmp_path / "home.csv"), whole.read()
    lies = [
        rows.assign(test_accuracy=999.0),
        rows.assign(run_id=["0123456789ab", "1123456789ab", "2123456789ab"]),
        rows.assign(seed=7),
        rows.drop(columns="spec"),
        pd.concat([rows, rows]),
        rows.assign(of_tomorrow=1),
    ]
    for table in lies:
        with pytest.raises(ValueError, match=r"999|0123456789ab|seed|spec|twice|of_tomorrow"):
            home.merge(table)
        assert not home.path.exists()
    assert home.merge(rows[list(COLUMNS[::-1])]) == list(rows["run_id"]), "the order of a table's columns is no matter"
    assert home.path.read_bytes() == whole.path.read_bytes()


def test_a_run_that_is_there_twice_is_named(whole: Ledger) -> None:
    lines = whole.path.read_text().splitlines(keepends=True)
    whole.path.write_text("".join([*lines, lines[2].replace("74.52", "75.0")]))
    run_id = lines[2][:12]
    with pytest.raises(ValueError, match=f"line 5: run_id = '{run_id}' is there twice; restore it from git"):
        whole.read()


def test_gits_conflict_markers_say_how_to_go_on_and_going_on_works(whole: Ledger) -> None:
    lines = whole.path.read_text().splitlines(keepends=True)
    markers = ["<<<<<<< HEAD\n", "=======\n", ">>>>>>> theirs\n"]
    together = [*lines[:2], markers[0], lines[2], markers[1], lines[3], markers[2]]
    whole.path.write_text("".join(together))
    for use in (whole.read, lambda: whole.append(RunSpec("ig"), test_accuracy=1.0)):
        with pytest.raises(ValueError, match=r"line 3.*conflict marker.*take out the lines.*or restore it from git"):
            use()
    assert whole.path.read_text() == "".join(together)
    whole.path.write_text("".join(line for line in together if line not in markers))
    assert len(whole.read()) == 3


def test_a_ledger_cut_at_any_byte_is_refused_or_is_the_shorter_one(whole: Ledger) -> None:
    """A last number may be whole or cut (52.9 to 5), so a row counts only with the end of its line."""
    content, good, counts = whole.path.read_bytes(), whole.read(), {"refused": 0, "shorter": 0}
    for cut in range(len(content)):
        whole.path.write_bytes(content[:cut])
        try:
            found = whole.read()
        except ValueError:
            counts["refused"] += 1
        else:
            assert content[:cut].endswith(b"\n")
            pd.testing.assert_frame_equal(found, good.head(len(found)), check_dtype=False)
            counts["shorter"] += 1
    assert counts["shorter"] == 3
    print(f"{len(content)} cuts: {counts}")


def test_a_ledger_from_before_its_later_columns_is_read(whole: Ledger) -> None:
    rows = whole.read()
    older = rows.drop(columns=list(LATER_COLUMNS))
    older.to_csv(whole.path, index=False)
    found = whole.read()
    pd.testing.assert_frame_equal(found[list(older)], older)
    assert found["compiled"].tolist() == ["", "", ""]
    assert found["sample_accuracy"].isna().all()


def test_a_change_of_the_file_is_seen_and_a_table_that_was_given_out_is_the_callers_own(whole: Ledger) -> None:
    first, stat = whole.read(), whole.path.stat()
    first.loc[:, "test_accuracy"] = 1.0
    assert whole.read()["test_accuracy"].tolist() == [89.34, 74.52, 70.0]
    whole.path.write_bytes(whole.path.read_bytes().replace(b"74.52", b"74.53"))
    os.utime(whole.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same inode, same time
    assert whole.read()["test_accuracy"].tolist() == [89.34, 74.53, 70.0]


def test_reading_again_costs_little() -> None:
    """Each chapter and each reservation reads: the committed ledger is checked once. Seconds are of this process."""
    ledger = Ledger(Path(__file__).parents[2] / "results" / "laptop.csv")
    ledger.read()
    begun = time.process_time()
    for _again in range(20):
        ledger.read()
    seconds = (time.process_time() - begun) / 20
    print(f"{len(ledger.read())} rows again in {1000 * seconds:.2f} ms")
    assert seconds < 0.05
