"""A study: the images, networks, signals and ledger of one profile, made when they are first asked for.

`published` loads what the repository holds and trains nothing; `smoke` trains everything, tiny, on the images of the
repository; `full` trains everything at the paper's settings on the full data set.
"""

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kdig_utils import paths
from kdig_utils.experiments import evidence, teachers
from kdig_utils.experiments.campaigns import main_runs
from kdig_utils.experiments.ledger import Ledger, provenance
from kdig_utils.experiments.runs import compiled_network, student_run, teacher_run
from kdig_utils.experiments.side_by_side import SIDE_BY_SIDE, Report, Run, Trained, Way, train_together
from kdig_utils.method import artifacts, cifar10, models, pairings, precompute, training
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.models import Student, Teacher, exact_float32
from kdig_utils.method.signals import SignalSettings, TeacherSignals
from kdig_utils.method.spec import MAIN_METHODS, RunSpec, TeacherSpec

PROFILES = ("published", "smoke", "full")
SMOKE_IMAGES = 500
SMOKE_HELD_OUT = 100  # at most
# The schedule of the best public MobileNet-V2 on CIFAR-10, with a square cut out of each image (chapter 01).
# In half of its epochs and batches twice as large, so that a GPU ends it within three minutes.
TEACHER_RECIPE = TeacherSpec(
    epochs=100, batch_size=256, learning_rate=0.2, schedule="cosine", cutout=8, label_smoothing=0.0
)
WEIGHTS_SEEDS = 3  # of each method whose weights go home: enough for an interval over seeds
RUN_BYTES = 60_000_000  # a checkpoint of the teacher, written beside the one before, and its weights


def print_line(line: str) -> None:
    """Print at once, also into a pipe or a file."""
    print(line, flush=True)


@dataclass(frozen=True)
class Study:
    """One profile's images, networks, signals and ledger.

    Attributes:
        profile: one of `PROFILES`.
        folder: where checkpoints, weights and signals are kept.
        ledger: the table of finished runs.
        curves: the folder of the learning curves, one CSV file a run.
        teacher_spec: how the teacher is trained; None takes the published teacher.
        specs: the students of the main campaign; empty where nothing is trained.
        n_steps: evaluations along the path for the IG maps.
        published_teacher: its name in artifacts/: `teacher` is that of the published students.
    """

    profile: str
    folder: Path
    ledger: Ledger
    curves: Path
    teacher_spec: TeacherSpec | None = None
    specs: tuple[RunSpec, ...] = ()
    n_steps: int = 50
    published_teacher: str = "teacher"

    def with_best_teacher(self) -> "Study":
        """The same beside the best published teacher, which may have no students yet."""
        return dataclasses.replace(self, published_teacher=teachers.best())

    @cached_property
    def train(self) -> ImageSet:
        """The training images of the profile."""
        if self.profile == "full":
            return cifar10.load("train", cifar10.fetch())
        return self._sample("train")

    @cached_property
    def test(self) -> ImageSet:
        """The test images of the profile."""
        if self.profile == "full":
            return cifar10.load("test", cifar10.fetch())
        return self._sample("test")

    @cached_property
    def device(self) -> torch.device:
        """The GPU if there is one, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher in evaluation mode: the published one, or one trained now, or earlier, by this study."""
        if self.teacher_spec is None:
            return artifacts.load(self.published_teacher)
        spec = dataclasses.replace(self.teacher_spec, data_md5=self.train.md5)
        self.run(spec)
        return self.weights(spec)

    @cached_property
    def signals(self) -> TeacherSignals:
        """The teacher's signals of all training images for students with k = 5, computed now or earlier."""
        return self.signals_for(models.attention_tap(5))

    def signals_for(self, tap: int, deadline: float = math.inf) -> TeacherSignals:
        """The same with the attention maps of feature block `tap`; past `deadline` raises `SignalsNotFinished`."""
        settings = SignalSettings(n_steps=self.n_steps, tap=tap)
        folder = self.folder / "signals" / f"{models.weights_sha256(self.teacher)[:12]}_{self.n_steps}_{tap}"
        teacher = self.teacher.to(self.device)
        report = precompute.print_progress(1000)
        return precompute.compute_signals(teacher, self.train, folder, settings, None, report, deadline, print_line)

    def kinds(self, *methods: str) -> list[str]:
        """The kinds of evidence that this study's networks are: `teacher`, and students by their method."""
        ledger = self.ledger.read()
        shown = ledger[ledger["method"].isin(methods)]
        if self.profile == "published":
            entries = artifacts.manifest().items()
            shown_names = {name for name, entry in entries if entry["method"] != "teacher"} | {self.published_teacher}
            published = [entry["run_id"] for name, entry in entries if name in shown_names]
            shown = shown[shown["run_id"].isin(published)]
        return evidence.of_runs(shown)

    def students(self) -> pd.DataFrame:
        """The ledger rows of the study's students, trained first if need be; in `published` those of `main_runs`."""
        wanted = self.run_all(self.specs)
        ledger = self.ledger.read()
        return ledger[ledger["run_id"].isin(wanted)].reset_index(drop=True) if self.specs else main_runs(ledger)

    def run_all(
        self,
        specs: Iterable[RunSpec],
        campaign: str = "main",
        way: Way | None = None,
        deadline: float = math.inf,
        report: Report = print_line,
    ) -> list[str]:
        """Train what the ledger does not hold yet, side by side; return the identities of all runs.

        Each finished run is in the ledger before another one starts. What `deadline` (`time.monotonic`) cuts off goes
        on from its checkpoint the next time, before the others.

        Args:
            way: how; None takes what suits the device (`side_by_side.SIDE_BY_SIDE`). The ledger says what was compiled.

        Raises:
            TrainingDiverged: losses were not finite; all other runs are in the ledger.
        """
        specs = [self.completed(spec) for spec in specs]
        known = set(self.ledger.read()["run_id"])
        left = [spec for spec in specs if spec.run_id not in known]
        left.sort(key=lambda spec: not (self.folders["checkpoints"] / f"{spec.run_id}.pt").is_file())
        way = way or Way(SIDE_BY_SIDE[self.device.type])
        network = compiled_network(print_line) if way.compiled else models.logits_and_features
        runs = (self._student_run(spec, network, deadline) for spec in left)
        self._train(runs, campaign, way, deadline, report)
        return [spec.run_id for spec in specs]

    def completed(self, spec: RunSpec) -> RunSpec:
        """The spec with what this study adds to it: data, teacher, steps of the IG path."""
        sha = self._teacher_sha256 if spec.uses_teacher else ""
        n_steps = self.n_steps if spec.uses("ig") else spec.n_steps
        return dataclasses.replace(spec, data_md5=self.train.md5, teacher_sha256=sha, n_steps=n_steps)

    def scaled(self, spec: RunSpec) -> RunSpec:
        """The spec in this study's measure: as it is, or, in `smoke`, with the few epochs of its own students."""
        if self.profile != "smoke":
            return spec
        epochs, n_steps = self.specs[0].epochs, self.n_steps if spec.uses("ig") else spec.n_steps
        few = min(spec.validation_images, SMOKE_HELD_OUT)
        small = {"batch_size": spec.batch_size // 4, "validation_images": few}
        return dataclasses.replace(spec, epochs=epochs, n_steps=n_steps, **small)

    def run(
        self,
        spec: RunSpec | TeacherSpec,
        campaign: str = "main",
        initial: Teacher | None = None,
        deadline: float = math.inf,
        way: Way = Way(),
    ) -> pd.Series | None:
        """The ledger row of a run, training it, or going on with it, if it is not there yet; None if time was over."""
        if self.ledger.find(spec) is None:
            if isinstance(spec, TeacherSpec):
                checkpoint = self._checkpoint(spec.run_id)
                run = teacher_run(spec, self.train, self.test, initial, checkpoint, self.device)
            else:
                run = self._student_run(spec)
            self._train([run], campaign, way, deadline)
        return self.ledger.find(spec)

    def weights(self, spec: RunSpec | TeacherSpec) -> Teacher | Student:
        """The network that a run of this study ended with, in evaluation mode."""
        return artifacts.read_weights(artifacts.model_for(spec.method, spec.k), self._weights_path(spec.run_id))

    @property
    def folders(self) -> dict[str, Path]:
        """Where files are: `curves`, `weights` and `checkpoints` of runs, `flights` and their `first_calls`."""
        results = self.ledger.path.parent
        return {
            "curves": self.curves,
            "weights": self.folder / "weights",
            "checkpoints": self.folder / "checkpoints",
            "flights": results / "flights",
            "first_calls": results / "latency" / "first_calls",
        }

    @property
    def explanations_path(self) -> Path:
        """The table of explanations, beside the ledger."""
        return self.ledger.path.with_name("explanations.csv")

    def files(self, rows: pd.DataFrame) -> list[Path]:
        """What goes home with these rows: curves, weights of teachers and of first seeds, checkpoints of open runs.

        What matters most comes first, as a pack may be full before its end: an open run can be trained again.
        """
        teachers, students = rows[rows["method"] == "teacher"], rows[rows["method"] != "teacher"]
        first = students[students["seed"].astype(int) < WEIGHTS_SEEDS].sort_values("seed", kind="stable")
        curves = [self.curves / f"{run_id}.csv" for run_id in rows["run_id"]]
        weights = [self._weights_path(run_id) for run_id in (*teachers["run_id"], *first["run_id"])]
        # A teacher's checkpoint is the largest, and what all students wait for.
        open_runs = sorted(self.folders["checkpoints"].glob("*.pt"), key=lambda path: -path.stat().st_size)
        return [path for path in (*curves, *weights, *open_runs) if path.is_file()]

    def student(self, method: str, k: int = 5) -> Student:
        """One trained student: the published one, or this study's first with this method and k, trained if need be.

        Raises:
            KeyError: nothing was published, or is to be run, with this method and k.
        """
        if not self.specs:
            return artifacts.load(f"{method}_k{k}")
        wanted = [spec for spec in self.specs if (spec.method, spec.k) == (method, k)][:1]
        if not wanted:
            raise KeyError(
                f"this study runs no {method!r} with k = {k}: it has {', '.join(s.method for s in self.specs)}"
            )
        (run_id,) = self.run_all(wanted)
        return artifacts.read_weights(models.student(k), self._weights_path(run_id))

    def curve(self, run_id: str) -> pd.DataFrame:
        """The learning curve of a run: epoch, train_loss, test_accuracy, validation_accuracy, seconds."""
        return pd.read_csv(self.curves / f"{run_id}.csv")

    def _sample(self, split: str) -> ImageSet:
        sample = cifar10.load_sample(split)
        if self.profile == "published":
            return sample
        few = sample.subset(cifar10.first_of_each_class(sample.labels, SMOKE_IMAGES // 10))
        return dataclasses.replace(few, name=f"{len(few):,} of the {cifar10.SPLIT_NAMES[split]} images")

    @property
    def teacher_sha256(self) -> str:
        """The weights by which the ledger knows the teacher: the published file may be a rounded copy of them."""
        return self._teacher_sha256

    @cached_property
    def _teacher_sha256(self) -> str:
        """That of its run: the published file may be a rounded copy."""
        found, name = models.weights_sha256(self.teacher), self.published_teacher
        entry = artifacts.manifest().get(name, {})
        is_published = entry.get("precision") == "float16" and found == models.weights_sha256(artifacts.load(name))
        return entry["weights_sha256"] if is_published else found

    @cached_property
    def _on_device(self) -> dict[str, ImageSet]:
        """The image sets where they are trained on, once for all runs."""
        return {"train": self.train.to(self.device), "test": self.test.to(self.device)}

    def _student_run(
        self, spec: RunSpec, network: models.Network = models.logits_and_features, deadline: float = math.inf
    ) -> Run:
        signals, checkpoint = self._signals_of(spec, deadline), self._checkpoint(spec.run_id)
        teacher = self.teacher.to(self.device) if spec.answers == "online" else None
        return student_run(
            spec,
            **self._on_device,
            signals=signals,
            checkpoint=checkpoint,
            device=self.device,
            teacher=teacher,
            network=network,
        )

    def _train(
        self,
        runs: Iterable[Run],
        campaign: str,
        way: Way = Way(),
        deadline: float = math.inf,
        report: Report = print_line,
    ) -> None:
        """Train the runs; each one's row is in the ledger before another one starts."""
        torch.backends.cudnn.benchmark = way.benchmark
        for run in train_together(runs, way, deadline, report):
            self._record(run.spec, run.trained, campaign, compiled="yes" if way.compiled else "")
            run.checkpoint.unlink(missing_ok=True)

    def _checkpoint(self, run_id: str) -> Path:
        """Where a run is saved; asked for beforehand, so that no hours are spent for a disk that is full."""
        checkpoint = self.folder / "checkpoints" / f"{run_id}.pt"
        for folder in (checkpoint.parent, self._weights_path(run_id).parent, self.curves, self.ledger.path.parent):
            paths.check_writable(folder, RUN_BYTES)
        return checkpoint

    def _weights_path(self, run_id: str) -> Path:
        return self.folder / "weights" / f"{run_id}.safetensors"

    def _signals_of(self, spec: RunSpec, deadline: float) -> TeacherSignals | None:
        if not spec.uses_teacher:
            return None
        # Only attention transfer looks at the tap: the other methods share one store.
        tap = models.attention_tap(spec.k if spec.uses("at") else 5)
        key = (tap, spec.pairing == "gradient")
        if key not in self._signals_on_device:
            found = self.signals_for(tap, deadline)
            found = self.with_saliency(found) if spec.pairing == "gradient" else found
            self._signals_on_device[key] = found.to(self.device)
        return self._signals_on_device[key]

    def with_saliency(self, found: TeacherSignals) -> TeacherSignals:
        """The same signals with the teacher's plain gradients in place of IG maps, computed now or earlier."""
        path = self.folder / "signals" / f"{self._teacher_sha256[:12]}_saliency.npy"
        if not path.is_file():
            print_line(f"plain gradients of {len(self.train):,} images")
            with exact_float32():
                maps = pairings.saliency_maps(self.teacher.to(self.device), self.train)
            with paths.replacing(path) as part, part.open("wb") as file:
                np.save(file, maps.numpy())
        maps = torch.from_numpy(np.load(path))
        return dataclasses.replace(found, maps=maps, manifest={**found.manifest, "maps": "saliency"})

    @cached_property
    def _signals_on_device(self) -> dict[tuple[int, bool], TeacherSignals]:
        return {}

    def _record(self, spec: RunSpec | TeacherSpec, trained: Trained, campaign: str, compiled: str) -> None:
        """Weights and curve first, the ledger row last: a row in the ledger has everything behind it."""
        artifacts.save_weights(trained.model, self._weights_path(spec.run_id))
        with paths.replacing(self.curves / f"{spec.run_id}.csv") as part:
            trained.curve.round(6).to_csv(part, index=False)
        last = trained.curve.iloc[-1]
        positions, _validation = training.training_positions(self.train.labels, spec)
        self.ledger.append(
            spec,
            campaign=campaign,
            compiled=compiled,
            **{name: round(float(last[name]), 6) for name in ("test_accuracy", "validation_accuracy", "train_loss")},
            seconds=round(float(last["seconds"]), 1),
            parameters=models.count_parameters(trained.model),
            macs=models.count_macs(trained.model),
            train_images=len(positions),
            test_images=len(self.test),
            weights_sha256=models.weights_sha256(trained.model),
            finished=pd.Timestamp.now("UTC").strftime("%Y-%m-%dT%H:%MZ"),
            **provenance(self.device),
        )


def open_study(profile: str) -> Study:
    """The study of a profile.

    Raises:
        ValueError: unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    folder = paths.workspace() / profile
    if profile == "smoke":
        return Study(
            profile,
            folder,
            Ledger(folder / "runs.csv"),
            folder / "curves",
            TeacherSpec(epochs=2, batch_size=16, learning_rate=0.02),
            tuple(RunSpec(method, epochs=2, batch_size=16) for method in MAIN_METHODS),
            n_steps=4,
        )
    study = Study(profile, folder, Ledger(paths.ledger_path()), paths.curves_folder())
    if profile == "full":
        study = dataclasses.replace(study, teacher_spec=TEACHER_RECIPE, specs=tuple(map(RunSpec, MAIN_METHODS)))
    return study


def print_now_and_then(seconds: float) -> Report:
    """A report that prints a line if `seconds` have passed since the last one: many runs have much to say."""
    printed = -math.inf

    def report(line: str) -> None:
        nonlocal printed
        if time.monotonic() - printed >= seconds:
            print_line(line)
            printed = time.monotonic()

    return report
