"""What `under_fire` attacks, by public functions: tiny trainings, the ledger, published networks, packs, signals."""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fire_processes import Say

from kdig_utils.experiments import packs, steps, study
from kdig_utils.experiments.ledger import Ledger, outcome, provenance
from kdig_utils.experiments.study import Study
from kdig_utils.method import artifacts, cifar10, models, precompute, signals
from kdig_utils.method.spec import RunSpec, TeacherSpec

# A network of 19 blocks like the paper's, with 8 channels: the ways through the package are the same, in milliseconds.
models.INVERTED_RESIDUALS = tuple((1, 8, blocks, stride) for _t, _c, blocks, stride in models.INVERTED_RESIDUALS)
steps.CHECK_EVERY, steps.SAVE_EVERY_SECONDS = 1, -1.0  # a checkpoint after each step
study.RUN_BYTES = 1000
packs.PACK_BYTES = 8000  # a pack of several pieces

TEACHER = TeacherSpec(epochs=1, batch_size=10, learning_rate=0.02)
TINY = RunSpec("student", k=17, stem_stride=2, epochs=2, batch_size=8)
SPECS = tuple(replace(TINY, method=method) for method in ("student", "kd", "kd_ig"))
ROWS = tuple(replace(TINY, seed=seed) for seed in range(4))
KEPT = ("method", "spec", "weights_sha256", "test_accuracy", "train_loss", "train_images", "parameters")
FOUND = ("kd_k17", "student_k17")  # what is published before the attack
STORE = signals.SignalSettings(n_steps=2, tap=9)


def first_images(split: str, of_each: int) -> cifar10.ImageSet:
    images = cifar10.load_sample(split)
    return images.subset(cifar10.first_of_each_class(images.labels, of_each))


TRAIN, TEST = first_images("train", 2), first_images("test", 2)
NETWORKS = [models.student(17, seed=seed).eval() for seed in range(2)]
SHA = [models.weights_sha256(network) for network in NETWORKS]
LOOKS_LIKE = {
    **outcome(NETWORKS[0]),
    **provenance(torch.device("cpu")),
    "campaign": "fire", "train_loss": 2.3, "test_accuracy": 10.0, "seconds": 1.0, "train_images": 20, "test_images": 20,
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Work that is disturbed, and what must be true then.

    Attributes:
        prepare: what is there before, made undisturbed.
        work: says `ROW run_id` for each row that it promises; done again it goes on, or has nothing to do.
        wrong: what is wrong in a folder, after any disturbance, given the rows that were promised.
        state: what the undisturbed work ends with.
    """

    name: str
    prepare: Callable[[Path], None]
    work: Callable[[Say, Path], None]
    wrong: Callable[[Path, set[str]], Iterator[str]]
    state: Callable[[Path], object]


def nothing(_folder: Path) -> None:
    """What needs no preparation."""


def ledger_in(folder: Path) -> Ledger:
    return Ledger(folder / "runs.csv")


def rows(ledger: Ledger) -> dict[str, tuple[str, ...]]:
    """What a ledger says of each run, but for times."""
    return {row["run_id"]: tuple(str(row[name]) for name in KEPT) for row in ledger.read().to_dict("records")}


def wrong_in(ledger: Ledger, promised: set[str]) -> Iterator[str]:
    """Rows that are lost or double; a ledger that cannot be read."""
    try:
        found = ledger.read()["run_id"].tolist()
    except Exception as error:  # whatever is raised, nobody can read it
        yield f"the ledger is not read: {type(error).__name__} {error}"
        return
    if lost := promised - set(found):
        yield f"a reported row is lost: {', '.join(sorted(lost))}"
    if double := [run_id for run_id, times in Counter(found).items() if times > 1]:
        yield f"a row is double: {', '.join(double)}"


def hashed(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(folder: Path, *patterns: str) -> dict[str, str]:
    """The SHA-256 of these files."""
    return {str(p.relative_to(folder)): hashed(p) for pattern in patterns for p in sorted(folder.glob(pattern))}


# A study: teacher, signals, students


def study_in(folder: Path) -> Study:
    os.environ["KDIG_ROOT"] = str(folder)  # it has no published networks
    made = Study("smoke", folder, ledger_in(folder), folder / "curves", TEACHER, SPECS, n_steps=2)
    made.__dict__.update(train=TRAIN, test=TEST, device=torch.device("cpu"))
    return made


def train(say: Say, folder: Path, specs: tuple[RunSpec, ...] = SPECS, teacher: bool = True) -> None:
    """Train what is left, and promise each row; say how many steps each run took in this process."""
    taken: Counter[str] = Counter()
    step = steps.Steps.step

    def counted(self: steps.Steps, size: int) -> None:
        taken[self.run.spec.run_id] += 1
        step(self, size)

    steps.Steps.step = counted
    try:
        made = study_in(folder)
        if teacher:
            _ = made.teacher
        for spec in specs:
            (run_id,) = made.run_all([spec], "fire", report=lambda _line: None)
            if run_id in set(made.ledger.read()["run_id"]):  # else another process has it under way
                say(f"ROW {run_id}")
    finally:
        for run_id, count in taken.items():
            say(f"STEPS {run_id} {count}")


def trained(folder: Path) -> object:
    """Rows, weights by their values, curves without seconds, signals."""
    made, found = study_in(folder), rows(ledger_in(folder))
    curves = {run_id: made.curve(run_id).drop(columns="seconds").to_csv() for run_id in found}
    stored = files(folder, "weights/*.safetensors", "signals/*/*.npy")
    return found, curves, stored, files(folder, "checkpoints/*.pt")


def wrong_rows(folder: Path, promised: set[str]) -> Iterator[str]:
    return wrong_in(ledger_in(folder), promised)


def train_one(say: Say, folder: Path) -> None:
    train(say, folder, (replace(TINY, epochs=1),), teacher=False)


# The ledger


def append(say: Say, folder: Path, specs: tuple[RunSpec, ...] = ROWS[2:]) -> None:
    for spec in specs:
        ledger_in(folder).append(spec, **LOOKS_LIKE)
        say(f"ROW {spec.run_id}")


def first_rows(folder: Path) -> None:
    append(lambda _line: None, folder, ROWS[:2])


def wrong_or_missing(folder: Path, promised: set[str]) -> Iterator[str]:
    return wrong_in(ledger_in(folder), promised | {spec.run_id for spec in ROWS[:2]})


# Published networks


def publish(folder: Path, name: str, which: int = 0) -> None:
    os.environ["KDIG_ROOT"] = str(folder)
    method, _, k = name.rpartition("_k")
    facts = {"run_id": TINY.run_id, "method": method, "k": int(k), "seed": 0, "epochs": 2, "test_accuracy": 10.0}
    artifacts.publish(name, NETWORKS[which], False, weights_sha256=SHA[which], **facts)


def two_published(folder: Path) -> None:
    for name in FOUND:
        publish(folder, name)


def publish_again(_say: Say, folder: Path) -> None:
    publish(folder, FOUND[0], 1)


def rename(_say: Say, folder: Path) -> None:
    os.environ["KDIG_ROOT"] = str(folder)
    if FOUND[0] in artifacts.manifest():
        artifacts.rename(FOUND[0], "ig_k17")


def published(folder: Path) -> dict[str, int]:
    """Which network each published name gives."""
    os.environ["KDIG_ROOT"] = str(folder)
    return {name: SHA.index(models.weights_sha256(artifacts.load(name))) for name in artifacts.manifest()}


def wrong_published(folder: Path, _promised: set[str]) -> Iterator[str]:
    try:
        found = published(folder)
    except Exception as error:
        yield f"a published network is not read: {type(error).__name__} {error}"
        return
    if len(found) < len(FOUND):
        yield f"a published network is lost: there are {', '.join(found) or 'none'}"


# Packs


def three_runs(folder: Path) -> None:
    train(lambda _line: None, folder / "made", ROWS[:3], teacher=False)


def pack_of(folder: Path, count: int) -> list[Path]:
    made = study_in(folder / "made")
    table = made.ledger.read().head(count)
    return packs.pack(table, packs.belongings(table, made.folders), folder / "packs", "fire").pieces


def one_packed(folder: Path) -> None:
    three_runs(folder)
    pack_of(folder, 1)


def pack(_say: Say, folder: Path) -> None:
    pack_of(folder, 3)


def unpacked(folder: Path, home: Path) -> dict[str, tuple[str, ...]]:
    """Put the pack into `home`; the rows that its ledger has then."""
    pieces = sorted((folder / "packs").glob("fire.tar.*"))
    packs.unpack(pieces, ledger_in(home), study_in(home).folders)
    return rows(ledger_in(home))


def wrong_pack(folder: Path, _promised: set[str]) -> Iterator[str]:
    """A pack that is cut off is refused, and nothing is written then; one that is read holds one run, or three."""
    home = folder.parent / "tried"
    shutil.rmtree(home, ignore_errors=True)
    with suppress(ValueError):
        if (count := len(unpacked(folder, home))) not in (1, 3):
            yield f"a pack of {count} runs was never made"
        return
    if ledger_in(home).path.exists():
        yield "a pack that was refused has left a ledger"


def packed(folder: Path) -> object:
    home = folder.parent / "tried"
    shutil.rmtree(home, ignore_errors=True)
    return unpacked(folder, home), files(home, "weights/*.safetensors", "curves/*.csv")


def three_packed(folder: Path) -> None:
    three_runs(folder)
    pack_of(folder, 3)
    append(lambda _line: None, folder / "home", ROWS[3:])


def unpack(say: Say, folder: Path) -> None:
    for run_id in unpacked(folder, folder / "home"):
        say(f"ROW {run_id}")


def wrong_home(folder: Path, promised: set[str]) -> Iterator[str]:
    home = folder / "home"
    yield from wrong_in(ledger_in(home), promised | {ROWS[3].run_id})
    with suppress(ValueError):
        for run_id in set(ledger_in(home).read()["run_id"]) - {ROWS[3].run_id}:
            for path in (home / "curves" / f"{run_id}.csv", home / "weights" / f"{run_id}.safetensors"):
                source = folder / "made" / path.relative_to(home)
                if not path.is_file() or hashed(path) != hashed(source):
                    yield f"the row {run_id} is there without its {path.parent.name}"


def at_home(folder: Path) -> object:
    return rows(ledger_in(folder / "home")), files(folder / "home", "weights/*.safetensors", "curves/*.csv")


# A signals store

TEACHES = models.teacher(1).eval()


def compute(_say: Say, folder: Path) -> None:
    precompute.compute_signals(TEACHES, TRAIN, folder / "store", STORE, batch_size=6)


def store(folder: Path) -> dict[str, str]:
    found = signals.open_signals(TEACHES, TRAIN, folder / "store", STORE)
    return {
        name: hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()
        for name, values in zip(signals.SIGNALS, found.tensors(), strict=True)
    }


STORES: dict[str, str] = {}  # what the undisturbed one holds


def wrong_store(folder: Path, _promised: set[str]) -> Iterator[str]:
    with suppress(FileNotFoundError):
        if STORES and store(folder) != STORES:
            yield "a store that counts as finished holds other signals"


TARGETS = {
    target.name: target
    for target in (
        Target("append", first_rows, append, wrong_or_missing, lambda folder: rows(ledger_in(folder))),
        Target("training", nothing, train_one, wrong_rows, trained),
        Target("publish", two_published, publish_again, wrong_published, published),
        Target("rename", two_published, rename, wrong_published, published),
        Target("pack", one_packed, pack, wrong_pack, packed),
        Target("unpack", three_packed, unpack, wrong_home, at_home),
        Target("signals", nothing, compute, wrong_store, store),
    )
}
CAMPAIGN = Target("campaign", nothing, train, wrong_rows, trained)
