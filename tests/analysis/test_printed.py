"""What the authors printed beside the paper: figures, curves, and that they agree with the networks they released."""

import numpy as np
import pytest

from kdig_utils.analysis import printed, witnesses
from kdig_utils.analysis.claims import paper


def value(method: str, than: str, measured: str) -> float:
    return printed.gains(method, than).set_index("measured").loc[measured, "value"]


@pytest.mark.parametrize(
    ("measured", "points"),
    [
        ("headline", 1.10),
        ("mean of ten runs", 0.834),
        ("best of sixty resamples", 0.66),
        ("the paper's sweep, k = 5", 0.24),
        ("earlier sweep, k = 5", 0.91),
        ("earlier sweep, mean of 8 sizes", 0.49375),
        ("six runs, overlay probability 0.25", 0.47),
        ("six runs, overlay probability 0.5", -0.03),
    ],
)
def test_answers_and_reasons_against_neither_as_the_authors_measured_it(measured: str, points: float) -> None:
    assert value("kd_ig", "student", measured) == pytest.approx(points)


def test_reasons_on_top_of_answers_as_the_authors_measured_it() -> None:
    assert value("kd_ig", "kd", "earlier sweep, mean of 8 sizes") == pytest.approx(-0.1175)
    assert value("kd_ig", "kd", "six runs, overlay probability 0.25") == pytest.approx(0.13)
    assert value("kd_ig", "kd", "six runs, overlay probability 0.5") == pytest.approx(-0.37)


def test_an_interval_stands_where_runs_were_repeated_and_holds_its_value() -> None:
    for method, than in (("kd_ig", "student"), ("kd_ig", "kd"), ("kd", "student"), ("ig", "student")):
        table = printed.gains(method, than)
        known = table["low"].notna()
        assert list(table["measured"][known]) == [name for name in table["measured"] if "mean of" in name], (
            method,
            than,
        )
        assert (table["low"][known] < table["value"][known]).all()
        assert (table["value"][known] < table["high"][known]).all()


def test_the_curves_are_whole_and_learn() -> None:
    sweep = printed.table("sweep_curves").groupby(["notebook", "k"])
    assert len(sweep) == 32
    six = printed.table("six_curves").groupby(["method", "overlay_probability"], dropna=False)
    assert len(six) == 6
    for runs in (sweep, six):
        for _run, curve in runs:
            assert list(curve["epoch"]) == list(range(1, 101))
            assert curve["train_accuracy"].iloc[-1] > curve["train_accuracy"].iloc[0]


def test_starting_from_the_teachers_blocks_shows_early_and_not_at_the_end() -> None:
    curves = printed.table("sweep_curves").query("method == 'kd_ig' and k < 17")
    for epoch in (2, 5, 10):
        early = curves[curves["epoch"] == epoch].pivot(index="k", columns="initial_weights", values="train_accuracy")
        assert (early["teacher"] > early["random"]).all()
    tested = printed.earlier_sweep().drop(17)
    apart = tested["kd_ig, teacher's blocks"] - tested["kd_ig"]
    assert abs(apart.mean()) < apart.std() / np.sqrt(len(apart))


def test_the_six_printed_accuracies_are_those_of_the_six_released_networks() -> None:
    """Two sources that say the same: what a notebook prints, and what the file gives when it is measured."""
    measured = witnesses.read().query("measure == 'accuracy' and commit.str.startswith('148f216', na=False)")
    assert sorted(100 * measured["value"]) == pytest.approx(sorted(printed.six_runs()["test_accuracy"]), abs=0.011)


def test_imagenet_is_counted_in_whole_images_and_its_interval_is_that_of_two_proportions() -> None:
    told = paper()["history"]["imagenet"]
    n, gain = told["teacher_right"], printed.imagenet_gain("kd_ig", "student")
    p, q = (told["accuracy"][name] / 100 for name in ("kd_ig", "student"))
    half = 1.96 * 100 * np.sqrt(p * (1 - p) / n + q * (1 - q) / n)
    assert gain["value"] == pytest.approx(-2.15)
    assert (gain["low"], gain["high"]) == pytest.approx((-2.15 - half, -2.15 + half), abs=0.01)
    for percent in told["accuracy"].values():  # each is a whole number of images, to the digits printed
        assert round(round(percent * n / 100) / n * 100, 2) == percent


def test_the_search_is_told_as_its_summary_says() -> None:
    told, runs = paper()["history"]["search"], paper()["ablation_runs"]["kd"]
    assert told["maximum"] == paper()["headline"]["kd_accuracy"] == max(runs)
    assert told["minimum"] < told["quartiles"][0] < told["quartiles"][1] < told["quartiles"][2] < told["maximum"]
    assert np.mean(runs) < told["mean"]  # of ten runs at the chosen setting, and of all 45 settings
    assert told["settings"] % len(told["temperatures"]) == 0
