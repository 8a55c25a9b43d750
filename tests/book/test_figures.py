"""Figures that fill as runs arrive: what they show without runs, with some, and with others than they are about."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from ledgers import student_rows, table

from kdig_utils.analysis import laboratory
from kdig_utils.book import figures
from kdig_utils.experiments import evidence


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDIG_ROOT", str(tmp_path))
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "runs.csv"


def drawn(ledger: Path, rows: list[dict]) -> tuple[list[str], plt.Axes]:
    """The panel of the laptop protocol's L1 at the paper's scale, with this committed ledger."""
    table(rows).to_csv(ledger, index=False)
    _fig, axes = plt.subplots()
    contrasts = laboratory.contrasts(laboratory.accuracies(laboratory.read()))
    return figures.draw_paper_scale(axes, contrasts.query("question == 'L1'").iloc[1:]), axes


def test_a_panel_at_the_papers_scale_is_left_out_until_there_are_pairs_of_runs(ledger: Path) -> None:
    alone = student_rows("student", [91.0, 91.2], pairing="matched")
    others = student_rows("kd", [91.5, 91.9], pairing="shuffled")
    few = student_rows("kd", [81.5, 81.9], pairing="matched", train_images=2500)
    kind, axes = drawn(ledger, alone + others + few)
    assert (kind, axes.figure) == ([], None)


def test_it_shows_the_mean_difference_of_the_pairs_that_are_there(ledger: Path) -> None:
    rows = student_rows("student", [91.0, 91.2, 91.1], pairing="matched")
    kind, axes = drawn(ledger, rows + student_rows("kd", [91.5, 91.9], pairing="matched"))
    assert kind == [evidence.TRAINED]
    assert [text.get_text() for text in axes.texts] == ["2 seeds"]
    places = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "D"]
    assert places == pytest.approx([0.6])


@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (2, 2)])
def test_the_other_panels_take_the_place_of_those_that_are_left_out(rows: int, columns: int) -> None:
    fig, panels = plt.subplots(rows, columns, layout="constrained", squeeze=False)
    fig.draw_without_rendering()
    before = [panel.get_position() for panel in panels[0]]
    for panel in panels[-1] if rows > 1 else panels[0, -1:]:
        figures.leave_out(panel)
    fig.draw_without_rendering()
    after = [panel.get_position() for panel in panels[0]]
    if rows > 1:
        assert all(new.height > 1.8 * old.height for new, old in zip(after, before, strict=True))
    else:
        assert all(new.width > 1.3 * old.width for new, old in zip(after[:-1], before, strict=False))
