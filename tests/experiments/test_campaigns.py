"""Campaigns: the runs of the paper's tables, found again in any ledger, packed and unpacked without loss."""

import dataclasses
import io
import math
import re
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kdig_utils import __main__ as command_line
from kdig_utils.commands import make_runs
from kdig_utils.experiments import campaigns, packs, study
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.study import open_study
from kdig_utils.method import models
from kdig_utils.method.spec import METHODS, RunSpec, TeacherSpec

RUNS = {
    "ablation": 8 * 10,
    "pairing": 7 * 10,
    "compression": 8 * 4 * 5,
    "compression-pairing": 8 * 3 * 5,
    "monte-carlo": 60 * 4,
    "monte-carlo-pairing": 60 * 3,
    "precision": 2 * 3,
    "alignment": 2 * 20 + (1 + 3 + 1) * 10,
    "components": 6 * 6,
}

OLD, NEW = "0d" * 32, "4e" * 32  # teachers


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "results" / "runs.csv")


def fill(ledger: Ledger, specs: list[RunSpec], seconds: float = 36.0, campaign: str = "any") -> None:
    scratch = Ledger(ledger.path.parent / "scratch.csv")
    for spec in specs:
        scratch.append(spec, campaign=campaign, seconds=seconds, test_accuracy=90.0)
    ledger.merge(scratch.read())
    scratch.path.unlink(missing_ok=True)


# The lists


@pytest.mark.parametrize("name", campaigns.CAMPAIGNS)
def test_a_campaign_has_the_papers_runs_each_once(name: str) -> None:
    specs = campaigns.specs(name)
    assert len(specs) == len({spec.run_id for spec in specs}) == RUNS[name]
    assert {spec.epochs for spec in specs} == {100}
    seeds = [spec.seed for spec in specs]
    assert seeds == sorted(seeds), "a part of a campaign is balanced"


def test_ablation_and_pairing_differ_in_pairing_alone_and_share_the_student() -> None:
    matched = {(spec.method, spec.seed) for spec in campaigns.specs("ablation")}
    shuffled = {(spec.method, spec.seed) for spec in campaigns.specs("pairing")}
    assert matched - shuffled == {("student", seed) for seed in range(10)}
    assert {method for method, _seed in matched} == set(METHODS)
    assert {spec.pairing for spec in campaigns.specs("pairing")} == {"shuffled"}


def test_compression_shares_its_runs_at_k_5_with_the_ablation() -> None:
    shared = {s.run_id for s in campaigns.specs("compression")} & {s.run_id for s in campaigns.specs("ablation")}
    assert len(shared) == 4 * 5
    assert {spec.k for spec in campaigns.specs("compression")} == set(models.REMOVABLE_BLOCKS)


def test_monte_carlo_draws_four_fifths_afresh_for_each_seed() -> None:
    specs = campaigns.specs("monte-carlo")
    assert {spec.train_fraction for spec in specs} == {0.8}
    assert len({spec.seed for spec in specs}) == 60


def test_answers_are_compared_at_one_setting_seed_by_seed() -> None:
    specs = campaigns.answers(alpha=0.5, temperature=4.0)
    assert {(spec.method, spec.alpha, spec.temperature) for spec in specs} == {("kd", 0.5, 4.0)}
    ways = {(spec.pairing, spec.answers) for spec in specs}
    assert ways == {("matched", "stored"), ("shuffled", "stored"), ("matched", "online")}
    assert len({spec.run_id for spec in specs}) == 3 * 10


def test_answers_wait_for_the_search(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_runs.paths, "ledger_path", lambda: ledger.path)
    with pytest.raises(ValueError, match="needs the alpha that validation prefers: run"):
        make_runs.campaign_specs("answers")


def test_unknown_campaign_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown campaign 'all': choose one of ablation, pairing"):
        campaigns.specs("all")


# In the ledger


def test_rows_of_a_campaign_are_found_whichever_campaign_trained_them(ledger: Ledger) -> None:
    few = [RunSpec("kd", seed=seed, teacher_sha256="ab" * 32, data_md5="cd" * 16) for seed in range(6)]
    fill(ledger, [*few, RunSpec("kd", epochs=3), TeacherSpec()], campaign="ablation")
    table = ledger.read()
    assert campaigns.rows(table, "compression")["seed"].tolist() == [0, 1, 2, 3, 4]
    assert campaigns.rows(table, "ablation")["seed"].tolist() == [0, 1, 2, 3, 4, 5]
    assert campaigns.rows(table, "pairing").empty
    assert list(campaigns.rows(Ledger(Path("none.csv")).read(), "pairing").columns) == list(table.columns)


def test_students_of_two_teachers_do_not_mix(ledger: Ledger) -> None:
    """The teacher with more of a campaign's rows is the one that counts; students without a teacher always do."""
    whole = campaigns.specs("ablation")
    fill(ledger, [dataclasses.replace(s, teacher_sha256=OLD) if s.uses_teacher else s for s in whole[:16]])
    fill(ledger, [dataclasses.replace(s, teacher_sha256=NEW) for s in whole if s.uses_teacher])
    table = ledger.read()
    found = campaigns.rows(table, "ablation")
    assert set(found["teacher_sha256"]) == {"", NEW}
    assert len(found) == 7 * 10 + 2
    assert campaigns.progress(table).set_index("campaign").loc["ablation", ["done", "left"]].tolist() == [72, 8]
    assert (campaigns.progress(table)["left"] >= 0).all()


def test_progress_counts_and_estimates(ledger: Ledger) -> None:
    assert campaigns.progress(ledger.read())["hours"].isna().all()
    fill(ledger, campaigns.specs("ablation")[:20], seconds=36.0)
    table = campaigns.progress(ledger.read()).set_index("campaign")
    assert table.loc["ablation", ["runs", "done", "left"]].tolist() == [80, 20, 60]
    assert table.loc["ablation", "hours"] == pytest.approx(60 * 36 / 3600)
    assert table.loc["monte-carlo", "hours"] == pytest.approx(240 * 36 / 3600)
    fill(ledger, campaigns.specs("ablation"))
    assert campaigns.progress(ledger.read()).set_index("campaign").loc["ablation", ["left", "hours"]].tolist() == [0, 0]


def test_merging_twice_adds_once_and_keeps_what_is_there(ledger: Ledger, tmp_path: Path) -> None:
    first, second = campaigns.specs("ablation")[:2]
    other = Ledger(tmp_path / "other.csv")
    fill(ledger, [first], seconds=1.0)
    fill(other, [first, second], seconds=2.0)
    assert ledger.merge(other.read()) == [second.run_id]
    assert ledger.merge(other.read()) == []
    assert ledger.read()["seconds"].tolist() == [1.0, 2.0]


# Packs


@pytest.fixture
def runs_on_disk(ledger: Ledger, tmp_path: Path) -> tuple[pd.DataFrame, list[Path]]:
    """Two of the three runs of the ledger, with files of random bytes, 30 MB in all."""
    fill(ledger, campaigns.specs("ablation")[:3])
    rows = ledger.read().head(2)
    generator, files = np.random.default_rng(0), []
    for folder, suffix, size in (("curves", "csv", 5_000), ("weights", "safetensors", 15_000_000)):
        for run_id in rows["run_id"]:
            files.append(tmp_path / "from" / folder / f"{run_id}.{suffix}")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            files[-1].write_bytes(generator.bytes(size))
    return rows, files


def folders(root: Path) -> dict[str, Path]:
    return {name: root / name for name in ("curves", "weights", "checkpoints")}


def test_what_is_packed_is_unpacked_in_pieces_of_16_mb(
    runs_on_disk: tuple[pd.DataFrame, list[Path]], tmp_path: Path
) -> None:
    rows, files = runs_on_disk
    pieces, left_out = packs.pack(rows, files, tmp_path / "out", "ablation")
    assert not left_out
    assert len(pieces) == math.ceil(30.01e6 / 16e6)
    assert max(path.stat().st_size for path in pieces) <= 16_000_000
    home = Ledger(tmp_path / "home" / "runs.csv")
    assert packs.unpack(reversed(pieces), home, folders(tmp_path / "home")) == rows["run_id"].tolist()
    assert home.read().equals(rows)
    for path in files:
        assert (tmp_path / "home" / path.parent.name / path.name).read_bytes() == path.read_bytes()
    assert packs.unpack(pieces, home, folders(tmp_path / "home")) == []


def test_a_pack_that_would_be_too_large_leaves_files_out_and_names_them(
    runs_on_disk: tuple[pd.DataFrame, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, files = runs_on_disk
    monkeypatch.setattr(packs, "PACK_MOST_BYTES", 21_000_000)
    pieces, left_out = packs.pack(rows, files, tmp_path / "out", "a")
    packs.unpack(pieces, Ledger(tmp_path / "home.csv"), folders(tmp_path / "home"))
    assert {path.parent.name for path in (tmp_path / "home").rglob("*.*")} == {"curves", "weights"}
    assert len(list((tmp_path / "home" / "weights").iterdir())) == 1
    assert left_out == files[-1:]


@pytest.mark.parametrize("damage", ["first piece missing", "last piece missing", "truncated", "not a pack"])
def test_a_pack_that_is_not_whole_changes_nothing(
    runs_on_disk: tuple[pd.DataFrame, list[Path]], tmp_path: Path, damage: str
) -> None:
    pieces = packs.pack(*runs_on_disk, tmp_path / "out", "ablation").pieces
    if damage == "truncated":
        pieces[0].write_bytes(pieces[0].read_bytes()[:-1000])
    elif damage == "not a pack":
        pieces = [Path(__file__)]
    else:
        pieces.pop(0 if damage.startswith("first") else -1)
    home = tmp_path / "home"
    with pytest.raises(ValueError, match=r"the pack is not whole|this is not a pack of runs"):
        packs.unpack(pieces, Ledger(home / "runs.csv"), folders(home))
    assert not home.exists()


@pytest.mark.parametrize("name", ["../escape.csv", "curves/../../0123456789ab.csv", "/x.csv", "other/x.csv"])
def test_a_pack_writes_nowhere_else(ledger: Ledger, tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in ("runs.csv", name):
            archive.addfile(tarfile.TarInfo(member), io.BytesIO())
    (tmp_path / "bad.tar.00").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="not a pack of runs"):
        packs.unpack([tmp_path / "bad.tar.00"], ledger, folders(tmp_path / "home"))


# The command


def test_a_run_that_diverges_does_not_block_its_campaign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = RunSpec("student", k=17, learning_rate=1e39)
    monkeypatch.setitem(campaigns.CAMPAIGNS, "tiny", lambda: [wild, RunSpec("student", k=17)])
    monkeypatch.setattr(study, "SMOKE_IMAGES", 50)
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path))
    words = ["campaign", "tiny", "--profile", "smoke", "--budget-minutes", "9", "--pack", str(tmp_path / "out")]
    for _again in range(2):
        assert command_line.main(words) == 1
        shown = capsys.readouterr()
        assert "tiny: 1 of 2 runs done" in shown.out
        assert "packed: tiny.tar.00" in shown.out
        assert re.search(r"^error: run \w{12}: .*lower the learning rate", shown.err)


def test_a_campaign_is_trained_packed_and_carried_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rehearsal: the very commands of a GPU machine, on fifty images and three tiny runs."""
    tiny = [RunSpec("student", k=17), RunSpec("kd_ig", k=17), RunSpec("kd", k=17, seed=1)]
    monkeypatch.setitem(campaigns.CAMPAIGNS, "tiny", lambda: tiny)
    monkeypatch.setattr(study, "SMOKE_IMAGES", 50)
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path / "away"))
    words = ["campaign", "tiny", "--profile", "smoke", "--at-once", "2", "--pack", str(tmp_path / "out")]
    assert command_line.main([*words, "--budget-minutes", "0"]) == 0
    assert "tiny: 0 of 3 runs done" in capsys.readouterr().out
    assert command_line.main([*words, "--budget-minutes", "10"]) == 0
    assert "tiny: 3 of 3 runs done" in capsys.readouterr().out

    away = open_study("smoke").ledger.read()
    monkeypatch.setenv("KDIG_WORKSPACE", str(tmp_path / "home"))
    pieces = [str(path) for path in (tmp_path / "out").iterdir()]
    assert command_line.main(["unpack", *pieces, "--profile", "smoke"]) == 0
    assert "3 runs added" in capsys.readouterr().out
    home = open_study("smoke")
    students = away[away["method"] != "teacher"].reset_index(drop=True)
    pd.testing.assert_frame_equal(home.ledger.read(), students)
    assert len(home.curve(students["run_id"][0])) == 2
