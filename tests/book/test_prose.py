"""Numbers in prose: a true quotation passes, a wrong one is refused."""

import importlib.util
import json
import os
import re
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
from kdig_utils.experiments.ledger import COLUMNS
from kdig_utils.method.spec import RunSpec

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "book" / "_ext"))
import kdig_numbers  # noqa: E402


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
    assert kdig_numbers.quoted(role, text, ledger, verdicts) == shown


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
    with pytest.raises(kdig_numbers.Contradiction, match=message):
        kdig_numbers.quoted(role, text, ledger, verdicts)


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
    assert kdig_numbers.agrees(quote, value) == same


# The build


CONFIG = """
extensions = ["myst_parser", "kdig_book"]
exclude_patterns = ["out"]
"""


def test_a_build_shows_what_is_true_and_stops_at_what_is_not(tmp_path: Path, ledger: pd.DataFrame) -> None:
    """A book of one page, in a process of its own, with warnings as errors."""
    (tmp_path / "results").mkdir()
    ledger.to_csv(tmp_path / "results" / "runs.csv", index=False)
    (tmp_path / "conf.py").write_text(CONFIG)
    (tmp_path / "index.md").write_text(
        "# A page\n\n"
        "It reaches {ledger}`92.25 % <mean test_accuracy method=kd_ig epochs=100>`, "
        "the paper {paper}`headline.kd_ig_accuracy` %, and {claim}`speedup` is {claim}`not run yet <speedup>`.\n\n"
        "It reaches {ledger}`93.25 % <mean test_accuracy method=kd_ig epochs=100>`.\n"
    )
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "text", ".", "out"]
    places = os.pathsep.join(map(str, (ROOT, ROOT / "book" / "_ext")))
    environment = {**os.environ, "PYTHONPATH": places, "KDIG_ROOT": str(ROOT)}
    ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert re.findall(r"index.md:(\d+): WARNING", ran.stderr) == ["5"]
    assert "the prose says 93.25 %, the ledger says 92.25" in ran.stderr
    built = (tmp_path / "out" / "index.txt").read_text()
    for shown in ("92.25 %", "92.5 %", "10.8 ×", "not run yet"):
        assert shown in built


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
