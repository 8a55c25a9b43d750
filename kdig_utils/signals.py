"""Teacher signals: logits, IG maps and attention maps of a whole image set, computed once, checked, memory-mapped.

A store is a folder: one `.npy` file a signal, `done.npy` with a flag an image, and `manifest.json`, which names the
teacher (SHA-256), the data (MD5) and the settings. Each row is the signal of the image at the same position.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from kdig_utils import cifar10
from kdig_utils.attribution import attribute, half_pays, secant_attributions
from kdig_utils.cifar10 import ImageSet
from kdig_utils.integrated_gradients import (
    attribution_map,
    baseline,
    check_baseline,
    check_finite,
    integrated_gradients,
    quadrature,
)
from kdig_utils.losses import attention_map
from kdig_utils.models import Teacher, exact_float32, logits_and_features, weights_sha256
from kdig_utils.paths import check_writable, replacing
from kdig_utils.secants import SecantNetwork, compiles

SIGNALS = ("logits", "maps", "attention", "error")
# How maps in [0, 1] are stored, and by how much a stored value may differ: half of the largest spacing
# (a uint8 is read as float16, which rounds once more).
QUANTISATION_ERROR = {"float16": 2**-12, "uint8": 1 / 510 + 2**-12}
# Images a batch, and points of the path in one pass: a CPU wants its caches to hold them, a GPU wants many.
CPU_BATCHES = (64, 32)
MOST_POINTS = 2048
SECANT = "secant"
COMPILE_FROM = 1000  # images whose time outweighs the seconds that torch.compile takes, many times over


@dataclass(frozen=True)
class SignalSettings:
    """What determines the signals besides teacher and images.

    Attributes:
        n_steps: evaluations along the path of Integrated Gradients.
        method: the quadrature, or `secant` for intervals that know where the ReLUs switch (`secants`, chapter 04).
        baseline: `mean_colour` is the paper's, zeros after normalisation.
        tap: index of the feature block whose attention map is kept (9 for k = 5).
        error: None takes `n_steps` of `method`; a number asks `attribution.attribute` for this relative error instead.
        storage: of the maps, one of `QUANTISATION_ERROR`.

    Raises:
        ValueError: unknown quadrature, baseline or storage, too few steps or an error out of range; a store is never
            begun with such settings.
    """

    n_steps: int = 50
    method: str = "gausslegendre"
    baseline: str = "mean_colour"
    tap: int = 9
    error: float | None = None
    storage: str = "float16"

    def __post_init__(self) -> None:
        if self.method != SECANT:
            quadrature(self.method, self.n_steps)
        elif self.n_steps < 1:
            raise ValueError(f"n_steps = {self.n_steps} is too few: use at least 1")
        check_baseline(self.baseline)
        if self.error is not None and not 0 < self.error < 1:
            raise ValueError(f"error = {self.error} is not a relative error: choose one above 0 and below 1, as 0.05")
        if self.storage not in QUANTISATION_ERROR:
            raise ValueError(f"unknown storage {self.storage!r}: choose one of {', '.join(QUANTISATION_ERROR)}")

    def identity(self) -> dict:
        """What a manifest keeps: every setting, but those that came later only where they differ from before."""
        later = {"error": None, "storage": "float16"}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


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
    manifest: dict

    def to(self, device: torch.device | str) -> "TeacherSignals":
        """The same signals on `device`."""
        return TeacherSignals(*(value.to(device) for value in self.tensors()), self.manifest)

    def rows(self, positions: Tensor) -> "TeacherSignals":
        """The signals of the images at `positions`, in this order, in memory."""
        return TeacherSignals(*(value[positions] for value in self.tensors()), self.manifest)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.logits, self.maps, self.attention, self.error


@exact_float32()
def compute_signals(
    teacher: Teacher,
    images: ImageSet,
    folder: Path,
    settings: SignalSettings = SignalSettings(),
    batch_size: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> TeacherSignals:
    """Compute the signals of `images` into `folder`, going on where an earlier call was stopped.

    Args:
        batch_size: images between two flushes; None takes what suits the device (`batch_sizes`).
        report: called after each batch with the number of images done and in all; `print_progress` makes one.

    Raises:
        ValueError: the folder holds the signals of another teacher, other images or other settings.
    """
    manifest = _manifest(teacher, images, settings)
    teacher = copy.deepcopy(teacher).eval()
    # Batch norm folded into the convolutions, frozen weights, channels-last: the same gradients in half the time.
    folded = fuse(teacher).requires_grad_(False).to(memory_format=torch.channels_last)
    arrays = _open_store(folder, _shapes(teacher, len(images), settings), manifest)
    remaining = torch.from_numpy(np.flatnonzero(~arrays["done"]))
    device = next(teacher.parameters()).device
    by_secants = settings.error is not None or settings.method == SECANT
    compiled = by_secants and len(images) >= COMPILE_FROM and device.type == "cpu" and compiles()
    images_a_batch, points = batch_sizes(folded, device)
    batches = remaining.split(batch_size or images_a_batch)
    for positions in batches if len(remaining) else ():  # split makes one empty part of nothing
        rows = _signals_of_batch(
            teacher,
            folded,
            images.images(positions).to(device),
            images.labels[positions].to(device),
            settings,
            points,
            compiled,
        )
        for name, values in rows.items():
            arrays[name][positions.numpy()] = values.cpu().numpy()  # NumPy takes a tensor of one for a number
            arrays[name].flush()
        arrays["done"][positions.numpy()] = True  # last, and flushed after the rows: a row marked done is whole
        arrays["done"].flush()
        report(int(arrays["done"].sum()), len(images))
    return open_signals(teacher, images, folder, settings)


def batch_sizes(model: nn.Module, device: torch.device) -> tuple[int, int]:
    """Images a batch, and points of the path in one pass; on a GPU such that half of its free memory holds them.

    The other half is for gradients and for what the libraries work in. Ask before anything else is computed: memory
    that PyTorch keeps for later counts as taken.
    """
    if device.type != "cuda":
        return CPU_BATCHES
    free, _total = torch.cuda.mem_get_info(device)
    points = max(1, min(MOST_POINTS, free // (2 * kept_bytes(model, device))))
    return points, points


def kept_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes that a forward pass keeps of each image for the gradient of its pixels."""
    kept = {1: 0, 2: 0}
    for count in kept:

        def weigh(value: Tensor, count: int = count) -> Tensor:
            kept[count] += value.nbytes
            return value

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(weigh, lambda value: value):
            model(torch.zeros(count, 3, 32, 32, device=device, requires_grad=True))
    return kept[2] - kept[1]  # weights are kept once, however many images there are


def open_signals(
    teacher: Teacher, images: ImageSet, folder: Path, settings: SignalSettings = SignalSettings()
) -> TeacherSignals:
    """Open a finished store, memory-mapped; maps stored as uint8 are turned into float16 in memory.

    Raises:
        FileNotFoundError: there is no store, or it is not finished.
        ValueError: the store was made by another teacher, from other images or with other settings.
    """
    if not (folder / "manifest.json").is_file():
        raise FileNotFoundError(f"no teacher signals in {folder}: compute them with `python -m kdig_utils signals`")
    manifest = _checked_manifest(folder, _manifest(teacher, images, settings))
    arrays = _mapped(folder, (*SIGNALS, "done"), "c")
    done = arrays.pop("done")
    if missing := int((~done).sum()):
        raise FileNotFoundError(
            f"{missing} of {len(images)} images have no signals in {folder}: run `python -m kdig_utils signals` again"
        )
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if settings.storage == "uint8":
        tensors["maps"] = (tensors["maps"].float() / 255).half()
    return TeacherSignals(**tensors, manifest=manifest)


@torch.no_grad()
def _signals_of_batch(
    teacher: Teacher,
    folded: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: SignalSettings,
    points: int,
    compiled: bool,
) -> dict[str, Tensor]:
    logits, features = logits_and_features(teacher, images, settings.tap)
    attributions, error = _attributions(folded, images, labels, settings, points, compiled)
    check_finite(logits, "rows of logits")
    check_finite(attributions, "attributions")
    maps = attribution_map(attributions)
    scaled = maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    return {
        "logits": logits,
        "maps": _stored(scaled, settings.storage),
        "attention": attention_map(features),
        "error": error,
    }


def _attributions(
    folded: nn.Module, images: Tensor, labels: Tensor, settings: SignalSettings, points: int, compiled: bool
) -> tuple[Tensor, Tensor]:
    """Attributions of a batch, and the error of each."""
    baselines = baseline(settings.baseline, images, cifar10.MEAN)
    if settings.error is not None:
        found = attribute(
            folded, images, baselines, labels, settings.error, internal_batch_size=points, compiled=compiled
        )
        return found.attributions, found.error
    if settings.method == SECANT:
        network = SecantNetwork(folded, half_pays(images.device), compiled)
        attributions = secant_attributions(network, images, baselines, labels, settings.n_steps, "logit", points)
    else:
        rule = settings.n_steps, settings.method
        attributions = integrated_gradients(folded, images, baselines, labels, *rule, points)
    rise = (folded(images) - folded(baselines)).gather(1, labels.unsqueeze(1)).squeeze(1)
    return attributions, (attributions.flatten(1).sum(1) - rise).abs() / rise.abs()


def _stored(maps: Tensor, storage: str) -> Tensor:
    return (maps * 255).round().to(torch.uint8) if storage == "uint8" else maps.half()


def print_progress(step: int = 1000, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """A report for `compute_signals`: a line about each `step` images, with the speed and the time that is left."""
    started = clock()
    state = {"first": None, "printed": 0}

    def report(done: int, total: int) -> None:
        begins = state["first"] is None
        if begins:  # the first batch may hold rows of an earlier call, so that it tells no speed
            state["first"] = (done, clock())
        if done == total or (not begins and done // step > state["printed"] // step):
            before, since = (0, started) if begins else state["first"]
            speed = (done - before) / max(clock() - since, 1e-9)
            minutes, seconds = divmod(round((total - done) / speed), 60)
            print(f"{done:,} of {total:,} images, {speed:.1f} images/s, {minutes} min {seconds:02d} s left", flush=True)
            state["printed"] = done

    return report


def _manifest(teacher: nn.Module, images: ImageSet, settings: SignalSettings) -> dict:
    return {
        "teacher_sha256": weights_sha256(teacher),
        "data_md5": images.md5,
        "settings": settings.identity(),
        "indices": images.indices.tolist(),
    }


def _shapes(teacher: Teacher, n: int, settings: SignalSettings) -> dict[str, tuple[tuple[int, ...], type]]:
    device = next(teacher.parameters()).device
    with torch.inference_mode():
        _logits, features = logits_and_features(teacher, torch.zeros(1, 3, 32, 32, device=device), settings.tap)
    return {
        "logits": ((n, 10), np.float32),
        "maps": ((n, 32, 32), np.uint8 if settings.storage == "uint8" else np.float16),
        "attention": ((n, features[0, 0].numel()), np.float32),
        "error": ((n,), np.float32),
        "done": ((n,), np.bool_),
    }


def _open_store(folder: Path, shapes: dict[str, tuple], manifest: dict) -> dict[str, np.memmap]:
    if (folder / "manifest.json").is_file():
        _checked_manifest(folder, manifest)
        return _mapped(folder, shapes, "r+")
    # Asked for beforehand: a memory-mapped write to a full disk ends the process without an error.
    check_writable(folder, sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values()))
    arrays = {
        name: open_memmap(folder / f"{name}.npy", mode="w+", shape=shape, dtype=dtype)
        for name, (shape, dtype) in shapes.items()
    }
    with replacing(folder / "manifest.json") as part:  # last: a folder with a manifest has all its arrays
        part.write_text(json.dumps(manifest))
    return arrays


def _mapped(folder: Path, names: Iterable[str], mode: str) -> dict[str, np.memmap]:
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode=mode) for name in names}
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"the teacher signals in {folder} are damaged ({error}): delete the folder and compute them again"
    )


def _checked_manifest(folder: Path, expected: dict) -> dict:
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
