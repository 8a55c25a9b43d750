"""The table of explanations, `results/explanations.csv`: every measure of faithfulness of every network, once.

`python -m kdig_utils explain` fills it; a chapter reads it. Its rows belong to runs of the ledger by `run_id`, and to
controls that no network had a part in, or no training.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from scipy import stats
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn

from kdig_utils.analysis import calibration, corruptions, faithfulness
from kdig_utils.analysis.faithfulness import Mosaics
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.experiments.study import Study
from kdig_utils.method import artifacts, cifar10, models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.integrated_gradients import attribution_map
from kdig_utils.method.models import predict
from kdig_utils.method.pairings import permuted
from kdig_utils.paths import explaining, replacing

COLUMNS = ("run_id", "method", "k", "seed", "measure", "value", "low", "high", "images")
CONTROLS = ("untrained", "edges", "difference")
RESAMPLES = 2000
BOOTSTRAPS_OF_ECE = 200
PART = 32  # images at a time where each becomes many


@dataclass(frozen=True)
class Effort:
    """On how many images each measure is taken, and how finely.

    Attributes:
        images: explained, the same number of each class: a multiple of ten.
        n_steps: evaluations along the path of IG.
        curve_steps: of deletion and insertion.
        perturbed: of the explained images, for infidelity and sensitivity.
        mosaics: for the pointing game.
        mosaic_steps: evaluations along the path of IG for a mosaic, each of which costs as much as four.
        corrupted: images under each corruption at each severity: a multiple of ten.
        classified: for calibration: a multiple of ten.
    """

    images: int = 100
    n_steps: int = 16
    curve_steps: int = 10
    perturbed: int = 20
    mosaics: int = 100
    mosaic_steps: int = 4
    corrupted: int = 50
    classified: int = 2000

    def __post_init__(self) -> None:
        for name in ("images", "corrupted", "classified"):
            if (count := getattr(self, name)) < 10 or count % 10:
                raise ValueError(f"{name} = {count} is no multiple of ten: give as many images of each class, as 100")


QUICK = Effort(images=10, n_steps=6, curve_steps=6, perturbed=4, mosaics=6, mosaic_steps=4, corrupted=10, classified=60)


@dataclass(frozen=True)
class Examination:
    """What every network is asked, made once: the same images, mosaics and corruptions for all.

    Attributes:
        explained: the images whose maps are compared.
        teacher_maps: the teacher's IG maps of them, (N, 32, 32).
        mosaics: of the pointing game.
        corrupted: images by (corruption, severity).
        clean: the same images without corruption.
        classified: the images for calibration.
    """

    effort: Effort
    explained: ImageSet
    teacher_maps: Tensor
    mosaics: Mosaics
    corrupted: dict[tuple[str, int], ImageSet]
    clean: ImageSet
    classified: ImageSet


def examination(teacher: nn.Module, images: ImageSet, effort: Effort) -> Examination:
    """The questions, from images that no network was trained on, on the device of both."""
    explained, clean, classified = (
        first_images(images, count) for count in (effort.images, effort.corrupted, effort.classified)
    )
    return Examination(
        effort,
        explained,
        teacher_maps=ig_maps(teacher, explained, effort.n_steps),
        mosaics=faithfulness.mosaics(images, effort.mosaics),
        corrupted=corruptions.corruptions_of(clean),
        clean=clean,
        classified=classified,
    )


def first_images(images: ImageSet, count: int) -> ImageSet:
    """The first `count` of the images, as many of each class; fewer if there are fewer."""
    return images.subset(cifar10.first_of_each_class(images.labels, max(1, count // len(cifar10.CLASSES))))


def ig_maps(network: nn.Module, images: ImageSet, n_steps: int) -> Tensor:
    """The network's IG maps of its logit of the true class, from the mean colour, (N, 32, 32)."""
    return attribution_map(faithfulness.attributions(network, images.images(), images.labels, n_steps))


class Mean(NamedTuple):
    """A mean over images with its 95 % interval."""

    value: float
    low: float
    high: float
    images: int


def mean_over_images(values: Tensor, scale: Tensor | None = None, seed: int = 0) -> Mean:
    """The mean of one number an image, (N,), divided by that of `scale` if given; NaN, if not defined, is left out.

    Truth values get Wilson's interval, numbers that of 2,000 bootstrap samples of the images (percentiles). It covers
    the choice of images and nothing else: for another training of the same network there is another seed.
    """
    if values.dtype == torch.bool:
        right, count = int(values.sum()), len(values)
        return Mean(right / count, *map(float, proportion_confint(right, count, method="wilson")), count)
    pairs = torch.stack([values, torch.ones_like(values) if scale is None else scale]).detach().cpu().double().numpy()
    above, below = pairs[:, ~np.isnan(pairs).any(0)]
    if len(above) < 2:
        return Mean(math.nan, math.nan, math.nan, len(above))
    rng = np.random.default_rng(seed)
    interval = stats.bootstrap(
        (above, below), _ratio, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile", rng=rng
    )
    return Mean(float(_ratio(above, below)), *map(float, interval.confidence_interval), len(above))


def _ratio(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
    return above.mean(axis) / below.mean(axis)


def explain(network: nn.Module, asked: Examination) -> pd.DataFrame:
    """All measures of one network, in evaluation mode, on the device of the examination's images.

    Returns:
        Columns measure, value, low, high, images. For the names of the measures see `map_measures`, `captum_measures`,
        `pointing_measures`, `calibration_measures` and `corruption_measures`.
    """
    found = faithfulness.attributions(network, asked.explained.images(), asked.explained.labels, asked.effort.n_steps)
    values = {
        **map_measures(network, found, asked),
        **pointing_measures(network, asked),
        **corruption_measures(network, asked),
    }
    means = {name: mean_over_images(of_image) for name, of_image in values.items()}
    means |= captum_measures(network, asked, found) | calibration_measures(network, asked.classified)
    return _as_rows(means)


def captum_measures(network: nn.Module, asked: Examination, attributions: Tensor | None = None) -> dict[str, Mean]:
    """`sensitivity` and `unexplained`; none where Captum is not installed: a later call, elsewhere, adds them."""
    if find_spec("captum") is None:
        return {}
    if attributions is None:
        images, labels = asked.explained.images(), asked.explained.labels
        attributions = faithfulness.attributions(network, images, labels, asked.effort.n_steps)
    moved = mean_over_images(sensitivity(network, asked))
    return {"sensitivity": moved, "unexplained": unexplained(network, attributions, asked)}


def _as_rows(means: dict[str, Mean]) -> pd.DataFrame:
    return pd.DataFrame([{"measure": name, **mean._asdict()} for name, mean in means.items()])


def map_measures(network: nn.Module, attributions: Tensor, asked: Examination) -> dict[str, Tensor]:
    """Measures of the network's maps, one value an image.

    Returns:
        `spearman`, `cosine`, `top_tenth`, to the teacher's map, and with `_shuffled` and `_random` to its controls;
        `spearman_partial`; `deletion` and `insertion`: areas, with `_random` those of a random order, with `_gain` how
        much better than it.
    """
    maps = attribution_map(attributions)
    values = likeness(maps, asked)
    for name, others in faithfulness.similarity_controls(asked.teacher_maps).items():
        values |= {f"{key}_{name}": value for key, value in faithfulness.similarity(maps, others).items()}
    pixels, labels = asked.explained.images(), asked.explained.labels
    for suffix, ranked in {"": maps, "_random": permuted(maps, seed=0)}.items():
        curves = faithfulness.deletion_and_insertion(network, pixels, labels, ranked, asked.effort.curve_steps)
        values |= {f"{name}{suffix}": faithfulness.area(curve) for name, curve in curves.items()}
    deletion_gain = values["deletion_random"] - values["deletion"]
    insertion_gain = values["insertion"] - values["insertion_random"]
    return values | {"deletion_gain": deletion_gain, "insertion_gain": insertion_gain}


def likeness(maps: Tensor, asked: Examination) -> dict[str, Tensor]:
    """`spearman`, `cosine`, `top_tenth` to the teacher's maps, and `spearman_partial`: what |image - baseline| leaves.

    That factor stands in every IG map, whatever the network.
    """
    factor = faithfulness.blind_maps(asked.explained)["difference"]
    partial = faithfulness.partial_spearman(maps, asked.teacher_maps, factor)
    return faithfulness.similarity(maps, asked.teacher_maps) | {"spearman_partial": partial}


def unexplained(network: nn.Module, attributions: Tensor, asked: Examination) -> Mean:
    """The share of the logit's changes that the attributions do not foretell (`faithfulness.infidelity_and_scale`)."""
    pairs = [
        faithfulness.infidelity_and_scale(network, pixels, attributions[part], labels, seed=number)
        for number, (part, pixels, labels) in enumerate(_perturbed(asked))
    ]
    error, scale = (torch.cat(values) for values in zip(*pairs, strict=True))
    return mean_over_images(error, scale)


def sensitivity(network: nn.Module, asked: Examination) -> Tensor:
    """How far the IG map moves under noise that is hardly seen, one value an image (`faithfulness.map_sensitivity`)."""
    parts = [
        faithfulness.map_sensitivity(network, pixels, labels, asked.effort.n_steps, seed=number)
        for number, (_part, pixels, labels) in enumerate(_perturbed(asked))
    ]
    return torch.cat(parts)


def _perturbed(asked: Examination) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Positions, pixels and labels of the images that become many, a few at a time."""
    order = torch.randperm(len(asked.explained), generator=torch.Generator().manual_seed(0))
    for part in order[: asked.effort.perturbed].to(asked.explained.labels.device).split(PART):
        yield part, asked.explained.images(part), asked.explained.labels[part]


def pointing_measures(network: nn.Module, asked: Examination) -> dict[str, Tensor]:
    """The pointing game on mosaics, one value a mosaic; chance is 1/4.

    Returns:
        `peak` and `share`, and with `_shuffled` for another mosaic's question, of the paper's map, which drops the
        sign; with `signed_` in front of the sum over the channels with its sign.
    """
    game = asked.mosaics
    found = faithfulness.attributions(network, game.images, game.target, asked.effort.mosaic_steps)
    maps = {"": attribution_map(found), "signed_": found.sum(1)}
    return {
        f"{prefix}{name}": value
        for prefix, values in maps.items()
        for name, value in faithfulness.pointing(values, game.asked).items()
    }


def corruption_measures(network: nn.Module, asked: Examination) -> dict[str, Tensor]:
    """Whether images under corruption are classified rightly, one value an image.

    Returns:
        `severity_0` (no corruption) to `severity_5`, each the mean over all corruptions; the name of each corruption,
        the mean over its severities.
    """
    right = {key: corruptions.correct(network, images).double() for key, images in asked.corrupted.items()}

    def mean_of(wanted: str | int) -> Tensor:
        return torch.stack([value for key, value in right.items() if wanted in key]).mean(0)

    return {
        "severity_0": corruptions.correct(network, asked.clean),
        **{f"severity_{level}": mean_of(level) for level in corruptions.SEVERITIES},
        **{name: mean_of(name) for name in corruptions.CORRUPTIONS},
    }


def calibration_measures(network: nn.Module, images: ImageSet) -> dict[str, Mean]:
    """`accuracy`; `ece`, the expected calibration error; `ece_calibrated`, what it were if the network were calibrated.

    The interval of `ece` is the basic bootstrap's, which takes back the upward bias of so many bins; that of
    `ece_calibrated` holds 95 % of the draws.
    """
    probabilities, labels = predict(network, images).softmax(1).cpu(), images.labels.cpu()
    ece, count = calibration.expected_calibration_error(probabilities, labels), len(labels)
    draws = torch.randint(count, (BOOTSTRAPS_OF_ECE, count), generator=torch.Generator().manual_seed(0))
    resampled = [calibration.expected_calibration_error(probabilities[draw], labels[draw]) for draw in draws]
    low, high = 2 * ece - np.quantile(resampled, (0.975, 0.025))
    null = calibration.error_if_calibrated(probabilities)
    return {
        "accuracy": mean_over_images(probabilities.argmax(1) == labels),
        "ece": Mean(ece, max(0.0, float(low)), float(high), count),
        "ece_calibrated": Mean(float(null.mean()), *map(float, np.quantile(null, (0.025, 0.975))), count),
    }


def explain_controls(asked: Examination) -> pd.DataFrame:
    """How like the teacher's maps are maps that know nothing of it: rows of the table, without a run.

    `untrained` are the maps of a student with random weights; `edges` and `difference` look at the image alone.
    """
    untrained = models.student(5).eval().to(asked.teacher_maps.device)
    maps = {"untrained": ig_maps(untrained, asked.explained, asked.effort.n_steps)}
    maps |= faithfulness.blind_maps(asked.explained)
    rows = [
        {"run_id": "", "method": name, "k": 5, "seed": 0, "measure": measure, **mean_over_images(values)._asdict()}
        for name in CONTROLS
        for measure, values in likeness(maps[name], asked).items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def read(path: Path) -> pd.DataFrame:
    """The table; empty, with its columns, if nothing was explained yet.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(COLUMNS))
    table = pd.read_csv(path, dtype={"run_id": str, "method": str, "measure": str}, keep_default_na=False,
                        na_values={name: ["", "nan"] for name in ("value", "low", "high")})  # fmt: skip
    if tuple(table.columns) != COLUMNS:
        raise ValueError(f"{path} has columns {', '.join(table.columns)}: it is no table of explanations; delete it")
    return table


def record(rows: pd.DataFrame, path: Path) -> None:
    """Add rows to the table; those of runs and controls that are there already are left as they are."""
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with explaining(path), FileLock(path.parent / f".{path.name}.lock"):
        table = read(path)
        known = set(zip(table["run_id"], table["method"], table["measure"], strict=True))
        new = rows[[(row.run_id, row.method, row.measure) not in known for row in rows.itertuples()]]
        with replacing(path) as part:
            pd.concat([table, new] if len(table) else [new], ignore_index=True).round(5).to_csv(part, index=False)


@models.exact_float32()
def explain_runs(
    study: Study,
    effort: Effort,
    path: Path,
    deadline: float = math.inf,
    report: Callable[[str], None] = lambda line: None,
    runs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Explain the runs whose weights are here and that the table lacks; return the whole table.

    `runs` are rows of the ledger, by default all. Each network's rows are written before the next one starts; none
    starts after `deadline` (`time.monotonic`). Students of another teacher than the study's are passed over: their
    maps would be compared with a stranger's.
    """
    teacher = study.teacher.to(study.device)
    asked = examination(teacher, study.test.to(study.device), effort)
    if not (read(path)["run_id"] == "").any():
        record(explain_controls(asked), path)
    runs = study.ledger.read() if runs is None else runs
    table = read(path)
    begun, whole = (set(table["run_id"][table["measure"].isin(names)]) for names in (["spearman"], ["unexplained"]))
    passed_over = whole if find_spec("captum") else begun
    for row, network in _networks(study, runs[~runs["run_id"].isin(passed_over)]):
        if time.monotonic() > deadline:
            break
        network = network.to(study.device)
        missing = row["run_id"] in begun
        rows = _as_rows(captum_measures(network, asked)) if missing else explain(network, asked)
        for place, name in enumerate(("run_id", "method", "k", "seed")):
            rows.insert(place, name, row[name])
        record(rows, path)
        report(f"{row['run_id']}  {row['method']:9} k {row['k']}  seed {row['seed']}: explained")
    return read(path)


def _networks(study: Study, runs: pd.DataFrame) -> Iterator[tuple[pd.Series, nn.Module]]:
    """These runs, each with its network, from the workspace or published, where it is there."""
    published = {entry["run_id"]: name for name, entry in artifacts.manifest().items()}
    sha256 = study.teacher_sha256
    for _index, row in runs.iterrows():
        taught_by = row["weights_sha256"] if row["method"] == "teacher" else row["teacher_sha256"]
        if taught_by not in ("", sha256):
            continue
        if (study.folders["weights"] / f"{row['run_id']}.safetensors").is_file():
            yield row, study.weights(spec_of(row))
        elif row["run_id"] in published:
            yield row, artifacts.load(published[row["run_id"]])


def by_method(table: pd.DataFrame) -> pd.DataFrame:
    """One line a method, size and measure: columns method, k, measure, value, low, high, seeds, images.

    With two seeds or more, value is their mean and the interval the 95 % t-interval over them; with one, both are the
    run's own, and the interval, over its images, says nothing about another training.
    """
    lines = []
    for (method, k, measure), rows in table.groupby(["method", "k", "measure"], sort=False):
        value, low, high = rows[["value", "low", "high"]].iloc[0] if len(rows) == 1 else _over_seeds(rows["value"])
        facts = {"method": method, "k": k, "measure": measure, "value": value, "low": low, "high": high}
        lines.append({**facts, "seeds": len(rows), "images": int(rows["images"].min())})
    return pd.DataFrame(lines, columns=["method", "k", "measure", "value", "low", "high", "seeds", "images"])


def _over_seeds(values: pd.Series) -> tuple[float, float, float]:
    mean, error = values.mean(), stats.sem(values)
    half = error * stats.t.ppf(0.975, len(values) - 1)
    return mean, mean - half, mean + half
