"""What the rank of the adapters changes: conflict, the noise of a step, and quality.

    python results/ranks.py                     # it goes on where it was stopped; then it draws
    python results/ranks.py --draw              # the figure and the table alone, from the rows

The paper speaks of a network's effective capacity, and the rank of an adapter makes it a number.
One might expect that with fewer trained numbers less is learned, and that samples are more in
conflict. Is it so? The DiT of results/regimes.py is fine-tuned in the paper-like regime at several
ranks, and with all weights, which counts as rank 0. For each rank the learning rate is chosen on
the baseline alone, with a seed that is used for nothing else. A run is one line of ranks.jsonl.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import ntk  # noqa: E402
from results import regimes, regimes_report, study_statistics  # noqa: E402
from support import report  # noqa: E402

ROWS = ROOT / "results/ranks.jsonl"
FIGURE = ROOT / "results/ranks.png"
TABLE = ROOT / "results/ranks_table.md"
TITLE = "A smaller rank learns less; its gradients are not more in conflict"
RANKS = (1, 2, 4, 8, 16, 0)
ARMS = ("baseline", "tuple_max", "sga")
SEEDS = (1, 2, 3)
CHOOSING_SEED = regimes.CHOOSING_SEED


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
    _, beta = group["betas"]
    scales = []
    for weight in group["params"]:
        state = optimizer.state[weight]
        v = state["exp_avg_sq"] / (1 - beta ** state["step"].item())
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
        regimes.run_missing(choices_of_rates(), key_of, run_once, ROWS, pool)
        for seed in SEEDS:
            regimes.run_missing(runs_of(seed), key_of, run_once, ROWS, pool)


# --- What the rows say ----------------------------------------------------------------------------

def rows_of(rows, rank, arm):
    """The rows of an arm at a rank, in the order of the seeds."""
    return [row for seed in SEEDS for row in rows
            if (row["rank"], row["arm"], row["seed"]) == (rank, arm, seed)]


def conflict(row):
    """The share of the probe's pairs that conflict at the end."""
    return row["probe"][-1]["conflict"]


def conflict_for_adamw(row):
    return row["adamw"]["conflict"]


def flipped(row):
    return row["adamw"]["flipped"]


def mean_of(rows, rank, arm, measure):
    return regimes_report.mean(measure(row) for row in rows_of(rows, rank, arm))


def effect(rows, rank, arm, measure):
    """By seed, in percent: how much larger a measure of the arm is than the baseline's."""
    pairs = zip(rows_of(rows, rank, arm), rows_of(rows, rank, "baseline"), strict=True)
    return regimes_report.changes_of_pairs(pairs, measure)


def table(rows):
    """The text of ranks_table.md: a line for each rank, with means over the seeds."""
    lines = ["# The ranks: a table", "",
             "Written by `python results/ranks.py --draw` from `ranks.jsonl`: the DiT in the "
             f"paper-like regime, {len(SEEDS)} seeds. The noise of a step is "
             "E\\|ĝ\\|²/\\|E ĝ\\|², predicted from M of the base.", "",
             "| rank | trained numbers | rate | conflict at the end: baseline | SGA "
             "| baseline, for AdamW | signs that AdamW flips | noise of a step: baseline "
             "| root tuples | fit of the baseline | joint accuracy | SGA: fit (%) |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    joint = regimes_report.reader("joint", 2)
    for rank in RANKS:
        first = rows_of(rows, rank, "baseline")[0]
        cells = [str(rank) if rank else "all weights", f"{first['trained']:,}",
                 f"{first['rate']:g}"]
        for arm, measure, form in (
                ("baseline", conflict, ".1%"), ("sga", conflict, ".1%"),
                ("baseline", conflict_for_adamw, ".1%"), ("baseline", flipped, ".1%"),
                ("baseline", regimes_report.noise_of, ".1f"),
                ("tuple_max", regimes_report.noise_of, ".1f"),
                ("baseline", regimes_report.fit, ".4f"), ("baseline", joint, ".1%")):
            cells.append(f"{mean_of(rows, rank, arm, measure):{form}}")
        cells.append(regimes_report.text_of(effect(rows, rank, "sga", regimes_report.fit)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# --- The figure -----------------------------------------------------------------------------------

PANELS = {
    "share of pairs in conflict\nat the end": (
        ("baseline", conflict, "baseline"), ("sga", conflict, "SGA"),
        ("baseline", conflict_for_adamw, "baseline, for AdamW")),
    "noise of a step,\nfrom M before training": (
        ("baseline", regimes_report.noise_of, "baseline"),
        ("sga", regimes_report.noise_of, "SGA"),
        ("tuple_max", regimes_report.noise_of, "root tuples")),
    "fit |v - u*|²/D\n(less is better)": (
        ("baseline", regimes_report.fit, "baseline"), ("sga", regimes_report.fit, "SGA"),
        ("tuple_max", regimes_report.fit, "root tuples"))}
LOOKS = {"baseline": "#000000", "SGA": "#cc4c8f", "root tuples": "#2f9fd8",
         "baseline, for AdamW": "#999999"}


def draw(rows, file):
    """Three panels against the rank. A dot is a seed, a line goes through the means."""
    figure = Figure(figsize=(16, 8), layout="constrained")
    for axis, (title, lines) in zip(figure.subplots(1, 3), PANELS.items()):
        for arm, measure, name in lines:
            means = [mean_of(rows, rank, arm, measure) for rank in RANKS]
            axis.plot(range(len(RANKS)), means, color=LOOKS[name], linewidth=3, label=name)
            for place, rank in enumerate(RANKS):
                values = [measure(row) for row in rows_of(rows, rank, arm)]
                axis.plot([place] * len(values), values, "o", color=LOOKS[name], markersize=7)
        axis.set_title(title, fontsize=23)
        axis.set_xticks(range(len(RANKS)), [str(rank or "all") for rank in RANKS])
        axis.set_xlabel("rank of the adapters", fontsize=21)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=21)
        axis.legend(fontsize=20, loc="best")
    figure.suptitle(TITLE, fontsize=27)
    figure.savefig(file, dpi=64)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--draw", action="store_true", help="only draw, from the rows")
    flags = parser.parse_args()
    if not flags.draw:
        run_all(flags.jobs)
    draw(read_rows(), FIGURE)
    TABLE.write_text(table(read_rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
