"""Each intervention of SGA against a closed form, a second route, or a count; and twins that break what is tested."""

import itertools
import math

import pytest
import torch
from torch import nn

import ntk
import sga

ALL = torch.arange(3)


# --- views ---

def image():
    """(1, 40, 60) whose value at a pixel is its column."""
    return torch.arange(60.0).expand(1, 40, 60)


def test_views_show_their_boxes_and_say_their_granularity():
    views = sga.decompose(image(), {"micro": (30, 10, 40, 20), "meso": (20, 0, 50, 40)}, "a red cross", 20)
    assert [g for g, *_ in views] == [0, 1, 2]
    assert [caption for *_, caption in views] == ["macro a red cross", "meso a red cross", "micro a red cross"]
    for (_, view, _), (left, right) in zip(views, ((0, 60), (20, 50), (30, 40))):
        assert view.shape == (1, 20, 20)
        middles = left - 0.5 + (right - left) * (torch.arange(20) + 0.5) / 20      # columns of the view's pixels
        assert (view[0, 10, 2:-2] - middles[2:-2]).abs().max() < 0.51


@pytest.mark.parametrize("boxes, kept", [
    ({}, [0]),
    ({"meso": (0, 0, 58, 40)}, [0]),                                       # nearly the root: IoU .97
    ({"meso": (20, 0, 50, 40), "micro": (20, 2, 50, 40)}, [0, 1]),         # nearly the meso: IoU .95
    ({"meso": (20, 0, 50, 40), "micro": (30, 10, 34, 20)}, [0, 1]),        # 4 pixels wide: enlarged 5 times
    ({"meso": (20, 0, 50, 40), "micro": (30, 10, 38, 20)}, [0, 1, 2]),
    ({"micro": (30, 10, 38, 20)}, [0, 2]),
])
def test_boxes_that_repeat_or_are_too_small_are_dropped_and_the_root_is_kept(boxes, kept):
    assert [g for g, *_ in sga.decompose(image(), boxes, "x", 20, smallest=4)] == kept


def test_the_enlargement_has_a_limit():
    box = {"meso": (20, 10, 30, 20)}
    assert [len(sga.decompose(image(), box, "x", pixels)) for pixels in (40, 41)] == [2, 1]
    assert [len(sga.decompose(image(), box, "x", 20, smallest=n)) for n in (10, 11)] == [2, 1]


@pytest.mark.parametrize("boxes, word", [
    ({"head": (0, 0, 9, 9)}, "'head'"), ({"macro": (0, 0, 9, 9)}, "'macro'"), ({"meso": (0, 0, 61, 9)}, "outside"),
    ({"meso": (-1, 0, 9, 9)}, "outside"), ({"meso": (9, 0, 9, 9)}, "empty"), ({"micro": (0, 9, 9, 0)}, "empty"),
    ({"micro": (0, math.nan, 9, 9)}, "empty"),
])
def test_bad_boxes_are_named(boxes, word):
    with pytest.raises(ValueError, match=word):
        sga.decompose(image(), boxes, "x", 20)


def test_an_image_without_channels_is_named():
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        sga.decompose(torch.zeros(4, 4), {}, "x", 20)


# --- tuples ---

ROOT = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 4])                        # K_g of 3, 1, 2, 3, 1
GRANULARITY = torch.tensor([0, 1, 2, 0, 0, 2, 0, 1, 2, 0])


def drawn(trade, n=5 * 40, seed=0):
    return list(itertools.islice(sga.root_tuples(ROOT, torch.Generator().manual_seed(seed), trade), n))


def whole_tuples(tuples):
    """The share of tuples that are exactly the views of one root."""
    return sum(any(k.tolist() == (ROOT == g).nonzero()[:, 0].tolist() for g in range(5)) for k in tuples) / len(tuples)


@pytest.mark.parametrize("trade", [None, GRANULARITY, torch.zeros(10, dtype=torch.long)])
def test_every_epoch_uses_every_view_once_and_is_reproducible(trade):
    tuples = drawn(trade)
    for epoch in range(40):
        assert sorted(torch.cat(tuples[5 * epoch:5 * epoch + 5]).tolist()) == list(range(10))
    again, other = drawn(trade), drawn(trade, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(tuples, again))
    assert [k.tolist() for k in tuples] != [k.tolist() for k in other]
    assert len({tuple(len(k) for k in tuples[5 * e:5 * e + 5]) for e in range(40)}) > 5    # a new order every epoch


def test_tuples_are_never_broken_but_in_the_controls():
    """Eq. 18: who meets in a step."""
    assert whole_tuples(drawn(None)) == 1
    assert whole_tuples(drawn(GRANULARITY)) < 0.7
    assert whole_tuples(drawn(torch.zeros(10, dtype=torch.long))) < 0.5


def test_the_stratified_control_keeps_the_granularities_and_mixes_the_roots():
    kinds = lambda tuples: sorted(tuple(GRANULARITY[k].tolist()) for k in tuples)
    stratified, mixed = drawn(GRANULARITY), drawn(torch.zeros(10, dtype=torch.long))
    assert kinds(stratified) == kinds(drawn(None))
    assert kinds(mixed) != kinds(stratified)
    assert {tuple(ROOT[k].tolist()) for k in stratified} > {(0, 0, 0), (3, 3, 3)}  # and other mixtures


def test_weights_of_both_scalings():
    """Eq. 18: 1/K_g and 1/K_max."""
    assert torch.allclose(sga.tuple_weights([3, 1, 2]), torch.tensor([1, 1, 1, 3, 1.5, 1.5]).double() / 9)
    assert torch.allclose(sga.tuple_weights([3, 1, 2], "view"), torch.full((6,), 1 / 9).double())
    assert torch.equal(sga.tuple_weights([3, 3]), sga.tuple_weights([3, 3], "view"))     # they differ only if K_g varies
    assert sga.tuple_weights([3, 1, 2]).sum() == pytest.approx(1)


@pytest.mark.parametrize("arguments", [([3, 4],), ([3], "tuple")])
def test_bad_weights_are_named(arguments):
    with pytest.raises(ValueError, match="scaling"):
        sga.tuple_weights(*arguments)


@pytest.mark.parametrize("scaling", ["root", "view"])
def test_the_deferred_step_is_one_big_step_whatever_the_sub_batches(scaling):
    """Eq. 18, both scalings, against one backward pass and by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()   # any resolution
    small, large = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randn(3, 1, 9, 9, dtype=torch.float64)
    losses, a = lambda x: (model(x) - 1).square().sum(1), sga.tuple_weights([3, 2, 3], scaling)
    grad = lambda: torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    value = sga.deferred_backward(losses, [((small[:2],), a[:2]), ((small[2:],), a[2:5]), ((large,), a[5:])])
    parts = grad()
    model.zero_grad()
    whole = (a[:5] * losses(small)).sum() + (a[5:] * losses(large)).sum()
    whole.backward()
    assert (parts - grad()).abs().max() < 1e-15 and abs(value - whole.item()) < 1e-14
    # by hand: K_g views of each root averaged, then the roots; and a twin with the other scaling
    by_root = lambda l: (l[:3].mean() + l[3:5].mean() + l[5:].mean()) / 3
    l = torch.cat([losses(small), losses(large)])
    assert abs(value - by_root(l)) < 1e-14 if scaling == "root" else abs(value - by_root(l)) > 1e-3
    assert abs(value - l.sum() / 9) < 1e-14 if scaling == "view" else abs(value - l.sum() / 9) > 1e-3


# --- scale ---

def law(g, n=200000, **settings):
    return sga.offset_time(torch.full((n,), g), torch.Generator().manual_seed(g), **settings).double()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("g, mu, median, mean", [(0, 0.5, 0.622, 0.602), (1, 0.0, 0.5, 0.5), (2, -0.5, 0.378, 0.398)])
def test_time_laws_against_their_closed_form(g, mu, median, mean, shift):
    """Eq. 19."""
    t = law(g, shift=shift).sort().values
    z = torch.logit(t) - math.log(shift)                                   # the shift adds log s to the logit
    cdf = (1 + torch.erf((z - mu) / 2**0.5)) / 2
    distance = lambda F: (F - (torch.arange(len(t)) + 0.5) / len(t)).abs().max()
    assert distance(cdf) < 1.63 / len(t) ** 0.5                            # Kolmogorov-Smirnov, 1%
    assert distance((1 + torch.erf((z + mu + 0.1) / 2**0.5)) / 2) > 0.02   # the wrong sign, or another law
    if shift == 1:
        assert abs(t.median() - median) < 0.003 and abs(t.mean() - mean) < 0.003


def test_each_sample_gets_the_offset_of_its_granularity():
    mixed = ALL.repeat(50000)
    t = sga.offset_time(mixed, torch.Generator().manual_seed(0), mean=0.3, std=0.5)
    for g in range(3):
        assert torch.logit(t[mixed == g]).mean() == pytest.approx(0.3 + sga.OFFSETS[g], abs=0.01)
        assert torch.logit(t[mixed == g]).std() == pytest.approx(0.5, abs=0.01)


def test_weights_begin_to_act_where_snr_is_gamma():
    """Eq. 20."""
    for g, (gamma, acts) in enumerate(zip((4, 5, 7), (0.333, 0.309, 0.274))):
        edge = 1 / (1 + gamma**0.5)
        assert edge == pytest.approx(acts, abs=6e-4)
        t = torch.tensor([edge / 2, edge - 1e-4, edge + 1e-4, 0.9, 1.0], dtype=torch.float64)
        w = sga.min_snr_weight(t, torch.full((5,), g))
        assert w[0] < w[1] < 1 and torch.equal(w[2:4], torch.ones(2).double())
        assert w[0] == pytest.approx(gamma / ((1 - t[0]) / t[0]) ** 2)
    assert sga.min_snr_weight(torch.full((3,), 0.2), ALL).diff().min() > 0     # a larger gamma acts later


def test_the_velocity_form_is_the_epsilon_form_carried_over():
    """e_hat - e = (1 - t)(v - u) for x_t = (1 - t) x0 + t e: a weight w on the error of e is w (1 - t)^2 on that of u."""
    t, g = torch.linspace(0.01, 0.99, 99, dtype=torch.float64), torch.arange(99) % 3
    x0, e, v = torch.randn(3, 99, dtype=torch.float64)
    x_t, u = (1 - t) * x0 + t * e, e - x0
    e_hat, x0_hat = x_t + (1 - t) * v, x_t - t * v
    assert torch.allclose(e_hat - e, (1 - t) * (v - u))
    snr = ((1 - t) / t) ** 2
    gamma = torch.tensor(sga.GAMMAS, dtype=torch.float64)[g]
    on_e = (e_hat - e) ** 2 * torch.minimum(snr, gamma) / snr
    # SNR / (SNR + 1) = (1 - t)^2 / ((1 - t)^2 + t^2): the weight on u, up to the factor (1 - t)^2 + t^2 of a variance-preserving path
    assert torch.allclose(on_e, (v - u) ** 2 * sga.min_snr_weight(t, g, form="velocity") * ((1 - t) ** 2 + t**2))
    with pytest.raises(ValueError, match="epsilon"):
        sga.min_snr_weight(t, g, form="x0")


def levels_of(roots=4):
    """Granularity and t of samples at every granularity and three levels, in the order of root, granularity, t."""
    granularity, t = torch.cartesian_prod(torch.arange(3.0).double(), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).repeat(roots, 1).T.contiguous()
    return granularity.long(), t


def test_measured_offsets_are_those_of_the_gradients_themselves():
    granularity, t = levels_of()
    G = torch.randn(36, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1      # (N, P)
    by_hand = []
    for g in range(3):
        cosines = [torch.cosine_similarity(G[(granularity == g) & (t == level)].mean(0), G.mean(0), 0).clamp(min=0) for level in (0.2, 0.5, 0.8)]
        by_hand.append(sum(c * math.log(level / (1 - level)) for c, level in zip(cosines, (0.2, 0.5, 0.8))) / sum(cosines))
    measured = sga.measured_offsets(G @ G.T, granularity, t)
    assert (measured - torch.stack(by_hand)).abs().max() < 1e-12
    twin = sga.measured_offsets(G @ G.T, 2 - granularity, t)               # the granularities the wrong way round
    assert (twin - torch.stack(by_hand)).abs().max() > 1e-2


def test_measured_offsets_lean_to_where_the_gradients_agree():
    granularity, t = levels_of()
    helps = (granularity == 0) & (t == 0.8) | (granularity == 1) | (granularity == 2) & (t == 0.2)
    G = torch.where(helps, 1.0, -0.1).double()[:, None]                    # one parameter: all of the others hurt a little
    measured = sga.measured_offsets(G @ G.T, granularity, t)
    assert torch.allclose(measured, torch.tensor([math.log(4), 0.0, -math.log(4)], dtype=torch.float64), atol=1e-7)


def test_weights_scale_the_interactions():
    """Eq. 21: the kernel of the weighted losses' gradients is a_i a_j M_ij."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, u, a = torch.randn(6, 5).double(), torch.randn(6, 4).double(), sga.tuple_weights([3, 1, 2])
    grads = []
    for i in range(6):
        model.zero_grad()
        sga.deferred_backward(lambda x, u: (model(x) - u).square().sum(1) / 2, [((x[i:i + 1], u[i:i + 1]), a[i:i + 1])])
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    G = torch.stack(grads)
    M = ntk.fast_interaction_matrix(model, (x,), (model(x) - u).detach()).detach()
    assert (G @ G.T - a[:, None] * a * M).abs().max() < 1e-12 * M.abs().max()
    assert (G @ G.T - a[:, None] * M).abs().max() > 1e-2 * M.abs().max()


def test_demo_draws(tmp_path, capsys):
    sga.main(str(tmp_path / "sga.png"))
    assert (tmp_path / "sga.png").stat().st_size > 10000
    assert "Eq. 19" in capsys.readouterr().out
