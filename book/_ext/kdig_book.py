"""What the book needs beyond Jupyter Book: what was run, numbers that are checked, alternative texts, a local badge."""

import hashlib
import json
import math
import os
import re
from base64 import b64decode
from functools import cache
from pathlib import Path, PurePosixPath

import kdig_numbers
import nbformat
import pandas as pd
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

from kdig_utils import paths
from kdig_utils.analysis import laboratory, scorecard
from kdig_utils.book import status
from kdig_utils.experiments import evidence, laptop
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.method.spec import METHODS

logger = logging.getLogger(__name__)

REMOTE_BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
LOCAL_BADGE = "/book/figures/colab-badge.svg"
SETTINGS = ["method", "epochs", "k", "other_settings", "test_images", "campaign"]
WORDS_A_MINUTE = 130  # of a text with formulas, in a language that is not the reader's first
SCORECARD = "notebooks/16_scorecard"
CHAPTER_LINK = re.compile(r"([\w./-]+)\.ipynb")
FIRE_COUNTS = ("attempts", "kills", "rows reported", "faults")
HEADINGS = ("method", "accuracy", "lowest to highest", "seeds", *(name.replace("_", " ") for name in SETTINGS[1:]))


def summary(ledger: pd.DataFrame) -> list[tuple[str, ...]]:
    """One row for each setting that was run and for each method that was not, in the order of `METHODS`."""
    rows, ledger = [], status.with_other_settings(ledger)
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
        return [table(HEADINGS, summary(ledger_of(self.env)))]


class ClaimsByKind(SphinxDirective):
    """`{claims-by-kind}`: the claims, a row a kind of evidence, a column a verdict; times are left to the scorecard."""

    def run(self) -> list[nodes.Node]:
        kinds = scorecard.by_kind(card_of(self.env)).drop(index=evidence.TIMED)
        kinds = kinds.loc[:, kinds.any()]
        rows = [(kind, *map(str, counts)) for kind, counts in zip(kinds.index, kinds.to_numpy(), strict=True)]
        return [table(("evidence", *kinds.columns), rows)]


class LaboratoryTable(SphinxDirective):
    """`{laboratory}`: a row for each tested question of the laptop protocol: what is shown, what is open."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(laptop.ledger_path()))
        contrasts = laboratory.contrasts(laboratory.accuracies(laboratory.read()))
        titles = {name: asked["title"] for name, asked in laboratory.registered()["questions"].items()}
        rows = [(f"{name}: {titles[name]}", *shown_and_open(its)) for name, its in contrasts.groupby("question")]
        return [table(("question", "shown, points", "not shown", "seeds missing"), rows)]


class UnderFire(SphinxDirective):
    """`{under-fire}`: how often the ledger was attacked, by kind, and what was found (`benchmarks/under_fire.py`)."""

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir) / "benchmarks" / "results" / "under_fire.json"
        self.env.note_dependency(str(path))
        if not path.is_file():
            return [nodes.paragraph(text="not run yet: `python benchmarks/under_fire.py`")]
        found = json.loads(path.read_text(encoding="utf-8"))
        caught = sum(map(bool, found["broken_on_purpose"].values()))
        told = (
            f"{found['date']}, commit {found['commit']}, {found['device']}, {found['seconds']:,} seconds. Of "
            f"{len(found['broken_on_purpose'])} packages that were broken on purpose, the attacks found {caught}."
        )
        return [table(("attack", "on", *FIRE_COUNTS), fire_counts(found["kinds"])), nodes.paragraph(text=told)]


def fire_counts(kinds: list[dict]) -> list[tuple[str, ...]]:
    """A row for each kind of attack, with what it was tried on, and one for all."""
    parts = pd.DataFrame([{**kind, "faults": len(kind["faults"])} for kind in kinds])
    parts[["attack", "on"]] = parts["name"].str.partition(", ")[[0, 2]]
    parts.loc[parts["left_out"] != "", "attack"] += ": not tried"
    rows = [(its, ", ".join(filter(None, of["on"])), *_sums(of)) for its, of in parts.groupby("attack", sort=False)]
    return [*rows, ("all", "", *_sums(parts))]


def _sums(parts: pd.DataFrame) -> list[str]:
    return [f"{parts[name.split()[0]].sum():,}" for name in FIRE_COUNTS]


def shown_and_open(contrasts: pd.DataFrame) -> tuple[str, str, str]:
    """The contrasts of a question: those that a test decides, with their size; those undecided; those that wait."""
    decided = contrasts["verdict"].isin((laboratory.ABOVE, laboratory.BELOW, laboratory.LEVEL))
    waiting = contrasts["pairs"] < contrasts["seeds"]
    shown = [f"{row.name} {laboratory.in_words(row)}" for row in contrasts[decided].itertuples()]
    return "; ".join(shown), *("; ".join(contrasts["name"][those]) for those in (~decided & ~waiting, waiting))


def ledger_of(env: BuildEnvironment) -> pd.DataFrame:
    """The ledger of the book that is being built; the page is built again when it changes."""
    path = Path(env.srcdir) / "results" / "runs.csv"
    env.note_dependency(str(path))
    return Ledger(path).read()


def card_of(env: BuildEnvironment) -> pd.DataFrame:
    """The scorecard of the book that is being built, by the claims' names, without any timing."""
    path = Path(env.srcdir) / "results" / "runs.csv"
    return _card(path, path.stat().st_mtime if path.is_file() else 0.0)


@cache
def _card(path: Path, _modified: float) -> pd.DataFrame:
    return scorecard.scorecard(Ledger(path).read()).set_index("name", drop=False)


class QuotedNumber(SphinxRole):
    """`{ledger}`, `{paper}`, `{claim}`: a number that is checked against its source; a contradiction is a warning."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        try:
            shown = kdig_numbers.quoted(self.name, self.text, ledger_of(self.env), self.verdicts)
        except kdig_numbers.Contradiction as error:
            logger.warning(str(error), location=self.get_location())
            shown = self.text
        text = nodes.inline("", shown, classes=["kdig-number"])
        return [self.linked(text) if self.name == "claim" else text], []

    def verdicts(self) -> pd.Series:
        return card_of(self.env)["verdict"]

    def linked(self, text: nodes.inline) -> nodes.Node:
        """The text with a link to the scorecard, if the book has one and this is another page."""
        if not (Path(self.env.srcdir) / f"{SCORECARD}.ipynb").is_file() or self.env.docname == SCORECARD:
            return text
        return link_to_page(self.env.docname, f"/{SCORECARD}", text)


def link_to_page(docname: str, target: str, *content: nodes.Node) -> addnodes.pending_xref:
    """A link from the page `docname` that Sphinx resolves, and warns of if there is no page `target`."""
    to = {"refdomain": "std", "reftype": "doc", "reftarget": target, "refexplicit": True, "refwarn": True}
    return addnodes.pending_xref("", *content, refdoc=docname, **to)


def follow_links_in_outputs(app: Sphinx, doctree: nodes.document) -> None:
    """Let a link to a notebook in a cell's output lead to its page; myst-nb follows only those in Markdown cells."""
    for link in list(doctree.findall(nodes.reference)):
        found = CHAPTER_LINK.fullmatch(link.get("refuri", ""))
        if found:
            content = nodes.inline("", "", *link.children, classes=["doc"])
            link.replace_self(link_to_page(app.env.docname, found[1], content))


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


def tell_time(app: Sphinx, doctree: nodes.document) -> None:
    """Below a chapter's title: how long it takes to read, and how long it ran on the machine that builds the book."""
    source = Path(app.env.doc2path(app.env.docname))
    section = next(doctree.findall(nodes.section), None)
    if source.suffix != ".ipynb" or section is None:
        return
    cells = nbformat.read(source, as_version=4).cells
    words = sum(len(cell.source.split()) for cell in cells if cell.cell_type == "markdown")
    minutes = 5 * math.ceil(words / WORDS_A_MINUTE / 5)
    told = f"About {minutes} minutes to read; the exercises take longer. No GPU is needed."
    executed = paths.workspace() / "reproduce" / "published" / source.name
    if executed.is_file():
        seconds = nbformat.read(executed, as_version=4).metadata.get("papermill", {}).get("duration")
        told += f" Its code ran in {seconds:.0f} s on {os.cpu_count()} CPU cores for this page." if seconds else ""
    section.insert(1, nodes.paragraph(text=told, classes=["kdig-time"]))


def without_thebe(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None) -> None:
    """Leave out sphinx-thebe's scripts: the theme adds them twice, which is an error on each page; none uses them."""
    scripts = context.get("script_files", [])
    context["script_files"] = [
        script for script in scripts if "thebe" not in f"{script.filename} {script.attributes}".lower()
    ]


def serve_networks(app: Sphinx, error: Exception | None) -> None:
    """Put what `book/try_it.md` runs in the reader's browser beside the pages; without a network, the reason why."""
    if error is None and app.builder.format == "html":
        import kdig_browser  # slow to import, and needed only now

        if missing := kdig_browser.write_site(Path(app.outdir) / "_static" / "try_it"):
            logger.info("try_it: no networks in the browser: %s", missing)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register directive and roles, and what is done to images before Sphinx collects them."""
    for name, directive in (
        ("ledger-status", LedgerStatus), ("claims-by-kind", ClaimsByKind), ("laboratory", LaboratoryTable),
        ("under-fire", UnderFire),
    ):  # fmt: skip
        app.add_directive(name, directive)
    for role in ("ledger", "paper", "claim"):
        app.add_role(role, QuotedNumber())
    app.connect("doctree-read", follow_links_in_outputs, priority=100)
    app.connect("doctree-read", use_local_badges, priority=100)
    app.connect("doctree-read", describe_figures, priority=100)
    app.connect("doctree-read", tell_time, priority=100)
    app.connect("html-page-context", without_thebe, priority=900)
    app.connect("build-finished", serve_networks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
