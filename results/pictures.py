"""The pictures of a run: what its network draws, its curves, and how the interaction matrix of its probe batch evolves. train.py calls them."""

import matplotlib.pyplot as plt
import torch

import ntk

KINDS = {"root view": ("black", "-"), "root level": ("black", "--"), "root": ("black", ":"), "view level": ("#d55e00", "-"), "view": ("#d55e00", "--"),
         "level": ("#cc79a7", "-"), "nothing": ("#56b4e9", "-")}                  # what two samples share: the colour and the line
VIEW_COLOURS = {"macro": "#0072b2", "meso": "#e69f00", "micro": "#009e73"}        # told apart by colour-blind readers


def show(axis, images):
    """Images, each (3, h, w), side by side."""
    strip = torch.cat([torch.nn.functional.pad(x.cpu(), (1, 1, 1, 1), value=0.3) for x in images], 2)
    axis.imshow(((strip.clamp(-1, 1).permute(1, 2, 0) + 1) / 2).numpy())
    axis.set_axis_off()


def draw_samples(columns, title, file):
    """A grid: columns of (title, [(caption, two true images, three samples)])."""
    figure, axes = plt.subplots(5, 3, figsize=(15, 7), constrained_layout=True)
    for column, (head, rows) in zip(axes.T, columns):
        for k, (axis, (caption, truth, drawn)) in enumerate(zip(column, rows)):
            show(axis, [*truth, torch.ones_like(truth[0][:, :, :6]), *drawn])
            axis.set_title((head + "\n" if k == 0 else "") + caption, fontsize=11)
    figure.suptitle(title, fontsize=14)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_curves(log, s, file):
    """Loss with its floor, and the error of the exact velocity, over the steps of both phases."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 8), sharex=True, constrained_layout=True)
    above.plot([int(row["step"]) for row in log], [float(row["loss"]) for row in log], color="grey", label="training loss (its own t, running mean)")
    for view, colour in VIEW_COLOURS.items():
        for phase in ("pretrain", "finetune"):
            rows = [row for row in log if row["phase"] == phase and row[f"val_loss_{view}"]]
            steps, values = [int(row["step"]) for row in rows], lambda name: [float(row[f"val_{name}_{view}"]) for row in rows]
            label = lambda text: f"{text}, {view}" if phase == "finetune" else None
            above.plot(steps, values("loss"), color=colour, label=label("validation loss"))
            above.plot(steps, values("floor"), color=colour, linestyle=":", label=label("its floor |u - u*|²/D"))
            below.plot(steps, values("error"), color=colour, label=label("|v - u*|²/D"))
    for axis, name in ((above, "loss per output"), (below, "error of the exact velocity")):
        axis.set_yscale("log")
        axis.set_ylabel(name)
        axis.axvline(s.pretrain_steps, color="black", linewidth=0.8)
        axis.legend(fontsize=9, ncols=2)
        axis.grid(alpha=0.3)
    below.set_xlabel("optimizer step (line: the fine-tuning on the target domain begins)")
    figure.suptitle(f"{s.model}, arm {s.arm}, seed {s.seed}: the loss stays above its floor; what a better network can remove is |v - u*|²")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_probe(rows, s, file):
    """How the interaction matrix of the probe batch evolves, and what it is at last."""
    figure, axes = plt.subplots(2, 2, figsize=(16, 11), constrained_layout=True)
    steps = [row["step"] for row in rows]
    for axis, name, title in ((axes[0, 0], "conflict", "share of pairs in conflict, by what two samples share"),
                              (axes[0, 1], "cosine", "mean cosine of two samples' gradients, by what they share")):
        for kind in rows[0]["pairs"]:
            axis.plot(steps, [row["pairs"][kind][name] for row in rows], "o", linestyle=KINDS[kind][1], markersize=4, color=KINDS[kind][0], label=kind)
        axis.set(title=title, ylim=(0, None) if name == "conflict" else None)
        if name == "cosine":                                       # the lines are the same in both
            axis.legend(title="the two share their")
    axes[1, 0].plot(steps, [row["cross"] / row["trace"] for row in rows], "o-", color="black", label="cross terms / trace (Eq. 13)")
    axes[1, 0].plot(steps, [row["sign_agreement"] for row in rows], "s-", color="#d55e00", label="sign agreement (Eq. 17)")
    axes[1, 0].plot(steps, [row["drift"] for row in rows], "^-", color="#cc79a7", label="drift of the kernel, seen by the targets (Eq. 16)")
    axes[1, 0].set_yscale("symlog", linthresh=0.1)
    axes[1, 0].set(title="the whole matrix: three numbers without unit", ylabel="ratio, share, ratio (linear below 0.1)")
    axes[1, 0].legend()
    for axis in axes.flat[:3]:
        axis.axvline(s.pretrain_steps, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.set_xlabel("optimizer step (line: the fine-tuning begins)")
    M = torch.tensor(rows[-1]["M"])
    shown = axes[1, 1].imshow(ntk.cosines(M).numpy(), vmin=-1, vmax=1, cmap="PuOr")
    figure.colorbar(shown, ax=axes[1, 1], label="cosine (negative: in conflict)")
    axes[1, 1].set(title=f"M after step {steps[-1]}, as cosines", xlabel="in each root: macro, meso, micro; in each of these: t = 0.2, 0.5, 0.8",
                   xticks=range(4, len(M), 9), yticks=range(4, len(M), 9))
    axes[1, 1].set_xticklabels([f"root {k + 1}" for k in range(s.probe)], rotation=60)
    axes[1, 1].set_yticklabels([f"root {k + 1}" for k in range(s.probe)])
    figure.suptitle(f"{s.model}, arm {s.arm}, seed {s.seed}: the interaction matrix of {s.probe} roots of the target domain, at three granularities and noise levels")
    figure.savefig(file, dpi=90)
    plt.close(figure)
