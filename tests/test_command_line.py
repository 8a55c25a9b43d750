"""The command line: help with examples, one clear line on bad input, and work that ends in ledger and artifacts."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from kdig_utils import __main__ as command_line
from kdig_utils import commands
from kdig_utils.book import repository
from kdig_utils.commands import make_runs
from kdig_utils.experiments import study
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.method import artifacts, cifar10, models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.spec import RunSpec, TeacherSpec

ROOT = Path(__file__).parents[1]
COMMANDS = [function.__name__.replace("_", "-") for function in commands.COMMANDS]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty clone of the book: a README with an empty table, no ledger, no artifacts."""
    for name in ("notebooks", "kdig_utils", "artifacts", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- results:begin -->\n<!-- results:end -->\nafter\n")
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/new/name"\n')
    (tmp_path / "_toc.yml").write_text("parts:\n  - chapters:\n      - file: notebooks/00_a\n")
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path / "workspace"))
    return tmp_path


@pytest.fixture
def small_data(monkeypatch: pytest.MonkeyPatch, sample_train: ImageSet, sample_test: ImageSet) -> None:
    """100 images of the repository in place of the official data set."""
    few = {
        "train": sample_train.subset(cifar10.first_of_each_class(sample_train.labels, 10)),
        "test": sample_test.subset(cifar10.first_of_each_class(sample_test.labels, 10)),
    }
    monkeypatch.setattr(study.cifar10, "fetch", lambda: Path())
    monkeypatch.setattr(study.cifar10, "load", lambda split, root=None: few[split])


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that says what was wrong; pooch names each download in lines of its own before it."""
    assert command_line.main(words) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(other.startswith("Downloading") for other in before)
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command_line.main([command, "--help"])
    shown = capsys.readouterr().out
    assert f"\n  python -m kdig_utils {command}" in shown.split("examples:")[1]


# What the GPU machines of ../shared/gpu/README.md lack of the package's requirements.
NOT_ON_A_BARE_MACHINE = ("alembic", "captum", "optuna", "sqlalchemy", "pooch", "IPython", "nbclient", "nbformat")
ON_A_BARE_MACHINE = f"""
import sys
for name in {NOT_ON_A_BARE_MACHINE}:
    sys.modules[name] = None  # importing it fails
from kdig_utils import __main__
from kdig_utils.experiments import campaigns, study
from kdig_utils.method.spec import RunSpec
campaigns.CAMPAIGNS["ablation"] = lambda: [RunSpec("student", k=17)]
study.SMOKE_IMAGES = 50
for words in sys.argv[1:]:
    print("exit status", __main__.main(words.split()))
"""


def test_a_machine_without_the_larger_packages_runs_campaigns(tmp_path: Path) -> None:
    """And says of a command that does need one which it is."""
    environment = {**os.environ, "KDIG_WORKSPACE": str(tmp_path), "KDIG_ROOT": str(ROOT), "PYTHONPATH": str(ROOT)}
    train = "campaign ablation --profile smoke --budget-minutes 5"
    command = [
        sys.executable,
        "-c",
        ON_A_BARE_MACHINE,
        "status",
        train,
        "search --method kd --budget-minutes 1",
        "explain --images 3",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert "ablation: 1 of 1 runs done" in ended.stdout, ended.stderr
    assert re.findall(r"exit status (\d)", ended.stdout)[1:] == ["0", "2", "2"]
    assert "error: sqlalchemy is not installed: pip install sqlalchemy" in ended.stderr
    assert "error: --images 3 is no multiple of 20" in ended.stderr  # it starts without Captum


@pytest.mark.parametrize(
    ("words", "value", "remedy"),
    [
        (["reproduce", "--profile", "smok"], "'smok'", "published, smoke, full"),
        (["train", "--method", "kdd"], "'kdd'", "kd_ig_at"),
        (["train", "--method", "kd", "--k", "4"], "k 4", "3, 5, 7"),
        (["train", "--method", "kd", "--epochs", "0"], "epochs = 0", "at least 1"),
        (["train", "--method", "kd", "--pairing", "none"], "'none'", "matched"),
        (["train", "--method", "kd", "--train-fraction", "1.5"], "1.5", "up to 1"),
        (["teacher", "--learning-rate", "-1"], "-1", "above 0"),
        (["teacher", "--label-smoothing", "nan"], "label_smoothing = nan", "below 1"),
        (["teacher", "--epochs", str(10**30)], "epochs = 1000", "1,000,000"),
        (["train", "--method", "kd", "--seed", "-1"], "seed = -1", "from 0"),
        (["teacher", "--initial", "absent.safetensors"], "absent.safetensors", "restore"),
        (["adopt", "absent.safetensors", "--recipe", "Adam", "--epochs", "9"], "absent.safetensors", "restore"),
        (["publish", "0123456789ab"], "'0123456789ab'", "status"),
    ],
)
def test_bad_input_is_one_line_with_value_and_remedy(
    words: list[str], value: str, remedy: str, clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capsys, *words)
    assert value in line
    assert remedy in line


@pytest.mark.parametrize(
    ("words", "option", "values"),
    [
        ("campaign next", "--budget-minutes", ["nan", "-1", "soon", ""]),
        ("campaign next --budget-minutes 1", "--at-once", ["0", "-1", "nan", "2.5", "x"]),
        ("campaign laptop --budget-minutes 1", "--workers", ["0", "-1"]),
        ("campaign next --budget-minutes 1", "--report-seconds", ["nan", "-1"]),
        ("search --method kd", "--budget-minutes", ["nan", "-0.1"]),
        ("search --method kd --budget-minutes 1", "--trials", ["0", "-1"]),
        ("probe recorded", "--seconds", ["nan", "-1"]),
        ("first-calls times.csv", "--seconds", ["nan", "-1"]),
        ("flight --pack out", "--budget-minutes", ["nan", "-9"]),
        ("explain", "--images", ["0", "-20", "nan"]),
        ("latency", "--patience", ["nan", "-1"]),
        ("adopt x --recipe words --epochs 1", "--seconds", ["nan", "-1"]),
    ],
)
def test_a_number_that_is_no_count_or_span_ends_with_status_2_before_anything_is_done(
    words: str, option: str, values: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for value in values:
        with pytest.raises(SystemExit) as ended:
            command_line.main([*words.split(), f"{option}={value}"])
        assert ended.value.code == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert option in line
        assert f"{value!r} is no" in line
        assert ": give" in line


def test_a_defect_is_not_taken_for_bad_input(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "results_table", lambda ledger: [].index(1))
    with pytest.raises(ValueError, match="not in list"):
        command_line.main(["readme"])


def test_stopping_by_hand_says_how_to_go_on(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_runs, "student_study", stop)
    assert command_line.main(["train", "--method", "kd"]) == 130
    assert capsys.readouterr().err == "stopped; run the same command again to go on\n"


def test_status_of_an_empty_clone(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["status"]) == 0
    assert capsys.readouterr().out.count("none") == 4


def test_train_without_a_published_teacher_says_so_before_it_reads_the_data(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "'teacher'" in error_of(capsys, "train", "--method", "student")


def test_data_names_the_folder_that_is_not_whole(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KDIG_DATA", str(tmp_path / "nowhere"))
    monkeypatch.setattr(
        cifar10.fetch, "__defaults__", (None, ("http://127.0.0.1:9/first", "http://127.0.0.1:9/second"))
    )
    line = error_of(capsys, "data")
    assert "/first" in line
    assert "/second" in line
    assert "nowhere" in line


def test_from_teacher_to_published_student(clone: Path, small_data: None, capsys: pytest.CaptureFixture[str]) -> None:
    """teacher → publish → train → publish → status, all on 100 images."""
    assert command_line.main(["teacher", "--epochs", "1", "--learning-rate", "0.01"]) == 0
    ledger = Ledger(clone / "results" / "runs.csv")
    assert command_line.main(["publish", ledger.read()["run_id"][0]]) == 0
    published = models.weights_sha256(artifacts.load("teacher"))
    assert published == ledger.read()["weights_sha256"][0], "half a file, the very network"

    training = ["train", "--method", "student", "kd_ig", "--epochs", "1", "--n-steps", "2"]
    assert command_line.main(training) == 0
    table = ledger.read().set_index("method")
    assert list(table.index) == ["teacher", "student", "kd_ig"]
    assert table.loc["kd_ig", "teacher_sha256"] == table.loc["teacher", "weights_sha256"]
    assert (table["epochs"] == 1).all()

    assert command_line.main(["publish", table.loc["kd_ig", "run_id"]]) == 0
    entry = artifacts.manifest()["kd_ig_k5"]
    assert entry["weights_sha256"] == table.loc["kd_ig", "weights_sha256"]
    assert models.count_parameters(artifacts.load("kd_ig_k5")) == table.loc["kd_ig", "parameters"]

    capsys.readouterr()
    assert command_line.main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "100 of 100 images" in shown
    assert "kd_ig_k5: whole" in shown

    assert command_line.main(training) == 0
    assert len(ledger.read()) == 3, "what is in the ledger is not trained again"


def test_a_teacher_whose_time_is_over_is_packed_to_go_on_elsewhere(
    clone: Path, small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["teacher", "--epochs", "2", "--seed", "1", "--batch-size", "8", "--pack", str(tmp_path / "out")]
    shown, minutes = [], 0.005
    while not shown or "not finished: run it again" in shown[-1]:
        assert command_line.main([*words, "--budget-minutes", str(minutes)]) == 0
        shown.append(capsys.readouterr().out)
        minutes *= 2
        for checkpoint in (clone / "workspace").glob("full/checkpoints/*.pt"):  # carried to another machine
            content = checkpoint.read_bytes()
            checkpoint.unlink()
            assert command_line.main(["unpack", *map(str, (tmp_path / "out").iterdir())]) == 0
            assert checkpoint.read_bytes() == content
    assert "goes on at epoch" in "".join(shown)
    with tarfile.open(tmp_path / "out" / "teacher.tar.00") as pack:
        assert {name.split("/")[0] for name in pack.getnames()} == {"sha256.json", "runs.csv", "curves", "weights"}


def test_train_shows_a_run_that_another_campaign_trained(
    clone: Path, small_data: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_runs, "student_study", lambda _profile, _n_steps: study.open_study("full"))
    monkeypatch.setattr(study.Study, "teacher_sha256", "")
    for name in ("first", "second"):
        capsys.readouterr()
        words = ["train", "--method", "student", "--k", "17", "--epochs", "1", "--campaign", name]
        assert command_line.main(words) == 0
        assert "first: student k=17, 1 epochs: 1 run" in capsys.readouterr().out


def test_status_shows_a_damaged_artifact_and_fails(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"method": "student", "k": 17, "test_accuracy": 50.0, "run_id": "0123456789ab"}
    artifacts.publish("student_k17", models.student(17), half=False, **facts)
    path = clone / "artifacts" / "student_k17.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert command_line.main(["status"]) == 1
    assert "the manifest says" in capsys.readouterr().out


def test_readme_table_has_a_row_for_every_method_and_keeps_the_rest(
    clone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(clone / "results" / "runs.csv")
    for seed, accuracy in enumerate((80.0, 81.0)):
        ledger.append(RunSpec("kd", seed=seed, epochs=7), campaign="main", test_accuracy=accuracy, parameters=543498)
    ledger.append(TeacherSpec(epochs=3), campaign="other", test_accuracy=90.0, parameters=2236682)
    error_of(capsys, "readme", "--check")
    assert command_line.main(["readme"]) == 0
    assert command_line.main(["readme", "--check"]) == 0
    text = (clone / "README.md").read_text()
    assert "| `kd` | answers | 2 | 7 | 80.50 ± 0.71 % |" in text
    assert text.count("| not run yet | 9") == 7
    assert text.startswith("before\n")
    assert text.endswith("after\n")


def test_links_moves_the_address_everywhere_and_nothing_else(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    badge = "https://colab.research.google.com/github/old/book/blob/main/notebooks/00_a.ipynb"
    others = "https://github.com/old/book/issues https://github.com/old/bookshelf"
    before = f"{badge} {others} git clone https://github.com/old/book\ncd book\n"
    (clone / "notebooks" / "00_a.ipynb").write_text(before)
    assert "old/book" in error_of(capsys, "links", "--check")
    assert command_line.main(["links"]) == 0
    expected = before.replace("old/book/", "new/name/").replace("old/book\ncd book", "new/name\ncd name")
    assert (clone / "notebooks" / "00_a.ipynb").read_text() == expected
    assert command_line.main(["links", "--check"]) == 0


def test_links_refuses_an_address_that_is_none(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (clone / "pyproject.toml").write_text('[project.urls]\nRepository = "example.org"\n')
    assert "'example.org'" in error_of(capsys, "links")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("campaign ablation", "--budget-minutes"),
        ("teacher --profile published", "smoke"),
        ("signals --profile published", "smoke"),
        ("campaign next --budget-minutes 1 --profile published", "smoke"),
    ],
)
def test_what_would_train_without_end_or_in_a_profile_that_trains_nothing_is_refused(
    words: str, remedy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study.Study, "run", lambda *_arguments: pytest.fail("it trained"))
    monkeypatch.setattr(study.Study, "run_all", lambda *_arguments: pytest.fail("it trained"))
    monkeypatch.setattr(study.Study, "signals_for", lambda *_arguments: pytest.fail("it computed signals"))
    assert remedy in error_of(capsys, *words.split())
