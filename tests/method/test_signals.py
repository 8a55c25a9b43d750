"""Teacher signals: each row belongs to its image, and a store cannot be mixed up or half used."""

import copy
import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from torch import nn
from torchvision.ops import Conv2dNormActivation

from kdig_utils.method import artifacts, cifar10, losses, models, precompute, signals
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.precompute import MapWay, SignalsNotFinished, compute_signals
from kdig_utils.method.signals import SignalSettings, open_signals

SETTINGS = SignalSettings(n_steps=3)
GPU = torch.device("cuda")
IMAGES = 8
BATCH = 3
# Folding batch norm and another batch size change float32 sums by 1e-6; float16 rounds a map by 5e-4.
TOLERANCE = 1e-3


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def teacher(sample_train: ImageSet) -> models.Teacher:
    """Random weights with batch-norm statistics and answers of order one, so that folding is put to the test.

    Its activations are smooth: at a switch of a ReLU6, another machine's rounding moves a gradient by 1 %.
    """
    network, generator = models.teacher(1), torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, Conv2dNormActivation) and len(layer) == 3:
            layer[2] = nn.Softplus()
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    with torch.no_grad():
        network.train()(sample_train.images(slice(0, 32)))
        for layer in norms:
            layer.weight.copy_(0.8 + 0.2 * torch.rand(layer.weight.shape, generator=generator))
        network.classifier[1].weight.normal_(0, 0.1, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def images(sample_train: ImageSet) -> ImageSet:
    return sample_train.subset(torch.arange(100, 100 + IMAGES))


@pytest.fixture(scope="module")
def store(teacher: models.Teacher, images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    compute_signals(teacher, images, folder, SETTINGS, BATCH)
    return folder


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to within `TOLERANCE` of the length."""
    return float((found - expected).norm()) < TOLERANCE * float(expected.norm())


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_rows_equal_rescoring_random_images(teacher: models.Teacher, images: ImageSet, store: Path) -> None:
    found = open_signals(teacher, images, store, SETTINGS)
    chosen = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0))[:4]
    for i in chosen.tolist():
        image, label = images.images([i]), int(images.labels[i])
        with torch.no_grad():
            assert close(found.logits[i], teacher(image)[0])
            _logits, features = models.logits_and_features(teacher, image, 9)
            assert close(found.attention[i], losses.attention_map(features)[0])
        baselines = torch.tensor(cifar10.MEAN).view(1, 3, 1, 1).expand_as(image)
        captum = IntegratedGradients(teacher).attribute(image, baselines, label, n_steps=3).abs().sum(1)[0]
        assert close(found.maps[i].float(), captum / captum.max())
    print(f"{len(chosen)} random images of {IMAGES}, seed 0")


def test_maps_are_computed_without_tf32(teacher: models.Teacher, images: ImageSet, tmp_path: Path) -> None:
    """Whatever was computed before: the setting is of the process."""
    seen, before = [], torch.backends.cudnn.allow_tf32
    network = copy.deepcopy(teacher)
    network.classifier.register_forward_hook(lambda *_arguments: seen.append(torch.backends.cudnn.allow_tf32))
    compute_signals(network, images.subset(torch.arange(1)), tmp_path, SignalSettings(n_steps=1))
    assert set(seen) == {False}
    assert torch.backends.cudnn.allow_tf32 == before


def test_only_a_gpu_with_much_to_do_has_a_choice_and_its_reference_is_what_a_cpu_does() -> None:
    ways = precompute.ways_for(GPU, SETTINGS, 50_000)
    assert len(set(ways)) == 4
    assert {way.tf32 for way in ways if way.layout == torch.channels_last} == {False, True}
    for device, remaining in ((torch.device("cpu"), 50_000), (GPU, 1000)):
        assert precompute.ways_for(device, SETTINGS, remaining) == [ways[0]] == [MapWay(torch.channels_last, False)]
    for settings in (SignalSettings(method="secant"), SignalSettings(error=0.05)):
        assert precompute.ways_for(GPU, settings, 50_000) == [MapWay()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of `signals`, which stands still unless a test moves `now`."""
    hands = SimpleNamespace(now=0.0)
    monkeypatch.setattr(precompute, "time", SimpleNamespace(monotonic=lambda: hands.now))
    return hands


@pytest.mark.parametrize(
    ("deadline", "allowed", "chosen"),
    [
        (1000, signals.QUANTISATION_ERROR["float16"], "same"),
        (1000, 0.02, "rounded"),  # the faster ones would be taken, were they within the contract
        (1000, 0.2, "incomplete"),
        (15, 0.2, "reference"),  # the first alone takes longer
        (0, 0.2, "reference"),
    ],
)
def test_the_fastest_way_within_the_contract_is_chosen(
    clock: SimpleNamespace, deadline: float, allowed: float, chosen: str
) -> None:
    maps, errors = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.01)
    found = {  # seconds, maps, completeness errors
        "reference": (5, maps, errors),
        "slow": (6, maps, errors),
        "same": (4, maps + 1e-5, errors),
        "rounded": (3, (50 * maps).round() / 50, errors),
        "incomplete": (2, maps, errors + 0.1),
        "broken": (1, maps * torch.nan, errors),
    }
    warm = set()

    def compute(way: str) -> tuple[torch.Tensor, torch.Tensor]:
        clock.now += found[way][0] + (0 if way in warm else 10 - found[way][0])
        warm.add(way)
        return found[way][1:]

    assert precompute.fastest_way(list(found), compute, allowed, deadline) == chosen
    assert clock.now < deadline + 16  # one way more at most


def test_a_lone_way_is_not_timed() -> None:
    assert precompute.fastest_way(["only"], lambda _way: pytest.fail("computed"), 0.0) == "only"


def test_a_chosen_way_is_told_stays_within_the_maps_and_leaves_settings_and_identity(
    teacher: models.Teacher, images: ImageSet, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here TF32 and layout change nothing but the order of sums; the half-done store of one way is ended by another."""
    before, along, beside, tried, lines = torch.backends.cudnn.allow_tf32, [], [], [], []
    network, ways = copy.deepcopy(teacher), precompute.ways_for(GPU, SETTINGS, 50_000)
    network.classifier.register_forward_hook(lambda *_arguments: beside.append(torch.backends.cudnn.allow_tf32))
    integrate, fastest = precompute.integrated_gradients, precompute.fastest_way

    def watched(*arguments) -> torch.Tensor:
        along.append(torch.backends.cudnn.allow_tf32)
        return integrate(*arguments)

    def last_way(ways: list[MapWay], *arguments) -> MapWay:
        tried.append(fastest(ways, *arguments))
        return ways[-1]

    def stop(*_numbers: int) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(precompute, "integrated_gradients", watched)
        patch.setattr(precompute, "ways_for", lambda *_arguments: ways)
        patch.setattr(precompute, "fastest_way", last_way)
        with pytest.raises(Stop):
            compute_signals(network, images, tmp_path, SETTINGS, BATCH, stop, say=lines.append)
    assert along == [False, False, False, False, True, True, True, True, True]  # four ways twice, one batch
    assert set(beside) == {False}
    assert torch.backends.cudnn.allow_tf32 == before
    assert tried[0] in ways
    assert len(lines) == 1
    assert "contiguous_format, tf32=True" in lines[0]
    found = compute_signals(network, images, tmp_path, SETTINGS, BATCH, say=lambda line: pytest.fail(line))
    expected = open_signals(teacher, images, store, SETTINGS)
    assert found.manifest == expected.manifest
    assert close(found.maps.float(), expected.maps.float())
    assert torch.equal(found.logits, expected.logits)


def test_another_images_map_is_told_apart(teacher: models.Teacher, images: ImageSet, store: Path) -> None:
    """The re-scoring test could not pass on a store in another order."""
    maps = open_signals(teacher, images, store, SETTINGS).maps.float().flatten(1)
    distance = torch.cdist(maps, maps) + 100 * torch.eye(IMAGES)
    assert float(distance.min()) > 100 * TOLERANCE * float(maps.norm(dim=1).max())


def test_maps_span_up_to_one_and_attention_has_unit_length(
    teacher: models.Teacher, images: ImageSet, store: Path
) -> None:
    found = open_signals(teacher, images, store, SETTINGS)
    assert found.maps.shape == (IMAGES, 32, 32)
    assert found.maps.dtype == torch.float16
    assert float(found.maps.min()) >= 0
    assert torch.equal(found.maps.amax((1, 2)), torch.ones(IMAGES).half())
    assert torch.allclose(found.attention.norm(dim=1), torch.ones(IMAGES))
    assert found.logits.shape == (IMAGES, 10)
    assert found.error.shape == (IMAGES,)
    assert bool(found.error.isfinite().all())


def test_error_is_the_relative_completeness_error(teacher: models.Teacher, images: ImageSet, store: Path) -> None:
    found, image = open_signals(teacher, images, store, SETTINGS), images.images([0])
    baselines = torch.tensor(cifar10.MEAN).view(1, 3, 1, 1).expand_as(image)
    attributions, delta = IntegratedGradients(teacher).attribute(
        image, baselines, int(images.labels[0]), n_steps=3, return_convergence_delta=True
    )
    rise = attributions.sum() - delta
    assert float(found.error[0]) == pytest.approx(float(delta.abs() / rise.abs()), rel=1e-3, abs=1e-4)


def test_manifest_names_teacher_data_settings_and_indices(
    teacher: models.Teacher, images: ImageSet, store: Path
) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    assert manifest["teacher_sha256"] == models.weights_sha256(teacher)
    assert manifest["data_md5"] == images.md5
    assert manifest["indices"] == images.indices.tolist()
    assert manifest["settings"] == {"n_steps": 3, "method": "gausslegendre", "baseline": "mean_colour", "tap": 9}
    assert set(manifest["arrays"]) == set(signals.SIGNALS)
    assert manifest["arrays"]["maps"]["sha256"] == hashlib.sha256((store / "maps.npy").read_bytes()).hexdigest()
    found = open_signals(teacher, images, store, SETTINGS).manifest
    assert found == {name: value for name, value in manifest.items() if name != "arrays"}


@pytest.mark.parametrize("stop_after", [1, 2])
def test_interrupted_store_goes_on_and_ends_the_same(
    teacher: models.Teacher, images: ImageSet, store: Path, tmp_path: Path, stop_after: int
) -> None:
    def stop(done: int, _total: int) -> None:
        if done >= stop_after * BATCH:
            raise Stop

    with pytest.raises(Stop):
        compute_signals(teacher, images, tmp_path, SETTINGS, BATCH, stop)
    with pytest.raises(FileNotFoundError, match=f"{IMAGES - stop_after * BATCH} of {IMAGES} images have no signals"):
        open_signals(teacher, images, tmp_path, SETTINGS)
    seen = []
    compute_signals(teacher, images, tmp_path, SETTINGS, BATCH, lambda done, total: seen.append((done, total)))
    assert seen[0] == (min(IMAGES, (stop_after + 1) * BATCH), IMAGES)  # nothing was computed twice
    assert contents(tmp_path) == contents(store)


@pytest.mark.parametrize(("deadline", "batches"), [(-1.0, 0), (0.5, 1), (1.5, 1), (2.1, 2)])
def test_a_deadline_is_kept_to_within_one_batch_and_the_next_call_goes_on(
    teacher: models.Teacher,
    images: ImageSet,
    store: Path,
    tmp_path: Path,
    clock: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    deadline: float,
    batches: int,
) -> None:
    """A batch takes a second here; only the first, whose pace is not known yet, may end after the deadline."""
    compute = precompute.signals_of_batch

    def in_a_second(*arguments) -> dict[str, torch.Tensor]:
        clock.now += 1
        return compute(*arguments)

    monkeypatch.setattr(precompute, "signals_of_batch", in_a_second)
    with pytest.raises(
        SignalsNotFinished, match=f"{batches * BATCH} of {IMAGES} images .*run the same again"
    ) as caught:
        compute_signals(teacher, images, tmp_path, SETTINGS, BATCH, deadline=deadline)
    assert str(tmp_path) in str(caught.value)
    assert int(np.load(tmp_path / "done.npy").sum()) == batches * BATCH
    assert clock.now == batches
    compute_signals(teacher, images, tmp_path, SETTINGS, BATCH, deadline=100)
    assert clock.now == -(-IMAGES // BATCH)  # nothing was computed twice
    assert contents(tmp_path) == contents(store)
    compute_signals(teacher, images, tmp_path, SETTINGS, BATCH, deadline=-1)  # nothing is left to do


def test_rows_written_but_not_marked_done_are_computed_again(
    teacher: models.Teacher, images: ImageSet, store: Path, tmp_path: Path
) -> None:
    for name, content in contents(store).items():
        (tmp_path / name).write_bytes(content)
    done, maps = (np.load(tmp_path / f"{name}.npy", mmap_mode="r+") for name in ("done", "maps"))
    done[3:6], maps[3:6] = False, 0.5
    done.flush(), maps.flush()
    compute_signals(teacher, images, tmp_path, SETTINGS, BATCH)
    assert contents(tmp_path) == contents(store)


def test_finished_store_is_not_computed_again(teacher: models.Teacher, images: ImageSet, store: Path) -> None:
    before, reports = contents(store), []
    compute_signals(teacher, images, store, SETTINGS, BATCH, lambda *numbers: reports.append(numbers))
    assert reports == []
    assert contents(store) == before


@pytest.mark.parametrize("use", [open_signals, compute_signals])
def test_store_of_something_else_is_refused_and_kept(
    teacher: models.Teacher, images: ImageSet, store: Path, use
) -> None:
    before = contents(store)
    others = {
        "teacher_sha256": (models.teacher(2).eval(), images, SETTINGS),
        "data_md5": (teacher, images.subset(torch.arange(IMAGES - 1, -1, -1)), SETTINGS),
        "settings": (teacher, images, SignalSettings(n_steps=4)),
    }
    for key, (network, image_set, settings) in others.items():
        with pytest.raises(ValueError, match=f"have another {key} .*compute them into another folder") as caught:
            use(network, image_set, store, settings)
        assert str(store) in str(caught.value)
    assert contents(store) == before


def test_no_store_names_folder_and_command(teacher: models.Teacher, images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no teacher signals in .*kdig_utils signals"):
        open_signals(teacher, images, tmp_path / "none", SETTINGS)


@pytest.mark.parametrize("damage", ["maps.npy", "manifest.json"])
def test_damaged_store_names_folder_and_remedy(
    teacher: models.Teacher, images: ImageSet, store: Path, tmp_path: Path, damage: str
) -> None:
    for name, content in contents(store).items():
        (tmp_path / name).write_bytes(content[: len(content) // 2] if name == damage else content)
    with pytest.raises(ValueError, match=r"damaged.*delete the folder") as caught:
        open_signals(teacher, images, tmp_path, SETTINGS)
    assert str(tmp_path) in str(caught.value)


def copied(store: Path, folder: Path, manifest: str = "hashed") -> Path:
    """The same store elsewhere, with the hashes of its arrays or, as earlier versions made it, without."""
    for name, content in contents(store).items():
        (folder / name).write_bytes(content)
    if manifest == "without hashes":
        found = json.loads((folder / "manifest.json").read_text())
        del found["arrays"]
        (folder / "manifest.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("name", signals.SIGNALS)
def test_a_flipped_bit_in_any_array_is_refused(
    teacher: models.Teacher, images: ImageSet, store: Path, tmp_path: Path, name: str
) -> None:
    file = copied(store, tmp_path) / f"{name}.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    for use in (open_signals, compute_signals):
        with pytest.raises(ValueError, match=rf"damaged .*{name}\.npy.*delete the folder"):
            use(teacher, images, tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("logits", lambda rows: rows[:-1]),
        ("maps", lambda rows: rows[:, :-1]),
        ("maps", lambda rows: rows.astype(np.float32)),
        ("attention", lambda rows: rows[:, 0]),
        ("maps", lambda rows: np.where(np.arange(IMAGES) == 3, np.nan, rows.T).T.astype(np.float16)),
        ("maps", lambda rows: 2 * rows),
        ("attention", lambda rows: -rows),
        ("done", lambda rows: rows[:-1]),
    ],
)
@pytest.mark.parametrize("manifest", ["hashed", "without hashes"])
def test_arrays_of_another_shape_type_or_range_are_refused(
    teacher: models.Teacher, images: ImageSet, store: Path, tmp_path: Path, manifest: str, name: str, damage
) -> None:
    file = copied(store, tmp_path, manifest) / f"{name}.npy"
    np.save(file, damage(np.load(file)))
    with pytest.raises(ValueError, match=r"damaged .*delete the folder"):
        open_signals(teacher, images, tmp_path, SETTINGS)


def test_a_store_from_before_is_read_unless_a_row_was_never_written(
    teacher: models.Teacher, images: ImageSet, store: Path, tmp_path: Path
) -> None:
    found = open_signals(teacher, images, copied(store, tmp_path, "without hashes"), SETTINGS)
    for part, whole in zip(found.tensors(), open_signals(teacher, images, store, SETTINGS).tensors(), strict=True):
        assert torch.equal(part, whole)
    for name in signals.SIGNALS:
        rows = np.load(tmp_path / f"{name}.npy", mmap_mode="r+")
        rows[5] = 0
        rows.flush()
    with pytest.raises(ValueError, match=r"damaged .*without any signal"):
        open_signals(teacher, images, tmp_path, SETTINGS)


def test_arrays_are_hashed_once_a_process_and_again_when_a_file_changes(
    teacher: models.Teacher, images: ImageSet, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    copied(store, tmp_path)
    for _call in range(3):
        open_signals(teacher, images, tmp_path, SETTINGS)
    assert len(hashed) == len(signals.SIGNALS)
    os.utime(tmp_path / "maps.npy", (1, 1))
    open_signals(teacher, images, tmp_path, SETTINGS)
    assert len(hashed) == len(signals.SIGNALS) + 1


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system reserves no room")
def test_a_store_has_all_its_room_before_the_first_image(
    teacher: models.Teacher, images: ImageSet, tmp_path: Path
) -> None:
    """Else a disk that another process fills ends this one with SIGBUS."""
    many = replace(
        images,
        **{
            name: getattr(images, name).repeat(200, *[1] * (getattr(images, name).ndim - 1))
            for name in ("pixels", "labels", "indices")
        },
    )
    with pytest.raises(SignalsNotFinished):
        compute_signals(teacher, many, tmp_path, SETTINGS, deadline=-1.0)
    for file in tmp_path.glob("*.npy"):
        assert 512 * file.stat().st_blocks >= file.stat().st_size > 0, file.name


def test_a_store_is_made_by_one_process_and_the_other_finds_it_done(
    teacher: models.Teacher, images: ImageSet, store: Path, tmp_path: Path
) -> None:
    """Two threads stand for two processes: a claim is a file's, and neither knows of the other."""
    few, lines, batches = images.subset(torch.arange(BATCH + 1)), [], []

    def compute(_number: int) -> signals.TeacherSignals:
        report = lambda done, total: batches.append(done)  # noqa: E731
        return compute_signals(teacher, few, tmp_path, SETTINGS, BATCH, report, say=lines.append)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(compute, range(2))
    assert batches == [BATCH, BATCH + 1]
    assert len(lines) <= 1
    assert all("waiting" in line for line in lines)
    for part, whole in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(part, whole)


def test_who_was_stopped_and_lost_the_store_writes_no_more(
    teacher: models.Teacher, images: ImageSet, tmp_path: Path
) -> None:
    def taken(done: int, _total: int) -> None:
        marker = tmp_path.parent / f".{tmp_path.name}.lock"
        marker.unlink()
        marker.write_text("filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken=ab\nduration=60.0\nstart=1\n")

    with pytest.raises(SignalsNotFinished, match="another process"):
        compute_signals(teacher, images, tmp_path, SETTINGS, BATCH, taken)
    assert np.load(tmp_path / "done.npy").sum() == BATCH
    (tmp_path.parent / f".{tmp_path.name}.lock").unlink()


def test_a_store_that_does_not_fit_is_refused_before_the_first_image(
    teacher: models.Teacher, images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A memory-mapped write to a full disk kills the process (SIGBUS), so the room is asked for beforehand."""
    needed = IMAGES * (10 * 4 + 32 * 32 * 2 + 8 * 8 * 4 + 4 + 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=needed - 1))
    with pytest.raises(OSError, match=r"MB free .*needed; free some space") as caught:
        compute_signals(teacher, images, tmp_path / "store", SETTINGS, report=lambda *_numbers: pytest.fail("started"))
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path / "store") in str(caught.value)


def test_the_callers_teacher_stays_as_it_was(teacher: models.Teacher, images: ImageSet, tmp_path: Path) -> None:
    before = models.weights_sha256(teacher)
    teacher.train()
    compute_signals(teacher, images.subset(torch.arange(2)), tmp_path, SETTINGS)
    assert teacher.training
    assert models.weights_sha256(teacher) == before
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    teacher.eval()


def test_rows_and_device_keep_the_signals_together(teacher: models.Teacher, images: ImageSet, store: Path) -> None:
    found = open_signals(teacher, images, store, SETTINGS)
    chosen = found.to("cpu").rows(torch.tensor([5, 2]))
    for part, whole in zip(chosen.tensors(), found.tensors(), strict=True):
        assert torch.equal(part, whole[[5, 2]])


def test_store_is_memory_mapped_and_writing_to_it_changes_nothing(
    teacher: models.Teacher, images: ImageSet, store: Path
) -> None:
    before = contents(store)
    open_signals(teacher, images, store, SETTINGS).maps.zero_()
    assert contents(store) == before
    assert set(signals.SIGNALS) | {"done"} == {name.removesuffix(".npy") for name in before if name.endswith(".npy")}


@pytest.mark.parametrize("wrong", [{"n_steps": 0}, {"method": "simpson"}, {"baseline": "grey"}])
def test_wrong_settings_are_refused_before_a_store_is_begun(wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        SignalSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"error": 1.5}, {"storage": "int4"}])
def test_wrong_accuracy_and_storage_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        SignalSettings(**wrong)


def test_quantisation_stays_within_the_stated_error() -> None:
    maps = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(0))
    maps[0, 0, :2] = torch.tensor([0.0, 1.0])
    half, byte = (signals.stored(maps, storage) for storage in ("float16", "uint8"))
    assert float((half.float() - maps).abs().max()) <= signals.QUANTISATION_ERROR["float16"]
    decoded = (byte.float() / 255).half().float()
    assert float((decoded - maps).abs().max()) <= signals.QUANTISATION_ERROR["uint8"]
    assert float((decoded - maps).abs().max()) > signals.QUANTISATION_ERROR["float16"]


def test_asking_for_an_error_gives_nearly_the_maps_of_many_steps_in_bytes(
    teacher: models.Teacher, images: ImageSet, tmp_path: Path
) -> None:
    few = images.subset(torch.arange(2))
    settings = SignalSettings(error=0.1, storage="uint8")
    found = compute_signals(teacher, few, tmp_path, settings)
    fine = compute_signals(teacher, few, tmp_path / "fine", SignalSettings(150, "riemann_middle"))
    assert (tmp_path / "maps.npy").stat().st_size < 2 * 32 * 32 + 200
    assert found.maps.dtype == torch.float16
    assert found.manifest["settings"]["error"] == 0.1
    apart = (found.maps.float() - fine.maps.float()).flatten(1).norm(dim=1) / fine.maps.float().flatten(1).norm(dim=1)
    assert float(apart.max()) < 0.1 + 0.03  # what was asked for, and by how much 150 gradients are off here
    assert float((found.maps[0].float() - fine.maps[1].float()).norm() / fine.maps[1].float().norm()) > 0.5
    assert float(found.error.max()) <= 0.1
    with pytest.raises(ValueError, match=r"error = 0\.1 instead of None"):
        open_signals(teacher, few, tmp_path, SignalSettings())


def test_maps_by_secants_need_fewer_evaluations_than_by_gradients(sample_train: ImageSet, tmp_path: Path) -> None:
    teacher, few = artifacts.load("teacher"), sample_train.subset(torch.arange(2))
    fine = compute_signals(teacher, few, tmp_path / "fine", SignalSettings(200, "riemann_middle")).maps.float()
    secant, gauss = (
        compute_signals(teacher, few, tmp_path / method, SignalSettings(n_steps, method)).maps.float()
        for n_steps, method in ((12, "secant"), (24, "gausslegendre"))
    )
    apart = [(found - fine).flatten(1).norm(dim=1) / fine.flatten(1).norm(dim=1) for found in (secant, gauss)]
    assert float(apart[0].max()) < 0.05
    assert bool((apart[0] < apart[1]).all())
    with pytest.raises(ValueError, match=r"n_steps = 0 .*whole number"):
        SignalSettings(0, "secant")


def test_progress_after_a_resume_tells_only_the_speed_of_what_is_new(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 10.0, 20.0])
    report = precompute.print_progress(100, clock=lambda: next(times))
    report(30_064, 50_000)  # 30,000 were there
    report(30_164, 50_000)
    assert capsys.readouterr().out.splitlines() == ["30,164 of 50,000 images, 10.0 images/s, 33 min 04 s left"]


def test_progress_tells_speed_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 10.0, 20.0, 20.0, 30.0])
    report = precompute.print_progress(100, clock=lambda: next(times))
    report(100, 1000)
    report(200, 1000)
    assert "200 of 1,000 images, 10.0 images/s, 1 min 20 s left" in capsys.readouterr().out
