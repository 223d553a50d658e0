"""The tables and figures of the second study: right for rows whose effects are known."""

import dataclasses
import functools
import math

import pytest
import torch

import toy_data
import train
from results import (
    ranks, regimes, regimes_quotes, regimes_report, step_noise, study_quotes, yardsticks)
from support import report
from test_study import changed, unchecked

SEEDS = (1, 2, 3)


def row_of(regime, model, arm, seed, error=0.1, joint=0.5, square=1.0, rate=1.0):
    """A row whose every error, share and prediction is as named."""
    shares = {name: joint for name in yardsticks.READ}
    splits = [f"{split} {view}" for split in yardsticks.SPLITS for view in yardsticks.VIEWS]
    reader = {f"{key} {scale:g}": shares for key in splits for scale in yardsticks.GUIDANCE}
    rates = dict.fromkeys(yardsticks.VIEWS, rate)
    return {"regime": regime, "model": model, "arm": arm, "seed": seed, "rate": 1e-3,
            "fit": dict.fromkeys(yardsticks.VIEWS, [error] * 3),
            "generalisation": dict.fromkeys(splits, [error] * 3), "reader": reader,
            "predicted": {"square": square, "mean_square": 0.25, "rates": rates}}


@pytest.fixture
def rows():
    """SGA has 2, 3 and 4% more error than the baseline, and a tenth more samples that are right."""
    found = []
    for seed, percent in zip(SEEDS, (2, 3, 4)):
        base = 0.1 * seed                      # seeds differ more than arms
        found.append(row_of("paper", "dit", "baseline", seed, base, 0.5, 2.0))
        worse = base * (1 + percent / 100)
        found.append(row_of("paper", "dit", "sga", seed, worse, 0.6, 2.5, 1.1))
    found.append(row_of("paper", "dit", "baseline", regimes.CHOOSING_SEED, 0.2))
    return found


def test_effects_are_paired_by_seed(rows):
    table = regimes_report.table_of(rows, "paper", "dit")
    assert len(table) == 6                                             # the choosing seed is none
    assert regimes_report.effects(table, "sga", "fit") == pytest.approx([2, 3, 4])
    points = regimes_report.effects(table, "sga", "joint, guidance 2")
    assert points == pytest.approx([10, 10, 10])
    assert regimes_report.predicted_noises(table, "sga") == pytest.approx([1.25] * 3)
    assert regimes_report.predicted_rates(table, "sga", "micro") == pytest.approx([10] * 3)
    without = {key: row for key, row in table.items() if key != ("baseline", 2)}
    assert regimes_report.effects(without, "sga", "fit") == pytest.approx([2, 4])


def density(x, freedom):
    scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    flat = math.exp(scale) / math.sqrt(freedom * math.pi)
    return flat * (1 + x * x / freedom) ** (-(freedom + 1) / 2)


@pytest.mark.parametrize("n", regimes_report.QUANTILES)
def test_the_quantiles_cut_off_a_fortieth_of_students_t(n):
    quantile = regimes_report.QUANTILES[n]
    x = torch.linspace(0, quantile, 20_001, dtype=torch.float64)
    inside = torch.trapezoid(density(x, n - 1), x).item()
    assert inside == pytest.approx(0.475, abs=1e-4)


def test_an_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    covered = 0
    for values in samples.tolist():
        _, low, high = regimes_report.t_interval(values)
        covered += low < 0 < high
    # Four standard deviations of a share of 4000.
    assert covered / 4000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_the_tables_hold_what_the_rows_say(rows):
    text = regimes_report.tables(rows)
    assert "## paper, DiT" in text and "## paper, U-Net" not in text
    [mechanism] = [line for line in text.splitlines() if line.startswith("| SGA (`sga`) | no")]
    assert "| 1.25 | -10.0, -10.0, -10.0 | +3.0, +3.0, +3.0 | +3.0 (+0.5 to +5.5) |" in mechanism
    effect = next(line for line in text.splitlines() if line.startswith("| SGA | 3 |"))
    assert "+3.0 (+0.5 to +5.5)" in effect and "+10.0 (+10.0 to +10.0)" in effect
    assert "1.250 (1.250 to 1.250)" in text
    assert "| 0.001 | 200.0/1000 |" in text


def two_squares():
    """Rows of step_noise.jsonl: the scheme's steps have the expected square 4 times as large."""
    rows = []
    for scheme, square, mean_square in (("baseline", 2.0, 0.25), ("tuple", 6.0, 1.0)):
        rows.append({"model": "dit", "regime": "paper", "step": 0, "scheme": scheme,
                     "predicted": square, "mean_square": mean_square, "measured": 1.1 * square,
                     "standard_error": 0.011 * square})
    return rows


def test_the_noise_of_a_step_is_its_square_over_that_of_its_mean():
    """6/1 over 2/0.25, which is 0.75, by M and as measured; two errors of 1% each make 2.8%."""
    [found] = regimes_report.noises_over_the_baselines(two_squares())
    case, scheme, predicted, measured, bar = found
    assert (*case, scheme) == ("dit", "paper", "tuple")
    assert (predicted, measured) == pytest.approx((0.75, 0.75))
    assert bar == pytest.approx(0.75 * 2 * 2**0.5 * 0.01)


def test_the_figures_are_drawn_from_whatever_rows_there_are(rows, tmp_path):
    for name, (lines, title) in regimes_report.FIGURES.items():
        regimes_report.draw_effects(rows, lines(), title, tmp_path / name)
    noises = two_squares()
    regimes_report.draw_step_noise(noises, tmp_path / "noise.png")
    for name in (*regimes_report.FIGURES, "noise.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_every_arm_of_the_study_has_a_name_for_its_reader():
    arms = {arm for arms in regimes.ARMS.values() for arm in arms} | set(step_noise.SCHEMES)
    assert arms - {"baseline"} == set(regimes_report.ARM_TITLES)
    assert set(regimes_report.MECHANISMS) == set(regimes_report.ARM_TITLES)
    assert set(regimes.ARMS_ELSEWHERE) == {"baseline", *regimes_report.IN_EVERY_REGIME}
    assert set(regimes.REGIMES) == set(regimes_report.REGIME_TITLES)


# An expected gradient E ghat gives each view so much weight at such noise levels. If two arms agree
# in this, all networks have the same E ghat under both. If not, some network has not.

@functools.cache
def weights_by_view_and_noise(name, model):
    """(12,) shares of the weight in all steps, by granularity and by quarter of the noise levels.

    A root without a micro view counts apart, so that it shows if its views weigh more.
    """
    s = train.Settings(model=model, arm=name, pixels=8, width=24, depth=1, roots=40,
                       smallest_object=0.24, tuples=32, finetune_steps=400, pretrain_steps=1)
    run = train.Run(s)
    run.step = 1
    run.begin_finetuning()
    number_of_views = torch.bincount(run.root)                     # (40,)
    assert set(number_of_views.tolist()) == {2, 3}
    found = torch.zeros(2, 3, 4, dtype=torch.float64)
    for step in range(2, run.last + 1):
        views, _ = run.plan[step - 2]
        _, _, t, _, a = train.draw_batch(run, step)
        whole = number_of_views[run.root[views]] - 2
        quarter = (4 * t).long().clamp(max=3)
        found.index_put_((whole, run.granularity[views], quarter), a.double(), accumulate=True)
    return found / found.sum()


def grey(scenes, granularity, pixels):
    """In place of toy_data.views: nothing here depends on what an image shows."""
    n = len(granularity)
    return torch.zeros(n, 3, pixels, pixels), torch.ones(n, 12, dtype=torch.long)


def some_products(run):
    """In place of the products of the views' gradients, for the arm quiet."""
    gradients = torch.randn(len(run.root), 4, generator=torch.Generator().manual_seed(0))
    return gradients @ gradients.T


@pytest.mark.parametrize("name", regimes_report.MECHANISMS)
def test_an_ingredient_has_the_expected_gradient_that_the_table_says(monkeypatch, name):
    monkeypatch.setattr(toy_data, "views", grey)
    monkeypatch.setattr(report, "products_of_views", some_products)
    objective, gradient, _ = regimes_report.MECHANISMS[name]
    assert objective == gradient
    baseline = weights_by_view_and_noise("baseline", "dit")
    for model in ("dit", "unet") if name.startswith("sga") else ("dit",):
        weights = weights_by_view_and_noise(name.removesuffix("-short"), model)
        # A hundredth of the weight moves by chance.
        moved = (weights - baseline).abs().sum() / 2
        assert (moved < 0.02) == (gradient == "yes")


# --- The page and the committed rows --------------------------------------------------------------

PAGE = (regimes.ROOT / "results/README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def committed():
    return regimes.read_rows()


def test_the_committed_runs_are_paired_and_see_as_many_tuples(committed):
    keys = {regimes.key_of(row) for row in committed}
    assert len(keys) == len(committed) > 0
    baselines = {key for key in keys if key[2] == "baseline"}
    for row in committed:
        regime, model, arm, seed, rate = regimes.key_of(row)
        assert (regime, model, "baseline", seed, rate) in baselines
        s = regimes.settings_of(regime, model, arm, seed, rate)
        assert row["settings"] == dataclasses.asdict(s)


def test_the_rates_of_the_committed_runs_are_the_chosen_ones(committed):
    for row in committed:
        if row["seed"] != regimes.CHOOSING_SEED:
            chosen = regimes.chosen_rate(committed, row["regime"], row["model"])
            assert row["rate"] == chosen


def test_the_committed_tables_are_those_of_the_committed_rows(committed):
    tables = regimes_report.tables(committed) + "\n"
    assert regimes_report.TABLES.read_text(encoding="utf-8") == tables
    for model in regimes.MODELS:
        assert "\n".join(regimes_report.mechanism_table(committed, model)) in PAGE
    for name in (*regimes_report.FIGURES, "step_noise.png"):
        assert f"({name})" in PAGE and (regimes.ROOT / "results" / name).exists()


def test_the_fit_follows_the_predicted_noise_of_the_four_ways_to_meet(committed):
    """The page says so."""
    table = regimes_report.table_of(committed, "paper", "dit")
    noises, fits = [], []
    for arm in ("tuple", "tuple_max", "stratified", "quiet"):
        noises.append(regimes_report.mean(regimes_report.predicted_noises(table, arm)))
        fits.append(regimes_report.mean(regimes_report.effects(table, arm, "fit")))
    assert noises == sorted(noises, reverse=True) and fits == sorted(fits, reverse=True)


def test_conflict_grows_in_every_arm_of_every_regime_in_the_mean(committed):
    """The page says so."""
    shares = {}
    for row in committed:
        if row["seed"] in regimes.SEEDS:
            key = row["regime"], row["model"], row["arm"]
            shares.setdefault(key, []).append(
                [row["probe"][moment]["conflict"] for moment in (0, -1)])
    assert len(shares) > 30
    for start_and_end in shares.values():
        start, end = map(regimes_report.mean, zip(*start_and_end))
        assert end > start + 0.05


def test_the_numbers_on_the_page_are_those_of_the_committed_rows(committed):
    sentences = regimes_quotes.sentences(committed, step_noise.read_rows(), ranks.read_rows())
    assert study_quotes.missing(PAGE, sentences) == []
    flat = " ".join(PAGE.split())
    for sentence in sentences:
        twin = flat.replace(sentence, changed(sentence))
        assert sentence in study_quotes.missing(twin, sentences)
    assert unchecked(PAGE, sentences) == set()
