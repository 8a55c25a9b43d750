"""What is there and what is missing, a line each: for the command `status`, and for what the others print."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdig_utils import paths
from kdig_utils.analysis import laboratory
from kdig_utils.experiments import brief, campaigns, checkpoints, laptop
from kdig_utils.experiments.ledger import Ledger, spec_of
from kdig_utils.experiments.reports import first_line
from kdig_utils.method import artifacts
from kdig_utils.method.spec import METHODS, RunSpec, TeacherSpec

DAMAGED = "damaged"


def campaign_lines(ledger: pd.DataFrame) -> list[str]:
    """A line for each campaign: what is done, what is left, and how long that takes at the pace so far."""
    return [
        f"{row.campaign}: {row.done} of {row.runs} runs done, {row.left} left"
        + ("" if not row.left else ", time not known yet" if np.isnan(row.hours) else f", about {row.hours:.1f} h")
        for row in campaigns.progress(ledger).itertuples()
    ]


def waiting_box(*names: str, more: Iterable[str] = ()) -> str:
    """A box in Markdown: the runs that these campaigns miss, and the commands that would make them; "" if none are.

    Args:
        names: of `CAMPAIGNS`, or `brief` or `laptop`.
        more: other lines about what is missing, each with its command.
    """
    lines = [*filter(None, map(_missing, names)), *more]
    if not lines:
        return ""
    title = '<div class="admonition note">\n<p class="admonition-title">Waiting for runs</p>'
    words = "These runs are missing. This chapter shows what is there, and takes them in as they come."
    how = "All but those of the laptop protocol need a GPU. The page *How to run it* says more."
    return "\n\n".join([title, words, "\n".join(f"- {line}" for line in lines), how, "</div>"])


def _missing(name: str) -> str:
    """What a campaign misses, and the command; "" if it is complete."""
    if name == laptop.NAME:
        wanted, rows, called = laptop.queue(), laboratory.read(), f"{name} --workers 2"
    else:
        rows = Ledger(paths.ledger_path()).read()
        called = f"{'next' if name == brief.NAME else name} --budget-minutes 9"
        wanted = brief.specs(brief.chosen(rows)) if name == brief.NAME else campaigns.specs(name)
    left = len(wanted) - campaigns.rows_of(rows, wanted)["run_id"].nunique()
    kind = "protocol" if name in (brief.NAME, laptop.NAME) else "campaign"
    words = f"{left} of {len(wanted)} runs of the {kind} `{name}`: `python -m kdig_utils campaign {called}`"
    return words if left else ""


def finished(row: pd.Series) -> str:
    """One line about a finished run."""
    name = "teacher" if row["method"] == "teacher" else f"{row['method']} k={row['k']}"
    settings = f"{name} seed {row['seed']}, {row['epochs']} epochs"
    return f"run {row['run_id']}: {settings}: {row['test_accuracy']:.2f} % on {row['test_images']:,} test images"


def ledger_lines(table: pd.DataFrame) -> list[str]:
    """A line for each campaign and setting: the runs and their mean accuracy."""
    order = {method: place for place, method in enumerate(("teacher", *METHODS))}
    groups = with_other_settings(table).groupby(["campaign", "method", "k", "epochs", "other_settings"], dropna=False)
    found = sorted(groups, key=lambda group: (str(group[0][0]), order.get(group[0][1], len(order)), group[0][2:]))
    return [
        f"{campaign}: {method} k={k}, {epochs} epochs{others and ', '}{others}: {len(runs)} run"
        f"{'s' if len(runs) > 1 else ''}, mean {runs['test_accuracy'].mean():.2f} % ({' '.join(runs['run_id'])})"
        for (campaign, method, k, epochs, others), runs in found
    ]


def with_other_settings(table: pd.DataFrame) -> pd.DataFrame:
    """The ledger with other_settings: what a run has, besides method, k and epochs, that is not the default, in words.

    Runs with one method, k, number of epochs and these words were trained alike, but for seed, images and teacher.
    """
    return table.assign(other_settings=[_other_settings(spec_of(run)) for run in table.to_dict("records")])


def _other_settings(spec: RunSpec | TeacherSpec) -> str:
    others = {name: value for name, value in spec.setting().items() if value != getattr(type(spec), name)}
    words = {"k": "", "epochs": "", "initial_sha256": "after earlier epochs"}
    told = [words.get(name, f"{name.replace('_', ' ')} {value}") for name, value in others.items()]
    return ", ".join(filter(None, told))


def described(file: Any, describe: Callable[[Any], str], remedy: str = "restore it from git") -> str:
    """What `describe` says of a file; where it cannot, a line that the file is damaged, and the remedy."""
    try:
        return describe(file)
    except Exception as error:  # what reads a damaged file raises many types
        return f"{file}: {DAMAGED} ({' '.join(first_line(error).split())}): {remedy}"


def checkpoint_line(path: Path) -> str:
    """Where the run of a checkpoint stands."""
    content = checkpoints.read(path)
    spec = content["spec"]
    done, name = content["epoch"], spec.get("method", "teacher")
    return f"{path.stem} ({path.parts[-3]}): {name} seed {spec['seed']}, {done} of {spec['epochs']} epochs done"


def signals_line(folder: Path) -> str:
    """How much of a store of teacher signals is there."""
    rows = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}  # refuses a file cut short
    return f"{folder.name} ({folder.parts[-3]}): {rows['done'].sum():,} of {len(rows['done']):,} images"


def artifact_line(name: str) -> str:
    """What a published network is."""
    artifacts.load(name)
    entry = artifacts.manifest()[name]
    return f"{name}: whole, {entry['precision']}, {entry['test_accuracy']:.2f} %, run {entry['run_id']}"
