"""The benchmark of latency: teacher and student in every runtime at hand, on this machine, in under two minutes.

Each network in each runtime runs in a fresh process of its own; the processes are called in turn, in blocks, in an
order drawn anew each round. What cannot be had (a runtime, an export, an instruction) is said in its row.
"""

import itertools
import json
import math
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from kdig_utils import machine
from kdig_utils.edge import records, roofline, runtimes, timing
from kdig_utils.edge.runtimes import Candidate, at_once, exported, heard
from kdig_utils.method import artifacts, cifar10, models, released
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.paths import check_writable, replacing

PATIENCE = 100.0  # seconds for everything
MEASURING = 0.03  # of the patience, for each batch size and number of threads
# Of the patience, by when each must have ended; what has not answered at the last is killed.
SHARES = {"peaks": 0.1, "exports": 0.42, "opening": 0.62, "measuring": 0.88, "classifying": 1.0, "answers": 1.15}
BATCHES = (1, 64)
EXACT = "eager fp32"  # the runtime and precision whose outputs are right, and whose teacher is the 1.0 of speed-ups
LEAST_CALLS = {50: 1, 95: 20, 99: 100}  # settled, for each percentile
SHOWN = [
    *("model", "runtime", "precision", "p50_ms", "p95_ms", "predicted_ms", "speedup", "95 %"),
    *("accuracy", "accuracy_images", "bytes", "load_ms", "peak_mb"),
]
SHA256_BEGINS = "[0-9a-f]{12,64}"  # so a released network is named
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}  # instructions that add up 8-bit products
NO_VNNI = (
    "no instruction for sums of 8-bit products (VNNI): 8 bits are slower here, and ONNX Runtime's sums of products of "
    "unsigned by signed bytes can overflow: read the accuracy"
)


def run(student: str, patience: float, json_path: Path | None) -> None:
    """The command `latency`: teacher and one student, the table, and the file if one is wanted.

    The student is an artifact, or a released network by the first digits of its SHA-256.

    Raises:
        ValueError: `patience` is no number of seconds.
        OSError: the file cannot be written; nothing was measured.
    """
    if not (math.isfinite(patience) and patience > 0):
        raise ValueError(f"--patience {patience} is no time to wait: give seconds, more than 0, as 100")
    if json_path:
        check_writable(json_path.resolve().parent)
    names = {"teacher": "teacher", "student": student}
    networks = {
        model: released.network(name) if re.fullmatch(SHA256_BEGINS, name) else artifacts.load(name)
        for model, name in names.items()
    }
    test = cifar10.load("test") if os.environ.get("KDIG_DATA") else cifar10.load_sample("test")
    rows = [{**found, "artifact": names[found["model"]]} for found in latency_rows(networks, test, patience=patience)]
    print(table(rows))
    words = "times in ms, speed-up against the teacher in eager PyTorch,"
    print(f"accuracy in % of so many images of {test.name}; {words}")
    print("bytes of the file, peak memory in MB of a process that opens it for one image")
    if json_path:
        write(rows, json_path)
        print(f"{len(rows)} rows in {json_path}")


def latency_rows(
    networks: Mapping[str, nn.Module],
    test: ImageSet,
    threads: tuple[int, ...] | None = None,
    batches: tuple[int, ...] = BATCHES,
    patience: float = PATIENCE,
) -> list[dict]:
    """Measure every network in every runtime; one row for each batch size and number of threads.

    Args:
        networks: by name; one must be `teacher`, whose eager latency is 1.0 (`serving.open_eager`).
        test: the images that give the accuracies.
        threads: by default one, and all that this process may use.
        patience: seconds for everything, shared out as in `SHARES`; what comes later is left out, in words.

    Returns:
        Rows with the keys `records.COLUMNS`, None where there is no figure.
    """
    ends = {part: time.monotonic() + share * patience for part, share in SHARES.items()}
    counts = threads or tuple(sorted({1, len(machine.usable_cpu_numbers())}))
    # Every other time from the last number of threads to the first: fewer files are opened anew.
    settings = [(batch, count) for turn, batch in enumerate(batches) for count in counts[:: -1 if turn % 2 else 1]]
    facts = machine_facts()  # before anything is measured: the load is that of others
    tables = {name: roofline.layers(network) for name, network in networks.items()}
    peaks, words = roofline.peaks(list(tables.values()), settings, ends["peaks"])
    facts["note"] = "; ".join(filter(None, (str(facts["note"]), words)))
    print(f"exporting {', '.join(networks)}")
    written = at_once(lambda name: exported(name, networks[name], ends["exports"]), networks)
    candidates = list(itertools.chain.from_iterable(written))
    times = heard(candidates, test.pixels.numpy(), settings, ends, MEASURING * patience)
    weights = {name: models.weights_sha256(network)[:12] for name, network in networks.items()}
    rows = []
    for (batch, count), calls in times.items():
        peak = peaks.get((batch, count))
        for each in candidates:
            least = roofline.predicted(tables[each.model], each.precision, batch, peak) if peak else {}
            found = {**statistics(calls, each.name), **least, **compared(each, candidates, test)}
            rows.append(whole(each, batch, count, {"weights": weights[each.model], **facts, **found}))
    return rows


def statistics(times: pd.DataFrame, name: str) -> dict[str, float]:
    """Percentiles of the settled calls of `name`, cold_ms of the first of each block, speed-up with its interval."""
    own = times[times["network"] == name]
    if own.empty:
        return {}
    steady = timing.settled(own)["ms"]
    enough = [percent for percent, least in LEAST_CALLS.items() if len(steady) >= least]
    found = {f"p{percent}_ms": float(np.percentile(steady, percent)) for percent in enough}
    found |= {"cold_ms": float(own[own["call"] == 0]["ms"].median()), "calls": len(steady)}
    if (times["network"] == f"teacher {EXACT}").any():
        batch, threads = times[["batch_size", "threads"]].iloc[0]
        ratio = timing.speedup(timing.settled(times), f"teacher {EXACT}", name, batch, threads)
        found |= {"speedup": ratio.value, "speedup_low": ratio.low, "speedup_high": ratio.high}
    return found


def compared(candidate: Candidate, candidates: list[Candidate], test: ImageSet) -> dict[str, float]:
    """Accuracy, and how far the logits are from those of the same network in eager PyTorch."""
    own = candidate.logits
    if own is None:
        return {}
    predicted, labels = own.argmax(1), test.labels.numpy()[: len(own)]
    found = {"accuracy": 100 * float((predicted == labels).mean()), "accuracy_images": len(own)}
    exact = next((each.logits for each in candidates if each.name == f"{candidate.model} {EXACT}"), None)
    if exact is not None:
        both = min(len(own), len(exact))
        found["max_difference"] = float(np.abs(own[:both] - exact[:both]).max())
        found["agreement"] = 100 * float((predicted[:both] == exact[:both].argmax(1)).mean())
    return found


def whole(candidate: Candidate, batch: int, threads: int, found: Mapping[str, object]) -> dict:
    """A row with all its columns; `ok` if it has its time and its accuracy, else what is missing, and why."""
    own = {column: getattr(candidate, column) for column in ("model", "k", "runtime", "precision")}
    size = candidate.file.stat().st_size if candidate.file.is_file() else None
    setting = {"batch": batch, "threads": threads, "bytes": size}
    row = {**dict.fromkeys(records.COLUMNS), **own, **setting, **candidate.loaded, **found}
    words = candidate.status(batch, threads)
    if row["p50_ms"] is None:
        return {**row, "status": words}
    return {**row, "status": "ok" if row["accuracy"] is not None else f"no accuracy: {words}"}


def machine_facts() -> dict[str, object]:
    """What a reader needs to know of the machine: processor, instructions, load, clock, versions, day."""
    flags = machine.processor_flags()
    clock = time.get_clock_info("perf_counter")
    return {
        "machine": machine.processor(),
        "flags": " ".join(flags),
        "cpus": len(machine.usable_cpu_numbers()),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "clock": f"perf_counter: {clock.implementation}, {1e9 * clock.resolution:.3g} ns",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": runtimes.versions(),
        "day": time.strftime("%Y-%m-%d", time.gmtime()),
        "note": NO_VNNI if flags and not VNNI & set(flags) else "",
    }


def table(rows: list[dict]) -> str:
    """The rows as text, best first within each setting; those without figures say why."""
    frame, parts = pd.DataFrame(rows).astype({"bytes": "Int64", "accuracy_images": "Int64"}), []
    for (threads, batch), found in frame.groupby(["threads", "batch"]):
        parts.append(f"batch {batch}, {threads} thread{'s' * (threads > 1)}")
        timed = found[found["p50_ms"].notna()].sort_values("p50_ms")
        if len(timed):
            interval = [f"{low:.2f}-{high:.2f}" for low, high in timed[["speedup_low", "speedup_high"]].to_numpy(float)]
            shown = timed.assign(**{"95 %": interval})[SHOWN].rename(columns={"accuracy_images": "images"})
            parts.append(shown.to_string(index=False, float_format="%.2f", na_rep="-"))
        missing = found[found["status"] != "ok"]
        names = missing["model"] + " " + missing["runtime"] + " " + missing["precision"]
        parts += [f"  {', '.join(group)}: {words}" for words, group in names.groupby(missing["status"], sort=False)]
    first = rows[0]
    parts.append(f"{first['machine']} ({first['flags']}), {first['cpus']} CPUs, load {first['load_average']}")
    parts.append(f"{first['versions']}; {first['system']}; {first['clock']}")
    if first["note"]:
        parts.append(f"note: {first['note']}")
    return "\n".join(parts)


def write(rows: list[dict], path: Path) -> None:
    """Write the rows as JSON, for results/latency, with four digits."""
    short = json.loads(json.dumps(rows), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    for row in short:  # what a runtime says may hold anything
        row |= {name: records.printable(text) for name, text in row.items() if isinstance(text, str)}
    with replacing(path) as part:
        part.write_text(json.dumps(short, indent=1) + "\n")
