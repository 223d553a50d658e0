"""The study's tables, as lines of Markdown. `python results/study.py --draw` writes them."""

from results import study_statistics as statistics
from results.study_statistics import (
    MODELS, THIRDS, VIEWS, conflict, final, held_out_error, held_out_joint, interval, joint, mean,
    paired, select, third_error, view_error)

# What two samples of the probe share.
KINDS = ("root view", "root level", "root", "view level", "view", "level", "nothing")

# The comparisons that decide: the first arm against the second.
DECISIVE = (
    ("whole", "baseline"), ("big", "baseline"), ("random", "baseline"), ("stratified", "baseline"),
    ("tuple", "baseline"), ("tuple", "stratified"), ("tuple", "big"), ("tuple", "random"),
    ("tuple_max", "tuple"), ("tuple_max", "baseline"), ("tuple_max", "random"),
    ("offsets", "baseline"), ("flipped", "baseline"), ("offsets", "flipped"), ("offsets", "global"),
    ("min_snr", "baseline"), ("sga", "baseline"), ("sga", "tuple"), ("sga-short", "baseline"),
    ("measured", "baseline"), ("measured", "lean"), ("measured", "flipped"))

# The rows of the arms' table: base, arm, what the arm is.
ARMS_TABLE = (
    (0, "baseline", "all views of all roots, shuffled: its own numbers"),
    (0, "sga", "the method: root tuples, with offsets in the DiT and Min-SNR weights in the U-Net"),
    (0, "tuple", "root tuples, weighted by 1/K_g: every root weighs the same (the paper)"),
    (0, "tuple_max", "root tuples, weighted by 1/K_max: every view weighs the same (its code)"),
    (0, "stratified", "control: one view of each granularity in a tuple, of any roots, 1/K_g"),
    (0, "random", "control: the baseline's views, weighted as if they were tuples, 1/K_g"),
    (0, "offsets", "the noise level depends on the granularity (Eq. 19)"),
    (0, "flipped", "control: offsets of the opposite sign"),
    (0, "global", "control: the same noise levels as `offsets`, whatever the granularity"),
    (0, "min_snr", "weights by noise level and granularity (Eq. 20, epsilon form)"),
    (0, "whole", "control: whole scenes alone"),
    (0, "big", "control: thrice the batch in a third of the steps"),
    (1, "baseline", "the same from base 1: its own numbers"),
    (1, "sga", "the method once more, from base 1"),
    (1, "sga-short", "the method with two thirds of the images"),
    (1, "measured", "beyond the paper: offsets read from the matrix M"),
    (1, "lean", "control of `measured`: the offset -0.25 for every granularity"))


def table(head, *lines):
    """A Markdown table with an empty line before it; every line is a list of texts."""
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *lines)]
    rule = "|" + "---|" * len(head)
    return ["", rows[0], rule, *rows[1:]]


def arms_table(rows):
    """Every arm minus the baseline, both networks: the final error and the joint accuracy."""
    lines = []
    for base, arm, words in ARMS_TABLE:
        cells = []
        for measure, scale, unit in ((final, 1000, ""), (joint, 100, "%")):
            for model in MODELS:
                runs, arms = select(rows, base, model)
                if arm not in arms:
                    cells.append("not completed")
                elif arm == "baseline":
                    cells.append(f"{scale * mean(runs, arm, measure):.1f}{unit}")
                else:
                    gaps = paired(runs, arm, "baseline", measure)
                    cells.append(interval([scale * gap for gap in gaps], "+.1f"))
        lines.append((str(base), f"`{arm}`", words, *cells))
    head = ("base", "arm", "what it is", "error, DiT", "error, U-Net", "joint, DiT", "joint, U-Net")
    return table(head, *lines)[1:]


def tables(rows):
    """The lines of results/study_tables.md."""
    lines = about(rows)
    lines += ["", "## Every arm against the baseline", ""]
    lines += ["Final error in 1/1000 of |v - u*|²/D, joint accuracy in percentage points."]
    lines += ["", *arms_table(rows)]
    for base, model in sorted({(row["base"], row["model"]) for row in rows}):
        runs, arms = select(rows, base, model)
        lines += ["", f"## {MODELS[model]}, base {base}"]
        lines += summary(runs, arms)
        lines += differences(runs)
        lines += images_needed(runs, arms)
        lines += thirds_of_t(runs, arms)
        lines += geometry(runs, arms)
        if "measured" in arms:
            lines += measured_offsets(runs)
    return lines


def about(rows):
    """Where the rows come from, and which are left out."""
    devices = ", ".join(sorted({row["device"] for row in rows}))
    versions = ", ".join(sorted({row["torch"] for row in rows}))
    minutes = sum(row["seconds"] for row in rows) / 60
    left_out = []
    for base, model, arm, number in statistics.incomplete(rows):
        seeds = "1 seed" if number == 1 else f"{number} seeds"
        left_out.append(f"`{arm}` ({MODELS[model]}, base {base}, {seeds})")
    lines = ["Written by `python results/study.py --draw` from `study.jsonl`.",
             f"Device: {devices}, torch {versions}.",
             f"{len(rows)} runs with {minutes:.0f} minutes of training on one thread each,"
             " evaluation not counted.",
             "Intervals hold 95%, by bootstrap over the seeds.",
             "A base is a pretrained network; its number is the seed of its pretraining."]
    if left_out:
        lines.append(f"Left out, begun and not completed: {' and '.join(left_out)}.")
    return lines


def summary(runs, arms):
    """The arms' means over their seeds."""
    def steps(row):
        return row["log"][-1]["step"] - row["probe"][0]["step"]

    def images(row):
        return row["log"][-1]["images"]

    errors = [final, *map(view_error, VIEWS), held_out_error]
    lines = []
    for arm in arms:
        cells = [f"`{arm}`", str(len(statistics.of_arm(runs, arm)))]
        cells += [f"{mean(runs, arm, measure):.0f}" for measure in (images, steps)]
        cells += [f"{mean(runs, arm, measure):.4f}" for measure in errors]
        cells += [f"{mean(runs, arm, measure):.1%}" for measure in (joint, held_out_joint)]
        cells += [f"{mean(runs, arm, statistics.best_on_the_way):.4f}"]
        lines.append(cells)
    head = ("arm", "seeds", "images", "steps", "error, seen", *VIEWS, "error, held out",
            "joint, seen", "joint, held out", "best error on the way")
    told = ("Means over the seeds. Error: \\|v - u\\*\\|²/D at evenly spread t. Joint accuracy:"
            " the reader finds all that the caption names.")
    return ["", told, *table(head, *lines)]


def differences(runs):
    """The decisive comparisons, paired by seed."""
    lines = []
    for first, second in DECISIVE:
        gaps = paired(runs, first, second, final)
        if not gaps:
            continue
        every_seed = ", ".join(f"{gap:+.4f}" for gap in gaps)
        held_out = interval(paired(runs, first, second, held_out_error))
        joints = []
        for measure in (joint, held_out_joint):
            joints.append(interval(paired(runs, first, second, measure), "+.1%"))
        lines.append((f"`{first}`, `{second}`", interval(gaps), every_seed, held_out, *joints))
    head = ("first, second", "error, seen", "every seed", "error, held out", "joint, seen",
            "joint, held out")
    told = ("Paired differences by seed, first minus second. Error: below 0 the first is better."
            " Joint accuracy: above 0 the first is better.")
    return ["", told, *table(head, *lines)]


def images_needed(runs, arms):
    """How soon an arm is as good as the baseline is at its end."""
    lines = []
    for arm in arms:
        shares = statistics.image_shares(runs, arm)
        number, centre = statistics.arrivals(shares)
        if number:
            every_seed = ", ".join(f"{share:.2f}" for share in shares)
            lines.append((f"`{arm}`", every_seed, f"{number} of {len(shares)}", f"{centre:.2f}"))
    told = ("Images until the error on seen captions first is at the baseline's final one, over the"
            " images of the baseline until then. Below 1: fewer. nan: never.")
    return ["", told, *table(("arm", "every seed", "seeds that get there", "their mean"), *lines)]


def thirds_of_t(runs, arms):
    """The final error by granularity and third of t."""
    places = [(view, third) for view in VIEWS for third in THIRDS]
    lines = []
    for arm in arms:
        cells = [f"{mean(runs, arm, third_error(*place)):.4f}" for place in places]
        lines.append((f"`{arm}`", *cells))
    told = ("Error on seen captions by granularity and third of t: towards data (0 to 1/3), middle,"
            " towards noise (2/3 to 1).")
    return ["", told, *table(("arm", *map(" ".join, places)), *lines)]


def geometry(runs, arms):
    """Who conflicts, and four numbers of the whole matrix at the end."""
    def cosine(row):
        return statistics.mean_cosine(row["probe"][-1], row["settings"]["probe"])

    def cross_over_trace(row):
        return row["probe"][-1]["cross"] / row["probe"][-1]["trace"]

    def agreement(row):
        return row["probe"][-1]["sign_agreement"]

    def drift(row):
        return row["probe"][-1]["drift"]

    def conflict_of(kind):
        def measure(row):
            return conflict(row, kind)
        return measure

    lines = []
    for arm in arms:
        cells = [f"{mean(runs, arm, conflict_of(kind)):.1%}" for kind in (None, *KINDS)]
        cells += [f"{mean(runs, arm, cosine):.3f}", f"{mean(runs, arm, cross_over_trace):.2f}"]
        cells += [f"{mean(runs, arm, agreement):.1%}", f"{mean(runs, arm, drift):.1f}"]
        lines.append((f"`{arm}`", *cells))
    head = ("arm", "all", *KINDS, "mean cosine", "cross / trace", "sign agreement", "drift")
    told = ("The geometry. Share of conflicting pairs, of all and by what the two samples share:"
            " means over the checkpoints after the start. At the end: mean cosine of all pairs,"
            " cross terms over trace (Eq. 13), sign agreement (Eq. 17), drift (Eq. 16).")
    return ["", told, *table(head, *lines)]


def measured_offsets(runs):
    """The offsets of the arm `measured` until each checkpoint."""
    def offset(checkpoint, granularity):
        def measure(row):
            return row["probe"][checkpoint]["offsets"][granularity]
        return measure

    probe = statistics.of_arm(runs, "measured")[0]["probe"]
    lines = []
    for checkpoint, point in enumerate(probe):
        means = [mean(runs, "measured", offset(checkpoint, k)) for k in range(len(VIEWS))]
        step = point["step"] - probe[0]["step"]
        lines.append((str(step), ", ".join(f"{value:+.2f}" for value in means)))
    told = ("The offsets in force until each checkpoint of the arm `measured` (macro, meso, micro):"
            " means over the seeds.")
    return ["", told, *table(("step", "offsets"), *lines)]
