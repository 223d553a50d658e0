"""Our networks against public ones of the same kind and size: images/s of a full training step, in one run, in turns.

    pip install diffusers && python tests/side_by_side.py --out table.md

Both take the same tensors, flow_matching.loss, precision, clipping and optimizer, and read the captions with dit.TextEncoder.
What is not timed: drawing the data and averaging the weights, which do not depend on the network.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import dit
import flow_matching as fm
import toy_data
import train

WORDS, HEADS = len(toy_data.WORDS), 4                              # the heads of dit.py and unet.py
NOTE = """In brackets: theirs / ours, since equal parameters are not equal work (FLOPs: matrix products and convolutions, forward and
backward). Times faster: their seconds / ours, the median of the rounds and their range. Their size, chosen for the count of
parameters, is the width of the MLP for the DiT and the channels for the U-Net."""


class DiffusersDiT(nn.Module):
    """facebookresearch/DiT with cross-attention, made of diffusers' parts. (Their own DiTTransformer2DModel takes a class, not
    words, and embeds it and t again in every block; here, as in the original, the blocks share one condition.)"""

    def __init__(self, s, mlp):
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
        super().__init__()
        self.patch, self.text = s.patch, dit.TextEncoder(WORDS, s.width, HEADS)
        self.embed = PatchEmbed(s.pixels, s.pixels, s.patch, 3, s.width)
        self.time = nn.Sequential(Timesteps(256, True, 1), TimestepEmbedding(256, s.width))
        self.blocks = nn.ModuleList(BasicTransformerBlock(
            s.width, HEADS, s.width // HEADS, cross_attention_dim=s.width, activation_fn="gelu-approximate", num_embeds_ada_norm=1,
            attention_bias=True, norm_type="ada_norm_zero", norm_elementwise_affine=False, ff_inner_dim=mlp) for _ in range(s.depth))
        for block in self.blocks:
            del block.norm1.emb
            block.norm1.emb = lambda condition, label, hidden_dtype: condition
        self.norm, self.modulation = nn.LayerNorm(s.width, elementwise_affine=False), nn.Linear(s.width, 2 * s.width)
        self.head = nn.Linear(s.width, 3 * s.patch ** 2)

    def forward(self, x, t, tokens):
        words, pooled = self.text(tokens)                          # (N, L, C), (N, C)
        h, condition = self.embed(x), self.time(1000 * t) + pooled     # (N, P, C), (N, C)
        for block in self.blocks:
            h = block(h, encoder_hidden_states=words, timestep=condition)          # (N, P, C)
        s, b = self.modulation(nn.functional.silu(condition))[:, None].chunk(2, -1)    # (N, 1, C) each
        return dit.unpatchify(self.head(self.norm(h) * (1 + s) + b), self.patch)   # (N, 3, H, W)


class DiffusersUNet(nn.Module):
    """diffusers' UNet2DConditionModel at three resolutions, with attention at the two lowest, one layer in a block."""

    def __init__(self, s, channels):
        from diffusers import UNet2DConditionModel
        super().__init__()
        self.text = dit.TextEncoder(WORDS, s.width, HEADS)
        self.network = UNet2DConditionModel(                       # attention_head_dim is their name for the number of heads
            s.pixels, 3, 3, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=channels, norm_num_groups=8,
            attention_head_dim=HEADS, cross_attention_dim=s.width, use_linear_projection=True, time_embedding_dim=s.width,
            class_embed_type="identity", resnet_time_scale_shift="scale_shift")

    def forward(self, x, t, tokens):
        words, pooled = self.text(tokens)                          # (N, L, C), (N, C)
        return self.network(x, 1000 * t, words, class_labels=pooled, return_dict=False)[0]         # (N, 3, H, W)


def size(model):
    return sum(p.numel() for p in model.parameters())


def pair(s):
    """Our network as train.py builds it, theirs with the nearest number of parameters, and the choice that gave it."""
    ours, theirs, choices = train.build(s), DiffusersDiT, [s.width * k // 4 for k in range(12, 33)]
    if s.model == "unet":
        theirs, choices = DiffusersUNet, [(b // 16 * 8, b, b) for b in range(16, s.width, 8)]
    with torch.device("meta"):
        choice = min(choices, key=lambda choice: abs(size(theirs(s, choice)) - size(ours)))
    return ours, theirs(s, choice).to(s.device), choice


def training_step(model, s):
    """One step of training as a function; it takes the same tensors each time, and for each model."""
    draw = torch.Generator().manual_seed(0)
    x0, e = torch.randn(2, s.batch, 3, s.pixels, s.pixels, generator=draw).to(s.device)
    t = torch.rand(s.batch, generator=draw).to(s.device)
    tokens = torch.randint(1, WORDS, (s.batch, toy_data.CAPTION_LENGTH), generator=draw).to(s.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99), weight_decay=s.weight_decay, fused=s.device == "cuda")

    def step():
        optimizer.zero_grad()
        fm.loss(train.velocity(model, s), x0, tokens, t, e).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
    return step


def flops(step):
    """Of one step. Attention is counted as matrix products: the counter does not know every fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def in_turns(ours, theirs, rounds, calls=5, clock=time.perf_counter):
    """The seconds of a call of each, their medians over the rounds, and the ratio theirs / ours of every round, sorted."""
    seconds = [[0.0] * rounds, [0.0] * rounds]
    for k in range(rounds):
        for who in (k % 2, 1 - k % 2):                             # in every other round theirs is first
            start = clock()
            for _ in range(calls):
                (ours, theirs)[who]()
            seconds[who][k] = (clock() - start) / calls
    return median(seconds[0]), median(seconds[1]), sorted(b / a for a, b in zip(*seconds))


def row(s, rounds, compiled):
    """A row of the table: our network against theirs."""
    def clock():
        if s.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
    *models, choice = pair(s)
    (p, q), (f, g) = map(size, models), [flops(training_step(model, s)) / 1e9 for model in models]
    steps = [training_step(torch.compile(model) if compiled else model, s) for model in models]
    in_turns(*steps, 2, clock=clock)                               # to warm up, and to compile
    a, b, ratios = in_turns(*steps, rounds, clock=clock)
    return (f"| {s.model}, {s.precision}{', compiled' * compiled} | {type(models[1]).__name__}, {choice} | {p:,} | {q:,} ({q / p:.3f}) | {f:.3g} |"
            f" {g:.3g} ({g / f:.2f}) | {s.batch / a:,.0f} | {s.batch / b:,.0f} | {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")


def main(arguments):
    parser = argparse.ArgumentParser(prog="side_by_side.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (("pixels", "height and width of an image"), ("width", "of the networks, a multiple of 24"), ("batch", "images in a step")):
        parser.add_argument("--" + name, type=int, default=argparse.SUPPRESS, help=f"{what} (default: that of train.py's DiT on the device)")
    parser.add_argument("--rounds", type=int, default=15, help="of five steps of each (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="with torch.compile too")
    parser.add_argument("--out", help="a file for the table")
    given = vars(parser.parse_args(arguments))
    rounds, compiling, out = (given.pop(name) for name in ("rounds", "compile", "out"))
    try:
        import diffusers
    except ImportError:
        return print("There is nothing to compare with before pip install diffusers")
    torch.set_num_threads(1)
    try:
        compare(given, rounds, compiling, out, arguments, diffusers.__version__)
    except train.Stop as stop:
        return f"side_by_side.py: {stop}"


def compare(given, rounds, compiling, out, arguments, version):
    """The table, printed row by row. Raises train.Stop for settings that cannot be had."""
    settings = train.PRESETS["gpu" if given["device"] == "cuda" else "cpu", "dit"] | given
    s = train.Settings(**settings)
    train.build(s)
    device = torch.cuda.get_device_name() if given["device"] == "cuda" else "CPU, 1 thread"
    lines = [f"`python {' '.join(['tests/side_by_side.py', *arguments])}` on {device}: torch {torch.__version__}, diffusers {version},"
             f" {s.pixels} px, width {s.width}, batch {s.batch}, {rounds} rounds of five steps in turns",
             "", "| ours | theirs, and its size | parameters | theirs | GFLOP a step | theirs | images/s | theirs | times faster |", "|" + "---|" * 9]
    print("\n".join(lines))
    for model in ("dit", "unet"):
        for compiled in (False, True)[:1 + compiling]:
            lines.append(row(train.Settings(**settings | {"model": model}), rounds, compiled))
            print(lines[-1], flush=True)
    print("\n" + NOTE)
    if out:
        Path(out).write_text("\n".join([*lines, "", NOTE]) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
