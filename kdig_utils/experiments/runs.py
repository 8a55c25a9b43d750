"""A run: a student or a teacher with its loss, optimiser, images and signals, ready for `side_by_side` to train."""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils.experiments.reports import Report, first_line
from kdig_utils.method import models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.overlay import EpochDraws, crop_and_flip, cutout
from kdig_utils.method.pairings import paired_signals
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import RunSpec, TeacherSpec
from kdig_utils.method.training import (
    check_signals,
    chosen,
    initial_student,
    schedule,
    student_loss,
    student_rates,
    training_positions,
)


class Trained(NamedTuple):
    """What a run has made.

    Attributes:
        model: in evaluation mode, on the device of the training.
        curve: one row an epoch: epoch, train_loss, test_accuracy, validation_accuracy (per cent; NaN in epochs after
            which it was not measured), seconds.
    """

    model: nn.Module
    curve: pd.DataFrame


@dataclass
class Run:
    """A run under way: what is trained, by which loss, and everything that moves; all tensors on its device."""

    spec: RunSpec | TeacherSpec
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_loss: Callable[[EpochDraws], Tensor]  # of a batch of draws, without Python decisions on tensor values
    n_images: int  # in an epoch
    test: ImageSet  # what it is measured on, as on `validation`
    validation: ImageSet | None = None
    checkpoint: Path | None = None  # where it is saved and resumed from; None keeps it in memory alone
    # Learning rate of each step, (steps,), and its momentum; None leaves the optimiser's own. With rates, the
    # optimiser's rate must be a tensor; a run with momenta is not recorded as a graph.
    rates: Tensor | None = None
    momenta: list[float] | None = None
    alike: Hashable = None  # runs that are equal in this can use one recording after another; None can use no other's
    own: tuple[Tensor, ...] = ()  # what `batch_loss` reads and belongs to this run alone
    epoch: int = 0  # finished ones
    position: int = 0  # images of the current epoch that are done, and the sum of their losses
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    seconds: float = 0.0  # spent training and measuring; runs side by side share the time
    curve: list[dict[str, float]] = field(default_factory=list)  # one entry a finished epoch
    generator: Tensor | None = None  # state of the random numbers of dropout

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def epochs_left(self) -> int:
        return self.spec.epochs - self.epoch

    @property
    def finished(self) -> bool:
        return self.epochs_left <= 0

    @property
    def uses_bfloat16(self) -> bool:
        """Whether forward passes run in bfloat16: on a GPU that computes in it, unless the spec asks for float32."""
        on_gpu = self.device.type == "cuda" and self.spec.precision == "native"
        return on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)

    @property
    def trained(self) -> Trained:
        """The network in evaluation mode and the learning curve so far."""
        return Trained(self.model.eval(), pd.DataFrame(self.curve))


def student_run(
    spec: RunSpec,
    train: ImageSet,
    test: ImageSet,
    signals: TeacherSignals | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    teacher: nn.Module | None = None,
    network: models.Network = models.logits_and_features,
) -> Run:
    """The student that `spec` describes, ready to be trained.

    Args:
        train: the training images; `spec` takes its share. What is on `device` already is shared and not copied.
        signals: the teacher's signals of `train`, row by row; not needed for the method `student`.
        teacher: in evaluation mode, on `device`; needed only if the spec's answers are `online`, or its initial weights
            the teacher's.
        network: how the student is evaluated on a full batch: `models.logits_and_features`, or the same, compiled.

    Raises:
        ValueError: the method needs signals or a teacher, and there are none, or others.
    """
    check_signals(spec, signals, train)
    if spec.answers == "online" and teacher is None:
        raise ValueError("answers = 'online' asks the teacher about each crop: pass the teacher")
    positions, images, tested, validation = image_sets(spec, train, test, device)
    told, own = told_by(signals, train, positions, spec, device)
    model = initial_student(spec, teacher).to(device).to(memory_format=torch.channels_last)
    rates = student_rates(spec, math.ceil(len(images) / spec.batch_size), device)
    rate = spec.learning_rate if rates is None else rates[0].clone()
    optimizer = torch.optim.Adam(
        model.parameters(), lr=rate, weight_decay=spec.weight_decay, fused=True, capturable=images.pixels.is_cuda
    )
    # A recorded step reads its images where they are, so only runs on the very same ones are alike.
    alike = replace(spec, seed=0, sample_seed=None, epochs=1), images.pixels.data_ptr(), bool(own), network

    def loss(batch: EpochDraws) -> Tensor:
        return student_loss(model, images, told, batch, spec, teacher, network)

    return Run(spec, model, optimizer, loss, len(images), tested, validation, checkpoint, rates, alike=alike, own=own)


def teacher_run(
    spec: TeacherSpec,
    train: ImageSet,
    test: ImageSet,
    initial: nn.Module | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
) -> Run:
    """The teacher that `spec` describes, ready to be trained; other arguments as in `student_run`.

    Args:
        initial: the model whose weights it starts from, if `spec.initial_sha256` names one.

    Raises:
        ValueError: `initial` is not the model that `spec` names.
    """
    found = models.weights_sha256(initial) if initial is not None else ""
    if found != spec.initial_sha256:
        raise ValueError(
            f"the spec starts from weights {spec.initial_sha256[:12] or 'none'}, got {found[:12] or 'none'}: pass those"
        )
    _positions, images, tested, validation = image_sets(spec, train, test, device)
    model = models.teacher(spec.seed)
    if initial is not None:
        model.load_state_dict(initial.state_dict())
    model = model.to(device).to(memory_format=torch.channels_last)
    scheduled, momenta = schedule(spec, math.ceil(len(images) / spec.batch_size))
    rates = torch.tensor(scheduled, device=device)  # as a tensor on the device it can change under a recorded step
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rates[0].clone(), momentum=0.9, weight_decay=spec.weight_decay, nesterov=True, fused=True
    )

    def loss(batch: EpochDraws) -> Tensor:
        crops = crop_and_flip(images.images(batch.order), batch.shifts, batch.flips)
        logits = model(cutout(crops, spec.cutout) if spec.cutout else crops)
        return F.cross_entropy(logits, images.labels[batch.order], label_smoothing=spec.label_smoothing)

    return Run(spec, model, optimizer, loss, len(images), tested, validation, checkpoint, rates, momenta)


def image_sets(
    spec: RunSpec | TeacherSpec, train: ImageSet, test: ImageSet, device: torch.device | str
) -> tuple[Tensor, ImageSet, ImageSet, ImageSet | None]:
    """The positions in `train` that a run trains on, these images, its test and its validation images, on `device`."""
    positions, held_out = training_positions(train.labels.cpu(), spec)
    validation = chosen(train, held_out).to(device) if len(held_out) else None
    return positions, chosen(train, positions).to(device), test.to(device), validation


def told_by(
    signals: TeacherSignals | None, train: ImageSet, positions: Tensor, spec: RunSpec, device: torch.device | str
) -> tuple[TeacherSignals | None, tuple[Tensor, ...]]:
    """What the images at `positions` are told by the teacher; and its tensors, if they are not shared between runs."""
    if signals is None or not spec.uses_teacher:
        return None, ()
    told = paired_signals(signals, train, positions, spec.pairing, spec.seed).to(device)
    return told, () if told.logits.data_ptr() == signals.logits.data_ptr() else told.tensors()


def compiled_network(report: Report) -> models.Network:
    """`models.logits_and_features`, compiled when it is first called; where the compiler fails, as it is."""
    compiled, works = torch.compile(models.logits_and_features, dynamic=False), True
    torch._dynamo.config.cache_size_limit = 128  # each k, tap and size of batch is compiled for itself

    def network(model: models.Teacher | models.Student, images: Tensor, tap: int) -> tuple[Tensor, Tensor]:
        nonlocal works
        if works:
            try:
                return compiled(model, images, tap)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler has many; one of the network itself comes again below
                works = False
                report(f"the network cannot be compiled, it is called as it is: {first_line(error)}")
        return models.logits_and_features(model, images, tap)

    return network
