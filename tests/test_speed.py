"""What makes training fast or small changes nothing that it computes: a step in several parts,
several processes, a compiled network, a step that is launched as one CUDA graph. That no step waits
for a GPU is in test_pretended.py.
"""

import contextlib
import functools
import os
import socket
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pretended_graph
import sga
import toy_data
import train
from pretended_gpu import tensors_in
from support import book, machine, report
from test_pretended import on_gpu

PIXELS = 8


def small(model="dit", **more):
    sizes = {"model": model, "pixels": PIXELS, "pretrain_steps": 2, "batch": 6}
    return train.Settings(**train.TINY | sizes | more)


def trained(s, steps):
    """The Run after a few steps, of both phases if there are enough."""
    run = train.Run(s)
    for _ in range(steps):
        if run.step == s.pretrain_steps:
            run.begin_finetuning()
        run.train_step()
    return run


def resumed(s, file):
    """A Run of these settings in the state of another."""
    run = train.Run(s)
    run.restore(torch.load(file))
    return run


# --- A step in parts ------------------------------------------------------------------------------

def gradient_in(model):
    """The gradient that lies in a network's weights, as one vector."""
    weights = [p for p in model.parameters() if p.grad is not None]
    return torch.cat([p.grad.flatten() for p in weights])


def gradient(s, file):
    """The gradient of the next step of a run."""
    run = resumed(s, file)
    run.train_step()
    return gradient_in(run.model)


# The last step is one of the pretraining, or one of the fine-tuning.
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("model", ["dit", "unet"])
def test_a_step_in_parts_is_the_same_step(tmp_path, model, steps):
    file = str(tmp_path / "start.pt")
    trained(small(model), steps).save(file)
    whole = gradient(small(model), file)
    parts = gradient(small(model, chunk=4), file)
    twin = gradient(small(model, caption_dropout=1.0), file)
    precision = 100 * torch.finfo(torch.float32).eps
    assert (whole - parts).norm() < precision * whole.norm()
    assert (whole - twin).norm() > 100 * precision * whole.norm()


def test_a_batch_is_cut_into_parts_of_at_most_so_many_samples():
    batch = [torch.arange(7) + 10 * k for k in range(5)]
    parts = machine.in_chunks(*batch, 3)
    assert [len(a) for _, a in parts] == [3, 3, 1]
    for k in range(4):
        assert torch.equal(torch.cat([inputs[k] for inputs, _ in parts]), batch[k])


# --- A compiled network ---------------------------------------------------------------------------

@pytest.fixture
def compiler(monkeypatch):
    """A stand-in for torch.compile that computes what Python would; what it was given."""
    given = []

    def compile(network):
        given.append(network)
        return lambda *inputs: network(*inputs)

    monkeypatch.setattr(machine, "what_compiling_lacks", lambda device: "")
    monkeypatch.setattr(torch, "compile", compile)
    return given


def test_a_compiled_network_trains_the_same_weights_from_a_restored_state(tmp_path, compiler):
    s, file = small(compile=1), str(tmp_path / "checkpoint.pt")
    plain = trained(small(), 2)
    plain.save(file)
    run = resumed(s, file)
    run.use(machine.compiled(run.model, s))
    assert compiler == [run.model]
    for one in (plain, run):
        one.begin_finetuning()
        one.train_step()
    pairs = zip(plain.model.parameters(), run.model.parameters())
    assert all(torch.equal(a, b) for a, b in pairs)
    # No name of a wrapper gets into a checkpoint.
    assert set(run.model.state_dict()) == set(train.build(s).state_dict())


def test_only_a_run_that_asks_for_it_is_compiled(compiler, capsys):
    run = train.Run(small())
    assert machine.compiled(run.model, run.settings) is run.model
    assert compiler == [] and capsys.readouterr().out == ""


def test_without_a_compiler_it_trains_uncompiled_and_says_so_once(monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    run = train.Run(small(compile=1))
    assert machine.compiled(run.model, run.settings) is run.model
    [said] = capsys.readouterr().out.splitlines()
    assert "a C compiler" in said and "uncompiled" in said


def said_while_compiling(s, capsys):
    capsys.readouterr()
    machine.compiled(torch.nn.Linear(1, 1), s)
    return capsys.readouterr().out


def test_it_says_when_it_compiles(compiler, capsys):
    same_size = {"compile": 1, "batch": 6, "tuples": 2}
    assert "the first step takes" in said_while_compiling(small(**same_size), capsys)
    for change in ({"batch": 5}, {"smallest_object": 0.24}, {"rank": 1}):
        said = said_while_compiling(small(**same_size | change), capsys)
        assert "the first step of each phase takes" in said, change


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_both_phases_of_the_preset_gpu_have_batches_of_one_size(model):
    smaller = {"model": model, "device": "cpu", "width": 24, "finetune_steps": 20}

    def sizes(**more):
        run = train.Run(train.Settings(**train.PRESETS["gpu", model] | smaller | more))
        return {run.settings.batch} | {len(views) for views, _ in run.plan}

    assert len(sizes()) == 1
    assert len(sizes(smallest_object=0.24)) > 1


# --- A step as one launch -------------------------------------------------------------------------
#
# The graph is pretended (pretended_graph.py), and so is the GPU: all numbers are those of a CPU.

# Steps of two or three views, in a changing order.
VARYING = {"pretrain_steps": 3, "finetune_steps": 8, "tuples": 1, "smallest_object": 0.24,
           "every": 4}
LAUNCHED = {
    "the DiT": {},
    "the U-Net": {"model": "unet", "finetune_steps": 6},
    "in parts, in bfloat16": {"precision": "bfloat16", "chunk": 3},
    "with adapters, and offsets at random": {"rank": 2, "arm": "global"},
    "with offsets that are measured anew": {"arm": "measured", "smallest_object": 0.0},
    "planned again before the fine-tuning": {"arm": "quiet"},
    "scenes, then views with Min-SNR weights": {"pretrain_views": "macro", "arm": "min_snr"}}


def go_on(run):
    """Both phases, or what is left of them, as train.train makes them. The norms of the steps."""
    s, norms = run.settings, []
    while run.step < run.last:
        if run.step == s.pretrain_steps:
            run.begin_finetuning()
        if run.arm.measured and run.step >= s.pretrain_steps and run.row_is_due():
            run.offsets = report.measured_offsets(run)
        norms.append(run.train_step().item())
    return norms


@functools.cache
def plain_course(**more):
    """(run, norms) on the CPU, where every step is an ordinary one. Nobody changes the run."""
    run = train.Run(small(**VARYING | more))
    return run, go_on(run)


@functools.cache
def launched_course(file=None, **more):
    """(run, norms) on the pretended GPU, by CUDA graphs; from the state in a file, if there is."""
    with on_gpu():
        s = small(**{"device": "cuda", "graph": 1} | VARYING | more)
        run = resumed(s, file) if file else train.Run(s)
        return run, go_on(run)


def differences(run, other):
    """What is not the same, bit for bit, after two courses."""
    found = [name for name in book.STATES if not same(run, other, name)]
    if not torch.equal(run.generator.get_state(), other.generator.get_state()):
        found.append("generator")
    if not torch.equal(run.loss, other.loss):
        found.append("loss")
    return found


def same(run, other, name):
    ours = tensors_in([getattr(run, name).state_dict()])
    theirs = tensors_in([getattr(other, name).state_dict()])
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def launches(run):
    return [one.graph.launches for one in run.graphs.recorded.values() if one]


@pytest.mark.parametrize("case", LAUNCHED)
def test_a_course_by_cuda_graphs_is_the_plain_course_bit_for_bit(case):
    plain, norms = plain_course(**LAUNCHED[case])
    run, their_norms = launched_course(**LAUNCHED[case])
    assert norms == their_norms and differences(plain, run) == []
    # Of each kind all steps but the first one are launches, in both phases.
    assert sum(launches(run)) == len(norms) - len(run.graphs.recorded)
    phases = {views > 0 for (views, _), one in run.graphs.recorded.items() if one}
    assert phases == {False, True}


def test_the_steps_of_that_course_have_several_sizes():
    run, _ = launched_course()
    sizes = [views for views, _ in run.graphs.recorded]
    assert set(sizes) == {0, 2, 3}             # the pretraining has no plan
    assert min(launches(run)) >= 2


def test_a_course_by_cuda_graphs_is_resumed_in_the_middle(tmp_path, step=7):
    plain, norms = plain_course()
    file = str(tmp_path / "checkpoint.pt")
    with on_gpu():
        run = train.Run(small(device="cuda", graph=1, **VARYING))
        run.last, last = step, run.last
        go_on(run)
        run.save(file)
        run.last = last
        rest = go_on(run)
    assert rest == norms[step:] and differences(plain, run) == []
    for graph in (0, 1):                       # by ordinary steps, or by graphs again
        run, rest = launched_course(file, graph=graph)
        assert rest == norms[step:] and differences(plain, run) == []


# --- Planted mistakes -----------------------------------------------------------------------------

launch, kind_of = machine.launch, machine.kind_of
back_propagate = train.Run.back_propagate


def plan_is_not_copied(put):
    put(machine, "launch", lambda recorded, run, planned: launch(recorded, run, []))


def gradients_are_of_another_graph(put):
    def planted(recorded, run, planned):
        return launch(recorded._replace(gradients=[]), run, planned)
    put(machine, "launch", planted)


def results_are_read_before_the_launch(put):
    def planted(recorded, run, planned):
        norm = recorded.results[3].clone()
        *others, _ = launch(recorded, run, planned)
        return *others, norm
    put(machine, "launch", planted)


def offsets_stay(put):
    put(machine, "kind_of", lambda run, planned: (kind_of(run, planned)[0], ()))


def phases_are_one_kind(put):
    put(machine, "kind_of", lambda run, planned: "a step")


def step_of_the_plan_stays(put):
    """The plan is read inside, at the step that was recorded."""
    def planted(run, step, planned=None):
        return back_propagate(run, step)
    put(train.Run, "back_propagate", planted)


def weights_of_the_network_are_replaced(put):
    """Other memory in every step, which no graph reads."""
    def planted(ema, model, decay):
        average(ema, model, decay)
        for weight in model.parameters():
            weight.data = weight.data.clone()

    average = machine.average
    put(machine, "average", planted)


FORGOTTEN = [(plan_is_not_copied, {}), (gradients_are_of_another_graph, {}),
             (results_are_read_before_the_launch, {}), (step_of_the_plan_stays, {}),
             (offsets_stay, LAUNCHED["with offsets that are measured anew"]),
             (phases_are_one_kind, {"smallest_object": 0.0, "arm": "baseline"}),
             (weights_of_the_network_are_replaced, {})]


@pytest.mark.parametrize("plant, more", FORGOTTEN)
def test_what_is_forgotten_between_two_launches_is_noticed(monkeypatch, plant, more):
    plain, norms = plain_course(**more)
    plant(monkeypatch.setattr)
    run, their_norms = launched_course.__wrapped__(**more)
    assert launches(run)
    assert norms != their_norms or differences(plain, run) != []


@pytest.mark.parametrize("changes", [True, False])
def test_a_learning_rate_within_a_graph_stays_as_it_was_recorded(monkeypatch, changes):
    """That is why the update is outside. With one learning rate for all steps it may be inside."""
    def with_update(run, step, planned=None):
        results = back_propagate(run, step, planned)
        rate = 1e-3 * step if changes else 1e-3
        with torch.no_grad():
            for weight in run.model.parameters():
                weight -= rate * weight.grad
        return results

    monkeypatch.setattr(train.Run, "back_propagate", with_update)
    plain, _ = plain_course.__wrapped__()
    run, _ = launched_course.__wrapped__()
    assert launches(run)
    assert (differences(plain, run) != []) == changes


# --- Where no graph can be made -------------------------------------------------------------------

def generator_is_not_known(put):
    put(pretended_graph.Graph, "register_generator_state", lambda graph, generator: None)


def number_is_read_in_a_step(put):
    def planted(*arguments):
        results = back_propagate(*arguments)
        assert results[2].item() > 0
        return results
    put(train.Run, "back_propagate", planted)


@pytest.mark.parametrize("plant", [generator_is_not_known, number_is_read_in_a_step])
def test_where_no_graph_can_be_made_it_says_so_once_and_goes_on(monkeypatch, capsys, plant):
    plain, norms = plain_course()
    plant(monkeypatch.setattr)
    run, their_norms = launched_course.__wrapped__()
    [said] = capsys.readouterr().out.splitlines()
    assert "no CUDA graph could be made (" in said and "--graph 0" in said
    assert run.graphs is None
    assert norms == their_norms and differences(plain, run) == []


def test_steps_are_ordinary_without_a_gpu_with_several_or_if_they_are_to_be(monkeypatch):
    assert train.Run(small(graph=1)).graphs is None
    with on_gpu():
        assert train.Run(small(device="cuda")).graphs is None
        assert train.Run(small(device="cuda", graph=1)).graphs is not None
        monkeypatch.setattr(machine, "processes", lambda: 2)
        assert train.Run(small(device="cuda", graph=1)).graphs is None


class Counting(TorchDispatchMode):
    """Counts operators: about the kernels that a host launches one by one."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_a_launched_step_leaves_little_to_the_host(monkeypatch, model):
    counts = []
    with on_gpu():
        run = train.Run(small(model, device="cuda", graph=1, pretrain_steps=4))
        for step in range(3):
            if step == 2:                      # the GPU's own work is not the host's
                monkeypatch.setattr(pretended_graph.Graph, "replay", lambda graph: None)
            with Counting() as counting:
                run.train_step()
            counts.append(counting.number)
    ordinary, _, launched = counts
    assert launched < ordinary / 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", LAUNCHED)
def test_on_a_gpu_a_course_by_cuda_graphs_is_the_plain_course(case):
    """Kernels that add in a changing order round differently, and steps carry that on."""
    courses = []
    for graph in (0, 1):
        s = small(**VARYING | LAUNCHED[case] | {"device": "cuda", "graph": graph})
        run = train.Run(s)
        courses.append(go_on(run))
    assert run.graphs is not None              # nothing was given up
    assert courses[1] == pytest.approx(courses[0], rel=1e-2)


# --- The clock ------------------------------------------------------------------------------------

def rows_of_a_slow_beginning(tmp_path, monkeypatch, **more):
    """The rows and seconds of a run whose first step of each phase takes 100 s, and others 1 s."""
    now, train_step = [0.0], train.Run.train_step
    s = small(batch=6, pretrain_steps=4, finetune_steps=4, **more)

    def slow(run):
        norm = train_step(run)
        _, number = train.phase_of(s, run.step)
        now[0] += 100 if number == 1 else 1
        return norm

    monkeypatch.setattr(train.Run, "train_step", slow)
    monkeypatch.setattr(report, "time", types.SimpleNamespace(time=lambda: now[0]))
    run = train.Run(s)
    train.train(run, str(tmp_path))
    return [row["images_per_s"] for row in run.log], run.seconds


def test_images_per_second_leave_out_the_first_step_of_each_phase(tmp_path, monkeypatch):
    speeds, seconds = rows_of_a_slow_beginning(tmp_path, monkeypatch, every=2)
    assert speeds == [6, 6, 6, 6] and seconds == 206
    monkeypatch.setattr(report.Recorder, "pass_over", nothing)
    with monkeypatch.context() as again:
        speeds, seconds = rows_of_a_slow_beginning(tmp_path, again, every=2)
    assert speeds[0] < 1 < speeds[1] and seconds == 206            # the twin


def test_a_row_after_every_step_has_a_speed(tmp_path, monkeypatch):
    speeds, seconds = rows_of_a_slow_beginning(tmp_path, monkeypatch, every=1)
    assert speeds[:3] == [0.06, 6, 6] and seconds == 206


def test_a_line_of_progress_comes_long_before_the_first_row(tmp_path, monkeypatch, capsys):
    """Each phase has one, a few steps after its first. No row and no time comes of it."""
    monkeypatch.setattr(report, "EARLY", 1)
    speeds, seconds = rows_of_a_slow_beginning(tmp_path, monkeypatch, every=9)
    lines = [line for line in capsys.readouterr().out.splitlines() if "images/s" in line]
    steps = [line.split("loss")[0].strip() for line in lines]
    assert steps == ["pretrain step 2/8", "pretrain step 4/8", "finetune step 6/8",
                     "finetune step 8/8"]
    assert lines[0].endswith("6 images/s  0:06 left")
    assert speeds == [6, 6] and seconds == 206


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_torch_compile_takes_the_network_in_one_piece(model):
    """torch's own tracing of the code; its code generator takes minutes on a CPU."""
    s = small(model)
    network = train.build(s)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.05)                    # away from a head of 0
    x = torch.randn(2, 3, PIXELS, PIXELS)
    inputs = (x, torch.rand(2), torch.ones(2, 12, dtype=torch.long))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), network(*inputs))


# --- Several processes ----------------------------------------------------------------------------

FLAGS = ["--preset", "tiny", "--device", "cpu", "--pixels", PIXELS, "--pretrain_steps", 4,
         "--eval_images", 2, "--sample_steps", 1, "--chunk", 2, "--smallest_object", 0.24]


def nothing(*_):
    pass


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def one_of_two(rank, port, flags, printed):
    """The work of a process of its own, which is told what torchrun tells each of two."""
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    report.draw_all = nothing
    with open(printed, "w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
        train.main(flags)


def test_two_processes_have_the_loss_curve_of_one(tmp_path, monkeypatch, processes):
    """The same seed and batches, with tuples of two and of three views.

    That torchrun itself can start the program is seen in test_train.py.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    flags, port = [str(flag) for flag in FLAGS], free_port()
    both = []
    for rank in (0, 1):
        work = (rank, port, [*flags, "--out", str(two)], tmp_path / f"printed-{rank}")
        both.append(processes.start(one_of_two, *work))
    # One that fails leaves the other waiting, until that is killed.
    assert [processes.status_of(process) for process in both] == [0, 0]
    assert (two / "report.json").exists()
    # Of the two processes the first alone speaks.
    said, more = ((tmp_path / f"printed-{rank}").read_text(encoding="utf-8") for rank in (0, 1))
    assert said.count("fine-tuning: arm") == said.count("step 2/8") == 1
    assert more == ""

    monkeypatch.setattr(report, "report", nothing)
    train.main([*flags, "--out", str(one)])
    ours, theirs = book.read_log(one), book.read_log(two)
    for log in (ours, theirs):
        assert [row["step"] for row in log] == ["2", "4", "6", "8"]
    for a, b in zip(ours, theirs):
        for name in ("loss", "grad_norm", "val_loss_macro", "val_error_micro"):
            same = a[name] == b[name] == ""
            assert same or float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), name


def test_the_shares_of_two_processes_are_the_step_of_one(monkeypatch):
    """The mean of their gradients, as DistributedDataParallel makes it; by hand, in one process."""
    run = train.Run(small(batch=5))
    batch = train.draw_batch(run, 1)

    def gradient_of(x0, e, t, tokens, a):
        run.optimizer.zero_grad()
        loss = (a * train.fm.loss(run.model, x0, e, t, tokens)).sum()
        loss.backward()
        return gradient_in(run.model)

    def share(rank):
        monkeypatch.setattr(machine, "processes", lambda: 2)
        monkeypatch.setattr(machine, "rank", lambda: rank)
        return machine.my_share(*batch)

    whole = gradient_of(*batch)
    shares = [share(rank) for rank in (0, 1)]
    assert sorted(len(a) for *_, a in shares) == [2, 3]
    mean = (gradient_of(*shares[0]) + gradient_of(*shares[1])) / 2
    precision = 100 * torch.finfo(torch.float32).eps
    assert (mean - whole).norm() < precision * whole.norm()
    assert (gradient_of(*shares[0]) - whole).norm() > 100 * precision * whole.norm()


class Exchanging(torch.nn.Linear):
    """Notes at each backward pass whether DistributedDataParallel would exchange gradients."""

    def __init__(self):
        super().__init__(2, 1)
        self.quiet, self.exchanged = False, []
        self.weight.register_hook(self.note)

    def note(self, gradient):
        self.exchanged.append(not self.quiet)

    @contextlib.contextmanager
    def no_sync(self):
        self.quiet = True
        yield
        self.quiet = False


def test_gradients_are_exchanged_once_a_step(monkeypatch):
    monkeypatch.setattr(machine, "processes", lambda: 2)
    network = Exchanging()
    a = torch.ones(2) / 6
    parts = [((torch.randn(2, 2),), a) for _ in range(3)]

    def losses(x):
        return network(x).square()[:, 0]

    sga.deferred_backward(losses, parts, lambda: machine.without_exchange(network))
    assert network.exchanged == [False, False, True]
    network.exchanged.clear()
    sga.deferred_backward(losses, parts)                           # the twin without it
    assert network.exchanged == [True, True, True]


def test_a_step_of_a_run_exchanges_once(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def without_exchange(network):
        entered.append(network)
        yield

    monkeypatch.setattr(machine, "without_exchange", without_exchange)
    run = train.Run(small(chunk=2))
    run.train_step()
    assert entered == [run.network] * 2                            # of three parts, all but one
