"""What a run trains: student and teacher, their losses, and the images and signals that they see."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils import losses, models
from kdig_utils.cifar10 import ImageSet, stratified_split
from kdig_utils.controls import control_maps
from kdig_utils.engine import Evaluation, Report, Run, Trained, first_line, fit
from kdig_utils.overlay import EpochDraws, crop_and_flip, cutout, overlay, signal_positions
from kdig_utils.runs import RunSpec, TeacherSpec
from kdig_utils.signals import TeacherSignals

Network = Callable[[nn.Module, Tensor, int], tuple[Tensor, Tensor]]  # model, images, tap: logits, features
VALIDATION_SEED = 0  # the 5,000 validation images are the same for every run
WARM_UP_SHARE = 0.05  # of the steps, in the cosine schedule


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
    network: Network = models.logits_and_features,
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
        teacher_signals = paired_signals(signals, train, positions, spec).to(device)
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


def student_rates(spec: RunSpec, steps_an_epoch: int, device: torch.device | str) -> Tensor | None:
    """The learning rate of each step of a student's run on `device`; None where it stays what it is."""
    if spec.schedule == "constant":
        return None
    steps = spec.epochs * steps_an_epoch
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], spec.learning_rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, spec.learning_rate, total_steps=steps, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False
    )
    return torch.tensor(rates_of(optimizer, scheduler, steps)[0], device=device)


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


def schedule(spec: TeacherSpec, steps_an_epoch: int) -> tuple[list[float], list[float] | None]:
    """Learning rate, and momentum if it moves, of each step of a teacher's run, by PyTorch's own schedulers."""
    steps, highest = spec.epochs * steps_an_epoch, spec.learning_rate
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], highest, momentum=0.9)
    if spec.schedule == "one_cycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=steps)
    else:
        rise = max(1, round(WARM_UP_SHARE * steps))
        up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / rise, 1.0, rise)
        down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - rise))
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [rise])
    rates, momenta = rates_of(optimizer, scheduler, steps)
    return rates, momenta if spec.schedule == "one_cycle" else None


def rates_of(
    optimizer: torch.optim.SGD, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int
) -> tuple[list[float], list[float]]:
    """Learning rate and momentum of each of `steps` steps under one of PyTorch's schedulers."""
    rates, momenta, group = [], [], optimizer.param_groups[0]
    for step in range(steps):
        rates.append(float(group["lr"]))
        momenta.append(float(group["momentum"]))
        optimizer.step()  # the schedulers ask for it
        if step + 1 < steps:
            scheduler.step()
    return rates, momenta


def compiled_network(report: Report) -> Network:
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


def chosen(images: ImageSet, positions: Tensor) -> ImageSet:
    """The images at `positions`; the very same set, not a copy, if those are all in their order."""
    whole = len(positions) == len(images) and bool((positions == torch.arange(len(images))).all())
    return images if whole else images.subset(positions)


def check_signals(spec: RunSpec, signals: TeacherSignals | None, train: ImageSet) -> None:
    """Raise ValueError unless `signals` are what the spec's method needs, from the spec's teacher, of these images."""
    if not spec.uses_teacher:
        return
    if signals is None:
        raise ValueError(
            f"method {spec.method} needs the teacher's signals: compute them with `python -m kdig_utils signals`"
        )
    if signals.manifest["indices"] != train.indices.tolist():
        raise ValueError(f"the signals are those of other images than {train.name}: compute the signals of these")
    found, tap = signals.manifest["teacher_sha256"], signals.manifest["settings"]["tap"]
    if spec.teacher_sha256 and spec.teacher_sha256 != found:
        raise ValueError(
            f"the spec names teacher {spec.teacher_sha256[:12]}, the signals are of {found[:12]}: compute its signals"
        )
    if (spec.pairing == "gradient") != (signals.manifest.get("maps") == "saliency"):
        raise ValueError(
            f"pairing {spec.pairing!r} blends in {'plain gradients' if spec.pairing == 'gradient' else 'IG maps'}, the "
            "signals hold the others: pass those that controls.saliency_maps or signals.compute_signals make"
        )
    if spec.uses("at") and tap != models.attention_tap(spec.k):
        raise ValueError(
            f"attention transfer at k = {spec.k} compares block {models.attention_tap(spec.k)}, the signals hold block "
            f"{tap}: compute them with that tap"
        )


def student_loss(
    model: models.Student,
    images: ImageSet,
    signals: TeacherSignals | None,
    batch: EpochDraws,
    spec: RunSpec,
    teacher: nn.Module | None = None,
    network: Network = models.logits_and_features,
) -> Tensor:
    """The paper's loss of one batch: a pure function of student, batch and spec (paper, section 3).

    `signals` holds, row by row, what the image at that position gets from the teacher under the spec's pairing;
    `teacher` is asked about the crop where the answers are `online`. `network` evaluates a full batch; the smaller last
    one of an epoch is not worth compiling for.
    """
    pixels, labels = images.images(batch.order), images.labels[batch.order]
    told = signals.rows(batch.order) if signals is not None else None
    if spec.uses("ig"):
        inputs = overlay(pixels, told.maps.float(), batch, spec.pairing)
    else:
        inputs = crop_and_flip(pixels, batch.shifts, batch.flips)
    evaluate = network if len(inputs) == spec.batch_size else models.logits_and_features
    logits, features = evaluate(model, inputs, models.attention_tap(spec.k))
    alpha = spec.alpha if spec.uses("kd") else 0.0
    loss = (1 - alpha) * F.cross_entropy(logits, labels)
    if spec.uses("kd"):
        answers = told.logits if spec.answers == "stored" else asked(teacher, pixels, batch)
        loss = loss + alpha * losses.distillation_loss(logits, answers, spec.temperature)
    if spec.uses("at"):
        loss = loss + spec.gamma * losses.attention_loss(features, told.attention)
    return loss


@torch.no_grad()
def asked(teacher: nn.Module, images: Tensor, batch: EpochDraws) -> Tensor:
    """The teacher's logits of the very crops that the student sees, without overlay, (N, 10)."""
    return teacher(crop_and_flip(images, batch.shifts, batch.flips))


def training_positions(labels: Tensor, spec: RunSpec | TeacherSpec) -> tuple[Tensor, Tensor]:
    """Positions to train on and positions held out for validation, disjoint and stratified."""
    validation, rest = stratified_split(labels, spec.validation_images, VALIDATION_SEED)
    if spec.train_fraction == 1:
        return rest, validation
    each_class = int(spec.train_fraction * int(labels[rest].bincount().min()))
    seed = spec.seed if spec.sample_seed is None else spec.sample_seed
    drawn, _left = stratified_split(labels[rest], each_class * len(labels.unique()), seed)
    return rest[drawn], validation


def paired_signals(signals: TeacherSignals, train: ImageSet, positions: Tensor, spec: RunSpec) -> TeacherSignals:
    """The rows of `signals` for the images at `positions` of `train` under the spec's pairing.

    The released scripts save maps in one shuffled order, logits and attention maps in another: two permutations.
    """
    if spec.pairing == "matched" and positions.equal(torch.arange(len(signals.logits))):
        return signals
    maps_of = signal_positions(len(signals.logits), spec.pairing, seed=2 * spec.seed)[positions]
    answers_of = signal_positions(len(signals.logits), spec.pairing, seed=2 * spec.seed + 1)[positions]
    maps, answers = signals.rows(maps_of), signals.rows(answers_of)
    blended = control_maps(spec.pairing, maps.maps, train, positions, spec.seed)
    return TeacherSignals(answers.logits, blended, answers.attention, maps.error, signals.manifest)
