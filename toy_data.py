"""A toy text-to-image data set that is small and exactly known: scenes, captions, renderer, reader.

A scene is one object, or two beside or above each other, on a background. It is seen at three
granularities:
    macro  the whole scene          "macro red striped circle top left on white"
    meso   one object fills it      "meso red striped circle on white"
    micro  its texture, close up    "micro red striped on white"
What no caption names, the nuisance, takes one of 18 values: 9 jitters (small shifts) times 2
sizes. So the images of a caption are a finite population, and its exact velocity (Eq. 4 in
flow_matching.py) is known, for held-out captions too.

Lengths are in widths of the scene, x to the right, y downwards. Images are (n, 3, pixels, pixels)
with values in [-1, 1]. Run `python toy_data.py` for a picture.
"""

import itertools
import numbers
import sys
import textwrap
from functools import lru_cache
from typing import NamedTuple

import torch

GRANULARITIES = ("macro", "meso", "micro")
SHAPES = ("circle", "square", "triangle", "cross")
TEXTURES = ("plain", "striped", "checked", "dotted")
COLOURS = {                                             # red, green and blue, each from -1 to 1
    "red": (1.0, -0.8, -0.8),
    "green": (-0.8, 0.5, -0.8),
    "blue": (-0.7, -0.5, 1.0),
    "yellow": (1.0, 0.9, -0.9),
}
BACKGROUNDS = {
    "white": (1.0, 1.0, 1.0),
    "black": (-1.0, -1.0, -1.0),
    "grey": (0.1, 0.1, 0.1),
    "cyan": (-0.4, 0.8, 0.8),
}

# Where an object may stand, as x and y. A single object takes one of the nine places of the grid.
# In a pair, the relation says where the first object is, and the second stands opposite, so far
# away that no close-up of the first shows any of it.
ROWS = {"top": 0.3, "middle": 0.5, "bottom": 0.7}
COLUMNS = {"left": 0.3, "centre": 0.5, "right": 0.7}
GRID = {f"{row} {column}": (COLUMNS[column], ROWS[row]) for row in ROWS for column in COLUMNS}
RELATIONS = {
    "left of": (0.22, 0.5),
    "right of": (0.78, 0.5),
    "above": (0.5, 0.22),
    "below": (0.5, 0.78),
}
PLACES = GRID | RELATIONS
# For 1 and for 2 objects: which PLACES are taken together. Place 9 is "left of", 10 "right of".
LAYOUTS = {1: tuple((place,) for place in range(len(GRID))), 2: ((9, 10), (11, 12))}

# Of each domain: the number of its SHAPES, the number of its TEXTURES, and its BACKGROUNDS. So the
# cross, the dotted texture and the last two backgrounds are new in `target`.
DOMAINS = {"base": (3, 3, (0, 1)), "target": (4, 4, (2, 3))}

# The values of the nuisance: dx, dy and the object's radius. (18, 3)
JITTERS, RADII = (-0.03, 0.0, 0.03), (0.22, 0.26)
NUISANCES = torch.tensor(list(itertools.product(JITTERS, JITTERS, RADII)))

# Half the side of what a macro, meso and micro view shows. A meso view leaves a rim around the
# object, and cuts only the tip of a large triangle that is shifted up. A micro view is so small
# that every shape covers it, whatever the nuisance.
HALF_SIDE = torch.tensor([0.5, 0.34, 0.07])
# Two objects are smaller than one, and so are their jitter and their close-ups: they never touch.
PAIR_SCALE = 0.75
# A texture repeats after this many radii: at 24 pixels a stripe of a whole scene is 2 pixels wide.
PERIOD = 0.7
# The share of an object's colour in the gaps of its texture, so that its outline stays visible.
GAP = 0.2

WORDS = ("<pad>", *GRANULARITIES, *COLOURS, *TEXTURES, *SHAPES, *ROWS, *COLUMNS,
         "of", "above", "below", "on", *BACKGROUNDS)
CAPTION_LENGTH = 12                                     # the longest caption has 11 words


class Scenes(NamedTuple):
    """n scenes of k objects. The meso and micro views of a scene show its first object."""

    objects: torch.Tensor     # (n, k, 4)  indices into SHAPES, COLOURS, TEXTURES, PLACES
    background: torch.Tensor  # (n,)       index into BACKGROUNDS
    nuisance: torch.Tensor    # (n, 3)     dx, dy, radius: a row of NUISANCES, or any between them

    def take(self, index):
        """The scenes at these indices."""
        return Scenes(*(field[index] for field in self))


@lru_cache
def constant(table, device):
    """A table of numbers as a tensor on the device, copied there once.

    A copy in every step would make a GPU wait for its host.
    """
    return torch.as_tensor(table, device=device)


def palette(table, device):
    """The values of COLOURS or BACKGROUNDS (RGB) or of PLACES (x, y), a row for each name."""
    return constant(tuple(table.values()), device)


# --- Checks: wrong input gets one sentence. None of them makes a GPU wait for its host ------------

def _refuse(values, allowed, rule):
    """Raises ValueError for a value that is not allowed. To be called on a CPU alone."""
    if not allowed.all():
        raise ValueError(f"{rule}, not {values[~allowed][0].item():g}")


def check_scenes(scenes):
    """Raises ValueError unless the three fields have the shapes and values that Scenes promises.

    The nuisance may be any; `coverage` checks that the radius in it is above 0.
    """
    fields = [getattr(scenes, name, None) for name in Scenes._fields]
    if not all(isinstance(field, torch.Tensor) for field in fields):
        raise ValueError("scenes must be Scenes of three tensors, as sample_scenes makes them")
    objects, background, _ = fields
    n = len(background) if background.dim() else 0
    shapes = tuple(tuple(field.shape) for field in fields)
    if shapes not in [((n, k, 4), (n,), (n, 3)) for k in LAYOUTS]:
        raise ValueError("scenes need objects (n, k, 4) with k = 1 or 2, background (n,) and "
                         f"nuisance (n, 3) for one n, not {', '.join(map(str, shapes))}")
    whole = (torch.int64, torch.int32)
    if objects.dtype not in whole or background.dtype not in whole:
        raise ValueError("objects and background must be whole numbers (int64 or int32), not "
                         f"{objects.dtype} and {background.dtype}")
    if background.device.type == "cpu":
        _check_indices(objects, background)


def _check_indices(objects, background):
    """Raises ValueError for an index that names nothing. To be called on a CPU alone."""
    places = sum(LAYOUTS[objects.shape[1]], ())
    first = constant((0, 0, 0, min(places)), objects.device)      # (4,)
    last = constant((len(SHAPES) - 1, len(COLOURS) - 1, len(TEXTURES) - 1, max(places)),
                    objects.device)                     # (4,)
    _refuse(objects, (objects >= first) & (objects <= last),
            "objects must be indices into SHAPES, COLOURS, TEXTURES and PLACES (0 to 8 for one "
            "object, 9 to 12 for two)")
    _refuse(background, (background >= 0) & (background < len(BACKGROUNDS)),
            "the background must be an index into BACKGROUNDS")


def check_objects(objects):
    """Raises ValueError unless the number of objects in a scene is 1 or 2."""
    if not isinstance(objects, int) or objects not in LAYOUTS:
        raise ValueError(f"a scene has 1 or 2 objects, not {objects}")


def check_images(images, objects):
    """Raises ValueError unless images are (n, 3, pixels, pixels) of 1 or 2 objects."""
    check_objects(objects)
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        kind = getattr(images, "dtype", type(images).__name__)
        raise ValueError(f"images must be floating-point numbers from -1 to 1, not {kind}")
    if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be (n, 3, pixels, pixels), not {tuple(images.shape)}")


def index_of(granularity):
    """0, 1 or 2 for the name of a granularity; ValueError for another name."""
    if granularity not in GRANULARITIES:
        allowed = ", ".join(GRANULARITIES)
        raise ValueError(f"unknown granularity {granularity!r}; the granularities are: {allowed}")
    return GRANULARITIES.index(granularity)


def indices_of(granularity, scenes):
    """(n,) the granularity of each of n scenes, from one name, n names, or (n,) indices 0..2."""
    check_scenes(scenes)
    background = scenes.background
    if isinstance(granularity, str):
        return torch.full_like(background, index_of(granularity))
    if isinstance(granularity, (list, tuple)):
        indices = [one if isinstance(one, int) else index_of(one) for one in granularity]
        granularity = torch.tensor(indices, dtype=torch.int64, device=background.device)
    if not isinstance(granularity, torch.Tensor):
        raise ValueError("granularity must be a name, a list of names, or indices in a tensor, "
                         f"not {granularity!r}")
    if granularity.shape != background.shape or granularity.dtype not in (torch.int64, torch.int32):
        shape, kind = tuple(granularity.shape), granularity.dtype
        raise ValueError(f"granularity must be a name, or one name or whole number for each of the "
                         f"{len(background)} scenes, not {shape} numbers of type {kind}")
    try:
        # The entry i of this table is i: the look-up changes nothing. On a CPU it refuses an index
        # outside, and a GPU goes on without a wait.
        return constant((0, 1, 2), background.device).index_select(0, granularity)
    except IndexError:
        raise ValueError("a granularity's index must be 0 (macro), 1 (meso) or 2 (micro)") from None


# --- Scenes ---------------------------------------------------------------------------------------

@lru_cache
def combinations(domain, split):
    """(m, 3) the (shape, colour, texture) of a domain that are "seen" or "held_out".

    A quarter is held out, and every pair of two attributes is seen. Raises ValueError for another
    domain or split.
    """
    if domain not in DOMAINS or split not in ("seen", "held_out"):
        raise ValueError(f"no split {split!r} of domain {domain!r}; domains: {', '.join(DOMAINS)}; "
                         "splits: seen, held_out")
    shapes, textures, _ = DOMAINS[domain]
    colours = len(COLOURS)
    table = torch.cartesian_prod(*map(torch.arange, (shapes, colours, textures)))
    # Of four consecutive sums one is held out, so that any two attributes are seen with some third.
    held_out = table.sum(1) % 4 == 3
    return table[held_out if split == "held_out" else ~held_out]


def sample_scenes(n, generator, domain="base", split="seen", objects=1):
    """n random Scenes on the generator's device; every object is of the split's combinations.

    Raises ValueError for an unknown domain or split and for a number of objects other than 1, 2.
    """
    check_objects(objects)
    if not isinstance(n, numbers.Integral) or n < 0:
        raise ValueError(f"the number of scenes must be a whole number from 0 on, not {n!r}")
    device = generator.device

    def pick(table, *size):
        """Random rows of a table."""
        rows = torch.randint(len(table), size, generator=generator, device=device)
        return constant(table, device)[rows]

    # In a pair either object may come first, so each layout counts in both orders.
    both_ways = LAYOUTS[objects] + tuple(layout[::-1] for layout in LAYOUTS[objects])
    attributes = pick(combinations(domain, split), n, objects)    # (n, k, 3)
    places = pick(both_ways, n)                         # (n, k)
    background = pick(DOMAINS[domain][2], n)            # (n,)
    nuisance = pick(NUISANCES, n)                       # (n, 3)
    return Scenes(torch.cat([attributes, places[..., None]], 2), background, nuisance)


def population(scenes):
    """18 n scenes: for each of n scenes in turn all that have its captions, equally likely."""
    check_scenes(scenes)
    n, device = len(scenes.background), scenes.background.device
    scene = torch.arange(n, device=device)              # (n,)
    each = scenes.take(scene.repeat_interleave(len(NUISANCES)))
    return each._replace(nuisance=constant(NUISANCES, device).repeat(n, 1))


def views(scenes, granularity, pixels):
    """Images (n, 3, pixels, pixels) and tokens (n, 12) of n scenes at a granularity.

    The granularity is one name for all, n names, or (n,) indices into GRANULARITIES. Raises
    ValueError for an unknown one, for scenes of other shapes, and for pixels below 1.
    """
    granularity = indices_of(granularity, scenes)
    images = render(scenes, view_boxes(scenes, granularity), pixels)
    return images, caption_tokens(scenes, granularity)


# --- Captions -------------------------------------------------------------------------------------

def word_table(names, device):
    """The index in WORDS of each name, as a tensor."""
    return constant(tuple(WORDS.index(name) for name in names), device)


def place_table(device):
    """(13, 2) the indices in WORDS of the words of each place; a place of one word has <pad>."""
    first = [place.split()[0] for place in PLACES]
    second = [place.split()[1] if " " in place else "<pad>" for place in PLACES]
    return torch.stack([word_table(first, device), word_table(second, device)], 1)


def caption_tokens(scenes, granularity):
    """(n, 12) long, on the scenes' device: the words of n captions as indices, padded with 0.

    The granularity is as in `views`. Tables make them, not texts: a text would make a GPU wait for
    its host in every step.
    """
    granularity = indices_of(granularity, scenes)       # (n,)
    device = scenes.background.device
    macro = (granularity == 0)[:, None]                 # (n, 1)
    shape, colour, texture, place = scenes.objects.unbind(2)      # (n, k) each

    # Every caption is laid out in full first, with a 0 for each word that it leaves out. Only a
    # macro caption names places and other objects, and a micro caption names no shape either.
    colour = word_table(COLOURS, device)[colour]        # (n, k)
    texture = word_table(TEXTURES, device)[texture]     # (n, k)
    shape = word_table(SHAPES, device)[shape]           # (n, k)
    shape[:, 0] *= granularity < 2
    named = torch.stack([colour, texture, shape], 2)    # (n, k, 3)
    words = torch.cat([
        word_table(GRANULARITIES, device)[granularity, None],
        named[:, 0],
        macro * place_table(device)[place[:, 0]],
        macro * named[:, 1:].flatten(1),
        word_table(["on"], device).expand(len(macro), 1),
        word_table(BACKGROUNDS, device)[scenes.background, None],
    ], 1)
    padding = CAPTION_LENGTH - words.shape[1]
    words = torch.nn.functional.pad(words, (0, padding))          # (n, 12)

    # A stable sort by "is this a 0?" moves the gaps to the end and keeps the words in order.
    order = (words == 0).byte().argsort(dim=1, stable=True)       # (n, 12)
    return words.gather(1, order)                       # (n, 12)


def captions(scenes, granularity):
    """The n captions of n scenes: the words of caption_tokens. The granularity is as in `views`."""
    texts = []
    for tokens in caption_tokens(scenes, granularity).tolist():
        texts.append(" ".join(WORDS[token] for token in tokens if token))
    return texts


def tokenize(texts):
    """(n, 12) long: the words of n texts as indices, padded with 0. "" is the null caption.

    Raises ValueError for an empty list, for an unknown word and for more than 12 words. Whether the
    words make a caption of this data is not checked here: see grammar_error.
    """
    is_list = isinstance(texts, (list, tuple)) and len(texts) > 0
    if not is_list or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"tokenize takes a list of at least one caption, not {texts!r}")
    rows = []
    for text in texts:
        words = text.split()
        for word in words:
            if word not in WORDS[1:]:
                raise ValueError(f"unknown word {word!r} in the caption {text!r}; the words are: "
                                 + " ".join(WORDS[1:]))
        if len(words) > CAPTION_LENGTH:
            raise ValueError(f"the caption {text!r} has {len(words)} words; at most "
                             f"{CAPTION_LENGTH} are allowed")
        padding = [0] * (CAPTION_LENGTH - len(words))
        rows.append([WORDS.index(word) for word in words] + padding)
    return torch.tensor(rows)


# The kinds of words that follow a caption's granularity, and the words of each kind.
GRAMMAR = {
    "macro": ("colour", "texture", "shape", "place", "on", "background"),
    "macro of two": ("colour", "texture", "shape", "relation", "colour", "texture", "shape",
                     "on", "background"),
    "meso": ("colour", "texture", "shape", "on", "background"),
    "micro": ("colour", "texture", "on", "background"),
}
CHOICES = {
    "colour": COLOURS, "texture": TEXTURES, "shape": SHAPES, "place": GRID,
    "relation": RELATIONS, "on": ("on",), "background": BACKGROUNDS,
}


def match(words, form):
    """Goes through words and a form of GRAMMAR from left to right: (missing, rest, first).

    The kinds of words that are missing, the words that are left over, and the words from the first
    missing kind on.
    """
    missing, first = [], []
    for kind in form:
        choices = [choice.split() for choice in CHOICES[kind]]
        fitting = [choice for choice in choices if words[:len(choice)] == choice]
        if fitting:
            words = words[len(fitting[0]):]
        else:
            if not missing:
                first = words
            missing.append(kind)
    return missing, words, first


def grammar_error(text):
    """"" if the text is a caption of this data; else a sentence: what is wrong, and the grammar."""
    granularity, *words = str(text).split() or [""]
    if granularity not in GRANULARITIES:
        return (f"the caption {text!r} must start with macro, meso or micro, for example: "
                "macro red plain circle top left on white")
    relations = {"of", "above", "below"}
    related = granularity == "macro" and relations.intersection(words)
    form = GRAMMAR["macro of two" if related else granularity]
    missing, rest, first = match(words, form)
    if not missing and not rest:
        return ""

    names = ["the word 'on'" if kind == "on" else f"a {kind}" for kind in missing]
    if not missing:
        wrong = f"goes on after its end with {rest[0]!r}"
    elif rest:
        # Something is left over, so that some word stands where a word of another kind belongs.
        allowed = ", ".join(CHOICES[missing[0]])
        wrong = f"has {first[0]!r} where {names[0]} belongs (allowed: {allowed})"
    elif len(missing) == 1:
        wrong = f"lacks {names[0]}"
    else:
        wrong = f"lacks {', '.join(names[:-1])} and {names[-1]}"
    grammar = " ".join(kind if kind == "on" else kind.upper() for kind in form)
    example = " ".join(next(iter(CHOICES[kind])) for kind in form)
    return (f"the caption {text!r} {wrong}; its grammar is: {granularity} {grammar}, "
            f"for example: {granularity} {example}")


# --- Renderer -------------------------------------------------------------------------------------

def view_boxes(scenes, granularity):
    """(n, 4) x0, y0, x1, y1 of what each scene's view shows; the granularity is as in `views`."""
    granularity = indices_of(granularity, scenes)       # (n,)
    device = scenes.background.device
    close = granularity > 0                             # (n,) meso or micro
    place = palette(PLACES, device)[scenes.objects[:, 0, 3]]      # (n, 2)
    centre = torch.where(close[:, None], place, 0.5)    # (n, 2)
    pair = scenes.objects.shape[1] == 2
    scale = torch.where(close & pair, PAIR_SCALE, 1.0)  # (n,)
    half = constant(HALF_SIDE, device)[granularity] * scale       # (n,)
    return torch.cat([centre - half[:, None], centre + half[:, None]], 1)


# Shapes as signed distances to the outline, in radii: positive inside, negative outside. For the
# circle, and near the middle of every edge of the others, the distance is exact.

def circle(x, y):
    """Of radius 1."""
    return 1 - (x * x + y * y).sqrt()


def square(x, y):
    """Of half side 0.95."""
    return 0.95 - torch.maximum(x.abs(), y.abs())


def triangle(x, y):
    """Equilateral with its apex up, around a circle of radius 0.64: a micro view just fits in."""
    # The normals of the upper sides point 30 degrees upwards: sqrt(3)/2 along x, 1/2 along -y.
    left_and_right = 0.75**0.5 * x.abs() - 0.5 * y
    return 0.64 - torch.maximum(y, left_and_right)


def cross(x, y):
    """An upright and a lying bar, each 1 wide and 2 long."""
    upright = torch.minimum(0.5 - x.abs(), 1 - y.abs())
    lying = torch.minimum(0.5 - y.abs(), 1 - x.abs())
    return torch.maximum(upright, lying)


# Textures as ink: how much of each pixel has the object's full colour, from 0 to 1. x and y are in
# radii from the object's centre, and so is `pixel`, the side of a pixel.

def soft(distance, pixel):
    """About how much of a pixel lies inside an outline, from 0 to 1, from its signed distance.

    It is exact where the outline is straight, and upright or lying. An outline through a pixel's
    middle covers half of it; this is what makes edges smooth.
    """
    return (0.5 + distance / pixel).clamp(0, 1)


def stripes(z):
    """Signed distance to the edges of stripes across z: they take one half of every period."""
    phase = z / PERIOD
    return PERIOD * (0.25 - (phase - phase.floor() - 0.5).abs())


def to_dot(z):
    """The way along z to the nearest of the points 0, +-PERIOD, +-2 PERIOD and so on."""
    phase = z / PERIOD
    return PERIOD * (phase.round() - phase)


def plain(x, y, pixel):
    """Ink everywhere."""
    return torch.ones_like(x)


def striped(x, y, pixel):
    """Lying stripes."""
    return soft(stripes(y), pixel)


def checked(x, y, pixel):
    """Ink where a lying and an upright stripe cross, and where neither is."""
    across, down = soft(stripes(x), pixel), soft(stripes(y), pixel)
    return across * down + (1 - across) * (1 - down)


def dotted(x, y, pixel):
    """Dots without ink, of radius 0.27 periods: they take about a quarter of the area."""
    distance = (to_dot(x) ** 2 + to_dot(y) ** 2).sqrt()
    return 1 - soft(0.27 * PERIOD - distance, pixel)


def choose(options, index):
    """(n, k, p, p) for each object the option that index (n, k, 1, 1) names."""
    table = torch.stack(torch.broadcast_tensors(*options))        # (options, n, k, p, p)
    if index.shape != (*table.shape[1:3], 1, 1):
        raise ValueError(f"index must be (n, k, 1, 1) for options of the shape "
                         f"{tuple(table.shape[1:])}, not {tuple(index.shape)}")
    return table.gather(0, index.expand_as(table[0])[None])[0]


def coverage(scenes, boxes, pixels):
    """(n, k, pixels, pixels) how much of each pixel has each object's colour, from 0 to 1.

    The boxes are (n, 4) x0, y0, x1, y1, and squares. Raises ValueError for others, for pixels
    below 1, and for a radius that is not above 0.
    """
    check_scenes(scenes)
    if not isinstance(boxes, torch.Tensor) or boxes.shape != (len(scenes.background), 4):
        raise ValueError(f"{len(scenes.background)} scenes need boxes of as many rows "
                         f"x0, y0, x1, y1, not {tuple(getattr(boxes, 'shape', ()))}")
    if not isinstance(pixels, numbers.Real) or pixels < 1 or pixels % 1:
        raise ValueError(f"pixels must be a whole number from 1 on, not {pixels}")
    n, device = len(boxes), boxes.device
    if device.type == "cpu":
        _check_sizes(boxes, scenes.nuisance[:, 2])

    # The middles of the pixels, in widths of the scene.
    middles = (torch.arange(pixels, device=device) + 0.5) / pixels          # (p,)
    corner, opposite = boxes[:, :2, None], boxes[:, 2:, None]     # (n, 2, 1) each
    grid = corner + (opposite - corner) * middles       # (n, 2, p)

    # The same in radii, from each object's centre.
    objects = scenes.objects[..., None, None]           # (n, k, 4, 1, 1)
    shape, _, texture, place = objects.unbind(2)        # (n, k, 1, 1) each
    scale = PAIR_SCALE if objects.shape[1] == 2 else 1.0
    nuisance = scale * scenes.nuisance[:, None, None, :]          # (n, 1, 1, 3)
    dx, dy, radius = nuisance.unbind(3)                 # (n, 1, 1) each
    centre = palette(PLACES, device)[place[..., 0, 0]]  # (n, k, 2)
    x = (grid[:, None, 0] - centre[..., :1] - dx) / radius        # (n, k, p)
    y = (grid[:, None, 1] - centre[..., 1:] - dy) / radius        # (n, k, p)
    x, y = x[:, :, None, :], y[:, :, :, None]           # (n, k, 1, p), (n, k, p, 1)
    side = (boxes[:, 2] - boxes[:, 0])[:, None, None]   # (n, 1, 1)
    pixel = (side / pixels / radius)[..., None]         # (n, 1, 1, 1)

    outlines = [circle(x, y), square(x, y), triangle(x, y), cross(x, y)]
    inks = [texture_ink(x, y, pixel) for texture_ink in (plain, striped, checked, dotted)]
    inside = soft(choose(outlines, shape), pixel)       # (n, k, p, p)
    ink = choose(inks, texture)                         # (n, k, p, p)
    return inside * (GAP + (1 - GAP) * ink)             # (n, k, p, p)


def _check_sizes(boxes, radii):
    """Raises ValueError unless the boxes (n, 4) are squares, and the radii (n,) above 0.

    To be called on a CPU alone.
    """
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    _refuse(width, (width > 0) & ((width - height).abs() <= 1e-3 * width),
            "a box must be a square whose sides are above 0")
    _refuse(radii, (radii > 0) & radii.isfinite(), "an object's radius must be above 0")


def compose(m, colour, background):
    """(n, 3, p, p) background + sum_k m_k (colour_k - background): linear in the coverages m.

    m is (n, k, p, p); colour (n, k, 3) and background (n, 3) are RGB. Raises ValueError for others.
    """
    n, k = m.shape[:2]
    if m.dim() != 4 or colour.shape != (n, k, 3) or background.shape != (n, 3):
        raise ValueError("m must be (n, k, p, p), colour (n, k, 3) and background (n, 3), not "
                         f"{tuple(m.shape)}, {tuple(colour.shape)}, {tuple(background.shape)}")
    contrast = colour - background[:, None]             # (n, k, 3)
    objects = torch.einsum("nkhw,nkc->nchw", m, contrast)         # (n, 3, p, p)
    return background[..., None, None] + objects        # (n, 3, p, p)


def render(scenes, boxes, pixels):
    """(n, 3, pixels, pixels) what the boxes (n, 4) show of n scenes; errors as in `coverage`."""
    m = coverage(scenes, boxes, pixels)                 # (n, k, p, p)
    background = palette(BACKGROUNDS, m.device)[scenes.background]          # (n, 3)
    colour = palette(COLOURS, m.device)[scenes.objects[..., 1]]   # (n, k, 3)
    return compose(m, colour, background)               # (n, 3, p, p)


# --- Reader: the renderer's inverse ---------------------------------------------------------------

@lru_cache
def bank(granularity, pixels, objects, device):
    """What the reader compares with, made once: places, T known objects (T, 4), m (T, pixels^2).

    A known object is a place, a shape, a texture and a nuisance; they stand place by place, and m
    is their coverage. A close-up looks the same at every place, so that one place will do.
    """
    places = sorted(set(sum(LAYOUTS[objects], ())))
    if granularity != "macro":
        places = places[:1]
    of_each = (torch.tensor(places), torch.arange(len(SHAPES)), torch.arange(len(TEXTURES)))
    place, shape, texture = torch.cartesian_prod(*of_each).to(device).unbind(1)
    # A coverage depends neither on a colour nor on a background: any will do.
    zero = torch.zeros_like(place)
    kinds = torch.stack([shape, zero, texture, place], 1)
    # In a scene of two objects each is smaller, so that the pair is made of one object twice.
    # Any nuisance will do: population replaces it by every row of NUISANCES.
    no_nuisance = torch.zeros(len(kinds), 3, device=device)
    scenes = Scenes(kinds[:, None].repeat(1, objects, 1), zero, no_nuisance)
    known = population(scenes)
    m = coverage(known, view_boxes(known, granularity), pixels)
    return places, known.objects[:, 0], m[:, 0].flatten(1)


def read(images, granularity="macro", objects=1):
    """The scenes that fit n images best: objects (n, k, 4) by place, background, residual (n,).

    Least squares over every shape, colour, texture, place, background and nuisance. An image is
    linear in its coverages m, so that with d_k = colour_k - bg
        |x - bg - sum_k m_k d_k|^2 = |x - bg|^2 + sum_k (|m_k d_k|^2 - 2 <m_k d_k, x - bg>)
    where the objects do not overlap. The residual is the root mean square of image minus fit, over
    pixels and channels. What a view does not show (the place in meso and micro, the shape in micro,
    the background behind a plain micro) comes back as whatever fits.

    For a good fit the sum is a small difference of large numbers. That is precise enough to choose
    by: fits that rounding could exchange are equally good to rounding. It is not precise enough
    for the residual, which is therefore computed from the image and the chosen fit.

    Images in float64 are compared in float64. Raises ValueError for other shapes, for an unknown
    granularity and for a number of objects other than 1 and 2.
    """
    check_images(images, objects)
    index_of(granularity)
    n, device, pixels = len(images), images.device, images.shape[-1]
    places, known, m = bank(granularity, pixels, objects, device)
    layouts = LAYOUTS[objects] if granularity == "macro" else ((places[0],),)

    # All in one type: float32, or float64 if the images are.
    kind = torch.promote_types(images.dtype, torch.float32)
    images, m = images.to(kind), m.to(kind)             # (n, 3, p, p), (T, pp)
    colours = palette(COLOURS, device).to(kind)         # (C, 3)
    backgrounds = palette(BACKGROUNDS, device).to(kind)           # (B, 3)

    # What each known object adds to |x - bg|^2, in each colour and on each background.
    d = colours[:, None] - backgrounds                  # (C, B, 3)
    y = images.flatten(2)[:, None] - backgrounds[..., None]       # (n, B, 3, pp)
    size_d = (d * d).sum(2)[:, :, None]                 # (C, B, 1)
    size = size_d * (m * m).sum(1)                      # (C, B, T)
    overlap = torch.einsum("cbr,nbrt->ncbt", d, y @ m.T)          # (n, C, B, T)
    energy = size - 2 * overlap                         # (n, C, B, T)

    # 1. The best colour of every known object.
    energy, colour = energy.min(1)                      # (n, B, T) each
    # 2. The best known object at every place.
    energy, best = energy.unflatten(2, (len(places), -1)).min(3)  # (n, B, places) each
    # 3. The best layout and background. Places are consecutive: a slot is a place's position.
    slots = constant(layouts, device) - places[0]       # (layouts, k)
    energy = energy[:, :, slots].sum(3)                 # (n, B, layouts)
    energy = (y * y).sum((2, 3))[..., None] + energy    # (n, B, layouts)
    winner = energy.flatten(1).min(1).indices           # (n,)
    background = winner // len(layouts)                 # (n,)
    layout = winner % len(layouts)                      # (n,)

    # The winner's objects, and its image.
    image = torch.arange(n, device=device)[:, None]     # (n, 1)
    slot = slots[layout]                                # (n, k)
    per_place = len(m) // len(places)
    index = best[image, background[:, None], slot]      # (n, k) among those at their place
    index = index + per_place * slot                    # (n, k) among all
    found = known[index]                                # (n, k, 4)
    found[..., 1] = colour[image, background[:, None], index]
    shown = m[index].unflatten(2, (pixels, pixels))     # (n, k, p, p)
    fit = compose(shown, colours[found[..., 1]], backgrounds[background])   # (n, 3, p, p)
    residual = (images - fit).square().mean((1, 2, 3)).sqrt()     # (n,)
    return found, background, residual


def accuracies(images, scenes, granularity="macro"):
    """What of n scenes the reader finds in n images, as (n,) booleans, and its residual (n,).

    layout (macro only): places and background; shape_colour (micro: colour); texture; joint: all.
    A wrong background in meso or micro counts as right. The granularity is a name. Raises
    ValueError for other shapes.
    """
    check_scenes(scenes)
    n, k, _ = scenes.objects.shape
    if len(images) != n:
        raise ValueError(f"{len(images)} images cannot show {n} scenes")
    found, background, residual = read(images, granularity, k)

    # The reader lists objects by their places, and one object only in a close-up: the first.
    objects = scenes.objects[:, :1]                     # (n, 1, 4)
    if granularity == "macro":
        order = scenes.objects[..., 3].argsort(1)[..., None]      # (n, k, 1)
        objects = scenes.objects.gather(1, order.expand(n, k, 4))           # (n, k, 4)
    same = (found == objects).all(1)                    # (n, 4)
    # To an image that is not finite nothing fits, and the reader's first guess means nothing.
    same = same & residual.isfinite()[:, None]          # (n, 4)
    shape, colour, texture, place = same.unbind(1)      # (n,) each

    layout = place & (background == scenes.background)  # (n,)
    shape_colour = shape & colour                       # (n,)
    if granularity != "macro":
        layout = residual.isfinite()                    # (n,)
    if granularity == "micro":
        shape_colour = colour                           # (n,)
    return {"layout": layout, "shape_colour": shape_colour, "texture": texture,
            "joint": layout & shape_colour & texture, "residual": residual}


@lru_cache
def largest_real_residual(granularity, pixels, objects=1):
    """Above this residual an image is "not a scene": the 99.9th percentile of real images.

    Their nuisance lies anywhere between the values that training uses, and the reader knows only
    those, so that it cannot fit exactly. Half of the images are of each domain.
    """
    generator = torch.Generator().manual_seed(0)
    low, high = NUISANCES.min(0).values, NUISANCES.max(0).values
    residuals = []
    for domain in DOMAINS:
        # In parts, since the reader compares every image with everything at once.
        for _ in range(4):
            scenes = sample_scenes(256, generator, domain, "seen", objects)
            between = low + (high - low) * torch.rand(256, 3, generator=generator)
            images, _ = views(scenes._replace(nuisance=between), granularity, pixels)
            residuals.append(read(images, granularity, objects)[2])
    return torch.cat(residuals).quantile(0.999).item()


# --- The demo -------------------------------------------------------------------------------------

def measure_views(scene, pixels):
    """Of one scene: [(caption, image)] at each granularity."""
    seen = []
    for granularity in GRANULARITIES:
        images, _ = views(scene, granularity, pixels)
        seen.append((captions(scene, granularity)[0], images[0]))
    return seen


def measure_reader(scenes, pixels, noises, generator):
    """{granularity: [share of images in which all is found, for each noise]}."""
    shares = {}
    for granularity in GRANULARITIES:
        clean, _ = views(scenes, granularity, pixels)
        shares[granularity] = []
        for noise in noises:
            noisy = clean + noise * torch.randn(clean.shape, generator=generator)
            joint = accuracies(noisy, scenes, granularity)["joint"]
            shares[granularity].append(joint.float().mean().item())
    return shares


def paint_view(axis, caption, image):
    axis.imshow((image.permute(1, 2, 0) / 2 + 0.5).numpy())
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(textwrap.fill(f'"{caption}"', 24))
    axis.set_title(caption.split()[0])


def paint_population(axis, images):
    from torchvision.utils import make_grid
    grid = make_grid(images / 2 + 0.5, nrow=6, padding=2, pad_value=1.0)
    axis.imshow(grid.permute(1, 2, 0).numpy())
    axis.axis("off")
    axis.set_title(f"{len(images)} images have this macro caption")


def paint_reader(axis, noises, shares):
    # The colours of macro, meso and micro in every picture of the project.
    looks = zip("osD", ("#0072b2", "#e69f00", "#009e73"))
    for (marker, colour), (granularity, values) in zip(looks, shares.items()):
        axis.plot(noises, values, color=colour, marker=marker, linewidth=2.5, markersize=8,
                  label=granularity)
    axis.set(xlabel="noise added to the images (std)", ylabel="read without a mistake")
    axis.set_ylim(0, 1.05)
    axis.yaxis.set_major_formatter("{x:.0%}")
    axis.legend()
    axis.set_title("A reader undoes the renderer")


def main(file="toy_data.png"):
    import matplotlib
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 7.8), layout="constrained")
    kinds = figure.canvas.get_supported_filetypes()
    if file.rpartition(".")[2].lower() not in kinds:
        raise SystemExit(f"the picture {file!r} must end in one of {', '.join(sorted(kinds))}")
    pixels, noises = 24, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    generator = torch.Generator().manual_seed(11)
    scene = sample_scenes(1, generator, "target")
    seen = measure_views(scene, pixels)
    for caption, _ in seen:
        print("caption:", caption)
    images, _ = views(population(scene), "macro", pixels)
    print("images with the macro caption:", len(images))

    many = sample_scenes(200, generator, "target")
    shares = measure_reader(many, pixels, noises, generator)
    for granularity, values in shares.items():
        listed = ", ".join(f"{value:.1%} ({noise:g})" for noise, value in zip(noises, values))
        print(f"{granularity}: read without a mistake, of 200 (noise): {listed}")
        limit = largest_real_residual(granularity, pixels)
        print(f"{granularity}: an image is a scene up to a residual of {limit:.3f}")

    with matplotlib.rc_context({"font.size": 15, "axes.titlesize": 17}):
        grid = figure.add_gridspec(2, 6, height_ratios=(1, 1.05))
        for column, (caption, image) in enumerate(seen):
            paint_view(figure.add_subplot(grid[0, 2 * column:2 * column + 2]), caption, image)
        paint_population(figure.add_subplot(grid[1, :3]), images)
        paint_reader(figure.add_subplot(grid[1, 3:]), noises, shares)
        figure.suptitle("One scene, seen at three granularities", fontsize=20)
        figure.savefig(file, dpi=100)
    print("drawn:", file)


if __name__ == "__main__":
    main(*sys.argv[1:])
