"""The queue: every campaign's runs once, in whole seeds, ordered by what they settle."""

import dataclasses
import math
import time
from collections.abc import Callable
from itertools import pairwise

import pandas as pd
import pytest
import torch

from kdig_utils.analysis import plan
from kdig_utils.analysis.claims import claims
from kdig_utils.experiments import brief, campaigns, queue
from kdig_utils.experiments.ledger import COLUMNS, Ledger
from kdig_utils.experiments.queue import Group
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.experiments.steps import TrainingDiverged
from kdig_utils.experiments.study import Study
from kdig_utils.method import models
from kdig_utils.method.cifar10 import ImageSet, first_of_each_class
from kdig_utils.method.spec import RunSpec

ALL = queue.groups()
SEVEN = {("student", "")} | {(m, p) for m in ("kd", "ig", "kd_ig") for p in ("shuffled", "matched")}


def of_stage(stage: str) -> list[Group]:
    return [group for group in ALL if group.stage == stage]


def test_every_run_of_every_campaign_stands_in_the_queue_once() -> None:
    specs = [spec for group in ALL for spec in group.specs]
    wanted = {spec for name in campaigns.CAMPAIGNS for spec in campaigns.specs(name)}
    assert len(specs) == len(set(specs))
    assert wanted <= set(specs)
    assert all(brief.setting_of(spec) or spec in brief.candidates() for spec in set(specs) - wanted)
    print(f"{len(specs)} runs in {len(ALL)} groups")


def test_the_order_is_by_what_the_runs_settle() -> None:
    stages = list(dict.fromkeys(group.stage for group in ALL))
    assert stages[:3] == ["choice of the brief setting", "brief: answers and reasons", "answers and reasons"]
    assert stages.index("all eight methods") < stages.index("sizes") < stages.index("resamples")
    sizes = [group.specs[0].k for group in of_stage("sizes")]
    assert sizes == sorted(sizes, reverse=True)  # the smallest student has the most blocks removed


@pytest.mark.parametrize(("stage", "seeds"), [("brief: answers and reasons", 5), ("answers and reasons", 10)])
def test_a_seed_is_seven_runs_so_that_a_cut_leaves_whole_seeds(stage: str, seeds: int) -> None:
    found = of_stage(stage)
    for seed, group in enumerate(found):
        runs = {(s.method, s.pairing if s.uses_teacher else "") for s in group.specs}
        assert runs == SEVEN
        assert {s.seed for s in group.specs} == {seed}
    assert len(found) == seeds


def test_the_two_protocols_never_share_a_run() -> None:
    paper = {
        spec for stage in ("answers and reasons", "sizes", "resamples") for g in of_stage(stage) for spec in g.specs
    }
    assert all(brief.setting_of(spec) is None for spec in paper)
    assert all(
        brief.setting_of(s) for stage in ("brief: answers and reasons",) for g in of_stage(stage) for s in g.specs
    )


@pytest.mark.parametrize(
    ("claim", "group"),
    [
        ("kd_ig_over_student", "answers and reasons, seed 9"),
        ("kd_ig_together", "answers and reasons, seed 9"),
        ("sweep_k5", "answers and reasons, seed 4"),
        ("mean_kd_ig_at", "all eight methods, seed 9"),
        ("sweep_student_k17", "sizes, k = 17, seed 2"),
        ("sweep_kd_k3", "sizes, k = 3, seed 4"),
        ("brief_kd_ig_over_kd", "brief: answers and reasons, seed 4"),
    ],
)
def test_a_claim_is_settled_by_the_group_that_holds_its_last_run(claim: str, group: str) -> None:
    assert claim in plan.settles(ALL, brief.DEFAULT)[group]


def test_every_claim_about_students_is_settled_somewhere_in_the_queue() -> None:
    settled = {name for names in plan.settles(ALL, brief.DEFAULT).values() for name in names}
    waiting = {claim.name for claim in claims() if plan.needed(claim, brief.DEFAULT)}
    assert settled == waiting
    assert len(waiting) > 60


NAMED = ("run_id", "method", "k", "seed", "pairing", "epochs", "train_fraction")
ENDED = {"device": "CPU, 2 threads", "train_images": 50_000, "seconds": 10, "test_accuracy": 90.0}


def rows_for(specs: list[RunSpec], **columns: object) -> pd.DataFrame:
    """Ledger rows as if these specs had been trained."""
    lines = []
    for spec in specs:
        named = {name: getattr(spec, name) for name in NAMED}
        text = pd.Series(dataclasses.asdict(spec)).to_json()
        lines.append({**named, "spec": text, **ENDED, **columns})
    return pd.DataFrame(lines, columns=list(COLUMNS)).fillna({"teacher_sha256": "", "finished": "2026-11-28T00:00Z"})


def test_the_plan_counts_what_the_ledger_holds_whichever_campaign_trained_it() -> None:
    done = rows_for([RunSpec("student", k=17, seed=seed, data_md5="d") for seed in range(3)], campaign="elsewhere")
    table = plan.plan(done).set_index("group")
    assert table.loc["sizes, k = 17, seed 0", "done"] == 1
    assert table["done"].sum() == 3
    assert (table["runs"] == table["done"] + table["left"]).all()


def test_seconds_are_those_that_a_gpu_took() -> None:
    """At two seconds an epoch of the main student, a seed of seven short runs takes 7 × 20 × 2 seconds."""
    gpu = rows_for([RunSpec("kd", seed=7)], device="NVIDIA H100", seconds=200)
    assert queue.is_measured(gpu)
    table = plan.plan(gpu).set_index("group")
    assert table.loc["brief: answers and reasons, seed 0", "seconds"] == pytest.approx(7 * 20 * 2)
    slower = queue.speed(gpu)
    assert slower(RunSpec("kd", k=3)) > slower(RunSpec("kd")) > slower(RunSpec("kd", k=17))
    assert not queue.is_measured(rows_for([RunSpec("kd")]))


def test_without_a_measurement_the_floor_of_memory_traffic_stands() -> None:
    """review: 3.56 GB a step of 64 images at 3.0 TB/s, 93 seconds for 100 epochs."""
    assert 100 * 50_000 * queue.speed(rows_for([]))(RunSpec("kd_ig")) == pytest.approx(93, rel=0.05)


def test_the_stages_add_up_to_the_plan() -> None:
    table = plan.plan(rows_for([]))
    stages = plan.stages(table)
    for column in ("runs", "left", "seconds"):
        assert stages[column].sum() == pytest.approx(table[column].sum())
    assert stages["claims"].sum() == sum(map(len, plan.settles(ALL, brief.DEFAULT).values()))


# Training


@pytest.fixture
def study(tmp_path: object, sample_train: ImageSet, sample_test: ImageSet) -> Study:
    """A rehearsal on 20 images beside a teacher with random weights."""
    specs = (RunSpec("student", epochs=1, batch_size=16),)
    made = Study("smoke", tmp_path, Ledger(tmp_path / "runs.csv"), tmp_path / "curves", specs=specs, n_steps=1)
    made.__dict__.update(
        train=sample_train.subset(first_of_each_class(sample_train.labels, 2)),
        test=sample_test.subset(torch.arange(20)),
        teacher=models.teacher(1).eval(),
        device=torch.device("cpu"),
    )
    return made


def asked_for(monkeypatch: pytest.MonkeyPatch, train: Callable = lambda study, specs: None) -> list[list[RunSpec]]:
    """Note the specs of each call of `run_all`, in place of training them."""
    calls = []

    def run_all(study: Study, specs: object, *_arguments: object) -> list[str]:
        calls.append(list(specs))
        train(study, calls[-1])
        return []

    monkeypatch.setattr(Study, "run_all", run_all)
    return calls


def test_the_setting_is_chosen_on_validation_images_before_any_other_run(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(study: Study, specs: list[RunSpec]) -> None:
        if len(specs) == len(brief.SETTINGS):
            accuracies = (60.0, 61.0, 63.0, 62.0)
            for spec, accuracy in zip(specs, accuracies, strict=True):
                study.ledger.merge(rows_for([spec], validation_accuracy=accuracy))

    calls = asked_for(monkeypatch, train)
    queue.train(study, Way(), math.inf, print)
    assert calls[0] == [study.scaled(spec) for spec in brief.candidates()]
    used = {spec.learning_rate for spec in calls[1] if spec.schedule == "one_cycle" and not spec.validation_images}
    assert used == {brief.SETTINGS[2].learning_rate}
    firsts = [(spec.method, spec.seed) for spec in calls[1] if spec.schedule == "one_cycle" and spec.seed < 5]
    assert all(one[1] <= other[1] for one, other in pairwise(firsts[:35]))


def test_a_candidate_that_diverges_stops_nothing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(study: Study, specs: list[RunSpec]) -> None:
        if specs[0].validation_images:
            raise TrainingDiverged("run x: the loss is nan")

    calls = asked_for(monkeypatch, train)
    with pytest.raises(TrainingDiverged, match=r"^run x: the loss is nan$"):  # named once, at the end
        queue.train(study, Way(), math.inf, print)
    assert len(calls) == 2


def test_what_a_cut_leaves_goes_on_and_ends_with_the_same_rows(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real training, cut off again and again, then once more without a cut: bit for bit the same networks."""
    monkeypatch.setattr(queue, "groups", lambda setting: [Group("few", "few", (brief.spec("student", 0, setting),))])
    monkeypatch.setattr(Study, "scaled", lambda _self, spec: dataclasses.replace(
        spec, k=17, epochs=2, batch_size=spec.batch_size // 16, validation_images=10 * (spec.validation_images > 0)
    ))  # fmt: skip
    whole = dataclasses.replace(study, folder=study.folder / "whole", ledger=Ledger(study.folder / "whole.csv"))
    whole.__dict__.update({name: study.__dict__[name] for name in ("train", "test", "teacher", "device")})
    queue.train(whole, Way(), math.inf, print)
    turns = 0
    while len(study.ledger.read()) < 5:
        queue.train(study, Way(2), time.monotonic() + 0.1 * 1.2**turns, print)
        turns += 1
    columns = ["run_id", "weights_sha256", "test_accuracy", "validation_accuracy"]
    rows = [made.ledger.read().sort_values("run_id")[columns].reset_index(drop=True) for made in (study, whole)]
    pd.testing.assert_frame_equal(*rows)
    print(f"{turns} turns of 0.1 s and more")
