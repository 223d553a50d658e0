"""The pictures of the derivation: one message each, one function each, drawn by one command.

    python results/figures.py                  draws all of them into results/figures/
    python results/figures.py influence step   draws these two

What a picture shows is measured here by the project's own functions. The measure_ functions take
arguments that make them cheaper, for the tests. How a picture looks is in results/figure_paint.py.
"""

import functools
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import support  # noqa: E402, F401  before torch: on a busy machine its threads must not spin

import matplotlib  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import dit  # noqa: E402
import flow_matching as fm  # noqa: E402
import ntk  # noqa: E402
import sga  # noqa: E402
import toy_data  # noqa: E402
import unet  # noqa: E402
from results import figure_paint as paint  # noqa: E402

FOLDER = ROOT / "results/figures"
VOCABULARY = len(toy_data.WORDS)
# The noise levels at which the picture states the floor as a number.
MARKED = (0.2, 0.5, 0.8, 0.95)


# --- Gradients of three samples, and the interaction matrix M -------------------------------------

def measure_arrows():
    """Three samples of one number each, and the network v = theta_1 x_t + theta_2 t (Eq. 10, 12).

    Its two parameters are the plane of the picture.
    """
    x0 = torch.tensor([[0.5], [1.1], [-1.4]], dtype=torch.float64)
    e = torch.tensor([[-0.9], [2.0], [0.8]], dtype=torch.float64)
    t = torch.tensor([0.8, 0.2, 0.7], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.2, -0.4]], dtype=torch.float64))

    features = torch.cat([fm.path(x0, e, t), t[:, None]], 1)       # (3, 2)
    u = fm.target(x0, e)                                           # (3, 1)
    r = model(features).detach() - u                               # (3, 1)
    f, params = ntk.of_module(model)
    g = ntk.per_sample_gradients(f, params, (features,), r)        # (3, 2)
    M = ntk.interaction_matrix(f, params, (features,), r)          # (3, 3)

    # The loss of every theta on a grid, for the contours of the bowl.
    side = torch.linspace(-4, 6, 201, dtype=torch.float64)
    theta_2, theta_1 = torch.meshgrid(side, side, indexing="ij")
    thetas = torch.stack([theta_1, theta_2], 2)                    # (201, 201, 2)
    residuals = thetas @ features.T - u[:, 0]                      # (201, 201, 3)
    bowl = residuals.square().sum(2) / (2 * len(u))                # (201, 201)
    theta = model.weight[0].detach()                               # (2,)
    return {"theta": theta, "g": g, "M": M, "side": side, "bowl": bowl}


def measure_jacobians():
    """J, K, r and M of two samples and a network of 2 outputs and 14 parameters (Eq. 10-12)."""
    torch.manual_seed(217)
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    network = network.double()
    x0, e = torch.randn(2, 2, 2, dtype=torch.float64)              # (2, 2) each
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    x_t = fm.path(x0, e, t)                                        # (2, 2)
    inputs = (torch.cat([x_t, t[:, None]], 1),)
    r = network(*inputs).detach() - fm.target(x0, e)               # (2, 2)
    f, params = ntk.of_module(network)

    # A row of J_i is the gradient of one output: J_i^T times a unit vector.
    rows = []
    for unit_vector in torch.eye(2, dtype=torch.float64):
        vectors = unit_vector.expand(2, 2)
        rows.append(ntk.per_sample_gradients(f, params, inputs, vectors))
    return {"J": torch.stack(rows, 1),                             # (2, 2, 14)
            "K": ntk.ntk_blocks(f, params, inputs),                # (2, 2, 2, 2)
            "M": ntk.interaction_matrix(f, params, inputs, r),     # (2, 2)
            "r": r}


# --- The quadratic form and the floor of the loss -------------------------------------------------

def measure_floor(scenes=300, pixels=16, levels=20):
    """The loss floor by granularity at many t, and at those that are MARKED (Eq. 5).

    It is the mean over the captions of random scenes of the domain `target`. A caption's population
    is its 18 images, and each of them is seen with 1, 2 or 12 noises (macro, meso, micro).
    """
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(0.05, 1, levels)
    floors = {"t": t, "marked": MARKED}
    # There are few captions of close-ups: more scenes say how often each comes, and each can have
    # more noises.
    for name, more, noises in zip(toy_data.GRANULARITIES, (1, 10, 10), (1, 2, 12)):
        drawn = toy_data.sample_scenes(more * scenes, generator, "target")
        chosen, share = distinct_captions(drawn, name)             # (captions,), (captions,)
        everyone = toy_data.population(drawn.take(chosen))
        images, _ = toy_data.views(everyone, name, pixels)
        points = images.unflatten(0, (len(chosen), -1))            # (captions, 18, 3, H, W)
        e = torch.randn(noises, *points.shape, generator=generator)

        def floor_at(level):
            of_captions = [floor_of(*one, level) for one in zip(points, e.unbind(1))]
            return (share @ torch.stack(of_captions)).item()

        floors[name] = [floor_at(level) for level in t.tolist()]
        floors[f"{name} marked"] = [floor_at(level) for level in MARKED]
    return floors


def floor_of(points, e, level):
    """The floor of one caption with images (18, 3, H, W), each with noises e (noises, 18, ...)."""
    x0 = points.expand(e.shape).flatten(0, 1)
    return fm.loss_floor(x0, e.flatten(0, 1), level, points).mean()


def distinct_captions(scenes, granularity):
    """A scene for each caption, as indices, and the share of the scenes that have this caption."""
    # One pixel is enough, since only the captions are asked for.
    _, tokens = toy_data.views(scenes, granularity, 1)
    captions = [tuple(words) for words in tokens.tolist()]
    distinct = sorted(set(captions))
    first = torch.tensor([captions.index(caption) for caption in distinct])
    count = torch.tensor([captions.count(caption) for caption in distinct])
    return first, count / len(captions)


# --- What a step on one image does to others ------------------------------------------------------

# Colour, texture, shape, place and background of three roots. The first one is stepped on.
ROOTS = (("red", "plain", "circle", "top left", "white"),
         ("blue", "plain", "circle", "top left", "white"),
         ("red", "plain", "circle", "top left", "black"))


def measure_influence(steps=50, noises=32, pixels=16, t=0.9):
    """What a step on the first of four images adds to each prediction, and M_ij (Eq. 11, 12).

    The images are the first root, its meso view, and two other roots. Each stands for samples with
    `noises` different noises, and what is shown is their mean. The network is a small U-Net after
    a few steps of training.
    """
    model = trained_unet(steps, pixels, t)
    x0, tokens = measured_views(pixels)                            # (4, 3, H, W), (4, 12)
    images = len(x0)
    generator = torch.Generator().manual_seed(1)
    # All images have the same noises, so that they differ in nothing else.
    e = torch.randn(noises, *x0.shape[1:], generator=generator)
    e = e.repeat(images, 1, 1, 1)                                  # (4 noises, 3, H, W)
    x0_of_each = x0.repeat_interleave(noises, 0)                   # (4 noises, 3, H, W)
    tokens = tokens.repeat_interleave(noises, 0)
    levels = torch.full((len(e),), t)
    r = fm.residual(model, x0_of_each, e, levels, tokens).detach()

    # K times a vector that is r_j on the samples of the first image, and 0 on all others.
    vectors = torch.zeros_like(r)
    vectors[:noises] = r[:noises] / noises
    f, params = ntk.of_module(model)
    x_t = fm.path(x0_of_each, e, levels)
    inputs = (x_t, levels, tokens)
    K_r = ntk.ntk_vector_product(f, params, inputs, vectors).view_as(r)

    # A small step adds -eta K_ij r_j to the velocity v_i. An image is predicted as x_t - t v, since
    # x0 = x_t - t u: so the step adds eta t K_ij r_j to the prediction.
    added = (t * K_r).unflatten(0, (images, noises)).mean(1)       # (4, 3, H, W)
    # Summed over pixels and colours, r_i K_ij r_j is M_ij; each pixel has its share.
    shares = (r * K_r).sum(1).unflatten(0, (images, noises)).mean(1)         # (4, H, W)
    return {"x0": x0, "added": added, "shares": shares, "M": shares.sum((1, 2))}


def measured_views(pixels):
    """Images (4, 3, H, W) and tokens (4, 12): macro, meso view of the first root; other roots."""
    objects, backgrounds = [], []
    for colour, texture, shape, place, background in ROOTS:
        objects.append([toy_data.SHAPES.index(shape),
                        list(toy_data.COLOURS).index(colour),
                        toy_data.TEXTURES.index(texture),
                        list(toy_data.PLACES).index(place)])
        backgrounds.append(list(toy_data.BACKGROUNDS).index(background))
    nuisance = toy_data.NUISANCES[[9] * len(ROOTS)]                # (3, 3)
    roots = toy_data.Scenes(torch.tensor(objects)[:, None], torch.tensor(backgrounds), nuisance)
    views = roots.take(torch.tensor([0, 0, 1, 2]))
    return toy_data.views(views, ("macro", "meso", "macro", "macro"), pixels)


def trained_unet(steps, pixels, t):
    """A small U-Net after some steps on all views of the base domain, at noise levels near t."""
    torch.manual_seed(2)
    generator = torch.Generator().manual_seed(2)
    model = unet.UNet(VOCABULARY, pixels, widths=(8, 16, 24), width=32)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            # Zeros beyond the edges would draw a frame into every picture.
            layer.padding_mode = "circular"
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        scenes = toy_data.sample_scenes(16, generator)
        granularity = torch.randint(3, (16,), generator=generator)
        x0, tokens = toy_data.views(scenes, granularity, pixels)
        e = torch.randn(x0.shape, generator=generator)
        levels = t - 0.1 + 0.2 * torch.rand(16, generator=generator)
        optimizer.zero_grad()
        fm.loss(model, x0, e, levels, tokens).mean().backward()
        optimizer.step()
    return model


def measure_step(steps=100):
    """The change of the loss by one step, measured and predicted (Eq. 15), for many step sizes."""
    generator = torch.Generator().manual_seed(0)
    model = ntk.measure_network(generator, steps)
    inputs, u = ntk.measure_batch(generator)
    r = (model(*inputs) - u).detach()
    M = ntk.fast_interaction_matrix(model, inputs, r)              # (36, 36)
    return ntk.measure_step(model, inputs, u, M)


# --- M while training -----------------------------------------------------------------------------

# The steps of the training at which M is shown: more of them early, where more happens.
STILLS = (0, 10, 40, 250)
FRAMES = (0, 1, 2, 3, 4, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 63, 80, 100, 126, 160, 200, 250)


@functools.cache
def measure_matrix(frames=FRAMES, noises=8, t=0.5):
    """M of twelve images, four roots of three views each, at some steps of a training (Eq. 12).

    Each entry is the mean over the noises of both images: the inner product of two mean gradients.
    It is kept, since the stills and the animation show the same.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = dit.DiT(VOCABULARY, pixels=8, patch=2, width=32, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)

    x0, tokens = ntk.measure_views(light_and_dark_roots(generator))
    e = torch.randn(noises * len(x0), *x0.shape[1:], generator=generator)
    levels = torch.full((len(e),), t)
    # The noises of one image follow each other.
    x0, tokens = x0.repeat_interleave(noises, 0), tokens.repeat_interleave(noises, 0)
    watched = (x0, e, levels, tokens)

    film = []
    for step in range(frames[-1] + 1):
        if step in frames:
            M = mean_interaction_matrix(model, watched, noises)    # (12, 12)
            film.append({"step": step, "cosines": ntk.cosines(M)})
        x0, tokens = ntk.measure_views(toy_data.sample_scenes(8, generator))
        e = torch.randn(x0.shape, generator=generator)
        levels = torch.rand(len(x0), generator=generator)
        optimizer.zero_grad()
        fm.loss(model, x0, e, levels, tokens).mean().backward()
        optimizer.step()
    return film


def light_and_dark_roots(generator):
    """Four roots of the base domain: two on white, then two on black."""
    scenes = toy_data.sample_scenes(4, generator)
    return scenes._replace(background=torch.tensor([0, 0, 1, 1]))


def mean_interaction_matrix(model, batch, noises):
    """(images, images) M of the mean gradients of the images, each with its noises."""
    x0, e, t, tokens = batch
    r = fm.residual(model, *batch).detach()
    inputs = (fm.path(x0, e, t), t, tokens)
    M = ntk.fast_interaction_matrix(model, inputs, r)
    images = len(x0) // noises
    return M.view(images, noises, images, noises).mean((1, 3))


# --- The pictures ---------------------------------------------------------------------------------

def crossing():
    return paint.crossing(fm.measure_crossing(), fm.measure_samples())


def arrows():
    return paint.arrows(measure_arrows())


def jacobians():
    return paint.jacobians(measure_jacobians())


def form():
    return paint.form(fm.measure_groups())


def floor(**cheaper):
    return paint.floor(measure_floor(**cheaper))


def influence(**cheaper):
    return paint.influence(measure_influence(**cheaper))


def step(**cheaper):
    return paint.step(measure_step(**cheaper))


def matrix(stills=STILLS, **cheaper):
    film = measure_matrix(**cheaper)
    return paint.matrix([shot for shot in film if shot["step"] in stills])


def views():
    root = sga.measure_views(torch.Generator().manual_seed(0))
    return paint.views(root["views of 32 px"])


def time_laws():
    return paint.time_laws(sga.measure_time_laws(torch.Generator().manual_seed(0)))


def weights():
    return paint.weights()


PICTURES = {"crossing": crossing, "arrows": arrows, "jacobians": jacobians, "form": form,
            "floor": floor, "influence": influence, "step": step, "matrix": matrix,
            "views": views, "time_laws": time_laws, "weights": weights}


def draw(name, folder, **cheaper):
    """The figure of one picture, which it saves as a PNG; M while training is a GIF too."""
    # Until it is saved: matplotlib makes the numbers on an axis last of all.
    with matplotlib.rc_context(paint.LARGE_TYPE):
        figure = PICTURES[name](**cheaper)
        figure.savefig(Path(folder) / f"{name}.png")
        if name == "matrix":
            cheaper.pop("stills", None)
            paint.animate(measure_matrix(**cheaper), Path(folder) / "matrix.gif")
    return figure


def main(*names):
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        known = ", ".join(PICTURES)
        raise SystemExit(f"there is no picture {unknown[0]!r}; the pictures are: {known}")
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        draw(name, FOLDER)
        print("drawn:", FOLDER.relative_to(ROOT) / f"{name}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
