"""The study: every arm, both networks, several seeds, at a size for a CPU. One command, which goes on where it was stopped:

    python results/study.py                     # all of it; --arms, --models and --seeds take fewer, --jobs sets how many at once
    python results/study.py --draw              # tables and figures from the rows alone

Each network is pretrained once (runs/study/MODEL-base); each run fine-tunes it on roots, an order and noise of its own seed. A row per
run goes to results/study.jsonl, with the validation and the geometry of every checkpoint.
"""

import argparse
import concurrent.futures
import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)                                          # not this folder, whose tabulate.py would hide a library of that name

import numpy  # noqa: E402
import torch  # noqa: E402
import train  # noqa: E402

ROWS = ROOT / "results/study.jsonl"
SIZE = {"pixels": 16, "width": 72, "eval_images": 128, "sample_steps": 8}
BASE = {"dit": {"pretrain_steps": 6000, "batch": 32, "lr": 2e-3}, "unet": {"pretrain_steps": 4000, "batch": 32, "lr": 2e-3}}
FINETUNE = {"finetune_steps": 450, "every": 75, "time_mean": 0.0, "smallest_object": 0.24, "roots": 48, "probe": 6}


def command(folder, **settings):
    """Runs train.py to its end in a process of its own, on one thread; goes on if the folder holds a run that was stopped."""
    flags = [str(x) for name, value in settings.items() for x in ("--" + name, value)]
    started = (folder / "checkpoint.pt").exists()
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--preset", "cpu", "--out", str(folder), *flags, *["--resume"] * started],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder.name}: {done.stderr[-2000:]}")


def pretrain(model, device):
    folder = ROOT / f"runs/study/{model}-base"
    if not (folder / "report.json").exists():
        command(folder, model=model, device=device, finetune_steps=0, seed=0, **SIZE, **BASE[model])
    return folder / "pretrained.pt"


def measure(model, arm, seed, device):
    """One run and its row: the report, and for every checkpoint the log's row and the geometry."""
    folder = ROOT / f"runs/study/{model}-{arm}-{seed}"
    if not (folder / "report.json").exists():
        settings = SIZE | FINETUNE | {"every": FINETUNE["every"] // 3 if arm == "big" else FINETUNE["every"]}
        command(folder, model=model, device=device, arm=arm, seed=seed, init=pretrain(model, device), **settings, **BASE[model])
    report = json.loads((folder / "report.json").read_text())
    log = [{name: float(value) for name, value in row.items() if value and name not in ("phase", "images_per_s")} for row in train.read_log(folder)]
    start = BASE[model]["pretrain_steps"] * BASE[model]["batch"]
    for row in log:
        row["images"] -= start
    probe = [{name: value for name, value in row.items() if name not in ("M", "kernel")} for row in train.read_probe(folder)]
    return {"model": model, "arm": arm, "seed": seed, "device": report["device"], "torch": report["torch"], "seconds": report["training_seconds"],
            "settings": report["settings"] | {"init": f"runs/study/{model}-base/pretrained.pt"}, "rows": report["rows"], "log": log, "probe": probe,
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
DECISIVE = (("whole", "baseline"), ("big", "baseline"), ("random", "baseline"), ("stratified", "baseline"), ("tuple", "baseline"),
            ("tuple", "stratified"), ("tuple", "big"), ("tuple", "random"), ("tuple_max", "tuple"), ("offsets", "baseline"),
            ("offsets", "flipped"), ("offsets", "global"), ("min_snr", "baseline"), ("sga", "baseline"), ("sga", "tuple"))


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


# --- Tables ------------------------------------------------------------------------------------------------------

def tables(rows):
    """The lines of results/study_tables.md."""
    lines = ["Written by `python results/study.py --draw` from `study.jsonl`. Device: " + ", ".join(sorted({row["device"] for row in rows}))
             + ", torch " + ", ".join(sorted({row["torch"] for row in rows})) + f". {len(rows)} runs, {sum(row['seconds'] for row in rows) / 60:.0f} minutes of"
             " training on one thread each (evaluation not counted)."]
    for model in ("dit", "unet"):
        of = {(row["arm"], row["seed"]): row for row in rows if row["model"] == model}
        arms = [arm for arm in train.ARMS if any(key[0] == arm for key in of)]
        if not arms:
            continue
        lines += ["", f"### {model}", "", "Means over the seeds. Error: \\|v - u\\*\\|²/D at evenly spread t; joint accuracy: the reader finds all that the caption names.", "",
                  "| arm | seeds | images | steps | error, seen | macro | meso | micro | error, held out | joint, seen | joint, held out | best error on the way | pairs in conflict | cross terms / trace | sign agreement | drift |",
                  "|" + "---|" * 16]
        for arm in arms:
            some = [row for (name, _), row in of.items() if name == arm]
            mean = lambda function: sum(map(function, some)) / len(some)
            last = lambda name: mean(lambda row: row["probe"][-1][name])
            lines.append(f"| {arm} | {len(some)} | {mean(lambda row: row['log'][-1]['images']):.0f} | {mean(lambda row: row['log'][-1]['step'] - row['probe'][0]['step']):.0f}"
                         f" | {mean(final):.4f} | " + " | ".join(f"{mean(lambda row: final(row, view=view)):.4f}" for view in VIEWS)
                         + f" | {mean(lambda row: final(row, 'held_out')):.4f} | {mean(lambda row: final(row, name='joint')):.1%} | {mean(lambda row: final(row, 'held_out', 'joint')):.1%}"
                         f" | {mean(lambda row: min(error for _, error in curve(row))):.4f} | {mean(conflict):.1%}"
                         f" | {mean(lambda row: row['probe'][-1]['cross'] / row['probe'][-1]['trace']):.2f} | {last('sign_agreement'):.1%} | {last('drift'):.1f} |")
        lines += ["", "Paired differences by seed, first minus second (below 0: the first has the smaller error), with a 95% bootstrap interval over seeds, and every seed:", "",
                  "| first, second | error, seen | interval | every seed | error, held out | interval | joint, held out | interval |", "|" + "---|" * 8]
        for first, second in DECISIVE:
            seeds = sorted(seed for arm, seed in of if arm == first and (second, seed) in of)
            if len(seeds) > 1:
                gaps = lambda *what: [final(of[first, seed], *what) - final(of[second, seed], *what) for seed in seeds]
                seen, held, joint = (mean_interval(gaps(*what)) for what in ((), ("held_out",), ("held_out", "joint")))
                lines.append(f"| {first}, {second} | {seen[0]:+.4f} | {seen[1]:+.4f} to {seen[2]:+.4f} | {', '.join(f'{gap:+.4f}' for gap in gaps())}"
                             f" | {held[0]:+.4f} | {held[1]:+.4f} to {held[2]:+.4f} | {joint[0]:+.1%} | {joint[1]:+.1%} to {joint[2]:+.1%} |")
        lines += ["", "Images until the error on seen captions first is at the baseline's final one, over the images of the baseline until then (below 1: fewer); never: seeds that do not get there:", "",
                  "| arm | share of the images | interval | every seed | never |", "|" + "---|" * 5]
        for arm in arms:
            seeds = sorted(seed for name, seed in of if name == arm and ("baseline", seed) in of)
            score = {seed: curve(of["baseline", seed])[-1][1] for seed in seeds}
            shares = {seed: images_to_reach(of[arm, seed], score[seed]) / images_to_reach(of["baseline", seed], score[seed]) for seed in seeds}
            reached = [share for share in shares.values() if not math.isnan(share)]
            if len(reached) > 1:
                mean, low, high = mean_interval(reached)
                lines.append(f"| {arm} | {mean:.2f} | {low:.2f} to {high:.2f} | {', '.join(f'{share:.2f}' for share in shares.values())} | {len(shares) - len(reached)} of {len(shares)} |")
        lines += ["", "Error on seen captions by view and third of t (towards data, middle, towards noise), and share of conflicting pairs by what the two samples share:", "",
                  "| arm | " + " | ".join(f"{view} {third}" for view in VIEWS for third in ("data", "middle", "noise")) + " | root, level | view, level | level | root | nothing |", "|" + "---|" * 15]
        for arm in arms:
            some = [row for (name, _), row in of.items() if name == arm]
            band = lambda view, third: sum(row["bands"][f"seen {view}"][third] for row in some) / len(some)
            lines.append(f"| {arm} | " + " | ".join(f"{band(view, third):.4f}" for view in VIEWS for third in range(3)) + " | "
                         + " | ".join(f"{sum(conflict(row, kind) for row in some) / len(some):.1%}" for kind in ("root level", "view level", "level", "root", "nothing")) + " |")
    return lines


# --- Figures -----------------------------------------------------------------------------------------------------

def draw(rows):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colour = dict(zip(train.ARMS, plt.get_cmap("tab20").colors))
    colour |= {"sga": "black", "baseline": "#0072b2", "tuple": "#e69f00", "stratified": "#009e73", "whole": "#d55e00"}
    models = [model for model in ("dit", "unet") if any(row["model"] == model for row in rows)]

    figure, axes = plt.subplots(2, len(models), figsize=(9.5 * len(models), 14), squeeze=False, layout="constrained")
    for (above, below), model in zip(axes.T, models):
        of = {(row["arm"], row["seed"]): row for row in rows if row["model"] == model}
        for arm in train.ARMS:
            ratios, images = [], []
            for seed in [seed for name, seed in of if name == arm and ("baseline", seed) in of]:
                images, errors = zip(*curve(of[arm, seed]))
                ratios.append(errors / numpy.interp(images, *zip(*curve(of["baseline", seed]))))
            if ratios:
                above.plot(images, sum(ratios) / len(ratios), ".-", color=colour[arm], linewidth=2.5 if arm in ("sga", "baseline") else 1.2, label=f"{arm} ({len(ratios)})")
        above.set(title=f"{model}: error on the roots' captions over the baseline's after as many images, mean over seeds",
                  xlabel="images", ylabel="|v - u*|²/D, mean of the views, relative to the baseline", ylim=(0.97, 1.25))
        above.legend(ncols=2, title="arm (seeds); whole and big lie above, or leave above")
        labels = []
        for first, second in DECISIVE[::-1]:
            gaps = [1e3 * (final(of[first, seed]) - final(of[second, seed])) for arm, seed in of if arm == first and (second, seed) in of]
            if len(gaps) > 1:
                mean, low, high = mean_interval(gaps)
                below.plot([low, high], [len(labels)] * 2, color="black")
                below.plot(gaps, [len(labels)] * len(gaps), "o", color="#56b4e9", markersize=4)
                below.plot(mean, len(labels), "D", color="black")
                labels.append(f"{first} - {second}")
        below.axvline(0, color="grey")
        below.set(yticks=range(len(labels)), xlabel="difference of the final errors on seen captions, in 1/1000; left of 0: the first is better",
                  title=f"{model}: decisive comparisons, each seed, mean and bootstrap interval")
        below.set_xscale("symlog", linthresh=5)
        below.set_yticklabels(labels)
        below.grid(axis="x", alpha=0.3)
    figure.savefig(ROOT / "results/study.png", dpi=70)

    figure, axes = plt.subplots(2, len(models), figsize=(9.5 * len(models), 13), squeeze=False, layout="constrained")
    for (above, below), model in zip(axes.T, models):
        some = [row for row in rows if row["model"] == model]
        base = {row["seed"]: row for row in some if row["arm"] == "baseline"}
        pairs = [(row["arm"], conflict(row) - conflict(base[row["seed"]]), final(row) / final(base[row["seed"]]) - 1)
                 for row in some if row["seed"] in base and row["arm"] not in ("baseline", "whole")]
        for arm in train.ARMS:
            points = [(x, y) for name, x, y in pairs if name == arm]
            if points:
                above.plot(*zip(*points), "o", color=colour[arm], label=arm)
        correlation = torch.corrcoef(torch.tensor([[x, y] for _, x, y in pairs]).T)[0, 1].item() if len(pairs) > 2 else math.nan
        above.axhline(0, color="grey")
        above.axvline(0, color="grey")
        above.set(title=f"{model}: does less conflict than the baseline go with a smaller error?\ncorrelation {correlation:+.2f} over {len(pairs)} runs (without the arm whole)",
                  xlabel="share of conflicting pairs, mean over the checkpoints, minus the baseline's", ylabel="final error on seen captions, relative to the baseline's")
        above.legend(ncols=2, fontsize=8)
        base = list(base.values())
        for kind, c in zip(some[0]["probe"][0]["pairs"], ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "black")):
            below.plot([point["step"] - base[0]["probe"][0]["step"] for point in base[0]["probe"]],
                       [sum(row["probe"][k]["pairs"][kind]["conflict"] for row in base) / len(base) for k in range(len(base[0]["probe"]))], "o-", color=c, label=kind)
        below.set(title=f"{model}, baseline: who is in conflict, by what two samples share ({len(base)} seeds)", xlabel="steps of the fine-tuning", ylabel="share of pairs with M_ij < 0")
        below.legend(title="the two share their")
    figure.savefig(ROOT / "results/study_geometry.png", dpi=70)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(train.ARMS), choices=list(train.ARMS))
    parser.add_argument("--models", nargs="+", default=["dit", "unet"], choices=["dit", "unet"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--draw", action="store_true", help="only draw what is there")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if not a.draw:
        done = {(row["model"], row["arm"], row["seed"]) for row in read_rows()}
        wanted = [(model, arm, seed) for seed in a.seeds for model in a.models for arm in a.arms if (model, arm, seed) not in done]
        with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
            list(pool.map(lambda model: pretrain(model, a.device), a.models))
            jobs = {pool.submit(measure, *job, a.device): job for job in wanted}
            for count, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                with open(ROWS, "a") as stream:
                    stream.write(json.dumps(job.result()) + "\n")
                print(f"{count}/{len(wanted)}", *jobs[job], f"{job.result()['seconds']:.0f} s of training", flush=True)
    rows = read_rows()
    (ROOT / "results/study_tables.md").write_text("\n".join(tables(rows)) + "\n")
    draw(rows)
    print("written: results/study_tables.md, study.png, study_geometry.png")


if __name__ == "__main__":
    main()
