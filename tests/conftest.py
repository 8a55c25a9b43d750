"""What the tests share: the images of the repository, the official data set, and a workspace of their own."""

import contextlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from jupyter_client.connect import LocalPortCache
from torch.nn import functional as F
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from kdig_utils import machine, paths
from kdig_utils.method import cifar10
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.signals import TeacherSignals

sys.path.append(str(Path(__file__).parent))  # for `ledgers` and `chapters`, which tests import
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def pytest_configure(config: pytest.Config) -> None:
    """Kernels get the environment of `reproduce`, none of the reader's settings.

    Side by side, each process takes the ports of its kernels from a range of its own: two could pick the same.
    """
    folder = tempfile.TemporaryDirectory(prefix="kernels-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ.update(machine.kernel_environment(Path(folder.name)) | paths.absolute_folders())
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        ports = itertools.cycle(range(20_000 + 1_000 * int(worker[2:]), 21_000 + 1_000 * int(worker[2:])))
        LocalPortCache.find_available_port = lambda _cache, ip: next(port for port in ports if is_free(ip, port))


def is_free(ip: str, port: int) -> bool:
    with socket.socket() as tried, contextlib.suppress(OSError):
        tried.bind((ip, port))
        return True
    return False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Side by side, the tests of a file stay in one process, as they share what is costly; chapters need not."""
    return ByFile(config, log)


class ByFile(LoadScopeScheduling):
    """Work is shared out by file, and by chapter where each chapter is a test."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if "test_every_notebook_runs_in_smoke" in nodeid else nodeid.partition("::")[0]


@pytest.fixture(scope="session", autouse=True)
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh workspace for the session: no test writes into the reader's, and what is trained is trained once."""
    folder = tmp_path_factory.mktemp("workspace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDIG_WORKSPACE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def sample_train() -> ImageSet:
    """The 1,000 training images that come with the repository."""
    return cifar10.load_sample("train")


@pytest.fixture(scope="session")
def sample_test() -> ImageSet:
    """The 2,000 test images that come with the repository."""
    return cifar10.load_sample("test")


@pytest.fixture(scope="session")
def full_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the official data set: `KDIG_DATA`, or unpacked from ../shared/cifar10, once a session."""
    if root := os.environ.get("KDIG_DATA"):
        return Path(root)
    unpack = SHARED / "cifar10" / "unpack.py"
    if not unpack.is_file():
        pytest.skip("needs the official CIFAR-10 files: set KDIG_DATA to their root")
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, unpack, root], check=True, stdout=subprocess.DEVNULL)
    return root


@pytest.fixture(scope="session")
def random_signals() -> Callable[..., TeacherSignals]:
    """Makes signals of a set of images, drawn from one seed, with attention maps of `side` × `side`."""

    def signals_of(train: ImageSet, side: int = 32) -> TeacherSignals:
        generator, n = torch.Generator().manual_seed(0), len(train)
        return TeacherSignals(
            logits=4 * torch.randn(n, 10, generator=generator),
            maps=torch.rand(n, 32, 32, generator=generator).half(),
            attention=F.normalize(torch.rand(n, side * side, generator=generator), dim=1),
            error=torch.zeros(n),
            manifest={
                "teacher_sha256": "ab" * 32,
                "indices": train.indices.tolist(),
                "settings": {"tap": {32: 0, 8: 9}[side]},
            },
        )

    return signals_of
