"""How `under_fire` attacks its targets, and what it counts as a fault."""

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import fire_processes as processes
import fire_targets as targets
from fire_processes import Ended, Say, Work
from fire_targets import Target

KILLS, QUICK_KILLS = 200, 30


@dataclass
class Kind:
    """One kind of attack, counted.

    Attributes:
        attempts: disturbed pieces of work.
        kills: of them, those that ended by SIGKILL or by the system in the midst of a write.
        rows: rows of ledgers that were reported, and had to be there.
        left_out: why the kind could not be tried here; empty if it was.
    """

    name: str
    attempts: int = 0
    kills: int = 0
    rows: int = 0
    faults: list[str] = field(default_factory=list)
    left_out: str = ""
    seconds: float = 0.0

    def line(self) -> str:
        if self.left_out:
            return f"{self.name}: not tried here: {self.left_out}"
        return (
            f"{self.name}: {self.attempts} attempts, {self.kills} kills, {self.rows} rows reported, "
            f"{len(self.faults)} faults, {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Fire:
    """How much is tried, where, and with which package."""

    folder: Path
    quick: bool
    seed: int
    broken: str

    def fresh(self, target: Target) -> Path:
        """A copy of what the target finds before its work."""
        folder = self.folder / "now"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._prepared(target), folder)
        return folder

    def _prepared(self, target: Target) -> Path:
        folder = self.folder / f"before_{target.name}"
        if not folder.is_dir():
            folder.mkdir()
            whole(lambda _say: target.prepare(folder))
        return folder

    def undisturbed(self, target: Target) -> tuple[object, Path, Ended, float]:
        """The state that the target ends with, in its folder, what it said, and its seconds."""
        folder = self.folder / f"after_{target.name}"
        if target.name not in _UNDISTURBED:
            shutil.copytree(self._prepared(target), folder)
            started = time.monotonic()
            done = whole(lambda say: target.work(say, folder))
            _UNDISTURBED[target.name] = target.state(folder), folder, done, time.monotonic() - started
            if target.name == "signals":
                targets.STORES.update(targets.store(folder))
        return _UNDISTURBED[target.name]

    def disturbed(self, work: Work) -> Work:
        """The work in a package that may be broken on purpose."""

        def begun(say: Say) -> None:
            if self.broken:
                processes.BREAKS[self.broken]()
            work(say)

        return begun


_UNDISTURBED: dict[str, tuple[object, Path, Ended, float]] = {}


def whole(work: Work) -> Ended:
    """Work that nothing disturbs; it must end well."""
    done = processes.run(work)
    if done.how:
        raise RuntimeError(f"undisturbed work ended with {done.how}: {done.said[-1:]}")
    return done


def errors(done: Ended) -> list[str]:
    """What is wrong with the end of a process that was not killed by us."""
    unasked = [f"ended by signal {-done.how}"] if done.how < 0 and not done.killed else []
    return unasked + done.all_said("ERROR")


def finish(fire: Fire, target: Target, folder: Path, kind: Kind, where: str, promised: set[str]) -> None:
    """Look at what a disturbance left, do the work again undisturbed, and compare with the undisturbed."""
    kind.faults += [f"{where}: {wrong}" for wrong in target.wrong(folder, promised)]
    again = processes.run(fire.disturbed(lambda say: target.work(say, folder)))
    promised |= set(again.all_said("ROW"))
    kind.rows += len(promised)
    found = [*errors(again), *target.wrong(folder, promised)]
    if not found:
        found = differences(fire, target, folder)
    kind.faults += [f"{where}, done again: {wrong}" for wrong in found]


def differences(fire: Fire, target: Target, folder: Path) -> list[str]:
    try:
        same = target.state(folder) == fire.undisturbed(target)[0]
    except Exception as error:
        return [f"what it ended with is not read: {type(error).__name__} {error}"]
    return [] if same else ["it ended with something else than the undisturbed one"]


def at_each_operation(fire: Fire, target: Target, kind: Kind) -> None:
    """Kill before and after each change of a file; in quick mode at some of these moments."""
    for moment in moments(fire, target, 3, None):
        folder = fire.fresh(target)
        one_kill(fire, target, folder, kind, struck(target, folder, moment), f"moment {moment}")


def moments(fire: Fire, target: Target, quick: int, most: int | None) -> list[int]:
    """The moments at which the target's work can be struck; some of them if there are more than `most`."""
    folder = fire.fresh(target)

    def counting(say: Say) -> None:
        met = processes.at_moment(0, say)
        target.work(say, folder)
        say(f"MOMENTS {met()}")

    (count,) = map(int, processes.run(fire.disturbed(counting)).all_said("MOMENTS") or ["0"])
    return processes.moments(count, quick if fire.quick else most or count, fire.seed)


def struck(target: Target, folder: Path, moment: int, strikes: Callable[[], None] = processes.killed) -> Work:
    def begun(say: Say) -> None:
        processes.at_moment(moment, say, strikes)
        target.work(say, folder)

    return begun


def in_the_midst(fire: Fire, target: Target, kind: Kind) -> None:
    """Let the system cut a write after some bytes, and the process with it."""
    sizes = {path.stat().st_size for path in fire.undisturbed(target)[1].rglob("*") if path.is_file()}
    least = 256 if fire.quick and target.name != "append" else 0  # a marker that is cut is waited for, seconds long
    cuts = sorted({cut for size in sizes for cut in (0, 1, size // 2, size - 1) if cut >= least})
    for number in processes.moments(len(cuts), 2 if fire.quick else len(cuts), fire.seed):
        folder, cut = fire.fresh(target), cuts[number - 1]

        def killed(say: Say, folder: Path = folder, cut: int = cut) -> None:
            processes.kill_beyond(cut)
            target.work(say, folder)

        one_kill(fire, target, folder, kind, killed, f"cut at byte {cut}")


def one_kill(fire: Fire, target: Target, folder: Path, kind: Kind, work: Work, where: str) -> None:
    done = processes.run(fire.disturbed(work))
    kind.attempts += 1
    kind.kills += done.killed
    where = ", ".join([where, *done.all_said("AT")])
    kind.faults += [f"{where}: {wrong}" for wrong in errors(done)]
    finish(fire, target, folder, kind, where, set(done.all_said("ROW")))


def at_random(fire: Fire, target: Target, kind: Kind) -> None:
    """Kill a training at random moments, again and again until it ends; then anew, until there are enough kills."""
    rng, seconds, wanted = random.Random(fire.seed), fire.undisturbed(target)[3], QUICK_KILLS if fire.quick else KILLS
    while kind.kills < wanted:
        folder, promised, before, killed = fire.fresh(target), set(), {}, True
        work = worker(fire, target, folder)
        kind.attempts += 1
        while killed and kind.kills < wanted:  # on a machine that got slower it might never end
            done = processes.run(work, rng.uniform(0.0, seconds / 2))
            killed, where = done.killed, f"kill {kind.kills + 1}"
            kind.kills += killed
            promised |= set(done.all_said("ROW"))
            kind.faults += [f"{where}: {w}" for w in [*errors(done), *target.wrong(folder, promised)]]
            before = unchanged(targets.ledger_in(folder), before, kind, where)
        finish(fire, target, folder, kind, f"after {kind.kills} kills", promised)


def worker(fire: Fire, target: Target, folder: Path) -> Work:
    return fire.disturbed(lambda say: target.work(say, folder))


def unchanged(ledger: targets.Ledger, before: dict, kind: Kind, where: str) -> dict:
    """The ledger's rows now; those that were there before are as they were."""
    try:
        now = targets.rows(ledger)
    except ValueError:  # `wrong` has told it
        return before
    kind.faults += [f"{where}: row {run_id} is another one" for run_id in before if now.get(run_id) != before[run_id]]
    return now
