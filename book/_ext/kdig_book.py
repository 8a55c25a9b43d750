"""What the book needs beyond Jupyter Book: a table of what was run, alternative texts, a badge of its own."""

import hashlib
from base64 import b64decode
from pathlib import Path, PurePosixPath

import nbformat
import pandas as pd
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from kdig_utils.runs import METHODS, Ledger

REMOTE_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
LOCAL_BADGE = "/book/figures/colab-badge.svg"
SETTINGS = ["method", "epochs", "k", "pairing", "train_fraction", "test_images", "campaign"]
HEADINGS = (
    "method",
    "accuracy",
    "lowest to highest",
    "seeds",
    "epochs",
    "k",
    "pairing",
    "train share",
    "test images",
    "campaign",
)


def summary(ledger: pd.DataFrame) -> list[tuple[str, ...]]:
    """One row for each setting that was run and for each method that was not, in the order of `METHODS`."""
    rows = []
    for method in ("teacher", *METHODS):
        runs = ledger[ledger["method"] == method]
        rows += [_row(setting, group) for setting, group in runs.groupby(SETTINGS, dropna=False)]
        if runs.empty:
            rows.append((method, "not run yet", *[""] * (len(HEADINGS) - 2)))
    return rows


def _row(setting: tuple, runs: pd.DataFrame) -> tuple[str, ...]:
    accuracy = runs["test_accuracy"].astype(float)
    method, *others = ("" if pd.isna(value) else value if isinstance(value, str) else f"{value:g}" for value in setting)
    spread = f"{accuracy.min():.2f} to {accuracy.max():.2f}" if len(runs) > 1 else ""
    return (method, f"{accuracy.mean():.2f}", spread, str(len(runs)), *others)


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> nodes.table:
    """A table node of plain text cells."""
    columns = [nodes.colspec(colwidth=1) for _ in headings]
    head, body = nodes.thead("", _table_row(headings)), nodes.tbody("", *map(_table_row, rows))
    return nodes.table(
        "", nodes.tgroup("", *columns, head, body, cols=len(headings)), classes=["colwidths-auto", "kdig-ledger"]
    )


def _table_row(cells: tuple[str, ...]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph(text=cell)) for cell in cells))


class LedgerStatus(SphinxDirective):
    """`{ledger-status}`: what the ledger holds when the book is built, and what it does not."""

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / "results" / "runs.csv"
        self.env.note_dependency(str(path))
        return [table(HEADINGS, summary(Ledger(path).read()))]


def use_local_badges(app: Sphinx, doctree: nodes.document) -> None:
    """Show the book's own Colab badge where a notebook names the one on Google's host."""
    for image in doctree.findall(nodes.image):
        if image["uri"] == REMOTE_BADGE:
            image["uri"] = LOCAL_BADGE
            image["classes"].append("kdig-badge")


def alternative_texts(notebook: Path) -> dict[str, str]:
    """The alternative text of each PNG in a notebook, by the PNG's SHA-256, which is its file name in the build."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    described = [(output.data["image/png"], output.metadata.get("image/png", {}).get("alt")) for output in outputs]
    return {hashlib.sha256(b64decode(png)).hexdigest(): text for png, text in described if text}


def describe_figures(app: Sphinx, doctree: nodes.document) -> None:
    """Give each figure the alternative text that its notebook stores; myst-nb takes only its width and height."""
    source = Path(app.env.doc2path(app.env.docname))
    if source.suffix != ".ipynb":
        return
    texts = alternative_texts(source)
    for image in doctree.findall(nodes.image):
        image["alt"] = texts.get(PurePosixPath(image["uri"]).stem, image.get("alt", ""))


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive, and what is done to images before Sphinx collects them."""
    app.add_directive("ledger-status", LedgerStatus)
    app.connect("doctree-read", use_local_badges, priority=100)
    app.connect("doctree-read", describe_figures, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
