"""Numbers in prose: a true quotation passes, a wrong one is refused, one that is only typed is found."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from docutils import nodes
from docutils.utils import new_document
from sphinx import addnodes

from kdig_utils.analysis import claims
from kdig_utils.book import prose
from kdig_utils.experiments.ledger import COLUMNS
from kdig_utils.method.spec import RunSpec

ROOT = Path(__file__).resolve().parents[2]


def run(accuracy: float, method: str = "kd_ig", images: int = 50000, **changes: object) -> dict:
    spec = RunSpec(method, **changes)
    names = ("run_id", "method", "k", "seed", "epochs", "pairing", "train_fraction", "data_md5", "teacher_sha256")
    facts = {name: getattr(spec, name) for name in names}
    counts = {"train_images": images, "test_images": 10000}
    return {**facts, **counts, "campaign": "main", "test_accuracy": accuracy, "spec": json.dumps(asdict(spec))}


@pytest.fixture(scope="module")
def ledger() -> pd.DataFrame:
    rows = [run(76.1, epochs=3), run(76.6, epochs=3, seed=1), run(92.25), run(70.0, "student", epochs=3)]
    return pd.DataFrame([*rows, run(75.0, epochs=3, alpha=0.5, seed=2)], columns=list(COLUMNS))


def verdicts() -> pd.Series:
    return pd.Series({claim.name: "not run yet" for claim in claims.claims()})


# Quoted numbers


@pytest.mark.parametrize(
    ("role", "text", "shown"),
    [
        ("ledger", "76.35 % <mean test_accuracy method=kd_ig epochs=3 alpha=0.01>", "76.35 %"),
        ("ledger", "76 % <mean test_accuracy method=kd_ig epochs=3 alpha=0.01>", "76 %"),
        ("ledger", "mean test_accuracy method=kd_ig epochs=100", "92.25"),
        ("ledger", "5 <count test_accuracy>", "5"),
        ("ledger", "50,000 images <max train_images epochs=100>", "50,000 images"),
        ("paper", "92.5 % <headline.kd_ig_accuracy>", "92.5 %"),
        ("paper", "headline.kd_ig_accuracy", "92.5"),
        ("paper", "teacher.parameters", "2,236,682"),
        ("paper", "12.7 ms <latency_table.by_factor.4.12>", "12.7 ms"),
        ("claim", "speedup", "10.8 ×"),
        ("claim", "+0.40 points <kd_ig_over_kd>", "+0.40 points"),
        ("claim", "11 times <speedup>", "11 times"),
        ("claim", "not run yet <kd_ig_over_kd>", "not run yet"),
        ("claim", "verdict <kd_ig_over_kd>", "not run yet"),
    ],
)
def test_a_true_quotation_is_shown(role: str, text: str, shown: str, ledger: pd.DataFrame) -> None:
    assert prose.quoted(role, text, ledger, verdicts) == shown


@pytest.mark.parametrize(
    ("role", "text", "message"),
    [
        ("ledger", "77.66 % <mean test_accuracy method=kd_ig epochs=3 alpha=0.01>", "prose says 77.66 %.* says 76.35"),
        ("ledger", "75.9 % <mean test_accuracy method=kd_ig epochs=3>", "mixes runs with different alpha"),
        ("ledger", "80.5 % <mean test_accuracy epochs=3>", "mixes runs with different method"),
        ("ledger", "80.5 % <mean test_accuracy method=kd_ig>", "mixes runs with different epochs"),
        ("ledger", "80.5 % <mean test_accuracy method=at>", "no run with method=at"),
        ("ledger", "80.5 % <median test_accuracy>", "start with one of mean"),
        ("ledger", "80.5 % <mean accuracy>", "a column with numbers"),
        ("ledger", "80.5 % <mean test_accuracy kd_ig>", "not of the form name=value"),
        ("ledger", "very good <mean test_accuracy method=kd_ig epochs=100>", "very good"),
        ("paper", "93.0 % <headline.kd_ig_accuracy>", "says 92.5"),
        ("paper", "headline.nothing", "nothing at 'nothing'"),
        ("paper", "92.5 <headline>", "is no number"),
        ("claim", "10 × <speedup>", "says 10.8"),
        ("claim", "reproduced <kd_ig_over_kd>", "scorecard says not run yet"),
        ("claim", "nonsense", "no claim 'nonsense'"),
    ],
)
def test_a_false_quotation_is_refused(role: str, text: str, message: str, ledger: pd.DataFrame) -> None:
    with pytest.raises(prose.Contradiction, match=message):
        prose.quoted(role, text, ledger, verdicts)


@pytest.mark.parametrize(
    ("quote", "value", "same"),
    [
        ("75.27 %", 75.2700001, True),
        ("75.3", 75.26, True),
        ("75.2", 75.26, False),
        ("1,994 parameters", 1994, True),
        ("−0.33 points", -0.334, True),
        ("0.33 points", -0.334, False),
        ("none", 1.0, False),
    ],
)
def test_a_quotation_may_round_and_nothing_else(quote: str, value: float, same: bool) -> None:
    assert prose.agrees(quote, value) == same


# Typed numbers


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
    assert [number[:4] for number in prose.typed_accuracies(markdown)] == ["88.1"]


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
    assert prose.typed_accuracies(markdown) == []


def test_the_papers_numbers_may_be_typed_and_others_are_named_with_their_page(tmp_path: Path) -> None:
    page = tmp_path / "book" / "page.md"
    page.parent.mkdir()
    page.write_text("The paper has 92.58 %, we 88.12 %.")
    (message,) = prose.unexplained(page, tmp_path)
    assert message.startswith("book/page.md, text: 88.12 is typed")


def test_cells_of_a_notebook_are_read_and_outputs_are_not(tmp_path: Path) -> None:
    page = tmp_path / "page.ipynb"
    markdown = {"cell_type": "markdown", "source": ["We reach\n", "88.12 %."]}
    code = {"cell_type": "code", "source": ["88.12"], "outputs": [{"data": {"text/markdown": ["88.13 %"]}}]}
    page.write_text(json.dumps({"cells": [code, markdown]}))
    (message,) = prose.unexplained(page, tmp_path)
    assert message.startswith("page.ipynb, cell 1: 88.12")


@pytest.mark.parametrize("path", prose.pages(ROOT), ids=lambda path: path.name)
def test_no_page_of_the_book_types_an_accuracy(path: Path) -> None:
    assert prose.unexplained(path, ROOT) == []


def test_what_is_allowed_still_stands_there() -> None:
    for name, numbers in prose.ALLOWED.items():
        typed = [number for _place, text in prose.texts(ROOT / name) for number in prose.typed_accuracies(text)]
        assert set(numbers) <= set(typed), f"{name} no longer types {set(numbers) - set(typed)}: take it off the list"
        assert all(reason.strip() for reason in numbers.values())


# The build


CONFIG = """
extensions = ["myst_parser", "kdig_book"]
exclude_patterns = ["out"]
"""


def build(folder: Path, page: str, ledger: pd.DataFrame) -> subprocess.CompletedProcess[str]:
    """Build a book of one page, in a process of its own, with warnings as errors."""
    (folder / "results").mkdir()
    ledger.to_csv(folder / "results" / "runs.csv", index=False)
    (folder / "conf.py").write_text(CONFIG)
    (folder / "index.md").write_text(f"# A page\n\n{page}\n")
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html", ".", "out"]
    places = os.pathsep.join(map(str, (ROOT, ROOT / "book" / "_ext")))
    environment = {**os.environ, "PYTHONPATH": places, "KDIG_ROOT": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_book_that_tells_the_truth_is_built(tmp_path: Path, ledger: pd.DataFrame) -> None:
    page = (
        "It reaches {ledger}`92.25 % <mean test_accuracy method=kd_ig epochs=100>`, "
        "the paper {paper}`headline.kd_ig_accuracy` %, and {claim}`speedup` is {claim}`not run yet <speedup>`."
    )
    ran = build(tmp_path, page, ledger)
    assert ran.returncode == 0, ran.stderr
    html = (tmp_path / "out" / "index.html").read_text()
    for shown in ("92.25 %", "92.5</span> %", "10.8 ×", "not run yet"):
        assert shown in html


def test_a_book_that_contradicts_the_ledger_is_not_built(tmp_path: Path, ledger: pd.DataFrame) -> None:
    page = "It reaches {ledger}`93.25 % <mean test_accuracy method=kd_ig epochs=100>`.\n\nOr is it 88.12 %?"
    ran = build(tmp_path, page, ledger)
    assert ran.returncode != 0
    assert "index.md:3: WARNING" in ran.stderr
    assert "the prose says 93.25 %, the ledger says 92.25" in ran.stderr
    assert "88.12 is typed" in ran.stderr


def test_a_link_to_a_chapter_in_an_output_leads_to_its_page_and_others_are_left_alone() -> None:
    spec = importlib.util.spec_from_file_location("kdig_book", ROOT / "book" / "_ext" / "kdig_book.py")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    page = new_document("a page")
    page += [nodes.reference("", "", refuri=uri) for uri in ("10_frontier.ipynb", "https://a.org/b.ipynb", "#there")]
    app = SimpleNamespace(env=SimpleNamespace(docname="notebooks/16_scorecard"))
    extension.follow_links_in_outputs(app, page)
    (followed,) = page.findall(addnodes.pending_xref)
    assert (followed["reftarget"], followed["refdoc"]) == ("10_frontier", "notebooks/16_scorecard")
    assert [link["refuri"] for link in page.findall(nodes.reference)] == ["https://a.org/b.ipynb", "#there"]
