"""A compact Diffusion Transformer: patches attend to each other and to the words; time and text modulate every block.

`DiT(...)(x, t, tokens) -> velocity`, the signature of unet.py too. After Peebles and Xie 2023 (adaLN-zero), with
cross-attention to the words. Nothing in it couples two samples, and it works under torch.func (vmap, jacrev, jvp):
attention is written out, since fused kernels lack those rules. Run `python dit.py` for its sizes and a check.
"""

import math

import torch
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


class Block(nn.Module):
    """Self-attention, cross-attention to the words, MLP. adaLN-zero: the condition shifts and scales what goes in and
    gates what comes out, and every gate starts at zero, so that the block starts as the identity."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2, self.norm_3 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q, self.kv, self.cross_out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 9 * width))
        nn.init.zeros_(self.modulation[1].weight)
        nn.init.zeros_(self.modulation[1].bias)

    def forward(self, x, words, condition):
        s1, b1, g1, s2, b2, g2, s3, b3, g3 = self.modulation(condition)[:, None].chunk(9, -1)      # (N, 1, C) each
        h = self.norm_1(x) * (1 + s1) + b1                         # (N, P, C)
        x = x + g1 * self.out(attend(*self.qkv(h).chunk(3, -1), self.heads))       # (N, P, C)
        h = self.norm_2(x) * (1 + s2) + b2                         # (N, P, C)
        x = x + g2 * self.cross_out(attend(self.q(h), *self.kv(words).chunk(2, -1), self.heads))   # (N, P, C)
        h = self.norm_3(x) * (1 + s3) + b3                         # (N, P, C)
        return x + g3 * self.mlp(h)                                # (N, P, C)


def patchify(x, patch):
    """(N, 3, H, W) to (N, P, 3 patch^2): the P = H W / patch^2 patches, row by row."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))      # (N, 3, H/p, p, W/p, p)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)    # (N, P, 3pp)


def unpatchify(x, patch):
    """(N, P, 3 patch^2) to (N, 3, H, W), square: the inverse of patchify."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(2, (3, patch, patch)).unflatten(1, (side, side))       # (N, H/p, W/p, 3, p, p)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)    # (N, 3, H, W)


class DiT(nn.Module):
    """x (N, 3, pixels, pixels), t (N,), tokens (N, L) -> velocity like x, which is zero at the start.

    Raises ValueError if patch does not divide pixels, or width is not a multiple of 4 and of heads.
    """

    def __init__(self, vocabulary, pixels=24, patch=4, width=96, depth=4, heads=4):
        super().__init__()
        if pixels % patch or width % heads or width % 4:
            raise ValueError(f"patch {patch} must divide pixels {pixels}; width {width} must be a multiple of 4 and of heads {heads}")
        self.patch, self.width = patch, width
        self.embed = nn.Linear(3 * patch * patch, width)
        self.text, self.time = TextEncoder(vocabulary, width, heads), TimeEncoder(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, 3 * patch * patch)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, t, tokens):
        words, pooled = self.text(tokens)                          # (N, L, C), (N, C)
        condition = self.time(t) + pooled                          # (N, C)
        h = self.embed(patchify(x, self.patch)) + self.positions(x)    # (N, P, C)
        for block in self.blocks:
            h = block(h, words, condition)                         # (N, P, C)
        s, b = self.modulation(condition)[:, None].chunk(2, -1)    # (N, 1, C) each
        return unpatchify(self.head(self.norm(h) * (1 + s) + b), self.patch)       # (N, 3, H, W)

    def positions(self, x):
        """(P, C) fixed 2-D sines and cosines: half of the channels for a patch's row, half for its column."""
        steps = torch.arange(x.shape[-1] // self.patch, device=x.device)           # (H/p,)
        row, column = torch.meshgrid(steps, steps, indexing="ij")  # (H/p, W/p) each
        return torch.cat([sinusoid(row.flatten(), self.width // 2), sinusoid(column.flatten(), self.width // 2)], -1)


def main():
    from torch.func import functional_call, jacrev, jvp, vmap
    torch.manual_seed(0)
    model = DiT(vocabulary=32)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    print("parameters:", sum(parts.values()), {name: count for name, count in parts.items() if count})
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
