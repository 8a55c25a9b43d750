"""The laptop protocol's verdicts are those of planted truths, and its rows those of registered runs."""

import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ledgers import row_of
from scipy import stats

from kdig_utils.analysis import claims, laboratory
from kdig_utils.experiments import laptop
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.paths import repository_root

ROOT, REGISTERED = repository_root(), laboratory.registered()
CONTRASTS = {(each["question"], each["name"]): each for each in REGISTERED["contrasts"]}


def accuracies(shifts: dict[str, float], deviation: float = 0.3, seeds: int = laptop.MORE_SEEDS) -> pd.DataFrame:
    """Every condition at 56 % plus its shift, plus what the seed moves alike, plus its own luck."""
    rng = np.random.default_rng(14)
    of_the_seed = rng.normal(0, 2, (seeds, 1))
    own = rng.normal(0, deviation, (seeds, len(laptop.CONDITIONS)))
    table = pd.DataFrame(56 + of_the_seed + own, columns=list(laptop.CONDITIONS))
    return table + pd.Series(shifts, dtype=float).reindex(table.columns, fill_value=0.0)


def verdicts(table: pd.DataFrame) -> dict[tuple[str, str], str]:
    found = laboratory.contrasts(table)
    return dict(zip(zip(found["question"], found["name"], strict=True), found["verdict"], strict=True))


# Truths that were planted


def test_a_planted_gain_a_planted_loss_and_a_planted_nothing_are_found() -> None:
    found = verdicts(accuracies({"kd": 3.0, "ig": -2.0}, deviation=0.15))
    assert found["L1", "the usual weight"] == "above"
    assert found["L2", "half of the images"] == "below"
    assert found["L1", "the paper's weight"] == "level"


def test_an_effect_that_drowns_in_noise_is_undecided_and_says_what_it_would_take() -> None:
    table = laboratory.contrasts(accuracies({}, deviation=4.0)).set_index(["question", "name"])
    row = table.loc[("L1", "the paper's weight")]
    assert row["verdict"] == "undecided"
    spread = row["deviation"] * np.sqrt(2 / 2)
    power = stats.nct(row["needed"] - 1, 0.5 / spread * np.sqrt(row["needed"])).sf(
        stats.t(row["needed"] - 1).ppf(1 - 0.025 / 2)
    )
    assert power == pytest.approx(0.8, abs=0.02)


def test_no_verdict_before_the_last_planned_seed() -> None:
    nine = accuracies({"kd": 3.0}).iloc[:9]
    assert verdicts(nine)["L1", "the usual weight"] == "not run yet"


def test_a_table_says_whether_a_prediction_held_and_leaves_it_open_without_a_verdict() -> None:
    found = laboratory.told(laboratory.contrasts(accuracies({"kd": 3.0, "ig": 2.0}, deviation=0.15)))
    assert found.loc["the usual weight", "held"] == "yes"
    assert found.loc["half of the images", ["predicted", "verdict", "held"]].tolist() == ["below", "above", "no"]
    assert found.loc["the usual weight", "pilot"] == "+2.96 (4 seeds)"
    few = laboratory.told(laboratory.contrasts(accuracies({"kd": 3.0}).iloc[:1]))
    assert set(few["held"]) == {"open"}
    assert set(few["effect, points"]) == {""}


def test_a_look_before_the_last_seed_neither_counts_nor_helps_the_others() -> None:
    table = accuracies({"ig": -2.0, "ig, edges": 3.0}, deviation=0.15)
    found = laboratory.contrasts(table.iloc[:10]).set_index(["question", "name"]).loc["L3"]
    early = found.index[found["pairs"] < found["seeds"]]
    assert set(early) == {"against shuffled", "against black", "darkening"}
    assert found.loc[early, "p_holm"].isna().all()
    assert found.loc["against edges", "verdict"] == "below"
    p = found["p"].drop(early).sort_values()
    assert found.loc[p.index[0], "p_holm"] == pytest.approx(p.iloc[0] * len(found))  # the family keeps its size


def test_the_plan_sees_one_point_with_a_chance_of_four_in_five() -> None:
    found = laboratory.contrasts(accuracies({}))
    without_pilot = found[(found["seeds"] == 10) & found["pilot"].map(len).eq(0)]
    assert without_pilot["power"].to_numpy() == pytest.approx(0.803, abs=0.001)
    for row in without_pilot.itertuples():  # and fewer once the tests of a question are counted
        critical = stats.t(9).isf(0.025 / (found["question"] == row.question).sum())
        beyond = stats.nct(9, np.sqrt(10))
        assert row.power_holm == pytest.approx(beyond.sf(critical) + beyond.cdf(-critical), abs=1e-6)


def test_undecided_is_final_only_when_the_question_has_all_its_runs() -> None:
    table = accuracies({"kd": 3.0}, deviation=0.8)
    before = verdicts(table)
    table.loc[0, "ig, edges"] = np.nan
    after = verdicts(table)
    undecided = [key for key, verdict in before.items() if verdict == "undecided"]
    assert {question for question, _name in undecided} > {"L3"}
    for question, name in undecided:
        expected = "not run yet" if "edges" in name else "undecided so far" if question == "L3" else "undecided"
        assert after[question, name] == expected


def test_predictions_about_choice_and_luck_hold_only_if_their_intervals_say_so() -> None:
    cells = laptop.surface()
    for best, luck, held in ((0.9, 0.1, "yes"), (0.1, 0.1, "no"), (0.9, 3.0, "open")):
        rng = np.random.default_rng(1)
        rows = [
            row_of(run, 50 + 2 * (run.alpha == best) + rng.normal(0, luck), validation_accuracy=0.0) for run in cells
        ]
        assert laboratory.choice_held(pd.DataFrame(rows))[1] == held
    assert laboratory.choice_held(pd.DataFrame(rows[:-1]))[1] == "open"
    for images, seed, held in ((1.0, 0.1, "yes"), (0.05, 1.0, "no"), (0.5, 1.0, "open")):
        rng, runs = np.random.default_rng(2), laptop.crossed()
        rows = [row_of(run, 55 + images * run.sample_seed + seed * run.seed + rng.normal(0, 0.05)) for run in runs]
        assert laboratory.lucks_held(pd.DataFrame(rows))[1] == held
        assert laboratory.lucks_held(pd.DataFrame(rows[:-1]))[1] == "open"


def test_more_seeds_than_planned_change_nothing() -> None:
    many = accuracies({"kd": 3.0}, seeds=40)
    ten = laboratory.differences(many, CONTRASTS["L1", "the usual weight"]["weights"], 10)
    assert np.allclose(ten, (many["kd"] - many["student"])[:10])


def test_a_missing_run_takes_its_seed_out_of_the_contrast() -> None:
    table = accuracies({})
    table.loc[3, "kd"] = np.nan
    assert len(laboratory.differences(table, {"kd": 1, "student": -1}, 10)) == 9


def test_effects_of_the_eight_methods_are_those_of_a_factorial_design() -> None:
    """Planted: answers + 3, maps − 2, together another + 1; each found where it belongs, and nowhere else."""
    methods = {name: name.split("_") for name in laptop.METHODS}
    shift = {m: 3.0 * ("kd" in p) - 2.0 * ("ig" in p) + 1.0 * ({"kd", "ig"} <= set(p)) for m, p in methods.items()}
    table = accuracies(shift, deviation=1e-6)
    effect = laboratory.contrasts(table).set_index(["question", "name"])["effect"]["L4"]
    assert effect["answers"] == pytest.approx(3.5, abs=1e-3)
    assert effect["maps"] == pytest.approx(-1.5, abs=1e-3)
    assert effect["answers with maps"] == pytest.approx(1.0, abs=1e-3)
    for none in ("attention", "answers with attention", "maps with attention", "all three"):
        assert effect[none] == pytest.approx(0.0, abs=1e-3)


def test_false_alarms_are_as_rare_as_the_level_promises() -> None:
    """400 studies without any effect: Holm's correction lets at most 5 % of the families of L3 say something."""
    alarms, studies = 0, 400
    names = [name for question, name in CONTRASTS if question == "L3"]
    for study in range(studies):
        rng = np.random.default_rng(study)
        d = rng.normal(0, 1, (len(names), 10))
        p = stats.ttest_1samp(d, 0, axis=1).pvalue
        alarms += bool((laboratory.holm(p) < 0.05).any())
    print(f"{alarms} of {studies} studies of nothing say something")
    assert alarms / studies <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / studies)


def test_surface_and_draws_are_read_from_their_runs() -> None:
    rows = [row_of(run, 50 + 10 * run.alpha, validation_accuracy=40.0) for run in laptop.surface()]
    rows += [row_of(run, 55.0 + run.sample_seed) for run in laptop.crossed()[:-1]]
    table = pd.DataFrame(rows)
    surface = laboratory.surface(table)
    assert (surface["seeds"] == 3).all()
    assert surface["test"].tolist() == pytest.approx((50 + 10 * surface["alpha"]).tolist())
    assert laboratory.crossed(table)["resample"].nunique() == 9  # the last draw lacks a seed


def test_a_choice_promises_the_luck_of_the_run_that_it_saw_and_nothing_that_a_seed_moves_alike() -> None:
    rng, runs = np.random.default_rng(5), laptop.surface()
    steady = [row_of(run, 50 + 3 * run.alpha + run.seed, validation_accuracy=45 + run.temperature) for run in runs]
    for chosen_by, alpha, temperature in (("test_accuracy", 1.0, 1.0), ("validation_accuracy", 0.01, 8.0)):
        found = laboratory.promises(pd.DataFrame(steady), chosen_by)
        assert found["promised"].tolist() == pytest.approx([0, 0, 0])
        assert found[["alpha", "temperature"]].drop_duplicates().to_numpy().tolist() == [[alpha, temperature]]
    promised = {"test_accuracy": [], "validation_accuracy": []}
    for _study in range(12):
        luck = pd.DataFrame(steady).assign(**{name: rng.normal(50, 1, len(steady)) for name in promised})
        for chosen_by, values in promised.items():
            values.append(laboratory.promises(luck, chosen_by)["promised"].mean())
    assert np.mean(promised["test_accuracy"]) == pytest.approx(1.87, abs=0.3)  # the best of 20 normal values
    assert np.mean(promised["validation_accuracy"]) == pytest.approx(0, abs=0.5)
    assert laboratory.promises(pd.DataFrame(steady[:30]), "test_accuracy")["promised"].isna().all()  # one whole seed
    assert laboratory.promises(pd.DataFrame(steady[:10]), "test_accuracy").empty


# The committed rows


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return laboratory.read()


def test_every_row_is_a_registered_run_of_the_registered_teacher_on_all_test_images(rows: pd.DataFrame) -> None:
    queue = {run.run_id for run in laptop.queue()}
    specs = [spec_of(row) for _index, row in rows.iterrows()]
    assert {spec.bare_id for spec in specs} <= queue
    assert {spec.teacher_sha256 for spec in specs} <= {"", REGISTERED["teacher_sha256"]}
    assert set(rows["test_images"]) <= {10_000}


def test_every_row_was_trained_after_the_registration(rows: pd.DataFrame) -> None:
    assert (pd.to_datetime(rows["finished"]) >= pd.Timestamp(REGISTERED["registered"])).all()


def git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_commit_of_every_row_descends_from_the_registering_commit(rows: pd.DataFrame) -> None:
    if git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("a clone without history")
    line = f'date: "{REGISTERED["registered"]}"'
    first = git("log", "--reverse", "--format=%H", f"-S{line}", "--", "kdig_utils/claims.yml").stdout.split()[0]
    for commit in rows["commit"].unique():
        assert not commit.endswith("+"), "trained with code that was not committed"
        assert git("merge-base", "--is-ancestor", first, commit).returncode == 0, commit


def test_no_run_of_the_laboratory_counts_for_a_claim_of_the_paper(rows: pd.DataFrame) -> None:
    assert not {claim.protocol for claim in claims.claims()} & {laptop.NAME}
    assert Path(laptop.ledger_path()).name != "runs.csv"
