"""A pack is checked whole before anything of it is written, and never makes what is here worse."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdig_utils.experiments import checkpoints, packs
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.runs import student_run
from kdig_utils.experiments.side_by_side import fit
from kdig_utils.method import artifacts, models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.spec import RunSpec

SPEC = RunSpec("student", k=17, epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def student() -> models.Student:
    return models.student(17, seed=1).eval()


@pytest.fixture
def away(tmp_path: Path, student: models.Student) -> dict[str, bytes]:
    """The members of a good pack of one run, without their hashes."""
    ledger, weights = Ledger(tmp_path / "away" / "runs.csv"), tmp_path / "away" / f"{SPEC.run_id}.safetensors"
    ledger.append(SPEC, test_accuracy=50.0, weights_sha256=models.weights_sha256(student))
    artifacts.save_weights(student, weights)
    return {"runs.csv": ledger.path.read_bytes(), f"weights/{SPEC.run_id}.safetensors": weights.read_bytes()}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def unpack(content: bytes, home: Path) -> list[str]:
    piece = home.parent / "p.tar.00"
    piece.write_bytes(content)
    return packs.unpack([piece], Ledger(home / "runs.csv"), {kind: home / kind for kind in packs.SUFFIXES})


def packed(members: list[tuple[str, bytes]], hashes: dict[str, str] | None = None) -> bytes:
    """A tar archive; hashes of None are the right ones, and no `sha256.json` is there where they are empty."""
    right = {name: hashlib.sha256(data).hexdigest() for name, data in members}
    listed = json.dumps(right if hashes is None else hashes).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in [*members, *([] if hashes == {} else [("sha256.json", listed)])]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_a_good_pack_comes_home(away: dict[str, bytes], home: Path) -> None:
    assert unpack(packed(list(away.items())), home) == [SPEC.run_id]
    assert (home / "weights" / f"{SPEC.run_id}.safetensors").read_bytes() == away[f"weights/{SPEC.run_id}.safetensors"]


def other_weights(_members: list[tuple[str, bytes]]) -> bytes:
    return artifacts.content_of(models.student(17, seed=2), half=False)


BAD: dict[str, Callable[[list[tuple[str, bytes]]], bytes]] = {
    "no hashes": lambda m: packed(m, {}),
    "one hash missing": lambda m: packed(m, {m[0][0]: hashlib.sha256(m[0][1]).hexdigest()}),
    "a hash too many": lambda m: packed(m, {**{n: hashlib.sha256(d).hexdigest() for n, d in m}, "curves/x.csv": "0"}),
    "hashes that are a list": lambda m: packed([*m, ("sha256.json", b"[1]")], {}),
    "hashes that are no JSON": lambda m: packed([*m, ("sha256.json", b"\xff{")], {}),
    "a member twice": lambda m: packed([*m, m[0]]),
    "another run's weights": lambda m: packed([m[0], (m[1][0], other_weights(m))]),
    "weights that are none": lambda m: packed([m[0], (m[1][0], b"none")]),
    "no ledger": lambda m: packed([("runs.csv", b"a,b\n1,2\n"), m[1]]),
    "no rows": lambda m: packed([m[1]]),
    "compressed": lambda m: gzip.compress(packed(m)),
    "a bomb": lambda m: gzip.compress(bytes(200_000_000), 1),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_pack_is_refused_in_words_and_writes_nothing(away: dict[str, bytes], home: Path, bad: str) -> None:
    with pytest.raises(ValueError, match=r"pack|ledger"):
        unpack(BAD[bad](list(away.items())), home)
    assert not home.exists()


def test_links_and_what_is_too_large_are_refused(
    away: dict[str, bytes], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO(packed(list(away.items())))
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        link = tarfile.TarInfo("curves/x.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "/x"
        tar.addfile(link)
    with pytest.raises(ValueError, match="links"):
        unpack(buffer.getvalue(), home)
    monkeypatch.setattr(packs, "UNPACK_MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="too large for a pack"):
        unpack(packed(list(away.items())), home)
    assert not home.exists()


def test_weights_here_stay_if_they_are_the_rows_and_are_replaced_if_not(away: dict[str, bytes], home: Path) -> None:
    unpack(packed(list(away.items())), home)
    file = home / "weights" / f"{SPEC.run_id}.safetensors"
    right, before = file.read_bytes(), file.stat().st_ino
    unpack(packed(list(away.items())), home)
    assert file.stat().st_ino == before
    for damaged in (right[:-1] + bytes([right[-1] ^ 1]), right[:100]):
        file.write_bytes(damaged)
        assert unpack(packed(list(away.items())), home) == []
        assert file.read_bytes() == right


def test_a_checkpoint_replaces_only_one_that_is_less_far(
    away: dict[str, bytes], home: Path, tmp_path: Path, sample_train: ImageSet, sample_test: ImageSet
) -> None:
    spec, saved = RunSpec("student", k=17, epochs=3, batch_size=8), []
    train, test = sample_train.subset(torch.arange(16)), sample_test.subset(torch.arange(10))
    run = student_run(spec, train, test, checkpoint=tmp_path / "c.pt")
    fit(run, report=lambda _line: saved.append((tmp_path / "c.pt").read_bytes()))
    less, more = saved[0], saved[1]
    assert checkpoints.read(less)["epoch"] < checkpoints.read(more)["epoch"]
    here = home / "checkpoints" / f"{spec.run_id}.pt"
    rows = ("runs.csv", away["runs.csv"])
    # In this order: what comes, and what is here afterwards.
    for comes, stays in ((b"damaged", None), (less, less), (more, more), (less, more), (b"damaged", more)):
        unpack(packed([rows, (f"checkpoints/{spec.run_id}.pt", comes)]), home)
        assert (here.read_bytes() if here.exists() else None) == stays
    here.write_bytes(b"damaged here")
    unpack(packed([rows, (f"checkpoints/{spec.run_id}.pt", less)]), home)
    assert here.read_bytes() == less
    unpack(packed([rows, (f"checkpoints/{SPEC.run_id}.pt", more)]), home)  # of a run that is in the ledger
    assert not (home / "checkpoints" / f"{SPEC.run_id}.pt").exists()
