"""The queue as a table: what is done of it, how long the rest takes, and which claims each group settles."""

import itertools

import pandas as pd

from kdig_utils.analysis.claims import ACCURACY_MEASURES, Claim, claims
from kdig_utils.experiments import brief, teachers
from kdig_utils.experiments.ledger import spec_of
from kdig_utils.experiments.queue import Group, Scale, groups, images_of, is_measured, speed
from kdig_utils.method import artifacts
from kdig_utils.method.spec import RunSpec


def plan(ledger: pd.DataFrame, scaled: Scale = lambda spec: spec, teacher_sha256: str | None = None) -> pd.DataFrame:
    """The queue as a table: columns stage, group, runs, done, left, seconds, settles.

    `seconds` is what the runs left take on a GPU, one after the other: at the speed that the ledger's GPU runs had, or,
    without any, at the floor of their memory traffic (`speed`). `settles` names the claims whose last run, of the
    direct replication, is in the group.

    Args:
        scaled: how the study of this ledger measures a spec, `Study.scaled`.
        teacher_sha256: whose students count as done; None takes the best published teacher.
    """
    if teacher_sha256 is None:
        teacher_sha256 = artifacts.manifest().get(teachers.best(), {}).get("weights_sha256", "")
    ours = ledger[ledger["teacher_sha256"].fillna("").isin(["", teacher_sha256])]
    done, seconds_an_image = {spec_of(row).bare_id for _index, row in ours.iterrows()}, speed(ledger)
    setting = brief.chosen(ledger, scaled)
    queue = groups(setting)
    settled = settles(queue, setting)
    lines = []
    for group in queue:
        left = [spec for spec in map(scaled, group.specs) if spec.run_id not in done]
        seconds = sum(spec.epochs * images_of(spec) * seconds_an_image(spec) for spec in left)
        counts = {"runs": len(group.specs), "done": len(group.specs) - len(left), "left": len(left)}
        names = ", ".join(settled.get(group.name, ()))
        lines.append({"stage": group.stage, "group": group.name, **counts, "seconds": seconds, "settles": names})
    return pd.DataFrame(lines)


def stages(table: pd.DataFrame) -> pd.DataFrame:
    """The same, a line a stage: stage, runs, done, left, seconds, claims (how many it settles)."""
    table = table.assign(claims=[len(names.split(", ")) if names else 0 for names in table["settles"]])
    sums = table.groupby("stage", sort=False)[["runs", "done", "left", "seconds", "claims"]].sum()
    return sums.reset_index()


def needed(claim: Claim, setting: brief.Setting) -> set[RunSpec]:
    """The runs of the direct replication that a claim about students waits for; empty for any other claim."""
    if claim.measure not in (*ACCURACY_MEASURES, "map_similarity") or "teacher" in claim.methods:
        return set()
    own, share = str(claim.settings["pairing"]), float(str(claim.settings.get("train_fraction", 1.0)))
    found = set()
    for method, seed in itertools.product(claim.methods, range(claim.seeds)):
        pairing = RunSpec.pairing if method == "student" else own
        if claim.protocol == brief.NAME:
            found.add(brief.spec(method, seed, setting, pairing=pairing))
        else:
            found.add(RunSpec(method, claim.k, seed, pairing=pairing, train_fraction=share))
    return found


def settles(queue: list[Group], setting: brief.Setting) -> dict[str, list[str]]:
    """The claims that each group of the queue settles, by its name: those whose last run stands in it.

    Args:
        setting: that of the brief protocol in this queue.
    """
    place = {spec: number for number, group in enumerate(queue) for spec in group.specs}
    found: dict[str, list[str]] = {}
    for claim in claims():
        runs = needed(claim, setting)
        if runs and runs <= place.keys():
            found.setdefault(queue[max(place[spec] for spec in runs)].name, []).append(claim.name)
    return found


def progress_lines(ledger: pd.DataFrame) -> list[str]:
    """A line a stage of the queue: what is done, how long the rest takes, how many claims it settles."""
    known = "as measured" if is_measured(ledger) else "by the floor of a GPU's memory"
    return [
        f"{row.stage}: {row.done} of {row.runs} runs done"
        + (f", about {row.seconds / 60:.0f} min left {known}" if row.left else "")
        + (f"; settles {row.claims} claims" if row.claims else "")
        for row in stages(plan(ledger)).itertuples()
    ]
