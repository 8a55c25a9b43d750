"""Hyperparameters: the levels that are searched, the runs of a search, and what is chosen from them by which images.

A setting is chosen on held-out training images; the ledger holds the accuracy on test images beside it, so that anyone
can see what choosing on those would have cost.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from kdig_utils.experiments.ledger import of_one_teacher, spec_of
from kdig_utils.method.spec import METHODS, RunSpec

# Levels, not ranges: runs that share a setting can be averaged, and the paper's value of each is among them.
LEVELS: dict[str, tuple[float, ...]] = {
    "alpha": (0.01, 0.03, 0.1, 0.3, 0.6, 0.9),
    "temperature": (1.0, 2.5, 4.0, 6.0, 10.0, 20.0),
    "overlay_probability": (0.05, 0.1, 0.2, 0.4, 0.7, 1.0),
    "gamma": (0.08, 0.8, 8.0, 80.0, 800.0),
}
SEARCHED = {"kd": ("alpha", "temperature"), "ig": ("overlay_probability",), "at": ("gamma",)}
VALIDATION_IMAGES = 5000
SMOKE_K, SMOKE_VALIDATION_IMAGES = 17, 100  # of the 500 training images that come with the repository
FINALISTS = 3  # settings with the highest validation accuracy that are trained again
FRESH_SEEDS = range(1000, 1003)  # of the runs that measure a choice; the search counts its seeds from 0


def searched(method: str) -> tuple[str, ...]:
    """The hyperparameters that matter to a method, in the order of `LEVELS`.

    Raises:
        ValueError: unknown method, or `student`, which has none of them.
    """
    if method not in METHODS[1:]:
        reason = "has nothing to search" if method in METHODS else "is unknown"
        raise ValueError(f"method {method!r} {reason}: choose one of {', '.join(METHODS[1:])}")
    return tuple(name for part, names in SEARCHED.items() if part in method.split("_") for name in names)


def base_spec(method: str, profile: str = "full") -> RunSpec:
    """The run that is varied: the paper's settings, 5,000 training images held out; in `smoke` a tiny one."""
    searched(method)  # raises for a method that has nothing to search
    if profile == "smoke":
        return RunSpec(method, k=SMOKE_K, validation_images=SMOKE_VALIDATION_IMAGES)
    return RunSpec(method, validation_images=VALIDATION_IMAGES)


def at_setting(base: RunSpec, setting: Mapping[str, float], seed: int) -> RunSpec:
    """`base` with the hyperparameters of its method at this setting, and this seed."""
    changes: dict[str, Any] = {name: setting[name] for name in searched(base.method)}
    return replace(base, seed=seed, **changes)


def trials(ledger: pd.DataFrame, base: RunSpec) -> pd.DataFrame:
    """The ledger rows that vary `base` in what is searched, and in its seed.

    Where `base` names no teacher, those of the teacher with the most runs: surfaces of two teachers do not mix.

    Returns:
        The rows with a column for each hyperparameter of the method, and `fresh`, whether the seed had no part in
        the search.
    """
    names, sha = searched(base.method), base.teacher_sha256
    free = names if sha else (*names, "n_steps")
    same = ledger[(ledger["method"] == base.method) & (ledger["k"] == base.k)]
    specs = [spec for _index, row in same.iterrows() if isinstance(spec := spec_of(row), RunSpec)]
    varied = [spec.setting(*free) == base.setting(*free) and sha in ("", spec.teacher_sha256) for spec in specs]
    values = {name: [getattr(spec, name) for spec in specs] for name in names}
    rows = same.assign(**values, fresh=same["seed"].astype(int) >= FRESH_SEEDS.start).loc[varied]
    rows = rows if sha else of_one_teacher(rows)
    numbers = (*names, "validation_accuracy", "test_accuracy")
    return rows.astype(dict.fromkeys(numbers, float)).reset_index(drop=True)


def choices(rows: pd.DataFrame) -> pd.DataFrame:
    """What is chosen by validation and what by test images, what each reports, and what fresh seeds say to it.

    The third line is the paper's setting, which nobody chose from these runs: its first run.

    Args:
        rows: of `trials`.

    Returns:
        Index `validation`, `test`, `paper` (those there are runs for). Columns: the hyperparameters,
        validation_accuracy and test_accuracy of the run (per cent; the latter is what would be reported), fresh_runs
        and fresh_accuracy (their mean test accuracy, NaN without any), optimism: reported minus fresh, in points.
    """
    names = settings_in(rows)
    proposed = rows[~rows["fresh"]].sort_values("seed", kind="stable")
    papers = pd.DataFrame([{name: float(getattr(RunSpec, name)) for name in names}])
    chosen = {
        "validation": proposed.nlargest(1, "validation_accuracy"),
        "test": proposed.nlargest(1, "test_accuracy"),
        "paper": proposed.merge(papers).head(1),
    }
    table = pd.concat(chosen, names=["chosen_by"]).droplevel(1)[[*names, "validation_accuracy", "test_accuracy"]]
    fresh = rows[rows["fresh"]].groupby(names)["test_accuracy"].agg(fresh_runs="size", fresh_accuracy="mean")
    table = table.join(fresh, on=names).fillna({"fresh_runs": 0}).astype({"fresh_runs": int})
    return table.assign(optimism=table["test_accuracy"] - table["fresh_accuracy"])


def finalists(rows: pd.DataFrame, *choosers: str) -> list[dict[str, float]]:
    """The three best settings by validation, and what `choosers` of `choices` chose, each once.

    `paper` and they are the candidates that may be preferred: no test image had a say. With `test`, to see what its
    choice would have cost, they are the settings that are worth fresh seeds.

    Args:
        rows: of `trials`.
    """
    names = settings_in(rows)
    best_first = rows[~rows["fresh"]].sort_values("validation_accuracy", ascending=False, kind="stable")
    best = best_first[names].drop_duplicates().head(FINALISTS)
    return pd.concat([best, choices(rows)[names].filter(choosers, axis=0)]).drop_duplicates().to_dict("records")


def preferred(ledger: pd.DataFrame, method: str = "kd") -> dict[str, float] | None:
    """The setting that validation prefers: of the candidates the one with the best mean over the fresh seeds.

    Best of thirty single runs is luck as well; fresh seeds have none of it. So there is no answer before them. The
    test images' choice is no candidate, however well it does: test images proposed it.

    Returns:
        Its hyperparameters, or None while the search and its fresh seeds are not run yet.
    """
    rows = trials(ledger, base_spec(method))
    names = settings_in(rows)
    fresh = rows[rows["fresh"]].groupby(names)["validation_accuracy"].agg(["size", "mean"])
    candidates = pd.DataFrame(finalists(rows, "paper"), columns=names).astype(float).join(fresh, on=names)
    if candidates.empty or not (candidates["size"] >= len(FRESH_SEEDS)).all():
        return None
    return candidates.loc[candidates["mean"].idxmax(), names].to_dict()


def settings_in(rows: pd.DataFrame) -> list[str]:
    """The hyperparameters that rows of `trials` have a column for."""
    return [name for name in LEVELS if name in rows]
