"""A picture of results/README.md: the interaction matrix before and after fine-tuning, beside
what the network makes of captions then.

    python train.py --probe 6 && python results/cover.py runs/dit-0
"""

import dataclasses
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import ntk  # noqa: E402
import toy_data  # noqa: E402
import train  # noqa: E402
from support import book, machine, report  # noqa: E402
from support.pictures import show  # noqa: E402

SAMPLES = 3


def main(folder, file=str(ROOT / "results/cover.png")):
    checkpoint = str(Path(folder) / "checkpoint.pt")
    s, content = book.load(checkpoint, train.Settings, train.FORMAT)
    s = dataclasses.replace(s, device="cpu", precision="float32")
    run = train.Run(s)
    # Not run.restore(content): a GPU's generator does not fit a CPU's.
    run.ema.load_state_dict(content["ema"])
    probe = [row for row in content["probe"] if row["step"] >= s.pretrain_steps]

    figure = Figure(figsize=(12.8, 9.6), layout="constrained")
    figure.suptitle("What the gradients share goes first", fontsize=24)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    paint_matrices(left, probe, s)
    paint_samples(right, *sample(run))
    figure.savefig(file, dpi=80)
    print("drawn:", file)


def sample(run):
    """(6 captions, 6 true images, 3 samples of each): two target scenes at each granularity."""
    s = run.settings
    scenes = report.test_scenes(s, run.roots, "target", "seen", 8)
    scenes = scenes.take(torch.tensor([0, 1, 0, 1, 0, 1]))
    granularity = torch.arange(3).repeat_interleave(2)             # (6,)
    truth, tokens = toy_data.views(scenes, granularity, s.pixels)  # (6, 3, H, W), (6, 12)
    tokens = tokens.repeat_interleave(SAMPLES, 0)                  # (18, 12)
    images = report.sample_images(run.ema, tokens, s, machine.seeded(s, 9))
    names = [toy_data.GRANULARITIES[k] for k in granularity]
    captions = toy_data.captions(scenes, names)
    return captions, truth, images.unflatten(0, (-1, SAMPLES))


def paint_matrices(figure, probe, s):
    """M before the fine-tuning and at its end, as cosines."""
    steps = probe[-1]["step"] - s.pretrain_steps
    axes = figure.subplots(2, 1)
    moments = {"before the fine-tuning": probe[0], f"after {steps} steps": probe[-1]}
    for axis, (when, row) in zip(axes, moments.items()):
        cosines = ntk.cosines(torch.as_tensor(row["M"]))
        shown = axis.imshow(cosines.numpy(), vmin=-1, vmax=1, cmap="PuOr")
        axis.set_title(f"M {when}:\n{row['conflict']:.0%} of pairs in conflict", fontsize=20)
        middles = range(4, 9 * s.probe, 9)
        names = [str(k + 1) for k in range(s.probe)]
        axis.set_xticks(middles, names, fontsize=18)
        axis.set_yticks(middles, names, fontsize=18)
        axis.set_ylabel("root", fontsize=18)
        for edge in range(9, 9 * s.probe, 9):
            axis.axhline(edge - 0.5, color="black", linewidth=0.6)
            axis.axvline(edge - 0.5, color="black", linewidth=0.6)
    bar = figure.colorbar(shown, ax=axes, ticks=(-1, 0, 1))
    bar.ax.set_yticklabels(("−1\nconflict", "0", "1\nhelps"), fontsize=18)


def paint_samples(figure, captions, truth, images):
    """A row for each caption: a true image, a gap, samples."""
    axes = figure.subplots(len(captions), 1)
    for axis, caption, image, samples in zip(axes, captions, truth, images):
        gap = torch.ones_like(image[:, :, :4])
        show(axis, [image, gap, *samples])
        axis.set_title(textwrap.fill(caption, 28), fontsize=18)
    figure.suptitle("A true image, three samples", fontsize=20)


if __name__ == "__main__":
    main(*sys.argv[1:])
