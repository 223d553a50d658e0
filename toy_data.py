"""A toy text-to-image data set that is small and exactly known: scenes, captions, renderer, reader.

A scene is one object (or two, beside or above each other) on a background. It is seen at three granularities:
    macro  the whole scene          "macro red striped circle top left on white"
    meso   one object fills it      "meso red striped circle on white"
    micro  its texture, close up    "micro red striped on white"
What no caption names, the nuisance, takes one of 18 values (9 jitters x 2 sizes). So the images of a caption are a
finite population, and its exact velocity (Eq. 4 in flow_matching.py) is known, for held-out captions too.

Lengths are in widths of the scene, x to the right, y downwards; images are (n, 3, pixels, pixels) in [-1, 1].
Run `python toy_data.py` for a picture.
"""

import itertools
import sys
from functools import lru_cache
from typing import NamedTuple

import torch

GRANULARITIES = ("macro", "meso", "micro")
SHAPES = ("circle", "square", "triangle", "cross")            # the cross is in `target` only
COLOURS = {"red": (1.0, -0.8, -0.8), "green": (-0.8, 0.5, -0.8), "blue": (-0.7, -0.5, 1.0), "yellow": (1.0, 0.9, -0.9)}
TEXTURES = ("plain", "striped", "checked", "dotted")          # the dotted one is in `target` only
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (-1.0, -1.0, -1.0),        # `base`
               "grey": (0.1, 0.1, 0.1), "cyan": (-0.4, 0.8, 0.8)}            # `target`
ROWS, COLUMNS = {"top": 0.3, "middle": 0.5, "bottom": 0.7}, {"left": 0.3, "centre": 0.5, "right": 0.7}
RELATIONS = {"left of": (0.25, 0.5), "right of": (0.75, 0.5), "above": (0.5, 0.25), "below": (0.5, 0.75)}
PLACES = {f"{row} {column}": (x, y) for row, y in ROWS.items() for column, x in COLUMNS.items()} | RELATIONS
LAYOUTS = {1: tuple((place,) for place in range(9)), 2: ((9, 10), (11, 12))} # which places are taken together
DOMAINS = {"base": (3, 3, (0, 1)), "target": (4, 4, (2, 3))}  # how many SHAPES and TEXTURES, which BACKGROUNDS
NUISANCES = torch.tensor(list(itertools.product((-0.03, 0.0, 0.03), (-0.03, 0.0, 0.03), (0.22, 0.26))))  # (18, 3)
HALF_SIDE = torch.tensor([0.5, 0.34, 0.07])                   # of what a macro, meso and micro view shows
PAIR_SCALE = 0.75                                             # two objects, their jitter and close-ups are smaller
PERIOD, GAP = 0.7, 0.2                                        # of a texture, in radii; the colour left in its gaps

WORDS = ("<pad>", *GRANULARITIES, *COLOURS, *TEXTURES, *SHAPES, *ROWS, *COLUMNS, "of", "above", "below", "on", *BACKGROUNDS)
CAPTION_LENGTH = 12                                           # the longest caption has 11 words


class Scenes(NamedTuple):
    """n scenes of k objects; a scene's first object is the one that its meso and micro views show."""

    objects: torch.Tensor     # (n, k, 4)  indices into SHAPES, COLOURS, TEXTURES, PLACES
    background: torch.Tensor  # (n,)       index into BACKGROUNDS
    nuisance: torch.Tensor    # (n, 3)     dx, dy, radius: a row of NUISANCES, or any value between them

    def take(self, index):
        return Scenes(*(field[index] for field in self))


@lru_cache
def constant(table, device):
    """A table of numbers as a tensor on the device, copied there once: a copy in every step would make a GPU wait for its host."""
    return torch.as_tensor(table, device=device)


# --- scenes ------------------------------------------------------------------------------------------------------

@lru_cache
def combinations(domain, split):
    """(m, 3) the (shape, colour, texture) of a domain that are "seen" or "held_out": of each pair, all are seen."""
    if domain not in DOMAINS or split not in ("seen", "held_out"):
        raise ValueError(f"no split {split!r} of domain {domain!r}; domains: {', '.join(DOMAINS)}; splits: seen, held_out")
    shapes, textures, _ = DOMAINS[domain]
    table = torch.cartesian_prod(torch.arange(shapes), torch.arange(len(COLOURS)), torch.arange(textures))
    return table[(table.sum(1) % 4 == 3) == (split == "held_out")]


def sample_scenes(n, generator, domain="base", split="seen", objects=1):
    """n random Scenes on the generator's device; every object is of the split's combinations."""
    if objects not in LAYOUTS:
        raise ValueError(f"a scene has 1 or 2 objects, not {objects}")
    pick = lambda table, *size: constant(table, generator.device)[
        torch.randint(len(table), size, generator=generator, device=generator.device)]
    attributes = pick(combinations(domain, split), n, objects)                     # (n, k, 3)
    places = pick(LAYOUTS[objects] + tuple(layout[::-1] for layout in LAYOUTS[objects]), n)    # (n, k)
    return Scenes(torch.cat([attributes, places[..., None]], 2), pick(DOMAINS[domain][2], n), pick(NUISANCES, n))


def population(scenes):
    """All 18 n scenes with the captions of the n scenes: each scene's population in turn, all equally likely."""
    n = len(scenes.background)
    each = scenes.take(torch.arange(n, device=scenes.background.device).repeat_interleave(len(NUISANCES)))
    return each._replace(nuisance=constant(NUISANCES, each.nuisance.device).repeat(n, 1))


# --- captions ----------------------------------------------------------------------------------------------------

def captions(scenes, granularity):
    """The n captions of n scenes, at one granularity or at one for each."""
    each = [granularity] * len(scenes.background) if isinstance(granularity, str) else granularity
    rows = zip(each, scenes.objects.tolist(), scenes.background.tolist())
    return [_caption(view, objects, list(BACKGROUNDS)[background]) for view, objects, background in rows]


def _caption(granularity, objects, background):
    named = [(SHAPES[s], list(COLOURS)[c], TEXTURES[t], list(PLACES)[p]) for s, c, t, p in objects]
    shape, colour, texture, place = named[0]
    if granularity == "micro":
        return f"micro {colour} {texture} on {background}"
    if granularity == "meso":
        return f"meso {colour} {texture} {shape} on {background}"
    others = "".join(f" {colour} {texture} {shape}" for shape, colour, texture, _ in named[1:])
    return f"macro {colour} {texture} {shape} {place}{others} on {background}"


def tokenize(texts):
    """(n, 12) long: the words' indices, padded with 0. Raises ValueError for an unknown word or too many words."""
    for text in texts:
        unknown = [word for word in text.split() if word not in WORDS[1:]]
        if unknown:
            raise ValueError(f"unknown word {unknown[0]!r} in the caption {text!r}; the words are: {' '.join(WORDS[1:])}")
        if len(text.split()) > CAPTION_LENGTH:
            raise ValueError(f"the caption {text!r} has {len(text.split())} words; at most {CAPTION_LENGTH} are allowed")
    ids = [[WORDS.index(word) for word in text.split()] for text in texts]
    return torch.tensor([row + [0] * (CAPTION_LENGTH - len(row)) for row in ids]).view(-1, CAPTION_LENGTH)


def caption_tokens(scenes, granularity):
    """(n, 12) long, on the scenes' device: tokenize(captions(...)) by tables, without a text; granularity is (n,) indices."""
    device = scenes.background.device
    word = lambda names: constant(tuple(WORDS.index(name) for name in names), device)
    place_words = tuple(tuple(WORDS.index(name) for name in (place.split() + ["<pad>"])[:2]) for place in PLACES)
    shape, colour, texture, place = scenes.objects.unbind(2)                       # (n, k) each
    named = torch.stack([word(COLOURS)[colour], word(TEXTURES)[texture], word(SHAPES)[shape]], 2)   # (n, k, 3)
    named[:, 0, 2] *= granularity < 2                                              # micro names no shape
    macro = (granularity == 0)[:, None]                                            # (n, 1)     only macro names places and other objects
    ids = torch.cat([word(GRANULARITIES)[granularity, None], named[:, 0], macro * constant(place_words, device)[place[:, 0]],
                     macro * named[:, 1:].flatten(1), word(("on",)).expand(len(macro), 1), word(BACKGROUNDS)[scenes.background, None]], 1)
    ids = torch.nn.functional.pad(ids, (0, CAPTION_LENGTH - ids.shape[1]))         # (n, 12)
    return ids.gather(1, (ids == 0).byte().argsort(dim=1, stable=True))            # (n, 12)    gaps go to the end


# --- renderer ----------------------------------------------------------------------------------------------------

def view_boxes(scenes, granularity):
    """(n, 4) x0, y0, x1, y1 of each scene's view; granularity is a name or (n,) indices into GRANULARITIES."""
    device, pair = scenes.background.device, scenes.objects.shape[1] == 2
    if isinstance(granularity, str):
        granularity = torch.full_like(scenes.background, GRANULARITIES.index(granularity))
    close = granularity > 0                                                        # (n,) meso or micro
    place = palette(PLACES, device)[scenes.objects[:, 0, 3]]                       # (n, 2)
    centre = torch.where(close[:, None], place, 0.5)                               # (n, 2)
    half = constant(HALF_SIDE, device)[granularity] * torch.where(close & pair, PAIR_SCALE, 1.0)   # (n,)
    return torch.cat([centre - half[:, None], centre + half[:, None]], 1)


def coverage(scenes, boxes, pixels):
    """(n, k, pixels, pixels) how much of each pixel has each object's colour, from 0 to 1 (anti-aliased)."""
    device, scale = boxes.device, PAIR_SCALE if scenes.objects.shape[1] == 2 else 1.0
    shape, _, texture, place = scenes.objects[..., None, None].unbind(2)           # (n, k, 1, 1) each
    steps = (torch.arange(pixels, device=device) + 0.5) / pixels                   # (p,)
    grid = boxes[:, :2, None] + (boxes[:, 2:] - boxes[:, :2])[..., None] * steps   # (n, 2, p)
    dx, dy, radius = (scale * scenes.nuisance[:, None, None, :]).unbind(3)         # (n, 1, 1) each
    centre = palette(PLACES, device)[place[..., 0, 0]]                             # (n, k, 2)
    x = ((grid[:, None, 0] - centre[..., :1] - dx) / radius)[:, :, None, :]        # (n, k, 1, p)  in radii
    y = ((grid[:, None, 1] - centre[..., 1:] - dy) / radius)[:, :, :, None]        # (n, k, p, 1)
    pixel = ((boxes[:, 2] - boxes[:, 0])[:, None, None] / pixels / radius)[..., None]  # (n, 1, 1, 1)
    soft = lambda inside: (0.5 + inside / pixel).clamp(0, 1)                       # from a signed distance, > 0 inside

    bar = lambda a, b: torch.minimum(0.5 - a.abs(), 1 - b.abs())
    inside = torch.stack(torch.broadcast_tensors(                                  # (4, n, k, p, p)
        1 - (x * x + y * y).sqrt(),                                                # circle
        0.95 - torch.maximum(x.abs(), y.abs()),                                    # square
        0.64 - torch.maximum(y, 0.75**0.5 * x.abs() - 0.5 * y),                    # triangle, apex up
        torch.maximum(bar(x, y), bar(y, x))))                                      # cross
    wave = lambda z: PERIOD * (0.25 - (z / PERIOD - (z / PERIOD).floor() - 0.5).abs())
    to_dot = lambda z: PERIOD * ((z / PERIOD).round() - z / PERIOD)
    across, down = soft(wave(x)), soft(wave(y))
    ink = torch.stack(torch.broadcast_tensors(                                     # (4, n, k, p, p)
        torch.ones_like(inside[0]),                                                # plain
        down,                                                                      # striped
        across * down + (1 - across) * (1 - down),                                 # checked
        1 - soft(0.27 * PERIOD - (to_dot(x) ** 2 + to_dot(y) ** 2).sqrt())))       # dotted
    choose = lambda table, index: table.gather(0, index.expand_as(table[0])[None])[0]
    return soft(choose(inside, shape)) * (GAP + (1 - GAP) * choose(ink, texture))


def palette(table, device):
    """The values of COLOURS or BACKGROUNDS (RGB) or of PLACES (x, y), a row for each name."""
    return constant(tuple(table.values()), device)


def render(scenes, boxes, pixels):
    """(n, 3, pixels, pixels) the part of each scene that its box shows: background + sum_k m_k (colour_k - background)."""
    m = coverage(scenes, boxes, pixels)                                            # (n, k, p, p)
    background = palette(BACKGROUNDS, boxes.device)[scenes.background]             # (n, 3)
    colour = palette(COLOURS, boxes.device)[scenes.objects[..., 1]]                # (n, k, 3)
    return background[..., None, None] + torch.einsum("nkhw,nkc->nchw", m, colour - background[:, None])


# --- reader: the renderer's inverse ------------------------------------------------------------------------------

@lru_cache
def bank(granularity, pixels, objects, device):
    """All that the reader compares with, made once: the places, and T objects (T, 4), place by place, with their coverages (T, pixels^2)."""
    places = sorted(set(sum(LAYOUTS[objects], ()))) if granularity == "macro" else [0 if objects == 1 else 9]
    table = torch.cartesian_prod(torch.tensor(places), torch.arange(len(SHAPES)), torch.arange(len(TEXTURES))).to(device)
    kinds = torch.stack([table[:, 1], 0 * table[:, 1], table[:, 2], table[:, 0]], 1)
    each = population(Scenes(kinds[:, None].repeat(1, objects, 1), 0 * kinds[:, 0], kinds[:, :3].float()))
    return places, each.objects[:, 0], coverage(each, view_boxes(each, granularity), pixels)[:, 0].flatten(1)


def read(images, granularity="macro", objects=1):
    """The scenes that fit the images best, and how well: (objects (n, k, 4) by place, background (n,), residual (n,)).

    Least squares over every shape, colour, texture, place, background and nuisance: an image is linear in its coverages m,
    so |x - bg - sum_k m_k d_k|^2 = |x - bg|^2 + sum_k (|m_k|^2 |d_k|^2 - 2 <m_k d_k, x - bg>), d_k = colour_k - bg, where
    the objects do not overlap. The residual is the root mean square over pixels and channels. What a view does not show
    (the place in meso and micro, the shape in micro, the background behind a plain micro) comes back as whatever fits.
    """
    n, device, pixels = len(images), images.device, images.shape[-1]
    places, known, m = bank(granularity, pixels, objects, device)
    layouts = LAYOUTS[objects] if granularity == "macro" else [(places[0],)]
    d = palette(COLOURS, device)[:, None] - palette(BACKGROUNDS, device)           # (C, B, 3)
    y = images.flatten(2)[:, None] - palette(BACKGROUNDS, device)[..., None]       # (n, B, 3, pp)
    gain = (d * d).sum(2)[:, :, None] * (m * m).sum(1) - 2 * torch.einsum("cbr,nbrt->ncbt", d, y @ m.T)  # (n, C, B, T)
    gain, colour = gain.min(1)                                                     # (n, B, T) each
    gain, best = gain.unflatten(2, (len(places), -1)).min(3)                       # (n, B, places) each
    fit = torch.stack([gain[..., [places.index(place) for place in layout]].sum(2) for layout in layouts], 2)
    energy = ((y * y).sum((2, 3))[..., None] + fit).flatten(1)                     # (n, B*layouts)
    energy, winner = energy.min(1)
    background, layout = winner // len(layouts), winner % len(layouts)
    slots = torch.tensor([[places.index(place) for place in layout] for layout in layouts], device=device)[layout]  # (n, k)
    index = best[torch.arange(n)[:, None], background[:, None], slots] + slots * (len(m) // len(places))  # (n, k) into T
    found = known[index]                                                           # (n, k, 4)
    found[..., 1] = colour[torch.arange(n)[:, None], background[:, None], index]
    return found, background, (energy.clamp(min=0) / images[0].numel()).sqrt()


def accuracies(images, scenes, granularity="macro"):
    """What of the scenes the reader finds in the images, as (n,) booleans: layout, shape_colour, texture, joint."""
    found, background, residual = read(images, granularity, scenes.objects.shape[1])
    by_place = scenes.objects[..., 3].argsort(1)[..., None].expand_as(scenes.objects)
    objects = scenes.objects.gather(1, by_place) if granularity == "macro" else scenes.objects[:, :1]
    same = (found[:, :objects.shape[1]] == objects).all(1)                         # (n, 4)
    always = torch.ones_like(same[:, 0])
    layout = same[:, 3] & (background == scenes.background) if granularity == "macro" else always
    shape_colour = same[:, 1] & (same[:, 0] if granularity != "micro" else always)
    right = {"layout": layout, "shape_colour": shape_colour, "texture": same[:, 2]}
    return right | {"joint": layout & shape_colour & same[:, 2], "residual": residual}


@lru_cache
def largest_real_residual(granularity, pixels, objects=1):
    """Above this residual an image is "not a scene": the 99.9th percentile of real images, of both domains alike.

    Their nuisance is drawn between the values that training uses, so the reader, who knows only those, cannot fit exactly.
    """
    generator, residuals = torch.Generator().manual_seed(0), []
    low, high = NUISANCES.min(0).values, NUISANCES.max(0).values
    for domain in DOMAINS:
        for _ in range(4):
            scenes = sample_scenes(256, generator, domain, "seen", objects)
            scenes = scenes._replace(nuisance=low + (high - low) * torch.rand(256, 3, generator=generator))
            residuals.append(read(render(scenes, view_boxes(scenes, granularity), pixels), granularity, objects)[2])
    return torch.cat(residuals).quantile(0.999).item()


def main(file="toy_data.png"):
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(18, 10), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    generator = torch.Generator().manual_seed(2)
    halves = [sample_scenes(3, generator, domain) for domain in DOMAINS]
    scenes = Scenes(*(torch.cat(pair) for pair in zip(*halves)))
    axes = left.subplots(6, 3)
    for column, granularity in zip(axes.T, GRANULARITIES):
        images = render(scenes, view_boxes(scenes, granularity), 24)
        for axis, image, caption in zip(column, images, captions(scenes, granularity)):
            axis.imshow((image.permute(1, 2, 0) / 2 + 0.5).numpy())
            axis.set_title(caption.replace(" on ", "\non "), fontsize=9)
            axis.set(xticks=[], yticks=[])
    left.suptitle("Scenes at three granularities, 24 px (top three: base domain, below: target)")

    many = sample_scenes(600, generator, "target", "seen")
    clean = render(many, view_boxes(many, "macro"), 24)
    axes = right.subplots(2, 3)
    for row, noise in zip(axes, (0.0, 1.0)):
        images = clean + noise * torch.randn(clean.shape, generator=generator)
        right_share = accuracies(images, many)["joint"].float().mean()
        print(f"noise {noise}: the reader finds place, background, shape, colour and texture together in {right_share:.1%} of 600 scenes")
        found = read(images)[0][:, 0]
        for axis, kind, names in zip(row, range(3), (SHAPES, list(COLOURS), TEXTURES)):
            counts = torch.zeros(4, 4).index_put_((many.objects[:, 0, kind], found[:, kind]), torch.tensor(1.0), accumulate=True)
            shares = counts / counts.sum(1, keepdim=True)
            axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="cividis")
            for i in range(4):
                for j in range(4):
                    axis.text(j, i, f"{shares[i, j]:.0%}", ha="center", va="center", color="black" if shares[i, j] > 0.5 else "white")
            axis.set(xticks=range(4), yticks=range(4), xlabel="read", ylabel="drawn", title=f"noise of std {noise:g}")
            axis.set_xticklabels(names, rotation=30)
            axis.set_yticklabels(names)
    right.suptitle("What the reader makes of clean and of noisy images (share of each row)")
    figure.savefig(file, dpi=100)
    for granularity in GRANULARITIES:
        print(f"{granularity}: an image is a scene up to a residual of {largest_real_residual(granularity, 24):.3f} (24 px)")
    print("drawn:", file)


if __name__ == "__main__":
    main(*sys.argv[1:])
