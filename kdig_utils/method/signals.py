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
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from kdig_utils.method import cifar10
from kdig_utils.method.attribution import attribute, half_pays, secant_attributions
from kdig_utils.method.checks import check_choice, check_number
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.integrated_gradients import (
    BASELINES,
    attribution_map,
    baseline,
    check_finite,
    integrated_gradients,
    quadrature,
)
from kdig_utils.method.losses import attention_map
from kdig_utils.method.models import Teacher, exact_float32, logits_and_features, most_at_once, weights_sha256
from kdig_utils.method.secants import SecantNetwork, compiles
from kdig_utils.paths import check_writable, replacing

SIGNALS = ("logits", "maps", "attention", "error")
# How maps in [0, 1] are stored, and by how much a stored value may differ: half of the largest spacing
# (a uint8 is read as float16, which rounds once more).
QUANTISATION_ERROR = {"float16": 2**-12, "uint8": 1 / 510 + 2**-12}
SECANT = "secant"
COMPILE_FROM = 1000  # images whose time outweighs the seconds that torch.compile takes, many times over
CHOOSE_FROM = 4000  # images whose time outweighs the seconds that a GPU takes to try its ways


class SignalsNotFinished(RuntimeError):
    """Time was over before the last image; what is done is stored, and the next call goes on from there."""


class MapWay(NamedTuple):
    """How maps are computed: the convolutions' layout, whether a GPU may round to TF32, secants compiled or not."""

    layout: torch.memory_format = torch.channels_last
    tf32: bool = False
    compiled: bool = False


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
        check_number("n_steps", self.n_steps)
        if self.method != SECANT:
            quadrature(self.method, self.n_steps)
        check_choice("baseline", self.baseline, BASELINES)
        check_choice("storage", self.storage, QUANTISATION_ERROR)
        if self.error is not None:
            check_number("error", self.error)

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
    deadline: float = math.inf,
    say: Callable[[str], None] = lambda line: None,
) -> TeacherSignals:
    """Compute the signals of `images` into `folder`, going on where an earlier call was stopped.

    Args:
        batch_size: images between two flushes; None takes what suits the device (`batch_sizes`).
        report: called after each batch with the number of images done and in all; `print_progress` makes one.
        deadline: on the clock of `time.monotonic`; no batch begins that, at the pace of the one before, ends later.
        say: told which way a GPU computes the maps, where it had a choice.

    Raises:
        SignalsNotFinished: time was over.
        ValueError: the folder holds the signals of another teacher, other images or other settings.
    """
    manifest = _manifest(teacher, images, settings)
    teacher = copy.deepcopy(teacher).eval()
    # Batch norm folded into the convolutions, frozen weights, channels-last: the same gradients in half the time.
    folded = fuse(teacher).requires_grad_(False).to(memory_format=torch.channels_last)
    arrays = _open_store(folder, _shapes(teacher, len(images), settings), manifest)
    remaining = torch.from_numpy(np.flatnonzero(~arrays["done"]))
    device = next(teacher.parameters()).device
    images_a_batch, points = batch_sizes(folded, device)

    def loaded(positions: Tensor) -> tuple[Tensor, Tensor]:
        return images.images(positions).to(device), images.labels[positions].to(device)

    few, allowed = remaining[: 1 + 2 * points // settings.n_steps], QUANTISATION_ERROR[settings.storage]
    ways = ways_for(device, settings, len(images), len(remaining))
    way = fastest_way(ways, lambda way: _maps(folded, *loaded(few), settings, points, way), allowed, deadline)
    if len(ways) > 1:
        say(f"maps are computed by {way}")
    batches, pace = remaining.split(batch_size or images_a_batch), 0.0
    for positions in batches if len(remaining) else ():  # split makes one empty part of nothing
        started = time.monotonic()
        if started + pace >= deadline:
            done = f"{int(arrays['done'].sum()):,} of {len(images):,} images"
            raise SignalsNotFinished(f"time is over, {done} have signals in {folder}: run the same again to go on")
        rows = _signals_of_batch(teacher, folded, *loaded(positions), settings, points, way)
        for name, values in rows.items():
            arrays[name][positions.numpy()] = values.cpu().numpy()  # NumPy takes a tensor of one for a number
            arrays[name].flush()
        arrays["done"][positions.numpy()] = True  # last, and flushed after the rows: a row marked done is whole
        arrays["done"].flush()
        pace = time.monotonic() - started
        report(int(arrays["done"].sum()), len(images))
    return open_signals(teacher, images, folder, settings)


def ways_for(device: torch.device, settings: SignalSettings, images: int, remaining: int) -> list[MapWay]:
    """The ways to try, the reference first: a choice on a GPU only, where much remains to be done.

    None for secants: their layout is their own, and their error would be told by the same rounded convolutions.
    """
    if settings.error is not None or settings.method == SECANT:
        return [MapWay(compiled=images >= COMPILE_FROM and device.type == "cpu" and compiles())]
    if device.type != "cuda" or remaining < CHOOSE_FROM:
        return [MapWay()]
    return [MapWay(layout, tf32) for tf32 in (False, True) for layout in (torch.channels_last, torch.contiguous_format)]


def fastest_way(
    ways: list[MapWay], compute: Callable[[MapWay], tuple[Tensor, Tensor]], allowed: float, deadline: float = math.inf
) -> MapWay:
    """The fastest way, once warm, whose maps differ from the first's by no more than `allowed`.

    That is the median, over the images, of a map's largest difference: rounding switches some ReLUs, so that a single
    map differs by more between any two orders of adding. Nor may the median completeness error be larger by more. What
    is not tried by `deadline` is not chosen.
    """
    seconds, reference = {}, ()
    for way in ways if len(ways) > 1 else ():
        if time.monotonic() >= deadline:
            break
        compute(way)
        started = time.monotonic()
        maps, errors = (values.cpu() for values in compute(way))  # a GPU is waited for
        took, reference = time.monotonic() - started, reference or (maps, errors)
        apart = (maps - reference[0]).abs().flatten(1).amax(1).median()
        worse = errors.median() - reference[1].median()
        if apart <= allowed and worse <= allowed:
            seconds[way] = took
    return min(seconds, key=seconds.get, default=ways[0])


def batch_sizes(model: nn.Module, device: torch.device) -> tuple[int, int]:
    """Images a batch, and points of the path in one pass: a CPU wants its caches to hold them, a GPU wants many."""
    points = most_at_once(model, (3, 32, 32), device)
    return points, points if device.type == "cuda" else points // 2


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
    way: MapWay,
) -> dict[str, Tensor]:
    logits, features = logits_and_features(teacher, images, settings.tap)
    check_finite(logits, "rows of logits")
    maps, error = _maps(folded, images, labels, settings, points, way)
    return {
        "logits": logits,
        "maps": _stored(maps, settings.storage),
        "attention": attention_map(features),
        "error": error,
    }


@torch.no_grad()
def _maps(
    folded: nn.Module, images: Tensor, labels: Tensor, settings: SignalSettings, points: int, way: MapWay
) -> tuple[Tensor, Tensor]:
    """Maps of a batch, in [0, 1], and the error of each."""
    attributions, error = _attributions(folded.to(memory_format=way.layout), images, labels, settings, points, way)
    check_finite(attributions, "attributions")
    maps = attribution_map(attributions)
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny), error


def _attributions(
    folded: nn.Module, images: Tensor, labels: Tensor, settings: SignalSettings, points: int, way: MapWay
) -> tuple[Tensor, Tensor]:
    """Attributions of a batch, and the error of each."""
    baselines = baseline(settings.baseline, images, cifar10.MEAN)
    if settings.error is not None:
        cost = {"internal_batch_size": points, "compiled": way.compiled}
        found = attribute(folded, images, baselines, labels, settings.error, **cost)
        return found.attributions, found.error
    if settings.method == SECANT:
        network = SecantNetwork(folded, half_pays(images.device), way.compiled)
        attributions = secant_attributions(network, images, baselines, labels, settings.n_steps, "logit", points)
    else:
        rule = settings.n_steps, settings.method
        with exact_float32():  # which puts the setting back
            torch.backends.cudnn.allow_tf32 = way.tf32
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
