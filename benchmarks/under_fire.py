"""The ledger under fire: kills, crowds, full and read-only disks, and a file system on which `flock` does nothing.

Children of one process train tiny networks, append, publish, pack, unpack and store signals, and are disturbed. Then no
row that was reported is lost, none is torn or double, no run was trained twice, and what was resumed is bit for bit
what an undisturbed process makes. Prints the counts and writes `benchmarks/results/under_fire.json`.

    python benchmarks/under_fire.py
    python benchmarks/under_fire.py --quick    # the part that the tests run; writes nothing
    python benchmarks/under_fire.py --quick --only append --break lock    # a package that is broken on purpose
"""

import argparse
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import fire_processes as processes
import fire_targets as targets
import torch
from fire_attacks import Fire, Kind, at_each_operation, at_random, in_the_midst
from fire_crowds import crowd_that_dies, crowded_artifacts, crowded_campaign, crowded_ledger, crowded_store
from fire_disks import disk_filled_by_another, full_disk, read_only, with_own_mounts
from fire_targets import Target

from kdig_utils.experiments.ledger import code_commit

RESULTS = Path(__file__).parent / "results" / "under_fire.json"
# Without `flock` the same is harder.
LEFT_OUT_OF_THE_QUICK = ("8 processes on one campaign", "8 processes publish", "8 processes on one signals store")
SHOWN = 5  # faults of a kind that are printed


def attacks() -> dict[str, Callable[[Fire, Kind], None]]:
    """All kinds, by their names."""
    part, each = functools.partial, targets.TARGETS
    return {
        "killed at random moments": lambda fire, kind: at_random(fire, targets.CAMPAIGN, kind),
        **{f"killed at each file operation, {name}": _on(at_each_operation, each[name]) for name in each},
        **{f"killed in the midst of a write, {name}": _on(in_the_midst, each[name]) for name in each},
        "8 processes append": crowded_ledger,
        "8 processes on one campaign": crowded_campaign,
        "8 processes on one campaign, killed and replaced": crowd_that_dies,
        "8 processes publish": crowded_artifacts,
        "8 processes on one signals store": crowded_store,
        "flock does nothing, 8 processes append": part(crowded_ledger, flock=False),
        "flock does nothing, 8 processes on one campaign": part(crowded_campaign, flock=False),
        "flock does nothing, 8 processes publish": part(crowded_artifacts, flock=False),
        "flock does nothing, 8 processes on one signals store": part(crowded_store, flock=False),
        "a full disk": part(with_own_mounts, full_disk),
        **{
            f"a disk filled by another, {name}": part(with_own_mounts, _on(disk_filled_by_another, each[name]))
            for name in each
        },
        "a read-only folder": part(with_own_mounts, read_only),
    }


def _on(attack: Callable[[Fire, Target, Kind], None], target: Target) -> Callable[[Fire, Kind], None]:
    return lambda fire, kind: attack(fire, target, kind)


# A harness that finds nothing may look at nothing: a package that is broken on purpose, and what must find it

FINDS = {
    "lock": "8 processes append",
    "replace": "killed at each file operation, append",
    "optimizer": "killed at random moments",
    "append": "killed at each file operation, append",
}


def found_if_broken(fire: Fire, names: Iterable[str] = FINDS) -> dict[str, int]:
    """The faults that are found in a package without its lock, and so on: none may be 0."""
    found = {}
    for name in names:
        kind = Kind(FINDS[name])
        attacks()[kind.name](replace(fire, quick=name != "replace", broken=name), kind)  # few moments lie in a write
        found[name] = len(kind.faults)
    return found


def tried(fire: Fire, only: str) -> Iterator[Kind]:
    """Each kind whose name contains `only`, tried and printed."""
    for name, attack in attacks().items():
        if only in name and not (fire.quick and name in LEFT_OUT_OF_THE_QUICK):
            kind, started = Kind(name), time.monotonic()
            attack(fire, kind)
            kind.seconds = round(time.monotonic() - started, 1)
            print(kind.line(), flush=True)
            for fault in kind.faults[:SHOWN]:
                print(f"    {fault[:400]}", flush=True)
            yield kind


def report(kinds: list[Kind], seed: int, broken: dict[str, int]) -> dict[str, object]:
    """The counts, with the commit and the machine."""
    return {
        "commit": os.environ["KDIG_COMMIT"],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": seed,
        "seconds": round(sum(kind.seconds for kind in kinds)),
        "broken_on_purpose": broken,
        "kinds": [asdict(kind) for kind in kinds],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some of each kind, and write no results")
    parser.add_argument("--only", default="", metavar="WORDS", help="kinds whose names have these words in them")
    parser.add_argument("--break", dest="broken", default="", choices=["", *processes.BREAKS])
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--folder", type=Path, help="where the scratch folder is made")
    parser.add_argument("--out", type=Path, help="the file for the counts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["KDIG_COMMIT"] = code_commit()  # now: a child would ask git for each row
    whole = not (given.only or given.broken)
    with processes.scratch(given.folder) as folder:
        fire = Fire(folder, given.quick, given.seed, given.broken)
        kinds = list(tried(fire, given.only))
        broken = found_if_broken(fire) if whole else {}
    for name, found in broken.items():
        print(f"broken on purpose, {name}: {found} faults found")
    faults = sum(len(kind.faults) for kind in kinds)
    attempts, kills, rows = (sum(getattr(kind, name) for kind in kinds) for name in ("attempts", "kills", "rows"))
    print(f"in all: {attempts} attempts, {kills} kills, {rows} rows reported, {faults} faults")
    if target := given.out or (RESULTS if whole and not given.quick else None):
        target.write_text(json.dumps(report(kinds, given.seed, broken), indent=1, ensure_ascii=False) + "\n")
    sys.exit(bool(faults) or not all(broken.values()))


if __name__ == "__main__":
    main()
