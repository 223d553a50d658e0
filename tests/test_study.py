"""What the study makes of its rows: known curves, known differences, tables, figures, and pages
whose numbers are those of the committed rows.
"""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from matplotlib.text import Text

import ntk
import train
from results import study, study_figures, study_quotes, study_tables, tabulate
from results import study_statistics as statistics
from support import report

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "results/first_study.md").read_text(encoding="utf-8")
DETAILS = (ROOT / "results/details.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows():
    return statistics.read_rows()


# --- Statistics -----------------------------------------------------------------------------------

def made_curve(errors, images=100):
    """A run whose error is given at every so many images, the same for each view."""
    log = []
    for k, error in enumerate(errors, 1):
        checkpoint = {f"val_error_{view}": error for view in statistics.VIEWS}
        log.append(checkpoint | {"images": images * k})
    return {"log": log}


@pytest.mark.parametrize("score, images", [(0.5, 100), (0.3, 150), (0.2, 200), (0.1, 250)])
def test_images_to_reach_a_score_lie_on_the_line_between_checkpoints(score, images):
    falling, denser = made_curve([0.4, 0.2, 0.0]), made_curve([0.4, 0.2, 0.0], 50)
    assert statistics.images_to_reach(falling, score) == pytest.approx(images)
    assert statistics.images_to_reach(denser, score) == pytest.approx(images / 2)


def test_a_score_that_is_never_reached_is_not_a_number_and_a_first_crossing_counts():
    assert math.isnan(statistics.images_to_reach(made_curve([0.4, 0.3]), 0.2))
    back_and_forth = made_curve([0.4, 0.2, 0.5, 0.1])
    assert statistics.images_to_reach(back_and_forth, 0.3) == pytest.approx(150)


def test_the_share_of_images_is_that_of_the_baseline_of_the_same_seed():
    runs = {("baseline", 1): made_curve([0.4, 0.2]), ("baseline", 2): made_curve([0.4, 0.3]),
            ("sga", 1): made_curve([0.3, 0.1]), ("sga", 2): made_curve([0.4, 0.4])}
    shares = statistics.image_shares(runs, "sga")
    assert shares[0] == pytest.approx(150 / 200) and math.isnan(shares[1])
    assert statistics.arrivals(shares) == (1, shares[0])
    assert statistics.arrivals([math.nan])[0] == 0


def test_the_interval_holds_the_mean_and_is_as_wide_as_the_seeds():
    centre, low, high = statistics.mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # Five seeds of variance 2: the mean lies within 1.96 sqrt(2/5) = 1.24.
    assert centre == 3 and 1.6 < low < 2 and 4 < high < 4.4
    assert statistics.mean_interval([7.0, 7.0]) == (7, 7, 7)


def test_paired_differences_are_of_equal_seeds():
    def measure(row):
        return row

    runs = {("a", 1): 5, ("a", 2): 7, ("a", 3): 1, ("b", 2): 4, ("b", 1): 1}
    assert statistics.paired(runs, "a", "b", measure) == [4, 3]


def test_the_correlation_of_made_up_runs():
    def made(conflict, error):
        report_row = {"domain": "target", "split": "seen", "view": "macro", "error": error}
        return {"probe": [{}, {"conflict": conflict}], "rows": [report_row]}

    runs = {("baseline", 1): made(0.5, 1.0), ("baseline", 2): made(0.4, 2.0),
            ("whole", 1): made(0.0, 9.0), ("tuple", 1): made(0.4, 0.8),
            ("tuple", 2): made(0.5, 2.4), ("sga", 1): made(0.6, 1.2)}
    assert statistics.relative(runs, "tuple") == pytest.approx([-0.2, 0.2])
    assert statistics.correlation(runs) == pytest.approx(1)
    runs["sga", 1] = made(0.6, 0.8)
    assert statistics.correlation(runs) < 0.9
    assert statistics.correlation(runs, "sga") == pytest.approx(1)


def test_the_mean_cosine_by_kinds_is_that_of_all_pairs():
    roots, number = 4, 4 * 3 * 3
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(number, 5, generator=generator, dtype=torch.float64)
    gradients[:, 0] += 1                                           # so that the mean is not 0
    M = gradients @ gradients.T
    labels = torch.cartesian_prod(torch.arange(roots), torch.arange(3), torch.arange(3))
    point = {"pairs": ntk.pairs_by_kind(M, labels, ("root", "view", "level"))}
    i, j = torch.triu_indices(number, number, 1)
    expected = torch.cosine_similarity(gradients[i], gradients[j]).mean().item()
    found = statistics.mean_cosine(point, roots)
    assert found == pytest.approx(expected, abs=1e-6)              # the means by kind are float32
    assert statistics.mean_cosine(point, roots + 1) != pytest.approx(expected, abs=1e-6)


# --- The committed rows ---------------------------------------------------------------------------

def test_every_run_of_the_study_has_the_budget_of_its_baseline(rows):
    free = {"arm": "", "seed": 0, "every": 0, "finetune_steps": 0}
    keys = {(row["base"], row["model"], row["arm"], row["seed"]) for row in rows}
    assert len(keys) == len(rows) > 0
    for row in rows:
        base, model = row["base"], row["model"]
        assert row["settings"]["init"] == f"runs/study/{model}-base-{base}/pretrained.pt"
        runs, _ = statistics.select(rows, base, model)
        baseline, short = runs["baseline", row["seed"]], row["arm"].endswith("-short")
        assert row["settings"] | free == baseline["settings"] | free
        steps = study.SHORT_STEPS if short else study.FINETUNING["finetune_steps"]
        assert row["settings"]["finetune_steps"] == steps
        assert short or row["log"][-1]["images"] == baseline["log"][-1]["images"]


def test_the_thirds_of_t_make_up_the_final_error_and_begin_at_the_data(rows):
    """The error is largest near the data; thirds in another order, or of other runs, do not fit."""
    for row in rows:
        for view in statistics.VIEWS:
            thirds = row["bands"][f"seen {view}"]
            final = statistics.final(row, view=view)
            assert abs(sum(thirds) / 3 - final) < 0.12 * final
            assert thirds[0] > thirds[2]


def test_arms_with_few_seeds_are_left_out_and_said(rows):
    left_out = statistics.incomplete(rows)
    assert left_out == [(1, "unet", "flipped", 1), (1, "unet", "sga", 2)]
    runs, arms = statistics.select(rows, 1, "unet")
    assert not {"flipped", "sga"} & (set(arms) | {arm for arm, _ in runs})
    for _, _, arm, number in left_out:
        assert f"`{arm}` ({number} seed" in PAGE


def test_conflict_rises_in_every_arm(rows):
    """The page says so."""
    for base, model in {(row["base"], row["model"]) for row in rows}:
        runs, arms = statistics.select(rows, base, model)
        for arm in arms:
            every = [row["probe"] for row in statistics.of_arm(runs, arm)]
            first = sum(probe[0]["conflict"] for probe in every)
            assert sum(probe[-1]["conflict"] for probe in every) > first, (base, model, arm)


# --- One tiny run ---------------------------------------------------------------------------------

def test_a_run_of_the_study_makes_a_row_like_the_committed_ones(rows, tmp_path, monkeypatch):
    commands = []

    def run_here(command, **options):
        commands.append(command)
        train.main(command[2:])
        return subprocess.CompletedProcess(command, 0)

    def draw_nothing(*arguments):
        pass

    monkeypatch.setattr(report, "draw_all", draw_nothing)
    monkeypatch.setattr(study.subprocess, "run", run_here)
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr(study, "SIZE", {"pixels": 8, "width": 24, "depth": 1, "eval_images": 8,
                                        "sample_steps": 1})
    monkeypatch.setattr(study, "PRETRAINING", {"dit": {"pretrain_steps": 2, "batch": 4}})
    monkeypatch.setattr(study, "FINETUNING", {"finetune_steps": 6, "every": 3, "roots": 3,
                                              "probe": 2, "tuples": 2})
    row, like = study.run_once(7, "dit", "big", 1, "cpu"), rows[-1]
    assert row.keys() == like.keys()
    assert row["bands"].keys() == like["bands"].keys()
    assert row["log"][0].keys() == like["log"][0].keys()
    # The committed rows are older than this number.
    assert row["probe"][0].keys() == like["probe"][0].keys() | {"sign_by_chance"}
    # `big` joins three steps, so that 6 steps are 2, with a checkpoint after each.
    assert [point["step"] for point in row["log"]] == [3, 4]
    assert 0 < row["log"][0]["images"] < row["log"][1]["images"]
    for view in statistics.VIEWS:
        assert 0.1 < sum(row["bands"][f"seen {view}"]) / 3 / statistics.final(row, view=view) < 10
    assert json.dumps(row) and row["settings"]["init"] == "runs/study/dit-base-7/pretrained.pt"

    study.run_once(7, "dit", "big", 1, "cpu")                      # all is there already
    assert len(commands) == 2
    (tmp_path / "dit-big-1-7/report.json").unlink()                # stopped: it goes on
    study.run_once(7, "dit", "big", 1, "cpu")
    assert "--resume" in commands[2]


# --- Figures --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def figures(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    found = study_figures.draw(rows, folder)
    for name in found:
        assert (folder / name).stat().st_size > 10_000
    return found


def test_the_figures_are_drawn_from_the_rows(figures):
    """Large enough for a lecture hall, and each is on the page."""
    for name, figure in figures.items():
        assert f"({name})" in PAGE and (ROOT / "results" / name).exists()
        assert figure.get_size_inches()[0] <= 12
        texts = [text for text in figure.findobj(Text) if text.get_text()]
        assert min(text.get_fontsize() for text in texts) >= 12


def test_the_figures_say_what_their_titles_say(figures):
    for axis in figures["study.png"].axes:
        ratios = {line.get_label(): line.get_ydata() for line in axis.lines}
        assert min(ratios["sga"]) > 1
    for axis in figures["study_geometry.png"].axes:
        for line in axis.lines:
            assert line.get_ydata()[-1] > line.get_ydata()[0]


# --- Pages ----------------------------------------------------------------------------------------

def test_the_committed_tables_are_those_of_the_committed_rows(rows):
    tables = "\n".join(study_tables.tables(rows)) + "\n"
    assert (ROOT / "results/study_tables.md").read_text(encoding="utf-8") == tables


def test_the_tables_on_the_page_are_those_of_the_rows_and_reports(rows):
    assert len(tabulate.table()) == 2 + 12 + 12
    assert "\n".join(study_tables.arms_table(rows)) in PAGE
    assert "\n".join(tabulate.table()) in DETAILS


def changed(sentence):
    """The sentence with another digit in place of its last one."""
    place = max(k for k, letter in enumerate(sentence) if letter.isdigit())
    digit = str((int(sentence[place]) + 1) % 10)
    return sentence[:place] + digit + sentence[place + 1:]


def test_the_numbers_on_the_pages_are_those_of_the_committed_rows(rows):
    for page, sentences in study_quotes.sentences(rows).items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert study_quotes.missing(text, sentences) == [], f"{page} must say this"
        flat = " ".join(text.split())
        for sentence in sentences:
            twin = flat.replace(sentence, changed(sentence))
            assert sentence in study_quotes.missing(twin, sentences)


# Numbers in the prose that are no results of the study.
CONSTANTS = {"0.2", "0.5", "0.8", "95%", "99.9%", "4%", "10%", "1.6"}


def unchecked(text, sentences):
    """The decimal numbers, shares and counts of seeds in a page's prose that no sentence quotes."""
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    flat = " ".join(" ".join(prose).split())
    for sentence in sentences:
        flat = flat.replace(sentence, "")
    return set(re.findall(r"\d+\.\d+%?|\d+%|\d+ of \d+", flat)) - CONSTANTS


def test_no_number_in_the_prose_is_unchecked(rows):
    sentences = study_quotes.sentences(rows)["results/first_study.md"]
    assert unchecked(PAGE, sentences) == set()
    twin = PAGE + "\nIt is 12.5% better in 4 of 5 runs."
    assert unchecked(twin, sentences) == {"12.5%", "4 of 5"}


def test_every_column_and_field_is_explained(rows):
    explained = DETAILS.split("## What a run leaves in its folder")[1]
    for column in report.COLUMNS:
        view = column.rpartition("_")[2]
        short = f"`_{view}`" in explained and f"`{column.removesuffix(view)}macro`" in explained
        assert f"`{column}`" in explained or short, column
    for field in (*rows[-1]["probe"][0], "M", "kernel", *rows[-1]):
        assert f"`{field}`" in explained, field


def test_every_arm_is_on_the_page():
    for arm in statistics.ARMS:
        assert f"| `{arm}` |" in PAGE
