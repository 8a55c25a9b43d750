"""Weights of chosen runs: safetensors with a manifest of SHA-256, checked before use. Nothing is ever unpickled."""

import hashlib
import json
import re
import tempfile
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, StringConstraints, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from kdig_utils.locks import locked
from kdig_utils.method import models
from kdig_utils.method.checks import Sha256
from kdig_utils.method.spec import METHODS
from kdig_utils.paths import artifacts_folder, reading, replacing


class Entry(BaseModel):
    """What an entry of the manifest must say."""

    file: Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*\.safetensors$")]  # in artifacts/, and nowhere else
    sha256: Sha256
    method: Annotated[str, StringConstraints(pattern=f"^(teacher|{'|'.join(METHODS)})$")]
    k: int


ENTRIES = TypeAdapter(dict[str, Entry])


def save_weights(model: torch.nn.Module, path: Path, half: bool = False) -> None:
    """Write the state dict as safetensors, in float32 or float16, under torchvision's names; raises as `content_of`."""
    content = content_of(model, half)
    with replacing(path) as part:
        part.write_bytes(content)


def content_of(model: torch.nn.Module, half: bool) -> bytes:
    """The state dict as a safetensors file holds it.

    Raises:
        ValueError: a value is too large for float16.
    """
    state = {}
    for name, value in model.state_dict().items():
        kept = value.detach().cpu().contiguous()
        state[name] = kept.half() if half and kept.is_floating_point() else kept
        if not torch.equal(state[name].isfinite(), kept.isfinite()):
            raise ValueError(f"{name} holds values too large for float16 (above 65,504): save these weights in float32")
    return save_safetensors(state)


def read_weights(
    model: torch.nn.Module, path: Path, sha256: str | None = None, weights_sha256: str | None = None
) -> torch.nn.Module:
    """Load a safetensors file into `model`, as float32, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another SHA-256 than `sha256`, or weights of another (`models.weights_sha256`) than
            `weights_sha256`, a damaged file, or the weights of another architecture.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: train them, or restore the file from git")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"{path.name} has SHA-256 {found[:16]}…, the manifest says {sha256[:16]}…: restore the file from git"
        )
    state = state_of(content, path)
    if weights_sha256 and (found := models.state_sha256(state)) != weights_sha256:
        raise ValueError(
            f"{path} holds weights {found[:12]}, the run of the ledger ended with {weights_sha256[:12]}: delete the "
            "file, and unpack it again or train the run again"
        )
    return models.load_state(model, state).eval().to(memory_format=torch.channels_last)


def state_of(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    """The state dict, in float32, that a safetensors file holds.

    Raises:
        ValueError: it is not whole; the message names `path`.
    """
    try:
        state = load_safetensors(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): restore or train it again") from error
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def rounded(model: torch.nn.Module, method: str, k: int) -> torch.nn.Module:
    """The network as it comes back from a file in float16.

    Raises:
        ValueError: as `save_weights`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.safetensors"
        save_weights(model, path, half=True)
        return read_weights(model_for(method, k), path)


def model_for(method: str, k: int, stem_stride: int = 1) -> torch.nn.Module:
    """An untrained network of the architecture that `method` trains: the teacher, or a student without `k` blocks."""
    return models.teacher() if method == "teacher" else models.student(k, stem_stride=stem_stride)


def manifest() -> dict[str, dict]:
    """What the repository holds: for each name its file, SHA-256, precision, run and accuracy; empty if nothing.

    Raises:
        ValueError: the manifest is damaged, or names a file elsewhere or no SHA-256.
    """
    path = artifacts_folder() / "manifest.json"
    content = path.read_bytes() if path.is_file() else b"{}"
    with reading(path):
        ENTRIES.validate_json(content)
    return json.loads(content)


def publish(name: str, model: torch.nn.Module, half: bool, **facts: object) -> None:
    """Write `model` to the repository as `name` and enter it, with `facts` about its run, in the manifest.

    The old file stays until the manifest names the new one: a kill leaves the old network or the new one.
    """
    folder = artifacts_folder()
    with locked(folder / "manifest.json"):
        known, content, file = manifest(), content_of(model, half), f"{name}.safetensors"
        sha256 = hashlib.sha256(content).hexdigest()
        if any(entry["file"] == file and entry["sha256"] != sha256 for entry in known.values()):
            file = f"{name}.{sha256[:12]}.safetensors"
        with replacing(folder / file) as part:
            part.write_bytes(content)
        precision = "float16" if half else "float32"
        _write_manifest({**known, name: {"file": file, "sha256": sha256, "precision": precision, **facts}})


def rename(old: str, new: str) -> None:
    """Give a published network another name, its file stays; what had that name leaves the repository."""
    with locked(artifacts_folder() / "manifest.json"):
        known = manifest()
        entry = known.pop(old)
        _write_manifest({**known, new: entry})


def _write_manifest(entries: dict[str, dict]) -> None:
    """Write the manifest, then remove files that it does not name any more, or that a kill left unnamed."""
    folder, names = artifacts_folder(), {*manifest(), *entries}
    with replacing(folder / "manifest.json") as part:
        part.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    for path in set(folder.glob("*.safetensors")) - {folder / entry["file"] for entry in entries.values()}:
        if re.sub(r"(\.[0-9a-f]{12})?\.safetensors$", "", path.name) in names:
            path.unlink()


def load(name: str) -> torch.nn.Module:
    """The published network `name` (`teacher`, or a method and its k, as `kd_ig_k5`), in evaluation mode.

    Raises:
        KeyError: no such artifact; the message lists those there are.
        ValueError: the file is not the one in the manifest.
    """
    known = manifest()
    if name not in known:
        held = ", ".join(sorted(known)) or "none"
        raise KeyError(f"no artifact {name!r}: the repository holds {held}; choose one of them, or restore it from git")
    entry = known[name]
    return read_weights(model_for(entry["method"], entry["k"]), artifacts_folder() / entry["file"], entry["sha256"])
