"""The search for hyperparameters on held-out training images.

Optuna proposes a setting, the study trains it, the ledger keeps what it measured, on validation and on test images.
Optuna's storage is only the memory of who trains what: lost, it is made again from the ledger.
"""

import contextlib
import math
import re
import time
import warnings
from collections.abc import Sequence

import pandas as pd
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from kdig_utils import paths
from kdig_utils.experiments import hyperparameters
from kdig_utils.experiments.hyperparameters import LEVELS, at_setting, base_spec, searched, trials
from kdig_utils.experiments.reports import Report, print_line
from kdig_utils.experiments.side_by_side import Way
from kdig_utils.experiments.steps import TrainingDiverged
from kdig_utils.experiments.study import Study
from kdig_utils.locks import locked
from kdig_utils.method.spec import RunSpec

with warnings.catch_warnings():  # of its progress bar, which is never shown
    warnings.filterwarnings("ignore", message="IProgress not found")
    import optuna
    from optuna.distributions import BaseDistribution, IntDistribution
    from optuna.exceptions import ExperimentalWarning
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
    from optuna.storages._heartbeat import get_heartbeat_thread
    from optuna.trial import FrozenTrial, Trial, TrialState
# Optuna's heartbeat is meant for `Study.optimize`, and called experimental: here it serves trials asked and told.
warnings.filterwarnings("ignore", category=ExperimentalWarning)
warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")

CAMPAIGN = "hyperparameters"
TRIALS = 30
BEAT_SECONDS = 30  # between two signs of life of a trial under way
GRACE_SECONDS = 120  # a trial without a sign of life for so long is given to another worker
LOCK_SECONDS = 60.0  # how long a worker waits for the others to let go of an SQLite file


def search_space(method: str) -> dict[str, BaseDistribution]:
    """What Optuna chooses from: for each hyperparameter of the method its place in `LEVELS`, from 0.

    Places are ordered and evenly spaced where the values are not, so that neighbours teach about each other.
    """
    return {f"{name}_level": IntDistribution(0, len(LEVELS[name]) - 1) for name in searched(method)}


def levels_of(spec: RunSpec) -> dict[str, int]:
    """The places of a run's hyperparameters in `LEVELS`, as Optuna has them; `spec_of_trial` backwards."""
    return {f"{name}_level": LEVELS[name].index(getattr(spec, name)) for name in searched(spec.method)}


def base_of(study: Study, method: str) -> RunSpec:
    """The run that is varied, as this study trains it: with its teacher, images and measure."""
    return study.completed(study.scaled(base_spec(method, study.profile)))


def spec_of_trial(trial: Trial | FrozenTrial, base: RunSpec) -> RunSpec:
    """The run of a trial: `base` at the trial's levels, with a seed of its own.

    The seed is the number that the trial had at first, so that a setting proposed twice is trained with other luck.
    """
    setting = {name: LEVELS[name][trial.params[f"{name}_level"]] for name in searched(base.method)}
    return at_setting(base, setting, trial.user_attrs.get("seed", trial.number))


def search(
    study: Study,
    method: str,
    n_trials: int = TRIALS,
    storage: str | None = None,
    at_once: int = 1,
    deadline: float = math.inf,
    report: Report = print_line,
    seed: int | None = None,
) -> pd.DataFrame:
    """Train trials, `at_once` side by side, until the search has `n_trials` of them or the time is over.

    Called again, also after a stop, it goes on where it was. Several workers share the trials of one storage.

    Args:
        n_trials: of all workers together, earlier ones included.
        storage: URL of an Optuna storage; None is an SQLite file in the workspace.
        deadline: on the clock of `time.monotonic`; what it cuts off goes on from its checkpoint the next time.
        seed: of the proposals; several workers leave it None, or all would propose the same.

    Returns:
        The trials so far, as ledger rows.

    Raises:
        ValueError: the storage cannot be opened, or the method has nothing to search.
    """
    base = base_of(study, method)
    proposals = open_search(study, base, storage, seed)
    _signals = study.signals  # may take long, and no trial is under way meanwhile
    while time.monotonic() < deadline and (asked := ask(study, proposals, base, n_trials, at_once)):
        train(study, proposals, base, asked, deadline, report)
    if left := sum(trial.state == TrialState.RUNNING for trial in _counted(proposals)):
        report(f"{left} trials are under way elsewhere, or their worker died: then run this again in {GRACE_SECONDS} s")
    return trials(study.ledger.read(), base)


def open_search(study: Study, base: RunSpec, storage: str | None = None, seed: int | None = None) -> optuna.Study:
    """Open or begin the search in a storage; what the ledger knows and the storage does not is told to it.

    The search's name holds the identity of `base`: another teacher or other images are another search.

    Raises:
        ValueError: the storage cannot be opened; a password in its URL is not shown.
    """
    file = (study.folder / "hyperparameters.db").absolute().as_uri()  # escapes what means something in a URL
    url = storage or URL.create("sqlite", database=file, query={"uri": "true"}).render_as_string()
    paths.check_writable(study.folder)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Two workers that begin at the same time would both make the tables, and both enqueue the paper's setting.
    with locked(study.folder / "hyperparameters"):
        try:
            storage_of_all = RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite") else {},
                heartbeat_interval=BEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
            proposals = optuna.create_study(
                storage=storage_of_all,
                study_name=f"{base.method}_k{base.k}_{base.run_id}",
                sampler=optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed),
                direction="maximize",
                load_if_exists=True,
            )
        except (SQLAlchemyError, ImportError, ValueError, RuntimeError, OSError) as error:
            shown = url if url.startswith("sqlite") else re.sub(r"//.*@", "//***@", url)
            raise ValueError(
                f"cannot open the storage {shown} ({str(error).splitlines()[0]}): "
                "give an Optuna storage URL such as sqlite:///search.db; in a password, ? is %3F, @ is %40 and # is %23"
            ) from error
        remember(proposals, trials(study.ledger.read(), base), base)
        proposals.enqueue_trial(levels_of(base), skip_if_exists=True)
    return proposals


def remember(proposals: optuna.Study, rows: pd.DataFrame, base: RunSpec) -> None:
    """Tell the search the trials of the ledger that it does not know: from another machine, or a lost storage."""
    space = search_space(base.method)
    asked = [trial for trial in _counted(proposals) if trial.params.keys() == space.keys()]
    known = {spec_of_trial(trial, base).run_id for trial in asked}
    for _index, row in rows[~rows["run_id"].isin(known) & ~rows["fresh"]].iterrows():
        proposals.add_trial(
            optuna.trial.create_trial(
                params=levels_of(at_setting(base, row, int(row["seed"]))),
                distributions=space,
                value=float(row["validation_accuracy"]),
                user_attrs={"seed": int(row["seed"])},
            )
        )


def trials_under_way(study: Study, method: str, storage: str | None = None) -> int:
    """How many trials of a search are begun and not done, by any worker: its finalists are known when there is none.

    Raises:
        ValueError: the storage cannot be opened, or the method has nothing to search.
    """
    found = open_search(study, base_of(study, method), storage).get_trials(deepcopy=False)
    return sum(not trial.state.is_finished() for trial in found)


def ask(study: Study, proposals: optuna.Study, base: RunSpec, n_trials: int, at_once: int) -> list[Trial]:
    """The next trials, at most `at_once`, given back ones first; none when the search has its `n_trials`."""
    asked: list[Trial] = []
    # One worker of the folder after the other: SQLite would give a waiting trial to two at once.
    with locked(study.folder / "hyperparameters"):
        fail_stale_trials(proposals)
        begun = sum(trial.state != TrialState.WAITING for trial in _counted(proposals))
        for _place in range(min(at_once, n_trials - begun)):
            trial = proposals.ask(search_space(base.method))
            # From now on it is taken over if this worker dies: Optuna passes over a trial without any sign of life.
            with get_heartbeat_thread(trial._trial_id, proposals._storage):
                trial.set_user_attr("seed", trial.user_attrs.get("seed", trial.number))
            # A worker elsewhere may have asked at the same moment: numbers are given once, the higher is too many.
            if sum(other.number < trial.number for other in _counted(proposals)) >= n_trials:
                proposals.tell(trial, state=TrialState.FAIL)
                break
            asked.append(trial)
    return asked


def _counted(proposals: optuna.Study) -> list[FrozenTrial]:
    return [trial for trial in proposals.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]


def train(
    study: Study, proposals: optuna.Study, base: RunSpec, asked: Sequence[Trial], deadline: float, report: Report
) -> None:
    """Train the runs of these trials side by side; tell the search how each ended, however the training ends.

    One that diverges counts as the worst. One that is cut off waits for any worker: the same levels and seed, so the
    same run and its checkpoint.
    """
    specs, diverged = [spec_of_trial(trial, base) for trial in asked], ""
    try:
        with contextlib.ExitStack() as signs_of_life:  # the storage learns that these trials are under way
            for thread in [get_heartbeat_thread(trial._trial_id, proposals._storage) for trial in asked]:
                thread.start()
                signs_of_life.callback(thread.join)
            study.run_all(specs, CAMPAIGN, Way(len(asked)), deadline, report)
    except TrainingDiverged as error:
        diverged = str(error)
        report(f"diverged: {diverged}")
    finally:
        accuracy = study.ledger.read().set_index("run_id")["validation_accuracy"]
        for trial, spec in zip(asked, specs, strict=True):
            with contextlib.suppress(ValueError):  # another worker, who took us for dead, has told it
                if spec.run_id in accuracy.index:
                    proposals.tell(trial, float(accuracy[spec.run_id]))
                elif spec.run_id in diverged:
                    proposals.tell(trial, state=TrialState.PRUNED)
                else:
                    RetryHeartbeatStaleTrialCallback()(proposals, proposals.tell(trial, state=TrialState.FAIL))


def confirm(
    study: Study, method: str, at_once: int = 1, deadline: float = math.inf, report: Report = print_line
) -> pd.DataFrame:
    """Train the finalists of a search again with fresh seeds, which had no part in the choice; return all rows."""
    base = base_of(study, method)
    settings = hyperparameters.finalists(trials(study.ledger.read(), base), "paper", "test")
    specs = [at_setting(base, setting, seed) for seed in hyperparameters.FRESH_SEEDS for setting in settings]
    study.run_all(specs, CAMPAIGN, Way(at_once), deadline, report)
    return trials(study.ledger.read(), base)
