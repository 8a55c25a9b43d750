"""What a student is trained with: losses composed as the paper says, its images, and the signals that it gets."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdig_utils.method import losses, models, overlay, pairings, training
from kdig_utils.method.cifar10 import ImageSet, stratified_split
from kdig_utils.method.signals import TeacherSignals
from kdig_utils.method.spec import METHODS, RunSpec, TeacherSpec

IMAGES, K = 60, 17  # 17 blocks removed: the smallest student


@pytest.fixture(scope="module")
def train(sample_train: ImageSet) -> ImageSet:
    return sample_train.subset(torch.arange(IMAGES))


@pytest.fixture(scope="module")
def signals(train: ImageSet, random_signals) -> TeacherSignals:
    return random_signals(train)


def small(method: str = "kd_ig_at", **changed: object) -> RunSpec:
    return RunSpec(method, **{"k": K, "batch_size": 16, "overlay_probability": 0.5, **changed})


# The loss


def loss_by_hand(
    model: models.Student, inputs: Tensor, labels: Tensor, teacher: TeacherSignals, spec: RunSpec
) -> Tensor:
    """alpha T² KL(teacher ‖ student) / batch + (1 - alpha) cross-entropy + gamma attention_loss (paper.json)."""
    tap = models.attention_tap(spec.k)
    features = model.features[: tap + 1](inputs)
    logits = model.classifier(model.pool(model.features[tap + 1 :](features)))
    alpha = spec.alpha if "kd" in spec.method else 0
    gamma = spec.gamma if "at" in spec.method.split("_") else 0
    p, q = ((values / spec.temperature).softmax(1) for values in (teacher.logits, logits))
    kl = (p * (p / q).log()).sum() / len(p)
    cross_entropy = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()
    attention = ((losses.attention_map(features) - teacher.attention) ** 2).mean()
    return alpha * spec.temperature**2 * kl + (1 - alpha) * cross_entropy + gamma * attention


@pytest.mark.parametrize("k", [5, K])
@pytest.mark.parametrize("method", METHODS)
def test_loss_of_each_method_equals_the_formula(train: ImageSet, method: str, k: int, random_signals) -> None:
    spec = small(method, k=k, alpha=0.3)
    teacher_signals = random_signals(train, side=32 if k == K else 8)
    model = models.student(k).eval()  # so that both passes use the same batch-norm statistics
    batch = overlay.draw_epoch(len(train), spec.overlay_probability, 0, 0).batch(0, 16)
    found = training.student_loss(model, train, teacher_signals, batch, spec)
    chosen = teacher_signals.rows(batch.order)
    images = train.images(batch.order)
    inputs = overlay.crop_and_flip(images, batch.shifts, batch.flips)
    if "ig" in method:
        inputs = overlay.overlay(images, chosen.maps.float(), batch)
    assert torch.allclose(found, loss_by_hand(model, inputs, train.labels[batch.order], chosen, spec), rtol=1e-5)


def test_untrained_student_knows_nothing(train: ImageSet) -> None:
    """Its loss is near ln 10, that of ten equal probabilities."""
    batch = overlay.draw_epoch(len(train), 0.0, 0, 0).batch(0, IMAGES)
    loss = training.student_loss(models.student(5), train, None, batch, small("student", k=5))
    assert float(loss.detach()) == pytest.approx(math.log(10), abs=0.3)


def test_a_few_steps_reduce_the_loss_on_a_fixed_batch(train: ImageSet, random_signals) -> None:
    spec, model = small("kd_ig_at", k=5), models.student(5)
    teacher_signals = random_signals(train, side=8)
    batch = overlay.draw_epoch(len(train), spec.overlay_probability, 0, 0).batch(0, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    values = []
    for _step in range(12):
        loss = training.student_loss(model, train, teacher_signals, batch, spec)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.6 * values[0]


def test_loss_touches_neither_images_nor_signals(train: ImageSet, signals: TeacherSignals) -> None:
    before = train.pixels.clone(), [value.clone() for value in signals.tensors()]
    batch = overlay.draw_epoch(len(train), 1.0, 0, 0).batch(0, 16)
    training.student_loss(models.student(K), train, signals, batch, small()).backward()
    assert torch.equal(train.pixels, before[0])
    assert all(torch.equal(now, then) for now, then in zip(signals.tensors(), before[1], strict=True))


# Signals that do not fit


@pytest.mark.parametrize("method", METHODS[1:])
def test_method_without_signals_names_the_command(train: ImageSet, method: str) -> None:
    with pytest.raises(ValueError, match=f"method {method} needs the teacher's signals.*kdig_utils signals"):
        training.check_signals(small(method), None, train)


@pytest.mark.parametrize("change", ["fewer", "other order"])
def test_signals_of_other_images_are_refused(train: ImageSet, change: str, random_signals) -> None:
    positions = torch.arange(IMAGES // 2) if change == "fewer" else torch.arange(IMAGES - 1, -1, -1)
    others = random_signals(train.subset(positions))
    with pytest.raises(ValueError, match="signals are those of other images"):
        training.check_signals(small("kd"), others, train)


def test_signals_of_another_teacher_are_refused(train: ImageSet, signals: TeacherSignals) -> None:
    with pytest.raises(ValueError, match="spec names teacher cdcdcdcdcdcd, the signals are of abababababab"):
        training.check_signals(small("kd", teacher_sha256="cd" * 32), signals, train)


def test_attention_maps_of_another_block_are_refused(train: ImageSet, random_signals) -> None:
    with pytest.raises(ValueError, match=r"k = 17 compares the teacher's block 0, the signals hold block 9"):
        training.check_signals(small("at"), random_signals(train, side=8), train)


# Who is trained on what


def test_validation_images_are_held_out_stratified_and_the_same_for_every_run(sample_train: ImageSet) -> None:
    positions, validation = training.training_positions(sample_train.labels, RunSpec("kd", validation_images=100))
    assert sample_train.labels[validation].bincount().tolist() == [10] * 10
    assert torch.cat([positions, validation]).sort().values.equal(torch.arange(1000))
    for other in (RunSpec("student", seed=5, validation_images=100), TeacherSpec(seed=2, validation_images=100)):
        assert training.training_positions(sample_train.labels, other)[1].equal(validation)


def test_train_fraction_is_drawn_stratified_and_fresh_for_each_seed(sample_train: ImageSet) -> None:
    first, other = (
        training.training_positions(
            sample_train.labels, RunSpec("kd", train_fraction=0.8, seed=seed, validation_images=100)
        )
        for seed in (0, 1)
    )
    for positions, validation in (first, other):
        assert (
            sample_train.labels[positions].bincount().tolist() == [72] * 10
        )  # 0.8 of the 90 that are left of each class
        assert not set(positions.tolist()) & set(validation.tolist())
        assert len(positions.unique()) == len(positions)
    assert not first[0].equal(other[0])


def test_a_fraction_of_the_images_is_rounded_to_the_nearest_number() -> None:
    labels = torch.arange(10).repeat_interleave(5000)
    for hundredths in range(1, 101):
        positions, _none = training.training_positions(labels, RunSpec("kd", train_fraction=hundredths / 100))
        assert labels[positions].bincount().tolist() == [50 * hundredths] * 10


def test_the_draw_of_earlier_runs_is_what_it_was() -> None:
    """80 % of 50,000 images are 4,000 of each class, drawn with the seed."""
    labels = torch.arange(50_000) * 7919 % 50_000 % 10
    positions, _none = training.training_positions(labels, RunSpec("kd", train_fraction=0.8, seed=3))
    assert positions.equal(stratified_split(labels, 40_000, 3)[0])


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (RunSpec("kd", train_fraction=0.001), "train_fraction = 0.001"),
        (RunSpec("kd", train_fraction=1e-320, validation_images=100), "train_fraction = 1e-320"),
        (RunSpec("kd", validation_images=1000), "validation_images = 1000"),
        (RunSpec("kd", validation_images=1000, train_fraction=0.5), "validation_images = 1000"),
        (RunSpec("kd", validation_images=1000, train_images=100), "validation_images = 1000"),
        (RunSpec("kd", train_images=5), "no 5 images"),
        (TeacherSpec(validation_images=1000), "validation_images = 1000"),
    ],
)
def test_a_spec_that_leaves_no_image_is_refused_in_words(
    sample_train: ImageSet, spec: RunSpec | TeacherSpec, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        training.training_positions(sample_train.labels, spec)
    if isinstance(spec, RunSpec) and not spec.validation_images:
        with pytest.raises(ValueError, match=named):
            training.train_student(replace(spec, method="student", k=K), sample_train)


def test_seed_and_draw_of_images_can_be_told_apart(sample_train: ImageSet) -> None:
    def drawn(seed: int, sample_seed: int | None) -> set[int]:
        spec = RunSpec("kd", train_fraction=0.8, seed=seed, sample_seed=sample_seed)
        return set(training.training_positions(sample_train.labels, spec)[0].tolist())

    assert drawn(1, 5) == drawn(2, 5) == drawn(5, None)
    assert drawn(1, 5) != drawn(1, 6)


def test_all_images_are_trained_on_by_default(sample_train: ImageSet) -> None:
    positions, validation = training.training_positions(sample_train.labels, RunSpec("kd"))
    assert positions.equal(torch.arange(1000))
    assert len(validation) == 0


def test_matched_signals_are_rows_of_the_images_themselves(train: ImageSet, signals: TeacherSignals) -> None:
    positions = torch.tensor([7, 3, 50])
    found = pairings.paired_signals(signals, train, positions, "matched", 0)
    assert all(torch.equal(a, b) for a, b in zip(found.tensors(), signals.rows(positions).tensors(), strict=True))


def test_shuffled_signals_come_from_two_permutations(train: ImageSet, signals: TeacherSignals) -> None:
    found = pairings.paired_signals(signals, train, torch.arange(IMAGES), "shuffled", 0)
    sources = [
        [int(torch.nonzero((whole == row).flatten(1).all(1))) for row in part]
        for part, whole in (
            (found.maps, signals.maps),
            (found.logits, signals.logits),
            (found.attention, signals.attention),
        )
    ]
    assert all(sorted(source) == list(range(IMAGES)) for source in sources)
    assert sources[0] != sources[1]
    assert sources[1] == sources[2]


def test_accuracy_is_a_percentage_by_hand(sample_test: ImageSet) -> None:
    held_out = sample_test.subset(torch.arange(40))

    class Answers(torch.nn.Module):
        """Right about all images but the first ten."""

        def forward(self, images: Tensor) -> Tensor:
            answers = held_out.labels.clone()
            answers[:10] = (answers[:10] + 1) % 10
            return F.one_hot(answers, 10).float()

    assert models.accuracy(Answers(), held_out) == 75.0


def test_a_cycle_that_cannot_rise_is_refused_and_a_longer_one_reaches_its_peak_once() -> None:
    with pytest.raises(ValueError, match="5 steps"):
        training.student_rates(small(epochs=5, schedule="one_cycle"), 1)
    for steps in (6, 20, 40):
        rates = training.student_rates(small(epochs=steps, schedule="one_cycle"), 1)
        assert rates is not None
        assert rates.isfinite().all()
    assert float(rates.max()) == pytest.approx(RunSpec.learning_rate)
    assert (rates.diff() > 0).sum() == int(rates.argmax()) == 40 // 5 - 1
