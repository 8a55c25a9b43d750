"""Commands that are bad by construction, each with what its refusal must name."""

import contextlib
import functools
import io
import re
from collections.abc import Sequence
from pathlib import Path

from bad_files import HEXADECIMAL, WORKSHOP, environment
from bad_values import NAMES, NONSENSE, NOT_FINITE, REAL, WHOLE, Case, beyond, outside
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kdig_utils import __main__ as command_line

NO_INTEGER = NONSENSE | st.floats(0.1, 1e3).filter(lambda x: x != int(x)).map(repr) | NOT_FINITE.map(repr) | st.just("")
NO_REAL = NONSENSE | st.just("")
NO_SPAN = (
    NO_REAL
    | st.floats(max_value=0, exclude_max=True, allow_subnormal=False).map(repr).filter(lambda x: x != "-0.0")
    | st.just("nan")
)
NO_NATURAL = NO_INTEGER | st.integers(max_value=0).map(str)


def no_field(name: str) -> SearchStrategy[str]:
    if name in WHOLE:
        return NO_INTEGER | outside(*WHOLE[name]).map(repr)
    return NO_REAL | beyond(*REAL[name]).map(repr)


def no_name(*names: str) -> SearchStrategy[str]:
    return (NONSENSE | st.text("abcdefgmnopst_,", min_size=1, max_size=8)).filter(lambda text: text not in names)


PROFILE = {"--profile": no_name("full", "smoke", "published")}
OPTIONS: dict[str, dict[str, SearchStrategy[str]]] = {  # words that are right but for the options, one at a time
    "teacher": {
        **{f"--{name.replace('_', '-')}": no_field(name) for name in (
            "seed", "epochs", "learning_rate", "batch_size", "cutout", "label_smoothing", "validation_images")},
        "--schedule": no_name("one_cycle", "cosine"), "--way": no_name("recorded", "compiled", "eager"),
        "--budget-minutes": NO_SPAN, "--initial": no_name(), **PROFILE,
    },
    "train --method kd": {
        "--epochs": no_field("epochs"), "--train-fraction": no_field("train_fraction"), "--seed": no_field("seed"),
        "--validation-images": no_field("validation_images"), "--pairing": no_name(*NAMES["pairing"]),
        "--n-steps": no_field("n_steps"), "--method": no_name(*NAMES["method"]),
        "--k": NO_INTEGER | st.integers().filter(lambda n: n not in range(3, 18, 2)).map(str),
    },
    "adopt absent.safetensors --recipe words --epochs 1": {
        "--seconds": NO_SPAN, "--epochs": no_field("epochs"), "--weight-decay": no_field("weight_decay"),
        "--label-smoothing": no_field("label_smoothing"), "--learning-rate": no_field("learning_rate"),
        "--batch-size": no_field("batch_size"), "--recipe": st.sampled_from(["", " ", "two\nlines", "two  spaces"]),
    },
    "signals": {"--n-steps": no_field("n_steps"), "--budget-minutes": NO_SPAN, **PROFILE},
    "campaign next --budget-minutes 0": {
        "--budget-minutes": NO_SPAN, "--at-once": NO_NATURAL, "--workers": NO_NATURAL, "--report-seconds": NO_SPAN,
        "--way": no_name("recorded", "compiled", "eager"), **PROFILE,
    },
    "search --method kd --budget-minutes 0": {
        "--budget-minutes": NO_SPAN, "--trials": NO_NATURAL, "--at-once": NO_NATURAL, "--report-seconds": NO_SPAN,
        "--method": no_name(*NAMES["method"]), **PROFILE,
    },
    "probe recorded": {"--seconds": NO_SPAN},
    "flight --pack out --budget-minutes 0": {"--budget-minutes": NO_SPAN, **PROFILE},
    "first-calls times.csv": {"--seconds": NO_SPAN},
    "explain": {
        "--images": NO_NATURAL | st.integers(1).filter(lambda n: n % 20).map(str),
        "--budget-minutes": NO_SPAN, **PROFILE,
    },
    "latency": {"--patience": NO_SPAN, "--student": no_name()},
    "reproduce": {"--only": no_name(), "--profile": no_name("full", "smoke", "published")},
}  # fmt: skip
ARGUMENTS: dict[str, SearchStrategy[str]] = {  # commands whose one argument is bad
    "campaign --budget-minutes 0": no_name("next"), "campaign --plan": no_name("next"),
    "probe": no_name("recorded", "compiled", "eager"), "publish": NONSENSE | HEXADECIMAL,
    "rerun": NONSENSE | HEXADECIMAL,
    "unpack": no_name(), "adopt --recipe words --epochs 1": no_name(), "": no_name(),
    **dict.fromkeys(("data", "store", "status", "readme", "links"), no_name()),
}  # fmt: skip


@functools.cache
def clone() -> Path:
    """An empty clone of the book, from which no command can reach data, networks or runs."""
    folder = WORKSHOP / "clone"
    for name in ("notebooks", "kdig_utils", "artifacts", "results"):
        (folder / name).mkdir(parents=True)
    (folder / "_toc.yml").write_text("parts:\n  - chapters:\n      - file: notebooks/00_a\n")
    (folder / "notebooks" / "00_a.ipynb").write_text("{}")
    return folder


class Refused(ValueError):
    """What the command line said where it ended with status 2."""


def run(words: Sequence[str]) -> int:
    """The exit status of a command; raises `Refused` with its last line where it is 2."""
    told, out = io.StringIO(), io.StringIO()
    places = {"KDIG_ROOT": str(clone()), "KDIG_WORKSPACE": str(clone() / "w"), "KDIG_DATA": str(clone() / "no_data")}
    with (
        environment(**places),
        contextlib.redirect_stderr(told),
        contextlib.redirect_stdout(out),
        contextlib.chdir(clone()),
    ):
        try:
            status = command_line.main(words)
        except SystemExit as ended:
            status = ended.code
    *_usage, line = told.getvalue().splitlines() or [""]
    if status == 2 and re.search(r"(^|: )error: ", line):
        raise Refused(line)
    return status


@st.composite
def commands(draw: st.DrawFn) -> Case:
    way = draw(st.sampled_from(["option"] * 8 + ["argument"] * 3 + ["unknown", "no value"]))
    if way == "argument":
        command = draw(st.sampled_from(sorted(ARGUMENTS)))
        wrong = draw(ARGUMENTS[command])
        words, named = [*command.split(), wrong], (wrong,)
    else:
        command = draw(st.sampled_from(sorted(OPTIONS)))
        option = draw(st.sampled_from(sorted(OPTIONS[command])))
        wrong = draw(OPTIONS[command][option])
        words = [*command.split(), f"{option}={wrong}"]
        named = (
            option,
            option[2:].replace("-", "_"),
            *(f"{part}'" for part in wrong.split(",") if part),
            f"no weights at {wrong}:",
            "no artifact" if option == "--student" else option,
        )
        if way == "unknown":
            words[-1] = f"--{wrong or 'gh'}x"
            named = (" ".join(words[-1].split()),)
        elif way == "no value":
            words[-1] = option
    return Case(" ".join(words), lambda: run(words), named)
