"""Eight processes at once for `under_fire`, with and without a `flock` that works."""

import os
import random
from collections import Counter
from pathlib import Path

import fire_processes as processes
import fire_targets as targets
from fire_attacks import Fire, Kind, errors, finish, worker
from fire_processes import PATIENCE, Ended, Say, Work

CROWD, CAMPAIGNS = 8, 8


def crowded_ledger(fire: Fire, kind: Kind, flock: bool = True) -> None:
    """Eight processes append rows of their own to one ledger, at the same moment."""
    each = 3 if fire.quick else 12

    def appending(which: int) -> Work:
        specs = tuple(targets.replace(targets.TINY, seed=100 + which * each + number) for number in range(each))
        return lambda say: targets.append(say, folder, specs)

    folder = fire.fresh(targets.TARGETS["append"])
    together(fire, kind, [appending(which) for which in range(CROWD)], flock)
    promised = CROWD * each
    kind.rows += promised
    kind.faults += list(targets.wrong_in(targets.ledger_in(folder), set()))
    if not kind.faults and (lost := promised + 2 - len(targets.rows(targets.ledger_in(folder)))):
        kind.faults.append(f"{lost} of {promised + 2} rows are lost")


def crowded_campaign(fire: Fire, kind: Kind, flock: bool = True) -> None:
    """Eight processes train one campaign: teacher, signals, students; each run once."""
    target = targets.CAMPAIGN
    _state, _folder, alone, _seconds = fire.undisturbed(target)
    folder = fire.fresh(target)
    done = together(fire, kind, [lambda say: target.work(say, folder)] * CROWD, flock)
    taken: Counter[str] = Counter()
    for line in [line for one in done for line in one.all_said("STEPS")]:
        taken[line.split()[0]] += int(line.split()[1])
    for run_id, steps in (line.split() for line in alone.all_said("STEPS")):
        if taken[run_id] != int(steps):
            kind.faults.append(f"run {run_id} took {taken[run_id]} steps in all processes, one training takes {steps}")
    finish(fire, target, folder, kind, f"{CROWD} processes", {row for one in done for row in one.all_said("ROW")})


def crowd_that_dies(fire: Fire, kind: Kind) -> None:
    """Eight processes train one campaign; whenever one is killed, another one takes its place; until enough were."""
    rng = random.Random(fire.seed)
    for number in range(1 if fire.quick else CAMPAIGNS):
        folder = fire.fresh(targets.CAMPAIGN)
        promised = dying(fire, kind, folder, rng)
        finish(fire, targets.CAMPAIGN, folder, kind, f"campaign {number}", promised)


def dying(fire: Fire, kind: Kind, folder: Path, rng: random.Random) -> set[str]:
    """Kill each of a crowd that trains in `folder`, and let its successors end; the rows that all promised."""
    target, promised = targets.CAMPAIGN, set()
    work = worker(fire, target, folder)
    crowd = processes.crowd([work] * CROWD)
    for number in range(2 * CROWD):
        seconds = rng.uniform(0.0, fire.undisturbed(target)[3] / 4) if number < CROWD else PATIENCE
        done = processes.ended(crowd.pop(0), seconds)
        promised |= set(done.all_said("ROW"))
        kind.attempts += 1
        kind.kills += done.killed
        kind.faults += [f"process {number}: {w}" for w in [*errors(done), *target.wrong(folder, promised)]]
        if number < CROWD:
            crowd.append(processes.forked(work))
    return promised


def crowded_artifacts(fire: Fire, kind: Kind, flock: bool = True) -> None:
    """Eight processes publish a network each, two of them in place of those that are there."""
    folder = fire.fresh(targets.TARGETS["publish"])
    names = [*targets.FOUND, *(f"{method}_k17" for method in ("ig", "at", "kd_ig", "kd_at", "ig_at", "kd_ig_at"))]

    def publishing(name: str) -> Work:
        return lambda _say: targets.publish(folder, name)

    together(fire, kind, [publishing(name) for name in names], flock)
    os.environ["KDIG_ROOT"] = str(folder)
    if lost := set(names) - set(targets.artifacts.manifest()):
        kind.faults.append(f"published networks are lost: {', '.join(sorted(lost))}")
    kind.faults += list(targets.wrong_published(folder, set()))


def crowded_store(fire: Fire, kind: Kind, flock: bool = True) -> None:
    """Eight processes compute one signals store."""
    target = targets.TARGETS["signals"]
    fire.undisturbed(target)
    folder = fire.fresh(target)
    together(fire, kind, [lambda say: target.work(say, folder)] * CROWD, flock)
    finish(fire, target, folder, kind, f"{CROWD} processes", set())


def together(fire: Fire, kind: Kind, works: list[Work], flock: bool) -> list[Ended]:
    """Do these at the same moment, and count them."""

    def begun(work: Work) -> Work:
        def inside(say: Say) -> None:
            if not flock:
                processes.without_flock()
            work(say)

        return fire.disturbed(inside)

    done = [processes.ended(child) for child in processes.crowd([begun(work) for work in works])]
    kind.attempts += len(works)
    kind.faults += [f"process {number}: {told}" for number, one in enumerate(done) for told in errors(one)]
    return done
