"""The two networks: one signature, no coupling between samples, captions and time that matter, torch.func."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import dit
import unet

NETWORKS = {"dit": lambda: dit.DiT(20, 8, 4, 16, 2, 2), "unet": lambda: unet.UNet(20, 8, (8, 16, 24), 24, 2)}


@pytest.fixture(params=NETWORKS)
def model(request):
    """A small network in float64, away from its zero start."""
    torch.manual_seed(0)
    network = NETWORKS[request.param]().double()
    for weight in network.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.2)
    return network


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64), torch.rand(4, generator=generator, dtype=torch.float64),
            torch.randint(1, 20, (4, 5), generator=generator))


def test_unpatchify_undoes_patchify():
    x = torch.randn(2, 3, 12, 12)
    patches = dit.patchify(x, 4)
    assert patches.shape == (2, 9, 48)
    assert torch.equal(dit.unpatchify(patches, 4), x)
    assert torch.equal(patches[:, 5], x[:, :, 4:8, 8:12].flatten(1))       # row by row: the sixth is in row 1, column 2
    assert not torch.equal(dit.unpatchify(patches.flip(1), 4), x)          # twin: the patches in another order


def test_attention_is_that_of_torch():
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    heads = lambda z: z.view(2, -1, 4, 2).transpose(1, 2)
    reference = nn.functional.scaled_dot_product_attention(heads(q), heads(k), heads(v)).transpose(1, 2).reshape(2, 5, 8)
    for module in (dit, unet):
        assert torch.allclose(module.attend(q, k, v, 4), reference, atol=1e-6)
        assert not torch.allclose(module.attend(q, k, v, 2), reference, atol=1e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_velocity_starts_at_zero_and_has_the_shape_of_x(name, batch):
    x, t, tokens = batch
    out = NETWORKS[name]().double()(x, t, tokens)
    assert out.shape == x.shape and not out.any()


def test_a_sample_does_not_depend_on_its_batch(model, batch):
    together = model(*batch)
    for i in range(4):
        assert torch.allclose(model(*(z[i:i + 1] for z in batch))[0], together[i], atol=1e-12)


def test_batch_norm_would_be_noticed(batch):
    model = NETWORKS["unet"]().double()
    model.norm = nn.BatchNorm2d(8).double()                                # twin: the layer that couples samples
    nn.init.normal_(model.head.weight)
    alone, together = model(*(z[:1] for z in batch))[0], model(*batch)[0]
    assert not torch.allclose(alone, together, atol=1e-3)


def test_captions_steer_the_velocity(model, batch):
    x, t, tokens = batch
    change = lambda other: (model(x, t, other) - model(x, t, tokens)).abs().amax((1, 2, 3))
    one_word = tokens.clone()
    one_word[:, 2] = tokens[:, 2] % 19 + 1
    assert (change(one_word) > 1e-4).all()
    assert (change(tokens.flip(1)) > 1e-4).all()                           # the order of the words matters
    assert (change(0 * tokens) > 1e-4).all()                               # so does the null caption
    assert (change(tokens.clone()) == 0).all()


def test_every_weight_has_a_say(model, batch):
    """No layer is built and then left out: words reach the image through attention too, not only through their mean."""
    model(*batch).square().sum().backward()
    silent = [name for name, weight in model.named_parameters() if weight.grad is None or weight.grad.abs().max() < 1e-12]
    assert not [name for name in silent if not name.endswith("bias")], silent      # a norm or a softmax may undo a bias


def test_near_times_are_told_apart(model, batch):
    x, t, tokens = batch
    size = model(x, t, tokens).abs().mean()
    assert (model(x, t + 0.01, tokens) - model(x, t, tokens)).abs().mean() > 0.02 * size
    for module in (dit, unet):
        raw = module.sinusoid(torch.tensor([0.4, 0.6]), 32)                # twin: t without its 1000 is nearly constant
        assert (raw[0] - raw[1]).abs().mean() < 0.1 < (module.sinusoid(torch.tensor([400.0, 600.0]), 32).diff(dim=0)).abs().mean()


def test_torch_func_gives_the_gradients_of_each_sample(model, batch):
    weights = dict(model.named_parameters())
    one = lambda w, *sample: functional_call(model, w, tuple(z[None] for z in sample))[0]
    half_square = lambda w, *sample: one(w, *sample).square().sum() / 2
    each = vmap(grad(half_square), (None, 0, 0, 0))({k: w.detach() for k, w in weights.items()}, *batch)
    (model(*batch).square().sum() / 2).backward()
    for name, weight in weights.items():
        assert torch.allclose(each[name].sum(0), weight.grad, atol=1e-9), name
    assert any(not torch.allclose(4 * each[name][0], w.grad, atol=1e-3) for name, w in weights.items())   # samples differ


def test_forward_and_reverse_mode_agree(model, batch):
    x, t, tokens = batch
    at = lambda time: model(x, time, tokens)
    direction = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    forward = jvp(at, (t,), (direction,))[1]
    assert torch.allclose(forward[0], jacrev(at)(t)[0, ..., 0], atol=1e-10)
    assert not forward[1:].any()
    step = 1e-7 * direction
    assert torch.allclose((at(t + step) - at(t - step)) / 2e-7, forward, atol=1e-4 * forward.abs().max().item())


@pytest.mark.parametrize("build, words", [
    (lambda: dit.DiT(20, 10, 4), "patch 4 must divide pixels 10"), (lambda: dit.DiT(20, 8, 4, 30, 1, 2), "width 30"),
    (lambda: unet.UNet(20, 10), "pixels 10"), (lambda: unet.UNet(20, 8, (8, 12, 24), 24), "(8, 12, 24)"), (lambda: unet.UNet(20, 8, (8, 16), 24), "(8, 16)")])
def test_wrong_sizes_are_named(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert words in str(error.value)


@pytest.mark.parametrize("module", [dit, unet])
def test_demo_prints_its_checks(module, capsys):
    module.main()
    printed = capsys.readouterr().out
    assert "parameters: 1" in printed and "(5, 3, 24, 24)" in printed
    assert all(float(line.rsplit(" ", 1)[1]) < 1e-4 for line in printed.splitlines() if line.startswith("check"))
