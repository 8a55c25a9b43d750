"""The scorecard in words: why each claim has its verdict, in sentences that are computed from its row."""

from collections.abc import Callable, Mapping

import numpy as np

from kdig_utils.analysis import claims
from kdig_utils.analysis.verdicts import NOT_RUN, NOT_TESTABLE, SIGNIFICANCE

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


def reasons(row: Mapping) -> str:
    """One paragraph on a row of the scorecard: what is claimed, what we have, how it was judged, where it is shown."""
    said = (
        f"The paper gives {claimed(row)}"
        if any(isinstance(part, str) for part in row["paths"])
        else "The claim is made in words"
    )
    parts = [f"{said} ({row['source']}).", _evidence(row), _judgement(row), _conceptual(row), _conflict(row)]
    shown = f"Shown in [chapter {row['chapter'][:2]}]({row['chapter']}.ipynb)."
    return " ".join([*filter(None, parts), shown])


def _evidence(row: Mapping) -> str:
    if row["verdict"] == NOT_TESTABLE:
        return f"It {claims.OUT_OF_REACH[row['measure']]}."
    if row["verdict"] == NOT_RUN:
        return _what_is_missing(row)
    ours, low, high = (written(row[name], row["unit"]) for name in ("value", "low", "high"))
    confidence = 99.9 if row["interim"] else 100 * (1 - SIGNIFICANCE)
    spread = f", {confidence:g} % interval {low} to {high}" if low else ""
    runs = f", {row['runs']} runs a method" if row["runs"] > 1 else ""
    return f"Evidence: {row['found']}. It gives {ours}{spread}{runs}."


def _what_is_missing(row: Mapping) -> str:
    if row["measure"] == "latency_ratio":
        return "It was not timed in this session."
    if not row["short_budget"]:
        return f"No run tests it yet: {explained(row)}. {_price(row)}"
    found = written(row["short"], row["unit"])
    return (
        f"No run tests it yet. The nearest had {row['reason']}. They gave {found}, which tests nothing. {_price(row)}"
    )


def _price(row: Mapping) -> str:
    if row["measure"] == "teacher":
        return f"It takes one teacher trained for {row['settings']['epochs']} epochs, or one that gets there sooner."
    methods, images = " and ".join(f"`{method}`" for method in row["methods"]), row["settings"]["train_images"]
    epochs = row["settings"].get("epochs", claims.paper()["training"]["epochs"])
    paired = f", and the pairing `{row['settings']['pairing']}`" if set(row["methods"]) != {"student"} else ""
    return (
        f"It takes {row['seeds']} runs of {methods} with k = {row['k']}, {epochs} epochs and {images:,} images{paired}."
    )


def _judgement(row: Mapping) -> str:
    if row["verdict"] in (NOT_RUN, NOT_TESTABLE):
        return ""
    rule = TESTS.get(row["measure"], TESTS["parameters"])
    return f"{rule} What came out: {explained(row)}. So the verdict is *{row['verdict']}*."


TESTS = {
    "accuracy": "It is the same if chance explains the distance, and if the interval is narrow enough to say so.",
    "teacher": "The first teacher trained in full, or that gets there sooner, must be within the tolerance, or better.",
    "difference": "It has to be shown, after Holm's correction over its family, in a size that chance explains. "
    "It is refuted if the opposite is shown, or if it is not shown and falls short by more than chance explains.",
    "no_difference": f"Two methods are alike if they are shown to differ by less than {claims.margin():g} points.",
    "direction": "It has to be shown, seed by seed, after Holm's correction over its family. It is refuted if the "
    f"opposite is shown, or if the difference is shown to be smaller than {claims.margin():g} points.",
    "map_similarity": "It has to be shown, seed by seed.",
    "printed_imagenet": "One network a method, on however many images, says nothing of the methods.",
    "parameters": "It should be the same, to the last digit that the paper prints.",
    "explaining_over_training": "It should be at most one.",
    "sensitivity": "It should hold in every trial.",
    "implementation_invariance": "It should be zero, but for rounding.",
    "latency_ratio": "It may be off by about a fifth, as machines differ; all ratios share the teacher's 140 ms.",
}
TESTS |= {"teacher_gap": TESTS["accuracy"], "interaction": TESTS["difference"]}


def _conceptual(row: Mapping) -> str:
    if not row["matched_verdict"] or row["matched_verdict"] == NOT_RUN:
        return ""
    found = written(row["matched_value"], row["unit"])
    look = ", an interim look" if row["matched_interim"] else ""
    return f"With each image's own map (conceptual replication) the runs give {found}: {row['matched_verdict']}{look}."


def _conflict(row: Mapping) -> str:
    if not row["conflicts"]:
        return ""
    names = " and ".join(f"`{name}`" for name in row["conflicts"].split(", "))
    if row["measure"] == "no_difference":
        return (
            f"The paper's own difference is above the margin of {claims.margin():g}: {names} say that the two differ."
        )
    return f"One recipe can hardly give this number of the paper and that of {names}: chance seldom explains so much."
