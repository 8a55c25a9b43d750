"""Stores that are bad by construction, each with what its refusal must name: signals, packs, artifacts, checkpoints."""

import functools
import hashlib
import io
import json
import math
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bad_files import WORKSHOP, environment
from bad_values import FEW, NONSENSE, NOT_FINITE, Case
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from kdig_utils.experiments import checkpoints, packs
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.experiments.runs import student_run
from kdig_utils.method import artifacts, models, signals
from kdig_utils.method.signals import SignalSettings
from kdig_utils.method.spec import RunSpec

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NONSENSE,
    lambda values: st.lists(values, max_size=2) | st.dictionaries(NONSENSE, values, max_size=2),
    max_leaves=4,
)
SPEC = RunSpec("student", k=17, epochs=2, batch_size=8)


@st.composite
def other_bytes(draw: st.DrawFn, content: bytes, most: int = 10**9) -> tuple[str, bytes]:
    """The content with another byte, cut, with bytes too many, or replaced, and what was done in words."""
    place, byte = draw(st.integers(0, min(len(content), most) - 1)), draw(st.integers(1, 255))
    way = draw(st.sampled_from(["byte", "byte", "byte", "cut", "more", "other"]))
    if way == "byte":
        return f"byte {place} ^ {byte}", content[:place] + bytes([content[place] ^ byte]) + content[place + 1 :]
    if way == "cut":
        return f"cut at {place}", content[:place]
    if way == "more":
        return f"{byte} inserted at {place}", content[:place] + bytes([byte]) + content[place:]
    other = draw(st.binary(max_size=30))
    return f"{other!r} in its place", other


# Teacher signals

SETTINGS = SignalSettings(n_steps=2)


@functools.cache
def teacher() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2)


@functools.cache
def store() -> dict[str, bytes]:
    """The files of a good store of six images."""
    folder, generator = WORKSHOP / "store", torch.Generator().manual_seed(0)
    manifest = signals.manifest_of(teacher(), FEW, SETTINGS)
    arrays = signals.open_store(folder, manifest, 4)
    rows = {
        "logits": torch.randn(6, 10, generator=generator),
        "maps": torch.rand(6, 32, 32, generator=generator).half(),
    }
    rows |= {"attention": torch.rand(6, 4, generator=generator), "error": torch.rand(6, generator=generator)}
    signals.write_rows(arrays, torch.arange(6), rows)
    signals.finish_store(folder, manifest, arrays)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def open_changed(**files: bytes | None) -> tuple[Tensor, ...]:
    """The signals of a store some of whose files have another content, or are gone."""
    folder = WORKSHOP / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in (store() | files).items():
        if content is not None:
            (folder / name).write_bytes(content)
    return tuple(tensor.clone() for tensor in signals.open_signals(teacher(), FEW, folder, SETTINGS).tensors())


def finish(name: str, place: int, value: float) -> None:
    """Enter a store with another value in the manifest, as what was computed ends."""
    folder = WORKSHOP / "unfinished"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(WORKSHOP / "store", folder)
    arrays = signals.open_store(folder, manifest := signals.manifest_of(teacher(), FEW, SETTINGS), 4)
    arrays[name].ravel()[place] = value
    signals.finish_store(folder, manifest, arrays)


def same_signals(found: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, found, open_changed()))


def in_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@st.composite
def unhashed_stores(draw: st.DrawFn) -> Case:
    """Stores from before there were hashes, unfinished ones, and ones of other images."""
    way, good = draw(st.sampled_from(["row", "shape", "type", "done", "JSON", "images"])), store()
    arrays = {name: np.load(io.BytesIO(good[f"{name}.npy"])) for name in (*signals.SIGNALS, "done")}
    manifest, row = json.loads(good["manifest.json"]), draw(st.integers(0, 5))
    told = f"{way}, {row}"
    if way == "images":
        other = {**manifest, "data_md5": draw(NONSENSE)}
        return Case(f"of {other['data_md5']}", lambda: signals.open_store(WORKSHOP / "store", other, 4), ("data_md5",))
    if way == "row":
        for name in ("logits", "maps", "attention"):
            arrays[name][row] = 0
    elif way == "done":
        done = draw(st.lists(st.booleans(), min_size=6, max_size=6).filter(lambda done: not all(done)))
        arrays["done"], told = np.array(done), f"done {done}"
    elif way == "type":
        name = draw(st.sampled_from(["logits", "maps", "error", "attention"]))
        arrays[name] = arrays[name].astype(draw(st.sampled_from(["f8", "f2" if name != "maps" else "f4"])))
        told = f"{name} as {arrays[name].dtype}"
    elif way == "shape":
        name = draw(st.sampled_from(["logits", "maps", "error"]))
        arrays[name] = np.concatenate([arrays[name], arrays[name][: row + 1]])
        told += f" of {name}"
    files: dict[str, bytes | None] = {f"{name}.npy": in_npy(array) for name, array in arrays.items()}
    files["manifest.json"] = json.dumps({**manifest, "arrays": None}).encode()
    if way == "JSON":
        value = draw(JSON)
        files["manifest.json"], told = json.dumps(value).encode(), f"manifest {value!r}"
    return Case(told, lambda: open_changed(**files), ("changed",))


@st.composite
def stores(draw: st.DrawFn) -> Case:
    way = draw(
        st.sampled_from(
            ["bytes"] * 3
            + ["unhashed"] * 4
            + ["array", "value", "value", "gone", "manifest", "manifest", "older", "arrays"]
        )
    )
    name = draw(st.sampled_from(["logits", "maps", "attention", "error"]))
    manifest, named, right = json.loads(store()["manifest.json"]), ("changed",), None
    if way == "unhashed":
        return draw(unhashed_stores())
    if way == "bytes":
        name = draw(st.sampled_from(sorted(store())))
        told, content = draw(other_bytes(store()[name], 400))
        right = same_signals if name in ("manifest.json", "done.npy") else None
        return Case(f"{name}, {told}", lambda: open_changed(**{name: content}), named, right)
    array = np.load(io.BytesIO(store()[f"{name}.npy"]))
    if way == "array":
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        kind = draw(st.sampled_from(["f2", "f4", "f8", "i8", "u1", "S1"]))
        if shape == (6, 4) and kind == "f4":
            shape = (6,)
        content = in_npy(np.zeros(shape, kind))
        return Case(f"{name}, zeros {shape} {kind}", lambda: open_changed(**{f"{name}.npy": content}), named)
    if way == "gone":
        name = draw(st.sampled_from(sorted(store())))
        return Case(f"{name} gone", lambda: open_changed(**{name: None}), named)
    if way == "value":  # of a store from before there were hashes
        del manifest["arrays"]
        wrong = {
            "maps": st.floats(1.01, 1e4) | st.floats(-1e4, -0.01) | NOT_FINITE, "logits": NOT_FINITE,
            "attention": st.floats(-1e4, -0.01) | NOT_FINITE, "error": st.floats(-1e4, -0.01) | st.just(-math.inf),
        }[name]  # fmt: skip
        value, place = draw(wrong), draw(st.integers(0, array.size - 1))
        array.ravel()[place] = value
        if draw(st.booleans()):
            return Case(f"{name}[{place}] = {value}, finished", lambda: finish(name, place, value), ("unfinished",))
        new = {f"{name}.npy": in_npy(array), "manifest.json": json.dumps(manifest).encode()}
        return Case(f"{name}[{place}] = {value} without hashes", lambda: open_changed(**new), named)
    if way == "older":
        del manifest["arrays"]
        told, right, named = "no hashes", same_signals, ()
    elif way == "arrays":
        key = draw(st.sampled_from(["sha256", "shape", "dtype"]))
        manifest["arrays"][name][key] = draw(JSON)
        told = f"arrays, {name}, {key} = {manifest['arrays'][name][key]!r}"
    else:
        key = draw(st.sampled_from(["teacher_sha256", "data_md5", "settings", "indices", "arrays"]))
        manifest[key] = draw(JSON.filter(lambda value: key != "arrays" or value is not None))
        told, named = f"manifest, {key} = {manifest[key]!r}", (key, "changed")
    content = json.dumps(manifest).encode()
    return Case(told, lambda: open_changed(**{"manifest.json": content}), named, right)


# Packs


@functools.cache
def members() -> dict[str, bytes]:
    """The members of a good pack of one run, without their hashes."""
    student = models.student(17, seed=1).eval()
    ledger, run_id = Ledger(WORKSHOP / "away.csv"), SPEC.run_id
    ledger.append(SPEC, test_accuracy=50.0, weights_sha256=models.weights_sha256(student))
    weights = artifacts.content_of(student, half=False)
    curve = b"epoch,train_loss\n1,0.5\n"
    return {
        "runs.csv": ledger.path.read_bytes(),
        f"curves/{run_id}.csv": curve,
        f"weights/{run_id}.safetensors": weights,
    }


def in_tar(content: dict[str, bytes], hashes: dict[str, Any] | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    listed = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()} if hashes is None else hashes
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in {"sha256.json": json.dumps(listed).encode(), **content}.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind if name in ("runs.csv",) else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def unpack(*pieces: bytes) -> dict[str, bytes]:
    """What a pack brings home: all files that are there afterwards; nothing where it is refused."""
    home, away = WORKSHOP / "home", WORKSHOP / "away"
    for folder in (home, away):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for number, content in enumerate(pieces):
        (away / f"pack.tar.{number:02d}").write_bytes(content)
    try:
        folders = {kind: home / kind for kind in (*packs.SUFFIXES, "flights", "first_calls")}
        packs.unpack(sorted(away.iterdir()), Ledger(home / "runs.csv"), folders)
    except ValueError:
        if brought := files_of(home):
            raise AssertionError(f"refused, and {sorted(brought)} written") from None
        raise
    return files_of(home)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_packed(found: dict[str, bytes]) -> bool:
    return {name: content for name, content in found.items() if not name.startswith(".")} == members()


@st.composite
def pack_files(draw: st.DrawFn) -> Case:
    content, named, run_id = dict(members()), ("pack", "runs.csv"), SPEC.run_id
    way = draw(
        st.sampled_from(
            ["bytes"] * 3 + ["name", "hashes", "member", "row", "weights", "gone", "piece", "kind", "split"]
        )
    )
    if way == "bytes":
        told, new = draw(other_bytes(in_tar(content), draw(st.sampled_from([6000, 10**9]))))
        return Case(told, lambda: unpack(new), named, as_packed)
    if way == "split":
        whole = in_tar(content)
        cut = draw(st.integers(1, len(whole) - 1))
        return Case(f"two pieces, cut at {cut}", lambda: unpack(whole[:cut], whole[cut:]), right=as_packed)
    if way == "piece":
        whole = in_tar(content)
        cut = draw(st.integers(1, len(whole) - 1))
        return Case(f"the piece from {cut}", lambda: unpack(whole[cut:]), named, as_packed)
    hashes: dict[str, Any] | None = None
    kind = tarfile.REGTYPE
    name = draw(st.sampled_from(sorted(content)))
    told = f"{way}, {name}"
    if way == "name":
        odd = draw(
            st.sampled_from(
                ["../{}", "/{}", "curves/../{}", "weights/.{}", "{}/x", "other/{}", "curves/a/{}", "", "{}"]
            )
        )
        told += f" as {odd.format(draw(NONSENSE))}"
        content[told.split(" as ")[1]] = content.pop(name)
    elif way == "hashes":
        hashes = {each: hashlib.sha256(data).hexdigest() for each, data in content.items()}
        value = draw(JSON.filter(lambda value: value is not None))
        if draw(st.booleans()):
            hashes[name], told = value, told + f" = {value!r}"
        else:
            hashes, told = value, f"hashes {value!r}"
    elif way in ("member", "row"):
        name = "runs.csv" if way == "row" else name
        told, content[name] = draw(other_bytes(content[name], 600))
        told += f" of {name}"
        if way == "member":
            hashes = {each: hashlib.sha256(data).hexdigest() for each, data in members().items()}
        else:
            return Case(told, lambda: unpack(in_tar(content)), named, rows_that_may_be)
    elif way == "weights":
        told, content[f"weights/{run_id}.safetensors"] = draw(other_bytes(content[f"weights/{run_id}.safetensors"]))
        return Case(f"weights, {told}", lambda: unpack(in_tar(content)), (run_id,), weights_that_are_the_same)
    elif way == "gone":
        hashes = {each: hashlib.sha256(data).hexdigest() for each, data in content.items()}
        del content[name]
    else:
        kind = draw(
            st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
        )
        told = f"runs.csv as {kind!r}"
    return Case(told, lambda: unpack(in_tar(content, hashes, kind)), named)


def rows_that_may_be(found: dict[str, bytes]) -> bool:
    """A changed byte of a row that was packed so is refused, or changes what no check can know, as an accuracy."""
    rows = Ledger(WORKSHOP / "home" / "runs.csv").read()
    return bool(rows["run_id"].isin([SPEC.run_id]).all())


def weights_that_are_the_same(found: dict[str, bytes]) -> bool:
    weights = found[f"weights/{SPEC.run_id}.safetensors"]
    return models.state_sha256(artifacts.state_of(weights, Path("it"))) == models.weights_sha256(
        models.student(17, seed=1)
    )


# Published networks


@functools.cache
def published() -> tuple[dict[str, Any], bytes]:
    """The manifest of a good folder of artifacts, with one student, and its weights."""
    with environment(KDIG_ROOT=str(WORKSHOP / "published")):
        facts = {"method": "student", "k": 17, "test_accuracy": 50.0, "run_id": SPEC.run_id}
        artifacts.publish("student_k17", models.student(17, seed=1), half=False, **facts)
        return artifacts.manifest(), (artifacts.artifacts_folder() / "student_k17.safetensors").read_bytes()


def load_published(name: str, manifest: bytes, weights: bytes) -> str:
    published()
    folder = WORKSHOP / "published" / "artifacts"
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "student_k17.safetensors").write_bytes(weights)
    (folder.parent / "student_k17.safetensors").write_bytes(weights)  # outside, where no manifest may reach
    with environment(KDIG_ROOT=str(WORKSHOP / "published")):
        return models.weights_sha256(artifacts.load(name))


def the_student(sha256: str) -> bool:
    return sha256 == models.weights_sha256(models.student(17, seed=1))


@st.composite
def artifact_files(draw: st.DrawFn) -> Case:
    manifest, weights = published()
    way = draw(st.sampled_from(["weights", "manifest", "entry", "entry", "name", "true hash"]))
    name, named, right = "student_k17", ("manifest.json", "student_k17", "no weights at"), None
    content = json.dumps(manifest).encode()
    if way == "weights":
        told, weights = draw(other_bytes(weights))
    elif way == "manifest":
        told, content = draw(other_bytes(content))
        right = the_student
    elif way == "name":
        name = told = draw(NONSENSE)
        named = (name,)
    elif way == "true hash":  # of weights that were damaged before they were entered
        told, weights = draw(other_bytes(weights, 400))
        entry = {**manifest[name], "sha256": hashlib.sha256(weights).hexdigest()}
        content = json.dumps({name: entry}).encode()
        named, right = ("student_k17", "weights"), the_student
    else:
        key = draw(st.sampled_from(["file", "file", "sha256", "k", "method"]))
        paths = st.sampled_from(
            ["../student_k17.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors", "x.pt"]
        )
        whole = st.integers().filter(lambda n: n != 17) | st.sampled_from(range(3, 17, 2))
        value: Any = draw(
            {"file": paths | paths.map(str) | JSON, "sha256": JSON, "k": whole | JSON, "method": JSON | NONSENSE}[key]
        )
        entry = {**manifest[name], key: value}
        if draw(st.integers(0, 5)) == 0:
            del entry[key]
            value = "gone"
        told, content = f"{key} = {value!r}", json.dumps({name: entry}).encode()
        named = ("manifest.json", f"k {value}", "weights", name)
    return Case(f"{way}, {told}", lambda: load_published(name, content, weights), named, right)


# Checkpoints


@functools.cache
def checkpoint() -> bytes:
    """A good checkpoint of a run that has just begun."""
    run = student_run(SPEC, FEW, FEW, checkpoint=WORKSHOP / "run.pt")
    checkpoints.save(run)
    return (WORKSHOP / "run.pt").read_bytes()


@functools.cache
def checkpoint_of_an_earlier_version() -> bytes:
    return checkpoint().partition(b"\n")[2]


def read_checkpoint(content: bytes) -> dict[str, Any]:
    path = WORKSHOP / "changed.pt"
    path.write_bytes(content)
    return checkpoints.read(path)


def same_checkpoint(found: dict[str, Any]) -> bool:
    good = checkpoints.read(checkpoint())
    return models.state_sha256(found["model"]) == models.state_sha256(good["model"]) and all(
        found[name] == good[name] for name in ("run_id", "spec", "epoch", "position", "curve")
    )


@st.composite
def checkpoint_files(draw: st.DrawFn) -> Case:
    make: Callable[[], bytes] = draw(st.sampled_from([checkpoint, checkpoint, checkpoint_of_an_earlier_version]))
    most: SearchStrategy[int] = st.sampled_from([100, 3000, 10**9])
    told, content = draw(other_bytes(make(), draw(most)))
    return Case(f"{make.__name__}, {told}", lambda: read_checkpoint(content), ("changed.pt",), same_checkpoint)
