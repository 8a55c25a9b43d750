"""Packs, in which finished runs travel: rows, curves and weights in a tar archive, in pieces that a host lets out."""

import contextlib
import hashlib
import io
import json
import re
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from kdig_utils.experiments import checkpoints
from kdig_utils.experiments.ledger import Ledger
from kdig_utils.method import artifacts, models
from kdig_utils.paths import replacing

PACK_BYTES = 16_000_000  # what a machine that is lent for minutes lets out in one file,
PACK_MOST_BYTES = 60_000_000  # and in all files together
UNPACK_MOST_BYTES = 2 * PACK_MOST_BYTES  # what is no pack of any version
WEIGHTS_SEEDS = 3  # of each method whose weights go home: enough for an interval over seeds
SUFFIXES = {"curves": "csv", "weights": "safetensors", "checkpoints": "pt"}  # of the files that a run has
MEMBERS = re.compile(r"runs\.csv|(curves|weights|checkpoints|flights|first_calls)/\w[\w.-]*")  # and nothing elsewhere


class Pack(NamedTuple):
    """What `pack` wrote: the pieces of the archive, in order, and the files for which there was no room."""

    pieces: list[Path]
    left_out: list[Path]


def belongings(rows: pd.DataFrame, folders: Mapping[str, Path]) -> list[Path]:
    """What goes home with these rows: curves, weights of teachers and of first seeds, checkpoints of open runs.

    What matters most comes first, as a pack may be full before its end: an open run can be trained again.
    """
    teachers, students = rows[rows["method"] == "teacher"], rows[rows["method"] != "teacher"]
    first = students[students["seed"].astype(int) < WEIGHTS_SEEDS].sort_values("seed", kind="stable")
    wanted = {"curves": rows["run_id"], "weights": [*teachers["run_id"], *first["run_id"]]}
    paths = [folders[kind] / f"{run_id}.{SUFFIXES[kind]}" for kind, run_ids in wanted.items() for run_id in run_ids]
    # A teacher's checkpoint is the largest, and what all students wait for.
    still_open = [path for path in folders["checkpoints"].glob("*.pt") if path.stem not in set(rows["run_id"])]
    paths += sorted(still_open, key=lambda path: -path.stat().st_size)
    return [path for path in paths if path.is_file()]


def pack(rows: pd.DataFrame, files: Iterable[Path], folder: Path, name: str) -> Pack:
    """Write ledger rows and files into a tar archive, cut into pieces of at most 16 MB: `NAME.tar.00`, `NAME.tar.01`, …

    A list of SHA-256 and the rows come first; `files`, each with its folder's name (`curves/…csv`,
    `weights/…safetensors`, `checkpoints/…pt`), follow in their order; one that 60 MB cannot hold is left out, and so is
    one that is gone by now. A pack of the same name makes way for the new one, which should hold its runs too.
    """
    members = {"runs.csv": rows.to_csv(index=False).encode()}
    left_out = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # a run that ended meanwhile has no checkpoint any more
            content = path.read_bytes()
            if len(content) + sum(map(len, members.values())) > PACK_MOST_BYTES:
                left_out.append(path)
            else:
                members[f"{path.parent.name}/{path.name}"] = content
    hashes = {member: hashlib.sha256(content).hexdigest() for member, content in members.items()}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for member, content in {"sha256.json": json.dumps(hashes).encode(), **members}.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return Pack(_write_pieces(archive.getvalue(), folder, name), left_out)


def unpack(pieces: Iterable[Path], ledger: Ledger, folders: dict[str, Path]) -> list[str]:
    """Put a pack's files into `folders` and its rows into the ledger, files first; what is there already stays.

    Only a checkpoint is replaced, by one that is further, and weights that are not those of their row.

    Args:
        pieces: all pieces of one pack.
        folders: where the files go, by the name of their folder in the pack.

    Returns:
        The identities of the runs whose rows were added.

    Raises:
        ValueError: a piece is missing or damaged, a row is no ledger's, or weights are not those of their row; nothing
            was written then.
    """
    pieces = sorted(pieces)
    if sum(path.stat().st_size for path in pieces) > UNPACK_MOST_BYTES:
        raise ValueError(f"{pieces[0]} and the others are too large for a pack: give the pieces of one pack")
    members = _members(b"".join(path.read_bytes() for path in pieces))
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "runs.csv").write_bytes(members.pop("runs.csv"))
        table = Ledger(Path(scratch) / "runs.csv").read()
    hashes = {
        run_id: sha for rows in (table, ledger.read()) for run_id, sha in rows[["run_id", "weights_sha256"]].to_numpy()
    }
    to_write = {folders[name.split("/")[0]] / name.split("/")[1]: data for name, data in members.items()}
    for path, data in to_write.items():
        if path.suffix == ".safetensors" and not _is_of_row(data, path, hashes):
            raise ValueError(f"the pack's weights of run {path.stem} are not those of its row: pack them again")
    for path, data in to_write.items():
        if _is_wanted(path, data, hashes):
            with replacing(path) as part:
                part.write_bytes(data)
    return ledger.merge(table)


def _is_of_row(weights: bytes, path: Path, hashes: Mapping[str, str]) -> bool:
    """Whether the weights are those that the run's row names, if there is one and it names any."""
    if not (named := hashes.get(path.stem)):
        return True
    with contextlib.suppress(ValueError):
        return models.state_sha256(artifacts.state_of(weights, path)) == named
    return False


def _is_wanted(path: Path, data: bytes, hashes: Mapping[str, str]) -> bool:
    """Whether a file of a pack is missing here, or better than the one that is here."""
    if path.suffix == ".pt":
        here = _progress(path.read_bytes()) if path.is_file() else ()
        return path.stem not in hashes and _progress(data) > here
    return not path.is_file() or (path.suffix == ".safetensors" and not _is_of_row(path.read_bytes(), path, hashes))


def _progress(checkpoint: bytes) -> tuple[int, ...]:
    """Epochs and images that are done; of a damaged checkpoint none."""
    with contextlib.suppress(ValueError):
        content = checkpoints.read(checkpoint)
        return content["epoch"], content["position"]
    return ()


def _write_pieces(content: bytes, folder: Path, name: str) -> list[Path]:
    """Write all pieces beside the old ones, then put them in their places: a kill leaves an old pack or a new one."""
    starts = range(0, len(content), PACK_BYTES)
    pieces = [folder / f"{name}.tar.{number:02d}" for number in range(len(starts))]
    with contextlib.ExitStack() as all_written:
        for piece, start in zip(pieces, starts, strict=True):
            part = all_written.enter_context(replacing(piece))
            part.write_bytes(content[start : start + PACK_BYTES])
    for path in {*folder.glob(f"{name}.tar.*"), *folder.glob(f".{name}.tar.*.part")} - set(pieces):
        path.unlink()  # of a larger pack that stood here before
    return pieces


def _members(content: bytes) -> dict[str, bytes]:
    """The files of an archive, each once, with its SHA-256 in `sha256.json`; nothing is ever expanded."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            listed = archive.getmembers()
            names = [member.name for member in listed]
            if not all(member.isfile() and not member.issparse() for member in listed) or len({*names}) < len(names):
                raise ValueError("this is not a pack of runs: it holds links, sparse files or a file twice")
            members = {member.name: file.read() for member in listed if (file := archive.extractfile(member))}
        hashes = json.loads(members.pop("sha256.json", b"{}"))
    except (tarfile.TarError, EOFError, json.JSONDecodeError, UnicodeError) as error:
        raise ValueError(f"the pack is not whole ({error}): give all its pieces, .00 and on") from error
    if "runs.csv" not in members or not all(map(MEMBERS.fullmatch, members)):
        raise ValueError("this is not a pack of runs: give the files that `campaign --pack` wrote")
    found = {name: hashlib.sha256(data).hexdigest() for name, data in members.items()}
    if hashes != found:
        told = hashes if isinstance(hashes, dict) else {}
        damaged = next((name for name in found if told.get(name) != found[name]), "sha256.json")
        raise ValueError(f"the pack is not whole ({damaged} is damaged): bring its pieces over again")
    return members
