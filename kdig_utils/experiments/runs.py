"""A run made ready: student or teacher with loss, optimiser, images and signals, for `side_by_side` to train."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils.experiments.side_by_side import Evaluation, Report, Run, Trained, first_line, fit
from kdig_utils.method import models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.overlay import EpochDraws, crop_and_flip, cutout
from kdig_utils.method.pairings import paired_signals
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import RunSpec, TeacherSpec
from kdig_utils.method.training import check_signals, chosen, schedule, student_loss, student_rates, training_positions


def train_student(
    spec: RunSpec,
    train: ImageSet,
    test: ImageSet,
    signals: TeacherSignals | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    report: Report = lambda line: None,
) -> Trained:
    """Train the student that `spec` describes, or go on from `checkpoint`.

    Args:
        train: the training images; `spec` takes its share of them.
        signals: the teacher's signals of `train`, row by row; not needed for the method `student`.
        report: called with a line of progress now and then.

    Raises:
        ValueError: the method needs signals and there are none, or the checkpoint is of another run.
        TrainingDiverged: the loss is not finite.
    """
    return fit(student_run(spec, train, test, signals, checkpoint, device), report)


def train_teacher(
    spec: TeacherSpec,
    train: ImageSet,
    test: ImageSet,
    initial: nn.Module | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
    report: Report = lambda line: None,
) -> Trained:
    """Train the teacher that `spec` describes, or go on from `checkpoint`; arguments as in `train_student`.

    Args:
        initial: the model whose weights it starts from, if `spec.initial_sha256` names one.

    Raises:
        ValueError: `initial` is not the model that `spec` names.
    """
    return fit(teacher_run(spec, train, test, initial, checkpoint, device), report)


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
    """The student that `spec` describes, ready to be trained, alone or beside others; arguments as in `train_student`.

    Images and signals that are on `device` already are shared between runs and not copied.

    Args:
        teacher: in evaluation mode, on `device`; asked only if the spec's answers are `online`.
        network: how the student is evaluated on a full batch: `models.logits_and_features`, or the same, compiled.
    """
    check_signals(spec, signals, train)
    if spec.answers == "online" and teacher is None:
        raise ValueError("answers = 'online' asks the teacher about each crop: pass the teacher")
    positions, validation = training_positions(train.labels.cpu(), spec)
    images, teacher_signals, own = chosen(train, positions).to(device), None, ()
    if signals is not None and spec.uses_teacher:
        teacher_signals = paired_signals(signals, train, positions, spec.pairing, spec.seed).to(device)
        own = () if teacher_signals.logits.data_ptr() == signals.logits.data_ptr() else teacher_signals.tensors()
    model = models.student(spec.k, spec.seed).to(device, memory_format=torch.channels_last)
    rates = student_rates(spec, math.ceil(len(images) / spec.batch_size), device)
    rate = spec.learning_rate if rates is None else rates[0].clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True, capturable=images.pixels.is_cuda)

    def batch_loss(batch: EpochDraws) -> Tensor:
        return student_loss(model, images, teacher_signals, batch, spec, teacher, network)

    evaluation = Evaluation(test.to(device), chosen(train, validation).to(device) if len(validation) else None)
    # A recorded step reads its images where they are, so only runs on the very same ones are alike.
    alike = replace(spec, seed=0, sample_seed=None, epochs=1), images.pixels.data_ptr(), bool(own), network
    return Run(spec, model, optimizer, batch_loss, len(images), evaluation, checkpoint, rates, alike=alike, own=own)


def teacher_run(
    spec: TeacherSpec,
    train: ImageSet,
    test: ImageSet,
    initial: nn.Module | None = None,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
) -> Run:
    """The teacher that `spec` describes, ready to be trained; arguments and errors as in `train_teacher`."""
    found = models.weights_sha256(initial) if initial is not None else ""
    if found != spec.initial_sha256:
        raise ValueError(
            f"the spec starts from weights {spec.initial_sha256[:12] or 'none'}, got {found[:12] or 'none'}: pass those"
        )
    positions, validation = training_positions(train.labels.cpu(), spec)
    images = chosen(train, positions).to(device)
    model = models.teacher(spec.seed)
    if initial is not None:
        model.load_state_dict(initial.state_dict())
    model = model.to(device, memory_format=torch.channels_last)
    rates, momenta = schedule(spec, math.ceil(len(images) / spec.batch_size))
    # A rate that is a tensor on the device can change under a recorded step.
    rate = torch.tensor(rates[0], device=device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, weight_decay=spec.weight_decay, nesterov=True, fused=True
    )

    def batch_loss(batch: EpochDraws) -> Tensor:
        crops = crop_and_flip(images.images(batch.order), batch.shifts, batch.flips)
        logits = model(cutout(crops, spec.cutout) if spec.cutout else crops)
        return F.cross_entropy(logits, images.labels[batch.order], label_smoothing=spec.label_smoothing)

    evaluation = Evaluation(test.to(device), chosen(train, validation).to(device) if len(validation) else None)
    rates = torch.tensor(rates, device=device)
    return Run(spec, model, optimizer, batch_loss, len(images), evaluation, checkpoint, rates, momenta)


def compiled_network(report: Report) -> models.Network:
    """`models.logits_and_features`, compiled when it is first called; where the compiler fails, as it is."""
    compiled, works = torch.compile(models.logits_and_features, dynamic=False), True
    torch._dynamo.config.cache_size_limit = 128  # each k, tap and size of batch is compiled for itself

    def network(model: nn.Module, images: Tensor, tap: int) -> tuple[Tensor, Tensor]:
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
