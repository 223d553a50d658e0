"""What the study makes of its rows: known curves, known differences, and the committed table is that of the committed rows."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("study", RESULTS / "study.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def row(errors, step=100):
    """A run whose error is given at every 100 images, the same for each view."""
    return {"log": [{"images": step * (k + 1)} | {f"val_error_{view}": error for view in ("macro", "meso", "micro")} for k, error in enumerate(errors)]}


@pytest.mark.parametrize("score, images", [(0.5, 100), (0.3, 150), (0.2, 200), (0.1, 250), (0.05, 300)])
def test_images_to_reach_a_score_lie_on_the_line_between_checkpoints(study, score, images):
    falling = row([0.4, 0.2, 0.0])
    assert study.images_to_reach(falling, score) == pytest.approx(images if score != 0.05 else 275)
    assert study.images_to_reach(row([0.4, 0.2, 0.0], 50), score) == pytest.approx(study.images_to_reach(falling, score) / 2)


def test_a_score_that_is_never_reached_is_not_a_number_and_a_first_crossing_counts(study):
    assert math.isnan(study.images_to_reach(row([0.4, 0.3]), 0.2))
    assert study.images_to_reach(row([0.4, 0.2, 0.5, 0.1]), 0.3) == pytest.approx(150)


def test_the_interval_holds_the_mean_and_is_as_wide_as_the_seeds(study):
    mean, low, high = study.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and 1.6 < low < 2 and 4 < high < 4.4                  # 3 -+ 1.96 sqrt(2/5)
    assert study.mean_interval([7.0, 7.0]) == (7, 7, 7)


def test_every_run_of_the_study_has_the_budget_of_its_baseline(study):
    rows = study.read_rows()
    free = {"arm": "", "seed": 0, "every": 0, "finetune_steps": 0}
    assert len({(row["base"], row["model"], row["arm"], row["seed"]) for row in rows}) == len(rows) > 0
    for row in rows:
        assert row["settings"]["init"] == f"runs/study/{row['model']}-base-{row['base']}/pretrained.pt"
        like = next(other for other in rows if (other["base"], other["model"]) == (row["base"], row["model"]))
        assert row["settings"] | free == like["settings"] | free
        baseline = study.select(rows, row["base"], row["model"])[0]["baseline", row["seed"]]
        short = row["arm"].endswith("-short")
        assert short or row["log"][-1]["images"] == baseline["log"][-1]["images"]
        assert row["settings"]["finetune_steps"] == study.FINETUNE["finetune_steps"] * (2 / 3 if short else 1)


def test_the_thirds_of_t_make_up_the_final_error_and_begin_at_the_data(study):
    """The loss of v is largest near the data; thirds in the other order, or of other runs, would not fit."""
    for row in study.read_rows():
        for view in study.VIEWS:
            bands = row["bands"][f"seen {view}"]
            final = study.final(row, view=view)
            assert abs(sum(bands) / 3 - final) < 0.12 * final and bands[0] > bands[2]


def test_the_correlation_of_made_up_runs(study):
    def made(conflict, error):
        return {"probe": [{}, {"conflict": conflict}], "rows": [{"domain": "target", "split": "seen", "view": "macro", "error": error}]}
    of = {("baseline", 1): made(0.5, 1.0), ("baseline", 2): made(0.4, 2.0), ("whole", 1): made(0.0, 9.0)}
    of |= {("tuple", 1): made(0.4, 0.8), ("tuple", 2): made(0.5, 2.4), ("sga", 1): made(0.6, 1.2)}
    assert study.correlation(of) == pytest.approx(1) and study.relative(of, "tuple") == pytest.approx([-0.2, 0.2])
    of["sga", 1] = made(0.6, 0.8)
    assert study.correlation(of) < 0.9 and study.correlation(of, "sga") == pytest.approx(1)


def test_paired_differences_are_of_equal_seeds(study):
    of = {("a", 1): 5, ("a", 2): 7, ("a", 3): 1, ("b", 2): 4, ("b", 1): 1}
    assert study.paired(of, "a", "b", lambda row: row) == [4, 3]


def test_the_figures_are_drawn_from_the_rows(study, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(study, "ROOT", tmp_path)
    rows = [row for row in study.read_rows() if row["base"] == 0 and row["model"] == "dit"]
    study.draw(rows)
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == ["study.png", "study_geometry.png", "study_views.png"]
    assert all(file.stat().st_size > 10_000 for file in (tmp_path / "results").iterdir())


def test_the_committed_table_is_that_of_the_committed_rows(study):
    assert (RESULTS / "study_tables.md").read_text() == "\n".join(study.tables(study.read_rows())) + "\n"


@pytest.mark.parametrize("file", ["README.md", "results/README.md"])
def test_the_numbers_of_the_pages_are_those_of_the_committed_rows(study, file):
    rows, page = study.read_rows(), (RESULTS.parent / file).read_text()
    assert study.fill(page, rows) == page
    number = next(part for part in page.split("<!-- = ")[1:])
    twin = page.replace(number, number.replace(" -->", " -->1", 1), 1)        # a number that somebody has typed
    assert study.fill(twin, rows) == page != twin
