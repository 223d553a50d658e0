"""Semantic Granularity Alignment (SGA): fine-tuning on views of an image at three granularities.

A root is one image of a scene. Its views are the whole scene (macro), its object
(meso) and a close-up of the object's texture (micro). SGA lets the views of one
root meet in one step, and gives each granularity its own noise levels or its own
weights. Here each of these interventions is a function of its own, and
one_sga_step is the whole method.

What can it change? A weight a_i in the loss multiplies the gradient of sample i.
Gradient flow on sum_i a_i |r_i|^2 / 2 lowers it at sum_ij a_i a_j M_ij, where M is
the interaction matrix of ntk.py. It lowers a sample's own |r_i|^2 / 2 at
sum_j a_j M_ij, and the plain mean that an evaluation sees at the mean of these: one
factor a, not two (Eq. 21). The training's loss has |r_i|^2 / D, so that all of its
rates are these times (2/D)^2. On given views SGA acts in three ways: which views
meet in a step (tuples), at which noise levels (offsets), and with which weights.

t = 0 is data, t = 1 is noise. A granularity is an index into GRANULARITIES. There
are V views in all, and n of them in a step. Run `python sga.py` for numbers. The
examples below take their names from `import torch, sga`.
"""

import contextlib
import math
import numbers
from typing import NamedTuple

import torch
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import resized_crop

GRANULARITIES = ("macro", "meso", "micro")
OFFSETS = (0.5, 0.0, -0.5)                              # mu of Eq. 19
GAMMAS = (4.0, 5.0, 7.0)                                # gamma of Eq. 20


def one_sga_step(model, optimizer, loss, x0, tokens, granularity, tuples, generator):
    """One update by root tuples and time offsets: the whole method, in the form for a DiT.

    x0 (V, ...), tokens (V, L) and granularity (V,) describe all views. tuples are
    a few of those of root_tuples. loss(model, x0, e, t, tokens) is (n,), such as
    flow_matching.loss. Returns the weighted loss.

    In the form for a U-Net, offset_time gets the offsets (0, 0, 0), and a is
    multiplied by min_snr_weight(t, granularity[views]).
    README.md has an example of the whole method, with a network and images.
    """
    granularity = _numbers(granularity, "the granularity")  # (V,)
    if not len(x0) == len(tokens) == len(granularity):
        raise ValueError(f"there are {len(x0)} views, {len(tokens)} captions"
                         f" and {len(granularity)} granularities")

    def losses(*batch):
        return loss(model, *batch)

    views = _views_of(tuples, len(x0), "images")        # (n,)
    a = tuple_weights([len(one) for one in tuples]).to(x0.device)  # (n,)
    t = offset_time(granularity[views], generator)      # (n,)
    e = torch.randn(x0[views].shape, generator=generator, device=x0.device)
    batch = (x0[views], e.to(x0.dtype), t, tokens[views])
    optimizer.zero_grad()
    total = deferred_backward(losses, [(batch, a)])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total


# --- Views: Algorithm 1 ---------------------------------------------------------------------------

def decompose(image, boxes, caption, pixels, largest_iou=0.8, smallest=8, enlargement=4.0):
    """The views [(granularity, (3, pixels, pixels), caption)] of one root image (3, H, W).

    boxes is {"meso": (x0, y0, x1, y1), "micro": ...} in pixels of the image, from
    a detector. The root itself comes first, as the macro view. A box is dropped
    if its IoU with a view that is kept is above largest_iou (IoU is the area of
    the overlap over that of the union), if one of its sides has fewer than
    `smallest` pixels, or if it would be enlarged by more than `enlargement`.
    Raises ValueError for an image of another shape, an unknown granularity, a box
    that is empty or reaches outside the image, and a limit that is nan or negative.

    Example:
        image = torch.rand(3, 60, 90)
        boxes = {"meso": (20, 10, 70, 50), "micro": (40, 20, 60, 40)}
        views = sga.decompose(image, boxes, "a cat on a chair", pixels=32)
        for granularity, view, its_caption in views:
            print(granularity, view.shape, its_caption)
    """
    _require_root_image(image, boxes, caption, pixels)
    if not (largest_iou >= 0 and smallest >= 0 and enlargement > 0):
        raise ValueError("the limits of a box must not be negative or nan, not"
                         f" {largest_iou}, {smallest} and {enlargement}")
    H, W = image.shape[1:]
    kept = {"macro": torch.tensor([0.0, 0.0, W, H])}
    for name in GRANULARITIES[1:]:
        if name in boxes:
            box = torch.as_tensor(boxes[name]).float().round()  # (4,)
            side = (box[2:] - box[:2]).min().item()
            others = torch.stack(list(kept.values()))
            overlap = box_iou(box[None], others).max().item()
            large_enough = side >= smallest and pixels <= enlargement * side
            if large_enough and overlap <= largest_iou:
                kept[name] = box
    views = []
    for name, box in kept.items():
        left, top, right, bottom = box.int().tolist()
        size = [pixels, pixels]
        view = resized_crop(image, top, left, bottom - top, right - left, size, antialias=True)
        views.append((GRANULARITIES.index(name), view, f"{name} {caption}"))
    return views


def _require_root_image(image, boxes, caption, pixels):
    """Raises ValueError for an image, boxes, a caption or a size that decompose cannot take."""
    # (H, W, 3), the shape of other libraries, would be an image of H channels.
    is_image = isinstance(image, torch.Tensor) and image.dim() == 3 and image.numel() > 0
    if not is_image or len(image) > 4:
        raise ValueError(f"an image has the shape (3, H, W), not {_shape_of(image)}")
    if not isinstance(pixels, numbers.Integral) or pixels < 1:
        raise ValueError(f"a view has 1 pixel or more a side, a whole number, not {pixels!r}")
    if not isinstance(boxes, dict) or not isinstance(caption, str):
        raise ValueError("boxes must be a dict, and the caption a text")
    H, W = image.shape[1:]
    for name, box in boxes.items():
        _check_box(name, box, H, W)


def _check_box(name, box, H, W):
    if name not in GRANULARITIES[1:]:
        raise ValueError(f"a box must be of {' or '.join(GRANULARITIES[1:])}"
                         f" (the root is the macro view), not of {name!r}")
    corners = _numbers(box, f"the {name} box", "numbers")          # (4,)
    if corners.shape != (4,):
        raise ValueError(f"the {name} box must be (x0, y0, x1, y1), not {box}")
    x0, y0, x1, y1 = corners.tolist()
    if not (0 <= x0 < x1 <= W and 0 <= y0 < y1 <= H):
        raise ValueError(f"the {name} box {tuple(box)} is empty or reaches outside the image"
                         f" of {W} x {H} pixels")


def all_views(sizes, smallest=0.0):
    """root (V,) and granularity (V,) of every view of R roots, on the device of sizes (R,).

    sizes are those of the roots' objects. A root whose object is smaller than
    `smallest` has no micro view, which would be enlarged too much.

    Example:
        root, granularity = sga.all_views(torch.tensor([0.5, 0.1]), smallest=0.2)  # (5,), (5,)
    """
    sizes = _numbers(sizes, "sizes", "numbers")         # (R,)
    if sizes.dim() != 1 or not smallest >= 0:
        raise ValueError(f"sizes must be (R,) and the smallest not negative, not"
                         f" {_shape_of(sizes)} and {smallest}")
    _refuse_on_a_cpu(sizes, sizes.isfinite(), "sizes must be finite")
    roots = torch.arange(len(sizes), device=sizes.device)
    three = torch.arange(3, device=sizes.device)
    root, granularity = torch.cartesian_prod(roots, three).T  # (3R,), (3R,)
    kept = (granularity < 2) | (sizes >= smallest)[root]  # (3R,)
    return root[kept], granularity[kept]


# --- Root tuples: Algorithm 2 ---------------------------------------------------------------------

def root_tuples(root, generator):
    """[(K_g,)] the tuples of one epoch: all views of a root, the roots in random order (Eq. 18).

    root (V,) gives each view the number of its root. No tuple is ever broken: every
    epoch has the same tuples in a new order. root and the generator are on the CPU.
    Raises ValueError if there is no view, and for roots that are no whole numbers.

    Example, in which a DataLoader's batches are the root tuples of one epoch:
        root, generator = torch.tensor([0, 0, 1, 1, 1]), torch.Generator().manual_seed(0)
        views = torch.utils.data.TensorDataset(torch.rand(5, 3, 8, 8), root)
        tuples = sga.root_tuples(root, generator)
        for x0, of_root in torch.utils.data.DataLoader(views, batch_sampler=tuples):
            print(len(x0), "views of root", of_root[0])
    """
    root = _labels(root, "root")                        # (V,)
    roots = torch.unique(root)
    order = torch.randperm(len(roots), generator=generator)
    return [torch.nonzero(root == one)[:, 0] for one in roots[order]]


def traded(tuples, labels, generator):
    """[(K_g,)] the controls: the tuples of an epoch, in which views have traded places.

    Only views of equal label (V,) trade. With granularities as labels a tuple
    keeps its granularities, but not its root. If all labels are equal it keeps
    nothing but its size.

    Example:
        generator = torch.Generator().manual_seed(0)
        tuples = sga.root_tuples([0, 0, 1, 1, 2, 2], generator)
        stratified = sga.traded(tuples, [0, 1, 0, 1, 0, 1], generator)
    """
    labels = _labels(labels, "labels")                  # (V,)
    if not tuples:
        return []
    _views_of(tuples, len(labels), "labels")
    place = torch.arange(len(labels))                   # (V,) who stands where
    for label in torch.unique(labels):
        equal = torch.nonzero(labels == label)[:, 0]
        order = torch.randperm(len(equal), generator=generator)
        place[equal] = equal[order]
    return [place[one] for one in tuples]


def in_conflict(tuples, products):
    """[(K_g,)] an epoch's tuples, in which views trade places so that those in conflict meet.

    products (V, V) are the inner products of the views' gradients, M of Eq. 12.
    Of all pairs of views whose trade lowers the sum of products within tuples,
    the best trades first, until there is none. With equal weights (1/K_max) the
    expected gradient of a step is unchanged, and its E|ghat|^2 is not larger (Eq. 23).
    Raises ValueError for products of another shape or type, or not finite.

    Example, with random gradients g:
        g = torch.randn(6, 20)
        tuples = sga.root_tuples([0, 0, 1, 1, 2, 2], torch.Generator().manual_seed(0))
        quieter = sga.in_conflict(tuples, products=g @ g.T)
    """
    is_float = isinstance(products, torch.Tensor) and products.is_floating_point()
    if not is_float or products.dim() != 2 or products.shape[0] != products.shape[1]:
        raise ValueError("products must be (V, V) for V views, floating-point numbers, not"
                         f" {_shape_of(products)}")
    if not products.isfinite().all():
        raise ValueError("the products of the views' gradients must be finite")
    view = _views_of(tuples, len(products), "products")  # (n,)
    sizes = torch.tensor([len(one) for one in tuples])  # (T,)
    tuple_of = torch.arange(len(sizes)).repeat_interleave(sizes)  # (n,)
    member = torch.nn.functional.one_hot(tuple_of).to(products)  # (n, T)
    products = (products + products.T) / 2              # (V, V)
    # Rounding must not let two views trade for ever.
    least = 1e-6 * products.abs().max()
    while True:
        M = products[view][:, view]                     # (n, n)
        # What a place's view has in common with each tuple, itself left out.
        common = M @ member - M.diagonal()[:, None] * member  # (n, T)
        own = (common * member).sum(1)                  # (n,) with its own tuple
        other = common[:, tuple_of]                     # (n, n) place i with the tuple of j
        # If i and j trade, i meets the tuple of j without j, and j that of i without i.
        change = other + other.T - 2 * M - own[:, None] - own  # (n, n)
        change[tuple_of[:, None] == tuple_of] = 0.0
        best = change.argmin()
        if not change.flatten()[best] < -least:
            return list(view.split(sizes.tolist()))
        two = torch.stack([best // len(view), best % len(view)])  # (2,)
        view[two] = view[two.flip(0)]


def _places_in_conflict(root, products):
    """(V,) the view that takes the place of each view, so that root tuples become in_conflict."""
    V = len(root)
    if _shape_of(products) != (V, V):
        raise ValueError(f"products must be (V, V) for V views, here {V}, not"
                         f" {_shape_of(products)}")
    tuples = root_tuples(root, torch.Generator().manual_seed(0))
    place = torch.arange(V)                             # (V,)
    place[torch.cat(tuples)] = torch.cat(in_conflict(tuples, products))
    return place


def _shape_of(z):
    """What a refusal says of z: its shape, or its type if it is no tensor."""
    return tuple(z.shape) if isinstance(z, torch.Tensor) else f"a {type(z).__name__}"


def _numbers(values, name, kind="whole numbers", device=None):
    """The values as a tensor. Words are refused in a sentence that says so."""
    try:
        return torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be {kind}, and no words or lists") from None


def _views_of(tuples, V, what):
    """(n,) the views of the tuples of a step or an epoch, each from 0 to V - 1."""
    tuples = [_numbers(one, "a tuple") for one in tuples]
    if not tuples or any(one.dim() != 1 or one.dtype != torch.int64 for one in tuples):
        raise ValueError("tuples must be one or more, each with the numbers of its views (K_g,)")
    view = torch.cat(tuples)                            # (n,)
    if len(view) and not (view.min() >= 0 and view.max() < V):
        raise ValueError(f"there are {what} for the views 0 to {V - 1}, but the tuples"
                         f" have views from {view.min()} to {view.max()}")
    return view


def _labels(labels, name):
    labels = _numbers(labels, name)
    if labels.dim() != 1 or len(labels) == 0 or labels.is_floating_point():
        raise ValueError(f"{name} must be whole numbers (V,), one for each view and at least one,"
                         f" not {labels.dtype} of the shape {tuple(labels.shape)}")
    return labels


def _of_views(root, granularity):
    """(V,) each: the root and the granularity of every view."""
    root, granularity = _labels(root, "root"), _labels(granularity, "granularity")
    if len(root) != len(granularity):
        raise ValueError(f"each view has a root and a granularity, but there are {len(root)} roots"
                         f" and {len(granularity)} granularities")
    return root, granularity


def tuple_weights(sizes, scaling="root", k_max=3):
    """(n,) float64: the weight of each view of a step in its loss (Eq. 18).

    sizes are the K_g of the step's G tuples. With "root" the weight is
    1 / (G K_g), so that every root weighs the same (the paper). With "view" it is
    1 / (G K_max), so that every view does (the authors' code). The two differ
    where a root has fewer than K_max views.
    In the geometry M_ij is multiplied by a_i a_j in the weighted loss, by a_j elsewhere (Eq. 21).
    Raises ValueError for another scaling, for no tuple, and unless a tuple has 1
    to k_max views.

    Example:
        a = sga.tuple_weights([3, 2, 3])                # (8,)
    """
    if scaling not in ("root", "view"):
        raise ValueError(f'the scaling must be "root" or "view", not {scaling!r}')
    sizes = _numbers(sizes, "sizes")                    # (G,)
    if sizes.dim() != 1 or len(sizes) == 0 or sizes.is_floating_point():
        raise ValueError(f"sizes must be those of 1 tuple or more, not {sizes.tolist()}")
    if not isinstance(k_max, numbers.Integral) or sizes.min() < 1 or sizes.max() > k_max:
        raise ValueError(f"a tuple has 1 to {k_max} views, not {sizes.tolist()}")
    # In uint8, a product of two sizes may not fit.
    sizes = sizes.long()                                # (G,)
    G = len(sizes)
    shared_by = sizes if scaling == "root" else torch.full_like(sizes, k_max)  # (G,)
    each = 1 / (G * shared_by).double()                 # (G,)
    return each.repeat_interleave(sizes)


def deferred_backward(losses, sub_batches, quiet=contextlib.nullcontext):
    """Adds the gradient of sum_i a_i loss_i over all sub-batches, and returns the sum (Eq. 18).

    It takes no step: clip and step once, after it. sub_batches is a list of pairs
    (batch, a), one for each resolution, or as many as memory asks for.
    losses(*batch) and a are (n,). Each pair has a backward pass of its own.

    quiet() is entered for all of them but the last. On several GPUs it is the
    no_sync of DistributedDataParallel, so that gradients are exchanged once.

    Example, with a regression in place of a network of velocities:
        network, x, y = torch.nn.Linear(4, 1), torch.randn(8, 4), torch.randn(8, 1)
        def losses(x, y):
            return (network(x) - y).square().mean(1)
        a = torch.full((4,), 1 / 8)
        total = sga.deferred_backward(losses, [((x[:4], y[:4]), a), ((x[4:], y[4:]), a)])  # ()
    """
    sub_batches = list(sub_batches)
    if not sub_batches:
        raise ValueError("a step needs one sub-batch or more")
    total = 0.0
    for k, (batch, a) in enumerate(sub_batches, 1):
        last = k == len(sub_batches)
        exchange = contextlib.nullcontext() if last else quiet()
        with exchange:
            each = losses(*batch)                       # (n,)
            fits = isinstance(each, torch.Tensor) and isinstance(a, torch.Tensor)
            if not fits or each.shape != a.shape:
                raise ValueError(f"losses of the shape {_shape_of(each)} do not fit weights"
                                 f" of the shape {_shape_of(a)}")
            loss = (a * each).sum()
            loss.backward()
        total += loss.detach()
    return total


# --- Scale: noise levels and weights by granularity -----------------------------------------------

def offset_time(granularity, generator, offsets=OFFSETS, mean=0.0, std=1.0, shift=1.0):
    """(n,) t = sigmoid(z), z ~ N(mean + mu, std^2), then t' = h t / (1 + (h - 1) t) (Eq. 19).

    granularity (n,) indexes the offsets mu: with those of the paper, macro views
    see more noise and micro views less. Labels of your own have offsets of their
    own in a dict. h is the resolution shift; h > 1 favours noise, as larger images
    need, and h = 1 is off. The median of t is sigmoid(mean + mu), shifted.
    A density of t and a weight of the loss give the same expected gradient if the
    weight is the ratio of two densities. They differ in how much the gradient of a
    step scatters around it.
    Raises ValueError unless the shift is positive and the std not negative, for
    offsets that are not finite, and for a granularity without an offset. On a GPU
    such a granularity has t = nan instead: to look for it, the program would have
    to wait for the GPU in every step.

    Example:
        generator = torch.Generator().manual_seed(0)
        t = sga.offset_time([0, 1, 2, 2], generator)    # (4,)
        t = sga.offset_time([7, 3, 3], generator, offsets={3: 0.5, 7: -0.5})  # (3,)
    """
    if not all(isinstance(value, numbers.Real) for value in (mean, std, shift)):
        raise ValueError("mean, std and shift must be one number each")
    # Float32 has no room for all that is finite.
    if not 1e-30 <= shift <= 1e30:
        raise ValueError("the resolution shift must be positive and finite, from 1e-30 to"
                         f" 1e30, not {shift}")
    if not (0 <= std <= 1e30 and abs(mean) <= 1e30):
        raise ValueError("the law of t needs a finite mean, and a finite std that is not"
                         f" negative, both up to 1e30, not {mean} and {std}")
    granularity = _numbers(granularity, "the granularity")  # (n,)
    if generator.device.type != granularity.device.type:
        raise ValueError(f"the generator is on {generator.device}, the granularity on"
                         f" {granularity.device}; they must be on one device")
    mu = _of_each(granularity, _table(offsets, "offsets"))  # (n,)
    noise = torch.randn(len(mu), generator=generator, device=mu.device)  # (n,)
    t = torch.sigmoid(mean + mu + std * noise)          # (n,)
    shifted = shift * t / (1 + (shift - 1) * t)         # (n,)
    # Where t is 1, the shift's rounding may lead a little beyond it.
    return shifted.clamp(max=1.0)


def min_snr_weight(t, granularity, gammas=GAMMAS, form="epsilon"):
    """(n,) min(SNR, gamma) / SNR with SNR = ((1 - t)/t)^2, for t in [0, 1] (Eq. 20).

    granularity (n,) indexes the gammas, or labels of your own have theirs in a
    dict. t is (n,), or one number. The weight is 1 for t > 1/(1 + sqrt(gamma)),
    and falls to 0 towards the data. This is the form for a loss on e, which the
    authors' code uses on a velocity loss. The form "velocity" is
    min(SNR, gamma) / (SNR + 1): the same weight carried over to a loss on v (on
    this path up to the factor (1 - t)^2 + t^2). It is below 1 at every t.
    Raises ValueError for another form, for a gamma that is not finite and
    positive, for t outside [0, 1] or nan, and for a granularity without a gamma.
    On a GPU the weight is nan in the last two cases: to look for them, the program
    would have to wait for the GPU in every step.

    Example:
        a = sga.min_snr_weight(torch.rand(4), [0, 1, 2, 2])  # (4,)
        a = sga.min_snr_weight(0.2, [7, 3, 3], gammas={3: 4.0, 7: 6.0})  # (3,)
    """
    if form not in ("epsilon", "velocity"):
        raise ValueError(f'the form must be "epsilon" or "velocity", not {form!r}')
    granularity = _numbers(granularity, "the granularity")  # (n,)
    t = _numbers(t, "t", "numbers", granularity.device)
    # The SNR of a small t is too large for half precision.
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    t = t.expand(granularity.shape) if t.dim() == 0 else t
    if t.shape != granularity.shape:
        raise ValueError(f"t must be one number or have the shape of the granularity,"
                         f" {tuple(granularity.shape)}, not {tuple(t.shape)}")
    gamma = _of_each(granularity, _table(gammas, "gammas", above=0.0))  # (n,)
    inside = (t >= 0) & (t <= 1)                        # (n,)
    _refuse_on_a_cpu(t, inside, "the Min-SNR weight needs 0 <= t <= 1")
    snr = ((1 - t) / t) ** 2                            # (n,)
    snr = torch.where(inside, snr, torch.nan)
    if form == "velocity":
        return torch.minimum(snr, gamma) / (snr + 1)
    # Not min(SNR, gamma) / SNR, which is 0/0 at t = 1. A nan stays one, as it is
    # below no gamma.
    return torch.where(snr <= gamma, 1.0, gamma / snr)


def _table(values, name, above=-math.inf):
    """{label: value} from a sequence or a dict, whose values are finite and above a bound."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    try:
        table = dict(values if isinstance(values, dict) else enumerate(values))
        inside = [above < value < math.inf for value in table.values()]
    except (TypeError, ValueError, RuntimeError):      # no numbers, or several for one label
        inside = []
    if not inside or not all(inside):
        bound = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"the {name} must be finite numbers{bound}, one or more, not {values}")
    words = [label for label in table if not isinstance(label, numbers.Integral)]
    if words:
        raise ValueError(f"the labels must be whole numbers, not {words[0]!r}")
    return table


def _of_each(granularity, value_of):
    """(n,) the value of each granularity; nan where there is none, which a CPU refuses."""
    if granularity.dim() != 1:
        raise ValueError(f"the granularity must be (n,), not {tuple(granularity.shape)}")
    allowed = ", ".join(map(str, value_of))
    if list(value_of) == list(range(len(value_of))):
        allowed = f"0..{len(value_of) - 1}"
    each = torch.full(granularity.shape, torch.nan, device=granularity.device)
    known = torch.zeros_like(each, dtype=torch.bool)    # (n,)
    # No table of the values is indexed, since a GPU would wait for it to be
    # copied, every time.
    for label, value in value_of.items():
        this = granularity == label                     # (n,)
        each = torch.where(this, value, each)           # (n,)
        known = known | this                            # (n,)
    _refuse_on_a_cpu(granularity, known, f"a granularity must be one of {allowed}")
    return each


def _refuse_on_a_cpu(values, allowed, rule):
    """Raises ValueError for a value that is not allowed; a GPU would have to be waited for."""
    if values.device.type == "cpu" and not allowed.all():
        raise ValueError(f"{rule}, not {values[~allowed][0].item()}")


def measured_offsets(M, granularity, t):
    """(3,) mu for offset_time, measured and not set by hand (Eq. 12, 19).

    M (N, N) is the interaction matrix of samples at a few noise levels;
    granularity and t are (N,), with 0 < t < 1. Each granularity leans towards the
    levels at which its mean gradient points where that of the whole batch does.
    mu is the mean of logit t over the levels, weighted with the cosine of the
    two. A level whose gradient hurts the batch has no weight. A granularity that
    helps at no level has mu = 0.

    Example, with random gradients g:
        g = torch.randn(6, 20)
        t = torch.tensor([0.2, 0.8]).repeat(3)          # (6,)
        granularity = torch.tensor([0, 0, 1, 1, 2, 2])
        mu = sga.measured_offsets(g @ g.T, granularity, t)  # (3,)
    """
    M, t = _numbers(M, "M", "numbers"), _numbers(t, "t", "numbers")  # (N, N), (N,)
    granularity = _numbers(granularity, "the granularity")  # (N,)
    N = len(M) if M.dim() else 0
    if M.shape != (N, N) or t.shape != (N,) or granularity.shape != (N,) or N == 0:
        raise ValueError(f"M must be (N, N), granularity and t (N,), not {tuple(M.shape)},"
                         f" {tuple(granularity.shape)} and {tuple(t.shape)}")
    t_allowed = (t > 0) & (t < 1)
    granularity_allowed = (granularity == 0) | (granularity == 1) | (granularity == 2)
    if not (t_allowed.all() and granularity_allowed.all()):
        raise ValueError("measured offsets need 0 < t < 1, and granularities from 0 to 2")
    precision = torch.promote_types(M.dtype, t.dtype)
    M, t, granularity = M.to(precision), t.to(precision), granularity.long()
    # In place of 0, where something is divided by a length.
    least = torch.finfo(precision).tiny
    levels = torch.unique(t)                            # (L,)
    # Samples of one level and granularity are of one kind; `mean` averages over
    # each kind.
    kind = 3 * torch.searchsorted(levels, t) + granularity  # (N,)
    member = torch.nn.functional.one_hot(kind, 3 * len(levels)).to(M)  # (N, 3L)
    mean = member / member.sum(0).clamp(min=1)          # (N, 3L)
    # The inner products of the kinds' mean gradients with each other and with the
    # batch's.
    between = mean.T @ M @ mean                         # (3L, 3L)
    with_batch = mean.T @ M.mean(1)                     # (3L,)
    length = between.diagonal().clamp(min=least).sqrt()  # (3L,)
    cosine = with_batch / length                        # (3L,) up to a common factor
    weight = cosine.clamp(min=0).view(-1, 3)            # (L, 3)
    mu = (torch.logit(levels) @ weight) / weight.sum(0).clamp(min=least)
    if not mu.isfinite().all():
        raise ValueError("M must be finite, and its sums must not be too large for its type")
    return mu


# --- The arms of the study: what each way to fine-tune changes of the baseline --------------------

MEETINGS = ("root", "granularity", "conflict", "any")


class Arm(NamedTuple):
    """One way to fine-tune. As it stands, the baseline: all views shuffled, all treated alike."""

    # Who meets in a tuple: the views of one "root", one view of each
    # "granularity" of any roots, views in "conflict", or "any" views.
    meet: str = "any"
    # The weights in a step of n views: 1/n ("step"), or "root" or "view" of
    # tuple_weights.
    weigh: str = "step"
    # The offsets of the noise levels by granularity (Eq. 19). `mixed` gives them
    # to random views of the step instead.
    offsets: tuple = (0.0, 0.0, 0.0)
    mixed: bool = False
    # Weights by noise level and granularity, in this form of Eq. 20.
    min_snr: str = ""
    # Offsets from measured_offsets, anew at every row of the log.
    measured: bool = False
    # Whole scenes in place of all views.
    whole: bool = False
    # So many steps become one.
    join: int = 1


ARMS = {
    "baseline": Arm(),
    "whole": Arm(whole=True),
    "big": Arm(join=3),
    # Tuples. "random" has the baseline's views, and differs from it in their
    # weights alone.
    "random": Arm(weigh="root"),
    "stratified": Arm(meet="granularity", weigh="root"),
    "tuple": Arm(meet="root", weigh="root"),
    "tuple_max": Arm(meet="root", weigh="view"),
    # Scale. "flipped" has the opposite signs. "global" has the same noise levels
    # in all, whatever the granularity.
    "offsets": Arm(offsets=OFFSETS),
    "flipped": Arm(offsets=(-0.5, 0.0, 0.5)),
    "global": Arm(offsets=OFFSETS, mixed=True),
    "min_snr": Arm(min_snr="epsilon"),
    "min_snr_velocity": Arm(min_snr="velocity"),
    # Beyond the paper. In "quiet" views in conflict meet. "measured" reads its
    # offsets from the interaction matrix, and "lean" is its control: about the
    # same mean offset, alike for every granularity.
    "quiet": Arm(meet="conflict", weigh="view"),
    "measured": Arm(measured=True),
    "lean": Arm(offsets=(-0.25, -0.25, -0.25)),
    # The method: root tuples, and the scale that suits the network, which
    # `method` adds.
    "sga": Arm(meet="root", weigh="root"),
}


def method(name, model):
    """The Arm of a name. "sga" has offsets for a "dit", and Min-SNR weights for a "unet"."""
    if name not in ARMS:
        raise ValueError(f"there is no arm {name!r}; the arms are {', '.join(ARMS)}")
    if model not in ("dit", "unet"):
        raise ValueError(f'the model must be "dit" or "unet", not {model!r}')
    arm = ARMS[name]
    if name == "sga" and model == "dit":
        return arm._replace(offsets=OFFSETS)
    if name == "sga":
        return arm._replace(min_snr="epsilon")
    return arm


def plan(root, granularity, arm, tuples_per_step, steps, seed, products=None):
    """[(views (n,), weights (n,))]: what each step sees, on the CPU.

    root and granularity (V,) describe all views. A step has `tuples_per_step`
    tuples. Every arm has the same number of images: views only trade places, and
    `join` makes one large step of several. An arm whose tuples are chosen by
    conflict is planned twice: like the baseline, until the products (V, V) of
    in_conflict are known.

    Example, with two roots of three views each:
        root, granularity = sga.all_views(torch.ones(2))
        arm = sga.method("tuple", "dit")
        for views, weights in sga.plan(root, granularity, arm, 1, steps=4, seed=0):
            print("a step sees the views", views, "with the weights", weights)
    """
    root, granularity = _of_views(root, granularity)    # (V,) each
    _require_plan(arm, tuples_per_step, steps)
    # The controls trade with a generator of their own. So the sizes of their
    # tuples follow each other in the same order as with root tuples.
    generator = torch.Generator().manual_seed(seed)
    trader = torch.Generator().manual_seed(seed + 1)
    labels = granularity if arm.meet == "granularity" else torch.zeros_like(root)
    by_conflict = arm.meet == "conflict" and products is not None
    if by_conflict:
        place = _places_in_conflict(root, products)     # (V,)
    planned = []
    # The tuples of the epoch that no step has seen yet.
    waiting = []
    while len(planned) < steps:
        while len(waiting) < tuples_per_step:
            epoch = root_tuples(root, generator)
            if by_conflict:
                epoch = [place[one] for one in epoch]
            elif arm.meet != "root":
                epoch = traded(epoch, labels, trader)
            waiting += epoch
        met, waiting = waiting[:tuples_per_step], waiting[tuples_per_step:]
        views, a = torch.cat(met), _weights(met, arm.weigh)  # (n,), (n,)
        if arm.whole:
            views = whole_scenes(views, root, granularity)  # (n,)
        planned.append((views, a))
    return [_join(planned[k:k + arm.join]) for k in range(0, steps, arm.join)]


def _require_plan(arm, tuples_per_step, steps):
    """Raises ValueError for an arm or a number of tuples or steps that plan cannot take."""
    if not isinstance(tuples_per_step, numbers.Integral) or tuples_per_step < 1:
        raise ValueError(f"a step has 1 tuple or more, a whole number, not {tuples_per_step!r}")
    if not isinstance(steps, numbers.Integral) or steps < 0:
        raise ValueError(f"steps must be a whole number from 0 on, not {steps!r}")
    meets = isinstance(arm, Arm) and arm.meet in MEETINGS
    if not meets or not isinstance(arm.join, int) or arm.join < 1:
        raise ValueError(f"the arm must be an Arm, its meet one of {', '.join(MEETINGS)},"
                         f" and its join a whole number from 1 on, not {arm!r}")


def _weights(tuples, weigh):
    """(n,) the weights of a step's views: 1/n, or those of tuple_weights."""
    sizes = [len(one) for one in tuples]
    n = sum(sizes)
    if weigh == "step":
        return torch.ones(n) / n
    return tuple_weights(sizes, weigh)


def whole_scenes(views, root, granularity):
    """(n,) for each of the views (n,) the macro view of its root.

    Example:
        root, granularity = sga.all_views(torch.ones(2))
        macro = sga.whole_scenes(torch.tensor([1, 5]), root, granularity)  # (2,)
    """
    root, granularity = _of_views(root, granularity)    # (V,) each
    views = _views_of([views], len(root), "roots")      # (n,)
    macro = torch.nonzero(granularity == 0)[:, 0]       # (R,)
    same_root = root[views][:, None] == root[macro]     # (n, R)
    if not (same_root.sum(1) == 1).all():
        raise ValueError("each root must have one macro view")
    return macro[same_root.int().argmax(1)]


def _join(steps):
    """One step from a few: all their views, each with its share of the weight."""
    views = torch.cat([views for views, _ in steps])    # (n,)
    a = torch.cat([a for _, a in steps]) / len(steps)   # (n,)
    return views, a


# --- The demo -------------------------------------------------------------------------------------

def measure_views(generator):
    """The views of one root of 96 px, by Algorithm 1. A caption names what its view shows."""
    import toy_data

    scene = toy_data.sample_scenes(1, generator, "target")
    image = toy_data.render(scene, toy_data.view_boxes(scene, "macro"), 96)[0]  # (3, 96, 96)
    boxes = {}
    for name in GRANULARITIES[1:]:
        box = 96 * toy_data.view_boxes(scene, name)[0]  # (4,)
        boxes[name] = tuple(box.clamp(0, 96).tolist())
    found = {}
    for pixels in (32, 80):
        views = []
        for index, view, _ in decompose(image, boxes, "", pixels):
            caption = toy_data.captions(scene, GRANULARITIES[index])[0]
            views.append((index, view, caption))
        found[f"views of {pixels} px"] = views
    return found


def measure_time_laws(generator, n=100_000):
    """The median and the mean of t, by granularity, of n random noise levels each."""
    laws = []
    for index in range(3):
        t = offset_time(torch.full((n,), index), generator)  # (n,)
        laws.append({"median": t.median().item(), "mean": t.mean().item()})
    return laws


def measure_meeting(generator, steps=60):
    """(3, 3) cosines of the mean gradients of one root's three views, after some steps of SGA.

    The mean is over 16 noises for each view, at the noise levels of its
    granularity.
    """
    import dit
    import flow_matching
    import ntk
    import toy_data

    torch.manual_seed(0)
    model = dit.DiT(len(toy_data.WORDS), pixels=8, patch=2, width=32, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    scenes = toy_data.sample_scenes(8, generator, "target")
    root = torch.arange(8).repeat_interleave(3)         # (24,)
    granularity = torch.arange(3).repeat(8)             # (24,)
    x0, tokens = toy_data.views(scenes.take(root), granularity, 8)
    waiting = []
    for _ in range(steps):
        waiting = waiting or root_tuples(root, generator)
        met, waiting = waiting[:4], waiting[4:]
        one_sga_step(model, optimizer, flow_matching.loss, x0, tokens, granularity, met, generator)

    views = torch.arange(3).repeat_interleave(16)       # (48,) views of the root 0
    t = offset_time(granularity[views], generator)      # (48,)
    e = torch.randn(x0[views].shape, generator=generator)
    batch = (x0[views], e, t, tokens[views])
    r = flow_matching.residual(model, *batch).detach()
    inputs = (flow_matching.path(x0[views], e, t), t, tokens[views])
    M = ntk.fast_interaction_matrix(model, inputs, r).detach()  # (48, 48)
    # The inner product of two mean gradients is the mean of their block of M.
    blocks = M.view(3, 16, 3, 16).mean((1, 3))          # (3, 3)
    return ntk.cosines(blocks)


def main():
    try:
        import dit, flow_matching, ntk, toy_data        # noqa: E401, F401
    except ImportError:
        print("The demo needs dit.py, flow_matching.py, ntk.py, toy_data.py beside this file; its"
              " functions do not.")
        return
    generator = torch.Generator().manual_seed(0)
    root, laws = measure_views(generator), measure_time_laws(generator)
    captions = [caption for _, _, caption in root["views of 32 px"]]
    print(f"Algorithm 1: {len(captions)} views of 32 px from one root of 96 px:")
    print("   ", "; ".join(captions))
    kept = [GRANULARITIES[granularity] for granularity, _, _ in root["views of 80 px"]]
    print("with views of 80 px the micro box would be enlarged too much, which leaves", *kept)
    cosines = measure_meeting(generator)
    print("Eq. 18: cosines of the mean gradients of one root's views")
    for name, row in zip(GRANULARITIES, cosines.tolist()):
        print(f"    {name:5}", *(f"{cosine:6.2f}" for cosine in row))
    for name, mu, law in zip(GRANULARITIES, OFFSETS, laws):
        median, mean = law["median"], law["mean"]
        print(f"Eq. 19: {name}: offset {mu:+}, median of t {median:.3f}, mean {mean:.3f}")
    for name, gamma in zip(GRANULARITIES, GAMMAS):
        edge = 1 / (1 + gamma**0.5)
        print(f"Eq. 20: {name}: gamma {gamma:g}, the weight is below 1 for t < {edge:.3f}")
    print("The pictures: python results/figures.py views time_laws weights")


if __name__ == "__main__":
    main()
