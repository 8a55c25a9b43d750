"""What the benchmark says of the machine, and its rows as a table and as a file."""

import json
import os
import platform
import time
from pathlib import Path

import pandas as pd

from kdig_utils import machine
from kdig_utils.edge import runtimes
from kdig_utils.paths import replacing

SHOWN = [
    *("model", "runtime", "precision", "p50_ms", "p95_ms", "predicted_ms", "speedup", "95 %"),
    *("accuracy", "images", "bytes", "load_ms", "peak_mb"),
]
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}  # instructions that add up 8-bit products
NO_VNNI = (
    "no instruction for sums of 8-bit products (VNNI): 8 bits are slower here, and ONNX Runtime's sums of products of "
    "unsigned by signed bytes can overflow: read the accuracy"
)


def machine_facts() -> dict[str, object]:
    """What a reader needs to know of the machine: processor, instructions, load, clock, versions, day."""
    flags = machine.processor_flags()
    clock = time.get_clock_info("perf_counter")
    eight_bits = "" if VNNI & set(flags) or not flags else NO_VNNI
    return {
        "machine": machine.processor(),
        "flags": " ".join(flags),
        "cpus": machine.usable_cpus(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "clock": f"perf_counter: {clock.implementation}, {1e9 * clock.resolution:.3g} ns",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": runtimes.versions(),
        "day": time.strftime("%Y-%m-%d", time.gmtime()),
        "note": eight_bits,
    }


def table(rows: list[dict]) -> str:
    """The rows as text, best first within each setting; those without figures say why."""
    frame = (
        pd.DataFrame(rows).rename(columns={"accuracy_images": "images"}).astype({"bytes": "Int64", "images": "Int64"})
    )
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
    """Write the rows as JSON, for results/latency, with four digits."""
    with replacing(path) as part:
        part.write_text(json.dumps([{k: _short(v) for k, v in found.items()} for found in rows], indent=1) + "\n")


def _short(value: object) -> object:
    return float(f"{value:.4g}") if isinstance(value, float) else value
