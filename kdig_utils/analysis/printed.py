"""What the authors' notebooks print beside the paper: an earlier sweep and six runs, with their learning curves.

`results/printed` holds the figures, read from the public history of their repository (`paper.json`, history); each run
was trained once, for 100 epochs.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from statsmodels.stats.proportion import confint_proportions_2indep, test_proportions_2indep

from kdig_utils import paths
from kdig_utils.analysis.claims import paper
from kdig_utils.analysis.comparisons import mean_interval, unpaired


def table(name: str) -> pd.DataFrame:
    """`sweep_curves`, `six_curves`, `kd_ig_at_curve` (train_loss, train_accuracy in %, by epoch) or `sweep_results`."""
    file = "sweep_curves.csv.xz" if name == "sweep_curves" else f"{name}.csv"
    path = paths.repository_root() / "results" / "printed" / file
    with paths.reading(path):
        return pd.read_csv(path)


def six_runs() -> pd.DataFrame:
    """The six runs at k = 5: method, overlay_probability (NaN without overlay), alpha, temperature, test_accuracy."""
    return table("six_curves").drop(columns=["epoch", "train_loss", "train_accuracy"]).drop_duplicates()


def earlier_sweep() -> pd.DataFrame:
    """Test accuracy of the earlier sweep: a row for each k, a column for `student`, `kd`, `kd_ig` from random weights.

    `kd_ig, teacher's blocks` starts from the teacher's first blocks; at k = 17 all four do.
    """
    runs = table("sweep_results")
    copied = (runs["notebook"] == "Compression_vs_accuracy").map({True: ", teacher's blocks", False: ""})
    return runs.assign(name=runs["method"] + copied).pivot(index="k", columns="name", values="test_accuracy")


class Gain(NamedTuple):
    """One measurement of how much a method is above another, in points."""

    measured: str
    value: float
    low: float  # of the 95 % interval; NaN, as `high`, where the measurement has none: one run, or the best of several
    high: float
    runs: int  # of each method


def gains(method: str, than: str) -> pd.DataFrame:
    """Every measurement of `method` minus `than` that the authors published, one row a `Gain`.

    Intervals: Welch's over ten runs a method; Student's t over the eight sizes of a sweep, of which each is one run.
    """
    ten = {name: pd.Series(runs) for name, runs in paper()["ablation_runs"].items() if isinstance(runs, list)}
    compared = unpaired(ten[method], ten[than])
    found = [Gain("mean of ten runs", compared.difference, compared.low, compared.high, 10)]
    keys = {"student": "baseline_student_accuracy", "kd": "kd_accuracy", "kd_ig": "kd_ig_accuracy"}
    if {method, than} <= set(keys):
        headline = paper()["headline"]
        found.insert(0, Gain("headline", headline[keys[method]] - headline[keys[than]], np.nan, np.nan, 1))
    best = paper()["monte_carlo"]["best"]
    if {method, than} <= set(best):
        found.append(Gain("best of sixty resamples", best[method] - best[than], np.nan, np.nan, 60))
    papers = pd.DataFrame({name: paper()["compression_sweep_accuracy"][name] for name in (method, than)})
    found += _of_sweep(
        "the paper's sweep", papers.set_axis([entry["k"] for entry in paper()["compression"]]), method, than
    )
    if {method, than} <= set(earlier_sweep()):
        found += _of_sweep("earlier sweep", earlier_sweep(), method, than)
    return pd.DataFrame(found + _of_six(method, than))


def imagenet_gain(method: str, than: str) -> dict[str, float]:
    """How much better `method` does than `than` on the images of ImageNet that the authors' teacher classifies right.

    Both networks saw the same images, but only the sums are printed: the interval takes the two for independent, which
    is too wide rather than too narrow, as long as what is hard for one is hard for the other.

    Returns:
        value, low, high (95 %) in points, p (two proportions) and runs.
    """
    told = paper()["history"]["imagenet"]
    images, percent = told["teacher_right"], told["accuracy"]
    right = [round(percent[name] * images / 100) for name in (method, than)]
    low, high = confint_proportions_2indep(*(part for count in right for part in (count, images)), method="wald")
    p = test_proportions_2indep(*(part for count in right for part in (count, images)), method="wald").pvalue
    value = percent[method] - percent[than]
    return {"value": value, "low": 100 * float(low), "high": 100 * float(high), "p": float(p), "runs": 1}


def _of_sweep(name: str, accuracy: pd.DataFrame, method: str, than: str) -> list[Gain]:
    apart = accuracy[method] - accuracy[than]
    at_5, over_all = Gain(f"{name}, k = 5", apart[5], np.nan, np.nan, 1), mean_interval(apart)
    return [at_5, Gain(f"{name}, mean of {len(apart)} sizes", *over_all, len(apart))]


def _of_six(method: str, than: str) -> list[Gain]:
    runs, found = six_runs().set_index("method"), []
    for row in runs.loc[[method]].itertuples() if method in runs.index else []:
        others = runs.loc[[than]] if than in runs.index else runs.iloc[:0]
        level = row.overlay_probability
        for other in others[
            others["overlay_probability"].isna() | (others["overlay_probability"] == level)
        ].itertuples():
            words = "" if np.isnan(level) else f", overlay probability {level:g}"
            found.append(Gain(f"six runs{words}", row.test_accuracy - other.test_accuracy, np.nan, np.nan, 1))
    return found
