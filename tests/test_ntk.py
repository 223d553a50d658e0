"""Eq. 10-17 and 22: the clear route, the fast route and a plain loop of autograd agree.

Beside that: closed forms, slopes, and twins that are broken on purpose. All in float64, but where
a test says so.
"""

import copy
import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import dit
import ntk
import unet
from results import bench_ntk

EPS = torch.finfo(torch.float64).eps


def small_dit():
    return dit.DiT(20, 4, 2, 8, 1, 2)


def small_unet():
    """Three resolutions, attention on 2 x 2 pixels; layers of both ways, gradients and Grams."""
    return unet.UNet(20, 4, (8, 8, 32), 8, 1, channels=1)


def foreign():
    """Linear layers, one of them without a bias, and a norm."""
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU(),
                         nn.Linear(4, 2, bias=False))


def convolution():
    """Strides and margins."""
    return nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.GroupNorm(3, 3), nn.SiLU(),
                         nn.Conv2d(3, 1, 2))


NETWORKS = {
    "dit": (small_dit, (3, 4, 4)),
    "unet": (small_unet, (1, 4, 4)),
    "foreign": (foreign, (3,)),
    "convolution": (convolution, (2, 5, 5)),
}


class Case:
    """A float64 network away from its zero start, n samples, and residuals r."""

    def __init__(self, name, n=3):
        torch.manual_seed(0)
        make, shape = NETWORKS[name]
        # Two samples of the U-Net: it has many outputs.
        n = 2 if name == "unet" else n
        self.model = make().double()
        for weight in self.model.parameters():
            if not weight.any():
                nn.init.normal_(weight, std=0.3)
        self.inputs = (torch.randn(n, *shape).double(),)
        if name in ("dit", "unet"):
            self.inputs += (torch.rand(n).double(), torch.randint(20, (n, 4)))
        self.r = torch.randn_like(self.model(*self.inputs)).detach()
        self.f, self.params = ntk.of_module(self.model)
        self.all = (self.f, self.params, self.inputs)


def plain_gradient(v, params, vector):
    """(P,), an ordinary backward pass from the answer v for one sample."""
    g = torch.autograd.grad(v, params, vector.view_as(v), retain_graph=True, allow_unused=True,
                            materialize_grads=True)
    return torch.cat([one.to_dense().flatten() for one in g])


def plain_gradients(model, inputs, vectors):
    """The plain loop: (N, P), each sample alone."""
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i, vector in enumerate(vectors):
        v = model(*(z[i:i + 1] for z in inputs))
        rows.append(plain_gradient(v, params, vector))
    return torch.stack(rows)


def jacobians(model, inputs, r):
    """(N, D, P) by the plain loop, one output of one sample at a time."""
    params = [p for p in model.parameters() if p.requires_grad]
    units = torch.eye(r[0].numel(), dtype=r.dtype)
    found = []
    for i in range(len(r)):
        v = model(*(z[i:i + 1] for z in inputs))
        found.append(torch.stack([plain_gradient(v, params, unit) for unit in units]))
    return torch.stack(found)


@pytest.fixture(params=NETWORKS, scope="module")
def case(request):
    made = Case(request.param)
    made.J = jacobians(made.model, made.inputs, made.r)
    made.K = ntk.fast_ntk_blocks(made.model, made.inputs)
    return made


def close(a, b, tolerance=1e-12):
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


# --- Eq. 10-12: all routes agree ------------------------------------------------------------------

def test_one_linear_layer_has_the_same_matrix_with_gradients_and_without():
    """Eq. 12, on one layer."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False).double()
    x, r = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    G = plain_gradients(layer, (x,), r)
    for M in ntk.one_linear_layer(x, r):
        assert close(M, G @ G.T)
    # Twin: residuals of other samples.
    assert not close(ntk.one_linear_layer(x, r.flip(0))[1], G @ G.T, 1e-3)


def test_all_routes_to_the_kernel_agree(case):
    """Eq. 11."""
    K = torch.einsum("idp,jep->ijde", case.J, case.J)
    assert close(ntk.ntk_blocks(*case.all), K)
    assert close(case.K, K)
    assert close(ntk.ntk_trace(*case.all), K.diagonal(dim1=2, dim2=3).sum(2))
    # Twin: transposed blocks.
    assert not close(case.K.transpose(2, 3), K, 1e-3)
    N, _, D, _ = K.shape
    matrix = K.transpose(1, 2).reshape(N * D, N * D)
    values = torch.linalg.eigvalsh(matrix)
    assert close(matrix, matrix.T)
    assert values.min() >= -N * D * EPS * values.max()


def test_all_routes_to_the_interaction_matrix_agree(case):
    """Eq. 10, 12."""
    r = case.r.flatten(1)
    G = torch.einsum("idp,id->ip", case.J, r)
    by_kernel = torch.einsum("id,ijde,je->ij", r, case.K, r)
    fast = ntk.fast_interaction_matrix(case.model, case.inputs, case.r)
    for M in (ntk.interaction_matrix(*case.all, case.r), fast, by_kernel):
        assert close(M, G @ G.T)
        assert not M.requires_grad
    assert close(ntk.per_sample_gradients(*case.all, case.r), G)
    if len(case.inputs) == 3:
        # Twin: the noise level left out.
        x, t, tokens = case.inputs
        wrong = ntk.fast_interaction_matrix(case.model, (x, 0 * t, tokens), case.r)
        assert not close(wrong, G @ G.T, 1e-3)


def test_the_matrix_between_two_batches_is_a_block_of_the_matrix_of_both(case):
    """Eq. 22: rows are evaluated, columns are trained on."""
    G = plain_gradients(case.model, case.inputs, case.r)
    few = tuple(z[1:] for z in case.inputs)
    columns = (case.inputs, case.r)
    truth = G[1:] @ G.T
    fast = ntk.fast_interaction_matrix(case.model, few, case.r[1:], columns)
    assert close(fast, truth)
    for chunk in (None, 1, 2):
        M = ntk.interaction_matrix(case.f, case.params, few, case.r[1:], chunk, columns)
        assert close(M, truth)
    # Rows and columns exchanged.
    rows = (few, case.r[1:])
    exchanged = ntk.fast_interaction_matrix(case.model, case.inputs, case.r, rows)
    assert close(exchanged, truth.T)
    # Twin: the residuals of the other batch.
    wrong = ntk.fast_interaction_matrix(case.model, few, case.r[:-1], columns)
    assert not close(wrong, truth, 1e-3)


def test_kernel_vector_products(case):
    rows = case.J.flatten(0, 1)
    g = rows.T @ case.r.flatten()
    product = ntk.ntk_vector_product(*case.all, case.r)
    assert close(product.flatten(), rows @ g)
    # And by a finite difference along g.
    step = 1e-6 / g.norm()
    pieces = g.split([p.numel() for p in case.params.values()])

    def outputs(size):
        moved = {}
        for (name, p), piece in zip(case.params.items(), pieces):
            moved[name] = p + size * piece.view_as(p)
        samples = [case.f(moved, *one) for one in zip(*case.inputs)]
        return torch.stack(samples).flatten(1)

    assert close((outputs(step) - outputs(-step)) / (2 * step), product, 1e-6)
    # Twin: the blocks off the diagonal dropped.
    own = torch.einsum("idp,iep,ie->id", case.J, case.J, case.r.flatten(1))
    assert not close(own, product, 1e-3)


def test_a_linear_model_has_the_kernel_of_its_inputs():
    x = torch.randn(4, 3, dtype=torch.float64)
    params = {"W": torch.randn(2, 3, dtype=torch.float64)}

    def f(params, x):
        return params["W"] @ x

    blocks = torch.einsum("ij,de->ijde", x @ x.T, torch.eye(2, dtype=torch.float64))
    assert close(ntk.ntk_blocks(f, params, (x,)), blocks)


def test_a_parameter_used_twice_counts_twice():
    x = torch.randn(4, 3, dtype=torch.float64)

    def f(params, x):
        return params["w"] @ x + params["w"] @ x

    params = {"w": torch.randn(3, dtype=torch.float64)}
    assert close(ntk.ntk_trace(f, params, (x,)), 4 * x @ x.T)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_chunks_change_nothing(chunk):
    case = Case("foreign")
    K, M = ntk.ntk_blocks(*case.all), ntk.interaction_matrix(*case.all, case.r)
    assert close(ntk.ntk_blocks(*case.all, chunk), K)
    assert close(ntk.ntk_trace(*case.all, chunk), ntk.ntk_trace(*case.all))
    assert close(ntk.interaction_matrix(*case.all, case.r, chunk), M)
    assert close(ntk.fast_ntk_blocks(case.model, case.inputs, chunk), K)


def test_groups_and_blocks_change_nothing(case):
    K = case.K
    assert close(ntk.fast_ntk_blocks(case.model, case.inputs, hold=500, check=False), K)
    triangle = K.transpose(1, 2).flatten(2).flatten(0, 1).tril()
    ntk._mirror(triangle, block=7)
    assert close(triangle, K.transpose(1, 2).flatten(2).flatten(0, 1))


@pytest.mark.parametrize("T, I, O", [(4, 5, 6), (1, 2, 6), (40, 2, 6), (2, 40, 6)])
def test_gradients_and_grams_say_the_same(T, I, O):
    """Few or many places, narrow or wide, for M and for K, in bands and blocks of every size."""
    torch.manual_seed(0)
    N, C = 3, 5
    module = nn.Linear(I, O).double()
    seen = ntk.Seen(module, dict(module.named_parameters()), torch.randn(N, T, I).double(),
                    0, torch.Size((N, T, O)), None)
    cotangents = torch.randn(C, N, T, O).double()
    a, b = ntk._factors(seen, cotangents, True)
    nothing, G = ntk._factors(seen, cotangents, False)
    assert nothing is None
    K, by_gradients = (torch.zeros(N, C, N, C).double() for _ in range(2))
    ntk._add_grams(K, a, b, block=2)
    ntk._add_gradients(by_gradients, G, block=2)
    rows = G.flatten(0, 1)
    for found in (K, by_gradients):
        assert close(found.view(N * C, N * C).tril(), (rows @ rows.T).tril())
    one = (a, b[:, :1])
    M = ntk._inner_products(one, one)
    assert close(M, G[:, 0] @ G[:, 0].T)
    assert close(ntk._inner_products(one, (a[:2], b[:2, :1])), M[:, :2])


def test_outputs_of_one_place_each_say_the_same():
    """Three of four outputs come from one place of the layer, the last from none."""
    torch.manual_seed(0)
    N, D, T, I, O = 3, 4, 5, 2, 6
    a, b = torch.randn(N, T, I).double(), torch.zeros(N, D, T, O).double()
    for d, place in enumerate((3, 0, 3)):
        b[:, d, place] = torch.randn(N, O).double()
    places = ntk._only_places(b)
    assert places[:3].tolist() == [3, 0, 3]
    by_grams, K, in_blocks = (torch.zeros(N, D, N, D).double() for _ in range(3))
    ntk._add_grams(by_grams, a, b)
    ntk._add_share(K, a, b)
    ntk._add_grams_of_one_place(in_blocks, a[:, places], b.sum(2), block=5)
    assert by_grams.any()
    for found in (K, in_blocks):
        assert close(found.view(N * D, N * D).tril(), by_grams.view(N * D, N * D).tril())
    # A single cotangent at a second place, and there is no place to be named.
    b[2, 1, 4, 5] = 1e-30
    assert ntk._only_places(b) is None


def test_float32_is_right_to_its_precision(case):
    model = copy.deepcopy(case.model).float()
    inputs = tuple(z.float() if z.is_floating_point() else z for z in case.inputs)
    f, params = ntk.of_module(model)
    G = torch.einsum("idp,id->ip", case.J, case.r.flatten(1))
    # A few hundred roundings in a sum.
    allowed = 1000 * torch.finfo(torch.float32).eps
    K = ntk.fast_ntk_blocks(model, inputs).double()
    assert close(K, case.K, allowed)
    M = ntk.fast_interaction_matrix(model, inputs, case.r)
    assert close(M.double(), G @ G.T, allowed)
    trace = ntk.ntk_trace(f, params, inputs).double()
    assert close(trace, case.K.diagonal(dim1=2, dim2=3).sum(2), allowed)


# --- Foreign networks: right, or refused by name --------------------------------------------------

class Of(nn.Module):
    """A module of named parts, with a function of them as its forward pass."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, *inputs, **named):
        return self.run(self, *inputs, **named)


def linear(I=3, O=3, **options):
    return nn.Linear(I, O, **options)


def tied():
    a, b = linear(), linear()
    b.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b)


def hooked():
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    model[0].register_forward_hook(lambda layer, args, z: 10 * z)
    model[2].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    return model


def patched():
    model = nn.Sequential(linear(), nn.Tanh(), linear())

    def forward(x):
        return x @ model[0].weight.T.sin()

    model[0].forward = forward
    return model


def in_place(m, x):
    h = m.act(m.a(x))
    v = m.b(h)
    v += 1
    v *= 2
    return v


def frozen_in_part():
    model = foreign()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    model.spare = linear()

    def without_spare(x):
        for layer in list(model)[:6]:
            x = layer(x)
        return x

    model.forward = without_spare
    return model


def sequence_first(m, x):
    return m.a(x.transpose(0, 1)).tanh().transpose(0, 1)


def flattened(m, x):
    N, T, I = x.shape
    return m.a(x.reshape(N * T, I)).tanh().view(N, T, -1)


def one_layer_twice():
    layer = linear()
    return nn.Sequential(layer, nn.Tanh(), layer)


def padding_changed():
    layer = nn.Conv2d(2, 3, 3, padding=1)
    layer.padding = (0, 1)
    return nn.Sequential(layer, nn.Tanh())


def routed(m, x):
    """Each sample by one of two experts."""
    first = x[:, 0] > 0
    v = torch.zeros_like(x)
    v[first] = m.a(x[first]).tanh()
    v[~first] = m.b(x[~first]).tanh()
    return v


def one_by_one(m, x):
    experts = m.a, m.b
    return torch.stack([experts[int(sample[0] > 0)](sample) for sample in x])


def fused_attention(m, x):
    return F.scaled_dot_product_attention(m.q(x), m.k(x), x)


def conditioned_on_itself(m, x):
    with torch.no_grad():
        first = m.a(x)
    return m.a(x + first).tanh()


def counted(m, x):
    m.count += 1
    return m.p * m.a(x).tanh()


def counter():
    model = Of(counted, a=linear(), p=parameter(3))
    model.register_buffer("count", torch.zeros(()))
    return model


class Tripled(torch.autograd.Function):
    """The identity, in the old style. Its backward pass triples, and reads a number."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return 3 * g if g.sum().item() < 1e9 else g


def tripled_by_a_hook():
    model = nn.Sequential(linear(), nn.Tanh(), linear())
    model[2].register_full_backward_hook(lambda layer, given, answered: (3 * given[0],))
    return model


def by_its_gradient(m, x):
    """Minus the gradient of an energy with respect to x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = m.b(m.a(x).tanh()).sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x)[0]


X3, X43, X4 = (3, 3), (3, 4, 3), (3, 2, 4, 4)
ONE = torch.ones(1, 3, dtype=torch.float64)


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


RIGHT = {
    "tied weights": (tied, X3),
    "hooks of others": (hooked, X3),
    "a patched forward": (patched, X3),
    "work in place": (lambda: Of(in_place, a=linear(3, 8), b=linear(8, 3),
                                 act=nn.ReLU(inplace=True)), X3),
    "partly frozen": (frozen_in_part, X3),
    "a layer called twice": (lambda: Of(lambda m, x: m.a(m.a(x).tanh()), a=linear()), X3),
    "an input by name": (lambda: Of(lambda m, x: m.a(input=x).tanh(), a=linear()), X3),
    "a weight without its layer": (lambda: Of(lambda m, x: F.linear(x, m.a.weight).tanh(),
                                              a=linear()), X3),
    "positions": (lambda: Of(lambda m, x: m.a(x + m.p).tanh(), a=linear(), p=parameter(1, 4, 3)),
                  X43),
    "a class token": (lambda: Of(lambda m, x: m.a(torch.cat([m.p.expand(len(x), 1, 3), x], 1)),
                                 a=linear(), p=parameter(1, 1, 3)), X43),
    "a raw scale": (lambda: Of(lambda m, x: m.p * m.a(x), a=linear(), p=parameter(3)), X3),
    "positions by a layer": (lambda: Of(lambda m, x: m.a(x) + m.p(ONE.to(x)), a=linear(),
                                        p=linear()), X3),
    "the sequence first": (lambda: Of(sequence_first, a=linear()), X43),
    "batch and time in one": (lambda: Of(flattened, a=linear()), X43),
    "RMSNorm": (lambda: nn.Sequential(linear(), nn.RMSNorm(3), linear()), X3),
    "LayerNorm over two axes": (lambda: nn.Sequential(linear(), nn.LayerNorm((4, 3))), X43),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, padding="same"), nn.Tanh()),
                  X4),
    "dilation, circular margin": (lambda: nn.Sequential(
        nn.Conv2d(2, 3, 2, dilation=2, padding=1, padding_mode="circular"), nn.Tanh()), X4),
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=1), nn.Tanh(),
                                     nn.Conv1d(6, 2, 1, bias=False)), X43),
    "Conv1d in groups": (lambda: nn.Sequential(nn.Conv1d(4, 4, 2, groups=4), nn.Tanh()), X43),
    "transposed convolution": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), X4),
    "BatchNorm in eval()": (lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3),
                                                  nn.Tanh()).eval(), X4),
    "Bilinear": (lambda: Of(lambda m, x: m.a(x, x.sin()), a=nn.Bilinear(3, 3, 2)), X3),
    "PReLU": (lambda: nn.Sequential(linear(), nn.PReLU()), X3),
    "parametrized weight_norm": (lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(linear()), nn.Tanh()), X3),
    "attention": (Attention, (3, 2, 4)),
    "a layer that nothing uses": (lambda: Of(lambda m, x: (m.b(x), m.a(x).tanh())[1], a=linear(),
                                             b=linear()), X3),
    "one layer twice in a row": (one_layer_twice, X3),
    "a padding that was changed": (padding_changed, X4),
    "an LSTM": (lambda: Of(lambda m, x: m.a(x)[0], a=nn.LSTM(3, 2, batch_first=True)), X43),
    "a GRU, the sequence first": (lambda: Of(lambda m, x: m.b(m.a(x.transpose(0, 1))[0][-1]),
                                             a=nn.GRU(3, 2), b=linear(2, 3)), X43),
    "a loop of Linear layers": (lambda: Of(lambda m, x: m.a(m.a(x.sin()) + x).tanh(), a=linear()),
                                X3),
    "experts by masks": (lambda: Of(routed, a=linear(), b=linear()), X3),
    "experts one by one": (lambda: Of(one_by_one, a=linear(), b=linear()), X3),
    "the batch doubled": (lambda: Of(lambda m, x: m.a(torch.cat([x, 0 * x])).tanh()[:len(x)],
                                     a=linear()), X3),
    "the batch in parts": (lambda: Of(lambda m, x: torch.cat([m.a(z) for z in x.split(2)]).tanh(),
                                      a=linear()), X3),
    "fused attention": (lambda: Of(fused_attention, q=linear(), k=linear()), X43),
    "an encoder in eval()": (lambda: nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).eval(),
                             (3, 2, 4)),
    "a checkpoint": (lambda: Of(lambda m, x: m.p * checkpoint(m.a, x, use_reentrant=False).tanh(),
                                a=linear(), p=parameter(3)), X3),
    "conditioned on itself": (lambda: Of(conditioned_on_itself, a=linear()), X3),
    "a backward pass of its own": (lambda: Of(lambda m, x: m.p * Tripled.apply(m.a(x)).tanh(),
                                              a=linear(), p=parameter(3)), X3),
    "a hook on a gradient": (tripled_by_a_hook, X3),
    "a count of its calls": (counter, X3),
    "a number that is read": (lambda: Of(lambda m, x: m.p * m.a(x) * x.abs().max().item() ** 0,
                                         a=linear(), p=parameter(3)), X3),
    "spectral_norm in eval()": (lambda: parametrizations.spectral_norm(linear()).eval(), X3),
    "running means of each sample": (lambda: nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)), X4),
    "one sample": (lambda: nn.Sequential(linear(), nn.Tanh()), (1, 3)),
    "no axis of outputs": (lambda: Of(lambda m, x: m.a(x).sum(1).tanh(), a=linear()), X3),
}


def traces(model):
    """What a call could leave behind: hooks, other parameters, gradients, modes, random numbers."""
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in model.modules()]
    parameters = [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    return hooks, parameters, modes, torch.get_rng_state().tolist()


@pytest.mark.parametrize("pattern", RIGHT)
def test_every_route_is_right_for(pattern):
    torch.manual_seed(1)
    make, shape = RIGHT[pattern]
    model, x = make().double(), torch.randn(shape).double()
    r = torch.randn_like(model(x)).detach()
    J = jacobians(model, (x,), r)
    G = torch.einsum("idp,id->ip", J, r.reshape(len(r), -1))
    K = torch.einsum("idp,jep->ijde", J, J)
    before = traces(model)
    assert close(ntk.fast_interaction_matrix(model, (x,), r), G @ G.T)
    assert close(ntk.fast_ntk_blocks(model, (x,)), K)
    few = (x[:1],)
    assert close(ntk.fast_interaction_matrix(model, few, r[:1], ((x,), r)), G[:1] @ G.T)
    f, params = ntk.of_module(model)
    assert close(ntk.interaction_matrix(f, params, (x,), r), G @ G.T)
    assert close(ntk.ntk_blocks(f, params, (x,)), K)
    assert traces(model) == before


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.jit.script])
def test_what_cannot_be_called_with_other_parameters_is_right_by_the_fast_route(wrap):
    torch.manual_seed(1)
    model = wrap(nn.Sequential(linear(), nn.Tanh(), linear())).double()
    x, r = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    G = plain_gradients(model, (x,), r)
    assert close(ntk.fast_interaction_matrix(model, (x,), r), G @ G.T)
    with pytest.raises(ValueError, match="cannot be called with other parameters"):
        ntk.of_module(model)


@pytest.mark.parametrize("what", ["M", "K", "the rest of a module"])
def test_lack_of_memory_is_not_answered_by_a_slow_loop(what):
    """Whoever runs out of memory must hear of it, and can choose a smaller chunk."""
    calls = []

    def lacking(*arguments):
        calls.append(arguments)
        if len(calls) == (2 if what == "the rest of a module" else 1):
            raise torch.OutOfMemoryError("out of memory")
        return arguments[-1]

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.scale * lacking(x)

    x = torch.ones(3, 2)
    with pytest.raises(torch.OutOfMemoryError):
        if what == "M":
            ntk.interaction_matrix(lacking, {"w": x}, (x,), x)
        elif what == "K":
            ntk._for_each(lacking, x)
        else:
            ntk.fast_interaction_matrix(Scaled(), (x,), x)
    assert len(calls) == (2 if what == "the rest of a module" else 1)



def test_few_digits_of_what_is_frozen_are_enough():
    """An adapter beside a layer in bfloat16."""
    torch.manual_seed(1)
    model = Of(lambda m, x: m.base(x.bfloat16()).double() + m.b(m.a(x)), a=linear().double(),
               b=linear().double(), base=linear().bfloat16().requires_grad_(False))
    x, r = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    G = plain_gradients(model, (x,), r)
    assert close(ntk.fast_interaction_matrix(model, (x,), r), G @ G.T)


def coupled(m, x):
    h = m.a(x).tanh()
    return m.b(h - h.mean(0)).tanh()


def pruned():
    layer = linear()
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer, nn.Tanh())


def compiled_in_place():
    model = nn.Sequential(linear(), nn.Tanh())
    model.compile(backend="eager")
    return model


def half():
    model = nn.Sequential(linear(), linear())
    model[1].to(torch.bfloat16)
    return model


def old_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(linear()), nn.Tanh())


def masked_gradient():
    layer = linear()
    layer.weight.register_hook(lambda g: g * (g > 0))
    return layer


def reentrant(m, x):
    return checkpoint(m.b, m.a(x), use_reentrant=True)


def overwriting(m, x):
    h = m.a(x)
    v = m.b(h.tanh_())
    h.zero_()
    return v


REFUSED = {
    "an input that is overwritten": (lambda: Of(overwriting, a=linear(), b=linear()),
                                     "b: its input is overwritten in place"),
    "tied by a product": (lambda: Of(lambda m, x: m.a(x).tanh() @ m.a.weight, a=linear()),
                          "a: for random weights s"),
    "a norm of a weight": (lambda: Of(lambda m, x: m.a(x) * m.a.weight.norm(), a=linear()),
                           "a: for random weights s"),
    "rows in another order": (lambda: Of(lambda m, x: m.a(x.flip(0)).tanh().flip(0), a=linear()),
                              "row k of what it sees is not of sample k"),
    "a gradient inside": (lambda: Of(by_its_gradient, a=linear(), b=linear(3, 1)),
                          "a: for random weights s"),
    "samples that are coupled": (lambda: Of(coupled, a=linear(), b=linear()),
                                 "the samples depend on each other"),
    "a mean that is detached": (lambda: Of(lambda m, x: m.a(x) - m.a(x).mean(0).detach(),
                                           a=linear()), "the samples depend on each other"),
    "inputs by their deviation": (lambda: Of(lambda m, x: m.a(x / x.std(0, False)), a=linear()),
                                  "the samples depend on each other"),
    "the batch's size": (lambda: Of(lambda m, x: m.a(x) / len(x), a=linear()),
                         "the samples depend on each other"),
    "sums over earlier samples": (lambda: Of(lambda m, x: m.a(x.cumsum(0)), a=linear()),
                                  "the samples depend on each other"),
    "answers of other samples": (lambda: Of(lambda m, x: m.a(x.roll(1, 0)), a=linear()),
                                 "the samples depend on each other"),
    "no single sample": (lambda: Of(lambda m, x: m.a(x).view(5, 3), a=linear()),
                         "fails for one sample alone, .*is invalid for input of size"),
    "compiled": (lambda: torch.compile(linear(), backend="eager"), "compiled"),
    "compiled in place": (compiled_in_place, "compiled"),
    "pruned": (pruned, "weight from weight_orig in a hook"),
    "old weight_norm": (old_weight_norm, "in a hook .pruning, or an old weight_norm"),
    "BatchNorm in training": (lambda: nn.Sequential(linear(), nn.BatchNorm1d(3)),
                              "1 is a BatchNorm in training: it couples the samples"),
    "BatchNorm without statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(),
                                     "BatchNorm in training"),
    "spectral_norm in training": (lambda: parametrizations.spectral_norm(linear()),
                                  "spectral_norm in training: each call changes the weight"),
    "a mask on a gradient": (masked_gradient, "a hook may change the gradient of its weight"),
    "an old checkpoint": (lambda: Of(reentrant, a=linear(), b=linear()), "use_reentrant=False"),
    "no size yet": (lambda: nn.LazyLinear(3), "weight has no size yet; call the model once"),
    "a division by 0": (lambda: Of(lambda m, x: m.a(x) / 0, a=linear()), "M is not finite"),
    "a dict": (lambda: Of(lambda m, x: {"v": m.a(x)}, a=linear()),
               r"a dict, not a tensor; .*\*ntk.of_module.model, output=\.\.\."),
    "a tuple": (lambda: Of(lambda m, x: (m.a(x), x), a=linear()),
                r"a tuple, not a tensor; .*\*ntk.of_module.model, output=\.\.\."),
    "a sparse answer": (lambda: Of(lambda m, x: m.a(x).to_sparse(), a=linear()), "a sparse or"),
    "one answer less": (lambda: Of(lambda m, x: m.a(x)[1:], a=linear()), "on its first axis"),
    "complex answers": (lambda: Of(lambda m, x: torch.fft.fft(m.a(x)), a=linear()),
                        "answers in torch.complex64"),
    "all frozen": (lambda: linear().requires_grad_(False), "all are frozen"),
    "two precisions": (half, "one precision, float32 or float64"),
    "bfloat16": (lambda: linear().to(torch.bfloat16), "bias is torch.bfloat16"),
    "complex": (lambda: linear().to(torch.complex64), "weight is torch.complex64, .* must be real"),
    "one answer for all": (lambda: Of(lambda m, x: m.a(x).sum(), a=linear()), "on its first axis"),
    "no gradient": (lambda: Of(lambda m, x: m.a(x).detach(), a=linear()), "has no gradient"),
}


@pytest.mark.parametrize("pattern", REFUSED)
@pytest.mark.parametrize("what", ["M", "K"])
def test_the_fast_route_refuses_by_name(pattern, what):
    torch.manual_seed(1)
    make, words = REFUSED[pattern]
    model = make()
    x, r = torch.randn(5, 3), torch.randn(5, 3)
    before = traces(model)
    with pytest.raises(ValueError, match=words) as refusal:
        if what == "M":
            ntk.fast_interaction_matrix(model, (x,), r)
        else:
            ntk.fast_ntk_blocks(model, (x,))
    assert traces(model) == before
    if "Otherwise use the clear route" in str(refusal.value):
        G = plain_gradients(model, (x,), r)
        assert close(ntk.interaction_matrix(*ntk.of_module(model), (x,), r), G @ G.T, 1e-5)


def test_nothing_is_left_behind_when_the_model_itself_fails():
    def forward(m, x):
        raise KeyError(str(m.a(x).shape))

    model = Of(forward, a=linear())
    inputs, r = (torch.randn(2, 3),), torch.randn(2, 3)
    before = traces(model)
    with pytest.raises(KeyError):
        ntk.fast_interaction_matrix(model, inputs, r)
    assert traces(model) == before


def test_autocast_is_refused():
    model, x = nn.Sequential(linear(), nn.Tanh()), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        ntk.fast_interaction_matrix(model, (x,), torch.randn(2, 3))


def test_the_smallest_examples_of_what_was_once_silently_wrong():
    """With the weight 1, x = (1), (2) and known residuals, worked out by hand."""
    def one(forward, *names):
        layers = {name: nn.Linear(1, 1, bias=False) for name in names}
        model = Of(forward, **layers)
        for weight in model.parameters():
            nn.init.ones_(weight)
        return model

    x, r = torch.tensor([[1.0], [2.0]]), torch.ones(2, 1)

    positions = one(lambda m, x: m.a(x) + m.p(torch.ones(1, 1)), "a", "p")
    M = ntk.fast_interaction_matrix(positions, (x,), torch.tensor([[1.0], [-1.0]]))
    assert M.tolist() == [[2, -3], [-3, 5]]

    squared = one(lambda m, x: m.a(x) * m.a.weight, "a")
    with pytest.raises(ValueError, match="a: for random weights"):
        ntk.fast_interaction_matrix(squared, (x,), r)
    assert ntk.interaction_matrix(*ntk.of_module(squared), (x,), r).tolist() == [[4, 8], [8, 16]]

    hook = one(lambda m, x: m.a(x), "a")
    hook.a.register_forward_hook(lambda layer, args, z: 10 * z)
    assert ntk.fast_interaction_matrix(hook, (x,), r).tolist() == [[100, 200], [200, 400]]


@pytest.mark.parametrize("scaled", [False, True])
def test_dropout_is_that_of_one_forward_pass(scaled):
    """M, its proof and its model share one forward pass; no other random number changes.

    With a scale that belongs to no layer, too, for which the clear route cannot be used.
    """
    torch.manual_seed(0)
    own = Of(lambda m, x: m.p * x, p=parameter(3)) if scaled else nn.Identity()
    model = nn.Sequential(linear(), nn.Dropout(0.5), own, linear()).double()
    x, r = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    torch.manual_seed(3)
    M = ntk.fast_interaction_matrix(model, (x,), r)
    after = torch.rand(1)
    torch.manual_seed(3)
    K = ntk.fast_ntk_blocks(model, (x,))
    torch.manual_seed(3)
    kept = model[1](torch.ones(5, 3).double())
    assert torch.equal(after, torch.rand(1))
    with pytest.raises(ValueError, match="draws random numbers"):
        ntk.interaction_matrix(*ntk.of_module(model), (x,), r)

    def v_of(i):
        return model[3](own(model[0](x[i]) * kept[i]))

    def gradient(i, vector):
        g = torch.autograd.grad(v_of(i), model.parameters(), vector)
        return torch.cat([one.flatten() for one in g])

    G = torch.stack([gradient(i, r[i]) for i in range(5)])
    assert close(M, G @ G.T)
    unit = torch.eye(3).double()
    J = torch.stack([torch.stack([gradient(i, one) for one in unit]) for i in range(5)])
    assert close(K, torch.einsum("idp,jep->ijde", J, J))


@pytest.mark.parametrize("options, tied", [({"padding_idx": 0}, False), ({"sparse": True}, False),
                                           ({"sparse": True}, True), ({"max_norm": 1.0}, False)])
def test_words_may_be_int32_and_padded(options, tied):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, **options), linear(3, 5)).double()
    if tied:
        model[1].weight = model[0].weight
    tokens = torch.tensor([[0, 1], [2, 2], [4, 0]], dtype=torch.int32)
    r = torch.randn(3, 2, 5).double()
    model(tokens)                                  # max_norm changes the weight in the first call
    G = plain_gradients(model, (tokens,), r)
    assert close(ntk.fast_interaction_matrix(model, (tokens,), r), G @ G.T)
    assert close(ntk.interaction_matrix(*ntk.of_module(model), (tokens,), r), G @ G.T)


# --- M certifies itself ---------------------------------------------------------------------------

SPOILED = {
    "a hundredth too much of a layer": ("_inner_products", lambda found: 1.01 * found),
    "two samples exchanged": ("_inner_products", lambda found: found.flip(0)),
    "nothing": ("_inner_products", lambda found: 0 * found),
    "a sign": ("_cotangents", lambda found: {name: b.abs() for name, b in found.items()}),
    "rows of other samples": ("_cotangents", lambda found: {name: b.flip(0)
                                                            for name, b in found.items()}),
    "a bias forgotten": ("_factors", lambda found: (found[0], found[1][..., :-1])
                         if found[0] is None else (found[0][..., :-1], found[1])),
}


def plant(fault, monkeypatch):
    """Spoils what a part of the fast route gives."""
    which, spoil = SPOILED[fault]
    original = getattr(ntk, which)
    monkeypatch.setattr(ntk, which, lambda *a, **k: spoil(original(*a, **k)))


@pytest.mark.parametrize("fault", SPOILED)
def test_a_wrong_matrix_refuses_itself(case, fault, monkeypatch):
    """Twins of the fast route: every fault is wrong without the proof and noticed with it."""
    G = torch.einsum("idp,id->ip", case.J, case.r.flatten(1))
    plant(fault, monkeypatch)
    wrong = ntk.fast_interaction_matrix(case.model, case.inputs, case.r, check=False)
    assert not close(wrong, G @ G.T, 1e-4)
    with pytest.raises(ValueError, match="for random weights s its share of s.T M s is"):
        ntk.fast_interaction_matrix(case.model, case.inputs, case.r)


@pytest.mark.parametrize("fault", SPOILED)
def test_a_wrong_matrix_between_two_batches_refuses_itself(case, fault, monkeypatch):
    """Eq. 22: the proof of a rectangular M."""
    few = tuple(z[1:] for z in case.inputs)
    arguments = case.model, case.inputs, case.r, (few, case.r[1:])
    ntk.fast_interaction_matrix(*arguments)            # twin: without the fault
    plant(fault, monkeypatch)
    with pytest.raises(ValueError, match="for random weights s its share of s.T M s' is"):
        ntk.fast_interaction_matrix(*arguments)


def test_columns_that_depend_on_each_other_are_refused_beside_a_single_row():
    """One row has no other to depend on, and a mean that is detached has no gradient."""
    torch.manual_seed(1)
    model = Of(lambda m, x: m.a(x) - m.a(x).mean(0).detach(), a=linear()).double()
    x, r = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    ntk.fast_interaction_matrix(model, (x[:1],), r[:1])                # twin: no second sample
    with pytest.raises(ValueError, match="the samples depend on each other"):
        ntk.fast_interaction_matrix(model, (x[:1],), r[:1], ((x,), r))


def test_a_wrong_kernel_refuses_itself(monkeypatch):
    case = Case("foreign")
    original = ntk._add_share
    monkeypatch.setattr(ntk, "_add_share", lambda K, a, b: original(K, a, 1.01 * b))
    ntk.fast_ntk_blocks(case.model, case.inputs, check=False)
    with pytest.raises(ValueError, match="K would be wrong: for random vectors r"):
        ntk.fast_ntk_blocks(case.model, case.inputs)


def test_a_kernel_from_wrong_places_refuses_itself(monkeypatch):
    """The last Linear layer of a DiT sees one token for each output, here a wrong one."""
    case = Case("dit")
    found = []

    def one_place_further(b, original=ntk._only_places):
        places = original(b)
        if places is not None:
            found.append(places)
            places = (places + 1) % b.shape[2]
        return places

    monkeypatch.setattr(ntk, "_only_places", one_place_further)
    with pytest.raises(ValueError, match="K would be wrong: for random vectors r"):
        ntk.fast_ntk_blocks(case.model, case.inputs)
    assert found


def test_equal_weights_would_miss_a_fault_that_random_weights_see(monkeypatch):
    """Rows in another order: the sum of all entries of M is right, and M is wrong."""
    model = Of(lambda m, x: m.a(x.flip(0)).tanh().flip(0), a=linear()).double()
    x, r = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    monkeypatch.setattr(ntk, "_random", lambda kind, shape, like, seed: torch.ones(shape).to(like))
    wrong = ntk.fast_interaction_matrix(model, (x,), r)
    G = plain_gradients(model, (x,), r)
    assert close(wrong.sum(), (G @ G.T).sum())
    assert not close(wrong, G @ G.T, 1e-3)


def test_a_right_matrix_passes_in_float32_at_every_size():
    """The proof allows for rounding: also where gradients are alike, or vanish."""
    torch.manual_seed(0)
    model = nn.Sequential(linear(3, 16), nn.Tanh(), linear(16, 3))
    for N in (1, 2, 3, 17, 256):
        x = torch.randn(1, 3).expand(N, 3)
        r = torch.randn(1, 3).expand(N, 3)
        for scale in (1.0, 1e-6, 0.0):
            ntk.fast_interaction_matrix(model, (x,), scale * r)
            ntk.fast_interaction_matrix(model, (x,), scale * r, ((x,), r))


# --- The adapter, and inputs that do not fit ------------------------------------------------------

def test_a_module_with_named_inputs_and_a_dict_or_a_tuple_becomes_a_function():
    torch.manual_seed(0)
    x, shift, r = (torch.randn(5, 3).double() for _ in range(3))

    def plain(m, x, shift):
        return m.a(x).tanh() + m.b(shift)

    model = Of(plain, a=linear(), b=linear()).double()
    G = plain_gradients(model, (x, shift), r)
    named = {"shift": shift, "x": x}
    f, params = ntk.of_module(model)
    assert close(ntk.interaction_matrix(f, params, named, r), G @ G.T)
    assert close(ntk.interaction_matrix(f, params, named, r, chunk=2), G @ G.T)
    assert close(ntk.fast_interaction_matrix(model, named, r), G @ G.T)
    K = ntk.ntk_blocks(f, params, (x, shift))
    assert close(ntk.ntk_blocks(f, params, named), K)

    answers = {"v": lambda m, x, shift: {"v": plain(m, x, shift), "other": x},
               0: lambda m, x, shift: (plain(m, x, shift), x)}
    for output, forward in answers.items():
        model.run = forward
        f, params = ntk.of_module(model, output)
        assert close(ntk.interaction_matrix(f, params, named, r), G @ G.T)
        # Without a choice it is both, and the second one has no gradient.
        f, params = ntk.of_module(model)
        both = torch.cat([r, r], 1)
        assert close(ntk.interaction_matrix(f, params, named, both), G @ G.T)


@pytest.mark.parametrize("forward, output, words", [
    (lambda m, x: {"v": m.a(x)}, "w", "returns a dict that has no 'w'"),
    (lambda m, x: (m.a(x),), 1, "returns a tuple that has no 1"),
    (lambda m, x: None, None, "returns a NoneType, not a tensor"),
    (lambda m, x: m.a(x).sum(), None, r"one sample with the shape \(\); the samples must be on"),
    (lambda m, x: {"v": m.a(x), "loss": m.a(x).sum()}, None, "`output` chooses one"),
    (lambda m, x: m.a(x).T, None, r"with the shape \(3, 1\)"),
    (lambda m, x: m.a(x).detach(), None, "the output has no gradient"),
    (lambda m, x: m.a(x).argmax(1), None, "the output has no gradient"),
])
def test_an_answer_that_is_no_batch_of_vectors_is_named(forward, output, words):
    f, params = ntk.of_module(Of(forward, a=linear()), output)
    x = torch.randn(5, 3)
    for call in (ntk.interaction_matrix, ntk.per_sample_gradients):
        with pytest.raises(ValueError, match=words):
            call(f, params, (x,), x)
    with pytest.raises(ValueError, match=words):
        ntk.ntk_blocks(f, params, (x,))


@pytest.mark.parametrize("pattern", ["BatchNorm in training", "BatchNorm without statistics",
                                     "spectral_norm in training", "a mask on a gradient",
                                     "pruned", "old weight_norm", "compiled"])
def test_a_module_whose_samples_have_no_gradient_becomes_no_function(pattern):
    """What the fast route refuses of a module itself, so does the clear route's of_module."""
    make, words = REFUSED[pattern]
    with pytest.raises(ValueError, match=words):
        ntk.of_module(make())


def test_without_that_refusal_the_clear_route_would_be_wrong_without_a_word(monkeypatch):
    """Twin: BatchNorm in training has other statistics for one image than for five."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)).double()
    x = torch.randn(5, 2, 4, 4).double()
    monkeypatch.setattr(ntk, "_require_separate_samples", lambda model: None)
    f, params = ntk.of_module(model)
    assert not close(torch.stack([f(params, one) for one in x]), model(x), 0.1)


def test_a_product_with_the_kernel_says_when_the_way_forward_is_another():
    """Forward, the way through no_grad counts. Attention without a fused kernel is no hindrance."""
    torch.manual_seed(0)
    x = torch.randn(5, 4, 3).double()
    wrong = ntk.of_module(Of(conditioned_on_itself, a=linear()).double())
    with pytest.raises(ValueError, match="the way back through f is not that forward"):
        ntk.ntk_vector_product(*wrong, (x,), x)
    impossible = ntk.of_module(RIGHT["an LSTM"][0]().double())
    with pytest.raises(ValueError, match="cannot take a step of f, but ntk_blocks can"):
        ntk.ntk_vector_product(*impossible, (x,), x[..., :2])
    right = ntk.of_module(Of(fused_attention, q=linear(), k=linear()).double())
    product = ntk.ntk_vector_product(*right, (x,), x)
    K = ntk.ntk_blocks(*right, (x,))
    assert close(product, torch.einsum("idje,je->id", K.transpose(1, 2), x.flatten(1)))


def test_a_backward_pass_that_is_wrong_for_several_vectors_is_run_for_each():
    """Torch's for cdist, so far; here one that is spoiled."""
    case = Case("foreign")
    K = ntk.ntk_blocks(*case.all)

    def spoiled(function, vectors):
        return torch.stack([function(vector) for vector in vectors]).flip(0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ntk, "_for_each", spoiled)
        assert close(ntk.ntk_blocks(*case.all), K)

    def distances(params, x):
        return torch.cdist(x[None], params["W"])[0]

    x, = case.inputs
    W, r = torch.randn(4, 3).double(), torch.randn(len(x), 4).double()
    M = ntk.interaction_matrix(distances, {"W": W}, (x,), r)
    K = ntk.ntk_blocks(distances, {"W": W}, (x,))
    assert close(torch.einsum("id,ijde,je->ij", r, K, r), M)


def test_the_example_of_the_docstring_runs():
    example = ntk.__doc__.split("it takes three lines:\n")[1].split("\nRun `")[0]
    model = linear().double()
    names = {"model": model, "torch": torch}
    lines = [line[4:] for line in example.strip("\n").splitlines()]
    exec("\n".join(lines), names)
    x, r = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    found = ntk.interaction_matrix(names["f"], names["params"], (x,), r)
    assert close(found, ntk.interaction_matrix(*ntk.of_module(model), (x,), r))


def test_residuals_need_not_be_contiguous():
    case = Case("convolution")
    strided = case.r.transpose(2, 3).contiguous().transpose(2, 3)
    assert not strided.is_contiguous()
    M = ntk.fast_interaction_matrix(case.model, case.inputs, case.r)
    assert close(ntk.fast_interaction_matrix(case.model, case.inputs, strided), M)
    assert close(ntk.interaction_matrix(*case.all, strided), M)
    assert close(ntk.interaction_matrix(*case.all, strided.flatten(1)), M)


def test_wrong_shapes_are_named():
    case = Case("foreign")
    x, = case.inputs
    for route in (ntk.interaction_matrix, ntk.ntk_vector_product, ntk.per_sample_gradients):
        with pytest.raises(ValueError, match=r"\(2, 2\) does not fit \(3, 2\)"):
            route(*case.all, case.r[:2])
        with pytest.raises(ValueError, match="does not fit"):
            route(*case.all, case.r[:, :1])
    with pytest.raises(ValueError, match="does not fit"):
        ntk.fast_interaction_matrix(case.model, case.inputs, case.r.T)
    for inputs in ((x, x[:2]), x, [x], (), (x, 3), {}, (x[:0],)):
        with pytest.raises(ValueError, match="same number of samples"):
            ntk.ntk_trace(case.f, case.params, inputs)
        with pytest.raises(ValueError, match="same number of samples"):
            ntk.fast_interaction_matrix(case.model, inputs, case.r)
    for route in (ntk.of_module, lambda f: ntk.fast_interaction_matrix(f, case.inputs, case.r)):
        with pytest.raises(ValueError, match="a function needs the clear route"):
            route(case.f)
    for r in (None, case.r.tolist(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="tensors with the samples on their first axis"):
            ntk.fast_interaction_matrix(case.model, case.inputs, r)
        with pytest.raises(ValueError, match="tensors with the samples on their first axis"):
            ntk.interaction_matrix(*case.all, r)
    with pytest.raises(ValueError, match="the vectors are complex, and the outputs are not"):
        ntk.interaction_matrix(*case.all, case.r * 1j)
    for columns in (x, (case.inputs,), (case.inputs, case.r, case.r)):
        with pytest.raises(ValueError, match="columns must be a pair"):
            ntk.fast_interaction_matrix(case.model, case.inputs, case.r, columns)
        with pytest.raises(ValueError, match="columns must be a pair"):
            ntk.interaction_matrix(*case.all, case.r, columns=columns)
    for call in (lambda chunk: ntk.ntk_blocks(*case.all, chunk),
                 lambda chunk: ntk.ntk_trace(*case.all, chunk),
                 lambda chunk: ntk.interaction_matrix(*case.all, case.r, chunk),
                 lambda chunk: ntk.fast_ntk_blocks(case.model, case.inputs, chunk)):
        with pytest.raises(ValueError, match="chunk must be 1 or more, not 0"):
            call(0)
    with pytest.raises(ValueError, match="all are frozen"):
        ntk.of_module(linear().requires_grad_(False))
    with pytest.raises(ValueError, match=r"a must be .steps, 2., not .3,."):
        ntk.step_noise(torch.ones(2, 2), torch.ones(3))
    M, K, r = torch.ones(2, 2), torch.ones(2, 2, 3, 3), torch.ones(3, 3)
    for call in (ntk.sign_agreement, ntk.kernel_drift, ntk.frozen_residuals, ntk.pairs_by_kind):
        inputs = {ntk.sign_agreement: (M, r), ntk.kernel_drift: (K[:1], K),
                  ntk.frozen_residuals: (K, r, 0.1), ntk.pairs_by_kind: (M, r, ("a", "b", "c"))}
        with pytest.raises(ValueError, match="must have the shape"):
            call(*inputs[call])
    with pytest.raises(ValueError, match="M of one batch is needed"):
        ntk.loss_velocity(torch.ones(2, 3))


# --- Eq. 13-17 and 22: what the kernel says -------------------------------------------------------

class Training:
    """L(params) = 1/(2N) sum_i |v_i - y_i|^2 of a small network, and a step of gradient descent."""

    def __init__(self):
        case = Case("foreign", n=4)
        self.f, self.params, self.inputs = case.all
        self.y = case.r
        self.r = self.residuals(self.params)
        self.M = ntk.interaction_matrix(*case.all, self.r)
        self.gradient = torch.func.grad(self.loss)(self.params)

    def residuals(self, params, some=slice(None)):
        x = self.inputs[0][some]
        return torch.stack([self.f(params, sample) for sample in x]) - self.y[some]

    def loss(self, params, some=slice(None)):
        r = self.residuals(params, some)
        return r.square().sum() / (2 * len(r))

    def stepped(self, eta, gradient=None):
        gradient = gradient or self.gradient
        return {name: p - eta * gradient[name] for name, p in self.params.items()}


def test_the_loss_falls_at_the_rate_of_the_interaction_matrix():
    """Eq. 13, 14."""
    training = Training()
    squared = sum(g.square().sum() for g in training.gradient.values())
    own, cross = ntk.loss_velocity(training.M)
    assert close(own + cross, -squared)
    # Twin: the trace alone.
    assert not close(own, -squared, 1e-2)

    def losses(params):
        return training.residuals(params).square().flatten(1).sum(1) / 2

    downhill = {name: -g for name, g in training.gradient.items()}
    _, slopes = torch.func.jvp(losses, (training.params,), (downhill,))
    mine, others = ntk.sample_velocities(training.M)
    assert close(mine + others, slopes)
    assert close((mine / 4).sum(), own)
    assert close((others / 4).sum(), cross)


def slope(x, y):
    x, y = torch.tensor(x).log(), torch.tensor(y).log()
    return ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()


ETAS = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4]


def test_the_error_of_a_real_step_falls_with_its_square():
    """Eq. 15."""
    training = Training()
    errors, wrong = [], []
    for eta in ETAS:
        change = training.loss(training.stepped(eta)) - training.loss(training.params)
        predicted = ntk.predicted_change(training.M, eta)
        errors.append((change - predicted).abs().item())
        wrong.append((change - 1.01 * predicted).abs().item())
    assert abs(slope(ETAS, errors) - 2) < 0.05
    # Twin: a hundredth off.
    assert slope(ETAS, wrong) < 1.8


def test_a_step_on_one_batch_changes_the_loss_of_another():
    """Eq. 22: by the rectangular M, up to the square of the step."""
    training = Training()
    rows, columns = slice(0, 1), slice(1, 4)
    x, r = training.inputs[0], training.r
    M = ntk.interaction_matrix(training.f, training.params, (x[rows],), r[rows],
                               columns=((x[columns],), r[columns]))
    gradient = torch.func.grad(lambda params: training.loss(params, columns))(training.params)
    before = training.loss(training.params, rows)
    errors, wrong = [], []
    for eta in ETAS:
        change = training.loss(training.stepped(eta, gradient), rows) - before
        predicted = ntk.predicted_change(M, eta)
        errors.append((change - predicted).abs().item())
        # Twin: a sum over the rows in place of their mean would be 3 times as large.
        wrong.append((change - 3 * predicted).abs().item())
    assert abs(slope(ETAS, errors) - 2) < 0.05
    assert slope(ETAS, wrong) < 1.2


@pytest.mark.parametrize("power, exact", [(1, True), (3, False)])
def test_the_frozen_kernel_is_exact_for_a_linear_model_and_only_for_it(power, exact):
    """Eq. 16."""
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    params = {"W": torch.randn(2, 3, dtype=torch.float64)}

    def f(params, x):
        return (params["W"] @ x) ** power

    def residuals(params):
        return torch.func.vmap(lambda sample: f(params, sample))(x) - y

    def loss(params):
        return residuals(params).square().sum() / 8

    K, r0 = ntk.ntk_blocks(f, params, (x,)), residuals(params)
    gradient = torch.func.grad(loss)
    # Gradient flow up to tau = 0.2, by small steps of the midpoint rule.
    eta = 0.2 / 100
    for _ in range(100):
        middle = {"W": params["W"] - eta / 2 * gradient(params)["W"]}
        params = {"W": params["W"] - eta * gradient(middle)["W"]}
    assert close(ntk.frozen_residuals(K, r0, 0.2), residuals(params), 1e-4) == exact
    drift = ntk.kernel_drift(ntk.ntk_blocks(f, params, (x,)), K)
    assert (drift < 1e-12) == exact


def test_frozen_residuals_never_grow():
    """In float32 a kernel of low rank has eigenvalues that are negative by rounding."""
    torch.manual_seed(0)
    J = torch.randn(4, 30, 5)
    K = torch.einsum("idp,jep->ijde", J, J)
    assert torch.linalg.eigvalsh(K.transpose(1, 2).reshape(120, 120)).min() < 0
    r = torch.randn(4, 30)
    # The eigenvectors are orthogonal up to rounding.
    allowed = r.norm() * (1 + 120 * torch.finfo(torch.float32).eps)
    for tau in (0.0, 1.0, 1e8, 1e9, 1e30):
        assert ntk.frozen_residuals(K, r, tau).norm() <= allowed


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_the_drift_of_a_kernel_that_grows_is_known(s):
    """Eq. 16: f = (W x)^3 has J ~ W^2, so that with s W the kernel is s^4 K(0)."""
    torch.manual_seed(0)
    x, W = torch.randn(4, 3).double(), torch.randn(2, 3).double()

    def f(params, x):
        return (params["W"] @ x) ** 3

    for kernel in (ntk.ntk_blocks, ntk.ntk_trace):
        start, K = kernel(f, {"W": W}, (x,)), kernel(f, {"W": s * W}, (x,))
        assert close(ntk.kernel_drift(K, start), torch.tensor(abs(s**4 - 1)).double())
        # Twin: measured by the end.
        assert not close(ntk.kernel_drift(start, K), ntk.kernel_drift(K, start), 0.1)
    # Frobenius: 36 ones have the length 6, and one of them moves by 3.
    start = torch.ones(2, 2, 3, 3).double()
    K = start.clone()
    K[0, 1, 2, 0] += 3
    assert ntk.kernel_drift(K, start).item() == pytest.approx(3 / 6)


def test_conflicts_cosines_and_signs_of_known_gradients():
    """Eq. 17, where the answer can be seen."""
    G = torch.tensor([[1.0, 0], [2, 0], [-3, 0], [0, 1]], dtype=torch.float64)
    M = G @ G.T
    known = [[1.0, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]]
    assert close(ntk.cosines(M), torch.tensor(known, dtype=torch.float64))
    # (0, 2) and (1, 2) of six pairs.
    assert ntk.conflict_share(M).item() == pytest.approx(2 / 6)
    by_group = ntk.conflict_share(M, torch.tensor([7, 7, 9, 9]))
    assert by_group.tolist() == [[0, 0.5], [0.5, 0]]
    assert math.isnan(ntk.conflict_share(M, torch.arange(4))[2, 2])
    # The kernel of the identity keeps every sign.
    assert ntk.sign_agreement(M, G)[0] == 1
    other = torch.tensor([[1.0], [1], [1], [0]]).double()
    assert ntk.sign_agreement(M, other)[0] == pytest.approx(4 / 6)


def test_a_gradient_that_is_zero_has_no_cosine():
    G = torch.tensor([[2.0, 0], [0, 0], [1, 1]]).double()
    found = ntk.cosines(G @ G.T)
    assert found.isnan().tolist() == [[False, True, False], [True] * 3, [False, True, False]]
    assert found[0, 2].item() == pytest.approx(1 / math.sqrt(2))


def test_agreement_by_chance_is_that_of_signs_which_meet_at_random():
    """Every sign of one kind with every sign of the other."""
    generator = torch.Generator().manual_seed(0)
    g, r = torch.randn(7, 4, generator=generator) + 0.4, torch.randn(7, 3, generator=generator)
    r[6] = 0                                                           # has no sign with any other
    i, j = torch.triu_indices(7, 7, 1)
    of_gradients, of_outputs = (g @ g.T)[i, j].sign(), (r @ r.T)[i, j].sign()
    agreement, by_chance = ntk.sign_agreement(g @ g.T, r)
    met = of_gradients[:, None] == of_outputs
    assert by_chance.item() == pytest.approx(met.float().mean().item())
    assert agreement.item() == pytest.approx(met.diagonal().float().mean().item())


EVERY_STEP = {
    "any three": list(itertools.combinations(range(8), 3)),
    "one root": [(0, 1, 2), (3, 4, 5), (6, 7)],
    "one of each half": list(itertools.product(range(4), range(4, 8))),
}


def weights_of(steps, scaling):
    """(steps, 8) weights: "view" gives every view the same, "root" the mean of a step's views."""
    a = torch.zeros(len(steps), 8, dtype=torch.float64)
    for row, views in zip(a, steps):
        row[list(views)] = 1 / len(views) if scaling == "root" else 1.0
    if scaling == "view":
        a *= len(steps) / (8 * (a > 0).sum(0).double())
    return a


@pytest.mark.parametrize("scheme", EVERY_STEP)
@pytest.mark.parametrize("scaling", ["root", "view"])
def test_the_noise_of_a_step_is_that_of_every_possible_step(scheme, scaling):
    """Eq. 23, by enumeration: the gradient of each step by a backward pass of its own."""
    torch.manual_seed(0)
    model = foreign().double()
    x, r = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    M = ntk.fast_interaction_matrix(model, (x,), r)
    a = weights_of(EVERY_STEP[scheme], scaling)
    gradients = []
    for weights in a:
        g = torch.autograd.grad(model(x), model.parameters(), weights[:, None] * r)
        gradients.append(torch.cat([one.flatten() for one in g]))
    ghat = torch.stack(gradients)
    square, of_mean = ntk.step_noise(M, a)
    assert close(square, ghat.square().sum(1).mean())
    assert close(of_mean, ghat.mean(0).square().sum())
    assert close(square - of_mean, (ghat - ghat.mean(0)).square().sum(1).mean())
    # Twin: steps that are not equally likely.
    assert not close(ntk.step_noise(M, torch.cat([a, a[:1]]))[0], square, 1e-3)
    # Equal shares: the expected gradient is the plain mean. The weights 1/K_g change it where K_g
    # varies, and nothing else here does.
    unchanged = scaling == "view" or scheme != "one root"
    assert close(of_mean, M.mean(), 1e-9) == unchanged


def test_agreeing_tuples_make_a_step_noisier_and_conflicting_ones_quieter():
    """Eq. 23, where the answer can be seen: two roots of two views."""
    together = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]) / 2
    any_two = torch.zeros(6, 4)
    for row, views in zip(any_two, itertools.combinations(range(4), 2)):
        row[list(views)] = 1 / 2
    for sign in (1, -1):
        # The views of a root agree, or conflict; between roots there is nothing.
        of_root = torch.tensor([[1.0, 0.5 * sign], [0.5 * sign, 1.0]])
        M = torch.block_diag(of_root, of_root)
        tuples, tuples_mean = ntk.step_noise(M, together)
        random, random_mean = ntk.step_noise(M, any_two)
        assert tuples_mean == pytest.approx(random_mean)
        assert (tuples > random) == (sign > 0)


def test_a_density_and_a_weight_of_the_loss_have_one_expectation_and_two_noises():
    """Eq. 23: of three noise levels, one in a step, with the weight or the frequency 3 : 2 : 1."""
    weight = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    g = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_weight = torch.diag(weight)                     # each level in one step of three
    by_density = 2 * torch.eye(3, dtype=torch.float64)[[0, 0, 0, 1, 1, 2]]
    squared, mean = ntk.step_noise(g @ g.T, by_weight)
    squared_density, mean_density = ntk.step_noise(g @ g.T, by_density)
    assert mean == pytest.approx(mean_density.item())
    each = g.square().sum(1)
    assert squared == pytest.approx((weight**2 * each).mean().item())
    assert squared_density == pytest.approx((2 * weight * each).mean().item())
    assert abs(squared - squared_density) > 0.1 * squared


# --- The benchmark and the demo -------------------------------------------------------------------

def test_the_benchmarks_competitors_give_the_same_kernel(case):
    def flat(params, *one):
        return case.f(params, *one).flatten()

    assert close(bench_ntk.method_1(flat, case.params, case.inputs), case.K)
    assert close(bench_ntk.method_2(flat, case.params, case.inputs), case.K)


def test_the_benchmark_prints_ratios_and_peaks(monkeypatch):
    monkeypatch.setattr(bench_ntk, "LONG_ENOUGH", 0.01)

    def make(N):
        return (torch.randn(N, 2, 4, 4),)

    layer = nn.Conv2d(2, 3, 1)
    rows = bench_ntk.contest_of_kernels(layer, make, 1, "cpu", (2, 2))
    rows += bench_ntk.contest_of_matrices(layer, make, 1, "cpu", (3,))
    assert [(row.what, row.other) for row in rows] == [
        ("K, N = 2", "method_1"), ("K, N = 2", "method_2"),
        ("M, N = 3", "vmap(grad)"), ("M, N = 3, unproved", "vmap(grad)")]
    for row in rows:
        assert row.ratio == pytest.approx(row.their_seconds / row.seconds)
        assert row.bytes >= 0
        assert row.their_bytes >= 0


def test_the_cost_counts_the_memory_that_is_needed():
    # 200 MiB, in a process that was small before.
    work = ("import torch; from results import bench_ntk\n"
            "def ones(): torch.ones(50, 2**20).sum()\n"
            "print(*bench_ntk.cost(ones, 'cpu'))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", work], text=True, check=True,
                          cwd=Path(ntk.__file__).parent, capture_output=True)
    seconds, peak = map(float, done.stdout.split())
    assert 200 * 2**20 < peak < 300 * 2**20
    assert seconds > 0


def test_the_demo_prints_what_the_readme_says_of_the_frozen_kernel(capsys):
    """Eq. 13: both sides as they are printed. Eq. 16: the page's shares, to a point and a half."""
    ntk.main()
    printed = capsys.readouterr().out
    numbers = printed.split("dL/dtau = ")[1]
    own, cross = float(numbers.split()[0]), float(numbers.split()[4])
    squared = float(numbers.split("|grad L|^2 = ")[1].split()[0])
    assert own + cross == pytest.approx(squared, abs=0.2)

    shares = re.findall(r"(\S+)% of the loss is left, a frozen kernel says (\S+)%; K has moved by "
                        r"(\S+)%", printed)
    early, early_frozen, early_drift = map(float, shares[0])
    late, late_frozen, late_drift = map(float, shares[1])
    assert abs(early_frozen - early) < 1.5
    assert late_frozen - late > 5
    page = (Path(ntk.__file__).parent / "README.md").read_text(encoding="utf-8")
    said = re.search(r"At a drift of (\d+)% it predicts that (\d+)% of the loss is left, and "
                     r"(\d+)% is; at (\d+)% it predicts (\d+)%, and (\d+)% is", page)
    measured = (early_drift, early_frozen, early, late_drift, late_frozen, late)
    assert [float(share) for share in said.groups()] == pytest.approx(measured, abs=1.5)
