"""The command line: `python -m kdig_utils COMMAND`; each command has --help with examples.

A command is a function in `commands`: its parameters are its options, `Annotated` with their help, its docstring is its
description.
"""

import argparse
import dataclasses
import inspect
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import torch

from kdig_utils.commands import COMMANDS, EXAMPLES, Command
from kdig_utils.experiments.reports import TrainingDiverged

PROGRAM = "python -m kdig_utils"
EXPECTED_ERRORS = (ValueError, KeyError, RuntimeError)  # and OSError: what the package raises on bad input
ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)  # in a dataclass's docstring


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Descriptions as they are written, and each default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if isinstance(action.default, bool | None) else super()._get_help_string(action)


def command_line() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=(__doc__ or "").splitlines()[0])
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        name, description = command.__name__.replace("_", "-"), inspect.getdoc(command) or ""
        examples = [line for line in EXAMPLES.splitlines() if line.split()[0] == name] or [name]
        subparser = subparsers.add_parser(
            name,
            help=description.splitlines()[0],
            description=description,
            epilog="\n".join(["examples:", *(f"  {PROGRAM} {line}" for line in examples)]),
            formatter_class=HelpFormatter,
        )
        subparser.set_defaults(command=command)
        for parameter in inspect.signature(command).parameters.values():
            add_options(subparser, parameter)
    return parser


def add_options(parser: argparse.ArgumentParser, parameter: inspect.Parameter) -> None:
    """Add what a parameter of a command stands for.

    `Annotated[type, "help", {more that add_argument takes}]` is an option, or an argument if it is not keyword-only;
    `Annotated[Spec, "names of fields"]` an option for each of these, with the default that the default spec has.
    """
    kind, words, *more = get_args(parameter.annotation)
    if dataclasses.is_dataclass(kind):
        described = dict(ATTRIBUTE.findall(inspect.getdoc(kind) or ""))
        for name in words.split():
            value, told = getattr(parameter.default, name), described.get(name, name).replace("%", "%%")
            parser.add_argument(flag(name), type=type(value), default=value, help=told)
        return
    options: dict[str, Any] = {"help": words, **dict(*more)}
    if kind is bool:
        options["action"] = "store_true"
    else:
        options["type"] = (get_args(kind) or (kind,))[0]  # `int` of `int | None` and of `Sequence[int]`
    if get_origin(kind) is Sequence:
        options["nargs"] = "+"
    if parameter.kind is not parameter.KEYWORD_ONLY:
        parser.add_argument(parameter.name, metavar=parameter.name.upper(), **options)
    elif parameter.default is parameter.empty:
        parser.add_argument(flag(parameter.name), required=True, **options)
    else:
        parser.add_argument(flag(parameter.name), default=parameter.default, **options)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def call(command: Command, given: dict[str, Any]) -> int:
    """Call a command with the values of its options, those of a spec's fields in that spec; return its exit status."""
    for name, parameter in inspect.signature(command).parameters.items():
        kind, words, *_ = get_args(parameter.annotation)
        if dataclasses.is_dataclass(kind):
            given[name] = dataclasses.replace(parameter.default, **{field: given.pop(field) for field in words.split()})
    return command(**given) or 0


def is_expected(error: Exception) -> bool:
    """Whether `error` is the package's own word on bad input, or the system's on a file, and no defect."""
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    raised_here = Path(innermost).is_relative_to(Path(__file__).parent)
    return isinstance(error, OSError) or (isinstance(error, EXPECTED_ERRORS) and raised_here)


def nobody_reads_on() -> bool:
    """Whether the output is a pipe without a reader; what is still to be printed goes nowhere then."""
    try:
        print(flush=True)
        return False
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: well. 1: a notebook failed, a run diverged, or a file is damaged. 2: bad input, or a package is missing.
    3: the GPU's memory is full. 130: stopped by hand. 141: who read the output has gone, as `head` does.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that the locale lacks is printed as ?
            stream.reconfigure(errors="replace")
    given = vars(command_line().parse_args(words))
    resume = " with --resume" if given.get("resume") is False else ""
    try:
        status = call(given.pop("command"), given)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(f"stopped; run the same command again{resume} to go on", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        status, message = 3, str(error)
    except TrainingDiverged as error:
        status, message = 1, str(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "kdig_utils"):  # a defect
            raise
        group = "cluster" if package in ("dask", "distributed") else "book,edge"
        status, message = 2, f"{package} is not installed: pip install {package}, or '.[{group}]'"
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads_on():
            return 141
        if not is_expected(error):
            raise
        status, message = 2, str(error.args[0] if isinstance(error, KeyError) else error)
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
