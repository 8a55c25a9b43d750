"""Numbers in prose: quoted from ledger, paper or scorecard and checked against it, or explained; never just typed.

Three MyST roles, for pages and for the Markdown cells of notebooks, check their number when the book is built:

- ``{ledger}`75.27 % <mean test_accuracy method=kd_ig epochs=3>` ``: a statistic of a column of the ledger;
- ``{paper}`92.5 % <headline.kd_ig_accuracy>` ``: a number of paper.json;
- ``{claim}`10.8 × <speedup>` `` or ``{claim}`not run yet <mean_kd>` ``: the paper's number of a claim, or its verdict.

Without the quoted text, as in ``{paper}`headline.kd_ig_accuracy` ``, the number is put in, and for
``{claim}`verdict <mean_kd>` `` the verdict. A notebook in Colab shows the role as it is typed: there, quote the number.
"""

import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pandas as pd

from kdig_utils.analysis import claims, verdicts
from kdig_utils.analysis.comparisons import mixed
from kdig_utils.analysis.scorecard_text import written
from kdig_utils.experiments.ledger import NUMBER_COLUMNS
from kdig_utils.paths import repository_root

STATISTICS = ("mean", "min", "max", "std", "count")
NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?")
# 10.0 % to 99.99 %, "per cent" as well, and two decimals without a unit, as accuracies are written in a table.
ACCURACY = re.compile(r"(?<![\w.,:/])[1-9]\d\.(?:\d{1,2}(?=[\s\\,~]*(?:%|per cent\b|percent\b))|\d\d(?![\w.]))")
FENCE = re.compile(r"^\s*(?P<marks>`{3,}|~{3,}|:{3,})(?P<rest>.*)$")
CODE_DIRECTIVES = ("code", "code-block", "code-cell", "eval-rst", "literalinclude", "math", "raw")
INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
GENERATED = re.compile(r"<!-- (\w+):begin -->.*?<!-- \1:end -->|<!--.*?-->", re.DOTALL)

# Accuracies that are typed on purpose, by page, with the reason.
ALLOWED: dict[str, dict[str, str]] = {
    "notebooks/01_teacher.ipynb": {"92.0": "invented for an exercise"},
    "notebooks/16_scorecard.ipynb": {"92.1": "invented for an exercise"},
}


class Contradiction(ValueError):
    """Prose quotes what its source does not say; the message names both."""


def quoted(role: str, text: str, ledger: pd.DataFrame, verdict_of: Callable[[], pd.Series]) -> str:
    """What a role shows: its quoted text if that is true, or the number itself if nothing was quoted.

    Args:
        role: `ledger`, `paper` or `claim`.
        text: what stands in the role: `quote <source>`, or the source alone.
        ledger: as `Ledger.read()` returns it.
        verdict_of: gives the verdict of each claim by its name; called only if one is quoted.

    Raises:
        Contradiction: the source says something else, or there is no such source.
    """
    found = re.fullmatch(r"(?P<quote>.+?)\s*<(?P<source>[^<>]+)>", text.strip(), re.DOTALL)
    quote, source = (found["quote"], found["source"]) if found else ("", text.strip())
    try:
        if role == "claim" and quote in ("verdict", *verdicts.VERDICTS):
            return _same_verdict(quote, source, verdict_of())
        value, unit = _value(role, source, ledger)
    except (KeyError, ValueError) as error:
        raise Contradiction(f"{{{role}}}`{text}`: {error.args[0]}") from error
    if not quote:
        return written(value, unit) if unit is not None else f"{round(value, 2):,.10g}"
    if not agrees(quote, value):
        raise Contradiction(f"{{{role}}}`{text}`: the prose says {quote}, the {role} says {value:.6g}")
    return quote


def _value(role: str, source: str, ledger: pd.DataFrame) -> tuple[float, str | None]:
    if role == "ledger":
        return statistic(ledger, source), None
    if role == "claim":
        claim = _claim(source)
        return claim.claimed, claim.unit
    found = claims.lookup(source)
    if not isinstance(found, int | float):
        raise ValueError(f"{source} in paper.json is no number: give the path of one")
    return found, None


def _claim(name: str) -> claims.Claim:
    for claim in claims.claims():
        if claim.name == name:
            return claim
    raise KeyError(f"there is no claim {name!r}: take a name from claims.yml")


def _same_verdict(quote: str, name: str, its: pd.Series) -> str:
    found = its[_claim(name).name]
    if quote not in ("verdict", found):
        raise ValueError(f"the prose says {quote}, the scorecard says {found}")
    return found


def agrees(quote: str, value: float) -> bool:
    """Whether the first number in `quote` is `value`, rounded to the decimals that are quoted."""
    if (found := NUMBER.search(quote)) is None:
        return False
    typed = found.group().replace(",", "").replace("−", "-")
    decimals = len(typed.partition(".")[2])
    return abs(float(typed) - value) <= 0.5 * 10.0**-decimals * (1 + 1e-9)


def statistic(ledger: pd.DataFrame, query: str) -> float:
    """A number of the ledger: `mean test_accuracy method=kd_ig k=5 epochs=3`.

    Args:
        ledger: as `Ledger.read()` returns it.
        query: one of `STATISTICS`, a column, and any conditions on columns or fields of the spec.

    Raises:
        ValueError: no such statistic, column or run; or runs with different settings, which no mean may mix.
    """
    kind, column, *conditions = query.split() if len(query.split()) > 1 else (query, "")
    if kind not in STATISTICS or column not in NUMBER_COLUMNS:
        raise ValueError(f"{query!r} should start with one of {', '.join(STATISTICS)} and a column with numbers")
    runs = ledger
    for condition in conditions:
        runs = runs[_holds(runs, condition)]
    if kind == "count":
        return float(runs[column].count())
    if runs.empty:
        raise ValueError(f"the ledger has no run with {' '.join(conditions)}")
    if several := _mixed_settings(runs):
        raise ValueError(f"{query!r} mixes runs with different {several[0]}: say which, as {several[0]}=…")
    return float(runs[column].astype(float).agg(kind))


def _mixed_settings(runs: pd.DataFrame) -> list[str]:
    """What differs between runs besides the seed: a number over several settings is no result."""
    columns = ("method", "train_images", "test_images", "data_md5")
    return [*(name for name in columns if runs[name].nunique() > 1), *mixed(runs)]


def _holds(runs: pd.DataFrame, condition: str) -> pd.Series:
    name, equals, wanted = condition.partition("=")
    if not equals:
        raise ValueError(f"the condition {condition!r} is not of the form name=value")
    values = runs[name] if name in runs.columns else runs["spec"].map(lambda spec: json.loads(spec).get(name))
    return values.map(lambda value: _same(value, wanted)).astype(bool)


def _same(value: object, wanted: str) -> bool:
    try:
        return float(value) == float(wanted)
    except (TypeError, ValueError):
        return str(value) == wanted


# Accuracies that nobody checks


def pages(root: Path | None = None) -> list[Path]:
    """The files with prose: README, the pages of the book, the notebooks."""
    root = root or repository_root()
    found = [root / "README.md", *sorted(root.glob("book/*.md")), *sorted(root.glob("notebooks/*.ipynb"))]
    return [path for path in found if path.is_file()]


def unexplained(path: Path, root: Path | None = None) -> list[str]:
    """The accuracies of a page that are typed and neither checked, nor the paper's, nor allowed: one message each."""
    name = path.relative_to(root or repository_root()).as_posix()
    known = ALLOWED.get(name, {})
    return [
        f"{name}, {place}: {number} is typed; quote it with a role, compute it in a cell, or allow it in prose.ALLOWED"
        for place, markdown in texts(path)
        for number in typed_accuracies(markdown)
        if number not in known and float(number) not in paper_numbers()
    ]


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """The Markdown of a page, or of each Markdown cell of a notebook, with the place where it stands."""
    if path.suffix != ".ipynb":
        yield "text", path.read_text(encoding="utf-8")
        return
    for place, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "markdown":
            yield f"cell {place}", "".join(cell["source"])


def typed_accuracies(markdown: str) -> list[str]:
    """Numbers that look like an accuracy in per cent, outside code, roles, comments and generated tables."""
    return ACCURACY.findall(INLINE_CODE.sub(" ", "\n".join(_prose_lines(GENERATED.sub("", markdown)))))


def _prose_lines(markdown: str) -> Iterator[str]:
    """Lines outside code blocks; title and content of a directive, as an admonition, are prose."""
    open_fences: list[tuple[str, bool]] = []  # marks, and whether code is between them
    for line in markdown.splitlines():
        marks, info = FENCE.match(line).groups() if FENCE.match(line) else ("", "")
        within, in_code = open_fences[-1] if open_fences else ("", False)
        if within and marks.startswith(within) and not info.strip():
            open_fences.pop()
        elif marks and not in_code:
            open_fences.append((marks, _opens_code(marks, info.strip())))
            yield "" if open_fences[-1][1] else info
        elif not in_code:
            yield line


def _opens_code(marks: str, info: str) -> bool:
    directive = re.match(r"\{([\w-]+)\}", info)
    return directive[1] in CODE_DIRECTIVES if directive else not marks.startswith(":")


@cache
def paper_numbers() -> frozenset[float]:
    """All numbers in paper.json."""
    return frozenset(float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", json.dumps(claims.paper())))
