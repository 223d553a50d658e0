"""A CUDA graph that is pretended: what is recorded is a list of operators, on the CPU.

It keeps what makes CUDA graphs hard. Launched again, every operator gets the numbers and the memory
that it got when it was recorded, and writes to the memory that it wrote to. To record computes
nothing: whatever it changed is put back. Before each launch, all memory that belongs to the graph
is spoiled, since another graph may have used it. What CUDA refuses to record is refused.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# Operators for which the host reads what the GPU has computed.
READING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"}


def tensors_in(tree):
    """Every tensor in nested lists and tuples, from left to right."""
    found = []
    for branch in tree if isinstance(tree, (list, tuple)) else [tree]:
        if isinstance(branch, torch.Tensor):
            found.append(branch)
        elif isinstance(branch, (list, tuple)):
            found += tensors_in(branch)
    return found


def memory(x):
    """The address of a tensor's memory; views of it have the same."""
    return x.untyped_storage()._cdata


def in_place_of(tree):
    """The same, with tensors that stay on their memory when the original ones move to other."""
    with torch._C.DisableTorchFunction():
        return tree_map_only(torch.Tensor, torch.Tensor.detach, tree)


def spoil(x):
    """Fills a tensor with what a right program does not read."""
    x.fill_(torch.nan if x.is_floating_point() else 99)


def changed_by(func, args, kwargs):
    """The tensors that an operator changes in place."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            found += tensors_in(given)
    return found


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.calls, self.generators, self.launches = [], [], 0
        self.own = {}                          # of the tensors that were made while recording

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        self.launches += 1
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for x in self.own.values():
                spoil(x)
            for func, args, kwargs, old in self.calls:
                new = func(*args, **kwargs)
                for there, computed in zip(tensors_in(old), tensors_in(new)):
                    if memory(there) != memory(computed):
                        there.copy_(computed)


class Recording(TorchDispatchMode):
    """Writes every operator into a graph, in the forward and in the backward pass."""

    def __init__(self, graph):
        super().__init__()
        self.graph, self.before = graph, {}
        self.states = [generator.get_state() for generator in graph.generators]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.refuse(func.name(), kwargs)
        inputs = {memory(x) for x in tensors_in([*args, *kwargs.values()])}
        given = in_place_of((args, kwargs))
        for x in changed_by(func, args, kwargs):
            if memory(x) not in self.graph.own:
                self.before.setdefault(memory(x), (x.detach(), x.detach().clone()))
        out = func(*args, **kwargs)
        there = in_place_of(out)
        for x in tensors_in(there):
            if memory(x) not in inputs:
                self.graph.own[memory(x)] = x
        self.graph.calls.append((func, *given, there))
        return out

    def refuse(self, name, kwargs):
        generator = kwargs.get("generator")
        if name in READING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        known = {generator._cdata for generator in self.graph.generators}
        if generator is not None and generator._cdata not in known:
            raise RuntimeError(f"a generator that the graph does not know is used by {name}")

    def put_back(self):
        """Leaves things as if nothing had been computed."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for x, before in self.before.values():
                x.copy_(before)
            for x in self.graph.own.values():
                spoil(x)
        for generator, state in zip(self.graph.generators, self.states):
            generator.set_state(state)


@contextlib.contextmanager
def record(graph, pool=None, stream=None):
    """In place of torch.cuda.graph."""
    recording = Recording(graph)
    try:
        with recording:
            yield
    finally:
        recording.put_back()


class Stream:
    """In place of torch.cuda.Stream: on a CPU there is one order of things."""

    def wait_stream(self, other):
        pass


def on_stream(stream):
    return contextlib.nullcontext()


def make_pool():
    return (0, 1)


# What stands in for what of torch.cuda.
IN_PLACE = {"CUDAGraph": Graph, "graph": record, "Stream": Stream, "stream": on_stream,
            "current_stream": Stream, "graph_pool_handle": make_pool}
