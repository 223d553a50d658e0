"""A compact U-Net: convolutions down to a coarse grid and up again, with attention where coarse.

`UNet(...)(x, t, tokens) -> velocity`, the signature of dit.py too. After Ho et al. 2020 and Rombach
et al. 2022: residual blocks with scale and shift from the condition, self- and cross-attention at
the two lowest resolutions. Nothing couples two samples: GroupNorm, never BatchNorm, with which a
sample would have no gradient of its own. It works under torch.func (vmap, jacrev, jvp): attention
is written out, since fused kernels lack those rules. Run `python unet.py` for its sizes and shapes.
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

def norm(channels):
    """Of one sample's channels in 8 groups. BatchNorm would take its mean over the samples."""
    return nn.GroupNorm(8, channels)


def zero(layer):
    """The layer, started at zero: what it adds is nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def larger(x):
    """(N, C, H, W) to (N, C, 2H, 2W): every pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResidualBlock(nn.Module):
    """(N, A, H, W) and a condition (N, E) to (N, B, H, W): two convolutions and a way around them.

    The condition scales and shifts between the two.
    """

    def __init__(self, channels_in, channels_out, width):
        super().__init__()
        self.norm_1 = norm(channels_in)
        self.norm_2 = norm(channels_out)
        self.conv_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv_2 = zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.modulation = nn.Linear(width, 2 * channels_out)
        self.skip = nn.Identity()
        if channels_in != channels_out:
            self.skip = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x, condition):
        _require_one_each(condition, x)
        h = self.conv_1(F.silu(self.norm_1(x)))         # (N, B, H, W)
        modulation = self.modulation(F.silu(condition))           # (N, 2B)
        s, b = modulation[..., None, None].chunk(2, 1)  # (N, B, 1, 1) each
        h = self.norm_2(h) * (1 + s) + b                # (N, B, H, W)
        return self.skip(x) + self.conv_2(F.silu(h))    # (N, B, H, W)


class Attention(nn.Module):
    """(N, B, H, W) to the same: every pixel attends to all pixels, then to the words (N, L, E)."""

    def __init__(self, channels, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1 = norm(channels)
        self.norm_2 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))
        self.q = nn.Linear(channels, channels)
        self.kv = nn.Linear(width, 2 * channels)
        self.cross_out = zero(nn.Linear(channels, channels))

    def forward(self, x, words):
        # Every pixel becomes a row, as attention wants it.
        h = self.norm_1(x).flatten(2).mT                # (N, HW, B)
        q, k, v = self.qkv(h).chunk(3, -1)              # (N, HW, B) each
        h = x.flatten(2).mT + self.out(attend(q, k, v, self.heads))         # (N, HW, B)
        q = self.q(self.norm_2(h))                      # (N, HW, B)
        k, v = self.kv(words).chunk(2, -1)              # (N, L, B) each
        h = h + self.cross_out(attend(q, k, v, self.heads))       # (N, HW, B)
        return h.mT.unflatten(2, x.shape[2:])           # (N, B, H, W)


class Level(nn.Module):
    """One residual block, with attention after it where `heads` is not 0."""

    def __init__(self, channels_in, channels_out, width, heads):
        super().__init__()
        self.block = ResidualBlock(channels_in, channels_out, width)
        self.attention = Attention(channels_out, width, heads) if heads else None

    def forward(self, x, words, condition):
        x = self.block(x, condition)                    # (N, B, H, W)
        if self.attention is not None:
            x = self.attention(x, words)                # (N, B, H, W)
        return x                                        # (N, B, H, W)


class UNet(nn.Module):
    """x (N, 3, pixels, pixels), t (N,), tokens (N, L) -> velocity like x, which is zero at first.

    t may be one number for all. `widths` are those of the three resolutions (pixels, pixels / 2,
    pixels / 4), and `width` is that of the condition. `channels` is 3 or another number of channels
    of x, such as 1 for grey images, or 4 for the latents of an autoencoder. Raises ValueError if
    pixels is not a multiple of 4, if a width is not a multiple of 8 and of heads, and for inputs of
    other shapes.

    Class labels are captions of one word: class k is the word k + 1, as 0 is the null caption.
    With tokens=None every sample has the null caption, and the network has no condition.

    Example, for digits of 28 x 28 grey pixels in ten classes (`import torch, unet`):
        model = unet.UNet(vocabulary=11, pixels=28, channels=1)
        x, digits = torch.randn(5, 1, 28, 28), torch.tensor([0, 1, 5, 9, 9])
        v = model(x, t=0.5, tokens=1 + digits[:, None])           # (5, 1, 28, 28)
        v = model(x, t=torch.rand(5))                             # (5, 1, 28, 28)
    """

    def __init__(self, vocabulary, pixels=24, widths=(32, 64, 96), width=96, heads=4, channels=3):
        super().__init__()
        widths = tuple(widths) if isinstance(widths, (list, tuple)) else (widths,)
        sizes = (vocabulary, pixels, *widths, width, heads, channels)
        if not all(isinstance(size, numbers.Integral) and size > 0 for size in sizes):
            raise ValueError("all sizes of a U-Net must be whole numbers of 1 or more, not "
                             f"{sizes}")
        if len(widths) != 3:
            raise ValueError("a U-Net has three widths, such as (32, 64, 96): one for each grid, "
                             f"not {widths}")
        wrong = [size for size in (*widths, width) if size % 8 or size % heads]
        if pixels % 4 or wrong:
            raise ValueError(f"pixels {pixels} must be a multiple of 4; widths {widths} and width "
                             f"{width} must be multiples of 8 and of heads {heads}")
        self.size = (channels, pixels, pixels)
        fine, half, coarse = widths
        self.text = TextEncoder(vocabulary, width, heads)
        self.time = TimeEncoder(width)
        self.embed = nn.Conv2d(channels, fine, 3, padding=1)
        # Down: at the finest resolution there is no attention, since it grows with pixels^4.
        self.down_1 = Level(fine, fine, width, 0)
        self.shrink_1 = nn.Conv2d(fine, half, 3, stride=2, padding=1)
        self.down_2 = Level(half, half, width, heads)
        self.shrink_2 = nn.Conv2d(half, coarse, 3, stride=2, padding=1)
        self.middle_1 = Level(coarse, coarse, width, heads)
        self.middle_2 = Level(coarse, coarse, width, heads)
        # Up: twice the channels come in, those from below and those kept on the way down.
        self.grow_2 = nn.Conv2d(coarse, half, 3, padding=1)
        self.up_2 = Level(2 * half, half, width, heads)
        self.grow_1 = nn.Conv2d(half, fine, 3, padding=1)
        self.up_1 = Level(2 * fine, fine, width, 0)
        self.norm = norm(fine)
        self.head = zero(nn.Conv2d(fine, channels, 3, padding=1))

    def forward(self, x, t, tokens=None):
        kind = self.text.embed.weight.dtype
        t, tokens = with_defaults(x, t, tokens, self.size, kind)  # (N,), (N, L)
        words, pooled = self.text(tokens)               # (N, L, E), (N, E)
        # The time and the caption as a whole steer every level; words come one by one in addition.
        condition = self.time(t) + pooled               # (N, E)
        # Down to a quarter of the resolution, keeping what each level gave.
        h1 = self.down_1(self.embed(x), words, condition)         # (N, C1, H, W)
        h2 = self.down_2(self.shrink_1(h1), words, condition)     # (N, C2, H/2, W/2)
        h = self.middle_1(self.shrink_2(h2), words, condition)    # (N, C3, H/4, W/4)
        h = self.middle_2(h, words, condition)          # (N, C3, H/4, W/4)
        # Up again, where each level takes in what was kept at its size.
        h = torch.cat([h2, self.grow_2(larger(h))], 1)  # (N, 2 * C2, H/2, W/2)
        h = self.up_2(h, words, condition)              # (N, C2, H/2, W/2)
        h = torch.cat([h1, self.grow_1(larger(h))], 1)  # (N, 2 * C1, H, W)
        h = self.up_1(h, words, condition)              # (N, C1, H, W)
        return self.head(F.silu(self.norm(h)))          # (N, 3, H, W)


def main():
    torch.manual_seed(0)
    model = UNet(vocabulary=32)
    print("parameters:", sum(weight.numel() for weight in model.parameters()))
    for name, module in model.named_children():
        print(f"  {name:<10}", sum(weight.numel() for weight in module.parameters()))
    x, t = torch.randn(5, 3, 24, 24), torch.rand(5)
    tokens = torch.randint(32, (5, 12))
    print("x", tuple(x.shape))
    print("t", tuple(t.shape))
    print("tokens", tuple(tokens.shape))
    print("velocity", tuple(model(x, t, tokens).shape))


if __name__ == "__main__":
    main()
