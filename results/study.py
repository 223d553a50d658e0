"""The study: every arm, both networks, several seeds, at a size for a CPU. It goes on where it was
stopped.

    python results/study.py                     # all of it; --arms, --models, --seeds take fewer
    python results/study.py --base 1 --arms baseline sga sga-short measured lean flipped
    python results/study.py --draw              # only the tables and figures, from the rows

A base is a pretrained network; its number is the seed of its pretraining. Each network is
pretrained once for each base (runs/study/MODEL-base-BASE). Each run fine-tunes it on roots, an
order and noise of its own seed. An arm whose name ends in "-short" has two thirds of the images:
the paper's claim is that SGA is then as good as the baseline with all of them.

A run is one line of study.jsonl, with the validation and the geometry of every checkpoint.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

import train  # noqa: E402
from results import study_figures, study_tables, yardsticks  # noqa: E402
from results.study_statistics import ARMS, MODELS, ROWS, VIEWS, read_rows  # noqa: E402
from support import book, report  # noqa: E402

RUNS = ROOT / "runs/study"
RESULTS = ROOT / "results"

SIZE = {"pixels": 16, "width": 72, "depth": 4, "patch": 4, "eval_images": 128, "sample_steps": 8,
        "guidance": 2.0, "pretrain_views": "macro", "time_mean": 0.5, "warmup": 100,
        "finetune_lr": 1e-3}
PRETRAINING = {"dit": {"pretrain_steps": 6000, "batch": 32, "lr": 2e-3},
               "unet": {"pretrain_steps": 4000, "batch": 32, "lr": 2e-3}}
FINETUNING = {"finetune_steps": 450, "every": 75, "time_mean": 0.0, "smallest_object": 0.24,
              "roots": 48, "probe": 6}

# The paper compares SGA after N1 images with the baseline after N2 = 1.5 N1, here 450 steps.
SHORT_STEPS = 300

# What base 0 was run with. The other arms came later, with base 1.
FIRST = [arm for arm in ARMS if arm not in ("measured", "lean", "sga-short")]


# --- One run --------------------------------------------------------------------------------------

def train_to_the_end(folder, settings):
    """Runs train.py in a process of its own on one thread. A folder with a stopped run goes on."""
    command = [sys.executable, str(ROOT / "train.py"), "--preset", "cpu", "--out", str(folder)]
    for name, value in settings.items():
        command += ["--" + name, str(value)]
    if (folder / "checkpoint.pt").exists():
        command += ["--resume"]
    # Several runs share the machine. More threads would only wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{folder.name}: {done.stderr[-2000:]}")


def pretrain(model, base, device):
    """The checkpoint of a base; it is made if there is none."""
    folder = RUNS / f"{model}-base-{base}"
    if not (folder / "report.json").exists():
        settings = {"model": model, "device": device, "seed": base, "finetune_steps": 0}
        train_to_the_end(folder, settings | SIZE | PRETRAINING[model])
    return folder / "pretrained.pt"


def settings_of(base, model, arm, seed, device):
    """The settings of train.py for one run."""
    settings = {"model": model, "device": device, "arm": arm.removesuffix("-short"), "seed": seed,
                "init": RUNS / f"{model}-base-{base}/pretrained.pt"}
    settings |= SIZE | PRETRAINING[model] | FINETUNING
    if arm == "big":
        # It joins three steps in one, and has its checkpoints after as many images as the others.
        settings["every"] //= 3
    if arm.endswith("-short"):
        settings["finetune_steps"] = SHORT_STEPS
    return settings


def run_once(base, model, arm, seed, device):
    """One run and its row: the report, and of every checkpoint the log's row and the geometry."""
    # The report comes last in a run: with it the run is complete.
    folder = RUNS / f"{model}-{arm}-{seed}-{base}"
    if not (folder / "report.json").exists():
        pretrain(model, base, device)
        train_to_the_end(folder, settings_of(base, model, arm, seed, device))
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    init = f"runs/study/{model}-base-{base}/pretrained.pt"
    return {"base": base, "model": model, "arm": arm, "seed": seed, "device": found["device"],
            "torch": found["torch"], "seconds": found["training_seconds"],
            "settings": found["settings"] | {"init": init}, "rows": found["rows"],
            "log": numbers_of_the_log(folder, found["settings"]),
            "probe": probe_without_matrices(folder), "bands": errors_by_third(folder)}


def numbers_of_the_log(folder, settings):
    """The log's rows as numbers. Images are counted from the start of the fine-tuning."""
    pretraining = settings["pretrain_steps"] * settings["batch"]
    rows = []
    for texts in book.read_log(folder):
        row = {}
        for name, text in texts.items():
            if text and name not in ("phase", "images_per_s"):
                row[name] = float(text)
        row["images"] -= pretraining
        rows.append(row)
    return rows


def probe_without_matrices(folder):
    rows = book.read_probe(folder)
    for row in rows:
        row.pop("M")
        row.pop("kernel", None)
    return rows


def errors_by_third(folder):
    """|v - u*|^2 / D of the final averaged weights: {"seen macro": [of each third of t], ...}."""
    s, content = book.load(str(folder / "checkpoint.pt"), train.Settings, train.FORMAT)
    run = train.Run(s)
    run.ema.load_state_dict(content["ema"])
    found = {}
    for split in ("seen", "held_out"):
        for view in VIEWS:
            held = report.validation_set(s, run.roots, "target", split, view)
            found[f"{split} {view}"] = yardsticks.errors_by_third(run.ema, held, s)
    return found


# --- All runs -------------------------------------------------------------------------------------

def run_all(wanted, device, jobs):
    """Runs what is wanted, several at once; each row is in the file as soon as it is there."""
    bases = sorted({(model, base) for base, model, _, _ in wanted})
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        pretrained = [pool.submit(pretrain, model, base, device) for model, base in bases]
        for job in pretrained:
            job.result()
        started = {pool.submit(run_once, *key, device): key for key in wanted}
        for count, job in enumerate(concurrent.futures.as_completed(started), 1):
            row = job.result()
            with open(ROWS, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            name = " ".join(map(str, started[job]))
            print(f"{count}/{len(wanted)} {name}: {row['seconds']:.0f} s of training", flush=True)


def still_wanted(flags, rows):
    """The (base, model, arm, seed) that were asked for and have no row yet, seed by seed."""
    done = set()
    for row in rows:
        done.add((row["base"], row["model"], row["arm"], row["seed"]))
    wanted = []
    for seed in flags.seeds:
        for model in flags.models:
            wanted += [(flags.base, model, arm, seed) for arm in flags.arms]
    return [key for key in wanted if key not in done]


def draw(rows):
    """Writes study_tables.md and the figures from the rows alone."""
    tables = "\n".join(study_tables.tables(rows)) + "\n"
    (RESULTS / "study_tables.md").write_text(tables, encoding="utf-8")
    study_figures.draw(rows, RESULTS)
    print("written: results/study_tables.md and", ", ".join(study_figures.FIGURES))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=FIRST, choices=ARMS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--base", type=int, default=0, help="seed of the pretraining")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--draw", action="store_true", help="only tables and figures")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    if not flags.draw:
        run_all(still_wanted(flags, read_rows()), flags.device, flags.jobs)
    draw(read_rows())


if __name__ == "__main__":
    main()
