"""Teacher signals: logits, IG maps and attention maps of a whole image set, checked and memory-mapped.

A store is a folder: one `.npy` file a signal, `done.npy` with a flag an image, and `manifest.json`, which names the
teacher (SHA-256), the data (MD5) and the settings, and, of a finished store, each array's SHA-256, shape and type.
Each row is the signal of the image at the same position. `precompute` fills it.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from kdig_utils.method.checks import Number, Text, Whole, check_choice, check_number, checked
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.integrated_gradients import BASELINES, QUADRATURES, quadrature
from kdig_utils.method.models import FEATURE_BLOCKS, weights_sha256
from kdig_utils.paths import check_writable, explaining, replacing

SIGNALS = ("logits", "maps", "attention", "error")
# How maps in [0, 1] are stored, and by how much a stored value may differ: half of the largest spacing
# (a uint8 is read as float16, which rounds once more).
QUANTISATION_ERROR = {"float16": 2**-12, "uint8": 1 / 510 + 2**-12}
SECANT = "secant"
LATER_SETTINGS = {"error": None, "storage": "float16"}  # a manifest names them only where they differ from this

Arrays = dict[str, np.memmap]
Shapes = dict[str, tuple[tuple[int, ...], type]]


@checked
class SignalSettings:
    """What determines the signals besides teacher and images.

    Attributes:
        n_steps: evaluations along the path of Integrated Gradients.
        method: the quadrature, or `secant` for intervals that know where the ReLUs switch (`secants`, chapter 17).
        baseline: `mean_colour` is the paper's, zeros after normalisation.
        tap: index of the feature block whose attention map is kept (9 for k = 5).
        error: None takes `n_steps` of `method`; a number asks `attribution.attribute` for this relative error instead.
        storage: of the maps, one of `QUANTISATION_ERROR`.

    Raises:
        ValueError: unknown quadrature, baseline or storage, too few steps or an error out of range; a store is never
            begun with such settings.
    """

    n_steps: Whole = 50
    method: Text = "gausslegendre"
    baseline: Text = "mean_colour"
    tap: Whole = 9
    error: Number | None = None
    storage: Text = "float16"

    choices: ClassVar[Mapping[str, Collection[object]]] = {
        "method": (*QUADRATURES, SECANT),
        "baseline": BASELINES,
        "tap": range(FEATURE_BLOCKS),
        "storage": tuple(QUANTISATION_ERROR),
    }

    def __post_init__(self) -> None:
        for name, choices in self.choices.items():
            check_choice(name, getattr(self, name), choices)
        check_number("n_steps", self.n_steps)
        if self.method != SECANT:
            quadrature(self.method, self.n_steps)
        if self.error is not None:
            check_number("error", self.error)

    def identity(self) -> dict[str, object]:
        """What a manifest keeps."""
        as_before = LATER_SETTINGS.items()
        return {name: value for name, value in asdict(self).items() if (name, value) not in as_before}


@dataclass(frozen=True)
class TeacherSignals:
    """The signals of N images, memory-mapped or in memory.

    Attributes:
        logits: (N, 10), float32.
        maps: attribution maps divided by their maximum, (N, 32, 32), float16 in [0, 1]; within `QUANTISATION_ERROR`.
        attention: attention maps of unit length, (N, H·W), float32.
        error: relative completeness error of each map, (N,), float32: |delta| / |F(x) - F(x')|; of maps that were
            asked for by `SignalSettings.error`, the estimated error that was reached (`Attribution.error`).
        manifest: teacher, data, settings and the index of each image.
    """

    logits: Tensor
    maps: Tensor
    attention: Tensor
    error: Tensor
    manifest: dict[str, Any]

    def to(self, device: torch.device | str) -> "TeacherSignals":
        """The same signals on `device`."""
        return replace(self, **{name: getattr(self, name).to(device) for name in SIGNALS})

    def rows(self, positions: Tensor) -> "TeacherSignals":
        """The signals of the images at `positions`, in this order, in memory."""
        return replace(self, **{name: getattr(self, name)[positions] for name in SIGNALS})

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.logits, self.maps, self.attention, self.error


def open_signals(
    teacher: nn.Module, images: ImageSet, folder: Path, settings: SignalSettings = SignalSettings()
) -> TeacherSignals:
    """Open a finished store, memory-mapped; maps stored as uint8 are turned into float16 in memory.

    Raises:
        FileNotFoundError: there is no store, or it is not finished.
        ValueError: the store was made by another teacher, from other images or with other settings, or is damaged:
            arrays with other hashes, or, in stores without them, of another shape or with values that are none.
    """
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"no teacher signals in {folder}: compute them with `python -m kdig_utils signals`")
    manifest = manifest_of(teacher, images, settings)
    kept = _checked_manifest(folder, manifest).get("arrays")
    arrays = _mapped(folder, shapes_of(manifest), "c")
    if missing := int((~arrays.pop("done")).sum()):
        raise FileNotFoundError(
            f"{missing} of {len(images)} images have no signals in {folder}: run `python -m kdig_utils signals` again"
        )
    if kept is None:
        check_values(folder, arrays)
    elif not isinstance(kept, dict):
        raise _damaged(folder, "its manifest names no arrays")
    elif changed := [name for name, found in described(folder, arrays).items() if kept.get(name) != found]:
        raise _damaged(folder, f"{changed[0]}.npy is not what its manifest says")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if settings.storage == "uint8":
        tensors["maps"] = (tensors["maps"].float() / 255).half()
    return TeacherSignals(**tensors, manifest=manifest)


def stored(maps: Tensor, storage: str) -> Tensor:
    """Maps in [0, 1] as the store keeps them."""
    return (maps * 255).round().to(torch.uint8) if storage == "uint8" else maps.half()


def manifest_of(teacher: nn.Module, images: ImageSet, settings: SignalSettings) -> dict[str, Any]:
    """What tells a store from those of other teachers, images and settings."""
    return {
        "teacher_sha256": weights_sha256(teacher),
        "data_md5": images.md5,
        "settings": settings.identity(),
        "indices": images.indices.tolist(),
    }


def shapes_of(manifest: dict[str, Any], attention_size: int | None = None) -> Shapes:
    """Shape and type of each array of a store; -1 for the size of attention maps that is not known."""
    n, storage = len(manifest["indices"]), manifest["settings"].get("storage")
    return {
        "logits": ((n, 10), np.float32),
        "maps": ((n, 32, 32), np.uint8 if storage == "uint8" else np.float16),
        "attention": ((n, attention_size or -1), np.float32),
        "error": ((n,), np.float32),
        "done": ((n,), np.bool_),
    }


def reserve(folder: Path, shapes: Shapes) -> None:
    """Take the arrays' room on the disk now: a memory-mapped write to a full disk ends the process without an error.

    Raises:
        OSError: the disk is full.
    """
    for path in (folder / f"{name}.npy" for name in shapes):
        if hasattr(os, "posix_fallocate") and path.is_file() and (size := path.stat().st_size):
            with explaining(path), path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)


def finish_store(folder: Path, manifest: dict[str, Any], arrays: Arrays) -> None:
    """Enter hash, shape and type of the finished arrays in the manifest.

    Raises:
        ValueError: an array holds values that are none; the store is damaged.
    """
    check_values(folder, arrays)
    with replacing(folder / "manifest.json") as part:
        part.write_text(json.dumps({**manifest, "arrays": described(folder, arrays)}))


def described(folder: Path, arrays: Arrays) -> dict[str, dict[str, Any]]:
    """SHA-256 of the file, shape and type of each signal."""
    found = {}
    for name in SIGNALS:
        status = (folder / f"{name}.npy").stat()
        sha256 = _file_sha256(folder / f"{name}.npy", (status.st_ino, status.st_size, status.st_mtime_ns))
        found[name] = {"sha256": sha256, "shape": list(arrays[name].shape), "dtype": str(arrays[name].dtype)}
    return found


@functools.lru_cache(maxsize=64)
def _file_sha256(path: Path, _identity: tuple[int, int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_values(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError unless the signals are finite, in their ranges, and none is missing, batch by batch."""
    for start in range(0, len(arrays["error"]), 4096):
        logits, maps, attention, error = (np.asarray(arrays[name][start : start + 4096]) for name in SIGNALS)
        flat = maps.reshape(len(maps), -1)
        if not all(np.isfinite(values).all() for values in (logits, maps, attention)):  # an error may be of nothing
            raise _damaged(folder, "values that are not finite")
        if flat.min() < 0 or (maps.dtype != np.uint8 and flat.max() > 1) or attention.min() < 0 or error.min() < 0:
            raise _damaged(folder, "values outside their ranges")
        if not (logits.any(1) | flat.any(1) | attention.any(1)).all():
            raise _damaged(folder, "images without any signal")


def open_store(folder: Path, manifest: dict[str, Any], attention_size: int) -> Arrays:
    """The arrays of a store, to be written to: as they are, or all zeros if there is none yet.

    Raises:
        ValueError: the store has another manifest, or is damaged.
        OSError: the disk does not hold it.
    """
    shapes = shapes_of(manifest, attention_size)
    if (folder / "manifest.json").is_file():
        _checked_manifest(folder, manifest)
        reserve(folder, shapes)
        return _mapped(folder, shapes, "r+")
    check_writable(folder, sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values()))
    with explaining(folder / "signals"):
        arrays: Arrays = {
            name: open_memmap(folder / f"{name}.npy", mode="w+", shape=shape, dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        }
    reserve(folder, shapes)
    with replacing(folder / "manifest.json") as part:  # last: a folder with a manifest has all its arrays
        part.write_text(json.dumps(manifest))
    return arrays


def write_rows(arrays: Arrays, positions: Tensor, rows: Mapping[str, Tensor]) -> None:
    """Put the signals of the images at `positions` into the store."""
    done = torch.ones(len(positions), dtype=torch.bool)
    for name, values in {**rows, "done": done}.items():  # flushed in this order: a row marked done is whole
        arrays[name][positions.numpy()] = values.cpu().numpy()  # NumPy takes a tensor of one for a number
        arrays[name].flush()


def _mapped(folder: Path, shapes: Shapes, mode: Literal["r+", "c"]) -> Arrays:
    try:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode=mode) for name in shapes}
    except Exception as error:  # NumPy raises many types for a damaged header
        raise _damaged(folder, error) from error
    for name, (shape, dtype) in shapes.items():
        found = arrays[name].shape
        if len(found) != len(shape) or any(size not in (-1, its) for size, its in zip(shape, found, strict=True)):
            raise _damaged(folder, f"{name}.npy has shape {found} instead of {shape}")
        if arrays[name].dtype != dtype:
            raise _damaged(folder, f"{name}.npy is of type {arrays[name].dtype} instead of {np.dtype(dtype)}")
    return arrays


def _damaged(folder: Path, error: object) -> ValueError:
    return ValueError(
        f"the teacher signals in {folder} are damaged ({error}): delete the folder and compute them again"
    )


def _checked_manifest(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(folder, error) from error
    if not isinstance(found, dict):
        raise _damaged(folder, "its manifest is none")
    for key, value in expected.items():
        if found.get(key) != value:
            raise ValueError(
                f"the teacher signals in {folder} have another {key} ({_difference(found.get(key), value)}): "
                "compute them into another folder"
            )
    return found


def _difference(found: object, expected: object) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        other = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
        return ", ".join(f"{key} = {found.get(key)} instead of {expected.get(key)}" for key in other)
    return f"{str(found)[:12]} instead of {str(expected)[:12]}"
