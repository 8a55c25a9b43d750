"""Two processes never train the same run, and the end of one frees what it had reserved."""

import subprocess
import sys
from pathlib import Path

from kdig_utils.experiments.reservations import reserved
from kdig_utils.method.spec import RunSpec

RUNS = [RunSpec("student", seed=seed) for seed in range(4)]
HOLDER = """
import sys
from pathlib import Path
from kdig_utils.experiments.reservations import reserved
from kdig_utils.method.spec import RunSpec
ours = reserved([RunSpec("student", seed=int(sys.argv[2]))], Path(sys.argv[1]), set, print)
print(next(ours).run_id, flush=True)
sys.stdin.read()
"""


def seeds(folder: Path, finished: set[str] = frozenset()) -> list[int]:
    return [spec.seed for spec in reserved(RUNS, folder, lambda: set(finished), lambda line: None)]


def test_a_run_that_another_process_has_reserved_is_passed_over_until_that_process_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), "2"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline().strip() == RUNS[2].run_id
        assert seeds(tmp_path) == [0, 1, 3]
        other.kill()  # it cannot clear up
        other.wait()
        assert seeds(tmp_path) == [0, 1, 2, 3]


def test_what_ended_since_is_not_trained_again(tmp_path: Path) -> None:
    assert seeds(tmp_path, {RUNS[1].run_id}) == [0, 2, 3]


def test_two_workers_share_the_runs_and_leave_none(tmp_path: Path) -> None:
    done: list[int] = []
    one, other = (
        reserved(RUNS, tmp_path, lambda: {RUNS[seed].run_id for seed in done}, lambda line: None)
        for _worker in range(2)
    )
    turns = [one, other]
    while turns:
        for worker in list(turns):
            run = next(worker, None)
            if run is None:
                turns.remove(worker)
            else:
                assert run.seed not in done
                done.append(run.seed)
    assert sorted(done) == [0, 1, 2, 3]


def test_what_was_left_unfinished_can_be_taken_again_by_the_same_process(tmp_path: Path) -> None:
    ours = reserved(RUNS, tmp_path, set, lambda line: None)
    assert next(ours).seed == 0
    ours.close()
    assert seeds(tmp_path) == [0, 1, 2, 3]
