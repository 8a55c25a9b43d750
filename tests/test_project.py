"""Facts about the repository: notebooks fit to be read, one address, numbers from the ledger, a whole book."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import yaml

from kdig_utils.book import repository
from kdig_utils.experiments import evidence
from kdig_utils.experiments.ledger import Ledger

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PACKAGE = ROOT / "kdig_utils"
MODULES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = runpy.run_path(str(ROOT / "setup.py"))["groups"]((ROOT / "requirements.txt").read_text())
MEGABYTE = 1_000_000
MOST_LINES = 14_060
MOST_LINES_OF_A_FILE = 350
MOST_VISIBLE_LINES = 80  # of code on a chapter's page
HIDDEN = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
MOST_LINES_OF_A_FUNCTION = 40
# A place on somebody's machine, which means nothing on another one.
LOCAL_PATH = re.compile(r"(?<![\w.:/-])/(?:home|root|tmp|work|Users|mnt)/\w|file:/{2}")
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "ipython": "IPython"}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def this_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDIG_ROOT", str(ROOT))


@cache
def cells(path: Path) -> list[nbformat.NotebookNode]:
    return nbformat.read(path, as_version=4).cells


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in cells(path) if cell.cell_type == "code"]


def outputs(path: Path) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(path) for output in cell.outputs]


@cache
def committed_files() -> list[Path]:
    """Tracked files, and new ones that git does not ignore."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs the git repository: this is a copy without it")
    return [path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file()]


# The notebooks as committed


@each_notebook
def test_notebook_was_run_from_top_to_bottom_without_error(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    counts = [cell.execution_count for cell in code_cells(path) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1)), "a cell was not executed, or out of order"
    assert outputs(path), "nothing is stored"
    assert not [output.ename for output in outputs(path) if output.output_type == "error"]


@each_notebook
def test_notebook_stores_no_stderr_widgets_or_progress_bars(path: Path) -> None:
    assert not [output.text for output in outputs(path) if output.get("name") == "stderr"]
    assert not [kind for output in outputs(path) for kind in output.get("data", {}) if "widget" in kind]
    assert not [output.text for output in outputs(path) if "\r" in output.get("text", "")]


@each_notebook
def test_every_figure_has_an_alternative_text_a_caption_and_its_kind_of_evidence(path: Path) -> None:
    for cell in code_cells(path):
        for place, output in enumerate(cell.outputs):
            turned = 'class="kdig-widget"' in output.get("data", {}).get("text/html", "")
            if not turned and "image/png" not in output.get("data", {}):
                continue
            assert turned or len(output.metadata.get("image/png", {}).get("alt", "")) > 20, cell.source
            after = cell.outputs[place + 1 : place + 2]
            caption = after[0].get("data", {}).get("text/markdown", "") if after else ""
            found = re.fullmatch(r"\*.+\* Evidence: (.+)\.", caption, re.DOTALL)
            assert found, f"no caption with its kind of evidence after the figure of\n{cell.source}"
            assert evidence.in_words(found[1].split(" · ")) == found[1]


@each_notebook
def test_notebook_has_one_parameter_and_the_plain_kernel(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    tagged = [cell.source.strip() for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == ['profile = "published"']
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.pygments_lexer == "ipython3", "the book cannot colour lines with % and !"
    assert "papermill" not in notebook.metadata
    assert not [cell.id for cell in notebook.cells if {"papermill", "execution"} & set(cell.metadata)]


@each_notebook
def test_notebook_opens_with_title_question_and_its_own_colab_badge(path: Path) -> None:
    opening = cells(path)[0].source
    assert re.match(rf"# {path.name[:2]} · \w", opening)
    slug = repository.address().removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name}"
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    assert f"[![Open in Colab]({badge})]({link})" in opening
    assert "question" in opening.lower()


@each_notebook
def test_cells_are_short_and_stand_alone(path: Path) -> None:
    longest = max(code_cells(path), key=lambda cell: len(cell.source.splitlines()))
    assert len(longest.source.splitlines()) <= 25, longest.source
    assert not [cell.source for cell in code_cells(path) if re.search(r"^%run|\.ipynb['\"]", cell.source, re.MULTILINE)]


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.name < "08"], ids=lambda path: path.stem)
def test_a_page_of_the_first_half_shows_little_code(path: Path) -> None:
    """What draws or prepares is a click away."""
    shown = [cell.source for cell in code_cells(path) if not HIDDEN & set(cell.metadata.get("tags", []))]
    assert sum(bool(line.strip()) for source in shown for line in source.splitlines()) <= MOST_VISIBLE_LINES


@each_notebook
def test_notebook_names_no_place_on_a_machine(path: Path) -> None:
    texts = [cell.source for cell in cells(path)]
    for output in outputs(path):
        texts += [output.get("text", ""), *(text for text in output.get("data", {}).values() if isinstance(text, str))]
    assert not [found.group() for text in texts for found in LOCAL_PATH.finditer(text) if len(text) < MEGABYTE]


@each_notebook
def test_notebook_is_small(path: Path) -> None:
    assert path.stat().st_size < 2 * MEGABYTE


# The repository


def test_every_chapter_of_the_table_of_contents_is_there_and_no_notebook_is_left_out() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    notebooks = [name for name in listed if name.startswith("notebooks/")]
    assert notebooks == [f"notebooks/{path.stem}" for path in NOTEBOOKS]
    assert not [name for name in listed if not notebooks.count(name) and not (ROOT / f"{name}.md").is_file()]


def test_the_tree_is_small() -> None:
    sizes = {path: path.stat().st_size for path in committed_files()}
    assert sum(sizes.values()) < 30 * MEGABYTE
    assert not [str(path) for path, size in sizes.items() if size > 10 * MEGABYTE]


def test_no_file_names_a_place_on_a_machine_or_the_host_of_a_registry() -> None:
    texts = (".py", ".md", ".yml", ".toml", ".txt", ".lock", ".cff", ".css", ".svg", ".json", "")
    registry = re.compile(r"index-url|find-links|pypi\.|registry\.npmjs|deb\.debian")
    for path in committed_files():
        if path.suffix in texts and path != Path(__file__):
            text = path.read_text()
            found = [match.group() for pattern in (LOCAL_PATH, registry) for match in pattern.finditer(text)]
            assert not found, f"{path.relative_to(ROOT)} names {found}"


def test_every_link_to_the_repository_is_the_address_in_pyproject() -> None:
    assert repository.address() == PROJECT["urls"]["Repository"]
    assert not list(repository.stale_addresses())
    slug = repository.address().removeprefix("https://github.com/")
    for path in (ROOT / "README.md", ROOT / "CITATION.cff", ROOT / "_config.yml", ROOT / "book" / "how_to_run.md"):
        assert slug in path.read_text(), f"{path.name} does not link to the repository"


def test_the_results_in_the_readme_are_those_of_the_ledger() -> None:
    ledger = Ledger(ROOT / "results" / "runs.csv").read()
    assert (ROOT / "README.md").read_text() == repository.readme_with(repository.results_table(ledger))


def test_the_readme_names_files_that_exist() -> None:
    targets = re.findall(r"\]\(((?!https?:)[^)#]+)\)", (ROOT / "README.md").read_text())
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_ci_only_calls_make_test() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[-1] == "make test"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


# The package


def imported(path: Path) -> set[str]:
    """Top-level names that a module imports when it is imported."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    nodes = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]
        for node in nodes
        for alias in node.names
    }


def distribution_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement).group().lower() for requirement in requirements}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_what_the_package_requires(path: Path) -> None:
    extras = "edge" if path.parent.name == "edge" else {"reproduce": "book", "cluster": "cluster"}.get(path.stem)
    required = REQUIRED["package"] + (REQUIRED[extras] if extras else [])
    known = {IMPORT_NAMES.get(name, name) for name in distribution_names(required)} | {"kdig_utils"}
    installed_with_papermill = {"nbclient"} if extras == "book" else set()
    assert imported(path) <= known | installed_with_papermill | set(sys.stdlib_module_names)


def test_requirements_are_ranges_and_the_lock_has_an_exact_version_of_each() -> None:
    required = [requirement for group in REQUIRED.values() for requirement in group]
    assert not [requirement for requirement in required if "==" in requirement or ">=" not in requirement]
    locked = (ROOT / "requirements.lock").read_text().splitlines()
    assert not [line for line in locked if not re.fullmatch(r"[\w.-]+==[\w.+!-]+", line)]
    missing = distribution_names(required) - {line.split("==")[0].lower().replace("_", "-") for line in locked}
    assert not missing


def test_what_pip_was_told_is_what_requirements_txt_names() -> None:
    """`make` installs again when requirements.txt changes."""
    told = metadata.requires("kdig-utils")
    for group, requirements in REQUIRED.items():
        extra = "" if group == "package" else f'; extra == "{group}"'
        listed = [one.partition(";")[0] for one in told if (one.endswith(extra) if extra else ";" not in one)]
        assert distribution_names(listed) == distribution_names(requirements)


def write_wheel(folder: Path, name: str, version: str, requires: str = "") -> None:
    """A wheel without content, which pip can find and compare."""
    about = f"{name}-{version}.dist-info"
    requirement = f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requirement}")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.mark.parametrize(
    ("torchvision", "chosen"),
    [
        ("0.98+cpu", ["torch==98.0+cpu", "torchvision==0.98+cpu"]),
        ("0.98", []),  # no CPU build
        ("0.97+cpu", []),  # one that needs another torch
    ],
)
def test_torch_for_the_cpu_is_taken_where_the_index_has_both_packages(
    torchvision: str, chosen: list[str], tmp_path: Path
) -> None:
    write_wheel(tmp_path, "torch", "98.0+cpu")
    write_wheel(tmp_path, "torch", "99.0")
    write_wheel(tmp_path, "torchvision", torchvision, f"torch=={torchvision.removesuffix('+cpu').replace('0.', '')}.0")
    write_wheel(tmp_path, "torchvision", "0.99", "torch==99.0")
    words = ["make", "torch-build", "TORCH=cpu", f"VENV={tmp_path}", f"PYTHON={sys.executable}"]
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    ran = subprocess.run(words, cwd=ROOT, env={**os.environ, **index}, capture_output=True, text=True, check=True)
    assert (tmp_path / "torch-build.txt").read_text().splitlines() == chosen
    assert bool(chosen) == ("ordinary builds" not in ran.stdout)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_public_names_exist_and_say_what_they_are(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module says nothing"
    kinds = ast.FunctionDef | ast.ClassDef
    for node in [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]:
        for part in [node, *(child for child in node.body if isinstance(child, ast.FunctionDef))]:
            annotated = isinstance(part, ast.ClassDef) or part.returns is not None or part.name.startswith("_")
            assert annotated, f"{part.name} does not say what it returns"


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_package_is_small() -> None:
    assert sum(map(lines_of, MODULES)) <= MOST_LINES


def test_no_file_of_the_package_is_long() -> None:
    assert not {
        str(path.relative_to(ROOT)): lines_of(path) for path in MODULES if lines_of(path) > MOST_LINES_OF_A_FILE
    }


def test_no_function_of_the_package_is_long() -> None:
    """From `def` to the last line, the docstring included."""
    functions = [(path, node) for path in MODULES for node in ast.walk(ast.parse(path.read_text()))]
    lengths = {
        f"{path.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for path, node in functions
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION}


def test_imports_go_one_way_through_the_wings() -> None:
    """The layers, and that no wing has a circle, are contracts in pyproject.toml."""
    words = [Path(sys.executable).parent / "lint-imports", "--no-cache", "--no-logo"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("wing", [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()])
def test_a_wing_says_what_is_inside(wing: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text()))
    modules = {path.stem for path in (PACKAGE / wing).glob("*.py")} - {"__init__"}
    assert modules == set(re.findall(r"`(\w+)`", docstring))


def test_ruff_finds_nothing() -> None:
    for words in (["check", "."], ["format", "--check", "kdig_utils", "tests"]):
        ran = subprocess.run(
            [sys.executable, "-m", "ruff", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout


def test_mypy_finds_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


# The book


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of the book, built with warnings as errors."""
    folder = tmp_path_factory.mktemp("book")
    script = Path(sys.executable).parent / "jupyter-book"
    words = [script, "build", ".", "-W", "--keep-going", "-n", "-q", "--path-output", folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return folder / "_build" / "html"


@pytest.mark.slow
def test_the_book_has_a_page_for_every_chapter(book: Path) -> None:
    assert (book / "index.html").is_file()
    assert not [path.stem for path in NOTEBOOKS if not (book / "notebooks" / f"{path.stem}.html").is_file()]


@pytest.mark.slow
def test_the_book_needs_no_network(book: Path) -> None:
    """Nothing that a page loads by itself comes from elsewhere."""
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"(?:https?:)?//[^\"]+|<link[^>]*rel=\"(?:stylesheet|preload|icon)\"[^>]*href=\"(?:https?:)?//[^\"]+"
    )
    for page in book.rglob("*.html"):
        assert not loads.findall(page.read_text()), page.name


@pytest.mark.slow
def test_every_picture_in_the_book_has_an_alternative_text(book: Path) -> None:
    for page in book.rglob("*.html"):
        bare = [tag for tag in re.findall(r"<img[^>]*>", page.read_text()) if not re.search(r"alt=\"[^\"]", tag)]
        assert not bare, f"{page.name}: {bare[0][:200]}"
