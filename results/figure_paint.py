"""How the pictures of results/figures.py look: a function for each, from what was measured.

A picture is 1024 pixels wide, as on a projector. All its text is at least 18 pixels high there. The
same colours mean the same in all of them, and a negative entry of M is a "conflict" everywhere.
"""

import math
import textwrap

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import sga
from sga import GRANULARITIES

# At 100 pixels an inch, 15 points are 21 pixels.
DPI = 100
LARGE_TYPE = {"figure.dpi": DPI, "savefig.dpi": DPI, "font.size": 17, "axes.titlesize": 18,
              "figure.titlesize": 23, "xtick.labelsize": 16, "ytick.labelsize": 16,
              "legend.fontsize": 17}

# Positive entries of M are violet, and negative ones are orange. Other matrices, whose signs say
# nothing of help or conflict, are blue and red.
OF_M, OF_OTHERS = "PuOr", "RdBu"
HELPS, CONFLICT = matplotlib.colormaps[OF_M](0.92), matplotlib.colormaps[OF_M](0.13)
# Macro, meso and micro; and two data points or groups, which are no granularity.
COLOURS = ("#0072b2", "#e69f00", "#009e73")
PAIR = ("#2f9fd8", "#cc4c8f")


def new_figure(title):
    """A figure with the one message of its picture as the title."""
    figure = Figure(figsize=(10.24, 7.68), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    figure.suptitle(title)
    return figure


def arrow(axis, start, end, colour, width=4):
    """An arrow between two points of an axis."""
    look = {"color": colour, "width": width, "headwidth": 4 * width, "headlength": 4 * width,
            "shrink": 0}
    axis.annotate("", tuple(end), tuple(start), arrowprops=look)


def number_table(axis, table, colours=OF_OTHERS, size=24, decimals=2, largest=None):
    """A matrix as cells with numbers in them. Tables with one `largest` have the same colours."""
    if largest is None:
        largest = table.abs().max().item()
    # The darkest colours are left out, so that numbers can be read on all.
    scale = 1.3 * largest
    axis.imshow(table.numpy(), vmin=-scale, vmax=scale, cmap=colours)
    for i, row in enumerate(table.tolist()):
        for j, value in enumerate(row):
            colour = "white" if abs(value) > 0.55 * scale else "black"
            axis.text(j, i, signed(value, decimals), ha="center", va="center", color=colour,
                      fontsize=size)


def signed(value, decimals=2, plus=""):
    """A number with a minus sign that is as long as a plus, in place of a hyphen."""
    return f"{value:{plus}.{decimals}f}".replace("-", "−")


def without_ticks(axis):
    axis.set(xticks=[], yticks=[])


def in_words(M_ij):
    return "helps" if M_ij > 0 else "conflict"


def colour_of(M_ij):
    return HELPS if M_ij > 0 else CONFLICT


# --- Flow matching --------------------------------------------------------------------------------

def crossing(meeting, samples):
    """Eq. 1, 2, 4, 6: straight paths that meet, beside samples that never do."""
    figure = new_figure("Training paths cross; samples bend, and never cross")
    left, right = figure.subplots(1, 2, sharey=True)
    paint_paths(left, meeting)
    paint_samples(right, samples)
    for axis in (left, right):
        axis.set(xlim=(-0.06, 1.06), ylim=(-2.5, 2.5), yticks=(-1, 1))
        axis.set_xticks((0, 1), ("t = 0\ndata", "t = 1\nnoise"))
    left.set_yticks((-1, 1), ("x = −1", "x = 1"))
    return figure


def paint_paths(axis, meeting):
    """Paths from both data points to random noises; two of them meet at the black dot."""
    # Noises at even shares of the normal law, in place of random ones.
    noise = torch.special.ndtri(torch.linspace(0.03, 0.97, 12)).tolist()
    x, t = meeting["x"], meeting["t"]
    reach = 0.3
    for point, colour, u in zip((-1, 1), PAIR, meeting["velocities"]):
        for e in noise:
            axis.plot((0, 1), (point, e), color=colour, alpha=0.35, linewidth=1.5)
        axis.plot((0, t), (point, x), color=colour, linewidth=4)
        arrow(axis, (t, x), (t + reach, x + reach * u), colour)
        axis.plot(0, point, "o", color=colour, markersize=14, clip_on=False)
    arrow(axis, (t, x), (t + reach, x + reach * meeting["mean"]), "black", 5)
    axis.plot(t, x, "o", color="black", markersize=12)
    axis.set_title("Where two cross, a network\ncan learn only their mean (black)")


def paint_samples(axis, samples):
    """Noises on their way to the data, along the mean velocity."""
    times = samples["t"]
    for way in samples["ways"]:
        axis.plot(times, way, color="black", linewidth=2)
    # Each way has a head, since sampling goes from noise to data.
    tail, tip = len(times) // 4, len(times) // 4 + 4
    for way in samples["ways"]:
        arrow(axis, (times[tail], way[tail]), (times[tip], way[tip]), "black", 3)
    for point, colour in zip((-1, 1), PAIR):
        axis.plot(0, point, "o", color=colour, markersize=14, clip_on=False)
    axis.set_title("So samples follow the mean,\nfrom noise back to data")


def form(measured):
    """Eq. 8: the triangle of v and the groups' velocities, and Omega with the weights omega."""
    figure = new_figure("The squared error of v is a sum over pairs of groups")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    paint_triangle(left, measured)
    paint_omega(right, measured)
    return figure


def paint_triangle(axis, measured):
    """In the plane of two outputs: from each group's velocity, and from their mean, to v."""
    u_g, u_star, v = measured["u_g"], measured["u_star"], measured["v"]
    # u* lies on the line between the groups' velocities, nearer to that of the larger share.
    axis.plot(*u_g.T, ":", color="grey", linewidth=3)
    points, colours = (*u_g, u_star), (*PAIR, "black")
    for name, point, colour in zip(("u₁", "u₂", "u*"), points, colours):
        arrow(axis, point, v, colour)
        axis.plot(*point, "o", color=colour, markersize=14)
        axis.annotate(name, tuple(point), (0, 14), textcoords="offset points", color=colour,
                      fontsize=26, ha="center")
    axis.plot(*v, "s", color="dimgrey", markersize=14)
    axis.annotate("v", tuple(v), (0, -14), textcoords="offset points", color="dimgrey",
                  fontsize=26, ha="center", va="top")
    without_ticks(axis)
    axis.set_aspect("equal")
    axis.margins(0.15, 0.6)
    axis.set(xlabel="velocity, first output", ylabel="second output")
    axis.set_title("u*: mean of the groups'\nvelocities u₁ and u₂", fontsize=20)


def paint_omega(axis, measured):
    """The inner products of v - u_g, the shares beside them, and the sum that they make."""
    omega, Omega = measured["omega"], measured["Omega"]
    number_table(axis, Omega, size=26)
    weighted = omega[:, None] * Omega * omega                      # (2, 2)
    for (g, h), term in zip(((0, 0), (0, 1), (1, 0), (1, 1)), weighted.flatten().tolist()):
        axis.text(h, g + 0.25, f"× ω{'₁₂'[g]} ω{'₁₂'[h]} = {signed(term)}", ha="center",
                  va="center", fontsize=15, color="black" if g != h else "white")
    shares = [f"ω{digit} = {share:.2f}" for digit, share in zip("₁₂", omega.tolist())]
    axis.set_xticks((0, 1), shares, fontsize=21)
    axis.set_yticks((0, 1), shares, fontsize=21, rotation=90, va="center")
    axis.set_xlabel(f"ωᵀ Ω ω, the sum of all four\n= {weighted.sum():.2f} = |v − u*|²",
                    fontsize=21, labelpad=14)
    axis.set_title("Ω: dot products of the\narrows from u₁ and u₂ to v", fontsize=20)


def floor(floors):
    """Eq. 5: the loss that is left to the exact velocity, over t."""
    figure = new_figure("On average no network gets below this loss on a caption's\n"
                        "images: it cannot know which of them the noise hides")
    axis = figure.subplots()
    for name, colour in zip(GRANULARITIES, COLOURS):
        axis.plot(floors["t"], floors[name], color=colour, linewidth=4, label=name)
        axis.plot(floors["marked"], floors[f"{name} marked"], "o", color=colour, markersize=11)
    ticks = (0, *floors["marked"])
    axis.set_xticks(ticks, map(str, ticks))
    axis.set(xlabel="t (0 is data, 1 is noise)", ylabel="floor of the loss, per output")
    axis.set(xlim=(0, 1), ylim=(0, None))
    axis.yaxis.labelpad = 10
    axis.grid(alpha=0.4)
    paint_floor_table(axis, floors)
    return figure


def paint_floor_table(axis, floors):
    """The floor at the marked noise levels, in the free corner: its lines are the legend too."""
    lines = ["t =   " + "  ".join(f"{level:6.2f}" for level in floors["marked"])]
    for name in GRANULARITIES:
        values = "  ".join(f"{short(value):>6}" for value in floors[f"{name} marked"])
        lines.append(f"{name:5} {values}")
    for k, (line, colour) in enumerate(zip(lines, ("black", *COLOURS))):
        axis.text(0.03, 0.95 - 0.08 * k, line, color=colour, family="monospace", fontsize=18,
                  transform=axis.transAxes, va="top", weight="bold")


def short(value):
    """Three decimals, or four where these say nothing."""
    if value < 0.00005:
        return "<.0001"
    return f"{value:.3f}" if value >= 0.001 else f"{value:.4f}"


# --- Gradients and the kernel ---------------------------------------------------------------------

NAMES = ("g₁", "g₂", "g₃")


def arrows(measured):
    """Eq. 10, 12, 13: three gradients, one step along their mean, and their dot products."""
    figure = new_figure("M holds the dot products of the samples' gradients:\n"
                        "a negative one is a conflict")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    paint_bowl(left, measured)
    paint_products(right, measured["M"])
    return figure


def paint_bowl(axis, measured):
    """The loss of two parameters, and what each sample asks of a step."""
    theta, g, side = measured["theta"], measured["g"], measured["side"]
    bowl = measured["bowl"]
    # More rings near the bottom of the bowl than on its walls.
    depth = bowl.max() - bowl.min()
    rings = bowl.min() + depth * torch.linspace(0.02, 1, 24) ** 2
    axis.contour(side, side, bowl, levels=rings, colors="silver", linewidths=1.2)
    for name, g_i in zip(NAMES, g):
        end = theta - g_i
        arrow(axis, theta, end, "dimgrey", 3)
        beyond = -26 * g_i / g_i.norm()
        axis.annotate(f"−{name}", tuple(end), tuple(beyond), textcoords="offset points",
                      fontsize=24, ha="center", va="center")
    arrow(axis, theta, theta - g.mean(0), "black", 7)
    axis.plot(*theta, "o", color="black", markersize=11)
    # A square that has room for all arrows and their names.
    ends = torch.cat([theta[None], theta - 1.3 * g])               # (4, 2)
    middle = (ends.amax(0) + ends.amin(0)) / 2
    reach = 0.62 * (ends.amax(0) - ends.amin(0)).max().item()
    axis.set(xlim=(middle[0] - reach, middle[0] + reach))
    axis.set(ylim=(middle[1] - reach, middle[1] + reach))
    axis.set_aspect("equal")
    without_ticks(axis)
    axis.set(xlabel="first parameter", ylabel="second parameter")
    axis.set_title("Each sample pulls its own way;\nthe step (black) is the mean")


def paint_products(axis, M):
    """The 3 x 3 table of dot products."""
    # The colours deepen early, so that the smaller numbers have one too.
    number_table(axis, M, OF_M, largest=1.3 * M.abs().median().item())
    axis.set_xticks(range(3), NAMES, fontsize=24)
    axis.set_yticks(range(3), NAMES, fontsize=24)
    axis.set_title("M: their dot products")
    axis.set_xlabel("violet: they help each other", color=HELPS)
    axis.text(0.5, -0.25, "orange: conflict", color=CONFLICT, ha="center",
              transform=axis.transAxes)


def jacobians(measured):
    """Eq. 10-12: J_i as strips, K as blocks, and one cell of M."""
    J, K, r, M = (measured[name] for name in "JKrM")
    _, D, P = J.shape
    figure = new_figure("One entry of M: a block of the kernel K\n"
                        "between the residuals of two samples")
    # Above, the Jacobians. Below, the kernel that they make, and one entry of M.
    strips, blocks = figure.subfigures(2, 1, height_ratios=(1, 1.35))
    scale = 1.3 * J.abs().max().item()
    for axis, name, J_i in zip(strips.subplots(2, 1), "₁₂", J):
        axis.imshow(J_i.numpy(), vmin=-scale, vmax=scale, cmap=OF_OTHERS, aspect="auto")
        axis.set_title(f"J{name}: what {P} parameters do to the {D} outputs of sample "
                       f"{name.translate(DIGITS)}", fontsize=20)
        without_ticks(axis)
    left, right = blocks.subfigures(1, 2, width_ratios=(1, 1.25))
    paint_blocks(left.subplots(), K)
    paint_one_cell(right, K, r, M[0, 1])
    return figure


DIGITS = str.maketrans("₁₂", "12")


def paint_blocks(axis, K):
    """K as 2 x 2 blocks of D x D numbers each; the block of samples 1 and 2 has a frame."""
    N, _, D, _ = K.shape
    table = K.transpose(1, 2).reshape(N * D, N * D)                # (ND, ND)
    number_table(axis, table, size=17, decimals=1)
    axis.axhline(D - 0.5, color="black", linewidth=2)
    axis.axvline(D - 0.5, color="black", linewidth=2)
    frame = Rectangle((D - 0.5, -0.5), D, D, fill=False, linewidth=4, clip_on=False)
    axis.add_patch(frame)
    middles = [D * sample + (D - 1) / 2 for sample in range(N)]
    axis.set_xticks(middles, ("sample 1", "sample 2"))
    axis.set_yticks(middles, ("sample 1", "sample 2"), rotation=90, va="center")
    axis.set_title("K: its blocks are J Jᵀ", fontsize=20, pad=14)


def paint_one_cell(figure, K, r, M_12):
    """r_1^T K_12 r_2 = M_12, with the numbers of all four. K_12 has the colours of the whole K."""
    row, column = r[0][None], r[1][:, None]
    tables = (row, K[0, 1], column, M_12.view(1, 1))
    titles = ("r₁ᵀ", "K₁₂", "r₂", "= M₁₂")
    of_r, of_K = r.abs().max().item(), K.abs().max().item()
    largest = (of_r, of_K, of_r, None)
    # The widths are those of the tables, so that their cells have one size.
    axes = figure.subplots(1, 4, width_ratios=(2, 2, 1, 1.3))
    for axis, table, title, scale in zip(axes, tables, titles, largest):
        colours = OF_M if axis is axes[-1] else OF_OTHERS
        number_table(axis, table, colours, size=18, decimals=1, largest=scale)
        without_ticks(axis)
        axis.set_title(title, fontsize=24)
    axes[-1].set_xlabel(in_words(M_12), fontsize=20, color=colour_of(M_12))


# --- What a step does -----------------------------------------------------------------------------

def influence(measured):
    """Eq. 11, 12: what a step on the first image does to four images."""
    figure = new_figure("A training step on one image changes the others too:\n"
                        "it helps some, and is in conflict with some")
    figure.get_layout_engine().set(h_pad=0.05)
    axes = figure.subplots(3, 4)
    heads = ("the step is\non this one", "its close-up", "other colour", "other\nbackground")
    # One scale for a row, which a few extreme pixels at the edges exceed.
    added = measured["added"] / measured["added"].abs().quantile(0.9)
    shares = measured["shares"] / measured["shares"].abs().quantile(0.97)
    for k, column in enumerate(axes.T):
        column[0].imshow(as_picture(measured["x0"][k]))
        column[0].set_title(heads[k])
        column[1].imshow(as_picture(added[k]))
        column[2].imshow(shares[k].numpy(), vmin=-1, vmax=1, cmap=OF_M)
        # In units of what the step does to the image that it is on.
        relative = (measured["M"][k] / measured["M"][0]).item()
        column[2].set_xlabel(f"M = {signed(relative, plus='+')}\n{in_words(relative)}",
                             color=colour_of(relative), fontsize=22, weight="bold")
        for axis in column:
            without_ticks(axis)
    labels = ("image", "the step adds\nthis to its\nprediction\n(grey: nothing)",
              "violet: helps\norange: conflict\n\nM: their sum,\nin units of\nthe first")
    for axis, label in zip(axes[:, 0], labels):
        axis.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=12, fontsize=16)
    return figure


def as_picture(image):
    """(H, W, 3) numbers from 0 to 1, of an image (3, H, W) from -1 to 1; 0 becomes grey."""
    return ((image.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy()


def step(measured):
    """Eq. 15: two lines that part."""
    figure = new_figure("M predicts what a small step does to the loss;\na large step overshoots")
    axis = figure.subplots()
    eta, whole = measured["eta"], measured["loss"]
    for name, colour in (("predicted", PAIR[1]), ("measured", "black")):
        shares = [change / whole for change in measured[name]]
        label = "predicted by M" if name == "predicted" else name
        axis.semilogx(eta, shares, color=colour, linewidth=5, label=label)
    axis.axhline(0, color="grey", linewidth=1)
    axis.legend(loc="upper left")
    axis.xaxis.set_major_formatter(in_powers_of_ten)
    axis.yaxis.set_major_formatter("{x:+.0%}")
    axis.set(xlabel="step size η", ylabel="change of the loss, as a share of it")
    axis.set(ylim=(-1.2, 1.2))
    return figure


def in_powers_of_ten(value, _):
    """Such as 1e-4: the exponent of a power would be too small to read."""
    return f"1e{math.log10(value):.0f}"


# --- M while training -----------------------------------------------------------------------------

OF_TRAINING = ("Gradients first share one direction, light against dark:\n"
               "training removes that first")


def share_of_light_against_dark(cosines):
    """How much of the (normed) gradients' squared length is a difference of light and dark images.

    The first half of the images is light. Let s be +1 on these and -1 on the others. If all light
    gradients were equal, and minus the dark ones, |sum_i s_i g_i|^2 = s^T M s would be N^2.
    """
    N = len(cosines)
    s = torch.ones(N, dtype=cosines.dtype)
    s[N // 2:] = -1
    return (s @ cosines @ s / N**2).item()


def matrix(stills):
    """Eq. 12: four moments of a training."""
    figure = new_figure(OF_TRAINING)
    axes = figure.subplots(2, 2)
    # Every panel has the same colours for the same numbers.
    for axis, shot in zip(axes.flat, stills):
        shown = paint_shot(axis, shot)
    add_scale(figure, shown, axes)
    return figure


def add_scale(figure, shown, axes):
    """The scale of colours that all steps share."""
    bar = figure.colorbar(shown, ax=axes, ticks=(-1, 0, 1))
    bar.ax.set_yticklabels(("−1\nconflict", "0", "1\nhelps"))


def paint_shot(axis, shot):
    """M at one step, as cosines. Black lines part the roots."""
    cosines = shot["cosines"]
    shown = axis.imshow(cosines.numpy(), vmin=-1, vmax=1, cmap=OF_M)
    for edge in range(3, len(cosines), 3):
        axis.axhline(edge - 0.5, color="black", linewidth=1)
        axis.axvline(edge - 0.5, color="black", linewidth=1)
    share = share_of_light_against_dark(cosines)
    axis.set_title(f"step {shot['step']}: {share:.0%} of it")
    axis.set_xticks((2.5, 8.5), ("on white", "on black"))
    axis.set_yticks((2.5, 8.5), ("on white", "on black"), rotation=90, va="center")
    return shown


def animate(film, file):
    """The same at every step that was measured, as a GIF."""
    figure = new_figure(OF_TRAINING)
    axis = figure.subplots()
    add_scale(figure, paint_shot(axis, film[0]), axis)
    writer = PillowWriter(fps=3)
    with writer.saving(figure, str(file), 0.7 * DPI):
        for shot in film:
            axis.clear()
            paint_shot(axis, shot)
            writer.grab_frame()
        # The last one stays for two seconds more.
        for _ in range(6):
            writer.grab_frame()


# --- Semantic Granularity Alignment ---------------------------------------------------------------

def one_panel(height, title):
    """A figure of one axis, whose title is the message of the picture."""
    figure = Figure(figsize=(10.24, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    axis = figure.subplots()
    axis.set_title(title, fontsize=23)
    return figure, axis


def views(root):
    """Algorithm 1: three views of one root, each with its caption."""
    figure, axis = one_panel(5.6, "One root has three views, each with\na caption of its own")
    framed = [F.pad(view, (1, 1, 1, 1), value=1.0) for _, view, _ in root]
    axis.imshow(as_picture(torch.cat(framed, 2)))
    captions = [textwrap.fill(caption, 14) for _, _, caption in root]
    axis.set_yticks([])
    axis.set_xticks([17, 51, 85], captions)
    return figure


def time_laws(laws):
    """Eq. 19: the density of t, by granularity."""
    figure, axis = one_panel(6.6, "Offsets: macro views see more noise,\nmicro views less")
    t = torch.linspace(0.002, 0.998, 499)
    for name, mu, law, colour in zip(GRANULARITIES, sga.OFFSETS, laws, COLOURS):
        z = torch.logit(t) - mu
        density_of_z = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        density = density_of_z / (t * (1 - t))
        shift = signed(mu, 1, plus="+") if mu else "0"
        label = f"{name}, {shift}: median {law['median']:.2f}"
        axis.plot(t, density, color=colour, linewidth=3, label=label)
    axis.set(xlabel="t (0 is data, 1 is noise)", ylabel="density of t", ylim=(0, 2.9))
    axis.legend(loc="upper center")
    return figure


def weights():
    """Eq. 20: both forms of the weight."""
    title = "Min-SNR weights make little noise count little;\nthe velocity form, much noise too"
    figure, axis = one_panel(6.6, title)
    t = torch.linspace(0, 1, 501)
    for index, (name, gamma, colour) in enumerate(zip(GRANULARITIES, sga.GAMMAS, COLOURS)):
        granularity = torch.full((501,), index)
        label = f"{name}, γ = {gamma:g}"
        axis.plot(t, sga.min_snr_weight(t, granularity), color=colour, linewidth=3, label=label)
        w = sga.min_snr_weight(t, granularity, form="velocity")
        axis.plot(t, w, "--", color=colour, linewidth=2)
    axis.plot([], [], color="black", linewidth=3, label="solid: epsilon form")
    axis.plot([], [], "--", color="black", linewidth=2, label="dashed: velocity form")
    axis.set(xlabel="t (0 is data, 1 is noise)", ylabel="weight", ylim=(0, 1.05))
    axis.legend(loc=(0.55, 0.42))
    return figure
