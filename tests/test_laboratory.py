"""The alignment laboratory: planted effects of a synthetic ledger are found, and nulls are not."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from kdig_utils import campaigns, laboratory
from kdig_utils.cifar10 import ImageSet
from kdig_utils.overlay import PAIRINGS, draw_epoch
from kdig_utils.runs import COLUMNS, Ledger, RunSpec

SEEDS = 10


def synthetic(tmp_path: Path, gains: dict[str, float], deviation: float = 0.3, seed: int = 0) -> pd.DataFrame:
    """A ledger in which `ig` gains what is planted, each seed with a common part of its own."""
    generator = np.random.default_rng(seed)
    common, ledger = generator.normal(0, deviation, SEEDS), Ledger(tmp_path / f"{seed}.csv")
    specs = [s for name in laboratory.CAMPAIGNS for s in campaigns.specs(name) if s.method in ("student", "ig")]
    rows = [row_of(spec, 91 + common[spec.seed] + gains.get(spec.pairing, 0.0) * (spec.method == "ig")
                   + generator.normal(0, 0.1)) for spec in specs]  # fmt: skip
    ledger.merge(pd.DataFrame(rows, columns=list(COLUMNS)))
    return ledger.read()


def row_of(spec: RunSpec, accuracy: float) -> dict[str, object]:
    names = ("run_id", "method", "k", "seed", "pairing", "epochs", "train_fraction")
    return {
        **{name: getattr(spec, name) for name in names},
        "campaign": "any", "test_accuracy": accuracy, "spec": json.dumps(asdict(spec)),
    }  # fmt: skip


def test_planted_gains_are_found_and_nulls_are_not(tmp_path: Path) -> None:
    planted = {"matched": 0.5, "edges": -0.4}
    table = laboratory.results(synthetic(tmp_path, planted), "ig").set_index("pairing")
    assert set(table[table["p_holm"] < 0.05].index) == set(planted)
    for pairing, gain in planted.items():
        assert table.loc[pairing, "gain"] == pytest.approx(gain, abs=0.14)  # three standard errors
    assert np.isnan(table.loc["none", "gain"])
    said = laboratory.verdict(table.reset_index(), "ig")
    assert "matched gains 0." in said
    assert "edges loses 0." in said
    assert "No difference from no overlay was shown for index-matched, shuffled, random" in said


def test_family_wise_error_stays_near_five_per_cent(tmp_path: Path) -> None:
    """15 ledgers without any effect: some pairing is called different in about 5 % of them, at most."""
    tables = [laboratory.results(synthetic(tmp_path, {}, seed=seed), "ig") for seed in range(15)]
    wrong = sum(bool((table["p_holm"] < 0.05).any()) for table in tables)
    print(f"{wrong} of {len(tables)} null ledgers show a difference")
    assert wrong <= 4  # fewer than one is expected; more than 4 in one of 1,000 cases


def test_what_was_not_run_is_not_claimed(tmp_path: Path) -> None:
    empty = Ledger(tmp_path / "none.csv").read()
    table = laboratory.results(empty, "kd_ig")
    assert table["pairing"].tolist() == ["none", *PAIRINGS]
    assert not table["runs"].any()
    assert table[["mean", "gain", "p", "p_holm"]].isna().all(axis=None)
    assert "not run yet" in laboratory.verdict(table, "kd_ig")
    figure, axes = plt.subplots()
    laboratory.draw_results(axes, empty, "kd_ig", "black")
    assert [text.get_text() for text in axes.texts] == ["not run yet"] * (1 + len(PAIRINGS))
    plt.close(figure)


def test_one_seed_is_shown_and_not_tested(tmp_path: Path) -> None:
    ledger = synthetic(tmp_path, {}).query("seed == 0")
    table = laboratory.results(ledger, "ig")
    assert (table["runs"] == 1).all()
    assert table["p"].isna().all()


def test_runs_with_online_answers_are_not_taken_for_stored_ones(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs.csv")
    ledger.merge(pd.DataFrame([row_of(RunSpec("kd", answers="online"), 95.0)], columns=list(COLUMNS)))
    assert not laboratory.results(ledger.read(), "kd_ig")["runs"].any()


def test_correlation_is_numpys() -> None:
    a, b = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0)), torch.rand(5, 8, 8)
    expected = [np.corrcoef(x.flatten(), y.flatten())[0, 1] for x, y in zip(a, b, strict=True)]
    assert laboratory.correlations(a, b).tolist() == pytest.approx(expected, abs=1e-5)
    assert laboratory.correlations(a, torch.ones(5, 8, 8)).isnan().all()


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_patterns_fill_the_range_of_a_map_whatever_is_blended_in(sample_train: ImageSet, pairing: str) -> None:
    images = sample_train.subset(torch.arange(12))
    generator = torch.Generator().manual_seed(1)
    maps, saliency = (torch.rand(12, 32, 32, generator=generator) for _each in range(2))
    blended = laboratory.blended_maps(pairing, images, maps, saliency)
    found = laboratory.pattern(pairing, blended, draw_epoch(12, 1.0, 0, 0))
    assert found.shape == (12, 32, 32)
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found.flatten(1).amax(1) > 0.45).all()
