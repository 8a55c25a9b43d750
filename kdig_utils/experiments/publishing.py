"""Weights of chosen runs go into artifacts/: checked, in float16 where that costs nothing."""

import pandas as pd

from kdig_utils.experiments import teachers
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.experiments.study import Study
from kdig_utils.method import artifacts, models

HALF_TOLERANCE = 0.05  # points of test accuracy that float16 may cost: a sixth of what the seed alone moves


def publish_run(study: Study, row: pd.Series) -> dict:
    """Put the weights of a finished run of `study` into the repository; return the entry in the manifest.

    A student is kept in float16 if that leaves its accuracy on `study.test` within 0.05 points; so is a teacher while a
    better one waits, for nobody learns from it any more. The teacher that students learn from is kept in float16 only
    if that changes no weight.

    Raises:
        FileNotFoundError: the run's weights are not in the study's folder.
        ValueError: those weights are not the ones of the ledger (`Study.weights`).
    """
    spec = spec_of(row)
    model = study.weights(spec)
    name = teachers.name_of(row, study.ledger.read()) if spec.method == "teacher" else f"{spec.method}_k{spec.k}"
    teaches = spec.method == "teacher" and (name == teachers.NEXT or teachers.NEXT not in artifacts.manifest())
    rounded = artifacts.rounded(model, spec.method, spec.k)
    half = models.weights_sha256(rounded) == row["weights_sha256"]
    if not half and not teaches:
        half = abs(models.accuracy(rounded, study.test) - models.accuracy(model, study.test)) < HALF_TOLERANCE
    texts = {column: str(row[column]) for column in ("run_id", "method", "weights_sha256")}
    counts = {column: int(row[column]) for column in ("k", "seed", "epochs")}
    artifacts.publish(name, model, half, **texts, **counts, test_accuracy=float(row["test_accuracy"]))
    return artifacts.manifest()[name]
