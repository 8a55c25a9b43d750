"""What the runs of the laptop protocol say: each registered contrast with its interval, its power and its verdict."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from kdig_utils.analysis import claims
from kdig_utils.analysis.claims import SIGNIFICANCE
from kdig_utils.analysis.comparisons import holm, mean_interval
from kdig_utils.analysis.permutation import sign_flips
from kdig_utils.analysis.sample_size import power, seeds_needed
from kdig_utils.analysis.variance import variance_components
from kdig_utils.experiments import laptop
from kdig_utils.experiments.evidence import NOT_RUN
from kdig_utils.experiments.ledger import Ledger, student_spec
from kdig_utils.method import models

ABOVE, BELOW, LEVEL, UNDECIDED = "above", "below", "level", "undecided"
SO_FAR = "undecided so far"  # while runs of the question are missing: Holm's correction may still allow a finding
YES, NO, OPEN = "yes", "no", "open"  # whether what was predicted held
NUMBERS = ("effect", "low", "high", "deviation", "p", "p_exact", "level_p", "needed")
PILOT_DEVIATION = 1.0  # points: about that of the pilot's differences
INDEPENDENT = 0.5  # the correlation at which a difference deviates as much as a run


def registered() -> dict[str, Any]:
    """The protocol as claims.yml has it; treat it as read-only."""
    return claims.protocols()[laptop.NAME]


def read(test_images: int = 10_000) -> pd.DataFrame:
    """The runs of the protocol on all test images, with their condition; empty if there are none yet."""
    rows = Ledger(laptop.ledger_path()).read().query("test_images == @test_images")
    seeds = range(laptop.MORE_SEEDS)
    names = {replace(run, seed=seed).bare_id: name for name, run in laptop.CONDITIONS.items() for seed in seeds}
    return rows.assign(condition=[names.get(student_spec(row).bare_id, "") for _index, row in rows.iterrows()])


def accuracies(rows: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy in per cent, a row a seed and a column a condition; NaN where a run is missing.

    Raises:
        ValueError: a condition has a seed twice.
    """
    its = rows[rows["condition"] != ""]
    if (twice := its.duplicated(["condition", "seed"])).any():
        row = its[twice].iloc[0]
        raise ValueError(f"{row['condition']!r} has seed {row['seed']} twice: choose the rows of one data set")
    table = its.pivot(index="seed", columns="condition", values="test_accuracy")
    return table.reindex(columns=list(laptop.CONDITIONS)).astype(float)


def differences(table: pd.DataFrame, weights: Mapping[str, float], seeds: int) -> NDArray:
    """The weighted sum of conditions, in points, at each of the first `seeds` seeds that has them all.

    Seeds pair the runs: initial weights, order, crops and flips are the same in every condition.
    """
    wanted = table.reindex(range(seeds))[list(weights)].dropna()
    return wanted.to_numpy() @ np.array(list(weights.values()))


def contrasts(table: pd.DataFrame) -> pd.DataFrame:
    """Each registered contrast, in the order of claims.yml.

    Args:
        table: as `accuracies` gives it.

    Returns:
        Columns question, name, text, prediction, seeds (planned), pairs (there), effect with its 95 % interval low to
        high (points), deviation of the differences, p of the paired t-test, p_exact (sign flips), level_p (two
        one-sided tests with the registered margin), p_holm and level_p_holm within the question, power (chance that
        the planned seeds see one point, at the pilot's deviation, or 1 where there is no pilot), power_holm (the same
        at the strictest of Holm's levels), needed (seeds that see the margin with a chance of 0.8, at that level and
        the deviation found), and verdict: `above`, `below`, `level` or `undecided` once all seeds are there, else
        `not run yet`. While contrasts of the same question wait for runs, it is `undecided so far`.
    """
    protocol = registered()
    tests = Counter(contrast["question"] for contrast in protocol["contrasts"])
    level = {question: SIGNIFICANCE / number for question, number in tests.items()}  # Holm's strictest step
    rows = [_measured(each, table, protocol["margin"], level[each["question"]]) for each in protocol["contrasts"]]
    found = pd.DataFrame(rows)
    whole = found["pairs"] >= found["seeds"]  # an interim p does not help the others: it is not final
    for _question, its in found.groupby("question"):
        for name in ("p", "level_p"):
            found.loc[its.index, f"{name}_holm"] = holm(its[name].where(whole[its.index]))
    shown, above = found["p_holm"] < SIGNIFICANCE, found["effect"] > 0
    conditions = [~whole, shown & above, shown, found["level_p_holm"] < SIGNIFICANCE]
    undecided = np.where(found["question"].isin(found.loc[~whole, "question"]), SO_FAR, UNDECIDED)
    return found.assign(verdict=np.select(conditions, [NOT_RUN, ABOVE, BELOW, LEVEL], undecided))


def _measured(contrast: dict, table: pd.DataFrame, margin: float, level: float) -> dict[str, Any]:
    d = differences(table, contrast["weights"], contrast["seeds"])
    pilot = np.std(contrast["pilot"], ddof=1) if contrast["pilot"] else PILOT_DEVIATION
    planned = [power(1.0, float(pilot), contrast["seeds"], at, INDEPENDENT) for at in (SIGNIFICANCE, level)]
    known = {"text": claims.shown(contrast["text"]), "pairs": len(d), "power": planned[0], "power_holm": planned[1]}
    row = contrast | known | dict.fromkeys(NUMBERS, np.nan)
    if len(d) < 2 or np.ptp(d) == 0:
        return row
    test, spread, whole = stats.ttest_1samp(d, 0.0), float(d.std(ddof=1)), len(d) == contrast["seeds"]
    interval = test.confidence_interval(1 - SIGNIFICANCE)
    apart = [stats.ttest_1samp(d, side * margin, alternative=way) for side, way in ((-1, "greater"), (1, "less"))]
    return row | {
        "effect": float(d.mean()),
        "low": float(interval.low),
        "high": float(interval.high),
        "deviation": spread,
        "p": float(test.pvalue),
        "p_exact": sign_flips(d),
        "level_p": max(float(each.pvalue) for each in apart),
        "needed": seeds_needed(margin, spread, alpha=level, correlation=INDEPENDENT) if whole else np.nan,
    }


def in_words(row: pd.Series) -> str:
    """What a contrast found: `+ 2.96 points (2.10 to 3.82): above`, or how many of its seeds there are."""
    if row.pairs < 2:
        return f"{NOT_RUN}: {row.pairs} of {row.seeds} seeds"
    found = f"{row.effect:+.2f} points ({row.low:+.2f} to {row.high:+.2f})"
    if row.verdict == NOT_RUN:
        return f"{found} after {row.pairs} of {row.seeds} seeds, no verdict yet"
    undecided = row.verdict in (UNDECIDED, SO_FAR)
    needs = f", about {row.needed:.0f} seeds can show {registered()['margin']:g} points" if undecided else ""
    return f"{found}: {row.verdict}{needs}"


def told(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `contrasts` to read, by name: the pilot, what came out, and whether what was predicted held."""
    needed, rows = f"seeds to see {registered()['margin']:g} points", []
    for row in table.itertuples():
        decided = row.verdict in (ABOVE, BELOW, LEVEL)
        rows.append({
            "contrast": row.name,
            "compared": row.text,
            "pilot": f"{np.mean(row.pilot):+.2f} ({len(row.pilot)} seeds)" if row.pilot else "",
            "effect, points": f"{row.effect:+.2f} ({row.low:+.2f} to {row.high:+.2f})" if row.pairs > 1 else "",
            "seeds": f"{row.pairs} of {row.seeds}",
            needed: f"{row.needed:.0f}" if np.isfinite(row.needed) else "",
            "power for 1 point": f"{row.power:.2f}, corrected {row.power_holm:.2f}",
            "verdict": row.verdict,
            "predicted": row.prediction,
            "held": (YES if row.verdict == row.prediction else NO) if decided else OPEN,
        })  # fmt: skip
    return pd.DataFrame(rows).set_index("contrast")


def basis(table: pd.DataFrame) -> str:
    """What a figure of contrasts in the protocol's own setting, those of L1 to L4, rests on, for its caption."""
    seeds = " to ".join(map(str, sorted({table["pairs"].min(), table["pairs"].max()})))
    base, rows = laptop.BASE, read()
    devices, mixed = rows["device"], mixed_seeds(rows)
    parameters = models.count_parameters(models.student(base.k, stem_stride=base.stem_stride))
    on_cpus = int(devices.str.startswith("CPU").sum())
    return (
        f"Protocol laptop: a student of {parameters:,} parameters, {base.train_images:,} images, {base.epochs} epochs, "
        f"{seeds} seeds for each comparison, paired; 10,000 test images. Of the protocol's runs {on_cpus} were made on "
        f"CPUs, {len(devices) - on_cpus} on a GPU{mixed}. Bars: 95 % intervals, not corrected for the number of tests "
        "as the verdicts are; grey: the registered margin."
    )


def mixed_seeds(rows: pd.DataFrame) -> str:
    """For a caption: the seeds of which some conditions of L1 to L4 ran on a CPU, and others on a GPU."""
    its = rows[rows["condition"].isin(laptop.MAIN)]
    kinds = its["device"].str.startswith("CPU").groupby(its["seed"].astype(int)).nunique()
    seeds = ", ".join(str(seed) for seed, number in kinds.items() if number > 1)
    return f" (seed {seeds} on both: a pair there is hardly more alike than two seeds)" if seeds else ""


def surface(rows: pd.DataFrame) -> pd.DataFrame:
    """L5: mean accuracy on held-out training images and on test images, and the seeds, of each alpha and temperature.

    Args:
        rows: as `read` gives them.

    Returns:
        Columns alpha, temperature, validation, test (per cent), seeds; one row a registered cell, NaN where none ran.
    """
    means = _of_surface(rows).groupby(["alpha", "temperature"])
    found = means.agg(
        validation=("validation_accuracy", "mean"), test=("test_accuracy", "mean"), seeds=("seed", "nunique")
    )
    return found.reindex(_cells()).fillna({"seeds": 0}).reset_index().astype({"seeds": int})


def promises(rows: pd.DataFrame, chosen_by: str) -> pd.DataFrame:
    """L5: each seed chooses a cell by its own runs; how much better it looks there than with the other seeds.

    A seed moves all its runs alike. So the cell is held against the mean of all cells of the same seed, both times.

    Args:
        rows: as `read` gives them; a seed takes part if it has run every cell.
        chosen_by: `validation_accuracy` or `test_accuracy`.

    Returns:
        Index seed; columns alpha and temperature of its choice, reported (test accuracy of the run that it chose, per
        cent) and promised (points too high; NaN with one seed).
    """
    seen, tested = (
        _of_surface(rows).pivot_table(name, "seed", ["alpha", "temperature"]).reindex(columns=_cells()).dropna()
        for name in (chosen_by, "test_accuracy")
    )
    above, found = tested.sub(tested.mean(axis=1), axis=0), {}
    for seed, cell in seen.idxmax(axis=1).items():
        promised = above.at[seed, cell] - above[cell].drop(seed).mean()
        found[seed] = (*cell, tested.at[seed, cell], promised)
    columns = [*seen.columns.names, "reported", "promised"]
    return pd.DataFrame.from_dict(found, orient="index", columns=columns).rename_axis("seed")


def choice_held(rows: pd.DataFrame) -> tuple[str, str]:
    """L5: what the test images choose and how much better it looks than it is, with its interval; whether that held.

    Predicted were an alpha of 0.9 or more, and less than one point.
    """
    cells, extra = surface(rows), promises(rows, "test_accuracy")["promised"].dropna()
    if cells["test"].isna().any() or len(extra) < 2:
        return NOT_RUN, OPEN
    best, (mean, low, high) = cells.loc[cells["test"].idxmax()], mean_interval(extra)
    said = f"test images choose α = {best['alpha']:g}, T = {best['temperature']:g} by the mean over seeds; what each "
    said += f"seed chooses alone looks {mean:+.2f} points ({low:+.2f} to {high:+.2f}) better than it is, on average"
    if (cells["seeds"] < registered()["questions"]["L5"]["seeds"]).any():
        return said, OPEN
    return said, NO if best["alpha"] < 0.9 or low > 1 else YES if high < 1 else OPEN


def lucks_held(rows: pd.DataFrame) -> tuple[str, str]:
    """L6: how much images and seed move the accuracy, with intervals; whether it is the images that move it more.

    Each share is that of one kind of luck against what neither explains alone: the larger share is the larger luck.
    """
    its = crossed(rows).astype({"test_accuracy": float})
    if its["resample"].nunique() < 2:
        return NOT_RUN, OPEN
    kinds = (("resample", "seed"), ("seed", "resample"))
    images, seed = (variance_components(its, group, fixed=[other]) for group, other in kinds)
    shares = [f"{part.share:.0%} ({part.low:.0%} to {part.high:.0%})" for part in (images, seed)]
    said = f"shares of the variance: images {shares[0]}, seed {shares[1]}, {images.groups} draws"
    if images.groups < registered()["questions"]["L6"]["draws"]:
        return said, OPEN
    return said, YES if images.low > seed.high else NO if images.high < seed.low else OPEN


def _cells() -> pd.MultiIndex:
    return pd.MultiIndex.from_product([laptop.ALPHAS, laptop.TEMPERATURES], names=["alpha", "temperature"])


def _of_surface(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs of L5, with their alpha and temperature; accuracies as numbers."""
    wanted = {run.bare_id: (run.alpha, run.temperature) for run in laptop.surface()}
    cells = [wanted.get(student_spec(row).bare_id, (np.nan, np.nan)) for _index, row in rows.iterrows()]
    its = rows.assign(alpha=[cell[0] for cell in cells], temperature=[cell[1] for cell in cells])
    return its.dropna(subset=["alpha"]).astype({"validation_accuracy": float, "test_accuracy": float})


def crossed(rows: pd.DataFrame) -> pd.DataFrame:
    """L6: the runs of the draws of images that have all their seeds, with the draw in the column `resample`."""
    wanted = {run.bare_id: run.sample_seed for run in laptop.crossed()}
    its = rows.assign(resample=[wanted.get(student_spec(row).bare_id) for _index, row in rows.iterrows()])
    its = its.dropna(subset=["resample"])
    return its[its.groupby("resample")["seed"].transform("nunique") == registered()["questions"]["L6"]["seeds"]]
