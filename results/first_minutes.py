"""The first minutes: a small network learns while you watch, and the derivation speaks of it.

    python results/first_minutes.py              draws first_minutes.png into the current folder
    python results/first_minutes.py other.png    draws this file

The images are close-ups of one object on white. What is printed comes in the order of the
derivation, each sentence with its equation. The functions with measure_ compute (one says how the
loss falls), and main says what they found.
"""

import itertools
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import support  # noqa: E402, F401  before torch: on a busy machine its threads must not spin

import matplotlib  # noqa: E402
import torch  # noqa: E402

import dit  # noqa: E402
import flow_matching as fm  # noqa: E402
import ntk  # noqa: E402
import toy_data  # noqa: E402
from results import figure_paint as paint  # noqa: E402
from results import figures  # noqa: E402

PIXELS = 12
D = 3 * PIXELS * PIXELS
STEPS, BATCH, LEARNING_RATE, WARMUP = 850, 32, 3e-3, 30
# Guidance and steps of Heun's method, for samples.
SCALE, SAMPLE_STEPS = 2.0, 8


def some_scenes(n, generator, split="seen"):
    """n random scenes of one object on white."""
    scenes = toy_data.sample_scenes(n, generator, "base", split)
    return scenes._replace(background=torch.zeros(n, dtype=torch.long))


def new_network():
    return dit.DiT(len(toy_data.WORDS), PIXELS, patch=3, width=64, depth=2)


def measure_training(steps, generator, held):
    """The trained network, and its last loss on the batch that is held; prints how it falls."""
    torch.manual_seed(0)
    model = new_network()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(1, steps + 1):
        # The learning rate rises at first, and falls to 0 towards the end.
        rise, fall = min(1, step / WARMUP), 1 - (step - 1) / steps
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rise * fall
        x0, tokens = toy_data.views(some_scenes(BATCH, generator), "meso", PIXELS)
        # One caption in ten is dropped, so that guidance has a velocity without caption.
        tokens[torch.rand(BATCH, generator=generator) < 0.1] = 0
        e = torch.randn(x0.shape, generator=generator)
        t = torch.rand(BATCH, generator=generator)
        optimizer.zero_grad()
        fm.loss(model, x0, e, t, tokens).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in (1, steps // 8, steps // 2, steps):
            with torch.no_grad():
                loss = fm.loss(model, *held).mean().item()
            print(f"   after step {step:4} the loss is {loss:.3f}", flush=True)
    return model, loss


def measure_held(generator, n=128):
    """A batch (x0, e, t, tokens) that is not trained on, and the floor of its loss (Eq. 5)."""
    scenes = some_scenes(n, generator)
    x0, tokens = toy_data.views(scenes, "meso", PIXELS)
    e = torch.randn(x0.shape, generator=generator)
    t = torch.linspace(0.02, 0.98, n)
    points, _ = toy_data.views(toy_data.population(scenes), "meso", PIXELS)
    floor = fm.loss_floor(x0, e, t, points.unflatten(0, (n, -1)))
    return (x0, e, t, tokens), floor.mean().item()


def measure_samples(model, generator, n):
    """Captions that were never trained on: true images, samples, and which the reader accepts."""
    scenes = some_scenes(n, generator, "held_out")
    truth, tokens = toy_data.views(scenes, "meso", PIXELS)
    noise = torch.randn(truth.shape, generator=generator)
    images = fm.sample(model, tokens, noise, SAMPLE_STEPS, SCALE)
    right = toy_data.accuracies(images, scenes, "meso")["joint"]
    return {"captions": toy_data.captions(scenes, "meso"), "truth": truth, "images": images,
            "right": right}


# --- What a step does to each of a few images -----------------------------------------------------

# Four captions of the training, as colour, texture and shape. The last step is on the first one.
FOUR = ("red plain square", "red plain circle", "blue plain circle", "yellow striped triangle")


def four_images():
    """Images (4, 3, H, W) and tokens (4, 12) of FOUR."""
    objects = []
    for caption in FOUR:
        colour, texture, shape = caption.split()
        objects.append([toy_data.SHAPES.index(shape), list(toy_data.COLOURS).index(colour),
                        toy_data.TEXTURES.index(texture), 0])
    nuisance = toy_data.NUISANCES[[9] * len(FOUR)]                 # (4, 3)
    white = torch.zeros(len(FOUR), dtype=torch.long)
    scenes = toy_data.Scenes(torch.tensor(objects)[:, None], white, nuisance)
    return toy_data.views(scenes, "meso", PIXELS)


def measure_matrix(model, generator, noises, t=0.3):
    """The samples of the four images, each with so many noises, and their M (4, 4) (Eq. 12)."""
    x0, tokens = four_images()
    # All images have the same noises, so that they differ in nothing else.
    e = torch.randn(noises, *x0.shape[1:], generator=generator, dtype=torch.float64)
    e = e.repeat(len(FOUR), 1, 1, 1)                               # (4 noises, 3, H, W)
    x0 = x0.double().repeat_interleave(noises, 0)
    levels = torch.full((len(e),), t).double()
    batch = (x0, e, levels, tokens.repeat_interleave(noises, 0))
    return batch, figures.mean_interaction_matrix(model, batch, noises)


def measure_step(model, batch, stepped, M_of_step):
    """A step of gradient descent on the images that are `stepped` on (4,): its size, what it does.

    The step size is such that to first order it takes a hundredth of their loss L, if M_of_step is
    the squared length of the gradient of L (Eq. 13). Returned are eta, and the change of each
    image's |r_i|^2 / 2 (4,), a mean over its noises.
    """
    noises = len(batch[0]) // len(FOUR)

    def halves():
        r = fm.residual(model, *batch)
        return r.square().flatten(1).sum(1).view(len(FOUR), noises).mean(1) / 2

    params = list(model.parameters())
    before = halves()
    L = before[stepped].mean()
    gradient = torch.autograd.grad(L, params, allow_unused=True, materialize_grads=True)
    eta = 0.01 * L.item() / M_of_step.item()
    with torch.no_grad():
        kept = [p.clone() for p in params]
        for p, g in zip(params, gradient):
            p -= eta * g
        changes = halves() - before.detach()
        for p, p_before in zip(params, kept):
            p.copy_(p_before)
    return eta, changes


# --- What is printed and drawn --------------------------------------------------------------------

def print_matrix(M):
    """M as cosines; a negative one is a conflict."""
    for caption, row in zip(FOUR, ntk.cosines(M).tolist()):
        print(f"   {caption:24}", *(f"{cosine:+6.2f}" for cosine in row))
    for i, j in itertools.combinations(range(len(M)), 2):
        if M[i, j] < 0:
            print(f"In conflict (M_ij < 0): {FOUR[i]} and {FOUR[j]}.")


def picture(samples):
    """Captions, true images and samples, of the first five."""
    with matplotlib.rc_context(paint.LARGE_TYPE):
        figure = paint.new_figure("After a minute of training: captions that\n"
                                  "were held out, drawn by the network")
        figure.set_size_inches(10.24, 5.9)
        axes = figure.subplots(2, 5)
        captions = samples["captions"]
        # The first sample of each of five captions.
        distinct = list(dict.fromkeys(captions))[:5]
        for column, caption in zip(axes.T, distinct):
            k = captions.index(caption)
            column[0].imshow(paint.as_picture(samples["truth"][k]))
            column[1].imshow(paint.as_picture(samples["images"][k]))
            words = caption.removeprefix("meso ").removesuffix(" on white")
            column[0].set_title(words.replace(" ", "\n"))
        for axis in axes.flat:
            paint.without_ticks(axis)
        axes[0, 0].set_ylabel("true image")
        axes[1, 0].set_ylabel("drawn")
    return figure


def main(file="first_minutes.png", steps=STEPS, samples=100, noises=32):
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    print("Can a training step on one image be in conflict with another? The picture of the"
          " question is\nresults/figures/influence.png. A small network learns now, in a minute,"
          " and answers it.")

    held, floor = measure_held(generator)
    # Without repetitions.
    captions = list(dict.fromkeys(toy_data.captions(some_scenes(9, generator), "meso")))
    print("\nThe data: close-ups of one object, with captions such as")
    print("  ", "; ".join(captions[:3]))
    print("A quarter of all combinations of shape, colour and texture is held out of the training.")

    print("\nThe path (Eq. 1) leads from an image x0 to noise e: x_t = (1 - t) x0 + t e. At a point"
          " x_t the\nnetwork answers with a velocity v, whose target is u = e - x0 (Eq. 2)."
          " Its residual is v - u.")
    print("The loss (Eq. 3) is the mean square of the residual. On average no network gets below"
          f" its floor\n(Eq. 5): {floor:.3f}")
    model, loss = measure_training(steps, generator, held)
    print(f"Most of the last loss is still the network's: the floor is {floor / loss:.0%} of it.")

    found = measure_samples(model, generator, samples)
    right = found["right"].float().mean()
    print(f"\n{samples} samples (Eq. 6) of captions that were held out: the reader finds colour,"
          f" shape and\ntexture in {right:.0%} of them. Guessing would find one in 36.")

    model = model.double()
    batch, M = measure_matrix(model, generator, noises)            # (4, 4)
    print("\nThe interaction matrix M (Eq. 12) of four training images, as cosines of their"
          " gradients:")
    print_matrix(M)

    everyone = torch.arange(len(FOUR))
    eta, changes = measure_step(model, batch, everyone, M.mean())
    print(f"\nOne real step on all four, of eta = {eta:.1e}: M says that L changes by"
          f" {ntk.predicted_change(M, eta):+.4f}\n(Eq. 15), and {changes.mean():+.4f} is measured."
          f" On the training loss, 2/D times L with D = {D},\nthis is the learning rate"
          f" {eta * D / 2:.1e} (eta = 2 lr/D).")

    eta, changes = measure_step(model, batch, everyone[:1], M[0, 0])
    print(f"\nOne step on the {FOUR[0]} alone changes the others, too (Eq. 22):")
    for caption, M_i0, measured in zip(FOUR, M[:, 0].tolist(), changes.tolist()):
        print(f"   {caption:24} {paint.in_words(M_i0):8}"
              f" {-eta * M_i0:+.4f} predicted, {measured:+.4f} measured")
    picture(found).savefig(file)
    print(f"\ndrawn: {file}, after {time.perf_counter() - began:.0f} seconds")


if __name__ == "__main__":
    main(*sys.argv[1:])
