"""Choosing hyperparameters on held-out training images, and what choosing on the test images would have cost.

Optuna proposes a setting, the study trains it, the ledger keeps what it measured, on validation and on test images.
Optuna's file is only the memory of who trains what: lost, it is made again from the ledger.
"""

import contextlib
import dataclasses
import math
import re
import time
import warnings
from collections.abc import Iterator, Sequence

import pandas as pd
from filelock import FileLock
from sqlalchemy.exc import SQLAlchemyError

from kdig_utils import paths
from kdig_utils.experiments.ledger import of_one_teacher, spec_of
from kdig_utils.experiments.side_by_side import Report, TrainingDiverged, Way
from kdig_utils.experiments.study import Study, print_line
from kdig_utils.method.spec import METHODS, RunSpec

with warnings.catch_warnings():  # of its progress bar, which is never shown
    warnings.filterwarnings("ignore", message="IProgress not found")
    import optuna
    from optuna.distributions import BaseDistribution, IntDistribution
    from optuna.trial import FrozenTrial, Trial, TrialState


CAMPAIGN = "hyperparameters"
# Levels, not ranges: runs that share a setting can be averaged, and the paper's value of each is among them.
LEVELS: dict[str, tuple[float, ...]] = {
    "alpha": (0.01, 0.03, 0.1, 0.3, 0.6, 0.9),
    "temperature": (1.0, 2.5, 4.0, 6.0, 10.0, 20.0),
    "overlay_probability": (0.05, 0.1, 0.2, 0.4, 0.7, 1.0),
    "gamma": (0.08, 0.8, 8.0, 80.0, 800.0),
}
SEARCHED = {"kd": ("alpha", "temperature"), "ig": ("overlay_probability",), "at": ("gamma",)}
VALIDATION_IMAGES = 5000
SMOKE = {"k": 17, "validation_images": 100}  # of the 500 training images that come with the repository
TRIALS = 30
FINALISTS = 3  # settings with the highest validation accuracy that are trained again
FRESH_SEEDS = range(1000, 1003)  # of the runs that measure a choice; the search counts its seeds from 0
BEAT_SECONDS = 30.0  # between two signs of life of a trial under way
GRACE_SECONDS = 600.0  # a trial without a sign of life for so long is given to another worker
LOCK = ".hyperparameters.lock"
LOCK_SECONDS = 60.0  # how long a worker waits for the others to let go of an SQLite file


def searched(method: str) -> tuple[str, ...]:
    """The hyperparameters that matter to a method, in the order of `LEVELS`.

    Raises:
        ValueError: unknown method, or `student`, which has none of them.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: choose one of {', '.join(METHODS[1:])}")
    names = tuple(name for part, its in SEARCHED.items() if part in method.split("_") for name in its)
    if not names:
        raise ValueError(f"method {method!r} has nothing to search: choose one of {', '.join(METHODS[1:])}")
    return tuple(name for name in LEVELS if name in names)


def search_space(method: str) -> dict[str, BaseDistribution]:
    """What Optuna chooses from: for each hyperparameter of the method its place in `LEVELS`, from 0.

    Places are ordered and evenly spaced where the values are not, so that neighbours teach about each other.

    Raises:
        ValueError: as in `searched`.
    """
    return {f"{name}_level": IntDistribution(0, len(LEVELS[name]) - 1) for name in searched(method)}


def base_spec(method: str, profile: str = "full") -> RunSpec:
    """The run that is varied: the paper's settings, 5,000 training images held out; in `smoke` a tiny one.

    Raises:
        ValueError: as in `searched`.
    """
    searched(method)
    spec = RunSpec(method, validation_images=VALIDATION_IMAGES)
    return dataclasses.replace(spec, **SMOKE) if profile == "smoke" else spec


def spec_of_trial(trial: Trial | FrozenTrial, base: RunSpec) -> RunSpec:
    """The run of a trial: `base` at the trial's levels, with a seed of its own.

    The seed is the trial's number, so that a setting proposed twice is trained twice, with other luck.
    """
    setting = {name: LEVELS[name][trial.params[f"{name}_level"]] for name in searched(base.method)}
    return dataclasses.replace(base, seed=trial.user_attrs.get("seed", trial.number), **setting)


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
    base = study.completed(study.scaled(base_spec(method, study.profile)))
    proposals = open_search(study, base, storage, seed)
    _signals = study.signals  # may take long, and no trial is under way meanwhile
    unfinished: list[Trial] = []
    while not unfinished and time.monotonic() < deadline:
        with FileLock(study.folder / LOCK):  # workers of one folder ask one after the other
            take_over_abandoned(proposals)
            asked = ask(proposals, base, n_trials, at_once)
        if not asked:
            break
        with settled(proposals, study, asked, base) as unfinished:
            train(study, asked, base, at_once, deadline, signs_of_life(asked, report))
    return trials(study.ledger.read(), base)


def open_search(study: Study, base: RunSpec, storage: str | None = None, seed: int | None = None) -> optuna.Study:
    """Open or begin the search in a storage; what the ledger knows and the storage does not is told to it.

    The search's name holds the identity of `base`: another teacher or other images are another search.

    Raises:
        ValueError: the storage cannot be opened; a password in its URL is not shown.
    """
    url = storage or f"sqlite:///{study.folder / 'hyperparameters.db'}"
    paths.check_writable(study.folder)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Two workers that begin at the same time would both make the tables, and both enqueue the paper's setting.
    with FileLock(study.folder / LOCK), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)
        name = f"{base.method}_k{base.k}_{base.run_id}"
        try:
            proposals = optuna.create_study(
                storage=_storage(url), study_name=name, sampler=sampler, direction="maximize", load_if_exists=True
            )
        except (SQLAlchemyError, ImportError, ValueError, RuntimeError, OSError) as error:
            raise ValueError(
                f"cannot open the storage {_without_password(url)} ({str(error).splitlines()[0]}): "
                "give an Optuna storage URL such as sqlite:///search.db"
            ) from error
        remember(proposals, trials(study.ledger.read(), base), base)
        proposals.enqueue_trial(levels_of(base), skip_if_exists=True)
    return proposals


def trials_under_way(study: Study, method: str, storage: str | None = None) -> int:
    """How many trials of a search are begun and not done, by any worker: its finalists are known when there is none.

    Raises:
        ValueError: the storage cannot be opened, or the method has nothing to search.
    """
    base = study.completed(study.scaled(base_spec(method, study.profile)))
    states = [trial.state for trial in open_search(study, base, storage).get_trials(deepcopy=False)]
    return states.count(TrialState.RUNNING) + states.count(TrialState.WAITING)


def levels_of(spec: RunSpec) -> dict[str, int]:
    """The places of a run's hyperparameters in `LEVELS`, as Optuna has them; `search_space` backwards."""
    return {f"{name}_level": LEVELS[name].index(getattr(spec, name)) for name in searched(spec.method)}


def remember(proposals: optuna.Study, rows: pd.DataFrame, base: RunSpec) -> None:
    """Tell the search the trials of the ledger that it does not know: from another machine, or a lost storage."""
    known = {trial.user_attrs.get("run_id") for trial in proposals.get_trials(deepcopy=False)}
    for _index, row in rows[~rows["run_id"].isin(known) & ~rows["fresh"]].iterrows():
        proposals.add_trial(
            optuna.trial.create_trial(
                params=levels_of(spec_of(row)),
                distributions=search_space(base.method),
                value=float(row["validation_accuracy"]),
                user_attrs={"run_id": row["run_id"], "seed": int(row["seed"])},
            )
        )


def ask(proposals: optuna.Study, base: RunSpec, n_trials: int, at_once: int) -> list[Trial]:
    """The next trials, at most `at_once`, given back ones first; none when the search has its `n_trials`."""
    asked: list[Trial] = []
    while len(asked) < at_once:
        others = _counted(proposals)
        if len(others) >= n_trials and not any(trial.state == TrialState.WAITING for trial in others):
            break
        trial = proposals.ask(search_space(base.method))
        # Another worker may have asked at the same moment: numbers are given once, so the higher one is too many.
        if sum(other.number < trial.number for other in _counted(proposals)) >= n_trials:
            proposals.tell(trial, state=TrialState.FAIL)
            break
        spec = spec_of_trial(trial, base)
        setting = {name: getattr(spec, name) for name in searched(base.method)}
        for name, value in {"run_id": spec.run_id, "seed": spec.seed, "seen": time.time(), **setting}.items():
            trial.set_user_attr(name, value)
        asked.append(trial)
    return asked


def train(
    study: Study,
    asked: Sequence[Trial],
    base: RunSpec,
    at_once: int,
    deadline: float,
    report: Report,
) -> None:
    """Train the runs of these trials; one that diverges is told to be the worst, and does not stop the others."""
    specs = [spec_of_trial(trial, base) for trial in asked]
    try:
        study.run_all(specs, CAMPAIGN, Way(at_once), deadline, report)
    except TrainingDiverged as error:
        if len(asked) > 1:  # which one it was shows when each is trained alone
            for trial in asked:
                train(study, [trial], base, 1, deadline, report)
        else:
            report(f"{specs[0].run_id} diverged: {error}")
            asked[0].set_user_attr("diverged", str(error))


@contextlib.contextmanager
def settled(proposals: optuna.Study, study: Study, asked: Sequence[Trial], base: RunSpec) -> Iterator[list[Trial]]:
    """Afterwards, however the block ends, tell the trials whose run is in the ledger and give back the others.

    Yields:
        A list that then holds the trials that were given back.
    """
    given_back: list[Trial] = []
    try:
        yield given_back
    finally:
        accuracy = study.ledger.read().set_index("run_id")["validation_accuracy"]
        for trial in asked:
            run_id = spec_of_trial(trial, base).run_id
            if run_id in accuracy.index:
                proposals.tell(trial, float(accuracy[run_id]), skip_if_finished=True)
            elif "diverged" in trial.user_attrs:
                proposals.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            else:
                give_back(proposals, trial)
                given_back.append(trial)


def give_back(proposals: optuna.Study, trial: Trial | FrozenTrial) -> None:
    """Let any worker go on with a trial: the same levels and seed, so the same run and its checkpoint."""
    with contextlib.suppress(ValueError):  # Optuna's word for a trial that another worker gave back just now
        proposals.tell(trial.number, state=TrialState.FAIL)
        seed = trial.user_attrs.get("seed", trial.number)
        proposals.enqueue_trial(trial.params, user_attrs={"seed": seed, "given_back": trial.number})


def take_over_abandoned(proposals: optuna.Study) -> None:
    """Give back the trials of workers that gave no sign of life for a while: they were killed."""
    for trial in proposals.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        begun = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
        if time.time() - trial.user_attrs.get("seen", begun) > GRACE_SECONDS:
            give_back(proposals, trial)


def signs_of_life(asked: Sequence[Trial], report: Report) -> Report:
    """`report`, which training calls all the time, with a sign of life of these trials now and then."""
    beaten = time.monotonic()

    def report_and_beat(line: str) -> None:
        nonlocal beaten
        report(line)
        if time.monotonic() - beaten > BEAT_SECONDS:
            beaten = time.monotonic()
            for trial in asked:
                trial.set_user_attr("seen", time.time())

    return report_and_beat


def confirm(
    study: Study,
    method: str,
    at_once: int = 1,
    deadline: float = math.inf,
    report: Report = print_line,
) -> pd.DataFrame:
    """Train the finalists of a search again with fresh seeds, which had no part in the choice; return all rows."""
    base = study.completed(study.scaled(base_spec(method, study.profile)))
    settings = finalists(trials(study.ledger.read(), base))
    specs = [dataclasses.replace(base, seed=seed, **setting) for seed in FRESH_SEEDS for setting in settings]
    study.run_all(specs, CAMPAIGN, Way(at_once), deadline, report)
    return trials(study.ledger.read(), base)


def trials(ledger: pd.DataFrame, base: RunSpec) -> pd.DataFrame:
    """The ledger rows that vary `base` in what is searched, and in its seed.

    Where `base` names no teacher, those of the teacher with the most runs: surfaces of two teachers do not mix.

    Returns:
        The rows with a column for each hyperparameter of the method, and `fresh`, whether the seed had no part in
        the search.
    """
    names = searched(base.method)
    free = (*names, *(() if base.teacher_sha256 else ("n_steps",)))
    same = ledger[(ledger["method"] == base.method) & (ledger["k"] == base.k)]
    specs = [spec_of(row) for _index, row in same.iterrows()]
    taught = [base.teacher_sha256 in ("", spec.teacher_sha256) for spec in specs]
    varied = [spec.setting(*free) == base.setting(*free) and its for spec, its in zip(specs, taught, strict=True)]
    rows = same.assign(
        **{name: pd.Series([getattr(s, name) for s in specs], same.index, dtype=float) for name in names}
    )
    rows = rows[pd.Series(varied, same.index, dtype=bool)]
    if not base.teacher_sha256:
        rows = of_one_teacher(rows)
    return rows.assign(fresh=rows["seed"].astype(int) >= FRESH_SEEDS.start).reset_index(drop=True)


def choices(rows: pd.DataFrame) -> pd.DataFrame:
    """What is chosen by validation and what by test images, what each reports, and what fresh seeds say to it.

    The third line is the paper's setting, which nobody chose from these runs: its first run.

    Args:
        rows: of `trials`.

    Returns:
        Index `validation`, `test`, `paper` (those there are runs for). Columns: the hyperparameters,
        validation_accuracy and test_accuracy of the run (per cent; the latter is what would be reported), fresh_runs
        and fresh_accuracy (their mean test accuracy, NaN without any), optimism: reported minus fresh, in points.
    """
    names = _settings(rows)
    proposed = rows[~rows["fresh"]].sort_values("seed")
    papers = proposed[(proposed[names] == [getattr(RunSpec, name) for name in names]).all(axis=1)]
    chosen = {
        "validation": proposed.sort_values("validation_accuracy", ascending=False, kind="stable"),
        "test": proposed.sort_values("test_accuracy", ascending=False, kind="stable"),
        "paper": papers,
    }
    columns = [*names, "validation_accuracy", "test_accuracy"]
    table = pd.DataFrame({by: found[columns].iloc[0] for by, found in chosen.items() if len(found)}).T
    table = table.reindex(columns=columns).astype(float).rename_axis("chosen_by")
    fresh = rows[rows["fresh"]].groupby(names)["test_accuracy"].agg(["size", "mean"])
    measured = fresh.reindex(pd.MultiIndex.from_frame(table[names]) if len(names) > 1 else table[names[0]])
    table["fresh_runs"] = measured["size"].fillna(0).astype(int).to_numpy()
    table["fresh_accuracy"] = measured["mean"].to_numpy(dtype=float)
    return table.assign(optimism=table["test_accuracy"] - table["fresh_accuracy"])


def candidates(rows: pd.DataFrame) -> list[dict[str, float]]:
    """The settings that may be preferred: the three best by validation, and the paper's; no test image had a say.

    Args:
        rows: of `trials`.
    """
    names = _settings(rows)
    best = rows[~rows["fresh"]].sort_values("validation_accuracy", ascending=False, kind="stable")
    settings = best[names].drop_duplicates().head(FINALISTS).to_dict("records")
    return _distinct(settings + choices(rows)[names].filter(["paper"], axis=0).to_dict("records"))


def finalists(rows: pd.DataFrame) -> list[dict[str, float]]:
    """The settings worth fresh seeds: the candidates, and the test images' choice, to see what that would have cost.

    Args:
        rows: of `trials`.
    """
    chosen_on_test = choices(rows)[_settings(rows)].filter(["test"], axis=0)
    return _distinct(candidates(rows) + chosen_on_test.to_dict("records"))


def _distinct(settings: list[dict[str, float]]) -> list[dict[str, float]]:
    return [setting for place, setting in enumerate(settings) if setting not in settings[:place]]


def preferred(ledger: pd.DataFrame, method: str = "kd") -> dict[str, float] | None:
    """The setting that validation prefers: of the candidates the one with the best mean over the fresh seeds.

    Best of thirty single runs is luck as well; fresh seeds have none of it. So there is no answer before them. The
    test images' choice is no candidate, however well it does: test images proposed it.

    Returns:
        Its hyperparameters, or None while the search and its fresh seeds are not run yet.
    """
    rows = trials(ledger, base_spec(method))
    names, fresh = _settings(rows), rows[rows["fresh"]]
    if rows.empty or fresh.empty:
        return None
    runs = {tuple(values): its for values, its in fresh.groupby(names)}
    wanted = [tuple(setting.values()) for setting in candidates(rows)]
    if any(len(runs.get(setting, ())) < len(FRESH_SEEDS) for setting in wanted):
        return None
    best = max(wanted, key=lambda setting: runs[setting]["validation_accuracy"].astype(float).mean())
    return dict(zip(names, best, strict=True))


def _settings(rows: pd.DataFrame) -> list[str]:
    """The hyperparameters that rows of `trials` have a column for."""
    return [name for name in LEVELS if name in rows]


def _counted(proposals: optuna.Study) -> list[FrozenTrial]:
    return [trial for trial in proposals.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]


def _storage(url: str) -> optuna.storages.BaseStorage:
    """The storage; one in an SQLite file waits for the other workers instead of failing."""
    options = {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=options)


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//***@", url)
