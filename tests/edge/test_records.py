"""What others sent: a value that cannot be is refused with its place, and the others' figures stay."""

import json
import math
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from chapters import cells_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kdig_utils.edge import benchmark, records

chapter = cells_of("14", "BOOK", "FirstCall", "CALLS", "once", "read_latencies", "read_calls", "submitted", "books_own")
LATENCIES, FIRST_CALLS = "*.json", "first_calls/*.csv"

GOOD = {
    **{"model": "student", "runtime": "eager", "precision": "fp32", "batch": 1, "threads": 1, "status": "ok"},
    **{"p50_ms": 2.0, "p95_ms": 2.5, "p99_ms": 3.0, "calls": 100, "accuracy": 91.5, "bytes": 10},
    **{
        "speedup": 2.0,
        "speedup_low": 1.9,
        "speedup_high": 2.1,
        "machine": "a machine",
        "day": "2026-11-28",
        "note": "",
    },
}
CALLS = [f'0,"teacher first, student",{name},{call},1.5,2,M' for name in ("teacher", "student") for call in (0, 1)]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty results/latency in a repository of its own."""
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    folder = tmp_path / "results" / "latency"
    (folder / "first_calls").mkdir(parents=True)
    return folder


def write(folder: Path, name: str, *rows: object) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(list(rows)))
    return path


def write_calls(folder: Path, name: str, lines: list[str]) -> Path:
    path = folder / "first_calls" / f"{name}.csv"
    path.write_text("\n".join(["process,order,network,call,ms,threads,machine", *lines]) + "\n")
    return path


def test_the_record_of_the_book_keeps_the_schema_and_its_numbers() -> None:
    record = chapter.books_own(chapter.submitted(LATENCIES, pytest.fail))
    assert len(record)
    assert set(record.columns) == {*records.COLUMNS, "file"}
    assert ((record["status"] == "ok") == record[["p50_ms", "accuracy", "bytes"]].notna().all(axis=1)).all()
    assert record.dropna(subset="p50_ms").groupby(["batch", "threads"])["model"].nunique().eq(2).all()
    folder = Path(__file__).parents[2] / "results" / "latency"
    as_written = pd.DataFrame(json.loads((folder / f"{chapter.BOOK}.json").read_text()))
    pd.testing.assert_frame_equal(record[records.COLUMNS], as_written[records.COLUMNS], check_dtype=False)
    calls = chapter.books_own(chapter.submitted(FIRST_CALLS, pytest.fail)).drop(columns="file")
    pd.testing.assert_frame_equal(calls, pd.read_csv(folder / "first_calls" / f"{chapter.BOOK}.csv"))


def test_without_a_record_there_are_columns_and_no_rows(results: Path) -> None:
    record = chapter.submitted(LATENCIES)
    assert record.empty
    assert {*records.COLUMNS, "file"} == set(record.columns)
    assert chapter.books_own(record).empty
    assert chapter.submitted(FIRST_CALLS).empty


def test_the_record_of_the_book_comes_first_whatever_the_others_are_called(results: Path) -> None:
    for name in ("aaa", chapter.BOOK, "zzz"):
        write(results, name, {**GOOD, "machine": name})
        write_calls(results, name, CALLS)
    record = chapter.submitted(LATENCIES)
    assert record["file"].tolist() == [chapter.BOOK, "aaa", "zzz"]
    assert chapter.books_own(record)["machine"].tolist() == [chapter.BOOK]
    assert chapter.submitted(FIRST_CALLS)["file"].unique().tolist() == [chapter.BOOK, "aaa", "zzz"]


WRONG = {
    "p50_ms": [-5.0, 0, math.nan, math.inf, "0.1", "fast", [1], True, 1e308, 3e-7, None],
    "p95_ms": [0.0001, 1.0],
    "speedup": [-3, 0, "12", math.nan],
    "speedup_low": [9],
    "accuracy": [250.0, -1, "x"],
    "batch": ["1", 0, None, 1.5],
    "threads": [None, -1],
    "model": [{}, None, "", "\x1b[31m", "\u202e"],
    "runtime": [None, 5],
    "machine": [None, 7, "x" * 100_000, "<script>alert(1)</script>"],
    "day": ["2999-13-77", "yesterday", 5],
    "bytes": [-1, 0],
    "calls": [0, 2.5],
    "k": [-1],
    "status": [None],
    "file": ["epyc_2cpus"],
    "p50": [3.0],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_a_strangers_value_that_cannot_be_leaves_out_its_file_alone(results: Path, field: str, value: object) -> None:
    write(results, chapter.BOOK, GOOD)
    write(results, "stranger", GOOD, {**GOOD, "batch": 64, field: value})
    told: list[str] = []
    record = chapter.submitted(LATENCIES, told.append)
    assert record["file"].tolist() == [chapter.BOOK]
    assert len(told) == 1
    for word in ("stranger.json", "row 2", field, "measure again"):
        assert word in told[0]
    assert "\n" not in told[0]
    assert len(told[0]) < 500


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"[]", b"5", b'{"a": 1}', b'["x"]', b"[null]", b"[" * 100_000, b"\xff\xfe\0",
     json.dumps([GOOD]).encode("utf-16"), json.dumps([GOOD]).replace("2.0", "1" + "0" * 5000).encode(),
     json.dumps([GOOD] * 2).encode()],
    ids=range(12),
)  # fmt: skip
def test_a_file_that_is_no_record_is_named(results: Path, content: bytes) -> None:
    (results / "stranger.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"stranger\.json.*measure again"):
        chapter.read_latencies(results / "stranger.json")


@pytest.mark.parametrize(
    "lines",
    [[], ["1,2"], CALLS[:2], CALLS * 2, [*CALLS, CALLS[0].replace("1.5", "-1")],
     [line.replace("1.5", "") for line in CALLS],
     [line.replace("1.5", "nan") for line in CALLS], [line.replace("teacher first, student", "x") for line in CALLS],
     [f"{line},9" for line in CALLS]],
    ids=range(9),
)  # fmt: skip
def test_first_calls_that_cannot_be_are_left_out(results: Path, lines: list[str]) -> None:
    write_calls(results, chapter.BOOK, CALLS)
    write_calls(results, "stranger", lines)
    told: list[str] = []
    assert chapter.submitted(FIRST_CALLS, told.append)["file"].unique().tolist() == [chapter.BOOK]
    assert len(told) == 1
    assert "stranger.csv" in told[0]


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\0", b"", b"\0"])
def test_a_file_that_is_no_table_of_calls_is_named(results: Path, content: bytes) -> None:
    path = results / "first_calls" / "zz.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"zz\.csv.*measure again"):
        chapter.read_calls(path)


def test_whatever_a_runtime_says_can_be_read_again(tmp_path: Path) -> None:
    row = dict.fromkeys(records.COLUMNS) | GOOD | {"p50_ms": None, "p95_ms": None, "p99_ms": None}
    benchmark.write([row | {"status": "lost: <class 'X'>\x1b[0m\n" + "x" * 20_000}], tmp_path / "a.json")
    assert chapter.read_latencies(tmp_path / "a.json")["status"][0].startswith("lost: ‹class 'X'›")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 200), st.floats(), st.text(max_size=8), st.just([]), st.just({})
)


def test_generated_rows_are_read_as_they_are_or_refused(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()

    @given(st.dictionaries(st.sampled_from([*records.COLUMNS, "other"]), VALUES, max_size=4))
    @settings(max_examples=300, deadline=None, derandomize=True)
    def holds(changes: dict) -> None:
        path = write(tmp_path, "generated", row := {**GOOD, **changes})
        try:
            found = chapter.read_latencies(path).iloc[0].dropna().to_dict()
        except ValueError as refused:
            found, said = None, str(refused)
        outcomes["read" if found else "refused"] += 1
        if found is None:
            assert said.startswith("generated.json, row 1")
            assert said.isprintable()
            return
        assert found == {name: value for name, value in row.items() if value is not None}
        assert found.get("p50_ms", 1) > 0
        assert found.get("p50_ms", 0) <= found.get("p95_ms", math.inf)
        assert all(text.isprintable() for text in found.values() if isinstance(text, str))

    holds()
    print(f"generated rows: {dict(outcomes)}")
    assert min(outcomes["read"], outcomes["refused"]) > 20
