"""The alignment laboratory: what is blended in under each pairing, and what the runs of the ledger say about it."""

import pandas as pd
import torch
from matplotlib.axes import Axes
from scipy import stats
from statsmodels.stats.multitest import multipletests
from torch import Tensor

from kdig_utils import campaigns, controls
from kdig_utils.cifar10 import ImageSet
from kdig_utils.claims import SIGNIFICANCE
from kdig_utils.comparisons import paired
from kdig_utils.overlay import PAIRINGS, EpochDraws, overlay, signal_positions

NO_OVERLAY = "none"
WITHOUT_OVERLAY = {"ig": "student", "kd_ig": "kd"}  # the same method without overlay
CAMPAIGNS = ("ablation", "pairing", "alignment")
COLUMNS = ("pairing", "runs", "mean", "low", "high", "gain", "gain_low", "gain_high", "p", "p_holm")


def blended_maps(pairing: str, images: ImageSet, maps: Tensor, saliency: Tensor, seed: int = 0) -> Tensor:
    """The map that each image gets under a pairing, not yet moved, (N, 32, 32).

    Args:
        maps: the IG maps of the images, (N, 32, 32).
        saliency: their plain gradients, (N, 32, 32).
    """
    everyone = torch.arange(len(images))
    chosen = saliency if pairing == "gradient" else maps[signal_positions(len(images), pairing, seed)]
    return controls.control_maps(pairing, chosen, images, everyone, seed).float()


def pattern(pairing: str, maps: Tensor, batch: EpochDraws) -> Tensor:
    """What is blended onto the cropped images, powered, scaled and moved, (N, 32, 32): all but the factor 0.5."""
    black = torch.zeros(len(maps), 3, *maps.shape[1:])
    return 2 * overlay(black, maps, batch, pairing)[:, 0]


def correlations(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation over the pixels of each pair of maps, (N, H, W) twice to (N,); NaN where one is constant."""
    a, b = (values.flatten(1) - values.flatten(1).mean(1, keepdim=True) for values in (first, second))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def runs(ledger: pd.DataFrame) -> pd.DataFrame:
    """The laboratory's rows of a ledger, each once."""
    return pd.concat([campaigns.rows(ledger, name) for name in CAMPAIGNS]).drop_duplicates("run_id")


def accuracies_of(ledger: pd.DataFrame, method: str) -> dict[str, pd.Series]:
    """Test accuracies of `method` by seed, under each pairing, after those of the same method without overlay."""
    rows = runs(ledger)
    rows = rows[~rows["spec"].astype(str).str.contains('"answers": "online"')]
    wanted = {NO_OVERLAY: (WITHOUT_OVERLAY[method], "matched"), **{name: (method, name) for name in PAIRINGS}}
    return {
        name: rows[(rows["method"] == run) & (rows["pairing"] == pairing)]
        .set_index("seed")["test_accuracy"]
        .astype(float)
        .sort_index()
        for name, (run, pairing) in wanted.items()
    }


def results(ledger: pd.DataFrame, method: str) -> pd.DataFrame:
    """What each pairing gives and gains over the same method without overlay, a row a pairing, none first.

    Args:
        method: `ig` or `kd_ig`.

    Returns:
        Columns pairing, runs, mean with its 95 % interval low to high (per cent), gain over no overlay with its
        interval (points; paired by seed), p of the paired t-test and its Holm correction. NaN where there are fewer
        than two runs, or two pairs.
    """
    accuracies = accuracies_of(ledger, method)
    rows = [_row(pairing, values, accuracies[NO_OVERLAY]) for pairing, values in accuracies.items()]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    tested = table["p"].notna()
    if tested.any():
        table.loc[tested, "p_holm"] = multipletests(table.loc[tested, "p"], method="holm")[1]
    return table


def verdict(table: pd.DataFrame, method: str) -> str:
    """What `results` support, in one paragraph that names only what was tested."""
    tested = table[table["p_holm"].notna()]
    if tested.empty:
        return f"`{method}`: not run yet, so nothing is supported and nothing refuted."
    clear = tested[tested["p_holm"] < SIGNIFICANCE]
    said = [
        f"{row.pairing} {'gains' if row.gain > 0 else 'loses'} {abs(row.gain):.2f} points "
        f"({row.gain_low:.2f} to {row.gain_high:.2f})"
        for row in clear.itertuples()
    ]
    unclear = [name for name in tested["pairing"] if name not in set(clear["pairing"])]
    parts = [f"Against `{WITHOUT_OVERLAY[method]}`, `{method}` with " + "; with ".join(said)] if said else []
    if unclear:
        parts.append(f"No difference from no overlay was shown for {', '.join(unclear)}")
    return ". ".join(parts) + f" ({int(tested['runs'].min())} seeds or more each, paired by seed, Holm-corrected)."


def draw_results(axes: Axes, ledger: pd.DataFrame, method: str, colour: str) -> None:
    """A row for each pairing: a dot a seed, mean and 95 % interval; `not run yet` where there is no run."""
    table, accuracies = results(ledger, method), accuracies_of(ledger, method)
    for place, row in enumerate(table.itertuples()):
        values = accuracies[row.pairing]
        axes.plot(values, [place] * len(values), ".", color=colour, alpha=0.4)
        if row.runs > 1:
            axes.errorbar(row.mean, place, xerr=[[row.mean - row.low], [row.high - row.mean]], fmt="D", color=colour)
        elif row.runs == 0:
            axes.text(0.5, place, "not run yet", transform=axes.get_yaxis_transform(), ha="center", va="center")
    axes.set(yticks=range(len(table)), yticklabels=table["pairing"], ylim=(len(table) - 0.5, -0.5))
    axes.set(xlabel="test accuracy, %")
    if not table["runs"].any():
        axes.set_xticks([])


def _row(pairing: str, values: pd.Series, without: pd.Series) -> dict[str, object]:
    row: dict[str, object] = {"pairing": pairing, "runs": len(values), "mean": values.mean()}
    if len(values) > 1:
        row["low"], row["high"] = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    shared = values.index.intersection(without.index)
    if pairing != NO_OVERLAY and len(shared) > 1:
        gain = paired(values[shared], without[shared])
        row |= {"gain": gain.difference, "gain_low": gain.low, "gain_high": gain.high, "p": gain.p}
    return row
