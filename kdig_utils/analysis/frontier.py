"""What each parameter buys: the sizes of the eight students, their accuracies in the ledger, and other work."""

from functools import cache

import numpy as np
import pandas as pd
from torch import nn

from kdig_utils.analysis import claims
from kdig_utils.analysis.comparisons import mean_interval
from kdig_utils.analysis.scorecard import by_seed, with_teacher_accuracy
from kdig_utils.experiments import evidence
from kdig_utils.experiments.ledger import of_one_teacher
from kdig_utils.method import models
from kdig_utils.method.artifacts import model_for
from kdig_utils.method.spec import MAIN_METHODS

BYTES_OF_A_WEIGHT = {"fp32": 4, "fp16": 2, "int8": 1}


@cache
def sizes() -> pd.DataFrame:
    """The teacher and the eight students, counted: one row each, largest first.

    Returns:
        Columns method, k, parameters, factor (the teacher's parameters over these), million_macs (one image), and the
        bytes of the state dict in fp32, fp16 and int8, as `state_bytes` counts them.
    """
    rows = []
    for k in (0, *models.REMOVABLE_BLOCKS):
        network = model_for("student" if k else "teacher", k)
        rows.append(
            {
                "method": "student" if k else "teacher",
                "k": k,
                "parameters": models.count_parameters(network),
                "million_macs": models.count_macs(network) / 1e6,
                **{name: state_bytes(network, name) for name in BYTES_OF_A_WEIGHT},
            }
        )
    table = pd.DataFrame(rows)
    table.insert(3, "factor", table["parameters"][0] / table["parameters"])
    return table


def state_bytes(network: nn.Module, precision: str) -> int:
    """Bytes of the state dict, without any file format around it.

    In int8 only the weights of convolutions and linear layers take one byte; batch norm and biases stay in fp32, as
    they would before they are folded. Counters of batch norm are left out.

    Args:
        precision: `fp32`, `fp16` or `int8`.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in BYTES_OF_A_WEIGHT:
        raise ValueError(f"unknown precision {precision!r}: choose one of {', '.join(BYTES_OF_A_WEIGHT)}")
    floats = [value for value in network.state_dict().values() if value.is_floating_point()]
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    others = sum(value.numel() for value in floats) - weights
    return weights * BYTES_OF_A_WEIGHT[precision] + others * (2 if precision == "fp16" else 4)


def largest_within(budget: int) -> pd.DataFrame:
    """The largest student whose state dict fits into `budget` bytes, by precision: columns precision, k, bytes.

    Raises:
        ValueError: not even the smallest fits in int8.
    """
    students = sizes().query("method == 'student'")
    if budget < students["int8"].min():
        raise ValueError(f"{budget:,} bytes hold no student: the smallest takes {students['int8'].min():,} in int8")
    rows = []
    for precision in BYTES_OF_A_WEIGHT:
        fitting = students[students[precision] <= budget]
        if len(fitting):
            largest = fitting.iloc[0]
            rows.append({"precision": precision, "k": int(largest["k"]), "bytes": int(largest[precision])})
    return pd.DataFrame(rows)


def ours(ledger: pd.DataFrame, epochs: int, train_images: int) -> pd.DataFrame:
    """Mean accuracy of each method and size, with its 95 % t-interval over the seeds.

    Only runs at the paper's other settings count, with maps and logits paired with their own images, and of several
    teachers only the students of the one that has most.

    Args:
        ledger: as `Ledger.read()` returns it.
        epochs: of the runs.
        train_images: number of images that they were trained on.

    Returns:
        Columns method, k, factor, runs, accuracy, low, high in per cent (the interval NaN for a single run), and
        teacher, the accuracy of their teacher (NaN for `student`).
    """
    columns = ["method", "k", "factor", "runs", "accuracy", "low", "high", "teacher"]
    table = with_teacher_accuracy(ledger)
    right = (table["epochs"] == epochs) & (table["train_images"] == train_images) & (table["pairing"] == "matched")
    free = ("epochs", "batch_size", "n_steps")
    others = table[right].apply(lambda run: evidence.other_settings(run, ignoring=free), axis=1)
    chosen = of_one_teacher(table[right][others == ""] if right.any() else table[right])
    factors = sizes().set_index("k")["factor"]
    rows = []
    for (method, k), runs in chosen.groupby(["method", "k"]):
        its = by_seed(runs, method)
        facts = (method, int(k), factors[k], len(its), *mean_interval(its))
        rows.append(dict(zip(columns, (*facts, runs["teacher_accuracy"].mean()), strict=True)))
    return pd.DataFrame(rows, columns=columns)


def paper_sweep() -> pd.DataFrame:
    """The paper's own sweep, one run a point: columns method, k, factor, accuracy, change (against its teacher)."""
    sweep, teacher = claims.lookup("compression_sweep_accuracy"), claims.lookup("teacher.accuracy")
    sizes_there = claims.lookup("compression")
    return pd.DataFrame(
        {"method": method, "k": row["k"], "factor": row["factor"], "accuracy": value, "change": value - teacher}
        for method in MAIN_METHODS
        for row, value in zip(sizes_there, sweep[method], strict=True)
    )


def literature() -> pd.DataFrame:
    """Other work on CIFAR-10, as the paper lists it: columns work, factor, change, accuracy, teacher.

    Accuracy, and with it the teacher's (accuracy minus change), is known only for the named works. A name stands at
    every entry of the list with its factor: the paper's list does not say which of two it is.
    """
    listed = claims.lookup("literature_on_cifar10")
    table = pd.DataFrame({"factor": listed["factors"], "change": listed["accuracy_changes"]})
    table["work"], table["accuracy"] = "", np.nan
    for name, key in {"Bhardwaj 2019": "bhardwaj_2019", "Gou 2023": "gou_2023"}.items():
        its = table["factor"] == listed[key]["factor"]
        table.loc[its, "work"], table.loc[its, "accuracy"] = name, listed[key]["accuracy"]
    return table.assign(teacher=table["accuracy"] - table["change"])[
        ["work", "factor", "change", "accuracy", "teacher"]
    ]
