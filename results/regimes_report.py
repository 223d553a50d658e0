"""What the rows of the second study say: tables and figures, from the rows alone.

    python results/regimes_report.py

An effect compares an arm with the baseline of the same regime, network and seed: for errors it is
the change in percent of the baseline's, for shares the difference in points. Its interval is the t
interval over the seeds; the bootstrap's, which is too narrow for few seeds, stands beside it.
"""

import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

from matplotlib.figure import Figure  # noqa: E402

from results import regimes, step_noise, yardsticks  # noqa: E402
from results.study_statistics import mean_interval  # noqa: E402

RESULTS = ROOT / "results"
TABLES = RESULTS / "regimes_tables.md"
NAMES = {"dit": "DiT", "unet": "U-Net"}
# No colour of a granularity.
COLOURS = {"dit": "#000000", "unet": "#cc4c8f"}

# The 97.5% quantile of Student's t, by the number of values.
QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306,
             10: 2.262}

REGIME_TITLES = {"paper": "paper-like",
                 "macro_base": "macro base",
                 "all_weights": "all weights",
                 "eight_tuples": "8 tuples a step"}
ARM_TITLES = {"sga": "SGA", "sga-short": "SGA, 2/3 of the images", "tuple": "root tuples, 1/K_g",
              "tuple_max": "root tuples, 1/K_max", "stratified": "stratified, 1/K_g",
              "quiet": "quiet tuples", "offsets": "offsets", "flipped": "flipped offsets",
              "min_snr": "Min-SNR, epsilon", "min_snr_velocity": "Min-SNR, velocity"}

# An ingredient: has it the baseline's objective, and its expected gradient; what does it change?
MECHANISMS = {
    "tuple_max": ("yes", "yes", "views of one root meet"),
    "quiet": ("yes", "yes", "views in conflict meet (Eq. 23)"),
    "tuple": ("no", "no", "views of one root meet; a root's views share its weight"),
    "stratified": ("no", "no", "the same weights, without the roots"),
    "offsets": ("no", "no", "noise levels by granularity"),
    "flipped": ("no", "no", "the opposite noise levels"),
    "min_snr": ("no", "no", "weights by noise level and granularity"),
    "min_snr_velocity": ("no", "no", "such weights, small near noise too"),
    "sga": ("no", "no", "all of the method"),
    "sga-short": ("no", "no", "the method with 2/3 of the images")}


# --- Measures of one run --------------------------------------------------------------------------

def mean(values):
    values = list(values)
    return sum(values) / len(values)


def fit(row):
    return mean(mean(row["fit"][view]) for view in yardsticks.VIEWS)


def generalisation(row):
    return regimes.generalisation(row)


def held_out(row):
    return regimes.generalisation(row, "held_out")


def reader(what, scale, split="seen"):
    """The measure: a share that the reader finds, the mean over the granularities."""
    def measure(row):
        return mean(row["reader"][f"{split} {view} {scale:g}"][what] for view in yardsticks.VIEWS)
    return measure


def of_whole_scenes(what):
    """The measure: a share that the reader finds in whole scenes, at guidance 2."""
    def measure(row):
        return row["reader"]["seen macro 2"][what]
    return measure


# A yardstick: its measure, and whether its effect is a change in percent or in points.
YARDSTICKS = {"fit": (fit, "%"), "generalisation": (generalisation, "%"),
              "held-out captions": (held_out, "%"),
              "joint, guidance 1": (reader("joint", 1), "points"),
              "joint, guidance 2": (reader("joint", 2), "points"),
              "layout": (of_whole_scenes("layout"), "points"),
              "shape": (of_whole_scenes("shape_colour"), "points")}


# --- Effects --------------------------------------------------------------------------------------

def table_of(rows, regime, model):
    """{(arm, seed): row} of one regime and network, without the rows that chose the rate."""
    found = {}
    for row in rows:
        if (row["regime"], row["model"]) == (regime, model) and row["seed"] in regimes.SEEDS:
            found[row["arm"], row["seed"]] = row
    return found


def pairs_of(table, arm):
    """[(the arm's row, the baseline's row)], one for each seed that has both."""
    found = []
    for seed in regimes.SEEDS:
        if (arm, seed) in table and ("baseline", seed) in table:
            found.append((table[arm, seed], table["baseline", seed]))
    return found


def changes(table, arm, measure):
    """By seed, in percent: how much larger a measure of the arm is than the baseline's."""
    return changes_of_pairs(pairs_of(table, arm), measure)


def changes_of_pairs(pairs, measure):
    """The same for pairs (the arm's row, the baseline's row)."""
    return [100 * (measure(row) / measure(baseline) - 1) for row, baseline in pairs]


def effects(table, arm, yardstick):
    """One number for each seed: the arm against the baseline."""
    measure, unit = YARDSTICKS[yardstick]
    if unit == "%":
        return changes(table, arm, measure)
    return [100 * (measure(row) - measure(baseline)) for row, baseline in pairs_of(table, arm)]


def fits_of_view(table, arm, view):
    """By seed, in percent: the change of the fit of one granularity."""
    def fit_of_view(row):
        return mean(row["fit"][view])

    return changes(table, arm, fit_of_view)


def t_interval(values):
    """(mean, low, high): the 95% interval of a mean of normal values."""
    n, centre = len(values), mean(values)
    variance = sum((value - centre) ** 2 for value in values) / (n - 1)
    half = QUANTILES[n] * math.sqrt(variance / n)
    return centre, centre - half, centre + half


def noise_of(row):
    """E|ghat|^2 over |E ghat|^2 as predicted from the base's M. Without noise it would be 1."""
    return row["predicted"]["square"] / row["predicted"]["mean_square"]


def predicted_noises(table, arm):
    """By seed: the noise of the arm's first steps over that of the baseline's."""
    return [noise_of(row) / noise_of(baseline) for row, baseline in pairs_of(table, arm)]


def rate_of(row, view):
    """How fast steps whose expectation has length 1 lower the loss of a granularity, from M."""
    predicted = row["predicted"]
    return predicted["rates"][view] / math.sqrt(predicted["mean_square"])


def predicted_rates(table, arm, view):
    """By seed, in percent: how much faster the arm's first steps lower a granularity's loss."""
    def rate_of_view(row):
        return rate_of(row, view)

    return changes(table, arm, rate_of_view)


# --- Tables ---------------------------------------------------------------------------------------

def text_of(values, form="+.1f"):
    """Such as "+2.3 (+1.4 to +3.1)"; the interval needs two values or more."""
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{form}} (one seed)"
    centre, low, high = t_interval(values)
    return f"{centre:{form}} ({low:{form}} to {high:{form}})"


def effect_table(rows, regime, model):
    """The lines of a table: every arm of a regime and network, every yardstick."""
    table = table_of(rows, regime, model)
    units = [f"{name} ({unit})" for name, (_, unit) in YARDSTICKS.items()]
    lines = ["| arm | seeds | " + " | ".join(units) + " |",
             "|---|---|" + "---|" * len(units)]
    baselines = [row for (arm, _), row in table.items() if arm == "baseline"]
    if not baselines:
        return []
    own = []
    for measure, unit in YARDSTICKS.values():
        value = mean(measure(row) for row in baselines)
        own.append(f"{1000 * value:.1f}/1000" if unit == "%" else f"{value:.1%}")
    lines.append(f"| baseline itself | {len(baselines)} | " + " | ".join(own) + " |")
    for arm in regimes.ARMS[model][1:]:
        seeds = len(effects(table, arm, "fit"))
        if seeds:
            cells = [text_of(effects(table, arm, name)) for name in YARDSTICKS]
            lines.append(f"| {ARM_TITLES[arm]} | {seeds} | " + " | ".join(cells) + " |")
    return lines


def bootstrap_table(rows, regime, model):
    """The lines of a table: the same effects by bootstrap."""
    table = table_of(rows, regime, model)
    units = [f"{name} ({unit})" for name, (_, unit) in YARDSTICKS.items()]
    lines = ["| arm | " + " | ".join(units) + " |", "|---|" + "---|" * len(units)]
    for arm in regimes.ARMS[model][1:]:
        cells = []
        for name in YARDSTICKS:
            values = effects(table, arm, name)
            if len(values) > 1:
                centre, low, high = mean_interval(values)
                cells.append(f"{centre:+.1f} ({low:+.1f} to {high:+.1f})")
        if cells:
            lines.append(f"| {ARM_TITLES[arm]} | " + " | ".join(cells) + " |")
    return lines


def prediction_table(rows, regime, model):
    """The lines of a table: what M of the base said before the arms were trained."""
    table = table_of(rows, regime, model)
    lines = ["| arm | noise of a step over the baseline's | macro (%) | meso (%) | micro (%) |",
             "|---|---|---|---|---|"]
    for arm in regimes.ARMS[model][1:]:
        ratios = predicted_noises(table, arm)
        if ratios and arm != "sga-short":
            cells = [text_of(ratios, ".3f")]
            cells += [text_of(predicted_rates(table, arm, view)) for view in yardsticks.VIEWS]
            lines.append(f"| {ARM_TITLES[arm]} | " + " | ".join(cells) + " |")
    return lines


def mechanism_table(rows, model):
    """The lines of a table: what each ingredient is, what M said beforehand, what then happened.

    It is about the paper-like regime. Predictions and effects are means over the seeds, the latter
    with their intervals.
    """
    table = table_of(rows, "paper", model)
    lines = ["| ingredient | same objective? | same expected gradient? | what it changes "
             "| M said: noise of a step | M said: losses of macro, meso, micro fall slower by "
             "| errors (fit) of macro, meso, micro change by | fit | generalisation |",
             "|---|---|---|---|---|---|---|---|---|"]
    for arm, (objective, gradient, change) in MECHANISMS.items():
        ratios = predicted_noises(table, arm)
        if len(ratios) < 2 or arm == "sga-short":
            continue
        noise, speeds = f"{mean(ratios):.2f}", "as the baseline's"
        if gradient == "no":
            means = [mean(predicted_rates(table, arm, view)) for view in yardsticks.VIEWS]
            # As errors: below 0 is better.
            speeds = ", ".join(f"{0 - round(value, 1):+.1f}" for value in means)
        fits = [mean(fits_of_view(table, arm, view)) for view in yardsticks.VIEWS]
        by_view = ", ".join(f"{value:+.1f}" for value in fits)
        measured = [text_of(effects(table, arm, name)) for name in ("fit", "generalisation")]
        title = f"{ARM_TITLES[arm]} (`{arm}`)"
        cells = (title, objective, gradient, change, noise, speeds, by_view, *measured)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def rate_lines(rows, regime, model):
    """The lines of a table: the baseline's error at each learning rate that was tried."""
    lines = ["| learning rate | generalisation, seed of the choice |", "|---|---|"]
    for row in rows:
        if (row["regime"], row["model"]) == (regime, model) \
                and row["seed"] == regimes.CHOOSING_SEED:
            lines.append(f"| {row['rate']:g} | {1000 * generalisation(row):.1f}/1000 |")
    return lines


def tables(rows):
    """The text of regimes_tables.md."""
    lines = ["# The second study: tables", "",
             "Written by `python results/regimes_report.py` from `regimes.jsonl`. An effect "
             "compares an arm with the baseline of the same seed: errors in percent, shares in "
             "points, each with its t interval.", ""]
    for model, name in NAMES.items():
        lines += [f"## Mechanisms, {name}", "", *mechanism_table(rows, model), ""]
    for regime in regimes.REGIMES:
        for model, name in NAMES.items():
            if not table_of(rows, regime, model):
                continue
            lines += [f"## {regime}, {name}", "", "Effects:", ""]
            lines += effect_table(rows, regime, model) + [""]
            lines += ["Predicted from M of the base: the noise E\\|ĝ\\|²/\\|E ĝ\\|² of a step, "
                      "and the rates by granularity, for equally long mean steps E ĝ:", ""]
            lines += prediction_table(rows, regime, model) + [""]
            lines += ["The same effects by bootstrap, too narrow for few seeds:", ""]
            lines += bootstrap_table(rows, regime, model) + [""]
            lines += ["The choice of the learning rate:", ""]
            lines += rate_lines(rows, regime, model) + [""]
    return "\n".join(lines)


# --- Figures --------------------------------------------------------------------------------------

# The panels of a figure: a yardstick and its title.
SHOWN = {"fit": "fit", "generalisation": "generalisation", "joint, guidance 2": "joint accuracy",
         "shape": "shape"}
# Where the regimes are compared. All of them have these arms.
IN_EVERY_REGIME = ("sga", "sga-short", "tuple_max")


def lines_of_arms():
    """A line of the first figure: its label, and whose effect it is."""
    return [(title, "paper", arm) for arm, title in ARM_TITLES.items()]


def lines_of_regimes():
    """The same for the second figure. A line without an arm is a heading."""
    lines = []
    for regime, title in REGIME_TITLES.items():
        lines.append((title, regime, None))
        lines += [(ARM_TITLES[arm], regime, arm) for arm in IN_EVERY_REGIME]
    return lines


def draw_effects(rows, lines, title, file):
    """The effect of every line and network with its interval, one panel for each yardstick."""
    lines = [line for line in lines if line[2] is None or has_interval(rows, *line[1:])]
    figure = Figure(figsize=(16, 10), layout="constrained")
    axes = figure.subplots(1, len(SHOWN), sharey=True)
    for axis, (yardstick, name) in zip(axes, SHOWN.items()):
        paint_effects(axis, rows, lines, yardstick, "dit", -0.15)
        paint_effects(axis, rows, lines, yardstick, "unet", 0.15)
        axis.axvline(0, color="black", linewidth=1)
        unit = YARDSTICKS[yardstick][1]
        better = "left is better" if unit == "%" else "right is better"
        axis.set_title(name, fontsize=23)
        axis.set_xlabel(f"change in {unit}\n({better})", fontsize=21)
        axis.tick_params(labelsize=21)
    figure.suptitle(title, fontsize=27)
    paint_labels(axes[0], lines)
    for model, name in NAMES.items():
        axes[-1].plot([], [], "o-", color=COLOURS[model], label=name, linewidth=3, markersize=10)
    figure.legend(*axes[-1].get_legend_handles_labels(), fontsize=21, loc="lower left")
    figure.savefig(file, dpi=64)


def has_interval(rows, regime, arm):
    """Whether some network has two seeds or more of an arm."""
    numbers = [len(effects(table_of(rows, regime, model), arm, "fit")) for model in NAMES]
    return max(numbers) > 1


def paint_effects(axis, rows, lines, yardstick, model, shift):
    """The effects of one network, a little above or below the middle of each line."""
    for place, (_, regime, arm) in enumerate(lines):
        values = effects(table_of(rows, regime, model), arm, yardstick)
        if len(values) > 1:
            paint_interval(axis, t_interval(values), place + shift, COLOURS[model])


def paint_interval(axis, interval, height, colour):
    """A mean as a dot on the line of its interval."""
    centre, low, high = interval
    axis.plot([low, high], [height, height], color=colour, linewidth=3)
    axis.plot(centre, height, "o", color=colour, markersize=10)


def paint_labels(axis, lines):
    """The labels of the lines, from above to below. Headings are bold."""
    axis.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=22)
    for text, (_, _, arm) in zip(axis.get_yticklabels(), lines):
        if arm is None:
            text.set_fontweight("bold")
    axis.set_ylim(len(lines) - 0.5, -0.5)


def noises_over_the_baselines(rows):
    """[(case, scheme, predicted, measured, two standard errors)]: noise over the baseline's.

    A case is a network and a regime. The noise of a step is E|ghat|^2 / |E ghat|^2. Training steps
    measure its numerator alone, so that its denominator is M's in both. The errors of the two
    squares are added as if they were independent: too long a bar for the arms that see the
    baseline's own samples.
    """
    baselines = {}
    for row in rows:
        if row["scheme"] == "baseline":
            baselines[row["model"], row["regime"], row["step"]] = row
    found = []
    for row in rows:
        if row["scheme"] != "baseline":
            base = baselines[row["model"], row["regime"], row["step"]]
            predicted = noise_by(row, "predicted") / noise_by(base, "predicted")
            measured = noise_by(row, "measured") / noise_by(base, "measured")
            error = 2 * measured * math.hypot(relative_error(row), relative_error(base))
            case = row["model"], row["regime"]
            found.append((case, row["scheme"], predicted, measured, error))
    return found


def noise_by(row, square):
    """The noise of a step, from its "predicted" or its "measured" square."""
    return row[square] / row["mean_square"]


def relative_error(row):
    """The standard error of the measured square, as a share of it."""
    return row["standard_error"] / row["measured"]


def draw_step_noise(rows, file):
    """Predicted against measured noise of a step, over the baseline's: a panel for each case."""
    figure = Figure(figsize=(16, 8.4), layout="constrained")
    axes = figure.subplots(1, len(step_noise.CASES), sharex=True, sharey=True)
    colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
               "#999999"]
    colour_of = dict(zip(step_noise.SCHEMES[1:], colours))
    found = noises_over_the_baselines(rows)
    for axis, (model, regime) in zip(axes, step_noise.CASES):
        for case, scheme, x, y, error in found:
            # A point whose bar is as long as half of its value is thin and hollow.
            known = error < 0.5 * y
            if case == (model, regime):
                axis.errorbar(x, y, error, color=colour_of[scheme], fmt="o", markersize=10,
                              fillstyle="full" if known else "none", linewidth=2 if known else 0.7)
        axis.plot([0.65, 1.4], [0.65, 1.4], color="black", linewidth=1)
        axis.set_title(f"{NAMES[model]}, {REGIME_TITLES[regime]}", fontsize=23)
        axis.set_xlabel("predicted", fontsize=22)
        axis.tick_params(labelsize=21)
    # In one case the steps differ so much that its bar leaves the page.
    axes[0].set_ylim(0, 2.4)
    axes[0].set_ylabel("measured", fontsize=22)
    for scheme, colour in colour_of.items():
        axes[0].plot([], [], "o", color=colour, markersize=9, label=ARM_TITLES[scheme])
    axes[0].plot([], [], color="black", linewidth=1, label="where both are equal")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=20, loc="outside lower center",
                  ncols=3)
    figure.suptitle("M predicts how noisy training steps are, as a multiple of the baseline",
                    fontsize=27)
    figure.savefig(file, dpi=64)


FIGURES = {"regimes_arms.png": (lines_of_arms, "In the paper-like regime no ingredient of SGA "
                                "clearly lowers the mean error"),
           "regimes.png": (lines_of_regimes, "SGA lowers no mean error in any of four regimes")}


def main():
    rows = regimes.read_rows()
    TABLES.write_text(tables(rows) + "\n", encoding="utf-8")
    for name, (lines, title) in FIGURES.items():
        draw_effects(rows, lines(), title, RESULTS / name)
    draw_step_noise(step_noise.read_rows(), RESULTS / "step_noise.png")
    print("written:", json.dumps([TABLES.name, *FIGURES, "step_noise.png"]))


if __name__ == "__main__":
    main()
