"""What each parameter buys: the sizes of the eight students, and their accuracies in the ledger."""

from functools import cache

import numpy as np
import pandas as pd
from torch import nn

from kdig_utils.analysis.comparisons import mean_interval
from kdig_utils.analysis.eligibility import by_seed, with_teacher_accuracy
from kdig_utils.experiments import evidence
from kdig_utils.experiments.ledger import of_one_teacher, student_spec
from kdig_utils.method import models
from kdig_utils.method.artifacts import model_for

BYTES_OF_A_WEIGHT = {"fp32": 4, "fp16": 2, "int8": 1}


@cache
def sizes() -> pd.DataFrame:
    """The teacher and the eight students, counted: one row each, largest first.

    Returns:
        Columns method, k, parameters, factor (the teacher's parameters over these), million_macs (one image), and the
        bytes of the state dict in fp32, fp16 and int8, as `state_bytes` counts them.
    """
    rows = []
    for method, k in [("teacher", 0), *(("student", k) for k in models.REMOVABLE_BLOCKS)]:
        network = model_for(method, k)
        work = models.count_macs(network) / 1e6
        facts = {"method": method, "k": k, "parameters": models.count_parameters(network), "million_macs": work}
        rows.append(facts | {precision: state_bytes(network, precision) for precision in BYTES_OF_A_WEIGHT})
    table = pd.DataFrame(rows)
    table.insert(3, "factor", table["parameters"][0] / table["parameters"])
    return table


def state_bytes(network: nn.Module, precision: str) -> int:
    """Bytes of the state dict in `fp32`, `fp16` or `int8`, without any file format around it.

    In int8 only the weights of convolutions and linear layers take one byte; batch norm and biases stay in fp32, as
    they would before they are folded. Counters of batch norm are left out.
    """
    floats = [value for value in network.state_dict().values() if value.is_floating_point()]
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    others = sum(value.numel() for value in floats) - weights
    return weights * BYTES_OF_A_WEIGHT[precision] + others * (2 if precision == "fp16" else 4)


def ours(ledger: pd.DataFrame, epochs: int, train_images: int) -> pd.DataFrame:
    """Mean accuracy of each method and size, with its 95 % t-interval over the seeds.

    Only runs of so many epochs on so many images at the paper's other settings count, with maps and logits paired with
    their own images, and of several teachers only the students of the one that has most.

    Returns:
        Columns method, k, factor, runs, accuracy, low, high in per cent (the interval NaN for a single run), and
        teacher, the accuracy of their teacher (NaN for `student`).
    """
    columns = ["method", "k", "factor", "runs", "accuracy", "low", "high", "teacher"]
    table = with_teacher_accuracy(ledger)
    right = (table["epochs"] == epochs) & (table["train_images"] == train_images) & (table["pairing"] == "matched")
    free = ("epochs", "batch_size", "n_steps")
    alike = [not evidence.unlike(student_spec(run), ignoring=free) for _index, run in table[right].iterrows()]
    chosen = of_one_teacher(table[right][np.array(alike, bool)])
    factors, rows = sizes().set_index("k")["factor"], []
    for (method, k), runs in chosen.groupby(["method", "k"]):
        its = list(by_seed(runs.itertuples(), method).values())
        rows.append((method, int(k), factors[k], len(its), *mean_interval(its), runs["teacher_accuracy"].mean()))
    return pd.DataFrame(rows, columns=columns)
