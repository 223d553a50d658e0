"""The exact kernel K beside the library neural-tangents (JAX, compiled), in turns.

JAX is no dependency of this project. It needs an environment of its own beside it:

    python -m venv jax && jax/bin/pip install neural-tangents==0.6.5 jax==0.4.25 jaxlib==0.4.25
    python results/bench_neural_tangents.py --jax jax/bin/python

Our networks are handed over as lists of torch's elementary operations with their weights. In JAX
each operation is one line, so both programs compute the same function; the outputs are compared
before anything is timed, and the kernels after it.
"""

import argparse
import pickle
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    # Not this folder first: its tabulate.py would hide a library of that name.
    sys.path[0] = str(ROOT)
N = 4
MODELS = ("MLP", "DiT", "U-Net")
WAYS = ("ntk_vector_products", "structured_derivatives")


# --- In our environment ---------------------------------------------------------------------------

def models_and_inputs():
    """{name: (model, inputs)}: the networks of results/bench_ntk.py, the same at each call."""
    from results import bench_ntk

    contestants = bench_ntk.contestants("cpu")
    return {name: (model, make(N)) for name, (model, make) in contestants.items()}


def as_text(value):
    """An argument of an operation: the name of a node in a tuple, a list, or a plain value."""
    import torch

    if isinstance(value, torch.fx.Node):
        return ("node", value.name)
    if isinstance(value, (list, tuple)):
        return [as_text(one) for one in value]
    if isinstance(value, (int, float, bool, type(None))):
        return value
    return str(value)


def hand_over(file):
    """Writes the operations, weights, inputs and kernels of all networks."""
    import torch
    from torch.func import functional_call
    from torch.fx.experimental.proxy_tensor import make_fx

    import ntk

    torch.set_num_threads(1)
    handed = {}
    for name, (model, inputs) in models_and_inputs().items():
        params = {which: p.detach() for which, p in model.named_parameters()}

        def call(params, *inputs):
            return functional_call(model, params, inputs)

        one = tuple(z[:1] for z in inputs)
        nodes = []
        for node in make_fx(call)(params, *one).graph.nodes:
            nodes.append((node.op, node.name, str(node.target), as_text(node.args)))
        handed[name] = {"nodes": nodes, "params": [p.numpy() for p in params.values()],
                        "inputs": [z.numpy() for z in inputs],
                        "v": model(*inputs).detach().numpy(),
                        "K": ntk.fast_ntk_blocks(model, inputs).numpy()}
    with open(file, "wb") as stream:
        pickle.dump(handed, stream)


def serve():
    """Times our K for each name that is read from the standard input."""
    import torch
    from results import bench_ntk

    import ntk

    torch.set_num_threads(1)
    known = models_and_inputs()
    for line in sys.stdin:
        model, inputs = known[line.strip()]

        def kernel():
            ntk.fast_ntk_blocks(model, inputs)

        print(bench_ntk.seconds_of(kernel, "cpu"), flush=True)


# --- In JAX's environment -------------------------------------------------------------------------

def operations():
    """{torch's operation: the same in JAX}. Those that only copy are left out."""
    import jax
    import jax.numpy as jnp

    def layer_norm(x, shape, weight, bias, eps):
        mean = x.mean(-1, keepdims=True)
        x = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
        # Torch's operation also gives the mean and the deviation, which nothing uses.
        return (x if weight is None else x * weight + bias), None, None

    def group_norm(x, weight, bias, count, channels, places, groups, eps):
        shape = x.shape
        x = x.reshape(count, groups, -1)
        mean = x.mean(-1, keepdims=True)
        x = (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
        return x.reshape(shape) * weight[:, None, None] + bias[:, None, None], None, None

    def convolution(x, weight, bias, stride, padding, *_):
        margin = [(p, p) for p in padding]
        y = jax.lax.conv_general_dilated(x, weight, stride, margin)
        return y + bias[:, None, None]

    def split(x, size, axis=0):
        return jnp.split(x, x.shape[axis] // size, axis)

    def pixel_unshuffle(x, p):
        count, channels, height, width = x.shape
        x = x.reshape(count, channels, height // p, p, width // p, p).transpose(0, 1, 3, 5, 2, 4)
        return x.reshape(count, channels * p * p, height // p, width // p)

    def pixel_shuffle(x, p):
        count, channels, height, width = x.shape
        x = x.reshape(count, channels // p**2, p, p, height, width).transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(count, channels // p**2, height * p, width * p)

    def twice_as_large(x, *_):
        return x.repeat(2, 2).repeat(2, 3)

    def reshape(x, shape):
        return x.reshape(shape)

    def linear(bias, x, weight):
        return x @ weight + bias

    return {
        "aten.embedding.default": lambda table, words, *_: table[words.astype(int)],
        "aten.arange.default": lambda end: jnp.arange(end, dtype=jnp.float32),
        "aten.mul.Tensor": lambda x, y: x * y, "aten.div.Tensor": lambda x, y: x / y,
        "aten.add.Tensor": lambda x, y: x + y, "aten.exp.default": jnp.exp,
        "aten.sin.default": jnp.sin, "aten.cos.default": jnp.cos,
        "aten.unsqueeze.default": jnp.expand_dims, "aten.cat.default": jnp.concatenate,
        "aten.native_layer_norm.default": layer_norm,
        "aten.native_group_norm.default": group_norm, "aten.convolution.default": convolution,
        "<built-in function getitem>": lambda x, k: x[k], "aten.view.default": reshape,
        "aten._unsafe_view.default": reshape, "aten.t.default": jnp.transpose,
        "aten.addmm.default": linear, "aten.mm.default": jnp.matmul,
        "aten.bmm.default": jnp.matmul, "aten.split.Tensor": split,
        "aten.transpose.int": jnp.swapaxes, "aten.expand.default": jnp.broadcast_to,
        "aten._softmax.default": lambda x, axis, _: jax.nn.softmax(x, axis),
        "aten.alias.default": lambda x: x, "aten.clone.default": lambda x: x,
        "aten.detach.default": lambda x: x,
        "aten.gelu.default": lambda x: jax.nn.gelu(x, approximate=False),
        "aten.mean.dim": lambda x, axes: x.mean(tuple(axes)), "aten.silu.default": jax.nn.silu,
        "aten.pixel_unshuffle.default": pixel_unshuffle, "aten.permute.default": jnp.transpose,
        "aten.pixel_shuffle.default": pixel_shuffle,
        "aten.upsample_nearest2d.default": twice_as_large,
    }


def in_jax(nodes, inputs):
    """f(params, rows) of the operations; a row holds all inputs of one sample in a line."""
    import jax

    known = operations()
    sizes = [z[0].size for z in inputs]

    def one_sample(params, rows):
        values, given, at = {}, list(params), 0
        for z, size in zip(inputs, sizes):
            given.append(rows[:, at:at + size].reshape(-1, *z.shape[1:]))
            at += size

        def value(argument):
            if isinstance(argument, tuple):
                return values[argument[1]]
            if isinstance(argument, list):
                return [value(one) for one in argument]
            return argument

        waiting = iter(given)
        for op, name, target, arguments in nodes:
            if op == "placeholder":
                values[name] = next(waiting)
            elif op == "output":
                v = value(arguments[0])
                v = v[0] if isinstance(v, list) else v
                return v.reshape(len(rows), -1)
            else:
                values[name] = known[target](*value(arguments))

    def f(params, rows):
        if len(rows) == 1:
            return one_sample(params, rows)
        return jax.vmap(lambda row: one_sample(params, row[None])[0])(rows)

    return f


def contest(file, python, rounds, models, ways):
    """Prints the table: neural-tangents' ways to K beside ours, in turns."""
    import jax
    import neural_tangents as nt
    import numpy

    ours = subprocess.Popen([python, __file__, "--serve"], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)
    with open(file, "rb") as stream:
        handed = pickle.load(stream)
    print(f"one CPU thread, float32, D = 768, N = {N}, jax {jax.__version__}, neural-tangents "
          f"{nt.__version__} compiled, {rounds} rounds in turns\n")
    print("| model | their way | we are times faster (median) | seconds | theirs | difference |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in models:
        given = handed[name]
        f = in_jax(given["nodes"], given["inputs"])
        rows = numpy.concatenate([z.reshape(N, -1) for z in given["inputs"]], 1)
        rows = rows.astype(numpy.float32)
        given["params"] = [jax.numpy.asarray(p) for p in given["params"]]
        v = numpy.concatenate([f(given["params"], rows[i:i + 1]) for i in range(N)])
        assert numpy.abs(v - given["v"].reshape(N, -1)).max() < 1e-4, f"{name} is not handed over"
        for way in ways:
            implementation = nt.NtkImplementation[way.upper()]
            kernel = jax.jit(nt.empirical_ntk_fn(f, trace_axes=(), vmap_axes=0,
                                                 implementation=implementation))

            def theirs():
                return kernel(rows, None, given["params"]).block_until_ready()

            K = numpy.asarray(theirs())        # compiles
            difference = numpy.abs(K - given["K"]).max() / numpy.abs(given["K"]).max()
            times = []
            for _ in range(rounds):
                ours.stdin.write(name + "\n")
                ours.stdin.flush()
                ours_took = float(ours.stdout.readline())
                start = time.perf_counter()
                theirs()
                times.append((ours_took, time.perf_counter() - start))
            ratio = statistics.median(slow / quick for quick, slow in times)
            quick, slow = map(statistics.median, zip(*times))
            print(f"| {name} | {way} | {ratio:.2f} | {quick:.3g} | {slow:.3g} "
                  f"| {difference:.0e} |", flush=True)
    ours.stdin.close()
    ours.wait()


def main(flags):
    if flags.serve:
        return serve()
    if flags.contest:
        return contest(flags.contest, flags.python, flags.rounds, flags.models, flags.ways)
    file = ROOT / "runs/neural_tangents.pickle"
    file.parent.mkdir(exist_ok=True)
    hand_over(file)
    subprocess.run([flags.jax, __file__, "--contest", str(file), "--python", sys.executable,
                    "--rounds", str(flags.rounds), "--models", *flags.models,
                    "--ways", *flags.ways], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jax", default="jax/bin/python", help="python of JAX's environment")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--python", default=sys.executable, help=argparse.SUPPRESS)
    parser.add_argument("--contest", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    main(parser.parse_args())
