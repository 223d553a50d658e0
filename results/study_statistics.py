"""What the rows of the study say: curves, paired differences of arms, intervals, conflict.

A row is one run of the study: one line of study.jsonl. `runs` is always {(arm, seed): row}, the
runs of one network from one base. A measure is a function of a row that returns a number.
"""

import json
import math
from pathlib import Path

import torch

import sga

ROWS = Path(__file__).parent / "study.jsonl"
# Arms that came after this study.
LATER = ("quiet", "min_snr_velocity")
ARMS = [arm for arm in sga.ARMS if arm not in LATER] + ["sga-short"]
MODELS = {"dit": "DiT", "unet": "U-Net"}
VIEWS = sga.GRANULARITIES
THIRDS = ("data", "middle", "noise")            # of the noise levels t

# An arm with fewer seeds was begun and not completed. Two differences are no interval.
FEWEST_SEEDS = 3


# --- Rows -----------------------------------------------------------------------------------------

def read_rows(file=ROWS):
    """Every run so far, as a list of dictionaries."""
    if not file.exists():
        return []
    with open(file, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def select(rows, base, model):
    """(runs, arms) of one network and base, arms in the order of ARMS, without the incomplete."""
    runs = {}
    for row in rows:
        if (row["base"], row["model"]) == (base, model):
            runs[row["arm"], row["seed"]] = row
    arms = [arm for arm in ARMS if len(of_arm(runs, arm)) >= FEWEST_SEEDS]
    return {key: row for key, row in runs.items() if key[0] in arms}, arms


def incomplete(rows):
    """The (base, model, arm, number of seeds) that `select` leaves out."""
    seeds = {}
    for row in rows:
        key = row["base"], row["model"], row["arm"]
        seeds[key] = seeds.get(key, 0) + 1
    return [(*key, number) for key, number in sorted(seeds.items()) if number < FEWEST_SEEDS]


def of_arm(runs, arm):
    """The rows of one arm, by seed."""
    return [row for (name, _), row in sorted(runs.items()) if name == arm]


def shared_seeds(runs, first, second="baseline"):
    """The seeds that both arms have."""
    return sorted(seed for arm, seed in runs if arm == first and (second, seed) in runs)


# --- Measures of one run --------------------------------------------------------------------------

def final(row, split="seen", name="error", view=None):
    """A number of the final report on the target domain: of one view, or the mean over all."""
    found = []
    for part in row["rows"]:
        if part["domain"] == "target" and part["split"] == split and view in (None, part["view"]):
            found.append(part[name])
    return sum(found) / len(found)


def held_out_error(row):
    return final(row, "held_out")


def joint(row):
    return final(row, name="joint")


def held_out_joint(row):
    return final(row, "held_out", "joint")


def view_error(view):
    """The measure: final error of one granularity on seen captions."""
    def measure(row):
        return final(row, view=view)
    return measure


def third_error(view, third):
    """The measure: final error of one granularity in one third of t."""
    def measure(row):
        return row["bands"][f"seen {view}"][THIRDS.index(third)]
    return measure


def curve(row):
    """[(images, mean |v - u*|^2 / D over the views)] at every checkpoint of the fine-tuning."""
    points = []
    for checkpoint in row["log"]:
        errors = [checkpoint[f"val_error_{view}"] for view in VIEWS]
        points.append((checkpoint["images"], sum(errors) / 3))
    return points


def best_on_the_way(row):
    return min(error for _, error in curve(row))


def images_to_reach(row, score):
    """The images after which the error first is at most a score, linear between checkpoints.

    It is nan for a run that never gets there.
    """
    points = curve(row)
    if points[0][1] <= score:
        return points[0][0]
    # The first crossing counts, even if the error rises again.
    for (before, high), (after, low) in zip(points, points[1:]):
        if low <= score < high:
            return before + (after - before) * (high - score) / (high - low)
    return math.nan


def conflict(row, kind=None):
    """The share of conflicting pairs, of one kind or of all: mean of the checkpoints after 0."""
    # At the start all arms of a seed are the same network.
    shares = []
    for point in row["probe"][1:]:
        among = point if kind is None else point["pairs"][kind]
        shares.append(among["conflict"])
    return sum(shares) / len(shares)


def mean_cosine(point, roots, views=3, levels=3):
    """The mean cosine over all pairs of a probe's samples, from the means by what a pair shares."""
    sizes = {"root": roots, "view": views, "level": levels}
    total = pairs = 0
    for kind, found in point["pairs"].items():
        # Of one sample: the others that share with it exactly what the kind names.
        others = 1
        for name, size in sizes.items():
            others *= 1 if name in kind.split() else size - 1
        total += others * found["cosine"]
        pairs += others
    return total / pairs


# --- Measures of several runs ---------------------------------------------------------------------

def mean(runs, arm, measure):
    """The mean of a measure over the seeds of an arm."""
    rows = of_arm(runs, arm)
    return sum(measure(row) for row in rows) / len(rows)


def paired(runs, first, second, measure):
    """By seed: the measure of the first arm minus that of the second."""
    gaps = []
    for seed in shared_seeds(runs, first, second):
        gaps.append(measure(runs[first, seed]) - measure(runs[second, seed]))
    return gaps


def relative(runs, first, second="baseline"):
    """By seed: the final error of the first arm over that of the second, minus 1."""
    changes = []
    for seed in shared_seeds(runs, first, second):
        changes.append(final(runs[first, seed]) / final(runs[second, seed]) - 1)
    return changes


def image_shares(runs, arm):
    """By seed: the images in which an arm reaches the baseline's final error, over the baseline's.

    Below 1 the arm needs fewer; nan is never.
    """
    shares = []
    # The baseline may have been at its final error before its last image.
    for seed in shared_seeds(runs, arm):
        baseline = runs["baseline", seed]
        score = curve(baseline)[-1][1]
        images = images_to_reach(runs[arm, seed], score)
        shares.append(images / images_to_reach(baseline, score))
    return shares


def arrivals(shares):
    """(how many of the image shares are numbers, their mean)."""
    reached = [share for share in shares if not math.isnan(share)]
    if not reached:
        return 0, math.nan
    return len(reached), sum(reached) / len(reached)


def correlation(runs, *without):
    """Over runs: of conflict minus, and final error over, that of the baseline of their seed.

    Left out are whole, which never sees a close-up, sga-short, which has fewer images, and the
    arms that are named.
    """
    arms = {arm for arm, _ in runs} - {"baseline", "whole", "sga-short", *without}
    pairs = []
    for arm in sorted(arms):
        pairs += zip(paired(runs, arm, "baseline", conflict), relative(runs, arm))
    return torch.corrcoef(torch.tensor(pairs).T)[0, 1].item()


def mean_interval(values, samples=10000):
    """(mean, low, high): the 95% bootstrap interval over seeds, too narrow when they are few."""
    # Always the same resampling: a table must not change when nothing was measured.
    x = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(x), (samples, len(x)), generator=generator)
    means = x[index].mean(1)
    low, high = means.quantile(0.025), means.quantile(0.975)
    return x.mean().item(), low.item(), high.item()


# --- The same as text -----------------------------------------------------------------------------

def interval(values, form="+.4f"):
    """Such as "+0.0042 (+0.0025 to +0.0056)"."""
    centre, low, high = mean_interval(values)
    return f"{centre:{form}} ({low:{form}} to {high:{form}})"


def thousandths(values):
    """An interval of differences of the error, in units of 1/1000."""
    return interval([1000 * value for value in values], "+.1f")


def points(values):
    """An interval of differences of shares, in percentage points."""
    return interval([100 * value for value in values], "+.1f")
