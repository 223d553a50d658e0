"""Eq. 1-9 by second routes, closed forms and slopes; each identity has a sabotaged twin."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import flow_matching as fm
import toy_data

# A few hundred roundings of a float64, for numbers of about 1.
NEARLY = 500 * torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps


def rand(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def noise_levels(n, low=0.05, high=0.95, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)


def near(a, b, within=NEARLY):
    """Whether the largest difference is `within` times the largest number (or 1)."""
    scale = max(1.0, b.abs().max().item())
    return (a - b).abs().max().item() <= within * scale


def squared(x):
    """The squared norm over the last three axes."""
    return x.square().flatten(-3).sum(-1)


# --- Eq. 1-3: path, target, loss ---

def test_noise_is_at_one_and_data_at_zero():
    """Eq. 1: both ends of the path."""
    x0, e = rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1)
    assert torch.equal(fm.path(x0, e, torch.zeros(3)), x0)
    assert torch.equal(fm.path(x0, e, torch.ones(3)), e)


def test_target_is_the_derivative_of_the_path():
    """Eq. 2: by automatic differentiation, and from x_t alone."""
    x0, e, t = rand(3, 4), rand(3, 4, seed=1), noise_levels(3)

    def along(t):
        return fm.path(x0, e, t)

    _, slope = torch.autograd.functional.jvp(along, t, torch.ones_like(t))
    from_x_t = (along(t) - x0) / t[:, None]
    assert near(slope, fm.target(x0, e))
    assert near(from_x_t, fm.target(x0, e), within=NEARLY / t.min())
    assert not near(slope, fm.target(e, x0), within=0.1)               # twin: the other way


def test_loss_is_zero_for_the_target_and_known_for_a_constant_error():
    """Eq. 3 in cases that need no formula."""
    x0, e = rand(5, 3, 4, 4), rand(5, 3, 4, 4, seed=1)
    t = noise_levels(5)
    one_wrong = torch.zeros_like(x0)
    one_wrong[2, 0, 0, 0] = 4.0

    def perfect(x_t, t, tokens):
        return e - x0

    def perfect_from_x_t(x_t, t, tokens):
        return (x_t - x0) / t[:, None, None, None]

    def wrong_in_one_of_48(x_t, t, tokens):
        return e - x0 + one_wrong

    assert fm.loss(perfect, x0, e, t, None).max() == 0
    assert fm.loss(perfect_from_x_t, x0, e, t, None).max() < NEARLY
    assert fm.loss(perfect_from_x_t, x0, e, t.flip(0), None).max() < NEARLY
    assert fm.loss(perfect_from_x_t, e, x0, t, None).min() > 0.1       # twin: ends exchanged
    assert near(fm.residual(wrong_in_one_of_48, x0, e, t, None), one_wrong)
    found = fm.loss(wrong_in_one_of_48, x0, e, t, None)
    assert near(found, torch.tensor([0, 0, 16 / 48, 0, 0], dtype=torch.float64))


def test_loss_is_float32_although_the_network_is_bfloat16():
    x0, e = rand(4, 3).float(), rand(4, 3, seed=1).float()

    def network(x_t, t, tokens):
        return x_t.bfloat16()

    value = fm.loss(network, x0, e, torch.full((4,), 0.5), None)
    assert value.dtype == torch.float32
    assert not torch.equal(value, value.bfloat16().float())            # more digits than bfloat16


# --- Eq. 4: the exact velocity by three other routes ---

def test_exact_velocity_of_one_point_leads_straight_to_it():
    x0, e, t = rand(1, 6), rand(4, 6, seed=1), noise_levels(4)
    x_t = fm.path(x0.expand(4, 6), e, t)
    assert near(fm.exact_velocity(x_t, t, x0), e - x0, within=NEARLY / t.min())


def score_velocity(x, t, points, pi):
    """From the density of x_t: E[e | x] = -t grad log p, and x0 = (x - t e) / (1 - t)."""
    def log_density(x, t):
        around_a_point = Independent(Normal((1 - t) * points, t), 1)
        return MixtureSameFamily(Categorical(pi), around_a_point).log_prob(x)

    score = torch.func.vmap(torch.func.grad(log_density))(x, t)
    e = -t[:, None] * score
    return e - (x - t[:, None] * e) / (1 - t[:, None])


def test_exact_velocity_is_that_of_the_score():
    """Eq. 4 from the gradient of log p, by automatic differentiation."""
    points = rand(6, 3, seed=2)
    pi = torch.arange(1, 7, dtype=torch.float64) / 21
    x, t = rand(50, 3, seed=3), noise_levels(50)
    exact = fm.exact_velocity(x, t, points, pi)
    within = NEARLY / (t.min() * (1 - t.max()))
    assert near(exact, score_velocity(x, t, points, pi), within)
    assert not near(exact, score_velocity(x, t, points, pi.flip(0)), 1e-2)     # twin: weights
    assert not near(exact, score_velocity(x, 0.9 * t, points, pi), 1e-2)       # twin: noise level


def test_exact_velocity_of_a_gaussian_by_quadrature():
    sigma = torch.tensor(0.7, dtype=torch.float64)
    nodes = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = Normal(0, sigma).log_prob(nodes).exp()
    x, t = rand(40, 1, seed=4), noise_levels(40, 0.1)
    by_sum = fm.exact_velocity(x, t, nodes[:, None], density)
    # E[e - x0 | x] of joint Gaussians is the covariance over the variance, times x.
    variance = (1 - t) ** 2 * sigma**2 + t**2
    gain = (t - (1 - t) * sigma**2) / variance
    # What lies beyond 6, at 8 sigma, is less than a rounding.
    assert near(by_sum, gain[:, None] * x, within=NEARLY / t.min())
    assert not near(by_sum, 1.01 * gain[:, None] * x, within=1e-3)     # twin


def test_populations_may_differ_from_sample_to_sample():
    points, x, t = rand(3, 5, 2, seed=5), rand(3, 2), noise_levels(3)
    alone = [fm.exact_velocity(x[[i]], t[[i]], points[i]) for i in range(3)]
    together = fm.exact_velocity(x, t, points)
    assert near(together, torch.cat(alone), within=NEARLY / t.min())
    assert not near(together, fm.exact_velocity(x, t, points.flip(0)), within=0.1)     # twin


def test_each_sample_may_have_weights_of_its_own():
    """Eq. 4, 7: pi (N, S), against each sample alone with its row (S,)."""
    points, x, t = rand(5, 2, seed=5), rand(3, 2), noise_levels(3, 0.6)
    pi = (2 * rand(3, 5, seed=6)).exp()

    def all_that_take(some, pi):
        some = x[some], t[some], points
        omega, u_g = fm.group_velocities(*some, [0, 1, 1, 0, 1], pi)
        return [fm.posterior(*some, pi), fm.exact_velocity(*some, pi), omega, u_g]

    together = all_that_take(slice(None), pi)
    alone = [all_that_take([i], pi[i]) for i in range(3)]
    for found, rows, wrong in zip(together, zip(*alone), all_that_take(slice(None), pi.flip(0))):
        assert near(found, torch.cat(rows), within=NEARLY / t.min())
        assert not near(wrong, torch.cat(rows), within=1e-2)           # twin: rows of others


def test_many_samples_are_solved_a_few_at_a_time():
    """So many that they are split: 300 samples, 18 points, 432 numbers."""
    points, x = rand(18, 3, 12, 12, seed=5), rand(300, 3, 12, 12)
    t = noise_levels(300, 0.5)
    whole = fm.exact_velocity(x, t, points)
    own = fm.exact_velocity(x, t, points.expand(300, 18, 3, 12, 12))
    assert near(own, whole)
    for i in (0, 17, 150, 299):
        assert near(fm.exact_velocity(x[[i]], t[[i]], points), whole[[i]])
    assert not near(fm.exact_velocity(x[[0]], t[[0]], points), whole[[1]], within=0.1)     # twin


@pytest.mark.parametrize("t", [0.0, -0.1, 1.1, math.nan])
def test_exact_velocity_refuses_times_outside_its_range(t):
    with pytest.raises(ValueError, match="0 < t <= 1"):
        fm.exact_velocity(rand(1, 2), torch.tensor([t]), rand(3, 2))


def close_points(apart, dtype):
    """x at t = 0.01, and two points of 768 numbers, whose posterior is known in closed form.

    x lies on the path from the first point. Then log(w_2 / w_1) = -(1-t) (2 t <e, gap> +
    (1-t) |gap|^2) / (2 t^2) with gap = x^1 - x^2. All numbers are binary fractions,
    so that x is exact in float32.
    """
    t = 2.0**-7
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(-128, 129, (768,), generator=generator).double() / 128
    sign = torch.where(torch.arange(768) % 2 == 0, 1.0, -1.0).double()
    gap = apart * sign
    e = torch.randint(-4, 5, (768,), generator=generator).double() / 4
    x = (1 - t) * first + t * e
    dot, square = (e * gap).sum(), (gap * gap).sum()
    difference_of_energies = (1 - t) * (2 * t * dot + (1 - t) * square)
    log_ratio = -difference_of_energies / (2 * t * t)
    points = torch.stack([first, first - gap])
    w = torch.softmax(torch.stack([torch.zeros_like(log_ratio), log_ratio]), 0)
    for exact in (x, points):
        assert torch.equal(exact.float().double(), exact)
    return x[None].to(dtype), t, points.to(dtype), w


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_close_points_are_told_apart_at_small_t(dtype):
    """Eq. 4 for two images that differ by 2^-10 in each pixel."""
    x, t, points, w = close_points(2.0**-12, dtype)
    found = fm.posterior(x, t, points)[0].double()
    assert 0.01 < w[0] < 0.99
    assert near(found, w, within=8 * torch.finfo(dtype).eps)
    # The twin: the square expanded in float32, as it was once done.
    x, points = x.float(), points.float()
    points = (1 - t) * points
    energy = points.square().sum(1) - 2 * (points @ x[0])
    expanded = torch.softmax(-energy / (2 * t * t), 0)
    assert not near(expanded.double(), w, within=1e-3)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "of each sample"])
@pytest.mark.parametrize("t", [0.003, 0.01, 0.3])
def test_float32_is_as_exact_as_float64(t, own):
    """Eq. 4 for the same numbers in both types."""
    first = rand(8, 1, 768).float()
    points = first + 0.03 * t * rand(8, 5, 768, seed=1).float()        # (8, 5, 768)
    points = points if own else points[0]
    x = fm.path(first[:, 0], rand(8, 768, seed=2).float(), t)
    same = (x.double(), torch.tensor(t), points.double())
    w, u_star = fm.posterior(*same), fm.exact_velocity(*same)
    assert near(fm.posterior(x, t, points).double(), w, within=8 * EPS32)
    assert near(fm.exact_velocity(x, t, points).double(), u_star, within=8 * EPS32)
    # It is not decided already which of the points it was.
    assert w.max(1).values.min() < 0.99


def test_the_floor_of_far_images_is_not_that_of_rounding():
    """Eq. 5 of the same numbers in both types, at a small t: 0 where there is one image."""
    t, far = 2.0**-10, 1e4
    x0 = (far + rand(8, 12)).float()
    e = rand(8, 12, seed=1).float()
    # The next float32: near 1e4 it is 2^-10 away, which is t.
    other = x0[0] + t * (torch.arange(12) == 0)
    one, two = x0[:1], torch.stack([x0[0], other])
    same = x0[:1].expand(8, 12)
    assert fm.loss_floor(same, e, t, one).max() < 1e-6
    exact = fm.loss_floor(same.double(), e.double(), t, two.double())
    assert exact.max() > 0.01
    assert near(fm.loss_floor(same, e, t, two).double(), exact, within=8 * EPS32)
    # The twin: Eq. 5 as it is written, in float32.
    u_star = fm.exact_velocity(fm.path(same, e, t), t, one)
    assert (fm.target(same, e) - u_star).square().mean(1).max() > 0.01


def test_products_that_nearly_cancel_keep_their_digits():
    """Eq. 8: long vectors at right angles, of which float32 makes more than rounding."""
    a, b = 300 * rand(1, 768), 300 * rand(1, 768, seed=1)
    b = b - a * (a * b).sum() / (a * a).sum()
    u_g = torch.stack([a, b], 1).float()               # (1, 2, 768)
    delta = u_g[0].double()
    product = (delta @ delta.T)[0, 1]
    found = fm.data_interaction_matrix(torch.zeros(1, 768), u_g)[0, 0, 1]
    assert abs(found - product) < 1e-3 * abs(product)
    twin = (u_g[0] @ u_g[0].T)[0, 1]
    assert abs(twin - product) > 1e-2 * abs(product)


def test_a_sample_far_from_the_origin_is_no_less_exact():
    """Moving x by (1 - t) c and the points by c changes nothing, for a power of two."""
    x, t, points, w = close_points(2.0**-12, torch.float64)
    far = 2.0**10
    found = fm.posterior(x + (1 - t) * far, t, points + far)[0]
    assert near(found, w, within=1e-6)


# --- Eq. 5 ---

def excess(points, believed, n=200_000):
    """The z-score of E|v - u|^2 - E|v - u*|^2 - E|u - u*|^2, with u* of `believed`."""
    generator = torch.Generator().manual_seed(6)
    x0 = points[torch.randint(len(points), (n,), generator=generator)]
    e = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    t = 0.1 + 0.9 * torch.rand(n, generator=generator, dtype=torch.float64)
    x_t = fm.path(x0, e, t)
    # Any function of (x_t, t) will do.
    v = torch.sin(3 * x_t) + t[:, None]
    u, u_star = fm.target(x0, e), fm.exact_velocity(x_t, t, believed)
    floor = (u - u_star).square().mean(1)
    assert near(fm.loss_floor(x0, e, t, believed), floor)
    loss, error = (v - u).square().mean(1), (v - u_star).square().mean(1)
    gap = loss - error - floor
    return (gap.mean() / (gap.std() / math.sqrt(n))).abs()


def test_the_loss_is_the_error_plus_the_floor():
    """Eq. 5 by sampling."""
    points = rand(5, 2, seed=7)
    assert excess(points, points) < 4
    assert excess(points, points[:4]) > 10                             # twin: a point forgotten
    assert excess(points, points + 0.05) > 4                           # twin: slightly wrong


def test_on_a_finite_batch_the_loss_is_only_nearly_error_plus_floor():
    """Eq. 5 is about the expectation; a batch leaves the cross term 2 <v - u*, u* - u>."""
    points = rand(5, 2, seed=7)
    x0, e, t = points[:4], rand(4, 2, seed=1), noise_levels(4)
    u_star = fm.exact_velocity(fm.path(x0, e, t), t, points)
    v = u_star + 0.3

    def network(x_t, t, tokens):
        return v

    floor = fm.loss_floor(x0, e, t, points)
    left = fm.loss(network, x0, e, t, None) - floor - 0.3**2
    cross = 2 * (0.3 * (u_star - fm.target(x0, e))).mean(1)
    assert near(left, cross, within=NEARLY / t.min() ** 2)
    assert not near(left, torch.zeros(4, dtype=torch.float64), within=1e-3)


# --- Eq. 6 ---

def sampler_slope(sampler):
    """The order of a sampler on dx/dt = x cos 3t; from t = 1 to 0 it makes x exp(-(sin 3)/3)."""
    def velocity(x, t):
        return x * torch.cos(3 * t)[:, None]

    x = rand(4, 3)
    end = x * math.exp(-math.sin(3) / 3)
    errors = []
    for steps in (64, 512):
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        errors.append((sampler(velocity, x, times) - end).abs().max().item())
    return math.log(errors[1] / errors[0]) / math.log(512 / 64)


def sample_along(velocity, x, times):
    """fm.sample, which makes its own times, in the form of the other samplers."""
    def model(x, t, tokens):
        return velocity(x, t)

    return fm.sample(model, None, x, len(times) - 1)


def test_euler_is_of_first_and_heun_of_second_order():
    """Eq. 6: slopes of the error."""
    assert abs(sampler_slope(fm.euler) + 1) < 0.1
    assert abs(sampler_slope(fm.heun) + 2) < 0.1
    assert abs(sampler_slope(sample_along) + 2) < 0.1


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sampling_never_asks_for_the_velocity_at_zero(steps):
    """The exact velocity of one point has none there. Its path is straight: any steps end on it."""
    point, asked = rand(1, 3, seed=1), []

    def model(x, t, tokens):
        asked.append(t.min().item())
        return fm.exact_velocity(x, t, point)

    noise = rand(5, 3)
    assert near(fm.sample(model, None, noise, steps), point.expand(5, 3))
    assert min(asked) > 0 and len(asked) == 2 * steps - 1
    with pytest.raises(ValueError, match="needs 0 < t"):               # the twin
        fm.heun(fm.guided(model, None), noise, torch.linspace(1, 0, steps + 1))


@pytest.mark.parametrize("sampler", [fm.euler, fm.heun])
def test_samplers_take_any_grid_and_both_directions(sampler):
    def constant(x, t):
        return torch.ones_like(x)

    x = rand(2, 3)
    grid = torch.tensor([1.0, 0.7, 0.65, 0.0], dtype=torch.float64)
    assert near(sampler(constant, x, grid), x - 1)
    assert near(sampler(constant, x, grid.flip(0)), x + 1)
    assert near(sampler(constant, x, [1.0, 0.5, 0.0]), x - 1)


def test_samples_of_the_exact_velocity_are_the_population():
    points = 2 * rand(4, 2, seed=8)

    def velocity(x, t):
        return fm.exact_velocity(x, t, points)

    times = torch.linspace(1, 0, 400, dtype=torch.float64)
    end = fm.euler(velocity, rand(64, 2), times)
    assert torch.cdist(end, points).min(1).values.max() < 0.01


def test_the_mean_image_needs_a_velocity_that_sees_x():
    """Eq. 6: (x - mean)/t ends on the mean; its mean, which ignores x, on noise around it."""
    mean, noise = rand(1, 5, seed=1), rand(8, 5)
    times = torch.linspace(1, 0, 65, dtype=torch.float64)

    def sees_x(x, t):
        return (x - mean) / t[:, None]

    def ignores_x(x, t):
        return (-mean).expand_as(x)

    assert near(fm.euler(sees_x, noise, times), mean.expand(8, 5), within=64 * NEARLY)
    assert near(fm.euler(ignores_x, noise, times), mean + noise)


def test_fresh_noise_in_the_target_teaches_a_denoiser():
    """Eq. 2, 4: what a best v leaves over has no part along any function h of x_t."""
    points, n, t = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), 20000, 0.6
    x0 = rand(n, 1).sign()
    e, fresh = rand(n, 1, seed=1), rand(n, 1, seed=2)
    x_t = fm.path(x0, e, t)
    u_star = fm.exact_velocity(x_t, t, points)
    denoiser = t * u_star - x_t                        # -E[x0 | x_t]

    def is_best(v, u):
        for h in (torch.ones_like(x_t), x_t, x_t.sin()):
            left_over = (u - v) * h
            if left_over.mean().abs() > 5 * left_over.std() / n**0.5:
                return False
        return True

    assert is_best(denoiser, fresh - x0) and is_best(u_star, fm.target(x0, e))
    assert not is_best(u_star, fresh - x0)                             # twins
    assert not is_best(denoiser, fm.target(x0, e))
    assert not is_best(torch.zeros_like(x_t), fresh - x0)              # no constant either


TOKENS = torch.tensor([[1, 2], [3, 0], [0, 0]])


def network_of_captions(x, t, tokens):
    """The null caption (all zeros) adds nothing."""
    return x + t[:, None] * tokens.sum(1, keepdim=True)


def test_guidance_is_off_at_one_and_linear():
    """Eq. 6: the guided velocity."""
    x, t = rand(3, 2), noise_levels(3)

    def guided(scale):
        return fm.guided(network_of_captions, TOKENS, scale)(x, t)

    assert torch.equal(guided(1), network_of_captions(x, t, TOKENS))
    assert torch.equal(guided(0), x)
    assert near(guided(3), guided(0) + 3 * (guided(1) - guided(0)))
    assert not near(guided(3), guided(1), within=0.1)                  # twin


def test_sampling_goes_along_the_guided_velocity():
    """Eq. 6: dx/dt = x + s t k has x(0) = (x(1) + 2 s k) / e - s k for a caption of sum k."""
    noise = rand(3, 2)
    for scale in (1.0, 2.0):
        k = scale * TOKENS.sum(1, keepdim=True)
        end = (noise + 2 * k) / math.e - k
        for steps, within in ((20, 1e-2), (200, 1e-4)):
            found = fm.sample(network_of_captions, TOKENS, noise, steps, scale)
            assert near(found, end, within)
    assert not near(found, (noise + k) / math.e - k / 2, within=0.1)   # twin: scale 1


def test_a_sample_is_float32_although_the_network_is_bfloat16():
    def network(x, t, tokens):
        return (x - 0.1).bfloat16()

    def same_answer_as_float32(x, t, tokens):
        return network(x, t, tokens).float()

    noise, tokens = rand(4, 3).float(), torch.ones(4, 2)
    for scale in (1.0, 2.0):
        found = fm.sample(network, tokens, noise, 3, scale)
        assert found.dtype == fm.guided(network, tokens, scale)(noise, 0.5).dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())
    # No digit of the steps is lost either.
    expected = fm.sample(same_answer_as_float32, tokens, noise, 3)
    assert torch.equal(fm.sample(network, tokens, noise, 3), expected)


def test_a_network_without_captions_is_sampled():
    def network(x, t, tokens):
        assert tokens is None
        return torch.ones_like(x)

    assert near(fm.sample(network, None, rand(3, 2), 4), rand(3, 2) - 1)
    with pytest.raises(ValueError, match="without tokens"):
        fm.sample(network, None, rand(3, 2), 4, scale=2.0)


# --- Eq. 7-9 ---

PARTITIONS = {"by size": torch.arange(18) % 2,
              "by jitter": torch.arange(18) // 2,
              "random": torch.randint(4, (18,), generator=torch.Generator().manual_seed(3)),
              "one group": torch.zeros(18, dtype=torch.long)}


@pytest.fixture(scope="module")
def toy():
    """x_t, t, v, the 18 images of each of 5 captions, and unequal weights; float64."""
    scenes = toy_data.sample_scenes(5, torch.Generator().manual_seed(0))
    everything = toy_data.population(scenes)
    images = toy_data.render(everything, toy_data.view_boxes(everything, "macro"), 12)
    points = images.double().unflatten(0, (5, 18))
    # Noisy enough for several images to share the posterior.
    t = noise_levels(5, 0.5, 0.95)
    x_t = fm.path(points[:, 4], rand(5, 3, 12, 12), t)
    pi = torch.linspace(1, 2, 18, dtype=torch.float64)
    return x_t, t, rand(5, 3, 12, 12, seed=1), points, pi / pi.sum()


def quadratic_form(weights, Omega):
    return torch.einsum("ng,ngh,nh->n", weights, Omega, weights)


@pytest.mark.parametrize("groups", PARTITIONS.values(), ids=PARTITIONS)
def test_groups_make_up_the_velocity(toy, groups):
    """Eq. 7, 8, 9 for any partition."""
    x_t, t, v, points, pi = toy
    omega, u_g = fm.group_velocities(x_t, t, points, groups, pi)
    u_star = fm.exact_velocity(x_t, t, points, pi)
    error, alone = squared(v - u_star), squared(v[:, None] - u_g)
    spread = squared(u_g - u_star[:, None])
    Omega = fm.data_interaction_matrix(v, u_g)
    assert near(omega.sum(1), torch.ones(5, dtype=torch.float64))
    assert near(torch.einsum("ng,ngchw->nchw", omega, u_g), u_star)                    # Eq. 7
    assert near(quadratic_form(omega, Omega), error)                                   # Eq. 8
    assert near((omega * alone).sum(1), error + (omega * spread).sum(1))               # Eq. 9
    if len(u_g[0]) > 1:
        equal = torch.full_like(omega, 1 / omega.shape[1])
        diagonal = (omega**2 * alone).sum(1)
        assert not near(quadratic_form(equal, Omega), error, within=1e-6)              # twins
        assert not near(diagonal, error, within=1e-6)
        assert not near((omega * alone).sum(1), error, within=1e-6)


def test_a_group_alone_is_a_population_of_its_own(toy):
    """Eq. 7: the velocity of a group from the points of the group only."""
    x_t, t, _, points, pi = toy
    groups = PARTITIONS["random"]
    omega, u_g = fm.group_velocities(x_t, t, points, groups, pi)
    w = fm.posterior(x_t, t, points, pi)
    for group in range(4):
        own = groups == group
        velocity = fm.exact_velocity(x_t, t, points[:, own], pi[own])
        assert near(u_g[:, group], velocity)
        assert near(omega[:, group], w[:, own].sum(1))
    assert not near(u_g[:, 0], fm.exact_velocity(x_t, t, points, pi), within=1e-3)     # twin


def test_the_last_term_of_equation_9_has_no_network_in_it(toy):
    """Eq. 9: both losses have the same gradient."""
    x_t, t, v, points, pi = toy
    omega, u_g = fm.group_velocities(x_t, t, points, PARTITIONS["random"], pi)
    u_star = fm.exact_velocity(x_t, t, points, pi)

    def groups_alone(v):
        return (omega * squared(v[:, None] - u_g)).sum()

    def whole(v):
        return squared(v - u_star).sum()

    gradient = torch.func.grad(whole)(v)
    assert near(torch.func.grad(groups_alone)(v), gradient)
    omega = torch.full_like(omega, 0.25)                               # twin: equal shares
    assert not near(torch.func.grad(groups_alone)(v), gradient, within=1e-3)


def test_a_group_that_never_occurs_is_named_as_such(toy):
    x_t, t, _, points, _ = toy
    pi = torch.ones(18)
    pi[3] = 0
    lone = (torch.arange(18) == 3).long()
    with pytest.raises(ValueError, match="each group must have a point whose weight"):
        fm.group_velocities(x_t, t, points, lone, pi)
    shared = torch.arange(18) // 9                      # twin: others of its group do occur
    assert fm.group_velocities(x_t, t, points, shared, pi)[0].isfinite().all()


NOT_A_PARTITION = {"too few": torch.zeros(17, dtype=torch.long),
                   "gaps": torch.arange(18) * 2,
                   "from -1 on": torch.arange(18) - 1,
                   "halves": torch.arange(18) / 2,
                   "nan": torch.full((18,), math.nan),
                   "a column": torch.zeros(18, 1, dtype=torch.long)}


@pytest.mark.parametrize("groups", NOT_A_PARTITION.values(), ids=NOT_A_PARTITION)
def test_groups_must_cover_the_population(toy, groups):
    with pytest.raises(ValueError, match="each of these at least once"):
        fm.group_velocities(toy[0], toy[1], toy[3], groups)


# --- Shapes: right or refused ---

def three_points():
    return torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])


def one_number_or_one_each(n):
    """The ways to say that t = 0.2 for n samples."""
    number = torch.tensor(0.2)
    return [0.2, number, number.double(), number.repeat(n), number.repeat(n, 1), [0.2] * n]


def test_t_is_a_number_or_one_for_each_sample():
    x, e = rand(3, 2).float(), rand(3, 2, seed=1).float()
    points = three_points()
    seen = []

    def network(x_t, t, tokens):
        seen.append(t.shape)
        return x_t * t[:, None]

    def all_that_take(t):
        _, u_g = fm.group_velocities(x, t, points, [0, 1, 1])
        return [fm.path(x, e, t),
                fm.loss(network, x, e, t, None),
                fm.guided(network, None)(x, t),
                fm.posterior(x, t, points),
                fm.exact_velocity(x, t, points),
                fm.loss_floor(x, e, t, points),
                u_g]

    expected = all_that_take(torch.full((3,), 0.2))
    for t in one_number_or_one_each(3):
        for found, right in zip(all_that_take(t), expected):
            assert torch.equal(found, right)
    assert set(seen) == {(3,)}


@pytest.mark.parametrize("shape", [(2,), (1, 3), (3, 2), (3, 1, 1)])
def test_any_other_t_is_refused(shape):
    x, t, points = torch.ones(3, 2), torch.full(shape, 0.2), three_points()
    calls = [(fm.path, x, x, t),
             (fm.residual, answer(3, 2), x, x, t, None),
             (fm.guided(answer(3, 2), None), x, t),
             (fm.posterior, x, t, points),
             (fm.exact_velocity, x, t, points),
             (fm.loss_floor, x, x, t, points),
             (fm.group_velocities, x, t, points, [0, 1, 1])]
    for function, *arguments in calls:
        with pytest.raises(ValueError, match="t must be one number, or one for each"):
            function(*arguments)


def test_one_sample_gets_one_velocity():
    """Eq. 4 by hand: at x = 0 the three weights are as exp(-|(1 - t) x^k|^2 / 2t^2)."""
    found = fm.exact_velocity(torch.zeros(1, 2), torch.tensor([[0.2]]), three_points())
    # The squared length of the third point is larger by 1 than that of the two others.
    far = math.exp(-(0.8**2) / (2 * 0.2**2))
    mean = (1 - far) / (2 + far)
    assert near(found, torch.full((1, 2), -mean / 0.2), within=1e-6)
    with pytest.raises(ValueError, match="t must be"):
        fm.exact_velocity(torch.zeros(1, 2), torch.full((3,), 0.2), three_points())


def test_samples_of_one_number_each_are_samples():
    x0, e, t = rand(4), rand(4, seed=1), noise_levels(4)
    points = rand(5, seed=2)

    def wrong_by(x_t, t, tokens):
        return e - x0 + torch.arange(1.0, 5)

    squares = torch.tensor([1.0, 4, 9, 16], dtype=torch.float64)
    assert near(fm.loss(wrong_by, x0, e, t, None), squares)
    column = fm.exact_velocity(x0[:, None], t, points[:, None])
    assert torch.equal(fm.exact_velocity(x0, t, points), column[:, 0])
    omega, u_g = fm.group_velocities(x0, t, points, [0, 0, 1, 1, 1])
    error = (x0 - fm.exact_velocity(x0, t, points)).square()
    form = quadratic_form(omega, fm.data_interaction_matrix(x0, u_g))
    assert near(form, error, within=NEARLY / t.min() ** 2)


def answer(*shape):
    """A network, or a velocity, that answers with ones of this shape."""
    def network(*arguments):
        return torch.ones(shape)
    return network


def nothing(*arguments):
    """A network that answers nothing."""


def guide(model, tokens, scale=1.0):
    """The guided velocity of two samples of three numbers."""
    return fm.guided(model, tokens, scale)(torch.zeros(2, 3), 0.5)


# Samples x (2, 3); x1 has one too few, and x3 serves as a population.
x1, x2, x3 = torch.zeros(1, 3), torch.zeros(2, 3), torch.zeros(3, 3)
zero, zeros, nan = torch.tensor(0.0), torch.zeros(4), math.nan

MISFITS = {
    "a path of one noise": (fm.path, x2, x1, 0.5),
    "a target of one noise": (fm.target, x2, x1[0]),
    "a path of two types": (fm.path, x2, x2.double(), 0.5),
    "a path of whole numbers": (fm.path, x2.long(), x2.long(), 0.5),
    "a path of no samples": (fm.path, zero, zero, 0.5),
    "a network that answers (N, 1)": (fm.loss, answer(4, 1), zeros, zeros, 0.5, None),
    "a network that answers for one": (fm.residual, answer(1, 3), x2, x2, 0.5, None),
    "a guided network of one answer": (guide, answer(1, 3), None),
    "guidance with half an answer": (guide, answer(2, 3), torch.ones(2, 1), 2.0),
    "one caption for two": (guide, answer(2, 3), torch.ones(1, 4)),
    "a scale for each sample": (guide, answer(4, 3), torch.ones(2, 4), torch.ones(2)),
    "a scale that is nan": (guide, answer(4, 3), torch.ones(2, 4), nan),
    "an Euler velocity for one": (fm.euler, answer(1, 3), x2, [1, 0]),
    "a Heun velocity for one": (fm.heun, answer(1, 3), x2, [1, 0]),
    "one time": (fm.euler, answer(2, 3), x2, [1.0]),
    "times in a column": (fm.heun, answer(2, 3), x2, torch.ones(3, 1)),
    "no step": (fm.sample, answer(2, 3), None, x2, 0),
    "half a step": (fm.sample, answer(2, 3), None, x2, 0.5),
    "points of another size": (fm.posterior, x2, 0.5, torch.zeros(4, 2)),
    "one number for a point": (fm.posterior, x2, 0.5, torch.zeros(4, 1)),
    "populations for three": (fm.posterior, x2, 0.5, torch.zeros(3, 4, 3)),
    "one population with an axis": (fm.posterior, x2, 0.5, torch.zeros(1, 4, 3)),
    "no points": (fm.exact_velocity, x2, 0.5, torch.zeros(0, 3)),
    "no points for each": (fm.exact_velocity, x2, 0.5, torch.zeros(2, 0, 3)),
    "too few weights": (fm.posterior, x2, 0.5, x3, [1, 1]),
    "one weight": (fm.posterior, x2, 0.5, x3, [1]),
    "weights for one": (fm.posterior, x2, 0.5, x3, [[1, 1, 1]]),
    "a negative weight": (fm.posterior, x2, 0.5, x3, [1, 1, -0.1]),
    "a weight that is nan": (fm.posterior, x2, 0.5, x3, [1, 1, nan]),
    "no weight at all": (fm.exact_velocity, x2, 0.5, x3, [0, 0, 0]),
    "a group without weight": (fm.group_velocities, x2, 0.5, x3, [0, 0, 1], [1, 1, 0]),
    "a floor of one noise": (fm.loss_floor, x2, x1, 0.5, x3),
    "an answer that is none": (fm.loss, nothing, zeros, zeros, 0.5, None),
    "a velocity that is none": (fm.heun, nothing, x2, [1, 0]),
    "guidance with no answer": (guide, nothing, torch.ones(2, 4), 2.0),
    "guidance with an odd answer": (guide, answer(5, 3), torch.ones(2, 4), 2.0),
    "guidance with one number": (guide, answer(), torch.ones(2, 4), 2.0),
    "a guided answer for one": (fm.guided(answer(1, 3), torch.ones(1, 2), 2.0), x1, 0.5),
    "guidance with a list": (guide, answer(4, 3), [[1], [2]], 2.0),
    "captions for one": (fm.residual, answer(2, 3), x2, x2, 0.5, torch.ones(1, 4)),
    "a caption for none": (fm.loss, answer(2, 3), x2, x2, 0.5, zero),
    "a word for t": (fm.path, x2, x2, "a"),
    "nothing for t": (fm.posterior, x2, None, x3),
    "ragged t": (fm.path, x2, x2, [[0.1], [0.2, 0.3]]),
    "a noise that is a number": (fm.path, x2, 0.0, 0.5),
    "half precision": (fm.euler, answer(2, 3), x2.bfloat16(), [1, 0]),
    "samples in a list": (fm.target, [[1.0]], [[2.0]]),
    "whole numbers that wrap around": (fm.target, x2.byte() + 1, x2.byte()),
    "samples of no numbers": (fm.posterior, torch.zeros(2, 0), 0.5, torch.zeros(4, 0)),
    "Euler from whole numbers": (fm.euler, answer(2, 3), x2.long(), [1, 0.5, 0]),
    "Heun from a number": (fm.heun, answer(2, 3), zero, [1, 0]),
    "a time that is a word": (fm.euler, answer(2, 3), x2, "10"),
    "noise of whole numbers": (fm.sample, answer(2, 3), None, x2.long(), 2),
    "points in a list": (fm.exact_velocity, x2, 0.5, [[0.0, 0.0, 0.0]]),
    "a weight that is a word": (fm.posterior, x2, 0.5, x3, ["a", "b", "c"]),
    "a weight that is infinite": (fm.posterior, x2, 0.5, x3, [1, 1, math.inf]),
    "one row without weight": (fm.posterior, x2, 0.5, x3, [[1, 1, 1], [0, 0, 0]]),
    "groups of words": (fm.group_velocities, x2, 0.5, x3, ["a", "b", "b"]),
    "no groups": (fm.group_velocities, x2, 0.5, x3, None),
    "a velocity in a list": (fm.data_interaction_matrix, [[1.0]], torch.zeros(1, 1, 1)),
    "groups of other samples": (fm.data_interaction_matrix, x2, torch.zeros(3, 4, 3)),
    "groups without an axis": (fm.data_interaction_matrix, x2, x2),
}


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_refused_in_one_sentence(misfit):
    function, *arguments = misfit
    with pytest.raises(ValueError) as refusal:
        function(*arguments)
    sentence = str(refusal.value)
    assert len(sentence) > 20 and "\n" not in sentence


def test_what_fits_is_not_refused():
    """The twin of the misfits; and no sample at all."""
    none = torch.zeros(0, 3)
    assert guide(answer(4, 3), torch.ones(2, 4), 2).shape == (2, 3)
    assert guide(answer(4, 3), torch.ones(2, 4), np.float32(2)).shape == (2, 3)
    assert guide(answer(2, 3), ["a", "b"]).shape == (2, 3)              # a network's own captions
    assert fm.sample(answer(2, 3), None, x2, np.int64(2)).shape == (2, 3)
    assert fm.euler(answer(2, 3), x2, [1, 0]).shape == (2, 3)
    assert fm.posterior(x2, 0.5, x3, [1, 2, 0]).shape == (2, 3)
    assert fm.posterior(x2, 0.5, x3.double(), torch.ones(2, 3)).dtype == torch.float32
    assert fm.exact_velocity(none, 0.5, x3).shape == (0, 3)
    assert fm.loss(answer(0, 3), none, none, 0.5, None).shape == (0,)
