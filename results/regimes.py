"""The second study: when does SGA help? Four regimes, both networks, several seeds.

    python results/regimes.py                   # all of it, two runs at once
    python results/regimes.py --regimes paper   # fewer: also --models, --arms, --seeds

It goes on where it was stopped.

A regime is a base, what is trained, and how many tuples a step has. `paper` is the corner that is
most like the paper's: a base that knows close-ups, adapters of rank 4, one tuple in a step. Each of
the other regimes changes one of the three. All runs see 1,200 tuples, but for the arms whose name
ends in "-short", which have two thirds of the steps. The arms of a seed see the same images.

The learning rate of a regime is chosen on its baseline alone, with a seed that is used for nothing
else. A run is one line of regimes.jsonl. It also holds what M predicts before the arm is trained.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

import train  # noqa: E402
from results import prediction, study_statistics, yardsticks  # noqa: E402
from results.study import train_to_the_end  # noqa: E402
from support import book, report  # noqa: E402

BASES = ROOT / "runs/regimes"
ROWS = ROOT / "results/regimes.jsonl"
MODELS = ("dit", "unet")

SIZE = {"pixels": 16, "width": 72, "depth": 4, "patch": 4, "time_mean": 0.0, "sample_steps": 8,
        "eval_images": 64, "warmup": 100, "guidance": 2.0}
PRETRAINING = {"dit": {"pretrain_steps": 6000, "batch": 32, "lr": 2e-3},
               "unet": {"pretrain_steps": 4000, "batch": 32, "lr": 2e-3}}
FINETUNING = {"roots": 48, "smallest_object": 0.24, "warmup": 50, "probe": 6}
TUPLES = 1200                                  # of a run whose arm is not short

REGIMES = {
    "paper": {"pretrain_views": "all", "rank": 4, "tuples": 1},
    "macro_base": {"pretrain_views": "macro", "rank": 4, "tuples": 1},
    "all_weights": {"pretrain_views": "all", "rank": 0, "tuples": 1},
    "eight_tuples": {"pretrain_views": "all", "rank": 4, "tuples": 8},
}
# Every ingredient apart in the paper-like corner; in the other regimes the method and its tuples.
ARMS = {"dit": ["baseline", "sga", "sga-short", "tuple", "tuple_max", "stratified", "quiet",
                "offsets", "flipped"],
        "unet": ["baseline", "sga", "sga-short", "tuple_max", "quiet", "min_snr",
                 "min_snr_velocity"]}
ARMS_ELSEWHERE = ["baseline", "sga", "sga-short", "tuple_max"]
SEEDS = (1, 2, 3, 4, 5)

# The rates to choose from, by the rank of the adapters (0 is no adapters), and the seed of that.
RATES = {4: (3e-3, 1e-2, 3e-2), 0: (3e-4, 1e-3, 3e-3)}
CHOOSING_SEED = 100


# --- One run --------------------------------------------------------------------------------------

def base_folder(model, views):
    return BASES / f"{model}-{views}"


def pretrain(model, views):
    """A base: a pretrained network that has seen whole scenes alone (macro), or all views."""
    folder = base_folder(model, views)
    if not (folder / "report.json").exists():
        settings = {"model": model, "device": "cpu", "pretrain_views": views, "finetune_steps": 0}
        train_to_the_end(folder, settings | SIZE | PRETRAINING[model])


def settings_of(regime, model, arm, seed, rate):
    """The settings of train.py for one run."""
    values = {"model": model, "seed": seed, "finetune_lr": rate, "device": "cpu"}
    values |= SIZE | PRETRAINING[model] | FINETUNING | REGIMES[regime]
    steps = TUPLES // values["tuples"]
    values["every"] = steps // 3
    values["arm"] = arm.removesuffix("-short")
    values["finetune_steps"] = steps * 2 // 3 if arm.endswith("-short") else steps
    return train.Settings(**values)


def begin(s):
    """A run at the start of its fine-tuning, from the base of its settings."""
    run = train.Run(s)
    file = base_folder(s.model, s.pretrain_views) / "pretrained.pt"
    book.load_weights(str(file), run.ema, s, train.FORMAT)
    run.step = s.pretrain_steps
    run.begin_finetuning()
    return run


def run_once(regime, model, arm, seed, rate):
    """One run and its row."""
    run = begin(settings_of(regime, model, arm, seed, rate))
    return {"regime": regime, "model": model, "arm": arm, "seed": seed, "rate": rate} | finish(run)


def finish(run):
    """Trains a run that is at the start of its fine-tuning; returns the rest of its row."""
    s = run.settings
    predicted = prediction.predict(run)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train.train(run, folder)
    seconds = time.time() - start
    for point in run.probe:
        point.pop("M")
        point.pop("kernel", None)
    log = [{name: value for name, value in row.items() if name.startswith(("step", "val_error"))}
           for row in run.log]
    return {"predicted": predicted, **yardsticks.measure(run, s), "log": log, "probe": run.probe,
            "seconds": round(seconds, 1), "device": report.device_name(s),
            "torch": torch.__version__, "settings": dataclasses.asdict(s)}


# --- Rows -----------------------------------------------------------------------------------------

def read_rows():
    """Every run so far."""
    return study_statistics.read_rows(ROWS)


def key_of(row):
    return tuple(row[name] for name in ("regime", "model", "arm", "seed", "rate"))


def generalisation(row, split="seen"):
    """The mean of |v - u*|^2 / D over granularities and thirds of t."""
    errors = []
    for view in yardsticks.VIEWS:
        errors += row["generalisation"][f"{split} {view}"]
    return sum(errors) / len(errors)


def chosen_rate(rows, regime, model):
    """The rate with the smallest error of the baseline, among the rows of the choosing seed."""
    tried = [row for row in rows
             if key_of(row)[:4] == (regime, model, "baseline", CHOOSING_SEED)]
    return min(tried, key=generalisation)["rate"]


# --- All runs -------------------------------------------------------------------------------------

def one_thread():
    """For each of the processes: several runs share the machine."""
    torch.set_num_threads(1)


def run_missing(keys, key_of, work, file, pool):
    """Runs work(*key) for every key without a row in the file, and appends each row to it."""
    done = {key_of(row) for row in study_statistics.read_rows(file)}
    missing = [key for key in keys if key not in done]
    started = {pool.submit(work, *key): key for key in missing}
    for count, job in enumerate(concurrent.futures.as_completed(started), 1):
        row = job.result()
        with open(file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{count}/{len(missing)} {started[job]}: {row['seconds']:.0f} s", flush=True)


def choices_of_rates(flags):
    """The keys of the runs that choose the learning rates."""
    keys = []
    for regime in flags.regimes:
        for model in flags.models:
            for rate in RATES[REGIMES[regime]["rank"]]:
                keys.append((regime, model, "baseline", CHOOSING_SEED, rate))
    return keys


def arms_of(regime, model):
    return ARMS[model] if regime == "paper" else ARMS_ELSEWHERE


def runs_of(seed, flags):
    """The keys of all runs of a seed."""
    keys, rows = [], read_rows()
    for regime in flags.regimes:
        for model in flags.models:
            rate = chosen_rate(rows, regime, model)
            for arm in arms_of(regime, model):
                if not flags.arms or arm in flags.arms:
                    keys.append((regime, model, arm, seed, rate))
    return keys


def run_all(flags):
    """The bases, then the choice of the rates, then seed by seed every arm."""
    context = multiprocessing.get_context("spawn")
    bases = {(model, REGIMES[regime]["pretrain_views"])
             for regime in flags.regimes for model in flags.models}
    with concurrent.futures.ThreadPoolExecutor(flags.jobs) as threads:
        for job in [threads.submit(pretrain, *base) for base in sorted(bases)]:
            job.result()
    with concurrent.futures.ProcessPoolExecutor(flags.jobs, context, one_thread) as pool:
        run_missing(choices_of_rates(flags), key_of, run_once, ROWS, pool)
        for seed in flags.seeds:
            run_missing(runs_of(seed, flags), key_of, run_once, ROWS, pool)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    every_arm = sorted({arm for arms in ARMS.values() for arm in arms})
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--arms", nargs="+", default=None, choices=every_arm)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    run_all(parser.parse_args())


if __name__ == "__main__":
    main()
