"""Flow matching: a straight path from data (t = 0) to noise (t = 1), and a network that learns its velocity.

Convention: x0 is data, e ~ N(0, I) is noise, t in [0, 1] has one value per sample, v = model(x_t, t, tokens).
On this path flow matching and rectified flow are the same. Run `python flow_matching.py` for a picture.
"""

import math
import sys

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

    Path, target and residual have the type of x0, so float32 even if the network answers in bfloat16.
    """
    r = model(path(x0, e, t), t, tokens) - target(x0, e)                   # (N, ...)
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
    (N, K), equal if None. Raises ValueError for t outside: at t = 0 x is data already and nothing is left to infer.
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
    residual correlation between groups. Averaging the groups' own errors instead gives sum_g omega_g |v - u_g|^2
    = |v - u*|^2 + sum_g omega_g |u_g - u*|^2, whose last term has no v in it (Eq. 9).
    """
    D_g = (v[:, None] - u_g).flatten(2)                                    # (N, G, D)
    return D_g @ D_g.mT                                                    # (N, G, G)


def main(file="flow_matching.png"):
    import matplotlib.pyplot as plt
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.arange(5) / 5
    points = 1.5 * torch.stack([angle.sin(), angle.cos()], 1)              # (5, 2)  the whole population
    n = 4000
    x0 = points[torch.randint(5, (n,), generator=generator)]               # (n, 2)
    e = torch.randn(n, 2, generator=generator)                             # (n, 2)
    figure, (a, b, c, d) = plt.subplots(1, 4, figsize=(20, 5.6), layout="constrained")

    print("Eq. 1, 2: every pair (x0, e) has a straight path, along which the velocity e - x0 is constant")
    a.plot(*torch.stack([x0[:60], e[:60]]).permute(2, 0, 1).numpy(), color="#0072b2", linewidth=0.7)
    a.scatter(*e[:60].T.numpy(), s=12, color="grey", label="noise, t = 1", zorder=2)
    a.set_title("Eq. 1-2: straight paths (t is not shown)")

    t = torch.tensor(0.5)
    axis = torch.linspace(-2.4, 2.4, 17)
    x = torch.cartesian_prod(axis, axis)                                   # (289, 2)
    u = exact_velocity(x, t.expand(len(x)), points)                        # (289, 2)
    print("Eq. 4: where paths cross only their mean velocity can be learned: the posterior at x = 0, t = 0.5 is",
          [round(w, 2) for w in posterior(torch.zeros(1, 2), t[None], points)[0].tolist()])
    b.quiver(*x.T.numpy(), *-u.T.numpy(), color="#0072b2")
    b.set_title("Eq. 4: the exact velocity at t = 0.5\n(arrows: towards the data, -u*)")

    start = torch.randn(60, 2, generator=generator)
    line = [start]
    for two_times in torch.linspace(1, 0, 201).unfold(0, 2, 1):            # (2,)  this t and the next, 200 times
        line.append(euler(lambda x, t: exact_velocity(x, t, points), line[-1], two_times))
    ways = torch.stack(line)                                               # (201, 60, 2)
    c.plot(*ways.permute(2, 0, 1).numpy(), color="#0072b2", linewidth=0.7)
    c.scatter(*start.T.numpy(), s=12, color="grey", label="noise, t = 1", zorder=2)
    c.set_title("Eq. 6: samples follow u* from t = 1 to 0;\nno two are at one x at one t")
    print(f"Eq. 6: after 200 Euler steps the largest distance from the nearest data point is {torch.cdist(ways[-1], points).min(1).values.max():.1e}")

    grid = torch.linspace(0.02, 1, 50)
    floor = [loss_floor(x0, e, t.expand(n), points).mean() for t in grid]
    v = lambda x, t: exact_velocity(x, t, points) + 0.3                    # a network that is wrong by 0.3 everywhere
    total = [((v(path(x0, e, t.expand(n)), t.expand(n)) - target(x0, e)) ** 2).mean() for t in grid]
    d.plot(grid.numpy(), torch.stack(total).numpy(), color="#e69f00", label="loss of a v that is u* + 0.3")
    d.plot(grid.numpy(), torch.stack(floor).numpy(), color="#0072b2", label="its floor, E|u - u*|² / D")
    d.set(xlabel="t (0 is data, 1 is noise)", ylabel="loss per output", ylim=(0, None))
    d.set_title("Eq. 5: the loss has a floor;\nabove it is |v - u*|²/D = 0.09")
    d.legend(loc="lower right")
    print(f"Eq. 5: mean over t of the floor {torch.stack(floor).mean():.3f}, of the loss {torch.stack(total).mean():.3f};",
          "their difference is near 0.3^2")

    groups = torch.tensor([0, 0, 1, 1, 1])
    x, t = e[:6].double(), torch.full((6,), 0.7, dtype=torch.float64)
    omega, u_g = group_velocities(x, t, points.double(), groups)
    v = torch.zeros_like(x)
    form = torch.einsum("ng,ngh,nh->n", omega, data_interaction_matrix(v, u_g), omega)
    error = (v - exact_velocity(x, t, points.double())).square().sum(1)
    print(f"Eq. 7, 8: |v - u*|^2 = omega^T Omega omega, largest difference {(form - error).abs().max():.1e}")
    for panel in (a, b, c):
        panel.scatter(*points.T.numpy(), s=60, color="#d55e00", label="data, t = 0", zorder=3)
        panel.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal", xlabel="x₁", ylabel="x₂")
        panel.legend(loc="lower right")
    figure.savefig(file, dpi=90)
    print("drawn:", file)


if __name__ == "__main__":
    main(*sys.argv[1:])
