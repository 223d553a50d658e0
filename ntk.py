"""The empirical neural tangent kernel (NTK) and the interaction matrix of a batch, both exact.

A network with P parameters theta answers sample i with D numbers v_i. Its residual is r_i.

    J_i  = dv_i / dtheta                  (D x P)  the Jacobian: what each parameter does to v_i
    g_i  = J_i^T r_i                      (P)      the gradient of |r_i|^2 / 2 (Eq. 10)
    K_ij = J_i J_j^T                      (D x D)  a block of the kernel; there are N x N (Eq. 11)
    M_ij = r_i^T K_ij r_j = <g_i, g_j>    (1)      the interaction matrix M is N x N (Eq. 12)

The clear route follows these definitions, for any function f(params, *one_input) of one sample.
The fast route takes a module and goes through it layer by layer. For M it forms no Jacobian, for
K only parts of it, a few layers at a time. It checks its own result by a backward pass with random
weights. `of_module` makes f and params of a module. By hand it takes three lines:

    params = {name: p.detach() for name, p in model.named_parameters()}
    def f(params, x):
        return torch.func.functional_call(model, params, (x[None],))[0]

Run `python ntk.py` for numbers, and `python results/bench_ntk.py` for times and memory beside
other ways to the same numbers. The examples below take their names from `import torch, ntk`.
"""

import contextlib
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel


# --- The idea, on one Linear layer ----------------------------------------------------------------

def one_linear_layer(a, b):
    """(N, N), (N, N): M of one layer z_i = W a_i, with its gradients and without them (Eq. 12).

    a (N, I) are the layer's inputs. b (N, O) are its cotangents: b_i is the gradient of
    <r_i, v_i> with respect to the layer's output z_i. For a network of this one layer b_i is r_i.

    Example:
        M, the_same = ntk.one_linear_layer(torch.randn(5, 3), torch.randn(5, 2))   # (5, 5), (5, 5)
    """
    # By the chain rule, the gradient of sample i with respect to W is the outer product b_i a_i^T.
    g = b[:, :, None] * a[:, None, :]                              # (N, O, I)
    g = g.flatten(1)                                               # (N, OI)
    with_gradients = g @ g.T                                       # (N, N)
    # The inner product of two outer products is the product of two inner products:
    # <b_i a_i^T, b_j a_j^T> = <a_i, a_j> <b_i, b_j>. A matrix of inner products is called a Gram
    # matrix. Entry by entry, the product of two of them is M; nothing of the size of W is formed.
    without = (a @ a.T) * (b @ b.T)                                # (N, N)
    return with_gradients, without


# --- The clear route: any function f(params, *one_input) ------------------------------------------
# params is a dict of tensors. inputs are a tuple of tensors with the N samples on their first axis,
# or a dict of them for inputs that are given by name. Results are detached.

@torch.no_grad()
def per_sample_gradients(f, params, inputs, vectors):
    """(N, P) g_i = J_i^T vector_i for vectors (N, *output shape); params in their order (Eq. 10).

    Raises ValueError if the numbers of samples differ, if a vector does not fit its output, and if
    the output has no gradient or is random.

    Example, of a function that is no module:
        def f(params, x):
            return params["W"] @ x.cos()
        params = {"W": torch.randn(2, 4)}
        x, r = torch.randn(3, 4), torch.randn(3, 2)
        g = ntk.per_sample_gradients(f, params, (x,), r)           # (3, 8)
    """
    _require_as_many(vectors, inputs)

    def one_gradient(vector, sample):
        def output(params):
            return _with_gradient(_call(f, params, sample))

        # A vector-Jacobian product (vjp): an ordinary backward pass that begins with this vector.
        v, pull_back = vjp(output, params)
        vector = _like(vector[None], v[None])[0]
        g, = pull_back(vector)
        return torch.cat([g_of_one.flatten() for g_of_one in g.values()])

    try:
        return vmap(one_gradient)(vectors, inputs)                 # (N, P)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # vmap cannot take every step: an LSTM, a checkpoint, a branch that depends on a number.
        pass
    return _one_after_another(f, params, inputs, vectors)


@torch.no_grad()
def interaction_matrix(f, params, inputs, residuals, chunk=None, columns=None):
    """(N, N) M_ij = <g_i, g_j> for residuals (N, *output shape) (Eq. 12).

    With columns = (inputs, residuals) of a second batch of N2 samples, M is (N, N2): its rows are
    evaluated, its columns are trained on (Eq. 22). It takes N P numbers of memory, or 2 `chunk` P
    and more time. Raises ValueError as per_sample_gradients does.
    """
    if chunk is None and columns is None:
        G = per_sample_gradients(f, params, inputs, residuals)     # (N, P)
        return G @ G.T                                             # (N, N)
    if columns is None:
        columns = (inputs, residuals)
    _require_pair(columns)
    bands = []
    for part in _parts(inputs, residuals, chunk):
        G = per_sample_gradients(f, params, *part)
        blocks = []
        for other in _parts(*columns, chunk):
            blocks.append(G @ per_sample_gradients(f, params, *other).T)
        bands.append(torch.cat(blocks, 1))
    return torch.cat(bands)


@torch.no_grad()
def ntk_blocks(f, params, inputs, chunk=None):
    """(N, N, D, D) K_ij = J_i J_j^T, as it is defined (Eq. 11).

    It takes N D P numbers of memory. With `chunk` outputs at once it is 2 `chunk` N P, and more
    time.
    """
    unit = _unit_vectors_of(f, params, inputs)                     # (D, N, ...)
    parts = unit.split(len(unit) if chunk is None else _positive(chunk))
    bands = []
    for some in parts:
        J = _rows_of_jacobians(f, params, inputs, some)
        blocks = []
        for other in parts:
            J_other = J if other is some else _rows_of_jacobians(f, params, inputs, other)
            blocks.append(torch.einsum("dip,ejp->ijde", J, J_other))
        bands.append(torch.cat(blocks, 3))
    return torch.cat(bands, 2)                                     # (N, N, D, D)


@torch.no_grad()
def ntk_trace(f, params, inputs, chunk=16):
    """(N, N) tr K_ij, for `chunk` outputs at once: `chunk` N P numbers of memory (Eq. 11).

    Example:
        f, params = ntk.of_module(torch.nn.Linear(4, 2))
        x = torch.randn(3, 4)
        trace = ntk.ntk_trace(f, params, (x,))                     # (3, 3)
        moved = ntk.ntk_vector_product(f, params, (x,), torch.randn(3, 2))         # (3, 2)
    """
    trace = 0
    for some in _unit_vectors_of(f, params, inputs).split(_positive(chunk)):
        J = _rows_of_jacobians(f, params, inputs, some)
        trace = trace + (J @ J.mT).sum(0)                          # (N, N)
    return trace


@torch.no_grad()
def ntk_vector_product(f, params, inputs, vectors):
    """(N, D) K applied to vectors (N, *output shape), while K is never formed (Eq. 11).

    Raises ValueError also if f has a step that vmap or jvp cannot take.
    """
    _require_as_many(vectors, inputs)
    # Whatever f itself may raise, it raises here.
    _call(f, params, _take(inputs, 0))

    def all_outputs(params):
        def one_output(sample):
            return _call(f, params, sample)

        return vmap(one_output)(inputs)

    try:
        # Attention is written out, since jvp cannot take its fused kernels.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            # Backward to the parameters: g = sum_j J_j^T vector_j.
            v, pull_back = vjp(all_outputs, params)                # (N, ...)
            vectors = _like(vectors, v)
            g, = pull_back(vectors)
            # Forward to the outputs again, by a Jacobian-vector product (jvp): J_i g.
            _, product = jvp(all_outputs, (params,), (g,))         # (N, ...), (N, ...)
    except RuntimeError as error:
        raise ValueError("vmap or jvp cannot take a step of f, but ntk_blocks can: "
                         f"{_first_line(error)}") from error
    # Both ways led through the same J if <vector, K vector> = |J^T vector|^2.
    squared = sum(one.square().sum() for one in g.values())
    gap = ((vectors * product).sum() - squared).abs()
    if gap > math.sqrt(torch.finfo(v.dtype).eps) * squared:
        raise ValueError("the way back through f is not that forward (a no_grad inside it, a hook "
                         "on a gradient, or a backward pass of its own); use ntk_blocks")
    return product.reshape(len(v), -1).detach()                    # (N, D)


def of_module(model, output=None):
    """(f, params): a module as a function f(params, *one_input) of one sample, without the batch.

    params are the parameters that require a gradient. If the model returns a dict or a tuple,
    `output` is the key or the index of the tensor that is meant; without it, all its tensors are
    joined to one vector. Raises ValueError for a model whose samples have no gradient of their own,
    and so does f for an output that has not the samples on its first axis.

    Example:
        f, params = ntk.of_module(torch.nn.Linear(4, 2))
        x, r = torch.randn(3, 4), torch.randn(3, 2)
        M = ntk.interaction_matrix(f, params, (x,), r)             # (3, 3)

    Example, of a model with inputs that are given by name, and with an output that is a tuple:
        attention = torch.nn.MultiheadAttention(4, 2, batch_first=True)
        f, params = ntk.of_module(attention, output=0)
        words = torch.randn(3, 5, 4)
        inputs = {"query": words, "key": words, "value": words}
        M = ntk.interaction_matrix(f, params, inputs, residuals=words)     # (3, 3)

    Example, of a model whose output is a dict:
        class Velocity(torch.nn.Linear):
            def forward(self, x):
                return {"velocity": super().forward(x), "x": x}
        f, params = ntk.of_module(Velocity(4, 2), output="velocity")
        K = ntk.ntk_blocks(f, params, {"x": torch.randn(3, 4)})    # (3, 3, 2, 2)
    """
    _require_separate_samples(model)
    if isinstance(model, (torch.jit.ScriptModule, nn.DataParallel)):
        raise ValueError(f"a {type(model).__name__} cannot be called with other parameters; give "
                         "the module that it was made of")
    params = {name: p.detach() for name, p in _trained(model).items()}
    names = _all_names(model)

    def f(params, *one, **named):
        batch = tuple(z[None] for z in one)
        named = {name: z[None] for name, z in named.items()}
        given = {name: params[first] for name, first in names.items() if first in params}
        v = functional_call(model, given, batch, named, tie_weights=False)
        return _one_tensor(v, output)[0]

    return f, params


# --- What the kernel says about training ----------------------------------------------------------
# All of it is for plain gradient descent, in infinitely small steps of the time tau, on the loss
# L = 1/(2N) sum_i |r_i|^2. Some steps of size eta on the training loss, 2/D times L, are the time
# tau = 2 eta steps/D. (AdamW has an inner product of its own, and signs can change.)

def loss_velocity(M):
    """dL/dtau = -|grad L|^2 as its two parts: the trace term and the cross terms (Eq. 13).

    It is that of plain gradient descent, in infinitely small steps.

    Example, for this and what follows, with random gradients g:
        g, r = torch.randn(4, 9), torch.randn(4, 3)
        M = g @ g.T
        rates = ntk.loss_velocity(M), ntk.sample_velocities(M), ntk.predicted_change(M, eta=0.1)
        pairs = ntk.cosines(M), ntk.conflict_share(M), ntk.sign_agreement(M, r)
        noise = ntk.step_noise(M, a=torch.rand(10, 4))
    """
    N = _require_square(M)
    trace = M.trace()
    cross = M.sum() - trace
    return -trace / N**2, -cross / N**2


def sample_velocities(M):
    """(N,), (N,): d(|r_i|^2 / 2)/dtau as own progress and interference (Eq. 14).

    The first is what sample i does to itself, the second what the others do to it. A sum above 0
    says that the batch makes sample i worse. Both are those of plain gradient descent.
    """
    N = _require_square(M)
    own = M.diagonal()                                             # (N,)
    others = M.sum(1) - own                                        # (N,)
    return -own / N, -others / N


def predicted_change(M, eta):
    """The change of L by the step theta - eta grad L, up to O(eta^2) (Eq. 15).

    This is a step of plain gradient descent. If M is rectangular, it is the change of the rows'
    loss by a step on the columns (Eq. 22).
    """
    return -eta * M.mean()


def cosines(M):
    """(N, N) the cosines between the samples' gradients; nan where a gradient is zero."""
    _require_square(M)
    length = M.diagonal().sqrt()                                   # (N,)
    return M / (length[:, None] * length)


def conflict_share(M, groups=None):
    """(G, G) the share of pairs i != j with M_ij < 0, within and between groups.

    groups (N,) are labels; without them all samples are one group. Where there is no pair: nan.
    """
    N = _require_square(M)
    if groups is None:
        groups = torch.zeros(N, device=M.device)
    labels, group = torch.unique(groups, return_inverse=True)      # (G,), (N,)
    member = F.one_hot(group, len(labels)).to(M)                   # (N, G)
    pairs = 1 - torch.eye(N, dtype=M.dtype, device=M.device)       # (N, N)
    conflicts = pairs * (M < 0)                                    # (N, N)
    return (member.T @ conflicts @ member) / (member.T @ pairs @ member)


def pairs_by_kind(M, labels, names):
    """{what two samples share: {"conflict": share with M_ij < 0, "cosine": mean cosine}}.

    labels is (N, L), a column for each of the L names. A kind of pair is named by all the labels
    that its two samples share, or "nothing". Kinds without a pair are left out.

    Example, with random gradients g:
        g = torch.randn(4, 9)
        labels = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])    # (4, 2)
        for kind, found in ntk.pairs_by_kind(g @ g.T, labels, ("root", "view")).items():
            print(kind, found["conflict"], found["cosine"])
    """
    N = _require_square(M)
    _require_shape("labels", labels, (N, len(names)))
    i, j = torch.triu_indices(N, N, 1, device=M.device)
    same = labels[i] == labels[j]
    negative = M[i, j] < 0
    cosine = cosines(M)[i, j]
    found = {}
    for kind in itertools.product((True, False), repeat=len(names)):
        of_kind = (same == torch.tensor(kind, device=M.device)).all(1)
        if of_kind.any():
            shared = [name for name, shares in zip(names, kind) if shares]
            found[" ".join(shared) or "nothing"] = {
                "conflict": negative[of_kind].float().mean().item(),
                "cosine": cosine[of_kind].mean().item()}
    return found


def frozen_residuals(K, r, tau):
    """(N, D) r(tau) = exp(-K tau / N) r(0), for K (N, N, D, D) and r (N, D) (Eq. 16).

    It is exact for plain gradient descent in infinitely small steps, if the kernel stands still. K
    is applied through its eigenvalues. Those that are negative by rounding count as 0, so that no
    residual grows. Rounding changes every eigenvalue by about eps times the largest one, where eps
    is the precision of K. So what becomes of the slowest directions is not known once tau nears
    N / (eps times the largest eigenvalue). r may also have the outputs' shape (N, ...).

    Example:
        f, params = ntk.of_module(torch.nn.Linear(4, 2))
        K = ntk.ntk_blocks(f, params, (torch.randn(3, 4),))        # (3, 3, 2, 2)
        r = ntk.frozen_residuals(K, torch.randn(3, 2), tau=0.5)    # (3, 2)
    """
    r = r.flatten(1)                                               # (N, D)
    N, D = r.shape
    _require_shape("K", K, (N, N, D, D))
    matrix = K.transpose(1, 2).reshape(N * D, N * D)               # (ND, ND)
    values, vectors = torch.linalg.eigh(matrix)                    # (ND,), (ND, ND)
    decay = torch.exp(-values.clamp(min=0) * tau / N)              # (ND,)
    return (vectors @ (decay * (vectors.T @ r.flatten()))).view(N, D)


def kernel_drift(K, K_start):
    """|K - K(0)|_F / |K(0)|_F, of the blocks or of their traces (Eq. 16)."""
    _require_shape("K", K, K_start.shape)
    return (K - K_start).norm() / K_start.norm()


def sign_agreement(M, residuals):
    """(agreement, by chance): how often <r_i, r_j> and M_ij have the same sign (Eq. 17).

    A kernel need not keep the sign of an inner product. The first number is the share of pairs
    i < j in which it does. The second is what this share would be if the two signs had nothing to
    do with each other, and each occurred as often as it does.
    """
    N = _require_square(M)
    r = residuals.flatten(1)                                       # (N, D)
    _require_shape("residuals", r, (N, r.shape[1]))
    i, j = torch.triu_indices(len(M), len(M), 1, device=M.device)
    of_outputs, of_gradients = (r @ r.T)[i, j].sign(), M[i, j].sign()  # (pairs,), (pairs,)
    agreement = (of_outputs == of_gradients).to(M).mean()
    by_chance = torch.zeros_like(agreement)
    for sign in (-1, 0, 1):
        p, q = (of_outputs == sign).to(M).mean(), (of_gradients == sign).to(M).mean()
        by_chance += p * q
    return agreement, by_chance


def step_noise(M, a):
    """(E|ghat|^2, |E ghat|^2) of a step that draws its samples: ghat = sum_i a_i g_i (Eq. 23).

    a (S, N) has a row for each of S possible steps, all equally likely: the weight of each sample,
    0 if it is not in the step. Both numbers are linear in M, so that a way to draw steps can be
    judged before it is tried. The first over the second is the noise of a step; without noise it
    is 1.
    """
    N = _require_square(M)
    if a.dim() != 2 or a.shape[1] != N:
        raise ValueError(f"a must be (steps, {N}), not {tuple(a.shape)}")
    squared = torch.einsum("si,ij,sj->s", a, M, a)                 # (S,)
    mean = a.mean(0)                                               # (N,)
    return squared.mean(), mean @ M @ mean


# --- The fast route: M, layer by layer ------------------------------------------------------------
# Most layers apply one matrix at several places p: z_p = W a_p. A Linear layer has a place for each
# token, a convolution one for each patch of the image that it sees, an Embedding one for each word
# (its a_p is one-hot). A bias is a column of W whose input is always 1. The gradient of a sample is
# then sum_p b_p a_p^T, and one_linear_layer's identity becomes
#     <g_i, g_j> = sum_pq <a_ip, a_jq> <b_ip, b_jq>.
# (Novak et al. 2022 call this structured derivatives.) It is used where it takes fewer products
# than the gradients themselves. The norms have few weights, so their gradients are always formed.
# M is the sum of its layers' shares. All other parameters go by the clear route, and if that cannot
# run the model, by N backward passes.

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
LAYERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *NORMS)

USE_CLEAR = "use the clear route: interaction_matrix(*of_module(model), inputs, residuals)"


class Seen(NamedTuple):
    """What one layer saw in a forward pass."""

    module: nn.Module
    trained: dict              # its own parameters that require a gradient, by name
    given: torch.Tensor        # its input
    version: int               # how often the input had been overwritten until then
    shape: torch.Size          # of its output
    edge: object               # its output's place in autograd's graph


class Pass(NamedTuple):
    """A batch's forward pass."""

    inputs: object
    v: torch.Tensor            # the output
    r: torch.Tensor            # the residuals, or random vectors in their place (for K)
    layers: dict               # {name: Seen} of the layers that are taken apart


class Share(NamedTuple):
    """What some parameters, mostly those of one layer, add to M."""

    name: str
    params: list
    products: torch.Tensor     # the inner products of their gradients


@torch.no_grad()
def fast_interaction_matrix(model, inputs, residuals, columns=None, check=True):
    """(N, N) M of model(*inputs) for residuals (N, *output shape), without any Jacobian (Eq. 12).

    M is over the parameters that require a gradient. With columns = (inputs, residuals) of a second
    batch of N2 samples it is (N, N2): its rows are evaluated, its columns are trained on (Eq. 22).
    It is checked by one backward pass of each batch, unless check is False. The last sample is also
    answered alone, to see whether the samples depend on each other; a dependence of other samples
    alone is not seen. Raises ValueError where M is found wrong, with the layer and, where that can
    be told, the cause.

    Example, with inputs x, residuals r and a second batch:
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        x, r = torch.randn(3, 4), torch.randn(3, 2)
        M = ntk.fast_interaction_matrix(model, (x,), r)            # (3, 3)
        columns = ((torch.randn(5, 4),), torch.randn(5, 2))
        M = ntk.fast_interaction_matrix(model, (x,), r, columns)   # (3, 5)
    """
    _require_as_many(residuals, inputs)
    rows = _forward(model, inputs, residuals)
    if columns is None:
        return _matrix(model, rows, rows, check)
    _require_pair(columns)
    return _matrix(model, rows, _forward(model, *columns), check)


def _matrix(model, rows, columns, check):
    """(N, N2) M of one pass with itself, or with another: the sum of its shares."""
    shares = _shares(model, rows, columns)
    if check:
        _check_alone(model, rows)
        if columns is not rows:
            _check_alone(model, columns)
        _check_by_backward(shares, rows, columns)
    return sum(share.products for share in shares)


def _shares(model, rows, columns):
    """[Share]: one for each layer that is taken apart, and one for all other parameters."""
    batches = [rows] if columns is rows else [rows, columns]
    layers = {name: seen for name, seen in rows.layers.items() if name in columns.layers}
    cotangents = [_cotangents(batch, list(layers), batch.r) for batch in batches]
    shares = []
    for name, layer in layers.items():
        by_grams = _grams_are_cheaper(layer, len(rows.v), 1)
        factors = []
        for batch, b in zip(batches, cotangents):
            factors.append(_factors(batch.layers[name], b[name][None], by_grams))
        products = _inner_products(factors[0], factors[-1])        # (N, N2)
        shares.append(Share(name, list(layer.trained.values()), products))
    rest = _rest(model, layers)
    if rest:
        G = [_rest_gradients(model, rest, batch, batch.r) for batch in batches]
        shares.append(Share(_listed(rest), list(rest.values()), G[0] @ G[-1].T))
    return shares


def _check_by_backward(shares, rows, columns):
    """Raises ValueError unless s^T M s = |sum_i s_i g_i|^2 for random weights s: Eq. 13 at work.

    The right side takes one ordinary backward pass, which begins with the vectors s_i r_i. (With
    equal weights a layer could pass whose rows are not the samples.) It is done share by share.
    With a second batch it is s^T M s' = <sum_i s_i g_i, sum_j s'_j g'_j>.
    """
    params = [p for share in shares for p in share.params]
    s, g = _weighted_gradient(params, rows, seed=0)
    s_columns, g_columns = s, g
    if columns is not rows:
        s_columns, g_columns = _weighted_gradient(params, columns, seed=1)
    sides = []
    for _, own, M in shares:
        by_share = s @ M @ s_columns
        by_gradient = sum((g[p] * g_columns[p]).sum() for p in own)
        # How large the terms are of which both sides are sums: rounding is measured by it.
        size = s.abs() @ M.abs() @ s_columns.abs() + by_gradient.abs()
        sides.append(torch.stack([by_share, by_gradient, size]))
    _require_equal_sides(shares, torch.stack(sides), columns is rows)


def _weighted_gradient(params, batch, seed):
    """Random weights s (N,), and {parameter: sum_i s_i g_i}."""
    s = _random(torch.rand, (len(batch.v),), batch.v, seed)        # (N,)
    # Signs, so that nothing agrees by chance, and sizes from 1 to 2, so that every sample counts.
    s = 2 * s - 1
    s = s + s.sign()
    vectors = batch.r * s.view(-1, *[1] * (batch.v.dim() - 1))     # (N, ...)
    g = _gradient(batch.v, params, vectors, materialize_grads=True)
    return s, dict(zip(params, g))


def _cotangents(batch, names, vectors):
    """{name: the cotangent of the layer's output}, back from vectors (N, ...) at the output v."""
    if not names:
        return {}
    edges = [batch.layers[name].edge for name in names]
    found = _gradient(batch.v, edges, vectors)
    cotangents = {}
    for name, b in zip(names, found):
        # None says that the layer does not reach the output.
        cotangents[name] = batch.v.new_zeros(batch.layers[name].shape) if b is None else b
    return cotangents


def _factors(layer, cotangents, by_grams):
    """The gradients of one layer for C cotangents of each sample's output, given as (C, N, ...).

    Either as the factors a (N, T, I) and b (N, C, T, O) of the gradients sum_p b_p a_p^T, or
    multiplied out, as None and the gradients (N, C, P).
    """
    module = layer.module
    C, N = cotangents.shape[:2]
    b = _places(module, cotangents.flatten(0, 1))                  # (CN, T, O)
    b = b.unflatten(0, (C, N)).transpose(0, 1)                     # (N, C, T, O)
    if by_grams:
        a = _inputs(layer)                                         # (N, T, I)
        if "bias" in layer.trained:
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
        return a, b
    gradients = []
    if "weight" in layer.trained:
        if isinstance(module, NORMS):
            # A norm multiplies each channel by its weight: a matrix that is diagonal.
            a = _places(module, _normalised(module, layer.given))  # (N, T, O)
            g = torch.einsum("nto,ncto->nco", a, b)
        elif isinstance(module, CONVOLUTIONS) and C == 1:
            g = _convolution_gradients(layer, cotangents[0])
        else:
            # The sums of outer products of all cotangents, as one product of matrices a sample.
            g = b.mT.flatten(1, 2) @ _inputs(layer)                # (N, CO, I)
        gradients.append(g.reshape(N, C, -1))
    if "bias" in layer.trained:
        gradients.append(b.sum(2))
    return None, torch.cat(gradients, -1)


def _inner_products(rows, columns):
    """(N, N2) <g_i, g'_j> from the factors of two batches, with one cotangent a sample (C = 1)."""
    (a, b), (a_columns, b_columns) = rows, columns
    b, b_columns = b[:, 0], b_columns[:, 0]
    # In bands of rows: all pairs of places at once would need too much memory.
    if a is None:
        band = 64
    else:
        pairs_of_one_row = a.shape[1] * a_columns.shape[1] * len(a_columns)
        band = max(1, min(32, 2**24 // pairs_of_one_row))
    symmetric = columns is rows
    M = b.new_zeros(len(b), len(b_columns))                        # (N, N2)
    for i in range(0, len(b), band):
        some = slice(i, i + band)
        first = i if symmetric else 0
        if a is None:
            M[some, first:] = b[some] @ b_columns[first:].T
        else:
            inner = torch.tensordot(a[some], a_columns[first:], ([2], [2]))
            inner *= torch.tensordot(b[some], b_columns[first:], ([2], [2]))
            M[some, first:] = inner.sum((1, 3))
    return M.triu() + M.triu(1).T if symmetric else M


def _grams_are_cheaper(layer, N, C):
    """Whether Gram matrices take fewer multiplications than gradients, for N samples."""
    gradients, grams = _multiplications(layer, N, C)
    return grams < gradients


def _multiplications(layer, N, C):
    """(by gradients, by Grams): what a layer's share of M (C = 1) or of K (C = D) takes a sample.

    Where only gradients are possible, the second number is infinite.
    """
    if isinstance(layer.module, NORMS) or "weight" not in layer.trained:
        P = sum(p.numel() for p in layer.trained.values())
        return N / 2 * C * C * P, math.inf
    O, I = layer.module.weight.flatten(1).shape
    if isinstance(layer.module, nn.Embedding):
        I, O = O, I
    T = layer.shape.numel() // (N * O)
    # Each sample has N / 2 pairs with others, since M and K are symmetric. Gradients take C T outer
    # products of a sample, and C C inner products of a pair. Grams take for each pair the products
    # <a_ip, a_jq>, then the sums over p of b_ip weighted with them, then inner products with b_jq.
    gradients = C * T * I * O + N / 2 * C * C * I * O
    grams = N / 2 * (T * T * I + C * T * T * O + C * C * T * O)
    return gradients, grams


# --- What a layer is at its places p --------------------------------------------------------------

def _places(module, z):
    """(N, T, O) a layer's output, or what has its shape, at the T places of each sample."""
    if isinstance(module, (*CONVOLUTIONS, nn.GroupNorm)):
        # Their channels come first.
        return z.reshape(*z.shape[:2], -1).mT
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        z = z.flatten(-len(module.normalized_shape))
    return z.reshape(len(z), -1, z.shape[-1])


def _inputs(layer):
    """(N, T, I) the inputs a_p of a layer that applies a matrix."""
    module, a = layer.module, layer.given
    if isinstance(module, CONVOLUTIONS):
        a = _patches(module, a)
    elif isinstance(module, nn.Embedding):
        a = F.one_hot(a.long(), module.num_embeddings).to(module.weight.dtype)
        if module.padding_idx is not None:
            # The word that pads gets no gradient.
            a[..., module.padding_idx] = 0
    return a.reshape(len(a), -1, a.shape[-1])


def _patches(convolution, a):
    """(N, T, I) the patches that a convolution sees, one for each place of its output."""
    a = _padded(convolution, a)
    kernel, dilation, stride = convolution.kernel_size, convolution.dilation, convolution.stride
    if isinstance(convolution, nn.Conv1d):
        # A sequence is an image of one row.
        a = a[:, :, None]
        kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
    return F.unfold(a, kernel, dilation, 0, stride).mT


def _padded(convolution, a):
    """The input of a convolution with its margin."""
    margin = convolution._reversed_padding_repeated_twice
    if convolution.padding_mode != "zeros":
        return F.pad(a, margin, convolution.padding_mode)
    if not isinstance(convolution.padding, str):
        # A later change of `padding` counts here, and torch's own margin does not know of it.
        # F.pad wants both ends of each axis, the last axis first.
        margin = torch.tensor(convolution.padding).flip(0).repeat_interleave(2).tolist()
    return F.pad(a, margin)


def _convolution_gradients(layer, b):
    """(N, O, ...) the gradients of a convolution's weight, for one cotangent b of each sample.

    Torch has no such function for single samples. But N samples side by side are one image of N
    groups of channels, and the gradient for that image is all of theirs. It is faster than patches.
    """
    convolution, weight = layer.module, layer.module.weight
    N = len(b)
    image = _padded(convolution, layer.given).flatten(0, 1)[None]
    shape = (N * len(weight), *weight.shape[1:])
    gradient = nn.grad.conv1d_weight if weight.dim() == 3 else nn.grad.conv2d_weight
    return gradient(image, shape, b.flatten(0, 1)[None], convolution.stride, 0,
                    convolution.dilation, N)


def _normalised(norm, a):
    """What a norm makes of its input, before its weight and bias."""
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(a, norm.num_groups, eps=norm.eps)
    if isinstance(norm, nn.LayerNorm):
        return F.layer_norm(a, norm.normalized_shape, eps=norm.eps)
    return F.rms_norm(a, norm.normalized_shape, eps=norm.eps)


# --- The fast route: K ----------------------------------------------------------------------------

@torch.no_grad()
def fast_ntk_blocks(model, inputs, chunk=64, hold=2**28, check=True):
    """(N, N, D, D) K_ij of model(*inputs), layer by layer; errors as for M (Eq. 11).

    `chunk` unit vectors go backward at once, for groups of layers that hold at most `hold` numbers.
    K is checked by M for random vectors, and this M by a backward pass, unless check is False.

    Example, in which the kernel moves while the first layer is scaled:
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        inputs = (torch.randn(3, 4),)
        K_start = ntk.fast_ntk_blocks(model, inputs)               # (3, 3, 2, 2)
        model[0].weight.data *= 1.1
        drift = ntk.kernel_drift(ntk.fast_ntk_blocks(model, inputs), K_start)      # ()
    """
    _positive(chunk)
    batch = _forward(model, inputs)
    N, D = len(batch.v), batch.v[0].numel()
    if check:
        # First of all: it takes little time, and names the layer if there is something wrong.
        M = _matrix(model, batch, batch, check)                    # (N, N)
    K = batch.v.new_zeros(N, D, N, D)                              # (N, D, N, D)
    for names in _groups(batch, hold):
        factors = _unit_factors(batch, names, chunk)
        # Taken out of the dict, so that its memory is free before the next one is used.
        while factors:
            _, (a, b) = factors.popitem()
            _add_share(K, a, b)
    rest = _rest(model, batch.layers)
    if rest:
        _add_share(K, None, _unit_rest(model, rest, batch, chunk))
    _mirror(K.view(N * D, N * D))
    if check:
        _require_same(K, batch.r.view(N, D), M)
    return K.transpose(1, 2)                                       # (N, N, D, D)


def _groups(batch, hold):
    """Lists of layers' names, from the output on, so that the first backward passes are short."""
    N, D = len(batch.v), batch.v[0].numel()
    groups, held = [[]], 0
    for name, layer in reversed(batch.layers.items()):
        size = D * layer.shape.numel()
        if not _grams_are_cheaper(layer, N, D):
            size = N * D * sum(p.numel() for p in layer.trained.values())
        if groups[-1] and held + size > hold:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _unit_factors(batch, names, chunk):
    """{name: the layer's factors} for all D unit vectors at the output, as in _factors (C = D)."""
    N, D = len(batch.v), batch.v[0].numel()
    kept = {}

    def back(vectors):
        return tuple(_cotangents(batch, names, vectors).values())

    for start, unit in zip(range(0, D, chunk), _unit_vectors(batch.v).split(chunk)):
        some = slice(start, start + len(unit))
        found = dict(zip(names, _for_each(back, unit)))
        for name in names:
            layer = batch.layers[name]
            by_grams = _grams_are_cheaper(layer, N, D)
            a, b = _factors(layer, found.pop(name), by_grams)
            if name not in kept:
                kept[name] = (a, b.new_empty(N, D, *b.shape[2:]))
            kept[name][1][:, some] = b
    return kept


def _unit_rest(model, rest, batch, chunk):
    """(N, D, P) the rest's part of each Jacobian."""
    def back(vectors):
        return _rest_gradients(model, rest, batch, vectors)

    rows = [_for_each(back, unit) for unit in _unit_vectors(batch.v).split(chunk)]
    return torch.cat(rows).transpose(0, 1)


def _add_share(K, a, b):
    """Adds a layer's share to K (N, D, N, D), only on and below the diagonal: K is symmetric.

    It goes in place and by blocks of columns, so that little memory is needed beside K.
    """
    if a is None:
        _add_gradients(K, b)
        return
    places = _only_places(b)
    if places is None:
        _add_grams(K, a, b)
    else:
        _add_grams_of_one_place(K, a[:, places], b.sum(2))


def _add_gradients(K, g, block=256):
    """K += g g^T, for the gradients g (N, D, P)."""
    N, D = g.shape[:2]
    g = g.flatten(0, 1)                                            # (ND, P)
    K = K.view(N * D, N * D)                                       # (ND, ND)
    for start in range(0, N * D, block):
        some = slice(start, start + block)
        K[start:, some].addmm_(g[start:], g[some].T)


def _add_grams(K, a, b, block=256):
    """K_ij += sum_pq <a_ip, a_jq> b_ip b_jq^T, for a (N, T, I) and b (N, D, T, O)."""
    N, D = b.shape[:2]
    for i in range(N):
        # <a_jq, a_ip> for all samples j from i on: a row for each (j, q), a column for each p.
        A = (a[i:] @ a[i].T).flatten(0, 1)
        for start in range(0, D, block):
            some = slice(start, start + block)
            # sum_p <a_jq, a_ip> b_ip, for the unit vectors of these columns: (columns, j, q O).
            weighted = (A @ b[i, some]).unflatten(1, (N - i, -1)).flatten(2)
            K[i, start:, i, some].addmm_(b[i, start:].flatten(1), weighted[:, 0].T)
            for j in range(i + 1, N):
                K[j, :, i, some].addmm_(b[j].flatten(1), weighted[:, j - i].T)


def _add_grams_of_one_place(K, a, b, block=256):
    """K += (a a^T) * (b b^T), for a (N, D, I) and b (N, D, O): one_linear_layer of N D outputs."""
    N, D = b.shape[:2]
    a, b = a.flatten(0, 1), b.flatten(0, 1)                        # (ND, I), (ND, O)
    K = K.view(N * D, N * D)                                       # (ND, ND)
    for start in range(0, N * D, block):
        some = slice(start, start + block)
        K[start:, some].addcmul_(a[start:] @ a[some].T, b[start:] @ b[some].T)


def _only_places(b):
    """(D,) the one place where each output's cotangents b (N, D, T, O) are not zero, or None.

    After the last attention of a DiT, for example, each output comes from a single token. Then the
    sum over places has one term. None says that some output has more places, or the layer only one.
    """
    if b.shape[2] == 1:
        return None
    seen = b.any(-1).any(0)                                        # (D, T)
    if (seen.sum(1) > 1).any():
        return None
    return seen.int().argmax(1)


def _mirror(K, block=256):
    """Fills the upper half of a symmetric matrix from its lower half, in place."""
    for start in range(0, len(K), block):
        end = start + block
        own = K[start:end, start:end]
        own.copy_(own.tril() + own.tril(-1).T)
        K[start:end, end:] = K[end:, start:end].T


def _require_same(K, r, M):
    """Raises ValueError unless r_i^T K_ij r_j = M_ij (Eq. 12)."""
    by_kernel = torch.einsum("idje,je->ijd", K, r)
    by_kernel = torch.einsum("ijd,id->ij", by_kernel, r)           # (N, N)
    eps = torch.finfo(M.dtype).eps
    length = M.diagonal().sqrt()                                   # (N,)
    # Half of the digits must agree, measured by the lengths of the gradients.
    allowed = math.sqrt(eps) * length[:, None] * length + eps * M.trace()
    gap = (by_kernel - M).abs()                                    # (N, N)
    if not (gap <= allowed).all():
        raise ValueError("K would be wrong: for random vectors r, r_i^T K_ij r_j differs from M "
                         f"by up to {gap.max():.4g}, where M is up to {M.abs().max():.4g}; use the "
                         "clear route: ntk_blocks(*of_module(model), inputs)")


# --- The fast route: one forward pass, and what its layers saw ------------------------------------

def _forward(model, inputs, vectors=None):
    """The Pass of a batch, with random vectors if none are given."""
    N = _count(inputs)
    _require_separate_samples(model)
    dtype = _one_precision(model)
    plain = _plain_layers(model)
    calls = {}
    handles = []

    def listen(module, args, named, z):
        if not z.requires_grad or z.is_nested:
            return
        name, trained = plain[module]
        if z.dtype != dtype:
            raise ValueError(f"{name} answers in {z.dtype}, and its parameters are {dtype}: "
                             "M needs one precision, without autocast")
        given = [*args, *named.values()][0]
        # This place in the graph stays z's own, even if z is overwritten later.
        seen = Seen(module, trained, given.detach(), given._version, z.shape,
                    get_gradient_edge(z))
        calls.setdefault(name, []).append(seen)

    try:
        for module in plain:
            # First of all hooks, so that it sees what the layer itself gives.
            handle = module.register_forward_hook(listen, prepend=True, with_kwargs=True)
            handles.append(handle)
        v = _run(model, inputs)
    finally:
        # However this ends, the model is left as it was.
        for handle in handles:
            handle.remove()
    _require_output(v, N, dtype)
    if vectors is None:
        vectors = _random(torch.randn, v.shape, v, seed=2)
    layers = {}
    for name, seen in calls.items():
        _require_untouched(name, seen)
        if len(seen) == 1 and _rows_are_samples(seen[0], N):
            layers[name] = seen[0]
    return Pass(inputs, v, _like(vectors.detach(), v), layers)


def _run(model, inputs):
    with torch.enable_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _plain_layers(model):
    """{layer: (its name, its trained parameters)} of LAYERS that do what their type says."""
    owners = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[p] = owners.get(p, 0) + 1
    layers = {}
    for name, module in model.named_modules():
        if type(module) not in LAYERS or "forward" in vars(module):
            continue
        if isinstance(module, CONVOLUTIONS) and module.groups > 1:
            continue
        if isinstance(module, nn.Embedding):
            if module.max_norm is not None or module.scale_grad_by_freq:
                continue
        own = dict(module.named_parameters(recurse=False))
        trained = {which: p for which, p in own.items() if p.requires_grad}
        shared = any(owners[p] > 1 for p in trained.values())
        if trained and not shared and own.keys() <= {"weight", "bias"}:
            layers[module] = (name or "the model", trained)
    return layers


def _rows_are_samples(layer, N):
    """Whether the layer saw one row a sample, as far as shapes can tell."""
    axes = 1
    if isinstance(layer.module, CONVOLUTIONS):
        axes = layer.module.weight.dim() - 1
    if isinstance(layer.module, (nn.LayerNorm, nn.RMSNorm)):
        axes = len(layer.module.normalized_shape)
    batched = len(layer.shape) > axes and layer.given.dim() > 0
    return batched and len(layer.given) == N and layer.shape[0] == N


def _rest(model, layers):
    """{name: parameter} of what belongs to no layer taken apart: positions, or tied weights."""
    covered = set()
    for layer in layers.values():
        covered.update(layer.trained.values())
    return {name: p for name, p in _trained(model).items() if p not in covered}


def _rest_gradients(model, rest, batch, vectors):
    """(N, P) the gradients of the rest: by the clear route, or else by N backward passes."""
    try:
        f, params = of_module(model)
        params = {name: params[name] for name in rest}
        return per_sample_gradients(f, params, batch.inputs, vectors)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # Not every model can be called again, and with one sample: random numbers, a fixed batch.
        pass
    rows = []
    for i in range(len(batch.v)):
        of_one = torch.zeros_like(vectors)
        of_one[i] = vectors[i]
        rows.append(_flat_gradient(batch.v, list(rest.values()), of_one))
    return torch.stack(rows)


def _listed(rest):
    """The first names of the rest."""
    names = list(rest)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_alone(model, batch):
    """Raises ValueError if the last sample alone has another answer than in its batch.

    The gradient need not show that samples depend on each other: think of a mean that is detached.
    """
    N = len(batch.v)
    if N == 1:
        return
    eps = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    # A third of the digits must agree, of the parameters that have the fewest.
    allowed = eps ** (1 / 3) * batch.v.nan_to_num().norm().item() / math.sqrt(N)

    def alone():
        try:
            v = _run(model, _take(batch.inputs, [-1]))
        except Exception:
            # Some layers want two samples.
            v = _run(model, _take(batch.inputs, [-1, -1]))[0]
        return v.detach().flatten()

    def same(v, other, allowed):
        return len(v) == len(other) and torch.allclose(v, other, 0, allowed, equal_nan=True)

    with _other_random_numbers():
        try:
            v = alone()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError("the model fails for one sample alone, so that its samples seem to "
                             f"depend on each other: {_first_line(error)}") from error
        # If it differs, a second answer tells whether it is merely random.
        if not same(v, batch.v[-1].flatten(), allowed) and same(v, alone(), 0):
            raise ValueError("the last sample alone has another answer than in its batch: the "
                             "samples depend on each other, so that none has a gradient of its own "
                             "(or few digits are computed, as with autocast)")


# --- Helpers of both routes -----------------------------------------------------------------------

def _unit_vectors_of(f, params, inputs):
    """(D, N, ...) one vector for each of f's D outputs: 1 there, for every sample."""
    N = _count(inputs)
    # Some modules go another way in no_grad.
    with torch.enable_grad():
        v = _call(f, params, _take(inputs, 0)).detach()
    return _unit_vectors(v.expand(N, *v.shape))


def _unit_vectors(v):
    """(D, N, ...) one vector for each of the D outputs: 1 there, for every sample."""
    D = v[0].numel()
    unit = torch.eye(D, dtype=v.dtype, device=v.device)            # (D, D)
    return unit.view(D, 1, *v.shape[1:]).expand(D, *v.shape)


def _rows_of_jacobians(f, params, inputs, unit):
    """(c, N, P) the rows of every sample's Jacobian that c of the unit vectors stand for."""
    def row_of_each_jacobian(vectors):
        return per_sample_gradients(f, params, inputs, vectors)

    J = _for_each(row_of_each_jacobian, unit)
    # Torch runs some backward passes wrongly with several vectors at once (in 2.14 that of cdist).
    # They are linear, so that a random sum of the rows shows it.
    s = _random(torch.randn, unit.shape[:1], J, seed=3)
    row = row_of_each_jacobian(torch.tensordot(s.to(unit), unit, 1))
    if (torch.tensordot(s, J, 1) - row).norm() <= math.sqrt(torch.finfo(J.dtype).eps) * J.norm():
        return J
    return torch.stack([row_of_each_jacobian(vectors) for vectors in unit])


def _for_each(function, vectors):
    """The function of each of the vectors: of all at once, or in a loop if that is impossible."""
    try:
        return vmap(function)(vectors)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        pass
    found = [function(vector) for vector in vectors]
    if isinstance(found[0], torch.Tensor):
        return torch.stack(found)
    return [torch.stack(several) for several in zip(*found)]


def _one_after_another(f, params, inputs, vectors):
    """per_sample_gradients in a plain loop."""
    weights = {name: p.detach().requires_grad_() for name, p in params.items()}
    rows = []
    with _other_random_numbers() as were_drawn, torch.enable_grad():
        for i, vector in enumerate(vectors):
            v = _with_gradient(_call(f, weights, _take(inputs, i)))
            vector = _like(vector[None], v[None])[0]
            rows.append(_flat_gradient(v, list(weights.values()), vector))
        if were_drawn():
            raise ValueError("f draws random numbers (dropout?), others each time; call eval()")
    return torch.stack(rows)


def _flat_gradient(v, params, vectors):
    """(P,) the gradient of <vectors, v>."""
    g = _gradient(v, params, vectors, materialize_grads=True)
    # That of an Embedding may be sparse.
    return torch.cat([(one.to_dense() if one.is_sparse else one).flatten() for one in g])


def _gradient(v, places, vectors, **options):
    """The gradients of <vectors, v> at some places of the graph, which is kept."""
    try:
        return torch.autograd.grad(v, places, vectors, retain_graph=True, allow_unused=True,
                                   **options)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise ValueError("a checkpoint in the model needs use_reentrant=False") from error
        raise


def _call(f, params, sample):
    """f of one sample, whose inputs are a tuple, or a dict if they are given by name."""
    v = f(params, **sample) if isinstance(sample, dict) else f(params, *sample)
    if not isinstance(v, torch.Tensor):
        raise ValueError(f"f must return a tensor, not a {type(v).__name__}")
    return v


def _one_tensor(v, output):
    """(1, ...) a model's output for one sample as one tensor, whatever it returns: of_module."""
    kind = type(v).__name__
    if output is not None and not isinstance(v, torch.Tensor):
        try:
            v = v[output]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"the model returns a {kind} that has no {output!r}") from None
    several = isinstance(v, (dict, tuple, list))
    values = v.values() if isinstance(v, dict) else v if several else [v]
    tensors = [z for z in values if isinstance(z, torch.Tensor)]
    if not tensors:
        raise ValueError(f"the model returns a {kind}, not a tensor, or a dict or tuple of tensors")
    for z in tensors:
        if z.dim() == 0 or len(z) != 1:
            raise ValueError(f"the model answers one sample with the shape {tuple(z.shape)}; the "
                             "samples must be on its first axis (of a dict or tuple, `output` "
                             "chooses one)")
    return torch.cat([z.flatten(1) for z in tensors], 1) if several else v


def _all_names(model):
    """{name: first name} of every trained parameter: one that is tied has several names."""
    first = {p: name for name, p in _trained(model).items()}
    names = {}
    for prefix, module in model.named_modules():
        for name, p in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            if p in first:
                names[name] = first[p]
    return names


def _parts(inputs, vectors, chunk):
    """The batch in parts of `chunk` samples (None: in one), as a list of (inputs, vectors)."""
    _require_as_many(vectors, inputs)
    N = len(vectors)
    size = N if chunk is None else _positive(chunk)
    parts = []
    for start in range(0, N, size):
        some = slice(start, start + size)
        parts.append((_take(inputs, some), vectors[some]))
    return parts


def _take(inputs, some):
    """Some of the samples: a slice of them, or one, without its axis."""
    if isinstance(inputs, dict):
        return {name: z[some] for name, z in inputs.items()}
    return tuple(z[some] for z in inputs)


def _random(kind, shape, like, seed):
    """Random numbers from a generator of their own, so that no other random numbers change."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return kind(shape, generator=generator, device="cpu", dtype=like.dtype).to(like.device)


@contextlib.contextmanager
def _other_random_numbers():
    """What is drawn in it changes no random numbers afterwards. It gives whether any were drawn."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []

    def state():
        return torch.cat([torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus)])

    def were_drawn():
        return not torch.equal(state(), before)

    before = state()
    with torch.random.fork_rng(gpus):
        yield were_drawn


def _first_line(error):
    return str(error).partition("\n")[0]


# --- What is refused, by name ---------------------------------------------------------------------

def _require_separate_samples(model):
    """Raises ValueError, with the cause, for a module that neither route can take."""
    if not isinstance(model, nn.Module):
        raise ValueError("a torch.nn.Module is needed; a function needs the clear route: "
                         "interaction_matrix(f, params, inputs, residuals)")
    for name, module in model.named_modules():
        name = name or "the model"
        compiled_in_place = getattr(module, "_compiled_call_impl", None) is not None
        if type(module).__name__ == "OptimizedModule" or compiled_in_place:
            raise ValueError(f"{name} is compiled, and its layers cannot be seen; give the module "
                             "as it was before torch.compile")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.training or module.running_mean is None:
                raise ValueError(f"{name} is a BatchNorm in training: it couples the samples, so "
                                 "that none has a gradient of its own; call eval() first")
        if type(module).__name__ == "_SpectralNorm" and module.training:
            raise ValueError(f"{name} is a spectral_norm in training: each call changes the weight;"
                             " call eval() first")
        for own, p in module.named_parameters(recurse=False):
            if p.requires_grad and p._backward_hooks:
                raise ValueError(f"{name}: a hook may change the gradient of its {own}; remove it")
            # Pruning computes `weight` from `weight_orig`, the old weight_norm from `weight_g`.
            computed = own.rpartition("_")[0]
            if p.requires_grad and module._forward_pre_hooks and hasattr(module, computed):
                raise ValueError(f"{name} computes its {computed} from {own} in a hook (pruning, "
                                 "or an old weight_norm or spectral_norm); make it permanent, or "
                                 "use torch.nn.utils.parametrizations")


def _trained(model):
    """{name: parameter} of those that require a gradient. Raises ValueError if there is none."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not params:
        raise ValueError("no parameter of the model requires a gradient: all are frozen")
    for name, p in params.items():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} has no size yet; call the model once before")
        if p.is_complex():
            raise ValueError(f"{name} is {p.dtype}, and parameters must be real")
    return params


def _one_precision(model):
    """The type of all parameters that require a gradient: float32 or float64."""
    names = {p.dtype: name for name, p in _trained(model).items()}
    if len(names) > 1 or not names.keys() <= {torch.float32, torch.float64}:
        listed = ", ".join(f"{name} is {dtype}" for dtype, name in names.items())
        raise ValueError(f"M needs parameters of one precision, float32 or float64, but {listed}")
    return next(iter(names))


def _require_output(v, N, dtype):
    """Raises ValueError unless v is a tensor with one row a sample that has a gradient."""
    if not isinstance(v, torch.Tensor):
        raise ValueError(f"the model returns a {type(v).__name__}, not a tensor; use the clear "
                         "route, and choose one: interaction_matrix(*ntk.of_module(model, "
                         "output=...), inputs, residuals)")
    if v.layout != torch.strided or v.is_nested:
        raise ValueError("the model returns a sparse or nested tensor; M needs a dense one")
    if v.dim() == 0 or len(v) != N:
        raise ValueError(f"the model answers {N} samples with an output of shape {tuple(v.shape)}; "
                         "the samples must be on its first axis")
    if v.dtype != dtype:
        raise ValueError(f"the model answers in {v.dtype}, and its parameters are {dtype}: M needs "
                         "one precision")
    _with_gradient(v)


def _require_untouched(name, seen):
    """Raises ValueError if an input of the layer was overwritten after its call."""
    for one in seen:
        if "weight" in one.trained and one.given._version != one.version:
            raise ValueError(f"{name}: its input is overwritten in place after its call, so that no"
                             " backward pass can find it")


def _require_equal_sides(shares, sides, one_batch):
    """Raises ValueError, with the share, unless both sides of _check_by_backward are equal.

    sides is (shares, 3): what the share says, what the gradient says, and how large their terms
    are.
    """
    left, right = "s^T M s", "|sum_i s_i g_i|^2"
    if not one_batch:
        left, right = "s^T M s'", "<sum_i s_i g_i, sum_j s'_j g'_j>"
    eps = torch.finfo(sides.dtype).eps
    sides = sides.tolist()
    total = sum(size for _, _, size in sides)
    for share, (by_share, by_gradient, size) in zip(shares, sides):
        gap = abs(by_share - by_gradient)
        if not math.isfinite(gap):
            raise ValueError(f"{share.name}: its share of M is not finite; look for inf and nan in "
                             "inputs, residuals, parameters and outputs")
        # Two thirds of the digits must agree, down to what is rounded away in the whole M.
        if gap > eps ** (2 / 3) * size + eps * total:
            raise ValueError(
                f"{share.name}: for random weights s its share of {left} is {by_share:.4g}, but "
                f"{right} is {by_gradient:.4g}, {gap:.2g} away, so M would be wrong. Either its "
                "weight is also used outside its call (tied, or in a norm), or a hook changes what "
                "it gives, or row k of what it sees is not of sample k (the sequence first, samples"
                " in another order), or rounding is large (TF32, autocast; try double()). Otherwise"
                f" {USE_CLEAR}")


def _with_gradient(v):
    """v itself. Raises ValueError if it has no gradient."""
    if not v.requires_grad:
        raise ValueError("the output has no gradient: it is detached, or made in no_grad, or does "
                         "not depend on the parameters")
    return v


def _count(inputs):
    """The number of samples N. Raises ValueError if the inputs do not agree on one."""
    sizes = set()
    if isinstance(inputs, (tuple, dict)):
        for z in inputs.values() if isinstance(inputs, dict) else inputs:
            is_batch = isinstance(z, torch.Tensor) and z.dim() > 0
            sizes.add(len(z) if is_batch else 0)
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError("inputs must be a tuple or a dict of tensors with the same number of "
                         "samples, at least one, on their first axis (a single input x is (x,))")
    return sizes.pop()


def _like(vectors, v):
    """The vectors in the shape of v, which they must have already, or flattened to (N, D)."""
    if tuple(vectors.shape) not in (tuple(v.shape), (len(v), v[0].numel())):
        raise ValueError(f"one vector is needed for each output: {tuple(vectors.shape)} "
                         f"does not fit {tuple(v.shape)}")
    if vectors.is_complex() and not v.is_complex():
        raise ValueError("the vectors are complex, and the outputs are not")
    return vectors.reshape(v.shape).to(v)


def _require_as_many(vectors, inputs):
    N = _count(inputs)
    if not isinstance(vectors, torch.Tensor) or vectors.dim() == 0:
        raise ValueError("residuals and vectors are tensors with the samples on their first axis")
    if len(vectors) != N:
        raise ValueError(f"one vector is needed for each output: {tuple(vectors.shape)} "
                         f"does not fit {(N, *vectors.shape[1:])}")


def _require_pair(columns):
    if not isinstance(columns, (tuple, list)) or len(columns) != 2:
        raise ValueError("columns must be a pair: (inputs, residuals) of the second batch")
    inputs, residuals = columns
    _require_as_many(residuals, inputs)


def _positive(chunk):
    if chunk < 1:
        raise ValueError(f"chunk must be 1 or more, not {chunk}")
    return chunk


def _require_shape(name, tensor, shape):
    if tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {tuple(shape)}, not {tuple(tensor.shape)}")


def _require_square(M):
    """The number of samples N."""
    if M.dim() != 2 or M.shape[0] != M.shape[1]:
        raise ValueError(f"M of one batch is needed, (N, N), not {tuple(M.shape)}")
    return len(M)


# --- The demo -------------------------------------------------------------------------------------

LEVELS = (0.2, 0.5, 0.8)


def measure_network(generator, steps):
    """A small DiT after a few steps of training on the base domain, in float64."""
    import dit
    import flow_matching as fm
    import toy_data

    torch.manual_seed(0)
    model = dit.DiT(len(toy_data.WORDS), pixels=8, patch=2, width=32, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        x0, tokens = measure_views(toy_data.sample_scenes(8, generator))
        e = torch.randn(x0.shape, generator=generator)
        t = torch.rand(len(x0), generator=generator)
        optimizer.zero_grad()
        fm.loss(model, x0, e, t, tokens).mean().backward()
        optimizer.step()
    return model.double()


def measure_views(roots):
    """The three views of each root, one after the other: images and tokens."""
    import toy_data

    count = len(roots.background)
    scenes = roots.take(torch.arange(count).repeat_interleave(3))
    granularity = torch.arange(3).repeat(count)
    return toy_data.views(scenes, granularity, 8)


def measure_batch(generator):
    """(inputs, u) of four roots of a new domain: three views each, at three noise levels each."""
    import flow_matching as fm
    import toy_data

    x0, tokens = measure_views(toy_data.sample_scenes(4, generator, "target"))
    x0 = x0.double()
    e = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    # The noise level changes slowest: first all views at the first level.
    x0, e, tokens = x0.repeat(3, 1, 1, 1), e.repeat(3, 1, 1, 1), tokens.repeat(3, 1)
    t = torch.tensor(LEVELS, dtype=x0.dtype).repeat_interleave(12)  # (36,)
    return (fm.path(x0, e, t), t, tokens), fm.target(x0, e)


def measure_step(model, inputs, u, M):
    """Eq. 15: what M says of steps of several sizes, and what they really change."""
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]

    def loss():
        return (model(*inputs) - u).square().sum() / (2 * len(u))

    start = loss()
    gradient = torch.autograd.grad(start, weights, allow_unused=True, materialize_grads=True)
    etas = torch.logspace(-6, -1.7, 23, dtype=torch.float64)
    measured = []
    for eta in etas:
        with torch.no_grad():
            for p, p_before, g in zip(weights, before, gradient):
                p.copy_(p_before - eta * g)
            measured.append((loss() - start).item())
    with torch.no_grad():
        for p, p_before in zip(weights, before):
            p.copy_(p_before)
    squared = sum(g.square().sum() for g in gradient).item()
    predicted = [predicted_change(M, eta).item() for eta in etas]
    return {"eta": etas.tolist(), "measured": measured, "predicted": predicted,
            "loss": start.item(), "squared": squared}


def measure_frozen(model, inputs, u, moments):
    """Eq. 16: gradient descent on three views of one root, beside the kernel of its start.

    It is measured after so many steps as the moments say, which must rise.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    r0 = (model(*inputs) - u).detach().flatten(1)                  # (3, 192)
    K = fast_ntk_blocks(model, inputs)                             # (3, 3, 192, 192)
    values = torch.linalg.eigvalsh(K.transpose(1, 2).reshape(576, 576))
    # A quarter of the step that would end the steepest direction at once: nearly a flow.
    eta = 0.25 * len(u) / values[-1].item()
    found = []
    for step in range(moments[-1] + 1):
        r = model(*inputs) - u
        if step in moments:
            frozen = frozen_residuals(K, r0, step * eta)
            now = fast_ntk_blocks(model, inputs, check=False)
            found.append({"tau": step * eta,
                          "left": (r.square().sum() / r0.square().sum()).item(),
                          "frozen": (frozen.square().sum() / r0.square().sum()).item(),
                          "drift": kernel_drift(now, K).item()})
        loss = r.square().sum() / (2 * len(u))
        gradient = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for p, g in zip(weights, gradient):
                p -= eta * g
    return found


def main(training=100, moments=(10, 100)):
    try:
        import dit, flow_matching, toy_data                        # noqa: E401, F401
    except ImportError:
        print("The demo needs dit.py, flow_matching.py, toy_data.py beside this file. Its functions"
              " do not.")
        return
    generator = torch.Generator().manual_seed(0)
    model = measure_network(generator, training)
    inputs, u = measure_batch(generator)
    r = (model(*inputs) - u).detach()
    M = fast_interaction_matrix(model, inputs, r)                  # (36, 36)
    step = measure_step(model, inputs, u, M)
    own, cross = loss_velocity(M)
    print(f"Eq. 12, 13: dL/dtau = {own:.1f} (each sample alone) {cross:+.1f} (cross terms);"
          f" -|grad L|^2 = {-step['squared']:.1f}")
    mine, others = sample_velocities(M)
    print(f"Eq. 14: the batch makes {(mine + others > 0).sum()} of {len(M)} samples worse")
    for k in (0, 11, 18):
        print(f"Eq. 15: a step of eta = {step['eta'][k]:.0e} changes L by"
              f" {step['measured'][k]:+.2e}; M says {step['predicted'][k]:+.2e}")
    few = tuple(z[:3] for z in inputs)
    for moment in measure_frozen(model, few, u[:3], moments):
        print(f"Eq. 16: after tau = {moment['tau']:.1e} {moment['left']:.1%} of the loss is left,"
              f" a frozen kernel says {moment['frozen']:.1%}; K has moved by {moment['drift']:.0%}")
    agreement, by_chance = sign_agreement(M, r)
    print(f"Eq. 17: <r_i, r_j> and M_ij have the same sign in {agreement:.1%} of pairs"
          f" (by chance: {by_chance:.1%})")
    print("The pictures: python results/figures.py arrows jacobians influence step matrix")


if __name__ == "__main__":
    main()
