"""The scenes, their captions and finite populations; the renderer against its own boxes and closed-form areas; the reader."""

import math

import pytest
import torch
from torchvision.transforms.functional import resize, resized_crop

import toy_data as toy

EVERYTHING = [(domain, split) for domain in toy.DOMAINS for split in ("seen", "held_out")]


def draw(n, domain="base", split="seen", objects=1, seed=0):
    return toy.sample_scenes(n, torch.Generator().manual_seed(seed), domain, split, objects)


def one(shape=0, colour=0, texture=0, place=4, background=0, nuisance=(0.0, 0.0, 0.26)):
    return toy.Scenes(torch.tensor([[[shape, colour, texture, place]]]), torch.tensor([background]), torch.tensor([nuisance]))


def view(scenes, granularity, pixels=24):
    return toy.render(scenes, toy.view_boxes(scenes, granularity), pixels)


# --- scenes and captions ---

@pytest.mark.parametrize("domain", toy.DOMAINS)
def test_held_out_combinations_are_new_but_each_pair_in_them_is_known(domain):
    seen, held_out = (set(map(tuple, toy.combinations(domain, split).tolist())) for split in ("seen", "held_out"))
    shapes, textures, _ = toy.DOMAINS[domain]
    assert seen and held_out and not seen & held_out and len(seen | held_out) == shapes * 4 * textures
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert {(row[a], row[b]) for row in held_out} <= {(row[a], row[b]) for row in seen}


def test_domains_differ_where_they_should():
    base, target = (draw(3000, domain) for domain in toy.DOMAINS)
    sizes = [len(base.objects[:, 0, k].unique()) for k in range(4)]
    assert sizes == [3, 4, 3, 9] and [len(target.objects[:, 0, k].unique()) for k in range(4)] == [4, 4, 4, 9]
    assert not set(base.background.tolist()) & set(target.background.tolist())


def test_scenes_are_seeded():
    assert all(torch.equal(a, b) for a, b in zip(draw(9, seed=3), draw(9, seed=3)))
    assert not torch.equal(draw(9, seed=3).objects, draw(9, seed=4).objects)


@pytest.mark.parametrize("arguments, words", [(("moon", "seen", 1), "base, target"), (("base", "new", 1), "seen, held_out"), (("base", "seen", 3), "1 or 2")])
def test_wrong_requests_name_what_is_allowed(arguments, words):
    with pytest.raises(ValueError, match=words):
        draw(1, *arguments)


def test_captions_read_as_promised():
    scene = one(shape=0, colour=0, texture=1, place=0)
    assert [toy.captions(scene, g)[0] for g in toy.GRANULARITIES] == [
        "macro red striped circle top left on white", "meso red striped circle on white", "micro red striped on white"]
    two = toy.Scenes(torch.tensor([[[1, 2, 0, 11], [0, 3, 2, 12]]]), torch.tensor([1]), torch.zeros(1, 3))
    assert toy.captions(two, "macro") == ["macro blue plain square above yellow checked circle on black"]


@pytest.mark.parametrize("objects", [1, 2])
def test_tokens_keep_every_word_of_every_caption(objects):
    texts = [text for domain in toy.DOMAINS for g in toy.GRANULARITIES for text in toy.captions(draw(200, domain, objects=objects), g)]
    back = [" ".join(toy.WORDS[k] for k in row if k) for row in toy.tokenize(texts).tolist()]
    assert back == texts


@pytest.mark.parametrize("objects", [1, 2])
def test_tokens_from_tables_are_those_of_the_texts(objects):
    for domain in toy.DOMAINS:
        scenes = draw(300, domain, objects=objects)
        granularity = torch.arange(300) % 3
        texts = toy.captions(scenes, [toy.GRANULARITIES[g] for g in granularity])
        assert torch.equal(toy.caption_tokens(scenes, granularity), toy.tokenize(texts))
        twin = toy.caption_tokens(scenes, (granularity + 1) % 3)
        assert (twin != toy.tokenize(texts)).any(1).all()


def test_bad_captions_name_the_word():
    with pytest.raises(ValueError, match="unknown word 'purple'.*red"):
        toy.tokenize(["macro red plain circle top left on white", "macro purple circle"])
    with pytest.raises(ValueError, match="'<pad>'"):
        toy.tokenize(["<pad> red"])
    with pytest.raises(ValueError, match="13 words"):
        toy.tokenize(["red " * 13])


@pytest.mark.parametrize("granularity", toy.GRANULARITIES)
def test_the_population_of_a_caption(granularity):
    scenes = draw(6, "target")
    everything = toy.population(scenes)
    assert toy.captions(everything, granularity) == [text for text in toy.captions(scenes, granularity) for _ in range(18)]
    images = view(everything, granularity).unflatten(0, (6, 18))
    truth = view(scenes, granularity)
    assert ((images - truth[:, None]).abs().amax((2, 3, 4)) == 0).any(1).all()     # the scene itself is in it


def test_a_close_up_shows_nothing_that_its_caption_does_not_name():
    for texture in range(4):
        micro = [view(one(shape, 1, texture, place, 2), "micro") for shape in range(4) for place in range(9)]
        assert max((image - micro[0]).abs().max() for image in micro) < 1e-4       # places differ by rounding only
    meso = [view(one(2, 1, 1, place, 2), "meso") for place in range(9)]
    assert max((image - meso[0]).abs().max() for image in meso) < 1e-4


# --- renderer ---

@pytest.mark.parametrize("granularity, pixels", [("meso", 24), ("micro", 24), ("meso", 32)])
def test_a_view_is_the_crop_of_its_box(granularity, pixels):
    large = 2400
    for shape, texture in ((0, 1), (1, 2), (2, 0), (3, 3)):
        scene = one(shape, 2, texture, place=4, background=3, nuisance=(0.03, -0.03, 0.22))
        x0, y0, x1, y1 = (toy.view_boxes(scene, granularity)[0] * large).round().int().tolist()
        whole = view(scene, "macro", large)
        crop = lambda off: resized_crop(whole, y0 + off, x0 + off, y1 - y0, x1 - x0, [pixels, pixels], antialias=True)
        gap = lambda other: (view(scene, granularity, pixels) - other).abs().mean()
        assert gap(crop(0)) < 0.04
        if texture:                                                                # twin: a crop off by a tenth of its side
            assert gap(crop((x1 - x0) // 10)) > 1.5 * gap(crop(0))


def test_small_images_are_the_average_of_large_ones():
    scenes = draw(20, "target")
    assert (view(scenes, "macro") - resize(view(scenes, "macro", 240), [24, 24], antialias=True)).abs().mean() < 0.02


@pytest.mark.parametrize("shape, area", [(0, math.pi), (1, 1.9**2), (2, 3**0.5 * 1.92**2 / 3), (3, 4 - 1)])
def test_areas_of_plain_shapes(shape, area):
    """In radii: a circle, a square of half side .95, a triangle of inradius .64 (area 3 sqrt 3 r^2), a cross of two 1 x 2 bars."""
    r = 0.26
    covered = toy.coverage(one(shape, nuisance=(0.0, 0.0, r)), torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 400).mean() / r**2
    assert abs(covered - area) < 0.02


def test_colours_position_and_nuisance_are_where_they_should_be():
    image = view(one(1, 0, 0, place=2, background=1), "macro", 100)[0]             # red plain square, top right, on black
    assert torch.allclose(image[:, 30, 70], torch.tensor([1.0, -0.8, -0.8])) and torch.allclose(image[:, 80, 20], torch.tensor([-1.0] * 3))
    centre = lambda nuisance: [(toy.coverage(one(1, nuisance=nuisance), torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 100)[0, 0]
                                * (torch.arange(100) + 0.5).view(shape)).sum() for shape in ((1, 100), (100, 1))]
    (x, y), (x2, y2) = centre((0.0, 0.0, 0.22)), centre((0.03, -0.03, 0.22))
    assert x2 > x and y2 < y


# --- reader ---

def all_scenes(domain, split):
    """Every combination at random places, backgrounds and nuisances."""
    table = toy.combinations(domain, split)
    scenes = draw(len(table), domain, split)
    scenes.objects[:, 0, :3] = table
    return scenes


@pytest.mark.parametrize("domain, split", EVERYTHING)
@pytest.mark.parametrize("granularity", toy.GRANULARITIES)
def test_the_reader_undoes_the_renderer(domain, split, granularity):
    scenes = all_scenes(domain, split)
    found = toy.accuracies(view(scenes, granularity), scenes, granularity)
    assert found["joint"].all() and found["residual"].max() < 2e-3
    wrong = scenes._replace(objects=scenes.objects.roll(1, 0))                     # twin: the attributes of another scene
    assert toy.accuracies(view(scenes, granularity), wrong, granularity)["joint"].float().mean() < 0.5


@pytest.mark.parametrize("domain", toy.DOMAINS)
def test_the_reader_undoes_the_renderer_for_two_objects_at_32_pixels(domain):
    scenes = draw(100, domain, objects=2)
    for granularity in toy.GRANULARITIES:
        assert toy.accuracies(view(scenes, granularity, 32), scenes, granularity)["joint"].all()


def test_reader_says_which_attribute_is_wrong():
    images = view(one(0, 0, 1, 0), "macro")                                        # red striped circle, top left
    found = lambda **change: {k: v.item() for k, v in toy.accuracies(images, one(**{"shape": 0, "colour": 0, "texture": 1, "place": 0} | change)).items() if k != "residual"}
    right = {"layout": True, "shape_colour": True, "texture": True, "joint": True}
    assert found() == right
    assert found(shape=1) == right | {"shape_colour": False, "joint": False} == found(colour=1)
    assert found(texture=2) == right | {"texture": False, "joint": False}
    assert found(place=1) == right | {"layout": False, "joint": False} == found(background=1)


def test_the_residual_is_the_noise_and_tells_scenes_from_others():
    scenes, generator = draw(50), torch.Generator().manual_seed(1)
    noise = torch.randn(50, 3, 24, 24, generator=generator)
    residual = lambda images: toy.accuracies(images, scenes)["residual"]
    assert torch.allclose(residual(view(scenes, "macro") + 0.3 * noise), 0.3 * noise.square().mean((1, 2, 3)).sqrt(), atol=2e-3)
    limit = toy.largest_real_residual("macro", 24)
    between = scenes._replace(nuisance=scenes.nuisance * torch.tensor([0.5, 0.5, 1.0]))
    assert (residual(view(between, "macro")) < limit).float().mean() > 0.97
    assert (residual(noise) > limit).all()
