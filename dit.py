"""A compact Diffusion Transformer: patches attend to each other and to the words.

`DiT(...)(x, t, tokens) -> velocity`, the signature of unet.py too. After Peebles and Xie 2023: time
and text modulate every block (adaLN-zero); attention to the words is added. Nothing couples two
samples, and it works under torch.func (vmap, jacrev, jvp): attention is written out, since fused
kernels lack those rules. Run `python dit.py` for its sizes and shapes.
"""

import math
import numbers

import torch
import torch.nn.functional as F
from torch import nn

# --- The same in dit.py and unet.py, so that each can be copied out alone: checks, words, time ----

def with_defaults(x, t, tokens, size, kind):
    """t (N,) and tokens (N, L) for x (N, *size); ValueError for what does not fit to x.

    kind is the type of the weights. t may be one number for all samples. tokens=None is the null
    caption of one word, for a network that has no condition: an empty caption (N, 0) would leave
    attention nothing to attend to.
    No value is read, since that would make a GPU wait for its host.
    """
    if not isinstance(x, torch.Tensor) or x.shape[1:] != size or len(x) == 0:
        allowed = ", ".join(map(str, size))
        raise ValueError(f"x must be (N, {allowed}) for this network, with N from 1 on, not "
                         f"{_shape_of(x)}")
    if x.dtype != kind or kind not in (torch.float32, torch.float64):
        raise ValueError("x and the weights must both be float32 or both float64 (torch.autocast "
                         f"computes in bfloat16), not {x.dtype} and {kind}")
    try:
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    except (TypeError, ValueError):
        raise ValueError(f"t must be one number or ({len(x)},), not {t!r}") from None
    if t.dim() == 0:
        t = t.expand(len(x))
    if t.shape != (len(x),):
        raise ValueError(f"t must be one number or ({len(x)},), like x, not {tuple(t.shape)}")
    if tokens is None:
        tokens = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
    is_table = isinstance(tokens, torch.Tensor) and tokens.dim() == 2
    if not is_table or len(tokens) != len(x) or tokens.shape[1] == 0:
        raise ValueError(f"tokens must be ({len(x)}, L), like x, and class labels ({len(x)}, 1), "
                         f"not {_shape_of(tokens)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens must be whole numbers (int64 or int32), not {tokens.dtype}")
    return t, tokens


def _shape_of(z):
    """What a refusal says of z: its shape, or its type if it is no tensor."""
    return tuple(z.shape) if isinstance(z, torch.Tensor) else f"a {type(z).__name__}"


def _require_one_each(condition, x):
    """One condition for all samples would be spread over them without a word."""
    if condition.dim() != 2 or len(condition) != len(x):
        raise ValueError(f"the condition must have a row for each of the {len(x)} samples, not "
                         f"{tuple(condition.shape)}")


def sinusoid(position, width):
    """(..., width) sines and cosines of (...) positions, at wavelengths of 2 pi to < 20,000 pi."""
    if width % 2 or width < 2:
        raise ValueError(f"width must be even, for pairs of a sine and a cosine, not {width}")
    steps = torch.arange(width // 2, device=position.device)      # (width/2,)
    frequency = torch.exp(-math.log(10_000) * steps / (width // 2))         # (width/2,)
    angle = position[..., None] * frequency             # (..., width/2)
    return torch.cat([angle.sin(), angle.cos()], -1)    # (..., width)


def attend(q, k, v, heads):
    """(N, Q, C) softmax(q k^T / sqrt(C / heads)) v in each head, for q (N, Q, C), k, v (N, K, C).

    Raises ValueError for other shapes, and if heads does not divide C.
    """
    fits = q.dim() == k.dim() == 3 and k.shape == v.shape
    fits = fits and q.shape[::2] == k.shape[::2]        # N and C
    if not fits or heads < 1 or q.shape[2] % heads:
        raise ValueError(f"attention with {heads} heads needs q (N, Q, C), k and v (N, K, C), not "
                         f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")

    # Every head has its own C/heads channels, and works like one more axis of the batch.
    def in_heads(z):
        return z.unflatten(-1, (heads, -1)).transpose(1, 2)

    q, k, v = in_heads(q), in_heads(k), in_heads(v)     # (N, heads, Q or K, C/heads) each
    # C/heads random products, each of size 1 and of either sign, add up to about sqrt(C/heads).
    # Divided by that, the softmax is mild.
    scores = q @ k.mT / math.sqrt(q.shape[-1])          # (N, heads, Q, K)
    mixed = scores.softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2)             # (N, Q, C)


class TextBlock(nn.Module):
    """(N, L, C) words to the same: a pre-norm transformer block."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width)
        self.norm_2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, words):
        q, k, v = self.qkv(self.norm_1(words)).chunk(3, -1)       # (N, L, C) each
        words = words + self.out(attend(q, k, v, self.heads))     # (N, L, C)
        return words + self.mlp(self.norm_2(words))     # (N, L, C)


class TextEncoder(nn.Module):
    """Token indices (N, L) to words (N, L, C) and their mean (N, C).

    Token 0 pads; nothing but 0 is the null caption. Padding is not masked. On a CPU a word outside
    of the vocabulary raises ValueError; a GPU reports it later, in its own words.
    """

    def __init__(self, vocabulary, width, heads, depth=1):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(TextBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be (N, L), not {tuple(tokens.shape)}")
        try:
            words = self.embed(tokens)                  # (N, L, C)
        except IndexError:
            last = self.embed.num_embeddings - 1
            raise ValueError(f"tokens must be words 0 to {last} of the vocabulary") from None
        # Attention does not see an order, so that each word is told its place.
        places = torch.arange(tokens.shape[1], device=tokens.device)        # (L,)
        words = words + sinusoid(places, self.embed.embedding_dim)          # (N, L, C)
        words = self.norm(self.blocks(words))           # (N, L, C)
        return words, words.mean(1)                     # (N, L, C), (N, C)


class TimeEncoder(nn.Module):
    """t (N,) in [0, 1] to (N, C).

    1000 t goes into the sinusoid: t alone would leave most of its waves nearly constant.
    """

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )

    def forward(self, t):
        if t.dim() != 1:
            raise ValueError(f"t must be (N,), not {tuple(t.shape)}")
        return self.mlp(sinusoid(1000 * t, self.width))           # (N, C)


# --- The network ----------------------------------------------------------------------------------

class Block(nn.Module):
    """Patches (N, P, C) to the same: self-attention, cross-attention to the words, MLP.

    adaLN-zero: the condition shifts and scales what goes into each of the three, and gates what
    comes out. Every gate starts at zero, so that the block starts as the identity.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_3 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 9 * width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x, words, condition):
        _require_one_each(condition, x)
        # The scale s, the shift b and the gate g of each of the three.
        modulation = self.modulation(condition)[:, None]          # (N, 1, 9C)
        s1, b1, g1, s2, b2, g2, s3, b3, g3 = modulation.chunk(9, -1)        # (N, 1, C) each

        h = self.norm_1(x) * (1 + s1) + b1              # (N, P, C)
        q, k, v = self.qkv(h).chunk(3, -1)              # (N, P, C) each
        x = x + g1 * self.out(attend(q, k, v, self.heads))        # (N, P, C)

        h = self.norm_2(x) * (1 + s2) + b2              # (N, P, C)
        q = self.q(h)                                   # (N, P, C)
        k, v = self.kv(words).chunk(2, -1)              # (N, L, C) each
        x = x + g2 * self.cross_out(attend(q, k, v, self.heads))  # (N, P, C)

        h = self.norm_3(x) * (1 + s3) + b3              # (N, P, C)
        return x + g3 * self.mlp(h)                     # (N, P, C)


def patchify(x, patch):
    """(N, 3, H, W) to (N, P, 3 patch^2): the P = H W / patch^2 patches, row by row.

    The channels may be others than 3. Raises ValueError if patch does not divide H and W.
    """
    if x.dim() != 4 or patch < 1 or x.shape[2] % patch or x.shape[3] % patch:
        raise ValueError(f"patch {patch} must divide height and width of x {tuple(x.shape)}")
    channels = F.pixel_unshuffle(x, patch)              # (N, 3pp, H/p, W/p)
    # Contiguous, since a matrix product of a transposed view may round differently.
    return channels.flatten(2).mT.contiguous()          # (N, P, 3pp)


def unpatchify(x, patch):
    """(N, P, 3 patch^2) to (N, 3, H, W), square: the inverse of patchify.

    The channels may be others than 3. Raises ValueError if P is not a square number, and if the
    last size is not a multiple of patch^2.
    """
    fits = x.dim() == 3 and patch > 0 and x.shape[2] % patch**2 == 0
    side = math.isqrt(x.shape[1]) if fits else 0
    if not fits or side * side != x.shape[1]:
        raise ValueError(f"patches must be (N, P, channels * {patch**2}) with a square number "
                         f"P, not {tuple(x.shape)}")
    # Flattened first, so that autograd makes the gradient contiguous too (see patchify).
    patches = x.flatten(1).unflatten(1, (side, side, -1))         # (N, H/p, W/p, 3pp)
    channels = patches.permute(0, 3, 1, 2).contiguous()           # (N, 3pp, H/p, W/p)
    return F.pixel_shuffle(channels, patch)             # (N, 3, H, W)


class DiT(nn.Module):
    """x (N, 3, pixels, pixels), t (N,), tokens (N, L) -> velocity like x, which is zero at first.

    t may be one number for all. `channels` is 3 or another number of channels of x, such as 1 for
    grey images, or 4 for the latents of an autoencoder. Raises ValueError if patch does not divide
    pixels, if width is not a multiple of 4 and of heads, and for inputs of other shapes.

    Class labels are captions of one word: class k is the word k + 1, as 0 is the null caption.
    With tokens=None every sample has the null caption, and the network has no condition.

    Example, for digits of 28 x 28 grey pixels in ten classes (`import torch, dit`):
        model = dit.DiT(vocabulary=11, pixels=28, channels=1)
        x, digits = torch.randn(5, 1, 28, 28), torch.tensor([0, 1, 5, 9, 9])
        v = model(x, t=0.5, tokens=1 + digits[:, None])           # (5, 1, 28, 28)
        v = model(x, t=torch.rand(5))                             # (5, 1, 28, 28)
    """

    def __init__(self, vocabulary, pixels=24, patch=4, width=96, depth=4, heads=4, channels=3):
        super().__init__()
        sizes = (vocabulary, pixels, patch, width, depth, heads, channels)
        if not all(isinstance(size, numbers.Integral) and size > 0 for size in sizes):
            raise ValueError(f"all sizes of a DiT must be whole numbers of 1 or more, not {sizes}")
        if pixels % patch or width % heads or width % 4:
            raise ValueError(f"patch {patch} must divide pixels {pixels}; width {width} must be "
                             f"a multiple of 4 and of heads {heads}")
        self.size = (channels, pixels, pixels)
        self.patch = patch
        self.width = width
        values = channels * patch * patch               # of one patch
        self.embed = nn.Linear(values, width)
        self.text = TextEncoder(vocabulary, width, heads)
        self.time = TimeEncoder(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, values)
        # The head starts at zero, and so does the velocity: no first step is wild.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, t, tokens=None):
        kind = self.text.embed.weight.dtype
        t, tokens = with_defaults(x, t, tokens, self.size, kind)  # (N,), (N, L)
        words, pooled = self.text(tokens)               # (N, L, C), (N, C)
        # The time and the caption as a whole steer every block; words come one by one in addition.
        condition = self.time(t) + pooled               # (N, C)
        h = self.embed(patchify(x, self.patch))         # (N, P, C)
        h = h + self.positions(x)                       # (N, P, C)
        for block in self.blocks:
            h = block(h, words, condition)              # (N, P, C)
        # From patches of features back to pixels.
        s, b = self.modulation(condition)[:, None].chunk(2, -1)   # (N, 1, C) each
        h = self.norm(h) * (1 + s) + b                  # (N, P, C)
        return unpatchify(self.head(h), self.patch)     # (N, 3, H, W)

    def positions(self, x):
        """(P, C) fixed sines and cosines: half for the row of a patch, half for its column."""
        steps = torch.arange(x.shape[-1] // self.patch, device=x.device)    # (H/p,)
        row, column = torch.meshgrid(steps, steps, indexing="ij")           # (H/p, W/p) each
        of_row = sinusoid(row.flatten(), self.width // 2)         # (P, C/2)
        of_column = sinusoid(column.flatten(), self.width // 2)   # (P, C/2)
        return torch.cat([of_row, of_column], -1)       # (P, C)


def main():
    torch.manual_seed(0)
    model = DiT(vocabulary=32)
    print("parameters:", sum(weight.numel() for weight in model.parameters()))
    for name, module in model.named_children():
        print(f"  {name:<10}", sum(weight.numel() for weight in module.parameters()))
    x, t = torch.randn(5, 3, 24, 24), torch.rand(5)
    tokens = torch.randint(32, (5, 12))
    print("x", tuple(x.shape))
    print("t", tuple(t.shape))
    print("tokens", tuple(tokens.shape))
    print("patches", tuple(patchify(x, model.patch).shape))
    print("velocity", tuple(model(x, t, tokens).shape))


if __name__ == "__main__":
    main()
