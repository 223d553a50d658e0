"""All that needs a GPU, in one command, from nothing to one page, bounded to about 10 minutes (which one H100 should do in):

    python results/gpu.py                                   # every part: a page, gpu.md, and its rows, gpu.jsonl, in runs/gpu
    python results/gpu.py --parts speedrun --minutes 9      # one part with time for all of its seeds; what the folder has of others stays
    python results/gpu.py --set pretrain_steps=5000         # other settings than those of train.py's preset gpu; compile=0 needs no compiler
    python results/gpu.py --rehearse                        # the same code at a tiny size on a CPU, in a minute: its numbers mean nothing

A row is on the disk as soon as it is measured. A part that fails leaves its message in the page, and the others go on.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)                                            # not this folder, whose tabulate.py would hide a library of that name

import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import flow_matching as fm  # noqa: E402
import ntk  # noqa: E402
import toy_data  # noqa: E402
import train  # noqa: E402

AIMS = {"dit": 60, "unet": 120}                                    # of the speedrun, in seconds
MINUTES = {"speedrun": 5.0, "rate": 0.75, "changes": 1.5, "kernel": 1.25, "side": 0.75}
FULL = {"settings": {}, "seeds": (0, 1, 2), "captions": 512, "share": 0.95, "product": 8192, "rounds": 15, "calls": 5,
        "widths": (96, 192, 384, 768), "sizes": {"M": (16, 2**20), "K": (1, 2**20)}, "side": ["--compile"]}
REHEARSAL = {"settings": {"device": "cpu", "pixels": 8, "width": 24, "depth": 1, "batch": 4, "pretrain_steps": 4, "every": 2, "sample_steps": 1},
             "seeds": (0,), "captions": 8, "share": 0.0, "product": 1024, "rounds": 2, "calls": 1,
             "widths": (24,), "sizes": {"M": (2, 4), "K": (1, 2)}, "side": ["--pixels", "8", "--width", "24", "--batch", "2", "--rounds", "1"]}


def settings(o, model, **more):
    """Those of train.py's preset gpu, with what the rehearsal, --set and a part change."""
    return train.Settings(**train.PRESETS["gpu", model] | {"model": model} | o.settings | more)


def clock(device):
    """Seconds, once all that the device was asked to do is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def size(model):
    return sum(p.numel() for p in model.parameters())


# --- The parts: each yields rows until a deadline. Their docstrings are the page's text ----------------------------

def speedrun(o, deadline):
    """From nothing to 95% of the reader's ceiling: joint accuracy of the averaged weights on seen two-object captions of the base domain.

    Seconds are from before the first step, with nothing compiled before, to after the evaluation that passes; evaluations and the first step,
    which compiles, are parts of them. The ceiling is what the reader finds in the captions' real images. Images/s are of the other steps.
    """
    for seed, model in itertools.product(o.seeds, AIMS):
        left = deadline - time.perf_counter()
        if left < AIMS[model] / 2 and not o.rehearse:
            yield {"note": f"{model}, seed {seed}: no time was left"}
        else:
            yield race(settings(o, model, seed=seed), o.share, o.captions, min(left, 2 * AIMS[model]))


def rate(o, deadline):
    """FLOPs of the network's products and convolutions, forward and backward, times steps/s, as a share of what products reach on this chip.

    The chip's rate is measured: square matrices in bfloat16 on a GPU, in float32 on a CPU, the best of several. Steps are whole: with drawing
    the data, optimizer and averaging. Their rate is the median of the rounds, with the range.
    """
    peak = product_rate(o.product, settings(o, "dit").device)
    for model in AIMS:
        run = ready(settings(o, model))
        work = flops(lambda: gradient(run.model, run.settings))
        seconds = sorted(steps(run, 4 * o.calls, k) for k in range(o.rounds))
        speed = 1 / median(seconds)
        yield {"model": model, "parameters": size(run.model), "flops": work, "steps_per_s": speed, "low": 1 / seconds[-1], "high": 1 / seconds[0],
               "images_per_s": speed * run.settings.batch, "flops_per_s": work * speed, "peak": peak, "share": work * speed / peak}


def changes(o, deadline):
    """What made training fast: one change at a time, in turns with the full configuration ("none") on the same tensors.

    Times slower is seconds an image over those of "none" in the same round: the median of the rounds and their range.
    """
    half = (deadline - time.perf_counter()) / 2
    for model in AIMS:
        if model != "dit" and deadline - time.perf_counter() < half:
            yield {"note": f"{model}: no time was left"}
            continue
        torch.compiler.reset()
        s, runs = settings(o, model), {}
        changed = changes_of(s)
        for name, (more, stand_in) in changed.items():
            with stand_in():
                runs[name] = ready(dataclasses.replace(s, **more))
        seconds, names = {name: [] for name in runs}, list(runs)   # seconds of an image
        for k in range(o.rounds):
            for name in names[k % len(names):] + names[:k % len(names)]:       # another one is first in every round
                with changed[name][1]():
                    seconds[name].append(steps(runs[name], o.calls, k) / runs[name].settings.batch)
            if time.perf_counter() > deadline and k:
                break
        for name in names:
            ratios = sorted(a / b for a, b in zip(seconds[name], seconds["none"]))
            yield {"model": model, "change": name, "ratio": median(ratios), "low": ratios[0], "high": ratios[-1], "rounds": len(ratios),
                   "images_per_s": 1 / median(seconds[name]), "batch": runs[name].settings.batch}


def kernel(o, deadline):
    """How many samples N a DiT may have for their M (N x N), and for the whole K (N D x N D), to fit in memory: N is doubled until it ends.

    In float32, at the speedrun's size of image. Seconds and peak memory (on a GPU, in 2^20 bytes) are of the largest N. The gap is that of M
    from float64 on the CPU, at the smallest N, over M's norm. Below the table: what `python ntk.py --bench 1` says.
    """
    yield child(["ntk.py", "--bench", "1"], (deadline - time.perf_counter()) / 2)
    cases = list(itertools.product(o.widths, o.sizes))
    for k, (width, what) in enumerate(cases):
        until = time.perf_counter() + (deadline - time.perf_counter()) / (len(cases) - k)
        yield largest(settings(o, "dit", width=width), what, *o.sizes[what], until)


def side(o, deadline):
    """Our networks against diffusers' of the same kind and size, by tests/side_by_side.py."""
    yield child(["tests/side_by_side.py", "--device", settings(o, "dit").device, *o.side], deadline - time.perf_counter())


PARTS = {"speedrun": speedrun, "rate": rate, "changes": changes, "kernel": kernel, "side": side}
TABLES = {
    "speedrun": {"network": "{model}", "parameters": "{parameters:,}", "seed": "{seed}", "result": "{result}", "seconds": "{seconds:.1f}", "aim": "{aim}",
                 "evaluations": "{evaluating:.1f}", "first step": "{first_step:.1f}", "images": "{images:,}", "joint accuracy": "{joint:.1%}",
                 "ceiling": "{ceiling:.1%}", "images/s": "{images_per_s:,.0f}"},
    "rate": {"network": "{model}", "parameters": "{parameters:,}", "FLOP a step": "{flops:.3g}", "steps/s": "{steps_per_s:.4g} ({low:.4g} to {high:.4g})",
             "images/s": "{images_per_s:,.0f}", "FLOP/s": "{flops_per_s:.3g}", "of products": "{peak:.3g}", "share": "{share:.1%}"},
    "changes": {"network": "{model}", "change": "{change}", "times slower": "{ratio:.2f} ({low:.2f} to {high:.2f})", "images/s": "{images_per_s:,.0f}",
                "batch": "{batch}", "rounds": "{rounds}"},
    "kernel": {"matrix": "{what}", "width": "{width}", "parameters": "{parameters:,}", "D": "{D}", "largest N": "{N}", "seconds": "{seconds}",
               "MB": "{mb}", "gap": "{gap}", "ended by": "{end}"},
    "side": {}}


# --- Speedrun ----------------------------------------------------------------------------------------------------

def race(s, share, captions, limit):
    """One run's row: steps until the joint accuracy is `share` of the ceiling, the schedule ends, or `limit` seconds are over."""
    torch.compiler.reset()
    fixed = dataclasses.replace(s, seed=0, eval_images=captions)   # the same captions and noise for every seed
    scenes = train.test_scenes("base", "seen", fixed, None, 4)
    x0, tokens = train.draw(scenes, train.all_of("macro", scenes), s)
    ceiling, run, evaluating, curve = joint(x0, scenes), train.Run(s), 0.0, []
    run.prepare()
    with torch.compiler.config.patch(force_disable_caches=True):   # nor does a disk remember what was compiled
        start = clock(s.device)
        while True:
            run.train_step(None)
            if run.step == 1:
                first = clock(s.device) - start
            if run.step % s.every == 0 or run.step == s.pretrain_steps:
                run.check()
                begun = clock(s.device)
                found = evaluated(run, tokens, scenes, fixed)
                ended = clock(s.device)
                seconds, evaluating = ended - start, evaluating + ended - begun
                curve.append((run.step * s.batch, round(seconds, 2), found))
                if found >= share * ceiling or run.step == s.pretrain_steps or seconds > limit:
                    break
    missed = "not reached in its steps" if run.step == s.pretrain_steps else "not reached in its time"
    rest = max(seconds - evaluating - first, 1e-9)                 # of the steps after the first
    return {"model": s.model, "seed": s.seed, "parameters": size(run.model), "result": "reached" if found >= share * ceiling else missed,
            "seconds": seconds, "aim": AIMS[s.model], "evaluating": evaluating, "first_step": first, "images": run.step * s.batch,
            "joint": found, "ceiling": ceiling, "images_per_s": (run.step - 1) * s.batch / rest, "curve": curve}


def joint(images, scenes):
    return toy_data.accuracies(images, scenes)["joint"].float().mean().item()


def evaluated(run, tokens, scenes, s):
    """The joint accuracy of samples of the captions, always from the same noise."""
    return joint(train.sample(run.ema, tokens, s, train.seeded(s, 5)), scenes)


# --- Steps and FLOPs ---------------------------------------------------------------------------------------------

def ready(s):
    """A Run that has warmed up and compiled, far from the end of its schedule."""
    run = train.Run(dataclasses.replace(s, pretrain_steps=10**6))
    run.prepare()
    steps(run, 3, 0)
    return run


def steps(run, calls, seed):
    """Seconds of a step, the mean of some; the same seed draws the same tensors."""
    run.generator.manual_seed(seed)
    start = clock(run.settings.device)
    for _ in range(calls):
        run.train_step(None)
    return (clock(run.settings.device) - start) / calls


def gradient(model, s):
    """The network's part of a step on new scenes, not compiled: loss and backward."""
    x0, tokens, t, e, a = train.draw_batch(s, train.seeded(s, 0))
    (a * fm.loss(train.velocity(model, s), x0, tokens, t, e)).sum().backward()


def flops(work):
    """Of the products and convolutions in work(). Attention is counted as products: the counter does not know every fused kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def product_rate(n, device):
    """FLOP/s of products of (n, n) matrices, the best of 8 rounds of 8."""
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    seconds = []
    for _ in range(8):
        start = clock(device)
        for _ in range(8):
            a @ b
        seconds.append(clock(device) - start)
    return 8 * 2 * n**3 / min(seconds)


def changes_of(s):
    """Of the full configuration, one at a time: name, other settings, and a context in which something slower stands in for a function."""
    def tokens_by_text(scenes, granularity):
        texts = toy_data.captions(scenes, [train.GRANULARITIES[g] for g in granularity.tolist()])
        return toy_data.tokenize(texts).to(scenes.background.device)

    def read_the_norm(*arguments, clip=torch.nn.utils.clip_grad_norm_):
        norm = clip(*arguments)
        norm.item()
        return norm

    def average_one_by_one(averages, weights, share):
        for average, weight in zip(averages, weights):
            average.lerp_(weight, share)

    same, stand_in = contextlib.nullcontext, lambda *where: partial(patch.object, *where)
    unfused = lambda *arguments, make=torch.optim.AdamW, **more: make(*arguments, **more | {"fused": False})
    exact = partial(torch.backends.cudnn.flags, enabled=True, allow_tf32=False)
    static = partial(torch.compile, dynamic=False)                 # or the second size would be compiled for all sizes
    return {"none": ({}, same),
            "without torch.compile": ({"compile": 0}, same),
            "float32 with TF32": ({"precision": "float32"}, same),
            "float32 without TF32": ({"precision": "float32"}, stand_in(train, "tensor_cores", exact)),
            "captions by text on the host": ({}, stand_in(toy_data, "caption_tokens", tokens_by_text)),
            "the host reads a number in every step": ({}, stand_in(torch.nn.utils, "clip_grad_norm_", read_the_norm)),
            "AdamW not fused": ({}, stand_in(torch.optim, "AdamW", unfused)),
            "weights averaged one by one": ({}, stand_in(torch, "_foreach_lerp_", average_one_by_one)),
            "half the batch": ({"batch": s.batch // 2}, stand_in(torch, "compile", static))}


# --- Kernel, and other programs ----------------------------------------------------------------------------------

def largest(s, what, N, most, until):
    """A row: N is doubled until memory, time or `most` ends it."""
    compute = {"M": ntk.fast_interaction_matrix, "K": lambda model, inputs, _: ntk.fast_ntk_blocks(model, inputs)}[what]
    model, twin = train.build(s), train.build(dataclasses.replace(s, device="cpu"))
    for p in model.parameters():
        p.data.add_(0.02 * torch.randn_like(p))                    # away from the zero start
    twin.double().load_state_dict(model.state_dict())
    row = {"what": what, "width": s.width, "parameters": size(model), "D": 3 * s.pixels**2, "N": 0, "seconds": None, "mb": None, "gap": None, "end": ""}
    while not row["end"]:
        draw = torch.Generator().manual_seed(0)
        x, r = torch.randn(2, N, 3, s.pixels, s.pixels, generator=draw)
        t, tokens = torch.rand(N, generator=draw), torch.randint(1, len(toy_data.WORDS), (N, toy_data.CAPTION_LENGTH), generator=draw)
        *inputs, residuals = (z.to(s.device) for z in (x, t, tokens, r))
        work = lambda: compute(model, tuple(inputs), residuals).detach()
        gc.collect()                                               # what the last size has left
        if s.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            start = clock(s.device)
            found = work()
            seconds = clock(s.device) - start
        except (MemoryError, RuntimeError) as error:
            if not row["N"]:
                raise                                              # the smallest size fits, if all is well
            row["end"] = f"N = {N}: {type(error).__name__}: {str(error)[:60]}"
            break
        if s.device == "cuda":
            row["mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
        if what == "M" and not row["N"]:
            exact = compute(twin, (x.double(), t.double(), tokens), r.double()).detach()
            row["gap"] = float(f"{(found.cpu() - exact).norm() / exact.norm():.0e}")
        row |= {"N": N, "seconds": float(f"{seconds:.3g}")}
        if N >= most or time.perf_counter() + 4 * seconds > until:
            row["end"] = "the last size" if N >= most else f"time: N = {2 * N} was not tried"
        N, found = 2 * N, None
    return row


def child(arguments, limit):
    """What a program of this repository says within `limit` seconds, as a note. Raises RuntimeError with it if it fails."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()                                   # its memory is this GPU's, too
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        said, ended = process.communicate(timeout=max(limit, 0))[0], ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)                     # with the processes that it has started
        said, ended = process.communicate()[0], f", stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:                                 # we are interrupted
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode and not ended:
        raise RuntimeError(f"{' '.join(arguments)}: {said[-1500:]}")
    return {"note": f"`python {' '.join(arguments)}`{ended}:\n\n{said.strip()}"}


# --- The page ----------------------------------------------------------------------------------------------------

def line(row):
    """A row of its part's table, or its note or failure."""
    if "failed" in row:
        return f"**Failed**: {row['failed']}"
    return row["note"] if "note" in row else "| " + " | ".join(form.format(**row) for form in TABLES[row["part"]].values()) + " |"


def page(rows):
    """The whole page, as lines: each part with what it measures, where and how it was made, and its rows."""
    lines = ["# What a GPU is needed for", ""]
    for part, measure in PARTS.items():
        of = [row for row in rows if row["part"] == part]
        table, others = ([line(row) for row in of if bool({"note", "failed"} & row.keys()) == other] for other in (False, True))
        lines += [f"## {part}", "", " ".join(measure.__doc__.split()), ""]
        lines += [f"`{of[0]['command']}` on {of[0]['device']}, torch {of[0]['torch']}" if of else "Not measured.", ""]
        lines += ["| " + " | ".join(TABLES[part]) + " |", "|" + "---|" * len(TABLES[part]), *table, ""] if table else []
        lines += [text for other in others for text in (other, "")]
    return lines + ["The study has a command of its own: `python results/study.py --device cuda --base 2`."]


def write(o, about):
    """Runs the parts, and writes and prints each row at once, with what `about` says of all; returns how many parts failed."""
    out, failures = Path(o.out), 0
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(text) for text in open(out / "gpu.jsonl")] if (out / "gpu.jsonl").exists() else []
    rows = [row for row in rows if row["part"] not in o.parts]

    def add(row):
        rows.append(row)
        (out / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (out / "gpu.md").write_text("\n".join(page(rows)) + "\n")
        print(line(row), flush=True)
    for part in o.parts:
        print(f"\n{part}: " + ", ".join(TABLES[part]), flush=True)
        try:
            for row in PARTS[part](o, time.perf_counter() + 60 * (o.minutes or MINUTES[part])):
                add({"part": part} | about | row)
        except Exception as error:
            failures += 1
            add({"part": part} | about | {"failed": f"{type(error).__name__}: {error}"})
    return failures


def main(arguments):
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--minutes", type=float, help=f"for each part (default: {MINUTES}); what has begun to compile compiles to its end")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of train.py other than those of its preset gpu")
    parser.add_argument("--rehearse", action="store_true", help="at a tiny size on a CPU")
    parser.add_argument("--out", default="runs/gpu", help="folder of the page (default %(default)s)")
    o = parser.parse_args(arguments)
    vars(o).update(REHEARSAL if o.rehearse else FULL)
    try:
        given = dict(text.split("=") for text in o.set)
        o.settings = o.settings | {name: type(getattr(train.Settings, name))(value) for name, value in given.items()}
    except (AttributeError, ValueError) as error:
        parser.error(f"--set: {error}")
    if not (o.rehearse or torch.cuda.is_available()):
        return "gpu.py: torch finds no CUDA device here; --rehearse runs the same code at a tiny size on a CPU"
    o.minutes = o.minutes or (0.1 if o.rehearse else None)
    about = {"command": " ".join(["python results/gpu.py", *arguments]), "torch": torch.__version__,
             "device": f"CPU, {torch.get_num_threads()} threads" if o.rehearse else torch.cuda.get_device_name()}
    with patch.object(torch, "compile", partial(torch.compile, backend="eager")) if o.rehearse else contextlib.nullcontext():
        return 1 if write(o, about) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
