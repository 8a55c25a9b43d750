"""Which runs stand for the study, on ledgers made for the test: one setting, one teacher, never two budgets in one."""

import re
from pathlib import Path

import pandas as pd
import pytest

from kdig_utils import commands, paths
from kdig_utils.analysis import plan, verdicts
from kdig_utils.book import repository
from kdig_utils.experiments import campaigns, evidence
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.method.spec import MAIN_METHODS, METHODS, RunSpec, TeacherSpec

OLD, NEW = "0d" * 32, "4e" * 32  # teachers


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Four short runs and their teacher, as the repository has had them first."""
    made = Ledger(tmp_path / "runs.csv")
    made.append(TeacherSpec(epochs=4), weights_sha256=OLD, test_accuracy=89.0, parameters=2236682, campaign="main")
    for method in MAIN_METHODS:
        add(made, method, 75.0, OLD, epochs=3, n_steps=8)
    return made


def add(ledger: Ledger, method: str, accuracy: float, teacher: str = OLD, campaign: str = "main", **settings) -> None:
    spec = RunSpec(method, teacher_sha256="" if method == "student" else teacher, **settings)
    ledger.append(spec, test_accuracy=accuracy, parameters=543498, campaign=campaign)


def chosen(ledger: Ledger) -> pd.DataFrame:
    return campaigns.main_runs(ledger.read())


def test_short_runs_stand_for_the_study_while_there_is_nothing_better(ledger: Ledger) -> None:
    assert chosen(ledger)["method"].tolist() == list(MAIN_METHODS)
    assert set(chosen(ledger)["epochs"]) == {3}


def test_the_whole_ablation_takes_their_place_with_all_methods_and_seeds(ledger: Ledger) -> None:
    for spec in campaigns.specs("ablation"):
        add(ledger, spec.method, 91 + 0.1 * spec.seed, NEW, "ablation", seed=spec.seed)
    found = chosen(ledger)
    assert set(found["run_id"]) == set(ledger.read().query("epochs == 100")["run_id"])
    assert found.groupby("method").size().to_dict() == dict.fromkeys(METHODS, 10)
    table = repository.methods_table(ledger.read())
    assert "| `at` | attention | 10 | 100 | 91.45 ± 0.30 % |" in table
    assert "75.00" not in table


def test_long_runs_of_campaign_main_are_never_averaged_with_short_ones(ledger: Ledger) -> None:
    for method in MAIN_METHODS:
        add(ledger, method, 91.0)
    assert set(chosen(ledger)["epochs"]) == {100}
    assert set(chosen(ledger)["test_accuracy"]) == {91.0}


def test_one_long_run_does_not_replace_a_comparison_of_four_methods(ledger: Ledger) -> None:
    add(ledger, "kd_ig", 92.0)
    assert set(chosen(ledger)["epochs"]) == {3}
    assert len(chosen(ledger)) == 4


@pytest.mark.parametrize(
    "other", [{"k": 9}, {"pairing": "shuffled"}, {"train_fraction": 0.8}, {"alpha": 0.9}, {"precision": "float32"}]
)
def test_runs_with_other_settings_are_left_out_however_long(ledger: Ledger, other: dict) -> None:
    for method in MAIN_METHODS:
        add(ledger, method, 50.0, **other)
    assert set(chosen(ledger)["test_accuracy"]) == {75.0}


def test_students_of_two_teachers_are_not_mixed_and_the_table_shows_theirs(ledger: Ledger) -> None:
    ledger.append(TeacherSpec(), weights_sha256=NEW, test_accuracy=94.5, parameters=2236682, campaign="main")
    for seed in (0, 1):
        for method in MAIN_METHODS:
            add(ledger, method, 76.0, NEW, epochs=3, seed=seed, n_steps=8)
    found = chosen(ledger)
    assert set(found["teacher_sha256"]) == {"", NEW}
    assert found.query("method == 'kd'")["test_accuracy"].tolist() == [76.0, 76.0]
    table = repository.methods_table(ledger.read())
    assert "94.50 %" in table
    assert "89.00 %" not in table


def test_an_empty_ledger_shows_every_method_and_campaign_as_not_run(tmp_path: Path) -> None:
    empty = Ledger(tmp_path / "runs.csv").read()
    assert campaigns.main_runs(empty).empty
    assert repository.methods_table(empty).count("| not run yet |") == len(METHODS) + 1
    stages = plan.stages(plan.plan(empty))
    assert repository.results_table(empty).count("| 0 of ") == len(stages)


def test_claims_are_counted_by_kind_of_evidence_and_a_count_settles_none_about_training(ledger: Ledger) -> None:
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:]
        for line in repository.claims_table(ledger.read()).splitlines()
    }
    trained = dict(zip(verdicts.VERDICTS, rows[evidence.TRAINED], strict=True))
    assert {trained[name] for name in (*verdicts.DECIDED, verdicts.UNDECIDED)} == {""}
    assert int(rows[evidence.COUNTED][0]) > 0
    assert evidence.TIMED not in rows


def test_the_queue_counts_a_run_once_where_it_is_first_needed(ledger: Ledger) -> None:
    add(ledger, "student", 91.0)
    table = repository.queue_table(ledger.read())
    assert "| answers and reasons | 1 of 70 |" in table
    assert table.count("| 1 of ") == 1


def test_the_papers_numbers_stand_beside_ours(ledger: Ledger) -> None:
    lines = repository.methods_table(ledger.read()).splitlines()
    # The means of the paper's ten runs, and its teacher, as its tables and its text give them.
    for method, accuracy in {"teacher": "93.91", "student": "91.18", "kd": "91.62", "kd_ig": "92.02"}.items():
        assert next(line for line in lines if line.startswith(f"| `{method}` |")).endswith(f"| {accuracy} % |")


def test_how_to_run_lists_every_command_and_every_campaign() -> None:
    text = (paths.repository_root() / "book" / "how_to_run.md").read_text()
    listed = re.findall(r"^\| `python -m kdig_utils ([\w-]+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(function.__name__.replace("_", "-") for function in commands.COMMANDS)
    trained = re.findall(r"^python -m kdig_utils campaign ([\w-]+) ", text, re.MULTILINE)
    assert sorted(trained) == sorted((*campaigns.CAMPAIGNS, "answers", "laptop", "next", "next"))
