"""Run the chapters headlessly with papermill, one after the other, into a run folder; the notebooks stay as they are.

The run folder, `reproduce/PROFILE` in the workspace, holds the executed copies. Beside each copy that ran to its end
stands a fingerprint of what it was made from, so that `--resume` passes over what is up to date.
"""

import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import nbformat
import pandas as pd
import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from kdig_utils import machine, paths
from kdig_utils.book.repository import notebooks
from kdig_utils.experiments.reports import print_line
from kdig_utils.experiments.study import PROFILES
from kdig_utils.method.checks import check_choice
from kdig_utils.paths import replacing

BLANKS = re.compile(" {3,}")
PARAMETERS = {"profile": "published"}
# A cell of `full` may train for days; one of the others that takes longer than this hangs.
CELL_TIMEOUT_SECONDS = {"published": 900, "smoke": 900, "full": None}
# glibc gives freed memory back at once and asks for it again: without these, training on a CPU takes twice as long.
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "1073741824",
}


@dataclass(frozen=True)
class Outcome:
    """How a chapter ended."""

    notebook: str  # its file name
    seconds: float  # wall time; 0 if it was up to date
    status: str  # `ok`, `up to date` or `failed`
    error: str = ""  # the first line of the error; empty if there was none


def reproduce(profile: str, only: Sequence[str] | None = None, resume: bool = False) -> list[Outcome]:
    """Run the chapters in `profile`, all or those with the numbers in `only`; a chapter that fails stops no other one.

    Args:
        resume: pass over chapters whose executed copy is up to date.

    Raises:
        ValueError: unknown profile or chapter number, or a notebook with other parameters; nothing was run.
    """
    check_choice("profile", profile, PROFILES)
    chosen = chosen_notebooks(only)
    for notebook in chosen:
        check_parameters(notebook)
    folder = paths.workspace() / "reproduce" / profile
    print_line(f"{len(chosen)} notebooks, profile {profile}; executed copies go to {folder}")
    outcomes = []
    for number, notebook in enumerate(chosen, start=1):
        print_line(f"[{number}/{len(chosen)}] {notebook.name} ...")
        outcomes.append(_execute_unless_up_to_date(notebook, profile, folder, resume))
        print_line(f"[{number}/{len(chosen)}] {notebook.name} {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s")
    return outcomes


def chosen_notebooks(only: Sequence[str] | None = None) -> list[Path]:
    """The chapters with these numbers, in reading order; all of them if `only` is None. An empty number is passed over.

    Raises:
        ValueError: there is no chapter with that number, `only` names none, or a chapter's notebook is missing.
    """
    needed = [paths.repository_root() / "_toc.yml", *notebooks()]
    if missing := [path for path in needed if not path.is_file()]:
        raise ValueError(f"{missing[0]} is missing: restore it from git")
    by_number = {path.name[:2]: path for path in needed[1:]}
    wanted = set(by_number) if only is None else {number.strip().zfill(2) for number in only if number.strip()}
    if unknown := sorted((wanted or {""}) - set(by_number)):
        raise ValueError(f"no chapter {unknown[0]!r}: choose from {','.join(by_number)}")
    return [path for number, path in by_number.items() if number in wanted]


def check_parameters(notebook: Path) -> None:
    """Raise ValueError unless the notebook has exactly the parameters of the book, with the committed values.

    papermill only warns of an unknown name, and the chapter would then run in another profile than the one asked for.
    """
    try:
        found = {name: entry["default"] for name, entry in papermill.inspect_notebook(_literal(notebook)).items()}
    except ValueError as error:
        raise ValueError(f"{notebook} is no notebook ({type(error).__name__}): restore it from git") from error
    expected = {name: repr(value) for name, value in PARAMETERS.items()}
    if {name: value.strip().replace('"', "'") for name, value in found.items()} != expected:
        shown = ", ".join(f"{name} = {value}" for name, value in found.items()) or "none"
        wanted = ", ".join(f"{name} = {value}" for name, value in expected.items())
        raise ValueError(
            f"the parameters of {notebook.name} are {shown}: its cell tagged `parameters` must set {wanted}"
        )


def execute(notebook: Path, profile: str, folder: Path) -> Outcome:
    """Execute a copy of `notebook` in `profile` into `folder`, working in the folder of the notebook itself."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    error = ""
    try:
        with mock.patch.dict(os.environ, _kernel_environment(folder)):
            papermill.execute_notebook(
                _literal(notebook),
                _literal(folder / notebook.name),
                parameters={"profile": profile},
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=str(notebook.parent),
                execution_timeout=CELL_TIMEOUT_SECONDS[profile],
            )
    except PapermillExecutionError as failure:
        error = f"cell {failure.exec_count}: {failure.ename}: {failure.evalue}"
    except (CellTimeoutError, DeadKernelError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    first_line = error.strip().split("\n")[0]
    return Outcome(notebook.name, time.monotonic() - started, "failed" if error else "ok", first_line)


def fingerprint(notebook: Path, profile: str) -> str:
    """SHA-256 of what an executed copy is made from: the notebook's cells, the package, the artifacts, the versions.

    In `published` also the ledger and its curves. In the other profiles the chapters write those themselves.
    """
    root = paths.repository_root()
    package = Path(__file__).parents[1]
    inputs = [
        *(path for path in package.rglob("*") if path.suffix in (".py", ".json", ".yml")),
        *_files(paths.artifacts_folder()),
        *_files(root / "book" / "widgets"),
    ]
    if profile == "published":
        inputs += _files(root / "results")
    digest = hashlib.sha256(f"{profile} {platform.python_version()} {version('torch')}".encode())
    cells = nbformat.read(notebook, as_version=4).cells
    digest.update(json.dumps([(cell.cell_type, cell.source) for cell in cells]).encode())
    for path in sorted(inputs):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table at the end: notebook, seconds, status, first line of the error."""
    table = pd.DataFrame(outcomes).to_string(index=False, float_format="%.1f")
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    total = sum(outcome.seconds for outcome in outcomes)
    return f"{table}\n{len(outcomes) - failed} of {len(outcomes)} notebooks are well, {total:.0f} s in all"


def store(outcomes: Sequence[Outcome]) -> list[str]:
    """Put the executed copies of `published` in place of the committed notebooks; return the names of those changed.

    What papermill adds, the injected cell and its timestamps, is left out: a notebook changes only where it says so.

    Raises:
        ValueError: a chapter failed; no notebook was changed.
    """
    if failed := [outcome.notebook for outcome in outcomes if outcome.status == "failed"]:
        raise ValueError(f"{failed[0]} failed: mend it, and store the notebooks then")
    folder, changed = paths.workspace() / "reproduce" / "published", []
    for outcome in outcomes:
        committed = paths.repository_root() / "notebooks" / outcome.notebook
        text = nbformat.writes(_without_traces(nbformat.read(folder / outcome.notebook, 4))) + "\n"
        if committed.read_text(encoding="utf-8") != text:
            with replacing(committed) as part:
                part.write_text(text, encoding="utf-8")
            changed.append(outcome.notebook)
    return changed


def _without_traces(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in cells:
        kept = {key: value for key, value in cell.metadata.items() if key in ("tags", "mystnb") and value}
        cell.metadata = nbformat.from_dict(kept)
    for count, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        cell.outputs = _joined_streams(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "text/html" in output.get("data", {}):  # beside it, a table in plain text is half blanks
                output.data["text/plain"] = BLANKS.sub("  ", output.data["text/plain"])
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    language = {"name": "python", "pygments_lexer": "ipython3"}
    notebook.cells, notebook.metadata = cells, nbformat.from_dict({"kernelspec": kernel, "language_info": language})
    return notebook


def _joined_streams(outputs: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Neighbouring pieces of one stream as one output: where it was cut depends on the moment."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _execute_unless_up_to_date(notebook: Path, profile: str, folder: Path, resume: bool) -> Outcome:
    stamp = folder / f"{notebook.stem}.sha256"
    made_from = fingerprint(notebook, profile)
    stored = stamp.is_file() and stamp.read_text(encoding="utf-8")
    if resume and (folder / notebook.name).is_file() and stored == made_from:
        return Outcome(notebook.name, 0.0, "up to date")
    stamp.unlink(missing_ok=True)
    outcome = execute(notebook, profile, folder)
    if outcome.status == "ok":
        with replacing(stamp) as part:
            part.write_text(made_from)
    return outcome


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _kernel_environment(folder: Path) -> dict[str, str]:
    """Let the kernel `python3` be this interpreter with this package, whatever kernels and settings the reader has."""
    own = folder / ".jupyter"
    quiet = "--log-level=CRITICAL"  # what fails in a cell is in the executed copy
    argv = [sys.executable, "-m", "ipykernel_launcher", quiet, "-f", "{connection_file}"]
    with replacing(own / "kernels" / "python3" / "kernel.json") as part:
        part.write_text(json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"}))
    found = os.pathsep.join(filter(None, (str(own), os.environ.get("JUPYTER_PATH"))))
    return MALLOC_SETTINGS | machine.kernel_environment(own) | paths.absolute_folders() | {"JUPYTER_PATH": found}


def _literal(path: Path) -> str:
    """A path in the words of papermill, which formats those that it gets."""
    return str(path).replace("{", "{{").replace("}", "}}")
