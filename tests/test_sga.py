"""Each intervention of SGA against a closed form, a second route, or a count; with twins."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader, TensorDataset

import flow_matching as fm
import ntk
import sga

# A few hundred roundings of a float64 and a few of a float32, for numbers of about 1.
NEARLY = 500 * torch.finfo(torch.float64).eps
FLOAT32 = 8 * torch.finfo(torch.float32).eps


def near(a, b, within=NEARLY):
    """Whether the largest difference is `within` times the largest number (or 1)."""
    scale = max(1.0, b.abs().max().item())
    return (a - b).abs().max().item() <= within * scale


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*size, seed=0):
    return torch.randn(*size, generator=seeded(seed), dtype=torch.float64)


# --- Views ---

def image():
    """(1, 40, 60) whose value at a pixel is its column."""
    return torch.arange(60.0).expand(1, 40, 60)


def granularities(boxes, pixels=20, **limits):
    views = sga.decompose(image(), boxes, "x", pixels, **limits)
    return [granularity for granularity, _, _ in views]


MESO, MICRO = (20, 0, 50, 40), (30, 10, 40, 20)


def test_views_show_their_boxes_and_say_their_granularity():
    boxes = {"micro": MICRO, "meso": MESO}
    views = sga.decompose(image(), boxes, "a red cross", 20)
    assert [granularity for granularity, _, _ in views] == [0, 1, 2]
    captions = [caption for _, _, caption in views]
    assert captions == ["macro a red cross", "meso a red cross", "micro a red cross"]
    sides = ((0, 60), (20, 50), (30, 40))
    for (_, view, _), (left, right) in zip(views, sides):
        assert view.shape == (1, 20, 20)
        # The columns in the middle of the view's pixels.
        middles = left - 0.5 + (right - left) * (torch.arange(20) + 0.5) / 20
        assert (view[0, 10, 2:-2] - middles[2:-2]).abs().max() < 0.51


def test_views_show_their_boxes_from_top_to_bottom_too():
    """A second route: rows and columns exchanged, in the image and in its boxes."""
    boxes = {"meso": (20, 4, 50, 36), "micro": (30, 10, 40, 22)}
    turned = {name: (y0, x0, y1, x1) for name, (x0, y0, x1, y1) in boxes.items()}
    views = sga.decompose(image(), boxes, "x", 20)
    of_turned = sga.decompose(image().mT, turned, "x", 20)
    assert len(views) == len(of_turned) == 3
    for (_, view, _), (_, other, _) in zip(views, of_turned):
        assert near(other.mT, view, FLOAT32)
        assert not near(other, view, 0.1)                              # twin: not turned


@pytest.mark.parametrize("boxes, kept", [
    ({}, [0]),
    ({"meso": (0, 0, 58, 40)}, [0]),                                   # nearly the root: IoU .97
    ({"meso": MESO, "micro": (20, 2, 50, 40)}, [0, 1]),                # nearly the meso: IoU .95
    ({"meso": MESO, "micro": (30, 10, 34, 20)}, [0, 1]),               # 4 wide: enlarged 5 times
    ({"meso": MESO, "micro": (30, 10, 38, 20)}, [0, 1, 2]),
    ({"micro": MICRO}, [0, 2]),
])
def test_boxes_that_repeat_or_are_too_small_are_dropped_and_the_root_is_kept(boxes, kept):
    assert granularities(boxes, smallest=4) == kept


def test_the_limits_of_a_box_are_those_of_its_docstring():
    """IoU above 0.8, sides below 8 pixels; a limit itself is allowed."""
    assert granularities({"meso": (0, 0, 47, 40)}) == [0, 1]           # 47 of 60 columns: 0.78
    assert granularities({"meso": (0, 0, 49, 40)}) == [0]              # 0.82
    assert granularities({"meso": (0, 0, 30, 40)}, largest_iou=0.5) == [0, 1]
    assert granularities({"meso": (0, 0, 30, 40)}, largest_iou=0.499) == [0]
    assert granularities({"meso": (0, 0, 8, 40)}) == [0, 1]
    assert granularities({"meso": (0, 0, 7, 40)}) == [0]


def test_the_enlargement_has_a_limit():
    box = {"meso": (20, 10, 30, 20)}
    assert granularities(box, pixels=40) == [0, 1]
    assert granularities(box, pixels=41) == [0]
    assert granularities(box, smallest=10) == [0, 1]
    assert granularities(box, smallest=11) == [0]


@pytest.mark.parametrize("boxes, word", [
    ({"head": (0, 0, 9, 9)}, "'head'"),
    ({"macro": (0, 0, 9, 9)}, "'macro'"),
    ({"meso": (0, 0, 61, 9)}, "outside"),
    ({"meso": (-1, 0, 9, 9)}, "outside"),
    ({"meso": (9, 0, 9, 9)}, "empty"),
    ({"micro": (0, 9, 9, 0)}, "empty"),
    ({"micro": (0, math.nan, 9, 9)}, "empty"),
    ({"micro": (0, 9, 9)}, "x0, y0, x1, y1"),
    ({"micro": torch.zeros(1, 4)}, "x0, y0, x1, y1"),
    ({"meso": "abcd"}, "must be numbers"),
    ({"meso": None}, "must be numbers"),
    ([MESO], "must be a dict"),
])
def test_bad_boxes_are_named(boxes, word):
    with pytest.raises(ValueError, match=word):
        granularities(boxes)


@pytest.mark.parametrize("y0, y1", [(0, 41), (-1, 9), (9, 9)])
def test_a_box_above_or_below_the_image_is_named(y0, y1):
    with pytest.raises(ValueError, match="is empty or reaches outside the image of 60 x 40"):
        granularities({"meso": (0, y0, 9, y1)})


def test_bad_images_and_sizes_are_named():
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        sga.decompose(torch.zeros(4, 4), {}, "x", 20)
    # The shape of other libraries, an image of nothing, and no tensor.
    for wrong in (torch.zeros(40, 60, 3), torch.zeros(3, 0, 0), [[0.0]]):
        with pytest.raises(ValueError, match=r"\(3, H, W\)"):
            sga.decompose(wrong, {}, "x", 20)
    for pixels in (0, 8.5, math.nan, "8"):
        with pytest.raises(ValueError, match="1 pixel or more"):
            granularities({}, pixels=pixels)
    with pytest.raises(ValueError, match="the caption a text"):
        sga.decompose(image(), {}, None, 20)


@pytest.mark.parametrize("limits", [
    {"largest_iou": math.nan}, {"largest_iou": -1}, {"smallest": math.nan}, {"smallest": -1},
    {"enlargement": math.nan}, {"enlargement": 0}])
def test_a_limit_that_no_box_passes_is_refused(limits):
    with pytest.raises(ValueError, match="limits of a box"):
        granularities({"meso": MESO}, **limits)
    assert granularities({"meso": MESO}, largest_iou=math.inf, enlargement=math.inf) == [0, 1]


# --- Tuples ---

# Five roots with K_g of 3, 1, 2, 3, 1.
ROOT = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 4])
GRANULARITY = torch.tensor([0, 1, 2, 0, 0, 2, 0, 1, 2, 0])
ALL_ALIKE = torch.zeros(10, dtype=torch.long)
LABELS = {"root": None, "granularity": GRANULARITY, "any": ALL_ALIKE, "conflict": ALL_ALIKE}


def epochs(labels, seed=0, count=40):
    """So many epochs of tuples, of which views of equal label have traded places."""
    generator, trader = seeded(seed), seeded(seed + 1)
    found = []
    for _ in range(count):
        tuples = sga.root_tuples(ROOT, generator)
        if labels is not None:
            tuples = sga.traded(tuples, labels, trader)
        found.append(tuples)
    return found


def in_words(tuples):
    return [one.tolist() for one in tuples]


def share_of_whole_roots(found):
    """The share of tuples that are exactly the views of one root."""
    whole = [(ROOT == root).nonzero()[:, 0].tolist() for root in range(5)]
    tuples = in_words(itertools.chain(*found))
    return sum(one in whole for one in tuples) / len(tuples)


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_every_epoch_uses_every_view_once_and_is_reproducible(labels):
    found, again, other = epochs(labels), epochs(labels), epochs(labels, seed=1)
    for epoch in found:
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    words = [in_words(epoch) for epoch in found]
    assert words == [in_words(epoch) for epoch in again]
    assert words != [in_words(epoch) for epoch in other]
    # Every epoch has a new order.
    sizes = [[len(one) for one in epoch] for epoch in found]
    assert len(set(map(tuple, sizes))) > 5


def test_tuples_are_never_broken_but_in_the_controls():
    """Eq. 18: who meets in a step."""
    assert share_of_whole_roots(epochs(None)) == 1
    assert share_of_whole_roots(epochs(GRANULARITY)) < 0.7
    assert share_of_whole_roots(epochs(ALL_ALIKE)) < 0.5


def test_the_stratified_control_keeps_the_granularities_and_mixes_the_roots():
    def kinds(found):
        return sorted(GRANULARITY[one].tolist() for one in itertools.chain(*found))

    root, stratified, mixed = epochs(None), epochs(GRANULARITY), epochs(ALL_ALIKE)
    assert kinds(stratified) == kinds(root)
    assert kinds(mixed) != kinds(root)                                 # twin
    mixtures = {tuple(ROOT[one].tolist()) for one in itertools.chain(*stratified)}
    assert mixtures > {(0, 0, 0), (3, 3, 3)}


def test_root_tuples_are_the_batches_of_a_loader():
    views = TensorDataset(ROOT, GRANULARITY)
    loader = DataLoader(views, batch_sampler=sga.root_tuples(ROOT, seeded()))
    batches = list(loader)
    assert sorted(root[0].item() for root, _ in batches) == list(range(5))
    for root, granularity in batches:
        assert root.unique().numel() == 1
        assert torch.equal(granularity, GRANULARITY[ROOT == root[0]])


@pytest.mark.parametrize("root", [[], [0.5], torch.zeros(0, dtype=torch.long), ROOT[:, None],
                                  ROOT.double(), torch.tensor(3)])
def test_tuples_of_nothing_are_refused(root):
    with pytest.raises(ValueError, match="root must be whole numbers"):
        sga.root_tuples(root, seeded())
    for words in (None, "abc", ["a"], {0: 1}):
        with pytest.raises(ValueError, match="root must be"):
            sga.root_tuples(words, seeded())
    assert in_words(sga.root_tuples([7], seeded())) == [[0]]


def test_views_without_a_label_do_not_trade():
    tuples = sga.root_tuples(ROOT, seeded())
    with pytest.raises(ValueError, match="labels for the views 0 to 8"):
        sga.traded(tuples, GRANULARITY[:9], seeded())
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        sga.traded(tuples, [], seeded())
    assert sga.traded([], GRANULARITY, seeded()) == []
    for wrong in (torch.tensor([-1]), torch.tensor([10])):
        with pytest.raises(ValueError, match="views 0 to 9"):
            sga.traded([wrong], GRANULARITY, seeded())
        with pytest.raises(ValueError, match="views 0 to 9"):
            sga.in_conflict([wrong], torch.eye(10))
        with pytest.raises(ValueError, match="views 0 to 9"):
            sga.whole_scenes(wrong, ROOT, GRANULARITY)
        with pytest.raises(ValueError, match="views 0 to 9"):
            sga.one_sga_step(None, None, None, rand(10, 3), rand(10, 1), GRANULARITY, [wrong],
                             None)
    for wrong in ([torch.tensor([0.5])], [torch.tensor(0)], [torch.tensor([[0]])]):
        with pytest.raises(ValueError, match="numbers of its views"):
            sga.traded(wrong, GRANULARITY, seeded())


# --- Weights and the deferred step ---

def test_weights_of_both_scalings():
    """Eq. 18: 1/K_g and 1/K_max."""
    by_root = torch.tensor([1, 1, 1, 3, 1.5, 1.5], dtype=torch.float64) / 9
    by_view = torch.full((6,), 1 / 9, dtype=torch.float64)
    assert near(sga.tuple_weights([3, 1, 2]), by_root)
    assert near(sga.tuple_weights([3, 1, 2], "view"), by_view)
    assert not near(by_root, by_view, within=0.1)                      # twin
    # They differ only where K_g varies.
    assert torch.equal(sga.tuple_weights([3, 3]), sga.tuple_weights([3, 3], "view"))


@pytest.mark.parametrize("arguments, word", [
    (([3, 4],), "1 to 3 views"),
    (([3, 0],), "1 to 3 views"),
    (([3], "tuple"), "scaling"),
    (([],), "1 tuple or more"),
    (([1.5],), "1 tuple or more"),
    ((3,), "1 tuple or more"),
    (("abc",), "must be whole numbers"),
    ((None,), "must be whole numbers"),
    (([3], "view", math.nan), "1 to nan views"),
    (([3], "view", 3.5), "1 to 3.5 views"),
])
def test_bad_weights_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        sga.tuple_weights(*arguments)


def test_small_types_have_room_for_the_weights():
    sizes = torch.full((90,), 3, dtype=torch.uint8)
    a = sga.tuple_weights(sizes)
    assert near(a, torch.full((270,), 1 / 270).double(), FLOAT32)
    assert (90 * sizes).max() < 20                      # twin: 270 is 14 in eight bits


def any_resolution():
    torch.manual_seed(0)
    convolution = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(convolution, nn.Flatten(), nn.Linear(4, 2)).double()


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("scaling", ["root", "view"])
def test_the_deferred_step_is_one_big_step_whatever_the_sub_batches(scaling):
    """Eq. 18, both scalings, against one backward pass and by hand."""
    model = any_resolution()
    small, large = rand(5, 1, 6, 6), rand(3, 1, 9, 9, seed=1)

    def losses(x):
        return (model(x) - 1).square().sum(1)

    a = sga.tuple_weights([3, 2, 3], scaling)
    batches = [(small[:2],), (small[2:],), (large,)]
    sub_batches = list(zip(batches, a.split([2, 3, 3])))
    model.zero_grad()
    value = sga.deferred_backward(losses, sub_batches)
    deferred = gradient(model)
    model.zero_grad()
    each = torch.cat([losses(small), losses(large)])
    (a * each).sum().backward()
    assert near(deferred, gradient(model))
    # By hand: the K_g views of each root averaged, then the roots; or a ninth of the sum.
    by_root = sum(root.mean() for root in each.split([3, 2, 3])) / 3
    by_view = each.sum() / 9
    right, twin = (by_root, by_view) if scaling == "root" else (by_view, by_root)
    assert near(value, right)
    assert not near(value, twin, within=1e-3)


def test_gradients_are_exchanged_with_the_last_sub_batch_only():
    entered = []

    class Quiet:
        def __enter__(self):
            entered.append(len(seen))

        def __exit__(self, *error):
            pass

    seen = []
    weight = torch.ones(1, requires_grad=True)

    def losses(x):
        seen.append(x)
        return weight * x

    one = ((torch.ones(2),), torch.ones(2))
    sga.deferred_backward(losses, [one, one, one], Quiet)
    assert entered == [0, 1] and len(seen) == 3


def test_a_step_of_nothing_and_losses_that_do_not_fit_are_refused():
    def column(x):
        return x[:, None]

    with pytest.raises(ValueError, match="one sub-batch or more"):
        sga.deferred_backward(column, [])
    with pytest.raises(ValueError, match="do not fit weights"):
        sga.deferred_backward(column, [((torch.ones(3),), torch.ones(3))])
    for a in (0.5, [0.5] * 3, torch.tensor(0.5), torch.ones(3, 1), torch.ones(1)):
        with pytest.raises(ValueError, match="do not fit weights"):
            sga.deferred_backward(torch.square, [((torch.ones(3),), a)])
    for answer in (None, 1.0):
        with pytest.raises(ValueError, match="do not fit weights"):
            sga.deferred_backward(lambda x: answer, [((torch.ones(3),), torch.ones(3))])


def six_samples():
    """A network, its inputs, targets and weights, and the interaction matrix of the samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, u = rand(6, 5), rand(6, 4, seed=1)
    a = sga.tuple_weights([3, 1, 2])
    r = (model(x) - u).detach()
    M = ntk.fast_interaction_matrix(model, (x,), r).detach()

    def losses(x, u):
        return (model(x) - u).square().sum(1) / 2

    return model, x, u, a, M, losses


def test_weights_scale_the_interactions():
    """Eq. 21: the inner products of the weighted losses' gradients are a_i a_j M_ij."""
    model, x, u, a, M, losses = six_samples()
    gradients = []
    for i in range(6):
        model.zero_grad()
        one = (x[[i]], u[[i]])
        sga.deferred_backward(losses, [(one, a[[i]])])
        gradients.append(gradient(model))
    G = torch.stack(gradients)
    assert near(G @ G.T, a[:, None] * a * M)
    assert not near(G @ G.T, a * M, within=1e-3)                       # twin: one factor


def slopes(model, losses, step=1e-4):
    """How fast the losses () change along minus the gradient that the model holds."""
    weights, g = parameters_to_vector(model.parameters()).detach(), gradient(model)
    ends = []
    for side in (-1, 1):
        vector_to_parameters(weights - side * step * g, model.parameters())
        ends.append(losses())
    vector_to_parameters(weights, model.parameters())
    return (ends[1] - ends[0]) / (2 * step)


def test_a_weight_enters_a_sample_s_own_loss_once_and_the_weighted_loss_twice():
    """Eq. 21 by small steps both ways; what is left is of order step^2."""
    model, x, u, a, M, losses = six_samples()
    model.zero_grad()
    sga.deferred_backward(losses, [((x, u), a)])

    def own_losses():
        return losses(x, u).detach()

    found = slopes(model, own_losses)
    within = 100 * 1e-4**2
    assert near(found, -(M @ a), within)
    assert near(found.mean(), -(M @ a).mean(), within)
    assert near((a * found).sum(), -(a @ M @ a), within)
    assert not near(found, -a * (M @ a), within=1e-2)                  # twin: two factors
    assert not near(found.mean(), -(a @ M @ a), within=1e-2)


def small_loss(model, x0, e, t, tokens):
    """(n,) that of a linear network, which sees its noise level and its caption."""
    def network(x_t, t, tokens):
        return model(x_t) * t[:, None] + tokens

    return fm.loss(network, x0, e.double(), t, tokens)


def sga_step_by_hand(model, optimizer, x0, tokens, tuples, generator):
    """The mean over the roots of each root's mean loss, and a step along its gradient."""
    model.zero_grad()
    views = torch.cat(tuples)
    t = sga.offset_time(GRANULARITY[views], generator)
    e = torch.randn(len(views), 3, generator=generator)
    each = small_loss(model, x0[views], e, t, tokens[views])
    roots = [root.mean() for root in each.split([len(one) for one in tuples])]
    total = torch.stack(roots).mean()
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total


def test_one_sga_step_is_tuples_offsets_and_one_step():
    """Eq. 18, 19: two steps by hand, with the same random numbers."""
    x0, tokens = rand(10, 3), torch.arange(10)[:, None]
    tuples = sga.root_tuples(ROOT, seeded())
    totals, weights = [], []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(3, 3).double()
        before = model.weight.detach().clone()
        optimizer, generator = torch.optim.SGD(model.parameters(), 0.1), seeded(5)
        for met in (tuples[:3], tuples[3:]):
            if by_hand:
                total = sga_step_by_hand(model, optimizer, x0, tokens, met, generator)
            else:
                total = sga.one_sga_step(model, optimizer, small_loss, x0, tokens,
                                         GRANULARITY, met, generator)
        totals.append(total.detach())
        weights.append(model.weight.detach())
    assert near(totals[0], totals[1]) and near(weights[0], weights[1])
    assert not near(weights[0], before, within=0.01)                   # twin: no step


def test_one_sga_step_wants_a_caption_and_a_granularity_for_each_view():
    with pytest.raises(ValueError, match="10 views, 9 captions and 10 granularities"):
        sga.one_sga_step(None, None, None, rand(10, 3), rand(9, 1), GRANULARITY, [ROOT], None)


# --- Scale ---

def law(granularity, n=200_000, **settings):
    """n sorted noise levels of a granularity, in float64."""
    t = sga.offset_time(torch.full((n,), granularity), seeded(granularity), **settings)
    return t.double().sort().values


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("granularity, mu, median, mean", [
    (0, 0.5, 0.622, 0.602),
    (1, 0.0, 0.5, 0.5),
    (2, -0.5, 0.378, 0.398),
])
def test_time_laws_against_their_closed_form(granularity, mu, median, mean, shift):
    """Eq. 19."""
    t = law(granularity, shift=shift)
    # The shift adds log s to the logit.
    z = torch.logit(t) - math.log(shift)

    def distance(mu):
        """That of Kolmogorov and Smirnov, from a normal law of z with the mean mu."""
        below = (1 + torch.erf((z - mu) / math.sqrt(2))) / 2
        return (below - (torch.arange(len(t)) + 0.5) / len(t)).abs().max()

    assert distance(mu) < 1.63 / math.sqrt(len(t))                     # exceeded in 1% of cases
    assert distance(-mu - 0.1) > 0.02                                  # twin: the wrong sign
    if shift == 1:
        assert abs(t.median() - median) < 0.003
        assert abs(t.mean() - mean) < 0.003


def test_each_sample_gets_the_offset_of_its_granularity():
    mixed = torch.arange(3).repeat(50_000)
    t = sga.offset_time(mixed, seeded(), mean=0.3, std=0.5)
    for granularity in range(3):
        z = torch.logit(t[mixed == granularity])
        assert z.mean() == pytest.approx(0.3 + sga.OFFSETS[granularity], abs=0.01)
        assert z.std() == pytest.approx(0.5, abs=0.01)


def test_the_shift_keeps_the_order_and_the_ends():
    """Eq. 19: the shift adds log s to the logit, and leaves t from 0 to 1, rounding included."""
    granularity = torch.arange(3)
    for shift in (1 / 3, 1.0, 3.0):
        t = sga.offset_time(granularity, seeded(), std=0.0, shift=shift)
        expected = torch.sigmoid(torch.tensor(sga.OFFSETS) + math.log(shift))
        assert near(t, expected, FLOAT32)
        assert not near(t, expected.flip(0), within=0.01)              # twin
        for mean, end in ((-200.0, 0.0), (200.0, 1.0)):
            ends = sga.offset_time(granularity, seeded(), mean=mean, shift=shift)
            assert near(ends, torch.full((3,), end), FLOAT32)
            assert ends.min() >= 0 and ends.max() <= 1


@pytest.mark.parametrize("settings, word", [
    ({"shift": 0.0}, "shift must be positive"), ({"shift": -1.0}, "shift must be positive"),
    ({"shift": math.nan}, "shift must be positive"), ({"shift": math.inf}, "finite"),
    ({"std": -1.0}, "not negative"), ({"std": math.nan}, "not negative"),
    ({"mean": math.nan}, "finite mean"),
    ({"shift": 1e300}, "finite"), ({"mean": 1e300, "std": 1e300}, "finite mean"),
    ({"mean": torch.zeros(3)}, "one number each"), ({"shift": "1"}, "one number each"),
    ({"std": torch.ones(3)}, "one number each"), ({"mean": None}, "one number each"),
    ({"offsets": (math.nan, 0, 0)}, "offsets must be finite"),
    ({"offsets": (math.inf, 0, 0)}, "offsets must be finite"),
    ({"offsets": ()}, "offsets must be finite"), ({"offsets": None}, "offsets must be finite"),
    ({"offsets": 0.5}, "offsets must be finite"), ({"offsets": "abc"}, "offsets must be finite"),
    ({"offsets": [torch.zeros(3)] * 3}, "offsets must be finite"),
    ({"offsets": torch.zeros(3, 1)}, "offsets must be finite"),
    ({"offsets": {0: 0.5, 1: None, 2: 0.0}}, "offsets must be finite"),
    ({"offsets": {"macro": 0.5}}, "labels must be whole numbers, not 'macro'"),
])
def test_a_law_of_t_that_is_none_is_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        sga.offset_time(torch.arange(3), seeded(), **settings)


@pytest.mark.parametrize("gamma", [0, -1, math.nan, math.inf, "a", None, torch.ones(3)])
def test_a_gamma_that_is_none_is_refused(gamma):
    """A negative one would be a negative weight, without a word."""
    for gammas in ((4, 5, gamma), {0: 4.0, 1: gamma, 2: 5.0}):
        for form in ("epsilon", "velocity"):
            with pytest.raises(ValueError, match="gammas must be finite numbers above 0"):
                sga.min_snr_weight(0.1, torch.zeros(3).long(), gammas, form)


def test_offsets_and_gammas_may_be_of_any_kind_of_numbers():
    labels = torch.arange(3)
    right = sga.offset_time(labels, seeded()), sga.min_snr_weight(0.1, labels)
    for kind in (list, torch.tensor, np.array):
        assert torch.equal(sga.offset_time(labels, seeded(), kind(sga.OFFSETS)), right[0])
        assert torch.equal(sga.min_snr_weight(0.1, labels, kind(sga.GAMMAS)), right[1])
    by_label = {np.int64(k): mu for k, mu in enumerate(sga.OFFSETS)}
    assert torch.equal(sga.offset_time(labels, seeded(), by_label), right[0])


def test_half_precision_does_not_lose_a_small_weight():
    """Eq. 20: in float16 the SNR of t = 0.001 is infinite, and the weight would be 0."""
    t = torch.tensor([0.001]).half()
    exact = 4 * (t.double() / (1 - t.double())) ** 2
    assert near(sga.min_snr_weight(t, [0]).double() / exact, torch.ones(1).double(), FLOAT32)
    assert ((1 - t) / t).square().isinf()               # twin


def test_weights_begin_to_act_where_snr_is_gamma():
    """Eq. 20."""
    for granularity, gamma, acts in ((0, 4, 0.333), (1, 5, 0.309), (2, 7, 0.274)):
        edge = 1 / (1 + math.sqrt(gamma))
        assert edge == pytest.approx(acts, abs=6e-4)
        t = torch.tensor([edge / 2, edge - 1e-4, edge + 1e-4, 0.9], dtype=torch.float64)
        w = sga.min_snr_weight(t, torch.full((4,), granularity))
        assert w[0] < w[1] < 1
        assert w[2] == w[3] == 1
        assert w[0] == pytest.approx(gamma / ((1 - t[0]) / t[0]) ** 2)
    # A larger gamma acts later.
    assert sga.min_snr_weight(0.2, torch.arange(3)).diff().min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weight_has_its_limits_at_both_ends(dtype):
    """Eq. 20: the SNR is 0 at t = 1, where 0/0 stood, and infinite at t = 0."""
    tiny = torch.finfo(dtype).eps
    t = torch.tensor([0.0, tiny, 1 - tiny, 1.0], dtype=dtype)
    for granularity in range(3):
        labels = torch.full((4,), granularity)
        epsilon = sga.min_snr_weight(t, labels).tolist()
        velocity = sga.min_snr_weight(t, labels, form="velocity").tolist()
        assert epsilon[0] == 0 and epsilon[2:] == [1, 1]
        assert velocity[0] == velocity[3] == 0
        for w in (epsilon, velocity):
            assert 0 < w[1] < 10 * tiny**2
    # The twin: the fraction as it is written.
    snr = ((1 - t) / t) ** 2
    assert (torch.minimum(snr, torch.tensor(4.0)) / snr).isnan().any()


def test_the_velocity_form_is_the_epsilon_form_carried_over():
    """e_hat - e = (1 - t)(v - u): a weight w on the error of e is w (1 - t)^2 on that of u."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    labels = torch.arange(99) % 3
    x0, e, v = rand(3, 99)
    x_t, u = fm.path(x0, e, t), fm.target(x0, e)
    e_hat = x_t + (1 - t) * v
    assert near(e_hat - e, (1 - t) * (v - u))
    on_e = (e_hat - e) ** 2 * sga.min_snr_weight(t, labels)
    # SNR/(SNR + 1) = (1 - t)^2 / ((1 - t)^2 + t^2). On a path that preserves the variance
    # the last factor is 1.
    on_v = (v - u) ** 2 * sga.min_snr_weight(t, labels, form="velocity")
    assert near(on_e, on_v * ((1 - t) ** 2 + t**2))
    assert not near(on_e, on_v, within=0.01)                           # twin
    with pytest.raises(ValueError, match="epsilon"):
        sga.min_snr_weight(t, labels, form="x0")


@pytest.mark.parametrize("label", [3, -1, 0.5])
def test_a_label_outside_is_refused(label):
    labels = torch.tensor([0, label, 2])
    with pytest.raises(ValueError, match="one of 0..2, not"):
        sga.offset_time(labels, seeded())
    with pytest.raises(ValueError, match="one of 0..2, not"):
        sga.min_snr_weight(torch.full((3,), 0.5), labels)
    assert sga.offset_time([0, 3], seeded(), offsets=(1, 2, 3, 4)).shape == (2,)


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan, math.inf])
def test_a_t_outside_is_refused(t):
    for form in ("epsilon", "velocity"):
        with pytest.raises(ValueError, match="0 <= t <= 1, not"):
            sga.min_snr_weight(torch.tensor([0.5, t]), torch.arange(2), form=form)


@pytest.mark.parametrize("form", ["epsilon", "velocity"])
def test_on_a_gpu_which_does_not_wait_what_is_refused_here_is_nan(form, monkeypatch):
    """Never a weight or an offset of 0, which nobody would notice."""
    monkeypatch.setattr(sga, "_refuse_on_a_cpu", lambda *arguments: None)
    labels = torch.tensor([0, 3, -1, 1, 1, 2])
    t = torch.tensor([0.9, 0.9, 0.1, math.nan, 1.5, 0.1])
    unknown = torch.tensor([False, True, True, True, True, False])
    assert torch.equal(sga.min_snr_weight(t, labels, form=form).isnan(), unknown)
    times = sga.offset_time(labels, seeded())
    assert torch.equal(times.isnan(), (labels < 0) | (labels > 2))


def test_t_and_labels_of_other_shapes_are_refused():
    labels = torch.arange(3)
    right = sga.min_snr_weight(torch.full((3,), 0.25), labels)
    for t in (0.25, torch.tensor(0.25)):
        assert torch.equal(sga.min_snr_weight(t, labels), right)
    for shape in ((3, 1), (1,), (2,)):
        with pytest.raises(ValueError, match="shape of the granularity"):
            sga.min_snr_weight(torch.full(shape, 0.25), labels)
    with pytest.raises(ValueError, match=r"must be \(n,\)"):
        sga.offset_time(labels[:, None], seeded())
    with pytest.raises(ValueError, match="they must be on one device"):
        sga.offset_time(labels.to("meta"), seeded())


def levels_of(roots=4):
    """Granularity and t of samples at every granularity and three noise levels, of each root."""
    levels = torch.tensor([0.2, 0.5, 0.8]).double()
    pairs = torch.cartesian_prod(torch.arange(3.0).double(), levels).repeat(roots, 1)
    return pairs[:, 0].long(), pairs[:, 1].contiguous()


def test_measured_offsets_are_those_of_the_gradients_themselves():
    """Eq. 12, 19: from the gradients, of which M holds the inner products."""
    granularity, t = levels_of()
    G = rand(36, 50) + 0.1                                             # (N, P)
    mean, by_hand = G.mean(0), []
    for index in range(3):
        total = weights = 0.0
        for level in (0.2, 0.5, 0.8):
            own = (granularity == index) & (t == torch.tensor(level).double())
            cosine = torch.cosine_similarity(G[own].mean(0), mean, 0).clamp(min=0)
            total += cosine * math.log(level / (1 - level))
            weights += cosine
        by_hand.append(total / weights)
    by_hand = torch.stack(by_hand)
    # The levels are rounded as float32 numbers.
    assert near(sga.measured_offsets(G @ G.T, granularity, t), by_hand, FLOAT32)
    exchanged = sga.measured_offsets(G @ G.T, 2 - granularity, t)
    assert not near(exchanged, by_hand, within=1e-2)                   # twin


def test_measured_offsets_lean_to_where_the_gradients_agree():
    granularity, t = levels_of()
    at_noise = (granularity == 0) & (t > 0.7)
    at_data = (granularity == 2) & (t < 0.3)
    helps = at_noise | (granularity == 1) | at_data
    # One parameter: all of the others hurt a little.
    G = torch.where(helps, 1.0, -0.1).double()[:, None]                # (N, P)
    measured = sga.measured_offsets(G @ G.T, granularity, t)
    expected = torch.tensor([math.log(4), 0.0, -math.log(4)], dtype=torch.float64)
    assert near(measured, expected, FLOAT32)


def test_a_granularity_that_helps_nowhere_or_has_no_samples_has_the_offset_0():
    """One parameter: the granularity 0 helps at 0.8, 1 hurts at every level, 2 is absent."""
    granularity = torch.tensor([0, 0, 1, 1])
    t = torch.tensor([0.2, 0.8, 0.2, 0.8]).double()
    g = torch.tensor([-1.0, 9.0, -1.0, -2.0]).double()                 # their mean is above 0
    mu = sga.measured_offsets(g[:, None] * g, granularity, t)
    assert near(mu, torch.tensor([math.log(4), 0.0, 0.0]).double(), FLOAT32)
    mu = sga.measured_offsets(g[:, None] * g, 1 - granularity, t)      # twin: exchanged
    assert near(mu, torch.tensor([0.0, math.log(4), 0.0]).double(), FLOAT32)


def test_measured_offsets_of_what_does_not_fit_are_refused():
    granularity, t = levels_of()
    M = torch.eye(36, dtype=torch.float64)
    shapes = [(M[:5], granularity, t), (M, granularity[:5], t), (M, granularity, t[:, None])]
    values = [(M, granularity + 1, t), (M, granularity, t + 0.2), (M, granularity, t * math.nan)]
    for arguments in shapes:
        with pytest.raises(ValueError, match=r"M must be \(N, N\)"):
            sga.measured_offsets(*arguments)
    values += [(M, granularity + 0.5, t), (M, torch.full((36,), math.nan), t)]
    for arguments in values:
        with pytest.raises(ValueError, match="0 < t < 1"):
            sga.measured_offsets(*arguments)
    shapes = [(M, granularity, 0.5), (M[:0, :0], granularity[:0], t[:0]), (3.0, 1, 0.5)]
    for arguments in shapes:
        with pytest.raises(ValueError, match=r"M must be \(N, N\)"):
            sga.measured_offsets(*arguments)
    for M in (M * math.nan, M.float() * 3e38 + 3e38):
        with pytest.raises(ValueError, match="M must be finite"):
            sga.measured_offsets(M, granularity, t.to(M))


def test_measured_offsets_do_not_depend_on_the_unit_of_the_gradients(monkeypatch):
    granularity, t = levels_of()
    G = rand(36, 50).float() + 0.1                                     # (N, P)
    M, t = G @ G.T, t.float()
    expected = sga.measured_offsets(M, granularity, t)
    for scale in (1e-36, 1e-12, 1e12):
        assert near(sga.measured_offsets(M * scale, granularity, t), expected, 1e-4)
    other = sga.measured_offsets((M * 1e3).long(), granularity.tolist(), t.tolist())
    assert near(other, expected, 1e-2)                                 # of other types
    # The twin: a bound below which all lengths are alike.
    monkeypatch.setattr(torch, "finfo", lambda kind: SimpleNamespace(tiny=1e-30))
    assert not near(sga.measured_offsets(M * 1e-36, granularity, t), expected, 1e-2)


# --- The arms ---

def stream(labels, seed):
    """The tuples of a plan without end, once more, from the same random numbers."""
    generator, trader = seeded(seed), seeded(seed + 1)
    while True:
        place = list(range(10))
        for label in ([] if labels is None else labels.unique()):
            equal = (labels == label).nonzero()[:, 0].tolist()
            order = torch.randperm(len(equal), generator=trader).tolist()
            for old, new in zip(equal, order):
                place[old] = equal[new]
        for root in torch.randperm(5, generator=generator).tolist():
            yield [place[view] for view in range(10) if ROOT[view] == root]


def plan(name, model="dit", tuples=3, steps=8, seed=4):
    return sga.plan(ROOT, GRANULARITY, sga.method(name, model), tuples, steps, seed)


PLAIN = [name for name, arm in sga.ARMS.items() if not arm.whole and arm.join == 1]


@pytest.mark.parametrize("name", PLAIN)
def test_a_plan_is_made_of_whole_tuples_and_of_the_same_random_numbers(name):
    arm = sga.method(name, "dit")
    tuples = stream(LABELS[arm.meet], seed=4)
    for views, a in plan(name):
        met = list(itertools.islice(tuples, 3))
        assert views.tolist() == [view for one in met for view in one]
        if arm.weigh == "step":
            assert torch.equal(a, torch.ones(len(views)) / len(views))
        else:
            sizes = [len(one) for one in met]
            assert torch.equal(a, sga.tuple_weights(sizes, arm.weigh))


def test_every_arm_has_as_many_images_and_weight_one_in_a_step():
    images = {sum(len(views) for views, _ in plan(name)) for name in sga.ARMS}
    assert len(images) == 1
    for name in sga.ARMS:
        sums = torch.tensor([a.sum() for _, a in plan(name)])
        if sga.ARMS[name].weigh == "view":
            assert sums.max() < 1                                      # the views that are missing
        else:
            assert (sums - 1).abs().max() < FLOAT32


def test_the_arm_big_is_three_steps_in_one_and_whole_shows_whole_scenes():
    small, big = plan("baseline"), plan("big")
    assert len(big) == 3
    for k, (views, a) in enumerate(big):
        three_views, three_a = zip(*small[3 * k:3 * k + 3])
        assert torch.equal(views, torch.cat(three_views))
        assert torch.equal(a, torch.cat(three_a) / len(three_a))
    for (whole, a), (views, b) in zip(plan("whole"), small):
        assert torch.equal(ROOT[whole], ROOT[views])
        assert torch.equal(a, b)
        assert GRANULARITY[whole].max() == 0


def products_within(tuples, products):
    """The sum of the products of two different views that meet."""
    total = 0.0
    for one in tuples:
        for i, j in itertools.permutations(one.tolist(), 2):
            total += products[i, j].item()
    return total


def test_no_trade_of_two_views_makes_the_tuples_in_conflict_quieter():
    """Eq. 23: by trying every trade."""
    G = rand(10, 6)
    products, tuples = G @ G.T, sga.root_tuples(ROOT, seeded(0))
    met = sga.in_conflict(tuples, products)
    assert [len(one) for one in met] == [len(one) for one in tuples]
    assert sorted(torch.cat(met).tolist()) == list(range(10))
    least = products_within(met, products)
    assert least < products_within(tuples, products)

    def smallest_after_a_trade(tuples):
        views, sizes, found = torch.cat(tuples), [len(one) for one in tuples], []
        for i, j in itertools.combinations(range(10), 2):
            traded = views.clone()
            traded[i], traded[j] = views[j], views[i]
            found.append(products_within(traded.split(sizes), products))
        return min(found)

    assert smallest_after_a_trade(met) >= least - 1e-9
    assert smallest_after_a_trade(tuples) < products_within(tuples, products)  # twin


def test_views_that_undo_each_other_meet():
    # The views 0 and 9 pull in opposite directions, and so do 1 and 8, 2 and 7, ...
    products = torch.eye(10).double() - torch.eye(10).double().flip(0)
    pairs = list(torch.arange(10).split(2))
    met = sga.in_conflict(pairs, products)
    assert sorted(sorted(one.tolist()) for one in met) == [[k, 9 - k] for k in range(5)]


def test_the_quiet_arm_shows_every_view_equally_often_and_makes_less_noise():
    """Eq. 23: the same expected gradient as the baseline's, and a smaller expected square."""
    G = rand(10, 6)
    M = G @ G.T

    def noise(products):
        """Of the steps of one tuple each, in 40 epochs."""
        steps = sga.plan(ROOT, GRANULARITY, sga.ARMS["quiet"], 1, 200, 4, products)
        a = torch.zeros(200, 10).double()
        for k, (views, weights) in enumerate(steps):
            a[k, views] = weights.double()
        return a.mean(0), ntk.step_noise(M, a)

    usual, (square, mean) = noise(None)
    quiet, (quiet_square, quiet_mean) = noise(M)
    assert near(quiet, usual, FLOAT32) and near(quiet_mean, mean, FLOAT32)
    assert quiet.max() - quiet.min() < FLOAT32                         # every view weighs the same
    assert quiet_square < square
    with pytest.raises(ValueError, match=r"products must be \(V, V\) for V views"):
        noise(M[:5, :5])


def test_a_view_is_a_root_at_a_granularity_and_small_objects_have_no_micro_view():
    root, granularity = sga.all_views(torch.tensor([0.3, 0.1]), 0.2)
    assert root.tolist() == [0, 0, 0, 1, 1] and granularity.tolist() == [0, 1, 2, 0, 1]
    assert len(sga.all_views(torch.tensor([0.3, 0.1]))[0]) == 6
    assert torch.equal(sga.all_views([0.3, 0.1], 0.2)[0], root)
    for sizes, smallest in (([0.3, math.nan], 0.2), ([0.3], math.nan), ([[0.3]], 0.2), (0.3, 0.2)):
        with pytest.raises(ValueError, match="sizes must be"):
            sga.all_views(torch.tensor(sizes), smallest)


def test_an_object_of_the_smallest_size_has_a_micro_view():
    assert sga.all_views(torch.tensor([0.25, 0.125]), 0.25)[1].tolist() == [0, 1, 2, 0, 1]


def test_a_root_without_a_whole_scene_has_none_to_show():
    assert sga.whole_scenes(torch.tensor([2, 9]), ROOT, GRANULARITY).tolist() == [0, 9]
    without = torch.where(ROOT == 1, 1, GRANULARITY)
    with pytest.raises(ValueError, match="one macro view"):
        sga.whole_scenes(torch.tensor([3]), ROOT, without)


def test_the_method_scales_as_suits_the_network():
    dit, unet = sga.method("sga", "dit"), sga.method("sga", "unet")
    assert dit.offsets == sga.OFFSETS and not dit.min_snr
    assert unet.offsets == (0, 0, 0) and unet.min_snr
    assert dit.meet == unet.meet == "root"
    assert sga.method("flipped", "unet").offsets == tuple(-mu for mu in sga.OFFSETS)
    with pytest.raises(ValueError, match="no arm 'best'; the arms are baseline"):
        sga.method("best", "dit")
    with pytest.raises(ValueError, match="the model must be"):
        sga.method("sga", "cnn")


def test_a_plan_of_no_tuples_is_refused():
    with pytest.raises(ValueError, match="1 tuple or more"):
        plan("sga", tuples=0)
    assert plan("sga", steps=0) == []
    for tuples in (0.5, 1.5, math.nan, math.inf, None):
        with pytest.raises(ValueError, match="1 tuple or more"):
            plan("sga", tuples=tuples)
    for steps in (-1, 2.5, math.nan, math.inf):         # inf would go on for ever
        with pytest.raises(ValueError, match="steps must be a whole number"):
            plan("sga", steps=steps)


def test_a_plan_of_what_does_not_fit_is_refused():
    for arm in ("sga", sga.Arm(meet="roots"), sga.Arm(join=0), sga.Arm(join=-1), sga.Arm(join=1.5)):
        with pytest.raises(ValueError, match="the arm must be an Arm"):
            sga.plan(ROOT, GRANULARITY, arm, 1, 2, 0)
    for granularity in (GRANULARITY[:3], torch.zeros(11).long()):
        with pytest.raises(ValueError, match="each view has a root and a granularity"):
            sga.plan(ROOT, granularity, sga.Arm(), 1, 2, 0)
        with pytest.raises(ValueError, match="each view has a root and a granularity"):
            sga.whole_scenes([0], ROOT, granularity)
    listed = sga.plan(ROOT.tolist(), GRANULARITY.tolist(), sga.Arm(), 1, 2, 0)
    assert len(listed) == 2


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_not_finite_do_not_choose_who_meets(wrong):
    products = torch.eye(10)
    products[3, 4] = wrong
    with pytest.raises(ValueError, match="must be finite"):
        sga.in_conflict([torch.arange(5), torch.arange(5, 10)], products)
    for other in (torch.eye(10).long(), torch.eye(10).tolist(), torch.ones(10), torch.eye(9)):
        with pytest.raises(ValueError, match=r"products must be \(V, V\)"):
            sga.plan(ROOT, GRANULARITY, sga.ARMS["quiet"], 1, 2, 0, other)


def test_the_demo_prints_in_the_order_of_the_derivation(capsys):
    sga.main()
    printed = capsys.readouterr().out
    places = [printed.index(name) for name in ("Algorithm 1", "Eq. 18", "Eq. 19", "Eq. 20")]
    assert places == sorted(places)
    assert "python results/figures.py" in printed
