"""Eq. 10-17: the clear route, the fast route and a plain loop of autograd agree; closed forms, slopes, sabotaged twins. float64."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import dit
import ntk
from results import bench_ntk
import unet

NETWORKS = {
    "dit": lambda: (dit.DiT(20, 4, 2, 8, 1, 2), True),
    "unet": lambda: (unet.UNet(20, 8, (8, 8, 8), 8, 1), True),
    "foreign": lambda: (nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2, bias=False)), False),
    "convolution": lambda: (nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1), nn.GroupNorm(3, 3), nn.SiLU(), nn.Conv2d(3, 1, 2)), False),
}


def build(name, n=3):
    """A float64 network away from its zero start, as (model, f, params, inputs, residuals)."""
    torch.manual_seed(0)
    model, ours = NETWORKS[name]()
    model = model.double()
    for weight in model.parameters():
        if not weight.any():
            nn.init.normal_(weight, std=0.3)
    x = torch.randn(n, *{"foreign": (3,), "convolution": (2, 5, 5), "unet": (3, 8, 8)}.get(name, (3, 4, 4)), dtype=torch.float64)
    inputs = (x, torch.rand(n, dtype=torch.float64), torch.randint(20, (n, 4))) if ours else (x,)
    f = lambda params, *one: functional_call(model, params, tuple(z[None] for z in one))[0]
    params = {name: p.detach() for name, p in model.named_parameters()}
    return model, f, params, inputs, torch.randn_like(model(*inputs)).detach()


def jacobians(model, inputs):
    """The plain loop: (N, D, P), one autograd.grad for each output of each sample."""
    rows = []
    for i in range(len(inputs[0])):
        v = model(*(z[i:i + 1] for z in inputs)).flatten()
        grads = [torch.autograd.grad(x, list(model.parameters()), retain_graph=True, allow_unused=True) for x in v]
        rows.append(torch.stack([torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(grad, model.parameters())])
                                 for grad in grads]))
    return torch.stack(rows)


@pytest.fixture(params=NETWORKS, scope="module")
def case(request):
    model, f, params, inputs, r = build(request.param)
    return model, f, params, inputs, r, jacobians(model, inputs)


def close(a, b, tolerance=1e-12):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


def test_all_routes_to_the_kernel_agree(case):
    """Eq. 11."""
    model, f, params, inputs, r, J = case
    K = torch.einsum("idp,jep->ijde", J, J)
    assert close(ntk.ntk_blocks(f, params, inputs), K) and close(ntk.fast_ntk_blocks(model, inputs), K)
    assert close(ntk.ntk_trace(f, params, inputs), K.diagonal(dim1=2, dim2=3).sum(2))
    assert not close(ntk.ntk_blocks(f, params, inputs).transpose(2, 3), K, 1e-3)                   # twin: transposed blocks
    flat = K.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)                                          # (ND, ND)
    assert close(flat, flat.T) and torch.linalg.eigvalsh(flat).min() >= -1e-10 * torch.linalg.eigvalsh(flat).max()


def test_all_routes_to_the_interaction_matrix_agree(case):
    """Eq. 10, 12."""
    model, f, params, inputs, r, J = case
    G = torch.einsum("idp,id->ip", J, r.flatten(1))
    K = ntk.ntk_blocks(f, params, inputs)
    by_kernel = torch.einsum("id,ijde,je->ij", r.flatten(1), K, r.flatten(1))
    for M in (ntk.interaction_matrix(f, params, inputs, r), ntk.fast_interaction_matrix(model, inputs, r), by_kernel):
        assert close(M, G @ G.T)
    assert close(ntk.per_sample_gradients(f, params, inputs, r), G)
    if len(inputs) == 3:                                                                           # twin: the time left out
        assert not close(ntk.fast_interaction_matrix(model, (inputs[0], 0 * inputs[1], inputs[2]), r), G @ G.T, 1e-3)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_a_missing_bias_is_noticed(name, monkeypatch):
    model, f, params, inputs, r = build(name)
    truth = ntk.interaction_matrix(f, params, inputs, r)
    original = ntk._share
    def forgetful(layer, a, b):
        bias, layer.bias = getattr(layer, "bias", None), None
        try:
            return original(layer, a, b)
        finally:
            if bias is not None:
                layer.bias = bias
    monkeypatch.setattr(ntk, "_share", forgetful)
    assert not close(ntk.fast_interaction_matrix(model, inputs, r), truth, 1e-3)


def test_both_sides_of_the_choice_are_the_same():
    a, b = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    by_gradients = ntk._gram(torch.einsum("nti,cnto->cnio", a, b))
    assert close(ntk._linear_share(a, b), by_gradients)
    for T, I in ((1, 2), (40, 2), (2, 40)):                                # few or many places, narrow or wide
        a, b = torch.randn(3, T, I, dtype=torch.float64), torch.randn(2, 3, T, I, dtype=torch.float64)
        assert close(ntk._linear_share(a, b), ntk._gram(torch.einsum("nti,cnto->cnio", a, b)))


def test_kernel_vector_products(case):
    model, f, params, inputs, r, J = case
    rows = J.flatten(0, 1)
    product = ntk.ntk_vector_product(f, params, inputs, r)
    assert close(product.flatten(), rows @ (rows.T @ r.flatten()))
    step = 1e-6                                                            # and by a finite difference along g
    g = rows.T @ r.flatten()
    parts = dict(zip(params, g.split([p.numel() for p in params.values()])))
    at = lambda s: torch.stack([f({k: p + s * parts[k].view_as(p) for k, p in params.items()}, *(z[i] for z in inputs)) for i in range(3)])
    scale = step / g.norm()
    assert close((at(scale) - at(-scale)).flatten(1) / (2 * scale), product, 1e-6)
    assert not close(torch.einsum("idp,iep,ie->id", J, J, r.flatten(1)), product, 1e-3)            # twin: off-diagonal blocks dropped


def test_a_linear_model_has_the_kernel_of_its_inputs():
    x, W = torch.randn(4, 3, dtype=torch.float64), {"W": torch.randn(2, 3, dtype=torch.float64)}
    K = ntk.ntk_blocks(lambda p, x: p["W"] @ x, W, (x,))
    assert close(K, torch.einsum("ij,de->ijde", x @ x.T, torch.eye(2, dtype=torch.float64)))


def test_a_parameter_used_twice_counts_twice():
    x = torch.randn(4, 3, dtype=torch.float64)
    K = ntk.ntk_trace(lambda p, x: p["w"] @ x + p["w"] @ x, {"w": torch.randn(3, dtype=torch.float64)}, (x,))
    assert close(K, 4 * x @ x.T)


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
def test_chunks_change_nothing(chunk):
    model, f, params, inputs, r = build("foreign")
    assert close(ntk.ntk_blocks(f, params, inputs, chunk), ntk.ntk_blocks(f, params, inputs))
    assert close(ntk.ntk_trace(f, params, inputs, chunk), ntk.ntk_trace(f, params, inputs))
    assert close(ntk.interaction_matrix(f, params, inputs, r, chunk), ntk.interaction_matrix(f, params, inputs, r))
    assert close(ntk.fast_ntk_blocks(model, inputs, chunk), ntk.ntk_blocks(f, params, inputs))


def test_one_sample_frozen_and_unused_parameters_and_float32():
    model, f, params, inputs, r = build("foreign", n=1)
    assert ntk.ntk_trace(f, params, inputs).shape == (1, 1)
    assert close(ntk.fast_interaction_matrix(model, inputs, r), ntk.interaction_matrix(f, params, inputs, r))
    model.spare = nn.Linear(2, 2).double()
    model[0].weight.requires_grad_(False)
    trained = {name: p.detach() for name, p in model.named_parameters() if name != "0.weight" and "spare" not in name}
    frozen = lambda p, x: f(p | {"0.weight": params["0.weight"]}, x)
    model.forward = lambda x: nn.Sequential(*list(model)[:6])(x)
    assert close(ntk.fast_interaction_matrix(model, inputs, r), ntk.interaction_matrix(frozen, trained, inputs, r))
    model, f, params, inputs, r = build("dit")
    truth = ntk.fast_ntk_blocks(model, inputs)
    single = tuple(z.float() if z.is_floating_point() else z for z in inputs)
    assert close(ntk.fast_ntk_blocks(model.float(), single).double(), truth, 1e-5)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


class Aside(Twice):
    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight)


class Named(Twice):
    def forward(self, x):
        return self.layer(input=x)


class InPlace(nn.Module):
    """What the layers were given and what they gave is overwritten afterwards."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(3, 8), nn.Linear(8, 3), nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.act(self.a(x))
        v = self.b(h)
        v += 1
        v *= 2
        return v


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * x


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("model, words", [
    (Twice(), "layer is called 2 times"), (Aside(), "layer.weight is used, but its layer is never called"), (Named(), "by keyword"), (Raw(), "Raw"), (tied(), "1 shares a parameter with 0"), (nn.Sequential(nn.BatchNorm1d(3)), "couples the samples"),
    (nn.Sequential(nn.Bilinear(3, 3, 3)), "0 .Bilinear."), (nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), "0 .Conv2d."),
    (nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 3)), "couples the samples")])
def test_the_fast_route_refuses_what_it_does_not_cover(model, words):
    with pytest.raises(ValueError, match=words):
        ntk.fast_interaction_matrix(model, (torch.randn(2, 3),), torch.randn(2, 3))


def test_work_in_place_changes_nothing():
    torch.manual_seed(0)
    model, x, r = InPlace().double(), torch.randn(5, 3).double(), torch.randn(5, 3).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    plain = lambda p, x: (F.linear(F.linear(x, p["a.weight"], p["a.bias"]).relu(), p["b.weight"], p["b.bias"]) + 1) * 2
    assert close(ntk.fast_interaction_matrix(model, (x,), r), ntk.interaction_matrix(plain, params, (x,), r))
    assert close(ntk.fast_ntk_blocks(model, (x,)), ntk.ntk_blocks(plain, params, (x,)))


def test_wrong_shapes_are_named():
    model, f, params, inputs, r = build("foreign")
    for route in (ntk.interaction_matrix, ntk.ntk_vector_product):
        with pytest.raises(ValueError, match=r"\(2, 2\) does not fit \(3, 2\)"):
            route(f, params, inputs, r[:2])
    with pytest.raises(ValueError, match="same number of samples"):
        ntk.ntk_trace(lambda p, x, y: x, params, (inputs[0], inputs[0][:2]))


# --- Eq. 13-17 ---

def training(name="foreign"):
    """f, params, inputs, targets and L(params) = 1/(2N) sum_i |v_i - y_i|^2."""
    model, f, params, inputs, y = build(name, n=4)
    residuals = lambda p: torch.func.vmap(lambda *one: f(p, *one))(*inputs) - y
    return f, params, inputs, residuals, lambda p: residuals(p).square().sum() / 8


def test_the_loss_falls_at_the_rate_of_the_interaction_matrix():
    f, params, inputs, residuals, L = training()
    M = ntk.interaction_matrix(f, params, inputs, residuals(params))
    grad = torch.func.grad(L)(params)
    norm = -sum(g.square().sum() for g in grad.values())
    own, cross = ntk.loss_velocity(M)
    assert close(own + cross, norm)                                                                # Eq. 13
    assert not close(own, norm, 1e-2)                                                              # twin: the trace alone
    _, slopes = torch.func.jvp(lambda p: residuals(p).square().flatten(1).sum(1) / 2, (params,), ({k: -g for k, g in grad.items()},))
    mine, others = ntk.sample_velocities(M)
    assert close(mine + others, slopes)                                                            # Eq. 14
    assert close((mine / 4).sum(), own) and close((others / 4).sum(), cross)


def slope(x, y):
    x, y = torch.tensor(x).log(), torch.tensor(y).log()
    return ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()


def test_the_error_of_a_real_step_falls_with_its_square():
    f, params, inputs, residuals, L = training()
    M, grad = ntk.interaction_matrix(f, params, inputs, residuals(params)), torch.func.grad(L)(params)
    etas = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4]
    change = lambda eta: L({k: p - eta * grad[k] for k, p in params.items()}) - L(params)
    errors = [(change(eta) - ntk.predicted_change(M, eta)).abs().item() for eta in etas]
    assert abs(slope(etas, errors) - 2) < 0.05                                                     # Eq. 15
    wrong = [(change(eta) - 1.01 * ntk.predicted_change(M, eta)).abs().item() for eta in etas]
    assert slope(etas, wrong) < 1.8                                                                # twin: 1% off


def test_the_frozen_kernel_is_exact_for_a_linear_model_and_only_for_it():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    for power, exact in ((1, True), (3, False)):
        f = lambda p, x: (p["W"] @ x) ** power
        params = {"W": torch.randn(2, 3, dtype=torch.float64)}
        v = lambda p: torch.func.vmap(lambda x: f(p, x))(x)
        K, r0, steps = ntk.ntk_blocks(f, params, (x,)), v(params) - y, 5000
        grad = torch.func.grad(lambda p: (v(p) - y).square().sum() / 8)
        for _ in range(steps):                                             # gradient flow up to tau = 0.2, by small steps
            params = {k: p - 0.2 / steps * g for (k, p), g in zip(params.items(), grad(params).values())}
        assert close(ntk.frozen_residuals(K, r0, 0.2), v(params) - y, 1e-4) == exact               # Eq. 16
        drift = ntk.kernel_drift(ntk.ntk_blocks(f, params, (x,)), K)
        assert (drift < 1e-12) == exact


def test_conflicts_cosines_and_signs_of_known_gradients():
    """Eq. 17, where the answer can be seen."""
    G = torch.tensor([[1.0, 0], [2, 0], [-3, 0], [0, 1]], dtype=torch.float64)
    M = G @ G.T
    assert close(ntk.cosines(M), torch.tensor([[1.0, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]], dtype=torch.float64))
    assert ntk.conflict_share(M).item() == pytest.approx(2 / 6)            # (0, 2) and (1, 2) of six pairs
    by_group = ntk.conflict_share(M, torch.tensor([7, 7, 9, 9]))
    assert by_group[0, 0] == 0 and by_group[1, 1] == 0 and by_group[0, 1] == by_group[1, 0] == 0.5
    assert math.isnan(ntk.conflict_share(M, torch.arange(4))[2, 2])
    assert ntk.sign_agreement(M, G) == 1                                   # the kernel of the identity keeps every sign
    assert ntk.sign_agreement(M, torch.tensor([[1.0], [1], [1], [0]]).double()) == pytest.approx(4 / 6)


def test_the_benchmarks_competitors_give_the_same_kernel(case):
    model, f, params, inputs, *_ = case
    K = ntk.fast_ntk_blocks(model, inputs)
    flat = lambda weights, *one: f(weights, *one).flatten()
    assert close(bench_ntk.jacobian_contraction(flat, params, inputs), K)
    assert close(bench_ntk.pairwise_vector_products(flat, params, inputs), K)


@pytest.mark.parametrize("hold", [500])
def test_layers_in_groups_change_nothing(case, hold):
    model, _, _, inputs, *_ = case
    assert close(ntk.fast_ntk_blocks(model, inputs, hold=hold), ntk.fast_ntk_blocks(model, inputs))


def test_the_benchmark_prints_ratios_and_peaks():
    rows = bench_ntk.contest(nn.Linear(30, 40), lambda n: (torch.randn(n, 30),), 1, "cpu", (2, 2, 3, 5))
    assert [row[:2] for row in rows] == [("K, N = 2", "method 1"), ("K, N = 2", "method 2"), ("M, N = 3", "vmap(grad)"), ("M, N = 5", "vmap(grad)")]
    for _, _, ratio, quick, slow, small, large in rows:
        assert ratio == pytest.approx(slow / quick) and small >= 0 and large >= 0


def test_the_cost_counts_the_memory_that_is_needed():
    work = "import torch; from results import bench_ntk; print(*bench_ntk.cost(lambda: torch.ones(50, 2**20).sum(), 'cpu'))"   # 200 MiB, in a process that was small before
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", work], cwd=Path(ntk.__file__).parent, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stdout.split())
    assert 200 * 2**20 < peak < 300 * 2**20 and seconds > 0


def test_demo_draws(tmp_path, capsys):
    ntk.main(tmp_path / "picture.png")
    printed = capsys.readouterr().out
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert [float(word) for word in printed.split("1e-6: [")[1].split("]")[0].split()][-3:] == pytest.approx([2, 2, 2], abs=0.05)
