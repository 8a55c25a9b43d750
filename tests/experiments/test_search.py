"""The search finds what is there, forgets and repeats nothing, and the price of a choice is what theory says."""

import dataclasses
import json
import math
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
from chapters import cells_of

from kdig_utils import paths
from kdig_utils.experiments import hyperparameters, search
from kdig_utils.experiments.hyperparameters import FRESH_SEEDS, LEVELS, base_spec
from kdig_utils.experiments.ledger import COLUMNS, Ledger
from kdig_utils.experiments.steps import TrainingDiverged
from kdig_utils.experiments.study import Study
from kdig_utils.method import cifar10, models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.spec import METHODS, RunSpec

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning", "ignore:Heartbeat of storage")

BEST = {"alpha": 0.3, "temperature": 4.0}


def row_of(spec: RunSpec, validation: float, test: float) -> dict:
    """What the ledger holds of a run that ended so."""
    found = {name: getattr(spec, name) for name in ("run_id", "method", "k", "seed", "epochs", "teacher_sha256")}
    accuracies = {"validation_accuracy": validation, "test_accuracy": test}
    return {**found, **accuracies, "spec": json.dumps(dataclasses.asdict(spec))}


def ledger_of(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS))


def varied(seed: int, alpha: float, temperature: float = 2.5, **changes: object) -> RunSpec:
    return dataclasses.replace(base_spec("kd"), seed=seed, alpha=alpha, temperature=temperature, **changes)


def planted(spec: RunSpec) -> float:
    """A hill over the levels, highest at `BEST`, with the luck of the seed."""
    places = [LEVELS[name].index(getattr(spec, name)) - LEVELS[name].index(value) for name, value in BEST.items()]
    return 90.0 - sum(place**2 for place in places) + np.random.default_rng(spec.seed).normal(0, 0.1)


@pytest.fixture
def make_study(tmp_path: Path, sample_train: ImageSet) -> Callable[[], Study]:
    """Studies of one workspace, as several workers have them."""

    def made() -> Study:
        specs = (RunSpec("kd", epochs=2, batch_size=16),)
        study = Study("smoke", tmp_path, Ledger(tmp_path / "runs.csv"), tmp_path / "curves", specs=specs)
        study.__dict__.update(train=sample_train, signals=None, teacher_sha256="ab" * 32)
        return study

    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No training: each run ends as planted, and its identity is noted."""
    noted: list[str] = []

    def run_all(study: Study, specs: list[RunSpec], campaign: str, *_options: object) -> None:
        for spec in map(study.completed, specs):
            if study.ledger.find(spec) is None:
                noted.append(spec.run_id)
                study.ledger.append(
                    spec, campaign=campaign, validation_accuracy=planted(spec), test_accuracy=planted(spec)
                )

    monkeypatch.setattr(Study, "run_all", run_all)
    return noted


@pytest.mark.parametrize("method", METHODS[1:])
def test_papers_setting_is_in_the_space_and_there_and_back_is_the_same_run(method: str) -> None:
    base = base_spec(method)
    trial = optuna.trial.create_trial(
        value=0.0, params=search.levels_of(base), distributions=search.search_space(method)
    )
    trial.number = 3  # as a study counts it
    there_and_back = search.spec_of_trial(trial, base)
    assert there_and_back == dataclasses.replace(RunSpec(method, validation_images=5000), seed=trial.number)
    assert set(hyperparameters.searched(method)) == {
        name for part, names in hyperparameters.SEARCHED.items() if base.uses(part) for name in names
    }


@pytest.mark.parametrize("method", ["student", "kdd"])
def test_method_without_hyperparameters_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method!r}.*choose one of kd, ig, at"):
        search.search_space(method)


def test_planted_optimum_is_found_in_fewer_trials_than_there_are_settings(
    make_study: Callable[[], Study], trained: list[str]
) -> None:
    rows = search.search(make_study(), "kd", n_trials=30, at_once=3, seed=0)
    assert len(rows) == len(set(trained)) == 30 < math.prod(len(LEVELS[name]) for name in BEST)
    assert (rows["campaign"] == "hyperparameters").all()
    chosen = hyperparameters.choices(rows)
    assert chosen.loc["validation", list(BEST)].to_dict() == BEST
    assert chosen.loc["paper", list(BEST)].tolist() == [RunSpec.alpha, RunSpec.temperature]


def test_real_search_puts_both_accuracies_of_each_trial_into_the_ledger(
    make_study: Callable[[], Study], sample_train: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hyperparameters, "SMOKE_VALIDATION_IMAGES", 20)
    few = sample_train.subset(cifar10.first_of_each_class(sample_train.labels, 6))
    study = dataclasses.replace(make_study(), n_steps=1)
    study.__dict__.update(train=few, test=few, teacher=models.teacher(1).eval(), device=torch.device("cpu"))
    rows = search.search(study, "kd", n_trials=2, at_once=2, report=lambda line: None, seed=0)
    assert (rows["k"] == 17).all()
    for row in rows.itertuples():
        last = study.curve(row.run_id).iloc[-1]
        assert last["validation_accuracy"] == pytest.approx(row.validation_accuracy)
        assert last["test_accuracy"] == pytest.approx(row.test_accuracy)
        assert row.train_images == 40


def test_interrupted_trials_go_on_as_the_same_runs(
    make_study: Callable[[], Study], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    run_all = Study.run_all

    def interrupted(study: Study, specs: list[RunSpec], *options: object) -> None:
        begun.extend(study.completed(spec).run_id for spec in specs)
        run_all(study, specs[:1], *options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Study, "run_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search.search(make_study(), "kd", n_trials=4, at_once=3, seed=0)
    assert trained == begun[:1]
    assert search.trials_under_way(make_study(), "kd") == 2
    rows = search.search(make_study(), "kd", n_trials=4, at_once=3, seed=1)
    assert set(begun) < set(trained) == set(rows["run_id"])
    assert len(rows) == len(trained) == 4
    assert search.trials_under_way(make_study(), "kd") == 0


@pytest.mark.parametrize(("silent_for", "taken_over"), [(700, True), (5, False)])
def test_trial_of_a_killed_worker_is_taken_over_and_that_of_a_living_one_is_not(
    make_study: Callable[[], Study], trained: list[str], silent_for: int, taken_over: bool
) -> None:
    study = make_study()
    base = study.completed(study.scaled(base_spec("kd", "smoke")))
    opened = search.open_search(study, base)
    (theirs,) = search.ask(study, opened, base, n_trials=3, at_once=1)
    with sqlite3.connect(study.folder / "hyperparameters.db") as storage:
        storage.execute(f"update trial_heartbeats set heartbeat = datetime('now', '-{silent_for} seconds')")
    search.search(study, "kd", n_trials=3, seed=0)
    assert (search.spec_of_trial(theirs, base).run_id in trained) == taken_over
    assert len(trained) == (3 if taken_over else 2)


def test_two_workers_on_one_file_share_the_trials_and_repeat_none(
    make_study: Callable[[], Study], trained: list[str]
) -> None:
    with ThreadPoolExecutor(2) as workers:
        list(workers.map(lambda worker: search.search(make_study(), "kd", 12, at_once=2, seed=worker), (0, 1)))
    assert len(trained) == len(set(trained)) == 12
    assert set(make_study().ledger.read()["run_id"]) == set(trained)


def test_lost_storage_is_made_again_from_the_ledger(
    make_study: Callable[[], Study], trained: list[str], tmp_path: Path
) -> None:
    before = search.search(make_study(), "kd", n_trials=5, seed=0)
    (tmp_path / "hyperparameters.db").unlink()
    trained.clear()
    assert search.search(make_study(), "kd", n_trials=5, seed=1).equals(before)
    assert trained == []
    assert len(search.search(make_study(), "kd", n_trials=7, seed=2)) == 7
    assert len(trained) == 2


def test_trial_that_diverges_stops_no_other_and_is_not_tried_for_ever(
    make_study: Callable[[], Study], trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_all = Study.run_all

    def diverging(study: Study, specs: list[RunSpec], *options: object) -> None:
        run_all(study, [spec for spec in specs if spec.seed != 1], *options)
        if diverged := [spec.run_id for spec in specs if spec.seed == 1]:
            raise TrainingDiverged(f"run {diverged[0]}: the loss is nan in epoch 1")

    monkeypatch.setattr(Study, "run_all", diverging)
    lines: list[str] = []
    rows = search.search(make_study(), "kd", n_trials=4, at_once=2, report=lines.append, seed=0)
    assert sorted(rows["seed"]) == [0, 2, 3]
    assert len([line for line in lines if "the loss is nan" in line]) == 1


def test_time_that_is_over_trains_nothing(make_study: Callable[[], Study], trained: list[str]) -> None:
    assert search.search(make_study(), "kd", n_trials=3, deadline=time.monotonic()).empty
    assert trained == []


@pytest.mark.parametrize(
    "url", ["nonsense", "foo://host/db", "sqlite:////no/such/folder/x.db", "postgresql://me:secret@localhost/db"]
)
def test_bad_storage_gives_one_clear_line(make_study: Callable[[], Study], url: str) -> None:
    with pytest.raises(ValueError, match=r"cannot open the storage .* give an Optuna storage URL") as caught:
        search.search(make_study(), "kd", storage=url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["a ?b", "a@b:c", "a#b&c=d", "a%20b", "{SCHEMA_VERSION} {"])
def test_the_storage_lies_in_any_folder_that_the_system_allows(
    make_study: Callable[[], Study], tmp_path: Path, name: str
) -> None:
    study = dataclasses.replace(make_study(), folder=tmp_path / name)
    search.open_search(study, search.base_of(study, "kd"))
    with sqlite3.connect(tmp_path / name / "hyperparameters.db") as storage:
        assert storage.execute("select count(*) from studies").fetchone() == (1,)


@pytest.mark.parametrize("password", ["se/cret", "se@cret", "se?cret", "se#cret"])
def test_a_password_that_is_not_escaped_is_not_shown(make_study: Callable[[], Study], password: str) -> None:
    with pytest.raises(ValueError, match="%40") as caught:
        search.search(make_study(), "kd", storage=f"postgresql://me:{password}@localhost:9/db")
    assert "se" + password[2] not in str(caught.value).split("://")[1].split("(")[0]


CHAPTER = cells_of("07", "Noise", "simulate_choices")


@pytest.mark.parametrize(("n", "highest"), [(2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi))])
def test_expected_optimism_is_the_known_mean_of_the_highest_normal_value(n: int, highest: float) -> None:
    found = CHAPTER.expected_optimism(n, CHAPTER.Noise(seed=0.3, test=0.4, validation=0.4))
    assert found["test"] == pytest.approx(0.5 * highest)
    assert found["validation"] == pytest.approx(0.3**2 / 0.5 * highest)


@pytest.mark.parametrize("n", [1, 2, 10, 30])
def test_best_of_n_promises_too_much_by_the_expected_amount(n: int) -> None:
    noise = CHAPTER.Noise(seed=0.25, test=0.2, validation=0.3)
    repeats = 20_000
    simulated = CHAPTER.simulate_choices([92.0] * n, noise, repeats)
    gap = (simulated["reported"] - simulated["setting"]).groupby(simulated["chosen_by"]).mean()
    error = math.hypot(noise.seed, noise.test) / math.sqrt(repeats)  # the highest of n varies less than one value
    for chooser, expected in CHAPTER.expected_optimism(n, noise).items():
        assert gap[chooser] == pytest.approx(expected, abs=4 * error)


def test_choice_without_noise_loses_and_promises_nothing() -> None:
    simulated = CHAPTER.simulate_choices([91.0, 92.0, 90.0], CHAPTER.Noise(0.0, 0.0, 0.0), repeats=10)
    assert (simulated[["reported", "setting"]] == 92.0).all(axis=None)
    assert (simulated["lost"] == 0).all()


def test_noise_splits_the_spread_of_runs() -> None:
    noise = CHAPTER.noise_of_runs(0.4, 92.0, correlation=0.5)
    assert math.hypot(noise.seed, noise.test) == pytest.approx(0.4)
    assert noise.test**2 == pytest.approx(0.5 * 92 * 8 / 10_000)
    assert noise.validation == pytest.approx(noise.test * math.sqrt(2))
    assert CHAPTER.noise_of_runs(0.4, 92.0, correlation=1.0) == pytest.approx((0.4, 0.0, 0.0))


@pytest.fixture
def searched_ledger() -> pd.DataFrame:
    """A search in which alpha 0.9 is lucky on test, 0.6 lucky on validation, and 0.3 the best: fresh seeds know."""
    search = [(0, 0.01, 90.0, 90.1), (1, 0.3, 91.0, 91.1), (2, 0.6, 91.5, 90.8), (3, 0.9, 89.9, 92.0)]
    rows = [row_of(varied(seed, alpha), validation, test) for seed, alpha, validation, test in search]
    truth = {0.01: 90.0, 0.3: 91.2, 0.6: 90.7, 0.9: 90.2}
    for place, seed in enumerate(FRESH_SEEDS):
        rows += [row_of(varied(seed, alpha), mean, mean + 0.1 * (place - 1)) for alpha, mean in truth.items()]
    return ledger_of(rows)


def test_choices_say_what_is_promised_and_what_fresh_seeds_give(searched_ledger: pd.DataFrame) -> None:
    table = hyperparameters.choices(hyperparameters.trials(searched_ledger, base_spec("kd")))
    assert table["alpha"].to_dict() == {"validation": 0.6, "test": 0.9, "paper": 0.01}
    assert table["fresh_runs"].tolist() == [len(FRESH_SEEDS)] * 3
    assert table["optimism"].to_dict() == pytest.approx({"validation": 0.1, "test": 1.8, "paper": 0.1})


def test_preferred_waits_for_fresh_seeds_and_follows_them(searched_ledger: pd.DataFrame) -> None:
    assert hyperparameters.preferred(searched_ledger) == {"alpha": 0.3, "temperature": 2.5}
    assert hyperparameters.preferred(searched_ledger.iloc[:4]) is None
    assert hyperparameters.preferred(searched_ledger.iloc[:-2]) is None
    assert hyperparameters.preferred(searched_ledger, "kd_ig") is None


def test_the_test_images_favourite_is_not_preferred_even_if_it_is_the_best(searched_ledger: pd.DataFrame) -> None:
    rows = hyperparameters.trials(searched_ledger, base_spec("kd"))
    favourite = {"alpha": 0.9, "temperature": 2.5}
    assert favourite in hyperparameters.finalists(rows, "paper", "test")
    assert favourite not in hyperparameters.finalists(rows, "paper")
    its = searched_ledger["run_id"].isin(rows.query("alpha == 0.9 and fresh")["run_id"])
    better = searched_ledger["validation_accuracy"] + 5.0 * its
    ledger = searched_ledger.assign(validation_accuracy=better)
    assert hyperparameters.choices(hyperparameters.trials(ledger, base_spec("kd"))).loc["test", "alpha"] == 0.9
    assert hyperparameters.preferred(ledger) == {"alpha": 0.3, "temperature": 2.5}
    assert hyperparameters.preferred(ledger[~its]) == {"alpha": 0.3, "temperature": 2.5}


def test_what_validation_and_test_images_both_choose_may_be_preferred(searched_ledger: pd.DataFrame) -> None:
    by_both = searched_ledger["spec"].map(lambda spec: json.loads(spec)["alpha"] == 0.9)
    ledger = searched_ledger.assign(validation_accuracy=searched_ledger["validation_accuracy"] + 5.0 * by_both)
    assert hyperparameters.preferred(ledger) == {"alpha": 0.9, "temperature": 2.5}


def test_committed_ledger_prefers_nothing_that_was_not_run() -> None:
    ledger = Ledger(paths.ledger_path()).read()
    for method in METHODS[1:]:
        rows = hyperparameters.trials(ledger, base_spec(method))
        assert len(rows) == (rows["validation_accuracy"].notna()).sum()
        if rows.empty:
            assert hyperparameters.preferred(ledger, method) is None
            assert hyperparameters.choices(rows).empty
            assert hyperparameters.finalists(rows, "paper", "test") == []


def test_trials_take_no_run_with_other_settings_or_another_teacher() -> None:
    kept = [varied(seed, 0.1, teacher_sha256="a", data_md5="c") for seed in (0, 1)]
    others = [
        varied(0, 0.1, teacher_sha256="b"),
        varied(0, 0.1, teacher_sha256="a", epochs=50),
        varied(0, 0.1, teacher_sha256="a", precision="float32"),
        varied(0, 0.1, teacher_sha256="a", pairing="shuffled"),
        varied(0, 0.1, teacher_sha256="a", validation_images=0),
        RunSpec("student", validation_images=5000),
    ]
    ledger = ledger_of([row_of(spec, 90.0, 90.0) for spec in (*others, *kept)])
    assert hyperparameters.trials(ledger, base_spec("kd"))["run_id"].tolist() == [spec.run_id for spec in kept]
    other = dataclasses.replace(base_spec("kd"), teacher_sha256="b")
    assert hyperparameters.trials(ledger, other)["run_id"].tolist() == [others[0].run_id]


def test_a_trial_gives_a_sign_of_life_before_it_is_trained(make_study: Callable[[], Study]) -> None:
    """Optuna takes over no trial that never gave one: a worker killed at once would hold it for ever."""
    study = make_study()
    base = search.base_of(study, "kd")
    proposals = search.open_search(study, base)
    (trial,) = search.ask(study, proposals, base, 1, 1)
    with sqlite3.connect(study.folder / "hyperparameters.db") as database:
        beats = database.execute("select trial_id from trial_heartbeats").fetchall()
    assert beats == [(trial._trial_id,)]
