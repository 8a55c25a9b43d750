"""How a student is trained, to be read: the loop, its loss, its rates, and the images and signals that it sees.

`experiments.side_by_side` trains the same, resumable and many at once; a test compares the two, bit for bit on a CPU.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from kdig_utils.method import losses, models
from kdig_utils.method.cifar10 import ImageSet, first_of_each_class, stratified_split
from kdig_utils.method.overlay import EpochDraws, crop_and_flip, draw_epoch, overlay_unchecked
from kdig_utils.method.pairings import paired_signals
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import RunSpec, TeacherSpec

VALIDATION_SEED = 0  # the 5,000 validation images are the same for every run
WARM_UP_SHARE = 0.05  # of the steps, in the cosine schedule


def train_student(
    spec: RunSpec, train: ImageSet, signals: TeacherSignals | None = None, teacher: nn.Module | None = None
) -> tuple[models.Student, list[float]]:
    """The student that `spec` describes, trained on the CPU, and the mean loss of each epoch (paper, section 3).

    Args:
        train: the training images; `spec` takes its share of them.
        signals: the teacher's signals of `train`, row by row; not needed for the method `student`.
        teacher: asked about each crop if the spec's answers are `online`; the start if its initial weights are.
    """
    check_signals(spec, signals, train)
    positions, _validation = training_positions(train.labels, spec)
    images, steps = train.subset(positions), math.ceil(len(positions) / spec.batch_size)
    if signals is not None:
        signals = paired_signals(signals, train, positions, spec.pairing, spec.seed)
    model = initial_student(spec, teacher).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), spec.learning_rate, weight_decay=spec.weight_decay, fused=True)
    rates = student_rates(spec, steps)
    epoch_losses = []
    for epoch in range(spec.epochs):
        draws, total = draw_epoch(len(images), spec.overlay_probability, spec.seed, epoch), torch.zeros(())
        for step, batch in enumerate(draws.batches(spec.batch_size), start=epoch * steps):
            if rates is not None:
                optimizer.param_groups[0]["lr"] = rates[step]
            loss = student_loss(model, images, signals, batch, spec, teacher)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch.order)
        epoch_losses.append(float(total) / len(images))
    return model.eval(), epoch_losses


def initial_student(spec: RunSpec, teacher: nn.Module | None = None) -> models.Student:
    """The student before its first step, on the CPU.

    Raises:
        ValueError: it starts from the teacher's first blocks, and there is no teacher.
    """
    model = models.student(spec.k, spec.seed, spec.stem_stride)
    if spec.initial == "teacher":
        if not isinstance(teacher, models.Teacher):
            raise ValueError("initial = 'teacher' starts from the teacher's first blocks: pass the teacher")
        model.features.load_state_dict(teacher.features[: len(model.features)].state_dict())
    return model


def student_rates(spec: RunSpec, steps_an_epoch: int, device: torch.device | str = "cpu") -> Tensor | None:
    """The learning rate of each step of a student's run on `device`; None where it stays what it is.

    Raises:
        ValueError: a schedule of five steps, whose rise, a fifth of them less one, has no length.
    """
    if spec.schedule == "constant":
        return None
    if (steps := spec.epochs * steps_an_epoch) == 5:
        raise ValueError("one_cycle over 5 steps has no rise: train longer, or choose schedule constant")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], spec.learning_rate)
    scheduler = OneCycleLR(
        optimizer, spec.learning_rate, total_steps=steps, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False
    )
    return torch.tensor(rates_of(optimizer, scheduler, steps)[0], device=device)


def schedule(spec: TeacherSpec, steps_an_epoch: int) -> tuple[list[float], list[float] | None]:
    """Learning rate, and momentum if it moves, of each step of a teacher's run, by PyTorch's own schedulers."""
    steps, highest = spec.epochs * steps_an_epoch, spec.learning_rate
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], highest, momentum=0.9)
    if spec.schedule == "one_cycle":
        return rates_of(optimizer, OneCycleLR(optimizer, highest, total_steps=steps), steps)
    rise = max(1, round(WARM_UP_SHARE * steps))
    up, down = LinearLR(optimizer, 1 / rise, 1.0, rise), CosineAnnealingLR(optimizer, max(1, steps - rise))
    return rates_of(optimizer, SequentialLR(optimizer, [up, down], [rise]), steps)[0], None


def rates_of(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> tuple[list[float], list[float]]:
    """Learning rate and momentum of each of `steps` steps under one of PyTorch's schedulers."""
    rates, momenta, group = [], [], optimizer.param_groups[0]
    for step in range(steps):
        rates.append(float(group["lr"]))
        momenta.append(float(group["momentum"]))
        optimizer.step()  # the schedulers ask for it
        if step + 1 < steps:
            scheduler.step()
    return rates, momenta


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
            "signals hold the others: pass those that pairings.saliency_maps or precompute.compute_signals make"
        )
    _student_tap, needed = models.attention_taps(spec.k, spec.stem_stride)
    if spec.uses("at") and tap != needed:
        raise ValueError(
            f"attention transfer at k = {spec.k} compares the teacher's block {needed}, the signals hold block {tap}: "
            "compute them with that tap"
        )


def student_loss(
    model: models.Student,
    images: ImageSet,
    signals: TeacherSignals | None,
    batch: EpochDraws,
    spec: RunSpec,
    teacher: nn.Module | None = None,
    network: models.Network = models.logits_and_features,
) -> Tensor:
    """The paper's loss of one batch: a pure function of student, batch and spec (paper, section 3).

    `signals` holds, row by row, what the image at that position gets from the teacher under the spec's pairing;
    `teacher` is asked about the crop where the answers are `online`. `network` evaluates a full batch; the smaller last
    one of an epoch is not worth compiling for.
    """
    pixels, labels = images.images(batch.order), images.labels[batch.order]
    answers = attention = pixels.new_empty(0)
    if signals is not None:  # there are some for each method that uses the teacher: `check_signals`
        told = signals.rows(batch.order)
        online = spec.uses("kd") and spec.answers == "online"
        answers, attention = asked(teacher, pixels, batch) if online else told.logits, told.attention
    if spec.uses("ig"):
        inputs = overlay_unchecked(pixels, told.maps.float(), batch, spec.pairing)
    else:
        inputs = crop_and_flip(pixels, batch.shifts, batch.flips)
    evaluate = network if len(inputs) == spec.batch_size else models.logits_and_features
    tap, _teacher_tap = models.attention_taps(spec.k, spec.stem_stride)
    logits, features = evaluate(model, inputs, tap)
    alpha = spec.alpha if spec.uses("kd") else 0.0
    loss = (1 - alpha) * F.cross_entropy(logits, labels)
    seen = losses.Seen(logits, features, answers, attention)
    for name, part in losses.PARTS.items():
        if part.term and spec.uses(name):
            loss = loss + part.term(seen, spec)
    return loss


@torch.no_grad()
def asked(teacher: nn.Module | None, images: Tensor, batch: EpochDraws) -> Tensor:
    """The teacher's logits of the very crops that the student sees, without overlay, (N, 10)."""
    if teacher is None:
        raise ValueError("answers = 'online' asks the teacher about each crop: pass the teacher")
    return teacher(crop_and_flip(images, batch.shifts, batch.flips))


def training_positions(labels: Tensor, spec: RunSpec | TeacherSpec) -> tuple[Tensor, Tensor]:
    """Positions to train on and positions held out for validation, disjoint and stratified.

    Raises:
        ValueError: there are not as many images as the spec asks for, or it leaves fewer than two to train on.
    """
    validation, rest = stratified_split(labels, spec.validation_images, VALIDATION_SEED)
    if not len(rest):
        raise ValueError(f"validation_images = {spec.validation_images} leaves no image to train on: hold out fewer")
    taken = torch.arange(len(rest))
    if spec.train_images:
        taken = first_of_each_class(labels[rest], spec.train_images // len(labels.unique()))
        if spec.sample_seed is not None:
            taken, _left = stratified_split(labels[rest], spec.train_images, spec.sample_seed)
        if len(taken) != spec.train_images:
            raise ValueError(f"there are no {spec.train_images} images, as many of each class: {len(rest)} are left")
    elif spec.train_fraction < 1:
        classes, counts = labels[rest].unique(return_counts=True)
        each_class = round(spec.train_fraction * int(counts.min()))
        seed = spec.seed if spec.sample_seed is None else spec.sample_seed
        taken, _left = stratified_split(labels[rest], each_class * len(classes), seed)
    if len(taken) < 2:  # batch norm needs two
        told = f"train_fraction = {spec.train_fraction} leaves {len(taken)} of {len(rest)} images to train on"
        raise ValueError(f"{told}, no batch: give a larger share")
    return rest[taken], validation
