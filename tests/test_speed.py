"""What makes training fast or small changes nothing that it computes: a step in several parts,
several processes, a compiled network. That no step waits for a GPU is in test_pretended.py.
"""

import contextlib
import os
import socket

import pytest
import torch

import sga
import toy_data
import train
from support import book, machine, report

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
