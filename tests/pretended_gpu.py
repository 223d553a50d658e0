"""A GPU that is pretended: what a program makes with device="cuda" lies on the CPU, but is watched
as if it lay on a GPU. The numbers are real; so a program's whole course can be tried without one.

    with pretended_gpu() as gpu:
        run()                          # raises Mismatch where CUDA would raise
    print(gpu.waits)                   # the calls at which the host would wait for the GPU

It sees what passes through Python. What torch does inside a call is taken to be right.
"""

import contextlib
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

import pretended_graph

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

# Calls that may have tensors of both devices: copies, indices, and what autograd does inside.
MIXING = {"to", "cpu", "copy_", "__get__", "__set__", "__getitem__", "backward",
          "_has_compatible_shallow_copy_type"}

# Calls of which the host needs the answer: a number, or a size that depends on numbers.
READING = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "__contains__",
           "__repr__", "__format__", "equal", "allclose", "is_nonzero", "nonzero", "argwhere",
           "unique", "unique_consecutive", "masked_select", "bincount"}

# Calls that make a tensor of what lies in the host's memory.
FROM_HOST = {"tensor", "as_tensor", "asarray", "to", "cuda"}

# What torch.cuda answers.
ANSWERS = {"is_available": True, "device_count": 1, "current_device": 0,
           "get_device_name": "a pretended GPU", "get_device_capability": (9, 0),
           "is_current_stream_capturing": False, "synchronize": None, "empty_cache": None,
           "memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None}


class Mismatch(Exception):
    """What CUDA would refuse: tensors, an index or a generator on another device."""


RealGenerator = torch.Generator
real_autocast = torch.autocast
real_by_device = torch._C._group_tensors_by_device_and_dtype


class GpuGenerator(torch.Generator):
    """Random numbers of the CPU, for tensors that are said to lie on the GPU."""

    device = GPU


def make_generator(device="cpu"):
    on_gpu = torch.device(device).type == "cuda"
    return GpuGenerator() if on_gpu else RealGenerator()


def autocast_on_cpu(device, *more, **flags):
    return real_autocast("cpu", *more, **flags)


def tensors_in(tree):
    """Every tensor in nested lists, tuples and dictionaries, from left to right."""
    found = []
    for branch in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(branch, torch.Tensor):
            found.append(branch)
        elif isinstance(branch, (list, tuple, dict)):
            found += tensors_in(branch)
    return found


def storage(x):
    """The memory of a tensor; views of it have the same. vmap, jvp and vjp wrap it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.untyped_storage()


def is_a_device(name, key, value):
    """Whether an argument asks for a device. A text does so by its name, or as in x.to("cuda")."""
    named = isinstance(value, str) and (key == "device" or name == "to" and key == 1)
    return isinstance(value, torch.device) or named


def indices_in(args):
    """The indices of x[...], which are a tuple or a single one."""
    index = args[1]
    return index if isinstance(index, tuple) else (index,)


def is_mask(index):
    """Whether an index picks as many entries as it has True."""
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


class PretendedGpu(TorchFunctionMode):
    """Watches every call of torch. `waits` has the names of those for which the host waits."""

    def __init__(self):
        super().__init__()
        self.waits = []
        # What lies on the GPU, by address. The weak references keep an address from being given
        # to other memory.
        self.memory = {}

    def holds(self, x):
        return storage(x)._cdata in self.memory

    def take(self, x):
        memory = storage(x)
        self.memory[memory._cdata] = StorageWeakRef(memory)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            return self.attribute(func, args)
        inputs = tensors_in([args, kwargs])
        held = [self.holds(x) for x in inputs]
        if name == "_parse_to":            # where a module is to go; its tensors follow one by one
            device, *others = func(*args, **kwargs)
            return (GPU if any(held) else device, *others)
        args, kwargs, asked = self.asked_device(name, inputs, held, args, kwargs)
        if asked:
            gpu = asked.type == "cuda"
        elif name == "copy_":
            gpu = held[0]
        else:
            gpu = any(held)
        self.check(name, inputs, held, gpu, [*args, *kwargs.values()])
        if self.is_wait(name, inputs, held, gpu, args, kwargs):
            self.waits.append(name)

        out = func(*args, **kwargs)
        if asked and inputs and gpu != held[0] and storage(out)._cdata == storage(inputs[0])._cdata:
            out = out.clone()              # on another device it is another tensor
        if gpu:
            for x in tensors_in([out]):
                self.take(x)
        return out

    def attribute(self, func, args):
        """An attribute of a tensor, such as its shape. The host has it without waiting."""
        x, attribute = args[0], func.__self__.__name__
        if attribute in ("device", "is_cuda") and self.holds(x):
            return GPU if attribute == "device" else True
        value = func(*args)
        if isinstance(value, torch.Tensor) and self.holds(x):
            self.take(value)
        return value

    def asked_device(self, name, inputs, held, args, kwargs):
        """The arguments with the CPU in place of any device, and the device that was asked for."""
        asked = CPU if name == "cpu" else None
        places = list(args)
        for key, value in enumerate(places):
            if is_a_device(name, key, value):
                asked, places[key] = torch.device(value), CPU
        named = dict(kwargs)
        for key, value in named.items():
            if is_a_device(name, key, value):
                asked, named[key] = torch.device(value), CPU
        if name == "to" and asked is None and len(inputs) == 2:    # x.to(y)
            asked = GPU if held[1] else CPU
        return places, named, asked

    def check(self, name, inputs, held, gpu, arguments):
        """Raises Mismatch where CUDA would refuse the call."""
        for x in arguments:
            if isinstance(x, RealGenerator) and isinstance(x, GpuGenerator) != gpu:
                raise Mismatch(f"{name}: the generator is on another device than the numbers")
        if name in ("numpy", "__array__") and gpu:
            raise Mismatch(f"{name}: of a tensor on the GPU")
        if all(held) or not any(held):
            return
        # A single number of the CPU may meet tensors of the GPU.
        left = [tuple(x.shape) for x, on_gpu in zip(inputs, held) if not on_gpu and x.dim()]
        if left and name not in MIXING:
            raise Mismatch(f"{name}: tensors of the shapes {left} are on the CPU")
        if name == "__getitem__" and not held[0]:
            raise Mismatch(f"{name}: a tensor on the CPU, an index on the GPU")

    def is_wait(self, name, inputs, held, gpu, args, kwargs):
        """Whether the host waits for the GPU: it reads a number, or copies between the two."""
        if gpu and name in FROM_HOST and not (held and all(held)):
            return True                    # from host to device
        if not any(held):
            return False
        if not gpu or name in READING:
            return True                    # from device to host
        if not all(held) and any(x.dim() for x, there in zip(inputs, held) if not there):
            return True                    # an index or a source of a copy is on the CPU
        if name in ("__getitem__", "__setitem__"):
            return any(isinstance(index, list) or is_mask(index) for index in indices_in(args))
        if name == "where":
            return len(inputs) == 1 and len(args) == 1
        if name == "repeat_interleave":
            return len(inputs) > 1 and "output_size" not in kwargs
        return False


    def by_device(self, lists, with_indices=False):
        """In place of what torch asks when it groups tensors: the true devices are all CPUs."""
        groups = {}
        for (device, dtype), group in real_by_device(lists, with_indices).items():
            first = tensors_in(group)[0]
            groups[GPU if self.holds(first) else device, dtype] = group
        return groups


def answering(value):
    """A function with one answer, whatever it is asked."""
    def function(*_):
        return value
    return function


def unwatched(function):
    """The function, unseen by a PretendedGpu: it reads or writes a file, as any host does."""
    def quiet(*arguments, **named):
        with torch._C.DisableTorchFunction():
            return function(*arguments, **named)
    return quiet


@contextlib.contextmanager
def pretended_gpu():
    """Within, torch says that there is a GPU, and a PretendedGpu watches."""
    gpu = PretendedGpu()
    with contextlib.ExitStack() as stack:
        def put(where, name, value):
            stack.enter_context(patch.object(where, name, value))

        for name, value in ANSWERS.items():
            put(torch.cuda, name, answering(value))
        for name, value in pretended_graph.IN_PLACE.items():
            put(torch.cuda, name, value)
        put(torch.accelerator, "current_accelerator", lambda **_: None)
        put(torch, "Generator", make_generator)
        put(torch, "autocast", autocast_on_cpu)
        put(torch, "save", unwatched(torch.save))
        put(torch, "load", unwatched(torch.load))
        put(torch._C, "_group_tensors_by_device_and_dtype", gpu.by_device)
        yield stack.enter_context(gpu)
