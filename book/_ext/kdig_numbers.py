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
from collections.abc import Callable

import pandas as pd

from kdig_utils.analysis import claims, verdicts
from kdig_utils.analysis.comparisons import mixed
from kdig_utils.analysis.scorecard import written
from kdig_utils.experiments.ledger import NUMBER_COLUMNS

STATISTICS = ("mean", "min", "max", "std", "count")
NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?")


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
            verdict = verdict_of()[_claim(source).name]
            if quote not in ("verdict", verdict):
                raise ValueError(f"the prose says {quote}, the scorecard says {verdict}")
            return verdict
        value, shown = _value(role, source, ledger)
        if quote and not agrees(quote, value):
            raise ValueError(f"the prose says {quote}, the {role} says {value:.6g}")
    except (KeyError, ValueError) as error:
        raise Contradiction(f"{{{role}}}`{text}`: {error.args[0]}") from error
    return quote or shown


def _value(role: str, source: str, ledger: pd.DataFrame) -> tuple[float, str]:
    """The number, and how it is written."""
    if role == "claim":
        claim = _claim(source)
        return claim.claimed, written(claim.claimed, claim.unit)
    value = statistic(ledger, source) if role == "ledger" else claims.lookup(source)
    if not isinstance(value, int | float):
        raise ValueError(f"{source} in paper.json is no number: give the path of one")
    return value, f"{round(value, 2):,.10g}"


def _claim(name: str) -> claims.Claim:
    for claim in claims.claims():
        if claim.name == name:
            return claim
    raise KeyError(f"there is no claim {name!r}: take a name from claims.yml")


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
    alike = ("method", "train_images", "test_images", "data_md5")
    if several := [*(name for name in alike if runs[name].nunique() > 1), *mixed(runs)]:
        raise ValueError(f"{query!r} mixes runs with different {several[0]}: say which, as {several[0]}=…")
    return float(runs[column].astype(float).agg(kind))


def _holds(runs: pd.DataFrame, condition: str) -> pd.Series:
    name, equals, wanted = condition.partition("=")
    if not equals:
        raise ValueError(f"the condition {condition!r} is not of the form name=value")
    values = runs[name] if name in runs.columns else runs["spec"].map(lambda spec: json.loads(spec).get(name))
    numbers = pd.to_numeric(values, errors="coerce")
    return (values.astype(str) == wanted) | (numbers == pd.to_numeric(wanted, errors="coerce"))
