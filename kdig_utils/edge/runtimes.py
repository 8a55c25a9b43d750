"""The runtimes that the benchmark hears: one entry each in one table, and the files that they open."""

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from torch import nn

from kdig_utils.edge import exporting, openers
from kdig_utils.edge.worker import LATE, Lost, Process, in_words
from kdig_utils.method import artifacts, models
from kdig_utils.paths import workspace

Writer = Callable[[nn.Module, Path], None]


class File(NamedTuple):
    """A file by its name, and what writes it, as in `exporting`."""

    name: str
    write: Writer


class Runtime(NamedTuple):
    """All that the benchmark knows of a runtime.

    Attributes:
        open: as in `openers`; another process finds it, and the writers, by name.
        packages: what is imported, and how long that takes, before a file is opened.
        files: by precision, in the order in which they are written.
        tools: further packages, which write the files.
        extra: of pyproject.toml, which installs all of these packages; empty if each is installed by its own name.
        opened_once: it is slow to open, and so is timed for one image and one thread alone.
    """

    open: openers.Opener
    packages: tuple[str, ...]
    files: Mapping[str, File]
    tools: tuple[str, ...] = ()
    extra: str = ""
    opened_once: bool = False


WEIGHTS = "weights.safetensors"
PYTORCH = ("torch", "kdig_utils.method.artifacts")
EXECUTORCH = ("torch", "executorch.extension.pybindings.portable_lib", "executorch.runtime")
STATE = {"fp32": File(WEIGHTS, artifacts.save_weights)}
ONNX = {"fp32": File("fp32.onnx", exporting.export_onnx), "int8": File("int8.onnx", exporting.export_onnx_int8)}
PTE = {  # 8 bits first: who has no time for both has the figure that is asked for
    "int8": File("int8.pte", exporting.export_executorch_int8),
    "fp32": File("fp32.pte", exporting.export_executorch),
}
RUNTIMES = {
    "eager": Runtime(openers.open_eager, PYTORCH, STATE),
    "compile": Runtime(openers.open_compiled, PYTORCH, STATE, opened_once=True),
    "onnxruntime": Runtime(openers.open_onnxruntime, ("onnxruntime",), ONNX, ("onnx",), "edge"),
    "openvino": Runtime(openers.open_openvino, ("openvino",), ONNX, ("onnx", "onnxruntime"), "edge"),
    "executorch": Runtime(openers.open_executorch, EXECUTORCH, PTE, ("torchao",)),
}


def versions(tools: bool = False) -> str:
    """The packages of all runtimes, and their `tools` if wanted, each with its version."""
    names = [name for runtime in RUNTIMES.values() for name in (*runtime.packages, *(runtime.tools if tools else ()))]
    packages = dict.fromkeys(name.partition(".")[0] for name in names)
    return ", ".join(f"{package} {_version(package)}" for package in packages if package != "kdig_utils")


def _version(package: str) -> str:
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "not installed"


def name_of(function: Callable) -> str:
    """As `module:function`, for a process of its own."""
    return f"{function.__module__}:{function.__qualname__}"


def write_files(network: nn.Module, end: float) -> tuple[Path, dict[str, str]]:
    """Write the files of all runtimes for a network, in a process of its own; those that are there already are kept.

    Args:
        end: the moment of `time.monotonic` by which it must have ended.

    Returns:
        Their folder, and why a file is not there, in words, by its name.
    """
    files = {file: runtime.extra for runtime in RUNTIMES.values() for file in runtime.files.values()}
    folder = _folder(network, files)
    problems: dict[str, str] = {}
    weights, k = folder / WEIGHTS, getattr(network, "k", 0)
    if not weights.is_file():
        artifacts.save_weights(network, weights)
    missing = [file for file in files if not (folder / file.name).is_file()]
    with contextlib.closing(Process("export", end)) as process:
        for file in missing:
            try:
                writer, path = name_of(file.write), str(folder / file.name)
                process.ask("write", writer=writer, weights=str(weights), k=k, path=path)
            except Lost as lost:
                words = in_words(str(lost), files[file])
                problems[file.name] = words if words == LATE else f"the export failed: {words}"
    return folder, problems


def _folder(network: nn.Module, files: Iterable[File]) -> Path:
    """The folder in the workspace for the files of this network, named by its weights and by all that writes them."""
    sources = sorted({inspect.getfile(file.write) for file in files})
    writers = [versions(tools=True), *(Path(source).read_text() for source in sources)]
    digest = hashlib.sha256("".join([models.weights_sha256(network), *writers]).encode())
    return workspace() / "exports" / digest.hexdigest()[:16]
