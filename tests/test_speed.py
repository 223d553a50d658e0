"""What makes training fast changes nothing that it computes: several processes, parts of a batch, a compiled network; and no step waits."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train

ROOT = Path(__file__).parent.parent


def small(model="dit", **more):
    return train.Settings(**train.PRESETS["tiny", model] | {"model": model, "pretrain_steps": 2, "batch": 6} | more)


def trained(s, steps=4):
    """The Run after a few steps over both phases."""
    run, plan = train.Run(s), train.make_plan(s)
    for _ in range(steps):
        if run.step == s.pretrain_steps:
            run.begin_finetuning()
        run.train_step(plan)
    return run


def gradient(s, start, file):
    """The gradient of the next step of a run in the state of another."""
    start.save(file)
    run = train.Run(s)
    run.restore(train.load(file)[1])
    run.train_step(train.make_plan(s))
    return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


# --- the same step, by other ways ---

@pytest.mark.parametrize("steps", [1, 3])                                  # of the pretraining and of the fine-tuning
@pytest.mark.parametrize("model", ["dit", "unet"])
def test_a_step_in_parts_is_the_same_step(tmp_path, model, steps):
    start = trained(small(model), steps)
    whole, parts, other = (gradient(small(model, **more), start, str(tmp_path / "start.pt")) for more in ({}, {"chunk": 4}, {"caption_dropout": 1.0}))
    assert (whole - parts).norm() < 1e-5 * whole.norm()
    assert (whole - other).norm() > 1e-3 * whole.norm()                    # a twin that is another step


def test_a_compiled_network_trains_the_same_weights_from_a_restored_state(tmp_path, monkeypatch):
    """The compiler is a stand-in here that computes what Python would; the gpu preset's test has torch's own."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda network: calls.append(network) or (lambda *x: network(*x)))
    s = small(compile=1)
    run = trained(s, 2)
    run.save(str(tmp_path / "checkpoint.pt"))
    resumed = train.Run(s)
    resumed.restore(train.load(tmp_path / "checkpoint.pt")[1])
    resumed.prepare()
    assert calls == [resumed.model]                                        # once, and only when asked for
    for one in (run, resumed):
        one.begin_finetuning()
        one.train_step(train.make_plan(s))
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), resumed.model.parameters()))
    assert set(resumed.model.state_dict()) == set(train.build(s).state_dict())     # no name of a wrapper in a checkpoint


# --- several processes ---

def log_of(folder, command):
    flags = ["--preset", "tiny", "--device", "cpu", "--chunk", "2", "--pretrain_steps", "6", "--finetune_steps", "6", "--smallest_object", "0.24", "--out", str(folder)]
    done = subprocess.run([*command, str(ROOT / "train.py"), *flags], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with open(folder / "log.csv") as stream:
        return list(csv.DictReader(stream))


def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    """torchrun with gloo on the CPU: the same seed and the same batches, over both phases, with tuples of 2 and 3 views."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    one, two = log_of(tmp_path / "one", [sys.executable]), log_of(tmp_path / "two", torchrun)
    assert [row["step"] for row in one] == [row["step"] for row in two] == ["2", "4", "6", "8", "10", "12"]
    for a, b in zip(one, two):
        for name in ("loss", "grad_norm", "val_loss_macro", "val_error_micro"):
            assert a[name] == b[name] == "" or float(a[name]) == pytest.approx(float(b[name]), rel=1e-4), (a["step"], name)
    assert (tmp_path / "two/report.json").exists()                         # written once, by the first


def test_gradients_are_exchanged_once_a_step(monkeypatch):
    """Parts of a step but the last are under no_sync; a twin without it exchanges at each of them."""
    import contextlib
    seen = []

    class Network(torch.nn.Linear):
        quiet = False

        @contextlib.contextmanager
        def no_sync(self):
            self.quiet = True
            yield
            self.quiet = False

    network = Network(2, 1)
    network.register_full_backward_hook(lambda *_: seen.append(network.quiet))
    parts = [((torch.randn(2, 2),), torch.ones(2) / 6) for _ in range(3)]
    for quiet, exchanges in ((network.no_sync, 1), (contextlib.nullcontext, 3)):
        seen.clear()
        train.sga.deferred_backward(lambda x: network(x).square()[:, 0], parts, quiet)
        assert len(seen) == 3 and seen.count(False) == exchanges and not seen[-1]


# --- no step makes a GPU wait for its host ---

class Waits(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises Waits where a GPU would have to be waited for: a number is read, a size depends on values, a list becomes a tensor."""

    NAMES = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "equal", "lift_fresh", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        masked = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in self.NAMES or masked:
            raise Waits(name)
        return func(*args, **kwargs or {})


def steps_without_waiting(s, monkeypatch):
    run, plan = train.Run(s), train.make_plan(s)
    for step in range(2):                                                  # tables are copied to the device once, at the first use
        run.train_step(plan)
    if run.step == s.pretrain_steps:
        run.begin_finetuning()
    run.train_step(plan)
    def refuse(*_):
        raise Waits("tolist")
    with monkeypatch.context() as patch, NoWaiting():
        patch.setattr(torch.Tensor, "tolist", refuse)
        run.train_step(plan)


@pytest.mark.parametrize("pretrain_steps", [2, 10])
@pytest.mark.parametrize("model, arm", [("dit", "sga"), ("unet", "sga"), ("dit", "global")])
def test_no_step_waits_for_the_gpu(monkeypatch, model, arm, pretrain_steps):
    steps_without_waiting(small(model, arm=arm, pretrain_steps=pretrain_steps, objects=2, pixels=32), monkeypatch)


def tokens_by_text(scenes, granularity):
    return train.toy_data.tokenize(train.toy_data.captions(scenes, [train.GRANULARITIES[g] for g in granularity.tolist()]))


def read_the_norm(*arguments, clip=torch.nn.utils.clip_grad_norm_):
    norm = clip(*arguments)
    return norm if norm.item() > 0 else norm


@pytest.mark.parametrize("where, name, twin", [(train.toy_data, "caption_tokens", tokens_by_text), (torch.nn.utils, "clip_grad_norm_", read_the_norm),
                                               (train.toy_data, "constant", lambda table, device: torch.tensor(table, device=device) if isinstance(table, tuple) else table)])
def test_twins_that_wait_are_noticed(monkeypatch, where, name, twin):
    monkeypatch.setattr(where, name, twin)
    with pytest.raises(Waits):
        steps_without_waiting(small(), monkeypatch)
