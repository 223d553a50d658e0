"""The exact kernel and M beside other ways to the same numbers: times and memory, in turns.

    python results/bench_ntk.py          # three rounds; memory on a CPU needs Linux or macOS

Method 1 and method 2 are those of torch.func's tutorial on neural tangent kernels.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.func import jacrev, jvp, vjp, vmap

if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(Path(__file__).parent.parent)
import dit  # noqa: E402
import ntk  # noqa: E402
import toy_data  # noqa: E402
import unet  # noqa: E402

WORDS = len(toy_data.WORDS)
LONG_ENOUGH = 1.0              # seconds of calls behind one time


# --- The other ways -------------------------------------------------------------------------------

def method_1(f, params, inputs):
    """(N, N, D, D) K: all Jacobians whole, then contracted."""
    def jacobian(*one):
        return jacrev(f)(params, *one)

    J = vmap(jacobian)(*inputs)
    K = 0
    for of_one in J.values():
        rows = of_one.flatten(2)
        K = K + torch.einsum("idp,jep->ijde", rows, rows)
    return K


def method_2(f, params, inputs):
    """(N, N, D, D) K: for each pair of samples, D vectors back through one, forward through one."""
    def block(x_i, x_j):
        def output_i(params):
            return f(params, *x_i)

        def output_j(params):
            return f(params, *x_j)

        v, pull_back = vjp(output_j, params)

        def push(vector):
            return jvp(output_i, (params,), pull_back(vector))[1]

        unit = torch.eye(len(v), dtype=v.dtype, device=v.device)
        return vmap(push)(unit).T

    def row(x_i):
        def block_of(x_j):
            return block(x_i, x_j)

        return vmap(block_of)(inputs)

    return vmap(row)(inputs)


# --- The contest ----------------------------------------------------------------------------------

class Row(NamedTuple):
    """One line of the table: ours against another way, medians of the rounds."""

    what: str
    other: str
    ratio: float               # how many times faster we are
    seconds: float
    their_seconds: float
    bytes: float               # the peak, above what there was before
    their_bytes: float


def cost(work, device):
    """(seconds, bytes) of work(): the median of its calls in a second, and its peak memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return seconds_of(work, device), torch.cuda.max_memory_allocated() - before
    # On a CPU the peak is that of a process, so each work has a process of its own.
    mine, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=in_a_process, args=(work, device, theirs))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise RuntimeError("the benchmark's process ended early, most likely for want of memory")
    finally:
        process.join()


def seconds_of(work, device):
    """The first call warms up; it counts only if there is no time for a second one."""
    times = []
    while len(times) < 2 and sum(times) < 3 or sum(times) < LONG_ENOUGH:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


def in_a_process(work, device, pipe):
    # OpenMP's other threads do not outlive a fork, and whoever waits for them waits for ever.
    torch.set_num_threads(1)
    before = peak_memory()
    seconds = seconds_of(work, device)
    pipe.send((seconds, peak_memory() - before))


def peak_memory():
    """In bytes, of this process so far."""
    try:
        import resource
    except ImportError:
        raise SystemExit("on a CPU the memory can be measured on Linux and macOS only")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def contest_of_kernels(model, make, rounds, device, sizes=(4, 2)):
    """[Row] of K for a model and make(N), its inputs. Ours and theirs run in turns."""
    module, params = ntk.of_module(model)
    warm_up(model, make)

    def f(params, *one):
        return module(params, *one).flatten()

    rows = []
    for N, other in zip(sizes, (method_1, method_2)):
        x = make(N)

        def kernel():
            ntk.fast_ntk_blocks(model, x)

        def their_kernel():
            other(f, params, x)

        rows.append(in_turns(f"K, N = {N}", other.__name__, kernel, their_kernel, rounds, device))
    return rows


def contest_of_matrices(model, make, rounds, device, sizes=(8, 256)):
    """[Row] of M, with its proof and without."""
    module, params = ntk.of_module(model)
    warm_up(model, make)
    rows = []
    for N in sizes:
        x = make(N)
        r = torch.randn_like(model(*x)).detach()

        def matrix():
            ntk.fast_interaction_matrix(model, x, r)

        def unproved():
            ntk.fast_interaction_matrix(model, x, r, check=False)

        def by_gradients():
            ntk.interaction_matrix(module, params, x, r)

        for what, ours in ((f"M, N = {N}", matrix), (f"M, N = {N}, unproved", unproved)):
            rows.append(in_turns(what, "vmap(grad)", ours, by_gradients, rounds, device))
    return rows


def warm_up(model, make):
    """What torch loads at the first use of vmap, vjp and jvp takes seconds: before any clock."""
    x = make(2)
    r = torch.randn_like(model(*x)).detach()
    ntk.fast_interaction_matrix(model, x, r)
    ntk.interaction_matrix(*ntk.of_module(model), x, r)
    ntk.ntk_vector_product(*ntk.of_module(model), x, r)


def in_turns(what, other, ours, theirs, rounds, device):
    """The Row of two competitors."""
    runs = [(*cost(ours, device), *cost(theirs, device)) for _ in range(rounds)]
    ratio = statistics.median(slow / quick for quick, _, slow, _ in runs)
    seconds, peak, their_seconds, their_peak = map(statistics.median, zip(*runs))
    return Row(what, other, ratio, seconds, their_seconds, peak, their_peak)


# --- The table ------------------------------------------------------------------------------------

def contestants(device):
    """{name: (model, make)} with D = 768 outputs; make(N) gives N inputs. Seeded."""
    torch.manual_seed(0)

    def image(N):
        return (torch.randn(N, 3, 16, 16, device=device),)

    def image_and_caption(N):
        t = torch.rand(N, device=device)
        tokens = torch.randint(1, WORDS, (N, 12), device=device)
        return (*image(N), t, tokens)

    mlp = nn.Sequential(nn.Flatten(), nn.Linear(768, 128), nn.GELU(), nn.Linear(128, 768))
    found = {"MLP": (mlp, image),
             "DiT": (dit.DiT(WORDS, 16, 4, 64, 2), image_and_caption),
             "U-Net": (unet.UNet(WORDS, 16, (16, 24, 32), 32), image_and_caption)}
    for model, _ in found.values():
        for p in model.to(device).parameters():
            # Away from the zero start.
            p.data.add_(0.02 * torch.randn_like(p))
    return found


CONTESTS = {"K": contest_of_kernels, "M": contest_of_matrices}


# --- What bounds these times ----------------------------------------------------------------------

def operations_of_kernel(model, inputs):
    """The floating-point operations of the layers' shares of K: a multiplication is two."""
    batch = ntk._forward(model, inputs)
    N, D = len(batch.v), batch.v[0].numel()
    total = 0
    for name, layer in batch.layers.items():
        a, b = ntk._unit_factors(batch, [name], 64)[name]
        if a is not None and ntk._only_places(b) is not None:
            # Half of two products of matrices with N D rows and columns.
            total += N / 2 * D * D * (a.shape[-1] + b.shape[-1])
        else:
            total += min(ntk._multiplications(layer, N, D))
    return 2 * N * total


def operations_of_matrix(model, inputs):
    """The floating-point operations of the layers' shares of M."""
    batch = ntk._forward(model, inputs)
    N = len(batch.v)
    return 2 * N * sum(min(ntk._multiplications(layer, N, 1)) for layer in batch.layers.values())


def print_bounds(device):
    """What the layers' shares of K and of M cost, and what this device makes of such products."""
    print(f"torch {torch.__version__}, float32, D = 768, {device}")
    A = torch.randn(2048, 2048, device=device)

    def multiply():
        A @ A

    rate = 2 * 2048**3 / seconds_of(multiply, device)
    print(f"products of 2048 x 2048 matrices: {rate / 1e9:.0f} GFLOP/s")
    for name, (model, make) in contestants(device).items():
        x = make(256)
        of_K, of_M = operations_of_kernel(model, make(4)), operations_of_matrix(model, x)

        def forward_and_backward():
            torch.autograd.grad(model(*x).square().sum(), list(model.parameters()))

        passes = seconds_of(forward_and_backward, device)
        print(f"{name}: shares of K, N = 4: {of_K / 1e9:.1f} GFLOP, {of_K / rate:.2f} s at that "
              f"rate; of M, N = 256: {of_M / 1e9:.1f} GFLOP, {of_M / rate:.3f} s; forward and "
              f"backward pass, N = 256: {passes:.3f} s", flush=True)


def bench(rounds, names, contests):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    if "bounds" in contests:
        return print_bounds(device)
    place = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread"
    print(f"{place}, torch {torch.__version__}, float32, D = 768, {rounds} rounds in turns\n")
    print("| model (parameters) | what | against | times faster (median) | seconds | theirs "
          "| MB | theirs |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (model, make) in contestants(device).items():
        if name not in names:
            continue
        size = sum(p.numel() for p in model.parameters())
        for contest in contests:
            for row in CONTESTS[contest](model, make, rounds, device):
                print(f"| {name} ({size:,}) | {row.what} | {row.other} | {row.ratio:.1f} "
                      f"| {row.seconds:.3g} | {row.their_seconds:.3g} | {row.bytes / 2**20:.0f} "
                      f"| {row.their_bytes / 2**20:.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--models", nargs="+", default=["MLP", "DiT", "U-Net"],
                        choices=["MLP", "DiT", "U-Net"], help="which networks (default all)")
    parser.add_argument("--what", nargs="+", default=["K", "M"], choices=["K", "M", "bounds"],
                        help="the kernel, the interaction matrix, or both (default); or, alone, "
                             "what their times cannot go below")
    flags = parser.parse_args()
    bench(flags.rounds, flags.models, flags.what)
