"""Flow matching: a straight path from data (t = 0) to noise (t = 1), and a network that learns its velocity.

Convention: x0 is data, e ~ N(0, I) is noise, t in [0, 1] has one value per sample, v = model(x_t, t, tokens).
On this path flow matching and rectified flow are the same. Run `python flow_matching.py` for a picture.
"""

import torch


def path(x0, e, t):
    """x_t = (1 - t) x0 + t e, where t is (N,) and x0, e are (N, ...) (Eq. 1)."""
    t = t.view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * e


def target(x0, e):
    """u = dx_t/dt = e - x0, the same at every t of one path (Eq. 2)."""
    return e - x0


def loss(model, x0, tokens, t, e):
    """(N,) |r_i|^2 / D with r_i = v_i - u_i (Eq. 3). Its mean is 2/D times L = 1/(2N) sum_i |r_i|^2; D outputs a sample.

    Path, target and residual are float32 (or wider) even if the network computes in bfloat16.
    """
    r = model(path(x0, e, t), t, tokens).to(x0.dtype) - target(x0, e)      # (N, ...)
    return (r * r).flatten(1).mean(1)                                      # (N,)


def guided(model, tokens, scale):
    """The velocity v_null + s (v_c - v_null) as a function of (x, t) (Eq. 6). s = 1 is off; the null caption is all zeros."""
    def velocity(x, t):
        if scale == 1:
            return model(x, t, tokens)
        v_c, v_null = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([tokens, 0 * tokens])).chunk(2)
        return v_null + scale * (v_c - v_null)
    return velocity


def euler(velocity, x, times):
    """Integrates dx/dt = v(x, t) along `times`, e.g. from 1 (noise) to 0 (data); first order in the step (Eq. 6)."""
    for t, t_next in zip(times[:-1], times[1:]):
        x = x + (t_next - t) * velocity(x, t.expand(len(x)))
    return x


def heun(velocity, x, times):
    """Like euler, with the mean of the velocities at both ends of a step; second order, two calls a step (Eq. 6)."""
    for t, t_next in zip(times[:-1], times[1:]):
        v = velocity(x, t.expand(len(x)))
        v_next = velocity(x + (t_next - t) * v, t_next.expand(len(x)))
        x = x + (t_next - t) * (v + v_next) / 2
    return x


# --- Time laws: which noise levels are trained on. Densities to draw from, not weights of the loss ---------------

def uniform_time(n, generator):
    """(n,) t ~ U(0, 1), on the generator's device."""
    return torch.rand(n, generator=generator, device=generator.device)


def logit_normal_time(n, generator, mean=0.0, std=1.0):
    """(n,) t = sigmoid(z), z ~ N(mean, std^2). The median is sigmoid(mean); a positive mean favours noise."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=generator.device))


def shift_time(t, s):
    """t' = s t / (1 + (s - 1) t): more noise for s > 1, as larger images need; s = 1 is off. Raises ValueError for s <= 0."""
    if s <= 0:
        raise ValueError(f"the resolution shift must be positive, not {s}")
    return s * t / (1 + (s - 1) * t)


# --- The exact velocity of a finite population -------------------------------------------------------------------

def posterior(x, t, points, pi=None):
    """(N, K) w_k(x, t) = softmax_k(log pi_k - |x - (1 - t) x^k|^2 / (2 t^2)): which x0 the noisy x came from (Eq. 4).

    x is (N, ...), t is (N,) in (0, 1], points are (K, ...) or, one population for each x, (N, K, ...); pi is (K,) or
    (N, K), equal if None. Raises ValueError where t is 0: there x is data already and nothing is left to infer.
    """
    if (t <= 0).any() or (t > 1).any():
        raise ValueError("the exact velocity needs 0 < t <= 1")
    x, points = x.flatten(1), _flat(points, x)                             # (N, D), (1 or N, K, D)
    t = t[:, None]                                                         # (N, 1)
    # |x - (1-t) p|^2 without its |x|^2, which is the same for every k and cancels in the softmax
    energy = (1 - t) ** 2 * (points * points).sum(2) - 2 * (1 - t) * (points @ x[..., None])[..., 0]    # (N, K)
    log_pi = 0.0 if pi is None else pi.log()
    return torch.softmax(log_pi - energy / (2 * t * t), 1)


def exact_velocity(x, t, points, pi=None):
    """(N, ...) u*(x, t) = (x - sum_k w_k x^k) / t, the best possible v; shapes and errors as in posterior (Eq. 4)."""
    w = posterior(x, t, points, pi)                                        # (N, K)
    x0_mean = (w[:, None] @ _flat(points, x))[:, 0]                        # (N, D)
    return ((x.flatten(1) - x0_mean) / t[:, None]).view_as(x)


def _flat(points, x):
    """Points (K, ...) or (N, K, ...) as (1 or N, K, D)."""
    return points.flatten(1)[None] if points.dim() == x.dim() else points.flatten(2)


def loss_floor(x0, e, t, points, pi=None):
    """(N,) |u - u*|^2 / D: the part of the loss that no network can remove (Eq. 5).

    E|v - u|^2 = E|v - u*|^2 + E|u - u*|^2. Many (x0, e) share one x_t, and v can only learn their mean velocity u*.
    """
    gap = target(x0, e) - exact_velocity(path(x0, e, t), t, points, pi)    # (N, ...)
    return (gap * gap).flatten(1).mean(1)


def group_velocities(x, t, points, groups, pi=None):
    """omega (N, G) and u_g (N, G, ...): each group's posterior share and its own exact velocity (Eq. 7).

    groups is (K,) long with values 0..G-1, each used: any partition of the population. sum_g omega_g u_g is u*.
    """
    present = torch.unique(groups)
    if len(groups) != points.shape[points.dim() - x.dim()] or not torch.equal(present, torch.arange(len(present), device=groups.device)):
        raise ValueError("groups must give every point one of 0..G-1, and each of these at least once")
    w, member = posterior(x, t, points, pi), groups == present[:, None]    # (N, K), (G, K)
    omega = w @ member.T.to(w.dtype)                                       # (N, G)
    pi = torch.full_like(w, 1 / w.shape[1]) if pi is None else pi.expand_as(w)
    u_g = [exact_velocity(x, t, points, pi * inside) for inside in member]     # a group alone: the others have weight 0
    return omega, torch.stack(u_g, 1)


def data_interaction_matrix(v, u_g):
    """(N, G, G) Omega_gh = <v - u_g, v - u_h>, for v (N, ...) and u_g (N, G, ...) (Eq. 8).

    |v - u*|^2 = omega^T Omega omega for any partition: the diagonal is each group learning alone, the off-diagonal is the
    residual correlation between groups. The same expansion in reverse: sum_g omega_g |v - u_g|^2
    = |v - u*|^2 + sum_g omega_g |u_g - u*|^2, whose last term has no v in it (Eq. 9).
    """
    D_g = (v[:, None] - u_g).flatten(2)                                    # (N, G, D)
    return D_g @ D_g.mT                                                    # (N, G, G)
