"""Scenes, captions, finite populations; the renderer by areas and crops; the reader undoes it."""

import math
import re

import pytest
import torch
from torchvision.transforms.functional import resize, resized_crop

import toy_data as toy

EPS = torch.finfo(torch.float32).eps
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])            # a box around all of a scene


def sample(n, domain="base", split="seen", objects=1, seed=0):
    return toy.sample_scenes(n, torch.Generator().manual_seed(seed), domain, split, objects)


def one(shape=0, colour=0, texture=0, place=4, background=0, nuisance=(0.0, 0.0, 0.26)):
    objects = torch.tensor([[[shape, colour, texture, place]]])
    return toy.Scenes(objects, torch.tensor([background]), torch.tensor([nuisance]))


def view(scenes, granularity, pixels=24):
    return toy.views(scenes, granularity, pixels)[0]


def noise_like(images, seed=1):
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def rms(images):
    return images.square().mean((1, 2, 3)).sqrt()


# --- Scenes ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("domain", toy.DOMAINS)
def test_held_out_combinations_are_new_but_each_pair_in_them_is_known(domain):
    seen = set(map(tuple, toy.combinations(domain, "seen").tolist()))
    held_out = set(map(tuple, toy.combinations(domain, "held_out").tolist()))
    shapes, textures, _ = toy.DOMAINS[domain]
    assert seen and held_out and not seen & held_out
    assert len(seen | held_out) == shapes * 4 * textures
    for a, b in ((0, 1), (0, 2), (1, 2)):
        pairs = {(row[a], row[b]) for row in seen}
        assert {(row[a], row[b]) for row in held_out} <= pairs


def test_domains_differ_where_they_should():
    base, target = sample(3000, "base"), sample(3000, "target")
    assert [len(column.unique()) for column in base.objects[:, 0].T] == [3, 4, 3, 9]
    assert [len(column.unique()) for column in target.objects[:, 0].T] == [4, 4, 4, 9]
    assert not set(base.background.tolist()) & set(target.background.tolist())


def test_scenes_are_seeded():
    first, again, other = sample(9, seed=3), sample(9, seed=3), sample(9, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.objects, other.objects)


@pytest.mark.parametrize("granularity", toy.GRANULARITIES)
def test_the_population_of_a_caption(granularity):
    scenes = sample(6, "target")
    everything = toy.population(scenes)
    texts = toy.captions(scenes, granularity)
    assert toy.captions(everything, granularity) == [text for text in texts for _ in range(18)]
    images = view(everything, granularity).unflatten(0, (6, 18))
    truth = view(scenes, granularity)[:, None]
    itself = (images - truth).abs().amax((2, 3, 4)) == 0
    assert itself.any(1).all()
    assert not itself.roll(1, 0).eq(itself).all()       # twin: not the same for all


def test_views_take_a_name_or_names_or_indices():
    scenes = sample(3, "target")
    images, tokens = toy.views(scenes, torch.tensor([2, 2, 0]), 10)
    for named in (["micro", "micro", "macro"], [2, 2, 0], (2, "micro", "macro")):
        again, same = toy.views(scenes, named, 10)
        assert torch.equal(images, again) and torch.equal(tokens, same)
    for granularity, rows in (("micro", [0, 1]), ("macro", [2])):
        alone, words = toy.views(scenes, granularity, 10)
        assert torch.equal(alone[rows], images[rows]) and torch.equal(words[rows], tokens[rows])
    assert not torch.equal(toy.views(scenes, "meso", 10)[0], images)        # twin


# --- Captions -------------------------------------------------------------------------------------

def told(scenes, i, granularity):
    """The caption of scene i as a text, without tokens: the second route."""
    background = list(toy.BACKGROUNDS)[scenes.background[i]]
    named = []
    for shape, colour, texture, _ in scenes.objects[i].tolist():
        named.append((list(toy.COLOURS)[colour], toy.TEXTURES[texture], toy.SHAPES[shape]))
    colour, texture, shape = named[0]
    if granularity == "micro":
        return f"micro {colour} {texture} on {background}"
    if granularity == "meso":
        return f"meso {colour} {texture} {shape} on {background}"
    place = list(toy.PLACES)[scenes.objects[i, 0, 3]]
    other = " ".join(["", *named[1]]) if len(named) == 2 else ""
    return f"macro {colour} {texture} {shape} {place}{other} on {background}"


def test_captions_read_as_promised():
    scene = one(shape=0, colour=0, texture=1, place=0)
    assert toy.captions(scene, "macro") == ["macro red striped circle top left on white"]
    assert toy.captions(scene, "meso") == ["meso red striped circle on white"]
    assert toy.captions(scene, "micro") == ["micro red striped on white"]
    objects = torch.tensor([[[1, 2, 0, 11], [0, 3, 2, 12]]])
    two = toy.Scenes(objects, torch.tensor([1]), torch.zeros(1, 3))
    text = "macro blue plain square above yellow checked circle on black"
    assert toy.captions(two, "macro") == [text]


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("domain", toy.DOMAINS)
def test_captions_and_tokens_are_the_same_words(domain, objects):
    scenes = sample(300, domain, objects=objects)
    names = [toy.GRANULARITIES[i % 3] for i in range(300)]
    texts = [told(scenes, i, name) for i, name in enumerate(names)]
    assert toy.captions(scenes, names) == texts
    tokens = toy.caption_tokens(scenes, torch.arange(300) % 3)
    assert torch.equal(tokens, toy.tokenize(texts))
    twin = toy.caption_tokens(scenes, (torch.arange(300) + 1) % 3)
    assert (twin != tokens).any(1).all()


def test_bad_captions_name_the_word():
    good = "macro red plain circle top left on white"
    with pytest.raises(ValueError, match="unknown word 'purple'.*red"):
        toy.tokenize([good, "macro purple circle"])
    with pytest.raises(ValueError, match="'<pad>'"):
        toy.tokenize(["<pad> red"])
    with pytest.raises(ValueError, match="13 words"):
        toy.tokenize(["red " * 13])
    null = ""
    assert toy.tokenize([good, null]).count_nonzero(1).tolist() == [8, 0]


def test_the_grammar_is_that_of_the_captions():
    """Every caption of the data passes; with a word less, one twice or two exchanged none."""
    for objects, granularity in ((1, "macro"), (2, "macro"), (1, "meso"), (2, "micro")):
        for text in toy.captions(sample(30, "target", objects=objects), granularity):
            words = text.split()
            assert toy.grammar_error(text) == ""
            for i in range(len(words)):
                without, twice = words[:i] + words[i + 1:], words[:i + 1] + words[i:]
                assert toy.grammar_error(" ".join(without)) and toy.grammar_error(" ".join(twice))
            for i in range(len(words) - 1):
                swapped = words[:i] + [words[i + 1], words[i]] + words[i + 2:]
                assert toy.grammar_error(" ".join(swapped))


@pytest.mark.parametrize("text, wrong", [
    ("macro red on white", "lacks a texture, a shape and a place;"),
    ("meso red plain circle white", "lacks the word 'on';"),
    ("macro red circle left of blue plain square on white", "lacks a texture;"),
    ("macro red plain circle top on white", "has 'top' where a place belongs (allowed: top left,"),
    ("micro purple plain on white", "has 'purple' where a colour belongs"),
    ("micro plain red on white", "has 'plain' where a colour belongs"),
    ("macro red plain circle top left blue plain square on white", "has 'blue' where the word"),
    ("micro red plain on white white", "goes on after its end with 'white'"),
    ("red plain on white", "must start with macro, meso or micro"),
    ("", "must start with")])
def test_what_is_wrong_in_a_caption_is_said(text, wrong):
    error = toy.grammar_error(text)
    assert wrong in error and "\n" not in error
    example = error.split("for example: ")[1]
    assert toy.grammar_error(example) == ""


# --- Wrong requests -------------------------------------------------------------------------------

def scenes_with(**one_field):
    """Three scenes of which a column of the objects, or a field, has one value."""
    scenes = sample(3)
    for name, value in one_field.items():
        if name in toy.Scenes._fields:
            field = getattr(scenes, name)
            scenes = scenes._replace(**{name: torch.full_like(field, value)})
        else:
            column = ("shape", "colour", "texture", "place").index(name)
            scenes.objects[1, 0, column] = value
    return scenes


# Labels outside of what they name. A negative one would count from the end, without a word.
LABELS = [("indices into SHAPES", {name: value}) for name, value in (
    ("shape", 4), ("shape", -1), ("colour", 4), ("colour", -1), ("texture", 9), ("texture", -1),
    ("place", 13), ("place", -1), ("place", 9))]
LABELS += [("index into BACKGROUNDS", {"background": value}) for value in (4, -1)]


def wrong_requests():
    """[(words of the sentence, function, its arguments)]"""
    scenes, images = sample(3), torch.zeros(3, 3, 8, 8)
    fewer = scenes._replace(background=scenes.background[:2])
    flat = scenes._replace(nuisance=scenes.nuisance[:, :2])
    three = scenes._replace(objects=scenes.objects.repeat(1, 3, 1))
    requests = [(words, toy.views, (scenes_with(**wrong), "macro", 8)) for words, wrong in LABELS]
    requests += [(words, toy.captions, (scenes_with(**wrong), "micro")) for words, wrong in LABELS]
    for wrong, words in ((fewer, "(2,)"), (flat, "(3, 2)"), (three, "(3, 3, 4)")):
        requests.append((words, toy.views, (wrong, "macro", 8)))
        requests.append((words, toy.captions, (wrong, "macro")))
        requests.append((words, toy.population, (wrong,)))
    generator = torch.Generator()
    return requests + [
        ("base, target", toy.sample_scenes, (1, generator, "moon")),
        ("seen, held_out", toy.sample_scenes, (1, generator, "base", "new")),
        ("1 or 2 objects", toy.sample_scenes, (1, generator, "base", "seen", 3)),
        ("macro, meso, micro", toy.views, (scenes, "mega", 8)),
        ("macro, meso, micro", toy.captions, (scenes, ["macro", "mega", "meso"])),
        ("each of the 3 scenes", toy.views, (scenes, torch.tensor([0, 1]), 8)),
        ("each of the 3 scenes", toy.captions, (scenes, ["macro"])),
        ("torch.float32", toy.view_boxes, (scenes, torch.rand(3))),
        ("0 (macro), 1 (meso) or 2", toy.caption_tokens, (scenes, torch.tensor([0, 1, 3]))),
        ("0 (macro), 1 (meso) or 2", toy.view_boxes, (scenes, torch.tensor([0, 1, -1]))),
        ("pixels must be", toy.views, (scenes, "macro", 0)),
        ("pixels must be", toy.views, (scenes, "macro", 8.5)),
        ("3 scenes need boxes", toy.render, (scenes, WHOLE, 8)),
        ("(n, 3, pixels, pixels)", toy.read, (images[:, :2],)),
        ("(n, 3, pixels, pixels)", toy.read, (images[..., :4],)),
        ("macro, meso, micro", toy.read, (images, "mega")),
        ("1 or 2 objects", toy.read, (images, "macro", 3)),
        ("2 images cannot show 3 scenes", toy.accuracies, (images[:2], scenes)),
        ("at least one caption", toy.tokenize, ([],)),
        ("list of", toy.tokenize, ("macro red",)),
        ("list of", toy.tokenize, (None,)),
        ("list of", toy.tokenize, ([None],)),
        ("number of scenes", toy.sample_scenes, (-1, generator)),
        ("number of scenes", toy.sample_scenes, (1.5, generator)),
        ("1 or 2 objects", toy.sample_scenes, (1, generator, "base", "seen", 1.0)),
        ("1 or 2 objects", toy.sample_scenes, (1, generator, "base", "seen", [])),
        ("Scenes of three tensors", toy.views, (None, "macro", 8)),
        ("Scenes of three tensors", toy.population, (tuple(scenes),)),
        ("must be whole numbers", toy.captions, (scenes._replace(objects=scenes.objects + 0.5),
                                                 "macro")),
        ("a list of names", toy.views, (scenes, None, 8)),
        ("a list of names", toy.captions, (scenes, 0)),
        ("0 (macro), 1 (meso) or 2", toy.captions, (scenes, [0, 1, 5])),
        ("pixels must be", toy.views, (scenes, "macro", "8")),
        ("pixels must be", toy.views, (scenes, "macro", math.nan)),
        ("radius must be above 0", toy.views, (scenes_with(nuisance=0.0), "macro", 8)),
        ("radius must be above 0", toy.views, (scenes_with(nuisance=-0.2), "macro", 8)),
        ("radius must be above 0", toy.views, (scenes_with(nuisance=math.nan), "macro", 8)),
        ("3 scenes need boxes", toy.render, (scenes, [[0, 0, 1, 1]] * 3, 8)),
        ("a box must be a square", toy.render, (scenes, WHOLE.flip(1).repeat(3, 1), 8)),
        ("a box must be a square", toy.render, (scenes, 0 * WHOLE.repeat(3, 1), 8)),
        ("a box must be a square", toy.render, (scenes, math.nan * WHOLE.repeat(3, 1), 8)),
        ("a box must be a square", toy.render, (scenes, torch.tensor([[0, 0, 1, 0.5]] * 3), 8)),
        ("floating-point numbers from -1", toy.read, ((127 * images).byte(),)),
        ("floating-point numbers from -1", toy.read, (images.numpy(),)),
        *((words, toy.compose, parts) for words, parts in one_part_for_all()),
        ("(n, k, 1, 1)", toy.choose, ([images[:, :2]] * 4, torch.zeros(1, 1, 1, 1).long())),
    ]


def one_part_for_all():
    """What compose would spread over all images, or over all objects, without a word."""
    parts = torch.rand(3, 2, 8, 8), torch.rand(3, 2, 3), torch.rand(3, 3)
    for k, part in enumerate(parts):
        for axis in range(part.dim() - 1 if k else 2):
            lone = part.narrow(axis, 0, 1)
            yield "m must be (n, k, p, p)", (*parts[:k], lone, *parts[k + 1:])


@pytest.mark.parametrize("words, function, arguments", wrong_requests())
def test_wrong_requests_name_what_is_allowed(words, function, arguments):
    with pytest.raises(ValueError, match=re.escape(words)):
        function(*arguments)


# --- Renderer -------------------------------------------------------------------------------------

def test_a_close_up_shows_nothing_that_its_caption_does_not_name():
    """Places, and in a micro view shapes, change an image by rounding only."""
    for texture in range(4):
        scenes = [one(shape, 1, texture, place, 2) for shape in range(4) for place in range(9)]
        micro = torch.cat([view(scene, "micro") for scene in scenes])
        assert (micro - micro[0]).abs().max() < rounding("micro")
    meso = torch.cat([view(one(2, 1, 1, place, 2), "meso") for place in range(9)])
    assert (meso - meso[0]).abs().max() < rounding("meso")
    twin = view(one(2, 1, 1, 0, 2, nuisance=(0.001, 0.0, 0.26)), "meso")
    assert (twin - meso[0]).abs().max() > rounding("meso")


@pytest.mark.parametrize("pixels", [8, 16, 32])
def test_a_close_up_of_a_pair_shows_nothing_of_the_second_object(pixels):
    """Only then is the population of its caption complete, and its exact velocity exact."""
    shape, other, pair, nuisance = torch.cartesian_prod(
        torch.arange(4), torch.arange(4), torch.arange(4), torch.arange(18)).T
    first, second = torch.tensor([(9, 10), (10, 9), (11, 12), (12, 11)])[pair].T
    zero, one = torch.zeros_like(shape), torch.ones_like(shape)
    here = torch.stack([shape, zero, zero, first], 1)              # (n, 4)
    there = torch.stack([other, one, zero, second], 1)             # (n, 4)
    scenes = toy.Scenes(torch.stack([here, there], 1), zero, toy.NUISANCES[nuisance])
    # The second object in another shape and colour.
    changed = torch.stack([(other + 1) % 4, 2 * one, zero, second], 1)
    others = scenes._replace(objects=torch.stack([here, changed], 1))
    for granularity in ("meso", "micro"):
        assert torch.equal(view(scenes, granularity, pixels), view(others, granularity, pixels))
    different = view(scenes, "macro", pixels) != view(others, "macro", pixels)     # twin
    assert different.flatten(1).any(1).all()


def rounding(granularity, pixels=24):
    """How far float32 may take a view's values off.

    A pixel's middle is rounded a few times at values up to 1. In sides of a pixel, which is what
    the coverage depends on, that is larger by their number in a scene's width. Two colours
    differ by 2 at most.
    """
    side = 2 * toy.HALF_SIDE[toy.GRANULARITIES.index(granularity)] * toy.PAIR_SCALE / pixels
    return (8 * EPS * 2 / side).item()


@pytest.mark.parametrize("granularity, pixels", [("meso", 24), ("micro", 24), ("meso", 32)])
def test_a_view_is_the_crop_of_its_box(granularity, pixels):
    large = 600                                         # the boxes' corners are whole numbers
    for shape, texture in ((0, 1), (1, 2), (2, 0), (3, 3)):
        scene = one(shape, 2, texture, background=3, nuisance=(0.03, -0.03, 0.22))
        box = toy.view_boxes(scene, granularity)[0] * large
        left, top, right, bottom = box.round().int().tolist()
        width, height = right - left, bottom - top
        whole, small = view(scene, "macro", large), view(scene, granularity, pixels)

        def gap(shift):
            """Of the view from the crop of a large image that is off by this much."""
            crop = resized_crop(whole, top + shift, left + shift, height, width, [pixels, pixels],
                                antialias=True)
            return (small - crop).abs().mean()
        assert gap(0) < 0.04
        if texture:
            assert gap(width // 10) > 1.5 * gap(0)      # twin: a tenth off


def test_small_images_are_the_average_of_large_ones():
    scenes = sample(20, "target")
    small = resize(view(scenes, "macro", 240), [24, 24], antialias=True)
    assert (view(scenes, "macro") - small).abs().mean() < 0.02
    assert (view(scenes, "macro") - small.flip(3)).abs().mean() > 0.02      # twin


@pytest.mark.parametrize("shape, area", [
    (0, math.pi),                                       # a circle
    (1, 1.9**2),                                        # a square of half side 0.95
    (2, 3 * 3**0.5 * 0.64**2),                          # an equilateral triangle of inradius 0.64
    (3, 2 * 2 - 1)])                                    # two bars of 1 x 2 that share 1 x 1
def test_areas_of_plain_shapes(shape, area):
    r = 0.26
    covered = toy.coverage(one(shape, nuisance=(0.0, 0.0, r)), WHOLE, 400).mean() / r**2
    assert abs(covered - area) < 0.02


def test_colours_are_where_they_should_be():
    red_square_top_right = one(1, 0, 0, place=2, background=1)
    image = view(red_square_top_right, "macro", 100)[0]
    assert torch.equal(image[:, 80, 20], torch.tensor(toy.BACKGROUNDS["black"]))
    torch.testing.assert_close(image[:, 30, 70], torch.tensor(toy.COLOURS["red"]))


def test_the_nuisance_moves_and_enlarges_the_object():
    def moments(nuisance):
        """Area and centre of mass of a square, in widths of the scene."""
        m = toy.coverage(one(1, nuisance=nuisance), WHOLE, 100)[0, 0]
        middles = (torch.arange(100) + 0.5) / 100
        return m.mean(), (m.sum(0) * middles).sum() / m.sum(), (m.sum(1) * middles).sum() / m.sum()

    area, x, y = moments((0.0, 0.0, 0.22))
    larger, moved_x, moved_y = moments((0.03, -0.03, 0.26))
    assert abs(larger / area - (0.26 / 0.22) ** 2) < 0.01
    assert abs(moved_x - x - 0.03) < 1e-3 and abs(moved_y - y + 0.03) < 1e-3


# --- Reader ---------------------------------------------------------------------------------------

def all_scenes(domain, split):
    """Every combination at random places, backgrounds and nuisances."""
    table = toy.combinations(domain, split)
    scenes = sample(len(table), domain, split)
    scenes.objects[:, 0, :3] = table
    return scenes


@pytest.mark.parametrize("split", ["seen", "held_out"])
@pytest.mark.parametrize("domain", toy.DOMAINS)
@pytest.mark.parametrize("granularity", toy.GRANULARITIES)
def test_the_reader_undoes_the_renderer(granularity, domain, split):
    scenes = all_scenes(domain, split)
    images = view(scenes, granularity)
    found = toy.accuracies(images, scenes, granularity)
    assert found["joint"].all() and found["residual"].max() < rounding(granularity)
    wrong = scenes._replace(objects=scenes.objects.roll(1, 0))    # twin: of another scene
    assert toy.accuracies(images, wrong, granularity)["joint"].float().mean() < 0.5


@pytest.mark.parametrize("domain", toy.DOMAINS)
def test_the_reader_undoes_the_renderer_for_two_objects(domain):
    scenes = sample(100, domain, objects=2)
    for granularity in toy.GRANULARITIES:
        found = toy.accuracies(view(scenes, granularity), scenes, granularity)
        assert found["joint"].all()
        assert found["residual"].max() < rounding(granularity)
    swapped = scenes._replace(objects=scenes.objects.roll(1, 0))  # twin
    assert not toy.accuracies(view(scenes, "macro"), swapped)["joint"].all()


def test_the_reader_says_which_attribute_is_wrong():
    images = view(one(0, 0, 1, 0), "macro")             # red striped circle, top left

    def wrong(**change):
        """What the reader does not find of this scene, or of a changed one, in the image."""
        scene = one(**{"shape": 0, "colour": 0, "texture": 1, "place": 0, **change})
        found = toy.accuracies(images, scene)
        del found["residual"]
        return {name for name, right in found.items() if not right}

    assert wrong() == set()
    assert wrong(shape=1) == wrong(colour=1) == {"shape_colour", "joint"}
    assert wrong(texture=2) == {"texture", "joint"}
    assert wrong(place=1) == wrong(background=1) == {"layout", "joint"}


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("granularity", toy.GRANULARITIES)
def test_in_an_image_that_is_not_finite_nothing_is_found(granularity, wrong):
    scenes = sample(40)
    images = view(scenes, granularity, 8) * wrong
    found = toy.accuracies(images, scenes, granularity)
    for name in ("layout", "shape_colour", "texture", "joint"):
        assert not found[name].any()
    assert not (found["residual"] <= 100).any()         # whatever the limit for valid scenes is
    # The twin: of the reader's guesses some are right by chance.
    guessed, _, _ = toy.read(images, granularity)
    assert (guessed[:, 0, 2] == scenes.objects[:, 0, 2]).any()


def choice_tolerance(images, residual):
    """(n,) how much worse the residual may be when rounding has decided between two fits.

    The energies are sums of squares of image minus background. In float32 they are wrong by a few
    eps of their size, and the residual is the root of an energy.
    """
    size = (images.abs() + 1).square().mean((1, 2, 3))
    return 16 * EPS * size / (2 * residual)


@pytest.mark.parametrize("granularity", toy.GRANULARITIES)
def test_the_residual_is_that_of_the_best_fit(granularity):
    """By another route: the found scene with each nuisance in turn, rendered anew."""
    scenes = sample(20, "target")
    images = view(scenes, granularity, 12)
    images = images + 0.5 * noise_like(images)
    objects, background, residual = toy.read(images, granularity)
    fits = view(toy.population(toy.Scenes(objects, background, scenes.nuisance)), granularity, 12)
    best = rms(images.repeat_interleave(18, 0) - fits).view(20, 18).min(1).values
    tolerance = rounding(granularity, 12) + choice_tolerance(images, residual)
    assert ((residual - best).abs() < tolerance).all()
    twins = scenes.take(torch.arange(20).roll(1))
    others = view(toy.population(twins), granularity, 12)
    other = rms(images.repeat_interleave(18, 0) - others).view(20, 18).min(1).values
    assert ((residual - other).abs() > tolerance).any()


@pytest.mark.parametrize("granularity", toy.GRANULARITIES)
def test_a_small_difference_is_not_lost_among_large_numbers(granularity):
    """Of an image that is off by 0.01 everywhere the residual is 0.01, to rounding."""
    images = view(all_scenes("base", "seen"), granularity)
    residual = toy.read(images + 0.01, granularity)[2]
    assert (residual - 0.01).abs().max() < rounding(granularity)
    twin = toy.read(images + 0.011, granularity)[2]
    assert (twin - 0.01).abs().max() > rounding(granularity)


@pytest.mark.parametrize("granularity", toy.GRANULARITIES)
def test_float32_chooses_as_well_as_float64(granularity, monkeypatch):
    """Noisy images have many fits that are nearly as good as the best."""
    images = view(sample(40, "target"), granularity, 12)
    images = images + noise_like(images)
    exact = toy.read(images.double(), granularity)[2]
    tolerance = choice_tolerance(images, exact)
    assert ((toy.read(images, granularity)[2] - exact).abs() < tolerance).all()
    bank = toy.bank

    def rough_bank(*arguments):
        """Twin: coverages that are known to a tenth only."""
        places, known, m = bank(*arguments)
        return places, known, (10 * m).round() / 10

    monkeypatch.setattr(toy, "bank", rough_bank)
    assert ((toy.read(images, granularity)[2] - exact).abs() > tolerance).any()


def test_the_residual_tells_scenes_from_others():
    scenes, pixels = sample(50), 12
    limit = toy.largest_real_residual("macro", pixels)
    clean = view(scenes, "macro", pixels)
    noise = noise_like(clean)
    between = scenes._replace(nuisance=scenes.nuisance * torch.tensor([0.5, 0.5, 1.0]))
    real = toy.read(view(between, "macro", pixels))[2]
    # The reader cannot fit most of them exactly, but well enough.
    assert real.median() > rounding("macro", pixels)
    assert (real < limit).float().mean() > 0.97
    assert (toy.read(clean)[2] < limit).all() and (toy.read(noise)[2] > limit).all()
    assert (toy.read(clean + 2 * limit * noise)[2] > limit).all()           # twin: too noisy
