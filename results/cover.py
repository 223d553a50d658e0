"""The README's first picture: the interaction matrix before and after fine-tuning, beside what the network draws then.

    python train.py --probe 6 && python results/cover.py runs/dit-0
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)                                          # not this folder, whose files would hide libraries of their names

import matplotlib  # noqa: E402
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import ntk  # noqa: E402
import train  # noqa: E402
from results.pictures import show  # noqa: E402


def main(folder, file=str(ROOT / "results/cover.png")):
    s, content = train.load(str(Path(folder) / "checkpoint.pt"))
    s = dataclasses.replace(s, device="cpu")
    rows = [row for row in train.read_probe(folder) if row["step"] >= s.pretrain_steps]
    model = train.load_weights(str(Path(folder) / "checkpoint.pt"), train.build(s), s)
    figure = plt.figure(figsize=(17, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.9, 1))
    axes = left.subplots(1, 2)
    for axis, row, when in zip(axes, (rows[0], rows[-1]), ("before fine-tuning", f"after {rows[-1]['step'] - s.pretrain_steps} steps of it")):
        shown = axis.imshow(ntk.cosines(torch.tensor(row["M"])).numpy(), vmin=-1, vmax=1, cmap="PuOr")
        axis.set(title=f"{when}: {row['conflict']:.0%} of pairs conflict\ndL/dτ = {row['trace']:.3g} (alone) {row['cross']:+.3g} (cross terms)",
                 xticks=range(4, 9 * s.probe, 9), yticks=range(4, 9 * s.probe, 9))
        axis.set_xticklabels([f"root {k + 1}" for k in range(s.probe)])
        axis.set_yticklabels([f"root {k + 1}" for k in range(s.probe)])
        axis.set_xlabel("a root: macro, meso, micro; each: t = 0.2, 0.5, 0.8", fontsize=9)
        for edge in range(9, 9 * s.probe, 9):
            axis.axhline(edge - 0.5, color="black", linewidth=0.6)
            axis.axvline(edge - 0.5, color="black", linewidth=0.6)
    left.colorbar(shown, ax=axes, label="cosine of two samples' gradients (orange: they conflict)")
    left.suptitle("The interaction matrix M_ij = r_iᵀ K_ij r_j")
    scenes = train.test_scenes("target", "seen", s, train.draw_roots(s), 8).take(torch.tensor([0, 1, 0, 1, 0, 1]))
    granularity = torch.arange(3).repeat_interleave(2)
    truth, tokens = train.draw(scenes, granularity, s)
    drawn = train.sample(model, tokens.repeat_interleave(3, 0), s, train.seeded(s, 9)).unflatten(0, (6, 3))
    captions = train.toy_data.captions(scenes, [train.GRANULARITIES[g] for g in granularity])
    for axis, image, samples, caption in zip(right.subplots(6, 1), truth, drawn, captions):
        show(axis, [image, torch.ones_like(image[:, :, :4]), *samples])
        axis.set_title(caption, fontsize=10)
    right.suptitle(f"a true image | three samples ({s.model}, arm {s.arm})")
    figure.savefig(file, dpi=80)
    print("drawn:", file)


if __name__ == "__main__":
    main(*sys.argv[1:])
