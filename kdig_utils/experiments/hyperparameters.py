"""Hyperparameters: the levels that are searched, the runs of a search, and what is chosen from them by which images.

A setting is chosen on held-out training images; the ledger holds the accuracy on test images beside it, so that anyone
can see what choosing on those would have cost.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
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
    """`base` with these hyperparameters and this seed."""
    alpha, temperature = setting.get("alpha", base.alpha), setting.get("temperature", base.temperature)
    overlaid, gamma = setting.get("overlay_probability", base.overlay_probability), setting.get("gamma", base.gamma)
    return replace(base, seed=seed, alpha=alpha, temperature=temperature, overlay_probability=overlaid, gamma=gamma)


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
    return rows.astype(dict.fromkeys(names, float)).reset_index(drop=True)


def runs_at(rows: pd.DataFrame, setting: Mapping[str, float]) -> pd.DataFrame:
    """Those of the `trials` that were trained at this setting."""
    return rows[(rows[list(setting)] == list(setting.values())).all(axis=1)]


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
    proposed, fresh = rows[~rows["fresh"]].sort_values("seed"), rows[rows["fresh"]]
    chosen = {
        "validation": best_first(proposed, "validation_accuracy").head(1),
        "test": best_first(proposed, "test_accuracy").head(1),
        "paper": runs_at(proposed, {name: getattr(RunSpec, name) for name in names}).head(1),
    }
    columns = [*names, "validation_accuracy", "test_accuracy"]
    table = pd.concat(chosen, names=["chosen_by"]).droplevel(1)[columns].astype(float)
    again = [runs_at(fresh, dict(row))["test_accuracy"].astype(float) for _by, row in table[names].iterrows()]
    table = table.assign(fresh_runs=[len(its) for its in again], fresh_accuracy=[its.mean() for its in again])
    return table.assign(optimism=table["test_accuracy"] - table["fresh_accuracy"])


def candidates(rows: pd.DataFrame) -> list[dict[str, float]]:
    """The settings that may be preferred: the three best by validation, and the paper's; no test image had a say.

    Args:
        rows: of `trials`.
    """
    names = settings_in(rows)
    best = best_first(rows[~rows["fresh"]], "validation_accuracy")[names].drop_duplicates().head(FINALISTS)
    papers = choices(rows)[names].filter(["paper"], axis=0)
    return pd.concat([best, papers]).drop_duplicates().to_dict("records")


def finalists(rows: pd.DataFrame) -> list[dict[str, float]]:
    """The settings worth fresh seeds: the candidates, and the test images' choice, to see what that would have cost.

    Args:
        rows: of `trials`.
    """
    names = settings_in(rows)
    chosen_on_test = choices(rows)[names].filter(["test"], axis=0)
    both = pd.concat([pd.DataFrame(candidates(rows), columns=names), chosen_on_test])
    return both.drop_duplicates().to_dict("records")


def preferred(ledger: pd.DataFrame, method: str = "kd") -> dict[str, float] | None:
    """The setting that validation prefers: of the candidates the one with the best mean over the fresh seeds.

    Best of thirty single runs is luck as well; fresh seeds have none of it. So there is no answer before them. The
    test images' choice is no candidate, however well it does: test images proposed it.

    Returns:
        Its hyperparameters, or None while the search and its fresh seeds are not run yet.
    """
    rows = trials(ledger, base_spec(method))
    settings = candidates(rows)
    runs = [runs_at(rows[rows["fresh"]], setting)["validation_accuracy"].astype(float) for setting in settings]
    if not runs or min(map(len, runs)) < len(FRESH_SEEDS):
        return None
    return settings[int(np.argmax([its.mean() for its in runs]))]


def best_first(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """Rows with the highest value first; among equals their order stays."""
    return rows.sort_values(by, ascending=False, kind="stable")


def settings_in(rows: pd.DataFrame) -> list[str]:
    """The hyperparameters that rows of `trials` have a column for."""
    return [name for name in LEVELS if name in rows]
