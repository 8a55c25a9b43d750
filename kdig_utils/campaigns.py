"""Campaigns: the lists of runs behind the paper's tables, and the packs in which finished runs travel.

A campaign is a list of specs. Its rows are found in the ledger by their specs, whichever campaign trained them first:
the seeds that two campaigns share are trained once.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from kdig_utils import models
from kdig_utils.overlay import PAIRINGS
from kdig_utils.paths import explaining, replacing
from kdig_utils.runs import MAIN_METHODS, METHODS, Ledger, RunSpec, of_one_teacher, spec_of

SEEDS = 10
COMPRESSION_SEEDS = 5
RESAMPLES = 60
RESAMPLED_METHODS = ("student", "kd", "kd_ig", "kd_ig_at")
COMPONENT_SEEDS = 3
COMPONENT_DRAWS = 12
PRECISION_SEEDS = 3
PACK_BYTES = 16_000_000  # what a machine that is lent for minutes lets out in one file,
PACK_MOST_BYTES = 60_000_000  # and in all files together


class Pack(NamedTuple):
    """What `pack` wrote.

    Attributes:
        pieces: the files of the archive, in order.
        left_out: files for which there was no room.
    """

    pieces: list[Path]
    left_out: list[Path]


def ablation() -> list[RunSpec]:
    """Eight methods, ten seeds, k = 5: the paper's settings, each map with its own image."""
    return [RunSpec(method, seed=seed) for seed in range(SEEDS) for method in METHODS]


def pairing() -> list[RunSpec]:
    """The same with shuffled signals, as the released scripts have them.

    `student` uses no signals: its runs are those of the ablation.
    """
    return _shuffled(ablation())


def _shuffled(specs: list[RunSpec]) -> list[RunSpec]:
    return [dataclasses.replace(spec, pairing="shuffled") for spec in specs if spec.uses_teacher]


def compression() -> list[RunSpec]:
    """Eight sizes of the student, four methods, five seeds, each map with its own image."""
    return [
        RunSpec(method, k=k, seed=seed)
        for seed in range(COMPRESSION_SEEDS)
        for k in models.REMOVABLE_BLOCKS
        for method in MAIN_METHODS
    ]


def compression_pairing() -> list[RunSpec]:
    """The sizes with shuffled signals, as the released scripts have them."""
    return _shuffled(compression())


def monte_carlo() -> list[RunSpec]:
    """Four methods on sixty stratified draws of 80 % of the training images."""
    return [RunSpec(method, seed=seed, train_fraction=0.8) for seed in range(RESAMPLES) for method in RESAMPLED_METHODS]


def monte_carlo_pairing() -> list[RunSpec]:
    """The sixty draws with shuffled signals, as the released scripts have them."""
    return _shuffled(monte_carlo())


def alignment() -> list[RunSpec]:
    """The controls of the alignment laboratory, k = 5: what is blended in, and what the teacher is asked about.

    `matched`, `shuffled` and no overlay at all are in the ablation and in pairing.
    """
    blended = [
        RunSpec(method, seed=seed, pairing=control)
        for seed in range(SEEDS)
        for method in ("ig", "kd_ig")
        for control in PAIRINGS
        if control not in ("matched", "shuffled")
    ]
    asked = [RunSpec("kd", seed=seed, answers="online") for seed in range(SEEDS)]
    return sorted(blended + asked, key=lambda spec: spec.seed)


def components() -> list[RunSpec]:
    """Each of twelve draws of images trained with each of three seeds: which of the two moves the accuracy."""
    return [
        RunSpec("kd_ig", seed=seed, sample_seed=draw, train_fraction=0.8)
        for seed in range(COMPONENT_SEEDS)
        for draw in range(COMPONENT_DRAWS)
    ]


def answers(alpha: float, temperature: float) -> list[RunSpec]:
    """Stored, shuffled and online answers where distillation is heard: at the setting that validation prefers."""
    ways = ({"pairing": "matched"}, {"pairing": "shuffled"}, {"answers": "online"})
    return [
        RunSpec("kd", seed=seed, alpha=alpha, temperature=temperature, **way) for seed in range(SEEDS) for way in ways
    ]


def precision() -> list[RunSpec]:
    """The control of the engine: the first seeds of two methods of the ablation again, in float32."""
    return [
        RunSpec(method, seed=seed, precision="float32")
        for seed in range(PRECISION_SEEDS)
        for method in ("student", "kd_ig")
    ]


CAMPAIGNS: dict[str, Callable[[], list[RunSpec]]] = {
    "ablation": ablation,
    "pairing": pairing,
    "compression": compression,
    "compression-pairing": compression_pairing,
    "monte-carlo": monte_carlo,
    "monte-carlo-pairing": monte_carlo_pairing,
    "alignment": alignment,
    "components": components,
    "precision": precision,
}


def specs(name: str) -> list[RunSpec]:
    """The runs of a campaign, seeds outermost, so that a part of it is balanced.

    Raises:
        ValueError: unknown campaign.
    """
    if name not in CAMPAIGNS:
        raise ValueError(f"unknown campaign {name!r}: choose one of {', '.join(CAMPAIGNS)}")
    return CAMPAIGNS[name]()


def rows(ledger: pd.DataFrame, name: str) -> pd.DataFrame:
    """The ledger rows that belong to a campaign: those with its settings, of the teacher that most of these have."""
    return rows_of(ledger, specs(name))


def rows_of(ledger: pd.DataFrame, wanted: Iterable[RunSpec]) -> pd.DataFrame:
    """The rows with the settings of these specs, of the teacher that most of them have, whatever data they had."""
    run_ids = {spec.run_id for spec in wanted}
    belongs = [_bare(row) in run_ids for _index, row in ledger.iterrows()]
    found = ledger[pd.Series(belongs, index=ledger.index, dtype=bool)]
    return of_one_teacher(found).reset_index(drop=True)


def main_runs(ledger: pd.DataFrame) -> pd.DataFrame:
    """The students that stand for the study: the paper's settings at k = 5, one number of epochs and one teacher.

    Whichever campaign trained them. Of several numbers of epochs the one at which most of `MAIN_METHODS` were run, and
    of those the largest; of several teachers the one with the most students.
    """
    students = ledger[ledger["method"] != "teacher"]
    belongs = [_has_main_settings(spec_of(row)) for _index, row in students.iterrows()]
    alike = students[pd.Series(belongs, index=students.index, dtype=bool)]
    budgets = (of_one_teacher(runs) for _epochs, runs in alike.groupby("epochs"))
    return max(budgets, key=_completeness, default=alike).reset_index(drop=True)


def _has_main_settings(spec: RunSpec) -> bool:
    free = {"seed": 0, "epochs": RunSpec.epochs, "n_steps": RunSpec.n_steps, "teacher_sha256": "", "data_md5": ""}
    return dataclasses.replace(spec, **free) == RunSpec(spec.method)


def _completeness(runs: pd.DataFrame) -> tuple[int, int]:
    return len(set(runs["method"]) & set(MAIN_METHODS)), int(runs["epochs"].max())


def bare_run_ids(ledger: pd.DataFrame) -> set[str]:
    """The identities that the ledger's students would have without teacher and data: those of a campaign's specs."""
    return {_bare(row) for _index, row in ledger.iterrows()} - {""}


def _bare(row: pd.Series) -> str:
    if row["method"] == "teacher":
        return ""
    return dataclasses.replace(spec_of(row), teacher_sha256="", data_md5="").run_id


def progress(ledger: pd.DataFrame) -> pd.DataFrame:
    """What is done of each campaign: columns campaign, runs, done, left, hours (of the runs left, at the pace so far).

    A run takes what the campaign's own runs took, or those of the ledger with as many epochs, each on its device;
    `hours` is NaN where there is no such run yet.
    """
    lines = []
    for name in CAMPAIGNS:
        wanted, done = specs(name), rows(ledger, name)
        alike = done if len(done) else ledger[ledger["epochs"] == wanted[0].epochs].query("method != 'teacher'")
        left = len(wanted) - done["run_id"].nunique()
        hours = 0.0 if not left else left * alike["seconds"].astype(float).mean() / 3600
        lines.append({"campaign": name, "runs": len(wanted), "done": len(wanted) - left, "left": left, "hours": hours})
    return pd.DataFrame(lines)


def pack(ledger: Ledger, run_ids: Iterable[str], files: Iterable[Path], folder: Path, name: str) -> Pack:
    """Write rows and files into a tar archive, cut into pieces of at most 16 MB: `NAME.tar.00`, `NAME.tar.01`, …

    A list of SHA-256 and the rows come first; `files`, each with its folder's name (`curves/…csv`,
    `weights/…safetensors`, `checkpoints/…pt`), follow in their order; one that 60 MB cannot hold is left out, and so is
    one that is gone by now. A pack of the same name makes way for the new one, which should hold its runs too.
    """
    table = ledger.read()
    members = {"runs.csv": table[table["run_id"].isin(set(run_ids))].to_csv(index=False).encode()}
    left_out, size = [], len(members["runs.csv"])
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # a run that ended meanwhile has no checkpoint any more
            content = path.read_bytes()
            if size + len(content) > PACK_MOST_BYTES:
                left_out.append(path)
            else:
                members[f"{path.parent.name}/{path.name}"] = content
                size += len(content)
    return Pack(_write_pieces(_archive(members), folder, name), left_out)


def _write_pieces(content: bytes, folder: Path, name: str) -> list[Path]:
    """Write all pieces beside the old ones, then put them in their places: a kill leaves an old pack or a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(content), PACK_BYTES)
    pieces = [folder / f"{name}.tar.{number:02d}" for number in range(len(starts))]
    parts = [piece.with_name(f".{piece.name}.part") for piece in pieces]
    with explaining(pieces[0]):
        for part, start in zip(parts, starts, strict=True):
            part.write_bytes(content[start : start + PACK_BYTES])
        for part, piece in zip(parts, pieces, strict=True):
            os.replace(part, piece)
    for path in {*folder.glob(f"{name}.tar.*"), *folder.glob(f".{name}.tar.*.part")} - set(pieces):
        path.unlink()  # of a larger pack that stood here before
    return pieces


def unpack(pieces: Iterable[Path], ledger: Ledger, folders: dict[str, Path]) -> list[str]:
    """Put a pack's files into `folders` and its rows into the ledger, files first; what is there already stays.

    Only a checkpoint is replaced: the machine that the pack comes from went on from ours.

    Args:
        pieces: all pieces of one pack.
        folders: where the files go, by the name of their folder in the pack.

    Returns:
        The identities of the runs whose rows were added.

    Raises:
        ValueError: a piece is missing or damaged; nothing was written then.
    """
    members = _members(b"".join(path.read_bytes() for path in sorted(pieces)))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "runs.csv").write_bytes(members.pop("runs.csv"))
        table = Ledger(Path(folder) / "runs.csv").read()
    for name, data in members.items():
        folder, file = name.split("/")
        path = folders[folder] / Path(file).name
        if folder == "checkpoints" or not path.exists():
            with replacing(path) as part:
                part.write_bytes(data)
    return ledger.merge(table)


def _archive(members: dict[str, bytes]) -> bytes:
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in {"sha256.json": json.dumps(hashes).encode(), **members}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _members(content: bytes) -> dict[str, bytes]:
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the pack is not whole ({error}): give all its pieces, .00 and on") from error
    hashes = json.loads(members.pop("sha256.json", b"{}"))
    known = re.compile(
        r"runs\.csv|(?:curves|weights|checkpoints)/[0-9a-f]{12}\.(?:csv|safetensors|pt)"
        r"|(?:flights|first_calls)/[\w.-]+\.(?:log|json|csv)"
    )
    if "runs.csv" not in members or not all(map(known.fullmatch, members)):
        raise ValueError("this is not a pack of runs: give the files that `campaign --pack` wrote")
    if damaged := [name for name in hashes if hashlib.sha256(members.get(name, b"")).hexdigest() != hashes[name]]:
        raise ValueError(f"the pack is not whole ({damaged[0]} is damaged): bring its pieces over again")
    return members
