"""A teacher's signals as they come with the repository: maps as bytes in one picture, the rest as arrays."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kdig_utils import paths
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.signals import TeacherSignals

COLUMNS = 50  # maps in a row of the picture
PRECISIONS = {"logits": np.float32, "attention": np.float16, "error": np.float16}


def freeze(signals: TeacherSignals, folder: Path) -> None:
    """Write signals into `folder`: `signals.npz`, `maps.webp`, and `manifest.json`, which says whose they are."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(signals, name).numpy().astype(kind) for name, kind in PRECISIONS.items()}
    np.savez_compressed(folder / "signals.npz", **arrays)
    rows = (signals.maps.float() * 255).round().to(torch.uint8).view(-1, COLUMNS, 32, 32)
    sheet = rows.transpose(1, 2).reshape(32 * len(rows), -1).numpy()
    Image.fromarray(sheet).convert("RGB").save(folder / "maps.webp", lossless=True, quality=100)
    kept = {name: signals.manifest[name] for name in ("teacher_sha256", "data_md5", "settings")}
    with paths.replacing(folder / "manifest.json") as part:
        part.write_text(json.dumps(kept, indent=1) + "\n")


def manifest(folder: Path) -> dict[str, Any]:
    """Teacher, data and settings of frozen signals."""
    return json.loads((folder / "manifest.json").read_text())


def read(folder: Path, images: ImageSet) -> TeacherSignals:
    """The frozen signals of `images`, in memory.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they are of other images.
    """
    named = manifest(folder)
    if named["data_md5"] != images.md5:
        raise ValueError(f"the signals in {folder.name} are of other images than {images.name}: restore them from git")
    arrays = np.load(folder / "signals.npz")
    rest = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in PRECISIONS}
    sheet = torch.from_numpy(np.asarray(Image.open(folder / "maps.webp").convert("RGB"))[..., 0].copy())
    maps = sheet.view(-1, 32, COLUMNS, 32).transpose(1, 2).reshape(-1, 32, 32)
    told = {**named, "indices": images.indices.tolist()}
    return TeacherSignals(maps=(maps.float() / 255).half(), manifest=told, **rest)
