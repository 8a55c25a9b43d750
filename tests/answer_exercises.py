"""Run a chapter, then each of its exercises: as it stands, and with the solution. Prints what each said, as JSON.

An exercise is a code cell with the tag `exercise`, whose last line calls `exercises.check`. Its solution is the code in
the `<details>` of the next cell: it stands in the place of the starter, and the same last line judges both.
"""

import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import matplotlib
import nbformat

CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def exercises_of(path: Path) -> list[tuple[str, str]]:
    """Starter and solution of each exercise; the solution is empty where the next cell has none."""
    cells = nbformat.read(path, as_version=4).cells
    return [
        (cell.source, solution_in(below.source))
        for cell, below in zip(cells, [*cells[1:], nbformat.v4.new_markdown_cell()], strict=True)
        if "exercise" in cell.metadata.get("tags", [])
    ]


def solution_in(markdown: str) -> str:
    """The code in the hidden part of a cell, all blocks together."""
    _, found, hidden = markdown.partition("<details>")
    return "\n".join(CODE.findall(hidden)) if found else ""


def answer(code: str, namespace: dict) -> str:
    """The last line that the code prints, or the error that it raises."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "exercise", "exec"), namespace)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return (printed.getvalue().strip().splitlines() or ["nothing"])[-1]


def main(path: Path) -> list[dict[str, str]]:
    """What each exercise said of its starter and of its solution."""
    os.chdir(path.parent)
    namespace: dict = {"__name__": "__main__"}
    code = [cell for cell in nbformat.read(path.name, as_version=4).cells if cell.cell_type == "code"]
    for cell in code:
        tags = cell.metadata.get("tags", [])
        if "exercise" not in tags and not re.search(r"^\s*[%!]", cell.source, re.MULTILINE):
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(cell.source, "chapter", "exec"), namespace)
    said = []
    for starter, solution in exercises_of(Path(path.name)):
        check = starter.strip().splitlines()[-1]
        before = answer(starter, dict(namespace))
        said.append({"check": check, "starter": before, "solution": answer(f"{solution}\n{check}", dict(namespace))})
    return said


if __name__ == "__main__":
    matplotlib.use("Agg")
    print(json.dumps(main(Path(sys.argv[1]).resolve())))
