"""Whatever the reader's shell, profiles, locale and folders are like: the book is found, runs and looks the same."""

import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from kdig_utils import __main__ as command_line
from kdig_utils import machine, paths
from kdig_utils.book import figures, repository, reproduce
from kdig_utils.experiments.ledger import code_commit
from kdig_utils.method import cifar10

ROOT = Path(__file__).resolve().parents[2]
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
PARAMETERS = new_code_cell('profile = "published"', metadata={"tags": ["parameters"]})


def executed(folder: Path, run: Path, source: str) -> list[str]:
    """The lines that a chapter with this one cell prints, in a book of its own below `folder`."""
    for name in ("notebooks", "kdig_utils"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    notebook = folder / "notebooks" / "00_asks.ipynb"
    nbformat.write(new_notebook(cells=[PARAMETERS, new_code_cell(source)], metadata=KERNEL), notebook)
    reproduce.check_parameters(notebook)
    outcome = reproduce.execute(notebook, "published", run)
    assert (outcome.status, outcome.error) == ("ok", "")
    outputs = nbformat.read(run / notebook.name, as_version=4).cells[-1].outputs
    assert {output.get("name") for output in outputs} == {"stdout"}
    return "".join(output.text for output in outputs).splitlines()


# Folders


@pytest.mark.parametrize("variable", ["KDIG_ROOT", "KDIG_WORKSPACE", "KDIG_DATA", "KDIG_RELEASED"])
@pytest.mark.parametrize(
    ("value", "meant"), [("there", "here/there"), ("../there", "there"), ("~/there", "home/there")]
)
def test_a_folder_is_what_the_shell_that_named_it_means(
    variable: str, value: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(variable, value)
    assert paths.named_folder(variable) == tmp_path / meant
    assert paths.absolute_folders()[variable] == str(tmp_path / meant)


@pytest.mark.slow
def test_command_line_and_chapters_share_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the paths hold braces, which papermill takes for places to fill in."""
    here = tmp_path / "a {book} {"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "{profile}"))
    for variable, value in {"KDIG_ROOT": ".", "KDIG_WORKSPACE": "~/mine", "KDIG_DATA": "data"}.items():
        monkeypatch.setenv(variable, value)
    asks = """
        from kdig_utils import paths
        from kdig_utils.method import cifar10
        print(paths.repository_root(), paths.workspace(), cifar10.data_root(), sep="\\n")
    """
    printed = executed(here, paths.workspace() / "run", textwrap.dedent(asks))
    assert printed == [str(here), str(tmp_path / "{profile}" / "mine"), str(here / "data")]
    assert printed == list(map(str, (paths.repository_root(), paths.workspace(), cifar10.data_root())))


# The reader's settings


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader whose profile, start-up files and style are their own, and who works in Latin-1."""
    startup = tmp_path / ".ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("print('mine')")
    (startup.parent / "ipython_config.py").write_text("c.InteractiveShell.ast_node_interactivity = 'all'\n")
    (tmp_path / "matplotlibrc").write_text("image.origin: lower\ntext.usetex: True\n")
    (tmp_path / "startup.py").write_text("import builtins\nbuiltins.print = None\n")
    for variable, value in {
        "HOME": tmp_path,
        "IPYTHONDIR": tmp_path / ".ipython",
        "MPLCONFIGDIR": tmp_path,
        "MATPLOTLIBRC": tmp_path / "matplotlibrc",
        "MPLBACKEND": "no such backend",
        "PYTHONSTARTUP": tmp_path / "startup.py",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
    }.items():
        monkeypatch.setenv(variable, str(value))
    return tmp_path


ASKS = """\
import matplotlib, matplotlib.pyplot, pathlib
1, 2
pathlib.Path("written.txt").write_text("±")
print(matplotlib.rcParams["image.origin"], matplotlib.rcParams["text.usetex"])
print("inline" in matplotlib.get_backend(), len(pathlib.Path("written.txt").read_bytes()))"""


@pytest.mark.slow
@pytest.mark.parametrize("home", ["", "no folder/below it"])
def test_a_chapter_sees_none_of_the_readers_settings(
    home: str, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it need a home that can be written."""
    if home:
        (settings / "no folder").write_text("")
        monkeypatch.setenv("HOME", str(settings / home))
        for variable in ("IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR"):
            monkeypatch.delenv(variable, raising=False)
    assert executed(settings / "book", settings / "run", ASKS) == ["upper False", "True 2"]


@pytest.mark.slow
def test_the_tests_of_the_notebooks_see_none_of_them_either(settings: Path) -> None:
    """What `make test` compares with the stored outputs comes from kernels in the same environment."""
    cell = new_code_cell(ASKS)
    cell.execution_count, cell.outputs = 1, [nbformat.v4.new_output("stream", text="upper False\nTrue 2\n")]
    (settings / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=[cell]), settings / "notebooks" / "00_asks.ipynb")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", "--nbval"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    environment = {name: value for name, value in environment.items() if "PYTEST" not in name}
    ran = subprocess.run(
        [*words, "--nbval-current-env", "--rootdir", settings, "notebooks"],
        cwd=settings,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]


def test_figures_begin_from_the_defaults_and_keep_the_backend() -> None:
    backend = matplotlib.get_backend()
    with matplotlib.rc_context(
        {"image.origin": "lower", "text.usetex": True, "savefig.bbox": "tight", "lines.linewidth": 9}
    ):
        figures.style()
        figure, axes = plt.subplots()
        image = torch.zeros(3, 32, 32)
        image[:, :16] = 1
        figures.show_image(axes, image, "its upper half is bright")
        assert axes.images[0].origin == "upper"
        assert matplotlib.rcParams["lines.linewidth"] < 2
        assert figures.png(figure).startswith(b"\x89PNG")  # without LaTeX
        assert matplotlib.get_backend() == backend
        plt.close(figure)


def test_what_the_machine_gives_to_kernels_lies_below_one_folder(tmp_path: Path) -> None:
    found = machine.kernel_environment(tmp_path)
    own = {"IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"}
    assert all(Path(found[name]).is_relative_to(tmp_path) for name in own)
    assert len({found[name] for name in own}) == len(own)
    assert str(ROOT) in found["PYTHONPATH"].split(os.pathsep)


# The locale


@pytest.mark.parametrize(("encoding", "printed"), [("ascii", "? 1 ? 2"), ("latin-1", "± 1 ? 2"), ("utf-8", "± 1 – 2")])
def test_the_command_line_prints_a_sign_that_the_locale_lacks_as_a_question_mark(
    encoding: str, printed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding=encoding))
    monkeypatch.setattr(command_line, "call", lambda *_: print("± 1 – 2"))
    command_line.main(["status"])
    assert terminal.getvalue().decode(encoding) == printed + "\n"


@pytest.mark.parametrize("command", ["links", "readme"])
def test_the_files_of_the_book_are_utf8_in_an_ascii_locale(command: str) -> None:
    """Their check reads every text with a sign beyond ASCII, and finds nothing to change."""
    poor = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "KDIG_ROOT": str(ROOT)}
    environment = {**machine.process_environment(), **poor}
    words = [sys.executable, "-m", "kdig_utils", command, "--check"]
    ran = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("words", ["much " * 100_000, "a line"])
def test_output_that_nobody_reads_ends_the_command_without_a_word(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `status | head -1` does, once `head` has gone."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as output:
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(command_line, "call", lambda *_: print(words))
        assert command_line.main(["status"]) == 141
    assert capsys.readouterr().err == ""


def test_a_pipe_to_another_process_that_breaks_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(command_line, "call", lambda *_: os.write(write, b"asked"))
    assert command_line.main(["status"]) == 2
    assert "Broken pipe" in capsys.readouterr().err


# Whose commit it is


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Makes a folder a repository with one commit, and returns that."""
    for name in [name for name in os.environ if name.startswith("GIT_")] + ["KDIG_COMMIT"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path / "outer" / "book"))
    (tmp_path / "outer" / "book" / "kdig_utils").mkdir(parents=True)

    def make(folder: Path) -> str:
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", folder]
        subprocess.run([*git, "init", "-q"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
        words = [*git, "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    return make


def test_the_commit_is_the_books_own_and_never_that_of_a_repository_around_it(
    clone: Callable[[Path], str], tmp_path: Path
) -> None:
    clone(tmp_path / "outer")
    assert code_commit() == ""
    (tmp_path / "outer" / "book" / ".git").mkdir()  # what a broken copy leaves
    with pytest.warns(UserWarning, match="KDIG_COMMIT"):
        assert code_commit() == ""
    own = clone(tmp_path / "outer" / "book")
    assert code_commit() == own
    (tmp_path / "outer" / "book" / "kdig_utils" / "new.py").write_text("")
    assert code_commit() == own + "+"


def test_a_clone_that_git_refuses_is_told_and_named_by_hand(
    clone: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone(tmp_path / "outer" / "book")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as a clone of another user is to git
    with pytest.warns(UserWarning, match=r"KDIG_COMMIT.*dubious ownership.*safe\.directory"):
        assert code_commit() == ""
    monkeypatch.setenv("KDIG_COMMIT", "0123abc")
    assert code_commit() == "0123abc"


# A folder with a space in its name

FAKE_PYTHON = """\
#!/bin/bash
# Stands for every Python: makes an environment of itself, and writes down what it is asked.
printf '%s | %s\\n' "$*" "${TMPDIR:-}" >> "$ASKED"
case "$*" in
  "-m venv"*) mkdir -p .venv/bin; for name in python jupyter-book; do cp "$0" ".venv/bin/$name"; done ;;
  "-m pip install"*) touch "$TMPDIR/written" ;;
esac
"""


@pytest.mark.parametrize(
    ("target", "last"), [("setup", "-m pip install"), ("test", "-m pytest"), ("reproduce", "build .")]
)
def test_make_works_in_a_folder_with_a_space(target: str, last: str, tmp_path: Path) -> None:
    folder, commands, asked = tmp_path / "my {$book}", tmp_path / "bin", tmp_path / "asked.txt"
    folder.mkdir()
    commands.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "requirements.txt").write_text("")
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (commands / name).write_text(FAKE_PYTHON)
        (commands / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment |= {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "ASKED": str(asked)}
    words = ["make", target, "BESIDE=", "TORCH="]
    ran = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    calls = asked.read_text().splitlines()
    assert calls[-1].startswith(last)
    installed = [call for call in calls if call.startswith("-m pip install --retries")]
    assert [call.split(" | ")[1] for call in installed] == [str(folder / ".venv" / "tmp")]


# The first cell of a chapter, in Colab

COLAB = """
import os, sys
from IPython.core.interactiveshell import InteractiveShell
sys.modules["google.colab"] = sys
shell = InteractiveShell.instance()
shell.register_magic_function(lambda line: print("pip", line, os.getcwd()), magic_name="pip")
for place in sys.argv[2:]:
    os.chdir(place)
    shell.run_cell(sys.argv[1]).raise_error()
    print("in", os.getcwd())
"""


def first_cells() -> dict[str, str]:
    """The set-up cell of each chapter, by its name."""
    found = {}
    for path in repository.notebooks():
        code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
        found[path.stem] = code[0]
    return found


def test_the_first_cell_is_the_same_in_all_chapters_but_for_what_the_edge_needs() -> None:
    texts = {text.replace('".[edge]"', ".") for text in first_cells().values()}
    assert len(texts) == 1
    assert [name for name, text in first_cells().items() if "[edge]" in text] == ["14_edge"]


def test_the_first_cell_may_be_run_again_and_from_elsewhere(tmp_path: Path) -> None:
    """One clone, one folder; what was written there stays."""
    address, copy, content = repository.address(), tmp_path / "copy", tmp_path / "content"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q", copy], check=True)
    (copy / "results").mkdir()
    (copy / "results" / "runs.csv").write_text("one\n")
    subprocess.run([*git, "-C", copy, "add", "."], check=True)
    subprocess.run([*git, "-C", copy, "commit", "-q", "-m", "one"], check=True)
    content.mkdir()
    source = first_cells()["00_start_here"].replace("/content", str(content))
    key = f"url.{copy.as_uri()}.insteadOf"
    shown = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": key, "GIT_CONFIG_VALUE_0": address}
    environment = {**os.environ, **shown, "IPYTHONDIR": str(tmp_path / "ipython")}
    clone = content / "kdig"

    def run(*places: Path) -> str:
        command = [sys.executable, "-c", COLAB, source, *map(str, places)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert run(content).splitlines() == [f"pip install -q . {clone}", f"in {clone}"]
    (clone / "results" / "runs.csv").write_text("one\nmine\n")
    again = run(clone, clone / "results", content)  # a new runtime, and the same cell three times
    assert again.splitlines() == 3 * [f"pip install -q . {clone}", f"in {clone}"]
    assert [path.parent for path in content.rglob(".git")] == [clone]
    assert (clone / "results" / "runs.csv").read_text() == "one\nmine\n"
