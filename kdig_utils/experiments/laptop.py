"""The laptop protocol: a small student on 2,500 images, a minute or two of one CPU core a run (claims.yml, `laptop`).

Its images, and what the teacher says of them, come with the repository, frozen: a better teacher, published later,
changes no run. Its runs have a ledger of their own, `results/laptop.csv`.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pydantic import BaseModel, Field, TypeAdapter
from torch import nn
from torchvision.datasets import CIFAR10

from kdig_utils import paths
from kdig_utils.experiments.ledger import Ledger, student_spec
from kdig_utils.experiments.reports import Report, postponed, raise_diverged
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.experiments.study import Study
from kdig_utils.method import artifacts, cifar10, models
from kdig_utils.method.checks import Sha256
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.models import Teacher
from kdig_utils.method.pairings import PAIRINGS
from kdig_utils.method.precompute import compute_signals
from kdig_utils.method.signals import SECANT, SignalSettings, TeacherSignals
from kdig_utils.method.spec import METHODS, RunSpec
from kdig_utils.method.training import train_student

NAME = "laptop"
SEEDS = 10
MORE_SEEDS = 20  # of the conditions that tell whether the map's content matters
K, IMAGES, POOL = 9, 2500, 5000
SIGNALS = SignalSettings(n_steps=14, method=SECANT)
MAP_COLUMNS = 50  # maps in a row of the picture that holds them all
BASE = RunSpec(
    "student", K, epochs=20, learning_rate=4e-3, schedule="one_cycle", stem_stride=2, precision="float32",
    train_images=IMAGES,
)  # fmt: skip
READ = {
    "kd": {"alpha": 0.9, "temperature": 4.0},  # the usual distillation (Hinton et al., arXiv 1503.02531)
    "ig": {"overlay_probability": 0.5, "n_steps": SIGNALS.n_steps},
}


def spec(method: str, **changes: Any) -> RunSpec:
    """A run of the protocol: fields that the method does not read keep their defaults, so that it has one identity."""
    usual = {
        name: value for part, fields in READ.items() if part in method.split("_") for name, value in fields.items()
    }
    return replace(BASE, method=method, **{**usual, **changes})


RECIPES: dict[str, dict[str, Any]] = {
    "constant rate": {"schedule": "constant", "learning_rate": 1e-3},
    "eight times the epochs": {"epochs": 160},
    "weight decay": {"weight_decay": 5e-4},
    "the teacher's first blocks": {"initial": "teacher"},
}
SIZES = (5, 7, 9, 11, 13)
COUNTS = (500, 1000, IMAGES, POOL)
ALPHAS, TEMPERATURES = (0.01, 0.1, 0.5, 0.9, 1.0), (1.0, 2.5, 4.0, 8.0)
# A condition is what the runs of all seeds share; by its name in claims.yml.
CONDITIONS: dict[str, RunSpec] = {
    **{method: spec(method) for method in METHODS},
    "kd, the paper's weight": spec("kd", alpha=RunSpec.alpha, temperature=RunSpec.temperature),
    "ig, the paper's probability": spec("ig", overlay_probability=RunSpec.overlay_probability),
    **{f"ig, {name}": spec("ig", pairing=name) for name in PAIRINGS if name != "matched"},
    **{f"{method}, k = {k}": spec(method, k=k) for k in SIZES if k != K for method in ("student", "kd")},
    **{f"{m}, {n:,} images": spec(m, train_images=n) for n in COUNTS if n != IMAGES for m in ("student", "kd", "ig")},
    **{f"{m}, {name}": spec(m, **its) for name, its in RECIPES.items() for m in ("student", "kd", "kd_ig")},
}
CONTENT = ("student", "ig", "ig, shuffled", "ig, black")  # what the map's content does, with more seeds
CONTROLS = tuple(f"ig, {name}" for name in PAIRINGS if name != "matched")
MAIN = (*METHODS, "kd, the paper's weight", "ig, the paper's probability", *CONTROLS)  # of L1 to L4


def runs(conditions: Iterable[str], seeds: Iterable[int]) -> list[RunSpec]:
    """Every seed with every condition, seeds outermost, so that a part of them is balanced."""
    return [replace(CONDITIONS[name], seed=seed) for seed, name in itertools.product(seeds, list(conditions))]


def surface() -> list[RunSpec]:
    """L5: alpha and temperature, judged on 500 held-out images."""
    held_out = {"validation_images": 500, "train_images": IMAGES - 500}
    chosen = itertools.product(range(3), ALPHAS, TEMPERATURES)
    return [spec("kd", seed=seed, alpha=alpha, temperature=t, **held_out) for seed, alpha, t in chosen]


def crossed() -> list[RunSpec]:
    """L6: ten draws of images, each with five seeds."""
    return [spec("student", seed=seed, sample_seed=draw) for seed, draw in itertools.product(range(5), range(10))]


def queue() -> list[RunSpec]:
    """All runs of the protocol in the order in which they are made: L1 to L4, then the others, the longest last.

    Those that need images which do not come with the repository stand behind those that need none.
    """
    counted, sized, retold = (
        [name for name in CONDITIONS if belongs(name)]
        for belongs in (lambda n: " images" in n, lambda n: ", k = " in n, lambda n: n.endswith(tuple(RECIPES)))
    )
    listed = [
        *runs(MAIN, range(SEEDS)),
        *runs(CONTENT, range(SEEDS, MORE_SEEDS)),
        *runs(counted, range(5)),
        *surface(),
        *runs(sized, range(5)),
        *sorted(runs(retold, range(5)), key=lambda run: run.epochs),
        *crossed(),
    ]
    return sorted(dict.fromkeys(listed), key=needs_the_pool)


def needs_the_pool(run: RunSpec) -> bool:
    """Whether a run takes images that do not come with the repository: more of them, or others."""
    return run.train_images > IMAGES or run.sample_seed is not None


@dataclass(frozen=True)
class Laboratory(Study):
    """The images, signals and ledger of the protocol."""

    images: int = IMAGES  # that its runs take theirs from; above `IMAGES` it needs CIFAR-10

    @cached_property
    def train(self) -> ImageSet:
        """The first training images of each class."""
        if self.images == IMAGES:
            return cifar10.load_laptop()
        official = cifar10.load("train")
        first = cifar10.first_of_each_class(official.labels, self.images // len(cifar10.CLASSES))
        return replace(official.subset(first), name=f"the first {self.images:,} training images")

    @cached_property
    def test(self) -> ImageSet:
        """All test images where CIFAR-10 is at hand, else those of the repository."""
        return cifar10.load("test") if has_cifar10() else cifar10.load_sample("test")

    @cached_property
    def teacher(self) -> Teacher:
        """The network that the frozen signals are of."""
        network = artifacts.load("laptop_teacher")
        assert isinstance(network, Teacher)
        return network

    @cached_property
    def teacher_sha256(self) -> str:
        """The weights of the network that the frozen signals are of."""
        return frozen_manifest()["teacher_sha256"]

    def signals_for(self, tap: int, deadline: float = np.inf) -> TeacherSignals:
        """The frozen signals, or, of more images, those computed now or earlier."""
        if self.images == IMAGES:
            return frozen_signals(self.train)
        folder = self.folder / f"signals_{self.images}"
        return compute_signals(self.teacher.to(self.device), self.train, folder, SIGNALS, deadline=deadline)

    def _also_measured(self, network: nn.Module) -> dict[str, float]:
        sample = cifar10.load_sample("test").to(self.device)
        return {"sample_accuracy": round(models.accuracy(network, sample), 6)}


def train(
    ledger: Path, way: Way, deadline: float, report: Report, run_all: Callable[..., list[str]] | None = None
) -> list[str]:
    """Train what is left of the protocol until `deadline` (`time.monotonic`); return the identities of its runs.

    Rows go to `ledger`. Runs that need images which do not come with the repository come last, and only where CIFAR-10
    is at hand. `run_all` may have them trained elsewhere (`cluster`); None is `Study.run_all`.

    Raises:
        TrainingDiverged: losses were not finite, now or earlier; all other runs were trained as far as time allowed.
    """
    run_ids, diverged = [], list[str]()
    for images in (IMAGES, POOL) if has_cifar10() else (IMAGES,):
        study = open_laboratory(ledger, images=images)
        specs = [run for run in queue() if needs_the_pool(run) == (images == POOL)]
        with postponed(diverged):
            run_ids += (run_all or Study.run_all)(study, specs, NAME, way, deadline, report)
    raise_diverged(diverged)
    return run_ids


def rerun(run_id: str, report: Report) -> tuple[pd.Series, pd.Series]:
    """The committed row of a run, and that of the same run trained here, in a ledger that is thrown away.

    Raises:
        ValueError: the ledger has no such run, or it needs images that are not at hand.
    """
    rows = Ledger(ledger_path()).read().query("run_id == @run_id")
    if rows.empty:
        raise ValueError(f"{ledger_path().name} has no run {run_id!r}: take a run_id from it")
    run = student_spec(rows.iloc[0])
    if needs_the_pool(run) and not has_cifar10():
        raise ValueError(f"run {run_id} needs images that do not come with the repository: fetch CIFAR-10 first")
    with tempfile.TemporaryDirectory() as folder:
        images = POOL if needs_the_pool(run) else IMAGES
        study = open_laboratory(Path(folder) / "runs.csv", Path(folder), images)
        study.run_all([run], NAME, report=report)
        return rows.iloc[0], study.ledger.read().iloc[0]


def compared(stored: pd.Series, again: pd.Series) -> str:
    """What the comparison of a run with its committed row says."""
    ours, theirs = (float(row["sample_accuracy"]) for row in (again, stored))
    words = f"{again['method']} seed {again['seed']}: committed {theirs:.2f} %, here {ours:.2f} % of 2,000 test images"
    if again["weights_sha256"] == stored["weights_sha256"]:
        return f"{words}; the weights are the same, bit for bit"
    if not spread_path().is_file():
        return f"{words}; other weights, and how much machines and versions may differ was not measured yet"
    verdict = "within" if abs(ours - theirs) <= spread() else "more than"
    return f"{words}; other weights, {verdict} the {spread():.1f} points by which machines and versions may differ"


def spread() -> float:
    """Points on the repository's test images by which a run may differ elsewhere: twice the measured deviation.

    Measured with other threads, instructions and versions (`benchmarks/laptop_spread.py`).
    """
    measured = pd.read_csv(spread_path())
    elsewhere = measured[~measured["same_weights"]]
    return 2 * float(np.sqrt(((elsewhere["again"] - elsewhere["committed"]) ** 2).mean()))


def spread_path() -> Path:
    """The measurements of how much machines and versions move a run."""
    return ledger_path().with_name("laptop_spread.csv")


def has_cifar10() -> bool:
    """Whether the official data set is at hand."""
    return (cifar10.data_root() / CIFAR10.base_folder).is_dir()


def open_laboratory(ledger: Path | None = None, folder: Path | None = None, images: int = IMAGES) -> Laboratory:
    """The laboratory; on a CPU each process of it computes in one thread, so that a run ends the same beside another.

    Args:
        ledger: where its rows go; None takes `own_ledger_path`.
        folder: of weights and checkpoints; None is one in the workspace.
        images: `IMAGES`, or `POOL` for the runs that need more.
    """
    torch.set_num_threads(1)
    folder = folder or paths.workspace() / NAME
    return Laboratory(
        NAME, folder, Ledger(ledger or own_ledger_path()), folder / "curves", n_steps=SIGNALS.n_steps, images=images
    )


def signals_folder() -> Path:
    """Where the repository keeps what the teacher says of the protocol's images."""
    return paths.artifacts_folder() / NAME


def frozen_manifest() -> dict[str, Any]:
    """Teacher, data and settings of the frozen signals."""
    path = signals_folder() / "manifest.json"
    with paths.reading(path):
        return TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())


def frozen_signals(images: ImageSet) -> TeacherSignals:
    """The frozen signals of the protocol's images, in memory: maps from bytes in one picture, the rest from arrays.

    Raises:
        FileNotFoundError: there are none, or they are damaged.
        ValueError: they are of other images.
    """
    named, folder = frozen_manifest(), signals_folder()
    if named.get("data_md5") != images.md5:
        raise ValueError(f"the signals in {folder.name} are of other images than {images.name}: restore them from git")
    packed, picture = paths.committed(folder, "signals.npz", "maps.webp")
    arrays = np.load(packed)
    rest = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in ("logits", "attention", "error")}
    sheet = torch.from_numpy(np.asarray(Image.open(picture).convert("RGB"))[..., 0].copy())
    maps = sheet.view(-1, 32, MAP_COLUMNS, 32).transpose(1, 2).reshape(-1, 32, 32)
    told = {**named, "indices": images.indices.tolist()}
    return TeacherSignals(maps=(maps.float() / 255).half(), manifest=told, **rest)


def train_small_teacher(smoothing: float, epochs: int = 60) -> nn.Module:
    """A teacher of the student's size, trained on labels of which `smoothing` is spread evenly over all classes.

    Label smoothing is distillation at temperature 1 from a teacher that finds every class equally likely: up to a
    constant the losses are one (Yuan et al., arXiv 1909.11723). On one CPU core it takes about five minutes.
    """
    images = cifar10.load_laptop()
    knows_nothing = replace(frozen_signals(images), logits=torch.zeros(len(images), len(cifar10.CLASSES)))
    return train_student(spec("kd", epochs=epochs, alpha=smoothing, temperature=1.0), images, knows_nothing)[0]


class _Stored(BaseModel):
    """What small_teachers.json must say of one; the rest of it is for readers."""

    file: str = Field(pattern=r"^[\w.-]+$")
    sha256: Sha256


def small_teacher(smoothing: float) -> nn.Module:
    """The stored small teacher: `smoothing` is 0 or 0.1.

    Raises:
        KeyError: there is no teacher with this smoothing.
        ValueError: the file is not the one that was stored, or small_teachers.json is damaged.
    """
    path = signals_folder() / "small_teachers.json"
    with paths.reading(path):
        known = TypeAdapter(dict[str, _Stored]).validate_json(path.read_bytes())
    if (name := f"{smoothing:g}") not in known:
        raise KeyError(f"no small teacher has the smoothing {name}: choose one of {', '.join(known)}")
    named, network = known[name], models.student(K, stem_stride=BASE.stem_stride)
    return artifacts.read_weights(network, signals_folder() / named.file, named.sha256)


def ledger_path() -> Path:
    """The committed runs of the protocol."""
    return paths.ledger_path().with_name("laptop.csv")


def own_ledger_path(profile: str = "full") -> Path:
    """Where rows go that are made here: to the committed ones, or, in a rehearsal or without CIFAR-10, apart.

    Rows on the fewer test images of the repository do not mix with the others.
    """
    committed = profile == "full" and has_cifar10()
    return ledger_path() if committed else paths.workspace() / NAME / "runs.csv"
