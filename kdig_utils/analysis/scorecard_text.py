"""The scorecard in words: its numbers, and why each claim has its verdict, computed from its row."""

from collections.abc import Callable, Mapping

import numpy as np

from kdig_utils.analysis import claims
from kdig_utils.analysis.verdicts import NOT_TESTABLE

DIGITS = {"%": ".2f", "points": "+.2f", "M": ".2f", "": ",.0f", "rank correlation": "+.3f", "relative": ".0e"}


def written(value: float, unit: str) -> str:
    """A number of the scorecard with its unit, as tables show it; empty if there is none."""
    if np.isnan(value):
        return ""
    if unit in ("×", "ms"):
        return f"{round(value, 2):.10g} {unit}"
    return f"{value:{DIGITS[unit]}} {unit}".rstrip()


def claimed(row: Mapping) -> str:
    """The paper's number of a row with its unit, or the bound that its words imply; empty if they imply none."""
    bound = "at most " if row["measure"] == "explaining_over_training" else ""
    return bound + written(row["claimed"], row["unit"])


def explained(row: Mapping) -> str:
    """Why a row has its verdict, in a few words; for a claim that was not tested, what is missing."""
    if row["verdict"] == NOT_TESTABLE:
        return f"it {claims.OUT_OF_REACH[row['measure']]}"
    if row["reason"]:
        return row["reason"]
    if np.isnan(row["value"]):
        return "not timed in this session" if row["measure"] == "latency_ratio" else "not measured"
    look = f"; an interim look, {row['runs']} of {row['seeds']} seeds" if row["interim"] else ""
    return WORDS.get(row["measure"], _size_in_words)(row) + look


def _size_in_words(row: Mapping) -> str:
    if row["measure"] == "explaining_over_training":
        return f"{row['value']:.2g}, at most {row['claimed']:g} is claimed"
    return f"{row['gap']:+.3g} from the paper's, tolerance {row['tolerance']:g}" if row["gap"] else "the same number"


def _accuracy_in_words(row: Mapping) -> str:
    said = f"{row['gap']:+.2f} from the paper's number; chance reaches {_or_unknown(row['reach'])} points"
    said += f", at most {row['tolerance']:g} is narrow enough"
    if row["statistic"] != "best":
        return said
    how = "extrapolated" if row["runs"] < row["paper_runs"] else "expected"
    runs = f"{row['runs']} runs, whose own best is {row['best']:.2f}"
    return f"{said}; the best of {row['paper_runs']}, {how} from {runs}"


def _difference_in_words(row: Mapping) -> str:
    exact = f", exact {row['p_exact']:.2g}" if np.isfinite(row["p_exact"]) else ""
    p = "no spread to test" if np.isnan(row["p"]) else f"p = {row['p']:.2g}{exact}"
    corrected = f", corrected {row['p_holm']:.2g}" if np.isfinite(row["p_holm"]) else ""
    if row["measure"] == "direction":
        return f"{p}{corrected}; smaller than {claims.margin():g}: p = {_or_unknown(row['p_level'])}"
    if row["measure"] == "no_difference":
        smaller = f"; smaller than {claims.margin():g}: corrected p = {_or_unknown(row['p_level_holm'])}"
        return p + corrected + smaller
    size = f"; {row['gap']:+.2f} from the paper's, chance reaches {_or_unknown(row['reach'])}"
    return p + corrected + (size if np.isfinite(row["gap"]) else "")


def _or_unknown(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{value:.2g}"


WORDS: dict[str, Callable[[Mapping], str]] = {
    **dict.fromkeys(("accuracy", "teacher_gap"), _accuracy_in_words),
    **dict.fromkeys(("difference", "interaction", "no_difference", "direction"), _difference_in_words),
    **dict.fromkeys(("map_similarity", "printed_imagenet"), _difference_in_words),
    "latency_ratio": lambda row: f"{row['gap']:+.3g} from the paper's, tolerance {row['tolerance']:g}, on this machine",
}
