"""Functions that stand in cells of one chapter, for the tests that say what must be true of them.

Tests import it as `chapters`; conftest.py puts this folder on the path.
"""

import ast
from pathlib import Path
from types import SimpleNamespace

import nbformat

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def cells_of(number: str, *names: str) -> SimpleNamespace:
    """All that a chapter imports, and what the cells that define these names define; the other cells are not run."""
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    cells = [ast.parse(source) for source in sources if "%" not in {line.lstrip()[:1] for line in source.splitlines()}]
    space: dict[str, object] = {"__name__": f"chapter_{number}"}
    for cell in cells:
        targets = [target for node in cell.body if isinstance(node, ast.Assign) for target in node.targets]
        defined = {getattr(node, "name", "") for node in cell.body} | {getattr(target, "id", "") for target in targets}
        imports = [node for node in cell.body if isinstance(node, ast.Import | ast.ImportFrom)]
        chosen = cell.body if defined & set(names) else imports
        exec(compile(ast.Module(chosen, type_ignores=[]), path.name, "exec"), space)
    return SimpleNamespace(**space)
