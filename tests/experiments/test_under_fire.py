"""The ledger under fire: a part of `benchmarks/under_fire.py`, which says on the status page what the whole found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KINDS = {
    "killed at random moments": 10,
    "killed at each file operation, append": 3,
    "killed in the midst of a write, append": 2,
    "8 processes append": 8,
    "8 processes on one campaign, killed and replaced": 3,
    "flock does nothing, 8 processes append": 8,
    "flock does nothing, 8 processes on one campaign": 8,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the part counted: in a process of its own, as it forks."""
    folder = tmp_path_factory.mktemp("fire")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KDIG_ROOT": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [
        sys.executable,
        ROOT / "benchmarks" / "under_fire.py",
        "--quick",
        "--folder",
        folder,
        "--out",
        folder / "found.json",
    ]
    ran = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, cwd=ROOT, timeout=600)
    print(ran.stdout)
    assert (folder / "found.json").is_file(), ran.stderr[-2000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_no_attack_costs_a_row_a_run_or_a_bit(found: dict) -> None:
    faults = {kind["name"]: kind["faults"] for kind in found["kinds"] if kind["faults"]}
    assert not faults


@pytest.mark.slow
def test_each_kind_was_tried(found: dict) -> None:
    kinds = {kind["name"]: kind for kind in found["kinds"]}
    for name, least in KINDS.items():
        tried = kinds[name]["kills" if "killed" in name else "attempts"]
        assert tried >= least, f"{name}: {tried}"
    mounted = [kind for name, kind in kinds.items() if "disk" in name or "read-only" in name]
    assert all(kind["left_out"] or kind["attempts"] for kind in mounted)
    print(f"{sum(kind['attempts'] for kind in kinds.values())} attempts, {found['seconds']} s")


@pytest.mark.slow
def test_a_package_that_is_broken_on_purpose_is_caught(found: dict) -> None:
    """Without the lock, with files written in place, without the optimiser's state, with rows written late."""
    assert set(found["broken_on_purpose"]) == {"lock", "replace", "optimizer", "append"}
    assert all(found["broken_on_purpose"].values()), found["broken_on_purpose"]


def test_the_committed_counts_are_those_of_the_whole() -> None:
    """No fault stands on the status page unseen, and nothing less than 200 kills is called the whole."""
    path = ROOT / "benchmarks" / "results" / "under_fire.json"
    if not path.is_file():
        pytest.skip("not run yet: python benchmarks/under_fire.py")
    counted = json.loads(path.read_text())
    kinds = {kind["name"]: kind for kind in counted["kinds"]}
    assert kinds["killed at random moments"]["kills"] >= 200
    assert not [name for name, kind in kinds.items() if kind["faults"] or kind["left_out"]]
    assert all(counted["broken_on_purpose"].values())
