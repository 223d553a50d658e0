"""The pictures of a run: what its network makes of captions, its curves, its interaction matrix.

They are made without pyplot, so that no window system and no notebook has a say in them.
"""

import os
import textwrap

import torch
from matplotlib.figure import Figure

import ntk
from support import book

# How the name of a picture may end. (For pgf, matplotlib needs LaTeX.)
SUFFIXES = set(Figure().canvas.get_supported_filetypes()) - {"pgf"}

# Colours that colour-blind readers tell apart.
VIEW_COLOURS = {"macro": "#0072b2", "meso": "#e69f00", "micro": "#009e73"}

# What two samples share: the colour and the line of such pairs.
KINDS = {"root view": ("black", "-"), "root level": ("black", "--"), "root": ("black", ":"),
         "view level": ("#d55e00", "-"), "view": ("#d55e00", "--"),
         "level": ("#cc79a7", "-"), "nothing": ("#56b4e9", "-")}
SHARED = {"root": "root", "view": "granularity", "level": "noise level", "nothing": "nothing"}
STEP_LABEL = "optimizer step (line: the fine-tuning begins)"


def file_of(out):
    """The file of a picture; a name without a suffix gets .png. Stops if it cannot be drawn."""
    file = out if os.path.splitext(out)[1] else out + ".png"
    if suffix_of(file) not in SUFFIXES:
        book.stop(f"--out {out!r} must end in one of {', '.join(sorted(SUFFIXES))}")
    folder = os.path.dirname(file) or "."
    if not os.path.isdir(folder):
        book.stop(f"{file} cannot be written: there is no folder {folder}")
    if os.path.isdir(file):
        book.stop(f"{file} cannot be written: it is a folder")
    return file


def suffix_of(file):
    return os.path.splitext(file)[1].lstrip(".").lower()


def save(figure, file, dpi):
    """A picture that fails leaves no half of it behind."""
    with book.unfinished(file) as name:
        figure.savefig(name, format=suffix_of(file), dpi=dpi)


def show(axis, images):
    """Images, each (3, h, w) in [-1, 1], side by side with a thin frame."""
    framed = [torch.nn.functional.pad(image.cpu(), (1, 1, 1, 1), value=0.3) for image in images]
    strip = torch.cat(framed, 2).clamp(-1, 1)
    axis.imshow(((strip.permute(1, 2, 0) + 1) / 2).numpy())
    axis.set_axis_off()


def draw_samples(columns, title, file):
    """A grid: columns of (title, [(caption, two true images, three samples)])."""
    figure = Figure(figsize=(15, 9.8), layout="constrained")
    for part, (head, entries) in zip(figure.subfigures(1, len(columns)), columns):
        part.suptitle(head.replace(": ", ":\n"), fontsize=21, fontweight="bold")
        for axis, (caption, truth, made) in zip(part.subplots(len(entries), 1), entries):
            gap = torch.ones_like(truth[0][:, :, :6])
            show(axis, [*truth, gap, *made])
            axis.set_title(textwrap.fill(caption, 26), fontsize=20)
    figure.suptitle(title, fontsize=23)
    save(figure, file, dpi=80)


def draw_captions(captions, images, file):
    """Images (n, k, 3, h, w): a row of k for each of n captions."""
    figure = Figure(figsize=(8, 2.4 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 1, squeeze=False)
    for axis, several, caption in zip(axes[:, 0], images, captions):
        show(axis, several)
        axis.set_title(caption, fontsize=14)
    save(figure, file, dpi=110)


# --- Curves ---------------------------------------------------------------------------------------

def draw_curves(log, s, file):
    """The loss with its floor, and the error |v - u*|^2/D, over the steps of both phases."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    steps = [row["step"] for row in log]
    above.plot(steps, [row["loss"] for row in log], color="grey", label="training loss")
    for view, colour in VIEW_COLOURS.items():
        draw_validation(above, below, log, view, colour)
    # Each with room for its legend.
    for axis, name, room in ((above, "loss per output", 4), (below, "error |v - u*|²/D", 1.7)):
        axis.set_yscale("log")
        axis.set_ylabel(name, fontsize=19)
        axis.axvline(s.pretrain_steps, color="black", linewidth=0.8)
        _, high = axis.get_ylim()
        axis.set_ylim(top=room * high)
        axis.legend(fontsize=17, ncols=3, loc="upper center")
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=18, which="both")
    below.set_xlabel(STEP_LABEL, fontsize=19)
    above.set_title("The loss stays above its floor (dotted)", fontsize=20)
    below.set_title("What a better network could still remove", fontsize=20)
    figure.suptitle(f"{s.model}, arm {s.arm}, seed {s.seed}", fontsize=20)
    save(figure, file, dpi=80)


def draw_validation(above, below, log, view, colour):
    """The validation curves of one view, each phase a line of its own."""
    for phase in ("pretrain", "finetune"):
        rows = [row for row in log if row["phase"] == phase and f"val_loss_{view}" in row]
        steps = [row["step"] for row in rows]
        loss = [row[f"val_loss_{view}"] for row in rows]
        floor = [row[f"val_floor_{view}"] for row in rows]
        error = [row[f"val_error_{view}"] for row in rows]
        named = phase == "finetune"            # one entry of the legend for both phases
        above.plot(steps, loss, color=colour, label=f"validation, {view}" if named else None)
        above.plot(steps, floor, ":", color=colour, label=f"floor, {view}" if named else None)
        below.plot(steps, error, color=colour, label=view if named else None)


# --- The probe ------------------------------------------------------------------------------------

def draw_probe(rows, s, file):
    """How the interaction matrix of the probe batch evolves, and what it is at last."""
    figure = Figure(figsize=(14.6, 11), layout="constrained")
    (conflict, cosine), (numbers, matrix) = figure.subplots(2, 2)
    draw_kinds(conflict, rows, "conflict", "Share of pairs in conflict")
    draw_kinds(cosine, rows, "cosine", "Mean cosine of two gradients")
    figure.legend(*cosine.get_legend_handles_labels(), title="the two samples share their",
                  fontsize=19, title_fontsize=19, ncols=4, loc="outside lower center")
    draw_numbers(numbers, rows)
    for axis in (conflict, cosine, numbers):
        axis.axvline(s.pretrain_steps, color="black", linewidth=0.8)
        axis.grid(alpha=0.3)
        axis.set_xlabel(STEP_LABEL, fontsize=19)
        axis.tick_params(labelsize=19)
    M = torch.as_tensor(rows[-1]["M"])
    shown = draw_matrix(matrix, M, f"M after step {rows[-1]['step']}, as cosines")
    bar = figure.colorbar(shown, ax=matrix)
    bar.set_label("cosine (below 0: conflict)", fontsize=19)
    bar.ax.tick_params(labelsize=19)
    figure.suptitle(f"{s.model}, arm {s.arm}, seed {s.seed}: M of {s.probe} roots", fontsize=22)
    save(figure, file, dpi=70)


def draw_kinds(axis, rows, measure, title):
    steps = [row["step"] for row in rows]
    for kind in rows[0]["pairs"]:
        colour, line = KINDS[kind]
        values = [row["pairs"][kind][measure] for row in rows]
        name = ", ".join(SHARED[word] for word in kind.split())
        axis.plot(steps, values, "o", linestyle=line, linewidth=2, markersize=6, color=colour,
                  label=name)
    axis.set_title(title, fontsize=21)


def draw_numbers(axis, rows):
    """Cross terms, sign agreement beside chance, and the kernel's drift: none has a unit."""
    steps = [row["step"] for row in rows]
    ratio = [row["cross"] / row["trace"] for row in rows]
    axis.plot(steps, ratio, "o-", color="black", label="cross terms / trace (Eq. 13)")
    axis.plot(steps, [row["sign_agreement"] for row in rows], "s-", color="#d55e00",
              label="sign agreement (Eq. 17)")
    axis.plot(steps, [row["sign_by_chance"] for row in rows], "--", color="#d55e00",
              label="the same by chance")
    axis.plot(steps, [row["drift"] for row in rows], "^-", color="#cc79a7",
              label="drift of the kernel (Eq. 16)")
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_title("The whole matrix (linear below 0.1)", fontsize=21)
    axis.legend(fontsize=19)


def draw_matrix(axis, M, title):
    """M of a probe batch as cosines, with a frame around each root's samples."""
    roots = len(M) // 9
    shown = axis.imshow(ntk.cosines(M).numpy(), vmin=-1, vmax=1, cmap="PuOr")
    middles = range(4, len(M), 9)
    names = [str(k + 1) for k in range(roots)]
    axis.set_xticks(middles, names, fontsize=19)
    axis.set_yticks(middles, names, fontsize=19)
    axis.set_title(title, fontsize=21)
    axis.set_xlabel("root (in it: macro, meso, micro,\neach at t = 0.2, 0.5, 0.8)", fontsize=19)
    for edge in range(9, len(M), 9):
        axis.axhline(edge - 0.5, color="black", linewidth=0.6)
        axis.axvline(edge - 0.5, color="black", linewidth=0.6)
    return shown
