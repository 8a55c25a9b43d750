"""What a figure or a claim rests on, in one vocabulary for the whole book. Kinds are named, and never pooled."""

import json
from collections.abc import Collection, Iterable

import pandas as pd

from kdig_utils.experiments import brief
from kdig_utils.experiments.ledger import student_spec
from kdig_utils.method.spec import RunSpec

COUNTED = "counted"  # computed from an architecture, a formula or a simulation: no network was trained for it
PAPER = "the paper's runs, analysed again"
RELEASED = "released networks, measured here"
TRAINED = "trained here at the paper's settings"
PROTOCOL = "trained here, another protocol"  # always with its name behind it
TIMED = "timed here"
NOT_RUN = "not run yet"
KINDS = (COUNTED, PAPER, RELEASED, TRAINED, PROTOCOL, TIMED, NOT_RUN)
TEACHER_EPOCHS = 100
TRAIN_IMAGES = 50_000
PREFIX = f"{PROTOCOL}: "
# Fields of a spec that a claim names itself or that change no result by intent; all others must be the paper's, which
# are RunSpec's defaults: a field added later is compared as well.
FREE_FIELDS = ("k", "pairing", "train_fraction")
COUNTED_FIELDS = {  # how these fields are told; the others by their names
    "epochs": "{} epochs in place of {}",
    "n_steps": "{} steps of Integrated Gradients in place of {}",
}


def protocol(name: str) -> str:
    """The kind of what was trained here in another way than the paper's, with the name of that way."""
    return f"{PREFIX}{name}"


def protocol_in(kind: str) -> str:
    """The name of the protocol in a kind of evidence; empty in all other kinds."""
    return kind.partition(PREFIX)[2]


def in_order(kinds: Iterable[str]) -> list[str]:
    """Kinds in the order of the vocabulary, each once; protocols by their names, each a kind of its own."""
    places = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(set(kinds), key=lambda kind: (places[PROTOCOL if protocol_in(kind) else kind], kind))


def check(kind: str) -> None:
    """Raise ValueError unless `kind` is in the vocabulary; a protocol needs its name."""
    if not protocol_in(kind).strip() and (kind not in KINDS or kind == PROTOCOL):
        raise ValueError(f"{kind!r} is no kind of evidence: use one of {'; '.join(KINDS)}; a protocol with its name")


def in_words(kinds: str | Iterable[str]) -> str:
    """One kind, or several side by side, each once, as captions and tables name them.

    Raises:
        ValueError: none is given, or one is not in the vocabulary.
    """
    named = list(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds))
    for kind in named or [""]:
        check(kind)
    return " · ".join(named)


def of_runs(rows: pd.DataFrame) -> list[str]:
    """The kinds of evidence that these rows of the ledger are, each once: `not run yet` if there is none."""
    kinds = [_of_run(run) for _index, run in rows.iterrows()]
    return list(dict.fromkeys(kinds)) or [NOT_RUN]


def _of_run(run: pd.Series) -> str:
    budget = f"{run['epochs']:.0f} epoch{'s' if run['epochs'] != 1 else ''}"
    if run["method"] == "teacher":
        spec = json.loads(run["spec"])
        continued, other = bool(spec.get("initial_sha256")), bool(spec.get("recipe"))
        words = f"{budget} of the teacher{' after earlier ones' * continued}{', by a recipe of its own' * other}"
        return TRAINED if run["epochs"] >= TEACHER_EPOCHS and not continued and not other else protocol(words)
    spec = student_spec(run)
    own = brief.NAME if brief.setting_of(spec) else ""
    fewer = run["train_images"] < round(TRAIN_IMAGES * run["train_fraction"])
    named = [
        own or (budget if run["epochs"] != RunSpec.epochs else ""),
        f"{run['train_images']:,.0f} images" if fewer else "",
        unlike(spec, ignoring=["epochs", "sample_seed", *(("schedule", *brief.Setting._fields) if own else ())]),
    ]
    return protocol("; ".join(filter(None, named))) if any(named) else TRAINED


def unlike(spec: RunSpec, wanted: RunSpec | None = None, ignoring: Collection[str] = ()) -> str:
    """The fields of a student's spec that are not as wanted, by default as the paper's, in words; empty if none.

    Those that a claim names itself and those in `ignoring` are left out.
    """
    ours, theirs = (each.setting(*FREE_FIELDS, *ignoring) for each in (spec, wanted or RunSpec(spec.method)))
    return "; ".join(
        COUNTED_FIELDS.get(name, f"{name.replace('_', ' ')} {{}} in place of {{}}").format(value, theirs[name])
        for name, value in ours.items()
        if value != theirs[name]
    )
