"""The alignment laboratory: what is blended in under each pairing, and what the runs of the ledger say about it.

Accuracies are in per cent, by seed; their differences in points, always taken seed by seed.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from kdig_utils.analysis.claims import SIGNIFICANCE
from kdig_utils.analysis.comparisons import holm, mean_interval, paired, paired_equivalence
from kdig_utils.experiments import campaigns
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.method import pairings
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.method.overlay import EpochDraws, overlay
from kdig_utils.method.pairings import PAIRINGS, signal_positions
from kdig_utils.method.spec import RunSpec

NOT_RUN = "not run yet"
NO_OVERLAY = "none"
WITHOUT_OVERLAY = {"ig": "student", "kd_ig": "kd"}  # the same method without overlay
CONTROLS = (NO_OVERLAY, *(name for name in PAIRINGS if name != "matched"))
GAINS = ("runs", "mean", "low", "high", "gain", "gain_low", "gain_high", "p", "p_holm")
DIFFERENCES = ("pairs", "difference", "low", "high", "p", "p_holm", "level_p", "level_p_holm")
# What `matched` must be, against which controls, for each thing that the laboratory could find out.
READINGS: dict[str, dict[str, str]] = {
    "the map's content matters, and so does its place": dict.fromkeys(CONTROLS, "above"),
    "content matters, and its place does not": {"shuffled": "above", "index-matched": "level"},
    "form is enough, and no teacher is needed": {NO_OVERLAY: "above", "edges": "level"},
    "whatever is blended in, it helps alike": {**dict.fromkeys(CONTROLS, "level"), NO_OVERLAY: "above"},
    "nothing that is blended in makes a difference": dict.fromkeys(CONTROLS, "level"),
}


def blended_maps(pairing: str, images: ImageSet, maps: Tensor, saliency: Tensor, seed: int = 0) -> Tensor:
    """The map that each image gets under a pairing, not yet moved, (N, 32, 32).

    Args:
        maps: the IG maps of the images, (N, 32, 32).
        saliency: their plain gradients, (N, 32, 32).
    """
    everyone = torch.arange(len(images))
    chosen = saliency if pairing == "gradient" else maps[signal_positions(len(images), pairing, seed)]
    return pairings.control_maps(pairing, chosen, images, everyone, seed).float()


def pattern(pairing: str, maps: Tensor, batch: EpochDraws) -> Tensor:
    """What is blended onto the cropped images, powered, scaled and moved, (N, 32, 32): all but the factor 0.5."""
    black = torch.zeros(len(maps), 3, *maps.shape[1:])
    return 2 * overlay(black, maps, batch, pairing)[:, 0]


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation over the pixels of each pair of maps, (N, H, W) twice to (N,); NaN where one is constant."""
    a, b = (values.flatten(1) - values.flatten(1).mean(1, keepdim=True) for values in (first, second))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def with_overlays(ledger: pd.DataFrame, method: str) -> dict[str, pd.Series]:
    """Test accuracies of `method` under each pairing, after those of the same method without overlay.

    Args:
        method: `ig` or `kd_ig`.
    """
    specs = {NO_OVERLAY: RunSpec(WITHOUT_OVERLAY[method]), **{name: RunSpec(method, pairing=name) for name in PAIRINGS}}
    return accuracies_of(ledger, specs)


def with_answers(ledger: pd.DataFrame, alpha: float, temperature: float) -> dict[str, pd.Series]:
    """Test accuracies of `kd` with stored, shuffled and online answers, after those of `student`."""
    kd = RunSpec("kd", alpha=alpha, temperature=temperature)
    told = {
        "stored": kd,
        "shuffled": dataclasses.replace(kd, pairing="shuffled"),
        "online": dataclasses.replace(kd, answers="online"),
    }
    return accuracies_of(ledger, {"student": RunSpec("student"), **told})


def accuracies_of(ledger: pd.DataFrame, specs: dict[str, RunSpec]) -> dict[str, pd.Series]:
    """Test accuracies of the campaigns' seeds with each of these settings, whichever campaign trained them.

    All of one teacher: the one that most of these runs have.

    Raises:
        ValueError: a seed was run twice with one setting.
    """
    wanted = [dataclasses.replace(spec, seed=seed) for spec in specs.values() for seed in range(campaigns.SEEDS)]
    rows = campaigns.rows_of(ledger, wanted)
    ran = pd.Series([_repeated(spec_of(row)) for _index, row in rows.iterrows()], rows.index, dtype=object)
    found = {
        name: rows[ran == _repeated(spec)].set_index("seed")["test_accuracy"].astype(float).sort_index().rename(name)
        for name, spec in specs.items()
    }
    for name, values in found.items():
        if values.index.has_duplicates:
            seed = values.index[values.index.duplicated()][0]
            raise ValueError(f"{name} has seed {seed} twice: choose the rows of one data set")
    return found


def results(ledger: pd.DataFrame, method: str) -> pd.DataFrame:
    """What each pairing gives, and gains over the same method without overlay: `gains` of `with_overlays`."""
    return gains(with_overlays(ledger, method)).rename_axis("pairing").reset_index()


def answers_results(ledger: pd.DataFrame, alpha: float, temperature: float) -> pd.DataFrame:
    """What each kind of answers gives, and gains over a student without any: `gains` of `with_answers`."""
    return gains(with_answers(ledger, alpha, temperature)).rename_axis("answers").reset_index()


def against_controls(ledger: pd.DataFrame, method: str, margin: float) -> pd.DataFrame:
    """The laboratory's question: `matched` minus each control and minus no overlay; `differences` of these."""
    table = differences(with_overlays(ledger, method), "matched", CONTROLS, margin)
    return table.rename_axis("control").reset_index()


def against_stored(ledger: pd.DataFrame, alpha: float, temperature: float, margin: float) -> pd.DataFrame:
    """Whether it matters whose answers, and about what: stored minus shuffled ones, and minus online ones."""
    table = differences(with_answers(ledger, alpha, temperature), "stored", ("shuffled", "online"), margin)
    return table.rename_axis("answers").reset_index()


def gains(accuracies: dict[str, pd.Series]) -> pd.DataFrame:
    """Means, and what each gains over the first, a row each.

    Returns:
        Columns runs, mean with its 95 % interval low to high (per cent), gain over the first with its interval
        (points), p of the paired t-test and its Holm correction. NaN where there are fewer than two runs, or pairs.
    """
    baseline, *_others = accuracies.values()
    rows = {name: _gain(values, baseline) for name, values in accuracies.items()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(GAINS)).astype(float)
    return table.astype({"runs": int}).assign(p_holm=[np.nan, *holm(table["p"].iloc[1:])])


def differences(accuracies: dict[str, pd.Series], first: str, others: Iterable[str], margin: float) -> pd.DataFrame:
    """The first minus each of the others, and whether they are level: two families of tests.

    That one gain is significant and another is not says nothing about their difference (Gelman & Stern 2006,
    doi 10.1198/000313006X152649): it takes a test of its own. Nor does a large p say that two are level: that takes
    a test of equivalence, with a margin in points that was fixed before looking.

    Returns:
        Columns pairs, difference with its 95 % interval low to high (points), p of the paired t-test, level_p of the
        paired test of equivalence, both with Holm's correction for all others, run or not, and finding: `above`,
        `below`, `level`, `undecided`, or `not run yet` with fewer than two pairs.
    """
    rows = {name: _difference(accuracies[first], accuracies[name], margin) for name in others}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(DIFFERENCES)).astype(float)
    table = table.astype({"pairs": int}).assign(p_holm=holm(table["p"]), level_p_holm=holm(table["level_p"]))
    return table.assign(finding=[_finding(row) for row in table.itertuples()])


def readings(controls: pd.DataFrame) -> dict[str, str]:
    """For each of `READINGS` whether `against_controls` makes it `supported`, `not supported` or `not run yet`.

    Not supported is not refuted: the difference that decides may be undecided.
    """
    found = dict(zip(controls["control"], controls["finding"], strict=True))
    return {
        reading: _support([found[name] for name in wanted], wanted.values()) for reading, wanted in READINGS.items()
    }


def verdict(controls: pd.DataFrame, method: str, margin: float) -> str:
    """What `against_controls` supports, in one paragraph that names only what was tested."""
    tested = controls[controls["finding"] != NOT_RUN]
    if tested.empty:
        return f"`{method}`: {NOT_RUN}, so nothing is supported and nothing refuted."
    parts = [_in_words(finding, its, margin) for finding, its in controls.groupby("finding")]
    supported = [reading for reading, support in readings(controls).items() if support == "supported"]
    return (
        f"`{method}` with its own map, moved with the image, is {'; '.join(parts)} ({int(tested['pairs'].min())} seeds "
        f"or more, paired, Holm-corrected). Supported: {'; '.join(supported) or 'none of the readings'}."
    )


def draw_results(axes: Axes, accuracies: dict[str, pd.Series], colour: str) -> None:
    """A row for each setting: a dot a seed, mean and 95 % interval; `not run yet` where there is no run."""
    table = gains(accuracies)
    for place, row in enumerate(table.itertuples()):
        values = accuracies[row.Index]
        axes.plot(values, [place] * len(values), ".", color=colour, alpha=0.4)
        if row.runs > 1:
            axes.errorbar(row.mean, place, xerr=[[row.mean - row.low], [row.high - row.mean]], fmt="D", color=colour)
        elif row.runs == 0:
            _mark_not_run(axes, place)
    axes.set(yticks=range(len(table)), yticklabels=table.index, ylim=(len(table) - 0.5, -0.5))
    axes.set(xlabel="test accuracy, %")
    if not table["runs"].any():
        axes.set_xticks([])


def draw_differences(axes: Axes, table: pd.DataFrame, margin: float, colour: str) -> None:
    """A row for each control: the difference and its 95 % interval, over the margin within which two are level."""
    axes.axvspan(-margin, margin, color="#DDDDDD", zorder=0)
    axes.axvline(0, color="black", lw=1)
    for place, row in enumerate(table.itertuples()):
        if row.finding == NOT_RUN:
            _mark_not_run(axes, place)
        else:
            reach = [[row.difference - row.low], [row.high - row.difference]]
            axes.errorbar(row.difference, place, xerr=reach, fmt="D", color=colour)
            axes.text(1.02, place, row.finding, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set(yticks=range(len(table)), yticklabels=table.iloc[:, 0], ylim=(len(table) - 0.5, -0.5))
    axes.set(xlabel="difference in test accuracy, points")


def _repeated(spec: RunSpec) -> str:
    """What all repetitions of a run have in common."""
    return f"{spec.method} {spec.setting()}"


def _gain(values: pd.Series, baseline: pd.Series) -> dict[str, float]:
    row: dict[str, float] = {"runs": len(values), "mean": np.nan}
    if len(values):
        row |= dict(zip(("mean", "low", "high"), mean_interval(values), strict=True))
    shared = values.index.intersection(baseline.index)
    if values is not baseline and len(shared) > 1:
        gain = paired(values[shared], baseline[shared])
        row |= {"gain": gain.difference, "gain_low": gain.low, "gain_high": gain.high, "p": gain.p}
    return row


def _difference(first: pd.Series, second: pd.Series, margin: float) -> dict[str, float]:
    shared = first.index.intersection(second.index)
    if len(shared) < 2:
        return {"pairs": len(shared)}
    found = paired(first[shared], second[shared])
    level = paired_equivalence(first[shared], second[shared], margin)
    same = {name: getattr(found, name) for name in ("difference", "low", "high", "p")}
    return {"pairs": found.runs, **same, "level_p": level.p}


def _finding(row: tuple) -> str:
    if pd.isna(row.p_holm):
        return NOT_RUN
    if row.p_holm < SIGNIFICANCE:
        return "above" if row.difference > 0 else "below"
    return "level" if row.level_p_holm < SIGNIFICANCE else "undecided"


def _support(findings: Iterable[str], wanted: Iterable[str]) -> str:
    found = list(findings)
    if NOT_RUN in found:
        return NOT_RUN
    return "supported" if found == list(wanted) else "not supported"


def _mark_not_run(axes: Axes, place: int) -> None:
    where = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "center"}
    axes.text(0.5, place, NOT_RUN, backgroundcolor="white", **where)


def _in_words(finding: str, rows: pd.DataFrame, margin: float) -> str:
    """`above edges by 0.41 points (+0.30 to +0.52)`, `level with random (within ± 0.3 points)`, and the like."""
    names = ", ".join(rows["control"])
    if finding == "level":
        return f"level with {names} (within ± {margin:g} points)"
    if finding not in ("above", "below"):
        return f"{finding} against {names}"
    return f"{finding} " + ", ".join(
        f"{row.control} by {abs(row.difference):.2f} points ({row.low:+.2f} to {row.high:+.2f})"
        for row in rows.itertuples()
    )
