"""Eq. 1-9: closed forms, second routes, slopes; and for the identities a sabotaged twin that must break them."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import flow_matching as fm
import toy_data


def rand(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(n, low=0.05, high=0.95, seed=9):
    return low + (high - low) * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_noise_is_at_one_and_data_at_zero():
    """Eq. 1: both ends of the path."""
    x0, e = rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1)
    assert torch.equal(fm.path(x0, e, torch.zeros(3)), x0)
    assert torch.equal(fm.path(x0, e, torch.ones(3)), e)


def test_target_is_the_derivative_of_the_path():
    """Eq. 2: the target by automatic differentiation of the path."""
    x0, e, t = rand(3, 4), rand(3, 4, seed=1), times(3)
    _, slope = torch.func.jvp(lambda t: fm.path(x0, e, t), (t,), (torch.ones_like(t),))
    assert torch.allclose(slope, fm.target(x0, e), atol=1e-15)
    assert torch.allclose((fm.path(x0, e, t) - x0) / t[:, None], fm.target(x0, e), atol=1e-12)      # Eq. 2's other form


def test_loss_is_zero_for_the_target_and_known_for_a_constant_error():
    """Eq. 3 in two cases that need no formula."""
    x0, e, t = rand(5, 3, 4, 4), rand(5, 3, 4, 4, seed=1), times(5)
    assert fm.loss(lambda *_: e - x0, x0, None, t, e).abs().max() == 0
    assert fm.loss(lambda x_t, t, tokens: (x_t - x0) / t[:, None, None, None], x0, None, t, e).max() < 1e-24       # Eq. 2's other form, at x_t and t
    one_wrong = torch.zeros_like(x0)
    one_wrong[2, 0, 0, 0] = 4.0                                            # 4^2 over D = 48 outputs
    assert torch.allclose(fm.loss(lambda *_: e - x0 + one_wrong, x0, None, t, e), torch.tensor([0, 0, 16 / 48, 0, 0], dtype=torch.float64))


def test_loss_is_float32_although_the_network_is_bfloat16():
    x0, e = rand(4, 3).float(), rand(4, 3, seed=1).float()
    value = fm.loss(lambda x, t, c: x.bfloat16(), x0, None, torch.full((4,), 0.5), e)
    assert value.dtype == torch.float32
    assert not torch.equal(value, value.bfloat16().float())                # it holds digits that bfloat16 has not


# --- Eq. 4: the exact velocity by three other routes ---

def test_exact_velocity_of_one_point_leads_straight_to_it():
    x0, e, t = rand(1, 6), rand(4, 6, seed=1), times(4)
    assert torch.allclose(fm.exact_velocity(fm.path(x0.expand(4, 6), e, t), t, x0), e - x0, atol=1e-12)


def score_velocity(x, t, points, pi):
    """The same velocity from autograd of the log density of x_t: E[e | x] = -t grad log p, x0 = (x - t e) / (1 - t)."""
    def log_density(x, t):
        parts = Independent(Normal((1 - t) * points, t), 1)
        return MixtureSameFamily(Categorical(pi), parts).log_prob(x)
    score = torch.func.vmap(torch.func.grad(log_density))(x, t)
    e = -t[:, None] * score
    return e - (x - t[:, None] * e) / (1 - t[:, None])


def test_exact_velocity_is_that_of_the_score():
    """Eq. 4 by way of the score: the gradient of log p, by automatic differentiation."""
    points, pi = rand(6, 3, seed=2), torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.float64) / 21
    x, t = rand(50, 3, seed=3), times(50)
    exact = fm.exact_velocity(x, t, points, pi)
    assert torch.allclose(exact, score_velocity(x, t, points, pi), atol=1e-9)
    assert not torch.allclose(exact, score_velocity(x, t, points, pi.flip(0)), atol=1e-2)       # twin: wrong weights
    assert not torch.allclose(exact, score_velocity(x, t * 0.9, points, pi), atol=1e-2)         # twin: wrong noise level


def test_exact_velocity_of_a_gaussian_by_quadrature():
    sigma, nodes = 0.7, torch.linspace(-6, 6, 4001, dtype=torch.float64)
    x, t = rand(40, 1, seed=4), times(40, 0.1)
    by_sum = fm.exact_velocity(x, t, nodes[:, None], Normal(0, sigma).log_prob(nodes).exp())
    gain = (t - (1 - t) * sigma**2) / ((1 - t) ** 2 * sigma**2 + t**2)     # E[e - x0 | x] of joint Gaussians: cov / var
    assert torch.allclose(by_sum, gain[:, None] * x, atol=1e-9)


def test_populations_may_differ_from_sample_to_sample():
    points, x, t = rand(3, 5, 2, seed=5), rand(3, 2), times(3)
    alone = torch.cat([fm.exact_velocity(x[i:i + 1], t[i:i + 1], points[i]) for i in range(3)])
    assert torch.allclose(fm.exact_velocity(x, t, points), alone, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, -0.1, 1.1])
def test_exact_velocity_refuses_times_outside_its_range(t):
    with pytest.raises(ValueError, match="0 < t <= 1"):
        fm.exact_velocity(rand(1, 2), torch.tensor([t]), rand(3, 2))


# --- Eq. 5 ---

def excess(points, believed, n=200_000):
    """The z-score of E|v - u|^2 - E|v - u*|^2 - E|u - u*|^2 for u* of the `believed` population, data from `points`."""
    generator = torch.Generator().manual_seed(6)
    x0 = points[torch.randint(len(points), (n,), generator=generator)]
    e, t = torch.randn(n, 2, generator=generator, dtype=torch.float64), 0.1 + 0.9 * torch.rand(n, generator=generator, dtype=torch.float64)
    x_t = fm.path(x0, e, t)
    v = torch.sin(3 * x_t) + t[:, None]                                    # any function of (x_t, t) will do
    u, u_star = fm.target(x0, e), fm.exact_velocity(x_t, t, believed)
    gap = ((v - u) ** 2 - (v - u_star) ** 2 - (u - u_star) ** 2).mean(1)
    assert torch.allclose(((u - u_star) ** 2).mean(1), fm.loss_floor(x0, e, t, believed))
    return (gap.mean() / (gap.std() / math.sqrt(n))).abs()


def test_the_loss_is_the_error_plus_the_floor():
    """Eq. 5 by sampling."""
    points = rand(5, 2, seed=7)
    assert excess(points, points) < 4
    assert excess(points, points[:4]) > 10                                 # twin: a point of the population forgotten
    assert excess(points, points + 0.05) > 4                               # twin: a slightly wrong population


# --- Eq. 6 ---

def sampler_slope(sampler):
    """The order of a sampler on dx/dt = x cos 3t, whose solution from t = 1 to 0 is x exp(-(sin 3) / 3)."""
    x, steps, errors = rand(4, 3), [64, 128, 256, 512], []
    for n in steps:
        end = sampler(lambda x, t: x * torch.cos(3 * t)[:, None], x, torch.linspace(1, 0, n + 1, dtype=torch.float64))
        errors.append((end - x * math.exp(-math.sin(3) / 3)).abs().max().log().item())
    return (errors[-1] - errors[0]) / math.log(steps[-1] / steps[0])


def test_euler_is_of_first_and_heun_of_second_order():
    """Eq. 6: slopes of the error."""
    assert abs(sampler_slope(fm.euler) + 1) < 0.1
    assert abs(sampler_slope(fm.heun) + 2) < 0.1


def test_samplers_take_any_grid_and_both_directions():
    velocity, x, grid = lambda x, t: torch.ones_like(x), rand(2, 3), torch.tensor([1.0, 0.7, 0.65, 0.0])
    for sampler in (fm.euler, fm.heun):
        assert torch.allclose(sampler(velocity, x, grid), x - 1)
        assert torch.allclose(sampler(velocity, x, grid.flip(0)), x + 1)


def test_samples_of_the_exact_velocity_are_the_population():
    points = 2 * rand(4, 2, seed=8)
    end = fm.euler(lambda x, t: fm.exact_velocity(x, t, points), rand(64, 2), torch.linspace(1, 0, 400, dtype=torch.float64))
    assert torch.cdist(end, points).min(1).values.max() < 0.01


def test_guidance_is_off_at_one_and_linear():
    """Eq. 6: the guided velocity."""
    model = lambda x, t, tokens: x + tokens.sum(1, keepdim=True)           # the null caption (all zeros) adds nothing
    x, t, tokens = rand(3, 2), times(3), torch.tensor([[1, 2], [3, 0], [0, 0]])
    at = lambda s: fm.guided(model, tokens, s)(x, t)
    assert torch.equal(at(1), model(x, t, tokens))
    assert torch.equal(at(0), x)
    assert torch.allclose(at(3), at(0) + 3 * (at(1) - at(0)))
    assert not torch.allclose(at(3), at(1))


# --- Eq. 7-9 ---

PARTITIONS = {"by size": torch.arange(18) % 2, "by jitter": torch.arange(18) // 2,
              "random": torch.randint(4, (18,), generator=torch.Generator().manual_seed(3)), "one group": torch.zeros(18, dtype=torch.long)}


@pytest.fixture(scope="module")
def toy():
    """x_t, t, v, the 18 images of each caption and unequal weights, float64."""
    scenes = toy_data.sample_scenes(5, torch.Generator().manual_seed(0))
    everything = toy_data.population(scenes)
    points = toy_data.render(everything, toy_data.view_boxes(everything, "macro"), 12).double().unflatten(0, (5, 18))
    t = times(5, 0.5, 0.95)                                                # noisy enough for several images to share the posterior
    x_t = fm.path(points[:, 4], rand(5, 3, 12, 12), t)
    pi = torch.linspace(1, 2, 18, dtype=torch.float64)
    return x_t, t, rand(5, 3, 12, 12, seed=1), points, pi / pi.sum()


@pytest.mark.parametrize("groups", PARTITIONS.values(), ids=PARTITIONS)
def test_groups_make_up_the_velocity(toy, groups):
    x_t, t, v, points, pi = toy
    omega, u_g = fm.group_velocities(x_t, t, points, groups, pi)
    u_star = fm.exact_velocity(x_t, t, points, pi)
    assert torch.allclose(omega.sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(torch.einsum("ng,ngchw->nchw", omega, u_g), u_star, atol=1e-10)            # Eq. 7
    form = lambda weights: torch.einsum("ng,ngh,nh->n", weights, fm.data_interaction_matrix(v, u_g), weights)
    norm = lambda x: (x * x).flatten(-3).sum(-1)
    assert torch.allclose(form(omega), norm(v - u_star), rtol=1e-11)                                 # Eq. 8
    alone, spread = norm(v[:, None] - u_g), norm(u_g - u_star[:, None])
    assert torch.allclose((omega * alone).sum(1), norm(v - u_star) + (omega * spread).sum(1), rtol=1e-11)   # Eq. 9
    if len(u_g[0]) > 1:                                                    # twins: equal shares; the diagonal alone
        assert not torch.allclose(form(torch.full_like(omega, 1 / omega.shape[1])), norm(v - u_star), rtol=1e-6)
        assert not torch.allclose((omega**2 * alone).sum(1), norm(v - u_star), rtol=1e-6)


def test_the_last_term_of_equation_9_has_no_network_in_it(toy):
    """Eq. 9: the gradient of both sides."""
    x_t, t, v, points, pi = toy
    omega, u_g = fm.group_velocities(x_t, t, points, PARTITIONS["random"], pi)
    u_star = fm.exact_velocity(x_t, t, points, pi)
    alone = lambda v: (omega * (v[:, None] - u_g).square().flatten(2).sum(2)).sum()
    whole = lambda v: (v - u_star).square().sum()
    assert torch.allclose(torch.func.grad(alone)(v), torch.func.grad(whole)(v), atol=1e-9)


@pytest.mark.parametrize("groups", [torch.zeros(17, dtype=torch.long), torch.arange(18) * 2, torch.arange(18) - 1])
def test_groups_must_cover_the_population(toy, groups):
    with pytest.raises(ValueError, match="each of these at least once"):
        fm.group_velocities(toy[0], toy[1], toy[3], groups)


# --- time laws ---

def test_logit_normal_quantiles():
    t = fm.logit_normal_time(100_000, torch.Generator().manual_seed(0), mean=0.5, std=2.0)
    for z, share in ((-1, 0.1587), (0, 0.5), (1, 0.8413)):                 # the normal law's
        assert abs((t < torch.sigmoid(torch.tensor(0.5 + 2 * z))).float().mean() - share) < 0.005
    assert t.min() > 0 and t.max() < 1


def test_uniform_time_quantiles():
    t = fm.uniform_time(100_000, torch.Generator().manual_seed(0))
    assert torch.allclose(t.quantile(torch.tensor([0.1, 0.5, 0.9])), torch.tensor([0.1, 0.5, 0.9]), atol=0.01)


def test_shift_keeps_the_ends_and_is_undone_by_its_inverse():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = fm.shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > t[1:-1]).all()
    assert torch.allclose(fm.shift_time(shifted, 1 / 3), t)
    assert torch.allclose(torch.logit(shifted[1:-1]) - torch.logit(t[1:-1]), torch.tensor(3.0, dtype=torch.float64).log())
    with pytest.raises(ValueError, match="positive"):
        fm.shift_time(t, 0)
