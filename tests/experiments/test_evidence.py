"""One vocabulary for kinds of evidence, and rows of the ledger that say truly of which kind they are."""

import json
from dataclasses import asdict

import pandas as pd
import pytest

from kdig_utils.experiments import brief, evidence
from kdig_utils.method.spec import RunSpec


def row(method: str = "kd", train_images: int = 50000, **changes: object) -> dict:
    spec = RunSpec(method, **changes)
    return {**asdict(spec), "train_images": train_images, "spec": json.dumps(asdict(spec))}


def teacher(epochs: int, **changes: object) -> dict:
    return {"method": "teacher", "epochs": epochs, "train_images": 50000, "spec": json.dumps(changes)}


def test_no_run_is_evidence_of_nothing():
    assert evidence.of_runs(pd.DataFrame(columns=["method"])) == [evidence.NOT_RUN]


def test_only_the_papers_settings_are_called_so():
    assert evidence.of_runs(pd.DataFrame([row(), row(seed=3, k=9, pairing="shuffled")])) == [evidence.TRAINED]
    assert evidence.of_runs(pd.DataFrame([row(train_fraction=0.8, train_images=40000)])) == [evidence.TRAINED]
    for other in (row(epochs=3), row(alpha=0.5), row(train_images=1000), row(train_fraction=0.8, train_images=900)):
        (kind,) = evidence.of_runs(pd.DataFrame([other]))
        assert kind.startswith(f"{evidence.PROTOCOL}: ")


def test_kinds_are_told_apart_and_never_pooled():
    kinds = evidence.of_runs(pd.DataFrame([row(), row(epochs=3), row(epochs=3, seed=1)]))
    assert kinds == [evidence.TRAINED, evidence.protocol("3 epochs")]
    assert evidence.in_words([*kinds, evidence.TRAINED]) == " · ".join(kinds)


def test_a_teacher_counts_by_its_whole_training():
    assert evidence.of_runs(pd.DataFrame([teacher(100)])) == [evidence.TRAINED]
    for other in (teacher(4), teacher(100, initial_sha256="abc")):
        (kind,) = evidence.of_runs(pd.DataFrame([other]))
        assert kind.startswith(evidence.PROTOCOL)


def brief_row(**changes: object) -> dict:
    return row(**{"epochs": brief.EPOCHS, "schedule": brief.SCHEDULE, **brief.DEFAULT._asdict(), **changes})


def test_runs_of_the_brief_protocol_have_its_name_and_others_that_are_as_short_do_not():
    for setting in brief.SETTINGS:
        its = [brief_row(**setting._asdict()), brief_row(seed=4, pairing="shuffled", **setting._asdict())]
        assert evidence.of_runs(pd.DataFrame(its)) == [evidence.protocol(brief.NAME)]
    near = [{"schedule": "constant"}, {"epochs": 21}, {"learning_rate": 0.001}, {"validation_images": 5000}]
    for changes in (*near, {"alpha": 0.5}, {"train_images": 500}):
        (kind,) = evidence.of_runs(pd.DataFrame([brief_row(**changes)]))
        assert kind.startswith(evidence.PROTOCOL)
        assert kind != evidence.protocol(brief.NAME)


def test_protocols_stand_by_their_names_at_their_place_in_the_vocabulary():
    others = [evidence.protocol(name) for name in ("brief", "laptop")]
    shuffled = [evidence.TIMED, others[1], evidence.COUNTED, others[0], evidence.TRAINED, others[1]]
    assert evidence.in_order(shuffled) == [evidence.COUNTED, evidence.TRAINED, *others, evidence.TIMED]
    assert [evidence.protocol_in(kind) for kind in (*others, evidence.TRAINED)] == ["brief", "laptop", ""]


@pytest.mark.parametrize("kind", ["", "hearsay", evidence.PROTOCOL, f"{evidence.PROTOCOL}: ", []])
def test_what_is_not_in_the_vocabulary_is_refused_and_a_protocol_needs_its_name(kind):
    with pytest.raises(ValueError, match="no kind of evidence"):
        evidence.in_words(kind)
