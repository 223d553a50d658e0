"""Flow matching: a straight path from data to noise, and a network that learns its velocity.

t = 0 is data and t = 1 is noise. x0 is an image of the data, and e ~ N(0, I) is
noise, sampled independently of x0. x_t is the point of their path at the noise
level t. A network answers with its velocity there, v = model(x_t, t, tokens).
A batch has N samples of D numbers each. With noise that is independent of the
data, this is also the first round of rectified flow.

Every function takes x0, e and x as (N, ...), and t as one number, as (N,) or as
(N, 1). What does not fit raises ValueError: nothing broadcasts silently.
Run `python flow_matching.py` for the numbers of two points and a plane. The
examples below take their names from `import torch, flow_matching as fm`.
"""

import math
import numbers

import torch


def path(x0, e, t):
    """(N, ...) x_t = (1 - t) x0 + t e (Eq. 1)."""
    _require_alike(x0, e)
    t = _per_sample(t, x0)                              # (N,)
    t = t.view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * e


def target(x0, e):
    """(N, ...) u = dx_t/dt = e - x0, the same at every t of one path (Eq. 2).

    e is the very noise that made x_t. With fresh noise the best v would be
    -E[x0 | x_t]: a denoiser, and no velocity.
    """
    _require_alike(x0, e)
    return e - x0


def residual(model, x0, e, t, tokens):
    """(N, ...) r_i = v_i - u_i: the network's velocity minus the target (Eq. 3).

    Path, target and residual have the type of x0: they are float32 even if the
    network answers in bfloat16.
    """
    t = _per_sample(t, x0)                              # (N,)
    _require_captions(tokens, x0)
    v = model(path(x0, e, t), t, tokens)                # (N, ...)
    _require_shape("the network's velocity", v, x0.shape)
    return v - target(x0, e)


def loss(model, x0, e, t, tokens):
    """(N,) |r_i|^2 / D (Eq. 3).

    Its mean over the samples is 2/D times L = 1/(2N) sum_i |r_i|^2: a step of size
    eta on it is a time tau = 2 eta/D on L.

    Example, of a network without captions:
        network = torch.nn.Linear(3, 2)
        def model(x, t, tokens):
            return network(torch.cat([x, t[:, None]], 1))
        x0, e = torch.randn(64, 2), torch.randn(64, 2)
        each = fm.loss(model, x0, e, torch.rand(64), None)  # (64,)
    """
    r = residual(model, x0, e, t, tokens)               # (N, ...)
    return _flat(r * r).mean(1)


# --- From noise to data ---------------------------------------------------------------------------

def guided(model, tokens, scale=1.0):
    """The velocity v_null + s (v_c - v_null) as a function of (x, t) (Eq. 6).

    v_c is the network's velocity under the caption, v_null under the null caption
    (all tokens 0). The scale s = 1 is off. Without captions, tokens is None, and
    there is no guidance. The velocity has the type of x, so that a sampler adds
    up its steps in float32.

    Example, with classes 1 and 2 in place of captions:
        def model(x, t, tokens):
            return tokens - x
        velocity = fm.guided(model, torch.tensor([[1], [2]]), scale=3.0)
        v = velocity(torch.zeros(2, 1), 0.5)            # (2, 1)
    """
    if not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
        raise ValueError(f"the guidance scale must be a finite number, not {scale!r}")
    if scale != 1 and not isinstance(tokens, torch.Tensor):
        raise ValueError("without tokens there is no guidance: the scale must be 1, or the"
                         f" tokens a tensor, not a {type(tokens).__name__}")

    def velocity(x, t):
        t = _per_sample(t, x)                           # (N,)
        _require_captions(tokens, x)
        if scale == 1:
            v = model(x, t, tokens)                     # (N, ...)
            _require_shape("the network's velocity", v, x.shape)
        else:
            twice = torch.cat([x, x])
            with_null = torch.cat([tokens, torch.zeros_like(tokens)])
            both = model(twice, torch.cat([t, t]), with_null)
            _require_shape("the network's velocity", both, twice.shape)
            v_c, v_null = both.chunk(2)                 # (N, ...) each
            v = v_null + scale * (v_c - v_null)         # (N, ...)
        return v.to(x.dtype)

    return velocity


def euler(velocity, x, times):
    """(N, ...) the end of dx/dt = v(x, t), from x at times[0] to times[-1] (Eq. 6).

    times (T,) goes from 1 to 0 for sampling. Half the step leaves half the error
    (first order).
    """
    times = _times(times, x)                            # (T,)
    for t, t_next in zip(times[:-1], times[1:]):
        v = velocity(x, t.expand(len(x)))               # (N, ...)
        _require_shape("the velocity", v, x.shape)
        x = x + (t_next - t) * v                        # (N, ...)
    return x


def heun(velocity, x, times):
    """Like euler, but with the mean of the velocities at both ends of each step (Eq. 6).

    Half the step leaves a quarter of the error (second order), for two calls of
    the velocity. It also asks for the velocity at times[-1]; the exact velocity
    has none at t = 0.

    Example, from noise to five points:
        points = torch.randn(5, 2)
        def velocity(x, t):
            return fm.exact_velocity(x, t, points)
        x = fm.heun(velocity, torch.randn(100, 2), torch.linspace(1, 0.01, 50))  # (100, 2)
    """
    times = _times(times, x)                            # (T,)
    for t, t_next in zip(times[:-1], times[1:]):
        v = velocity(x, t.expand(len(x)))               # (N, ...)
        _require_shape("the velocity", v, x.shape)
        x_next = x + (t_next - t) * v                   # (N, ...)
        v_next = velocity(x_next, t_next.expand(len(x)))  # (N, ...)
        _require_shape("the velocity", v_next, x.shape)
        x = x + (t_next - t) * (v + v_next) / 2         # (N, ...)
    return x


@torch.no_grad()
def sample(model, tokens, noise, steps, scale=1.0):
    """(N, ...) an image for each caption, from noise (N, ...), mostly by Heun's method (Eq. 6).

    The last step is Euler's, since Heun's would ask for the velocity at t = 0,
    where x_t holds no noise and a network can only guess e. It ends on x - t v: the
    network's guess of the image. The error is still of second order.

    With tokens None the network is called without captions; the scale must be 1.

    Example:
        def model(x, t, tokens):
            return x
        noise = torch.randn(4, 1, 28, 28)
        images = fm.sample(model, None, noise, steps=8)  # (4, 1, 28, 28)
    """
    if not (isinstance(steps, numbers.Integral) and steps >= 1):
        raise ValueError(f"sampling takes a whole number of steps from 1 on, not {steps!r}")
    _require_samples(noise)
    times = torch.linspace(1, 0, steps + 1, device=noise.device)  # (T,)
    velocity, x = guided(model, tokens, scale), noise
    if steps > 1:
        x = heun(velocity, x, times[:-1])               # (N, ...)
    return euler(velocity, x, times[-2:])


# --- The exact velocity of a finite population ----------------------------------------------------

def posterior(x, t, points, pi=None):
    """(N, S) w_k(x, t) = softmax_k(log pi_k - |x - (1 - t) x^k|^2 / (2 t^2)) (Eq. 4).

    w_k is the probability that the noisy x comes from x^k, one of the S points
    (images) of one caption's population. It holds for noise e ~ N(0, I) that is
    independent of x0, and for t > 0: at t = 0 x is data already, and nothing is
    left to infer.

    x is (N, ...). points are (S, ...), or (N, S, ...) with a population for each
    x (then x has two axes or more). pi is (S,) or (N, S): how often each point
    occurs, up to a factor. None means equally often.
    Raises ValueError for other shapes, for a t that is not 0 < t <= 1, for an empty
    population, and for a pi that is negative, not finite or all zero.

    Example, in which the last point occurs twice as often:
        points = torch.randn(3, 2)
        x = torch.randn(7, 2)
        w = fm.posterior(x, 0.5, points, pi=[1, 1, 2])  # (7, 3)
    """
    w, _ = _exact(x, t, points, pi)
    return w.to(x.dtype)


def exact_velocity(x, t, points, pi=None):
    """(N, ...) u*(x, t) = (x - sum_k w_k x^k) / t: the mean velocity at (x, t) (Eq. 4).

    It is the mean over all paths through (x, t), and sum_k w_k x^k = E[x0 | x_t]
    is that of their ends. No function v(x_t, t, c) of point, time and caption has
    a smaller expected loss. u* belongs to the population of one caption c: images
    with different captions, such as the views of one root, never share one u*.
    (Under the null caption all images share one.)

    Near t = 1 the weights w_k are nearly those of pi, for every x that is likely
    there. So u* is nearly (x - mean image) / t, and samples head for the mean image.
    (A v that ignored x, minus the mean image, would lead to noise around it.)
    Structure appears once the weights depend on x.

    Shapes and errors are those of posterior. One x alone is a batch of one, x[None].

    Example:
        points = torch.randn(5, 2)
        x = torch.randn(7, 2)
        u = fm.exact_velocity(x, 0.5, points)           # (7, 2)
        t = torch.linspace(0.1, 1, 7)
        u = fm.exact_velocity(x, t, points)             # (7, 2)
    """
    _, u_star = _exact(x, t, points, pi)
    return u_star.to(x.dtype).view(x.shape)


def _posterior_and_velocity(x, t, points, log_pi):
    """w (N, S) and u* (N, D), for x (N, D), t (N, 1), points (N, S, D), log pi (N, S) (Eq. 4)."""
    points = points.double()
    gap = x[:, None] - (1 - t[..., None]) * points      # (N, S, D)
    energy = gap.square().sum(2) / (2 * t * t)          # (N, S)
    w = torch.softmax(log_pi - energy, 1)               # (N, S)
    x0_mean = (w[:, None] @ points)[:, 0]               # (N, D)
    u_star = (x - x0_mean) / t                          # (N, D)
    return w, u_star


def _exact(x, t, points, pi):
    """w (N, S) and u* (N, D) in float64: the checks, then Eq. 4 for a few samples at a time."""
    t = _per_sample(t, x)                               # (N,)
    if not ((t > 0) & (t <= 1)).all():
        raise ValueError("the exact velocity needs 0 < t <= 1")
    points = _population(points, x)                     # (1 or N, S, D)
    N, (_, S, D) = len(x), points.shape
    log_pi = _weights(pi, x, S).log()                   # (1 or N, S)
    # The energies of close points differ by little, and are large where t is
    # small. Float32 has too few digits for such a difference.
    if len(points) == 1:
        # At once, since otherwise it would be done anew for every sample.
        points = points.double()
    x, t = _flat(x).double(), t.double()[:, None]       # (N, D), (N, 1)
    points, log_pi = points.expand(N, S, D), log_pi.expand(N, S)
    # So many samples at a time that their (n, S, D) differences stay in a
    # processor's cache.
    few = max(1, 2**17 // (S * D))
    split = [z.split(few) for z in (x, t, points, log_pi)]
    solved = [_posterior_and_velocity(*some) for some in zip(*split)]
    w, u_star = zip(*solved)
    return torch.cat(w), torch.cat(u_star)


def loss_floor(x0, e, t, points, pi=None):
    """(N,) |u - u*|^2 / D, whose expectation no network can remove from its loss (Eq. 5).

    E|v - u|^2 = E|v - u*|^2 + E|u - u*|^2 for any v that is a function of
    (x_t, t, c) alone, if x0 is distributed as the population, e is independent of
    it, and t > 0. The expectation is over the whole population: on a finite batch
    this holds only nearly. Where every caption has one image the floor is 0, since
    then x_t, t and the caption leave a single path.

    Many pairs (x0, e) share one x_t, and v can learn no more than their mean
    velocity u*.

    Example:
        points = torch.randn(5, 2)
        x0 = points[torch.randint(5, (1000,))]
        e = torch.randn(1000, 2)
        floor = fm.loss_floor(x0, e, 0.5, points)       # (1000,)
    """
    _require_alike(x0, e)
    t, kind = _per_sample(t, x0).double(), x0.dtype     # (N,)
    # u and u* may be large, and differ by little: in float32 the rounding of x_t,
    # divided by t, would count as a floor.
    x0, e = x0.double(), e.double()                     # (N, ...) each
    u_star = exact_velocity(path(x0, e, t), t, points, pi)  # (N, ...)
    gap = target(x0, e) - u_star                        # (N, ...)
    return _flat(gap * gap).mean(1).to(kind)


def group_velocities(x, t, points, groups, pi=None):
    """omega (N, G) and u_g (N, G, ...): each group's share and its own exact velocity (Eq. 7).

    groups (S,) gives each point of one caption's population a number from 0 to
    G-1, and uses each of these. Any partition will do. omega_g is the sum of w_k
    over the points of the group, u_g is the exact velocity of the group alone,
    and sum_g omega_g u_g = u*.
    """
    w, _ = _exact(x, t, points, pi)                     # (N, S), (N, D)
    S = w.shape[1]
    groups = _numbers("groups", groups, x, torch.float64)
    present = torch.unique(groups)                      # (G,)
    if groups.shape != (S,) or present.tolist() != list(range(len(present))):
        raise ValueError("groups must give every point one of 0..G-1,"
                         " and each of these at least once")
    member = (groups == present[:, None]).double()      # (G, S)
    omega = w @ member.T                                # (N, G)
    pi = _weights(pi, x, S).expand(len(x), S)
    if not (pi @ member.T > 0).all():
        raise ValueError("each group must have a point whose weight pi is not zero")
    # A group alone is the population in which all the other points have the
    # weight 0.
    u_g = [exact_velocity(x, t, points, pi * inside) for inside in member]
    return omega.to(x.dtype), torch.stack(u_g, 1)


def data_interaction_matrix(v, u_g):
    """(N, G, G) Omega_gh = <v - u_g, v - u_h>, for v (N, ...) and u_g (N, G, ...) (Eq. 8).

    |v - u*|^2 = omega^T Omega omega for any partition into groups, a random one
    too. The diagonal of Omega is each group learning alone. Its off-diagonal is
    how the residuals of two groups correlate.

    If each group learned alone, the loss would be sum_g omega_g |v - u_g|^2. This
    is |v - u*|^2 + sum_g omega_g |u_g - u*|^2 (Eq. 9), and its last term has no
    network in it. So both losses have the same gradient: the cross terms of Omega
    are an expansion of the loss, and no separate lever on its expectation.

    The groups are groups of one caption's population. The views of one root have
    different captions and share no u*, so Omega says nothing between them. They
    interact through the parameters alone, which is the interaction matrix M of
    ntk.py.

    Example, of five points in two groups:
        points, groups = torch.randn(5, 2), [0, 0, 1, 1, 1]
        x = torch.randn(7, 2)
        omega, u_g = fm.group_velocities(x, 0.5, points, groups)
        v = torch.zeros(7, 2)
        Omega = fm.data_interaction_matrix(v, u_g)      # (7, 2, 2)
    """
    _require_samples(v)
    _require_samples(u_g)
    of_a_group = u_g.shape[:1] + u_g.shape[2:]
    if u_g.dim() != v.dim() + 1 or of_a_group != v.shape:
        raise ValueError(f"u_g must be (N, G, ...) for v (N, ...), not {tuple(u_g.shape)}"
                         f" for {tuple(v.shape)}")
    # In float64, since the products of long vectors may add up to little.
    delta = v.double()[:, None] - u_g                   # (N, G, ...)
    delta = delta[..., None].flatten(2)                 # (N, G, D)
    Omega = delta @ delta.mT                            # (N, G, G)
    return Omega.to(torch.promote_types(v.dtype, u_g.dtype))


# --- Each function checks the shapes that it documents --------------------------------------------
# Only shapes and types, never values: to look at a value, a program has to wait
# for its GPU.

def _described(x):
    """What a refusal says of x."""
    if isinstance(x, torch.Tensor):
        return f"{x.dtype} of the shape {tuple(x.shape)}"
    return f"a {type(x).__name__}"


def _require_shape(name, tensor, shape):
    if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
        raise ValueError(f"{name} must be a tensor of the shape {tuple(shape)},"
                         f" not {_described(tensor)}")


def _require_samples(x):
    """A sample has a number or more, but there may be no sample at all.

    In bfloat16 a t near 1 would be known to 1/256 only (in float16 to 1/2048), and
    small steps would be lost.
    """
    is_float = isinstance(x, torch.Tensor) and x.dtype in (torch.float32, torch.float64)
    if not is_float or x.dim() == 0 or 0 in x.shape[1:]:
        raise ValueError("samples must be a tensor of float32 or float64 of the shape (N, ...),"
                         f" not {_described(x)}")


def _require_alike(x0, e):
    _require_samples(x0)
    _require_shape("e", e, x0.shape)
    if x0.dtype != e.dtype:
        raise ValueError(f"x0 and e must have one type, not {x0.dtype} and {e.dtype}")


def _require_captions(tokens, x):
    """A tensor of tokens has a row for each sample. What else a network takes is its own affair."""
    if isinstance(tokens, torch.Tensor) and tokens.shape[:1] != x.shape[:1]:
        raise ValueError(f"tokens must have a row for each of the {len(x)} samples,"
                         f" not the shape {tuple(tokens.shape)}")


def _numbers(name, values, x, kind):
    """The values as a tensor on the device of x. What is no number is refused by its name."""
    try:
        return torch.as_tensor(values, dtype=kind, device=x.device)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number or a tensor of numbers,"
                         f" not {values!r}") from None


def _per_sample(t, x):
    """(N,) a noise level for each sample of x (N, ...), in the type of x."""
    _require_samples(x)
    N = len(x)
    t = _numbers("t", t, x, x.dtype)
    if t.dim() == 0:
        t = t.expand(N)
    if t.shape not in ((N,), (N, 1)):
        raise ValueError(f"t must be one number, or one for each of the {N} samples,"
                         f" not of the shape {tuple(t.shape)}")
    return t.reshape(N)


def _times(times, x):
    """(T,) the times of a sampler, in the type of x."""
    _require_samples(x)
    times = _numbers("times", times, x, x.dtype)
    if times.dim() != 1 or len(times) < 2:
        raise ValueError("a sampler goes along two times or more, given as (T,),"
                         f" not of the shape {tuple(times.shape)}")
    return times


def _flat(x):
    """(N, D) from (N, ...). Samples of one number each, (N,), become (N, 1)."""
    return x[..., None].flatten(1)


def _population(points, x):
    """(1 or N, S, D) the points of the samples x, given as (S, ...) or (N, S, ...)."""
    if not isinstance(points, torch.Tensor):
        raise ValueError(f"points must be a tensor, not {_described(points)}")
    one_for_all = points.dim() == x.dim()
    # Not for x (N,): a user who forgot that one x alone is x[None] would not notice.
    own = x.dim() > 1 and points.dim() == x.dim() + 1 and len(points) == len(x)
    of_a_point = points.shape[1:] if one_for_all else points.shape[2:]
    if not (one_for_all or own) or of_a_point != x.shape[1:]:
        raise ValueError("points must be (S, ...) or (N, S, ...) for samples (N, ...), and one"
                         " sample alone is x[None]; these are"
                         f" {tuple(points.shape)} for {tuple(x.shape)}")
    if one_for_all:
        points = points[None]
    if points.shape[1] == 0:
        raise ValueError("a population has 1 point or more, not 0")
    return points[..., None].flatten(2)


def _weights(pi, x, S):
    """(1 or N, S) the weights of S points in float64; all are 1 if pi is None."""
    if pi is None:
        return torch.ones(1, S, dtype=torch.float64, device=x.device)
    pi = _numbers("pi", pi, x, torch.float64)
    if pi.shape not in ((S,), (len(x), S)):
        raise ValueError(f"pi must have the shape ({S},) or ({len(x)}, {S}),"
                         f" not {tuple(pi.shape)}")
    allowed = (pi >= 0) & pi.isfinite()
    if not allowed.all() or not (pi > 0).any(-1).all():
        raise ValueError("the weights pi must be finite and not negative,"
                         " and not all of them zero")
    return pi.view(-1, S)


# --- The demo: two points in one dimension, where a path is a line over t -------------------------

def two_points():
    """(2, 1) the whole population of the demo."""
    return torch.tensor([[-1.0], [1.0]])


def measure_crossing():
    """Two paths that meet at x = 0.3, t = 0.6: their velocities there, and the mean of these."""
    points = two_points()
    t = 0.6
    x = torch.tensor([[0.3]])
    w = posterior(x, t, points)                         # (1, 2)
    # One path from each point leads through x. Its noise follows from Eq. 1.
    e = (x - (1 - t) * points) / t                      # (2, 1)
    return {"x": x.item(),
            "t": t,
            "posterior": w[0].tolist(),
            "velocities": target(points, e)[:, 0].tolist(),
            "mean": exact_velocity(x, t, points).item()}


def measure_floor(n=20000):
    """The loss of a network that is wrong by 0.3 everywhere, and its floor, at four levels."""
    generator = torch.Generator().manual_seed(0)
    points = two_points()
    x0 = points[torch.randint(2, (n,), generator=generator)]  # (n, 1)
    e = torch.randn(n, 1, generator=generator)          # (n, 1)

    def network(x, t, tokens):
        return exact_velocity(x, t, points) + 0.3

    levels = (0.2, 0.5, 0.8, 0.95)
    floors = [loss_floor(x0, e, t, points).mean().item() for t in levels]
    losses = [loss(network, x0, e, t, None).mean().item() for t in levels]
    return {"t": levels, "floor": floors, "loss": losses}


def measure_samples():
    """Eleven noises on their way from t = 1 to the data, along the exact velocity."""
    points = two_points()

    def velocity(x, t):
        return exact_velocity(x, t, points)

    times = torch.linspace(1, 0, 201)
    x = torch.linspace(-2, 2, 11)[:, None] + 0.02       # (11, 1)
    positions = [x]
    for this_and_next in times.unfold(0, 2, 1):         # (2,)
        x = euler(velocity, x, this_and_next)           # (11, 1)
        positions.append(x)
    ways = torch.cat(positions, 1)                      # (11, 201)

    # Halfway, beside 2,000 steps. (At t = 0 each of these ends on the data.)
    start = ways[:, :1]                                 # (11, 1)
    halfway = euler(velocity, start, torch.linspace(1, 0.5, 2001))  # (11, 1)
    errors = []
    for steps in (10, 20, 40):
        found = euler(velocity, start, torch.linspace(1, 0.5, steps + 1))  # (11, 1)
        errors.append((found - halfway).abs().max().item())
    return {"t": times.tolist(), "ways": ways.tolist(), "errors": errors}


def measure_groups():
    """A velocity v, two groups of five points in the plane, and Omega (Eq. 7, 8)."""
    left = torch.tensor([[-1.0, 0.6], [-0.6, -0.4]], dtype=torch.float64)
    right = torch.tensor([[0.8, 0.9], [1.0, -0.2], [0.5, 0.2]], dtype=torch.float64)
    points = torch.cat([left, right])                   # (5, 2)
    groups = torch.tensor([0, 0, 1, 1, 1])
    x = torch.tensor([[0.2, -0.1]], dtype=torch.float64)
    t = 0.6
    omega, u_g = group_velocities(x, t, points, groups)  # (1, 2), (1, 2, 2)
    u_star = exact_velocity(x, t, points)               # (1, 2)
    # Such that the numbers of the picture also add up after they are rounded.
    v = u_star + torch.tensor([[0.4, -0.62]])           # (1, 2)
    Omega = data_interaction_matrix(v, u_g)             # (1, 2, 2)
    found = {"v": v, "u_star": u_star, "u_g": u_g, "omega": omega, "Omega": Omega}
    # There is one sample, and a picture needs no axis for it.
    return {name: value[0] for name, value in found.items()}


def main():
    crossing, floor = measure_crossing(), measure_floor()
    samples, form = measure_samples(), measure_groups()
    first, second = crossing["velocities"]
    print(f"Eq. 1, 2: two paths meet at x = {crossing['x']:g}, t = {crossing['t']:g},"
          f" with the velocities {first:+.2f} and {second:+.2f}")
    first, second = crossing["posterior"]
    print(f"Eq. 4: x came from -1 or 1 with the probabilities {first:.2f} and {second:.2f},"
          f" so that the exact velocity is {crossing['mean']:+.2f}")
    for t, floor_at_t, loss_at_t in zip(floor["t"], floor["floor"], floor["loss"]):
        print(f"Eq. 5: at t = {t} the floor is {floor_at_t:.3f}, and the loss of v = u* + 0.3 is"
              f" {loss_at_t - floor_at_t:.3f} above it: nearly 0.3^2, on a finite batch")
    print("Eq. 6: halfway, Euler's largest error with 10, 20 and 40 steps is",
          ", ".join(f"{error:.4f}" for error in samples["errors"]))
    omega, Omega, v, u_star = (form[name] for name in ("omega", "Omega", "v", "u_star"))
    gap = (v - u_star).square().sum()
    (a, b), (_, c) = (omega[:, None] * Omega * omega).tolist()
    print(f"Eq. 8: |v - u*|^2 = {gap:.4f} = {a:.4f} {b:+.4f} {b:+.4f} {c:+.4f}")
    alone = (omega * Omega.diagonal()).sum()
    spread = (omega * (form["u_g"] - u_star).square().sum(1)).sum()
    print(f"Eq. 9: the groups alone have {alone:.4f} = {gap:.4f} + {spread:.4f};"
          " v is not in the last term")
    print("The pictures: python results/figures.py crossing floor form")


if __name__ == "__main__":
    main()
