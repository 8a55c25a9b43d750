"""The networks that the paper's authors released: known by their hashes, loaded under torchvision's names."""

import hashlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

from kdig_utils.method import cifar10, models, released
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.spec import METHODS

CATALOGUE = released.catalogue()
AT_HAND = Path(__file__).resolve().parents[3] / "shared" / "reference" / "students"
LAST = CATALOGUE[CATALOGUE["group"] == "last commit"]
needs_the_files = pytest.mark.skipif(not AT_HAND.is_dir(), reason="the authors' released students are not at hand")


@pytest.fixture
def at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDIG_RELEASED", str(AT_HAND))


def test_each_file_has_one_hash_one_commit_and_a_method_of_the_book() -> None:
    assert CATALOGUE["sha256"].is_unique
    assert CATALOGUE["sha256"].str.fullmatch("[0-9a-f]{64}").all()
    assert CATALOGUE["commit"].str.fullmatch("[0-9a-f]{40}").all()
    assert set(CATALOGUE["method"]) <= set(METHODS)
    assert set(CATALOGUE["k"]) <= set(models.REMOVABLE_BLOCKS)


def test_a_method_is_what_the_name_says_or_what_a_notebook_prints() -> None:
    """In a name, KD is distillation, IG an overlay, AT attention transfer; what is called Student has none of them."""
    for row in CATALOGUE[CATALOGUE["known_from"].str.startswith("its name")].itertuples():
        parts = re.findall(r"(?<![A-Z])(KD|IG|AT)(?![A-Z])", Path(row.path).stem.replace("_", " "))
        assert row.method == ("_".join(dict.fromkeys(parts)).lower() or "student"), row.path
        assert parts or "Student" in row.path, row.path


def test_an_epoch_of_fifty_thousand_images_has_782_batches_and_one_of_forty_thousand_625() -> None:
    assert released.batches_an_epoch(1.0) == 782
    assert released.batches_an_epoch(0.8) == 625


def test_the_odometer_counts_the_batches_of_a_training() -> None:
    network = models.student(17).train()
    for _batch in range(3):
        network(torch.rand(4, 3, 32, 32))
    network.eval()(torch.rand(4, 3, 32, 32))  # an evaluation is no update
    assert released.updates(network) == 3


def test_the_mean_colour_of_what_the_first_layer_saw_is_in_its_weights() -> None:
    colours = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)
    network = models.student(17, seed=1).train()
    for _batch in range(60):  # the running mean forgets a tenth with each
        network(colours.expand(2, 3, 32, 32))
    assert released.mean_colour(network).tolist() == pytest.approx([0.2, 0.5, 0.9], abs=0.08)


def test_blocks_split_for_attention_transfer_load_as_the_same_network(tmp_path: Path) -> None:
    network = models.student(5, seed=3).eval()
    split = {}
    for name, value in network.state_dict().items():
        if found := re.match(r"features\.(\d+)\.(.*)", name):
            block, rest = int(found[1]), found[2]
            front, middle, end = (f"{part}_layer" for part in ("front", "middle", "end"))
            name = f"{front}s.{block}.{rest}" if block < 9 else f"{middle}.{rest}" if block == 9 else ""
            name = name or f"{end}s.{block - 10}.{rest}"
        split[name] = value
    torch.save(split, tmp_path / "split.pt")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(released.load(tmp_path / "split.pt", 5)(images), network(images))


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    torch.save(models.student(7).state_dict(), tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"543,498.*architecture"):
        released.load(tmp_path / "small.pt", 5)


def test_a_folder_that_lacks_networks_says_which_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KDIG_RELEASED", str(tmp_path))
    (tmp_path / "other.pt").write_bytes(b"no network")
    with pytest.raises(FileNotFoundError, match=rf"34 of 34.*{re.escape(CATALOGUE['path'][0])}"):
        released.fetch()
    with pytest.raises(KeyError, match="0000"):
        released.network("000000000000")


@needs_the_files
def test_a_file_is_known_by_its_hash_whatever_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = next(iter(sorted(AT_HAND.glob("*.pt"))))
    shutil.copyfile(first, tmp_path / "renamed.pt")
    digits = hashlib.sha256(first.read_bytes()).hexdigest()
    monkeypatch.setenv("KDIG_RELEASED", str(tmp_path))
    assert released.fetch(digits[:12]) == {digits: tmp_path / "renamed.pt"}


@needs_the_files
@pytest.mark.slow
@pytest.mark.parametrize("sha256", LAST["sha256"], ids=[Path(path).stem for path in LAST["path"]])
def test_a_released_student_reaches_the_accuracy_in_its_name(sha256: str, at_hand: None, full_data: Path) -> None:
    """The paper's main student on all test images; the others on 500, within what a draw of 500 leaves to chance."""
    row = CATALOGUE.set_index("sha256").loc[sha256]
    network = released.network(sha256[:12]).to(memory_format=torch.channels_last)
    stated = float(re.search(r"TestAcc([\d.]+)\.pt", row["path"])[1])
    test: ImageSet = cifar10.load("test", full_data)
    if (row["method"], row["train_fraction"]) == ("kd_ig", 1.0):
        assert models.accuracy(network, test) == pytest.approx(stated, abs=0.02)
        return
    drawn = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:500]
    low, high = binom.interval(0.9999, 500, stated / 100)
    assert low <= 5 * models.accuracy(network, test.subset(drawn)) <= high
