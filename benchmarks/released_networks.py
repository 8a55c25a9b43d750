"""What the authors' released networks say when they are measured: makes the four files `results/released*`.

All networks get the same questions. Chapters read the answers through `analysis.witnesses`, which says what they are.
In an hour of two CPU cores; needs CIFAR-10. The networks are fetched from the authors' repository, or taken from the
folder that KDIG_RELEASED names.

    python benchmarks/released_networks.py
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from kdig_utils import paths
from kdig_utils.analysis import corruptions, examination, faithfulness, gradients, witnesses
from kdig_utils.analysis.examination import Effort, Examination, Mean, mean_over_images
from kdig_utils.experiments.hyperparameters import LEVELS
from kdig_utils.experiments.reports import print_line
from kdig_utils.experiments.study import open_study
from kdig_utils.machine import keep_freed_memory
from kdig_utils.method import cifar10, losses, released
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.integrated_gradients import attribution_map
from kdig_utils.method.models import predict
from kdig_utils.method.overlay import crop_and_flip, draw_epoch
from kdig_utils.method.pairings import another, permuted

COLUMNS = ("sha256", "measure", "value", "low", "high", "images")
OF_IMAGES = (  # what is kept image by image
    *("spearman", "spearman_partial", "spearman_siblings", "sensitivity", "infidelity", "infidelity_of_zeros"),
    *("deletion_random", "deletion_gain", "insertion_random", "insertion_gain", "share", "signed_share", "peak"),
    *(f"{name}, severity 3" for name in witnesses.CORRUPTED),
    *(f"overlay: {name}" for name in ("no overlay", "black", "own map", "another's map")),
)


class Questions(NamedTuple):
    """What the networks are asked about, made once.

    Attributes:
        test: all test images there are.
        sample: the test images for overlays and corruptions.
        crops: training images, cropped and flipped as in an epoch, (N, 3, 32, 32), and their labels.
        answers: the teacher's logits of them: `stored` of the whole images, `shuffled`, `online` of the crops.
        overlaid: five times as many images as are explained, under each overlay, without a crop.
        shown: ten images, one of each class, and `game`, two mosaics: those whose maps are kept to be looked at.
        asked: the questions that all networks of the book are asked.
    """

    test: ImageSet
    sample: ImageSet
    crops: Tensor
    labels: Tensor
    answers: dict[str, Tensor]
    overlaid: dict[str, Tensor]
    shown: ImageSet
    game: faithfulness.Mosaics
    asked: Examination


def questions(teacher: nn.Module, train: ImageSet, test: ImageSet, sample: ImageSet, effort: Effort) -> Questions:
    """The questions beside this teacher.

    Args:
        train: training images whose crops the gradients are measured on.
        sample: test images; as many as `effort.images` times five are overlaid.
    """
    draws = draw_epoch(len(train), 0.0, seed=0, epoch=0)
    crops = crop_and_flip(train.images(draws.order), draws.shifts, draws.flips)
    stored = predict(teacher, train)[draws.order]
    answers = {
        "stored": stored,
        "shuffled": stored[another(len(stored), seed=0)],
        "online": witnesses.logits_of(teacher, crops),
    }
    few = examination.first_images(sample, 5 * effort.images)
    overlaid = witnesses.overlays(few, faithfulness.ig_maps(teacher, few, effort.n_steps))
    asked = examination.prepare(teacher, sample, effort)
    shown, game = examination.first_images(sample, 10), faithfulness.mosaics(asked.explained, 2, seed=5)
    return Questions(test, sample, crops, train.labels[draws.order], answers, overlaid, shown, game, asked)


def closely(network: nn.Module, q: Questions) -> tuple[dict[str, Mean], dict[str, Tensor]]:
    """What only some networks are asked.

    Returns:
        The measures of `examination.examine`; `CORRUPTION, severity N`, accuracy; and those of `curve_measures`,
        `gradient_measures` and `step_measures`; and of each image what has a value there.
    """
    values = examination.of_images(fuse(network), q.asked)  # batch norm within the convolutions: in half the time
    for name, severity in itertools.product(witnesses.CORRUPTED, witnesses.SEVERITIES):
        changed = corruptions.corrupt(q.sample, name, severity)
        values[f"{name}, severity {severity}"] = predict(network, changed).argmax(1) == changed.labels
    found = examination.means(values | examination.corruption_measures(network, q.asked))
    found |= examination.calibration_measures(network, q.asked.classified)
    found |= witnesses.gradient_measures(network, q.crops, q.labels, q.answers)
    return found | step_measures(network, q) | curve_measures(network, q.asked), values


def curve_measures(network: nn.Module, asked: Examination) -> dict[str, Mean]:
    """`deletion, N %` and `insertion, N %`: probability of the true class when so many pixels are changed.

    In the order of the network's own map; with `random order, ` in front in a random one.
    """
    maps, steps = faithfulness.ig_maps(network, asked.explained, asked.effort.n_steps), asked.effort.curve_steps
    found = {}
    for order, ranked in {"": maps, "random order, ": permuted(maps, seed=0)}.items():
        its = (network, asked.explained.images(), asked.explained.labels, ranked, steps)
        for kind, curve in faithfulness.deletion_and_insertion(*its).items():
            for step, values in enumerate(curve.T):
                found[f"{order}{kind}, {100 * step / steps:.0f} %"] = mean_over_images(values)
    return found


def step_measures(network: nn.Module, q: Questions) -> dict[str, Mean]:
    """What the stored answers do to one training step, with respect to all parameters (`gradient_plane`).

    Returns:
        `step share, alpha A, temperature T` in per cent and `step angle, ...` in degrees, means over `BATCHES` batches
        of `BATCH_SIZE` crops; `step angle, two batches`, between the cross-entropy gradients of two of them.
    """
    parts = [
        slice(start, start + witnesses.BATCH_SIZE)
        for start in range(0, witnesses.BATCHES * witnesses.BATCH_SIZE, witnesses.BATCH_SIZE)
    ]
    planes = [gradient_plane(network, q.crops[p], q.labels[p], q.answers["stored"][p]) for p in parts]
    table = pd.concat(planes).groupby(["alpha", "temperature"]).mean()
    found = {
        f"step {name}, alpha {alpha:g}, temperature {temperature:g}": Mean(
            value, np.nan, np.nan, witnesses.BATCHES * witnesses.BATCH_SIZE
        )
        for name in ("share", "angle")
        for (alpha, temperature), value in table[name].items()
    }
    apart = gradients.degrees_between(*(gradients.label_gradient(network, q.crops[p], q.labels[p]) for p in parts))
    return found | {"step angle, two batches": Mean(apart, np.nan, np.nan, witnesses.BATCHES * witnesses.BATCH_SIZE)}


def gradient_plane(
    student: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    alphas: Sequence[float] = LEVELS["alpha"],
    temperatures: Sequence[float] = LEVELS["temperature"],
) -> pd.DataFrame:
    """What distillation contributes to one training step at each alpha and temperature, exactly.

    The gradient with respect to the student's parameters is (1 - alpha) g + alpha h_T, with g that of cross-entropy
    and h_T that of T² KL: one backward pass for g and one for each T give the whole plane.

    Args:
        inputs: a batch of crops, (N, 3, 32, 32).
        labels: (N,).
        teacher_logits: (N, classes).

    Returns:
        Columns alpha, temperature; share, of distillation in the sum of the two lengths, per cent; angle between the
        whole gradient and that of cross-entropy alone, degrees, which is what an optimiser such as Adam notices:
        it hardly asks for the length.
    """
    student = copy.deepcopy(student).train()  # the batch norm of training; the caller's statistics stay
    logits = student(inputs)
    hard = gradients.parameter_gradient(student, F.cross_entropy(logits, labels))
    rows = []
    for temperature in temperatures:
        soft = gradients.parameter_gradient(student, losses.distillation_loss(logits, teacher_logits, temperature))
        for alpha in alphas:
            taught, labelled = alpha * soft, (1 - alpha) * hard
            share = 100 * float(taught.norm() / (taught.norm() + labelled.norm()))
            rows.append((alpha, temperature, share, gradients.degrees_between(taught + labelled, hard)))
    return pd.DataFrame(rows, columns=["alpha", "temperature", "share", "angle"])


def siblings(maps: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """How like the other networks' maps each network's are, image by image; as a control, those of other images."""
    found, number = {}, len(next(iter(maps.values())))
    for name, own in maps.items():
        others = torch.stack([its for other, its in maps.items() if other != name])
        kinds = {"spearman_siblings": others, "spearman_siblings_shuffled": others[:, another(number, seed=0)]}
        found[name] = {
            kind: torch.stack([faithfulness.similarity(own, each)["spearman"] for each in its]).mean(0)
            for kind, its in kinds.items()
        }
    return found


class Found(NamedTuple):
    """What was measured: `table` with `COLUMNS`, a line a network and measure; `predictions`, a row a test image.

    The columns of `predictions` are label, teacher, and the first twelve digits of each network's SHA-256; with
    `_confidence` behind it, the probability of the predicted class. `maps` are IG maps, each divided by its maximum:
    `SHA256.shown`, (10, 32, 32), and `SHA256.game`, (2, 64, 64). `images` are the measures `OF_IMAGES` image by image,
    (images,), by `SHA256.MEASURE`: the same images for all networks.
    """

    table: pd.DataFrame
    predictions: pd.DataFrame
    maps: dict[str, Tensor]
    images: dict[str, Tensor]


def measure(
    files: dict[str, Path], q: Questions, teacher: nn.Module, report: Callable[[str], None] = lambda line: None
) -> Found:
    """Measure every network of the catalogue, the teacher and what knows nothing of it (`examination.CONTROLS`).

    Args:
        files: by SHA-256, as `released.fetch` gives them.
    """
    of_images = {"teacher": examination.of_images(fuse(teacher), q.asked)} | examination.control_measures(q.asked)
    means = {name: examination.means(values) for name, values in of_images.items()}
    means["teacher"] |= examination.means(examination.corruption_measures(teacher, q.asked))
    means["teacher"] |= examination.calibration_measures(teacher, q.asked.classified)
    explained: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    predictions = {"label": q.test.labels.numpy()} | _predictions("teacher", teacher, q.test)
    for row in released.catalogue().itertuples():
        network, name = released.load(files[row.sha256], row.k), row.sha256[:12]
        predictions |= _predictions(name, network, q.test)
        means[name], overlaid = {}, _overlaid(network, q)
        if witnesses.is_asked_closely(row):
            means[name], of_images[name] = closely(network, q)
            of_images[name] |= overlaid
            explained[name] = faithfulness.ig_maps(network, q.asked.explained, q.asked.effort.n_steps)
            kept |= {f"{name}.{kind}": maps for kind, maps in _maps_to_look_at(network, q).items()}
        means[name] |= _accuracies(network, predictions[name], q) | examination.means(overlaid)
        means[name] |= _of_weights(network, row.train_fraction)
        report(f"{row.path}: {100 * means[name]['accuracy'].value:.2f} %, {means[name]['epochs'].value:.0f} epochs")
    for name, values in siblings(explained).items():
        means[name] |= examination.means(values)
        of_images[name] |= values
    lines = [(name, measure, *mean) for name, its in means.items() for measure, mean in its.items()]
    table = pd.DataFrame(lines, columns=list(COLUMNS)).round(5)
    return Found(table, pd.DataFrame(predictions), kept, _kept_of_images(of_images))


def _kept_of_images(values: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{name}.{measure}": found if found.dtype == torch.bool else found.detach().float()
        for name, its in values.items()
        for measure, found in its.items()
        if measure in OF_IMAGES
    }


def _overlaid(network: nn.Module, q: Questions) -> dict[str, Tensor]:
    labels = examination.first_images(q.sample, len(q.overlaid["black"])).labels
    return {f"overlay: {name}": witnesses.logits_of(network, x).argmax(1) == labels for name, x in q.overlaid.items()}


def _predictions(name: str, network: nn.Module, test: ImageSet) -> dict[str, np.ndarray]:
    confidence, classes = predict(network, test).softmax(1).max(1)
    return {name: classes.numpy().astype(np.uint8), f"{name}_confidence": confidence.numpy().round(4)}


def _of_weights(network: nn.Module, train_fraction: float) -> dict[str, Mean]:
    updates = released.updates(network)
    epochs = updates / released.batches_an_epoch(train_fraction)
    told = {"updates": updates, "epochs": epochs, "mean colour": float(released.mean_colour(network).mean())}
    return {name: Mean(value, np.nan, np.nan, 0) for name, value in told.items()}


def _accuracies(network: nn.Module, predicted: np.ndarray, q: Questions) -> dict[str, Mean]:
    on_sample = predict(network, q.sample).argmax(1) == q.sample.labels
    on_all = torch.from_numpy(predicted) == q.test.labels
    return {"accuracy": mean_over_images(on_all), "accuracy, the book's images": mean_over_images(on_sample)}


def _maps_to_look_at(network: nn.Module, q: Questions) -> dict[str, Tensor]:
    game = torch.cat(
        [
            attribution_map(faithfulness.attributions(network, image[None], label[None], q.asked.effort.n_steps))
            for image, label in zip(q.game.images, q.game.target, strict=True)
        ]
    )
    maps = {"shown": faithfulness.ig_maps(network, q.shown, q.asked.effort.n_steps), "game": game}
    return {kind: (its / its.amax((1, 2), keepdim=True)).half() for kind, its in maps.items()}


def write(found: Found) -> None:
    """Put measures, predictions, maps and the values of images in place of the committed ones."""
    with paths.replacing(witnesses.file("released.csv")) as part:
        found.table.to_csv(part, index=False)
    with paths.replacing(witnesses.file("released_predictions.csv.xz")) as part:
        found.predictions.to_csv(part, index=False, compression="xz")
    for name, tensors in (("maps", found.maps), ("images", found.images)):
        with paths.replacing(witnesses.file(f"released_{name}.safetensors")) as part:
            save_file({key: values.contiguous() for key, values in tensors.items()}, part)


def main() -> None:
    keep_freed_memory()
    study, files = open_study("published").with_best_teacher(), released.fetch()
    test = cifar10.load("test", cifar10.fetch())
    asked = questions(study.teacher, study.train, test, study.test, Effort())
    write(measure(files, asked, study.teacher, report=print_line))
    print(f"{len(files)} networks measured, in results/released.csv")


if __name__ == "__main__":
    main()
