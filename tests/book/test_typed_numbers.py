"""No page of the book just types an accuracy: it is quoted with its source, computed in a cell, or allowed here."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from kdig_utils.analysis import claims

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("book/*.md")), *sorted(ROOT.glob("notebooks/*.ipynb"))]
# 10.0 % to 99.99 %, "per cent" as well, and two decimals without a unit, as accuracies are written in a table.
ACCURACY = re.compile(r"(?<![\w.,:/])[1-9]\d\.(?:\d{1,2}(?=[\s\\,~]*(?:%|per cent\b|percent\b))|\d\d(?![\w.]))")
FENCE = re.compile(r"^\s*(?P<marks>`{3,}|~{3,}|:{3,})(?P<rest>.*)$")
CODE_DIRECTIVES = ("code", "code-block", "code-cell", "eval-rst", "literalinclude", "math", "raw")
INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
GENERATED = re.compile(r"<!-- (\w+):begin -->.*?<!-- \1:end -->|<!--.*?-->", re.DOTALL)

# Accuracies that are typed on purpose, by page, with the reason.
ALLOWED = {
    "notebooks/01_teacher.ipynb": {"92.0": "invented for an exercise"},
    "notebooks/16_scorecard.ipynb": {"92.1": "invented for an exercise"},
}


def unexplained(path: Path, root: Path = ROOT) -> list[str]:
    """The accuracies of a page that are typed and neither checked, nor the paper's, nor allowed: one message each."""
    name = path.relative_to(root).as_posix()
    return [
        f"{name}, {place}: {number} is typed; quote it with a role, compute it in a cell, or allow it here"
        for place, markdown in texts(path)
        for number in typed_accuracies(markdown)
        if number not in ALLOWED.get(name, {}) and float(number) not in paper_numbers()
    ]


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """The Markdown of a page, or of each Markdown cell of a notebook, with the place where it stands."""
    if path.suffix != ".ipynb":
        yield "text", path.read_text(encoding="utf-8")
        return
    for place, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "markdown":
            yield f"cell {place}", "".join(cell["source"])


def typed_accuracies(markdown: str) -> list[str]:
    """Numbers that look like an accuracy in per cent, outside code, roles, comments and generated tables."""
    return ACCURACY.findall(INLINE_CODE.sub(" ", "\n".join(prose_lines(GENERATED.sub("", markdown)))))


def prose_lines(markdown: str) -> Iterator[str]:
    """Lines outside code blocks; title and content of a directive, as an admonition, are"""
    open_fences: list[tuple[str, bool]] = []  # marks, and whether code is between them
    for line in markdown.splitlines():
        marks, info = FENCE.match(line).groups() if FENCE.match(line) else ("", "")
        within, in_code = open_fences[-1] if open_fences else ("", False)
        if within and marks.startswith(within) and not info.strip():
            open_fences.pop()
        elif marks and not in_code:
            open_fences.append((marks, opens_code(marks, info.strip())))
            yield "" if open_fences[-1][1] else info
        elif not in_code:
            yield line


def opens_code(marks: str, info: str) -> bool:
    directive = re.match(r"\{([\w-]+)\}", info)
    return directive[1] in CODE_DIRECTIVES if directive else not marks.startswith(":")


@cache
def paper_numbers() -> frozenset[float]:
    """All numbers in paper.json."""
    return frozenset(float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", json.dumps(claims.paper())))


@pytest.mark.parametrize(
    "markdown",
    [
        "It reaches 88.12 % in the end.",
        "It reaches 88.1 per cent.",
        "| kd | 88.12 |",
        "(88.12 %)",
        "$88.12\\,\\%$",
        "```{admonition} Solution\nIt reaches 88.12 %.\n```",
        "```{admonition} 88.12 % it is\n```",
        ":::{note}\nIt reaches 88.12 %.\n:::",
        "```python\nx = 1\n```\nthen 88.12 %",
        "````{admonition} Two fences\n```\ncode\n```\nIt reaches 88.12 %\n````",
    ],
)
def test_a_typed_accuracy_is_found(markdown: str) -> None:
    assert [number[:4] for number in typed_accuracies(markdown)] == ["88.1"]


@pytest.mark.parametrize(
    "markdown",
    [
        "{ledger}`88.12 % <mean test_accuracy method=kd>` is checked",
        "`88.12 %` is code",
        "```\n88.12 %\n```",
        "```python\nprint('88.12 %')\n```",
        "```{code-block} python\n88.12\n```",
        "````{admonition} Two fences\n```\n88.12 %\n```\n````",
        "<!-- 88.12 % --> nothing",
        "<!-- results:begin -->\n| kd | 88.12 % |\n<!-- results:end -->",
        "95 % interval, 0.32 points, 2.17 MB, 1.50×, version 12.34.5, 16.12s, arXiv 2503.13008",
    ],
)
def test_code_roles_and_other_numbers_are_left_alone(markdown: str) -> None:
    assert typed_accuracies(markdown) == []


def test_the_papers_numbers_may_be_typed_and_others_are_named_with_their_page(tmp_path: Path) -> None:
    page = tmp_path / "book" / "page.md"
    page.parent.mkdir()
    page.write_text("The paper has 92.58 %, we 88.12 %.")
    (message,) = unexplained(page, tmp_path)
    assert message.startswith("book/page.md, text: 88.12 is typed")


def test_cells_of_a_notebook_are_read_and_outputs_are_not(tmp_path: Path) -> None:
    page = tmp_path / "page.ipynb"
    markdown = {"cell_type": "markdown", "source": ["We reach\n", "88.12 %."]}
    code = {"cell_type": "code", "source": ["88.12"], "outputs": [{"data": {"text/markdown": ["88.13 %"]}}]}
    page.write_text(json.dumps({"cells": [code, markdown]}))
    (message,) = unexplained(page, tmp_path)
    assert message.startswith("page.ipynb, cell 1: 88.12")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_page_of_the_book_types_an_accuracy(path: Path) -> None:
    assert unexplained(path) == []


def test_what_is_allowed_still_stands_there() -> None:
    for name, numbers in ALLOWED.items():
        typed = [number for _place, text in texts(ROOT / name) for number in typed_accuracies(text)]
        assert set(numbers) <= set(typed), f"{name} no longer types {set(numbers) - set(typed)}: take it off the list"
        assert all(reason.strip() for reason in numbers.values())
