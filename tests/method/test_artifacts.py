"""Artifacts: only the file that the manifest names is loaded, and nothing is ever unpickled."""

import errno
import inspect
import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdig_utils.method import artifacts, models


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository; its folder of artifacts."""
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    return tmp_path / "artifacts"


@pytest.fixture
def student() -> models.Student:
    return models.student(17, seed=1).eval()


def publish(student: models.Student, half: bool = False) -> None:
    artifacts.publish("kd_k17", student, half, method="kd", k=17, test_accuracy=55.0)


@pytest.mark.parametrize("half", [False, True])
def test_published_network_comes_back(folder: Path, student: models.Student, half: bool) -> None:
    publish(student, half)
    loaded = artifacts.load("kd_k17")
    assert not loaded.training
    assert type(loaded) is models.Student
    for name, value in student.state_dict().items():
        found = loaded.state_dict()[name]
        expected = value.half().float() if half and value.is_floating_point() else value
        assert found.dtype == value.dtype, name
        assert torch.equal(found, expected), name


def test_half_precision_halves_the_file_and_hardly_moves_the_answers(folder: Path, student: models.Student) -> None:
    artifacts.save_weights(student, folder / "whole.safetensors")
    artifacts.save_weights(student, folder / "half.safetensors", half=True)
    numbers = models.count_parameters(student)
    assert (folder / "whole.safetensors").stat().st_size - (folder / "half.safetensors").stat().st_size >= 2 * numbers
    assert {value.dtype for value in load_file(folder / "half.safetensors").values()} == {torch.float16, torch.int64}
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loaded = artifacts.read_weights(models.student(17), folder / "half.safetensors")
    with torch.no_grad():
        assert torch.allclose(loaded(images), student(images), rtol=1e-2, atol=1e-3)


def test_half_precision_refuses_what_it_cannot_hold(folder: Path, student: models.Student) -> None:
    student.features[0][1].running_var.fill_(1e5)  # float16 ends at 65,504
    with pytest.raises(ValueError, match=r"features\.0\.1\.running_var.*float16"):
        artifacts.save_weights(student, folder / "half.safetensors", half=True)
    assert not (folder / "half.safetensors").exists()


def test_names_in_the_file_are_torchvisions(folder: Path, student: models.Student) -> None:
    publish(student)
    assert set(load_file(folder / "kd_k17.safetensors")) == set(student.state_dict())


def test_channels_last_weights_are_written_as_any_other(folder: Path, student: models.Student) -> None:
    before = models.weights_sha256(student)
    artifacts.save_weights(student.to(memory_format=torch.channels_last), folder / "x.safetensors")
    assert models.weights_sha256(artifacts.read_weights(models.student(17), folder / "x.safetensors")) == before


@pytest.mark.parametrize("where", [8, -1])
def test_tampered_file_is_refused(folder: Path, student: models.Student, where: int) -> None:
    publish(student)
    file = folder / "kd_k17.safetensors"
    content = bytearray(file.read_bytes())
    content[where] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(
        ValueError, match=r"kd_k17\.safetensors has SHA-256 [0-9a-f]{16}…, the manifest says [0-9a-f]{16}…: restore"
    ):
        artifacts.load("kd_k17")


def test_file_that_was_exchanged_for_another_network_is_refused(folder: Path, student: models.Student) -> None:
    publish(student)
    artifacts.save_weights(models.student(17, seed=2), folder / "kd_k17.safetensors")
    with pytest.raises(ValueError, match="the manifest says"):
        artifacts.load("kd_k17")


def test_unknown_name_lists_the_known_ones(folder: Path, student: models.Student) -> None:
    with pytest.raises(KeyError, match=r"no artifact 'teacher'.*none"):
        artifacts.load("teacher")
    publish(student)
    with pytest.raises(KeyError, match=r"no artifact 'kd_k5'.*kd_k17"):
        artifacts.load("kd_k5")


def test_missing_file_is_named(folder: Path, student: models.Student) -> None:
    publish(student)
    (folder / "kd_k17.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights at .*kd_k17\.safetensors: .*restore the file from git"):
        artifacts.load("kd_k17")


@pytest.mark.parametrize("content", ["truncated", "empty", "text"])
def test_file_that_is_not_whole_is_refused(folder: Path, student: models.Student, content: str) -> None:
    file = folder / "x.safetensors"
    artifacts.save_weights(student, file)
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:-100], "empty": b"", "text": b"not weights at all"}[content])
    with pytest.raises(ValueError, match="is not a whole safetensors file") as caught:
        artifacts.read_weights(models.student(17), file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("other", [models.student(15), models.teacher()], ids=["k=15", "teacher"])
def test_weights_of_another_architecture_are_refused(
    folder: Path, student: models.Student, other: torch.nn.Module
) -> None:
    artifacts.save_weights(student, folder / "x.safetensors")
    with pytest.raises(ValueError, match="these weights are not those of"):
        artifacts.read_weights(other, folder / "x.safetensors")


def test_pickle_under_a_safetensors_name_is_refused_and_not_executed(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    folder.mkdir()
    (folder / "x.safetensors").write_bytes(pickle.dumps(Payload()))
    torch.save({"payload": 1}, folder / "y.safetensors")
    for name in ("x", "y"):
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            artifacts.read_weights(models.student(17), folder / f"{name}.safetensors")
    assert not marker.exists()


def test_artifacts_have_no_way_to_unpickle() -> None:
    source = inspect.getsource(artifacts)
    assert not any(word in source for word in ("torch.load(", "import pickle", "joblib", "allow_pickle"))


def test_publishing_again_replaces_its_entry_and_keeps_the_others(folder: Path, student: models.Student) -> None:
    publish(student)
    artifacts.publish("student_k17", models.student(17, seed=3), False, method="student", k=17)
    publish(models.student(17, seed=4))
    assert set(artifacts.manifest()) == {"kd_k17", "student_k17"}
    assert models.weights_sha256(artifacts.load("kd_k17")) == models.weights_sha256(models.student(17, seed=4))
    assert artifacts.manifest()["kd_k17"]["test_accuracy"] == 55.0


def test_full_disk_leaves_the_old_weights(
    folder: Path, student: models.Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(student)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write kd_k17\..*safetensors in .*disk is full"):
        publish(models.student(17, seed=9))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_disk_that_takes_no_more_while_the_tensors_are_written_is_a_system_error(folder: Path) -> None:
    """A limit on file sizes stands for the full disk. safetensors' own writer would hide the system's reason."""
    file, student = folder / "x.safetensors", models.student(5)
    artifacts.save_weights(student, file)
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            artifacts.save_weights(student, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert file.read_bytes() == before
    assert len(list(folder.iterdir())) == 1


def test_committed_artifacts_are_those_of_the_manifest() -> None:
    """Every network of the repository loads, checked."""
    for name in artifacts.manifest():
        assert not artifacts.load(name).training, name


# Weights and manifest, which belong together


class Killed(BaseException):
    """What no `except Exception` stops, as a kill."""


def at_every_operation(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], check: Callable[[], None]) -> int:
    """Let `act` be killed before each of its file operations, and `check` what it leaves; how many there are."""
    operations = [(os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "write_bytes"), (Path, "write_text")]
    for kill_at in range(1000):
        calls = 0

        def stopping(original: Callable, kill_at: int = kill_at) -> Callable:
            def call(*arguments: object, **options: object) -> object:
                nonlocal calls
                ours = not str(arguments[0]).endswith(".lock")  # a lock of a dead process is filelock's to free
                calls += ours
                if ours and calls > kill_at:
                    raise Killed
                return original(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for owner, name in operations:
                patch.setattr(owner, name, stopping(getattr(owner, name)))
            try:
                act()
            except Killed:
                pass
            else:
                return kill_at
        check()
    raise AssertionError("does not end")


def test_a_kill_within_publish_leaves_the_old_network_or_the_new_one(
    folder: Path, student: models.Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = models.student(17, seed=9).eval()
    publish(student)
    old, new, seen = models.weights_sha256(student), models.weights_sha256(second), set()

    def check() -> None:
        found = models.weights_sha256(artifacts.load("kd_k17"))
        assert found in (old, new)
        seen.add(found)
        publish(student)

    points = at_every_operation(monkeypatch, lambda: publish(second), check)
    assert seen == {old, new}
    assert models.weights_sha256(artifacts.load("kd_k17")) == new
    assert len([path for path in folder.iterdir() if path.suffix != ".part"]) == 2, "nothing is left over"
    print(f"{points} kills")


def test_a_kill_within_a_renaming_leaves_both_names_or_the_new_one(
    folder: Path, student: models.Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    better = models.student(17, seed=9).eval()

    def start() -> None:
        publish(student)
        artifacts.publish("next", better, False, method="kd", k=17)

    def check() -> None:
        found = {name: models.weights_sha256(artifacts.load(name)) for name in artifacts.manifest()}
        before = {"kd_k17": models.weights_sha256(student), "next": models.weights_sha256(better)}
        assert found in (before, {"kd_k17": models.weights_sha256(better)})
        start()

    start()
    at_every_operation(monkeypatch, lambda: artifacts.rename("next", "kd_k17"), check)
    assert set(artifacts.manifest()) == {"kd_k17"}
    assert models.weights_sha256(artifacts.load("kd_k17")) == models.weights_sha256(better)


def test_parallel_publishes_lose_nothing(folder: Path) -> None:
    code = (
        "import sys, torch\nfrom kdig_utils.method import artifacts\n"
        "for n in range(5):\n"
        "    artifacts.publish(f'n{sys.argv[1]}_{n}', torch.nn.Linear(2, 2), False, method='kd', k=17)"
    )
    publishing = [subprocess.Popen([sys.executable, "-c", code, str(number)]) for number in range(2)]
    assert [process.wait(240) for process in publishing] == [0, 0]
    assert set(artifacts.manifest()) == {f"n{number}_{n}" for number in range(2) for n in range(5)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"file": "../kd_k17.safetensors"},
        {"file": "/kd_k17.safetensors"},
        {"file": "sub/kd_k17.safetensors"},
        {"file": ".hidden.safetensors"},
        {"sha256": None},
        {"sha256": "abc"},
        {"sha256": "g" * 64},
        {"method": 3},
        {"k": "many"},
    ],
)
def test_an_entry_that_names_no_file_here_or_no_hash_is_refused(
    folder: Path, student: models.Student, wrong: dict
) -> None:
    publish(student)
    found = artifacts.manifest()
    (folder / "manifest.json").write_text(json.dumps({"kd_k17": {**found["kd_k17"], **wrong}}))
    with pytest.raises(ValueError, match=rf"manifest\.json, kd_k17, {next(iter(wrong))}:.*restore it from git"):
        artifacts.load("kd_k17")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"kd_k17": 3}', b"\xff", b"<<<<<<< HEAD\n{}"])
def test_a_damaged_manifest_is_refused_in_words_and_not_overwritten(
    folder: Path, student: models.Student, content: bytes
) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_bytes(content)
    for use in (artifacts.manifest, lambda: publish(student)):
        with pytest.raises(ValueError, match=r"manifest\.json.*restore it from git"):
            use()
    assert (folder / "manifest.json").read_bytes() == content


def test_the_hash_of_a_state_is_that_of_its_network(student: models.Student) -> None:
    state = artifacts.state_of(artifacts.content_of(student, half=False), Path("x"))
    assert models.state_sha256(state) == models.weights_sha256(student)
