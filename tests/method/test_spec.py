"""A run is a spec: its values have the types of its fields or are refused in words, and its identity is stable."""

import copy
import csv
import dataclasses
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdig_utils
from kdig_utils.experiments import campaigns, laptop
from kdig_utils.method.spec import METHODS, RunSpec, Spec, TeacherSpec

ROOT = Path(__file__).parents[2]
OTHER_VALUES = {
    "method": "kd", "k": 7, "seed": 1, "epochs": 99, "batch_size": 128, "learning_rate": 1e-2, "alpha": 0.02,
    "temperature": 3.0, "gamma": 0.7, "overlay_probability": 0.2, "pairing": "shuffled", "train_fraction": 0.8,
    "validation_images": 5000, "teacher_sha256": "ab", "n_steps": 20, "data_md5": "cd",
    "precision": "float32", "answers": "online", "sample_seed": 4, "schedule": "one_cycle",
    "stem_stride": 2, "weight_decay": 5e-4, "initial": "teacher", "train_images": 2500,
}  # fmt: skip


# Identity


def test_identity_of_a_run_is_pinned() -> None:
    """The committed ledger, curves and weights are filed under these: another value here orphans every run."""
    assert RunSpec("kd_ig").run_id == "c205e981730b"
    assert RunSpec("student", seed=3, epochs=2).run_id == "1f56ec16899b"
    assert TeacherSpec().run_id == "b6246adfe320"


def test_every_field_changes_the_identity() -> None:
    assert set(OTHER_VALUES) == {field.name for field in dataclasses.fields(RunSpec)}
    base = RunSpec("kd_ig")
    identities = [dataclasses.replace(base, **{name: value}).run_id for name, value in OTHER_VALUES.items()]
    assert len({base.run_id, *identities}) == 1 + len(OTHER_VALUES)


def test_a_default_that_is_written_out_is_the_same_run() -> None:
    assert RunSpec("kd", k=5, seed=0, epochs=100, temperature=2.5).run_id == RunSpec("kd").run_id


def test_methods_and_defaults_are_the_papers(paper: dict) -> None:
    assert tuple(METHODS) == tuple(method for method in paper["ablation_runs"] if method in METHODS)
    assert len(METHODS) == 8
    spec, settings = RunSpec("kd_ig_at"), paper["training"]
    for name in ("epochs", "batch_size", "learning_rate", "alpha", "temperature", "gamma", "overlay_probability"):
        assert getattr(spec, name) == settings[name]
    assert spec.k == paper["student"]["main_k"]


@pytest.fixture
def paper() -> dict:
    return json.loads((Path(kdig_utils.__file__).parent / "paper.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_method(method: str) -> None:
    spec = RunSpec(method)
    parts = [part for part in ("kd", "ig", "at") if spec.uses(part)]
    assert "_".join(parts) == ("" if method == "student" else method)
    assert spec.uses_teacher == bool(parts)


# Ranges


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"method": "KD"}, r"unknown method 'KD': choose one of student, kd"),
        ({"method": "ig_kd"}, "unknown method 'ig_kd'"),
        ({"k": 4}, "unknown k 4: choose one of 3, 5"),
        ({"k": 19}, "unknown k 19"),
        ({"temperature": 0}, "temperature = 0.*above 0"),
        ({"temperature": -2.5}, "temperature = -2.5 .*above 0"),
        ({"alpha": -0.1}, "alpha = -0.1 .*from 0 to 1"),
        ({"alpha": float("nan")}, "alpha = nan .*from 0 to 1"),
        ({"overlay_probability": -0.1}, "overlay_probability = -0.1 .*from 0 to 1"),
        ({"overlay_probability": 1.1}, "overlay_probability = 1.1 .*from 0 to 1"),
        ({"pairing": "index"}, "unknown pairing 'index'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"batch_size": 1}, "batch_size = 1 .*at least 2"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0 .*above 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan .*above 0"),
        ({"train_fraction": 0.0}, "train_fraction = 0.0 .*above 0"),
        ({"train_fraction": 1.2}, "train_fraction = 1.2 .*up to 1"),
        ({"gamma": -0.1}, "gamma = -0.1 .*0 or more"),
        ({"gamma": float("nan")}, "gamma = nan .*0 or more"),
        ({"n_steps": 0}, "n_steps = 0"),
        ({"epochs": 2.5}, "epochs = 2.5 .*whole number.*at least 1"),
        ({"epochs": float("nan")}, "epochs = nan .*whole number"),
        ({"epochs": 10**30}, "epochs = 1000.*to 1,000,000"),
        ({"epochs": "20"}, "epochs = '20' .*whole number"),
        ({"epochs": True}, "epochs = True .*whole number"),
        ({"epochs": None}, "epochs = None .*whole number"),
        ({"seed": -1}, "seed = -1 .*from 0 to 4,294,967,295"),
        ({"sample_seed": 2**32}, "sample_seed = 4294967296 .*from 0 to 4,294,967,295"),
        ({"learning_rate": float("inf")}, "learning_rate = inf .*finite"),
        ({"weight_decay": float("nan")}, "weight_decay = nan .*0 or more"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1 .*0 or more"),
        ({"k": "5"}, "k '5': choose one of 3, 5"),
        ({"teacher_sha256": None}, "teacher_sha256 = None is no text"),
        ({"data_md5": b"ab"}, "data_md5 = b'ab' is no text"),
        ({"validation_images": -1}, "validation_images = -1"),
        ({"precision": "int8"}, "unknown precision 'int8': choose one of native, float32"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_value_outside_its_range_is_named(changed: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RunSpec(**{"method": "kd_ig", **changed})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "learning_rate", "validation_images"])
def test_teachers_ranges_too(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} = -1(\.0)? "):
        TeacherSpec(**{name: -1})


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "linear"},
        {"cutout": -1},
        {"cutout": 33},
        {"label_smoothing": 1.0},
        {"label_smoothing": float("nan")},
        {"weight_decay": float("nan")},
        {"precision": "half"},
    ],
)
def test_wrong_teacher_settings_name_value_and_remedy(change: dict) -> None:
    (value,) = change.values()
    with pytest.raises(ValueError, match=rf"{value}.*(choose|give|0 is none)"):
        TeacherSpec(**change)


def test_a_spec_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunSpec("kd").temperature = -1


# Types


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"k": 9.0}, {"k": 9}),
        ({"epochs": np.int64(2), "seed": np.uint8(3)}, {"epochs": 2, "seed": 3}),
        ({"alpha": 1, "temperature": 4}, {"alpha": 1.0, "temperature": 4.0}),
        ({"gamma": -0.0}, {"gamma": 0.0}),
        ({"learning_rate": np.float64(0.01)}, {"learning_rate": 0.01}),
        ({"train_fraction": np.float32(0.5)}, {"train_fraction": 0.5}),
        ({"pairing": np.str_("shuffled")}, {"pairing": "shuffled"}),
        ({"sample_seed": np.int32(0)}, {"sample_seed": 0}),
    ],
)  # fmt: skip
def test_equal_values_are_one_run_whatever_their_types(given: dict, same: dict) -> None:
    found, other = RunSpec("kd_ig", **given), RunSpec("kd_ig", **same)
    assert found == other
    assert found.run_id == other.run_id
    assert json.dumps(dataclasses.asdict(found)) == json.dumps(dataclasses.asdict(other))


@pytest.mark.parametrize(
    ("construct", "named"),
    [
        (lambda: RunSpec(), "RunSpec, method: .*required"),
        (lambda: RunSpec("kd", epoch=3), "RunSpec, epoch: unexpected.*epochs"),
        (lambda: RunSpec("kd", method="ig"), "RunSpec, method: .*multiple"),
        (lambda: RunSpec("kd", 5, 0, 3, k=5), "RunSpec, k: .*multiple"),
        (lambda: RunSpec(*dataclasses.astuple(RunSpec("kd")), 1), "RunSpec, 24: unexpected"),
        (lambda: RunSpec(5), "method = 5 is no text"),
        (lambda: RunSpec("kd", "5"), "k '5': choose one of 3, 5"),
        (lambda: RunSpec("kd", 5, 0.5), "seed = 0.5 is no whole number"),
        (lambda: TeacherSpec(k=5), "TeacherSpec, k: unexpected"),
        (lambda: dataclasses.replace(RunSpec("kd"), epoch=3), "RunSpec, epoch: unexpected.*epochs"),
    ],
)
def test_arguments_that_are_no_fields_are_refused_in_words(construct, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        construct()


def test_a_spec_is_copied_changed_and_taken_apart_as_any_dataclass() -> None:
    spec = RunSpec("kd", seed=3)
    values = dataclasses.asdict(spec)
    _asked = spec.run_id
    assert dataclasses.asdict(spec) == values == {**values, "method": "kd", "seed": 3}
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec == RunSpec(**values)
    assert dataclasses.replace(spec, seed=4).run_id == RunSpec("kd", seed=4).run_id != spec.run_id
    assert len({spec, RunSpec("kd", seed=3), dataclasses.replace(spec, seed=4)}) == 2


def test_identities_of_all_committed_runs_and_all_campaigns_are_what_they_were() -> None:
    """Against the rule itself, hashed here: kind and the values that are no defaults, each of its field's type."""
    specs = [spec for name in campaigns.CAMPAIGNS for spec in campaigns.specs(name)] + laptop.queue()
    for spec in specs:
        assert spec.run_id == identity(type(spec), dataclasses.asdict(spec))
    rows = [row for name in ("runs", "laptop") for row in csv.DictReader((ROOT / f"results/{name}.csv").open())]
    for row in rows:
        kind = TeacherSpec if row["method"] == "teacher" else RunSpec
        names = {field.name for field in dataclasses.fields(kind)}
        told = {name: value for name, value in json.loads(row["spec"]).items() if name in names}
        assert kind(**told).run_id == identity(kind, told) == row["run_id"]
    assert len(rows) >= 469
    print(f"{len(rows)} committed rows, {len(specs)} specs of campaigns")


def identity(kind: type, values: dict) -> str:
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    chosen = {name: value for name, value in values.items() if value != defaults[name]}
    return hashlib.sha256(json.dumps({"kind": kind.__name__, **chosen}, sort_keys=True).encode()).hexdigest()[:12]


NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    st.floats(-0.5, 1.5),
    st.sampled_from([2**63, 10**400, 10**5000, np.int64(5), np.float32(0.25), np.float64("nan"), np.bool_(True)]),
    st.fractions(),
    st.decimals(),
    st.complex_numbers(),
)
OTHERS = st.one_of(
    st.none(),
    st.booleans(),
    st.text(st.characters(codec=None), max_size=5),
    st.binary(max_size=3),
    st.sampled_from(
        ["kd", "kd_ig", "student", "shuffled", "native", "one_cycle", "teacher", "a" * 20_000, "\ud800", "5"]
    ),
    st.lists(st.integers(0, 5), max_size=2),
    st.just({}),
    st.builds(object),
    st.just(np.array([5, 6])),
)
KINDS = {RunSpec: {"method": "kd_ig"}, TeacherSpec: {}}
FIELDS = [(kind, field.name) for kind in KINDS for field in dataclasses.fields(kind)]
seen = {"specs": 0, "refused": 0}


def check(kind: type[Spec], values: dict) -> None:
    """A spec with exactly the declared types and an identity that survives JSON, or a ValueError that names a field."""
    try:
        spec = kind(**{**KINDS[kind], **values})
    except ValueError as error:
        told = str(error) if type(error) is ValueError else f"pydantic's own: {error}"
        assert told.startswith(tuple(f"{word}{name} " for name in values for word in ("", "unknown ", "recipe "))), told
        assert not any(word in told for word in ("type=", "http", "validation error", "\n")), told
        seen["refused"] += 1
        return
    for field in dataclasses.fields(kind):
        value = getattr(spec, field.name)
        declared = type(field.default) if field.default not in (None, dataclasses.MISSING) else None
        optional = field.name == "sample_seed" and (value is None or type(value) is int)
        assert optional or type(value) is (declared or str), (field.name, value)
    again = kind(**json.loads(json.dumps(dataclasses.asdict(spec))))
    assert again == spec
    assert again.run_id == spec.run_id
    seen["specs"] += 1


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(st.one_of(NUMBERS, OTHERS))
def in_each_field(value: object) -> None:
    for kind, name in FIELDS:
        check(kind, {name: value})


def test_whatever_a_field_is_given_it_has_its_type_or_is_named() -> None:
    in_each_field()
    assert seen["specs"] + seen["refused"] >= 2000
    assert min(seen.values()) >= 500
    print(f"{seen['specs']} specs, {seen['refused']} values refused")


# Methods


@pytest.mark.parametrize("method", ["", "ig_kd", "kd_kd", "kd_", "kdd", "teacher"])
def test_a_method_is_made_of_parts_in_their_order(method: str) -> None:
    with pytest.raises(ValueError, match="method"):
        RunSpec(method)


def test_what_a_method_does_not_read_is_no_part_of_its_setting() -> None:
    """Runs that differ in nothing that their method reads are repetitions, whatever else their specs say."""
    assert RunSpec("ig", alpha=0.5).setting() == RunSpec("ig").setting()
    assert RunSpec("kd", alpha=0.5).setting() != RunSpec("kd").setting()
    assert RunSpec("student", pairing="shuffled").setting() == RunSpec("student", seed=3).setting()
    assert RunSpec("at", pairing="shuffled").setting() != RunSpec("at").setting()
