"""Exercises: a solution is right, its starter is not; and what a hidden solution tells the reader to call is there."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import nbformat
import pytest
import torch
from answer_exercises import exercises_of, solution_in

import kdig_utils
from kdig_utils.book import exercises
from kdig_utils.experiments.study import Study, open_study
from kdig_utils.paths import repository_root

ROOT = repository_root()
SOLUTION = re.compile(r"^(`{3,})\{admonition\} Solution$(.*?)^\1$|<details>()(.*?)</details>", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
NAME = re.compile(r"(?<![\w./])([a-z]\w*)\.([A-Za-z]\w*)")
MODULES = {found.name.rpartition(".")[2]: found.name for found in walk_packages(kdig_utils.__path__, "kdig_utils.")}
FILES = {"csv", "json", "md", "py", "yml"}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIRST_HALF = [path for path in NOTEBOOKS if path.name < "08"]
WITH_EXERCISES = [path for path in NOTEBOOKS if exercises_of(path)]


def names_in(markdown: str) -> set[tuple[str, str]]:
    """Each `module.name` of the package in the code of the solutions in a Markdown cell."""
    code = [found[1] for solution in SOLUTION.findall(markdown) for found in CODE.findall(solution[1] + solution[3])]
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


# Solutions that are run


@pytest.mark.parametrize("notebook", WITH_EXERCISES, ids=lambda path: path.stem)
def test_a_solution_is_right_and_its_starter_is_not(notebook: Path):
    words = [sys.executable, str(ROOT / "tests" / "answer_exercises.py"), str(notebook)]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = json.loads(ran.stdout.splitlines()[-1])
    print(f"{len(said)} exercises")
    assert [one for one in said if one["solution"] != "Right." or one["starter"] == "Right."] == []


@pytest.mark.parametrize("notebook", FIRST_HALF, ids=lambda path: path.stem)
def test_a_chapter_of_the_first_half_has_four_to_six_exercises_with_hidden_solutions(notebook: Path):
    found = exercises_of(notebook)
    assert 4 <= len(found) <= 6
    assert [starter for starter, solution in found if not solution] == []


def test_the_solution_is_the_code_that_is_hidden():
    hidden = "Text\n<details>\n<summary>Solution</summary>\n\n```python\nx = 1\n```\n\nWhy.\n</details>"
    assert solution_in(hidden) == "x = 1\n"
    assert solution_in("```python\nx = 1\n```") == ""


@pytest.mark.parametrize(
    ("judge", "right", "wrong", "hint"),
    [
        (exercises.number(0.25, 0.01), 0.255, 25, "per cent"),
        (exercises.number(0.25, 0.01), 0.25, -0.25, "sign"),
        (exercises.number(2, 0.1), torch.tensor(2.05), 3, "large"),
        (exercises.number(2, 0.1), 2, float("nan"), "no number"),
        (exercises.number(2, 0.1, {4: "that is the square"}), 2, 4.001, "square"),
        (exercises.number(2, 0.1, {2: "never said of a right one"}), 2, 1, "small"),
        (exercises.function(abs, (-1,), (2,), slips={"the sign": lambda x: -abs(x)}), abs, lambda x: -abs(x), "sign"),
        (exercises.choice("black", {"white": "brighter"}), " Black", "white", "brighter"),
        (exercises.choice("black", {"white": "brighter"}), "black", "green", "none of"),
        (exercises.function(torch.exp, (torch.zeros(2),)), lambda x: 1 + x, lambda x: x, "off by up to 1"),
        (exercises.function(torch.exp, (torch.zeros(2),)), torch.exp, torch.sum, "shape"),
        (exercises.function(abs, (-1,), (2,)), abs, lambda x: -x, "case 2"),
        (exercises.function(abs, (-1,)), abs, lambda x: None, "nothing"),
        (exercises.function(abs, (-1,)), abs, lambda x: 1 / 0, "ZeroDivisionError"),
        (exercises.function(abs, (-1,)), abs, 3, "no function"),
    ],
)
def test_a_judge_says_right_or_what_is_off(judge, right, wrong, hint, capsys: pytest.CaptureFixture):
    for answer in (right, wrong, ...):
        exercises.check(answer, judge)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Right."
    assert hint in said[1]
    assert "three dots" in said[2]
