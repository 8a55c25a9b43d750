"""Texts and tables that come with the book, damaged: refused in words that name the file, the place and the remedy."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from kdig_utils import paths
from kdig_utils.analysis import claims, explanations, printed
from kdig_utils.experiments import laptop

WHOLE = yaml.safe_load(claims.CLAIMS.read_text(encoding="utf-8"))
FLAWS = {
    "no YAML": (lambda text: "claims: [", "claims.yml is damaged"),
    "no mapping": (lambda text: "- 1", r"claims\.yml: .*dict"),
    "empty": (lambda text: "", r"claims\.yml: .*None"),
    "no rules": (lambda text: yaml.safe_dump({k: v for k, v in WHOLE.items() if k != "rules"}), "claims.yml, rules"),
    "conflict markers": (lambda text: text.replace("\nclaims:", "\n<<<<<<< HEAD\nclaims:"), "claims.yml is damaged"),
    "python objects": (lambda text: "!!python/object/apply:os.getcwd []", "claims.yml is damaged"),
}
OF_A_CLAIM = {
    "tolerance": ["wide", -1, float("nan"), None],
    "measure": ["guess", 5],
    "statistic": ["median"],
    "seeds": ["ten", 1.5],
    "group": ["none such"],
    "evidence": ["hearsay"],
    "k": ["five"],
    "value": [{"a": 1}],
    "methods": [5, "student", [5]],
    "colour": ["red"],
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_damaged_file_of_claims_is_named(tmp_path: Path, flaw: str) -> None:
    damage, message = FLAWS[flaw]
    (tmp_path / "claims.yml").write_text(damage(claims.CLAIMS.read_text(encoding="utf-8")))
    with pytest.raises(ValueError, match=rf"{message}.*restore it from git"):
        claims.read(tmp_path / "claims.yml")


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, its in OF_A_CLAIM.items() for value in its])
def test_a_damaged_claim_is_named(tmp_path: Path, field: str, value: object) -> None:
    content = yaml.safe_load(claims.CLAIMS.read_text(encoding="utf-8"))
    content["claims"][0][field] = value
    (tmp_path / "claims.yml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"claims\.yml, claim factor.*restore it from git") as refused:
        claims.read(tmp_path / "claims.yml")
    assert "\n" not in str(refused.value)
    assert str(value).strip("[]") in str(refused.value)


def test_the_claims_of_the_book_are_those_of_its_file() -> None:
    assert claims.read(claims.CLAIMS) == claims.claims()
    assert claims.contents(claims.CLAIMS) == WHOLE


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with what is read here, to be damaged."""
    for folder in ("artifacts/laptop", "results/printed"):
        shutil.copytree(paths.repository_root() / folder, tmp_path / folder)
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    return tmp_path


DAMAGED = [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damaged_files_of_the_laboratory_are_named(copied: Path, content: bytes) -> None:
    for name, read in (("manifest", laptop.frozen_manifest), ("small_teachers", lambda: laptop.small_teacher(0))):
        (copied / "artifacts" / "laptop" / f"{name}.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.json.*restore it from git"):
            read()


@pytest.mark.parametrize("change", [{"file": "../../x"}, {"file": None}, {"sha256": None}, {"sha256": "00"}])
def test_a_small_teacher_is_one_file_with_its_hash(copied: Path, change: dict) -> None:
    path = copied / "artifacts" / "laptop" / "small_teachers.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"0": stored["0"] | change}))
    with pytest.raises(ValueError, match=rf"small_teachers\.json, 0, {next(iter(change))}.*restore it from git"):
        laptop.small_teacher(0)
    path.write_text(json.dumps(stored))
    with pytest.raises(KeyError, match=r"0\.3: choose one of 0, 0\.1"):
        laptop.small_teacher(0.3)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b'a,b\n"1,2\n'])
def test_damaged_tables_are_named(copied: Path, content: bytes) -> None:
    (copied / "results" / "printed" / "six_curves.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"six_curves\.csv is damaged.*restore it from git"):
        printed.table("six_curves")
    (copied / "explanations.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"explanations\.csv is damaged.*delete it"):
        explanations.read(copied / "explanations.csv")
