"""Full and read-only disks for `under_fire`, on mounts that only its own processes see."""

import errno
import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import fire_processes as processes
import fire_targets as targets
from fire_attacks import Fire, Kind, errors, finish, moments, struck, worker
from fire_processes import Ended, Say, Work
from fire_targets import Target

FILLED = 16  # moments of each work at which a disk is filled


def in_words(done: Ended, folder: Path, number: int) -> list[str]:
    """What is wrong with the end of work that met a full or a read-only disk: it ends well, or names the folder."""
    told = done.all_said("ERROR")
    if done.how < 0:
        return [f"ended by signal {-done.how}"]
    return [error for error in told if error.split()[:2] != ["OSError", str(number)] or str(folder) not in error]


def full_disk(fire: Fire, kind: Kind) -> None:
    """Disks of all sizes from nothing to enough, in memory; then each becomes large, and the work goes on."""
    target = targets.CAMPAIGN
    used = sum(path.stat().st_size for path in fire.undisturbed(target)[1].rglob("*") if path.is_file())
    count = 2 if fire.quick else FILLED
    for size in (4096 * (3 + int(2 * used / 4096 * number / count)) for number in range(count)):
        folder = on_disk(fire, target, size)
        met(fire, kind, target, folder, lambda say, at=folder: target.work(say, at), f"a disk of {size:,} bytes")


def disk_filled_by_another(fire: Fire, target: Target, kind: Kind) -> None:
    """A disk with room, until something else fills it between two file operations."""
    for moment in moments(fire, target, 1, FILLED):
        folder = on_disk(fire, target, 4_000_000)
        work = struck(target, folder, moment, functools.partial(processes.fill, folder))
        met(fire, kind, target, folder, work, f"filled at moment {moment}")


def on_disk(fire: Fire, target: Target, size: int) -> Path:
    """What the target finds before its work, on a disk of its own of `size` bytes, or of what that takes."""
    folder = fire.fresh(target)
    aside = folder.rename(folder.with_name("aside"))
    folder.mkdir()
    processes.mount_memory(folder, 50_000_000)
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    shutil.rmtree(aside)
    taken = os.statvfs(folder)
    processes.mount_memory(folder, max(size, 4096 * (taken.f_blocks - taken.f_bfree)), again=True)
    return folder


def met(fire: Fire, kind: Kind, target: Target, folder: Path, work: Work, where: str) -> None:
    """Work on a small disk, which then becomes large."""
    done = processes.run(fire.disturbed(work))
    kind.attempts += 1
    where = ", ".join([where, *done.all_said("AT")])
    kind.faults += [f"{where}: {wrong}" for wrong in in_words(done, folder, errno.ENOSPC)]
    (folder / "filler").unlink(missing_ok=True)
    processes.mount_memory(folder, 50_000_000, again=True)
    finish(fire, target, folder, kind, where, set(done.all_said("ROW")))
    processes.unmount(folder)


def read_only(fire: Fire, kind: Kind) -> None:
    """A folder that cannot be written: all work says so, what is there is read, and once it can be, work ends well."""
    for target in (*targets.TARGETS.values(), targets.CAMPAIGN):
        folder = fire.fresh(target)
        processes.make_read_only(folder)
        done = processes.run(worker(fire, target, folder))
        kind.attempts += 1
        kind.faults += [f"{target.name}: {wrong}" for wrong in in_words(done, folder, errno.EROFS)]
        if not done.all_said("ERROR"):
            kind.faults.append(f"{target.name}: does not say that the folder is read-only")
        kind.faults += [f"{target.name}, read: {wrong}" for wrong in target.wrong(folder, set())]
        processes.unmount(folder)
        finish(fire, target, folder, kind, target.name, set(done.all_said("ROW")))
    finished_and_read_only(fire, kind)


def finished_and_read_only(fire: Fire, kind: Kind) -> None:
    """A finished study needs no writing: its students are found."""
    target = targets.CAMPAIGN
    folder = fire.fresh(target)
    shutil.copytree(fire.undisturbed(target)[1], folder, dirs_exist_ok=True)
    processes.make_read_only(folder)
    done = processes.run(worker(fire, target, folder))
    kind.attempts += 1
    kind.rows += len(done.all_said("ROW"))
    kind.faults += [f"a finished study: {told}" for told in errors(done)]
    processes.unmount(folder)


def with_own_mounts(attack: Callable[[Fire, Kind], None], fire: Fire, kind: Kind) -> None:
    """Attack in a child with mounts of its own, and take over what it counted."""
    for target in (*targets.TARGETS.values(), targets.CAMPAIGN):
        fire.undisturbed(target)  # here, once for all attacks

    def mounted(say: Say) -> None:
        try:
            processes.own_mounts()
        except OSError as error:
            kind.left_out = f"this system allows no mounts ({error})"
        else:
            attack(fire, kind)
        say(f"KIND {json.dumps(asdict(kind))}")

    done = processes.run(mounted, 3600.0)
    if not (counted := done.all_said("KIND")):
        raise RuntimeError(f"the attack {kind.name!r} has ended early: {done.said[-1:]}")
    vars(kind).update(json.loads(counted[0]))
