"""The latency court: teacher and student in every runtime at hand, on this machine, in under two minutes.

Each network in each runtime runs in a fresh process of its own; the processes are called in turn, in blocks, in an
order drawn anew each round. What cannot be had (a runtime, an export, an instruction) is said in its row.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from kdig_utils import machine
from kdig_utils.edge import roofline, timing
from kdig_utils.edge.worker import LATE, Lost, Process, death, in_words
from kdig_utils.machine import process_environment, usable_cpu_numbers, usable_cpus
from kdig_utils.method import artifacts, cifar10, models
from kdig_utils.method.cifar10 import ImageSet
from kdig_utils.paths import check_writable, replacing, workspace

PATIENCE = 100.0  # seconds for everything
MEASURING = 0.03  # of the patience, for each batch size and number of threads
BATCHES = (1, 64)
SETTING = ["model", "runtime", "precision", "batch", "threads"]
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}  # instructions that add up 8-bit products
NO_VNNI = (
    "no instruction for sums of 8-bit products (VNNI): 8 bits are slower here, and ONNX Runtime's sums of products of "
    "unsigned by signed bytes can overflow: read the accuracy"
)
PACKAGES = ("torch", "onnxruntime", "openvino", "executorch")
TABLE = ["model", "runtime", "precision", "batch", "threads", "p50_ms", "p95_ms", "speedup", "accuracy", "bytes"]
SHOWN = [  # of TABLE, in each setting, and what else fits
    *("model", "runtime", "precision", "p50_ms", "p95_ms", "predicted_ms", "speedup", "95 %"),
    *("accuracy", "bytes", "load_ms", "peak_mb"),
]
WHO = {"compile": "torch.compile", "others": "the others"}  # of the runtimes, by how many images they are given
LARGE_CALLS, LARGE_ROUNDS = 2, 6  # of batches larger than one; fewer rounds give no interval that covers
LEAST_CALLS = {50: 1, 95: 20, 99: 100}  # settled, for each percentile
NO_CALLS = pd.DataFrame({"batch_size": [], "threads": [], "network": [], "ms": []}, dtype=float)
WARM_UP = 4  # calls at the least, as `timing.warm_up` makes them
FEW_IMAGES = 500  # to compare the outputs of a file that takes one image at a time
PEAK_SECONDS = 0.1  # for each measurement of the machine


class Variant(NamedTuple):
    """One network in one runtime and precision, and the file it runs from."""

    model: str
    k: int
    runtime: str
    precision: str
    file: str
    format: str = ""

    @property
    def name(self) -> str:
        """As `student onnxruntime int8`."""
        return f"{self.model} {self.runtime} {self.precision}"


KINDS = (
    ("eager", "fp32", "weights.safetensors", ""),
    ("compile", "fp32", "weights.safetensors", ""),
    ("onnxruntime", "fp32", "fp32.onnx", "onnx_fp32"),
    ("onnxruntime", "int8", "int8.onnx", "onnx_int8"),
    ("openvino", "fp32", "fp32.onnx", "onnx_fp32"),
    ("openvino", "int8", "int8.onnx", "onnx_int8"),
    ("executorch", "fp32", "fp32.pte", "executorch_fp32"),
    ("executorch", "int8", "int8.pte", "executorch_int8"),
)


# Of the patience, by when each must have ended; what has not answered at the last is killed.
SHARES = {"peaks": 0.1, "exports": 0.42, "opening": 0.62, "measuring": 0.88, "classifying": 1.0, "answers": 1.15}
FILES = {  # in the order in which they are written
    "onnx_fp32": "fp32.onnx",
    "onnx_int8": "int8.onnx",
    "executorch_int8": "int8.pte",
    "executorch_fp32": "fp32.pte",
}
ONE_COMPILATION = "left out: each further batch size and number of threads costs another compilation"
NO_TIME = "left out: there was no time left to measure it; --patience SECONDS gives more"


def latency_rows(
    networks: Mapping[str, nn.Module],
    test: ImageSet,
    threads: tuple[int, ...] | None = None,
    batches: tuple[int, ...] = BATCHES,
    kinds: tuple = KINDS,
    patience: float = PATIENCE,
    report: Callable[[str], None] = print,
) -> list[dict]:
    """Measure every network in every runtime; one row for each batch size and number of threads.

    Args:
        networks: by name; one must be `teacher`, whose eager latency is 1.0 (`runtimes.open_eager`).
        test: the images that give the accuracies.
        threads: by default one, and all that this process may use.
        kinds: runtimes, precisions and files, as in `KINDS`.
        patience: seconds for everything, shared out as in `SHARES`; what comes later is left out, in words.
        report: is told what is being done.

    Returns:
        Rows with the keys `timing.COLUMNS`, None where there is no figure: artifact (named by `run`), k (blocks
        removed) and weights (first digits of `models.weights_sha256`), p50_ms, p95_ms, p99_ms (settled calls, as far
        as `LEAST_CALLS` allow), cold_ms (median call after other networks ran), calls, speedup with speedup_low and
        speedup_high (against the eager teacher at the same batch and threads), predicted_macs_ms, predicted_ms
        (roofline), accuracy and accuracy_images, max_difference and agreement (of logits and predictions with the same
        network in eager PyTorch), bytes (of the file), import_ms (of the runtime's Python package), load_ms (of the
        file), first_ms, peak_mb (of the fresh process, opened for one image and one thread), status (`ok`, or what is
        missing and why), and the machine's facts.
    """
    start, counts = time.monotonic(), threads or tuple(sorted({1, usable_cpus()}))
    ends = {part: start + share * patience for part, share in SHARES.items()}
    variants = [Variant(name, getattr(network, "k", 0), *kind) for name, network in networks.items() for kind in kinds]
    settings = [pair for turn, batch in enumerate(batches) for pair in _pairs(batch, counts, turn)]
    facts = machine_facts()
    best, words = predictions(networks, counts, batches, ends["peaks"])
    facts["note"] = "; ".join(filter(None, (facts["note"], words)))
    report(f"exporting {', '.join(networks)}")
    folders, problems = export(networks, variants, ends["exports"])
    report(f"opening {len(variants)} processes")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        opened(variants, problems, folders, _pixels(test, Path(folder)), ends) as processes,
    ):
        loaded = {name: process.loaded for name, process in processes.items()}
        found = measured(processes, problems, settings, MEASURING * patience, ends["measuring"], report)
        report("classifying test images")
        logits = classified(processes, problems, len(test), max(batches), ends["classifying"])
    outputs = {variant.name: compared(variant, logits, test) for variant in variants}
    weights = {name: models.weights_sha256(network)[:12] for name, network in networks.items()}
    return [
        _whole(
            {
                **dict(zip(SETTING, (v.model, v.runtime, v.precision, batch, count), strict=True)),
                **{"k": v.k, "weights": weights[v.model], "bytes": _size(folders[v.model] / v.file)},
                **row(found, v, batch, count),
                **best.get((v.model, v.precision, batch, count), {}),
                **outputs[v.name],
                **loaded.get(v.name, {}),
                **facts,
            },
            status(v, batch, count, problems),
        )
        for count in counts
        for batch in batches
        for v in variants
    ]


def measured(
    processes: dict[str, Process],
    problems: dict[tuple, str],
    settings: list[tuple[int, int]],
    seconds: float,
    end: float,
    report: Callable[[str], None],
) -> pd.DataFrame:
    """The calls of all networks at all settings, (batch size, threads) each: the columns of `_times`."""
    times = [NO_CALLS]
    for batch, threads in settings:
        report(f"measuring batch {batch} with {threads} thread{'s' * (threads > 1)}")
        times.append(_times(processes, problems, batch, threads, seconds, end))
    return pd.concat(times, ignore_index=True)


def _pixels(test: ImageSet, folder: Path) -> Path:
    """A file of the test images for the processes."""
    path = folder / "pixels.npy"
    np.save(path, test.pixels.numpy())
    return path


def _whole(found: dict, words: str) -> dict:
    """A row with all its columns; `ok` if it has its time and its accuracy, else what is missing, and why."""
    whole = {**dict.fromkeys(timing.COLUMNS), **found}
    if whole["p50_ms"] is None:
        return whole | {"status": words}
    return whole | {"status": "ok" if whole["accuracy"] is not None else f"no accuracy: {words}"}


def _pairs(batch: int, counts: tuple[int, ...], turn: int) -> list[tuple[int, int]]:
    """Batch and numbers of threads; every other time from the last number back to the first."""
    return [(batch, count) for count in (reversed(counts) if turn % 2 else counts)]


def machine_facts() -> dict[str, object]:
    """What a reader needs to know of the machine: processor, instructions, load, clock, versions, day."""
    flags = machine.processor_flags()
    clock = time.get_clock_info("perf_counter")
    eight_bits = "" if VNNI & set(flags) or not flags else NO_VNNI
    return {
        "machine": machine.processor(),
        "flags": " ".join(flags),
        "cpus": usable_cpus(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "clock": f"perf_counter: {clock.implementation}, {1e9 * clock.resolution:.3g} ns",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{package} {_version(package)}" for package in PACKAGES),
        "day": time.strftime("%Y-%m-%d", time.gmtime()),
        "note": eight_bits,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "not installed"


def export(
    networks: Mapping[str, nn.Module], variants: list[Variant], end: float
) -> tuple[dict[str, Path], dict[tuple, str]]:
    """Write all files, each network in a process of its own; what an earlier call has written is not written again.

    Returns:
        The folder of each network's files, and what went wrong, by network and format, in words.
    """
    folders = {model: _kept(network) for model, network in networks.items()}
    formats = dict.fromkeys(variant.format for variant in variants if variant.format)

    def export_one(model: str) -> dict[tuple, str]:
        missing = [name for name in formats if not (folders[model] / FILES[name]).is_file()]
        k = getattr(networks[model], "k", 0)
        words = _export(folders[model], k, sorted(missing, key=list(FILES).index), end) if missing else {}
        return {(model, name): said for name, said in words.items() if said}

    with ThreadPoolExecutor(usable_cpus()) as pool:
        return folders, {key: said for found in pool.map(export_one, networks) for key, said in found.items()}


def _kept(network: nn.Module) -> Path:
    """The folder in the workspace for the files of this network, named by weights, exporter and packages."""
    with tempfile.TemporaryDirectory() as name:
        artifacts.save_weights(network, Path(name) / "weights.safetensors")
        weights = (Path(name) / "weights.safetensors").read_bytes()
    packages = " ".join(_version(package) for package in (*PACKAGES, "onnx", "torchao"))
    source = (Path(__file__).parent / "exporting.py").read_bytes()
    digest = hashlib.sha256(weights + source + packages.encode()).hexdigest()[:16]
    folder = workspace() / "exports" / digest
    with replacing(folder / "weights.safetensors") as part:
        part.write_bytes(weights)
    return folder


def _export(folder: Path, k: int, names: list[str], end: float) -> dict[str, str]:
    """Write these formats in one process; by format `` or, in words, why it is not there."""
    weights = str(folder / "weights.safetensors")
    command = [sys.executable, "-m", "kdig_utils.edge.exporting", weights, str(k), str(folder), *names]
    one_thread = {**process_environment(), "OMP_NUM_THREADS": "1"}  # a process for each CPU is running
    try:
        left = max(0.0, end - time.monotonic())
        done = subprocess.run(command, capture_output=True, timeout=left, env=one_thread)
        said, otherwise = done.stdout, "the export failed: " + _last_line(done)
    except subprocess.TimeoutExpired as late:
        said, otherwise = late.stdout or b"", LATE
    answers = dict(json.loads(line) for line in said.decode().splitlines() if line.endswith("]"))
    return {name: _export_words(answers[name]) if name in answers else otherwise for name in names}


def _last_line(done: subprocess.CompletedProcess) -> str:
    return in_words((done.stderr.decode().strip() or death(done.returncode)).splitlines()[-1])


def _export_words(error: str) -> str:
    return in_words(error) if not error or "ModuleNotFound" in error else "the export failed: " + in_words(error)


@contextlib.contextmanager
def opened(
    variants: list[Variant],
    problems: dict[tuple, str],
    folders: Mapping[str, Path],
    pixels: Path,
    ends: Mapping[str, float],
) -> Iterator[dict[str, Process]]:
    """Processes by the name of their variant; why one could not be opened is entered in `problems`."""
    wanted = [v for v in variants if not status(v, 1, 1, problems)]
    wanted.sort(key=lambda variant: variant.runtime == "compile")  # the slowest last
    with contextlib.ExitStack() as all_of_them:

        def open_one(variant: Variant) -> Process | None:
            try:
                with contextlib.ExitStack() as own:
                    process = Process(variant.name, ends["opening"])
                    own.callback(process.close)
                    meet(process, variant, folders[variant.model], pixels)
                    all_of_them.enter_context(own.pop_all())
            except (RuntimeError, OSError) as error:
                problems[(variant.name,)] = str(error)
                return None
            process.end = ends["answers"]
            return process

        with ThreadPoolExecutor(usable_cpus()) as pool:
            found = list(pool.map(open_one, wanted))
        yield {process.name: process for process in found if process}


def meet(process: Process, variant: Variant, folder: Path, pixels: Path) -> None:
    """Open the file of `variant` for one image and one thread, and call it."""
    process.ask("open", runtime=variant.runtime, path=str(folder / variant.file), k=variant.k, pixels=str(pixels))
    process.loaded = process.ask("meet", batch=1, threads=1)
    process.setting = (1, 1)


def status(variant: Variant, batch: int, threads: int, problems: Mapping[tuple, str]) -> str:
    """Why there is no figure for this setting; empty if nothing speaks against it."""
    keys = ((variant.name, batch, threads), (variant.name,), (variant.model, variant.format))
    found = next((problems[key] for key in keys if key in problems), "")
    return ONE_COMPILATION if not found and _left_to_others(variant.name, batch, threads) else found


def _left_to_others(name: str, batch: int, threads: int) -> bool:
    return " compile " in name and (batch, threads) != (1, 1)


def _times(
    processes: dict[str, Process], problems: dict[tuple, str], batch: int, threads: int, seconds: float, end: float
) -> pd.DataFrame:
    """The calls of all networks at one setting: round, network, call, ms, batch_size, threads.

    If one is lost, why is entered in `problems`, and the others are measured again.
    """
    calls, least = (timing.BLOCK_CALLS, timing.LEAST_ROUNDS) if batch == 1 else (LARGE_CALLS, LARGE_ROUNDS)
    while timed := _timed(processes, problems, batch, threads):
        each = batch * sum(processes[name].loaded["each_ms"] for name in timed) / 1e3
        if time.monotonic() + (WARM_UP + calls * least) * each > end:
            problems |= {(name, batch, threads): NO_TIME for name in timed}
            break
        try:
            prepare([processes[name] for name in timed], batch, threads)
            left = min(seconds, end - time.monotonic())
            found = timing.interleave(timed, left, calls, least, seconds / len(timed))
            return found.assign(batch_size=batch, threads=threads)
        except Lost as lost:
            _lose(processes, problems, lost, batch, threads)
    return NO_CALLS


def _timed(
    processes: Mapping[str, Process], problems: Mapping[tuple, str], batch: int, threads: int
) -> dict[str, timing.Times]:
    """What can be timed at this setting."""
    return {
        name: lambda calls, process=process: process.ask("times", calls=calls)
        for name, process in processes.items()
        if not _left_to_others(name, batch, threads) and (name, batch, threads) not in problems
    }


def _lose(processes: dict[str, Process], problems: dict[tuple, str], lost: Lost, batch: int, threads: int) -> None:
    """Go on without a network: at this setting if it has refused, at all that follow if its process is dead."""
    if processes[lost.name].is_alive():
        problems[lost.name, batch, threads] = str(lost)
    else:
        problems[(lost.name,)] = str(lost)
        processes.pop(lost.name).close()


def prepare(processes: list[Process], batch: int, threads: int) -> None:
    """Let all networks be open for this setting; with one thread, on one CPU.

    Raises:
        Lost: a network cannot be.
    """
    cpus = usable_cpu_numbers()

    def prepare_one(process: Process) -> None:
        process.stay(cpus)  # threads that a runtime starts when it opens a file may use all
        process.ready(batch, threads)
        process.stay([machine.fastest_cpu(cpus)] if threads == 1 else cpus)

    with ThreadPoolExecutor(len(cpus)) as pool:
        list(pool.map(prepare_one, processes))


def classified(
    processes: Mapping[str, Process], problems: dict[tuple, str], images: int, batch: int, end: float
) -> dict[str, np.ndarray]:
    """The logits of every network, (N, 10), one thread each, as many at once as there are CPUs.

    N is `images`, or as many as the time until `end` allows, the same for all; 500 at most for torch.compile. Why a
    network gives none is entered in `problems`.
    """
    cpus = usable_cpu_numbers()
    each = sum(process.loaded["each_ms"] for process in processes.values()) / 1e3
    fit = int(len(cpus) * max(0.0, end - time.monotonic()) / each) if processes else 0
    chosen = min(images, max(batch, fit))

    def classify(process: Process) -> np.ndarray | Lost:
        alone = _left_to_others(process.name, batch, 1)
        try:
            process.stay(cpus)
            process.ready(1 if alone else batch, 1)
            return np.array(process.ask("logits", images=min(chosen, FEW_IMAGES) if alone else chosen))
        except Lost as lost:
            return lost

    with ThreadPoolExecutor(len(cpus)) as pool:
        found = dict(zip(processes, pool.map(classify, processes.values()), strict=True))
    problems |= {(name,): str(answer) for name, answer in found.items() if isinstance(answer, Lost)}
    return {name: answer for name, answer in found.items() if not isinstance(answer, Lost)}


def row(times: pd.DataFrame, variant: Variant, batch: int, threads: int) -> dict[str, float]:
    """Percentiles of the settled calls, the median of the first calls of each block, the speed-up with its interval."""
    chosen = times[(times["batch_size"] == batch) & (times["threads"] == threads)]
    own = chosen[chosen["network"] == variant.name]
    if own.empty:
        return {}
    steady = timing.settled(own)["ms"]
    percentiles = {
        f"p{q}_ms": float(np.percentile(steady, q)) for q, least in LEAST_CALLS.items() if len(steady) >= least
    }
    found = {**percentiles, "cold_ms": float(own[own["call"] == 0]["ms"].median()), "calls": len(steady)}
    if (chosen["network"] == "teacher eager fp32").any():
        ratio = timing.speedup(timing.settled(chosen), "teacher eager fp32", variant.name, batch, threads)
        found |= {"speedup": ratio.value, "speedup_low": ratio.low, "speedup_high": ratio.high}
    return found


def predictions(
    networks: Mapping[str, nn.Module], counts: tuple[int, ...], batches: tuple[int, ...], end: float
) -> tuple[dict[tuple, dict[str, float]], str]:
    """What each network could take at best, by model, precision, batch and threads: `roofline.predicted_ms`.

    And in words, why there is none for some; empty if all are there.
    """
    found: dict[tuple, dict[str, float]] = {}
    try:
        layers = {name: roofline.layers(network) for name, network in networks.items()}
        for count, batch in itertools.product(counts, batches):
            if time.monotonic() > end:
                return found, "no time to measure all peaks of the machine"
            found |= _predicted(layers, count, batch)
    except Exception as error:  # a machine whose peaks cannot be measured still has its court
        return found, f"the peaks of the machine could not be measured: {in_words(f'{type(error).__name__}: {error}')}"
    return found, ""


def _predicted(layers: Mapping[str, pd.DataFrame], count: int, batch: int) -> dict[tuple, dict[str, float]]:
    found, moved = {}, max(roofline.largest_traffic(table, "fp32", batch) for table in layers.values())
    peak = roofline.peak(count, moved, PEAK_SECONDS)
    for precision in ("fp32", "int8"):
        facts = {"peak_gmacs": getattr(peak, precision) / 1e9, "bandwidth_gb": peak.bandwidth / 1e9}
        for name, table in layers.items():
            by_macs, by_roofline = roofline.predicted_ms(table, precision, batch, peak)
            found[name, precision, batch, count] = {"predicted_macs_ms": by_macs, "predicted_ms": by_roofline, **facts}
    return found


def compared(variant: Variant, logits: Mapping[str, np.ndarray], test: ImageSet) -> dict[str, float]:
    """Accuracy, and how far the logits are from those of the same network in eager PyTorch."""
    own, eager = logits.get(variant.name), logits.get(f"{variant.model} eager fp32")
    if own is None:
        return {}
    predicted, labels = own.argmax(1), test.labels.numpy()[: len(own)]
    found = {"accuracy": 100 * float((predicted == labels).mean()), "accuracy_images": len(own)}
    if eager is not None:
        both = min(len(own), len(eager))
        found["max_difference"] = float(np.abs(own[:both] - eager[:both]).max())
        found["agreement"] = 100 * float((predicted[:both] == eager[:both].argmax(1)).mean())
    return found


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def table(rows: list[dict]) -> str:
    """The rows as text, best first within each setting; those without figures say why."""
    frame = pd.DataFrame(rows).astype({"bytes": "Int64"})
    parts = []
    for (threads, batch), found in frame.groupby(["threads", "batch"]):
        parts.append(f"batch {batch}, {threads} thread{'s' * (threads > 1)}")
        timed = found[found["p50_ms"].notna()].sort_values("p50_ms")
        if len(timed):
            interval = [f"{low:.2f}-{high:.2f}" for low, high in timed[["speedup_low", "speedup_high"]].to_numpy(float)]
            shown = timed.assign(**{"95 %": interval})[SHOWN]
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
    """Write the rows as JSON, for results/latency."""
    with replacing(path) as part:
        part.write_text(json.dumps([{k: _short(v) for k, v in found.items()} for found in rows], indent=1) + "\n")


def _short(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def run(student: str, patience: float, json_path: Path | None) -> None:
    """The command `latency`: teacher and one published student, the table, and the file if one is wanted.

    Raises:
        ValueError: `patience` is no number of seconds.
        OSError: the file cannot be written; nothing was measured.
    """
    if not (math.isfinite(patience) and patience > 0):
        raise ValueError(f"--patience {patience} is no time to wait: give seconds, more than 0, as 100")
    if json_path:
        check_writable(json_path.resolve().parent)
    names = {"teacher": "teacher", "student": student}
    networks = {model: artifacts.load(name) for model, name in names.items()}
    test = cifar10.load("test") if os.environ.get("KDIG_DATA") else cifar10.load_sample("test")
    rows = [{**found, "artifact": names[found["model"]]} for found in latency_rows(networks, test, patience=patience)]
    print(table(rows))
    print(f"accuracy on {test.name}{few_images(rows, len(test))}; times in ms, speed-up against the teacher in eager")
    print("PyTorch, bytes of the file, peak memory in MB of a process that opens it for one image")
    if json_path:
        write(rows, json_path)
        print(f"{len(rows)} rows in {json_path}")


def few_images(rows: list[dict], images: int) -> str:
    """In brackets, which runtimes were given fewer than `images` images; empty if none was."""
    frame = pd.DataFrame(rows).dropna(subset="accuracy_images")
    runtimes = frame["runtime"].where(frame["runtime"] == "compile", "others").map(WHO)
    fewest = frame.groupby(runtimes)["accuracy_images"].min()
    fewest = fewest[fewest < images].sort_values()
    words = [f"{name} on the first {count:,.0f} images" for name, count in fewest.items()]
    return f" ({', '.join(words)})" * bool(words)
