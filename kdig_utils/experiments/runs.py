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
from kdig_utils.method.training import check_signals, chosen, schedule, student_loss, student_rates, training_positions


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
    """A run under way: what is trained, by which loss, and everything that moves.

    Attributes:
        batch_loss: the loss of a batch of draws, without Python decisions on tensor values.
        n_images: images in an epoch.
        test: the images that it is measured on, as those of `validation`, on its device.
        checkpoint: where the run is saved and resumed from; None keeps it in memory alone.
        rates: learning rate of each step, (steps,), on the device; None leaves the optimiser's own. The optimiser's
            rate must then be a tensor.
        momenta: momentum of each step; None leaves the optimiser's own. Such a run is not recorded as a graph.
        alike: runs that are equal in this can use one recording after another; None can use no other's.
        own: tensors that `batch_loss` reads and that belong to this run alone.
        epoch: finished epochs.
        position: images of the current epoch that are done.
        loss_sum: sum of the losses of those images, on the device.
        seconds: time spent training and measuring; runs side by side share it.
        curve: one entry a finished epoch.
        generator: state of the random numbers of dropout.
    """

    spec: RunSpec | TeacherSpec
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_loss: Callable[[EpochDraws], Tensor]
    n_images: int
    test: ImageSet
    validation: ImageSet | None = None
    checkpoint: Path | None = None
    rates: Tensor | None = None
    momenta: list[float] | None = None
    alike: Hashable = None
    own: tuple[Tensor, ...] = ()
    epoch: int = 0
    position: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    generator: Tensor | None = None

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
        teacher: in evaluation mode, on `device`; asked only if the spec's answers are `online`.
        network: how the student is evaluated on a full batch: `models.logits_and_features`, or the same, compiled.

    Raises:
        ValueError: the method needs signals or a teacher, and there are none, or others.
    """
    check_signals(spec, signals, train)
    if spec.answers == "online" and teacher is None:
        raise ValueError("answers = 'online' asks the teacher about each crop: pass the teacher")
    positions, held_out = training_positions(train.labels.cpu(), spec)
    images, taught, own = chosen(train, positions).to(device), None, False
    if signals is not None and spec.uses_teacher:
        taught = paired_signals(signals, train, positions, spec.pairing, spec.seed).to(device)
        own = taught.logits.data_ptr() != signals.logits.data_ptr()
    model = models.student(spec.k, spec.seed).to(device).to(memory_format=torch.channels_last)
    rates = student_rates(spec, math.ceil(len(images) / spec.batch_size), device)
    rate = spec.learning_rate if rates is None else rates[0].clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True, capturable=images.pixels.is_cuda)

    def batch_loss(batch: EpochDraws) -> Tensor:
        return student_loss(model, images, taught, batch, spec, teacher, network)

    # A recorded step reads its images where they are, so only runs on the very same ones are alike.
    alike = replace(spec, seed=0, sample_seed=None, epochs=1), images.pixels.data_ptr(), own, network
    tensors = taught.tensors() if taught is not None and own else ()
    measured = measured_on(train, test, held_out, device)
    return Run(spec, model, optimizer, batch_loss, len(images), *measured, checkpoint, rates, None, alike, tensors)


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
    positions, held_out = training_positions(train.labels.cpu(), spec)
    images = chosen(train, positions).to(device)
    model = models.teacher(spec.seed)
    if initial is not None:
        model.load_state_dict(initial.state_dict())
    model = model.to(device).to(memory_format=torch.channels_last)
    scheduled, momenta = schedule(spec, math.ceil(len(images) / spec.batch_size))
    rates = torch.tensor(scheduled, device=device)  # as a tensor on the device it can change under a recorded step
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rates[0].clone(), momentum=0.9, weight_decay=spec.weight_decay, nesterov=True, fused=True
    )

    def batch_loss(batch: EpochDraws) -> Tensor:
        crops = crop_and_flip(images.images(batch.order), batch.shifts, batch.flips)
        logits = model(cutout(crops, spec.cutout) if spec.cutout else crops)
        return F.cross_entropy(logits, images.labels[batch.order], label_smoothing=spec.label_smoothing)

    measured = measured_on(train, test, held_out, device)
    return Run(spec, model, optimizer, batch_loss, len(images), *measured, checkpoint, rates, momenta)


def measured_on(
    train: ImageSet, test: ImageSet, held_out: Tensor, device: torch.device | str
) -> tuple[ImageSet, ImageSet | None]:
    """Test and validation images of a run, on its device."""
    return test.to(device), chosen(train, held_out).to(device) if len(held_out) else None


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
