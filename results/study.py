"""The study: every arm, both networks, several seeds, at a size for a CPU. One command, which goes on where it was stopped:

    python results/study.py                     # all of it; --arms, --models and --seeds take fewer, --jobs sets how many at once
    python results/study.py --base 1 --arms baseline sga sga-short measured lean flipped      # again, from networks pretrained anew
    python results/study.py --draw              # tables, figures and the page's numbers from the rows alone

Each network is pretrained once for each --base (runs/study/MODEL-base-BASE); each run fine-tunes it on roots, an order and noise of its own
seed. An arm with "-short" has two thirds of the images: if the paper's claim holds, its sga-short is as good as the baseline.
A row per run goes to results/study.jsonl, with the validation and the geometry of every checkpoint.
"""

import argparse
import concurrent.futures
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)                                          # not this folder, whose tabulate.py would hide a library of that name

import numpy  # noqa: E402
import torch  # noqa: E402
import train  # noqa: E402

ROWS, PAGES = ROOT / "results/study.jsonl", (ROOT / "README.md", ROOT / "results/README.md")
SIZE = {"pixels": 16, "width": 72, "eval_images": 128, "sample_steps": 8}
BASE = {"dit": {"pretrain_steps": 6000, "batch": 32, "lr": 2e-3}, "unet": {"pretrain_steps": 4000, "batch": 32, "lr": 2e-3}}
FINETUNE = {"finetune_steps": 450, "every": 75, "time_mean": 0.0, "smallest_object": 0.24, "roots": 48, "probe": 6}
SHORT = {"finetune_steps": 300}                                  # N1 of the paper's claim, where N2 = 1.5 N1 are the baseline's 450
ARMS = [*train.ARMS, "sga-short"]
FIRST = [arm for arm in ARMS if arm not in ("measured", "lean", "sga-short")]     # what base 0 was run with


def command(folder, **settings):
    """Runs train.py to its end in a process of its own, on one thread; goes on if the folder holds a run that was stopped."""
    flags = [str(x) for name, value in settings.items() for x in ("--" + name, value)]
    started = (folder / "checkpoint.pt").exists()
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--preset", "cpu", "--out", str(folder), *flags, *["--resume"] * started],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder.name}: {done.stderr[-2000:]}")


def pretrain(model, base, device):
    folder = ROOT / f"runs/study/{model}-base-{base}"
    if not (folder / "report.json").exists():
        command(folder, model=model, device=device, finetune_steps=0, seed=base, **SIZE, **BASE[model])
    return folder / "pretrained.pt"


def measure(base, model, arm, seed, device):
    """One run and its row: the report, and for every checkpoint the log's row and the geometry."""
    folder = ROOT / f"runs/study/{model}-{arm}-{seed}-{base}"
    if not (folder / "report.json").exists():
        settings = SIZE | FINETUNE | {"every": FINETUNE["every"] // 3 if arm == "big" else FINETUNE["every"]} | (SHORT if arm.endswith("-short") else {})
        command(folder, model=model, device=device, arm=arm.removesuffix("-short"), seed=seed, init=pretrain(model, base, device), **settings, **BASE[model])
    report = json.loads((folder / "report.json").read_text())
    log = [{name: float(value) for name, value in row.items() if value and name not in ("phase", "images_per_s")} for row in train.read_log(folder)]
    start = BASE[model]["pretrain_steps"] * BASE[model]["batch"]
    for row in log:
        row["images"] -= start
    probe = [{name: value for name, value in row.items() if name not in ("M", "kernel")} for row in train.read_probe(folder)]
    return {"base": base, "model": model, "arm": arm, "seed": seed, "device": report["device"], "torch": report["torch"], "seconds": report["training_seconds"],
            "settings": report["settings"] | {"init": f"runs/study/{model}-base-{base}/pretrained.pt"}, "rows": report["rows"], "log": log, "probe": probe,
            "bands": errors_by_band(folder)}


def errors_by_band(folder):
    """|v - u*|^2 / D of the final averaged weights by split, view and third of t (0 to 1/3, to 2/3, to 1)."""
    s, content = train.load(folder / "checkpoint.pt")
    model, plan, found = train.build(s), train.make_plan(s), {}
    model.load_state_dict(content["ema"])
    for split in ("seen", "held_out"):
        for view in train.GRANULARITIES:
            held = train.validation_set("target", split, view, s, plan.roots)
            thirds = zip(*(torch.tensor_split(z, 3) for z in held))
            found[f"{split} {view}"] = [train.validate(model, third, s)["error"] for third in thirds]
    return found


def read_rows():
    return [json.loads(line) for line in open(ROWS)] if ROWS.exists() else []


# --- From the rows alone: figures of one run ---------------------------------------------------------------------

VIEWS = ("macro", "meso", "micro")
MODELS = {"dit": "DiT", "unet": "U-Net"}
KINDS = ("root view", "root level", "root", "view level", "view", "level", "nothing")      # what two samples share
DECISIVE = (("whole", "baseline"), ("big", "baseline"), ("random", "baseline"), ("stratified", "baseline"), ("tuple", "baseline"),
            ("tuple", "stratified"), ("tuple", "big"), ("tuple", "random"), ("tuple_max", "tuple"), ("tuple_max", "baseline"), ("tuple_max", "random"), ("offsets", "baseline"), ("flipped", "baseline"),
            ("offsets", "flipped"), ("offsets", "global"), ("min_snr", "baseline"), ("sga", "baseline"), ("sga", "tuple"), ("sga-short", "baseline"),
            ("measured", "baseline"), ("measured", "lean"), ("measured", "flipped"))


def curve(row):
    """Images and mean |v - u*|^2 / D over the views, at every checkpoint of the fine-tuning."""
    return [(point["images"], sum(point[f"val_error_{view}"] for view in VIEWS) / 3) for point in row["log"]]


def images_to_reach(row, score):
    """The images after which the error first is at or below a score, between checkpoints linearly; nan if it never is."""
    points = curve(row)
    if points[0][1] <= score:
        return points[0][0]
    for (before, high), (after, low) in zip(points, points[1:]):
        if low <= score < high:
            return before + (after - before) * (high - score) / (high - low)
    return math.nan


def final(row, split="seen", name="error", view=None):
    """A figure of the final report, the mean over the views or that of one."""
    found = [part[name] for part in row["rows"] if part["domain"] == "target" and part["split"] == split and view in (None, part["view"])]
    return sum(found) / len(found)


def conflict(row, kind=None):
    """The share of conflicting pairs, of one kind or of all, as a mean over the checkpoints after the start."""
    points = row["probe"][1:]
    return sum(point["conflict"] if kind is None else point["pairs"][kind]["conflict"] for point in points) / len(points)


def mean_interval(values, draws=10000):
    """The mean and its 95% bootstrap interval over seeds (few seeds make it too narrow)."""
    x = torch.tensor(values, dtype=torch.float64)
    means = x[torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(0))].mean(1)
    return x.mean().item(), means.quantile(0.025).item(), means.quantile(0.975).item()


def select(rows, base, model):
    """{(arm, seed): row} of one network, and its arms in the order of ARMS."""
    of = {(row["arm"], row["seed"]): row for row in rows if (row["base"], row["model"]) == (base, model)}
    return of, [arm for arm in ARMS if any(name == arm for name, _ in of)]


def seeds_of(of, first, second="baseline"):
    """The seeds that both arms have."""
    return sorted(seed for arm, seed in of if arm == first and (second, seed) in of)


def paired(of, first, second, figure):
    """figure(row) of the first arm minus that of the second, seed by seed."""
    return [figure(of[first, seed]) - figure(of[second, seed]) for seed in seeds_of(of, first, second)]


def relative(of, first, second="baseline"):
    """The final error of the first arm over that of the second, minus 1, seed by seed."""
    return [final(of[first, seed]) / final(of[second, seed]) - 1 for seed in seeds_of(of, first, second)]


def image_shares(of, arm):
    """By seed: the images in which an arm reaches the baseline's final error, over those of the baseline; nan if never."""
    shares = {}
    for seed in seeds_of(of, arm):
        score = curve(of["baseline", seed])[-1][1]
        shares[seed] = images_to_reach(of[arm, seed], score) / images_to_reach(of["baseline", seed], score)
    return shares


def correlation(of, *without):
    """Between a run's conflict and its final error, both relative to the baseline of its seed, over all runs but those of whole, -short and some."""
    arms = {arm for arm, _ in of} - {"baseline", "whole", "sga-short", *without}
    pairs = [pair for arm in arms for pair in zip(paired(of, arm, "baseline", conflict), relative(of, arm))]
    return torch.corrcoef(torch.tensor(pairs).T)[0, 1].item()


# --- Tables ------------------------------------------------------------------------------------------------------

def table(head, *lines):
    return ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(line) + " |" for line in lines)]


def interval(values, form="+.4f"):
    mean, low, high = mean_interval(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def tables(rows):
    """The lines of results/study_tables.md."""
    lines = ["Written by `python results/study.py --draw` from `study.jsonl`. Device: " + ", ".join(sorted({row["device"] for row in rows}))
             + ", torch " + ", ".join(sorted({row["torch"] for row in rows})) + f". {len(rows)} runs, {sum(row['seconds'] for row in rows) / 60:.0f} minutes of"
             " training on one thread each (evaluation not counted). Intervals: 95%, bootstrap over seeds."]
    for base, model in sorted({(row["base"], row["model"]) for row in rows}):
        of, arms = select(rows, base, model)
        some = {arm: [row for (name, _), row in sorted(of.items()) if name == arm] for arm in arms}
        mean = lambda arm, function: sum(map(function, some[arm])) / len(some[arm])
        lines += ["", f"## {MODELS[model]}, pretrained with seed {base}", "", "Means over the seeds. Error: \\|v - u\\*\\|²/D at evenly spread t; joint accuracy: the reader finds all that the caption names."]
        lines += table(("arm", "seeds", "images", "steps", "error, seen", "macro", "meso", "micro", "error, held out", "joint, seen", "joint, held out", "best error on the way"),
                       *((arm, str(len(some[arm])), f"{mean(arm, lambda row: row['log'][-1]['images']):.0f}", f"{mean(arm, lambda row: row['log'][-1]['step'] - row['probe'][0]['step']):.0f}",
                          f"{mean(arm, final):.4f}", *(f"{mean(arm, lambda row: final(row, view=view)):.4f}" for view in VIEWS), f"{mean(arm, lambda row: final(row, 'held_out')):.4f}",
                          f"{mean(arm, lambda row: final(row, name='joint')):.1%}", f"{mean(arm, lambda row: final(row, 'held_out', 'joint')):.1%}",
                          f"{mean(arm, lambda row: min(error for _, error in curve(row))):.4f}") for arm in arms))
        lines += ["", "Paired differences by seed, first minus second, with their interval (error: below 0 the first is better; joint accuracy: above 0):"]
        pairs = [pair for pair in DECISIVE if len(paired(of, *pair, final)) > 1]
        lines += table(("first, second", "error, seen", "every seed", "error, held out", "joint, seen", "joint, held out"),
                       *((", ".join(pair), interval(paired(of, *pair, final)), ", ".join(f"{gap:+.4f}" for gap in paired(of, *pair, final)),
                          interval(paired(of, *pair, lambda row: final(row, "held_out"))), interval(paired(of, *pair, lambda row: final(row, name="joint")), "+.1%"),
                          interval(paired(of, *pair, lambda row: final(row, "held_out", "joint")), "+.1%")) for pair in pairs))
        lines += ["", "Images until the error on seen captions first is at the baseline's final one, over the images of the baseline until then (below 1: fewer; nan: never):"]
        shares = {arm: list(image_shares(of, arm).values()) for arm in arms}
        lines += table(("arm", "every seed", "seeds that get there", "their mean"),
                       *((arm, ", ".join(f"{share:.2f}" for share in values), f"{sum(not math.isnan(x) for x in values)} of {len(values)}", f"{numpy.nanmean(values):.2f}")
                         for arm, values in shares.items() if not all(map(math.isnan, values))))
        lines += ["", "Error on seen captions by view and third of t (towards data, middle, towards noise):"]
        lines += table(("arm", *(f"{view} {third}" for view in VIEWS for third in ("data", "middle", "noise"))),
                       *((arm, *(f"{mean(arm, lambda row: row['bands'][f'seen {view}'][third]):.4f}" for view in VIEWS for third in range(3))) for arm in arms))
        lines += ["", "The geometry: share of conflicting pairs of all and by what the two samples share (means over the checkpoints after the start); at the end cross terms over"
                  " trace (Eq. 13), sign agreement (Eq. 17) and drift (Eq. 16):"]
        last = lambda arm, figure: mean(arm, lambda row: figure(row["probe"][-1]))
        lines += table(("arm", "all", *KINDS, "cross / trace", "sign agreement", "drift"),
                       *((arm, *(f"{mean(arm, lambda row: conflict(row, kind)):.1%}" for kind in (None, *KINDS)), f"{last(arm, lambda point: point['cross'] / point['trace']):.2f}",
                          f"{last(arm, lambda point: point['sign_agreement']):.1%}", f"{last(arm, lambda point: point['drift']):.1f}") for arm in arms))
        if "measured" in arms:
            lines += ["", "The offsets in force until each checkpoint of the arm measured (macro, meso, micro), means over the seeds:"]
            points = range(len(some["measured"][0]["probe"]))
            lines += table(("step", "offsets"), *((str(some["measured"][0]["probe"][k]["step"] - some["measured"][0]["probe"][0]["step"]),
                           ", ".join(f"{mean('measured', lambda row: row['probe'][k]['offsets'][g]):+.2f}" for g in range(3))) for k in points))
    return lines


# --- The pages: their numbers are written by the rows, too ---------------------------------------------------------

def fill(text, rows):
    """The text with each number between <!-- = expression --> and <!-- --> computed anew from the rows."""
    on = lambda model, base: select(rows, base, model)[0]
    of_arm = lambda model, arm, base: [row for (name, _), row in sorted(on(model, base).items()) if name == arm]
    mean = lambda model, arm, base, figure: numpy.mean([figure(row) for row in of_arm(model, arm, base)])
    points = lambda values: interval([100 * value for value in values], "+.1f") + " points"
    figures = {"error": lambda row: final(row), "held": lambda row: final(row, "held_out"), "joint": lambda row: final(row, name="joint"),
               "joint_held": lambda row: final(row, "held_out", "joint")} | {view: lambda row, view=view: final(row, view=view) for view in VIEWS} \
        | {f"{view} {third}": lambda row, view=view, k=k: row["bands"][f"seen {view}"][k] for view in VIEWS for k, third in enumerate(("data", "middle", "noise"))}
    names = {
        "gap": lambda model, first, second, figure="error", base=0: points(paired(on(model, base), first, second, figures[figure])) if "joint" in figure
                    else interval(paired(on(model, base), first, second, figures[figure])),
        "relative": lambda model, first, second, base=0: interval(relative(on(model, base), first, second), "+.1%"),
        "mean": lambda model, arm, figure="error", base=0: (lambda x: f"{x:.1%}" if "joint" in figure else f"{x:.4f}")(
                    mean(model, arm, base, figures[figure])),
        "reached": lambda model, arm, base=0: (lambda x: f"{sum(not math.isnan(y) for y in x)} of {len(x)}")(list(image_shares(on(model, base), arm).values())),
        "share": lambda model, arm, base=0: f"{numpy.nanmean(list(image_shares(on(model, base), arm).values())):.2f}",
        "conflict": lambda model, arm, kind=None, base=0: f"{mean(model, arm, base, lambda row: conflict(row, kind)):.0%}",
        "kinds": lambda model, arm, first, second, base=0: points([conflict(row, first) - conflict(row, second) for row in of_arm(model, arm, base)]),
        "probe": lambda model, arm, point, figure, base=0: (lambda x: f"{x:.2f}" if figure == "cross" else f"{x:.0%}" if figure != "drift" else f"{x:.0f}")(
                    mean(model, arm, base, lambda row: row["probe"][point]["cross"] / row["probe"][point]["trace"] if figure == "cross" else row["probe"][point][figure])),
        "correlation": lambda model, *without, base=0: f"{correlation(on(model, base), *without):+.2f}",
        "mean_offsets": lambda model: ", ".join(f"{mean(model, 'measured', 1, lambda row: numpy.mean([point['offsets'][g] for point in row['probe'][1:]])):+.2f}" for g in range(3)),
        "lowest_offset": lambda model: f"{min(mean(model, 'measured', 1, lambda row: row['probe'][k]['offsets'][g]) for k in range(7) for g in range(3)):+.2f}",
        "third": lambda model: f"{mean(model, 'baseline', 0, lambda row: numpy.mean([row['bands'][f'seen {view}'][0] / sum(row['bands'][f'seen {view}']) for view in VIEWS])):.0%}",
        "seeds": lambda model, arm, base=0: str(len(of_arm(model, arm, base))), "runs": lambda base=None: str(sum(base in (None, row["base"]) for row in rows)),
        "minutes": lambda base: f"{sum(row['seconds'] for row in rows if row['base'] == base) / 60:.0f}", "torch_of": lambda base: ", ".join({row["torch"] for row in rows if row["base"] == base}),
        "parameters": lambda model: f"{sum(p.numel() for p in train.build(train.Settings(**next(row['settings'] for row in rows if row['model'] == model))).parameters()):,}",
    }
    return re.sub(r"<!-- = (.+?) -->(.*?)<!-- -->", lambda match: f"<!-- = {match[1]} -->{eval(match[1], names)}<!-- -->", text)


# --- Figures -----------------------------------------------------------------------------------------------------

STYLES = {"sga": ("black", "o"), "baseline": ("grey", "o"), "tuple": ("#d55e00", "o"), "tuple_max": ("#d55e00", "^"), "stratified": ("#56b4e9", "o"),
          "random": ("#56b4e9", "^"), "offsets": ("#cc79a7", "o"), "flipped": ("#cc79a7", "v"), "global": ("#cc79a7", "s"), "min_snr": ("#882255", "o"),
          "big": ("silver", "o"), "whole": ("silver", "^"), "measured": ("#332288", "D"), "lean": ("#332288", "s"), "sga-short": ("black", "v")}      # told apart by colour-blind readers


def draw(rows, base=0):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from results.pictures import KINDS as LINES, VIEW_COLOURS
    models = [model for model in MODELS if select(rows, base, model)[0]]
    chosen = []
    for model in models:                                         # fewer than three seeds are in the tables only
        of, arms = select(rows, base, model)
        arms = [arm for arm in arms if sum(name == arm for name, _ in of) > 2]
        chosen.append(({key: row for key, row in of.items() if key[0] in arms}, arms))

    figure, axes = plt.subplots(2, len(models), figsize=(9.5 * len(models), 14), squeeze=False, layout="constrained")
    for (above, below), model, (of, arms) in zip(axes.T, models, chosen):
        for arm in arms:
            ratios, images = [], []
            for seed in seeds_of(of, arm):
                images, errors = zip(*curve(of[arm, seed]))
                ratios.append(errors / numpy.interp(images, *zip(*curve(of["baseline", seed]))))
            if ratios:
                above.plot(images, sum(ratios) / len(ratios), color=STYLES[arm][0], marker=STYLES[arm][1], linewidth=2.5 if arm in ("sga", "baseline") else 1.2, label=f"{arm} ({len(ratios)})")
        above.set(title=f"{MODELS[model]}: error divided by the baseline's, at equal images", xlabel="images of the fine-tuning",
                  ylabel="|v - u*|²/D, mean of views and seeds, over the baseline's", ylim=(0.94, 1.25))
        above.legend(ncols=2, title="arm (seeds)" + "; whole lies far above" * ("whole" in arms))
        labels = []
        for pair in DECISIVE[::-1]:
            gaps = [1e3 * gap for gap in paired(of, *pair, final)]
            if len(gaps) > 1:
                mean, low, high = mean_interval(gaps)
                below.plot([low, high], [len(labels)] * 2, color="black")
                below.plot(gaps, [len(labels)] * len(gaps), "o", color="#56b4e9", markersize=4)
                below.plot(mean, len(labels), "D", color="black")
                labels.append(f"{pair[0]} - {pair[1]}")
        below.axvline(0, color="grey")
        below.set(yticks=range(len(labels)), xlabel="difference of the final |v - u*|²/D on seen captions, in 1/1000; left of 0: the first is better",
                  title=f"{MODELS[model]}: decisive comparisons: seeds (blue), mean and 95% interval (black)")
        below.set_xscale("symlog", linthresh=5)
        below.set_xticks([-100, -10, -5, -2, 0, 2, 5, 10, 100])
        below.set_xticklabels(["-100", "-10", "-5", "-2", "0", "2", "5", "10", "100"])
        below.set_yticklabels(labels)
        below.grid(axis="x", alpha=0.3)
    save(figure, "study", base)

    figure, axes = plt.subplots(2, len(models), figsize=(9.5 * len(models), 12), squeeze=False, layout="constrained")
    for (above, below), model, (of, arms) in zip(axes.T, models, chosen):
        arms = [arm for arm in arms if arm not in ("baseline", "whole", "big")]
        for axis, kinds in ((above, {view: (VIEW_COLOURS[view], lambda row, view=view: 1e3 * final(row, view=view)) for view in VIEWS}),
                            (below, {"seen captions": ("black", lambda row: 100 * final(row, name="joint")), "held-out captions": ("#cc79a7", lambda row: 100 * final(row, "held_out", "joint"))})):
            for shift, (name, (colour, value)) in enumerate(kinds.items()):
                for x, arm in enumerate(arms):
                    gaps = paired(of, arm, "baseline", value)
                    mean, low, high = mean_interval(gaps)
                    place = x + 0.22 * (shift - (len(kinds) - 1) / 2)
                    axis.plot([place] * len(gaps), gaps, ".", color=colour, alpha=0.5)
                    axis.errorbar(place, mean, [[mean - low], [high - mean]], color=colour, marker="D", capsize=4, label=name if x == 0 else None)
            axis.axhline(0, color="grey")
            axis.set_xticks(range(len(arms)))
            axis.set_xticklabels(arms, rotation=30)
            axis.grid(axis="y", alpha=0.3)
            axis.legend()
        above.set(title=f"{MODELS[model]}: what an arm does to each granularity (below 0: better)", ylabel="final |v - u*|²/D minus the baseline's, in 1/1000", ylim=(-15, 40))
        below.set(title=f"{MODELS[model]}: what the reader finds in the samples (above 0: better)", ylabel="joint accuracy minus the baseline's, percentage points")
    save(figure, "study_views", base)

    figure, axes = plt.subplots(2, len(models), figsize=(9.5 * len(models), 13), squeeze=False, layout="constrained")
    for (above, below), model, (of, arms) in zip(axes.T, models, chosen):
        for arm in arms:
            points = list(zip(paired(of, arm, "baseline", lambda row: 100 * conflict(row)), [100 * change for change in relative(of, arm)]))
            if points and arm not in ("baseline", "whole", "sga-short"):
                above.plot(*zip(*points), STYLES[arm][1], color=STYLES[arm][0], label=arm)
        above.axhline(0, color="grey")
        above.axvline(0, color="grey")
        above.set(title=f"{MODELS[model]}: does less conflict than the baseline go with a smaller error?\ncorrelation {correlation(of):+.2f} (every arm and seed but whole)",
                  xlabel="share of conflicting pairs, mean of the checkpoints, minus the baseline's, percentage points", ylabel="final |v - u*|²/D against the baseline's, %")
        above.legend(ncols=2, fontsize=9)
        same = [row for (arm, _), row in sorted(of.items()) if arm == "baseline"]
        for kind, (colour, line) in LINES.items():
            below.plot([point["step"] - same[0]["probe"][0]["step"] for point in same[0]["probe"]],
                       [100 * sum(row["probe"][k]["pairs"][kind]["conflict"] for row in same) / len(same) for k in range(len(same[0]["probe"]))], "o", linestyle=line, color=colour, label=kind)
        below.set(title=f"{MODELS[model]}, baseline: who is in conflict, by what two samples share ({len(same)} seeds)", xlabel="steps of the fine-tuning", ylabel="pairs with M_ij < 0, %")
        below.legend(title="the two share their")
    save(figure, "study_geometry", base)


def save(figure, name, base):
    file = f"results/{name}{f'_base{base}' if base else ''}.png"
    figure.savefig(ROOT / file, dpi=70)
    print("drawn:", file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=FIRST, choices=ARMS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--base", type=int, default=0, help="seed of the pretraining")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--draw", action="store_true", help="only draw what is there")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if not a.draw:
        done = {(row["base"], row["model"], row["arm"], row["seed"]) for row in read_rows()}
        wanted = [(a.base, model, arm, seed) for seed in a.seeds for model in a.models for arm in a.arms if (a.base, model, arm, seed) not in done]
        with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
            list(pool.map(lambda model: pretrain(model, a.base, a.device), a.models))
            jobs = {pool.submit(measure, *job, a.device): job for job in wanted}
            for count, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                with open(ROWS, "a") as stream:
                    stream.write(json.dumps(job.result()) + "\n")
                print(f"{count}/{len(wanted)}", *jobs[job], f"{job.result()['seconds']:.0f} s of training", flush=True)
    rows = read_rows()
    (ROOT / "results/study_tables.md").write_text("\n".join(tables(rows)) + "\n")
    for page in PAGES:
        page.write_text(fill(page.read_text(), rows))
    for base in sorted({row["base"] for row in rows}):
        draw(rows, base)


if __name__ == "__main__":
    main()
