"""The latency court: teacher and student in every runtime at hand, on this machine, in under two minutes.

Each network in each runtime runs in a fresh process of its own; the processes are called in turn, in blocks, in an
order drawn anew each round. What cannot be had (a runtime, an export, an instruction) is said in its row.
"""

import contextlib
import hashlib
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
from kdig_utils.paths import replacing, workspace

PATIENCE = 100.0  # seconds for everything
ANSWER_SECONDS = 900.0  # an answer that takes longer does not come
BATCHES = (1, 64)
SETTING = ["model", "runtime", "precision", "batch", "threads"]
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}  # instructions that add up 8-bit products
PACKAGES = ("torch", "onnxruntime", "openvino", "executorch")
TABLE = ["model", "runtime", "precision", "batch", "threads", "p50_ms", "p95_ms", "speedup", "accuracy", "bytes"]
LARGE_CALLS, LARGE_ROUNDS = 2, 4  # of batches larger than one
NO_CALLS = pd.DataFrame({"batch_size": [], "threads": [], "network": [], "ms": []}, dtype=float)
WARM_UP = 4  # calls at the least, as `latency.warm_up` makes them
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
    ("onnxruntime", "fp32", "fp32.onnx", "onnx"),
    ("onnxruntime", "int8", "int8.onnx", "onnx"),
    ("openvino", "fp32", "fp32.onnx", "onnx"),
    ("openvino", "int8", "int8.onnx", "onnx"),
    ("executorch", "fp32", "fp32.pte", "executorch_fp32"),
    ("executorch", "int8", "int8.pte", "executorch_int8"),
)


SHARES = {"exports": 0.42, "opening": 0.62, "measuring": 0.88}  # of the patience, by when each must have ended
FILES = {"onnx": ("fp32.onnx", "int8.onnx"), "executorch_int8": ("int8.pte",), "executorch_fp32": ("fp32.pte",)}
LATE = "left out: it was not ready in time; --patience SECONDS gives more, and what was exported is kept"
ONE_COMPILATION = "left out: each further batch size and number of threads costs another compilation"
NO_TIME = "left out: there was no time left to measure it; --patience SECONDS gives more"


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

    def open(self, variant: Variant, files: Path, pixels: Path, patience: float) -> None:
        """Open the file of `variant` for one image and one thread, and call it."""
        path = str(files / variant.file)
        self.ask("open", runtime=variant.runtime, path=path, k=variant.k, pixels=str(pixels))
        self.loaded = self.ask("meet", patience, batch=1, threads=1)
        self.setting = (1, 1)

    def ready(self, batch: int, threads: int) -> None:
        """Open the file anew if it was open for another batch size or number of threads."""
        if self.setting != (batch, threads):
            self.ask("load", batch=batch, threads=threads)
            self.setting = (batch, threads)

    def stay(self, cpus: list[int]) -> None:
        """Use these CPUs only, where the system lets a process say so."""
        if hasattr(os, "sched_setaffinity"):
            self.ask("stay", cpus=cpus)

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
    seconds: float = 3.0,
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
        patience: seconds for everything, shared out as in `SHARES`; what comes later is left out, in words.
        report: is told what is being done.

    Returns:
        Rows with the keys of `SETTING`, p50_ms, p95_ms, p99_ms (settled calls), cold_ms (median call after other
        networks ran), calls, speedup with speedup_low and speedup_high (against the eager teacher at the same batch and
        threads), predicted_macs_ms, predicted_ms (roofline), accuracy and accuracy_images, max_difference and
        agreement (of logits and predictions with the same network in eager PyTorch), bytes (of the file), load_ms,
        first_ms, peak_mb (of the fresh process, opened for one image and one thread), status (`ok`, or why there are no
        figures), and the machine's facts.
    """
    start, counts = time.monotonic(), threads or tuple(sorted({1, usable_cpus()}))
    ends = {part: start + share * patience for part, share in {**SHARES, "all": 1.0}.items()}
    variants = [Variant(name, getattr(network, "k", 0), *kind) for name, network in networks.items() for kind in kinds]
    settings = [pair for turn, batch in enumerate(batches) for pair in _pairs(batch, counts, turn)]
    facts, best = machine(), predictions(networks, counts, batches)
    report(f"exporting {', '.join(networks)}")
    folders, problems = export(networks, variants, ends["exports"])
    report(f"opening {len(variants)} processes")
    with tempfile.NamedTemporaryFile(suffix=".npy") as pixels:
        np.save(pixels, test.pixels.numpy())
        pixels.flush()
        with opened(variants, problems, folders, Path(pixels.name), ends["opening"]) as processes:
            times = []
            for batch, count in settings:
                report(f"measuring batch {batch} with {count} thread{'s' * (count > 1)}")
                times.append(_times(processes, problems, batch, count, seconds, ends["measuring"]))
            report("classifying test images")
            logits = classified(processes, len(test), max(batches), ends["all"])
            loaded = {name: process.loaded for name, process in processes.items()}
    outputs = {variant.name: compared(variant, logits, test) for variant in variants}
    found = pd.concat([NO_CALLS, *times], ignore_index=True)
    return [
        {
            **dict(zip(SETTING, (v.model, v.runtime, v.precision, batch, count), strict=True)),
            **row(found, v, batch, count),
            **best[v.model, v.precision, batch, count],
            **outputs[v.name],
            **loaded.get(v.name, {}),
            "bytes": _size(folders[v.model] / v.file),
            "status": status(v, batch, count, problems),
            **facts,
        }
        for count in counts
        for batch in batches
        for v in variants
    ]


def _pairs(batch: int, counts: tuple[int, ...], turn: int) -> list[tuple[int, int]]:
    """Batch and numbers of threads; every other time from the last number back to the first."""
    return [(batch, count) for count in (reversed(counts) if turn % 2 else counts)]


def usable_cpu_numbers() -> list[int]:
    """The CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def usable_cpus() -> int:
    """How many CPUs this process may use."""
    return len(usable_cpu_numbers())


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
    networks: Mapping[str, nn.Module], variants: list[Variant], end: float
) -> tuple[dict[str, Path], dict[tuple, str]]:
    """Write all files, each network in a process of its own; what an earlier call has written is not written again.

    Returns:
        The folder of each network's files, and what went wrong, by network and format, in words.
    """
    folders = {model: _kept(network) for model, network in networks.items()}
    formats = dict.fromkeys(variant.format for variant in variants if variant.format)

    def export_one(model: str) -> dict[tuple, str]:
        missing = [name for name in formats if not all((folders[model] / file).is_file() for file in FILES[name])]
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
    command = [sys.executable, "-m", "kdig_utils.exporting", weights, str(k), str(folder), *names]
    one_thread = {**environment(), "OMP_NUM_THREADS": "1"}  # a process for each CPU is running
    try:
        left = max(0.0, end - time.monotonic())
        done = subprocess.run(command, capture_output=True, timeout=left, env=one_thread)
        said, otherwise = done.stdout, "the export failed: " + _last_line(done)
    except subprocess.TimeoutExpired as late:
        said, otherwise = late.stdout or b"", LATE
    answers = dict(json.loads(line) for line in said.decode().splitlines() if line.endswith("]"))
    return {name: _export_words(answers[name]) if name in answers else otherwise for name in names}


def _last_line(done: subprocess.CompletedProcess) -> str:
    return in_words((done.stderr.decode().strip() or _death(done.returncode)).splitlines()[-1])


def _export_words(error: str) -> str:
    return in_words(error) if not error or "ModuleNotFound" in error else "the export failed: " + in_words(error)


@contextlib.contextmanager
def opened(
    variants: list[Variant], problems: dict[tuple, str], folders: Mapping[str, Path], pixels: Path, end: float
) -> Iterator[dict[str, Process]]:
    """Processes by the name of their variant; why one could not be opened is entered in `problems`."""

    def open_one(variant: Variant) -> tuple[str, Process | None]:
        process = Process()
        try:
            process.open(variant, folders[variant.model], pixels, max(1.0, end - time.monotonic()))
        except RuntimeError as error:
            process.close()
            problems[(variant.name,)] = str(error)
            return variant.name, None
        return variant.name, process

    wanted = [v for v in variants if status(v, 1, 1, problems) == "ok"]
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
    keys = ((variant.model, variant.format), (variant.name,), (variant.name, batch, threads))
    found = next((problems[key] for key in keys if key in problems), "ok")
    return ONE_COMPILATION if found == "ok" and _left_to_others(variant.name, batch, threads) else found


def _left_to_others(name: str, batch: int, threads: int) -> bool:
    return " compile " in name and (batch, threads) != (1, 1)


def _times(
    processes: dict[str, Process], problems: dict[tuple, str], batch: int, threads: int, seconds: float, end: float
) -> pd.DataFrame:
    """The calls of all networks at one setting: round, network, call, ms, batch_size, threads."""
    calls, least = (latency.BLOCK_CALLS, latency.LEAST_ROUNDS) if batch == 1 else (LARGE_CALLS, LARGE_ROUNDS)
    present = {name: process for name, process in processes.items() if not _left_to_others(name, batch, threads)}
    expected = (WARM_UP + calls * least) * batch * sum(process.loaded["each_ms"] for process in present.values()) / 1e3
    if time.monotonic() + expected > end:
        problems |= {(name, batch, threads): NO_TIME for name in present}
        return pd.DataFrame()
    timed = {name: _timed(present[name]) for name in prepared(present, problems, batch, threads)}
    left = min(seconds, end - time.monotonic())
    return latency.interleave(timed, left, calls, least).assign(batch_size=batch, threads=threads)


def _timed(process: Process) -> latency.Times:
    return lambda calls: process.ask("times", calls=calls)


def prepared(processes: dict[str, Process], problems: dict[tuple, str], batch: int, threads: int) -> list[str]:
    """Let all networks be open for this setting, and give the names of those that are; with one thread, on one CPU."""
    cpus = usable_cpu_numbers()

    def prepare(name: str) -> bool:
        try:
            processes[name].stay(cpus)  # threads that a runtime starts when it opens a file may use all
            processes[name].ready(batch, threads)
            processes[name].stay(cpus[-1:] if threads == 1 else cpus)
        except RuntimeError as error:
            problems[name, batch, threads] = str(error)
            return False
        return True

    with ThreadPoolExecutor(len(cpus)) as pool:
        return [name for name, good in zip(processes, pool.map(prepare, processes), strict=True) if good]


def classified(processes: dict[str, Process], images: int, batch: int, end: float) -> dict[str, np.ndarray]:
    """The logits of every network, (N, 10), one thread each, as many at once as there are CPUs.

    N is `images`, or as many as the time until `end` allows, the same for all; 500 at most for torch.compile.
    """
    cpus = usable_cpu_numbers()
    each = sum(process.loaded["each_ms"] for process in processes.values()) / 1e3
    fit = int(len(cpus) * max(0.0, end - time.monotonic()) / each) if processes else 0
    chosen = min(images, max(batch, fit))

    def classify(name: str) -> tuple[str, np.ndarray | None]:
        process, alone = processes[name], _left_to_others(name, batch, 1)
        try:
            process.stay(cpus)
            process.ready(1 if alone else batch, 1)
            return name, np.array(process.ask("logits", images=min(chosen, FEW_IMAGES) if alone else chosen))
        except RuntimeError:
            return name, None

    with ThreadPoolExecutor(len(cpus)) as pool:
        return {name: found for name, found in pool.map(classify, processes) if found is not None}


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
        both = min(len(own), len(eager))
        found["max_difference"] = float(np.abs(own[:both] - eager[:both]).max())
        found["agreement"] = 100 * float((predicted[:both] == eager[:both].argmax(1)).mean())
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
        if len(timed):
            parts.append(timed[TABLE].drop(columns=["batch", "threads"]).to_string(index=False, float_format="%.2f"))
        names = (found["model"] + " " + found["runtime"] + " " + found["precision"])[found["p50_ms"].isna()]
        parts += [f"  {', '.join(group)}: {words}" for words, group in names.groupby(found["status"], sort=False)]
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
    few = min((found["accuracy_images"] for found in rows if "accuracy_images" in found), default=0)
    part = f" (torch.compile, or all where time was short: on the first {few:,})" * (few < len(test))
    print(
        f"accuracy on {test.name}{part}; times in ms, speed-up against the teacher in eager PyTorch, bytes of the file"
    )
    if json_path:
        write(rows, json_path)
        print(f"{len(rows)} rows in {json_path}")
