"""The study's figures: one message and one function each.

`python results/study.py --draw` writes them.

Every function takes all rows and returns a matplotlib figure. All text is at least 16 points high
in a figure 12 inches wide, so that it can be read at the back of a lecture hall.
"""

import matplotlib
from matplotlib.figure import Figure

from results import study_statistics as statistics
from results.study_statistics import (
    MODELS, VIEWS, conflict, curve, mean_interval, of_arm, paired, relative, select, view_error)
from support.pictures import KINDS, VIEW_COLOURS

# The arms whose curves are drawn: colour and marker, told apart by colour-blind readers.
STYLES = {
    "sga": ("black", "o"), "min_snr": ("#882255", "o"),
    "offsets": ("#cc79a7", "o"), "flipped": ("#0072b2", "v"),
    "tuple": ("#d55e00", "o"), "tuple_max": ("#d55e00", "^")}

# The arms by what they change: their names, a colour and a marker.
FAMILIES = {
    "the method, sga": (("sga",), "black", "o"),
    "arms of tuples": (("stratified", "random", "tuple", "tuple_max"), "#d55e00", "^"),
    "arms of noise levels": (("offsets", "flipped", "global"), "#0072b2", "v"),
    "the arm min_snr": (("min_snr",), "#882255", "s"),
    "the arm big": (("big",), "silver", "D")}


def two_panels(title):
    """A figure with a panel for each network, and the panels by the network's name."""
    figure = Figure(figsize=(12, 7.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, fontsize=23)
    for axis, name in zip(axes, MODELS.values()):
        axis.set_title(name)
        axis.grid(alpha=0.3)
    return figure, dict(zip(MODELS, axes))


def curves(rows):
    """The error over the baseline's of the same seed and as many images."""
    figure, panels = two_panels("SGA is above the baseline's error at every checkpoint")
    for model, axis in panels.items():
        runs, _ = select(rows, 0, model)
        for arm, (colour, marker) in STYLES.items():
            images, ratios = mean_ratios(runs, arm)
            width = 3 if arm == "sga" else 1.5
            axis.plot(images, ratios, color=colour, marker=marker, linewidth=width, label=arm)
        axis.axhline(1, color="grey", linewidth=2)
        axis.set(xlabel="images of the fine-tuning", ylim=(0.98, 1.17))
    panels["dit"].set_ylabel("|v - u*|²/D over the baseline's (grey: 1)")
    panels["dit"].legend(title="mean of five seeds", ncols=2)
    return figure


def mean_ratios(runs, arm):
    """(images, error over the baseline's) of every checkpoint of an arm: means over its seeds."""
    seeds = statistics.shared_seeds(runs, arm)
    images, ratios = [], []
    for seed in seeds:
        baseline = dict(curve(runs["baseline", seed]))
        ratios.append([error / baseline[count] for count, error in curve(runs[arm, seed])])
        images.append([count for count, _ in curve(runs[arm, seed])])
    return mean_of_columns(images), mean_of_columns(ratios)


def mean_of_columns(lists):
    return [sum(column) / len(column) for column in zip(*lists)]


def views(rows):
    """The final error of each granularity minus the baseline's: every seed, mean and interval."""
    figure, panels = two_panels("Offsets move error between granularities and do not remove it")
    arms = ("tuple_max", "offsets", "flipped", "min_snr", "sga")
    for model, axis in panels.items():
        runs, _ = select(rows, 0, model)
        for place, arm in enumerate(arms):
            for k, view in enumerate(VIEWS):
                gaps = paired(runs, arm, "baseline", view_error(view))
                label = view if place == 0 else None
                one_interval(axis, place + 0.25 * (k - 1), gaps, VIEW_COLOURS[view], label)
        axis.axhline(0, color="grey", linewidth=2)
        axis.set(ylim=(-15, 40))
        axis.set_xticks(range(len(arms)), [arm.replace("_", "\n") for arm in arms])
    panels["dit"].set_ylabel("final |v - u*|²/D minus the baseline's,\n"
                             "in 1/1000 (below 0 is better)")
    panels["dit"].legend()
    return figure


def one_interval(axis, place, gaps, colour, label):
    """One group of seeds as dots, with their mean and its 95% interval, in 1/1000."""
    gaps = [1000 * gap for gap in gaps]
    centre, low, high = mean_interval(gaps)
    axis.plot([place] * len(gaps), gaps, ".", color=colour, alpha=0.5)
    axis.errorbar(place, centre, [[centre - low], [high - centre]], color=colour, marker="D",
                  capsize=4, label=label)


def who_conflicts(rows):
    """The share of conflicting pairs at every checkpoint of the baseline, by what two share."""
    figure, panels = two_panels("Conflict grows while a network is fine-tuned")
    for model, axis in panels.items():
        baselines = of_arm(select(rows, 0, model)[0], "baseline")
        probe = baselines[0]["probe"]
        steps = [point["step"] - probe[0]["step"] for point in probe]
        for kind, (colour, line) in KINDS.items():
            shares = []
            for checkpoint in range(len(probe)):
                every_seed = [row["probe"][checkpoint]["pairs"][kind] for row in baselines]
                total = sum(found["conflict"] for found in every_seed)
                shares.append(100 * total / len(baselines))
            label = " and ".join(kind.replace("view", "granularity").split())
            axis.plot(steps, shares, "o", linestyle=line, color=colour, label=label)
        axis.set(xlabel="steps (baseline)", ylim=(-2, 57))
    panels["dit"].set_ylabel("pairs in conflict, %")
    handles, labels = panels["dit"].get_legend_handles_labels()
    figure.legend(handles, labels, title="the two share their", loc="outside lower center", ncols=3)
    return figure


def conflict_and_error(rows):
    """Every run: conflict and final error, both against the baseline of its seed."""
    figure, panels = two_panels("Less conflict does not go with a smaller error\n"
                                "(both against the baseline's)")
    for model, axis in panels.items():
        runs, _ = select(rows, 0, model)
        for family, (arms, colour, marker) in FAMILIES.items():
            less, worse = [], []
            for arm in arms:
                less += [100 * gap for gap in paired(runs, arm, "baseline", conflict)]
                worse += [100 * change for change in relative(runs, arm)]
            axis.plot(less, worse, marker, color=colour, markersize=10, label=family)
        axis.axhline(0, color="grey")
        axis.axvline(0, color="grey")
        axis.set(xlabel="conflicting pairs (points)")
    panels["dit"].set_ylabel("final |v - u*|²/D (%)")
    handles, labels = panels["dit"].get_legend_handles_labels()
    figure.legend(handles, labels, title="one run each of", loc="outside lower center", ncols=3)
    return figure


FIGURES = {"study.png": curves, "study_views.png": views, "study_geometry.png": who_conflicts,
           "study_conflict.png": conflict_and_error}


def draw(rows, folder):
    """Writes every figure into a folder; returns them by the name of their file."""
    figures = {}
    with matplotlib.rc_context({"font.size": 19, "legend.fontsize": 17}):
        for file, paint in FIGURES.items():
            figures[file] = paint(rows)
            figures[file].savefig(folder / file, dpi=80)
    return figures
