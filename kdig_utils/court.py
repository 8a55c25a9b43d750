"""The latency court: teacher and student in every runtime at hand, on this machine, in under two minutes.

Each network in each runtime runs in a fresh process of its own; the processes are called in turn, in blocks, in an
order drawn anew each round. What cannot be had (a runtime, an export, an instruction) is said in its row.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import nn

from kdig_utils import artifacts, cifar10, latency, roofline
from kdig_utils.cifar10 import ImageSet
from kdig_utils.paths import replacing

PATIENCE = 20.0  # seconds for all exports, and again for all networks to be opened
ANSWER_SECONDS = 900.0  # an answer that takes longer does not come
BATCHES = (1, 64)
SETTING = ["model", "runtime", "precision", "batch", "threads"]
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}  # instructions that add up 8-bit products
PACKAGES = ("torch", "onnxruntime", "openvino", "executorch")
TABLE = ["model", "runtime", "precision", "batch", "threads", "p50_ms", "p95_ms", "speedup", "accuracy", "bytes"]
LARGE_CALLS, LARGE_ROUNDS = 2, 4  # of batches larger than one
FEW_IMAGES = 500  # to compare the outputs of a file that takes one image at a time
SLOWEST = 1500.0  # milliseconds that a large batch may be expected to take in eager PyTorch
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
    ("onnxruntime", "fp32", "fp32.onnx", "onnx"),
    ("onnxruntime", "int8", "int8.onnx", "onnx"),
    ("openvino", "fp32", "fp32.onnx", "onnx"),
    ("openvino", "int8", "int8.onnx", "onnx"),
    ("executorch", "fp32", "fp32.pte", "executorch_fp32"),
    ("executorch", "int8", "int8.pte", "executorch_int8"),
)


LATE = "left out: it was not ready in time; --patience SECONDS gives more"


class Process:
    """A runtime in a process of its own, which answers one request at a time.

    Raises:
        RuntimeError: the process died, or refused; the message says why.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kdig_utils.runtimes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )

    def ask(self, do: str, patience: float = ANSWER_SECONDS, **arguments: object) -> object:
        """The answer of the process to one request."""
        late = threading.Timer(patience, self.process.kill)
        late.start()
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            in_time = late.is_alive()
            late.cancel()
        if not line:
            raise RuntimeError(_death(self.process.wait()) if in_time else LATE)
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(in_words(reply["error"]))
        return reply["answer"]

    def open(self, variant: Variant, folder: Path, threads: int, patience: float) -> None:
        """Open the file of `variant` and call it; with one thread, stay on one CPU."""
        path, pixels = str(folder / variant.model / variant.file), str(folder / "pixels.npy")
        self.ask("open", runtime=variant.runtime, path=path, k=variant.k, threads=threads, pixels=pixels)
        self.loaded = self.ask("load", patience, batch=1)
        self.batches = [1]
        if threads == 1 and hasattr(os, "sched_getaffinity"):
            self.ask("pin", cpu=max(os.sched_getaffinity(0)))

    def ready(self, batch: int) -> None:
        """Make sure that batches of this size can be called."""
        if batch not in self.batches:
            self.ask("load", batch=batch)
            self.batches.append(batch)

    def logits(self, images: int) -> np.ndarray:
        """The logits of the first `images` test images, (N, 10); of 500 at most if it takes one image at a time."""
        batch = self.batches[-1]
        return np.array(self.ask("logits", batch=batch, images=images if batch > 1 else min(images, FEW_IMAGES)))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def environment() -> dict[str, str]:
    """The environment of a fresh process: this package can be imported, and logs stay quiet."""
    found = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    quiet = {"TORCH_LOGS": "-all", "OPENVINO_TELEMETRY": "0"}
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(filter(None, found))}


def _death(status: int) -> str:
    if status == -4:
        return "this CPU lacks an instruction that the runtime needs"
    return f"the process ended with status {status}" + (", perhaps out of memory" if status == -9 else "")


def in_words(error: str) -> str:
    """A runtime's error as one line that says what to do, where that is known."""
    line = " ".join(error.split())
    if line.startswith("ModuleNotFoundError"):
        package = line.rpartition("'")[0].rpartition("'")[2].partition(".")[0]
        return f"{package} is not installed: pip install {package}"
    if "C++ compiler" in line or "InvalidCxxCompiler" in line:
        return "torch.compile found no C++ compiler: install one (g++ or clang++), or set CXX"
    return line[:200]


def latency_rows(
    networks: Mapping[str, nn.Module],
    test: ImageSet,
    threads: tuple[int, ...] | None = None,
    batches: tuple[int, ...] = BATCHES,
    kinds: tuple = KINDS,
    seconds: float = 4.0,
    patience: float = PATIENCE,
    report: Callable[[str], None] = print,
) -> list[dict]:
    """Measure every network in every runtime; one row for each batch size and number of threads.

    Args:
        networks: by name; one must be `teacher`, whose eager latency is 1.0.
        test: the images that give the accuracies.
        threads: by default one, and all that this process may use.
        kinds: runtimes, precisions and files, as in `KINDS`.
        seconds: of measuring, for each batch size and number of threads.
        patience: seconds for all exports, and again for all networks to be opened; who comes later is left out.
        report: is told what is being done.

    Returns:
        Rows with the keys of `SETTING`, p50_ms, p95_ms, p99_ms (settled calls), cold_ms (median call after other
        networks ran), calls, speedup with speedup_low and speedup_high (against the eager teacher at the same batch and
        threads), predicted_macs_ms, predicted_ms (roofline), accuracy and accuracy_images, max_difference and
        agreement (of logits and predictions with the same network in eager PyTorch), bytes (of the file), load_ms,
        first_ms, peak_mb (of the whole process), status (`ok`, or why there are no figures), and the machine's facts.
    """
    counts = threads or tuple(sorted({1, usable_cpus()}))
    variants = [Variant(name, getattr(network, "k", 0), *kind) for name, network in networks.items() for kind in kinds]
    facts = machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "pixels.npy", test.pixels.numpy())
        report(f"exporting {', '.join(networks)}")
        problems = export(networks, variants, folder, patience)
        times, loaded, logits = [], {}, {}
        for count in counts:
            report(f"opening the networks with {count} thread{'s' * (count > 1)}")
            with opened(variants, problems, folder, count, patience) as processes:
                loaded |= {(name, count): process.loaded for name, process in processes.items()}
                times += [_times(processes, problems, count, batch, seconds) for batch in batches]
                report(f"measured with {count} thread{'s' * (count > 1)}")
                last = [v.name for v in variants if count == counts[-1] or v.runtime == "compile"]
                logits |= {name: processes[name].logits(len(test)) for name in last if name in processes}
        sizes = {variant.name: _size(folder / variant.model / variant.file) for variant in variants}
    best = predictions(networks, counts, batches)
    outputs = {variant.name: compared(variant, logits, test) for variant in variants}
    found = pd.concat(times, ignore_index=True)
    return [
        {
            **dict(zip(SETTING, (v.model, v.runtime, v.precision, batch, count), strict=True)),
            **row(found, v, batch, count),
            **best[v.model, v.precision, batch, count],
            **outputs[v.name],
            **loaded.get((v.name, count), {}),
            "bytes": sizes[v.name],
            "status": status(v, batch, count, problems),
            **facts,
        }
        for count in counts
        for batch in batches
        for v in variants
    ]


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, object]:
    """What a reader needs to know of the machine: processor, instructions, load, clock, versions, day."""
    flags = latency.processor_flags()
    clock = time.get_clock_info("perf_counter")
    eight_bits = "" if VNNI & set(flags) or not flags else "no instruction for sums of 8-bit products (VNNI)"
    return {
        "machine": latency.processor(),
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
    networks: Mapping[str, nn.Module], variants: list[Variant], folder: Path, patience: float
) -> dict[tuple, str]:
    """Write all files, each format in a process of its own; what went wrong, by network and format, in words."""
    for model, network in networks.items():
        (folder / model).mkdir()
        artifacts.save_weights(network, folder / model / "weights.safetensors")
    jobs = sorted({(v.model, v.k, v.format) for v in variants if v.format}, key=lambda job: (job[2] != "onnx", -job[1]))
    end = time.monotonic() + patience
    with ThreadPoolExecutor(usable_cpus()) as pool:
        found = list(pool.map(lambda job: _export(folder / job[0], *job[1:], end), jobs))
    return {(model, name): words for (model, _k, name), words in zip(jobs, found, strict=True) if words}


def _export(folder: Path, k: int, name: str, end: float) -> str:
    weights = str(folder / "weights.safetensors")
    command = [sys.executable, "-m", "kdig_utils.exporting", name, weights, str(k), str(folder)]
    try:
        left = max(0.0, end - time.monotonic())
        done = subprocess.run(command, capture_output=True, text=True, timeout=left, env=environment())
    except subprocess.TimeoutExpired:
        return LATE
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip() or _death(done.returncode)).splitlines()[-1]
    return in_words(last) if "ModuleNotFound" in last else "the export failed: " + in_words(last)


@contextlib.contextmanager
def opened(
    variants: list[Variant], problems: dict[tuple, str], folder: Path, threads: int, patience: float
) -> Iterator[dict[str, Process]]:
    """Processes by the name of their variant; why one could not be opened is entered in `problems`."""

    def open_one(variant: Variant) -> tuple[str, Process | None]:
        process = Process()
        try:
            process.open(variant, folder, threads, max(1.0, end - time.monotonic()))
        except RuntimeError as error:
            process.close()
            problems[variant.name, threads] = str(error)
            return variant.name, None
        return variant.name, process

    end = time.monotonic() + patience
    wanted = [v for v in variants if status(v, 1, threads, problems) == "ok"]
    wanted.sort(key=lambda variant: variant.runtime == "compile")  # the slowest last
    with ThreadPoolExecutor(usable_cpus()) as pool:
        processes = {name: process for name, process in pool.map(open_one, wanted) if process}
    try:
        yield processes
    finally:
        for process in processes.values():
            process.close()


def status(variant: Variant, batch: int, threads: int, problems: Mapping[tuple, str]) -> str:
    """`ok`, or why there are no figures for this setting."""
    if variant.runtime == "compile" and (batch, threads) != (1, 1):
        return "left out: each further batch size and number of threads costs another compilation"
    keys = ((variant.model, variant.format), (variant.name, threads), (variant.name, threads, batch))
    return next((problems[key] for key in keys if key in problems), "ok")


def _times(
    processes: dict[str, Process], problems: dict[tuple, str], threads: int, batch: int, seconds: float
) -> pd.DataFrame:
    """The calls of all networks at one setting: round, network, call, ms, batch_size, threads."""
    timed: dict[str, latency.Times] = {}
    reference = processes.get("teacher eager fp32")
    for name, process in processes.items():
        try:
            if batch > 1 and reference and batch * reference.loaded["each_ms"] > SLOWEST:
                raise RuntimeError(f"left out: on this machine {batch} images would take too long")
            process.ready(batch)
            timed[name] = lambda calls, process=process: process.ask("times", batch=batch, calls=calls)
        except RuntimeError as error:
            problems[name, threads, batch] = str(error)
    if not timed:
        return pd.DataFrame()
    calls, least = (latency.BLOCK_CALLS, latency.LEAST_ROUNDS) if batch == 1 else (LARGE_CALLS, LARGE_ROUNDS)
    return latency.interleave(timed, seconds, calls, least).assign(batch_size=batch, threads=threads)


def row(times: pd.DataFrame, variant: Variant, batch: int, threads: int) -> dict[str, float]:
    """Percentiles of the settled calls, the median of the first calls of each block, the speed-up with its interval."""
    chosen = times[(times["batch_size"] == batch) & (times["threads"] == threads)]
    own = chosen[chosen["network"] == variant.name]
    if own.empty:
        return {}
    steady = latency.settled(own)["ms"]
    percentiles = {f"p{q}_ms": float(np.percentile(steady, q)) for q in (50, 95, 99)}
    found = {**percentiles, "cold_ms": float(own[own["call"] == 0]["ms"].median()), "calls": len(steady)}
    if (chosen["network"] == "teacher eager fp32").any():
        ratio = latency.speedup(latency.settled(chosen), "teacher eager fp32", variant.name, batch, threads)
        found |= {"speedup": ratio.value, "speedup_low": ratio.low, "speedup_high": ratio.high}
    return found


def predictions(
    networks: Mapping[str, nn.Module], counts: tuple[int, ...], batches: tuple[int, ...]
) -> dict[tuple, dict[str, float]]:
    """What each network could take at best, by model, precision, batch and threads: `roofline.predicted_ms`."""
    found, layers = {}, {name: roofline.layers(network) for name, network in networks.items()}
    for count in counts:
        for batch in batches:
            moved = max(roofline.largest_traffic(table, "fp32", batch) for table in layers.values())
            peak = roofline.peak(count, moved, PEAK_SECONDS)
            for precision in ("fp32", "int8"):
                facts = {"peak_gmacs": getattr(peak, precision) / 1e9, "bandwidth_gb": peak.bandwidth / 1e9}
                for name, table in layers.items():
                    by_macs, by_roofline = roofline.predicted_ms(table, precision, batch, peak)
                    best = {"predicted_macs_ms": by_macs, "predicted_ms": by_roofline}
                    found[name, precision, batch, count] = {**best, **facts}
    return found


def compared(variant: Variant, logits: Mapping[str, np.ndarray], test: ImageSet) -> dict[str, float]:
    """Accuracy, and how far the logits are from those of the same network in eager PyTorch."""
    own, eager = logits.get(variant.name), logits.get(f"{variant.model} eager fp32")
    if own is None:
        return {}
    predicted, labels = own.argmax(1), test.labels.numpy()[: len(own)]
    found = {"accuracy": 100 * float((predicted == labels).mean()), "accuracy_images": len(own)}
    if eager is not None:
        same = eager[: len(own)]
        found["max_difference"] = float(np.abs(own - same).max())
        found["agreement"] = 100 * float((predicted == same.argmax(1)).mean())
    return found


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def table(rows: list[dict]) -> str:
    """The rows as text, best first within each setting; those without figures say why."""
    frame = pd.DataFrame(rows)
    for name in TABLE:
        frame[name] = frame.get(name)
    parts = []
    for (threads, batch), found in frame.groupby(["threads", "batch"]):
        timed = found[found["p50_ms"].notna()].sort_values("p50_ms")
        parts.append(f"batch {batch}, {threads} thread{'s' * (threads > 1)}")
        parts.append(timed[TABLE].drop(columns=["batch", "threads"]).to_string(index=False, float_format="%.2f"))
        missing = found[found["p50_ms"].isna()]
        parts += [f"  {r.model} {r.runtime} {r.precision}: {r.status}" for r in missing.itertuples()]
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
    """The command `latency`: teacher and one published student, the table, and the file if one is wanted."""
    networks = {"teacher": artifacts.load("teacher"), "student": artifacts.load(student)}
    test = cifar10.load("test") if os.environ.get("KDIG_DATA") else cifar10.load_sample("test")
    rows = latency_rows(networks, test, patience=patience)
    print(table(rows))
    print(f"accuracy on {test.name}; times in ms, speed-up against the teacher in eager PyTorch, bytes of the file")
    if json_path:
        write(rows, json_path)
        print(f"{len(rows)} rows in {json_path}")
