"""Teacher signals: logits, IG maps and attention maps of a whole image set, checked and memory-mapped.

A store is a folder: one `.npy` file a signal, `done.npy` with a flag an image, and `manifest.json`, which names the
teacher (SHA-256), the data (MD5) and the settings. Each row is the signal of the image at the same position.
`precompute` fills it.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping
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
from kdig_utils.paths import check_writable, replacing

SIGNALS = ("logits", "maps", "attention", "error")
# How maps in [0, 1] are stored, and by how much a stored value may differ: half of the largest spacing
# (a uint8 is read as float16, which rounds once more).
QUANTISATION_ERROR = {"float16": 2**-12, "uint8": 1 / 510 + 2**-12}
SECANT = "secant"
LATER_SETTINGS = {"error": None, "storage": "float16"}  # a manifest names them only where they differ from this

Arrays = dict[str, np.memmap]


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
        ValueError: the store was made by another teacher, from other images or with other settings.
    """
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"no teacher signals in {folder}: compute them with `python -m kdig_utils signals`")
    manifest = _checked_manifest(folder, manifest_of(teacher, images, settings))
    arrays = _mapped(folder, (*SIGNALS, "done"), "c")
    if missing := int((~arrays.pop("done")).sum()):
        raise FileNotFoundError(
            f"{missing} of {len(images)} images have no signals in {folder}: run `python -m kdig_utils signals` again"
        )
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


def open_store(folder: Path, manifest: dict[str, Any], attention_size: int, storage: str) -> Arrays:
    """The arrays of a store, to be written to: as they are, or all zeros if there is none yet.

    Raises:
        ValueError: the store has another manifest, or is damaged.
        OSError: the disk does not hold it.
    """
    n = len(manifest["indices"])
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "logits": ((n, 10), np.float32),
        "maps": ((n, 32, 32), np.uint8 if storage == "uint8" else np.float16),
        "attention": ((n, attention_size), np.float32),
        "error": ((n,), np.float32),
        "done": ((n,), np.bool_),
    }
    if (folder / "manifest.json").is_file():
        _checked_manifest(folder, manifest)
        return _mapped(folder, shapes, "r+")
    # Asked for beforehand: a memory-mapped write to a full disk ends the process without an error.
    check_writable(folder, sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values()))
    arrays: Arrays = {
        name: open_memmap(folder / f"{name}.npy", mode="w+", shape=shape, dtype=dtype)
        for name, (shape, dtype) in shapes.items()
    }
    with replacing(folder / "manifest.json") as part:  # last: a folder with a manifest has all its arrays
        part.write_text(json.dumps(manifest))
    return arrays


def write_rows(arrays: Arrays, positions: Tensor, rows: Mapping[str, Tensor]) -> None:
    """Put the signals of the images at `positions` into the store."""
    done = torch.ones(len(positions), dtype=torch.bool)
    for name, values in {**rows, "done": done}.items():  # flushed in this order: a row marked done is whole
        arrays[name][positions.numpy()] = values.cpu().numpy()  # NumPy takes a tensor of one for a number
        arrays[name].flush()


def _mapped(folder: Path, names: Iterable[str], mode: Literal["r+", "c"]) -> Arrays:
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode=mode) for name in names}
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"the teacher signals in {folder} are damaged ({error}): delete the folder and compute them again"
    )


def _checked_manifest(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads((folder / "manifest.json").read_text())
    except ValueError as error:
        raise _damaged(folder, error) from error
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
