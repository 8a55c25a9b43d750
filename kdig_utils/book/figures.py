"""How the book's figures look: one style, one colour a method, an alternative text and a caption for each."""

import io
from collections.abc import Iterable

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import seaborn as sns
from IPython.display import Image, Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kdig_utils import paths
from kdig_utils.analysis import claims, laboratory
from kdig_utils.analysis.comparisons import mean_interval
from kdig_utils.experiments import campaigns, evidence, laptop
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.method.spec import METHODS, RunSpec

# Okabe-Ito, readable with every kind of colour vision; grey for the teacher.
COLOURS = ("#555555", "#000000", "#0072B2", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#882255")
METHOD_COLOURS = dict(zip(("teacher", *METHODS), COLOURS, strict=True))
DPI = 96
CLOSED = 1e-6  # of a panel that is left out: a ratio must be positive


def style() -> None:
    """Set the book's style for all figures that follow, whatever the reader's is, and show a table's words in full."""
    matplotlib.rcdefaults()  # but for the backend
    pd.set_option("display.max_colwidth", None)
    titles = {"axes.titleweight": "bold", "axes.titlelocation": "left", "figure.titleweight": "bold"}
    sns.set_theme(style="whitegrid", font_scale=0.9, rc={"figure.constrained_layout.use": True, **titles})


def show(figure: Figure, alt: str, caption: str, kind: str | Iterable[str]) -> None:
    """Show a figure with its alternative text, and its caption below; close it.

    Args:
        alt: what the figure shows, for readers who do not see it.
        caption: what it rests on: which images, how many seeds, how many epochs.
        kind: its kind of evidence, in the vocabulary of `evidence`; of a figure with several, all of them.

    Raises:
        ValueError: alternative text or caption is empty, or a kind is not in the vocabulary.
    """
    below = caption_of(alt, caption, kind)
    display(Image(data=png(figure), format="png", alt=alt))
    plt.close(figure)
    display(below)


def caption_of(alt: str, caption: str, kind: str | Iterable[str]) -> Markdown:
    """What stands below a figure: its caption and its kind of evidence; raises as `show` does."""
    if not alt.strip() or not caption.strip():
        raise ValueError(f"a figure needs an alternative text and a caption, got {alt!r} and {caption!r}: write both")
    return Markdown(f"*{caption}* Evidence: {evidence.in_words(kind)}.")


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 128 colours, chosen for it: a quarter of the bytes, and nobody sees it."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, facecolor="white")
    with PIL.Image.open(drawn) as image:
        image.convert("RGB").quantize(128).save(small, format="png", optimize=True)
    return small.getvalue()


def show_image(axes: Axes, image: Tensor, title: str = "") -> None:
    """Draw one image, (3, H, W) in [0, 1], without axes."""
    show_map(axes, image.permute(1, 2, 0).clamp(0, 1), title)


def show_map(axes: Axes, values: Tensor, title: str = "", cmap: str = "inferno") -> None:
    """Draw one map, (H, W), from its lowest to its highest value, without axes; of colours, (H, W, 3), as it is."""
    axes.imshow(values.detach().float().cpu().numpy(), cmap=cmap, interpolation="nearest")  # the pixels that there are
    axes.set_title(title, fontsize=9, loc="center", fontweight="normal")
    axes.set_axis_off()


def draw_contrasts(axes: Axes, table: pd.DataFrame) -> None:
    """A row for each contrast of the laptop protocol: effect and 95 % interval over the margin, its verdict beside it.

    Hollow while seeds are missing.

    Args:
        table: rows of `laboratory.contrasts`.
    """
    margin = laboratory.registered()["margin"]
    axes.axvspan(-margin, margin, color="#DDDDDD", zorder=0)
    axes.axvline(0, color="black", lw=1)
    for place, row in enumerate(table.itertuples()):
        known, right = row.pairs > 1, axes.get_yaxis_transform()
        if known:
            reach = [[row.effect - row.low], [row.high - row.effect]]
            filled = COLOURS[2] if row.pairs >= row.seeds else "white"
            axes.errorbar(row.effect, place, xerr=reach, fmt="D", color=COLOURS[2], markerfacecolor=filled)
        words = row.verdict if row.pairs >= row.seeds else f"{row.pairs} of {row.seeds} seeds"
        axes.text(1.02, place, words, transform=right, va="center", fontsize=9)
    axes.set(yticks=range(len(table)), yticklabels=table["name"], ylim=(len(table) - 0.5, -0.5))
    axes.set(xlabel="difference in test accuracy, points")


def draw_paper_scale(axes: Axes, table: pd.DataFrame) -> list[str]:
    """The same contrasts between runs at the paper's settings with these methods and pairings; return their evidence.

    Without a run the panel is left out, and there is no evidence.

    Args:
        table: rows of `laboratory.contrasts`.
    """
    ledger = Ledger(paths.ledger_path()).read().query("train_images == @evidence.TRAIN_IMAGES")
    found = []
    for row in table.itertuples():
        of_condition = {}
        for name in row.weights:
            method, pairing = laptop.CONDITIONS[name].method, laptop.CONDITIONS[name].pairing
            wanted = [RunSpec(method, seed=seed, pairing=pairing) for seed in range(campaigns.SEEDS)]
            runs = campaigns.rows_of(ledger, wanted)
            of_condition[name] = runs.set_index("seed")["test_accuracy"].astype(float)
        found.append(laboratory.differences(pd.DataFrame(of_condition), row.weights, campaigns.SEEDS))
    if not any(map(len, found)):
        leave_out(axes)
        return []
    axes.axvspan(-claims.margin(), claims.margin(), color="#DDDDDD", zorder=0)
    axes.axvline(0, color="black", lw=1)
    for place, d in enumerate(found):
        axes.text(1.02, place, f"{len(d)} seeds", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        if len(d):
            mean, low, high = mean_interval(d)
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="D", color=COLOURS[2])
    axes.set(yticks=range(len(table)), yticklabels=table["name"], ylim=(len(table) - 0.5, -0.5))
    axes.set(xlabel="difference in test accuracy, points", title="The paper's settings")
    return [evidence.TRAINED]


def draw_gains(axes: Axes, table: pd.DataFrame) -> None:
    """A row for each measurement of a gain: filled with its 95 % interval, hollow if it is a number without one.

    Args:
        table: columns measured, value, low and high, in points, as `printed.gains` has them, and if wanted colour.
    """
    axes.axvline(0, color="black", lw=1)
    for place, row in enumerate(table.itertuples()):
        known, colour = not np.isnan(row.low), getattr(row, "colour", COLOURS[7])
        reach = [[row.value - row.low], [row.high - row.value]] if known else None
        fill = colour if known else "white"
        axes.errorbar(row.value, place, xerr=reach, fmt="s", ms=7, capsize=3, color=colour, markerfacecolor=fill)
        axes.text(1.02, place, f"{row.value:+.2f}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set(yticks=range(len(table)), yticklabels=table["measured"], ylim=(len(table) - 0.5, -0.5))
    axes.set(xlabel="difference in test accuracy, points")


def leave_out(axes: Axes) -> None:
    """Remove a panel whose runs are missing, and close its gap: its column, or its row where others stand above it."""
    place = axes.get_subplotspec()
    assert place is not None, "an axes of a grid of panels"
    grid, one_column = place.get_gridspec(), len(place.rowspan) == place.get_gridspec().nrows
    axes.remove()
    ratios = np.array(grid.get_width_ratios() if one_column else grid.get_height_ratios(), dtype=float)
    ratios[list(place.colspan if one_column else place.rowspan)] = CLOSED
    (grid.set_width_ratios if one_column else grid.set_height_ratios)(ratios)
