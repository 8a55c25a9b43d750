"""How often the rules of `verdicts` err: studies whose truth is known, simulated and judged as the scorecard judges."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kdig_utils.analysis import verdicts
from kdig_utils.analysis.claims import Claim, claims, lookup, signed_sum
from kdig_utils.analysis.comparisons import holm
from kdig_utils.method.spec import MAIN_METHODS, METHODS

# The claims that stand for their kinds, and what would be false: (claim, distance of the truth from the claim).
KINDS_OF_CLAIM = {
    "a mean of ten": "mean_kd_ig",
    "a best of ten": "headline_kd_ig",
    "a best of sixty": "resampled_kd_ig",
    "a single run": "sweep_k9",
    "a large difference": "kd_ig_over_student",
    "a small difference": "kd_ig_over_kd",
    "an interaction": "kd_ig_together",
    "no difference": "at_like_student",
}
TRUTHS = {"exactly true": 1.0, "off by half": 0.5, "false": 0.0}
OTHER_SIZE = 2.0  # points: what a single run of the sweep is off by where its claim is false


def operating_characteristics(
    seeds: Sequence[int] = (1, 3, 5, 10),
    studies: int = 1000,
    correlation: float = 0.0,
    seed: int = 0,
    kinds: Mapping[str, str] = MappingProxyType(KINDS_OF_CLAIM),
) -> pd.DataFrame:
    """How often each verdict falls where the truth is known: simulated studies, judged as the scorecard judges runs.

    Both sides are simulated, normal with the deviation of the paper's ten runs: the paper's number is one draw too.
    The truth is the paper's table: of a method its gain over `student`, of a difference itself; none of it where the
    claim is false. Of no difference: 0, half the smallest direct effect of the table, all of it. Each number of seeds
    is taken as the registered one.

    Args:
        correlation: of two methods' runs with one seed.
        kinds: the claims to judge, each by the name of its kind.

    Returns:
        A row for each kind of claim, truth and number of seeds: kind, claim, truth, seeds, and a share of the studies
        for each of the four verdicts on runs.

    Raises:
        ValueError: no runs or studies, or a correlation outside [0, 1].
    """
    if not (min(seeds, default=0) >= 1 and studies >= 1 and 0 <= correlation <= 1):
        found = f"seeds {tuple(seeds)}, studies {studies}, correlation {correlation}"
        raise ValueError(f"{found}: give one run and one study or more, and a correlation in [0, 1]")
    rng, registered, rows = np.random.default_rng(seed), {claim.name: claim for claim in claims()}, []
    cases = [(runs, truth, kind) for runs in seeds for truth in TRUTHS for kind in kinds]
    for runs, truth, kind in cases:
        claim = registered[kinds[kind]]
        table = _true_means(claim)
        theirs = _draws(table, (studies, claim.paper_runs), 0.0, rng)
        ours = _draws(_moved(claim, table, TRUTHS[truth]), (studies, runs), correlation, rng)
        found = _verdicts(claim, theirs, ours, verdicts.level(runs, runs))
        shares = {verdict: float((found == verdict).mean()) for verdict in (*verdicts.DECIDED, verdicts.UNDECIDED)}
        rows.append({"kind": kind, "claim": claim.name, "truth": truth, "seeds": runs, **shares})
    return pd.DataFrame(rows)


def _true_means(claim: Claim) -> dict[str, float]:
    """What the paper's table says of the methods that its kind of claim is made on, as the truth of a simulation."""
    if claim.group == "compression":
        place = str(claim.value[0]).rpartition(".")[2]
        return {method: lookup(f"compression_sweep_accuracy.{method}.{place}") for method in MAIN_METHODS}
    if claim.group == "resampling":
        return dict(lookup("monte_carlo.best"))  # shifted alike by the height of a best of sixty
    return {method: float(np.mean(lookup(f"ablation_runs.{method}"))) for method in METHODS}


def _moved(claim: Claim, table: dict[str, float], share: float) -> dict[str, float]:
    """The same table with this share of what is claimed."""
    if claim.measure == "no_difference":
        effect = (1 - share) * (table["kd_ig"] - table["kd"])
        return {**table, claim.methods[0]: table["student"] + effect}
    if claim.group == "compression":
        return {method: mean - (1 - share) * OTHER_SIZE for method, mean in table.items()}
    return {method: table["student"] + share * (mean - table["student"]) for method, mean in table.items()}


def _draws(
    means: dict[str, float], shape: tuple[int, int], correlation: float, rng: np.random.Generator
) -> dict[str, NDArray]:
    """Accuracies of each method, (studies, runs), normal with the paper's deviation."""
    deviation, _df = verdicts.papers_spread()
    common, own = correlation**0.5 * rng.normal(size=shape), (1 - correlation) ** 0.5
    return {name: mean + deviation * (common + own * rng.normal(size=shape)) for name, mean in means.items()}


def _verdicts(claim: Claim, theirs: dict[str, NDArray], ours: dict[str, NDArray], significance: float) -> NDArray:
    """The verdict of each simulated study, on the number that its simulated paper prints."""
    statistic = np.max if claim.statistic == "best" else np.mean
    claimed = signed_sum([statistic(theirs[method], axis=-1) for method in claim.methods])
    spread = verdicts.pooled_deviation(list(ours.values()))

    def found(methods: tuple[str, ...]) -> dict[str, NDArray]:
        runs = [ours[method] for method in methods]
        return verdicts.measure(replace(claim, methods=methods), runs, claimed, spread, significance)

    its = found(claim.methods)
    if claim.family:  # Holm's correction in each study, over its whole family
        tests = verdicts.families()[claim.family]
        corrected = holm(np.stack([found(methods)["p"] for methods, *_runs in tests]))
        alike = [other for other in claims() if other.family == claim.family and other.measure == "no_difference"]
        its["p_holm"] = corrected[tests.index(verdicts.comparison_of(claim))]
        its["p_level_holm"] = np.minimum(its["p_level"] * len(alike), 1)  # the strictest step of Holm's
    return verdicts.judge(claim, its, significance)
