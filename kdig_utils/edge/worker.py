"""A process that writes files or runs a network (`serving`): started, asked, stopped, ended; failures in words.

A process leads a process group, so that a compiler that it has started ends with it. It is stopped (SIGSTOP) whenever
nothing is asked of it: threads that wait for work by spinning would run beside the network that is timed. If this
program dies, Linux kills the process at once; elsewhere the system wakes the stopped group with a hang-up (SIGHUP and
SIGCONT, as POSIX wants of a group that nobody waits for), and the group ends. No process is left behind.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from kdig_utils.machine import process_environment, start

LATE = "left out: it was not ready in time; --patience SECONDS gives more, and what was exported is kept"
EDGE = ("onnx", "onnxruntime", "openvino")  # the packages of the group [edge] of requirements.txt
DEATHS = {  # by exit status
    -4: "this CPU lacks an instruction that the runtime needs",
    -9: "the process ended with status -9, perhaps out of memory",
}


class Lost(RuntimeError):
    """A process died, or refused; the message says why."""


class Process:
    """A process of its own, which answers one request at a time, and is killed if it has not by `end`.

    Args:
        end: a moment of `time.monotonic`; may be moved.
    """

    def __init__(self, end: float) -> None:
        self.end = end
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = start(
            [sys.executable, "-c", "from kdig_utils.edge import serving; serving.main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=process_environment(),
            process_group=0,
        )

    def ask(self, do: str, *arguments: object) -> Any:
        """The answer, from JSON, of a method of `serving.Server`.

        Raises:
            Lost: the process died, refused, or did not answer before `end`.
        """
        late = threading.Timer(max(0.0, self.end - time.monotonic()), self._kill)
        late.start()
        try:
            self._signal("SIGCONT")
            print(json.dumps([do, *arguments]), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline() if self.process.stdout else ""
        except BrokenPipeError:
            line = ""
        finally:
            late.cancel()
            self._signal("SIGSTOP")
        if not line.endswith("\n"):
            raise Lost(self._death() if time.monotonic() < self.end else LATE)
        reply = json.loads(line)
        if "error" in reply:
            raise Lost(reply["error"])
        return reply["answer"]

    def _death(self) -> str:
        """Why the process ended: its status, and the last line that it wrote."""
        self._kill()
        status = self.process.wait()
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return ": ".join([DEATHS.get(status, f"the process ended with status {status}"), *last])

    def is_alive(self) -> bool:
        """Whether there is a process to ask."""
        return self.process.poll() is None

    def close(self) -> None:
        """End the process, and those that it has started."""
        self._kill()
        self.process.communicate()
        self.errors.close()

    def _kill(self) -> None:
        self._signal("SIGKILL")
        self.process.kill()  # where there are no process groups

    def _signal(self, name: str) -> None:
        if self.process.returncode is None and hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says the latter of the dead
                os.killpg(self.process.pid, getattr(signal, name))


def in_words(error: Exception | str) -> str:
    """A runtime's error as one line that says what to do, where that is known."""
    line = " ".join(str(error).split())
    if missing := re.search(r"No module named '(\w+)", line):
        remedy = "'.[edge]' in the folder of the book" if missing[1] in EDGE else missing[1]
        return f"{missing[1]} is not installed: pip install {remedy}"
    if "C++ compiler" in line or "InvalidCxxCompiler" in line:
        return "torch.compile found no C++ compiler: install one (g++ or clang++), or set CXX"
    return line[:200]
