"""What a hidden solution tells the reader to call is there."""

import re
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import nbformat
import pytest

import kdig_utils
from kdig_utils.experiments.study import Study, open_study
from kdig_utils.paths import repository_root

SOLUTION = re.compile(r"^(`{3,})\{admonition\} Solution$(.*?)^\1$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
NAME = re.compile(r"(?<![\w./])([a-z]\w*)\.([A-Za-z]\w*)")
MODULES = {found.name.rpartition(".")[2]: found.name for found in walk_packages(kdig_utils.__path__, "kdig_utils.")}
FILES = {"csv", "json", "md", "py", "yml"}
NOTEBOOKS = sorted((repository_root() / "notebooks").glob("*.ipynb"))


def names_in(markdown: str) -> set[tuple[str, str]]:
    """Each `module.name` of the package in the code of the solutions in a Markdown cell."""
    code = [found[1] for solution in SOLUTION.findall(markdown) for found in CODE.findall(solution[1])]
    named = {pair for snippet in code for pair in NAME.findall(snippet)}
    return {(module, name) for module, name in named if module in MODULES and name not in FILES}


def is_there(module: str, name: str) -> bool:
    """Whether the package has it; in the notebooks `study` is no module but the study that is open."""
    if module == "study":
        return hasattr(Study, name) or hasattr(open_study("published"), name)
    return hasattr(import_module(MODULES[module]), name)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_solution_calls_is_in_the_package(notebook: Path):
    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "markdown"]
    named = set().union(*map(names_in, cells))
    assert {".".join(pair) for pair in named if not is_there(*pair)} == set()


def test_a_name_that_is_gone_is_found_and_prose_and_files_are_not_taken_for_code():
    solution = (
        "```{admonition} Solution\n:class: dropdown\nCall `claims.effects(x)` as in `claims.yml`; losses.none.\n```"
    )
    assert names_in(solution) == {("claims", "effects")}
    assert not is_there("claims", "effects")
    assert is_there("claims", "lookup")
    assert is_there("study", "test")
    assert names_in(solution.replace("Solution", "Note")) == set()


def test_the_chapters_solutions_call_something():
    cells = [cell.source for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    assert len(set().union(*map(names_in, cells))) > 10
