"""Semantic Granularity Alignment (SGA): views of one image at three granularities, grouped in one update, each with its noise levels and weights.

Each intervention is a function of its own. A loss weight a_i turns the interaction M_ij of two samples into a_i a_j M_ij (Eq. 21), so all
that SGA can change is which views meet in one step (tuples), at which noise levels (offsets), with which weights (Min-SNR).
t = 0 is data, t = 1 is noise; a granularity is an index into GRANULARITIES. Run `python sga.py` for a picture.
"""

import contextlib
import itertools
import sys

import torch
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import resized_crop

GRANULARITIES = ("macro", "meso", "micro")
OFFSETS = (0.5, 0.0, -0.5)                                         # mu of each granularity (Eq. 19)
GAMMAS = (4.0, 5.0, 7.0)                                           # gamma of each granularity (Eq. 20)

# --- Views: Algorithm 1 ------------------------------------------------------------------------------------------

def decompose(image, boxes, caption, pixels, largest_iou=0.8, smallest=8, enlargement=4.0):
    """The views [(granularity, (3, pixels, pixels), caption)] of one root image (3, H, W): 1 to 3, the root itself first, as macro.

    boxes is {"meso": (x0, y0, x1, y1), "micro": ...} in pixels of the image, from a detector. A box is dropped if its IoU with a view
    that is kept is above largest_iou, if a side has fewer than `smallest` pixels, or if it would be enlarged by more than `enlargement`.
    Raises ValueError for an unknown granularity or a box that is empty or reaches outside the image.
    """
    if image.dim() != 3:
        raise ValueError(f"an image has the shape (3, H, W), not {tuple(image.shape)}")
    H, W = image.shape[1:]
    for name, (x0, y0, x1, y1) in boxes.items():
        if name not in GRANULARITIES[1:]:
            raise ValueError(f"a box must be of {' or '.join(GRANULARITIES[1:])} (the root is the macro view), not of {name!r}")
        if not (0 <= x0 < x1 <= W and 0 <= y0 < y1 <= H):
            raise ValueError(f"the {name} box {(x0, y0, x1, y1)} is empty or reaches outside the image of {W} x {H} pixels")
    kept = {"macro": torch.tensor([0.0, 0.0, W, H])}
    for name in GRANULARITIES[1:]:
        if name in boxes:
            box = torch.tensor(boxes[name]).float().round()        # whole pixels
            side = (box[2:] - box[:2]).min().item()
            overlap = box_iou(box[None], torch.stack(list(kept.values()))).max().item()
            if side >= smallest and pixels <= enlargement * side and overlap <= largest_iou:
                kept[name] = box
    views = []
    for name, box in kept.items():
        left, top, right, bottom = box.int().tolist()
        view = resized_crop(image, top, left, bottom - top, right - left, [pixels, pixels], antialias=True)
        views.append((GRANULARITIES.index(name), view, f"{name} {caption}"))
    return views


# --- Root tuples: Algorithm 2 ------------------------------------------------------------------------------------

def root_tuples(root, generator, trade=None):
    """Endless tuples, (K_g,) indices of views: all views of one root, the roots in a new order every epoch, no tuple ever broken (Eq. 18).

    root is (V,), the root of each view. The controls: with labels trade (V,), views of the same label change places at random, anew in
    every epoch: the granularities as labels leave each tuple its granularities but not its root, equal labels leave only its size.
    Trades have a generator of their own, so that with and without them the tuples' sizes follow each other in the same order.
    """
    roots, views, trader = torch.unique(root), torch.arange(len(root)), torch.Generator().manual_seed(generator.initial_seed() + 1)
    while True:
        place = views.clone()                                      # (V,) which view stands in each view's place
        for label in [] if trade is None else torch.unique(trade):
            equal = views[trade == label]
            place[equal] = equal[torch.randperm(len(equal), generator=trader)]
        for g in roots[torch.randperm(len(roots), generator=generator)]:
            yield place[root == g]


def tuple_weights(sizes, scaling="root", k_max=3):
    """(n,) float64: the weight of each view in the loss of a step, for G tuples of the given sizes, n views in all (Eq. 18).

    "root": 1 / (G K_g), every root weighs the same (the paper); "view": 1 / (G K_max), every view does (the authors' code).
    In the geometry a weight a_i turns M_ij into a_i a_j M_ij (Eq. 21). Raises ValueError for another scaling or a larger tuple.
    """
    if scaling not in ("root", "view") or max(sizes) > k_max:
        raise ValueError(f'the scaling must be "root" or "view" and a tuple at most {k_max} views, not {scaling!r} and {max(sizes)}')
    each = [1 / (len(sizes) * (k if scaling == "root" else k_max)) for k in sizes]
    return torch.tensor(each, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))


def deferred_backward(losses, sub_batches, quiet=contextlib.nullcontext):
    """Adds the gradient of sum_i a_i l_i over all sub-batches, one backward pass each, and takes no step; returns the sum (Eq. 18).

    losses(*views) is (n,), sub_batches is a list of pairs (views, a) with a (n,): one for each resolution, or as many as memory asks for.
    Clip and step after it, once. quiet() is entered for all but the last: on several GPUs no_sync of DistributedDataParallel, so that
    gradients are exchanged once.
    """
    total = 0.0
    for k, (views, a) in enumerate(sub_batches, 1):
        with contextlib.nullcontext() if k == len(sub_batches) else quiet():
            loss = (a * losses(*views)).sum()
            loss.backward()
        total += loss.detach()
    return total


# --- Scale: noise levels and weights by granularity --------------------------------------------------------------

def offset_time(granularity, generator, offsets=OFFSETS, mean=0.0, std=1.0, shift=1.0):
    """(n,) t = sigmoid(z), z ~ N(mean + offset, std^2), then the resolution shift t' = s t / (1 + (s - 1) t) (Eq. 19).

    granularity is (n,). Macro (+0.5) sees more noise, micro (-0.5) less. The median is that of sigmoid(mean + offset), shifted.
    Raises ValueError for a shift that is not positive.
    """
    if shift <= 0:
        raise ValueError(f"the resolution shift must be positive, not {shift}")
    mu = mean + sum(offset * (granularity == g) for g, offset in enumerate(offsets))       # (n,), no table to copy to a GPU
    t = torch.sigmoid(mu + std * torch.randn(len(mu), generator=generator, device=mu.device))
    return shift * t / (1 + (shift - 1) * t)


def measured_offsets(M, granularity, t):
    """(3,) mu for offset_time from an interaction matrix M (N, N) of samples at a few noise levels, instead of by hand (Eq. 12, 19).

    granularity and t are (N,). Each granularity leans towards the levels at which its mean gradient points where that of the whole batch
    does: mu is the mean of logit t over the levels, weighted with this cosine. A level whose gradient hurts the batch has no weight.
    """
    levels = torch.unique(t)                                       # (L,)
    kind = 3 * torch.searchsorted(levels, t) + granularity         # (N,)      noise level and granularity
    member = torch.nn.functional.one_hot(kind, 3 * len(levels)).to(M)      # (N, 3L)
    mean = member / member.sum(0).clamp(min=1)                     # (N, 3L)   averages over the samples of a kind
    between = mean.T @ M @ mean                                    # (3L, 3L)  inner products of the kinds' mean gradients
    agree = (mean.T @ M.mean(1)) / between.diagonal().clamp(min=1e-30).sqrt()      # (3L,)     cosine, up to a common factor
    weight = agree.clamp(min=0).view(-1, 3)                        # (L, 3)
    return (torch.logit(levels) @ weight) / weight.sum(0).clamp(min=1e-30)


def min_snr_weight(t, granularity, gammas=GAMMAS, form="epsilon"):
    """(n,) min(SNR, gamma)/SNR with SNR = ((1 - t)/t)^2, for t (n,) in (0, 1) (Eq. 20).

    It is 1 for t > 1/(1 + sqrt(gamma)) and falls towards the data. This is the form for a loss on e, which the authors' code uses on a
    velocity loss; form "velocity" is min(SNR, gamma)/(SNR + 1), the same weight carried over to a loss on v (on this path up to the
    factor (1 - t)^2 + t^2).
    """
    if form not in ("epsilon", "velocity"):
        raise ValueError(f'the form must be "epsilon" or "velocity", not {form!r}')
    snr = ((1 - t) / t) ** 2
    gamma = sum(value * (granularity == g) for g, value in enumerate(gammas))      # (n,)
    return torch.minimum(snr, gamma) / (snr if form == "epsilon" else snr + 1)


def main(file="sga.png"):
    try:
        import matplotlib.pyplot as plt
        import ntk, toy_data as td, dit, flow_matching as fm
    except ImportError:
        return print("The demo needs matplotlib, and toy_data.py, flow_matching.py, dit.py, ntk.py beside this file; its functions do not.")
    generator = torch.Generator().manual_seed(0)
    figure, axes = plt.subplots(2, 3, figsize=(19, 11), layout="constrained")
    colours = ("#0072b2", "#e69f00", "#009e73")

    scene = td.sample_scenes(1, generator, "target")
    image = td.render(scene, td.view_boxes(scene, "macro"), 96)[0]
    boxes = {name: tuple((96 * td.view_boxes(scene, name)[0]).clamp(0, 96).tolist()) for name in GRANULARITIES[1:]}
    views = decompose(image, boxes, td.captions(scene, "macro")[0].removeprefix("macro "), 32)
    print(f"Algorithm 1: {len(views)} views of 32 px from one root of 96 px:", "; ".join(caption for *_, caption in views))
    print("with views of 80 px the micro box would be enlarged too much:", [GRANULARITIES[g] for g, *_ in decompose(image, boxes, "", 80)])
    strip = torch.cat([torch.nn.functional.pad(view, (1, 1, 1, 1), value=1.0) for _, view, _ in views], 2)
    axes[0, 0].imshow(((strip.permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy())
    axes[0, 0].set(title="one root: macro, meso, micro\n" + views[0][2], xticks=[], yticks=[])

    t = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
    for g, (name, mu, gamma, colour) in enumerate(zip(GRANULARITIES, OFFSETS, GAMMAS, colours)):
        density = torch.exp(-(torch.logit(t) - mu) ** 2 / 2) / (2 * torch.pi) ** 0.5 / (t * (1 - t))
        drawn = offset_time(torch.full((100000,), g), generator)
        print(f"Eq. 19: {name}: offset {mu:+}, median of t {drawn.median():.3f}, mean {drawn.mean():.3f}")
        axes[0, 1].plot(t, density, color=colour, label=f"{name}: median {drawn.median():.3f}, mean {drawn.mean():.3f}")
        axes[0, 1].axvline(drawn.mean(), color=colour, linestyle=":")
        acts = 1 / (1 + gamma**0.5)
        for form, line in (("epsilon", "-"), ("velocity", "--")):
            label = f"{name}, gamma = {gamma:g}: below t = {acts:.3f}" if form == "epsilon" else None
            axes[0, 2].plot(t, min_snr_weight(t, torch.full((499,), g), form=form), line, color=colour, label=label)
        axes[0, 2].axvline(acts, color=colour, linestyle=":")
    axes[0, 1].set(title="Eq. 19: where each granularity trains", xlabel="t (0 is data, 1 is noise)", ylabel="density of t (dotted: its mean)")
    axes[0, 2].set(title="Eq. 20: Min-SNR weights (dashed: velocity form)", xlabel="t (0 is data, 1 is noise)", ylabel="weight")

    torch.manual_seed(0)
    model = dit.DiT(len(td.WORDS), pixels=8, patch=2, width=32, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    roots = td.sample_scenes(8, generator, "target")
    root, granularity = torch.arange(8).repeat_interleave(3), torch.arange(3).repeat(8)
    scenes = roots.take(root)
    x0, tokens = td.render(scenes, td.view_boxes(scenes, granularity), 8), td.tokenize(td.captions(scenes, [GRANULARITIES[g] for g in granularity]))
    stream = root_tuples(root, generator)
    for _ in range(200):                                           # the method, whole: tuples, offsets, one step for all of a tuple's views
        tuples = list(itertools.islice(stream, 4))
        i = torch.cat(tuples)
        t_i, e = offset_time(granularity[i], generator), torch.randn(x0[i].shape, generator=generator)
        optimizer.zero_grad()
        deferred_backward(lambda *views: fm.loss(model, *views), [((x0[i], tokens[i], t_i, e), tuple_weights([len(k) for k in tuples]))])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    i = next(stream).repeat(8)                                     # one root's three views, eight noises each
    t_i, e = offset_time(granularity[i], generator), torch.randn(x0[i].shape, generator=generator)
    x_t, u = fm.path(x0[i], e, t_i), fm.target(x0[i], e)
    M = ntk.fast_interaction_matrix(model, (x_t, t_i, tokens[i]), model(x_t, t_i, tokens[i]).detach() - u).detach()
    between = torch.stack([torch.stack([M[a::3, b::3].sum() / 64 for b in range(3)]) for a in range(3)])      # <mean g_a, mean g_b>
    cosine = ntk.cosines(between)
    values, vectors = torch.linalg.eigh(between)                   # three gradients span three dimensions: show the two widest
    arrows = vectors[:, [2, 1]] * values[[2, 1]].clamp(min=0).sqrt()       # (3, 2)
    for (x, y), name, colour in zip(arrows.tolist(), GRANULARITIES, colours):
        axes[1, 0].annotate("", (x, y), (0, 0), arrowprops={"color": colour, "width": 2})
        in_plane = (x * x + y * y) ** 0.5 / between.diagonal()[GRANULARITIES.index(name)].sqrt()
        axes[1, 0].plot([], [], color=colour, label=f"{name}: {in_plane:.0%} of its length is in this plane")
    x, y = arrows.mean(0).tolist()
    axes[1, 0].annotate("", (x, y), (0, 0), arrowprops={"color": "black", "width": 3})
    axes[1, 0].plot([], [], color="black", label="their mean: the one step")
    reach = 1.15 * arrows.abs().max().item()
    axes[1, 0].set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title="Eq. 18: one tuple's gradients meet in one step\n(their two widest dimensions)")
    for axis, matrix, title in ((axes[1, 1], cosine, "the same as cosines"), (axes[1, 2], M.sign(), "signs of M, 3 views with 8 noises each\n(purple: agree, brown: conflict)")):
        order = torch.arange(24).view(8, 3).T.flatten() if len(matrix) == 24 else torch.arange(3)
        axis.imshow(matrix[order][:, order].numpy(), vmin=-1, vmax=1, cmap="PuOr")
        axis.set(title=title, xticks=(order.view(3, -1).shape[1] * torch.arange(3) + (len(order) - 3) / 6).tolist(),
                 yticks=(order.view(3, -1).shape[1] * torch.arange(3) + (len(order) - 3) / 6).tolist())
        axis.set_xticklabels(GRANULARITIES)
        axis.set_yticklabels(GRANULARITIES)
    for a, b in itertools.product(range(3), range(3)):
        axes[1, 1].text(b, a, f"{cosine[a, b]:.2f}", ha="center", va="center", color="white" if cosine[a, b].abs() > 0.6 else "black")
    print("Eq. 18, 21: cosines of the three views' mean gradients:", cosine.numpy().round(2).tolist())
    for axis, place in ((axes[0, 1], "lower center"), (axes[0, 2], (0.5, 0.7)), (axes[1, 0], "lower left")):
        axis.legend(loc=place)
    figure.savefig(file, dpi=80)
    print("drawn:", file)


if __name__ == "__main__":
    main(*sys.argv[1:])
