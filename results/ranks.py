"""What the rank of the adapters changes: conflict, the noise of a step, and quality.

    python results/ranks.py                     # it goes on where it was stopped; then it draws
    python results/ranks.py --draw              # the figure and the table alone, from the rows

The paper speaks of a network's effective capacity. A low-rank adapter makes it a number: the fewer
numbers are trained, the less can be learned, and the more the samples must share. The DiT of
results/regimes.py is fine-tuned in the paper-like regime at several ranks, and with all weights,
which counts as rank 0. For each rank the learning rate is chosen on the baseline alone, with a seed
that is used for nothing else. A run is one line of ranks.jsonl.
"""

import argparse
import concurrent.futures
import dataclasses
import math
import multiprocessing
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

import ntk  # noqa: E402
from results import regimes, study_statistics  # noqa: E402
from support import report  # noqa: E402

ROWS = ROOT / "results/ranks.jsonl"
RANKS = (1, 2, 4, 8, 16, 0)
ARMS = ("baseline", "tuple_max", "sga")
SEEDS = (1, 2, 3)
CHOOSING_SEED = regimes.CHOOSING_SEED
BETA = 0.99                                    # of AdamW's mean of squared gradients, in train.py


# --- One run --------------------------------------------------------------------------------------

def rates_of(rank):
    """The learning rates to choose from."""
    return (1e-4, 3e-4, 1e-3) if rank == 0 else (3e-3, 1e-2, 3e-2)


def run_once(rank, arm, seed, rate):
    """One run and its row."""
    s = regimes.settings_of("paper", "dit", arm, seed, rate)
    run = regimes.begin(dataclasses.replace(s, rank=rank))
    row = {"rank": rank, "arm": arm, "seed": seed, "rate": rate} | regimes.finish(run)
    trained = sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad)
    return row | {"trained": trained, "adamw": in_adamws_metric(run)}


def in_adamws_metric(run):
    """{"conflict", "flipped"}: what AdamW's inner product makes of the probe's pairs (Eq. 15).

    A step of AdamW, without its momentum, is theta - lr g / (sqrt(v) + eps), with v its mean of
    squared gradients. To first order it changes the loss by the products <g_i, g_j / (sqrt(v) +
    eps)> in place of M_ij = <g_i, g_j>. `conflict` is the share of pairs below 0 in this metric,
    `flipped` the share of pairs whose sign is another one than in M.
    """
    s = run.settings
    inputs, u, _ = report.probe_batch(s, run.roots, s.probe)
    r = report.residuals_of(run.model, inputs, u)
    G = ntk.per_sample_gradients(*ntk.of_module(run.model), inputs, r)     # (N, P)
    M = G @ G.T                                                    # (N, N)
    M_adamw = (G / adamws_scale(run.optimizer)) @ G.T              # (N, N)
    i, j = torch.triu_indices(len(M), len(M), 1)
    flipped = M.sign() != M_adamw.sign()
    return {"conflict": ntk.conflict_share(M_adamw).item(),
            "flipped": flipped[i, j].float().mean().item()}


def adamws_scale(optimizer):
    """(P,) sqrt(v) + eps of every trained weight: AdamW divides its steps by it."""
    group = optimizer.param_groups[0]
    scales = []
    for weight in group["params"]:
        state = optimizer.state[weight]
        v = state["exp_avg_sq"] / (1 - BETA ** state["step"].item())
        scales.append((v.sqrt() + group["eps"]).flatten())
    return torch.cat(scales)


# --- All runs -------------------------------------------------------------------------------------

def read_rows():
    """Every run so far."""
    return study_statistics.read_rows(ROWS)


def key_of(row):
    return tuple(row[name] for name in ("rank", "arm", "seed", "rate"))


def chosen_rate(rows, rank):
    """The rate with the smallest error of the baseline, among the rows of the choosing seed."""
    tried = [row for row in rows if (row["rank"], row["seed"]) == (rank, CHOOSING_SEED)]
    return min(tried, key=regimes.generalisation)["rate"]


def choices_of_rates():
    return [(rank, "baseline", CHOOSING_SEED, rate) for rank in RANKS for rate in rates_of(rank)]


def runs_of(seed):
    rows = read_rows()
    return [(rank, arm, seed, chosen_rate(rows, rank)) for rank in RANKS for arm in ARMS]


def run_all(jobs):
    regimes.pretrain("dit", "all")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, regimes.one_thread) as pool:
        def run(keys):
            regimes.run_missing(keys, set(map(key_of, read_rows())), run_once, ROWS, pool)

        run(choices_of_rates())
        for seed in SEEDS:
            run(runs_of(seed))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    run_all(parser.parse_args().jobs)


if __name__ == "__main__":
    main()
