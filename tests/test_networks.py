"""The two networks: one signature, samples that do not meet, conditions that matter, torch.func."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import dit
import unet

EPS = torch.finfo(torch.float64).eps


def small_dit(**more):
    return dit.DiT(20, 8, 4, 16, 2, 2, **more)


def small_unet(**more):
    return unet.UNet(20, 8, (8, 16, 24), 24, 2, **more)


NETWORKS = {"dit": small_dit, "unet": small_unet}


@pytest.fixture(params=NETWORKS)
def model(request):
    """A small network in float64, away from its zero start."""
    torch.manual_seed(0)
    return woken(NETWORKS[request.param]().double())


def woken(network):
    """The network with small random weights where all are zero."""
    for weight in network.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.2)
    return network


@pytest.fixture
def batch():
    """x, t, tokens of four samples."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.rand(4, generator=generator, dtype=torch.float64)
    return x, t, torch.randint(1, 20, (4, 5), generator=generator)


def alone(model, weights, *sample):
    """The velocity of one sample, as torch.func wants it: a function of the weights."""
    return functional_call(model, weights, tuple(z[None] for z in sample))[0]


def close(a, b):
    """Equal to the rounding of a few thousand operations in float64."""
    return (a - b).abs().max() < 10_000 * EPS * b.abs().max()


def largest(difference):
    """(N,) the largest change of each sample."""
    return difference.abs().amax((1, 2, 3))


# --- Parts ----------------------------------------------------------------------------------------

def test_unpatchify_undoes_patchify():
    x = torch.randn(2, 3, 12, 12)
    patches = dit.patchify(x, 4)
    assert patches.shape == (2, 9, 48)
    assert torch.equal(dit.unpatchify(patches, 4), x)
    # Row by row: the sixth patch is in row 1, column 2.
    assert torch.equal(patches[:, 5], x[:, :, 4:8, 8:12].flatten(1))
    assert not torch.equal(dit.unpatchify(patches.flip(1), 4), x)           # twin: another order


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    q = torch.randn(2, 5, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 7, 8, dtype=torch.float64)

    def in_heads(z):
        return z.view(2, -1, 4, 2).transpose(1, 2)

    by_torch = nn.functional.scaled_dot_product_attention(in_heads(q), in_heads(k), in_heads(v))
    reference = by_torch.transpose(1, 2).reshape(2, 5, 8)
    assert close(dit.attend(q, k, v, 4), reference)
    assert not close(dit.attend(q, k, v, 2), reference)           # twin: other heads


def test_the_waves_are_as_long_as_it_says():
    """For a width of 8 they are 2 pi, 20 pi, 200 pi and 2,000 pi; 20,000 pi is never reached."""
    length = 2 * torch.pi * torch.tensor([1, 10, 100, 1000]).double()
    for part, sine, cosine in ((1.0, 0, 1), (0.5, 0, -1), (0.25, 1, 0)):
        waves = dit.sinusoid(part * length, 8)          # (4, 8)
        sines, cosines = waves[:, :4].diagonal(), waves[:, 4:].diagonal()
        assert (sines - sine).abs().max() < 1e-5 and (cosines - cosine).abs().max() < 1e-5
    longer = dit.sinusoid(1.1 * length, 8)[:, :4].diagonal()
    assert longer.min() > 0.5                           # twin


def read(module):
    return Path(module.__file__).read_text(encoding="utf-8")


def top_level(source):
    """{name: lines} of the functions and classes of a module."""
    lines = source.splitlines()
    nodes = [node for node in ast.parse(source).body if hasattr(node, "name")]
    return {node.name: lines[node.lineno - 1:node.end_lineno] for node in nodes}


def test_what_stands_in_both_files_is_the_same():
    source, other = read(dit), read(unet)
    shared = top_level(source).keys() & top_level(other).keys() - {"main"}
    assert shared >= {"with_defaults", "sinusoid", "attend", "TextBlock", "TextEncoder",
                      "TimeEncoder"}

    def different(source):
        return {name for name in shared if top_level(source)[name] != top_level(other)[name]}

    assert different(source) == set()
    assert different(source.replace("1000 * t", "999 * t")) == {"TimeEncoder"}  # twin


# --- Both networks --------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NETWORKS)
def test_the_velocity_starts_at_zero_and_has_the_shape_of_x(name, batch):
    x, t, tokens = batch
    velocity = NETWORKS[name]().double()(x, t, tokens)
    assert velocity.shape == x.shape and not velocity.any()


def test_blocks_start_as_the_identity():
    """adaLN-zero, and zero() of the U-Net."""
    torch.manual_seed(0)
    words, condition = torch.randn(3, 5, 8), torch.randn(3, 8)
    for part, shape in ((dit.Block(8, 2), (3, 4, 8)), (unet.Level(8, 8, 8, 2), (3, 8, 2, 2))):
        x = torch.randn(shape)
        assert torch.equal(part(x, words, condition), x)
        assert (woken(part)(x, words, condition) - x).abs().max() > 0.1   # twin


def test_a_sample_does_not_depend_on_its_batch(model, batch):
    together = model(*batch)
    weights = dict(model.named_parameters())
    by_vmap = vmap(lambda *sample: alone(model, weights, *sample))(*batch)
    assert close(by_vmap, together)
    for i in range(4):
        assert close(model(*(z[i:i + 1] for z in batch))[0], together[i])
    twin = model(*(z.flip(0) for z in batch))           # the samples differ
    assert not close(twin, together)


def test_batch_norm_would_be_noticed(batch):
    torch.manual_seed(0)
    model = woken(small_unet().double())
    model.norm = nn.BatchNorm2d(8).double()             # twin: it couples samples
    assert not close(model(*(z[:1] for z in batch))[0], model(*batch)[0])


def test_captions_steer_the_velocity(model, batch):
    x, t, tokens = batch
    velocity = model(x, t, tokens)
    one_word = tokens.clone()
    one_word[:, 2] = tokens[:, 2] % 19 + 1
    null = torch.zeros_like(tokens)
    for other in (one_word, tokens.flip(1), null):      # the order matters too
        assert (largest(model(x, t, other) - velocity) > 1e-4).all()
    assert torch.equal(model(x, t, tokens.clone()), velocity)     # twin: the same caption


def test_every_weight_has_a_say(model, batch):
    """No layer is built and then left out: words reach the image by attention, not only by mean."""
    model(*batch).square().sum().backward()
    silent = [name for name, weight in model.named_parameters()
              if weight.grad is None or weight.grad.abs().max() < 1e-12]
    # A norm or a softmax may undo a bias.
    assert not [name for name in silent if not name.endswith("bias")], silent


@pytest.mark.parametrize("axis", [2, 3])
def test_a_patch_knows_its_row_and_its_column(batch, axis):
    """Without positions, patches that trade places do no more than that."""
    torch.manual_seed(0)
    model = woken(small_dit().double())
    x, t, tokens = batch

    def trade(z):
        """The 2 x 2 patches change their rows, or their columns."""
        return z.roll(4, axis)

    assert (largest(trade(model(x, t, tokens)) - model(trade(x), t, tokens)) > 1e-3).all()

    def nowhere(x):
        return 0.0

    model.positions = nowhere                           # twin
    assert close(trade(model(x, t, tokens)), model(trade(x), t, tokens))


def test_words_reach_the_image_one_by_one():
    """By attention, while the condition stays: a set of words, each of which counts."""
    torch.manual_seed(0)
    words, condition = torch.randn(3, 5, 8).double(), torch.randn(3, 8).double()
    other = words.clone()
    other[1, 2] = torch.randn(8)
    for part, shape in ((dit.Block(8, 2), (3, 4, 8)), (unet.Level(8, 8, 8, 2), (3, 8, 2, 2))):
        part, x = woken(part.double()), torch.randn(shape).double()
        seen = part(x, words, condition)
        change = (part(x, other, condition) - seen).flatten(1).abs().amax(1)
        assert change[1] > 1e-3 and change[0] == change[2] == 0
        assert close(part(x, words.flip(1), condition), seen)


@pytest.mark.parametrize("cut, kept, lost", [("grow_1", "down_1", "down_2"),
                                             ("grow_2", "down_2", "middle_1")])
def test_what_a_level_gave_on_the_way_down_is_used_on_the_way_up(batch, cut, kept, lost):
    """Where nothing comes from the coarser grid, the level beside it still has a say."""
    torch.manual_seed(0)
    model = woken(small_unet().double())
    for weight in getattr(model, cut).parameters():
        nn.init.zeros_(weight)
    model(*batch).square().sum().backward()

    def say(level):
        return max(weight.grad.abs().max() for weight in getattr(model, level).parameters())

    assert say(kept) > 1e-3
    if cut == "grow_2":
        assert say(lost) == 0                           # twin
    else:
        assert say("up_2") == 0


def test_near_times_are_told_apart(model, batch):
    x, t, tokens = batch
    velocity = model(x, t, tokens)
    change = model(x, t + 0.01, tokens) - velocity
    assert change.abs().mean() > 0.02 * velocity.abs().mean()
    far, raw = dit.sinusoid(torch.tensor([[400.0, 600.0], [0.4, 0.6]]), 32)
    assert far.diff(dim=0).abs().mean() > 0.1
    assert raw.diff(dim=0).abs().mean() < 0.1           # twin: t without its 1000


def test_torch_func_gives_the_gradients_of_each_sample(model, batch):
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def half_square(weights, *sample):
        return alone(model, weights, *sample).square().sum() / 2

    each = vmap(grad(half_square), (None, 0, 0, 0))(weights, *batch)
    (model(*batch).square().sum() / 2).backward()
    whole = {name: weight.grad for name, weight in model.named_parameters()}
    scale = max(gradient.abs().max() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (each[name].sum(0) - gradient).abs().max() < 10_000 * EPS * scale, name
    # Twin: four times the first sample's gradient is another one.
    assert any((4 * each[name][0] - gradient).abs().max() > 1e-3 * scale
               for name, gradient in whole.items())


def test_forward_and_reverse_mode_agree(model, batch):
    x, t, tokens = batch
    torch.manual_seed(2)
    w = torch.randn_like(x)

    def at(t):
        return model(x, t, tokens)

    def seen_along_w(t):
        """(N,) <w_i, v_i>, so that reverse mode takes a pass for a sample and not for a pixel."""
        return (w * at(t)).sum((1, 2, 3))

    velocity, slope = jvp(at, (t,), (torch.ones_like(t),))
    reverse = jacrev(seen_along_w)(t)                   # (N, N)
    assert close(reverse.diagonal(), (w * slope).sum((1, 2, 3)))
    assert not (reverse - reverse.diagonal().diag()).any()        # no sample sees another's t

    # A central difference is off by about (1000 h)^2 / 6 of the slope, and by rounding over h.
    h = 1e-7
    gap = (at(t + h) - at(t - h)) / (2 * h) - slope
    rounding = 1000 * EPS / h * velocity.abs().max()
    assert gap.abs().max() < (1000 * h) ** 2 * slope.abs().max() + rounding
    twin = (at(t + h) - at(t)) / h - slope              # of first order only
    assert twin.abs().max() > 10 * gap.abs().max()


# --- Other shapes, and wrong ones -----------------------------------------------------------------

@pytest.mark.parametrize("name", NETWORKS)
def test_grey_images_classes_and_no_condition_fit_too(name):
    torch.manual_seed(0)
    model = woken(NETWORKS[name](channels=1))
    x, t, classes = torch.randn(3, 1, 8, 8), torch.full((3,), 0.25), torch.tensor([[1], [2], [3]])
    assert model(x, t, classes).shape == x.shape
    nothing = torch.zeros(3, 1, dtype=torch.long)
    assert torch.equal(model(x, t), model(x, t, nothing))         # no tokens: the null caption
    assert not torch.equal(model(x, t), model(x, t, classes))       # twin
    for same in (0.25, torch.tensor(0.25)):
        assert torch.equal(model(x, same), model(x, t))
    assert not torch.equal(model(x, 0.26), model(x, t))           # twin


@pytest.mark.parametrize("build, words", [
    (lambda: dit.DiT(20, 10, 4), "patch 4 must divide pixels 10"),
    (lambda: dit.DiT(20, 8, 4, 30, 1, 2), "width 30"),
    (lambda: dit.DiT(20, 8, 4, 16, 0), "1 or more"),
    (lambda: unet.UNet(20, 10), "pixels 10"),
    (lambda: unet.UNet(20, 8, (8, 12, 24), 24), "(8, 12, 24)"),
    (lambda: unet.UNet(20, 8, (8, 16), 24), "(8, 16)"),
    (lambda: unet.UNet(20, 8, (8, 16, 24), 24, 0), "1 or more"),
    (lambda: dit.patchify(torch.zeros(1, 3, 8, 9), 4), "patch 4 must divide"),
    (lambda: dit.unpatchify(torch.zeros(1, 6, 48), 4), "a square number P"),
    (lambda: dit.unpatchify(torch.zeros(1, 4, 50), 4), "channels * 16"),
    (lambda: dit.DiT("20"), "whole numbers of 1 or more"),
    (lambda: dit.DiT(20, 8, 4, 16.0), "whole numbers of 1 or more"),
    (lambda: dit.DiT(20, (8, 8)), "whole numbers of 1 or more"),
    (lambda: unet.UNet(20, 8, 8), "(8,)"),
    (lambda: unet.UNet(20, 8, "abc"), "whole numbers of 1 or more"),
    (lambda: dit.patchify(torch.zeros(3, 8, 8), 4), "patch 4 must divide"),
    (lambda: dit.patchify(torch.zeros(1, 3, 8, 8), 0), "patch 0 must divide"),
    (lambda: dit.unpatchify(torch.zeros(4, 48), 4), "not (4, 48)"),
    (lambda: dit.unpatchify(torch.zeros(1, 4, 48), 0), "channels * 0"),
    (lambda: dit.TimeEncoder(8)(torch.zeros(3, 1)), "t must be (N,), not (3, 1)"),
    (lambda: dit.TextEncoder(9, 8, 2)(torch.ones(3).long()), "tokens must be (N, L), not (3,)"),
    (lambda: dit.sinusoid(torch.zeros(3), -2), "width must be even"),
    (lambda: dit.attend(*torch.zeros(3, 2, 5, 8), 0), "0 heads"),
    (lambda: dit.attend(*torch.zeros(3, 2, 5, 8), -2), "-2 heads"),
    (lambda: dit.sinusoid(torch.zeros(3), 5), "width must be even"),
    (lambda: dit.attend(torch.zeros(2, 5, 8), torch.zeros(1, 7, 8), torch.zeros(1, 7, 8), 4),
     "(2, 5, 8), (1, 7, 8), (1, 7, 8)"),
    (lambda: dit.attend(*torch.zeros(3, 2, 5, 8), 3), "3 heads")])
def test_wrong_sizes_are_named(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert words in str(error.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_that_do_not_fit_are_named(name):
    model = NETWORKS[name]()
    x, t, tokens = torch.zeros(3, 3, 8, 8), torch.zeros(3), torch.ones(3, 5, dtype=torch.long)
    model(x, t, tokens)
    for inputs, words in (
            ((torch.zeros(3, 3, 4, 4), t, tokens), "x must be (N, 3, 8, 8)"),
            ((torch.zeros(3, 3, 8, 4), t, tokens), "not (3, 3, 8, 4)"),
            ((x[0], t, tokens), "not (3, 8, 8)"),
            ((x, t[:1], tokens), "t must be one number or (3,)"),
            ((x, t[:, None], tokens), "not (3, 1)"),
            ((x, t, tokens[:1]), "tokens must be (3, L)"),
            ((x, t, tokens[0]), "not (5,)"),
            ((x, t, tokens[:, :0]), "not (3, 0)"),
            ((x, t, tokens.float()), "whole numbers"),
            ((x[:0], t[:0], tokens[:0]), "with N from 1 on, not (0, 3, 8, 8)"),
            (([[0.0]], t, tokens), "not a list"),
            ((None, t, tokens), "not a NoneType"),
            ((x.double(), t, tokens), "not torch.float64 and torch.float32"),
            ((x.half(), t, tokens), "torch.autocast"),
            ((x.byte(), t, tokens), "not torch.uint8"),
            ((x, None, tokens), "t must be one number"),
            ((x, "a", tokens), "t must be one number"),
            ((x, t, tokens.tolist()), "not a list"),
            ((x, t, ["a", "b", "c"]), "not a list"),
            ((x, t, tokens[..., None]), "not (3, 5, 1)"),
            ((x, t, 20 * tokens), "words 0 to 19"),
            ((x, t, -tokens), "words 0 to 19")):
        with pytest.raises(ValueError) as error:
            model(*inputs)
        assert words in str(error.value)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_of_half_precision_are_refused_in_one_sentence(name):
    """A time of 1000 t has more digits than they hold; autocast keeps those."""
    x, tokens = torch.zeros(2, 3, 8, 8), torch.ones(2, 5, dtype=torch.long)
    for kind in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="torch.autocast"):
            NETWORKS[name]().to(kind)(x.to(kind), 0.5, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert NETWORKS[name]()(x, 0.5, tokens).shape == x.shape


@pytest.mark.parametrize("name", NETWORKS)
def test_a_double_t_or_a_list_is_a_t(name, batch):
    torch.manual_seed(0)
    model = woken(NETWORKS[name]())
    x, t, tokens = batch
    x = x.float()
    assert torch.equal(model(x, t, tokens), model(x, t.float(), tokens))
    assert torch.equal(model(x, t.tolist(), tokens), model(x, t.float(), tokens))


def test_one_condition_for_all_samples_is_refused():
    words, x = torch.zeros(3, 2, 8), torch.zeros(3, 8, 4, 4)
    for condition in (torch.zeros(1, 8), torch.zeros(8), torch.zeros(3, 1, 8)):
        with pytest.raises(ValueError, match="a row for each of the 3 samples"):
            dit.Block(8, 2)(torch.zeros(3, 4, 8), words, condition)
        with pytest.raises(ValueError, match="a row for each of the 3 samples"):
            unet.Level(8, 8, 8, 2)(x, words, condition)
    assert dit.Block(8, 2)(torch.zeros(3, 4, 8), words, torch.zeros(3, 8)).shape == (3, 4, 8)
    assert unet.Level(8, 8, 8, 2)(x, words, torch.zeros(3, 8)).shape == x.shape


@pytest.mark.parametrize("module", [dit, unet])
def test_the_demo_prints_sizes_and_shapes(module, capsys):
    module.main()
    printed = capsys.readouterr().out
    sizes = [int(line.split()[-1]) for line in printed.splitlines() if line.split()[-1].isdigit()]
    assert sizes[0] == sum(sizes[1:]) > 1_000_000
    assert "velocity (5, 3, 24, 24)" in printed
