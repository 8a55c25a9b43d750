"""Weights of chosen runs: safetensors with a manifest of SHA-256, checked before use. Nothing is ever unpickled."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from kdig_utils.method import models
from kdig_utils.paths import artifacts_folder, replacing


def save_weights(model: torch.nn.Module, path: Path, half: bool = False) -> None:
    """Write the state dict as safetensors, in float32 or float16, under torchvision's names.

    Raises:
        ValueError: a value is too large for float16; nothing was written.
    """
    state = {}
    for name, value in model.state_dict().items():
        kept = value.detach().cpu().contiguous()
        state[name] = kept.half() if half and kept.is_floating_point() else kept
        if not torch.equal(state[name].isfinite(), kept.isfinite()):
            raise ValueError(f"{name} holds values too large for float16 (above 65,504): save these weights in float32")
    with replacing(path) as part:
        part.write_bytes(save_safetensors(state))


def read_weights(model: torch.nn.Module, path: Path, sha256: str | None = None) -> torch.nn.Module:
    """Load a safetensors file into `model`, as float32, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another SHA-256 than `sha256`, a damaged file, or the weights of another architecture.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}: train them, or restore the file from git")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(
            f"{path.name} has SHA-256 {found[:16]}…, the manifest says {sha256[:16]}…: restore the file from git"
        )
    try:
        state = load_safetensors(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): restore or train it again") from error
    floats = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    return models.load_state(model, floats).eval().to(memory_format=torch.channels_last)


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
    """What the repository holds: for each name its file, SHA-256, precision, run and accuracy; empty if nothing."""
    path = artifacts_folder() / "manifest.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def publish(name: str, model: torch.nn.Module, half: bool, **facts: object) -> None:
    """Write `model` to the repository as `name` and enter it, with `facts` about its run, in the manifest."""
    path = artifacts_folder() / f"{name}.safetensors"
    save_weights(model, path, half)
    entry = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "precision": "float16" if half else "float32",
        **facts,
    }
    _write_manifest({**manifest(), name: entry})


def rename(old: str, new: str) -> None:
    """Give a published network another name; what had that name leaves the repository."""
    known = manifest()
    entry = known.pop(old)
    file = f"{new}.safetensors"
    shared = any(other["file"] == entry["file"] for other in known.values())
    (shutil.copyfile if shared else os.replace)(artifacts_folder() / entry["file"], artifacts_folder() / file)
    _write_manifest({**known, new: {**entry, "file": file}})


def _write_manifest(entries: dict[str, dict]) -> None:
    with replacing(artifacts_folder() / "manifest.json") as part:
        part.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")


def load(name: str) -> torch.nn.Module:
    """The published network `name` (`teacher`, or a method and its k, as `kd_ig_k5`), in evaluation mode.

    Raises:
        KeyError: no such artifact; the message lists those there are.
        ValueError: the file is not the one in the manifest.
    """
    known = manifest()
    if name not in known:
        raise KeyError(f"no artifact {name!r}: the repository holds {', '.join(sorted(known)) or 'none'}")
    entry = known[name]
    return read_weights(model_for(entry["method"], entry["k"]), artifacts_folder() / entry["file"], entry["sha256"])
