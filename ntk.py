"""The empirical neural tangent kernel and the interaction matrix of a batch, exact, by two routes.

J_i = d f(theta, x_i) / d theta is D x P for a sample with D outputs. The kernel's blocks are K_ij = J_i J_j^T (D x D), and with the
residuals r_i the interaction matrix is M_ij = r_i^T K_ij r_j = <g_i, g_j>, the inner products of the samples' gradients g_i = J_i^T r_i.

The clear route takes any function f(params, *one_input). The fast route takes a module made of Linear, Conv2d, Embedding, GroupNorm
and LayerNorm. It uses that a layer z_t = W a_t has the gradient dW = sum_t b_t a_t^T, where b is the cotangent of z, so that
    <dW_i, dW_j> = sum_ts <a_it, a_js> <b_it, b_js> :
the Gram matrix of the layer's inputs meets that of its cotangents, and nothing of the size of the parameters is formed. (Novak et al.
2022 call it structured derivatives.) Run `python ntk.py` for a picture, `python results/bench_ntk.py` for times
and memory beside other ways to the same numbers.
"""

import itertools
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp, vjp, vmap

# --- The clear route ---------------------------------------------------------------------------------------------

def ntk_vector_product(f, params, inputs, vectors):
    """(N, D) K applied to vectors (N, *output shape), K never formed: back to the parameters, then forward again (Eq. 11).

    inputs is a tuple of tensors with N on their first axis, params a dict of tensors. Raises ValueError for other shapes.
    """
    every = lambda weights: vmap(lambda *one: f(weights, *one).flatten())(*_checked(inputs))
    v, pull_back = vjp(every, params)                              # (N, D)
    g = pull_back(_like(vectors, v))[0]                            # dict      sum_j J_j^T vector_j
    return jvp(every, (params,), (g,))[1]                          # (N, D)    J_i g


def ntk_blocks(f, params, inputs, chunk=16):
    """(N, N, D, D) K_ij = J_i J_j^T: the products of K with the N D unit vectors, `chunk` of them at once (Eq. 11)."""
    v = vmap(lambda *one: f(params, *one).flatten())(*_checked(inputs))    # (N, D)
    unit = torch.eye(v.numel(), dtype=v.dtype, device=v.device).view(-1, *v.shape)                     # (ND, N, D)
    columns = vmap(lambda vector: ntk_vector_product(f, params, inputs, vector), chunk_size=chunk)(unit)
    return columns.view(*v.shape, *v.shape).permute(2, 0, 3, 1)    # (N, N, D, D)  from (j, e, i, d) to (i, j, d, e)


def per_sample_gradients(f, params, inputs, vectors):
    """(N, P) g_i = J_i^T vector_i for vectors (N, *output shape), with the parameters in the order of the dict (Eq. 10)."""
    N = len(_checked(inputs)[0])
    if len(vectors) != N:
        raise ValueError(f"one vector is needed for each output: {tuple(vectors.shape)} does not fit {(N, *vectors.shape[1:])}")

    def one(vector, *sample):
        v, pull_back = vjp(lambda weights: f(weights, *sample), params)
        if vector.numel() != v.numel():
            raise ValueError(f"one vector is needed for each output: {tuple(vectors.shape)} does not fit {(N, *v.shape)}")
        return torch.cat([g.flatten() for g in pull_back(vector.view_as(v))[0].values()])
    return vmap(one)(vectors, *inputs)


def ntk_trace(f, params, inputs, chunk=16):
    """(N, N) tr K_ij: the Gram matrices of the Jacobian's rows, summed over the D outputs; `chunk` N P numbers in memory (Eq. 11)."""
    v = vmap(lambda *one: f(params, *one).flatten())(*_checked(inputs))    # (N, D)
    unit = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)   # (D, D)
    rows = vmap(lambda e: per_sample_gradients(f, params, inputs, e.expand_as(v)))
    return sum(torch.einsum("cip,cjp->ij", G, G) for G in map(rows, unit.split(chunk)))


def interaction_matrix(f, params, inputs, residuals, chunk=None):
    """(N, N) M_ij = <g_i, g_j> for residuals (N, *output shape); N P numbers in memory, or 2 `chunk` P and more time (Eq. 12)."""
    if chunk is None:
        G = per_sample_gradients(f, params, inputs, residuals)     # (N, P)
        return G @ G.T
    parts = [(part[0], part[1:]) for part in zip(*(z.split(chunk) for z in (residuals, *_checked(inputs))))]
    G = lambda part: per_sample_gradients(f, params, part[1], part[0])     # (chunk, P)
    return torch.cat([torch.cat([rows @ G(part).T for part in parts], 1) for rows in map(G, parts)])


def of_module(model):
    """(f, params): the module as a function f(params, *one_input) of one sample, for this route."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def f(weights, *one):
        batch = tuple(z[None] for z in one)
        return functional_call(model, weights, batch)[0]

    return f, params


def _checked(inputs):
    if not isinstance(inputs, tuple) or len({len(z) for z in inputs}) != 1:
        raise ValueError("inputs must be a tuple of tensors with the same number of samples on their first axis")
    return inputs


def _like(vectors, v):
    if len(vectors) != len(v) or vectors.numel() != v.numel():
        raise ValueError(f"one vector is needed for each output: {tuple(vectors.shape)} does not fit {tuple(v.shape)}")
    return vectors.reshape(v.shape)


# --- The fast route ----------------------------------------------------------------------------------------------

LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.GroupNorm)


def fast_interaction_matrix(model, inputs, residuals):
    """(N, N) M for model(*inputs), whose samples must not depend on each other; over the parameters that require a gradient (Eq. 12).

    Raises ValueError naming a layer that it does not cover, a shared parameter, or a layer that is called twice.
    """
    v, calls = _record(model, inputs)
    cotangents = _cotangents(v, calls, _like(residuals, v)[None])
    return _sum_of_shares(calls, [cotangents])[0, :, 0].detach()


def fast_ntk_blocks(model, inputs, chunk=64, hold=2**27):
    """(N, N, D, D) K_ij; errors as above. Layers are taken in groups of at most `hold` cotangent numbers, to bound the memory (Eq. 11)."""
    v, calls = _record(model, inputs)
    D = v[0].numel()
    unit = torch.eye(D, dtype=v.dtype, device=v.device).view(D, 1, *v.shape[1:]).expand(-1, *v.shape)      # (D, N, ...)
    groups, held = [[]], 0
    for call in calls[::-1]:                                       # from the output on: the first backward passes are short
        held += D * call[2].numel()
        if groups[-1] and held > hold:
            groups.append([])
            held = D * call[2].numel()
        groups[-1].append(call)
    K = sum(_sum_of_shares(group, [_cotangents(v, group, part) for part in unit.split(chunk)]) for group in groups)
    return K.permute(1, 3, 0, 2).detach()


def _record(model, inputs):
    """The output and the (layer, input, output) of each layer with a trainable parameter."""
    owner, calls, handles = {}, [], []

    def keep(name):
        def hook(layer, args, z):
            if not args:
                raise ValueError(f"{name} is called with its input by keyword; call it by position, or use the clear route")
            calls.append((name, layer, args[0].detach().clone(), z))
            return z.clone()                                       # what works in place on it leaves ours alone
        return hook
    for name, layer in model.named_modules():
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(f"{name} is a BatchNorm: it couples the samples, so that none has a gradient of its own")
        if own and not _covered(layer):
            raise ValueError(f"{name or 'the model'} ({type(layer).__name__}) has parameters, but the fast route covers only plain "
                             "Linear, Conv2d, Embedding, LayerNorm and GroupNorm; use the clear route")
        for p in own:
            if id(p) in owner:
                raise ValueError(f"{name} shares a parameter with {owner[id(p)]}; use the clear route")
            owner[id(p)] = name
        if own:
            handles.append(layer.register_forward_hook(keep(name)))
    try:
        with torch.enable_grad():
            v = model(*_checked(inputs))
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, *_ in calls]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} is called {names.count(name)} times in one pass; use the clear route")
    aside = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name.rpartition(".")[0] not in names]
    if aside:
        used = torch.autograd.grad(v.sum(), [p for _, p in aside], retain_graph=True, allow_unused=True)
        for (name, _), g in zip(aside, used):
            if g is not None:
                raise ValueError(f"{name} is used, but its layer is never called; use the clear route")
    return v, [call[1:] for call in calls]


def _covered(layer):
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return False
    if isinstance(layer, nn.Embedding) and (layer.padding_idx is not None or layer.max_norm is not None or layer.scale_grad_by_freq):
        return False
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) != 1:
        return False
    return type(layer) in LAYERS


def _cotangents(v, calls, vectors):
    """For each call the cotangents (C, N, ...) of its output, for C vectors (C, N, ...) at the model's output."""
    outputs = [z for _, _, z in calls]
    found = torch.autograd.grad(v, outputs, vectors, retain_graph=True, allow_unused=True, is_grads_batched=True)
    return [torch.zeros(len(vectors), *z.shape, dtype=z.dtype, device=z.device) if b is None else b for b, z in zip(found, outputs)]


def _sum_of_shares(calls, parts):
    """(C, N, C, N) the inner products of all gradients: the sum over the layers. Uses up the parts, chunks of _cotangents."""
    share = 0
    for layer, a, _ in calls:
        share = share + _share(layer, a, torch.cat([part.pop(0) for part in parts]))
    return share


def _share(layer, a, b):
    """(C, N, C, N) one layer's share, for its input a (N, ...) and the cotangents b (C, N, ...) of its output."""
    if isinstance(layer, nn.Conv2d):                               # a linear layer on patches
        a = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT             # (N, T, I)
        b = b.flatten(3).mT                                        # (C, N, T, O)
    elif isinstance(layer, nn.Embedding):                          # a linear layer on one-hot words
        a = F.one_hot(a, layer.num_embeddings).to(b.dtype)         # (N, ..., I)
    elif isinstance(layer, nn.GroupNorm):
        a, b = F.group_norm(a, layer.num_groups, eps=layer.eps).movedim(1, -1), b.movedim(2, -1)       # (N, ..., I), (C, N, ..., I)
    elif isinstance(layer, nn.LayerNorm):
        a = F.layer_norm(a, layer.normalized_shape, eps=layer.eps) # (N, ..., I)
    a = a.reshape(len(a), -1, a.shape[-1])                         # (N, T, I)
    b = b.reshape(*b.shape[:2], -1, b.shape[-1])                   # (C, N, T, O)
    share, bias = 0, getattr(layer, "bias", None)
    if layer.weight.requires_grad:
        norm = isinstance(layer, (nn.GroupNorm, nn.LayerNorm))     # their weight is a diagonal: its gradient is sum_t b_t a_t
        share = share + (_gram((a * b).sum(2)) if norm else _linear_share(a, b))
    if bias is not None and bias.requires_grad:
        share = share + _gram(b.sum(2))
    return share


def _gram(G):
    """(C, N, C, N) inner products of the gradients G (C, N, anything)."""
    rows = G.flatten(2).flatten(0, 1)                              # (CN, P)  P of this layer
    return (rows @ rows.T).view(*G.shape[:2], *G.shape[:2])


def _linear_share(a, b):
    """(C, N, C, N) of dW = sum_t b_t a_t^T, by whichever needs fewer multiplications: dW itself or the two Gram matrices."""
    (N, T, I), (C, _, _, O) = a.shape, b.shape
    if C * N * T * I * O + (C * N) ** 2 * I * O < (N * T) ** 2 * I + C * (N * T) ** 2 * O + (C * N) ** 2 * T * O:
        return _gram(torch.einsum("nti,cnto->cnio", a, b))
    share, b = b.new_empty(N, C, N, C), b.transpose(0, 1).contiguous()     # (N, C, N, C), (N, C, T, O)
    for i in range(N):                                             # K is symmetric: from sample i on is enough
        A = a[i] @ a[i:].mT                                        # (N - i, T, T)      <a_it, a_js>
        met = A[:, None] @ b[i:]                                   # (N - i, C, T, O)   sum_s <a_it, a_js> b_js
        share[i, :, i:] = (b[i].flatten(1) @ met.flatten(2).flatten(0, 1).T).view(C, -1, C)
        share[i:, :, i] = share[i, :, i:].permute(1, 2, 0).clone()
    return share.permute(1, 0, 3, 2)


# --- What the kernel says about training -------------------------------------------------------------------------

def loss_velocity(M):
    """dL/dtau = -|grad L|^2 under gradient flow on L = 1/(2N) sum_i |r_i|^2, as (trace term, cross terms) (Eq. 13)."""
    own = M.diagonal().sum()
    return -own / len(M) ** 2, -(M.sum() - own) / len(M) ** 2


def sample_velocities(M):
    """(N,), (N,): d(|r_i|^2 / 2)/dtau as a sample's own progress and the interference of the others; below 0 is better (Eq. 14)."""
    own = M.diagonal()
    return -own / len(M), -(M.sum(1) - own) / len(M)


def predicted_change(M, eta):
    """The change of L by a step theta - eta grad L, up to O(eta^2) (Eq. 15)."""
    return eta * sum(loss_velocity(M))


def cosines(M):
    """(N, N) the cosines between the samples' gradients."""
    size = M.diagonal().sqrt()
    return M / (size[:, None] * size)


def conflict_share(M, groups=None):
    """(G, G) the share of pairs i != j with M_ij < 0, within and between groups ((N,) labels); one group if None; nan: no pair."""
    labels, of = torch.unique(torch.zeros(len(M)) if groups is None else groups, return_inverse=True)
    member = F.one_hot(of, len(labels)).to(M)                      # (N, G)
    pairs = 1 - torch.eye(len(M), dtype=M.dtype, device=M.device)
    count = lambda chosen: member.T @ (chosen * pairs) @ member    # (G, G)
    return count((M < 0).to(M)) / count(torch.ones_like(M))


def pairs_by_kind(M, labels, names):
    """{what two samples share: {"conflict": share with M_ij < 0, "cosine": mean cosine}}.

    labels is (N, L), a column for each of the L names. A kind of pair is named by all the labels
    that its two samples share, or "nothing". Kinds without a pair are left out.
    """
    i, j = torch.triu_indices(len(M), len(M), 1, device=M.device)
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
    """(N, D) r(tau) = exp(-K tau / N) r(0), for K (N, N, D, D) and r (N, D): gradient flow if the kernel stood still (Eq. 16)."""
    N, D = r.shape
    values, vectors = torch.linalg.eigh(K.permute(0, 2, 1, 3).reshape(N * D, N * D))
    return (vectors @ (torch.exp(-values * tau / N) * (vectors.T @ r.flatten()))).view(N, D)


def kernel_drift(K, K_start):
    """|K - K(0)|_F / |K(0)|_F, of the blocks or of their traces (Eq. 16)."""
    return (K - K_start).norm() / K_start.norm()


def sign_agreement(M, residuals):
    """The share of pairs i < j in which <r_i, r_j> and M_ij have the same sign: a kernel need not keep it (Eq. 17)."""
    r = residuals.flatten(1)
    i, j = torch.triu_indices(len(M), len(M), 1, device=M.device)
    return ((r @ r.T)[i, j].sign() == M[i, j].sign()).to(M).mean()


# --- The demo -------------------------------------------------------------------------------------

def main(file="ntk.png"):
    try:
        import matplotlib.pyplot as plt
        import dit, flow_matching as fm, toy_data as td
    except ImportError:
        return print("The demo needs matplotlib, and dit.py, flow_matching.py, toy_data.py beside this file; its functions do not.")
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = dit.DiT(len(td.WORDS), pixels=8, patch=2, width=32, depth=2)

    def draw(roots, views, dtype=torch.float32):
        """x0, tokens and e for each root at each view."""
        n = len(roots.background)
        scenes, granularity = roots.take(torch.arange(n).repeat_interleave(len(views))), torch.tensor(views).repeat(n)
        tokens = td.tokenize(td.captions(scenes, [td.GRANULARITIES[g] for g in granularity]))
        x0 = td.render(scenes, td.view_boxes(scenes, granularity), 8).to(dtype)
        return x0, tokens, torch.randn(x0.shape, generator=generator, dtype=dtype)

    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(400):                                           # a moment of training, away from the zero start
        x0, tokens, e = draw(td.sample_scenes(8, generator), [0, 1, 2])
        optimizer.zero_grad()
        fm.loss(model, x0, e, torch.rand(len(x0), generator=generator), tokens).mean().backward()
        optimizer.step()
    model.double()

    roots, levels = td.sample_scenes(4, generator, "target"), (0.2, 0.5, 0.8)
    x0, tokens, e = (z.repeat_interleave(3, 0) for z in draw(roots, [0, 1, 2], torch.float64))     # (36, ...) each, of a new domain
    t = torch.tensor(levels, dtype=torch.float64).repeat(12)       # (36,)
    inputs, u = (fm.path(x0, e, t), t, tokens), fm.target(x0, e)
    residuals = lambda: model(*inputs) - u
    r = residuals().detach()                                       # (36, 3, 8, 8)
    M = fast_interaction_matrix(model, inputs, r).detach()         # (36, 36)
    own, cross = loss_velocity(M)
    L = lambda: residuals().square().sum() / 72
    grads = torch.autograd.grad(L(), list(model.parameters()), allow_unused=True)
    norm = sum(g.square().sum() for g in grads if g is not None)
    print(f"Eq. 12, 13: dL/dtau = {own:.1f} (each sample alone) + {cross:.1f} (cross terms); -|grad L|^2 = {-norm:.1f},",
          f"relative gap {abs(own + cross + norm) / norm:.0e}")
    mine, others = sample_velocities(M)
    print(f"Eq. 14: {(others > -mine).sum()} of 36 samples are made worse by their batch")
    print(f"conflicting pairs: {conflict_share(M).item():.1%}; by noise level {levels}:")
    print(conflict_share(M, t).numpy().round(2))
    print(f"Eq. 17: the residuals' product has the sign of the gradients' in {sign_agreement(M, r):.1%} of pairs")

    etas = torch.logspace(-1, -6, 11, dtype=torch.float64)
    start, before, weights = [p.detach().clone() for p in model.parameters()], L().item(), list(model.parameters())

    @torch.no_grad()
    def change(eta):
        for p, p0, g in zip(weights, start, grads):
            p.copy_(p0 if g is None else p0 - eta * g)
        return L().item() - before
    gap = torch.tensor([abs(change(eta) - predicted_change(M, eta)) for eta in etas])
    change(0.0)
    print("Eq. 15: the slope of the error in eta, from eta = 1e-1 down to 1e-6:", (2 * (gap[:-1] / gap[1:]).log10()).numpy().round(2))

    few = tuple(z[:9:3] for z in inputs)                           # three views of one root at t = 0.2
    r0 = (model(*few) - u[:9:3]).detach().flatten(1)               # (3, 192)
    K = fast_ntk_blocks(model, few).detach()                       # (3, 3, 192, 192)
    values = torch.linalg.eigvalsh(K.permute(0, 2, 1, 3).reshape(576, 576)).flip(0)
    eta, taus, truth, frozen, drifts = 0.1 * 3 / values[0], [], [], [], []
    for step in range(301):                                        # gradient descent in small steps, beside the frozen kernel
        loss = (model(*few) - u[:9:3]).square().sum() / 6
        if step % 60 == 0:
            taus.append(step * eta.item())
            truth.append(loss.item() * 6 / r0.square().sum().item())
            frozen.append(frozen_residuals(K, r0, step * eta).square().sum().item() / r0.square().sum().item())
            drifts.append(kernel_drift(fast_ntk_blocks(model, few).detach(), K).item())
        for p, g in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True)):
            p.data -= 0 if g is None else eta * g
    print(f"Eq. 16: after tau = {taus[-1]:.1e} {truth[-1]:.1%} of the loss is left, a frozen kernel says {frozen[-1]:.1%}; the kernel has moved by {drifts[-1]:.0%}")

    figure, ((a, b, c), (d, f, h)) = plt.subplots(2, 3, figsize=(19, 11), layout="constrained")
    for axis, matrix, title in ((a, r.flatten(1) @ r.flatten(1).T, "the residuals: cosines of <r_i, r_j>"),
                                (b, M, "twisted by the kernel: cosines of M_ij (Eq. 12)")):
        shown = axis.imshow(cosines(matrix).numpy(), vmin=-1, vmax=1, cmap="PuOr")
        axis.set(xticks=range(4, 36, 9), yticks=range(4, 36, 9), title=title)
        axis.set_xticklabels([f"root {k + 1}" for k in range(4)])
        axis.set_yticklabels([f"root {k + 1}" for k in range(4)])
        for edge in (8.5, 17.5, 26.5):
            axis.axhline(edge, color="black", linewidth=0.8)
            axis.axvline(edge, color="black", linewidth=0.8)
        axis.set_xlabel("in each root: macro, meso, micro; in each of these: t = 0.2, 0.5, 0.8")
    figure.colorbar(shown, ax=b, label="cosine (negative: in conflict)")
    shares = conflict_share(M, torch.arange(36) % 9).numpy()
    shown = c.imshow(shares, vmin=0, cmap="cividis")
    names = [f"{name}, t = {level}" for name in td.GRANULARITIES for level in levels]
    c.set(xticks=range(9), yticks=range(9), title="share of conflicting pairs, by granularity and t")
    c.set_xticklabels(names, rotation=60)
    c.set_yticklabels(names)
    figure.colorbar(shown, ax=c, label="share of pairs with M_ij < 0")
    d.loglog(etas, gap, "o-", color="#0072b2", label="|measured - predicted| change of L")
    d.loglog(etas, gap / (etas * norm).detach(), "s-", color="#e69f00", label="the same, relative to the prediction")
    d.loglog(etas, gap[4] * (etas / etas[4]) ** 2, ":", color="grey", label="slope 2")
    d.set(xlabel="step size eta", ylabel="error of Eq. 15", title="Eq. 15: M predicts a small step")
    f.semilogy(range(1, 577), values.clamp(min=values[0] * 1e-16).numpy(), color="#0072b2")
    f.set(xlabel="rank", ylabel="eigenvalue", title="spectrum of K (3 samples of 192 outputs)")
    h.plot(taus, truth, "o-", color="#0072b2", label="gradient descent")
    h.plot(taus, frozen, "s--", color="#e69f00", label="frozen kernel (Eq. 16)")
    h.plot(taus, drifts, ":", color="grey", label="drift |K - K(0)| / |K(0)|")
    h.set(xlabel="training time tau", ylabel="loss, relative to its start; drift", title="Eq. 16: a frozen kernel nearly predicts the loss,\nalthough K drifts", ylim=(0, None))
    h.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    for axis in (d, h):
        axis.legend()
    figure.savefig(file, dpi=80)
    print("drawn:", file)


if __name__ == "__main__":
    main(*sys.argv[1:])
