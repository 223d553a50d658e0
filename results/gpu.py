"""What needs a GPU, one part a call. Each stops itself after 9 minutes of measuring.

    python results/gpu.py speedrun --model dit      # seconds until samples are right, three seeds
    python results/gpu.py speedrun --model unet
    python results/gpu.py rates --model dit         # images/s with and without each change
    python results/gpu.py rates --model unet
    python results/gpu.py kernel                    # results/bench_ntk.py

Rows are on the disk as they come, in runs/gpu/gpu.jsonl; gpu.md beside it is a page made of them.
With --tiny the same code runs small on a CPU, where its numbers mean nothing.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

import toy_data  # noqa: E402
import train  # noqa: E402
from support import machine, report  # noqa: E402

EVERY = 500                                    # steps between two evaluations of the speedrun
MINUTES = 9                                    # of a part; the tenth is for Python to start and end
CAPTIONS = 512                                 # behind every evaluation of the speedrun


def settings_of(flags, **changes):
    size = "tiny" if flags.tiny else "gpu"
    return train.Settings(**train.PRESETS[size, flags.model] | {"model": flags.model} | changes)


def clock(s):
    """Seconds, once everything that the device was asked to do is done."""
    if s.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def new_run(s):
    run = train.Run(s)
    run.use(torch.compile(run.model) if s.compile else run.model)
    return run


# --- Speedrun -------------------------------------------------------------------------------------

def speedrun(flags):
    """Seconds until the reader finds in samples of seen captions of the base domain 95% of what it
    finds in real images. They count from before the first step and include sampling the data, the
    evaluations, and all that is prepared once. For the first seed the caches of the process are
    empty; the others find its libraries loaded.
    """
    # The preset's rows are rare, since each one comes with a checkpoint. Here they cost less.
    changes = {} if flags.tiny else {"every": EVERY}
    for seed in (0, 1, 2):
        s = settings_of(flags, seed=seed, **changes)
        row = race(s, goal=0.0 if flags.tiny else 0.95, limit=60 * MINUTES / 3, captions=CAPTIONS)
        yield {"seed": seed, "caches": "full" if seed else "empty"} | row


def race(s, goal, limit, captions):
    """The row of one run, until it is at its goal, at the end of its schedule or out of time."""
    judged = dataclasses.replace(s, seed=0, eval_images=captions)      # alike for every seed
    scenes = report.test_scenes(judged, None, "base", "seen", 4)
    real, tokens = toy_data.views(scenes, "macro", s.pixels)
    ceiling, found, evaluating, reached = joint(real, scenes), 0.0, 0.0, False
    start = clock(s)
    run = new_run(s)
    # The loop reads the time without waiting for the device, which clock() would do.
    while not reached and run.step < s.pretrain_steps and time.perf_counter() - start < limit:
        run.train_step()
        if run.step == 1:
            first_step = clock(s) - start
        if run.row_is_due():
            run.finite.check()
            before = clock(s)
            images = report.sample_images(run.ema, tokens, judged, machine.seeded(judged, 5))
            found = joint(images, scenes)
            reached = found >= goal * ceiling
            evaluating += clock(s) - before
    return {"reached": reached, "seconds": clock(s) - start,
            "until the first step": first_step, "evaluating": evaluating,
            "images": report.images_until(run, run.step), "joint accuracy": found,
            "ceiling": ceiling}


def joint(images, scenes):
    """The share of images in which the reader finds all that the caption names."""
    return toy_data.accuracies(images, scenes, "macro")["joint"].float().mean().item()


# --- Rates ----------------------------------------------------------------------------------------

def adamw_in_a_loop(*arguments, make=torch.optim.AdamW, **options):
    return make(*arguments, **options | {"fused": False, "foreach": False})


# One change at a time: other settings, and what stands in for a function while a run steps.
CHANGES = {
    "none": ({}, None),
    "no CUDA graph": ({"graph": 0}, None),
    "torch.compile": ({"compile": 1}, None),
    "torch.compile, no CUDA graph": ({"compile": 1, "graph": 0}, None),
    "float32 with TF32": ({"precision": "float32"}, None),
    "float32 without TF32": ({"precision": "float32"},
                             (machine, "tensor_cores", contextlib.nullcontext)),
    "AdamW in a loop": ({}, (torch.optim, "AdamW", adamw_in_a_loop))}


def rates(flags):
    """Images/s of pretraining steps, with sampling the data, optimizer and averaging. "none" is the
    preset gpu; every other row changes what it names. The runs take turns. Times slower is the
    median over the rounds, to "none" in the same round, with the range.
    """
    rounds, calls = (2, 1) if flags.tiny else (15, 10)
    runs = {}
    for name, (changes, _) in CHANGES.items():
        s = settings_of(flags, pretrain_steps=10**6, **changes)
        with standing_in(name):
            runs[name] = new_run(s)
        seconds_of_a_step(runs[name], name, 3)                     # it compiles and warms up
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of_a_step(run, name, calls))
    for name, run in runs.items():
        slower = sorted(a / b for a, b in zip(seconds[name], seconds["none"]))
        yield {"change": name, "images/s": run.settings.batch / median(seconds[name]),
               "times slower": median(slower), "least": slower[0], "most": slower[-1]}


def standing_in(name):
    replacement = CHANGES[name][1]
    return patch.object(*replacement) if replacement else contextlib.nullcontext()


def seconds_of_a_step(run, name, calls):
    with standing_in(name):
        start = clock(run.settings)
        for _ in range(calls):
            run.train_step()
        return (clock(run.settings) - start) / calls


# --- Kernel ---------------------------------------------------------------------------------------

def kernel(flags):
    """What results/bench_ntk.py says of the exact kernel and M, beside other ways to them. What it
    has said before it is stopped or fails stays in bench_ntk.txt.
    """
    command = [sys.executable, "results/bench_ntk.py", *(["--help"] if flags.tiny else [])]
    file = flags.out / "bench_ntk.txt"
    with open(file, "w", encoding="utf-8") as stream:
        subprocess.run(command, cwd=ROOT, stdout=stream, stderr=stream, check=True)
    yield {"said": file.read_text(encoding="utf-8")}


# --- Rows and page --------------------------------------------------------------------------------

PARTS = {"speedrun": speedrun, "rates": rates, "kernel": kernel}


def cpu_model():
    """The host counts: it decides how fast kernels are launched."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def add(row, flags):
    """Puts a row on the disk and writes the page anew, from the rows of all calls so far."""
    device = "no GPU" if flags.tiny else torch.cuda.get_device_name()
    where = f"{device}, {cpu_model()}, torch {torch.__version__}"
    line = {"part": flags.part, "model": flags.model, "where": where, "row": row}
    print(json.dumps(row), flush=True)
    with open(flags.out / "gpu.jsonl", "a+", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
        stream.seek(0)
        text = "\n".join(page(map(json.loads, stream))) + "\n"
    (flags.out / "gpu.md").write_text(text, encoding="utf-8")


def page(rows):
    """The lines of gpu.md: a heading and what is measured wherever part or place change."""
    lines, last = ["# Measured with results/gpu.py"], None
    for line in rows:
        row = line["row"]
        place = [line["part"], line["model"], line["where"], *row]
        if place != last:
            what = " ".join(PARTS[line["part"]].__doc__.split())
            lines += ["", f"## {line['part']}, {line['model']}", "", what, "", line["where"], ""]
            lines += ["| " + " | ".join(row) + " |", "|" + "---|" * len(row)]
        lines.append("| " + " | ".join(map(text_of, row.values())) + " |")
        last = place
    return lines


def text_of(value):
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.strip().replace("|", "\\|").replace("\n", "<br>")


def stop_now(*_):
    raise TimeoutError(f"stopped after {MINUTES} minutes; the rows above stay")


def main(arguments):
    parser = argparse.ArgumentParser("gpu.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", choices=("dit", "unet"), default="dit")
    parser.add_argument("--tiny", action="store_true", help="at a tiny size on a CPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="(runs/gpu)")
    flags = parser.parse_args(arguments)
    if not (flags.tiny or torch.cuda.is_available()):
        sys.exit("gpu.py: torch finds no CUDA device here; --tiny runs the same code on a CPU")
    machine.full_precision()
    flags.out.mkdir(parents=True, exist_ok=True)
    previous = signal.signal(signal.SIGALRM, stop_now)
    signal.alarm(round(60 * MINUTES))
    try:
        with tempfile.TemporaryDirectory() as caches:              # nothing is compiled yet
            with patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": caches}):
                for row in PARTS[flags.part](flags):
                    add(row, flags)
    except Exception as error:
        add({"failed": f"{type(error).__name__}: {error}"}, flags)
        sys.exit(1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


if __name__ == "__main__":
    main(sys.argv[1:])
