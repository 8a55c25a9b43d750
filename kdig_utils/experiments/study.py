"""A study: the images, networks, signals and ledger of one profile, made when they are first asked for.

`published` loads what the repository holds and trains nothing; `smoke` trains everything, tiny, on the images of the
repository; `full` trains everything at the paper's settings on the full data set.
"""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from kdig_utils import locks, paths
from kdig_utils.experiments import evidence, reports, teachers
from kdig_utils.experiments.campaigns import main_runs
from kdig_utils.experiments.ledger import Ledger, outcome, provenance
from kdig_utils.experiments.packs import SUFFIXES
from kdig_utils.experiments.reports import Report, print_line
from kdig_utils.experiments.reservations import ended, reserved
from kdig_utils.experiments.runs import Run, compiled_network, student_run, teacher_run
from kdig_utils.experiments.side_by_side import SIDE_BY_SIDE, Way, train_together
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
RUN_BYTES = 60_000_000  # a checkpoint of the teacher, written beside the one before, and its weights
LAST_EPOCH = ("test_accuracy", "validation_accuracy", "train_loss")  # what a row says of it


@dataclass(frozen=True)
class Study:
    """One profile's images, networks, signals and ledger."""

    profile: str  # one of `PROFILES`
    folder: Path  # of checkpoints, weights and signals
    ledger: Ledger
    curves: Path  # the folder of the learning curves, one CSV file a run
    teacher_spec: TeacherSpec | None = None  # how the teacher is trained; None takes the published one
    specs: tuple[RunSpec, ...] = ()  # the students of the main campaign; empty where nothing is trained
    n_steps: int = 50  # evaluations along the path for the IG maps
    published_teacher: str = "teacher"  # its name in artifacts/: `teacher` is that of the published students

    def with_best_teacher(self) -> "Study":
        """The same beside the best published teacher, which may have no students yet."""
        return replace(self, published_teacher=teachers.best())

    @cached_property
    def train(self) -> ImageSet:
        """The training images of the profile."""
        return self._images("train")

    @cached_property
    def test(self) -> ImageSet:
        """The test images of the profile."""
        return self._images("test")

    def _images(self, split: str) -> ImageSet:
        if self.profile == "full":
            return cifar10.load(split, cifar10.fetch())
        sample = cifar10.load_sample(split)
        if self.profile == "published":
            return sample
        few = sample.subset(cifar10.first_of_each_class(sample.labels, SMOKE_IMAGES // 10))
        return replace(few, name=f"{len(few):,} of the {cifar10.SPLIT_NAMES[split]} images")

    @cached_property
    def device(self) -> torch.device:
        """The GPU if there is one, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def _on_device(self) -> dict[str, ImageSet]:
        """The image sets where they are trained on, once for all runs."""
        return {"train": self.train.to(self.device), "test": self.test.to(self.device)}

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

    def _file(self, kind: str, run_id: str) -> Path:
        return self.folders[kind] / f"{run_id}.{SUFFIXES[kind]}"

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher in evaluation mode: the published one, or one trained now, or earlier, by this study."""
        if self.teacher_spec is None:
            network = artifacts.load(self.published_teacher)
        else:
            spec = replace(self.teacher_spec, data_md5=self.train.md5)
            self.run(spec)
            network = self.weights(spec)
        assert isinstance(network, Teacher)
        return network

    @cached_property
    def teacher_sha256(self) -> str:
        """The weights by which the ledger knows the teacher: the published file may be a rounded copy of them."""
        found, name = models.weights_sha256(self.teacher), self.published_teacher
        entry = artifacts.manifest().get(name, {})
        is_published = entry.get("precision") == "float16" and found == models.weights_sha256(artifacts.load(name))
        return entry["weights_sha256"] if is_published else found

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

    def with_saliency(self, found: TeacherSignals) -> TeacherSignals:
        """The same signals with the teacher's plain gradients in place of IG maps, computed now or earlier."""
        path = self.folder / "signals" / f"{self.teacher_sha256[:12]}_saliency.npy"
        with exact_float32():
            maps = pairings.stored_saliency_maps(self.teacher.to(self.device), self.train, path, print_line)
        return replace(found, maps=maps, manifest={**found.manifest, "maps": "saliency"})

    @cached_property
    def _signals_on_device(self) -> dict[tuple[int, bool], TeacherSignals]:
        return {}

    def signals_of(self, spec: RunSpec, deadline: float) -> TeacherSignals | None:
        """What a run reads of the teacher, on the device; None if nothing. Raises as `signals_for`."""
        if not spec.uses_teacher:
            return None
        # Only attention transfer looks at the tap: the other methods share one store.
        tap, saliency = models.attention_tap(spec.k if spec.uses("at") else 5), spec.pairing == "gradient"
        if (tap, saliency) not in self._signals_on_device:
            found = self.signals_for(tap, deadline)
            found = self.with_saliency(found) if saliency else found
            self._signals_on_device[tap, saliency] = found.to(self.device)
        return self._signals_on_device[tap, saliency]

    def completed(self, spec: RunSpec) -> RunSpec:
        """The spec with what this study adds to it: data, teacher, steps of the IG path."""
        sha = self.teacher_sha256 if spec.uses_teacher else ""
        n_steps = self.n_steps if spec.uses("ig") else spec.n_steps
        return replace(spec, data_md5=self.train.md5, teacher_sha256=sha, n_steps=n_steps)

    def scaled(self, spec: RunSpec) -> RunSpec:
        """The spec in this study's measure: as it is, or, in `smoke`, with the few epochs of its own students."""
        if self.profile != "smoke":
            return spec
        epochs, batch_size = self.specs[0].epochs, spec.batch_size // 4
        n_steps, few = self.n_steps if spec.uses("ig") else spec.n_steps, min(spec.validation_images, SMOKE_HELD_OUT)
        return replace(spec, epochs=epochs, batch_size=batch_size, n_steps=n_steps, validation_images=few)

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
        on from its checkpoint the next time, before the others. A `way` of None is what suits the device.

        Raises:
            TrainingDiverged: losses were not finite, now or earlier; all other runs are in the ledger.
        """
        specs = [self.completed(spec) for spec in specs]
        finished = partial(ended, self.ledger, self.folders["checkpoints"], self.folder)
        known, diverged = finished(), reports.divergences(self.folder, {spec.run_id for spec in specs})
        left = [spec for spec in specs if spec.run_id not in known]
        left.sort(key=lambda spec: not self._file("checkpoints", spec.run_id).is_file())
        way = way or Way(SIDE_BY_SIDE[self.device.type])
        network = compiled_network(print_line) if way.compiled else models.logits_and_features
        ours = reserved(left, self.folder / "reserved", finished, report)
        with reports.postponed(diverged), contextlib.closing(ours):
            self._train((self._student_run(spec, network, deadline) for spec in ours), campaign, way, deadline, report)
        reports.raise_diverged(diverged)
        return [spec.run_id for spec in specs]

    def run(
        self,
        spec: TeacherSpec,
        campaign: str = "main",
        initial: Teacher | None = None,
        deadline: float = math.inf,
        way: Way = Way(),
    ) -> pd.Series | None:
        """The ledger row of a teacher, trained now, from `initial` if the spec says so; None if time was over.

        While another process trains it, this one waits.
        """
        if self.ledger.find(spec) is None:
            claim = locks.claimed(self.folder / "reserved" / spec.run_id, print_line, deadline)
            with contextlib.suppress(TimeoutError), claim:
                if self.ledger.find(spec) is None:  # else the other process has just ended it
                    run = teacher_run(spec, self.train, self.test, initial, self._checkpoint(spec.run_id), self.device)
                    self._train([run], campaign, way, deadline, print_line)
        return self.ledger.find(spec)

    def _student_run(self, spec: RunSpec, network: models.Network, deadline: float) -> Run:
        return student_run(
            spec,
            **self._on_device,
            signals=self.signals_of(spec, deadline),
            checkpoint=self._checkpoint(spec.run_id),
            device=self.device,
            teacher=self.teacher.to(self.device) if spec.asks_the_network else None,
            network=network,
        )

    def _checkpoint(self, run_id: str) -> Path:
        """Where a run is saved; asked for beforehand, so that no hours are spent for a disk that is full."""
        for folder in (*(self.folders[kind] for kind in SUFFIXES), self.ledger.path.parent):
            paths.check_writable(folder, RUN_BYTES)
        return self._file("checkpoints", run_id)

    def _train(self, runs: Iterable[Run], campaign: str, way: Way, deadline: float, report: Report) -> None:
        """Train the runs; each one's row is in the ledger before another one starts."""
        torch.backends.cudnn.benchmark = way.benchmark
        with reports.logged(report, self.folder, campaign) as told:
            for run in train_together(runs, way, deadline, told):
                # A process that was stopped for longer than its lease may find its run trained by another.
                with locks.locked(self._file("weights", run.spec.run_id)):
                    if self.ledger.find(run.spec) is None:
                        self._record(run, campaign=campaign, compiled="yes" if way.compiled else "")
                self._file("checkpoints", run.spec.run_id).unlink(missing_ok=True)

    def _record(self, run: Run, **known: str) -> None:
        """Weights and curve first, the ledger row last: a row in the ledger has everything behind it.

        A teacher is rounded to float16 before it is measured for its row; its curve is that of the training.
        """
        spec, (model, curve) = run.spec, run.trained
        last = {name: round(float(curve.iloc[-1][name]), 6) for name in LAST_EPOCH}
        if isinstance(model, Teacher):  # a file of half the size holds the very network that students learn from
            with contextlib.suppress(ValueError):  # values that float16 cannot hold stay as they are
                model = artifacts.rounded(model, spec.method, 0).to(self.device)
            last["test_accuracy"] = round(models.accuracy(model, self._on_device["test"]), 6)
        artifacts.save_weights(model, self._file("weights", spec.run_id))
        with paths.replacing(self._file("curves", spec.run_id)) as part:
            curve.round(6).to_csv(part, index=False)
        positions, _validation = training.training_positions(self.train.labels, spec)
        self.ledger.append(
            spec,
            **known,
            **last,
            seconds=round(float(curve.iloc[-1]["seconds"]), 1),
            train_images=len(positions),
            test_images=len(self.test),
            **self._also_measured(model),
            **outcome(model),
            **provenance(self.device),
        )

    def _also_measured(self, _network: nn.Module) -> dict[str, float]:
        """What else a row of this study says of its network."""
        return {}

    def weights(self, spec: RunSpec | TeacherSpec) -> Teacher | Student:
        """The network that a run of this study ended with, in evaluation mode; raises as `artifacts.read_weights`."""
        untrained, row = artifacts.model_for(spec.method, spec.k, spec.stem_stride), self.ledger.find(spec)
        path, sha256 = self._file("weights", spec.run_id), None if row is None else row["weights_sha256"]
        network = artifacts.read_weights(untrained, path, weights_sha256=sha256)
        assert isinstance(network, Teacher | Student)
        return network

    def curve(self, run_id: str) -> pd.DataFrame:
        """The learning curve of a run: epoch, train_loss, test_accuracy, validation_accuracy, seconds."""
        return pd.read_csv(self._file("curves", run_id))

    def students(self) -> pd.DataFrame:
        """The ledger rows of the study's students, trained first if need be; in `published` those of `main_runs`."""
        wanted, ledger = self.run_all(self.specs), self.ledger.read()
        return ledger[ledger["run_id"].isin(wanted)].reset_index(drop=True) if self.specs else main_runs(ledger)

    def student(self, method: str, k: int = 5) -> Student:
        """One trained student: the published one, or this study's first with this method and k, trained if need be.

        Raises:
            KeyError: nothing was published, or is to be run, with this method and k.
        """
        its = {(spec.method, spec.k): spec for spec in reversed(self.specs)}
        if not self.specs:
            network = artifacts.load(f"{method}_k{k}")
        elif spec := its.get((method, k)):
            self.run_all([spec])
            network = self.weights(self.completed(spec))
        else:
            there = ", ".join(spec.method for spec in self.specs)
            raise KeyError(f"this study runs no {method!r} with k = {k}: it has {there}")
        assert isinstance(network, Student)
        return network

    def kinds(self, *methods: str) -> list[str]:
        """The kinds of evidence that this study's networks are: `teacher`, and students by their method."""
        shown = self.ledger.read().query("method in @methods")
        if self.profile == "published":
            entries = artifacts.manifest().items()
            there = [e["run_id"] for name, e in entries if e["method"] != "teacher" or name == self.published_teacher]
            shown = shown[shown["run_id"].isin(there)]
        return evidence.of_runs(shown)


def open_study(profile: str) -> Study:
    """The study of a profile.

    Raises:
        ValueError: unknown profile.
    """
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    folder = paths.workspace() / profile
    if profile == "smoke":
        teacher = TeacherSpec(epochs=2, batch_size=16, learning_rate=0.02)
        specs = tuple(RunSpec(method, epochs=2, batch_size=16) for method in MAIN_METHODS)
        return Study(profile, folder, Ledger(folder / "runs.csv"), folder / "curves", teacher, specs, n_steps=4)
    study = Study(profile, folder, Ledger(paths.ledger_path()), paths.curves_folder())
    if profile == "full":
        return replace(study, teacher_spec=TEACHER_RECIPE, specs=tuple(map(RunSpec, MAIN_METHODS)))
    return study
