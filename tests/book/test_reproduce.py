"""The chapters run headlessly: every one in profile smoke, and what happens when one of them fails."""

import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from kdig_utils import __main__ as command_line
from kdig_utils.book import repository, reproduce

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = repository.notebooks()
PARAMETERS = 'profile = "published"'


def write_notebook(path: Path, *sources: str, parameters: str | None = PARAMETERS) -> Path:
    cells = [] if parameters is None else [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[*cells, *map(new_code_cell, sources)], metadata=kernel), path)
    return path


def list_chapters(book: Path, *names: str) -> None:
    """Write the table of contents of a small book."""
    lines = "".join(f"      - file: notebooks/{name}\n" for name in names)
    (book / "_toc.yml").write_text(f"format: jb-book\nroot: book/intro\nparts:\n  - chapters:\n{lines}")


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a small book with three chapters, of which the second fails."""
    for name in ("kdig_utils", "results", "artifacts"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path / "workspace"))
    chapters = tmp_path / "notebooks"
    first_piece = "import os, sys, time\nprint(profile, os.getcwd(), sys.executable, flush=True)"
    write_notebook(chapters / "00_start.ipynb", first_piece + "\ntime.sleep(0.3)\nprint()")
    write_notebook(chapters / "03_fails.ipynb", 'raise RuntimeError("first line\\nsecond line")')
    write_notebook(chapters / "10_end.ipynb", "import kdig_utils\nprint(kdig_utils.__file__)")
    list_chapters(tmp_path, "00_start", "03_fails", "10_end")
    return tmp_path


def printed(notebook: Path) -> str:
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs_in_smoke(notebook: Path, workspace: Path) -> None:
    """They share the session's workspace: teacher and students are trained by the first that asks for them."""
    reproduce.check_parameters(notebook)
    outcome = reproduce.execute(notebook, "smoke", workspace / "reproduce" / "smoke")
    assert (outcome.status, outcome.error) == ("ok", "")


@pytest.mark.slow
def test_a_failed_chapter_stops_no_other_one(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (book / "notebooks").iterdir()}
    assert command_line.main(["reproduce", "--profile", "smoke"]) == 1
    shown = capsys.readouterr().out
    table = shown[shown.index("notebook ") :].splitlines()
    assert [line.split()[0] for line in table[1:4]] == ["00_start.ipynb", "03_fails.ipynb", "10_end.ipynb"]
    assert "failed" in table[2]
    assert table[2].endswith("RuntimeError: first line")
    assert "2 of 3" in table[4]
    assert {path: path.read_bytes() for path in (book / "notebooks").iterdir()} == before, "notebooks were changed"

    folder = book / "workspace" / "reproduce" / "smoke"
    assert printed(folder / "00_start.ipynb").split() == ["smoke", str(book / "notebooks"), sys.executable]
    assert Path(printed(folder / "10_end.ipynb").strip()) == ROOT / "kdig_utils" / "__init__.py"

    assert command_line.main(["reproduce", "--profile", "smoke", "--resume"]) == 1
    assert capsys.readouterr().out.count("up to date, 0 s") == 2, "only the failed one runs again"


@pytest.mark.slow
def test_the_kernel_is_this_interpreter_whatever_is_installed(book: Path, tmp_path: Path) -> None:
    """A kernel python3 of another interpreter stands first in the user's own folder."""
    other = tmp_path / "jupyter" / "kernels" / "python3"
    other.mkdir(parents=True)
    kernel = {"argv": ["/bin/false", "{connection_file}"], "display_name": "another", "language": "python"}
    (other / "kernel.json").write_text(json.dumps(kernel))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
        before = dict(os.environ)
        outcome = reproduce.execute(book / "notebooks" / "00_start.ipynb", "published", tmp_path / "run")
        assert dict(os.environ) == before
    assert outcome.error == ""
    assert printed(tmp_path / "run" / "00_start.ipynb").split()[-1] == sys.executable


def test_only_takes_the_named_chapters_in_reading_order(book: Path) -> None:
    assert [path.name for path in reproduce.chosen_notebooks(["10", "0"])] == ["00_start.ipynb", "10_end.ipynb"]
    assert [path.name for path in reproduce.chosen_notebooks(["03", " "])] == ["03_fails.ipynb"]


def test_the_chapters_are_those_of_the_table_of_contents_and_no_copy_beside_them(book: Path) -> None:
    write_notebook(book / "notebooks" / "03_fails_mine.ipynb", "print('mine')")
    write_notebook(book / "notebooks" / "04_of_a_reader.ipynb")
    names = [path.name for path in reproduce.chosen_notebooks()]
    assert names == ["00_start.ipynb", "03_fails.ipynb", "10_end.ipynb"]
    list_chapters(book, "10_end", "00_start")
    assert [path.name for path in reproduce.chosen_notebooks()] == ["10_end.ipynb", "00_start.ipynb"]


def test_a_chapter_or_a_table_of_contents_that_is_missing_is_named(
    book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (book / "notebooks" / "10_end.ipynb").unlink()
    assert command_line.main(["reproduce"]) == 2
    assert re.search(r"10_end\.ipynb .*restore it from git", capsys.readouterr().err)
    (book / "_toc.yml").unlink()
    assert command_line.main(["reproduce"]) == 2
    assert re.search(r"_toc\.yml .*restore it from git", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "value", "remedy"),
    [
        (["--only", "00,04"], "'04'", "00,03,10"),
        (["--only", "teacher"], "'teacher'", "00,03,10"),
        (["--only", ""], "''", "00,03,10"),
        (["--only", ","], "''", "00,03,10"),
        (["--profile", "fast"], "'fast'", "published, smoke, full"),
    ],
)
def test_nothing_runs_when_the_words_are_wrong(
    words: list[str], value: str, remedy: str, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line.main(["reproduce", *words]) == 2
    line = capsys.readouterr().err
    assert value in line
    assert remedy in line
    assert not (book / "workspace").exists()


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        (None, "none"),
        ('profile = "published"\nseeds = 3', "seeds = 3"),
        ('profil = "published"', "profil ="),
        ('profile = "smoke"', "smoke"),
    ],
)
def test_other_parameters_are_refused_before_anything_runs(
    parameters: str | None, named: str, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_notebook(book / "notebooks" / "10_end.ipynb", parameters=parameters)
    assert command_line.main(["reproduce"]) == 2
    line = capsys.readouterr().err
    assert "10_end.ipynb" in line
    assert named in line
    assert not (book / "workspace").exists()


def test_a_damaged_notebook_is_named(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (book / "notebooks" / "03_fails.ipynb").write_text('{"cells": [')
    assert command_line.main(["reproduce"]) == 2
    assert "03_fails.ipynb" in capsys.readouterr().err


def test_a_notebook_is_out_of_date_when_a_cell_changes_and_not_when_an_output_does(book: Path) -> None:
    notebook = book / "notebooks" / "00_start.ipynb"
    before = reproduce.fingerprint(notebook, "published")
    stored = nbformat.read(notebook, as_version=4)
    stored.cells[1].outputs = [new_output("stream", text="published\n")]
    nbformat.write(stored, notebook)
    assert reproduce.fingerprint(notebook, "published") == before
    stored.cells[1].source += "\nprint(1)"
    nbformat.write(stored, notebook)
    assert reproduce.fingerprint(notebook, "published") != before


@pytest.mark.parametrize("changed", ["artifacts/teacher.safetensors", "results/runs.csv"])
def test_an_executed_copy_is_out_of_date_when_what_it_was_made_from_changes(book: Path, changed: str) -> None:
    notebook = book / "notebooks" / "00_start.ipynb"
    before = reproduce.fingerprint(notebook, "published")
    assert reproduce.fingerprint(notebook, "published") == before
    (book / changed).write_text("changed")
    assert reproduce.fingerprint(notebook, "published") != before


def test_a_full_run_is_not_out_of_date_because_it_added_to_the_ledger(book: Path) -> None:
    notebook = book / "notebooks" / "00_start.ipynb"
    before = reproduce.fingerprint(notebook, "full")
    (book / "results" / "runs.csv").write_text("a row that the run itself added")
    assert reproduce.fingerprint(notebook, "full") == before


def test_summary_is_a_table() -> None:
    outcomes = [reproduce.Outcome("00_a.ipynb", 3.25, "ok"), reproduce.Outcome("01_b.ipynb", 1, "failed", "E: why")]
    lines = reproduce.summary(outcomes).splitlines()
    assert lines[0].split()[:3] == ["notebook", "seconds", "status"]
    assert lines[1].split() == ["00_a.ipynb", "3.2", "ok"]
    assert lines[2].split() == ["01_b.ipynb", "1.0", "failed", "E:", "why"]
    assert lines[3] == "1 of 2 notebooks are well, 4 s in all"


@pytest.mark.slow
def test_stored_notebooks_hold_outputs_and_no_trace_of_how_they_were_made(book: Path) -> None:
    assert command_line.main(["store"]) == 2  # chapter 03 fails: nothing may be replaced
    start = book / "notebooks" / "00_start.ipynb"
    assert "published" not in printed(start)
    list_chapters(book, "00_start", "10_end")
    assert command_line.main(["store"]) == 0
    stored = nbformat.read(start, as_version=4)
    assert printed(start).startswith("published")
    assert [cell.execution_count for cell in stored.cells] == [1, 2]
    assert [len(cell.outputs) for cell in stored.cells] == [0, 1]  # the two pieces of what was printed are one
    assert stored.cells[0].source == PARAMETERS
    assert "papermill" not in start.read_text()
    assert "timestamp" not in start.read_text()
    before = start.read_bytes()
    assert command_line.main(["store"]) == 0
    assert start.read_bytes() == before
