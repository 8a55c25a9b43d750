"""The table of explanations, `results/explanations.csv`: every measure of `examination` of every network, once.

`python -m kdig_utils explain` fills it; a chapter reads it. Its rows belong to runs of the ledger by `run_id`, and to
controls that no network had a part in, or no training: these have no `run_id`.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
from torch import nn

from kdig_utils.analysis.examination import Effort, Mean, control_measures, examine, means, prepare
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.experiments.study import Study
from kdig_utils.locks import locked
from kdig_utils.method import artifacts
from kdig_utils.method.models import exact_float32
from kdig_utils.paths import reading, replacing

COLUMNS = ("run_id", "method", "k", "seed", "measure", "value", "low", "high", "images")


def read(path: Path) -> pd.DataFrame:
    """The table; empty, with its columns, if nothing was explained yet.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(COLUMNS))
    with reading(path, "delete it, and run `python -m kdig_utils explain` again"):
        table = pd.read_csv(path, dtype={"run_id": str}).fillna({"run_id": ""})  # a hash is text, also 12e45678
    if tuple(table.columns) != COLUMNS:
        raise ValueError(f"{path} has columns {', '.join(table.columns)}: it is no table of explanations; delete it")
    return table


def record(rows: pd.DataFrame, path: Path) -> None:
    """Add rows to the table; those of runs and controls that are there already are left as they are."""
    with locked(path):
        table = read(path)
        known = set(zip(table["run_id"], table["method"], table["measure"], strict=True))
        new = rows[[(row.run_id, row.method, row.measure) not in known for row in rows.itertuples()]]
        with replacing(path) as part:
            pd.concat([table, new] if len(table) else [new], ignore_index=True).round(5).to_csv(part, index=False)


def _rows(found: dict[str, Mean], run_id: str, method: str, k: int, seed: int) -> pd.DataFrame:
    lines = [(run_id, method, k, seed, measure, *mean) for measure, mean in found.items()]
    return pd.DataFrame(lines, columns=list(COLUMNS))


@exact_float32()
def explain_runs(
    study: Study,
    effort: Effort,
    path: Path,
    deadline: float = math.inf,
    report: Callable[[str], None] = lambda line: None,
    runs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Explain the runs whose weights are here and that the table lacks; return the whole table.

    `runs` are rows of the ledger, by default all. Each network's rows are written before the next one starts; none
    starts after `deadline` (`time.monotonic`). Students of another teacher than the study's are passed over: their
    maps would be compared with a stranger's.
    """
    asked = prepare(study.teacher.to(study.device), study.test.to(study.device), effort)
    table = read(path)
    if not (table["run_id"] == "").any():
        controls = control_measures(asked).items()
        record(pd.concat([_rows(means(values), "", name, k=5, seed=0) for name, values in controls]), path)
    runs = study.ledger.read() if runs is None else runs
    whole = table.loc[table["measure"] == "unexplained", "run_id"]  # which machines lent before 2026-11-28 left out
    for row, network in _networks(study, runs[~runs["run_id"].isin(whole)]):
        if time.monotonic() > deadline:
            break
        found = examine(network.to(study.device), asked)
        record(_rows(found, *row[["run_id", "method", "k", "seed"]]), path)
        report(f"{row['run_id']}  {row['method']:9} k {row['k']}  seed {row['seed']}: explained")
    return read(path)


def _networks(study: Study, runs: pd.DataFrame) -> Iterator[tuple[pd.Series, nn.Module]]:
    """These runs, each with its network, from the workspace or published, where it is there."""
    published = {(entry["run_id"], entry["weights_sha256"]): name for name, entry in artifacts.manifest().items()}
    for _index, row in runs.iterrows():
        taught_by = row["weights_sha256"] if row["method"] == "teacher" else row["teacher_sha256"]
        if taught_by not in ("", study.teacher_sha256):
            continue
        if (study.folders["weights"] / f"{row['run_id']}.safetensors").is_file():
            yield row, study.weights(spec_of(row))
        elif name := published.get((row["run_id"], row["weights_sha256"])):
            yield row, artifacts.load(name)
