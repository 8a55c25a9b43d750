"""The page that draws the architecture shows the code as it is."""

import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "book" / "architecture.md").read_text()
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def architecture() -> ModuleType:
    path = ROOT / "book" / "_ext" / "kdig_architecture.py"
    spec = importlib.util.spec_from_file_location("kdig_architecture", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_package(tmp_path: Path) -> Path:
    """A package of two layers whose lower one imports the upper one in a function."""
    contract = '[[tool.importlinter.contracts]]\ntype = "layers"\nlayers = ["kdig_utils.high", "kdig_utils.low"]\n'
    (tmp_path / "pyproject.toml").write_text(contract)
    for name, text in {
        "__init__": '"""All."""\n',
        "high/__init__": '"""Above: all."""\n',
        "high/one": '"""One."""\nfrom kdig_utils.low import two\nNAME: int = 1\n',
        "low/__init__": '"""Below."""\n',
        "low/two": '"""Two."""\ndef late():\n    import kdig_utils.high.one\n',
    }.items():
        path = tmp_path / "kdig_utils" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_arrows_are_the_imports(architecture: ModuleType) -> None:
    """Grimp, which import-linter rests on, finds the same ones."""
    graph = grimp.build_graph("kdig_utils")
    direct = {(name, other) for name in graph.modules for other in graph.find_modules_directly_imported_by(name)}
    assert architecture.imports(ROOT) == {tuple(name.removeprefix("kdig_utils.") for name in pair) for pair in direct}


def test_no_arrow_runs_back(architecture: ModuleType) -> None:
    assert architecture.back(architecture.arrows(ROOT), architecture.rows(ROOT)) == set()


def test_the_drawing_has_a_box_for_each_wing_and_an_arrow_for_each_import(architecture: ModuleType) -> None:
    svg = ElementTree.fromstring(architecture.drawing(ROOT))
    names = [text.text for text in svg.iter(f"{SVG}text") if text.get("class") == "name"]
    assert names == [name for layer in architecture.rows(ROOT) for name in layer]
    assert {name.split(".")[0] for name in architecture.modules(ROOT)} - {""} == set(names)
    shown = [group.find(f"{SVG}title").text for group in svg.iter(f"{SVG}g") if "arrow" in group.get("class", "")]
    told = {tuple(re.fullmatch(r"(\w+) imports (\w+): .+", title).groups()) for title in shown}
    assert told == set(architecture.arrows(ROOT))


def test_an_arrow_that_runs_back_is_found_and_drawn_as_such(architecture: ModuleType, small_package: Path) -> None:
    found = architecture.arrows(small_package)
    assert found == Counter({("high", "low"): 1, ("low", "high"): 1})
    assert architecture.back(found, architecture.rows(small_package)) == {("low", "high")}
    drawn = architecture.drawing(small_package)
    assert drawn.count('class="arrow back"') == 1
    assert architecture.RED in drawn


def test_a_place_is_found_and_one_that_is_gone_is_not(architecture: ModuleType, small_package: Path) -> None:
    assert architecture.place_of("low.two.late", small_package) == small_package / "kdig_utils" / "low" / "two.py"
    assert architecture.place_of("high.one.NAME", small_package).name == "one.py"
    assert architecture.place_of("low.two.gone", small_package) is None
    assert architecture.place_of("lower.two", small_package) is None


@pytest.mark.parametrize("name", re.findall(r"\{place\}`([\w.]+)`", PAGE))
def test_what_the_page_leads_to_is_there(architecture: ModuleType, name: str) -> None:
    assert architecture.place_of(name, ROOT) is not None


def test_each_wing_and_module_has_a_line_to_show(architecture: ModuleType) -> None:
    known = architecture.modules(ROOT)
    assert not [name for name, path in known.items() if len(architecture.says(path)) < 10]
    assert architecture.wings(known) < {name for layer in architecture.rows(ROOT) for name in layer}
