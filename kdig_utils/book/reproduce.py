"""Run the chapters headlessly, one after the other, into a run folder; the notebooks stay as they are.

The run folder, `reproduce/PROFILE` in the workspace, holds the executed copies. Beside each copy that ran to its end
stands a fingerprint of what it was made from, so that `--resume` passes over what is up to date.
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from kdig_utils import paths
from kdig_utils.book.repository import notebooks
from kdig_utils.experiments.study import PROFILES, print_line
from kdig_utils.machine import process_environment
from kdig_utils.paths import replacing

PARAMETERS = 'profile = "published"'  # of each chapter, in its cell tagged `parameters`
# A cell of `full` may train for days; one of the others that takes longer than this hangs.
CELL_TIMEOUT_SECONDS = {"published": 900, "smoke": 900, "full": None}
# glibc gives freed memory back at once and asks for it again: without these, training on a CPU takes twice as long.
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "1073741824",
}


class Outcome(NamedTuple):
    """How a chapter ended.

    Attributes:
        seconds: wall time; 0 if it was up to date.
        status: `ok`, `up to date` or `failed`.
        error: the first line of the error; empty if there was none.
    """

    notebook: str
    seconds: float
    status: str
    error: str = ""


def reproduce(profile: str, only: Sequence[str] = (), resume: bool = False) -> list[Outcome]:
    """Run the chapters in `profile`, all or those with the numbers in `only`; a chapter that fails stops no other one.

    Args:
        resume: pass over chapters whose executed copy is up to date.

    Raises:
        ValueError: unknown profile or chapter number, or a notebook with other parameters; nothing was run.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    chosen = chosen_notebooks(only)
    for notebook in chosen:
        read_chapter(notebook)
    folder = run_folder(profile)
    print_line(f"{len(chosen)} notebooks, profile {profile}; executed copies go to {folder}")
    outcomes = []
    for number, notebook in enumerate(chosen, start=1):
        place = f"[{number}/{len(chosen)}] {notebook.name}"
        print_line(f"{place} ...")
        outcomes.append(_execute_unless_up_to_date(notebook, profile, folder, resume))
        print_line(f"{place} {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s")
    return outcomes


def run_folder(profile: str) -> Path:
    """Where the executed copies are."""
    return paths.workspace().resolve() / "reproduce" / profile


def chosen_notebooks(only: Sequence[str] = ()) -> list[Path]:
    """The chapters with these numbers, in reading order; all of them if `only` is empty.

    Raises:
        ValueError: there is no chapter with that number, or none at all.
    """
    by_number = {path.name[:2]: path for path in notebooks()}
    if not by_number:
        raise ValueError(f"no notebooks NN_*.ipynb in {paths.repository_root() / 'notebooks'}: restore them from git")
    wanted = {number.strip().zfill(2) for number in only}
    if unknown := sorted(wanted - set(by_number)):
        raise ValueError(f"no chapter {unknown[0]!r}: choose from {','.join(by_number)}")
    return [path for number, path in by_number.items() if not wanted or number in wanted]


def read_chapter(notebook: Path) -> tuple[nbformat.NotebookNode, nbformat.NotebookNode]:
    """A notebook, and its cell with the parameters.

    Raises:
        ValueError: no notebook, or other parameters than the book's with their committed values.
    """
    try:
        book = nbformat.read(notebook, as_version=4)
    except ValueError as error:
        raise ValueError(f"{notebook} is no notebook ({type(error).__name__}): restore it from git") from error
    tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    if [cell.source.strip() for cell in tagged] != [PARAMETERS]:
        shown = "; ".join(cell.source for cell in tagged).replace("\n", "; ") or "none"
        told = f"the parameters of {notebook.name} are {shown}"
        raise ValueError(f"{told}: its cell tagged `parameters` must set {PARAMETERS}")
    return book, tagged[0]


def execute(notebook: Path, profile: str, folder: Path) -> Outcome:
    """Execute a copy of `notebook` in `profile` into `folder`, working in the folder of the notebook itself."""
    started, error, copy = time.monotonic(), "", folder / notebook.name
    folder.mkdir(parents=True, exist_ok=True)
    book, parameters = read_chapter(notebook)
    parameters.source = f'profile = "{profile}"'
    client = NotebookClient(
        book,
        timeout=CELL_TIMEOUT_SECONDS[profile],
        kernel_name="python3",
        kernel_manager_class=_this_interpreter(),
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    try:
        with client.setup_kernel():  # not `execute`, which takes Ctrl-C for a dead kernel
            for place, cell in enumerate(book.cells):
                client.execute_cell(cell, place)
                nbformat.write(book, copy)
    except CellExecutionError as failure:
        error = f"cell {client.code_cells_executed}: {failure.ename}: {failure.evalue}"
    except (CellTimeoutError, DeadKernelError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    nbformat.write(book, copy)
    first_line = error.strip().split("\n")[0]
    return Outcome(notebook.name, time.monotonic() - started, "failed" if error else "ok", first_line)


def _this_interpreter() -> type:
    """What starts the kernel: this interpreter with this package, whatever kernels the machine has installed."""
    from jupyter_client.kernelspec import KernelSpec  # comes with nbclient
    from jupyter_client.manager import AsyncKernelManager

    quiet = "--log-level=CRITICAL"  # what fails in a cell is in the executed copy
    argv = [sys.executable, "-m", "ipykernel_launcher", quiet, "-f", "{connection_file}"]
    env = {name: os.environ.get(name, value) for name, value in MALLOC_SETTINGS.items()}
    env["PYTHONPATH"] = process_environment()["PYTHONPATH"]

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=argv, env=env, display_name="Python 3", language="python")

    return ThisInterpreter


def fingerprint(notebook: Path, profile: str) -> str:
    """SHA-256 of what an executed copy is made from: the notebook's cells, the package, the artifacts, the versions.

    In `published` also the ledger and its curves. In the other profiles the chapters write those themselves.
    """
    package = Path(__file__).parents[1]
    inputs = [path for path in package.rglob("*") if path.suffix in (".py", ".json", ".yml")]
    inputs += _files(paths.artifacts_folder())
    if profile == "published":
        inputs += _files(paths.repository_root() / "results")
    digest = hashlib.sha256(f"{profile} {platform.python_version()} {version('torch')}".encode())
    cells = nbformat.read(notebook, as_version=4).cells
    digest.update(json.dumps([(cell.cell_type, cell.source) for cell in cells]).encode())
    for path in sorted(inputs):
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def summary(outcomes: Sequence[Outcome]) -> str:
    """The table at the end: notebook, seconds, status, first line of the error."""
    width = max(len("notebook"), *(len(outcome.notebook) for outcome in outcomes))
    lines = [f"{'notebook':{width}}  seconds  status      first line of the error"]
    lines += [f"{o.notebook:{width}}  {o.seconds:7.1f}  {o.status:10}  {o.error}".rstrip() for o in outcomes]
    well = sum(outcome.status != "failed" for outcome in outcomes)
    total = sum(outcome.seconds for outcome in outcomes)
    return "\n".join([*lines, f"{well} of {len(outcomes)} notebooks are well, {total:.0f} s in all"])


def store(outcomes: Sequence[Outcome]) -> list[str]:
    """Put the executed copies of `published` in place of the committed notebooks; return the names of those changed.

    Only their outputs are taken.

    Raises:
        ValueError: a chapter failed; no notebook was changed.
    """
    if failed := [outcome.notebook for outcome in outcomes if outcome.status == "failed"]:
        raise ValueError(f"{failed[0]} failed: mend it, and store the notebooks then")
    folder, changed = run_folder("published"), []
    for outcome in outcomes:
        committed = paths.repository_root() / "notebooks" / outcome.notebook
        stored, copy = (nbformat.read(path, as_version=4) for path in (committed, folder / outcome.notebook))
        _take_outputs(stored, copy)
        text = nbformat.writes(stored) + "\n"
        if committed.read_text() != text:
            with replacing(committed) as part:
                part.write_text(text)
            changed.append(outcome.notebook)
    return changed


def _take_outputs(notebook: nbformat.NotebookNode, copy: nbformat.NotebookNode) -> None:
    code, ran = ([cell for cell in book.cells if cell.cell_type == "code"] for book in (notebook, copy))
    for count, (cell, executed) in enumerate(zip(code, ran, strict=True), start=1):
        cell.execution_count = count
        cell.outputs = _joined_streams(executed.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count


def _joined_streams(outputs: Sequence[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Neighbouring pieces of one stream as one output: where it was cut depends on the moment."""
    joined = []
    for name, group in groupby(outputs, key=lambda output: output.get("name")):
        pieces = list(group)
        if name:
            pieces[0].text = "".join(piece.text for piece in pieces)
        joined += pieces[:1] if name else pieces
    return joined


def _execute_unless_up_to_date(notebook: Path, profile: str, folder: Path, resume: bool) -> Outcome:
    stamp = folder / f"{notebook.stem}.sha256"
    made_from = fingerprint(notebook, profile)
    if resume and (folder / notebook.name).is_file() and stamp.is_file() and stamp.read_text() == made_from:
        return Outcome(notebook.name, 0.0, "up to date")
    stamp.unlink(missing_ok=True)
    outcome = execute(notebook, profile, folder)
    if outcome.status == "ok":
        with replacing(stamp) as part:
            part.write_text(made_from)
    return outcome


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
