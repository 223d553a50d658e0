"""Our networks against public ones of the same kind and size: images/s of a full training step.

    pip install diffusers && python results/side_by_side.py --out table.md

Both run in turns in one process. Both take the same tensors, flow_matching.loss, precision,
clipping and optimizer, and read the captions with dit.TextEncoder. Not timed are sampling the data
and averaging the weights, which do not depend on the network.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import dit  # noqa: E402
import flow_matching as fm  # noqa: E402
import toy_data  # noqa: E402
import train  # noqa: E402
from support import machine  # noqa: E402

WORDS = len(toy_data.WORDS)
HEADS = 4                                          # as dit.py and unet.py have by default
HEAD = ("ours", "theirs, and its size", "parameters", "theirs", "GFLOP a step", "theirs",
        "images/s", "theirs", "times faster")
NOTE = """In brackets: theirs / ours, since equal parameters are not equal work. FLOPs are those of
matrix products and convolutions, forward and backward. Times faster: their seconds / ours, the
median of the rounds and their range. Their size was chosen for the count of parameters: it is the
width of the MLP for the DiT and the channels for the U-Net."""


# --- Their networks -------------------------------------------------------------------------------

class DiffusersDiT(nn.Module):
    """facebookresearch/DiT with cross-attention, made of diffusers' parts.

    Their own DiTTransformer2DModel takes a class, not words, and embeds it and t again in every
    block. Here, as in the original, the blocks share one condition.
    """

    def __init__(self, s, mlp):
        from diffusers.models.attention import BasicTransformerBlock
        from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
        super().__init__()
        C = s.width
        self.patch = s.patch
        self.text = dit.TextEncoder(WORDS, C, HEADS)
        self.embed = PatchEmbed(s.pixels, s.pixels, s.patch, 3, C)
        self.time = nn.Sequential(Timesteps(256, True, 1), TimestepEmbedding(256, C))
        self.blocks = nn.ModuleList()
        for _ in range(s.depth):
            block = BasicTransformerBlock(
                C, HEADS, C // HEADS, cross_attention_dim=C, activation_fn="gelu-approximate",
                num_embeds_ada_norm=1, attention_bias=True, norm_type="ada_norm_zero",
                norm_elementwise_affine=False, ff_inner_dim=mlp)
            # The block would embed t and a class here. It gets the shared condition instead.
            del block.norm1.emb
            block.norm1.emb = hand_on
            self.blocks.append(block)
        self.norm = nn.LayerNorm(C, elementwise_affine=False)
        self.modulation = nn.Linear(C, 2 * C)
        self.head = nn.Linear(C, 3 * s.patch ** 2)

    def forward(self, x, t, tokens):
        words, pooled = self.text(tokens)                          # (N, L, C), (N, C)
        condition = self.time(1000 * t) + pooled                   # (N, C)
        h = self.embed(x)                                          # (N, P, C)
        for block in self.blocks:
            h = block(h, encoder_hidden_states=words, timestep=condition)
        modulation = self.modulation(nn.functional.silu(condition))
        scale, shift = modulation[:, None].chunk(2, -1)            # (N, 1, C) each
        return dit.unpatchify(self.head(self.norm(h) * (1 + scale) + shift), self.patch)


def hand_on(condition, label, hidden_dtype):
    return condition


class DiffusersUNet(nn.Module):
    """diffusers' UNet2DConditionModel: three resolutions, attention at the two lowest."""

    def __init__(self, s, channels):
        from diffusers import UNet2DConditionModel
        super().__init__()
        down = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
        up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
        self.text = dit.TextEncoder(WORDS, s.width, HEADS)
        # Their attention_head_dim is the number of heads.
        self.network = UNet2DConditionModel(
            s.pixels, 3, 3, down_block_types=down, up_block_types=up, layers_per_block=1,
            block_out_channels=channels, norm_num_groups=8, attention_head_dim=HEADS,
            cross_attention_dim=s.width, use_linear_projection=True, time_embedding_dim=s.width,
            class_embed_type="identity", resnet_time_scale_shift="scale_shift")

    def forward(self, x, t, tokens):
        words, pooled = self.text(tokens)                          # (N, L, C), (N, C)
        found = self.network(x, 1000 * t, words, class_labels=pooled, return_dict=False)
        return found[0]                                            # (N, 3, H, W)


def size(model):
    return sum(weight.numel() for weight in model.parameters())


def pair(s):
    """(our network, theirs with the nearest number of parameters, the choice that gave it)."""
    ours = train.build(s)
    if s.model == "dit":
        theirs, choices = DiffusersDiT, [s.width * k // 4 for k in range(12, 33)]
    else:
        widths = range(16, s.width, 8)
        theirs, choices = DiffusersUNet, [(C // 16 * 8, C, C) for C in widths]

    def gap(choice):
        return abs(size(theirs(s, choice)) - size(ours))

    with torch.device("meta"):                     # parameters are counted, not made
        choice = min(choices, key=gap)
    return ours, theirs(s, choice).to(s.device), choice


# --- Steps ----------------------------------------------------------------------------------------

def training_step(model, s):
    """One step of training as a function. It takes the same tensors each time, for each model."""
    generator = torch.Generator().manual_seed(0)
    shape = (s.batch, 3, s.pixels, s.pixels)
    x0, e = torch.randn(2, *shape, generator=generator).to(s.device)
    t = torch.rand(s.batch, generator=generator).to(s.device)
    tokens = torch.randint(1, WORDS, (s.batch, toy_data.CAPTION_LENGTH), generator=generator)
    tokens = tokens.to(s.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.99),
                                  weight_decay=s.weight_decay, fused=s.device == "cuda")
    velocity = machine.in_precision(model, s)

    def step():
        optimizer.zero_grad()
        with machine.tensor_cores():
            fm.loss(velocity, x0, e, t, tokens).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()

    return step


def flops(step):
    """Of one step. Attention counts as products: the counter does not know every fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def in_turns(ours, theirs, rounds, calls=5, clock=time.perf_counter):
    """(our seconds, theirs, [theirs / ours]) of a call: medians over the rounds, sorted ratios."""
    seconds = {ours: [], theirs: []}
    for k in range(rounds):
        # In every other round theirs is first.
        for step in ((ours, theirs) if k % 2 == 0 else (theirs, ours)):
            start = clock()
            for _ in range(calls):
                step()
            seconds[step].append((clock() - start) / calls)
    ratios = sorted(b / a for a, b in zip(seconds[ours], seconds[theirs]))
    return median(seconds[ours]), median(seconds[theirs]), ratios


# --- The table ------------------------------------------------------------------------------------

def row(s, rounds, compiled):
    """A row of the table: our network against theirs."""
    def clock():
        if s.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    ours, theirs, choice = pair(s)
    p, q = size(ours), size(theirs)
    f, g = (flops(training_step(model, s)) / 1e9 for model in (ours, theirs))
    used = [torch.compile(model) if compiled else model for model in (ours, theirs)]
    steps = [training_step(model, s) for model in used]
    in_turns(*steps, 2, clock=clock)               # to warm up, and to compile
    a, b, ratios = in_turns(*steps, rounds, clock=clock)

    network = f"{s.model}, {s.precision}" + (", compiled" if compiled else "")
    cells = [network, f"{type(theirs).__name__}, {choice}", f"{p:,}", f"{q:,} ({q / p:.3f})",
             f"{f:.3g}", f"{g:.3g} ({g / f:.2f})", f"{s.batch / a:,.0f}", f"{s.batch / b:,.0f}",
             f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"]
    return "| " + " | ".join(cells) + " |"


def compare(given, rounds, compiling, arguments, version):
    """The lines of the table, printed as they come."""
    settings = train.PRESETS["gpu" if given["device"] == "cuda" else "cpu", "dit"] | given
    s = train.Settings(**settings)
    device = torch.cuda.get_device_name() if s.device == "cuda" else "CPU, 1 thread"
    command = " ".join(["results/side_by_side.py", *arguments])
    about = (f"`python {command}` on {device}: torch {torch.__version__}, diffusers {version},"
             f" {s.pixels} px, width {s.width}, batch {s.batch},"
             f" {rounds} rounds of five steps in turns")
    lines = [about, "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    print("\n".join(lines))
    for model in ("dit", "unet"):
        for compiled in (False, True) if compiling else (False,):
            lines.append(row(train.Settings(**settings | {"model": model}), rounds, compiled))
            print(lines[-1], flush=True)
    print("\n" + NOTE)
    return [*lines, "", NOTE]


def main(arguments):
    keep_lines = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("side_by_side.py", description=__doc__,
                                     formatter_class=keep_lines)
    sizes = {"pixels": "height and width of an image", "batch": "images in a step",
             "width": "of the networks, a multiple of 24"}
    for name, what in sizes.items():
        parser.add_argument("--" + name, type=int, default=argparse.SUPPRESS,
                            help=f"{what} (default: that of train.py's DiT on the device)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None,
                        help="default: cuda where it is, else cpu")
    parser.add_argument("--rounds", type=int, default=15, help="of five steps of each (15)")
    parser.add_argument("--compile", action="store_true", help="with torch.compile too")
    parser.add_argument("--out", help="a file for the table")
    given = vars(parser.parse_args(arguments))
    rounds, compiling, out = (given.pop(name) for name in ("rounds", "compile", "out"))
    try:
        import diffusers
    except ImportError:
        print("There is nothing to compare with before pip install diffusers")
        return
    given["device"] = given["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    machine.full_precision()
    lines = compare(given, rounds, compiling, arguments, diffusers.__version__)
    if out:
        Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
