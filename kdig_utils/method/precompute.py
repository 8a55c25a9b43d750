"""The teacher's signals of a whole image set, computed once into a store (`signals`)."""

import contextlib
import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import SoftFileLease
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from kdig_utils.locks import claimed
from kdig_utils.method import cifar10
from kdig_utils.method.attribution import attribute, half_pays
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.integrated_gradients import attribution_map, baseline, check_finite, integrated_gradients
from kdig_utils.method.losses import attention_map
from kdig_utils.method.models import Teacher, exact_float32, logits_and_features, most_at_once
from kdig_utils.method.secants import SecantNetwork, compiles, secant_attributions
from kdig_utils.method.signals import (
    QUANTISATION_ERROR,
    SECANT,
    SignalSettings,
    TeacherSignals,
    finish_store,
    manifest_of,
    open_signals,
    open_store,
    stored,
    write_rows,
)

COMPILE_FROM = 1000  # images whose time outweighs the seconds that torch.compile takes, many times over
CHOOSE_FROM = 4000  # images whose time outweighs the seconds that a GPU takes to try its ways


class SignalsNotFinished(RuntimeError):
    """Time was over before the last image; what is done is stored, and the next call goes on from there."""


class MapWay(NamedTuple):
    """How maps are computed by gradients: the convolutions' layout, and whether a GPU may round to TF32."""

    layout: torch.memory_format = torch.channels_last
    tf32: bool = False


WAYS = [MapWay(layout, tf32) for tf32 in (False, True) for layout in (torch.channels_last, torch.contiguous_format)]


class MapMaker(NamedTuple):
    """Makes maps of images by `settings`; `points` of their paths in one pass, secants compiled or not."""

    network: nn.Module  # the teacher, folded
    settings: SignalSettings
    points: int
    compiled: bool

    @torch.no_grad()
    def maps(self, images: Tensor, labels: Tensor, way: MapWay = WAYS[0]) -> tuple[Tensor, Tensor]:
        """Maps of a batch, in [0, 1], and the error of each."""
        attributions, error = self.attributions(images, labels, way)
        check_finite(attributions, "attributions")
        maps = attribution_map(attributions)
        return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny), error

    def attributions(self, images: Tensor, labels: Tensor, way: MapWay) -> tuple[Tensor, Tensor]:
        """Attributions of a batch, and the error of each."""
        settings, points, folded = self.settings, self.points, self.network.to(memory_format=way.layout)
        fused = by_secants(settings) and self.compiled and compiles()
        start = baseline(settings.baseline, images, cifar10.MEAN)
        if settings.error is not None:
            found = attribute(folded, images, start, labels, settings.error, internal_batch_size=points, compiled=fused)
            return found.attributions, found.error
        if settings.method == SECANT:
            network = SecantNetwork(folded, half_pays(images.device), fused)
            attributions = secant_attributions(network, images, start, labels, settings.n_steps, points)
        else:
            with exact_float32():  # which puts the setting back
                torch.backends.cudnn.allow_tf32 = way.tf32
                rule = settings.n_steps, settings.method
                attributions = integrated_gradients(folded, images, start, labels, *rule, points)
        rise = (folded(images) - folded(start)).gather(1, labels.unsqueeze(1)).squeeze(1)
        return attributions, (attributions.flatten(1).sum(1) - rise).abs() / rise.abs()


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

    While another process is at it, this one waits.

    Args:
        batch_size: images between two flushes; None takes what suits the device.
        report: called after each batch with the number of images done and in all; `print_progress` makes one.
        deadline: on the clock of `time.monotonic`; no batch begins that, at the pace of the one before, ends later.
        say: told which way a GPU computes the maps, where it had a choice, and who is waited for.

    Raises:
        SignalsNotFinished: time was over.
        ValueError: as `open_signals`.
    """
    with contextlib.suppress(FileNotFoundError):
        return open_signals(teacher, images, folder, settings)
    try:
        with claimed(folder, say, deadline) as claim:
            _fill(copy.deepcopy(teacher).eval(), images, folder, settings, batch_size, report, deadline, say, claim)
    except TimeoutError as error:
        raise SignalsNotFinished(str(error)) from error
    return open_signals(teacher, images, folder, settings)


def _fill(
    teacher: Teacher,
    images: ImageSet,
    folder: Path,
    settings: SignalSettings,
    batch_size: int | None,
    report: Callable[[int, int], None],
    deadline: float,
    say: Callable[[str], None],
    claim: SoftFileLease,
) -> None:
    """Compute what a store lacks; raise TimeoutError when `claim` is another process's, or time is over."""
    maker, at_once = map_maker(teacher, settings, len(images))
    black = torch.zeros(1, 3, 32, 32, device=next(teacher.parameters()).device)
    manifest = manifest_of(teacher, images, settings)
    arrays = open_store(folder, manifest, answers(teacher, black, settings.tap)["attention"].shape[1])
    remaining = torch.from_numpy(np.flatnonzero(~arrays["done"]))
    way = chosen_way(maker, images, remaining, deadline, say)
    pace = 0.0
    for positions in remaining.split(batch_size or at_once) if len(remaining) else ():
        started = time.monotonic()
        if started + pace >= deadline:
            done = f"{int(arrays['done'].sum()):,} of {len(images):,} images have signals"
            raise TimeoutError(f"time is over, {done} in {folder}: run the same again to go on")
        rows = signals_of_batch(teacher, maker, images, positions, way)
        if not claim.is_lock_held_by_us:
            raise TimeoutError(f"another process took over {folder}, as this one had stopped: run it again")
        write_rows(arrays, positions, rows)
        pace = time.monotonic() - started
        report(int(arrays["done"].sum()), len(images))
    finish_store(folder, manifest, arrays)


def map_maker(teacher: Teacher, settings: SignalSettings, images: int) -> tuple[MapMaker, int]:
    """A maker of maps, and images a batch: a CPU wants its caches to hold them, a GPU wants many."""
    # Batch norm folded into the convolutions, frozen weights, channels-last: the same gradients in half the time.
    folded = fuse(teacher).requires_grad_(False).to(memory_format=torch.channels_last)
    device = next(teacher.parameters()).device
    at_once, on_cpu = most_at_once(folded, (3, 32, 32), device), device.type == "cpu"
    return MapMaker(folded, settings, at_once // 2 if on_cpu else at_once, on_cpu and images >= COMPILE_FROM), at_once


def signals_of_batch(
    teacher: Teacher, maker: MapMaker, images: ImageSet, positions: Tensor, way: MapWay
) -> dict[str, Tensor]:
    """What the store keeps of the images at `positions`."""
    pixels, labels = loaded(images, positions, teacher)
    maps, error = maker.maps(pixels, labels, way)
    kept = {"maps": stored(maps, maker.settings.storage), "error": error}
    return {**answers(teacher, pixels, maker.settings.tap), **kept}


def loaded(images: ImageSet, positions: Tensor, teacher: nn.Module) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels, where the teacher is."""
    device = next(teacher.parameters()).device
    return images.images(positions).to(device), images.labels[positions].to(device)


@torch.no_grad()
def answers(teacher: Teacher, pixels: Tensor, tap: int) -> dict[str, Tensor]:
    """Logits and attention maps."""
    logits, features = logits_and_features(teacher, pixels, tap)
    check_finite(logits, "rows of logits")
    return {"logits": logits, "attention": attention_map(features)}


def chosen_way(
    maker: MapMaker, images: ImageSet, remaining: Tensor, deadline: float, say: Callable[[str], None]
) -> MapWay:
    """The fastest way on some of the remaining images; `say` is told where there was a choice."""
    ways = ways_for(next(maker.network.parameters()).device, maker.settings, len(remaining))
    few = loaded(images, remaining[: 1 + 2 * maker.points // maker.settings.n_steps], maker.network)
    way = fastest_way(ways, lambda way: maker.maps(*few, way), QUANTISATION_ERROR[maker.settings.storage], deadline)
    if len(ways) > 1:
        say(f"maps are computed by {way}")
    return way


def ways_for(device: torch.device, settings: SignalSettings, remaining: int) -> list[MapWay]:
    """The ways to try, the reference first: a choice on a GPU only, where much remains to be done.

    None for secants: their layout is their own, and their error would be told by the same rounded convolutions.
    """
    return WAYS[:1] if by_secants(settings) or device.type != "cuda" or remaining < CHOOSE_FROM else WAYS


def by_secants(settings: SignalSettings) -> bool:
    return settings.error is not None or settings.method == SECANT


def fastest_way(
    ways: list[MapWay], compute: Callable[[MapWay], tuple[Tensor, Tensor]], allowed: float, deadline: float = math.inf
) -> MapWay:
    """The fastest way, once warm, whose maps differ from the first's by no more than `allowed`.

    That is the median, over the images, of a map's largest difference: rounding switches some ReLUs, so that a single
    map differs by more between any two orders of adding. Nor may the median completeness error be larger by more. What
    is not tried by `deadline` is not chosen.
    """
    seconds: dict[MapWay, float] = {}
    reference: tuple[Tensor, Tensor] | None = None
    for way in ways if len(ways) > 1 else ():
        if time.monotonic() >= deadline:
            break
        compute(way)
        started = time.monotonic()
        maps, errors = (values.cpu() for values in compute(way))  # a GPU is waited for
        took = time.monotonic() - started
        reference = reference or (maps, errors)
        apart = (maps - reference[0]).abs().flatten(1).amax(1).median()
        worse = errors.median() - reference[1].median()
        if apart <= allowed and worse <= allowed:
            seconds[way] = took
    return min(seconds, key=seconds.__getitem__, default=ways[0])


def print_progress(step: int = 1000, clock: Callable[[], float] = time.monotonic) -> Callable[[int, int], None]:
    """A report for `compute_signals`: a line about each `step` images, with the speed and the time that is left."""
    started, printed = clock(), 0
    first: tuple[int, float] | None = None

    def report(done: int, total: int) -> None:
        nonlocal first, printed
        # The first batch may hold rows of an earlier call, so that it tells no speed.
        before, since = first or (0, started)
        if done == total or (first and done // step > printed // step):
            speed = (done - before) / max(clock() - since, 1e-9)
            minutes, seconds = divmod(round((total - done) / speed), 60)
            print(f"{done:,} of {total:,} images, {speed:.1f} images/s, {minutes} min {seconds:02d} s left", flush=True)
            printed = done
        first = first or (done, clock())

    return report
