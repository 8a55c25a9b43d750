"""The architecture as it is: a drawing of the wings and their imports, tables of modules, places in the code.

All of it is read from the package's source and from the layers in pyproject.toml when the book is built.
"""

import ast
import re
import textwrap
import tomllib
from collections import Counter
from collections.abc import Iterator
from html import escape
from math import log2
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

logger = logging.getLogger(__name__)

PACKAGE = "kdig_utils"
# One an importer, of a brightness that is seen on white and on black; red is for arrows that run back.
COLOURS = ("#3b8ed0", "#d9822b", "#2f9e6e", "#a06cd5", "#c8558f", "#8a8f98")
RED = "#e03131"
BOX, ROW, LEFT = (218, 46), 66, 8  # width and height of a box, distance of the rows, margin; in the drawing's units
WIDTH = 384
STYLE = """
.kdig-architecture { display: block; width: 100%; max-width: 30rem; height: auto; margin: 1.5rem auto;
  font-family: inherit; }
.kdig-architecture rect { fill: var(--pst-color-surface, #f4f4f4); stroke: var(--pst-color-border, #999); }
.kdig-architecture text { fill: var(--pst-color-text-base, #222); font-size: 11.5px; }
.kdig-architecture .name { font-size: 14px; font-weight: 600; }
.kdig-architecture .arrow { fill: none; opacity: 0.75; }
.kdig-architecture .arrow:hover { opacity: 1; stroke-width: 4; }
.kdig-architecture .back { stroke-dasharray: 5 3; }
"""

Arrow = tuple[str, str]


def rows(root: Path) -> list[list[str]]:
    """The wings, and the modules outside them, by layer, the highest first: those in the contract of pyproject.toml."""
    tool = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    layers = next(each["layers"] for each in tool["importlinter"]["contracts"] if each["type"] == "layers")
    return [[name.strip().removeprefix(f"{PACKAGE}.") for name in layer.split("|")] for layer in layers]


def modules(root: Path) -> dict[str, Path]:
    """Each module by its name within the package, such as `method.overlay`; a wing itself is `method`."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    parts = {path: path.relative_to(root / PACKAGE).with_suffix("").parts for path in paths}
    return {".".join(name for name in parts[path] if name != "__init__"): path for path in paths}


def imports(root: Path) -> set[Arrow]:
    """Each pair of modules of which the first imports the second, anywhere in its source."""
    known = modules(root)
    found = {(name, other) for name, path in known.items() for other in imported(path, known)}
    return {(name, other) for name, other in found if name != other}


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that the one at `path` imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            targets = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for target in targets:
            name = target.removeprefix(f"{PACKAGE}.")
            if target.startswith(f"{PACKAGE}."):
                yield name if name in known else name.rpartition(".")[0]


def arrows(root: Path) -> Counter[Arrow]:
    """How many pairs of modules import across each pair of wings."""
    pairs = [(name.split(".")[0], other.split(".")[0]) for name, other in imports(root)]
    return Counter(pair for pair in pairs if pair[0] != pair[1] and all(pair))


def back(found: Counter[Arrow], layers: list[list[str]]) -> set[Arrow]:
    """The arrows that run back: up, or between two of one layer. There should be none."""
    height = {name: place for place, layer in enumerate(layers) for name in layer}
    return {(name, other) for name, other in found if height[name] >= height[other]}


def says(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def in_short(path: Path) -> str:
    """The words of that line before its first colon, semicolon or full stop, as many as a box has room for."""
    return textwrap.shorten(re.split(r"[:;.]", says(path).replace("`", ""))[0], 34, placeholder=" …")


def drawing(root: Path) -> str:
    """The SVG: a box for each wing, the highest on top, and an arrow to each one that it imports."""
    layers, found = rows(root), arrows(root)
    order, known, wrong = [name for layer in layers for name in layer], modules(root), back(found, layers)
    margin = 90 if wrong else 0
    height = ROW * len(order)
    told = "; ".join(f"{name} imports {', '.join(o for o in order if (name, o) in found) or 'none'}" for name in order)
    parts = [_box(name, place, in_short(known[name])) for place, name in enumerate(order)]
    parts += [_arrow(pair, found, order, pair in wrong) for pair in sorted(found)]
    return (
        f'<svg class="kdig-architecture" viewBox="{-margin} 0 {WIDTH + margin} {height}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style><title>The wings of the package</title>'
        f"<desc>{escape(told)}.</desc>{''.join(parts)}</svg>"
    )


def _box(name: str, place: int, words: str) -> str:
    width, height = BOX
    top = place * ROW + (ROW - height) / 2
    return (
        f'<g><rect x="{LEFT}" y="{top}" width="{width}" height="{height}" rx="7"/>'
        f'<text class="name" x="{LEFT + 12}" y="{top + 20}">{escape(name)}</text>'
        f'<text x="{LEFT + 12}" y="{top + 36}">{escape(words)}</text></g>'
    )


def _arrow(pair: Arrow, found: Counter[Arrow], order: list[str], wrong: bool) -> str:
    """A curve on the right from the importer to what it imports; on the left, red and broken, where it runs back."""
    start, end = _ends(pair, found, order)
    places = [order.index(name) for name in pair]
    reach = 34 + 21 * abs(places[1] - places[0])
    side, towards = (LEFT, -1) if wrong else (LEFT + BOX[0], 1)
    tip, bend = side + 7 * towards, side + reach * towards
    colour = RED if wrong else COLOURS[places[0] % len(COLOURS)]
    times = "once" if found[pair] == 1 else f"{found[pair]} times"
    return (
        f'<g class="arrow{" back" * wrong}" stroke="{colour}" stroke-width="{1.1 + log2(found[pair]) / 3:.1f}">'
        f"<title>{pair[0]} imports {pair[1]}: {times}</title>"
        f'<path d="M{side} {start:.1f} C{bend} {start:.1f} {bend} {end:.1f} {tip} {end:.1f}"/>'
        f'<path d="M{side + towards} {end:.1f} l{7 * towards} -3.5 v7 z" fill="{colour}" stroke="none"/></g>'
    )


def _ends(pair: Arrow, found: Counter[Arrow], order: list[str]) -> tuple[float, float]:
    """Heights at which an arrow leaves and arrives, each arrow of a box at its own: curves of one box never cross."""
    places = [order.index(name) for name in pair]
    leaving = sorted((order.index(other) for name, other in found if name == pair[0]), reverse=True)
    arriving = sorted((order.index(name) for name, other in found if other == pair[1]), reverse=True)
    middle = [place * ROW + ROW / 2 for place in places]
    step = min(5.0, 40 / (len(leaving) + len(arriving)))
    start = middle[0] + 2 + step * leaving.index(places[1])
    return start, middle[1] - 2 - step * (len(arriving) - 1 - arriving.index(places[0]))


class CodeDirective(SphinxDirective):
    """A directive that is read from the package: its page is built again when a file of the package changes."""

    @property
    def root(self) -> Path:
        """The folder of the book."""
        root = Path(self.env.srcdir)
        for path in (root / "pyproject.toml", *modules(root).values()):
            self.env.note_dependency(str(path))
        return root


class Drawing(CodeDirective):
    """`{architecture}`: the drawing; a warning for each arrow that runs back."""

    def run(self) -> list[nodes.Node]:
        for name, other in back(arrows(self.root), rows(self.root)):
            logger.warning(f"{name} imports {other}, which stands above it", location=self.get_location())
        return [nodes.raw("", drawing(self.root), format="html")]


class Modules(CodeDirective):
    """`{modules}`: for each wing what it says of itself, and a table of its modules; then those outside the wings."""

    def run(self) -> list[nodes.Node]:
        known, order = modules(self.root), [name for layer in rows(self.root) for name in layer]
        held = [wing for wing in reversed(order) if wing in wings(known)]
        found: list[nodes.Node] = []
        for wing in held:
            inside = [name for name in known if name.startswith(f"{wing}.")]
            found += [_heading(wing, says(known[wing])), self.table(inside, known)]
        outside = [name for name in reversed(order) if name not in held]
        return [*found, _heading("", "Outside the wings."), self.table(outside, known)]

    def table(self, names: list[str], known: dict[str, Path]) -> nodes.table:
        """A line for each module: its name with a link to its source, and the first line of its docstring."""
        link = self.config.html_theme_options["repository_url"]
        lines = [(linked(known[name], link, self.root), described(says(known[name]))) for name in names]
        columns = [nodes.colspec(colwidth=width) for width in (28, 72)]
        head = nodes.thead("", _row([nodes.Text("module")], [nodes.Text("what it does")]))
        body = nodes.tbody("", *(_row(*line) for line in lines))
        return nodes.table("", nodes.tgroup("", *columns, head, body, cols=2), classes=["colwidths-given"])


def _heading(wing: str, words: str) -> nodes.paragraph:
    name = [nodes.strong("", "", nodes.literal(text=wing)), nodes.Text(": ")] if wing else []
    return nodes.paragraph("", "", *name, *described(words))


def wings(known: dict[str, Path]) -> set[str]:
    """The modules that hold others."""
    return {name.rpartition(".")[0] for name in known} - {""}


def _row(*cells: list[nodes.Node]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells))


def linked(path: Path, repository: str, root: Path) -> list[nodes.Node]:
    """A module's file name with a link to its source."""
    address = f"{repository}/blob/main/{path.relative_to(root).as_posix()}"
    return [nodes.reference("", "", nodes.literal(text=path.stem), refuri=address)]


def described(line: str) -> list[nodes.Node]:
    """A line of a docstring: what stands between backticks is code."""
    pieces = enumerate(line.split("`"))
    return [nodes.literal(text=piece) if place % 2 else nodes.Text(piece) for place, piece in pieces]


def place_of(name: str, root: Path) -> Path | None:
    """The file of a dotted name such as `experiments.ledger.Ledger.merge`; None if the package has none."""
    known, parts = modules(root), name.split(".")
    length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), 0)
    if not length:
        return None
    path = known[".".join(parts[:length])]
    inside: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in parts[length:]:
        found = [node for node in inside if part in defined(node)]
        if not found:
            return None
        inside = getattr(found[0], "body", [])
    return path


def defined(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {target.id for target in targets if isinstance(target, ast.Name)}
    return {getattr(node, "name", "")}


class Place(SphinxRole):
    """`{place}`method.overlay.blend``: a name with a link to its file; a warning if it is not there."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        root = Path(self.env.srcdir)
        path = place_of(self.text, root)
        if path is None:
            logger.warning(f"the package has no {self.text}", location=self.get_location())
            return [nodes.literal(text=self.text)], []
        file = path.relative_to(root / PACKAGE).as_posix()
        name = self.text.removeprefix(file.removesuffix(".py").replace("/", ".")).strip(".")
        address = f"{self.config.html_theme_options['repository_url']}/blob/main/{PACKAGE}/{file}"
        shown = nodes.reference("", "", nodes.literal(text=file), refuri=address)
        return [nodes.literal(text=name), nodes.Text(" in "), shown] if name else [shown], []


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the role."""
    app.add_directive("architecture", Drawing)
    app.add_directive("modules", Modules)
    app.add_role("place", Place())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
