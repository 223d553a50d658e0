"""The exact kernel and M beside other ways to the same numbers: times and memory, in turns.

    python results/bench_ntk.py          # three rounds; memory on a CPU needs Linux or macOS
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.func import jacrev, jvp, vjp, vmap

sys.path.insert(0, str(Path(__file__).parent.parent))
import dit  # noqa: E402
import ntk  # noqa: E402
import toy_data as td  # noqa: E402
import unet  # noqa: E402

# --- Benchmark: other ways to the same numbers -------------------------------------------------------------------

def jacobian_contraction(f, params, inputs):
    """(N, N, D, D) K as method 1 of torch.func's tutorial on the NTK has it: both Jacobians whole, then contracted."""
    J = lambda: vmap(lambda *one: jacrev(f)(params, *one))(*inputs)        # (N, D, *parameter) each, in a dict
    return sum(torch.einsum("idp,jep->ijde", a.flatten(2), b.flatten(2)) for a, b in zip(J().values(), J().values()))


def pairwise_vector_products(f, params, inputs):
    """(N, N, D, D) K as its method 2 has it: for each of the N^2 pairs, D vectors back through one sample and forward through the other."""
    def block(x_i, x_j):
        v, pull_back = vjp(lambda weights: f(weights, *x_j), params)
        push = lambda vector: jvp(lambda weights: f(weights, *x_i), (params,), pull_back(vector))[1]
        return vmap(push)(torch.eye(len(v), dtype=v.dtype, device=v.device)).T
    return vmap(lambda *x_i: vmap(lambda *x_j: block(x_i, x_j))(*inputs))(*inputs)


def cost(work, device):
    """(seconds, bytes): the least time of work() in half a second or once, and its peak memory above what this process has ever had."""
    def repeat():
        times = []
        while sum(times) < 0.5:
            start = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return repeat(), torch.cuda.max_memory_allocated() - before
    import multiprocessing, resource                               # on a CPU the peak is that of a process: one for each work
    def child(pipe):
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        before = peak()
        pipe.send((repeat(), peak() - before))
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise RuntimeError("the benchmark's process ended early, most likely for want of memory")
    finally:
        process.join()


def contest(model, draw, rounds, device, sizes=(4, 2, 8, 256)):
    """Rows (what, other way, median ratio of the times, seconds, seconds, bytes, bytes), the fast route first; in turns."""
    module, params = ntk.of_module(model)

    def f(weights, *one):
        return module(weights, *one).flatten()

    rows = []
    for N, (what, name) in zip(sizes, (("K", "method 1"), ("K", "method 2"), ("M", "vmap(grad)"), ("M", "vmap(grad)"))):
        x = draw(N)
        r = torch.randn(N, f(params, *(z[0] for z in x)).numel(), device=device)
        fast = (lambda: ntk.fast_ntk_blocks(model, x)) if what == "K" else (lambda: ntk.fast_interaction_matrix(model, x, r))
        other = {"method 1": lambda: jacobian_contraction(f, params, x), "method 2": lambda: pairwise_vector_products(f, params, x),
                 "vmap(grad)": lambda: ntk.interaction_matrix(f, params, x, r)}[name]
        runs = [(cost(fast, device), cost(other, device)) for _ in range(rounds)]
        ratio = statistics.median(slow[0] / quick[0] for quick, slow in runs)
        rows.append((f"{what}, N = {N}", name, ratio, *(statistics.median(run[k][m] for run in runs) for m in (0, 1) for k in (0, 1))))
    return rows


def bench(rounds=3):
    device, words = "cuda" if torch.cuda.is_available() else "cpu", len(td.WORDS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    image = lambda N: torch.randn(N, 3, 16, 16, device=device)
    text = lambda N: (image(N), torch.rand(N, device=device), torch.randint(1, words, (N, 12), device=device))
    contestants = {"MLP": (nn.Sequential(nn.Flatten(), nn.Linear(768, 128), nn.GELU(), nn.Linear(128, 768)), lambda N: (image(N),)),
                   "DiT": (dit.DiT(words, 16, 4, 64, 2), text), "U-Net": (unet.UNet(words, 16, (16, 24, 32), 32), text)}
    print(f"{torch.cuda.get_device_name() if device == 'cuda' else 'one CPU thread'}, torch {torch.__version__}, float32, D = 768, {rounds} rounds in turns")
    print("| model (parameters) | what | against | times faster (median) | seconds | theirs | MB | theirs | share of their memory |\n|" + "---|" * 9)
    for name, (model, draw) in contestants.items():
        for p in model.to(device).parameters():
            p.data.add_(0.02 * torch.randn_like(p))                # away from the zero start
        for what, other, ratio, fast, slow, small, large in contest(model, draw, rounds, device):
            print(f"| {name} ({sum(p.numel() for p in model.parameters()):,}) | {what} | {other} | {ratio:.1f} | {fast:.3g} | {slow:.3g} |"
                  f" {small / 2**20:.0f} | {large / 2**20:.0f} | {small / max(large, 1):.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=3, help="rounds (default 3)")
    bench(parser.parse_args().rounds)
