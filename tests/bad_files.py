"""Files and commands that are bad by construction, each with what its refusal must name."""

import contextlib
import csv
import functools
import io
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from bad_values import NAMES, NONSENSE, NOT_FINITE, Case, beyond
from chapters import cells_of
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kdig_utils.experiments.ledger import COLUMNS, Ledger
from kdig_utils.method import cifar10
from kdig_utils.method.spec import RunSpec, TeacherSpec

WORKSHOP = Path(tempfile.mkdtemp(prefix="bad-inputs-"))  # removed when the process ends
ROOT = Path(__file__).parents[1]

# Ledgers

FACTS: dict[str, Any] = {
    "campaign": "main", "validation_accuracy": 71.25, "train_loss": 0.5, "parameters": 543498, "macs": 58696640,
    "seconds": 12.5, "device": "CPU, 1 threads", "train_images": 50000, "test_images": 10000,
    "weights_sha256": "ab" * 32, "finished": "2026-11-22T22:29Z", "sample_accuracy": 52.5,
}  # fmt: skip
SPECS = [
    TeacherSpec(epochs=3, data_md5="0f" * 16),
    RunSpec("kd", teacher_sha256="cd" * 32, data_md5="0f" * 16),
    RunSpec("student", seed=1, k=9, train_fraction=0.5),
]


@functools.cache
def good_ledger() -> tuple[bytes, pd.DataFrame]:
    """The file of a ledger of three runs, and its rows."""
    ledger = Ledger(WORKSHOP / "good.csv")
    for spec, accuracy in zip(SPECS, (89.5, 74.25, 70.0), strict=True):
        ledger.append(spec, test_accuracy=accuracy, **FACTS)
    return ledger.path.read_bytes(), ledger.read()


def read_ledger(content: bytes) -> pd.DataFrame:
    path = WORKSHOP / "runs.csv"
    path.write_bytes(content)
    return Ledger(path).read()


def in_csv(lines: Sequence[Sequence[str]]) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue().encode()


def lines_of(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode())))


HEXADECIMAL = st.text("0123456789abcdef", min_size=1, max_size=70)
NO_PERCENT = (beyond(0, 100, True, True) | NOT_FINITE).map(repr) | NONSENSE
NO_AMOUNT = (beyond(0, math.inf, True, False) | NOT_FINITE).map(repr) | NONSENSE
NO_COUNT = (st.integers(max_value=0) | st.floats(0.1, 9.9).filter(lambda x: x != int(x))).map(repr) | NONSENSE
CELLS: dict[str, SearchStrategy[str]] = {  # what the cells of a row may not be, whatever its spec
    "test_accuracy": NO_PERCENT | st.just(""),
    "validation_accuracy": NO_PERCENT, "sample_accuracy": NO_PERCENT,
    "train_loss": NO_AMOUNT, "seconds": NO_AMOUNT,
    "parameters": NO_COUNT, "macs": NO_COUNT, "test_images": NO_COUNT, "train_images": NO_COUNT,
    "run_id": HEXADECIMAL | NONSENSE | st.just(""),
    "method": st.sampled_from(sorted(NAMES["method"] - {"student", "kd"})) | NONSENSE | st.just(""),
    "k": st.integers().filter(lambda n: n not in (0, 5, 9)).map(str) | st.just(""),
    "seed": st.integers().filter(lambda n: n not in (0, 1)).map(str) | NONSENSE,
    "epochs": st.integers().filter(lambda n: n not in (3, 100)).map(str) | NONSENSE,
    "train_fraction": st.floats().filter(lambda x: x not in (1.0, 0.5)).map(repr) | NONSENSE | st.just(""),
    "pairing": NONSENSE | st.sampled_from(["random", "shuffled"]),
    "data_md5": HEXADECIMAL | NONSENSE, "teacher_sha256": HEXADECIMAL | NONSENSE,
    "weights_sha256": HEXADECIMAL.filter(lambda text: len(text) != 64) | NONSENSE,
    "finished": NONSENSE | st.integers(13, 99).map("2026-{}-01T00:00Z".format),
    "spec": st.sampled_from(["", "{}", "[]", "{", "null", "1", '""', "[1]", '[["method", 1, 2]]', "[" * 5000])
    | st.builds(json.dumps, st.dictionaries(NONSENSE, st.integers())),
}  # fmt: skip


@st.composite
def ledgers(draw: st.DrawFn) -> Case:
    content, good = good_ledger()
    way = draw(st.sampled_from(["cell"] * 10 + ["cut", "byte", "table", "spec", "spec", "append", "number"]))
    if way in ("cut", "byte", "spec", "number"):
        return draw({"cut": cuts, "byte": other_bytes, "spec": spec_bytes, "number": other_forms}[way](content, good))
    if way == "table":
        return draw(tables(content))
    measured_now = {*FACTS, "test_accuracy"} if way == "append" else {*CELLS}
    column = draw(st.sampled_from(sorted(measured_now & {*CELLS})))
    cell, line, lines = draw(CELLS[column]), draw(st.integers(1, 3)), lines_of(content)
    cell = "8" if lines[line][COLUMNS.index(column)] == cell else cell
    if way == "append":
        column = draw(st.sampled_from([column] * 3 + ["of_tomorrow", "data_md5", "teacher_sha256"]))
        if column in ("data_md5", "teacher_sha256"):  # a spec says nothing of their form, a row does
            odd = draw(NONSENSE)
            measured = {**FACTS, "test_accuracy": 50.0}
            return Case(f"append, {column}={odd}", lambda: append_again(measured, **{column: odd}), (column,))
        measured = {**FACTS, "test_accuracy": 50.0, column: cell}
        return Case(f"append({column}={cell!r})", lambda: append_again(measured), (column,))
    lines[line][COLUMNS.index(column)] = cell
    named = f"line {line + 1}"
    return Case(f"line {line + 1}, {column}={cell!r}", lambda: read_ledger(in_csv(lines)), (named,))


def append_again(measured: dict[str, object], **changes: Any) -> None:
    """Append a run to a good ledger, which must stay as it is where the run is refused."""
    path, (content, _rows) = WORKSHOP / "appended.csv", good_ledger()
    path.write_bytes(content)
    try:
        Ledger(path).append(RunSpec("ig", seed=77, **changes), **measured)
    except ValueError:
        if path.read_bytes() != content:
            raise AssertionError("the ledger was changed") from None
        raise


def is_head(good: pd.DataFrame) -> Callable[[pd.DataFrame], bool]:
    return lambda found: found.astype(str).equals(good.head(len(found)).astype(str))


def cuts(content: bytes, good: pd.DataFrame) -> SearchStrategy[Case]:
    """A cut is refused, or what is left is the shorter table."""
    ends = st.sampled_from([n for n, byte in enumerate(content) if byte == 10])
    near = st.builds(lambda end, less: end - less, ends, st.integers(0, 3))
    return (st.integers(0, len(content) - 1) | near).map(
        lambda cut: Case(f"{cut} bytes", lambda: read_ledger(content[:cut]), ("runs.csv",), is_head(good))
    )


@st.composite
def other_bytes(draw: st.DrawFn, content: bytes, _good: pd.DataFrame) -> Case:
    place, odd = draw(st.integers(0, len(content) - 1)), draw(st.integers(0x80, 0xFF))
    marker = draw(
        st.sampled_from([bytes([odd]), b"<<<<<<< HEAD\n", b"=======\n", b">>>>>>> theirs\n", b"\xef\xbb\xbf"])
    )
    if marker == b"\xef\xbb\xbf":
        place = 0  # elsewhere it is a sign of a text
    if len(marker) > 3:
        place = content.rfind(b"\n", 0, place) + 1
    new = content[:place] + marker + content[place + (len(marker) == 1) :]
    named = "conflict marker" if len(marker) > 3 else "runs.csv"
    return Case(f"{marker!r} at {place}", lambda: read_ledger(new), (named,))


@st.composite
def spec_bytes(draw: st.DrawFn, content: bytes, good: pd.DataFrame) -> Case:
    """Another byte in a spec or a run_id is refused, or means the same: a field of its default value, or a space."""
    lines, line = lines_of(content), draw(st.integers(1, 3))
    column = draw(st.sampled_from(["spec", "spec", "run_id"]))
    cell = lines[line][COLUMNS.index(column)]
    place, letter = draw(st.integers(0, len(cell) - 1)), draw(st.sampled_from('0123456789 abcdef"{}:,.-'))
    if cell[place] == letter:
        letter = "~"
    lines[line][COLUMNS.index(column)] = cell[:place] + letter + cell[place + 1 :]
    others = [name for name in COLUMNS if name != "spec"]
    return Case(
        f"line {line + 1}, {column}: {letter!r} at {place}",
        lambda: read_ledger(in_csv(lines)),
        (f"line {line + 1}",),
        (lambda found: found[others].astype(str).equals(good[others].astype(str))) if column == "spec" else None,
    )


@st.composite
def other_forms(draw: st.DrawFn, content: bytes, good: pd.DataFrame) -> Case:
    """The same numbers, written otherwise, give the same table."""
    lines, column = (
        lines_of(content),
        draw(st.sampled_from(["test_accuracy", "train_loss", "seconds", "train_fraction"])),
    )
    form = draw(st.sampled_from(["{:.6f}", "{:.8e}", " {}", "+{}", "{}0"]))
    for line in lines[1:]:
        number = line[COLUMNS.index(column)]
        line[COLUMNS.index(column)] = form.format(float(number))
    end = draw(st.sampled_from([b"\n", b"\r\n"]))
    new = in_csv(lines).replace(b"\n", end)
    return Case(f"{column} as {form}, {end!r}", lambda: read_ledger(new), right=is_head(good))


@st.composite
def tables(draw: st.DrawFn, content: bytes) -> Case:
    """A whole table without, or with, a column, a row, a cell too many."""
    lines = lines_of(content)
    at, other, row = (draw(st.integers(0, len(COLUMNS) - 1)) for _ in range(3))
    line = draw(st.integers(1, 3))
    way = draw(st.sampled_from(["renamed", "swapped", "double", "row twice", "cell gone", "cell more", "joined"]))
    if way == "renamed":
        lines[0][at] = draw(NONSENSE)
    elif way == "swapped":
        for cells in lines if draw(st.booleans()) else lines[:1]:
            cells[at], cells[at - 1] = cells[at - 1], cells[at]
    elif way == "double":
        lines[0][at] = COLUMNS[other if other != at else at - 1]
    elif way == "row twice":
        lines.insert(draw(st.integers(1, 4)), lines[line])
    elif way == "cell gone":
        del lines[line][at]
    elif way == "cell more":
        lines[line].insert(row, draw(NONSENSE))
    else:
        lines[line - 1] += lines.pop(line)
    new = in_csv(lines)
    return Case(
        f"{way}: {at}, {other}, {row}, line {line}, {hash(new)}",
        lambda: read_ledger(new),
        ("cells of",) if way in ("cell gone", "cell more", "joined") and line > 1 else ("runs.csv, line",),
    )


# Latency

GOOD = {
    **{"model": "student", "runtime": "eager", "precision": "fp32", "batch": 1, "threads": 1, "status": "ok"},
    **{"p50_ms": 2.0, "p95_ms": 2.5, "p99_ms": 3.0, "calls": 100, "accuracy": 91.5, "bytes": 10, "speedup": 2.0},
    **{"speedup_low": 1.9, "speedup_high": 2.1, "machine": "a machine", "day": "2026-11-28", "note": "", "k": 5},
}
NO_TEXT = st.integers() | st.floats() | st.booleans() | st.lists(st.integers(), max_size=1)
TAGGED = st.sampled_from(["<b>", "a\nb", "\x00", "x" * 1001, "a>b", "\x1b[31m", "\u202e"])
NOT_A_NUMBER = st.text(max_size=5) | st.booleans() | st.lists(st.integers(), max_size=1) | NOT_FINITE
NO_WHOLE = NOT_A_NUMBER | st.floats(0.1, 1e6).filter(lambda x: x != int(x))
NOT_POSITIVE = NOT_A_NUMBER | st.floats(max_value=0)
FIELDS: dict[str, SearchStrategy[object]] = {
    **dict.fromkeys(("model", "runtime", "precision", "machine"), NO_TEXT | TAGGED | st.just("") | st.none()),
    **dict.fromkeys(("artifact", "weights"), NO_TEXT | TAGGED | st.just("")),
    **dict.fromkeys(("flags", "clock", "system", "versions", "note"), NO_TEXT | TAGGED),
    "status": NO_TEXT | TAGGED | st.none(),
    **dict.fromkeys(("batch", "threads"), NO_WHOLE | st.integers(max_value=0) | st.none()),
    **dict.fromkeys(("calls", "accuracy_images", "bytes", "cpus"), NO_WHOLE | st.integers(max_value=0)),
    "k": NO_WHOLE | st.integers(max_value=-1),
    **dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "cold_ms"), NOT_POSITIVE | st.floats(1e7) | st.floats(0, 1e-3)),
    **dict.fromkeys(("speedup", "speedup_low", "speedup_high", "predicted_macs_ms", "predicted_ms"), NOT_POSITIVE),
    **dict.fromkeys(("peak_gmacs", "bandwidth_gb", "first_ms", "each_ms", "peak_mb"), NOT_POSITIVE),
    **dict.fromkeys(("accuracy", "agreement"), NOT_A_NUMBER | beyond(0, 100, True, True)),
    **dict.fromkeys(("max_difference", "import_ms", "load_ms", "load_average"),
                    NOT_A_NUMBER | beyond(0, math.inf, True, False)),
    "day": NONSENSE | st.just("2026-13-01") | st.none() | st.floats(),
}  # fmt: skip


CHAPTER = cells_of("14", "BOOK", "FirstCall", "CALLS", "once", "read_latencies", "read_calls")


def read_rows(content: bytes) -> pd.DataFrame:
    path = WORKSHOP / "theirs.json"
    path.write_bytes(content)
    return CHAPTER.read_latencies(path)


def read_calls(content: bytes) -> pd.DataFrame:
    path = WORKSHOP / "theirs.csv"
    path.write_bytes(content)
    return CHAPTER.read_calls(path)


@st.composite
def latency_files(draw: st.DrawFn) -> Case:
    way = draw(
        st.sampled_from(
            ["field"] * 8
            + ["order", "absent", "unknown", "twice", "cut", "no rows", "calls", "calls", "calls", "calls", "harmless"]
        )
    )
    other, named = {**GOOD, "batch": 8}, ("theirs.json, row 2",)
    if way in ("cut", "no rows", "calls", "harmless"):
        return draw({"cut": cut_rows, "no rows": no_rows, "calls": first_calls, "harmless": same_rows}[way]())
    if way == "field":
        name = draw(st.sampled_from(sorted(FIELDS)))
        other[name] = draw(FIELDS[name])
        told = f"{name}={other[name]!r}"
    elif way == "order":
        name = draw(st.sampled_from(["p50_ms", "speedup_low"]))
        least = {"p50_ms": 2.5, "speedup_low": 2.1}[name]
        other[name] = draw(st.floats(least, 9e6, exclude_min=True))
        told = f"{name}={other[name]!r}, too large"
    elif way == "absent":
        told = draw(
            st.sampled_from(["model", "runtime", "precision", "batch", "threads", "status", "machine", "day", "p50_ms"])
        )
        del other[told]
    elif way == "unknown":
        told = draw(NONSENSE)
        other[told] = draw(st.integers())
    else:
        other = {**GOOD, "p50_ms": draw(st.floats(0.1, 2.5))}
        told, named = f"twice, {other['p50_ms']}", ("theirs.json, row 2",)
    content = json.dumps([GOOD, other]).encode()
    return Case(f"row 2, {told[:100]}", lambda: read_rows(content), named)


def cut_rows() -> SearchStrategy[Case]:
    content = json.dumps([GOOD, {**GOOD, "batch": 8}]).encode()
    cut = st.integers(0, len(content) - 1).map(lambda cut: content[:cut])
    odd = st.tuples(st.integers(0, len(content) - 1), st.integers(0x80, 0xBF)).map(
        lambda at: content[: at[0]] + bytes([at[1]]) + content[at[0] :]
    )
    return (cut | odd).map(lambda new: Case(f"{len(new)} bytes, {hash(new)}", lambda: read_rows(new), ("theirs.json",)))


def no_rows() -> SearchStrategy[Case]:
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | NONSENSE,
        lambda v: st.lists(v, max_size=3) | st.dictionaries(NONSENSE, v, max_size=3),
        max_leaves=5,
    )
    return values.map(
        lambda value: Case(f"JSON {value!r}", lambda: read_rows(json.dumps(value).encode()), ("theirs.json",))
    )


def same_rows() -> SearchStrategy[Case]:
    def case(names: list[str], indent: int | None) -> Case:
        rows = [{name: GOOD[name] for name in names}, {**GOOD, "batch": 2}]
        content = json.dumps(rows, indent=indent).encode()
        return Case(
            f"{names}, indent {indent}",
            lambda: read_rows(content),
            right=lambda found: all(found.loc[i, name] == row[name] for i, row in enumerate(rows) for name in row),
        )

    return st.builds(case, st.permutations(sorted(GOOD)), st.sampled_from([None, 1, 4]))


CALL = {
    "process": "0",
    "order": "teacher first, student",
    "network": "teacher",
    "call": "0",
    "ms": "1.5",
    "threads": "2",
    "machine": "M",
}
CALL_CELLS: dict[str, SearchStrategy[str]] = {
    "process": NO_COUNT.filter(lambda cell: cell != "0") | st.just(""),
    "call": NO_COUNT.filter(lambda cell: cell != "0"),
    "order": NONSENSE, "network": NONSENSE | st.just(""), "threads": NO_COUNT,
    "ms": NO_AMOUNT | st.floats(1e7).map(repr), "machine": st.just("") | st.just("<i>"),
}  # fmt: skip


@st.composite
def first_calls(draw: st.DrawFn) -> Case:
    rows = [{**CALL, "network": name, "call": str(n)} for name in ("teacher", "student") for n in (0, 1)]
    way = draw(st.sampled_from(["cell"] * 6 + ["column", "twice", "alone", "cut"]))
    at, column = draw(st.integers(0, 3)), draw(st.sampled_from([*sorted(CALL), "process", "process"]))
    told = f"{way} {at}, {column}"  # of four rows
    if way == "cell":
        rows[at][column] = draw(CALL_CELLS[column])
        told += f"={rows[at][column]!r}"
        if column == "process":  # of both networks, or it would have called one alone
            rows = [{**row, column: rows[at][column]} for row in rows]
    elif way == "twice":
        rows.append(rows[at])
    elif way == "alone":
        alone = draw(st.sampled_from(["teacher", "student"]))
        rows = [{**row, "machine": draw(NONSENSE)} for row in rows if row["network"] == alone]
    told += f", {rows[0]['machine']}"
    content = pd.DataFrame(rows).rename(columns={column: "gh"} if way == "column" else {}).to_csv(index=False).encode()
    if way == "cut":
        cut = draw(st.integers(0, content.index(b"student,0") if b"student,0" in content else 30))
        content, told = content[:cut], f"cut at {cut}"
    return Case(f"first calls, {told}", lambda: read_calls(content), ("theirs.csv",))


# The images of the repository


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@functools.cache
def sheets() -> Path:
    """A copy of the repository's images."""
    folder = WORKSHOP / "book" / "artifacts" / "cifar10_sample"
    shutil.copytree(ROOT / "artifacts" / "cifar10_sample", folder)
    return folder


def load_changed(split: str, name: str, content: bytes | None) -> object:
    """The images of a split where one file has another content, or is gone."""
    path = sheets() / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    try:
        with environment(KDIG_ROOT=str(WORKSHOP / "book")):
            return cifar10.load_sample(split)
    finally:
        path.write_bytes((ROOT / "artifacts" / "cifar10_sample" / name).read_bytes())


@st.composite
def image_files(draw: st.DrawFn) -> Case:
    if draw(st.integers(0, 3)) == 0:
        return draw(official_files())
    split, suffix = draw(st.sampled_from(["train", "test"])), draw(st.sampled_from(["npz", "webp"]))
    name = f"{split}.{suffix}"
    whole = (ROOT / "artifacts" / "cifar10_sample" / name).read_bytes()
    place, way = draw(st.integers(0, len(whole) - 1)), draw(st.sampled_from(["byte", "byte", "cut", "gone", "other"]))
    new: bytes | None = whole[:place]
    if way == "byte":
        new = whole[:place] + bytes([whole[place] ^ draw(st.integers(1, 255))]) + whole[place + 1 :]
    elif way == "gone":
        new = None
    elif way == "other":
        new = draw(st.binary(max_size=40))
    told = f"{name}, {way}" + (f" at {place}" if way in ("byte", "cut") else f" {new!r}")
    return Case(told, lambda: load_changed(split, name, new), (name, str(WORKSHOP)))


@st.composite
def official_files(draw: st.DrawFn) -> Case:
    split = draw(st.sampled_from(["train", "test"]))
    names = ["batches.meta", "test_batch", *(f"data_batch_{n}" for n in range(1, 6))]
    files = draw(st.dictionaries(st.sampled_from(names), st.binary(max_size=60), max_size=7))
    return Case(f"{split} of {files!r}", lambda: load_official(split, files), (str(WORKSHOP),))


def load_official(split: str, files: dict[str, bytes]) -> object:
    with tempfile.TemporaryDirectory(dir=WORKSHOP) as folder:
        base = Path(folder) / "cifar-10-batches-py"
        base.mkdir()
        for name, content in files.items():
            (base / name).write_bytes(content)
        return cifar10.load(split, Path(folder))
