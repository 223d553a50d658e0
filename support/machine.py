"""How the machine is used: random numbers, precision, memory, interrupts, several processes.

None of this changes the method. Without a GPU, torchrun, torch.compile or bfloat16 the network and
its batches pass through unchanged, and a CUDA graph repeats a step without changing a number of it.
"""

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import signal
import threading
from typing import NamedTuple

import torch
import torch.distributed as dist


def seeded(s, stream):
    """A generator for one use, its `stream` (0 to 9), so that no use disturbs another.

    Stream 0 trains, and draws in `train.py sample`. 1 picks roots, 2 and 3 validate, 3 also makes
    the noise of the probe, 4 and 5 evaluate, 6 to 9 draw. (sga.plan begins from the same numbers
    as the streams 1 and 2 of a CPU.)
    """
    return torch.Generator(s.device).manual_seed(10 * s.seed + stream)


# --- Precision ------------------------------------------------------------------------------------

def in_precision(network, s):
    """The network as a function of (x, t, tokens) that computes in the settings' precision."""
    def velocity(x, t, tokens):
        with torch.autocast(s.device, torch.bfloat16, enabled=s.precision == "bfloat16"):
            return network(x, t, tokens)
    return velocity


def full_precision():
    """Products and convolutions of float32 keep its 23 bits, as all that is measured needs."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


@contextlib.contextmanager
def tensor_cores():
    """Within, a GPU may multiply float32 with 10 bits (TF32): faster, and good enough to train."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        full_precision()


# --- Compiling ------------------------------------------------------------------------------------

def suited(s):
    """The settings, without what this machine cannot do for a new run; says so in one sentence."""
    has_gpu = s.device == "cuda" and torch.cuda.is_available()
    old = has_gpu and torch.cuda.get_device_capability() < (8, 0)
    if old and (s.compile or s.precision == "bfloat16"):
        print("train.py: this GPU is older than capability 8.0, so the run is in float32 and is "
              "not compiled", flush=True)
        return dataclasses.replace(s, compile=0, precision="float32")
    return s


def compiled(network, s):
    """The network, through torch.compile where the settings ask for it and the machine can."""
    lacking = what_compiling_lacks(s.device) if s.compile else ""
    if lacking:
        print(f"train.py: torch.compile needs {lacking}, which is not here, so that the network "
              "is trained uncompiled", flush=True)
    if not s.compile or lacking:
        return network
    if rank() == 0:
        # Inputs of another shape, and adapters, are compiled anew.
        once = s.batch == 3 * s.tuples and not (s.smallest_object or s.rank)
        when = "the first step" if once else "the first step of each phase"
        print(f"compiling: {when} takes a while", flush=True)
    return torch.compile(network)


def what_compiling_lacks(device):
    """What torch.compile needs and does not find on this machine; "" if there is everything."""
    compilers = (os.environ.get("CC"), os.environ.get("CXX"), "gcc", "g++", "clang", "clang++")
    if not any(shutil.which(name) for name in compilers if name):
        return "a C compiler"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton"
    return ""


# --- A step as one launch (--graph): a reader may skip this part ----------------------------------
#
# The forward and the backward pass of a step are a thousand short kernels. A host that launches
# them one by one needs longer than the GPU that runs them. A CUDA graph is a record of launches,
# which are then launched together. It repeats them as they were: the same kernels, with the same
# numbers, on the same memory. A number that the host changes, and a tensor that it replaces, would
# therefore stay as they were. In Run.back_propagate the host decides these things anew:
#     the views and weights of the plan       they are copied to where the graph reads them
#     how many views a step has, the offsets  a step where they differ has a graph of its own
# What else changes is on the GPU: the weights are changed in place, and the generator, which the
# graph knows, goes on with each launch. The update of the weights stays outside. It has few
# launches, and numbers that change: the learning rate, the averaging, the number of the step.

def may_repeat(s):
    """Whether a run's steps are launched as CUDA graphs: on one GPU, where it is asked for."""
    return bool(s.graph) and s.device == "cuda" and processes() == 1


class Recorded(NamedTuple):
    """A step's CUDA graph, and the memory that it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    planned: list              # views (n,) and weights (n,) of the plan; [] in the pretraining
    results: tuple             # what Run.back_propagate returns
    gradients: list            # of every weight of the model


class Graphs:
    """Run.back_propagate by CUDA graphs, one for each kind of step.

    The first step of a kind is an ordinary one: it copies tables to the GPU and lets libraries
    choose their kernels, which no graph can record. The second one is recorded.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()      # no graph can be recorded on the usual one
        # One pool of memory for all: of a launch nothing is needed once the next one begins.
        self.pool = torch.cuda.graph_pool_handle()
        self.recorded = {}

    def back_propagate(self, run):
        """As Run.back_propagate, for the run's step. The next step overwrites what it returns."""
        planned = []
        if run.step > run.settings.pretrain_steps:
            planned = run.plan[run.step - run.settings.pretrain_steps - 1]
        kind = kind_of(run, planned)
        if kind not in self.recorded:
            self.recorded[kind] = None
            return self.ordinary(run)
        if self.recorded[kind] is None:
            try:
                self.recorded[kind] = self.record(run, planned)
            except RuntimeError as error:
                return give_up(run, error)
        return launch(self.recorded[kind], run, planned)

    def ordinary(self, run):
        """An ordinary step, on the stream that will be recorded: what it prepares is there."""
        usual = torch.cuda.current_stream()
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            results = run.back_propagate(run.step)
        usual.wait_stream(self.stream)
        return results

    def record(self, run, planned):
        """Records a step. Nothing is computed, and no random number is used up."""
        planned = [x.clone() for x in planned]
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(run.generator)
        # The outer context puts the usual stream back even if the recording fails.
        with torch.cuda.stream(self.stream), torch.cuda.graph(graph, self.pool, self.stream):
            results = run.back_propagate(run.step, planned)
        gradients = [weight.grad for weight in run.model.parameters()]
        return Recorded(graph, planned, results, gradients)


def kind_of(run, planned):
    """What the host decides for a step, but for the entries of what is planned."""
    views = len(planned[0]) if planned else 0
    return views, tuple(run.offsets)


def launch(recorded, run, planned):
    """Repeats a recorded step, with the views and weights of the plan that are given."""
    for there, now in zip(recorded.planned, planned):
        there.copy_(now)
    recorded.graph.replay()
    # The optimizer must find this graph's gradients, not those of the step before.
    for weight, gradient in zip(run.model.parameters(), recorded.gradients):
        weight.grad = gradient
    return recorded.results


def give_up(run, error):
    """Says why a step could not be recorded, and makes it and all that follow ordinary steps."""
    cause = str(error.__context__ or error).splitlines()[0]
    print(f"train.py: no CUDA graph could be made ({cause}), so that steps are launched kernel by "
          "kernel, as with --graph 0", flush=True)
    run.graphs = None
    # A generator that was to be recorded may refuse any other use. Nothing was taken from it.
    generator = torch.Generator(run.settings.device)
    generator.set_state(run.generator.get_state())
    run.generator = generator
    return run.back_propagate(run.step)


# --- Memory ---------------------------------------------------------------------------------------

def in_chunks(x0, e, t, tokens, a, size):
    """A batch as a list of sub-batches ((x0, e, t, tokens), a) of at most `size` samples each."""
    chunks = []
    for start in range(0, len(a), size):
        some = slice(start, start + size)
        chunks.append(((x0[some], e[some], t[some], tokens[some]), a[some]))
    return chunks


# --- Averaged weights -----------------------------------------------------------------------------

@torch.no_grad()
def average(ema, model, decay):
    """Moves ema, the exponential mean of the weights, by a share 1 - decay towards the model's."""
    weights = list(model.parameters())
    torch._foreach_lerp_(list(ema.parameters()), weights, 1 - decay)


# --- Interrupts -----------------------------------------------------------------------------------

@contextlib.contextmanager
def finishing_the_step():
    """Within, Ctrl-C stops nothing at once. It fills the list, which a loop reads after a step.

    A second Ctrl-C does not wait for the step. Torchrun stops its processes in its own way, and
    only the main thread hears of Ctrl-C.
    """
    interrupts = []
    if processes() > 1 or threading.current_thread() is not threading.main_thread():
        yield interrupts
        return

    def note(*_):
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(True)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)


# --- Several processes, started by torchrun -------------------------------------------------------
#
# Every process samples the whole batch with the same random numbers and trains on its share of it.
# Gradients are averaged, so that together they make the step that one process would make.

def started_by_torchrun():
    """Whether the environment says what torchrun says. Other programs set RANK alone."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def join_the_others(device):
    """Called once at the start. Does nothing unless torchrun started this process."""
    if not started_by_torchrun() or dist.is_initialized():
        return
    if device == "cuda":
        if not torch.cuda.is_available():
            return                             # build() refuses this in one sentence
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        how = {"backend": "nccl", "device_id": own}
    else:
        how = {"backend": "gloo"}
    try:
        dist.init_process_group(**how)
    except (ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        stop(f"the processes do not find each other ({why}); torchrun starts them")


@contextlib.contextmanager
def leaving_the_others():
    """At its end, however it comes, this process belongs to no group any more."""
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def processes():
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number, from 0. Only process 0 measures, writes and speaks."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if started_by_torchrun() else 0


def stop(sentence):
    """Ends the program with one sentence for its user. Of several processes the first speaks."""
    raise SystemExit(f"train.py: {sentence}" if rank() == 0 else 1)


def lost_the_others(error):
    """Whether an error says that another process has ended: in gloo's or NCCL's wording."""
    wordings = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return dist.is_initialized() and any(wording in str(error) for wording in wordings)


def check_shares(run):
    """Stops if a step that is left has fewer images than there are processes."""
    s = run.settings
    sizes = [len(views) for views, _ in run.plan]
    if run.step < s.pretrain_steps:
        sizes.append(s.batch)
    if sizes and min(sizes) < processes():
        stop(f"a step of {min(sizes)} images has none for some of the {processes()} processes: "
             "start fewer of them, or set a larger --batch or --tuples")


def wait_for_the_others():
    if processes() > 1:
        dist.barrier()


def my_share(x0, e, t, tokens, a):
    """This process's samples of a batch; their weights a make up for the averaging of gradients."""
    count = processes()
    mine = slice(rank(), None, count) if count > 1 else slice(None)
    return x0[mine], e[mine], t[mine], tokens[mine], count * a[mine]


def together(model):
    """The model, or one that averages its gradients with those of the other processes."""
    if processes() == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(model)


def without_exchange(network):
    """Within, backward passes only add up their gradients, to be exchanged by a later one."""
    if processes() == 1:
        return contextlib.nullcontext()
    return network.no_sync()


def mean_of_all(x):
    """The mean of a number over the processes."""
    if processes() > 1:
        dist.all_reduce(x)
        x = x / processes()
    return x


def largest_of_all(x):
    """The largest value over the processes, entry by entry."""
    if processes() > 1:
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x
