"""A compact U-Net: convolutions down to a coarse grid and up again, with attention to itself and the words where coarse.

`UNet(...)(x, t, tokens) -> velocity`, the signature of dit.py too. After Ho et al. 2020 and Rombach et al. 2022: residual
blocks with scale and shift from the condition, self- and cross-attention at the two lowest resolutions. GroupNorm, never
BatchNorm: that would couple the samples of a batch, and a sample would have no gradient of its own. Works under torch.func
(vmap, jacrev, jvp): attention is written out, since fused kernels lack those rules. The text and time encoders are those of
dit.py, repeated so that this file can be copied out alone. Run `python unet.py` for its sizes and a check.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def sinusoid(position, width):
    """(..., width) sines and cosines of (...) positions, at wavelengths from 2 pi to 20,000 pi."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=position.device) / (width // 2))
    angle = position[..., None] * frequency                        # (..., width/2)
    return torch.cat([angle.sin(), angle.cos()], -1)               # (..., width)


def attend(q, k, v, heads):
    """(N, Q, C) softmax(q k^T / sqrt(C / heads)) v, for q (N, Q, C) and k, v (N, K, C), in each head."""
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))    # (N, heads, Q or K, C/heads) each
    scores = q @ k.mT / math.sqrt(q.shape[-1])                     # (N, heads, Q, K)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)     # (N, Q, C)


class TextBlock(nn.Module):
    """A pre-norm transformer block for the words."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, words):
        words = words + self.out(attend(*self.qkv(self.norm_1(words)).chunk(3, -1), self.heads))   # (N, L, C)
        return words + self.mlp(self.norm_2(words))                # (N, L, C)


class TextEncoder(nn.Module):
    """Token indices (N, L) to words (N, L, C) and their mean (N, C). Token 0 pads, and alone it is the null caption."""

    def __init__(self, vocabulary, width, heads, depth=1):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(TextBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        places = torch.arange(tokens.shape[1], device=tokens.device)               # (L,)
        words = self.embed(tokens) + sinusoid(places, self.embed.embedding_dim)    # (N, L, C)
        words = self.norm(self.blocks(words))                      # (N, L, C)
        return words, words.mean(1)                                # (N, L, C), (N, C)


class TimeEncoder(nn.Module):
    """t (N,) in [0, 1] to (N, C). 1000 t goes into the sinusoid: t alone would leave most waves nearly constant."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        return self.mlp(sinusoid(1000 * t, self.width))            # (N, C)


def norm(channels):
    return nn.GroupNorm(8, channels)


def zero(layer):
    """The layer, started at zero: what it adds is nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """(N, A, H, W) and a condition (N, E) to (N, B, H, W): two convolutions, the condition scales and shifts between."""

    def __init__(self, channels_in, channels_out, width):
        super().__init__()
        self.norm_1, self.norm_2 = norm(channels_in), norm(channels_out)
        self.conv_1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv_2 = zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.modulation = nn.Linear(width, 2 * channels_out)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x, condition):
        h = self.conv_1(F.silu(self.norm_1(x)))                    # (N, B, H, W)
        s, b = self.modulation(F.silu(condition))[..., None, None].chunk(2, 1)     # (N, B, 1, 1) each
        h = self.norm_2(h) * (1 + s) + b                           # (N, B, H, W)
        return self.skip(x) + self.conv_2(F.silu(h))               # (N, B, H, W)


class Attention(nn.Module):
    """(N, B, H, W) to the same: every pixel attends to all pixels, then to the words (N, L, E)."""

    def __init__(self, channels, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = norm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), zero(nn.Linear(channels, channels))
        self.q, self.kv, self.cross_out = nn.Linear(channels, channels), nn.Linear(width, 2 * channels), zero(nn.Linear(channels, channels))

    def forward(self, x, words):
        h = self.norm_1(x).flatten(2).mT                           # (N, HW, B)
        h = x.flatten(2).mT + self.out(attend(*self.qkv(h).chunk(3, -1), self.heads))              # (N, HW, B)
        h = h + self.cross_out(attend(self.q(self.norm_2(h)), *self.kv(words).chunk(2, -1), self.heads))   # (N, HW, B)
        return h.mT.unflatten(2, x.shape[2:])                      # (N, B, H, W)


class Level(nn.Module):
    """One residual block, with attention after it where `heads` is not 0."""

    def __init__(self, channels_in, channels_out, width, heads):
        super().__init__()
        self.block = ResidualBlock(channels_in, channels_out, width)
        self.attention = Attention(channels_out, width, heads) if heads else None

    def forward(self, x, words, condition):
        x = self.block(x, condition)                               # (N, B, H, W)
        return self.attention(x, words) if self.attention else x   # (N, B, H, W)


class UNet(nn.Module):
    """x (N, 3, pixels, pixels), t (N,), tokens (N, L) -> velocity like x, which is zero at the start.

    channels are those of the three resolutions (pixels, pixels / 2, pixels / 4), `width` that of the condition.
    Raises ValueError if pixels is no multiple of 4 or a width or channel count no multiple of 8 and of heads.
    """

    def __init__(self, vocabulary, pixels=24, channels=(32, 64, 96), width=96, heads=4):
        super().__init__()
        if pixels % 4 or len(channels) != 3 or any(size % 8 or size % heads for size in (*channels, width)):
            raise ValueError(f"pixels {pixels} must be a multiple of 4; three channels {channels} and width {width} of 8 and of heads {heads}")
        fine, half, coarse = channels
        self.text, self.time = TextEncoder(vocabulary, width, heads), TimeEncoder(width)
        self.embed = nn.Conv2d(3, fine, 3, padding=1)
        self.down_1, self.shrink_1 = Level(fine, fine, width, 0), nn.Conv2d(fine, half, 3, stride=2, padding=1)
        self.down_2, self.shrink_2 = Level(half, half, width, heads), nn.Conv2d(half, coarse, 3, stride=2, padding=1)
        self.middle_1, self.middle_2 = Level(coarse, coarse, width, heads), Level(coarse, coarse, width, heads)
        self.grow_2, self.up_2 = nn.Conv2d(coarse, half, 3, padding=1), Level(2 * half, half, width, heads)
        self.grow_1, self.up_1 = nn.Conv2d(half, fine, 3, padding=1), Level(2 * fine, fine, width, 0)
        self.norm, self.head = norm(fine), zero(nn.Conv2d(fine, 3, 3, padding=1))

    def forward(self, x, t, tokens):
        words, pooled = self.text(tokens)                          # (N, L, E), (N, E)
        condition = self.time(t) + pooled                          # (N, E)
        larger = lambda h: F.interpolate(h, scale_factor=2.0, mode="nearest")
        h1 = self.down_1(self.embed(x), words, condition)          # (N, C1, H, W)
        h2 = self.down_2(self.shrink_1(h1), words, condition)      # (N, C2, H/2, W/2)
        h = self.middle_1(self.shrink_2(h2), words, condition)     # (N, C3, H/4, W/4)
        h = self.middle_2(h, words, condition)                     # (N, C3, H/4, W/4)
        h = self.up_2(torch.cat([h2, self.grow_2(larger(h))], 1), words, condition)    # (N, C2, H/2, W/2)
        h = self.up_1(torch.cat([h1, self.grow_1(larger(h))], 1), words, condition)    # (N, C1, H, W)
        return self.head(F.silu(self.norm(h)))                     # (N, 3, H, W)


def main():
    from torch.func import functional_call, jacrev, jvp, vmap
    torch.manual_seed(0)
    model = UNet(vocabulary=32)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    print("parameters:", sum(parts.values()), parts)
    x, t, tokens = torch.randn(5, 3, 24, 24), torch.rand(5), torch.randint(32, (5, 12))
    print("shapes: x", tuple(x.shape), "t", tuple(t.shape), "tokens", tuple(tokens.shape), "-> velocity", tuple(model(x, t, tokens).shape))
    for weight in model.parameters():                              # away from the zero start, where every velocity is 0
        if not weight.any():
            nn.init.normal_(weight, std=0.1)
    one = lambda parameters, *sample: functional_call(model, parameters, tuple(z[None] for z in sample))[0]
    each = vmap(one, (None, 0, 0, 0))(dict(model.named_parameters()), x, t, tokens)
    print(f"check: samples alone (vmap) against the batch, largest difference {(each - model(x, t, tokens)).abs().max():.1e}")
    at_time = lambda time, image, words: one(dict(model.named_parameters()), image, time, words)
    small = x[..., :8, :8]                                         # (5, 3, 8, 8), since reverse mode takes one pass for each output
    reverse = vmap(jacrev(at_time))(t, small, tokens)              # (5, 3, 8, 8)  dv/dt
    forward = vmap(lambda time, *rest: jvp(lambda z: at_time(z, *rest), (time,), (torch.ones(()),))[1])(t, small, tokens)
    print(f"check: dv/dt by jvp against jacrev, largest relative difference {((forward - reverse).abs().max() / reverse.abs().max()):.1e}")


if __name__ == "__main__":
    main()
