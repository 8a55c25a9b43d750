"""One training loop for teacher and students: readable, resumable, the same for a notebook, a CPU and a GPU.

A batch is positions into tensors that live on the device. All random numbers of an epoch are drawn at its start from
(seed, epoch), so a checkpoint needs only weights, optimiser state, the generator of dropout, and the position.
"""

import io
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdig_utils import losses, models
from kdig_utils.cifar10 import ImageSet, stratified_split
from kdig_utils.overlay import EpochDraws, crop_and_flip, draw_epoch, overlay, signal_positions
from kdig_utils.paths import replacing
from kdig_utils.runs import RunSpec, TeacherSpec
from kdig_utils.signals import TeacherSignals

Report = Callable[[str], None]
CHECK_EVERY = 50  # steps between two looks at the loss: each look makes a GPU wait
SAVE_EVERY_SECONDS = 60.0
VALIDATION_SEED = 0  # the 5,000 validation images are the same for every run


class TrainingDiverged(RuntimeError):
    """The loss is not finite; the last checkpoint was made before that."""


@dataclass
class Trained:
    """A finished run.

    Attributes:
        model: in evaluation mode, on the device of the training.
        curve: one row an epoch: epoch, train_loss, test_accuracy, validation_accuracy (per cent), seconds.
    """

    model: nn.Module
    curve: pd.DataFrame


@dataclass
class State:
    """Everything that moves during training; `position` counts images of the current epoch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epoch: int = 0
    position: int = 0
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(()))
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """The image sets that a run is measured on after each epoch."""

    test: ImageSet
    validation: ImageSet | None = None


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
    check_signals(spec, signals, train)
    positions, validation = training_positions(train.labels, spec)
    images, teacher_signals = train.subset(positions).to(device), None
    if signals is not None and spec.uses_teacher:
        teacher_signals = paired_signals(signals, positions, spec).to(device)
    model = models.student(spec.k, spec.seed).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=spec.learning_rate, fused=True)
    state = State(model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0))

    def batch_loss(batch: EpochDraws) -> Tensor:
        return student_loss(model, images, teacher_signals, batch, spec)

    held_out = train.subset(validation).to(device) if len(validation) else None
    return fit(state, batch_loss, len(images), spec, Evaluation(test.to(device), held_out), checkpoint, report)


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
    found = models.weights_sha256(initial) if initial is not None else ""
    if found != spec.initial_sha256:
        raise ValueError(
            f"the spec starts from weights {spec.initial_sha256[:12] or 'none'}, got {found[:12] or 'none'}: pass those"
        )
    positions, validation = training_positions(train.labels, spec)
    images = train.subset(positions).to(device)
    model = models.teacher(spec.seed)
    if initial is not None:
        model.load_state_dict(initial.state_dict())
    model = model.to(device, memory_format=torch.channels_last)
    # The scheduler takes over learning rate and momentum with its first step.
    optimizer = torch.optim.SGD(
        model.parameters(), lr=spec.learning_rate, momentum=0.9, weight_decay=spec.weight_decay, nesterov=True
    )
    steps = spec.epochs * math.ceil(len(images) / spec.batch_size)
    state = State(
        model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, spec.learning_rate, total_steps=steps)
    )

    def batch_loss(batch: EpochDraws) -> Tensor:
        crops = crop_and_flip(images.images(batch.order), batch.shifts, batch.flips)
        return F.cross_entropy(model(crops), images.labels[batch.order], label_smoothing=spec.label_smoothing)

    held_out = train.subset(validation).to(device) if len(validation) else None
    return fit(state, batch_loss, len(images), spec, Evaluation(test.to(device), held_out), checkpoint, report)


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
    if spec.uses("at") and tap != models.attention_tap(spec.k):
        raise ValueError(
            f"attention transfer at k = {spec.k} compares block {models.attention_tap(spec.k)}, the signals hold block "
            f"{tap}: compute them with that tap"
        )


def student_loss(
    model: models.Student, images: ImageSet, signals: TeacherSignals | None, batch: EpochDraws, spec: RunSpec
) -> Tensor:
    """The paper's loss of one batch: a pure function of student, batch and spec (paper, section 3).

    `signals` holds, row by row, what the image at that position gets from the teacher under the spec's pairing.
    """
    pixels, labels = images.images(batch.order), images.labels[batch.order]
    teacher = signals.rows(batch.order) if signals is not None else None
    if spec.uses("ig"):
        inputs = overlay(pixels, teacher.maps.float(), batch, spec.pairing)
    else:
        inputs = crop_and_flip(pixels, batch.shifts, batch.flips)
    logits, features = models.logits_and_features(model, inputs, models.attention_tap(spec.k))
    alpha = spec.alpha if spec.uses("kd") else 0.0
    loss = (1 - alpha) * F.cross_entropy(logits, labels)
    if spec.uses("kd"):
        loss = loss + alpha * losses.distillation_loss(logits, teacher.logits, spec.temperature)
    if spec.uses("at"):
        loss = loss + spec.gamma * losses.attention_loss(features, teacher.attention)
    return loss


def training_positions(labels: Tensor, spec: RunSpec | TeacherSpec) -> tuple[Tensor, Tensor]:
    """Positions to train on and positions held out for validation, disjoint and stratified."""
    validation, rest = stratified_split(labels, spec.validation_images, VALIDATION_SEED)
    if spec.train_fraction == 1:
        return rest, validation
    each_class = int(spec.train_fraction * int(labels[rest].bincount().min()))
    drawn, _left = stratified_split(labels[rest], each_class * len(labels.unique()), spec.seed)
    return rest[drawn], validation


def paired_signals(signals: TeacherSignals, positions: Tensor, spec: RunSpec) -> TeacherSignals:
    """The rows of `signals` for the images at `positions` under the spec's pairing.

    The released scripts save maps in one shuffled order, logits and attention maps in another: two permutations.
    """
    maps_of = signal_positions(len(signals.logits), spec.pairing, seed=2 * spec.seed)[positions]
    answers_of = signal_positions(len(signals.logits), spec.pairing, seed=2 * spec.seed + 1)[positions]
    maps, answers = signals.rows(maps_of), signals.rows(answers_of)
    return TeacherSignals(answers.logits, maps.maps, answers.attention, maps.error, signals.manifest)


def fit(
    state: State,
    batch_loss: Callable[[EpochDraws], Tensor],
    n_images: int,
    spec: RunSpec | TeacherSpec,
    evaluation: Evaluation,
    checkpoint: Path | None,
    report: Report,
) -> Trained:
    """The loop: epochs of batches, a curve row after each epoch, a checkpoint now and then."""
    device = next(state.model.parameters()).device
    state.loss_sum = state.loss_sum.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(spec.seed)  # the generator of dropout
        if checkpoint is not None and checkpoint.is_file():
            load_checkpoint(checkpoint, state, spec)
            report(f"{spec.run_id} goes on at epoch {state.epoch + 1}, image {state.position} of {n_images}")
        while state.epoch < spec.epochs:
            train_epoch(state, batch_loss, n_images, spec, checkpoint, report)
            finish_epoch(state, n_images, evaluation, checkpoint, spec, report)
    return Trained(state.model.eval(), pd.DataFrame(state.curve))


def train_epoch(
    state: State,
    batch_loss: Callable[[EpochDraws], Tensor],
    n_images: int,
    spec: RunSpec | TeacherSpec,
    checkpoint: Path | None,
    report: Report,
) -> None:
    """The rest of the current epoch, from `state.position` on."""
    device = state.loss_sum.device
    draws = draw_epoch(n_images, getattr(spec, "overlay_probability", 0.0), spec.seed, state.epoch).to(device)
    state.model.train()
    saved = started = time.monotonic()
    before = state.seconds
    while state.position < n_images:
        batch = draws.batch(state.position, spec.batch_size)
        loss = step(state, batch_loss, batch)
        state.loss_sum += loss.detach() * len(batch.order)
        state.position += len(batch.order)
        if (state.position // spec.batch_size) % CHECK_EVERY == 0:
            check_finite(state)
            state.seconds = before + time.monotonic() - started
            if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                save_checkpoint(checkpoint, state, spec)
                saved = time.monotonic()
                report(progress(state, n_images, spec))
    check_finite(state)
    state.seconds = before + time.monotonic() - started


def step(state: State, batch_loss: Callable[[EpochDraws], Tensor], batch: EpochDraws) -> Tensor:
    """One step of the optimiser; bfloat16 on a GPU, float32 on the CPU."""
    device = state.loss_sum.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        loss = batch_loss(batch)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    state.scheduler.step()
    return loss


def finish_epoch(
    state: State,
    n_images: int,
    evaluation: Evaluation,
    checkpoint: Path | None,
    spec: RunSpec | TeacherSpec,
    report: Report,
) -> None:
    """Measure, add a row to the curve, turn to the next epoch, save."""
    check_weights(state)
    row = {
        "epoch": state.epoch + 1,
        "train_loss": float(state.loss_sum) / n_images,
        "test_accuracy": accuracy(state.model, evaluation.test),
        "validation_accuracy": accuracy(state.model, evaluation.validation) if evaluation.validation else float("nan"),
        "seconds": state.seconds,
    }
    state.curve.append(row)
    state.epoch, state.position = state.epoch + 1, 0
    state.loss_sum.zero_()
    save_checkpoint(checkpoint, state, spec)
    report(
        f"{spec.method} k={spec.k} seed {spec.seed}, epoch {state.epoch}/{spec.epochs}: "
        f"loss {row['train_loss']:.3f}, test {row['test_accuracy']:.2f} %, {state.seconds:.0f} s"
    )


def progress(state: State, n_images: int, spec: RunSpec | TeacherSpec) -> str:
    """One line: where the run is and how long it will take."""
    done = state.epoch + state.position / n_images
    left = state.seconds / done * (spec.epochs - done)
    return (
        f"{spec.method} k={spec.k} seed {spec.seed}: {done:.2f} of {spec.epochs} epochs, about {left / 60:.0f} min left"
    )


def check_finite(state: State) -> None:
    """Raise TrainingDiverged if the loss of this epoch is not finite."""
    if not torch.isfinite(state.loss_sum):
        raise TrainingDiverged(
            f"the loss is {float(state.loss_sum)} in epoch {state.epoch + 1} before image {state.position}: "
            f"lower the learning rate ({state.optimizer.param_groups[0]['lr']:g}) or check the teacher's signals"
        )


def check_weights(state: State) -> None:
    """Raise TrainingDiverged if the last step, whose loss came before it, left a tensor that is not finite."""
    if bad := [name for name, value in state.model.state_dict().items() if not value.isfinite().all()]:
        raise TrainingDiverged(f"{bad[0]} is not finite after epoch {state.epoch + 1}: lower the learning rate")


@torch.inference_mode()
def predict(model: nn.Module, images: ImageSet, batch_size: int = 50) -> Tensor:
    """Logits of all `images`, (N, 10), with the model in evaluation mode; small batches fit into a CPU's cache."""
    model.eval()
    return torch.cat([model(images.images(slice(at, at + batch_size))) for at in range(0, len(images), batch_size)])


def accuracy(model: nn.Module, images: ImageSet) -> float:
    """Top-1 accuracy in per cent."""
    return 100 * float((predict(model, images).argmax(1) == images.labels).double().mean())


def save_checkpoint(checkpoint: Path | None, state: State, spec: RunSpec | TeacherSpec) -> None:
    """Write everything that a resume needs; a reader sees the old checkpoint or the new one."""
    if checkpoint is None:
        return
    content = {
        "run_id": spec.run_id,
        "spec": asdict(spec),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "scheduler": state.scheduler.state_dict(),
        "generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state() if state.loss_sum.is_cuda else None,
        **{name: getattr(state, name) for name in ("epoch", "position", "loss_sum", "seconds", "curve")},
    }
    buffer = io.BytesIO()  # torch.save to a full disk gives no OSError, writing bytes does
    torch.save(content, buffer)
    with replacing(checkpoint) as part:
        part.write_bytes(buffer.getbuffer())


def load_checkpoint(checkpoint: Path, state: State, spec: RunSpec | TeacherSpec) -> None:
    """Put the state back as it was saved.

    Raises:
        ValueError: the checkpoint is unreadable, or of another run or architecture.
    """
    device = state.loss_sum.device
    try:
        content = torch.load(checkpoint, map_location=device, weights_only=True)
        run_id, saved_spec = content["run_id"], content["spec"]
    except Exception as error:  # torch.load raises many types for a damaged file
        raise ValueError(
            f"the checkpoint {checkpoint} is damaged ({type(error).__name__}): delete it to start the run afresh"
        ) from error
    if run_id != spec.run_id:
        raise ValueError(
            f"the checkpoint {checkpoint} is of run {run_id} {saved_spec}, not of {spec.run_id}: "
            "resume it with its own spec, or give another checkpoint"
        )
    models.load_state(state.model, content["model"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.scheduler.load_state_dict(content["scheduler"])
    torch.set_rng_state(content["generator"].cpu())
    if content["cuda_generator"] is not None:
        torch.cuda.set_rng_state(content["cuda_generator"].cpu())
    for name in ("epoch", "position", "loss_sum", "seconds", "curve"):
        setattr(state, name, content[name])
