"""This machine: its processor and CPUs, the memory that a C library keeps, and processes that it starts."""

import contextlib
import ctypes
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SET_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
STARTING = ThreadPoolExecutor(1, "starting")
MALLOC_PARAMETERS = (-1, -2, -3)  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD of glibc's mallopt


def processor() -> str:
    """The model name of this machine's CPU."""
    return _cpuinfo("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def processor_flags() -> list[str]:
    """The instructions of this CPU that matter to a network, as the system names them; empty where it does not say."""
    wanted = r"avx2|fma|avx512f|avx512_vnni|avx_vnni|avx512_bf16|amx_int8|neon|asimd|asimddp|i8mm|sve"
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [flag for flag in flags if re.fullmatch(wanted, flag)]


def fastest_cpu(numbers: Sequence[int], system: Path = Path("/sys/devices/system/cpu")) -> int:
    """The CPU of the highest clock among `numbers`; the last of them where the system does not say."""

    def highest(number: int) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((system / f"cpu{number}" / "cpufreq" / "cpuinfo_max_freq").read_text(encoding="utf-8"))
        return 0

    return max(numbers, key=lambda number: (highest(number), number))


def _cpuinfo(key: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def _sysctl(key: str) -> str:
    """What macOS says of itself; empty elsewhere."""
    with contextlib.suppress(OSError):
        return subprocess.run(["sysctl", "-n", key], capture_output=True, text=True).stdout.strip()
    return ""


def start(command: Sequence[str], **options: Any) -> "subprocess.Popen[str]":
    """Start a process that, on Linux, is killed when this program dies, even by SIGKILL; options as of `Popen`.

    Linux kills it when the *thread* that started it ends, so one thread starts all of them, and lasts as long as the
    program (prctl(2), PR_SET_PDEATHSIG).
    """
    last_will = _die_with_parent if sys.platform == "linux" else None
    return STARTING.submit(lambda: subprocess.Popen(command, preexec_fn=last_will, **options)).result()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def process_environment() -> dict[str, str]:
    """The environment of a fresh process: this package can be imported, text is UTF-8, and logs stay quiet."""
    found = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    fixed = {"TORCH_LOGS": "-all", "OPENVINO_TELEMETRY": "0", "PYTHONUTF8": "1"}
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(filter(None, found))}


def kernel_environment(folder: Path) -> dict[str, str]:
    """The environment of a notebook's kernel: of the reader's profiles, start-up files and styles it has none.

    What IPython, Jupyter and Matplotlib keep lies below `folder`; the reader's home folder is not needed.
    """
    own = {name: str(folder.resolve() / name) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR")}
    return {**process_environment(), **own, "MATPLOTLIBRC": "", "MPLBACKEND": "", "PYTHONSTARTUP": ""}  # as if unset


def usable_cpu_numbers() -> list[int]:
    """The CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def free_memory(device: "torch.device") -> int:
    """Bytes of a GPU's memory that nobody has taken."""
    import torch  # a process that only runs ONNX files does without

    return torch.cuda.mem_get_info(device)[0]


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a training step frees: else a CPU loses half its time to page faults."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for parameter in MALLOC_PARAMETERS:
            libc.mallopt(parameter, 1 << 30)
